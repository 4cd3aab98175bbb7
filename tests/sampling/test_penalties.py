from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

from nanovllm.engine.batch import RowSampling
from nanovllm.sampling.penalties import FORBIDDEN, EditedRow, apply_edits, build_edits, edits_logits
from nanovllm.sampling_params import SamplingParams

VOCAB_SIZE = 11
TOKENS = st.integers(0, VOCAB_SIZE - 1)
CPU = torch.device("cpu")


def edit(logits: torch.Tensor, sampled: Sequence[RowSampling], histories: Sequence[Sequence[int]]) -> torch.Tensor:
    table = torch.full((len(sampled) + 1, 40), 2**31 - 1, dtype=torch.int32)
    for row, history in enumerate(histories, start=1):
        table[row, : len(history)] = torch.tensor(history, dtype=torch.int32)
    rows = [EditedRow(i, i + 1, sampling) for i, sampling in enumerate(sampled) if edits_logits(sampling)]
    return apply_edits(build_edits(rows, CPU), logits, [len(history) for history in histories], table)


def naive_edit(logits: Sequence[float], sampling: RowSampling, history: Sequence[int]) -> list[float]:
    """One token at a time, in the documented order except that masks come last, with which they commute."""
    params, output = sampling.params, list(history[sampling.num_prompt_tokens :])
    result = []
    for token, logit in enumerate(logits):
        logit += (params.logit_bias or {}).get(token, 0.0)
        if token in history:
            logit = logit / params.repetition_penalty if logit > 0 else logit * params.repetition_penalty
        logit -= params.frequency_penalty * output.count(token) + params.presence_penalty * (token in output)
        result.append(logit if may_follow(token, sampling, history) else FORBIDDEN)
    return result


def may_follow(token: int, sampling: RowSampling, history: Sequence[int]) -> bool:
    params = sampling.params
    if params.allowed_token_ids is not None and token not in params.allowed_token_ids:
        return False
    if token in sampling.stop_token_ids and len(history) - sampling.num_prompt_tokens < params.min_tokens:
        return False
    text = [*history, token]
    return not any(text[-len(word) :] == list(word) for word in sampling.bad_words)


@st.composite
def edited_rows(draw: st.DrawFn) -> tuple[dict[str, Any], list[int]]:
    history = draw(st.lists(TOKENS, min_size=1, max_size=20))
    options = {
        "repetition_penalty": st.floats(0.5, 2.0),
        "frequency_penalty": st.floats(-2.0, 2.0),
        "presence_penalty": st.floats(-2.0, 2.0),
        "logit_bias": st.dictionaries(TOKENS, st.floats(-100, 100), min_size=1),
        "allowed_token_ids": st.lists(TOKENS, min_size=1),
        "bad_words": st.lists(st.lists(TOKENS, min_size=1, max_size=3), min_size=1, max_size=5),
        "min_tokens": st.integers(1, 20),
    }
    chosen = draw(st.sets(st.sampled_from(sorted(options))))
    row = {name: draw(options[name]) for name in sorted(chosen)}
    row["num_prompt"] = draw(st.integers(1, len(history)))
    row["stop_token_ids"] = draw(st.lists(TOKENS, max_size=3))
    return row, history


@given(st.lists(edited_rows(), min_size=1, max_size=4), st.integers(0, 2**32))
@settings(derandomize=True, deadline=None, max_examples=200)
def test_edits_of_a_batch_equal_the_naive_ones_row_by_row(rows: list[tuple[dict[str, Any], list[int]]], seed: int) -> None:
    sampled, histories = [], []
    for options, history in rows:
        options = {"max_tokens": None, **options}
        words = tuple(tuple(word) for word in options.pop("bad_words", ()))
        stop, num_prompt = tuple(options.pop("stop_token_ids")), options.pop("num_prompt")
        sampled.append(RowSampling(SamplingParams(**options), 0, stop, words, num_prompt))
        histories.append(history)
    logits = torch.randn(len(rows), VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 3
    before = logits.clone()
    expected = torch.tensor([naive_edit(*line) for line in zip(logits.tolist(), sampled, histories, strict=True)])
    torch.testing.assert_close(edit(logits, sampled, histories).clamp(min=FORBIDDEN), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits, before)


def test_penalties_repeat_exactly_when_the_same_edits_run_again(row: Callable[..., RowSampling]) -> None:
    table = torch.tensor([[1, 2, 2, 3, 3, 3, 0, 0]], dtype=torch.int32)
    edits = build_edits([EditedRow(0, 0, row(frequency_penalty=0.5, presence_penalty=1.0))], CPU)
    for last, expected in ((1, [0, 0, 0]), (3, [0, -2.0, 0]), (6, [0, -2.0, -2.5]), (3, [0, -2.0, 0])):
        assert apply_edits(edits, torch.zeros(1, 4), [last], table)[0, 1:].tolist() == expected


def test_an_edit_with_nothing_to_do_returns_the_logits_themselves(row: Callable[..., RowSampling]) -> None:
    logits = torch.randn(2, VOCAB_SIZE)
    sampled = [row(min_tokens=2, stop_token_ids=[3]), row(frequency_penalty=1.0, num_prompt=3)]
    assert edit(logits, sampled, [[1, 2, 3], [1, 2, 3]]) is logits
    assert edit(logits, sampled, [[1, 2], [1, 2, 3]]) is not logits


def test_a_row_without_options_needs_no_edits(row: Callable[..., RowSampling]) -> None:
    assert not edits_logits(row(temperature=0.5, top_k=3, logprobs=2, stop_token_ids=[1]))


@pytest.mark.parametrize(("history", "is_forbidden"), [([5, 6], True), ([6], False), ([1, 5, 6], True), ([5, 6, 1], False)])
def test_a_phrase_is_forbidden_only_where_the_text_ends_with_its_beginning(
    row: Callable[..., RowSampling], history: list[int], is_forbidden: bool
) -> None:
    edited = edit(torch.zeros(1, VOCAB_SIZE), [row(bad_words=[[5, 6, 7], [9]])], [history])[0]
    assert edited[9] == FORBIDDEN
    assert (edited[7] == FORBIDDEN) == is_forbidden
    assert edited[:7].tolist() == [0] * 7


def test_two_phrases_with_the_same_end_do_not_undo_each_other(row: Callable[..., RowSampling]) -> None:
    words = [[1, 7], [2, 7], [3, 7], [7, 7]]
    for last in range(1, 6):
        edited = edit(torch.zeros(1, VOCAB_SIZE), [row(bad_words=words)], [[0, last]])[0]
        assert (edited[7] == FORBIDDEN) == (last in (1, 2, 3))


def test_bf16_logits_are_edited_in_float32(row: Callable[..., RowSampling]) -> None:
    logits = torch.full((1, VOCAB_SIZE), 8.0, dtype=torch.bfloat16)
    edited = edit(logits, [row(logit_bias={4: 0.01})], [[0]])
    assert edited.dtype == torch.float32
    assert edited[0, 4].item() == pytest.approx(8.01)
