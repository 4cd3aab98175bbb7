"""The loop around an `LLMEngine` in its own process: receive, step, send, until it is told to stop.

Speaks token ids only; text is the business of the front ends, which may be several. One turn of the loop takes what has
arrived, makes one step, and sends one message to each front end that the step concerns. A front end that does not
read costs nothing but its own latency: what it has not taken is added to the next message. One that has gone is noticed
when it is sent to, at least once a second, and its requests are aborted. A request that is refused is answered; a
failure of the engine is told to every front end, and ends the loop. `engine_main.py` is the process around it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
import traceback
from bisect import bisect_left
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import zmq

from nanovllm.energy import EnergyMeter
from nanovllm.engine.events import Event, SequencePreempted, StepCollected, StepDispatched
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.messages import (
    STEP_SIZE_EDGES,
    Abort,
    AddRequest,
    Answer,
    Begun,
    Call,
    Ended,
    EngineFacts,
    Failure,
    Goodbye,
    Hello,
    LastWords,
    Outputs,
    Ready,
    Refused,
    Shutdown,
    TokenizerMessage,
    decode_for_engine,
    encode,
)
from nanovllm.engine.roofline import Peak, StepWork, WorkCounter, counter_of, peak_of
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.errors import NONFINITE_LOGITS, NanoVllmError, RequestError
from nanovllm.log import degraded, logger
from nanovllm.outputs import GenerationOutput
from nanovllm.structured.base import Grammar
from nanovllm.tokenizer import Tokenizer

MAX_RECEIVE_SECONDS = 0.005  # between two steps: what a flood of requests may delay the running ones, and keep the device idle
SIGN_OF_LIFE_SECONDS = 1.0  # between two messages to a front end, at most
RETRY_SECONDS = 0.02  # after a front end's queue was full
MAX_STALL_SECONDS = 60.0  # without taking a message; then the front end's requests are aborted
MAX_PROFILE_SECONDS = 60.0
WAITING_REASONS = ("rows", "blocks", "token", "next", "grammar")  # next: has just come, or the step's budget was used up
SHORTAGE_SECONDS = 60.0  # between two lines about a full KV cache, at least


@dataclass(frozen=True, slots=True)
class ServedEngine:
    """What a builder makes. The engine has no tokenizer: the front ends have it."""

    engine: LLMEngine
    tokenizer: Tokenizer
    facts: EngineFacts
    grammar: Grammar | None = None  # of the engine: here it compiles on a thread, before a request is added
    calls: Mapping[str, Callable[..., Any]] = field(default_factory=dict)  # more `Call`s: f(number of the front end, **arguments)
    on_end: Callable[[BaseException | None], None] | None = None  # the loop has ended, with what error
    on_accept: Callable[[str, AddRequest], None] | None = None  # the engine has taken a request, under this id
    adopt: Callable[[int, list[str]], list[str]] | None = None  # a front end has died: which of its requests go on


@dataclass(slots=True, eq=False)
class Frontend:
    """One connected front end, and the message that is being filled for it."""

    number: int
    identity: bytes
    requests: dict[int, OpenRequest] = field(default_factory=dict)  # by handle
    outputs: Outputs | None = None  # not sent yet
    sent_time: float = 0.0
    stalled_time: float | None = None  # since when its queue has been full
    retry_time: float = 0.0

    def news(self) -> Outputs:
        if self.outputs is None:
            self.outputs = Outputs()
        return self.outputs


@dataclass(slots=True, eq=False)
class OpenRequest:
    """What of an unfinished request has been put into messages."""

    frontend: Frontend
    handle: int
    request_id: str  # the engine's, which is unique among front ends
    num_tokens: list[int]  # per completion
    has_begun: bool = False
    has_ended: set[int] = field(default_factory=set)  # indexes of completions

    def tell(self, output: GenerationOutput, result_time: float = 0.0) -> None:
        """Add what is new to the front end's message. `result_time`: when the step's result was on the host."""
        message = self.frontend.news()
        if not self.has_begun:
            self.has_begun = True
            metrics = output.metrics
            scheduled, first = metrics.first_scheduled_time, metrics.first_token_time
            times = metrics.arrival_time, prompt_done_time(scheduled, result_time, first), first
            begun = Begun(self.handle, scheduled, metrics.num_cached_tokens, output.prompt_logprobs, *times)
            message.begun.append(begun)
        if output.embedding is not None:
            message.embeddings[self.handle] = output.embedding
        for index, completion in enumerate(output.completions):
            handle = self.handle + index
            first, num_tokens = self.num_tokens[index], len(completion.token_ids)
            if first < num_tokens:
                self.num_tokens[index] = num_tokens
                message.handles += [handle] * (num_tokens - first)
                message.token_ids += completion.token_ids[first:]
                if completion.logprobs is not None:
                    message.logprobs.setdefault(handle, []).extend(completion.logprobs[first:])
            if completion.finish_reason is not None and index not in self.has_ended:
                self.has_ended.add(index)
                ended = Ended(handle, completion.finish_reason, completion.stop_reason, output.metrics.num_preemptions)
                message.ended.append(ended)


class Compiling(NamedTuple):
    """A request that waits for its grammar."""

    frontend: Frontend
    message: AddRequest
    future: Future[Any]


class Counters:
    """A listener that adds up what happened since the start. Times are nanoseconds."""

    def __init__(self, work: WorkCounter | None = None, peak: Peak | None = None) -> None:
        self._count, self._peak = None if work is None else work.count, peak
        self._works: dict[int, StepWork] = {}  # of steps in flight
        self._last = StepWork(0.0, 0.0), 0  # the last step and its nanoseconds
        self.model_bytes = self.model_operations = self.written_bytes = self.roof_ns = 0.0
        self.num_steps = self.num_generated_tokens = self.num_computed_tokens = self.num_preemptions = 0
        self.forward_ns = self.schedule_ns = self.apply_ns = 0
        self._told_time = -SHORTAGE_SECONDS
        self._steps_by_size = [0] * (len(STEP_SIZE_EDGES) + 1)  # the last is for more tokens than the last edge
        self.result_time = 0.0  # when the last step's result was on the host, seconds of the engine's clock

    def on_event(self, event: Event) -> None:
        if isinstance(event, StepCollected):
            self.num_steps += 1
            self.num_generated_tokens += event.num_new_tokens
            self.forward_ns += event.forward_ns
            self.apply_ns += event.apply_ns
            if self._count is not None:
                self._add_work(self._works.pop(event.step, None), event.forward_ns)
            self.result_time = event.time - event.apply_ns * 1e-9
        elif isinstance(event, StepDispatched):
            self.num_computed_tokens += event.num_tokens
            self.schedule_ns += event.schedule_ns
            self._steps_by_size[bisect_left(STEP_SIZE_EDGES, event.num_tokens)] += 1
            if self._count is not None:
                self._works[event.step] = self._count(event.batch)
        elif isinstance(event, SequencePreempted):
            self.num_preemptions += 1
            if event.time - self._told_time >= SHORTAGE_SECONDS:
                self._told_time = event.time
                degraded("kv_cache_full", "%s is computed again; %d preemptions so far", event.request_id, self.num_preemptions)

    def _add_work(self, work: StepWork | None, forward_ns: int) -> None:
        if work is not None:
            self._last = work, forward_ns
            self.model_bytes += work.num_bytes
            self.model_operations += work.num_operations
            self.written_bytes += work.num_written
            if self._peak is not None:
                self.roof_ns += self._peak.roof_s(work) * 1e9

    def totals(self) -> dict[str, int | float]:
        """Counts since the start; shares of the peak are of the last step, 0 to 1."""
        sizes = {f"num_steps_up_to_{edge}": number for edge, number in zip([*STEP_SIZE_EDGES, "inf"], self._steps_by_size)}
        totals = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        work, forward_ns = self._last
        if self._count is None:
            del totals["model_bytes"], totals["model_operations"], totals["written_bytes"]
        else:
            totals["read_bytes"] = self.model_bytes - self.written_bytes
        if self._count is None or self._peak is None:
            del totals["roof_ns"]
            return {**totals, **sizes}
        totals["peak_bytes_per_s"] = self._peak.bytes_per_s
        totals["peak_operations_per_s"] = self._peak.operations_per_s
        if forward_ns:
            totals["bandwidth_share"] = work.num_bytes / self._peak.bytes_per_s / forward_ns * 1e9
            totals["operations_share"] = work.num_operations / self._peak.operations_per_s / forward_ns * 1e9
        return {**totals, **sizes}


class EngineProcess:
    """The loop around one engine, on one ROUTER socket."""

    def __init__(self, served: ServedEngine, socket: zmq.Socket, folder: Path, degradations: Mapping[str, int]) -> None:
        self._engine, self._served = served.engine, served
        self._ready = encode(Ready(served.facts, TokenizerMessage.of(served.tokenizer)))
        self._socket = socket
        self._folder = folder
        self._degradations = degradations  # live counts by reason
        self._frontends: dict[bytes, Frontend] = {}
        self._gone: list[Frontend] = []  # found to be gone; what they sent before is still to be read
        self._requests: dict[str, OpenRequest] = {}  # by the engine's request id
        self._num_frontends = self._num_prompt_tokens = self._num_requests = self._num_nonfinite = 0
        facts = served.facts
        self._counters = Counters(counter_of(facts.spec, facts.dtype, facts.roofline), peak_of(facts.roofline))
        self._engine.events.listeners.append(self._counters)
        self._energy = EnergyMeter()
        self._profile: Profile | None = None
        self._compiling: dict[tuple[bytes, int], Compiling] = {}  # by front end and handle: requests that wait for their grammar
        self._compiler = ThreadPoolExecutor(1, "nanovllm-grammars")
        self._is_closing = False

    def serve(self) -> None:
        """Until `Shutdown`. Raises what the engine raises, after telling the front ends."""
        try:
            while not self._is_closing:
                self._receive()
                if self._gone:
                    self._forget_gone()
                self._add_compiled()
                if self._engine.has_work:
                    self._step()
                self._send()
                if self._profile is not None and time.monotonic() >= self._profile.end_time:
                    self._finish_profile()
        except BaseException as error:
            self._say_last_words(error)
            self._end(error)
            raise
        else:
            self._end(None)
        finally:
            self._compiler.shutdown(wait=False, cancel_futures=True)
            self._engine.close()

    def _end(self, error: BaseException | None) -> None:
        if self._served.on_end is not None:
            self._served.on_end(error)

    # --- receive

    def _receive(self) -> None:
        """Take what has arrived; without work to do, sleep until something does."""
        if not self._engine.has_work:
            self._socket.poll(int(self._patience() * 1000))
        end_time = time.monotonic() + MAX_RECEIVE_SECONDS
        while time.monotonic() < end_time:
            try:
                identity, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                message = decode_for_engine(b"".join(frames))
            except (msgspec.DecodeError, NanoVllmError) as error:
                self._reject(identity, b"".join(frames), error)
            else:
                self._take(identity, message)

    def _reject(self, identity: bytes, payload: bytes, error: Exception) -> None:
        """What is not a message of ours is ignored, but whoever waits for an answer gets one."""
        logger.warning("a front end sent what is not a message: %s", error)
        frontend = self._frontends.get(identity)
        failure = Failure.of(RequestError(f"the engine process does not understand the request: {error}"))
        with contextlib.suppress(msgspec.DecodeError):
            match msgspec.msgpack.decode(payload):
                case {"type": "add", "handle": int(handle)} if frontend:
                    frontend.news().refused.append(Refused(handle, failure))
                case {"type": "call", "call_id": int(call_id)} if frontend:
                    frontend.news().answers.append(Answer(call_id, None, failure))

    def _patience(self) -> float:
        """Seconds that an idle loop may sleep."""
        if self._profile is not None:
            return min(max(0.0, self._profile.end_time - time.monotonic()), SIGN_OF_LIFE_SECONDS)
        has_news = any(frontend.outputs is not None for frontend in self._frontends.values())
        return RETRY_SECONDS if has_news or self._compiling else SIGN_OF_LIFE_SECONDS

    def _take(self, identity: bytes, message: Any) -> None:
        if isinstance(message, Hello):
            self._welcome(identity)
        elif isinstance(message, Shutdown):
            self._is_closing = True
        elif (frontend := self._frontends.get(identity)) is None:
            logger.warning("a message of a front end that is not connected is ignored")
        elif isinstance(message, AddRequest) and message.params.structured is not None and self._served.grammar is not None:
            future = self._compiler.submit(self._served.grammar.prepare, message.params.structured)
            self._compiling[identity, message.handle] = Compiling(frontend, message, future)
        elif isinstance(message, AddRequest):
            self._add(frontend, message)
        elif isinstance(message, Abort):
            self._abort(frontend, message)
        elif isinstance(message, Call):
            self._answer(frontend, message)
        elif isinstance(message, Goodbye):
            self._abort_all(frontend)
            self._forget(frontend)

    def _welcome(self, identity: bytes) -> None:
        if identity not in self._frontends:
            self._frontends[identity] = Frontend(self._num_frontends, identity)
            self._num_frontends += 1
        try:
            self._socket.send_multipart([identity, self._ready], zmq.NOBLOCK)
        except zmq.ZMQError:
            self._forget(self._frontends[identity])

    def _add_compiled(self) -> None:
        """The requests whose grammar has been compiled meanwhile; the engine finds it among those that it keeps."""
        for place, waiting in list(self._compiling.items()):
            if waiting.future.done():
                del self._compiling[place]
                self._add(waiting.frontend, waiting.message, waiting.future.exception())

    def _add(self, frontend: Frontend, message: AddRequest, failure: BaseException | None = None) -> None:
        """Whatever goes wrong here, or went wrong before, is the answer to this request, and nobody else's."""
        request_id = f"{frontend.number}/{message.request_id}"
        try:
            if failure is not None:
                raise failure
            if message.handle in frontend.requests:
                raise RequestError(f"handle {message.handle} is in use")
            self._engine.add_request(
                message.token_ids,
                message.params if message.pooling is None else None,
                request_id=request_id,
                priority=message.priority,
                cache_salt=message.cache_salt,
                bad_words=message.bad_words,
                pooling=message.pooling,
            )
        except Exception as error:
            if not isinstance(error, NanoVllmError):
                logger.exception("the admission of request %s failed", request_id)
            frontend.news().refused.append(Refused(message.handle, Failure.of(error)))
            return
        if self._served.on_accept is not None:
            self._served.on_accept(request_id, message)
        request = OpenRequest(frontend, message.handle, request_id, [0] * message.params.n)
        frontend.requests[message.handle] = self._requests[request_id] = request
        self._num_requests += 1
        self._num_prompt_tokens += len(message.token_ids)

    def _abort(self, frontend: Frontend, message: Abort) -> None:
        """The front end has closed what it aborts: it gets no answer."""
        self._compiling.pop((frontend.identity, message.handle), None)
        request = frontend.requests.get(message.handle)
        if request is None:
            return  # ended meanwhile, or has not begun
        output = self._engine.abort(request.request_id, message.index)
        if output is None or output.finished:
            self._close(request)

    def _close(self, request: OpenRequest) -> None:
        del request.frontend.requests[request.handle], self._requests[request.request_id]

    def _forget(self, frontend: Frontend) -> None:
        """It has gone. What it left behind ends, or goes on without it."""
        self._compiling = {place: one for place, one in self._compiling.items() if one.frontend is not frontend}
        if self._served.adopt is not None:
            for name in self._served.adopt(frontend.number, [request.request_id for request in frontend.requests.values()]):
                self._close(self._requests[name])
        self._abort_all(frontend)
        del self._frontends[frontend.identity]

    def _forget_gone(self) -> None:
        gone, self._gone = self._gone, []
        for frontend in gone:
            if frontend.identity in self._frontends:  # else its goodbye has come meanwhile
                self._forget(frontend)

    def _abort_all(self, frontend: Frontend) -> None:
        if frontend.requests:
            logger.warning("front end %d has gone: %d requests are aborted", frontend.number, len(frontend.requests))
        for request in list(frontend.requests.values()):
            output = self._engine.abort(request.request_id)
            if output is not None:
                request.tell(output)
            self._close(request)

    # --- step and send

    def _step(self) -> None:
        for output in self._engine.step():
            request = self._requests.get(output.request_id)
            if request is not None:
                request.tell(output, self._counters.result_time)
                if output.finished:
                    self._close(request)
                    reasons = [completion.stop_reason for completion in output.completions]
                    self._num_nonfinite += reasons.count(NONFINITE_LOGITS)

    def _send(self) -> None:
        now = time.monotonic()
        for frontend in list(self._frontends.values()):
            if now - frontend.sent_time >= SIGN_OF_LIFE_SECONDS:
                frontend.news()
            if frontend.outputs is not None and now >= frontend.retry_time:
                self._send_news(frontend, now)

    def _send_news(self, frontend: Frontend, now: float) -> None:
        try:
            self._socket.send_multipart([frontend.identity, encode(frontend.outputs)], zmq.NOBLOCK)
        except zmq.Again:
            frontend.retry_time = now + RETRY_SECONDS
            if frontend.stalled_time is None:
                frontend.stalled_time = now
            elif now - frontend.stalled_time > MAX_STALL_SECONDS:
                self._abort_all(frontend)
        except zmq.ZMQError:  # EHOSTUNREACH: the connection is gone
            frontend.outputs = None
            self._gone.append(frontend)
        else:
            frontend.outputs, frontend.sent_time, frontend.stalled_time = None, now, None

    def _say_last_words(self, error: BaseException) -> None:
        self._send()
        words = encode(LastWords(Failure("EngineDead", f"the engine failed: {type(error).__name__}"), traceback_of(error)))
        for identity in self._frontends:
            try:
                self._socket.send_multipart([identity, words], zmq.NOBLOCK)
            except zmq.ZMQError:
                continue

    # --- other calls

    def _answer(self, frontend: Frontend, call: Call) -> None:
        answers = frontend.news().answers
        try:
            if call.name == "profile":
                self._start_profile(frontend, call)
            elif call.name in self._served.calls:
                value = self._served.calls[call.name](frontend.number, **call.arguments)
                answers.append(Answer(call.call_id, value, None))
            elif call.name not in CALLS:
                raise RequestError(f"unknown call {call.name!r}")
            else:
                answers.append(Answer(call.call_id, CALLS[call.name](self, **call.arguments), None))
        except Exception as error:
            if not isinstance(error, NanoVllmError):
                logger.exception("the call %r failed", call.name)
            answers.append(Answer(call.call_id, None, Failure.of(error)))

    def _stats(self) -> dict[str, int | float]:
        scheduler = self._engine.scheduler
        blocks = scheduler.block_manager
        return {
            "num_waiting": len(scheduler.waiting) + len(self._compiling),
            **{f"num_waiting_{reason}": number for reason, number in self._waiting().items()},
            "num_running": len(scheduler.running),
            "num_requests": self._num_requests,
            "num_open_requests": len(self._requests),
            "num_frontends": len(self._frontends),
            "num_free_blocks": blocks.num_free_blocks,
            "num_kv_blocks": blocks.num_blocks,
            "max_admissible_tokens": max_admissible_tokens(self._engine),
            "num_prompt_tokens": self._num_prompt_tokens,
            "num_nonfinite_logits": self._num_nonfinite,
            "num_prefix_queried_tokens": blocks.stats.num_queried_tokens,
            "num_prefix_hit_tokens": blocks.stats.num_hit_tokens,
            "num_prefix_evictions": blocks.stats.num_evictions,
            **{f"num_degraded_{reason}": number for reason, number in self._degradations.items()},
            **{f"joules_{name}": joules for name, joules in self._energy.joules().items()},
            **self._counters.totals(),
        }

    def _waiting(self) -> dict[str, int]:
        """Sequences that wait in the engine, by the reason of the first: nobody overtakes it."""
        counts = {**dict.fromkeys(WAITING_REASONS, 0), "grammar": len(self._compiling)}
        if self._engine.scheduler.waiting:
            counts[why_first_waits(self._engine.scheduler)] += len(self._engine.scheduler.waiting)
        return counts

    def _set_limits(self, **limits: Any) -> dict[str, Any]:
        return dataclasses.asdict(self._engine.scheduler.set_limits(**limits))

    def _reset_prefix_cache(self) -> bool:
        self._engine.scheduler.block_manager.reset_prefix_cache()
        return True

    def _inspect(self) -> dict[str, Any]:
        """What runs and what waits, without a word of text."""
        scheduler = self._engine.scheduler
        return {
            "limits": dataclasses.asdict(scheduler.limits),
            "running": [describe(sequence) for sequence in scheduler.running],
            "waiting": [describe(sequence) for sequence in scheduler.waiting],
            "num_free_blocks": scheduler.block_manager.num_free_blocks,
            "num_kv_blocks": scheduler.block_manager.num_blocks,
            "num_steps_in_flight": scheduler.num_in_flight,
            "frontends": {str(frontend.number): len(frontend.requests) for frontend in self._frontends.values()},
        }

    def _start_profile(self, frontend: Frontend, call: Call) -> None:
        seconds = call.arguments.get("seconds")
        if not isinstance(seconds, (int, float)) or isinstance(seconds, bool) or not 0 < seconds <= MAX_PROFILE_SECONDS:
            raise RequestError(f"seconds must be a number above 0 and up to {MAX_PROFILE_SECONDS:g}, got {seconds!r}")
        if self._profile is not None:
            raise RequestError("a profile is being taken already; wait for its end")
        self._profile = Profile(frontend, call.call_id, seconds)

    def _finish_profile(self) -> None:
        profile, self._profile = self._profile, None
        if profile is not None:
            path = profile.save(self._folder)
            profile.frontend.news().answers.append(Answer(profile.call_id, str(path), None))


