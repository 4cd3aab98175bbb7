"""AttentionBackend: attention of a ragged batch over a paged KV cache.

A step has chunks; chunk i holds `lengths[i]` new tokens of one sequence, at positions [starts[i], starts[i] +
lengths[i]). Each attends to its own sequence's positions up to itself: those of earlier steps through the block table,
and those of this step, whose KV is stored first. One method plans (host work, once a step), one stores, one attends
(once per layer).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Shapes on this rank."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


class Rotary(NamedTuple):
    """Of the step's tokens, both [num_tokens, 1, head_dim]; see kernels/rotary.py."""

    cos: Tensor
    signed_sin: Tensor


class HeadNorm(NamedTuple):
    """RMSNorm over the head dimension of queries and keys."""

    weight: Tensor  # [num_heads + num_kv_heads, head_dim]
    eps: float


@dataclass(slots=True)
class AttentionInputs:
    """One step as the attention sees it; host lists and device tensors of the same facts.

    Example, block_size 4: a prompt chunk of 3 tokens on top of 4 cached ones, and a decoding sequence at position 9:
    starts [4, 9], lengths [3, 1], rows [1, 0], block_tables [[5, 0, 3], [7, 2, -]].
    """

    starts: list[int]  # [num_chunks]
    lengths: list[int]  # [num_chunks]
    rows: list[int]  # [num_chunks], line of each chunk in the block tables
    block_tables: Tensor  # [max_num_seqs, max_blocks] int32, all rows


class AttentionBackend(Protocol):
    def kv_cache_shape(self, num_blocks: int) -> tuple[int, ...]: ...

    def plan(self, inputs: AttentionInputs) -> Any:
        """Host-side preparation of one step, shared by all layers."""
        ...

    def rotate_and_store(
        self, heads: Tensor, head_norm: HeadNorm | None, rotary: Rotary, kv_cache: Tensor, slot_mapping: Tensor
    ) -> Tensor:
        """Norm (where the family has one) and turn queries and keys, write keys and values into the slots.

        heads: [num_tokens, num_heads + 2 * num_kv_heads, head_dim], queries first; slot_mapping: [num_tokens], a
        negative slot is not written. Returns the queries, [num_tokens, num_heads, head_dim].
        """
        ...

    def attend(self, query: Tensor, kv_cache: Tensor, plan: Any) -> Tensor:
        """query: [num_tokens, num_heads, head_dim] -> [num_tokens, num_heads * head_dim]."""
        ...

    def copy_blocks(self, kv_cache: Tensor, sources: Tensor, destinations: Tensor) -> None:
        """Copy whole blocks within the cache (copy-on-write); sources, destinations: [n] int64."""
        ...
