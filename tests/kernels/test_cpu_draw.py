"""The compiled step's draw takes the tokens that the torch sampler takes: every way to draw, with and without masks."""

from __future__ import annotations

import ctypes
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from kernels.instruction_sets import AVAILABLE
from kernels.test_cpu_step import library
from torch import Tensor

from nanovllm.engine.batch import RowSampling
from nanovllm.kernels.cpu import build
from nanovllm.kernels.cpu.library import Layer, Model
from nanovllm.models.compiled_decoder import CompiledDecoder
from nanovllm.sampling.sampler import Sampler
from nanovllm.sampling_params import SamplingParams

pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="no C++ compiler")

WAYS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.1},
    {"temperature": 0.7},
    {"temperature": 1.3, "min_p": 0.05},
    {"temperature": 1.0, "top_p": 0.3},
    {"temperature": 0.9, "top_p": 0.95, "min_p": 0.01},
    {"temperature": 1.0, "top_p": 0.999},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.3, "top_k": 3},
    {"temperature": 1.0, "top_k": 50, "top_p": 0.8},
    {"temperature": 2.0, "top_k": 90, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 1.5, "top_k": 3000, "min_p": 0.001},
    {"temperature": 1.0, "logit_bias": {3: 4.0}, "bad_words": [], "min_tokens": 5},
]


def race(instruction_set: str, num_threads: int = 1) -> Any:
    """`CompiledDecoder.race` without a model."""
    decoder = object.__new__(CompiledDecoder)
    decoder._library = library(instruction_set)
    decoder._handle = decoder._library.nanovllm_create(ctypes.byref(Model(layers=(Layer * 0)())), num_threads)
    weakref.finalize(decoder, decoder._library.nanovllm_destroy, decoder._handle)
    return decoder.race


class Mask:
    """A matcher that allows what it is told, also beyond the vocabulary."""

    error = None

    def __init__(self, allowed: np.ndarray) -> None:
        self.allowed = allowed  # [vocab] bool

    def fill_mask(self, mask: np.ndarray) -> None:
        bits = np.ones(mask.size * 32, dtype=np.uint8)
        bits[: len(self.allowed)] = self.allowed
        mask[:] = np.packbits(bits, bitorder="little").view(np.int32)

    def accept(self, token_id: int) -> str | None:
        return None


def sample(logits: Tensor, params: list[SamplingParams], matchers: dict[int, Any] | None, race: Any) -> list[int]:
    sampler = Sampler(logits.shape[1], len(params), torch.device("cpu"))
    sampler.race = race
    for row, one in enumerate(params):
        sampler.seat(row, RowSampling(one, row, (2,), (), 1))
    rows, before = list(range(len(params))), logits.clone()
    drawn = sampler.sample(logits, rows, [3 + row for row in rows], torch.ones(len(params), 99, dtype=torch.int32), matchers)
    assert torch.equal(logits.nan_to_num(7.0), before.nan_to_num(7.0)), "logits are left as they are"
    return drawn.token_ids.tolist()


def random_logits(num_rows: int, vocab_size: int, seed: int = 0) -> Tensor:
    """Of few different values, so that many are equal; some tokens are not possible."""
    logits = torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed))
    logits = (logits * 8).round() / 4
    logits[::3, ::5] = -torch.inf
    return logits


def random_masks(num_rows: int, vocab_size: int, share: float) -> dict[int, Mask]:
    """Of nine samples in ten; each allows about a share of the vocabulary, and one token at least."""
    generator = np.random.default_rng(vocab_size)
    allowed = generator.random((num_rows, vocab_size)) < share
    allowed[np.arange(num_rows), generator.integers(0, vocab_size, num_rows)] = True
    return {row: Mask(line) for row, line in enumerate(allowed) if row % 10 != 4}


def draws_the_same(
    instruction_set: str, vocab_size: int, params: list[SamplingParams], share: float | None = None, num_threads: int = 1
) -> list[int]:
    logits = random_logits(len(params), vocab_size)
    masks = None if share is None else random_masks(len(params), vocab_size, share)
    ours = sample(logits, params, masks, race(instruction_set, num_threads))
    assert ours == sample(logits, params, masks, None)
    assert all(masks[row].allowed[token] for row, token in enumerate(ours) if masks and row in masks)
    return ours


