"""Grammars by llguidance: an Earley parser over a lexer of derivatives, which needs no compilation worth the name.

Owns the translation of `StructuredOutput` into its languages, its limits, and how it sees a vocabulary. Bytes of the
tokens come from our own tokenizer, so that a grammar and the text that a user receives cannot disagree. Compiling takes
about a millisecond, a mask ten microseconds to a few milliseconds (docs/structured-output.md has the measurements). It
is an optional extra: it is imported when the first request with a grammar comes. Knows nothing of sequences.
"""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from nanovllm.errors import InvalidGrammar
from nanovllm.log import logger
from nanovllm.sampling_params import StructuredOutput
from nanovllm.structured.after_mark import AfterMark, MarkMasks
from nanovllm.structured.base import BITS, Matcher, num_mask_words
from nanovllm.structured.limits import check_limits
from nanovllm.structured.mask_budget import MaskBudget
from nanovllm.structured.mask_threads import mask_threads
from nanovllm.structured.native_tokenizer import looks_special, native_tokenizer
from nanovllm.tokenizer import Tokenizer

MAX_LEXER_STATES = 50_000  # of one sequence, 1 to 2 kB each
MAX_COMPILE_SECONDS = 0.5  # of processor time, the first mask included
MAX_SECONDS_AGAIN = 0.02  # of a compilation that the engine may repeat between two steps, the first mask included
MAX_COMPILED = 64  # grammars kept for the next request with the same one
MAX_STRANDS = 512  # compiled copies of all of them: one that is written to hurt can learn 60 MB of states
STRANDS_PER_THREAD = 2
MAX_MARKS = 8  # whose masks are kept; a server has one or two
MAX_MESSAGE_LENGTH = 400  # characters of a compiler's message
# Between the parts of a JSON text. Without a limit small models write newlines until their tokens are used up.
JSON_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,32}"


MIN_TOGETHER = 4  # masks; below, waking threads costs more than it saves
MASKS_PER_SAMPLE = 32
FEW_WORDS = 16  # of a mask, a line of the processor's cache: single bytes are among the first tokens


