"""Tracker: the listener that follows each request through its stages, and tells sinks what happened.

On the engine's thread it only notes times and appends to a queue; a thread of its own formats and writes. So a slow disk
or collector costs the engine nothing, and what cannot be kept up with is counted and dropped, never waited for.
Sinks: `stage_log.py`, `lifecycle.py`, `chrome_trace.py`, `otel.py`.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from typing import Any, NamedTuple

from nanovllm.engine.events import (
    Event,
    RequestAdded,
    SequenceAdmitted,
    SequenceFinished,
    SequencePreempted,
    StepCollected,
    StepDispatched,
)
from nanovllm.log import logger
from nanovllm.observability.timeline import Timeline

PERIOD_S = 0.05  # between two looks into the queue
MAX_QUEUED = 200_000  # items that wait to be written
MAX_WAITING = 20_000  # ended requests that wait for the front end's facts


class StepFacts(NamedTuple):
    """A dispatched step without its batch. Times in seconds, `schedule_ns` in nanoseconds."""

    time: float
    step: int
    batch_size: int
    num_tokens: int
    num_samples: int
    waiting_len: int
    running_size: int
    free_blocks: int
    schedule_ns: int


NO_STEP = StepFacts(0.0, -1, 0, 0, 0, 0, 0, 0, 0)


class Sink:
    """What a writer may want to know; called by the tracker's thread, one call at a time."""

    def on_stage(self, timeline: Timeline, stage: str, time: float, num_generated: int, step: StepFacts) -> None:
        """A request has reached a stage."""

    def on_step(self, dispatched: StepFacts, collected: StepCollected) -> None:
        """A step has ended."""

    def on_request(self, timeline: Timeline) -> None:
        """A request has ended and everything about it is known."""

    def flush(self) -> None:
        """Make what was written visible to readers."""

    def close(self) -> None:
        """The engine has ended."""


