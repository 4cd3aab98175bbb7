"""Chrome trace of steps and requests: open the file at ui.perfetto.dev, or in chrome://tracing.

Three lanes: what the scheduler decides and applies (control plane), the steps (data plane), and one group per request with
its spans; counters for queue, batch and free blocks. Times are microseconds of the monotonic clock. With a step in flight
the device's lane begins a step where the one before it ended, so that slices of one lane never overlap.
"""

from __future__ import annotations

import os
from typing import Any

import msgspec

from nanovllm.engine.events import StepCollected
from nanovllm.log import logger
from nanovllm.observability.timeline import Timeline
from nanovllm.observability.tracker import Sink, StepFacts

MAX_EVENTS = 2_000_000  # about 300 MB; Perfetto takes no more with comfort
CONTROL, DATA = 1, 2


class ChromeTrace(Sink):
    def __init__(self, path: str) -> None:
        self._file = open(path, "wb")  # noqa: SIM115  closed by `close`
        self._pid = os.getpid()
        self._num_events = 0
        self._last_end = 0.0  # of the last step, seconds
        self._file.write(b'{"displayTimeUnit":"ms","traceEvents":[\n')
        self._write("process_name", "M", 0.0, CONTROL, args={"name": "nanovllm engine"})
        for lane, name in ((CONTROL, "control plane"), (DATA, "data plane")):
            self._write("thread_name", "M", 0.0, lane, args={"name": name})

    def on_step(self, dispatched: StepFacts, collected: StepCollected) -> None:
        if dispatched.step < 0:
            return  # dispatched before the trace began
        apply_s, schedule_s = collected.apply_ns * 1e-9, dispatched.schedule_ns * 1e-9
        result = collected.time - apply_s
        start = max(min(dispatched.time, result), self._last_end)
        self._last_end = max(start, result)
        facts = {"step": dispatched.step, "batch_size": dispatched.batch_size, "tokens": dispatched.num_tokens}
        facts |= {"new_tokens": collected.num_new_tokens, "forward_ms": collected.forward_ns * 1e-6}
        name = "decode" if dispatched.num_tokens == dispatched.batch_size else "prefill or mixed"
        self._slice("schedule", dispatched.time - schedule_s, schedule_s, CONTROL, {"plane": "control", "step": dispatched.step})
        self._slice(name, start, self._last_end - start, DATA, {"plane": "data", **facts})
        self._slice("apply", result, apply_s, CONTROL, {"plane": "control", "step": collected.step})
        queues = {"running": dispatched.running_size, "waiting": dispatched.waiting_len}
        self._write("sequences", "C", dispatched.time, CONTROL, args=queues)
        self._write("KV blocks", "C", dispatched.time, CONTROL, args={"free": dispatched.free_blocks})

    def on_request(self, timeline: Timeline) -> None:
        spans = timeline.spans()
        if not spans:
            return
        start, end = timeline.times["received"], timeline.times["cleanup_done"]
        shared = {"cat": "request", "id": timeline.request_id}
        self._write(timeline.request_id, "b", start, CONTROL, args=timeline.facts(), **shared)
        for name, (first, last) in spans.items():
            self._write(name, "b", first, CONTROL, **shared)
            self._write(name, "e", last, CONTROL, **shared)
        self._write(timeline.request_id, "e", end, CONTROL, **shared)

    def annotate(self, name: str, time: float) -> None:
        """A mark at one moment, seconds."""
        self._write(name, "i", time, CONTROL, s="g")

    def _slice(self, name: str, start: float, seconds: float, lane: int, facts: dict[str, Any]) -> None:
        self._write(name, "X", start, lane, dur=max(0.0, seconds) * 1e6, cat=facts["plane"], args=facts)

    def _write(self, name: str, phase: str, time: float, lane: int, **more: Any) -> None:
        if self._num_events >= MAX_EVENTS:
            if self._num_events == MAX_EVENTS:
                logger.warning("the trace file is full: %d events", MAX_EVENTS)
                self._num_events += 1
            return
        event = {"name": name, "ph": phase, "ts": time * 1e6, "pid": self._pid, "tid": lane, **more}
        self._file.write((b",\n" if self._num_events else b"") + msgspec.json.encode(event))
        self._num_events += 1

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.write(b"\n]}\n")
        self._file.close()
