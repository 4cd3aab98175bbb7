"""AsyncEngine: an engine in a process of its own, for asyncio programs. The server is one of them.

    async with await AsyncEngine.start() as engine:
        async for output in engine.generate("Once upon a time", SamplingParams(max_tokens=50)):
            print(output.text)

This side does the text: it checks and tokenises prompts, turns tokens into text and notices stop strings, so that the
engine process never waits for any of it. Outputs are live objects that only grow: a slow reader misses intermediate
states, and costs no memory. Several front ends can share an engine (`connect`). Read next: `connection.py`,
`messages.py`, and `engine_process.py`, which is the other side.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import msgspec

from nanovllm.config import EngineConfig
from nanovllm.engine.connection import EngineChild, EngineConnection, check_somebody_listens, spawn_engine
from nanovllm.engine.detokenizer import IncrementalDetokenizer, StopStrings
from nanovllm.engine.door import POOLINGS, Bounds, CheckedRequest, Door, Prompt
from nanovllm.engine.messages import Abort, AddRequest, Answer, Call, EngineFacts, Hello, LastWords, Origin, Outputs, Ready
from nanovllm.errors import (
    NONFINITE_LOGITS,
    EngineDead,
    InvalidSamplingParams,
    NanoVllmError,
    NotFinite,
    PromptTooLong,
    RequestError,
)
from nanovllm.log import logger, show_log_unless_configured
from nanovllm.outputs import CompletionOutput, EmbeddingOutput, GenerationOutput, RequestMetrics, TtftParts, add_text
from nanovllm.sampling_params import SamplingParams
from nanovllm.tokenizer import Tokenizer

DEFAULT_BUILDER = "nanovllm.engine.engine_main:build"
LONG_TEXT = 1024  # characters; longer texts are tokenised in a thread
MANY_BAD_WORDS = 8

Result = TypeVar("Result")


class LiveRequest:
    """One request under way. Its reader sleeps in `news`."""

    __slots__ = ("_loop", "_waiter", "completions", "embedding", "error", "handle", "has_news", "num_unfinished", "output")

    def __init__(self, handle: int, output: GenerationOutput) -> None:
        self.handle = handle
        self.output = output
        self.completions: list[LiveCompletion] = []
        self.num_unfinished = len(output.completions)
        self.embedding: list[float] | None = None
        self.error: NanoVllmError | None = None
        self.has_news = False
        self._loop = asyncio.get_running_loop()  # asking for it each time is a call of the system
        self._waiter: asyncio.Future[None] | None = None

    async def news(self) -> None:
        """Wait until the output has grown since the last call. Raises what ended the request."""
        if not self.has_news:
            self._waiter = self._loop.create_future()
            await self._waiter
        self.has_news = False
        if self.error is not None:
            raise self.error

    def wake(self) -> None:
        self.has_news = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def fail(self, error: NanoVllmError) -> None:
        self.error = error
        self.wake()


class LiveCompletion:
    """One of its n completions."""

    __slots__ = ("detokenizer", "handle", "output", "request")

    def __init__(self, request: LiveRequest, output: CompletionOutput, detokenizer: IncrementalDetokenizer) -> None:
        self.request = request
        self.output = output
        self.detokenizer = detokenizer
        self.handle = request.handle + output.index

    def push(self, token_id: int) -> bool:
        """Take one more token. True: it completed a stop string."""
        output, detokenizer = self.output, self.detokenizer
        output.token_ids.append(token_id)
        text = detokenizer.append((token_id,))
        if text:
            add_text(output, text)
        return detokenizer.stop_string is not None

    def end(self, finish_reason: str, stop_reason: int | str | None) -> None:
        output, detokenizer = self.output, self.detokenizer
        add_text(output, detokenizer.finish())
        if detokenizer.stop_string is not None:
            finish_reason, stop_reason = "stop", detokenizer.stop_string
        output.finish_reason, output.stop_reason = finish_reason, stop_reason
        if output.logprobs is not None:
            del output.logprobs[len(output.token_ids) :]  # those of tokens behind a stop string


class AsyncEngine:
    """Made by `start` or `connect`, used and closed on the event loop where that happened."""

    facts: EngineFacts
    tokenizer: Tokenizer

    def __init__(self, address: str, child: EngineChild | None) -> None:
        """Not for users: the engine is ready only after `_become_ready`."""
        self._connection = EngineConnection(address, child, self._take)
        self._ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self._requests: dict[str, LiveRequest] = {}  # by request id
        self._completions: dict[int, LiveCompletion] = {}  # by handle
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._handles = 0
        self._call_ids = count()
        self._connection.dead.add_done_callback(self._fail_everything)

    # --- life

    @classmethod
    async def start(
        cls,
        model: str | Path | None = None,
        *,
        builder: str = DEFAULT_BUILDER,
        builder_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> AsyncEngine:
        """Spawn an engine process and wait until its model is loaded. Options: see `EngineConfig`.

        Raises `ConfigError`, `ModelError`, or `EngineDead` when the process ended for another reason. `builder`:
        "module:function" that makes a `ServedEngine` from the config and `builder_options`, in the engine process.
        """
        show_log_unless_configured()
        config = EngineConfig.from_options(model=str(model) if isinstance(model, Path) else model, **options)
        child = spawn_engine(config, builder, builder_options)
        return await cls(child.address, child)._become_ready()

    @classmethod
    async def connect(cls, address: str) -> AsyncEngine:
        """Share the engine whose `address` another front end has told. Closing leaves the engine running."""
        check_somebody_listens(address)
        return await cls(address, None)._become_ready()

    async def _become_ready(self) -> AsyncEngine:
        connection = self._connection
        try:
            connection.send(Hello())
            while not self._ready.done() and not connection.dead.done():
                await asyncio.wait([self._ready, connection.dead], timeout=0.1, return_when=asyncio.FIRST_COMPLETED)
                if connection.child is not None and connection.child.process.poll() is not None:
                    await asyncio.sleep(0.1)  # its last words may be on their way
                    connection.die(f"the engine process {connection.child.describe_end()} while it started")
            if not self._ready.done():
                raise connection.death()
            ready = self._ready.result()
        except BaseException:
            await self.close(at_once=True)
            raise
        self.facts = ready.facts
        self.tokenizer = await asyncio.to_thread(ready.tokenizer.open)  # a large vocabulary takes a while
        bounds = Bounds(ready.facts.vocab_size, ready.facts.max_model_len, ready.facts.num_kv_blocks, ready.facts.block_size)
        self._door = Door(bounds, self.tokenizer)
        return self

    @property
    def address(self) -> str:
        """For `connect`, in any process of this user."""
        return self._connection.address

    @property
    def is_alive(self) -> bool:
        return self._connection.is_alive

    def watch(self, max_silence: float) -> None:
        """Take the engine for dead, and end its process if it is ours, when it is silent for `max_silence` seconds.

        It speaks between two steps, so this must exceed the longest step. Without it a hung engine is waited for.
        """
        self._connection.watch(max_silence)

    async def wait_dead(self) -> BaseException:
        """Return when the engine is no more: died or closed."""
        await asyncio.shield(self._connection.dead)
        return self._connection.death()

    async def close(self, at_once: bool = False) -> None:
        """End the engine process if `start` made it, else leave it; open requests get `EngineDead`. Idempotent.

        `at_once`: do not wait until it has left by itself.
        """
        if at_once and self._connection.child is not None:
            self._connection.child.process.kill()
        await self._connection.close()

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # --- requests

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        origin: Origin | None = None,
    ) -> AsyncGenerator[GenerationOutput, None]:
        """Complete one prompt. Yields the live output whenever it has grown; the last time it is `finished`.

        Raises `RequestError` or `CapacityError` before anything is sent, or when the engine refuses, and `EngineDead`.
        Closing the generator, also by cancellation, aborts the request.
        """
        arrival_time = time.monotonic()
        checked = await self._check(prompt, params, priority, cache_salt)
        request = self._open(checked, request_id, prompt, arrival_time, origin=origin)
        try:
            while not request.output.finished or request.has_news:
                await request.news()
                yield request.output
        finally:
            self._drop(request)

    async def embed(
        self, prompt: Prompt, pooling: str = "mean", *, request_id: str | None = None, priority: int = 0, cache_salt: str = ""
    ) -> EmbeddingOutput:
        """The final hidden states of a prompt as one vector, not normalised: their "mean", or the "last" one.

        Errors as in `generate`; `NotFinite` when the vector would not be numbers.
        """
        if pooling not in POOLINGS:
            raise RequestError(f"pooling={pooling!r} is not one of {', '.join(POOLINGS)}")
        arrival_time = time.monotonic()
        checked = await self._check(prompt, SamplingParams(max_tokens=1), priority, cache_salt)
        request = self._open(checked, request_id, prompt, arrival_time, pooling)
        try:
            while request.embedding is None:
                if request.output.finished:
                    is_error = request.output.completions[0].finish_reason == "error"
                    raise NotFinite(NONFINITE_LOGITS) if is_error else RequestError("the request was aborted")
                await request.news()
            return EmbeddingOutput(request.embedding, len(checked.token_ids))
        finally:
            self._drop(request)

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Tokenise, in a thread if that takes long. `PromptTooLong` for what cannot fit, before it is tokenised."""
        self._check_length(text)
        return await self._off_the_loop(len(text) > LONG_TEXT, lambda: self.tokenizer.encode(text, add_special_tokens))

    async def abort(self, request_id: str) -> None:
        """End a request; its generator yields what there is, with finish reason "abort". Unknown ids are ignored."""
        request = self._requests.get(request_id)
        if request is not None:
            self._tell_to_abort(request)
            for completion in request.completions:
                if completion.output.finish_reason is None:
                    self._end(completion, "abort", None)

    # --- other calls

    async def stats(self) -> dict[str, int | float]:
        """Counts and totals since the start of the engine; names ending in _ns are nanoseconds."""
        return await self._call("stats")

    async def set_limits(self, **limits: Any) -> dict[str, Any]:
        """Change `SchedulerLimits` while the engine runs. Returns all of them. Raises `ConfigError`."""
        return await self._call("set_limits", **limits)

    async def reset_prefix_cache(self) -> bool:
        """Forget all cached content that no running sequence holds."""
        return await self._call("reset_prefix_cache")

    async def inspect(self) -> dict[str, Any]:
        """Running and waiting sequences with their counts and blocks; no text."""
        return await self._call("inspect")

    async def profile(self, seconds: float) -> str:
        """Run the torch profiler in the engine process. Returns the path of a Chrome trace, which `close` removes."""
        return await self._call("profile", seconds=seconds)

    async def call(self, name: str, **arguments: Any) -> Any:
        """A call that the engine's builder has added (`ServedEngine.calls`). `RequestError` when there is none."""
        return await self._call(name, **arguments)

    async def _call(self, name: str, **arguments: Any) -> Any:
        call_id = next(self._call_ids)
        answer = self._calls[call_id] = asyncio.get_running_loop().create_future()
        try:
            self._send(Call(call_id, name, arguments))
            return await answer
        finally:
            del self._calls[call_id]

    # --- the way in

    async def _check(self, prompt: Prompt, params: SamplingParams | None, priority: int, cache_salt: str) -> CheckedRequest:
        if not self.is_alive:
            raise self._connection.death()
        takes_long = isinstance(params, SamplingParams) and len(params.bad_words) > MANY_BAD_WORDS
        if isinstance(prompt, str):
            self._check_length(prompt)
            takes_long = takes_long or len(prompt) > LONG_TEXT
        return await self._off_the_loop(takes_long, lambda: self._door.check(prompt, params, priority, cache_salt))

    def _check_length(self, text: str) -> None:
        if isinstance(text, str) and len(text) > self._max_characters:
            raise PromptTooLong(
                f"the prompt has {len(text)} characters; no prompt of more than {self._max_characters} fits into "
                f"max_model_len={self.facts.max_model_len} tokens"
            )

    @cached_property
    def _max_characters(self) -> int:
        return self.facts.max_model_len * self.tokenizer.max_token_length

    async def _off_the_loop(self, takes_long: bool, function: Callable[[], Result]) -> Result:
        return await asyncio.to_thread(function) if takes_long else function()

    def _open(
        self,
        checked: CheckedRequest,
        request_id: str | None,
        prompt: Prompt,
        arrival_time: float,
        pooling: str | None = None,
        origin: Origin | None = None,
    ) -> LiveRequest:
        """Send the request, and make the place where its answer will grow."""
        params = checked.params
        request_id = uuid4().hex if request_id is None else request_id
        if not isinstance(request_id, str) or request_id in self._requests:
            raise RequestError(f"request_id {request_id!r} is not a string, or in use by an unfinished request")
        handle, self._handles = self._handles, self._handles + params.n
        text = prompt if isinstance(prompt, str) else None
        metrics = RequestMetrics(arrival_time, num_prompt_tokens=len(checked.token_ids), tokenized_time=time.monotonic())
        outputs = [CompletionOutput(index, logprobs=None if params.logprobs is None else []) for index in range(params.n)]
        request = LiveRequest(handle, GenerationOutput(request_id, text, checked.token_ids, outputs, metrics))
        stop_strings = StopStrings(params.stop) if params.stop else None
        for output in outputs:
            detokenizer = IncrementalDetokenizer(self.tokenizer, params, stop_strings)
            request.completions.append(LiveCompletion(request, output, detokenizer))
        without_text = replace(params, stop=(), bad_words=()) if params.stop or params.bad_words else params
        bad_words = [list(token_ids) for token_ids in checked.bad_words]
        message = AddRequest(
            handle, request_id, checked.token_ids, without_text, bad_words, checked.priority, checked.cache_salt, pooling
        )
        if self.facts.has_checkpoint:
            message.stop, message.origin = tuple(params.stop), origin
        self._send(message)
        self._requests[request_id] = request
        self._completions.update((completion.handle, completion) for completion in request.completions)
        return request

    def _send(self, message: Any) -> None:
        try:
            self._connection.send(message)
        except (TypeError, ValueError, OverflowError, msgspec.MsgspecError) as error:
            raise InvalidSamplingParams(f"an argument has a type or a size that cannot be sent: {error}") from None

    def _drop(self, request: LiveRequest) -> None:
        """Its reader has left."""
        self._requests.pop(request.output.request_id, None)
        for completion in request.completions:
            self._completions.pop(completion.handle, None)
        request.completions.clear()  # they point back at it: without the circle nothing is left to the garbage collector
        if not request.output.finished and request.embedding is None:  # also unknown to the engine: it ignores that
            self._tell_to_abort(request)

    def _tell_to_abort(self, request: LiveRequest, index: int | None = None) -> None:
        if self.is_alive:
            self._send(Abort(request.handle, index))

    # --- the way out

    def _take(self, message: Outputs | Ready | LastWords) -> None:
        if isinstance(message, Outputs):
            self._take_outputs(message)
        elif isinstance(message, Ready):
            self._ready.set_result(message)
        else:
            self._take_last_words(message)

    def _take_outputs(self, message: Outputs) -> None:
        completions = self._completions
        for begun in message.begun:
            if (completion := completions.get(begun.handle)) is not None:
                metrics = completion.request.output.metrics
                metrics.first_token_time = time.monotonic()
                metrics.first_scheduled_time, metrics.num_cached_tokens = begun.first_scheduled_time, begun.num_cached_tokens
                if (scheduled := begun.first_scheduled_time) is not None and begun.first_token_time is not None:
                    done, first = begun.prompt_done_time, begun.first_token_time
                    metrics.ttft_parts = TtftParts(scheduled - begun.arrival_time, done - scheduled, first - done)
                completion.request.output.prompt_logprobs = begun.prompt_logprobs
        for handle, logprobs in message.logprobs.items():
            if (completion := completions.get(handle)) is not None and completion.output.logprobs is not None:
                completion.output.logprobs.extend(logprobs)
        for handle, token_id in zip(message.handles, message.token_ids):
            completion = completions.get(handle)
            if completion is None:
                continue  # it was dropped, or its text has ended, and the engine does not know yet
            completion.request.wake()
            try:
                if completion.push(token_id):
                    self._end(completion, "stop", None)
                    self._tell_to_abort(completion.request, completion.output.index)
            except Exception as error:  # a mistake of ours: the others in this message must not suffer from it
                logger.exception("the text of request %s failed", completion.request.output.request_id)
                completion.request.fail(NanoVllmError(f"internal error: {type(error).__name__}"))
        for handle, embedding in message.embeddings.items():
            if (completion := completions.get(handle)) is not None:
                completion.request.embedding = embedding
                completion.request.wake()
        for handle, finish_reason, stop_reason, num_preemptions in message.ended:
            if (completion := completions.get(handle)) is not None:
                completion.request.output.metrics.num_preemptions = num_preemptions
                self._end(completion, finish_reason, stop_reason)
        for handle, failure in message.refused:
            if (completion := completions.get(handle)) is not None:
                completion.request.fail(failure.to_error())
        for answer in message.answers:
            self._take_answer(answer)

    def _end(self, completion: LiveCompletion, finish_reason: str, stop_reason: int | str | None) -> None:
        request = completion.request
        completion.end(finish_reason, stop_reason)
        self._completions.pop(completion.handle, None)
        request.num_unfinished -= 1
        if request.num_unfinished == 0:
            metrics = request.output.metrics
            metrics.finish_time = time.monotonic()
            metrics.num_generated_tokens = sum(len(output.token_ids) for output in request.output.completions)
            request.output.finished = True
            del self._requests[request.output.request_id]
        request.wake()

    def _take_answer(self, answer: Answer) -> None:
        future = self._calls.get(answer.call_id)
        if future is None or future.done():
            return
        if answer.failure is None:
            future.set_result(answer.value)
        else:
            future.set_exception(answer.failure.to_error())

    def _take_last_words(self, words: LastWords) -> None:
        if words.traceback:
            logger.error("%s\n%s", words.failure.message, words.traceback.rstrip())
        if not self._ready.done():
            self._ready.set_exception(words.failure.to_error())
        else:
            self._connection.die(words.failure.message)

    def _fail_everything(self, dead: asyncio.Future[EngineDead]) -> None:
        for request in list(self._requests.values()):
            request.fail(self._connection.death())
        for call in self._calls.values():
            if not call.done():
                call.set_exception(self._connection.death())
