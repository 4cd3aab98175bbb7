"""Watchdog: notices a step that does not end, and says what it was computing and where every thread stands.

The deadline follows the recent steps: many times the longest of them, and never below what the options say. It only tells
(log, flight record); to end a process that hangs is the business of whoever started it.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any

from nanovllm.engine.batch import ScheduledBatch
from nanovllm.engine.events import Event, StepCollected, StepDispatched
from nanovllm.log import logger

NUM_RECENT = 64  # steps that the deadline looks back on
PATIENCE = 20.0  # times the longest of them
MAX_CHUNKS_SHOWN = 64


class Watchdog:
    """A `Listener` with a thread. `on_stall(reason)` is called once per stalled step, on that thread."""

    def __init__(self, min_seconds: float, on_stall: Callable[[str], Any] | None = None) -> None:
        self.min_seconds = min_seconds
        self.num_stalls = 0
        self._on_stall = on_stall
        self._recent: deque[float] = deque(maxlen=NUM_RECENT)
        self._in_flight: dict[int, tuple[float, ScheduledBatch]] = {}
        self._progress_time = 0.0  # of the last dispatch into an empty pipe, or result
        self._told = -1  # the step that was told of
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="nanovllm-watchdog", daemon=True)
        self._thread.start()

    @property
    def deadline(self) -> float:
        """Seconds that a step may take now."""
        return max(self.min_seconds, PATIENCE * max(self._recent, default=0.0))

    def on_event(self, event: Event) -> None:
        if isinstance(event, StepDispatched):
            if not self._in_flight:
                self._progress_time = time.monotonic()
            self._in_flight[event.step] = (self._progress_time, event.batch)
        elif isinstance(event, StepCollected):
            now = time.monotonic()
            if self._in_flight.pop(event.step, None) is not None:
                self._recent.append(now - self._progress_time)
            self._progress_time = now

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self.min_seconds / 4)):
            oldest = next(iter(list(self._in_flight.items())), None)
            if oldest is None or oldest[0] == self._told:
                continue
            step, (_, batch) = oldest
            waited, deadline = time.monotonic() - self._progress_time, self.deadline
            if waited > deadline:
                self._told = step
                self.num_stalls += 1
                self._tell(step, batch, waited, deadline)

    def _tell(self, step: int, batch: ScheduledBatch, waited: float, deadline: float) -> None:
        logger.error("step %d has taken %.1f s (deadline %.1f s)\n%s\n%s", step, waited, deadline, describe(batch), stacks())
        if self._on_stall is not None:
            try:
                self._on_stall(f"step {step} stalled")
            except Exception:
                logger.exception("the flight record could not be written")

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


def describe(batch: ScheduledBatch) -> str:
    """Its chunks: rows and ranges, no tokens."""
    chunks = list(zip(batch.rows, batch.starts, batch.lengths))
    shown = ", ".join(f"row {row}: [{start}, {start + length})" for row, start, length in chunks[:MAX_CHUNKS_SHOWN])
    more = f" and {len(chunks) - MAX_CHUNKS_SHOWN} more" if len(chunks) > MAX_CHUNKS_SHOWN else ""
    return f"batch of {len(chunks)} chunks, {batch.num_tokens} tokens, {len(batch.sampled_chunks)} draws: {shown}{more}"


def stacks() -> str:
    """Where every thread of this process is. Source lines only, no values."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident, frame in sys._current_frames().items():
        parts.append(f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame)).rstrip()}")
    return "\n".join(parts)
