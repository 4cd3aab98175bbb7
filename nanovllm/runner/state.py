"""RowState: what the device remembers of each running sequence between steps.

A sequence owns one row from admission until it leaves. Tokens are written into its row once, when it is seated, and
from then on by the sampler; so a step's inputs are gathered here, and the host need not have seen the last token.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nanovllm.engine.batch import BlockUpdate, Seat
from nanovllm.kernels.upload import upload


class RowState:
    """`token_ids[row, p]` is the token at position p; `block_tables[row, i]` the block of positions [i * block_size, ...)."""

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int, device: torch.device) -> None:
        max_blocks = -(-max_model_len // block_size)
        self.spare_row = max_num_seqs  # where padding may write
        self.token_ids = torch.zeros(max_num_seqs + 1, max_model_len + 1, dtype=torch.int32, device=device)
        self.block_tables = torch.zeros(max_num_seqs + 1, max_blocks, dtype=torch.int32, device=device)

    def seat(self, seats: list[Seat]) -> None:
        if seats:
            values = np.concatenate([np.array(seat.token_ids, dtype=np.int32) for seat in seats])
            width = self.token_ids.shape[1]
            places = np.concatenate([np.arange(seat.row * width, seat.row * width + len(seat.token_ids)) for seat in seats])
            self._write(self.token_ids, places, values)

    def update_blocks(self, updates: list[BlockUpdate]) -> None:
        """In order: a later update may replace an entry of an earlier one."""
        if updates:
            width = self.block_tables.shape[1]
            entries: dict[int, int] = {}
            for row, first_index, block_ids in updates:
                place = row * width + first_index
                entries.update(zip(range(place, place + len(block_ids)), block_ids))
            self._write(self.block_tables, np.array(list(entries)), np.array(list(entries.values()), dtype=np.int32))

    def _write(self, table: Tensor, places: np.ndarray, values: np.ndarray) -> None:
        """`table.flat[places] = values`; the places differ. Both go up in one copy: pinning memory costs more than bytes."""
        places_and_values = upload(np.stack([places, values]), table.device)  # int64
        table.view(-1).index_copy_(0, places_and_values[0], places_and_values[1].int())

    def write_sampled(self, rows: Tensor, positions: Tensor, token_ids: Tensor) -> None:
        """All [num_samples]: the drawn tokens become the inputs of the next step; -1, no token, is written as 0."""
        self.token_ids[rows, positions] = token_ids.int().clamp_(min=0)
