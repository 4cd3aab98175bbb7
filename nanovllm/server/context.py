"""Server: what the endpoint modules stand on. Reading a body, running a request, answering as a whole or as a stream.

    struct = await server.read(request, CompletionRequest, refused={"suffix": "..."})
    stream = server.submit(request, prompt, params)
    outputs = await server.run(request, finished([stream]))  # or: return server.sse(request, events)

Whatever ends a request early (client gone, deadline, shutdown) cancels its work, which closes its stream, which aborts it
in the engine. Knows no endpoint; read next: `admission.py`, `app.py`.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from nanovllm.engine.messages import Origin
from nanovllm.errors import RequestError
from nanovllm.log import logger
from nanovllm.outputs import GenerationOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.server.admission import Admission, Ticket, queue_timed_out
from nanovllm.server.auth import Key
from nanovllm.server.body import parse_body, read_body
from nanovllm.server.errors import BadField, ClientGone, DeadlineExceeded, HttpError, QueueFull, Unavailable, error_event
from nanovllm.server.grammars import KEY, Grammars
from nanovllm.server.logprobs import num_candidates, num_prompt_candidates
from nanovllm.server.metrics import Metrics, RequestRecord, Snapshot
from nanovllm.server.options import ServerOptions
from nanovllm.server.shared import PERIOD_S, SharedFolder

if TYPE_CHECKING:
    from nanovllm.engine.async_engine import AsyncEngine

T = TypeVar("T")
DEFAULT_MODEL_NAME = "SmolLM2-135M-Instruct"  # of the embedded model
LIVE_LIMITS = ("max_queued_requests", "queue_timeout_s", "request_timeout_s")  # an admin may change them
MAX_PRIORITY = 1000  # of a request, either way; a key's class outweighs it


class Server:
    """One per front-end process: `request.app.state.server`."""

    def __init__(self, engine: AsyncEngine, options: ServerOptions, *, shared: SharedFolder | None = None) -> None:
        """`shared`: where several front ends meet; each then has its part of the limits."""
        facts = engine.facts
        self.engine, self.options = engine, options
        self.limits = options  # those of now: an admin may have changed some
        self.model_name = served_name(options, facts.model)
        self.started_at = int(time.time())
        self.metrics = Metrics(facts.max_model_len)
        self.is_draining = False
        self.on_drain: Callable[[], None] | None = None  # set by whoever runs the process
        self.num_candidates = 0  # log-probabilities that the requests under way may come to hold, at most
        self.num_open = 0  # HTTP requests that a drain waits for
        self._share = 1 / options.num_frontends if shared else 1.0
        self.admission = Admission(capacity=1, max_queued=0, share=self._share)
        self._shared = shared
        self._use_limits(options, facts.max_num_seqs)
        if shared is not None and (before := shared.predecessor()) is not None:
            self.metrics.counts.add(before)
        self._stops: set[asyncio.Future[None]] = set()  # one for each `run`; done: it ends with an error
        self._numbers = count()
        self.grammars = Grammars(engine, options)
        self._reports: set[asyncio.Future[Any]] = set()  # kept: a task without owner may vanish

    def close(self) -> None:
        """Let go of what outlives a request. Idempotent."""
        self.grammars.close()

    # --- in

    async def read(self, request: Request, struct_type: type[T], refused: Mapping[str, str]) -> T:
        """The body as a struct. Raises `BadField` (400), or 408 and 413.

        `refused`: field -> why it is not supported; allowed only where it is null. Unknown fields are errors.
        """
        body = await read_body(request, self.options)
        KEY.set(self.key_of(request).name)
        request.state.body_size = len(body)  # how long all that follows may take
        return await parse_body(body, struct_type, refused, self.options)

    # --- the work

    async def submit(
        self,
        request: Request,
        prompt: str | list[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        request_id: str | None = None,
        number: int = 0,
    ) -> AsyncIterator[GenerationOutput]:
        """Through admission into the engine; yields the live output whenever it has grown. Closing it aborts.

        Errors of the door are raised by the first step: `RequestError`, `QueueFull` (429), `Unavailable` (503).
        `number`: of this prompt among those of the client's call.
        """
        key = self.key_of(request)
        name = request_id or f"{request.state.request_id}-{next(self._numbers)}"
        candidates = num_candidates(params, self.engine.facts.max_model_len) + num_prompt_candidates(_num_tokens(prompt), params)
        ticket = self._enter(key, priority, params.n, self._most_tokens(prompt, params), candidates)
        record = self.metrics.begin(params, request.state.arrived, name)
        request.scope["state"].setdefault("records", []).append(record)
        late = _QueueTimer(self, ticket, name)
        error: BaseException | None = None
        try:
            if ticket.turn is not None:
                await ticket.turn
            stream = self.engine.generate(
                prompt,
                params,
                request_id=name,
                priority=self._engine_priority(key, priority),
                cache_salt=self.salt(key, cache_salt),
                origin=Origin(key.salt, request.state.request_id, request.scope["path"], number),
            )
            async with aclosing(stream):  # type: ignore[type-var]
                async for output in stream:
                    if late.error is not None:
                        break  # what it has is what its abort left
                    late.stop()
                    record.grew(output)
                    yield output
            if late.error is not None:
                raise late.error
        except (GeneratorExit, asyncio.CancelledError):
            raise
        except BaseException as failure:
            error = failure
            raise
        finally:
            late.stop()
            used = record.ended(error)
            if not used and error is None and ticket.state == "running":
                used = _num_tokens(prompt)  # who leaves before the first token does not get the prompt for nothing
            self.admission.leave(ticket, used)
            self.num_candidates -= ticket.candidates

    async def embed(
        self,
        request: Request,
        prompt: str | list[int],
        pooling: str = "mean",
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> Any:
        """`AsyncEngine.embed` through the same admission. Use it inside of `run`."""
        key = self.key_of(request)
        name = f"{request.state.request_id}-{next(self._numbers)}"
        ticket = self._enter(key, priority, 1, len(prompt))
        late, used = _QueueTimer(self, ticket, name), 0
        try:
            if ticket.turn is not None:
                await ticket.turn
            result = await self.engine.embed(
                prompt,
                pooling,
                request_id=name,
                priority=self._engine_priority(key, priority),
                cache_salt=self.salt(key, cache_salt),
            )
            used = result.num_prompt_tokens
            return result
        except RequestError as error:
            raise late.error or error from None
        finally:
            late.stop()
            self.admission.leave(ticket, used)

    async def run(self, request: Request, work: Awaitable[T]) -> T:
        """The result of `work`, unless the client leaves, the deadline passes or the server stops: then it is cancelled.

        Raises `ClientGone`, `DeadlineExceeded` (504), `Unavailable` (503).
        """
        task = asyncio.ensure_future(work)
        gone, stop = self._gone(request), asyncio.get_running_loop().create_future()
        self._stops.add(stop)
        limit = self.limits.request_timeout_s
        remaining = request.state.arrived + limit - time.monotonic() if limit else None
        try:
            await asyncio.wait({task, gone, stop}, timeout=remaining, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if gone.done():
                raise ClientGone
            if stop.done():
                raise Unavailable("the server is shutting down", 1, "shutting_down")
            raise DeadlineExceeded(limit)
        finally:
            self._stops.discard(stop)
            if not task.done():
                task.cancel()
                await asyncio.wait({task})

    # --- out

    def sse(self, request: Request, events: AsyncIterator[bytes]) -> Response:
        """A `text/event-stream` of ready-made events. Errors before the first event get their own status; later ones
        become a last event. A client that reads slowly slows `events` down; one that is gone closes it."""
        return EventStream(self, request, events)

    # --- helpers

    def report(self, scope: Mapping[str, Any], ended: float | None) -> None:
        """Tell the engine process what only HTTP knows of a request; nobody waits for it. `ended`: None: it was cut off."""
        traceparent = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"traceparent"), None)
        for record in scope["state"]["records"]:
            facts = http_facts(record, scope["path"], traceparent, ended)
            task = asyncio.ensure_future(self.engine.call("note_request", request_id=record.name, facts=facts))
            self._reports.add(task)
            task.add_done_callback(self._reported)

    def _reported(self, task: asyncio.Future[Any]) -> None:
        self._reports.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.debug("a request could not be reported: %s", error)

    def key_of(self, request: Request) -> Key:
        return request.state.key

    def salt(self, key: Key, cache_salt: str | None) -> str:
        """Requests share cached prefixes only within one key, and there only with the same `cache_salt`."""
        own = "" if self.options.share_prefix_cache else key.salt
        return f"{own}:{cache_salt or ''}" if own or cache_salt else ""

    # --- the process

    def begin_drain(self) -> None:
        """No new requests from now on. Idempotent."""
        if not self.is_draining:
            self.is_draining = True
            if self.on_drain is not None:
                self.on_drain()

    def all_counts(self) -> Snapshot:
        """Those of all front ends: this one's are of now, the others' at most a second old."""
        counts = msgspec.msgpack.decode(msgspec.msgpack.encode(self.metrics.counts), type=Snapshot)  # a deep copy
        counts.gauges = {"requests_open": self.num_open, "requests_queued": self.admission.num_waiting}
        for other in self._shared.others() if self._shared is not None else ():
            counts.add(other)
        return counts

    def check_limits(self, changes: Mapping[str, Any]) -> ServerOptions:
        """The limits with these changes. Raises `ConfigError`."""
        return replace(self.limits, **changes)

    def share_limits(self, limits: ServerOptions, max_num_seqs: int) -> None:
        """Use them from now on, here and in the other front ends. `max_num_seqs`: the engine's new one."""
        self._use_limits(limits, max_num_seqs)
        if self._shared is not None:
            names = {name: getattr(limits, name) for name in LIVE_LIMITS}
            self._shared.write_limits({**names, "max_num_seqs": max_num_seqs})

    async def keep_in_step(self) -> None:
        """With other front ends, forever."""
        while self._shared is not None:
            counts = self.metrics.counts
            counts.gauges = {"requests_open": self.num_open, "requests_queued": self.admission.num_waiting}
            self._shared.write_counts(counts)
            changes = self._shared.changed_limits()
            if changes is not None:
                max_num_seqs = int(changes.pop("max_num_seqs"))
                self._use_limits(self.check_limits(changes), max_num_seqs)
            await asyncio.sleep(PERIOD_S)

    def _use_limits(self, limits: ServerOptions, max_num_seqs: int) -> None:
        self.limits = limits
        self.admission.capacity = _capacity(max_num_seqs, self._share)
        self.admission.advance()
        self.admission.max_queued = math.ceil(limits.max_queued_requests * self._share)

    def stop_open_requests(self) -> None:
        """End what is open with an error: the drain has lasted long enough."""
        for stop in self._stops:
            if not stop.done():
                stop.set_result(None)

    def _enter(self, key: Key, priority: int, weight: int, tokens: int, candidates: int = 0) -> Ticket:
        if isinstance(priority, bool) or not isinstance(priority, int) or abs(priority) > MAX_PRIORITY:
            raise BadField("priority", f"priority={priority!r} must be a whole number from {-MAX_PRIORITY} to {MAX_PRIORITY}")
        limit = math.ceil(self.limits.max_open_logprobs * self._share)
        try:
            if candidates and self.num_candidates and self.num_candidates + candidates > limit:  # one alone always may
                text = f"log-probabilities: too many are under way, max_open_logprobs={self.limits.max_open_logprobs}"
                raise QueueFull(text, self.admission.retry_after(), "logprobs_full")
            ticket = self.admission.enter(key, priority, weight, tokens)
            ticket.candidates = candidates
            self.num_candidates += candidates
            return ticket
        except HttpError as error:
            self.metrics.refused(error.code or "")
            raise

    def _most_tokens(self, prompt: str | list[int], params: SamplingParams) -> int:
        """What a key's quota reserves until the true number is known."""
        room = self.engine.facts.max_model_len
        return min(_num_tokens(prompt), room) + params.n * min(params.max_tokens or room, room)

    def _engine_priority(self, key: Key, priority: int) -> int:
        """One number for the engine's own policy: the key's class first."""
        return key.priority * (2 * MAX_PRIORITY + 1) + priority

    def _gone(self, request: Request) -> asyncio.Future[None]:
        """Done when the client has closed the connection. One watcher per request; the body must have been read."""
        state = request.scope["state"]
        if "gone" not in state:
            state["gone"] = asyncio.ensure_future(_until_disconnect(request))
        return state["gone"]


