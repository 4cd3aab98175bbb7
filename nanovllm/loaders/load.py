"""Put a checkpoint into a model, and account for every tensor on both sides.

All missing, unknown and wrongly shaped tensors are found from names and shapes and raised together, before any data
is read; then tensors stream through one at a time. Where a tensor goes is the model's business (`WeightSlot`), where
it comes from is the source's (`weight_source.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from nanovllm.errors import WeightMismatch
from nanovllm.layers.weight_slot import WeightSlot
from nanovllm.loaders.weight_source import BlockSource, WeightSource


class LoadableModel(Protocol):
    """What a model offers to be filled from a checkpoint."""

    def weight_slots(self) -> dict[str, WeightSlot]:
        """One slot for every tensor that the model needs, by checkpoint name."""
        ...

    def is_ignored_weight(self, name: str) -> bool:
        """True for tensors that may be in the file although the model computes or ties them."""
        ...


def load_weights(model: LoadableModel, source: WeightSource, *, progress: Callable[[int, int], None] | None = None) -> None:
    """Fill all parameters of `model`. `progress(num_loaded, num_tensors)` is called after each tensor."""
    slots = model.weight_slots()
    check_weights(slots, source, model.is_ignored_weight)
    names = [name for name in source.names() if name in slots]
    with torch.no_grad():
        for num_loaded, name in enumerate(names, start=1):
            fill_slot(slots[name], source, name)
            if progress is not None:
                progress(num_loaded, len(names))


def fill_slot(slot: WeightSlot, source: WeightSource, name: str) -> None:
    """By the tensor's values; or by its quantised blocks, where the source has them and the slot takes their type."""
    if slot.load_blocks is not None and isinstance(source, BlockSource):
        type_name = source.type_name(name)
        if type_name in slot.block_types:
            slot.load_blocks(source.raw(name), type_name)
            return
    slot.load(source.load(name))


def check_weights(slots: Mapping[str, WeightSlot], source: WeightSource, is_ignored: Callable[[str], bool]) -> None:
    """Raise one `WeightMismatch` that lists everything on which the model and the checkpoint disagree."""
    offered = set(source.names())
    missing = [name for name in slots if name not in offered]
    unexpected = [name for name in offered if name not in slots and not is_ignored(name)]
    wrong_shape = [
        f"{name} (checkpoint {list(source.shape(name))}, model {list(slot.shape)})"
        for name, slot in slots.items()
        if name in offered and tuple(source.shape(name)) != tuple(slot.shape)
    ]
    if missing or unexpected or wrong_shape:
        raise WeightMismatch(missing, unexpected, wrong_shape)
