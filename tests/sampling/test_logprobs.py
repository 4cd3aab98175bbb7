from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from nanovllm.engine.batch import RowSampling
from nanovllm.sampling.logprobs import prompt_logprobs
from nanovllm.sampling.sampler import SampledTokens

VOCAB_SIZE = 203


def random_logits(num_rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompt_logprobs_equal_log_softmax(dtype: torch.dtype) -> None:
    logits, targets = random_logits(7).to(dtype), torch.arange(7) * 29
    expected = logits.float().log_softmax(-1)
    top = expected.sort(dim=-1, descending=True, stable=True)
    for line, position in enumerate(prompt_logprobs(logits, targets, 5).to_host()):
        assert position is not None
        target = int(targets[line])
        rank = top.indices[line].tolist().index(target) + 1
        assert position.chosen.token_id == target
        assert position.chosen.rank == rank
        assert position.chosen.logprob == pytest.approx(expected[line, target].item(), abs=1e-4)
        assert [entry.token_id for entry in position.top] == top.indices[line, :5].tolist()
        assert [entry.logprob for entry in position.top] == pytest.approx(top.values[line, :5].tolist(), abs=1e-4)
        assert [entry.rank for entry in position.top] == [1, 2, 3, 4, 5]


def test_only_rows_that_asked_get_logprobs_each_with_its_own_number(
    row: Callable[..., RowSampling], sample: Callable[..., SampledTokens]
) -> None:
    logits = random_logits(4)
    sampled = [row(logprobs=2), row(), row(logprobs=0), row(logprobs=5, temperature=0)]
    result = sample(logits, sampled)
    assert result.logprobs is not None
    positions = result.logprobs.to_host()
    assert positions[1] is None
    assert [None if p is None else len(p.top) for p in positions] == [2, None, 0, 5]
    expected = logits.log_softmax(-1)
    for line, position in enumerate(positions):
        if position is not None:
            token = int(result.token_ids[line])
            assert position.chosen.token_id == token
            assert position.chosen.logprob == pytest.approx(expected[line, token].item(), abs=1e-4)
    assert positions[3] is not None
    assert positions[3].chosen == positions[3].top[0]


def test_logprobs_are_of_the_raw_logits(row: Callable[..., RowSampling], sample: Callable[..., SampledTokens]) -> None:
    logits = random_logits(1)
    worst = int(logits.argmin())
    plain = logits.log_softmax(-1)
    result = sample(logits, [row(logprobs=1, allowed_token_ids=[worst], temperature=0.1, top_k=3)])
    assert result.logprobs is not None
    (position,) = result.logprobs.to_host()
    assert position is not None
    assert position.chosen.token_id == worst
    assert position.chosen.rank == VOCAB_SIZE
    assert position.chosen.logprob == pytest.approx(plain[0, worst].item(), abs=1e-4)


def test_no_row_that_asks_means_no_logprobs(row: Callable[..., RowSampling], sample: Callable[..., SampledTokens]) -> None:
    assert sample(random_logits(2), [row(), row(temperature=0)]).logprobs is None


def test_equal_logits_rank_by_token_id_in_both_places() -> None:
    position = prompt_logprobs(torch.zeros(1, 6), torch.tensor([3]), 6).to_host()[0]
    assert position is not None
    assert [entry.token_id for entry in position.top] == [0, 1, 2, 3, 4, 5]
    assert position.chosen == position.top[3]


def test_more_alternatives_than_tokens_are_cut_off() -> None:
    position = prompt_logprobs(torch.zeros(1, 3), torch.tensor([1]), 20).to_host()[0]
    assert position is not None
    assert len(position.top) == 3


def test_impossible_tokens_have_minus_infinity() -> None:
    position = prompt_logprobs(torch.tensor([[0.0, -math.inf]]), torch.tensor([1]), 2).to_host()[0]
    assert position is not None
    assert [entry.logprob for entry in position.top] == [0.0, -math.inf]
    assert position.chosen.rank == 2


def test_nothing_asked_of_an_empty_prompt_gives_nothing() -> None:
    assert prompt_logprobs(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64), 3).to_host() == []


def test_logprobs_move_between_devices_as_one(row: Callable[..., RowSampling], sample: Callable[..., SampledTokens]) -> None:
    batch = sample(random_logits(2), [row(), row(logprobs=3)]).logprobs
    assert batch is not None
    assert batch.to("cpu", non_blocking=True).to_host() == batch.to_host()
