from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from nanovllm.sampling import filters

# Few distinct values, so that ties are everywhere.
TIED_LOGITS = st.lists(st.sampled_from([-math.inf, -2.5, -0.0, 0.0, 1.0, 1.5, 30.0]), min_size=1, max_size=40)


def in_order(values: list[float]) -> list[int]:
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


@given(TIED_LOGITS, st.integers(1, 40), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(derandomize=True, deadline=None)
def test_most_likely_takes_the_lowest_ids_among_equals(values: list[float], count: int, dtype: torch.dtype) -> None:
    count = min(count, len(values))
    logits, ids = filters.most_likely(torch.tensor([values, values[::-1]], dtype=dtype), count)
    assert ids.tolist() == [in_order(values)[:count], in_order(values[::-1])[:count]]
    assert logits[0].tolist() == [values[i] for i in ids[0]]


def test_most_likely_sorts_floats_of_all_sizes() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 1001, generator=generator) * 10.0 ** torch.randint(-30, 30, (3, 1001), generator=generator)
    expected = logits.sort(-1, descending=True)
    values, ids = filters.most_likely(logits, 1001)
    assert torch.equal(values, expected.values)
    assert torch.equal(ids, expected.indices)


@given(TIED_LOGITS, st.data())
@settings(derandomize=True, deadline=None)
def test_tokens_ahead_are_those_before_it_in_the_order(values: list[float], data: st.DataObject) -> None:
    token = data.draw(st.integers(0, len(values) - 1))
    ahead = filters.tokens_ahead(torch.tensor([values]), torch.tensor([token]))[0]
    order = in_order(values)
    assert set(ahead.nonzero()[:, 0].tolist()) == set(order[: order.index(token)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_argmax_takes_the_first_of_equals_and_stays_in_range_with_nan(dtype: torch.dtype) -> None:
    nan, inf = math.nan, math.inf
    values = torch.tensor([[1, 3, 3], [-inf, -inf, -inf], [1, nan, 2], [inf, 1, inf]], dtype=dtype)
    assert filters.argmax(values).tolist() == [1, 0, 1, 0]
    assert filters.argmax(values[:0]).tolist() == []


def test_min_p_is_a_share_of_the_most_likely() -> None:
    weights = torch.tensor([[1.0, 0.5, 0.25, 0.2], [1.0, 0.5, 0.25, 0.2]])
    kept = filters.drop_below_min_p(weights, torch.tensor([[0.25], [1.0]]))
    assert kept.tolist() == [[1.0, 0.5, 0.25, 0.0], [1.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("top_k", "top_p", "expected"),
    [
        (5, 1.0, [8, 4, 2, 1, 1]),
        (3, 1.0, [8, 4, 2, 0, 0]),
        (4, 0.8, [8, 4, 0, 0, 0]),
        (4, 0.81, [8, 4, 2, 0, 0]),
        (5, 0.5, [8, 0, 0, 0, 0]),
        (5, 0.51, [8, 4, 0, 0, 0]),
        (1, 0.01, [8, 0, 0, 0, 0]),
        (5, 1e-9, [8, 0, 0, 0, 0]),
    ],
)
def test_top_p_is_of_what_top_k_left(top_k: int, top_p: float, expected: list[float]) -> None:
    weights = torch.tensor([[8.0, 4.0, 2.0, 1.0, 1.0]])
    assert filters.drop_beyond_top_k_top_p(weights, torch.tensor([[top_k]]), torch.tensor([[top_p]])).tolist() == [expected]


@given(TIED_LOGITS.filter(lambda values: max(values) > -math.inf), st.floats(0.01, 0.99), st.integers(0, 2**32))
@settings(derandomize=True, deadline=None)
def test_winner_within_top_p_is_the_best_of_the_nucleus(values: list[float], top_p: float, seed: int) -> None:
    logits = torch.tensor([values])
    weights = filters.relative_weights(logits, torch.ones(1, 1))
    scores = weights * torch.rand(weights.shape, generator=torch.Generator().manual_seed(seed))
    nucleus, mass = [], 0.0
    for token in in_order(values):
        if mass < top_p * weights.sum().item():
            nucleus.append(token)
        mass += weights[0, token].item()
    best = max(nucleus, key=lambda token: (scores[0, token].item(), -token))
    assert filters.winner_within_top_p(logits, weights, scores, torch.tensor([[top_p]])).tolist() == [best]


def test_winner_within_top_p_of_several_rows_at_once() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]] * 3)
    weights = filters.relative_weights(logits, torch.ones(3, 1))
    scores = torch.tensor([[9.0, 2.0, 3.0, 1.0], [9.0, 8.0, 3.0, 4.0], [1.0, 2.0, 3.0, 9.0]])
    top_p = torch.tensor([[0.95], [0.7], [1.0]])
    assert filters.winner_within_top_p(logits, weights, scores, top_p).tolist() == [2, 3, 3]


def test_blocks_cover_every_line_once() -> None:
    for num_rows in (1, 2, 5):
        blocks = list(filters.row_blocks(torch.zeros(num_rows, 3), rows_on_cpu=2))
        assert [line for block in blocks for line in range(num_rows)[block]] == list(range(num_rows))
    assert len(list(filters.row_blocks(torch.zeros(0, 3)))) == 1