class Tracker:
    """A `Listener`. `joins`: front ends send their facts (`join`) after each request."""

    def __init__(self, sinks: list[Sink], joins: bool = False) -> None:
        self.num_lost = 0
        self._sinks, self._joins = sinks, joins
        self._open: dict[str, Timeline] = {}
        self._owners: dict[int, Timeline] = {}  # by seq_id, from the first admission on
        self._without_token: list[Timeline] = []  # scheduled, and no first token yet
        self._ending: list[Timeline] = []  # ended during the step that is being applied
        self._ended: OrderedDict[str, Timeline] = OrderedDict()  # waits for the front end
        self._early: OrderedDict[str, dict[str, Any]] = OrderedDict()  # facts of requests that have not ended here
        self._step = NO_STEP
        self._steps: dict[int, StepFacts] = {}  # in flight
        self._queue: deque[tuple[str, tuple[Any, ...]]] = deque()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._write, name="nanovllm-observer", daemon=True)
        self._thread.start()

    # --- the engine's thread

    def on_event(self, event: Event) -> None:
        if isinstance(event, StepDispatched):
            self._step = self._steps[event.step] = StepFacts(*event[:9])
        elif isinstance(event, StepCollected):
            self._on_collected(event)
        elif isinstance(event, SequenceFinished):
            self._on_finished(event)
        elif isinstance(event, RequestAdded):
            times: dict[str, float] = {"received": event.time, "tokenized": event.time, "queued": event.time}
            timeline = Timeline(event.request_id, event.num_prompt_tokens, event.num_sequences, times, event.request)
            timeline.num_unfinished = event.num_sequences
            self._open[event.request_id] = timeline
            self._put("on_stage", timeline, "queued", event.time, 0, self._step)
        elif isinstance(event, SequenceAdmitted):
            self._on_admitted(event)
        elif isinstance(event, SequencePreempted) and (timeline := self._open.get(event.request_id)) is not None:
            timeline.num_preemptions += 1
            num_generated = event.num_tokens - timeline.num_prompt_tokens
            self._put("on_stage", timeline, "preempted", event.time, num_generated, self._step)

    def _on_admitted(self, event: SequenceAdmitted) -> None:
        timeline = self._open.get(event.request_id)
        if timeline is not None and "scheduled" not in timeline.times:
            first = timeline.request.sequences[0]
            timeline.times["scheduled"] = event.time if first.first_scheduled_time is None else first.first_scheduled_time
            timeline.num_cached_tokens = event.num_cached_tokens
            self._without_token.append(timeline)
            self._put("on_stage", timeline, "scheduled", event.time, 0, self._step)

    def _on_collected(self, event: StepCollected) -> None:
        dispatched = self._steps.pop(event.step, NO_STEP)
        self._put("on_step", dispatched, event)
        if self._without_token:
            self._without_token = [one for one in self._without_token if not self._note_first(one, event, dispatched)]
        if self._ending:
            ending, self._ending = self._ending, []
            for timeline in ending:
                self._end(timeline, event.time)

    def _note_first(self, timeline: Timeline, event: StepCollected, step: StepFacts) -> bool:
        """True when nothing is left to wait for. The engine's own stamp of the first token is the one that counts."""
        metrics = timeline.request.output.metrics
        first = metrics.first_token_time
        if first is None:
            return timeline.num_unfinished == 0
        done = max(min(event.time - event.apply_ns * 1e-9, first), timeline.times["scheduled"])
        timeline.times["prefill_done"] = done
        timeline.times["first_token"] = timeline.engine_first_token = first
        self._put("on_stage", timeline, "prefill_done", done, 0, step)
        self._put("on_stage", timeline, "first_token", first, 1, step)
        return True

    def _on_finished(self, event: SequenceFinished) -> None:
        timeline = self._open.get(event.request_id)
        if timeline is None:
            return
        timeline.finish_reasons.append(event.reason)
        timeline.num_generated_tokens += event.num_generated_tokens
        timeline.num_unfinished -= 1
        if timeline.num_unfinished == 0:
            timeline.times["decode_done"] = event.time
            del self._open[event.request_id]
            if event.reason == "abort":  # between two steps, and perhaps none follows
                self._end(timeline, event.time)
            else:
                self._ending.append(timeline)

    def _end(self, timeline: Timeline, now: float) -> None:
        times, finish = timeline.times, timeline.request.output.metrics.finish_time
        if finish is not None:
            times["decode_done"] = finish
        times["stream_done"], times["cleanup_done"] = times["decode_done"], max(now, times["decode_done"])
        timeline.request = None
        self._put("on_stage", timeline, "decode_done", times["decode_done"], timeline.num_generated_tokens, self._step)
        if not self._joins:
            self._put("on_request", timeline)
            return
        facts = self._early.pop(timeline.request_id, None)
        if facts is not None:
            timeline.join(facts)
            self._put("on_request", timeline)
            return
        self._ended[timeline.request_id] = timeline
        if len(self._ended) > MAX_WAITING:
            self._put("on_request", self._ended.popitem(last=False)[1])

    def join(self, request_id: str, facts: dict[str, Any]) -> None:
        """A front end has sent the last byte of a request, or has given it up. On the engine's thread, like events."""
        timeline = self._ended.pop(request_id, None)
        if timeline is not None:
            timeline.join(facts)
            self._put("on_request", timeline)
            return
        self._early[request_id] = facts
        if len(self._early) > MAX_WAITING:
            self._early.popitem(last=False)

    def _put(self, what: str, *arguments: Any) -> None:
        if len(self._queue) < MAX_QUEUED:
            self._queue.append((what, arguments))
        else:
            self.num_lost += 1

    # --- the tracker's own thread

    def _write(self) -> None:
        while not self._stop.wait(PERIOD_S):
            self._drain()
        self._drain()

    def _drain(self) -> None:
        queue, has_written = self._queue, bool(self._queue)
        while queue:
            what, arguments = queue.popleft()
            for sink in list(self._sinks):
                self._tell(sink, what, arguments)
        if has_written:
            for sink in list(self._sinks):
                self._tell(sink, "flush", ())

    def _tell(self, sink: Sink, what: str, arguments: tuple[Any, ...]) -> None:
        """A sink that fails (a full disk) is left out from then on; the engine does not suffer from it."""
        try:
            getattr(sink, what)(*arguments)
        except Exception:
            logger.exception("%s failed and is switched off", type(sink).__name__)
            self._sinks.remove(sink)

    def close(self) -> None:
        """Write everything, also of requests whose front end has not reported. Idempotent."""
        if self._stop.is_set():
            return
        for timeline in self._ended.values():
            self._put("on_request", timeline)
        self._ended.clear()
        self._stop.set()
        self._thread.join()
        for sink in list(self._sinks):
            self._tell(sink, "close", ())
        if self.num_lost:
            logger.warning("%d observations were lost: more came than could be written", self.num_lost)
