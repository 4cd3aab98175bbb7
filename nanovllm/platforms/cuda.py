"""The CUDA platform: defaults and memory of one GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from nanovllm.config import gpu_max_num_seqs
from nanovllm.engine.roofline import Peak, find_peak
from nanovllm.platforms.base import DeviceMemory


class CudaPlatform:
    default_memory_share = 0.9
    default_block_size = 64  # tokens
    default_token_budget = 8192
    default_steps_ahead = 1

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.default_max_num_seqs = gpu_max_num_seqs(torch.cuda.get_device_properties(self.device).total_memory)

    def prepare(self, num_threads: int | None) -> None:
        if num_threads is not None:
            torch.set_num_threads(num_threads)

    def default_dtype(self) -> torch.dtype:
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16

    def memory(self) -> DeviceMemory:
        free, total = torch.cuda.mem_get_info(self.device)
        return DeviceMemory(total, free)

    def max_default_kv_bytes(self) -> int | None:
        return None

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def describe(self) -> str:
        return torch.cuda.get_device_name(self.device)

    def peak(self, dtype: str) -> Peak | None:
        """Of the data sheet, which is for 16 bits."""
        return None if dtype == "float32" else find_peak(self.describe())
