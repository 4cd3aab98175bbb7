"""Events: what the engine tells about itself, to whoever listens.

The engine does not know its listeners (logs, metrics, traces live in `observability/`). With no listener the cost of
an event is one truth test of an empty list: `if events.listeners: events.emit(...)`.
Times are seconds of the engine's clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from nanovllm.engine.batch import ScheduledBatch


class RequestAdded(NamedTuple):
    time: float
    request_id: str
    num_prompt_tokens: int
    num_sequences: int
    request: Any  # the live `engine.request.Request`: to read its times and counts, not to write


class SequenceAdmitted(NamedTuple):
    time: float
    request_id: str
    seq_id: int
    num_tokens: int
    num_cached_tokens: int  # tokens whose KV is shared: prefix cache, or a sibling's prompt


class SequencePreempted(NamedTuple):
    time: float
    request_id: str
    seq_id: int
    num_tokens: int


class SequenceFinished(NamedTuple):
    time: float
    request_id: str
    seq_id: int
    reason: str
    num_generated_tokens: int


class StepDispatched(NamedTuple):
    time: float
    step: int
    num_sequences: int
    num_tokens: int
    num_samples: int
    num_waiting: int
    num_running: int
    num_free_blocks: int
    schedule_ns: int  # host time spent deciding
    batch: ScheduledBatch  # its columns say which chunks; seats hold token ids, which no listener may keep


class StepCollected(NamedTuple):
    time: float
    step: int
    num_new_tokens: int
    forward_ns: int
    apply_ns: int  # host time spent on appending, stopping, publishing


Event = RequestAdded | SequenceAdmitted | SequencePreempted | SequenceFinished | StepDispatched | StepCollected


class Listener(Protocol):
    """Receives every event, on the engine's thread: return quickly, never raise."""

    def on_event(self, event: Event) -> None: ...


@dataclass(slots=True)
class Events:
    """The list of listeners, shared by the engine and its scheduler."""

    listeners: list[Listener] = field(default_factory=list)

    def emit(self, event: Event) -> None:
        for listener in self.listeners:
            listener.on_event(event)
