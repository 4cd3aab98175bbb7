from __future__ import annotations

import math
import random
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from nanovllm.sampling import gumbel

SEEDS = st.integers(-(2**63), 2**64 - 1)


def mix(x: int) -> int:
    x ^= x >> 16
    x = (x * 0x7FEB352D) % 2**32
    x ^= x >> 15
    x = (x * 0x846CA68B) % 2**32
    return x ^ (x >> 16)


def finish(z: int) -> int:
    z ^= z >> 30
    z = (z * 0xBF58476D1CE4E5B9) % 2**64
    z ^= z >> 27
    z = (z * 0x94D049BB133111EB) % 2**64
    return z ^ (z >> 31)


def key_of(seed: int, position: int) -> int:
    return finish((finish(seed % 2**64) + (position + 1) * 0x9E3779B97F4A7C15) % 2**64) >> 32


def uniform(seed: int, position: int, token: int) -> float:
    return ((mix((mix(token) + key_of(seed, position)) % 2**32) >> 9) + 0.5) * 2.0**-23


def keys_for(seed: int, positions: Iterable[int]) -> torch.Tensor:
    positions = list(positions)
    streams = np.full(len(positions), gumbel.stream_of(seed), dtype=np.uint64)
    return torch.from_numpy(gumbel.draw_keys(streams, positions))


def uniforms(seed: int, positions: Iterable[int], vocab_size: int) -> np.ndarray:
    """[positions, vocab] float64, recovered from the noise."""
    noise = gumbel.exponential_noise(gumbel.token_hashes(vocab_size), keys_for(seed, positions))
    return np.exp(-noise.double().numpy())


@given(SEEDS, st.integers(0, 2**31))
@settings(derandomize=True, deadline=None)
def test_keys_follow_the_specification(seed: int, position: int) -> None:
    assert int(keys_for(seed, [position]).numpy().view(np.uint32)[0]) == key_of(seed, position)


@given(SEEDS, st.integers(0, 10**6), st.lists(st.integers(0, 200_000), min_size=1, max_size=20))
@settings(derandomize=True, deadline=None)
def test_noise_of_any_tokens_follows_the_specification(seed: int, position: int, tokens: list[int]) -> None:
    hashes = gumbel.token_hashes(200_001)[torch.tensor(tokens)]
    noise = gumbel.exponential_noise(hashes, keys_for(seed, [position]))[0]
    expected = [-math.log(uniform(seed, position, token)) for token in tokens]
    assert noise.tolist() == pytest.approx(expected, rel=1e-6)


def test_noise_of_torch_and_of_numpy_come_from_the_same_bits() -> None:
    bits = torch.randint(-(2**31), 2**31, (3, 5001), dtype=torch.int64, generator=torch.Generator().manual_seed(0)).int()
    torch.testing.assert_close(gumbel._noise_numpy(bits.clone()), gumbel._noise_torch(bits.clone()), rtol=5e-7, atol=0)
    mixed = gumbel._mix_numpy(bits.numpy().view(np.uint32).copy()).view(np.int32)
    assert torch.equal(torch.from_numpy(mixed), gumbel._mix_torch(bits.clone()))


def test_noise_of_a_token_does_not_depend_on_what_is_computed_beside_it() -> None:
    hashes, keys = gumbel.token_hashes(1001), keys_for(3, range(7))
    together = gumbel.exponential_noise(hashes, keys)
    for line in range(7):
        assert torch.equal(together[line : line + 1], gumbel.exponential_noise(hashes, keys[line : line + 1]))
    tokens = torch.tensor([17, 1000, 3])
    assert torch.equal(together[:, tokens], gumbel.exponential_noise(hashes[tokens].expand(7, 3), keys))


def test_noise_stays_within_its_bounds() -> None:
    noise = gumbel.exponential_noise(gumbel.token_hashes(50), keys_for(0, range(100_000)))
    assert 2**-24 <= noise.min() < 1e-5
    assert 13 < noise.max() < 16.7


def test_noise_is_uniform() -> None:
    u = uniforms(seed=1, positions=range(40), vocab_size=5000).ravel()
    counts = np.histogram(u, bins=256, range=(0, 1))[0]
    expected = u.size / 256
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_square - 255) < 5 * math.sqrt(2 * 255)
    assert abs(u.mean() - 0.5) < 5 * math.sqrt(1 / 12 / u.size)


@pytest.mark.parametrize("axis", [0, 1], ids=["positions", "token ids"])
@pytest.mark.parametrize("lag", [1, 2, 16, 64])
def test_neighbours_are_not_correlated(axis: int, lag: int) -> None:
    u = uniforms(seed=2, positions=range(300), vocab_size=300)
    first, second = (u[:-lag], u[lag:]) if axis == 0 else (u[:, :-lag], u[:, lag:])
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 5 / math.sqrt(first.size)


def test_neighbouring_pairs_fill_the_square_evenly() -> None:
    u = uniforms(seed=5, positions=range(100), vocab_size=1000)
    for first, second in ((u[:, :-1], u[:, 1:]), (u[:-1], u[1:])):
        counts = np.histogram2d(first.ravel(), second.ravel(), bins=16, range=[[0, 1], [0, 1]])[0]
        expected = first.size / 256
        assert abs(((counts - expected) ** 2 / expected).sum() - 255) < 5 * math.sqrt(2 * 255)


def test_neighbouring_seeds_are_not_correlated() -> None:
    u = np.stack([uniforms(seed, range(30), 300).ravel() for seed in range(20)])
    correlation = np.corrcoef(u) - np.eye(20)
    assert np.abs(correlation).max() < 5 / math.sqrt(u.shape[1])


def test_keys_of_many_positions_and_seeds_differ() -> None:
    keys = {int(key) for seed in range(10) for key in keys_for(seed, range(1000))}
    assert len(keys) > 10_000 - 3


@pytest.mark.parametrize("number", [0, 1, 5])
def test_keys_of_steps_computed_together_are_those_of_each(number):
    choose = random.Random(number)
    streams = np.array([gumbel.stream_of(choose.getrandbits(64)) for _ in range(number)], dtype=np.uint64)
    first = np.array([choose.randrange(1000) for _ in range(number)], dtype=np.int64)
    keys = gumbel.KeysOfSteps(streams, first)
    for step in range(50):
        assert np.array_equal(keys.next(), gumbel.draw_keys(streams, (first + step).tolist()))
