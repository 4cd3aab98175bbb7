"""Executor: how the engine reaches the ranks that compute. In-process, by pipes, simulated: three methods either way."""

from __future__ import annotations

from typing import Protocol

from nanovllm.engine.batch import ScheduledBatch, StepResult


class Executor(Protocol):
    def dispatch(self, batch: ScheduledBatch) -> None:
        """Start one step; do not wait for it. Steps run in the order of dispatch.

        A step with matchers draws its tokens when the next one is dispatched or its own result is collected: by then the
        caller has collected all results before it, and shown them to the matchers. The forward pass runs meanwhile.
        """
        ...

    def begin_draw(self) -> None:
        """What was collected has been shown to the matchers: the oldest step that was not may begin its masks."""
        ...

    def collect(self) -> StepResult:
        """Wait for the oldest step that was dispatched and not collected."""
        ...

    def close(self) -> None:
        """Release what it holds. Idempotent."""
        ...
