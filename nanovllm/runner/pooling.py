"""Vectors of prompts: the mean of their final hidden states, or the last one.

A prompt may be computed in several chunks, so the sum of a row grows from step to step, in float32. A sequence that is
preempted is seated again, begins again, and so does its sum. Knows rows, not sequences.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from nanovllm.engine.batch import RowSampling, ScheduledBatch, Seat


@dataclass(slots=True)
class _Row:
    sampling: RowSampling
    total: Tensor | None = None  # [hidden_size] float32, of the positions so far


class PromptPooling:
    def __init__(self) -> None:
        self._rows: dict[int, _Row] = {}  # those whose vector is still to come

    def seat(self, seat: Seat) -> None:
        """A sequence arrives; whoever was in its row is forgotten."""
        self._rows.pop(seat.row, None)
        if seat.sampling.pooling is not None:
            self._rows[seat.row] = _Row(seat.sampling)

    def is_asked(self, rows: Iterable[int]) -> bool:
        return bool(self._rows) and not self._rows.keys().isdisjoint(rows)

    def pool(self, batch: ScheduledBatch, query_start: np.ndarray, hidden: Tensor) -> dict[int, Tensor]:
        """The vectors that this step completes, by chunk: [hidden_size] float32 each.

        Chunk i computed lines `query_start[i]` to `query_start[i + 1]` of `hidden`, [num_tokens, hidden_size].
        """
        vectors = {}
        for chunk, row in enumerate(batch.rows):
            pooled = self._rows.get(row)
            if pooled is None:
                continue
            lines = hidden[int(query_start[chunk]) : int(query_start[chunk + 1])].float()
            if pooled.sampling.pooling == "mean":
                total = lines.sum(0)
                pooled.total = total if pooled.total is None else pooled.total + total
            if batch.starts[chunk] + batch.lengths[chunk] == pooled.sampling.num_prompt_tokens:
                vectors[chunk] = lines[-1] if pooled.total is None else pooled.total / pooled.sampling.num_prompt_tokens
                del self._rows[row]
        return vectors
