"""WeightSource: the seam between checkpoint formats and models.

A source lists names and shapes without reading data, and loads one tensor at a time under its Hugging Face name.
`safetensors_files.py` and `gguf_model.py` implement it for files; `RandomWeights` here needs no file at all.
Torch is imported only when a tensor is made, so that finding a checkpoint stays free of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


class WeightSource(Protocol):
    """A checkpoint's tensors under their Hugging Face names."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def load(self, name: str) -> Tensor: ...


@runtime_checkable
class BlockSource(Protocol):
    """A source that also hands out tensors as they are stored, in quantised blocks."""

    def type_name(self, name: str) -> str: ...

    def raw(self, name: str) -> np.ndarray: ...


class RandomWeights:
    """A reproducible stand-in for a checkpoint: tests and benchmarks need a model's shapes, not its knowledge.

    A tensor depends on its name, its shape and the seed only, so ranks and tests may load in any order.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], seed: int = 0, std: float = 0.02) -> None:
        self._shapes = dict(shapes)
        self.seed = seed
        self.std = std

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def load(self, name: str) -> Tensor:
        """Float32: ones for norm weights, normal values of deviation `std` for all others."""
        import torch

        if name.endswith("norm.weight"):
            return torch.ones(self._shapes[name])
        digest = hashlib.blake2b(f"{self.seed}:{name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        return torch.randn(self._shapes[name], generator=generator) * self.std