class EventStream(Response):
    """See `Server.sse`."""

    media_type = "text/event-stream"

    def __init__(self, server: Server, request: Request, events: AsyncIterator[bytes]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # a proxy must pass events on at once
        super().__init__(None, headers=headers)
        del self.headers["content-length"]
        self._server, self._request, self._events = server, request, events
        self._has_begun = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await self._server.run(self._request, self._pump(send))
        except ClientGone:
            if not self._has_begun:
                raise
        except Exception as error:
            if not self._has_begun:
                raise
            await self._events.aclose()  # type: ignore[attr-defined]  # now: the client may not take the last event for long
            last = error_event(scope["path"], error, self._request.state.request_id)
            await send({"type": "http.response.body", "body": last, "more_body": False})
        finally:
            await self._events.aclose()  # type: ignore[attr-defined]

    async def _pump(self, send: Any) -> None:
        async for event in self._events:
            if not self._has_begun:
                self._has_begun = True
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": event, "more_body": True})
        if not self._has_begun:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class _QueueTimer:
    """Ends a request that has no first token in time, whether it waits here or in the engine."""

    def __init__(self, server: Server, ticket: Ticket, name: str) -> None:
        self._server, self._ticket, self._name = server, ticket, name
        self.error: HttpError | None = None
        seconds = server.limits.queue_timeout_s
        self._handle = asyncio.get_running_loop().call_later(seconds, self._expire) if seconds else None

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _expire(self) -> None:
        server = self._server
        self.error = queue_timed_out(server.limits.queue_timeout_s, server.admission.retry_after())
        server.metrics.refused("queue_timeout")
        if self._ticket.state == "waiting":
            server.admission.expire(self._ticket, self.error)
        else:
            self._abort = asyncio.ensure_future(server.engine.abort(self._name))  # kept: a task without owner may vanish


def _num_tokens(prompt: str | list[int]) -> int:
    """Of a text, about."""
    return len(prompt) // 4 if isinstance(prompt, str) else len(prompt)


async def _until_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def http_facts(record: RequestRecord, path: str, traceparent: str | None, ended: float | None) -> dict[str, Any]:
    """Times in seconds of the monotonic clock, under the names of the stages that they are."""
    now = time.monotonic()
    facts: dict[str, Any] = {"received": record.arrived, "stream_done": now if ended is None else ended, "cleanup_done": now}
    facts["operation"] = "text_completion" if path.endswith("/completions") and "chat" not in path else "chat"
    if record.first_token_s is not None and record.output is not None:
        facts["first_token"] = record.arrived + record.first_token_s
        facts["tokenized"] = record.output.metrics.tokenized_time
        facts["decode_done"] = record.output.metrics.finish_time
    if traceparent is not None:
        facts["traceparent"] = traceparent[:128]
    return facts


def served_name(options: ServerOptions, model: str | None) -> str:
    """What clients call the model."""
    return options.served_model_name or model or DEFAULT_MODEL_NAME


def _capacity(max_num_seqs: int, share: float) -> int:
    """What the engine runs at once, and a quarter more: its next ones are there when places become free."""
    return max(1, round((max_num_seqs + max(4, max_num_seqs // 4)) * share))
