"""From logits to tokens: the flow of one step's sampling, and what is remembered of each row.

Edits (`penalties.py`), then temperature, filters and draw (`draw.py`); log-probabilities beside it (`logprobs.py`). A
batch costs only what its rows ask for: all greedy is one argmax. What a row draws depends on its logits, parameters,
seed and position alone, never on its neighbours. This is the specification for faster kernels, and what runs on a CPU.
Knows rows, not sequences or requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanovllm.engine.batch import RowSampling
from nanovllm.kernels.upload import upload
from nanovllm.sampling import filters
from nanovllm.sampling.draw import FROM_ALL, GREEDY, LIMITS, Group, Race, build_groups, draw_groups, limits_of, race_all, warm_up
from nanovllm.sampling.gumbel import KeysOfSteps, draw_keys, stream_of, token_hashes
from nanovllm.sampling.logprobs import BatchLogprobs, sampled_logprobs
from nanovllm.sampling.penalties import Edit, EditedRow, apply_edits, build_edits, edits_logits, grammar_masks
from nanovllm.structured.base import Matchers

# One line per row, so that the operands of a batch are one indexing away. num_logprobs is -1 for none.
ROW_COLUMNS = np.dtype([*LIMITS, ("stream", np.uint64), ("has_edits", np.bool_), ("num_logprobs", np.int64)])


class SampledTokens(NamedTuple):
    token_ids: Tensor  # [num_samples] int64, on the device; -1 where the logits are not finite numbers
    logprobs: BatchLogprobs | None  # None if no row asked


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """What follows from the rows of a batch alone: kept while the same rows come back."""

    rows: list[int]
    streams: np.ndarray  # [num_samples] uint64
    groups: list[Group]
    edits: list[Edit]
    logprobs_asked: dict[int, int]  # sample: number of alternatives
    logprobs_lines: Tensor  # [m] int64, the keys of it


class Sampler:
    def __init__(self, vocab_size: int, max_num_seqs: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = torch.device(device)
        self._seated: list[RowSampling | None] = [None] * max_num_seqs
        self._columns = np.zeros(max_num_seqs, ROW_COLUMNS)
        self._hashes = token_hashes(vocab_size).to(self._device)  # [vocab] int32
        self._plan: BatchPlan | None = None
        self._plain: tuple[list[int], np.ndarray, np.ndarray, bool] | None = None  # of the rows that were asked for last
        self.race: Race | None = None  # set where the model's library draws, whatever the samples ask for

    def seat(self, row: int, sampling: RowSampling) -> None:
        """A sequence arrives in `row`; whatever was there is forgotten."""
        num_logprobs = -1 if sampling.params.logprobs is None else sampling.params.logprobs
        limits = limits_of(sampling.params, self._vocab_size)
        self._seated[row] = sampling
        self._columns[row] = (*limits, stream_of(sampling.seed), edits_logits(sampling), num_logprobs)
        self._plan = self._plain = None

    def plain_operands(self, rows: list[int], positions: np.ndarray) -> tuple[np.ndarray, KeysOfSteps, bool]:
        """For `kernels/draw_token.py`: 1 / temperature [n] float32, keys, and whether that kernel does it all."""
        if self._plain is None or self._plain[0] != rows:
            columns = self._columns[rows]
            is_plain = columns["method"] <= FROM_ALL
            is_plain &= (columns["min_p"] == 0) & ~columns["has_edits"] & (columns["num_logprobs"] < 0)
            self._plain = rows, columns["inverse_temperature"], columns["stream"], bool(is_plain.all())
        _, inverse_temperature, streams, is_plain = self._plain
        return inverse_temperature, KeysOfSteps(streams, positions), is_plain

    def warm_up(self, dtype: torch.dtype) -> None:
        """Compile the kernels that only some requests need."""
        warm_up(self._vocab_size, dtype, self._hashes)

    def sample(
        self, logits: Tensor, rows: list[int], positions: list[int], token_table: Tensor, matchers: Matchers | None = None
    ) -> SampledTokens:
        """One token for each line of `logits`, [num_samples, vocab], which are left as they are.

        `rows[i]` is the row of sample i, `positions[i]` the place in its sequence that the new token takes; the tokens
        before it are `token_table[rows[i], :positions[i]]`, of [max_num_seqs, max_model_len + 1] int32. `matchers[i]`,
        if there, is the grammar that sample i follows.
        """
        plan = self._plan_for(rows)
        edits = plan.edits
        if matchers and self.race is None:
            edits = [*edits, grammar_masks(matchers, logits.shape[-1], self._device)]
        scores = apply_edits(edits, logits, positions, token_table) if edits else logits
        token_ids = self._draw(scores, plan, positions, matchers)
        if not plan.logprobs_asked:
            return SampledTokens(token_ids, None)
        return SampledTokens(token_ids, sampled_logprobs(logits, token_ids, plan.logprobs_asked, plan.logprobs_lines))

    def _draw(self, scores: Tensor, plan: BatchPlan, positions: list[int], matchers: Matchers | None) -> Tensor:
        """[num_samples] int64."""
        if all(group.method == GREEDY for group in plan.groups):
            return filters.winner_of(scores)
        keys = upload(draw_keys(plan.streams, positions), self._device)  # [num_samples] int32
        if self.race is not None:
            return race_all(self.race, scores, plan.groups[0], self._hashes, keys, matchers)
        return draw_groups(scores, plan.groups, self._hashes, keys)

    def _plan_for(self, rows: list[int]) -> BatchPlan:
        if self._plan is None or self._plan.rows != rows:
            self._plan = self._build_plan(list(rows))
        return self._plan

    def _build_plan(self, rows: list[int]) -> BatchPlan:
        columns = self._columns[rows]  # [num_samples]
        edited = [EditedRow(i, rows[i], self._sampling_in(rows[i])) for i in np.flatnonzero(columns["has_edits"]).tolist()]
        asking = np.flatnonzero(columns["num_logprobs"] >= 0)  # [m]
        return BatchPlan(
            rows=rows,
            streams=columns["stream"],
            groups=build_groups(columns, self._device, is_one=self.race is not None),
            edits=build_edits(edited, self._device) if edited else [],
            logprobs_asked=dict(zip(asking.tolist(), columns["num_logprobs"][asking].tolist(), strict=True)),
            logprobs_lines=upload(asking, self._device),
        )

    def _sampling_in(self, row: int) -> RowSampling:
        sampling = self._seated[row]
        assert sampling is not None, f"row {row} is sampled but was never seated"
        return sampling
