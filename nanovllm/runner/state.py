"""RowState: what the device remembers of each running sequence between steps.

A sequence owns one row from admission until it leaves. Tokens are written into its row once, when it is seated, and
from then on by the sampler; so a step's inputs are gathered here, and the host need not have seen the last token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanovllm.engine.batch import BlockUpdate, Seat


class RowState:
    """`token_ids[row, p]` is the token at position p; `block_tables[row, i]` the block of positions [i * block_size, ...)."""

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int, device: torch.device) -> None:
        max_blocks = -(-max_model_len // block_size)
        self.token_ids = torch.zeros(max_num_seqs, max_model_len + 1, dtype=torch.int32, device=device)
        self.block_tables = torch.zeros(max_num_seqs, max_blocks, dtype=torch.int32, device=device)

    def seat(self, seats: list[Seat]) -> None:
        for seat in seats:
            self.token_ids[seat.row, : len(seat.token_ids)] = torch.tensor(seat.token_ids, dtype=torch.int32)

    def update_blocks(self, updates: list[BlockUpdate]) -> None:
        """In order: a later update may replace an entry of an earlier one."""
        for row, first_index, block_ids in updates:
            new_ids = torch.tensor(block_ids, dtype=torch.int32)
            self.block_tables[row, first_index : first_index + len(block_ids)] = new_ids

    def write_sampled(self, rows: Tensor, positions: Tensor, token_ids: Tensor) -> None:
        """All [num_samples]: the drawn tokens become the inputs of the next step."""
        self.token_ids[rows, positions] = token_ids.int()
