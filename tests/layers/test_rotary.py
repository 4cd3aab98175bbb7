"""Rotary tables against the formula, one pair at a time. Whole models are in tests/models."""

from __future__ import annotations

import math

import pytest
import torch

from nanovllm.kernels.rotary import apply_rotary
from nanovllm.layers.rotary import RotaryTable, attention_scale
from nanovllm.model_spec import RopeSpec

CPU = torch.device("cpu")


@pytest.mark.parametrize("head_dim", [2, 16, 80])
def test_dimension_i_turns_with_dimension_i_plus_half(head_dim):
    table = RotaryTable(RopeSpec(10000.0), head_dim, 50, dtype=torch.float32, device=CPU)
    positions = torch.tensor([0, 49, 7, 7])
    x = torch.randn(4, 3, head_dim, generator=torch.Generator().manual_seed(0))
    turned = apply_rotary(x, *table.at(positions))
    half = head_dim // 2
    for token, position in enumerate(positions.tolist()):
        for i in range(half):
            angle = position * 10000.0 ** (-2 * i / head_dim)
            a, b = x[token, :, i], x[token, :, i + half]
            torch.testing.assert_close(turned[token, :, i], a * math.cos(angle) - b * math.sin(angle), rtol=0, atol=1e-5)
            torch.testing.assert_close(turned[token, :, i + half], b * math.cos(angle) + a * math.sin(angle), rtol=0, atol=1e-5)


def test_position_0_is_left_as_it_is_and_lengths_are_kept():
    table = RotaryTable(RopeSpec(500_000.0), 64, 4000, dtype=torch.float32, device=CPU)
    x = torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(0))
    turned = apply_rotary(x, *table.at(torch.tensor([0, 3999])))
    torch.testing.assert_close(turned[0], x[0])
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_only_the_distance_of_two_positions_matters():
    table = RotaryTable(RopeSpec(10000.0), 32, 300, dtype=torch.float32, device=CPU)
    query, key = torch.randn(2, 1, 1, 32, generator=torch.Generator().manual_seed(0))

    def score(at_query: int, at_key: int) -> float:
        turned = [apply_rotary(x, *table.at(torch.tensor([at]))) for x, at in ((query, at_query), (key, at_key))]
        return (turned[0] * turned[1]).sum().item()

    assert score(9, 4) == pytest.approx(score(205, 200), abs=1e-4)
    assert score(9, 4) != pytest.approx(score(10, 4), abs=1e-2)


@pytest.mark.parametrize(("factor", "given", "expected"), [(4.0, None, 1 + 0.1 * math.log(4)), (1.0, None, 1.0), (4.0, 0.7, 0.7)])
def test_only_yarn_scales_the_scores(factor, given, expected):
    assert attention_scale(RopeSpec(10000.0, "yarn", factor, 512, attention_factor=given)) == pytest.approx(expected)
    assert attention_scale(RopeSpec(10000.0, "linear", factor)) == 1.0
