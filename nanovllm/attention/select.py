"""Which attention backend runs, and why."""

from __future__ import annotations

import torch

from nanovllm.attention.base import AttentionBackend, AttentionSpec
from nanovllm.attention.torch_reference import TorchAttention
from nanovllm.kernels.triton_language import DISABLED, HAS_TRITON


def select_backend(spec: AttentionSpec, dtype: torch.dtype, device: torch.device) -> AttentionBackend:
    if explain_backend(device)[0] == "triton":
        from nanovllm.attention.triton_paged import TritonAttention

        return TritonAttention(spec, dtype, device)
    return TorchAttention(spec, dtype, device)


def explain_backend(device: torch.device) -> tuple[str, str]:
    """(name, reason)."""
    if device.type != "cuda":
        return "torch", "the only backend for this device"
    if not HAS_TRITON:
        return "torch", "Triton is not installed: slow on a GPU"
    if DISABLED & {"attention", "all"}:
        return "torch", "NANOVLLM_DISABLE_KERNELS asks for it"
    return "triton", "own kernels, for every head size and group size"
