"""Logprobs: from the engine's positions to the shapes of OpenAI's completions, its chats, and vLLM's prompt_logprobs.

Owns how a token is named: by its text, or as `token_id:123`. A token that is only part of a character has U+FFFD in its
text; `bytes` has what it really is. Knows nothing of requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nanovllm.outputs import PositionLogprobs, TokenLogprob
from nanovllm.sampling_params import SamplingParams
from nanovllm.server.protocol import Candidate, CompletionLogprobs, PromptLogprobs, TokenLogprobs, TopLogprob
from nanovllm.tokenizer import Tokenizer

LOWEST = -9999.0  # JSON has no infinity


class TokenNames:
    """Names of tokens for one answer."""

    def __init__(self, tokenizer: Tokenizer, as_ids: bool, skip_special_tokens: bool) -> None:
        self._spelled = tokenizer.spelled
        self._as_ids = as_ids
        self._open_stream = lambda: tokenizer.text_stream(skip_special_tokens)

    def name(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_ids else self.text(token_id)

    def text(self, token_id: int) -> str:
        return self._spelled(token_id)[0]

    def offsets(self, start: int) -> Callable[[int], int]:
        """A function that is given the tokens of a text one by one, and returns where each begins, in characters."""
        stream, end = self._open_stream(), start

        def offset_of(token_id: int) -> int:
            nonlocal end
            begin, end = end, end + len(stream.push((token_id,)))
            return begin

        return offset_of

    def bytes(self, token_id: int) -> list[int]:
        return self._spelled(token_id)[1]


def completion_logprobs(
    names: TokenNames,
    token_ids: Sequence[int],
    positions: Sequence[PositionLogprobs | None],
    offset_of: Callable[[int], int],
    max_top: int | None = None,
) -> CompletionLogprobs:
    """`offset_of`: see `TokenNames.offsets`. `max_top`: candidates, if fewer than there are.

    A position of None, the first of a prompt, has no log-probability.
    """
    answer = CompletionLogprobs(text_offset=[], token_logprobs=[], tokens=[], top_logprobs=[])
    for token_id, position in zip(token_ids, positions):
        answer.tokens.append(names.name(token_id))
        answer.text_offset.append(offset_of(token_id))
        answer.token_logprobs.append(None if position is None else _finite(position.chosen))
        answer.top_logprobs.append(None if position is None else _top(names, position, max_top))
    return answer


def joined(first: CompletionLogprobs, second: CompletionLogprobs) -> CompletionLogprobs:
    return CompletionLogprobs(
        text_offset=first.text_offset + second.text_offset,
        token_logprobs=first.token_logprobs + second.token_logprobs,
        tokens=first.tokens + second.tokens,
        top_logprobs=first.top_logprobs + second.top_logprobs,
    )


def _top(names: TokenNames, position: PositionLogprobs, max_top: int | None) -> dict[str, float]:
    """Most likely first; of two tokens with one text, the more likely. The token that stands there is always in it."""
    top: dict[str, float] = {}
    for candidate in (*position.top[:max_top], position.chosen):
        top.setdefault(names.name(candidate.token_id), _finite(candidate))
    return top


def chat_logprobs(names: TokenNames, positions: Sequence[PositionLogprobs]) -> list[TokenLogprobs]:
    return [
        TokenLogprobs(
            token=names.name(position.chosen.token_id),
            logprob=_finite(position.chosen),
            bytes=names.bytes(position.chosen.token_id),
            top_logprobs=[
                TopLogprob(token=names.name(one.token_id), logprob=_finite(one), bytes=names.bytes(one.token_id))
                for one in position.top
            ],
        )
        for position in positions
    ]


def prompt_logprobs(
    names: TokenNames, positions: Sequence[PositionLogprobs | None] | None, max_top: int
) -> PromptLogprobs | None:
    """Token id -> candidate, for each prompt token."""
    if positions is None:
        return None
    return [None if position is None else _candidates(names, position, max_top) for position in positions]


def _candidates(names: TokenNames, position: PositionLogprobs, max_top: int) -> dict[str, Candidate]:
    return {
        str(one.token_id): Candidate(logprob=_finite(one), rank=one.rank, decoded_token=names.text(one.token_id))
        for one in (position.chosen, *position.top[:max_top])
    }


def _finite(candidate: TokenLogprob) -> float:
    return max(candidate.logprob, LOWEST)


def num_candidates(params: SamplingParams, room: int) -> int:
    """Log-probabilities that the completions of one prompt may have, if each gets `max_tokens` or fills `room`."""
    return 0 if params.logprobs is None else params.n * min(params.max_tokens or room, room) * (params.logprobs + 1)


def num_prompt_candidates(num_tokens: int, params: SamplingParams) -> int:
    return 0 if params.prompt_logprobs is None else num_tokens * (params.prompt_logprobs + 1)
