"""WeightSlot: where one tensor of a checkpoint goes.

A model offers one slot per checkpoint tensor (`model.weight_slots()`). The slot names the full, unsharded shape, so
that `loaders/load.py` can compare whole checkpoints before it reads any data, and hides how this rank takes its part:
the loader knows nothing of shards, merged projections or transposed storage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True, slots=True)
class WeightSlot:
    """One tensor that the model expects from a checkpoint."""

    shape: tuple[int, ...]  # in the checkpoint: all ranks together
    load: Callable[[Tensor], object]  # copies this rank's part of the full tensor into the parameter, converting its dtype
    block_types: tuple[str, ...] = ()  # quantised GGUF types, such as "Q4_1", that it takes as they are stored
    load_blocks: Callable[[np.ndarray, str], object] | None = None  # takes [num_rows, bytes_per_row] uint8, and the type
