"""RowState: what the device remembers of each running sequence between steps.

A sequence owns one row from admission until it leaves. Tokens are written into its row once, when it is seated, and
from then on by the sampler; so a step's inputs are gathered here, and the host need not have seen the last token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nanovllm.engine.batch import BlockUpdate, Seat
from nanovllm.sampling.upload import upload


class RowState:
    """`token_ids[row, p]` is the token at position p; `block_tables[row, i]` the block of positions [i * block_size, ...)."""

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int, device: torch.device) -> None:
        max_blocks = -(-max_model_len // block_size)
        self.spare_row = max_num_seqs  # where padding may write
        self.token_ids = torch.zeros(max_num_seqs + 1, max_model_len + 1, dtype=torch.int32, device=device)
        self.block_tables = torch.zeros(max_num_seqs + 1, max_blocks, dtype=torch.int32, device=device)

    def seat(self, seats: list[Seat]) -> None:
        _scatter(self.token_ids, [(seat.row, 0, seat.token_ids) for seat in seats])

    def update_blocks(self, updates: list[BlockUpdate]) -> None:
        """In order: a later update may replace an entry of an earlier one."""
        _scatter(self.block_tables, updates)

    def write_sampled(self, rows: Tensor, positions: Tensor, token_ids: Tensor) -> None:
        """All [num_samples]: the drawn tokens become the inputs of the next step."""
        self.token_ids[rows, positions] = token_ids.int()


def _scatter(table: Tensor, runs: Sequence[tuple[int, int, list[int]]]) -> None:
    """`table[row, first : first + len(values)] = values` for every (row, first, values), in one copy to the device."""
    if not runs:
        return
    width = table.shape[1]
    places = {}  # later runs win
    for row, first, values in runs:
        places.update(zip(range(row * width + first, row * width + first + len(values)), values))
    index, values = upload(list(places), table.device), upload(np.array(list(places.values()), dtype=np.int32), table.device)
    table.view(-1).index_copy_(0, index, values)