class LLGuidanceMatcher:
    def __init__(
        self,
        inner: Any,
        end_token_ids: Sequence[int],
        can_end_early: bool,
        budget: MaskBudget,
        strand: LLGuidanceMatcher | None = None,
    ) -> None:
        """`strand`: the compiled one that this is a copy of. They share what they learn, and the limits of it."""
        self.error: str | None = None
        self.is_worn = False  # as a strand: what was learnt has come to a limit, and no copy goes on
        self.compile_again: Callable[[], Any] | None = None  # as a strand: where it takes no time to speak of
        self._strand = strand or self
        self._accepted: list[int] = []
        self._is_complete = False
        self._inner = inner
        self._end_token_ids = end_token_ids
        self._end_bits = [(token_id // BITS, np.uint32(1 << token_id % BITS).view(np.int32)) for token_id in end_token_ids]
        self._can_end_early = can_end_early
        self._budget = budget

    def fork(self, can_end_early: bool, budget: MaskBudget) -> LLGuidanceMatcher:
        """The same place, to go on independently."""
        return LLGuidanceMatcher(self._inner.deep_copy(), self._end_token_ids, can_end_early, budget, self._strand)

    def give_up(self) -> None:
        self._fail("it is too ambiguous: finding the next tokens takes too long")

    def fill_mask(self, mask: np.ndarray) -> None:
        self._budget.charge(self, self._compute_mask(mask))
        self._finish_mask(mask)

    def _compute_mask(self, mask: np.ndarray) -> float:
        """Returns the seconds of processor time that it took."""
        started = time.thread_time()
        try:
            if not self._is_over:
                self._inner.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        except BaseException as error:  # also a panic, which is no Exception: it ends a sequence, not the engine
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            self._strand.is_worn = True
            self._fail(f"the grammar engine failed: {error!r}")
        return time.thread_time() - started

    @staticmethod
    def begin_together(matchers: Sequence[LLGuidanceMatcher], masks: np.ndarray) -> Callable[[], None]:
        """Begin `fill_mask` of each, in threads of the library, which do not take turns for Python's lock as ours would.

        What one of them takes is then not known. Once all have taken longer than one may, a few are filled alone for some
        steps, drawn by lot each time, and pay for all. The masks are there when the function that is returned has been called.
        """
        num_matchers, budget = len(matchers), matchers[0]._budget
        if num_matchers < MIN_TOGETHER or budget.num_threads == 1:
            for matcher, mask in zip(matchers, masks):
                matcher.fill_mask(mask)
            return lambda: None
        num_alone = -(-num_matchers // MASKS_PER_SAMPLE)
        lots = budget.draw_lots(num_matchers, num_alone)
        over = {i for i, matcher in enumerate(matchers) if matcher._is_over}
        apart = over | lots
        running = [(matcher._inner, i) for i, matcher in enumerate(matchers) if i not in apart]
        wait = mask_threads(budget.num_threads).begin(running, masks, budget.clock)
        alone = {i: matchers[i]._compute_mask(masks[i]) for i in lots}

        def finish() -> None:
            try:
                budget.note_together(len(running), max(wait(), sum(alone.values())))
            except BaseException as error:  # find out which
                if isinstance(error, (KeyboardInterrupt, SystemExit)):
                    raise
                for _, i in running:
                    matchers[i].fill_mask(masks[i])
            for i, seconds in alone.items():
                budget.charge(matchers[i], seconds, num_matchers / num_alone)
            for i in over.union(_unfinished(matchers, masks)):
                matchers[i]._finish_mask(masks[i])

        return finish

    @property
    def _is_over(self) -> bool:
        """A step in flight may still draw for it; nobody reads that token."""
        return self._is_complete or self.error is not None

    def _finish_mask(self, mask: np.ndarray) -> None:
        if not self._is_over:
            if self._inner.is_error() and self._goes_on_alone():
                mask.fill(0)
                self._budget.charge(self, self._compute_mask(mask))
            if self._inner.is_error():
                self._fail(_first_part(self._inner.get_error()))
            elif not mask.any():
                self._fail("no token fits here")
        if self._is_over:  # what is drawn, and then refused or not read, is no text
            mask.fill(0)
            self._add_ends(mask)
        elif not self._can_end_early:
            self._drop_ends(mask)

    def accept(self, token_id: int) -> str | None:
        if self.error is not None:
            return "error"
        inner = self._inner
        if token_id in self._end_token_ids and inner.is_accepting():
            self._is_complete = True
        elif inner.consume_token(token_id) or (self._goes_on_alone() and self._inner.consume_token(token_id)):
            self._accepted.append(token_id)
            self._is_complete = self._inner.is_stopped()
        else:
            self._fail(_first_part(self._inner.get_error()))
            return "error"
        return "stop" if self._is_complete else None

    def _goes_on_alone(self) -> bool:
        """What the copies of one compilation have learnt is at its limit: in a compilation of its own, once, there is room."""
        strand, self._strand = self._strand, self
        strand.is_worn = True
        if strand is self or strand.compile_again is None:
            return False
        with suppress(InvalidGrammar):
            inner = strand.compile_again()
            if all(map(inner.consume_token, self._accepted)):
                self._inner = inner
        return not self._inner.is_error()

    def _fail(self, message: str) -> None:
        self.error = self.error or message

    def _add_ends(self, mask: np.ndarray) -> None:
        for word, bit in self._end_bits:
            mask[word] |= bit

    def _drop_ends(self, mask: np.ndarray) -> None:
        """Unless nothing else is possible."""
        present = [(word, bit) for word, bit in self._end_bits if mask[word] & bit]
        for word, bit in present:
            mask[word] &= ~bit
        if present and not mask.any():
            for word, bit in present:
                mask[word] |= bit


def _unfinished(matchers: Sequence[LLGuidanceMatcher], masks: np.ndarray) -> list[int]:
    """Lines that `_finish_mask` may change: where nothing is allowed, or an end that should not be."""
    is_odd = np.logical_not(masks[:, :FEW_WORDS].any(axis=1))
    if not all(matcher._can_end_early for matcher in matchers):
        for word, bit in matchers[0]._end_bits:  # of the model
            is_odd |= (masks[:, word] & bit) != 0
    return np.flatnonzero(is_odd).tolist()


class LLGuidanceGrammar:
    """Of one model: its vocabulary, and the tokens that end a text."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_token_ids: Sequence[int], num_threads: int = 1) -> None:
        """`num_threads`: that compute the masks of one step."""
        self._marks: dict[tuple[str, str | None], MarkMasks] = {}
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._end_token_ids = tuple(end_token_ids)
        self._compiled: OrderedDict[StructuredOutput, list[LLGuidanceMatcher]] = OrderedDict()  # strands, next first
        self._is_prepared = False
        self._lock = threading.Lock()  # of `_compiled`; nobody compiles under it
        self._budget = MaskBudget(num_threads=num_threads)

    def compile(self, structured: StructuredOutput, can_end_early: bool = True) -> Matcher:
        """Raises `InvalidGrammar`, with the compiler's words. Threads may call it; most of a compilation lets others run."""
        if structured.after is not None:
            return self._compile_after_mark(structured, structured.after, can_end_early)
        strands = self._strands(structured, may_add=not self._is_prepared)
        with self._lock:
            strands.append(strands.pop(0))
            return strands[-1].fork(can_end_early, self._budget)

    def prepare(self, structured: StructuredOutput) -> None:
        """From the first time on `compile` compiles only what is not there: whoever prepares adds the copies for threads."""
        self._is_prepared = True
        _ = self._vocabulary  # some grammars need it, whatever the others use
        self._strands(replace(structured, after=None, opened_by=None), may_add=True)
        self.compile(structured)  # the masks of its mark

    def _strands(self, structured: StructuredOutput, may_add: bool) -> list[LLGuidanceMatcher]:
        """One at least, and one more each time until there are enough.

        Matchers of one strand wait for each other, because they share what they learn.
        """
        with self._lock:
            strands = [strand for strand in self._compiled.get(structured, []) if not strand.is_worn]
            is_enough = len(strands) >= self._num_wanted
        fresh = []
        if not strands or (may_add and not is_enough):
            try:
                check_limits(structured)
                fresh.append(self._compile(structured))
            except InvalidGrammar:
                if not strands:  # else it compiles, if not always in time
                    raise
        with self._lock:
            kept = [strand for strand in self._compiled.get(structured, strands) if not strand.is_worn]
            strands = self._compiled[structured] = [*fresh, *kept] or strands
            self._compiled.move_to_end(structured)
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
            for others in self._compiled.values():
                del others[self._num_wanted :]
            return strands

    @property
    def _num_wanted(self) -> int:
        """Strands of a grammar, so that two threads seldom meet at one, and a fair share of all. Call it under the lock."""
        num_threads = self._budget.num_threads
        fair = MAX_STRANDS // max(len(self._compiled), 1)
        return 1 if num_threads == 1 else max(1, min(STRANDS_PER_THREAD * num_threads, fair))

    def _compile_after_mark(self, structured: StructuredOutput, after: str, can_end_early: bool) -> AfterMark:
        plain, key = replace(structured, after=None, opened_by=None), (after, structured.opened_by)
        inner = self.compile(plain, can_end_early)
        at_once = None if structured.opened_by is None else self.compile(plain, can_end_early)
        masks = self._marks.get(key) or MarkMasks(self._view.tokens, self._end_token_ids, *key)
        self._marks = {**dict(list(self._marks.items())[1 - MAX_MARKS :]), key: masks}  # other threads may read it
        return AfterMark(inner, masks, at_once)

    def _compile(self, structured: StructuredOutput) -> LLGuidanceMatcher:
        vocabulary = self._vocabulary_for(structured)
        started = time.thread_time()
        inner, used = None, vocabulary
        if vocabulary is self._native_vocabulary:
            with suppress(InvalidGrammar):
                inner = self._parse(structured, vocabulary)
        if inner is None:
            used = self._vocabulary  # in whose message special tokens have their own names
            inner = self._parse(structured, used)
        unused = MaskBudget()  # this mask counts as compilation
        matcher = LLGuidanceMatcher(inner, self._end_token_ids, True, unused)
        first = matcher.fork(True, unused)
        first.fill_mask(np.zeros(num_mask_words(self._vocab_size), dtype=np.int32))
        if first.error is not None:
            raise InvalidGrammar(f"{structured.kind}: {first.error}")
        seconds = time.thread_time() - started
        if seconds > MAX_COMPILE_SECONDS:
            raise InvalidGrammar(f"{structured.kind}: it takes longer than {MAX_COMPILE_SECONDS:g} seconds to compile")
        if seconds < MAX_SECONDS_AGAIN:
            matcher.compile_again = partial(self._parse, structured, used)
        return matcher

    def _parse(self, structured: StructuredOutput, vocabulary: Any) -> Any:
        library = self._library
        limits = library.LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
        try:
            inner = library.LLMatcher(vocabulary, _translate(structured, library), log_level=0, limits=limits)
        except Exception as error:
            raise InvalidGrammar(f"{structured.kind}: {_first_part(str(error))}") from None
        if inner.is_error():
            raise InvalidGrammar(f"{structured.kind}: {_first_part(inner.get_error())}")
        return inner

    @cached_property
    def _library(self) -> Any:
        try:
            import llguidance
        except ImportError:
            raise InvalidGrammar("structured output needs llguidance: pip install 'nanovllm[grammar]'") from None
        return llguidance

    @cached_property
    def _view(self) -> _VocabularyView:
        if not self._end_token_ids:
            raise InvalidGrammar("structured output needs a model with a token that ends a text")
        return _VocabularyView(self._tokenizer, self._vocab_size, self._end_token_ids)

    def _vocabulary_for(self, structured: StructuredOutput) -> Any:
        """Only the one by Python knows special tokens by name, which a grammar may call for, and writes `<tool_call>` as one."""
        if self._native_vocabulary is None:
            return self._vocabulary
        added = self._tokenizer.parts.backend.get_added_tokens_decoder().values()
        spellings = [token.content for token in added if token.special or looks_special(token.content)]
        texts = structured.choices or (structured.text,)
        is_ours = any(spelling in text for text in texts for spelling in spellings)
        return self._vocabulary if is_ours else self._native_vocabulary

    @cached_property
    def _native_vocabulary(self) -> Any | None:
        """For threads, which need not wait for Python's lock then. Two seconds for 150,000 tokens."""
        if self._budget.num_threads == 1:
            return None
        native = native_tokenizer(self._library, self._tokenizer.to_json(), self._view, self._end_token_ids)
        if native is None:
            logger.info("grammars: llguidance's own tokenizer differs from this model's; large batches of grammars are slower")
        return native

    @cached_property
    def _vocabulary(self) -> Any:
        """A tenth of a second for 49,000 tokens."""
        wrapper = self._library.TokenizerWrapper(self._view)
        return self._library.LLTokenizer(wrapper, n_vocab=self._vocab_size, eos_token=list(self._end_token_ids))


class _VocabularyView:
    """What llguidance's TokenizerWrapper reads. Special tokens are listed, so that no text can spell them."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_token_ids: Sequence[int]) -> None:
        self.bos_token_id = tokenizer.bos_token_id
        self.eos_token_id = end_token_ids[0]
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in range(vocab_size)]
        special = {*tokenizer.special_token_ids, *end_token_ids}
        self.special_token_ids = sorted(token_id for token_id in special if token_id < vocab_size)
        self._special = set(self.special_token_ids)
        self.encode = tokenizer.encode_literally

    def __call__(self, text: bytes | str) -> list[int]:
        """Where only one text is possible, the model gets the tokens that it would have been trained on.

        If they write that text: some tokenizers change it, to a normal form of Unicode say, and forget how it was.
        """
        text = text if isinstance(text, str) else text.decode()
        token_ids = self.encode(text)
        return token_ids if self.writes(token_ids, text) else self._encode_anyhow(text.encode())

    def _encode_anyhow(self, text: bytes) -> list[int]:
        """In the longest tokens that fit, up to where none does."""
        # Not by the library's own `greedy_tokenize`: it holds this object, and the circle would never be collected.
        token_ids, start = [], 0
        while start < len(text):
            ends = range(min(len(text), start + self._longest), start, -1)
            end = next((end for end in ends if text[start:end] in self._ids_of_bytes), None)
            if end is None:
                break
            token_ids.append(self._ids_of_bytes[text[start:end]])
            start = end
        return token_ids

    @cached_property
    def _ids_of_bytes(self) -> dict[bytes, int]:
        ordinary = (token_id for token_id in range(len(self.tokens) - 1, -1, -1) if token_id not in self._special)
        return {self.tokens[token_id]: token_id for token_id in ordinary if self.tokens[token_id]}

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._ids_of_bytes))

    def writes(self, token_ids: Sequence[int], text: str) -> bool:
        if not self._special.isdisjoint(token_ids):
            return False
        return b"".join([self.tokens[token_id] for token_id in token_ids]) == text.encode()


def _translate(structured: StructuredOutput, library: Any) -> str:
    """llguidance's own notation."""
    matcher = library.LLMatcher
    if structured.kind == "regex":
        return matcher.grammar_from_regex(structured.text)
    if structured.kind == "choice":
        return matcher.grammar_from_lark("start: " + " | ".join(json.dumps(c, ensure_ascii=False) for c in structured.choices))
    if structured.kind == "grammar":
        return library.grammar_from("grammar", structured.text)
    schema = structured.text if structured.kind == "json_schema" else '{"type": "object"}'
    # A schema may carry options of llguidance, "x-guidance". Not this one: a lenient compiler ignores what it does not know.
    options = _options_of(schema)
    defaults = {} if any(name.startswith("whitespace") for name in options) else {"whitespace_pattern": JSON_WHITESPACE}
    return matcher.grammar_from_json_schema(schema, defaults=defaults, overrides={"lenient": False})


def _options_of(schema: str) -> Mapping[str, Any]:
    try:
        options = json.loads(schema)["x-guidance"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return {}
    return options if isinstance(options, dict) else {}


def _first_part(message: str) -> str:
    """Without llguidance's dump of its state."""
    text = message.split("\n<state>")[0].split("\n<non-verbose/>")[0].strip()
    if text == "NoExtensionBias":
        return "no text satisfies it"
    return text if len(text) <= MAX_MESSAGE_LENGTH else text[:MAX_MESSAGE_LENGTH] + " ..."
