"""SwiGLU's elementwise part (Shazeer 2020): silu(gate) * up. N tokens, n values per token."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels.triton_language import gdc_launch_dependents, gdc_wait, tl, triton, use_kernel

BLOCK = 1024


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """gate_up: [N, 2 n], gate first -> [N, n]."""
    if use_kernel("silu_and_mul", gate_up):
        num_tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(num_tokens, size)
        use_pdl = num_tokens <= 512
        grid = (num_tokens, triton.cdiv(size, BLOCK))
        _silu_and_mul_kernel[grid](gate_up, out, size, BLOCK, use_pdl, num_warps=4, launch_pdl=use_pdl)
        return out
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


@triton.jit
def _silu_and_mul_kernel(gate_up_ptr, out_ptr, size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < size
    gate = tl.load(gate_up_ptr + token * 2 * size + columns, mask, other=0.0)
    up = tl.load(gate_up_ptr + token * 2 * size + size + columns, mask, other=0.0)
    gate32 = gate.to(tl.float32)
    activated = (gate32 / (1.0 + tl.exp(-gate32))).to(gate.dtype)
    tl.store(out_ptr + token * size + columns, activated * up, mask)
