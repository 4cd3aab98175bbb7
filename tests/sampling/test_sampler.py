from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from nanovllm.engine.batch import RowSampling
from nanovllm.sampling import gumbel
from nanovllm.sampling.sampler import SampledTokens, Sampler
from nanovllm.sampling_params import SamplingParams

VOCAB_SIZE = 131
Row = Callable[..., RowSampling]
Sample = Callable[..., SampledTokens]


def random_logits(num_rows: int, vocab_size: int = VOCAB_SIZE, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 2


def kept_tokens(logits: np.ndarray, params: SamplingParams) -> dict[int, float]:
    """Naive filters in float64: token id -> probability up to a factor, most likely first."""
    weights = np.exp((logits - logits.max()) / params.temperature)
    kept = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    kept = [token for token in kept if weights[token] >= params.min_p]
    kept = kept[: params.top_k] if params.top_k > 0 else kept
    total, reached, nucleus = sum(weights[token] for token in kept), 0.0, {}
    for token in kept:
        if params.top_p < 1 and reached >= params.top_p * total:
            break
        reached += weights[token]
        nucleus[token] = weights[token]
    return nucleus


def naive_draw(logits: torch.Tensor, sampling: RowSampling, position: int) -> int:
    kept = kept_tokens(logits.double().numpy(), sampling.params)
    keys = gumbel.draw_keys(np.array([gumbel.stream_of(sampling.seed)], dtype=np.uint64), [position])
    noise = gumbel.exponential_noise(gumbel.token_hashes(len(logits)), torch.from_numpy(keys))[0].tolist()
    return max(kept, key=lambda token: (kept[token] / noise[token], -token))


@st.composite
def sampling_options(draw: st.DrawFn) -> dict[str, Any]:
    options = {
        "temperature": st.floats(0.05, 5.0),
        "top_k": st.integers(-1, 150),
        "top_p": st.floats(0.05, 1.0),
        "min_p": st.floats(0.0, 1.0),
    }
    chosen = draw(st.sets(st.sampled_from(sorted(options))))
    return {name: draw(options[name]) for name in sorted(chosen)}


@given(st.lists(sampling_options(), min_size=1, max_size=5), st.integers(0, 2**32), st.integers(1, 60))
@settings(derandomize=True, deadline=None, max_examples=200)
def test_draws_equal_the_naive_ones(options: list[dict[str, Any]], seed: int, position: int) -> None:
    logits = random_logits(len(options), seed=seed)
    sampler = Sampler(VOCAB_SIZE, len(options), torch.device("cpu"))
    sampled = [RowSampling(SamplingParams(**chosen), seed + i, (), (), 1) for i, chosen in enumerate(options)]
    for i, sampling in enumerate(sampled):
        sampler.seat(i, sampling)
    table = torch.zeros(len(options), 64, dtype=torch.int32)
    drawn = sampler.sample(logits, list(range(len(options))), [position] * len(options), table).token_ids
    assert drawn.tolist() == [naive_draw(line, s, position) for line, s in zip(logits, sampled, strict=True)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 2.0},
        {"top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"top_k": 12, "top_p": 0.7, "min_p": 0.05, "temperature": 1.5},
        {"top_p": 0.6, "temperature": 3.0},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(options: dict[str, Any]) -> None:
    logits, num_draws = random_logits(1, vocab_size=30, seed=1), 10_000
    sampler = Sampler(30, 1, torch.device("cpu"))
    sampler.seat(0, RowSampling(SamplingParams(**options), 42, (), (), 1))
    positions = list(range(1, num_draws + 1))
    drawn = sampler.sample(logits.expand(num_draws, -1), [0] * num_draws, positions, torch.zeros(1, 1, dtype=torch.int32))
    kept = kept_tokens(logits[0].double().numpy(), SamplingParams(**options))
    counts = np.bincount(drawn.token_ids.numpy(), minlength=30)
    assert counts.sum() == sum(counts[token] for token in kept)
    expected = {token: num_draws * weight / sum(kept.values()) for token, weight in kept.items()}
    chi_square = sum((counts[token] - mean) ** 2 / mean for token, mean in expected.items())
    assert abs(chi_square - (len(kept) - 1)) < 4 * math.sqrt(2 * len(kept))


MIXED = [
    {"temperature": 0},
    {"temperature": 0.8},
    {"top_k": 5},
    {"top_k": 100, "top_p": 0.9, "temperature": 3.0},
    {"top_p": 0.5, "temperature": 2.0},
    {"min_p": 0.2, "logprobs": 3},
    {"temperature": 0, "repetition_penalty": 1.3, "logprobs": 1},
    {"frequency_penalty": 1.0, "presence_penalty": 0.5, "top_k": 80},
    {"logit_bias": {3: 5.0}, "top_p": 0.7, "top_k": 20},
    {"allowed_token_ids": [1, 2, 3, 100]},
    {"bad_words": [[7], [1, 9]], "temperature": 0.3},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_draws_the_same_alone_and_in_any_batch_in_any_order(row: Row, sample: Sample, dtype: torch.dtype) -> None:
    generator = np.random.default_rng(0)
    sampled = [row(seed=i % 7, num_prompt=2, **options) for i, options in enumerate(MIXED * 3)]
    logits = random_logits(len(sampled)).to(dtype)
    histories = [generator.integers(0, VOCAB_SIZE, 3 + i % 5).tolist() for i in range(len(sampled))]
    alone = [
        sample(logits[i : i + 1], [s], [history]).token_ids.item()
        for i, (s, history) in enumerate(zip(sampled, histories, strict=True))
    ]
    for size in (len(sampled), 20, 5, 2):
        lines = generator.permutation(len(sampled))[:size].tolist()
        drawn = sample(logits[lines], [sampled[i] for i in lines], [histories[i] for i in lines])
        assert drawn.token_ids.tolist() == [alone[i] for i in lines]


def test_a_token_that_survives_the_filters_wins_as_it_would_without_them(row: Row, sample: Sample) -> None:
    logits = random_logits(200)
    plain = sample(logits, [row(seed=i) for i in range(200)]).token_ids.tolist()
    cases: tuple[dict[str, Any], ...] = ({"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.05})
    for options in cases:
        filtered = sample(logits, [row(seed=i, **options) for i in range(200)]).token_ids.tolist()
        for line, before, after in zip(logits, plain, filtered, strict=True):
            assert after == before or before not in kept_tokens(line.double().numpy(), SamplingParams(**options))


def test_other_seeds_and_other_positions_draw_other_tokens(row: Row, sample: Sample) -> None:
    logits = torch.zeros(100, VOCAB_SIZE)
    by_seed = sample(logits, [row(seed=i) for i in range(100)]).token_ids
    by_position = sample(logits, [row(seed=0)] * 100, positions=list(range(1, 101))).token_ids
    assert len(set(by_seed.tolist())) > 50
    assert len(set(by_position.tolist())) > 50


@pytest.mark.parametrize("seed", [-(2**63), -1, 0, 2**63, 2**64 - 1])
def test_any_64_bit_seed_is_taken(row: Row, sample: Sample, seed: int) -> None:
    assert 0 <= sample(torch.zeros(1, VOCAB_SIZE), [row(seed=seed)]).token_ids.item() < VOCAB_SIZE


def test_greedy_takes_the_lowest_of_equals(row: Row, sample: Sample) -> None:
    logits = torch.zeros(2, VOCAB_SIZE)
    logits[0, [77, 50]] = 4.0
    assert sample(logits, [row(temperature=0)] * 2).token_ids.tolist() == [50, 0]


def test_temperatures_near_zero_are_safe_with_huge_logits(row: Row, sample: Sample) -> None:
    logits = random_logits(1) * 1e4
    for temperature in (0.0, 1e-6, 1e-5, 1e-3):
        assert sample(logits, [row(temperature=temperature)]).token_ids.tolist() == logits.argmax(-1).tolist()


def test_top_k_keeps_exactly_k_of_equals_with_the_lowest_ids(row: Row, sample: Sample) -> None:
    logits = torch.ones(500, VOCAB_SIZE)
    logits[:, 100] = 1.5
    drawn = sample(logits, [row(seed=i, top_k=3) for i in range(500)]).token_ids.tolist()
    assert set(drawn) == {100, 0, 1}


def test_small_and_large_top_k_share_a_batch(row: Row, sample: Sample) -> None:
    logits = random_logits(6, vocab_size=3001)
    sampled = [row(seed=i, temperature=4.0, top_k=top_k) for i, top_k in enumerate((3, 64, 65, 1024, 1025, 3000))]
    drawn = sample(logits, sampled).token_ids.tolist()
    assert drawn == [naive_draw(line, sampling, 1) for line, sampling in zip(logits, sampled, strict=True)]


def test_top_p_cuts_equals_too(row: Row, sample: Sample) -> None:
    drawn = sample(torch.ones(500, 100), [row(seed=i, top_p=0.045) for i in range(500)]).token_ids.tolist()
    assert set(drawn) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("options", MIXED, ids=str)
def test_nan_and_infinity_are_no_token(row: Row, sample: Sample, options: dict[str, Any]) -> None:
    logits = random_logits(5)
    logits[0] = math.nan
    logits[1, 5] = math.nan
    logits[2] = -math.inf
    logits[3, 7:] = -math.inf
    logits[4, 9] = math.inf
    result = sample(logits, [row(seed=i, num_prompt=1, **options) for i in range(5)], [[0, 1, 1]] * 5)
    drawn = result.token_ids.tolist()
    assert drawn[0] == -1
    assert drawn[2] == -1 or options.keys() & {"allowed_token_ids", "bad_words"}  # what they forbid is finite
    if "allowed_token_ids" in options:
        assert {drawn[1], drawn[4]} < {1, 2, 3, 100}  # neither may be drawn
    else:
        assert (drawn[1], drawn[4]) == (-1, -1 if "bad_words" not in options else drawn[4])  # 1, 9 is a bad word
        assert 0 <= drawn[3] < 7


def test_a_nan_row_leaves_its_neighbours_alone(row: Row, sample: Sample) -> None:
    logits = random_logits(3)
    for options in ({}, {"top_k": 5}, {"top_p": 0.8}, {"temperature": 0}):
        sampled = [row(seed=i, **options) for i in range(3)]
        expected = sample(logits, sampled).token_ids.tolist()
        broken = logits.clone()
        broken[1] = math.nan
        drawn = sample(broken, sampled).token_ids.tolist()
        assert [drawn[0], drawn[2]] == [expected[0], expected[2]]


def draws(sample: Sample, logits: torch.Tensor, make: Callable[[int], RowSampling], history: Sequence[int] = (0,)) -> set[int]:
    """What 100 seeds draw."""
    return set(sample(logits.expand(100, -1), [make(i) for i in range(100)], [list(history)] * 100).token_ids.tolist())


def test_only_allowed_tokens_are_drawn(row: Row, sample: Sample) -> None:
    for options in ({}, {"top_k": 9}, {"top_p": 0.99}, {"temperature": 50.0}):
        assert draws(sample, torch.zeros(1, 20), lambda i, o=options: row(seed=i, allowed_token_ids=[4, 11, 4], **o)) == {4, 11}


def test_a_large_bias_decides(row: Row, sample: Sample) -> None:
    assert draws(sample, torch.zeros(1, 20), lambda i: row(seed=i, logit_bias={6: 100.0})) == {6}
    assert 6 not in draws(sample, torch.zeros(1, 20), lambda i: row(seed=i, logit_bias={6: -100.0}))


def test_a_bias_does_not_lift_a_mask(row: Row, sample: Sample) -> None:
    assert 6 not in draws(sample, torch.zeros(1, 20), lambda i: row(seed=i, logit_bias={6: 100.0}, bad_words=[[6]]))
    greedy = row(temperature=0, logit_bias={6: 100.0}, bad_words=[[6]], repetition_penalty=0.01)
    assert sample(torch.zeros(1, 20), [greedy], [[6]]).token_ids.item() != 6


def test_no_end_before_min_tokens(row: Row, sample: Sample) -> None:
    logits = torch.zeros(1, 5)
    logits[0, 2] = 9.0
    sampling = row(temperature=0, min_tokens=2, stop_token_ids=[2, 3], num_prompt=2)
    drawn = [sample(logits, [sampling], [[1] * length]).token_ids.item() for length in (2, 3, 4, 5)]
    assert drawn == [0, 0, 2, 2]


def test_contradicting_masks_still_give_an_allowed_token(row: Row, sample: Sample) -> None:
    options: dict[str, Any] = {"allowed_token_ids": [3, 8], "min_tokens": 5, "stop_token_ids": [8, 3]}
    assert draws(sample, random_logits(1), lambda i: row(seed=i, **options)) == {3, 8}
    for filters in ({"top_k": 4}, {"top_p": 0.9}, {"min_p": 0.3}, {"temperature": 0}):
        assert draws(sample, random_logits(1), lambda i, f=filters: row(seed=i, **options, **f)) <= {3, 8}
    assert sample(torch.full((1, 20), -math.inf), [row(allowed_token_ids=[7])]).token_ids.item() == 7


def test_logits_of_the_caller_are_left_alone(row: Row, sample: Sample) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        logits = random_logits(len(MIXED)).to(dtype)
        before = logits.clone()
        for subset in (range(len(MIXED)), *([i] for i in range(len(MIXED)))):
            sample(logits[list(subset)], [row(**MIXED[i]) for i in subset])
            sample(logits[: len(subset)], [row(**MIXED[i]) for i in subset])
        assert torch.equal(logits, before)


def test_bf16_draws_what_float32_draws_from_the_same_values(row: Row, sample: Sample) -> None:
    logits = random_logits(len(MIXED)).bfloat16()
    sampled = [row(seed=i, **options) for i, options in enumerate(MIXED)]
    assert sample(logits, sampled).token_ids.tolist() == sample(logits.float(), sampled).token_ids.tolist()


def test_a_row_seated_again_forgets_what_was_there() -> None:
    sampler, table = Sampler(10, 2, torch.device("cpu")), torch.zeros(2, 8, dtype=torch.int32)
    logits = torch.arange(10.0).expand(2, -1)
    for allowed in ([1, 2], [3], None):
        for row in (0, 1):
            params = SamplingParams(temperature=0, allowed_token_ids=allowed, logprobs=None if allowed else 0)
            sampler.seat(row, RowSampling(params, 0, (), (), 1))
        result = sampler.sample(logits, [1, 0], [1, 1], table)
        assert result.token_ids.tolist() == [max(allowed or [9])] * 2
        assert (result.logprobs is None) == bool(allowed)


def test_a_plan_is_not_confused_by_a_list_that_the_caller_changes() -> None:
    sampler, table = Sampler(10, 2, torch.device("cpu")), torch.zeros(2, 8, dtype=torch.int32)
    sampler.seat(0, RowSampling(SamplingParams(temperature=0, allowed_token_ids=[2]), 0, (), (), 1))
    sampler.seat(1, RowSampling(SamplingParams(temperature=0, allowed_token_ids=[5]), 0, (), (), 1))
    rows = [0]
    assert sampler.sample(torch.zeros(1, 10), rows, [1], table).token_ids.item() == 2
    rows[0] = 1
    assert sampler.sample(torch.zeros(1, 10), rows, [1], table).token_ids.item() == 5


def test_one_row_may_be_sampled_at_several_positions(row: Row, sample: Sample) -> None:
    sampler, table = Sampler(VOCAB_SIZE, 1, torch.device("cpu")), torch.zeros(1, 8, dtype=torch.int32)
    sampler.seat(0, row(seed=9, frequency_penalty=0.5))
    logits = random_logits(3)
    together = sampler.sample(logits, [0, 0, 0], [2, 3, 4], table).token_ids.tolist()
    alone = [sampler.sample(logits[i : i + 1], [0], [2 + i], table).token_ids.item() for i in range(3)]
    assert together == alone


def test_an_empty_batch_gives_no_tokens() -> None:
    sampler = Sampler(10, 2, torch.device("cpu"))
    assert sampler.sample(torch.zeros(0, 10), [], [], torch.zeros(2, 8, dtype=torch.int32)).token_ids.tolist() == []


def test_a_vocabulary_of_one_token_works(row: Row, sample: Sample) -> None:
    for options in ({}, {"top_k": 1}, {"top_p": 0.1}, {"temperature": 0}):
        assert sample(torch.zeros(1, 1), [row(**options)]).token_ids.tolist() == [0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_cuda_draws_the_same_tokens_and_waits_only_for_top_p(row: Row) -> None:
    options = [options for options in MIXED if "top_k" in options or "top_p" not in options]
    logits, table = random_logits(len(options)), torch.randint(0, VOCAB_SIZE, (len(options), 64), dtype=torch.int32)
    results = []
    for where in (torch.device("cpu"), torch.device("cuda")):
        sampler = Sampler(VOCAB_SIZE, len(options), where)
        for i, chosen in enumerate(options):
            sampler.seat(i, row(seed=i, **chosen))
        operands = (logits.to(where), list(range(len(options))), [9] * len(options), table.to(where))
        sampler.sample(*operands)
        torch.cuda.set_sync_debug_mode("error")
        try:
            drawn = [sampler.sample(*operands).token_ids]
            sampler.seat(0, row(seed=0, **options[0]))
            drawn.append(sampler.sample(*operands).token_ids)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        results.append([tokens.tolist() for tokens in drawn])
    assert results[0] == results[1]