CALLS: dict[str, Callable[..., Any]] = {
    "stats": EngineProcess._stats,
    "set_limits": EngineProcess._set_limits,
    "reset_prefix_cache": EngineProcess._reset_prefix_cache,
    "inspect": EngineProcess._inspect,
}


class Profile:
    """A running torch profiler, and who waits for it."""

    def __init__(self, frontend: Frontend, call_id: int, seconds: float) -> None:
        import torch  # only a profile needs it here

        self.frontend, self.call_id = frontend, call_id
        self._profiler = torch.profiler.profile()
        self._profiler.start()
        self.end_time = time.monotonic() + seconds  # the first start takes long

    def save(self, folder: Path) -> Path:
        """A trace for chrome://tracing or Perfetto."""
        self._profiler.stop()
        path = folder / f"profile-{self.frontend.number}-{self.call_id}.json"
        self._profiler.export_chrome_trace(str(path))
        return path


def describe(sequence: Sequence) -> dict[str, Any]:
    return {
        "request_id": sequence.request_id,
        "index": sequence.index,
        "priority": sequence.priority,
        "num_prompt_tokens": sequence.num_prompt_tokens,
        "num_generated_tokens": sequence.num_generated_tokens,
        "num_computed_tokens": sequence.num_computed_tokens,
        "num_cached_tokens": sequence.num_cached_tokens,
        "num_preemptions": sequence.num_preemptions,
        "num_blocks": len(sequence.block_table),
        "block_ids": list(sequence.block_table),
    }


