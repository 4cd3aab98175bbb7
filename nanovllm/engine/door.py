"""Door: everything that a user can get wrong about a request, refused before the loop sees it.

Turns one call into its sequences. Knows the limits of the model and of the cache; changes nothing when it refuses.
"""

from __future__ import annotations

import random
from collections.abc import Sequence as AbstractSequence
from itertools import count

from nanovllm.engine.batch import RowSampling
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.sequence import Sequence
from nanovllm.errors import CacheTooSmall, InvalidGrammar, InvalidPrompt, InvalidSamplingParams, PromptTooLong, RequestError
from nanovllm.sampling_params import SamplingParams
from nanovllm.structured.base import Grammar, Matcher
from nanovllm.tokenizer import Tokenizer

Prompt = str | AbstractSequence[int]
POOLINGS = ("mean", "last")


class Door:
    def __init__(
        self,
        block_manager: BlockManager,
        tokenizer: Tokenizer | None,
        vocab_size: int,
        max_model_len: int,
        eos_token_ids: AbstractSequence[int],
        seed: int,
        grammar: Grammar | None = None,
    ) -> None:
        self._blocks = block_manager
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._eos_token_ids = tuple(eos_token_ids)
        self._grammar = grammar
        self._seq_ids = count()
        self._seeds = random.Random(seed)

    def make_sequences(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams | None,
        priority: int,
        cache_salt: str,
        now: float,
        pooling: str | None = None,
    ) -> list[Sequence]:
        """The n sequences of a request. Raises `RequestError` or `CapacityError`."""
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
        limit = self._longest_sequence
        max_num_tokens = limit if params.max_tokens is None else min(limit, len(token_ids) + params.max_tokens)
        matchers = self._compile(params)
        seed = self._seeds.getrandbits(64) if params.seed is None else params.seed % 2**64
        sequences: list[Sequence] = []
        for index in range(params.n):
            sampling = self._row_sampling(params, (seed + index) % 2**64, len(token_ids), pooling)
            sequence = Sequence(
                seq_id=next(self._seq_ids),
                request_id=request_id,
                index=index,
                num_prompt_tokens=len(token_ids),
                max_num_tokens=max_num_tokens,
                sampling=sampling,
                stop_token_ids=frozenset(sampling.stop_token_ids),
                priority=priority,
                cache_salt=cache_salt,
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

    def _row_sampling(self, params: SamplingParams, seed: int, num_prompt_tokens: int, pooling: str | None) -> RowSampling:
        stop_token_ids = (() if params.ignore_eos else self._eos_token_ids) + tuple(params.stop_token_ids)
        spellings = [tuple(ids) for word in params.bad_words for ids in self._tokenizer.token_ids_of_word(word)]  # type: ignore[union-attr]
        bad_words = tuple(ids for ids in spellings if max(ids) < self._vocab_size)
        return RowSampling(params, seed, stop_token_ids, bad_words, num_prompt_tokens, pooling)

    @property
    def _longest_sequence(self) -> int:
        """Tokens that one sequence can have when it is alone."""
        blocks = self._blocks
        return min(self._max_model_len, blocks.num_blocks * blocks.block_size)

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
        if min(token_ids) < 0 or max(token_ids) >= self._vocab_size:
            raise InvalidPrompt(f"token ids must be from 0 to {self._vocab_size - 1}, got {min(token_ids)} to {max(token_ids)}")
        return token_ids

    def _check_fits(self, num_prompt_tokens: int) -> None:
        if num_prompt_tokens >= self._max_model_len:
            raise PromptTooLong(
                f"the prompt has {num_prompt_tokens} tokens; with at least one generated token it must fit into "
                f"max_model_len={self._max_model_len}"
            )
        blocks = self._blocks
        if blocks.num_blocks_for(num_prompt_tokens + 1) > blocks.num_blocks:
            raise CacheTooSmall(
                f"the prompt has {num_prompt_tokens} tokens; the KV cache holds {blocks.num_blocks * blocks.block_size} "
                "in all; give it more memory (kv_cache_memory_bytes) or shorten the prompt"
            )

    def _check_params(self, params: SamplingParams, num_prompt_tokens: int) -> None:
        room = self._longest_sequence - num_prompt_tokens
        if params.min_tokens > room:
            raise InvalidSamplingParams(f"min_tokens={params.min_tokens}: after this prompt there is room for {room} tokens")
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            for token_id in getattr(params, name) or ():
                if token_id >= self._vocab_size:
                    raise InvalidSamplingParams(f"{name}: token id {token_id} is not in the vocabulary of {self._vocab_size}")
        if self._tokenizer is None and (params.stop or params.bad_words):
            raise InvalidSamplingParams("stop and bad_words need a tokenizer, and the engine has none")


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
