"""Rotary position embedding (Su et al. 2021), half-split pairing: dimension i turns with dimension i + d/2."""

from __future__ import annotations

import torch
from torch import Tensor


def apply_rotary(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Turn every head of x by its token's angles.

    x: [num_tokens, num_heads, d]; cos, signed_sin: [num_tokens, 1, d], where both halves of cos are equal and the
    first half of signed_sin is negated, so that with (a, b) the halves of x the result is
    (a cos - b sin, b cos + a sin) in two products and a sum.
    """
    half = x.shape[-1] // 2
    swapped = torch.cat((x[..., half:], x[..., :half]), dim=-1)
    return torch.addcmul(x * cos, swapped, signed_sin)
