"""LLMEngine: the driving loop. Requests in at the door, steps in the middle, outputs out.

One step is: schedule a batch, dispatch it, and, once `num_steps_ahead` further steps are in flight, collect the oldest
result and apply it. With one step ahead the device computes step N + 1 while the host is busy with the tokens of
step N. Everything that a user can get wrong is refused in `add_request`, before the loop sees it.

Knows requests and text; does not know tensors or listeners. Read next: `model_runner.py`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence as AbstractSequence
from itertools import count
from typing import Any

from tqdm import tqdm

from nanovllm.engine.batch import RowSampling
from nanovllm.engine.events import Events, RequestAdded, StepCollected, StepDispatched
from nanovllm.engine.request import Request
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.errors import CacheTooSmall, EngineDead, InvalidPrompt, InvalidSamplingParams, PromptTooLong, RequestError
from nanovllm.executor.base import Executor
from nanovllm.outputs import GenerationOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.tokenizer import Tokenizer

Prompt = str | AbstractSequence[int]


class LLMEngine:
    """Single control plane over a scheduler and an executor. Not thread-safe: one thread drives it."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        *,
        vocab_size: int,
        max_model_len: int,
        tokenizer: Tokenizer | None = None,
        eos_token_ids: AbstractSequence[int] = (),
        num_steps_ahead: int = 1,
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.events: Events = scheduler.events
        self._eos_token_ids = tuple(eos_token_ids)
        self._num_steps_ahead = num_steps_ahead
        self._requests: dict[str, Request] = {}
        self._request_numbers = count()
        self._seq_ids = count()
        self._seeds = random.Random(seed)
        self._clock = clock
        self._failure: BaseException | None = None

    # --- the door

    def add_request(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
    ) -> str:
        """Queue one request; returns its id. Raises `RequestError` or `CapacityError`, and then nothing has changed.

        `cache_salt`: requests share cached prefixes only with requests of the same salt. `priority`: smaller is more
        urgent; needs `scheduling_policy="priority"` to have an effect on order.
        """
        self._check_alive()
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise InvalidSamplingParams(f"params must be SamplingParams, got {type(params).__name__}")
        if isinstance(priority, bool) or not isinstance(priority, int):
            raise RequestError(f"priority must be a whole number, got {priority!r}")
        if not isinstance(cache_salt, str):
            raise RequestError(f"cache_salt must be a string, got {cache_salt!r}")
        token_ids = self._token_ids_of(prompt)
        self._check_fits(len(token_ids))
        self._check_params(params)
        request_id = f"request-{next(self._request_numbers)}" if request_id is None else request_id
        if request_id in self._requests:
            raise RequestError(f"request_id {request_id!r} is already in use by an unfinished request")
        sequences = self._make_sequences(request_id, token_ids, params, priority, cache_salt)
        self._requests[request_id] = Request.begin(sequences, prompt if isinstance(prompt, str) else None, self.tokenizer)
        self.scheduler.add(sequences)
        if self.events.listeners:
            self.events.emit(RequestAdded(sequences[0].arrival_time, request_id, len(token_ids), len(sequences)))
        return request_id

    def output_of(self, request_id: str) -> GenerationOutput:
        """The live output of an unfinished request. Raises KeyError for others."""
        return self._requests[request_id].output

    def abort(self, request_id: str) -> GenerationOutput | None:
        """End a request in whatever state it is. Returns what it has so far; None when it is unknown or finished."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        for sequence in request.sequences:
            self.scheduler.finish(sequence, "abort")
        self._close_finished()
        return request.output

    def _token_ids_of(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InvalidPrompt("the engine has no tokenizer: prompts must be token ids")
            if not prompt:
                raise InvalidPrompt("the prompt is empty")
            token_ids = self.tokenizer.encode(prompt)
        elif isinstance(prompt, AbstractSequence) and not isinstance(prompt, (bytes, bytearray)):
            token_ids = list(prompt)
        else:
            raise InvalidPrompt(f"a prompt is a string or a list of token ids, got {type(prompt).__name__}")
        if not token_ids:
            raise InvalidPrompt("the prompt has no tokens")
        if set(map(type, token_ids)) != {int}:
            wrong = next(token_id for token_id in token_ids if type(token_id) is not int)
            raise InvalidPrompt(f"a prompt must hold token ids (whole numbers), got {wrong!r}")
        if min(token_ids) < 0 or max(token_ids) >= self.vocab_size:
            raise InvalidPrompt(f"token ids must be from 0 to {self.vocab_size - 1}, got {min(token_ids)} to {max(token_ids)}")
        return token_ids

    def _check_fits(self, num_prompt_tokens: int) -> None:
        if num_prompt_tokens >= self.max_model_len:
            raise PromptTooLong(
                f"the prompt has {num_prompt_tokens} tokens; with at least one generated token it must fit into "
                f"max_model_len={self.max_model_len}"
            )
        blocks = self.scheduler.block_manager
        if blocks.num_blocks_for(num_prompt_tokens + 1) > blocks.num_blocks:
            raise CacheTooSmall(
                f"the prompt has {num_prompt_tokens} tokens; the KV cache holds {blocks.num_blocks * blocks.block_size} "
                "in all; give it more memory (kv_cache_memory_bytes) or shorten the prompt"
            )

    def _check_params(self, params: SamplingParams) -> None:
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            for token_id in getattr(params, name) or ():
                if token_id >= self.vocab_size:
                    raise InvalidSamplingParams(f"{name}: token id {token_id} is not in the vocabulary of {self.vocab_size}")
        if self.tokenizer is None and (params.stop or params.bad_words):
            raise InvalidSamplingParams("stop and bad_words need a tokenizer, and the engine has none")

    def _make_sequences(
        self, request_id: str, token_ids: list[int], params: SamplingParams, priority: int, cache_salt: str
    ) -> list[Sequence]:
        blocks = self.scheduler.block_manager
        limit = min(self.max_model_len, blocks.num_blocks * blocks.block_size)
        max_num_tokens = limit if params.max_tokens is None else min(limit, len(token_ids) + params.max_tokens)
        stop_token_ids = (() if params.ignore_eos else self._eos_token_ids) + tuple(params.stop_token_ids)
        bad_words = tuple(tuple(ids) for word in params.bad_words for ids in self.tokenizer.token_ids_of_word(word))  # type: ignore[union-attr]
        seed = self._seeds.getrandbits(64) if params.seed is None else params.seed % 2**64
        now = self._clock()
        sequences: list[Sequence] = []
        for index in range(params.n):
            sampling = RowSampling(params, (seed + index) % 2**64, stop_token_ids, bad_words, len(token_ids))
            sequence = Sequence(
                seq_id=next(self._seq_ids),
                request_id=request_id,
                index=index,
                num_prompt_tokens=len(token_ids),
                max_num_tokens=max_num_tokens,
                sampling=sampling,
                stop_token_ids=frozenset(stop_token_ids),
                priority=priority,
                cache_salt=cache_salt,
                arrival_time=now,
                sibling=sequences[0] if sequences else None,
                token_ids=list(token_ids),
            )
            sequences.append(sequence)
        return sequences

    # --- the loop

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def step(self) -> list[GenerationOutput]:
        """One turn of the loop. Returns the requests that grew or ended; their outputs are live objects."""
        self._check_alive()
        try:
            batch = self._dispatch_next()
            if self.scheduler.num_in_flight > (self._num_steps_ahead if batch else 0):
                return self._collect_oldest()
            return self._close_finished()
        except BaseException as error:  # also KeyboardInterrupt: a step cut in half cannot be resumed
            self._failure = error
            raise

    def _dispatch_next(self) -> bool:
        started = time.perf_counter_ns() if self.events.listeners else 0
        batch = self.scheduler.schedule()
        if batch is None:
            if not self.scheduler.num_in_flight and self.scheduler.has_work:
                raise RuntimeError("the scheduler has work but nothing can run: this is a bug in the scheduler")
            return False
        if self.events.listeners:
            self._note_dispatch(batch, time.perf_counter_ns() - started)
        self.executor.dispatch(batch)
        return True

    def _collect_oldest(self) -> list[GenerationOutput]:
        result = self.executor.collect()
        started = time.perf_counter_ns() if self.events.listeners else 0
        grown = self.scheduler.apply(result)
        requests: dict[str, Request] = {}
        for sequence in grown:
            request = requests[sequence.request_id] = self._requests[sequence.request_id]
            self._grow(request, sequence)
        outputs = {request_id: request.output for request_id, request in requests.items()}
        outputs.update((output.request_id, output) for output in self._close_finished())
        if self.events.listeners:
            apply_ns = time.perf_counter_ns() - started
            self.events.emit(StepCollected(self._clock(), result.step, len(grown), result.forward_ns, apply_ns))
        return list(outputs.values())

    def _grow(self, request: Request, sequence: Sequence) -> None:
        metrics = request.output.metrics
        if metrics.first_token_time is None:
            metrics.first_token_time = self._clock()
        stop_string = request.grow(sequence)
        if stop_string is not None and not sequence.is_finished:
            self.scheduler.finish(sequence, "stop", stop_string)
        elif stop_string is not None:  # a stop token or the limit came with the same token: the text ends at the string
            sequence.finish_reason, sequence.stop_reason = "stop", stop_string

    def _close_finished(self) -> list[GenerationOutput]:
        outputs = []
        for sequence in self.scheduler.take_finished():
            request = self._requests[sequence.request_id]
            request.close_sequence(sequence, self._clock())
            if request.output.finished:
                del self._requests[sequence.request_id]
                outputs.append(request.output)
        return outputs

    def _note_dispatch(self, batch: Any, schedule_ns: int) -> None:
        scheduler = self.scheduler
        event = StepDispatched(
            self._clock(),
            batch.step,
            len(batch.rows),
            batch.num_tokens,
            len(batch.sampled_chunks),
            len(scheduler.waiting),
            len(scheduler.running),
            scheduler.block_manager.num_free_blocks,
            schedule_ns,
        )
        self.events.emit(event)

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise EngineDead(f"the engine stopped after an error: {self._failure!r}") from self._failure

    # --- many at once

    def generate(
        self,
        prompts: AbstractSequence[Prompt],
        params: SamplingParams | AbstractSequence[SamplingParams] | None = None,
        *,
        priority: int = 0,
        cache_salt: str = "",
        use_tqdm: bool = False,
    ) -> list[GenerationOutput]:
        """Run prompts to their end; outputs in the order of the prompts. If one is refused, none is left behind."""
        per_prompt = [params] * len(prompts) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(per_prompt) != len(prompts):
            raise InvalidSamplingParams(f"{len(prompts)} prompts need as many sampling params, got {len(per_prompt)}")
        request_ids: list[str] = []
        outputs: dict[str, GenerationOutput] = {}
        try:
            for prompt, one in zip(prompts, per_prompt):
                request_ids.append(self.add_request(prompt, one, priority=priority, cache_salt=cache_salt))
            wanted = set(request_ids)
            with _Progress(len(prompts), use_tqdm) as progress:
                while len(outputs) < len(wanted):
                    for output in self.step():
                        if output.finished and output.request_id in wanted:
                            outputs[output.request_id] = output
                            progress.advance(output)
        finally:
            for request_id in request_ids:
                if request_id not in outputs:
                    self.abort(request_id)
        return [outputs[request_id] for request_id in request_ids]

    def close(self) -> None:
        """Release the executor. Idempotent; later calls of `step` or `add_request` raise `EngineDead`."""
        self.executor.close()
        self._failure = self._failure or RuntimeError("the engine was closed")


class _Progress:
    """A bar over finished requests, with the rate of generated tokens."""

    def __init__(self, total: int, enabled: bool) -> None:
        self._bar = tqdm(total=total, desc="Generating", unit="req", disable=not enabled, dynamic_ncols=True)
        self._num_tokens = 0
        self._start = time.monotonic()

    def advance(self, output: GenerationOutput) -> None:
        self._num_tokens += output.metrics.num_generated_tokens
        self._bar.set_postfix_str(f"{self._num_tokens / (time.monotonic() - self._start + 1e-9):.0f} tok/s", refresh=False)
        self._bar.update()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
