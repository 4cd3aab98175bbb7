"""PendingStep: a step whose results may still be on their way to the host, or are not drawn yet."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from nanovllm.engine.batch import StepResult
from nanovllm.outputs import PositionLogprobs
from nanovllm.sampling.logprobs import BatchLogprobs
from nanovllm.sampling.sampler import SampledTokens

NOTHING = torch.empty(0, dtype=torch.int64)


class Events:
    """A GPU's events, used again: making one takes half as long as recording it."""

    def __init__(self) -> None:
        self._unused: list[Any] = []

    def record(self) -> Any:
        event = self._unused.pop() if self._unused else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def take_back(self, events: Iterable[Any]) -> None:
        """Each once, when nobody will ask it any more."""
        self._unused.extend(events)


@dataclass(slots=True)
class PendingStep:
    step: int
    held: Callable[[], SampledTokens] | None = None  # the draw, which waits for what its grammars must read first
    begin_masks: Callable[[], None] | None = None  # what of the draw can go on beside the host, if anything
    token_ids: Tensor = NOTHING  # [num_samples] int64, on the host or on its way there
    logprobs: BatchLogprobs | None = None
    prompt_logprobs: dict[int, list[BatchLogprobs]] = field(default_factory=dict)
    embeddings: dict[int, Tensor] = field(default_factory=dict)
    forward_ns: int = 0
    spans: list[tuple[Any, Any]] = field(default_factory=list)  # of a GPU's work on it: events at begin and end
    done: Any = None  # event after all of that
    events: Events | None = None  # of the GPU

    def end_timing(self, started: Any, events: Events | None = None) -> None:
        """The work that began with `started`, of `begin_timing`, has been done, or is in the stream of a GPU."""
        if events is None:
            self.forward_ns += time.perf_counter_ns() - started
        else:
            self.events, self.done = events, events.record()
            self.spans.append((started, self.done))

    def begin_draw(self) -> None:
        """Every token before this step has been shown to its matchers."""
        if self.begin_masks is not None:
            begin, self.begin_masks = self.begin_masks, None
            begin()

    def draw(self) -> None:
        """Start the draw, if it is still to come. Every token before this step must have been shown to its matchers."""
        if self.held is not None:
            self.begin_draw()
            started = time.perf_counter_ns()
            self.send(*self.held())
            if self.events is not None:  # a GPU's time is that of the forward pass: it may stand still until the masks are there
                self.done = self.events.record()
            else:
                self.end_timing(started)

    def send(self, token_ids: Tensor, logprobs: BatchLogprobs | None = None) -> PendingStep:
        """Start the copy of the drawn tokens to the host. Waits for nothing."""
        self.held, self.token_ids, self.logprobs = None, token_ids, logprobs
        if token_ids.is_cuda:
            self.token_ids = torch.empty(token_ids.shape, dtype=token_ids.dtype, pin_memory=True)
            self.token_ids.copy_(token_ids, non_blocking=True)
        return self

    def wait(self) -> None:
        """For the device to have done what it was told."""
        if self.done is not None:
            self.done.synchronize()

    def result(self) -> StepResult:
        """Wait for the device, and bring everything to the host."""
        self.draw()
        self.wait()
        if self.events is not None:
            self.forward_ns = sum(round(started.elapsed_time(ended) * 1e6) for started, ended in self.spans)
            self.events.take_back({self.done, *chain.from_iterable(self.spans)})
        return StepResult(
            step=self.step,
            token_ids=self.token_ids.unsqueeze(1).tolist(),
            logprobs=self.logprobs.to_host() if self.logprobs else None,
            prompt_logprobs={chunk: _to_host(parts) for chunk, parts in self.prompt_logprobs.items()},
            embeddings={chunk: vector.tolist() for chunk, vector in self.embeddings.items()},
            forward_ns=self.forward_ns,
        )


def begin_timing(events: Events | None) -> Any:
    """Nanoseconds of the host, or an event in the stream: a GPU's time is its own, and the host is ahead of it."""
    return time.perf_counter_ns() if events is None else events.record()


def _to_host(parts: list[BatchLogprobs]) -> list[PositionLogprobs]:
    return [position for part in parts for position in part.to_host() if position is not None]
