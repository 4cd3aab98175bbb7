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
    needed_tokens: Tensor | None = None  # [num_needed] int64, places of the tokens whose final state is asked for; None: all
    needed_plan: Any = None  # the plan of these tokens alone, in this order: what the last layer attends with
