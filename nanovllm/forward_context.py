"""ForwardContext: all that a layer may see of a step besides its input. Passed as an argument, never a global."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nanovllm.attention.base import AttentionBackend


@dataclass(slots=True)
class ForwardContext:
    positions: Tensor  # [num_tokens] int64, place of each token in its sequence
    cos: Tensor  # [num_tokens, 1, head_dim], rotary, gathered once for all layers
    signed_sin: Tensor  # [num_tokens, 1, head_dim]
    slot_mapping: Tensor  # [num_tokens] int64, where each token's KV is written: block_id * block_size + offset
    kv_caches: list[Tensor]  # one per layer, in the layout of the backend
    backend: AttentionBackend
    attention_plan: Any  # what backend.plan() made of this step, opaque to layers
