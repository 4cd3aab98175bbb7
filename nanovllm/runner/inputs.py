"""StepInputs: one step's flat device tensors, gathered from the rows.

The host computes where each token is (numpy, once per step); the device looks up what it is. Example, block_size 4:
rows [2, 0], starts [4, 9], lengths [3, 1] give

    token_rows      [2, 2, 2, 0]
    positions       [4, 5, 6, 9]
    query_start     [0, 3, 4]         chunk i owns tokens [query_start[i], query_start[i + 1])
    input_ids       token_ids[token_rows, positions]
    slot_mapping    block_tables[token_rows, positions // 4] * 4 + positions % 4
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanovllm.attention.base import AttentionInputs
from nanovllm.engine.batch import ScheduledBatch
from nanovllm.runner.state import RowState


@dataclass(slots=True)
class StepInputs:
    input_ids: Tensor  # [num_tokens] int32
    positions: Tensor  # [num_tokens] int64
    slot_mapping: Tensor  # [num_tokens] int64
    attention: AttentionInputs
    query_start: np.ndarray  # [num_chunks + 1] int64, on the host

    def last_tokens(self, chunks: list[int]) -> tuple[Tensor, AttentionInputs]:
        """The last tokens of these chunks: their places, [len(chunks)] int64, and them as a step of their own."""
        every = self.attention
        ends = [every.starts[chunk] + every.lengths[chunk] for chunk in chunks]
        rows = [every.rows[chunk] for chunk in chunks]
        alone = AttentionInputs([end - 1 for end in ends], [1] * len(chunks), rows, every.block_tables)
        return torch.from_numpy(self.query_start[1:][chunks] - 1).to(self.positions.device), alone


def build_inputs(batch: ScheduledBatch, state: RowState, block_size: int) -> StepInputs:
    device = state.token_ids.device
    rows, starts = np.array(batch.rows), np.array(batch.starts)  # [num_chunks]
    query_start = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum(batch.lengths, out=query_start[1:])
    if query_start[-1] == len(rows):  # every chunk is one token
        token_rows, positions = rows, starts
    else:
        token_rows = np.repeat(rows, batch.lengths)
        positions = np.arange(query_start[-1]) + np.repeat(starts - query_start[:-1], batch.lengths)
    row_index = torch.from_numpy(token_rows).to(device)
    position = torch.from_numpy(positions).to(device)
    block_ids = state.block_tables[row_index, position // block_size].long()
    attention = AttentionInputs(batch.starts, batch.lengths, batch.rows, state.block_tables)
    return StepInputs(
        input_ids=state.token_ids[row_index, position],
        positions=position,
        slot_mapping=block_ids * block_size + position % block_size,
        attention=attention,
        query_start=query_start,
    )
