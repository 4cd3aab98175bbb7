"""Look up the step's tokens and slots in the row state: one kernel for what are a dozen small torch operations.

T tokens of the step; a negative row marks padding, which gets token 0 and no slot.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanovllm.kernels.triton_language import tl, triton

BLOCK = 256


def gather_inputs(
    token_rows: Tensor, positions: Tensor, token_table: Tensor, block_tables: Tensor, block_size: int
) -> tuple[Tensor, Tensor]:
    """token_rows, positions: [T] int32 -> input_ids [T] int32, slot_mapping [T] int64 (-1 for padding)."""
    num_tokens = len(token_rows)
    input_ids = torch.empty(num_tokens, dtype=torch.int32, device=token_rows.device)
    slots = torch.empty(num_tokens, dtype=torch.int64, device=token_rows.device)
    _gather_kernel[(triton.cdiv(num_tokens, BLOCK),)](
        token_rows,
        positions,
        token_table,
        block_tables,
        input_ids,
        slots,
        num_tokens,
        token_table.stride(0),
        block_tables.stride(0),
        block_size,
        BLOCK,
        num_warps=4,
    )
    return input_ids, slots


@triton.jit
def _gather_kernel(
    row_ptr, position_ptr, table_ptr, block_table_ptr, id_ptr, slot_ptr, num_tokens, table_stride, block_stride,
    PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = token < num_tokens
    row = tl.load(row_ptr + token, mask, other=-1).to(tl.int64)
    position = tl.load(position_ptr + token, mask, other=0)
    is_real = mask & (row >= 0)
    token_id = tl.load(table_ptr + row * table_stride + position, is_real, other=0)
    block_id = tl.load(block_table_ptr + row * block_stride + position // PAGE, is_real, other=0).to(tl.int64)
    tl.store(id_ptr + token, token_id, mask)
    tl.store(slot_ptr + token, tl.where(is_real, block_id * PAGE + position % PAGE, -1), mask)