@pytest.mark.parametrize("instruction_set", AVAILABLE)
class TestDraw:
    @pytest.mark.parametrize("vocab_size", [5, 97, 4096])
    @pytest.mark.parametrize("options", WAYS)
    def test_takes_the_tokens_that_the_torch_twin_takes(self, instruction_set, options, vocab_size):
        drawn = draws_the_same(instruction_set, vocab_size, [SamplingParams(**options)] * 200)
        assert len(set(drawn)) > 2

    @pytest.mark.parametrize(("vocab_size", "share"), [(50, 0.5), (97, 0.9), (4096, 0.01), (49_157, 0.9), (151_936, 0.001)])
    def test_under_masks_takes_the_tokens_that_edited_logits_give(self, instruction_set, vocab_size, share):
        draws_the_same(instruction_set, vocab_size, [SamplingParams(**options) for options in WAYS] * 2, share)

    def test_of_a_row_does_not_depend_on_its_neighbours_or_the_threads(self, instruction_set):
        params = [SamplingParams(**options) for options in WAYS] * 4
        logits, masks = random_logits(len(params), 97), random_masks(len(params), 97, 0.5)
        every = sample(logits, params, masks, race(instruction_set, num_threads=3))
        alone = []
        for row in range(len(params)):
            others = [SamplingParams(temperature=0)] * row  # the seed and the place are those of the row
            mask = {row: masks[row]} if row in masks else None
            alone.append(sample(logits[: row + 1], [*others, params[row]], mask, race(instruction_set))[row])
        assert every == alone

    @pytest.mark.parametrize("options", WAYS)
    @pytest.mark.parametrize("place", [0, 40, 96])
    @pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf])
    def test_of_what_is_not_finite_is_no_token(self, instruction_set, options, place, bad):
        params, logits = [SamplingParams(**options)] * 4, random_logits(4, 97)
        expected = sample(logits, params, None, None)
        logits[1, place] = bad
        logits[2] = -torch.inf
        ours = sample(logits, params, None, race(instruction_set))
        assert ours == [expected[0], -1, -1 if "min_tokens" not in options else ours[2], expected[3]]

    @pytest.mark.parametrize("options", WAYS)
    def test_under_masks_of_what_is_not_finite(self, instruction_set, options):
        """A token that may not come may be infinite, but none may be NaN; what alone fits wins, though the model says never."""
        only_35 = np.arange(5000) == 35
        masks = {row: Mask(only_35) for row in range(5)} | {5: Mask(only_35 < 0)}
        logits = torch.zeros(7, 5000)
        logits[0], logits[1, 7], logits[2, 4000], logits[3, 35], logits[4, 36] = (
            -torch.inf,
            torch.nan,
            torch.inf,
            torch.inf,
            -1e30,
        )
        logits[6, 4000] = torch.inf
        params = [SamplingParams(**options)] * 7
        assert sample(logits, params, masks, race(instruction_set)) == [35, -1, 35, -1, 35, -1, -1]

    @pytest.mark.parametrize("vocab_size", [33, 97])
    def test_that_allows_everything_stays_within_the_vocabulary(self, instruction_set, vocab_size):
        """Where the model says never to all of it, all are equal; bits and registers go on beyond it."""
        params = [SamplingParams(temperature=1.0)] * 300
        masks = {row: Mask(np.ones(vocab_size, dtype=bool)) for row in range(300)}
        ours = sample(torch.full((300, vocab_size), -torch.inf), params, masks, race(instruction_set))
        assert min(ours) >= 0 and max(ours) < vocab_size and len(set(ours)) > vocab_size / 2

    @pytest.mark.parametrize("top_k", [1, 2, 15, 16, 17, 100, 1025, 4094])
    @pytest.mark.parametrize("order", ["rising", "falling", "equal", "two values"])
    def test_top_k_of_any_order(self, instruction_set, order, top_k):
        rising = torch.arange(4095.0) / 4095
        line = {"rising": rising, "falling": rising.flip(0), "equal": rising * 0, "two values": rising.mul(4095) % 3 // 2}[order]
        params = [SamplingParams(temperature=10.0, top_k=top_k)] * 60
        logits = line.repeat(60, 1)
        ours = sample(logits, params, None, race(instruction_set))
        assert ours == sample(logits, params, None, None)
        assert len(set(ours)) > min(top_k, 30) / 3


VALUES = st.sampled_from([-torch.inf, -3.0, -1.25, -0.0, 0.0, 0.7, 0.9999999, 1.0, 4.0])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    values=st.lists(VALUES, min_size=1, max_size=70),
    temperature=st.sampled_from([0.0, 0.01, 0.5, 1.0, 3.0]),
    top_k=st.integers(0, 75),
    top_p=st.sampled_from([0.05, 0.31, 0.62, 0.93, 1.0]),
    min_p=st.sampled_from([0.0, 0.003, 0.21]),
    allowed=st.none() | st.integers(0, 2**70 - 1),
)
def test_limits_compose_as_in_the_torch_sampler(values, temperature, top_k, top_p, min_p, allowed):
    params = [SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)] * 20
    logits = torch.tensor(values).repeat(20, 1)
    bits = None if allowed is None else np.array([allowed >> place & 1 for place in range(len(values))], dtype=bool)
    masks = None if bits is None else {row: Mask(bits) for row in range(20)}
    assert sample(logits, params, masks, race(AVAILABLE[0])) == sample(logits, params, masks, None)
