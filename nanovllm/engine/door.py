"""Door: everything that a user can get wrong about a request, refused before the loop sees it.

`Door.check` needs numbers (`Bounds`) and a tokenizer, but no engine: a front end in another process runs it before it
sends anything, and the engine runs it again, because it trusts nobody. `make_sequences` is the engine's half. Changes
nothing when it refuses.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence as AbstractSequence
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

from nanovllm.engine.batch import RowSampling
from nanovllm.engine.sequence import Sequence
from nanovllm.errors import CacheTooSmall, InvalidGrammar, InvalidPrompt, InvalidSamplingParams, PromptTooLong, RequestError
from nanovllm.sampling_params import SamplingParams
from nanovllm.structured.base import Grammar, Matcher
from nanovllm.tokenizer import Tokenizer

Prompt = str | AbstractSequence[int]
POOLINGS = ("mean", "last")


TokenSequences = AbstractSequence[AbstractSequence[int]]


@dataclass(frozen=True, slots=True)
class Bounds:
    """What every request must fit into."""

    vocab_size: int
    max_model_len: int  # tokens of prompt and output together
    num_blocks: int  # of the whole KV cache
    block_size: int  # tokens

    @property
    def num_slots(self) -> int:
        return self.num_blocks * self.block_size

    @property
    def longest_sequence(self) -> int:
        """Tokens that one sequence can have when it is alone."""
        return min(self.max_model_len, self.num_slots)


class CheckedRequest(NamedTuple):
    """What the engine may rely on."""

    token_ids: list[int]
    params: SamplingParams
    bad_words: tuple[tuple[int, ...], ...]  # every spelling of `params.bad_words`, and those that were given as ids
    priority: int
    cache_salt: str
    pooling: str | None = None  # "mean", "last": the answer is the prompt's vector


class Door:
    def __init__(
        self,
        bounds: Bounds,
        tokenizer: Tokenizer | None,
        eos_token_ids: AbstractSequence[int] = (),
        seed: int = 0,
        grammar: Grammar | None = None,
    ) -> None:
        self._bounds = bounds
        self._tokenizer = tokenizer
        self._eos_token_ids = tuple(eos_token_ids)
        self._grammar = grammar
        self._seq_ids = count()
        self._seeds = random.Random(seed)

    def check(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        priority: int,
        cache_salt: str,
        bad_words: TokenSequences = (),
        pooling: str | None = None,
    ) -> CheckedRequest:
        """Raises `RequestError` or `CapacityError`. `bad_words`: spellings in token ids, beside those in `params`."""
        if pooling is not None:
            params = _check_pooling(pooling, params)
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise InvalidSamplingParams(f"params must be SamplingParams, got {type(params).__name__}")
        if isinstance(priority, bool) or not isinstance(priority, int):
            raise RequestError(f"priority must be a whole number, got {priority!r}")
        if not isinstance(cache_salt, str) or not _is_text(cache_salt):
            raise RequestError(f"cache_salt must be a string, got {cache_salt!r}")
        token_ids = self._token_ids_of(prompt)
        self._check_fits(len(token_ids))
        self._check_params(params, len(token_ids))
        return CheckedRequest(token_ids, params, self._spellings_of(params, bad_words), priority, cache_salt, pooling)

    def make_sequences(self, request_id: str, request: CheckedRequest, now: float) -> list[Sequence]:
        """The n sequences of a request. Raises `InvalidGrammar`."""
        token_ids, params = request.token_ids, request.params
        limit = self._bounds.longest_sequence
        max_num_tokens = limit if params.max_tokens is None else min(limit, len(token_ids) + params.max_tokens)
        matchers = self._compile(params)
        stop_token_ids = (() if params.ignore_eos else self._eos_token_ids) + tuple(params.stop_token_ids)
        seed = self._seeds.getrandbits(64) if params.seed is None else params.seed
        sequences: list[Sequence] = []
        for index in range(params.n):
            own_seed = (seed + index) % 2**64
            sampling = RowSampling(params, own_seed, stop_token_ids, request.bad_words, len(token_ids), request.pooling)
            sequence = Sequence(
                seq_id=next(self._seq_ids),
                request_id=request_id,
                index=index,
                num_prompt_tokens=len(token_ids),
                max_num_tokens=max_num_tokens,
                sampling=sampling,
                stop_token_ids=frozenset(stop_token_ids),
                priority=request.priority,
                cache_salt=request.cache_salt,
                arrival_time=now,
                sibling=sequences[0] if sequences else None,
                matcher=matchers[index],
                token_ids=list(token_ids),
            )
            sequences.append(sequence)
        return sequences

    def _compile(self, params: SamplingParams) -> list[Matcher] | list[None]:
        """A matcher for each of the n sequences. Raises `InvalidGrammar`."""
        if params.structured is None:
            return [None] * params.n
        if self._grammar is None:
            raise InvalidGrammar("structured output needs a grammar engine, and this engine was built without one")
        return [self._grammar.compile(params.structured, can_end_early=not params.ignore_eos) for _ in range(params.n)]

    def _spellings_of(self, params: SamplingParams, bad_words: TokenSequences) -> tuple[tuple[int, ...], ...]:
        for token_ids in bad_words:
            if not token_ids:
                raise InvalidSamplingParams("bad_words: a spelling has no token ids")
            self._check_ids("bad_words", token_ids)
        words = [ids for word in params.bad_words for ids in self._tokenizer.token_ids_of_word(word)]  # type: ignore[union-attr]
        known = [tuple(ids) for ids in words if max(ids) < self._bounds.vocab_size]
        return (*map(tuple, bad_words), *known)

    def _token_ids_of(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            if not _is_text(prompt):
                raise InvalidPrompt("the prompt has half of a surrogate pair, which is not a character")
            if self._tokenizer is None:
                raise InvalidPrompt("the engine has no tokenizer: prompts must be token ids")
            if not prompt:
                raise InvalidPrompt("the prompt is empty")
            token_ids = self._tokenizer.encode(prompt)
        elif isinstance(prompt, AbstractSequence) and not isinstance(prompt, (bytes, bytearray)):
            token_ids = list(prompt)
        else:
            raise InvalidPrompt(f"a prompt is a string or a list of token ids, got {type(prompt).__name__}")
        if not token_ids:
            raise InvalidPrompt("the prompt has no tokens")
        if set(map(type, token_ids)) != {int}:
            wrong = next(token_id for token_id in token_ids if type(token_id) is not int)
            raise InvalidPrompt(f"a prompt must hold token ids (whole numbers), got {wrong!r}")
        vocab_size = self._bounds.vocab_size
        if min(token_ids) < 0 or max(token_ids) >= vocab_size:
            raise InvalidPrompt(f"token ids must be from 0 to {vocab_size - 1}, got {min(token_ids)} to {max(token_ids)}")
        return token_ids

    def _check_fits(self, num_prompt_tokens: int) -> None:
        bounds = self._bounds
        if num_prompt_tokens >= bounds.max_model_len:
            raise PromptTooLong(
                f"the prompt has {num_prompt_tokens} tokens; with at least one generated token it must fit into "
                f"max_model_len={bounds.max_model_len}"
            )
        if num_prompt_tokens + 1 > bounds.num_slots:
            raise CacheTooSmall(
                f"the prompt has {num_prompt_tokens} tokens; the KV cache holds {bounds.num_slots} "
                "in all; give it more memory (kv_cache_memory_bytes) or shorten the prompt"
            )

    def _check_params(self, params: SamplingParams, num_prompt_tokens: int) -> None:
        room = self._bounds.longest_sequence - num_prompt_tokens
        if params.min_tokens > room:
            raise InvalidSamplingParams(f"min_tokens={params.min_tokens}: after this prompt there is room for {room} tokens")
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            self._check_ids(name, getattr(params, name) or ())
        if self._tokenizer is None and (params.stop or params.bad_words):
            raise InvalidSamplingParams("stop and bad_words need a tokenizer, and the engine has none")

    def _check_ids(self, name: str, token_ids: Iterable[int]) -> None:
        for token_id in token_ids:
            if not 0 <= token_id < self._bounds.vocab_size:
                vocab_size = self._bounds.vocab_size
                raise InvalidSamplingParams(f"{name}: token id {token_id} is not in the vocabulary of {vocab_size}")


def _check_pooling(pooling: str, params: SamplingParams | None) -> SamplingParams:
    """A prompt's vector comes with its first token, which nobody reads: the loop needs no second kind of ending."""
    if pooling not in POOLINGS:
        raise RequestError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
    if params is not None:
        raise InvalidSamplingParams("a request for an embedding takes no sampling params: nothing is generated")
    return SamplingParams(temperature=0, max_tokens=1)


def _is_text(string: str) -> bool:
    """False for lone surrogates, which no encoder takes."""
    try:
        string.encode()
    except UnicodeEncodeError:
        return False
    return True
