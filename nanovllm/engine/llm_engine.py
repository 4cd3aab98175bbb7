"""LLMEngine: the driving loop. Requests in at the door, steps in the middle, outputs out.

One step is: schedule a batch, dispatch it, and, once `num_steps_ahead` further steps are in flight, collect the oldest
result and apply it. With one step ahead the device computes step N + 1 while the host is busy with the tokens of
step N. Everything that a user can get wrong is refused by `door.py`, before the loop sees it.

Knows requests and text; does not know tensors or listeners. Read next: `model_runner.py`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence as AbstractSequence
from itertools import count
from typing import Any

from nanovllm.engine.door import Bounds, Door, Prompt, TokenSequences
from nanovllm.engine.events import Events, RequestAdded, StepCollected, StepDispatched
from nanovllm.engine.progress import Progress, deferred_interrupt, few_full_collections
from nanovllm.engine.request import Request
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.errors import EngineDead, InvalidPrompt, InvalidSamplingParams, RequestError
from nanovllm.executor.base import Executor
from nanovllm.outputs import GenerationOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.structured.base import Grammar
from nanovllm.tokenizer import Tokenizer


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
        grammar: Grammar | None = None,
        num_steps_ahead: int = 1,
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self.events: Events = scheduler.events
        blocks = scheduler.block_manager
        self.bounds = Bounds(vocab_size, max_model_len, blocks.num_blocks, blocks.block_size)
        self._door = Door(self.bounds, tokenizer, eos_token_ids, seed, grammar)
        self._num_steps_ahead = num_steps_ahead
        self._requests: dict[str, Request] = {}
        self._request_numbers = count()
        self._clock = clock
        self._failure: BaseException | None = None
        self._is_closed = False
        self._is_stepping = False
        self._aborts: deque[str] = deque()  # asked for while a step was under way, or by the garbage collector
        self._num_aborted = 0

    # --- the door

    def add_request(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        pooling: str | None = None,
        bad_words: TokenSequences = (),
    ) -> str:
        """Queue one request; returns its id. Raises `RequestError` or `CapacityError`, and then nothing has changed.

        `cache_salt`: requests share cached prefixes only with requests of the same salt. `priority`: smaller is more
        urgent; needs `scheduling_policy="priority"` to have an effect on order. `pooling`: the result is the prompt's
        vector, the mean of its hidden states or the last one. `bad_words`: in token ids, from a caller that has the
        tokenizer.
        """
        self._check_alive()
        request_id = self._check_id(request_id)
        checked = self._door.check(prompt, params, priority, cache_salt, bad_words, pooling)
        sequences = self._door.make_sequences(request_id, checked, self._clock())
        request = Request.begin(sequences, prompt if isinstance(prompt, str) else None, self.tokenizer)
        self._requests[request_id] = request
        self.scheduler.add(sequences)
        if self.events.listeners:
            first = sequences[0]
            self.events.emit(RequestAdded(first.arrival_time, request_id, first.num_prompt_tokens, len(sequences), request))
        return request_id

    def output_of(self, request_id: str) -> GenerationOutput:
        """The live output of an unfinished request. Raises KeyError for others."""
        return self._requests[request_id].output

    def abort(self, request_id: str, index: int | None = None) -> GenerationOutput | None:
        """End a request, or (between two steps) only one of its completions, in whatever state it is.

        Returns what it has so far; None when it is unknown or finished. Called during a step (by a listener), it takes
        effect at the beginning of the next.
        """
        request = self._requests.get(request_id)
        if request is None:
            return None
        if self._is_stepping:
            self._aborts.append(request_id)
            return request.output
        for sequence in request.sequences if index is None else request.sequences[index : index + 1]:
            self.scheduler.finish(sequence, "abort")
        self._close_finished()
        self._num_aborted += 1
        return request.output

    def abort_later(self, request_id: str) -> None:
        """Abort at the next step. Safe from any thread and from a finalizer."""
        self._aborts.append(request_id)

    def _check_id(self, request_id: str | None) -> str:
        if request_id is None:
            return next(name for number in self._request_numbers if (name := f"request-{number}") not in self._requests)
        if not isinstance(request_id, str):
            raise RequestError(f"request_id must be a string, got {request_id!r}")
        if request_id in self._requests:
            raise RequestError(f"request_id {request_id!r} is already in use by an unfinished request")
        return request_id

    # --- the loop

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def step(self, may_collect: bool = True) -> list[GenerationOutput]:
        """One turn of the loop. Returns the requests that grew or ended; their outputs are live objects.

        `may_collect=False` dispatches and waits for nothing, so that a device computes while requests are still added: once.
        """
        self._check_alive()
        while self._aborts:
            self.abort(self._aborts.popleft())
        self._is_stepping = True
        try:
            is_dispatched = self._dispatch_next()
            if self.scheduler.num_in_flight > (self._num_steps_ahead if is_dispatched else 0) + (not may_collect):
                return self._collect_oldest()
            return self._close_finished()
        except BaseException as error:  # also KeyboardInterrupt: a step cut in half cannot be resumed
            self._failure = error
            raise
        finally:
            self._is_stepping = False

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
        self.executor.begin_draw()
        outputs: dict[str, GenerationOutput] = {}
        for sequence in grown:
            request = self._requests[sequence.request_id]
            outputs[sequence.request_id] = request.output
            stop_string = request.grow(sequence, self._clock)
            if stop_string is not None:
                self._stop_at(stop_string, sequence)
        outputs.update((output.request_id, output) for output in self._close_finished())
        if self.events.listeners:
            apply_ns = time.perf_counter_ns() - started
            self.events.emit(StepCollected(self._clock(), result.step, len(grown), result.forward_ns, apply_ns))
        return list(outputs.values())

    def _stop_at(self, stop_string: str, sequence: Sequence) -> None:
        if not sequence.is_finished:
            self.scheduler.finish(sequence, "stop", stop_string)
        else:  # a stop token or the limit came with the same token: the text ends at the string
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
        work = len(batch.rows), batch.num_tokens, len(batch.sampled_chunks)
        state = len(scheduler.waiting), len(scheduler.running), scheduler.block_manager.num_free_blocks
        self.events.emit(StepDispatched(self._clock(), batch.step, *work, *state, schedule_ns, batch))

    def _check_alive(self) -> None:
        if self._failure is not None:
            reason = "was closed" if self._is_closed else f"stopped after an error: {self._failure!r}"
            raise EngineDead(f"the engine {reason}; make a new one") from self._failure

    # --- many at once

    @few_full_collections()
    def generate(
        self,
        prompts: AbstractSequence[Prompt],
        params: SamplingParams | AbstractSequence[SamplingParams] | None = None,
        *,
        priority: int = 0,
        cache_salt: str = "",
        pooling: str | None = None,
        use_tqdm: bool = False,
    ) -> list[GenerationOutput]:
        """Run prompts to their end; outputs in the order of the prompts. If one is refused, none is left behind."""
        if isinstance(prompts, (str, bytes)) or not isinstance(prompts, AbstractSequence):
            raise InvalidPrompt(f"prompts must be a list of strings or of lists of token ids, got {type(prompts).__name__}")
        if params is not None and not isinstance(params, (SamplingParams, AbstractSequence)):
            raise InvalidSamplingParams(f"params must be SamplingParams or a list of them, got {params!r}")
        per_prompt = [params] * len(prompts) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(per_prompt) != len(prompts):
            raise InvalidSamplingParams(f"{len(prompts)} prompts need as many sampling params, got {len(per_prompt)}")
        unfinished: dict[str, GenerationOutput] = {}
        num_tokens, may_start_early, num_aborted = 0, self._num_steps_ahead > 0, self._num_aborted
        try:
            for prompt, one in zip(prompts, per_prompt):
                request_id = self.add_request(prompt, one, priority=priority, cache_salt=cache_salt, pooling=pooling)
                unfinished[request_id] = self.output_of(request_id)
                num_tokens += len(unfinished[request_id].prompt_token_ids)
                if may_start_early and num_tokens >= self.scheduler.limits.max_num_batched_tokens:
                    may_start_early = False  # the device is busy with one step while the rest is added
                    self.step(may_collect=False)
            outputs = list(unfinished.values())
            with Progress(len(prompts), use_tqdm) as progress, deferred_interrupt() as interrupted:
                while unfinished:
                    ended = [output for output in self.step() if output.finished]
                    if self._num_aborted != num_aborted:  # by somebody else: a step does not report those
                        num_aborted = self._num_aborted
                        ended = [output for output in unfinished.values() if output.finished]
                    for output in ended:
                        if unfinished.pop(output.request_id, None) is not None:
                            progress.advance(output)
                    if interrupted.is_set():
                        raise KeyboardInterrupt
        finally:
            for request_id in unfinished:
                self.abort(request_id)
        return outputs

    def close(self) -> None:
        """Release the executor. Idempotent; later calls of `step` or `add_request` raise `EngineDead`."""
        self.executor.close()
        if self._failure is None:
            self._is_closed, self._failure = True, RuntimeError("closed")