def why_first_waits(scheduler: Scheduler) -> str:
    """Of the head of the queue, or of who would be: one of `WAITING_REASONS`."""
    limits, num_running = scheduler.limits, len(scheduler.running)
    first = scheduler.waiting[0] if scheduler.waiting else None
    if first is not None and first.num_pending_tokens:
        return "token"
    if not scheduler._free_rows or num_running >= min(limits.max_num_seqs, limits.max_num_batched_tokens):
        return "rows"
    return "blocks" if first is not None and scheduler._is_known_to_wait(first) else "next"


def max_admissible_tokens(engine: LLMEngine) -> int:
    """The longest prompt that would be admitted next, without what a prefix cache may give it."""
    scheduler, blocks = engine.scheduler, engine.scheduler.block_manager
    if why_first_waits(scheduler) != "next":  # nobody overtakes
        return 0
    reserve = int(scheduler.limits.watermark * blocks.num_blocks) if scheduler.running else 0
    return min(max(0, blocks.num_free_blocks - reserve) * blocks.block_size, engine.max_model_len)


def prompt_done_time(scheduled: float | None, result_time: float, first_token: float | None) -> float:
    """Where prefill ends and the first decode begins; between the two times around it, however clocks are read."""
    last = result_time if first_token is None else min(result_time, first_token)
    return last if scheduled is None else max(last, scheduled)


def traceback_of(error: BaseException) -> str:
    return "".join(traceback.format_exception(type(error), error, error.__traceback__))
