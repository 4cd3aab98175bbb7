"""RMSNorm layers: over the hidden state, and over each head of queries and keys."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from nanovllm.attention.base import HeadNorm
from nanovllm.kernels.rms_norm import add_rms_norm, rms_norm
from nanovllm.layers.weight_slot import WeightSlot


class RMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.ones(hidden_size, dtype=dtype)

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """[num_tokens, d] -> (normed, new residual): the addition that precedes every norm but the first is part of it."""
        if residual is None:
            return rms_norm(x, self.weight, self.eps), x
        return add_rms_norm(x, residual, self.weight, self.eps)

    def weight_slots(self, prefix: str) -> Iterator[tuple[str, WeightSlot]]:
        yield f"{prefix}.weight", WeightSlot(tuple(self.weight.shape), lambda tensor: self.weight.copy_(tensor))

    def finish_loading(self, device: torch.device) -> None:
        self.weight = self.weight.to(device)


class QKNorm(nn.Module):
    """RMSNorm over the head dimension; one weight for all query heads, one for all key heads (Qwen3)."""

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int, eps: float, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.eps = num_heads, head_dim, eps
        self.weight = torch.ones(num_heads + num_kv_heads, head_dim, dtype=dtype)  # the two weights, repeated per head

    def as_head_norm(self) -> HeadNorm:
        """For `AttentionBackend.rotate_and_store`, which does it on the way."""
        return HeadNorm(self.weight, self.eps)

    def weight_slots(self, prefix: str) -> Iterator[tuple[str, WeightSlot]]:
        yield f"{prefix}q_norm.weight", WeightSlot((self.head_dim,), lambda tensor: self.weight[: self.num_heads].copy_(tensor))
        yield f"{prefix}k_norm.weight", WeightSlot((self.head_dim,), lambda tensor: self.weight[self.num_heads :].copy_(tensor))

    def finish_loading(self, device: torch.device) -> None:
        self.weight = self.weight.to(device)
