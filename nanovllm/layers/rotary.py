"""Rotary tables: cos and sin of every position, with the context extensions that checkpoints use.

Sources: linear, Chen et al. 2023 (position interpolation); llama3, the Llama 3.1 release; yarn, Peng et al. 2023,
section 3. Any other scaling was refused when the ModelSpec was read.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nanovllm.attention.base import Rotary
from nanovllm.model_spec import RopeSpec


class RotaryTable:
    """cos and signed sin for positions [0, max_position); both [max_position, 1, head_dim], see kernels/rotary.py."""

    def __init__(self, rope: RopeSpec, head_dim: int, max_position: int, *, dtype: torch.dtype, device: torch.device) -> None:
        angles = torch.outer(torch.arange(max_position, dtype=torch.float32), inverse_frequencies(rope, head_dim))
        scale = attention_scale(rope)
        cos, sin = angles.cos() * scale, angles.sin() * scale
        self.cos = torch.cat((cos, cos), dim=-1).unsqueeze(1).to(device, dtype)
        self.signed_sin = torch.cat((-sin, sin), dim=-1).unsqueeze(1).to(device, dtype)

    def at(self, positions: Tensor) -> Rotary:
        """positions: [num_tokens]."""
        return Rotary(self.cos[positions], self.signed_sin[positions])


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> Tensor:
    """[head_dim / 2] float32, radians per position."""
    base = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if rope.scaling == "linear":
        return base / rope.factor
    if rope.scaling == "llama3":
        return _llama3(base, rope)
    if rope.scaling == "yarn":
        return _yarn(base, rope, head_dim)
    return base


def attention_scale(rope: RopeSpec) -> float:
    """Factor on cos and sin; its square scales the attention logits. Only YaRN has one."""
    if rope.scaling != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    return 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0


def _llama3(base: Tensor, rope: RopeSpec) -> Tensor:
    """Long wavelengths are stretched by the factor, short ones kept, those between blended."""
    turns = rope.original_max_position * base / (2 * math.pi)  # full turns within the original context
    keep = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return base / rope.factor * (1 - keep) + base * keep


def _yarn(base: Tensor, rope: RopeSpec, head_dim: int) -> Tensor:
    """Dimensions that turn more than beta_fast times are kept, fewer than beta_slow stretched, a ramp between."""

    def dimension_of(num_turns: float) -> float:
        return head_dim * math.log(rope.original_max_position / (num_turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    return base / rope.factor * ramp + base * (1 - ramp)
