"""ParallelGroup: this rank's place among those that share one model, and the two collectives that layers use.

Sharding here is Megatron's (Shoeybi et al. 2019, section 3): column-parallel layers need no communication, row-parallel
layers sum partial results over the ranks. A layer receives its group; there is no global state.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class ParallelGroup:
    """`size` ranks, of which this is `rank`. The group of one does nothing and needs no process group."""

    def __init__(self, rank: int = 0, size: int = 1, process_group: dist.ProcessGroup | None = None) -> None:
        if not 0 <= rank < size:
            raise ValueError(f"rank {rank} is not in a group of {size}")
        self.rank = rank
        self.size = size
        self._process_group = process_group

    def split(self, total: int, what: str) -> int:
        """This rank's share of `total`; an error that names `what` when it does not divide evenly."""
        if total % self.size:
            raise ValueError(f"{what}: {total} cannot be split evenly over {self.size} ranks")
        return total // self.size

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x, group=self._process_group)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """[..., n] on each rank -> [..., size * n] on all, in rank order."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self._process_group)
        return torch.cat(parts, dim=-1)
