"""Shared by the sampler's tests: one thread, and a short way to seat rows and sample them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm.engine.batch import RowSampling
from nanovllm.sampling.sampler import SampledTokens, Sampler
from nanovllm.sampling_params import SamplingParams


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def make_row(
    seed: int = 0, stop_token_ids: Sequence[int] = (), bad_words: Sequence[Sequence[int]] = (), num_prompt: int = 1, **params: Any
) -> RowSampling:
    words = tuple(tuple(word) for word in bad_words)
    return RowSampling(SamplingParams(**params), seed, tuple(stop_token_ids), words, num_prompt)


def sample_rows(
    logits: Tensor, sampled: Sequence[RowSampling], histories: Sequence[Sequence[int]] | None = None, positions: Any = None
) -> SampledTokens:
    """Seats `sampled` in rows of a new sampler, in reverse order, and samples once. Histories default to one token, 0."""
    histories = histories or [[0]] * len(sampled)
    num_rows = len(sampled) + 3
    table = torch.full((num_rows, 64), 2**31 - 1, dtype=torch.int32)  # what nobody may read would be out of range
    rows = [num_rows - 1 - i for i in range(len(sampled))]
    sampler = Sampler(logits.shape[-1], num_rows, torch.device("cpu"))
    for row, sampling, history in zip(rows, sampled, histories, strict=True):
        sampler.seat(row, sampling)
        table[row, : len(history)] = torch.tensor(history, dtype=torch.int32)
    return sampler.sample(logits, rows, positions or [len(history) for history in histories], table)


@pytest.fixture
def row() -> Callable[..., RowSampling]:
    return make_row


@pytest.fixture
def sample() -> Callable[..., SampledTokens]:
    return sample_rows
