"""Turns the token ids of one sequence into text while they are generated, and notices stop strings.

Owns what a user may see of a sequence so far: no half characters, and nothing that might be the beginning of a stop
string. The sum of all that is released equals `Tokenizer.decode` of all ids, up to the stop string. Knows nothing of
scheduling; the engine gives it ids and asks whether `stop_string` is set. The characters themselves come from
`text_stream.py`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from nanovllm.sampling_params import SamplingParams
from nanovllm.tokenizer import Tokenizer


class StopStrings:
    """All stop strings of a request as one automaton (Aho-Corasick), read character by character.

    A state is the longest end of the text that begins some stop string; its depth is therefore the number of
    characters that must be held back. Immutable: the sequences of a request can share one.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._fallback = [0]
        self._completed: list[str | None] = [None]
        self.depth = [0]
        for string in strings:
            self._insert(string)
        self._link()
        self.first_characters = self._next[0].keys()

    def advance(self, state: int, character: str) -> int:
        """The state after one more character."""
        while character not in self._next[state]:
            if state == 0:
                return 0
            state = self._fallback[state]
        return self._next[state][character]

    def completed(self, state: int) -> str | None:
        """The longest stop string that the text ends with in this state."""
        return self._completed[state]

    def _insert(self, string: str) -> None:
        state = 0
        for character in string:
            if character not in self._next[state]:
                self._next[state][character] = len(self._next)
                self._next.append({})
                self._fallback.append(0)
                self._completed.append(None)
                self.depth.append(self.depth[state] + 1)
            state = self._next[state][character]
        self._completed[state] = string

    def _link(self) -> None:
        """Breadth first: the fallback of a state is the state of its text without the first character(s)."""
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            for character, child in self._next[state].items():
                queue.append(child)
                self._fallback[child] = self.advance(self._fallback[state], character)
                if self._completed[child] is None:
                    self._completed[child] = self._completed[self._fallback[child]]


class IncrementalDetokenizer:
    """The text of one sequence. `append` and `finish` return what they newly release.

    Which stop string wins: the one that is complete first, as if the text arrived character by character; of several
    that end with the same character, the longest. So the result depends only on the text, never on how it was cut
    into tokens or appends. A stop string counts only if it is completed by token number `min_tokens` or a later one.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, stop_strings: StopStrings | None = None) -> None:
        """`stop_strings` saves building them again for every sequence of a request; they must be those of `params`."""
        self._stream = tokenizer.text_stream(params.skip_special_tokens)
        self._min_tokens = params.min_tokens
        self._includes_stop = params.include_stop_str_in_output
        self._stops = stop_strings or (StopStrings(params.stop) if params.stop else None)
        self._state = 0
        self._held = ""  # might be the beginning of a stop string; as long as the depth of the state
        self.num_tokens = 0  # appended, up to and including the one that completed a stop string
        self.stop_string: str | None = None

    def append(self, token_ids: Sequence[int]) -> str:
        """Take the next tokens. After a stop string nothing is released any more."""
        stops = self._stops
        if stops is None:
            self.num_tokens += len(token_ids)
            return self._stream.push(token_ids)
        pieces = []
        for token_id in token_ids:  # one by one: which token completed the stop string is part of the answer
            if self.stop_string is not None:
                break
            self.num_tokens += 1
            pieces.append(self._scan(stops, self._stream.push((token_id,))))
        return "".join(pieces)

    def finish(self) -> str:
        """No more tokens will come: release what was held back."""
        if self.stop_string is not None:
            return ""
        rest = self._stream.finish()
        if self._stops is not None:
            rest = self._scan(self._stops, rest)
            rest, self._held = rest + self._held, ""
        return rest

    def _scan(self, stops: StopStrings, text: str) -> str:
        """Read new text; return what can be released, and keep the rest in `_held`."""
        state = self._state
        if state == 0 and stops.first_characters.isdisjoint(text):
            return text  # no stop string begins here, and nothing is held
        may_stop = self.num_tokens >= self._min_tokens
        for index, character in enumerate(text):
            state = stops.advance(state, character)
            completed = stops.completed(state) if may_stop else None
            if completed is not None:
                return self._stop(completed, self._held + text[: index + 1])
        self._state = state
        text = self._held + text
        cut = len(text) - stops.depth[state]
        self._held = text[cut:]
        return text[:cut]

    def _stop(self, stop_string: str, text: str) -> str:
        """`text` ends with the stop string, which began in what was held back or later."""
        self.stop_string = stop_string
        self._held = ""
        return text if self._includes_stop else text[: len(text) - len(stop_string)]
