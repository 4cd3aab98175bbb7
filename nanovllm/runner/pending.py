"""PendingStep: a step whose results may still be on their way to the host."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nanovllm.engine.batch import StepResult
from nanovllm.outputs import PositionLogprobs
from nanovllm.sampling.logprobs import BatchLogprobs


@dataclass(slots=True)
class PendingStep:
    step: int
    token_ids: Tensor  # [num_samples] int64, on the host or on its way there
    logprobs: BatchLogprobs | None = None
    arrived: Any = None  # None: it is there
    prompt_logprobs: dict[int, list[BatchLogprobs]] = field(default_factory=dict)
    embeddings: dict[int, Tensor] = field(default_factory=dict)
    forward_ns: int = 0

    def result(self) -> StepResult:
        """Wait for the device, and bring everything to the host."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return StepResult(
            step=self.step,
            token_ids=self.token_ids.unsqueeze(1).tolist(),
            logprobs=self.logprobs.to_host() if self.logprobs else None,
            prompt_logprobs={chunk: _to_host(parts) for chunk, parts in self.prompt_logprobs.items()},
            embeddings={chunk: vector.tolist() for chunk, vector in self.embeddings.items()},
            forward_ns=self.forward_ns,
        )


def send_to_host(step: int, token_ids: Tensor, logprobs: BatchLogprobs | None = None) -> PendingStep:
    """Start the copy of a step's tokens. Waits for nothing."""
    if not token_ids.is_cuda:
        return PendingStep(step, token_ids, logprobs)
    on_host = torch.empty(token_ids.shape, dtype=token_ids.dtype, pin_memory=True)
    on_host.copy_(token_ids, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return PendingStep(step, on_host, logprobs, arrived)


def _to_host(parts: list[BatchLogprobs]) -> list[PositionLogprobs]:
    return [position for part in parts for position in part.to_host() if position is not None]
