"""InProcessExecutor: one rank, in this process. Dispatching is calling the runner; the device may lag behind."""

from __future__ import annotations

from collections import deque
from contextlib import suppress

from nanovllm.engine.batch import ScheduledBatch, StepResult
from nanovllm.engine.model_runner import ModelRunner, PendingStep


class InProcessExecutor:
    def __init__(self, runner: ModelRunner) -> None:
        self.runner: ModelRunner | None = runner
        self._in_flight: deque[PendingStep] = deque()

    def dispatch(self, batch: ScheduledBatch) -> None:
        if self.runner is None:
            raise RuntimeError("the executor was closed")
        before = self._in_flight[-1] if self._in_flight else None
        self._in_flight.append(self.runner.run(batch, before))

    def collect(self) -> StepResult:
        return self._in_flight.popleft().result()

    def begin_draw(self) -> None:
        if self._in_flight:
            self._in_flight[0].begin_draw()

    def close(self) -> None:
        """Let go of the model and its caches, and of memory that a step under way may write to."""
        with suppress(IndexError, RuntimeError):  # nothing is under way, or the device has failed and writes no more
            self._in_flight[-1].wait()
        if self.runner is not None:
            self.runner.graphs = None  # they name the runner: a circle would leave all memory to the garbage collector
        self.runner = None
        self._in_flight.clear()
