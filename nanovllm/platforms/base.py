"""Platform: what the engine must know of the kind of device that it runs on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nanovllm.engine.roofline import Peak
from nanovllm.errors import ConfigError


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes; `free` is what could be allocated now, other processes' use deducted."""

    total: int
    free: int


class Platform(Protocol):
    device: torch.device
    default_memory_share: float  # of the device's memory, when the user does not say
    default_block_size: int
    default_token_budget: int
    default_max_num_seqs: int
    default_steps_ahead: int

    def prepare(self, num_threads: int | None) -> None:
        """Process-wide settings, once, before the model is made."""
        ...

    def default_dtype(self) -> torch.dtype: ...

    def memory(self) -> DeviceMemory: ...

    def max_default_kv_bytes(self) -> int | None:
        """Upper limit of the KV cache when the user does not size it; None: all that is left."""
        ...

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A large zeroed tensor, without touching memory before it is used where the system allows that."""
        ...

    def describe(self) -> str: ...

    def peak(self, dtype: str) -> Peak | None:
        """What the device can do at most, computing in `dtype`; None: nobody knows."""
        ...


def select_platform(device: str) -> Platform:
    """`device`: "auto", "cpu" or "cuda"."""
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        if not torch.cuda.is_available():
            raise ConfigError("device='cuda': torch finds no CUDA device; use device='cpu' or 'auto'")
        from nanovllm.platforms.cuda import CudaPlatform

        return CudaPlatform()
    from nanovllm.platforms.cpu import CpuPlatform

    return CpuPlatform()
