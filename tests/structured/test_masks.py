"""The mask of a grammar among the other edits of the logits: exact, last, and nobody else's business."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from nanovllm.engine.batch import RowSampling
from nanovllm.sampling import penalties
from nanovllm.sampling.sampler import Sampler
from nanovllm.sampling_params import SamplingParams

VOCAB_SIZE = 131


class Allows:
    """A matcher that lets these tokens through."""

    error = None

    def __init__(self, *token_ids: int) -> None:
        self.token_ids = token_ids

    def fill_mask(self, mask: np.ndarray) -> None:
        bits = np.zeros(mask.size * 32, dtype=np.uint8)
        bits[list(self.token_ids)] = 1
        mask[:] = np.packbits(bits, bitorder="little").view(np.int32)

    def accept(self, token_id: int) -> str | None:
        return None


def sample(logits: torch.Tensor, params: list[SamplingParams], matchers: dict[int, Any] | None, position: int = 1) -> list[int]:
    sampler = Sampler(VOCAB_SIZE, len(params), torch.device("cpu"))
    for row, one in enumerate(params):
        sampler.seat(row, RowSampling(one, row, (2,), (), 1))
    table = torch.zeros(len(params), 8, dtype=torch.int32)
    drawn = sampler.sample(logits, list(range(len(params))), [position] * len(params), table, matchers)
    return drawn.token_ids.tolist()


OPTIONS = [
    {"temperature": 0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.5},
    {"temperature": 1.5, "top_k": 3},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 0, "repetition_penalty": 1.5},
    {"temperature": 0, "allowed_token_ids": [5, 6]},
    {"temperature": 1.0, "logit_bias": {7: 100.0}},
    {"temperature": 0, "min_tokens": 5},
]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    options=st.lists(st.sampled_from(OPTIONS), min_size=1, max_size=5),
    allowed=st.dictionaries(st.integers(0, 4), st.sets(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=6)),
    seed=st.integers(0, 1000),
)
def test_draws_are_allowed_and_those_of_others_unchanged(options, allowed, seed):
    params = [SamplingParams(**chosen) for chosen in options]
    logits = torch.randn(len(params), VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    before = logits.clone()
    matchers = {sample: Allows(*tokens) for sample, tokens in allowed.items() if sample < len(params)}
    masked, free = sample(logits, params, matchers), sample(logits, params, None)
    assert torch.equal(logits, before)
    for index, (token, unmasked) in enumerate(zip(masked, free, strict=True)):
        if index in matchers:
            assert token in matchers[index].token_ids
            if unmasked in matchers[index].token_ids and options[index] in OPTIONS[:2]:
                assert token == unmasked, "the noise of a token does not depend on what else is allowed"
        else:
            assert token == unmasked


def test_the_best_of_the_allowed_tokens_wins():
    logits = torch.arange(VOCAB_SIZE, dtype=torch.float32)[None]
    assert sample(logits, [SamplingParams(temperature=0)], {0: Allows(3, 77, 130)}) == [130]
    assert sample(logits, [SamplingParams(temperature=0, logit_bias={3: 100.0, 50: 100.0})], {0: Allows(3, 77)}) == [3]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_contradicts_the_grammar_gives_way(temperature):
    logits = torch.full((1, VOCAB_SIZE), -torch.inf)
    logits[0, 9] = 3.0
    params = SamplingParams(temperature=temperature, allowed_token_ids=[9], min_tokens=4)
    assert sample(logits, [params], {0: Allows(2)}) == [2]  # an end that min_tokens forbids, too
    assert sample(logits, [params], {0: Allows(2, 30)})[0] in (2, 30)


def test_a_bit_is_a_token():
    masks, lines = penalties.upload_masks({0: Allows(0, 31, 32, 63, 130), 3: Allows(1)}, 5, VOCAB_SIZE, torch.device("cpu"))
    assert lines.tolist() == [0, -1, -1, 1, -1]
    edit = penalties._keep_in_grammar_on_cpu([1, 4], masks.numpy(), VOCAB_SIZE)
    batch = penalties.EditedLogits(torch.zeros(5, VOCAB_SIZE), [0] * 5, torch.zeros(5, 1))
    edit(batch)
    assert [row.nonzero()[:, 0].tolist() for row in batch.scores.isfinite()[[1, 4]]] == [[0, 31, 32, 63, 130], [1]]
    assert batch.scores[[0, 2, 3]].isfinite().all()
