"""WeightSlot: where one tensor of a checkpoint goes.

A model offers one slot per checkpoint tensor (`model.weight_slots()`). The slot names the full, unsharded shape, so
that `loaders/load.py` can compare whole checkpoints before it reads any data, and hides how this rank takes its part:
the loader knows nothing of shards, merged projections or transposed storage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class WeightSlot:
    """One tensor that the model expects from a checkpoint."""

    shape: tuple[int, ...]  # in the checkpoint: all ranks together
    load: Callable[[Tensor], object]  # copies this rank's part of the full tensor into the parameter, converting its dtype
