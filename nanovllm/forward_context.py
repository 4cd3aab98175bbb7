"""ForwardContext: all that a layer may see of a step besides its input. Passed as an argument, never a global."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nanovllm.attention.base import AttentionBackend, Rotary


@dataclass(slots=True)
class ForwardContext:
    rotary: Rotary  # cos and sin of the step's positions, gathered once for all layers
    slot_mapping: Tensor  # [num_tokens] int64, where each token's KV is written: block_id * block_size + offset
    kv_caches: list[Tensor]  # one per layer, in the layout of the backend
    backend: AttentionBackend
    attention_plan: Any  # what backend.plan() made of this step, opaque to layers
