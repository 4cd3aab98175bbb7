"""RMSNorm (Zhang and Sennrich 2019), alone and fused with the residual addition before it.

Kernel: one program per token; the sum is rounded to the dtype before it is squared, as the twin does.
N tokens, D values per token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels.triton_language import gdc_launch_dependents, gdc_wait, tl, triton, use_kernel


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension. x: [N, D], weight: [D]."""
    if use_kernel("rms_norm", x):
        return _launch(x, None, weight, eps)[0]
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual). x, residual: [N, D]."""
    if use_kernel("rms_norm", x):
        return _launch(x, residual, weight, eps)
    total = x + residual
    return F.rms_norm(total, weight.shape, weight, eps), total


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    num_tokens, size = x.shape
    normed = torch.empty_like(x)
    total = torch.empty_like(x) if residual is not None else x
    block = triton.next_power_of_2(size)
    use_pdl = x.is_cuda and num_tokens <= 512
    _add_rms_norm_kernel[(num_tokens,)](
        x,
        residual if residual is not None else x,
        weight,
        normed,
        total,
        x.stride(0),
        eps,
        size,
        block,
        residual is not None,
        use_pdl,
        num_warps=min(8, max(1, block // 256)),
        launch_pdl=use_pdl,
    )
    return normed, total


@triton.jit
def _add_rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, normed_ptr, total_ptr, x_stride, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < D
    x = tl.load(x_ptr + token * x_stride + columns, mask, other=0.0)
    if ADD:
        x = (x.to(tl.float32) + tl.load(residual_ptr + token * D + columns, mask, other=0.0).to(tl.float32)).to(x.dtype)
        tl.store(total_ptr + token * D + columns, x, mask)
    x32 = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x32 * x32) / D + eps)
    weight = tl.load(weight_ptr + columns, mask, other=0.0).to(tl.float32)
    tl.store(normed_ptr + token * D + columns, (x32 * scale * weight).to(x.dtype), mask)
