"""Triton where it is installed, and the switch of every kernel.

A kernel is used for CUDA tensors unless its name is in NANOVLLM_DISABLE_KERNELS (comma-separated, or "all"): a debugging
switch that runs the torch twin instead. Without Triton the modules still import, and the twins run.

Programmatic dependent launch (PDL): a kernel launched with `launch_pdl=True` may start while the one before it ends.
It must call `gdc_wait()` before it reads anything that an earlier kernel wrote (weights need not wait), and calls
`gdc_launch_dependents()` when the next one may start in turn.
"""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.language.extra import cuda
    from triton.tools import tensor_descriptor

    gdc_launch_dependents, gdc_wait = cuda.gdc_launch_dependents, cuda.gdc_wait
    TensorDescriptor = tensor_descriptor.TensorDescriptor
    HAS_TRITON = True
except ImportError:  # a CPU build of torch comes without it

    class _Absent:
        """Accepts the decorations of kernels that will never run."""

        constexpr = int

        def __getattr__(self, name: str) -> Any:
            return lambda function=None, **_: function if callable(function) else (lambda kernel: kernel)

    triton = tl = _Absent()  # type: ignore[assignment]
    gdc_wait = gdc_launch_dependents = TensorDescriptor = None  # type: ignore[assignment]
    HAS_TRITON = False

DISABLED = frozenset(filter(None, os.environ.get("NANOVLLM_DISABLE_KERNELS", "").split(",")))

__all__ = ["HAS_TRITON", "TensorDescriptor", "gdc_launch_dependents", "gdc_wait", "tl", "triton", "use_kernel"]


def use_kernel(name: str, x: Tensor) -> bool:
    """Whether the Triton kernel `name` takes this tensor."""
    return HAS_TRITON and x.is_cuda and name not in DISABLED and "all" not in DISABLED
