"""The face that the compiled step shows as an attention backend: the layout of the cache, and nothing to compute.

`models/compiled_decoder.py` attends within its one call, so a plan is the step's inputs as they are, and storing and
attending are never asked for. The cache has the shape of torch_reference.py, but a block holds its keys as
[head_dim, block_size]; only step.cpp reads it, everyone else moves whole blocks.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nanovllm.attention.base import AttentionInputs, AttentionSpec, HeadNorm, Rotary


class CompiledAttention:
    def __init__(self, spec: AttentionSpec) -> None:
        self.spec = spec

    def kv_cache_shape(self, num_blocks: int) -> tuple[int, ...]:
        return 2, self.spec.num_kv_heads, num_blocks, self.spec.block_size, self.spec.head_dim

    def plan(self, inputs: AttentionInputs) -> AttentionInputs:
        return inputs

    def copy_blocks(self, kv_cache: Tensor, sources: Tensor, destinations: Tensor) -> None:
        kv_cache.index_copy_(2, destinations, kv_cache.index_select(2, sources))

    def rotate_and_store(
        self, heads: Tensor, head_norm: HeadNorm | None, rotary: Rotary, kv_cache: Tensor, slot_mapping: Tensor
    ) -> Tensor:
        raise NotImplementedError("part of the compiled step")

    def attend(self, query: Tensor, kv_cache: Tensor, plan: Any) -> Tensor:
        raise NotImplementedError("part of the compiled step")
