"""Matrix-vector products for a step of one token, with what comes before and after them in the same kernel.

One stream of tokens is bound by launches and by reading the weights once. So a layer is five kernels: norm and QKV,
rotary and KV write, attention, output and residual, norm and gate/up, SiLU and down and residual. The norm and the SiLU
are recomputed by every program from a few kilobytes in the cache, which costs less than another launch. Weights do not
depend on earlier kernels, so their first tile is requested before the wait for them (programmatic dependent launch).
n outputs, k inputs; a program computes OUT of the n.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanovllm.kernels.triton_language import gdc_launch_dependents, gdc_wait, tl, triton, use_kernel


def can_fuse(x: Tensor) -> bool:
    """x: [N, hidden_size]."""
    return len(x) == 1 and x.dtype in (torch.bfloat16, torch.float16) and use_kernel("one_token", x)


def norm_product(x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rms_norm(x) @ weight^T + bias. x: [1, k], norm: [k], weight: [n, k] -> [1, n]."""
    return _launch(x, weight, bias, norm, eps, 1)


def product_add(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """x @ weight^T + residual. x: [1, k], weight: [n, k], residual: [1, n] -> [1, n]."""
    return _launch(x, weight, residual, None, 0.0, 0)


def silu_product_add(gate_up: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """(silu(gate) * up) @ weight^T + residual. gate_up: [1, 2 k], weight: [n, k], residual: [1, n] -> [1, n]."""
    return _launch(gate_up, weight, residual, None, 0.0, 2)


def _launch(x: Tensor, weight: Tensor, addend: Tensor | None, norm: Tensor | None, eps: float, before: int) -> Tensor:
    num_out, num_in = weight.shape
    out = x.new_empty(1, num_out)
    out_tile, in_tile, num_warps = _tiles(num_out, num_in)
    _product_kernel[(triton.cdiv(num_out, out_tile),)](
        x,
        weight,
        addend if addend is not None else x,
        norm if norm is not None else x,
        out,
        eps,
        num_out,
        num_in,
        triton.next_power_of_2(num_in),
        out_tile,
        in_tile,
        before,
        addend is not None,
        x.is_cuda,
        num_warps=num_warps,
        launch_pdl=x.is_cuda,
    )
    return out


def _tiles(num_out: int, num_in: int) -> tuple[int, int, int]:
    """(outputs per program, inputs per turn, warps), measured on an H200 (benchmarks/LOG.md)."""
    if num_out > 4096 or (num_out == 4096 and num_in <= 1024):
        return 8, min(512, triton.next_power_of_2(num_in)), 4
    return 4, min(4096, triton.next_power_of_2(num_in)), 8 if num_in > 2048 else 4


@triton.jit
def _product_kernel(
    x_ptr, weight_ptr, addend_ptr, norm_ptr, out_ptr, eps, n, k: tl.constexpr, K_POWER: tl.constexpr,
    OUT: tl.constexpr, IN: tl.constexpr, BEFORE: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0) * OUT + tl.arange(0, OUT)
    is_line = line < n
    column = tl.arange(0, IN)
    weight_ptr += line[:, None].to(tl.int64) * k + column[None, :]
    first_weight = tl.load(weight_ptr, is_line[:, None] & (column < k)[None, :], other=0.0)  # [OUT, IN]
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    scale = 1.0
    if BEFORE == 1:
        whole = tl.arange(0, K_POWER)
        x = tl.load(x_ptr + whole, whole < k, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x) / k + eps)
    total = tl.zeros([OUT], tl.float32)
    for start in tl.static_range(0, k, IN):
        is_column = start + column < k
        weight = first_weight
        if start > 0:
            weight = tl.load(weight_ptr + start, is_line[:, None] & is_column[None, :], other=0.0)
        x = tl.load(x_ptr + start + column, is_column, other=0.0)
        value = x.to(tl.float32)
        if BEFORE == 1:
            value = value * scale * tl.load(norm_ptr + start + column, is_column, other=0.0).to(tl.float32)
            value = value.to(x.dtype).to(tl.float32)
        if BEFORE == 2:
            up = tl.load(x_ptr + k + start + column, is_column, other=0.0).to(tl.float32)
            value = (value / (1.0 + tl.exp(-value))).to(x.dtype).to(tl.float32) * up
            value = value.to(x.dtype).to(tl.float32)
        total += tl.sum(weight.to(tl.float32) * value[None, :], 1)
    if ADD:
        total += tl.load(addend_ptr + line, is_line, other=0.0).to(tl.float32)
    tl.store(out_ptr + line, total.to(out_ptr.dtype.element_ty), is_line)
