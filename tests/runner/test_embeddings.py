"""Vectors of prompts over a toy model: Transformers' final hidden states, whatever the schedule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from runner.test_engine_with_a_model import PROMPTS, greedy, make_engine, naive, toy
from support import assert_nothing_is_held, drain

from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.errors import CacheTooSmall, InvalidPrompt, InvalidSamplingParams, PromptTooLong, RequestError
from nanovllm.sampling_params import SamplingParams

TOLERANCE = {"rtol": 0.0, "atol": 1e-4}


@torch.no_grad()
def expected(prompt: list[int], pooling: str) -> torch.Tensor:
    """[hidden_size]; the backbone returns the states after the final norm."""
    states = toy().oracle.model(torch.tensor([prompt]), use_cache=False).last_hidden_state[0]
    return states.mean(0) if pooling == "mean" else states[-1]


def embed(engine: LLMEngine, prompts: list[list[int]], pooling: str, **options: Any) -> list[torch.Tensor]:
    return [torch.tensor(output.embedding) for output in engine.generate(prompts, pooling=pooling, **options)]


def assert_right(vectors: list[torch.Tensor], prompts: list[list[int]], pooling: str) -> None:
    for vector, prompt in zip(vectors, prompts, strict=True):
        torch.testing.assert_close(vector, expected(prompt, pooling), **TOLERANCE)


def test_the_toy_tells_the_ways_apart():
    assert (expected(PROMPTS[3], "mean") - expected(PROMPTS[3], "last")).abs().max() > 0.5
    assert (expected(PROMPTS[3], "mean") - expected(PROMPTS[4], "mean")).abs().max() > 0.1


@pytest.mark.parametrize("pooling", ["mean", "last"])
@settings(max_examples=15, deadline=None)
@given(
    chosen=st.lists(st.integers(0, len(PROMPTS) - 1), min_size=1, max_size=6),
    budget=st.sampled_from([1, 3, 16, 200]),
    spare_blocks=st.sampled_from([0, 3, 60]),
    max_num_seqs=st.integers(1, 5),
    num_steps_ahead=st.integers(0, 2),
    caching=st.booleans(),
)
def test_vectors_are_those_of_transformers(pooling, chosen, budget, spare_blocks, max_num_seqs, num_steps_ahead, caching):
    engine = make_engine(
        max_num_batched_tokens=budget,
        max_num_seqs=max_num_seqs,
        num_kv_blocks=9 + spare_blocks,
        num_steps_ahead=num_steps_ahead,
        enable_prefix_caching=caching,
    )
    prompts = [PROMPTS[index] for index in chosen]
    assert_right(embed(engine, prompts, pooling), prompts, pooling)
    assert_right(embed(engine, prompts, pooling), prompts, pooling)  # of prompts that are cached by now
    assert_nothing_is_held(engine)


@pytest.mark.parametrize("num_steps_ahead", [0, 1])
def test_vectors_and_texts_share_a_batch(num_steps_ahead):
    engine = make_engine(num_steps_ahead=num_steps_ahead, max_num_batched_tokens=20)
    text = engine.output_of(engine.add_request(PROMPTS[3], greedy()))
    mean = engine.output_of(engine.add_request(PROMPTS[3], pooling="mean"))
    last = engine.output_of(engine.add_request(PROMPTS[3], pooling="last"))
    drain(engine)
    assert text.token_ids == naive(tuple(PROMPTS[3])) and text.embedding is None
    assert_right([torch.tensor(mean.embedding)], [PROMPTS[3]], "mean")
    assert_right([torch.tensor(last.embedding)], [PROMPTS[3]], "last")


def test_preempted_prompts_begin_again_and_count_once():
    engine = make_engine(num_kv_blocks=14, max_num_batched_tokens=12, num_steps_ahead=1, watermark=0.0)
    texts = [engine.output_of(engine.add_request(PROMPTS[0], greedy())) for _ in range(2)]
    vector = engine.output_of(engine.add_request(PROMPTS[3], pooling="mean"))
    others = [engine.output_of(engine.add_request(PROMPTS[1], greedy())) for _ in range(2)]
    drain(engine)
    outputs = [*texts, vector, *others]
    assert sum(output.metrics.num_preemptions for output in outputs) > 0
    assert_right([torch.tensor(vector.embedding)], [PROMPTS[3]], "mean")
    assert [output.token_ids for output in texts] == [naive(tuple(PROMPTS[0]))] * 2


def test_last_may_start_from_a_cached_prefix_and_mean_may_not():
    engine = make_engine()
    embed(engine, [PROMPTS[3]], "last")
    last, mean = (engine.generate([PROMPTS[3]], pooling=pooling)[0] for pooling in ("last", "mean"))
    assert last.metrics.num_cached_tokens == 32 and mean.metrics.num_cached_tokens == 0
    assert_right([torch.tensor(last.embedding)], [PROMPTS[3]], "last")


def test_a_vector_comes_without_text():
    engine = make_engine()
    (output,) = engine.generate([PROMPTS[2]], pooling="mean")
    assert len(output.embedding) == 48 and all(type(value) is float for value in output.embedding)
    assert (output.token_ids, output.text, output.completions[0].finish_reason) == ([], "", "stop")
    assert output.finished and output.metrics.num_generated_tokens == 0 and output.metrics.num_prompt_tokens == 17


def test_an_abort_leaves_nothing_behind():
    engine = make_engine(max_num_batched_tokens=4)
    request_id = engine.add_request(PROMPTS[3], pooling="mean")
    engine.step()
    output = engine.abort(request_id)
    drain(engine)
    assert output.embedding is None and output.completions[0].finish_reason == "abort"
    assert_nothing_is_held(engine)
    assert_right(embed(engine, [PROMPTS[4]], "mean"), [PROMPTS[4]], "mean")


def test_what_is_wrong_is_refused_and_named():
    engine = make_engine(num_kv_blocks=10)
    with pytest.raises(RequestError, match="pooling must be one of mean, last, got 'max'"):
        engine.add_request([1], pooling="max")
    with pytest.raises(InvalidSamplingParams, match="takes no sampling params"):
        engine.add_request([1], SamplingParams(), pooling="mean")
    with pytest.raises(InvalidPrompt, match="no tokens"):
        engine.add_request([], pooling="mean")
    with pytest.raises((CacheTooSmall, PromptTooLong)):
        engine.add_request([1] * 40, pooling="mean")
    assert_nothing_is_held(engine)
