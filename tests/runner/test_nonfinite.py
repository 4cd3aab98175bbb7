"""One token of the vocabulary is poisoned: its embedding is NaN or infinite. Who uses it ends with an error, alone."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from models.toys import make_toy
from support import assert_nothing_is_held, drain
from torch import Tensor

from nanovllm.config import EngineConfig
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.errors import NONFINITE_LOGITS
from nanovllm.kernels.cpu import build
from nanovllm.llm import build_engine
from nanovllm.loaders.checkpoint import open_checkpoint
from nanovllm.loaders.weight_source import WeightSource
from nanovllm.model_spec import ModelSpec
from nanovllm.models.registry import read_model_spec
from nanovllm.outputs import GenerationOutput
from nanovllm.platforms.cpu import CpuPlatform
from nanovllm.sampling_params import SamplingParams

POISON = 90
BASE = torch.randint(0, POISON, (30,), generator=torch.Generator().manual_seed(4)).tolist()
HEALTHY = [BASE[:4], BASE[:17], [7, 7, 7, 7, 7]]
POISONED = [[*BASE[:9], POISON], [POISON, *BASE[:9]], [POISON]]
WAYS: list[dict[str, Any]] = [{"temperature": 0}, {}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"logit_bias": {3: 2.0}}]
COMPUTES = ["torch", *(["bf16", "int8", "int4"] if build.find_compiler() else [])]


@cache
def toy_source() -> tuple[ModelSpec, WeightSource]:
    """Sizes that the compiled step can run, and that need padding there."""
    checkpoint = open_checkpoint(make_toy("qwen3", head_dim=80, num_key_value_heads=1, hidden_size=50).folder)
    return read_model_spec(checkpoint.config, checkpoint.name), checkpoint.weights


class Poisoned:
    def __init__(self, source: WeightSource, value: float) -> None:
        self.names, self.shape, self._source, self._value = source.names, source.shape, source, value

    def load(self, name: str) -> Tensor:
        tensor = self._source.load(name)
        if name.endswith("embed_tokens.weight"):
            tensor[POISON] = self._value
        return tensor


def make_engine(compute: str = "torch", value: float = float("nan"), **options: Any) -> LLMEngine:
    spec, source = toy_source()
    defaults = {"dtype": "float32", "num_threads": 1, "num_kv_blocks": 200, "max_num_seqs": 8, "block_size": 4}
    config = EngineConfig(**{**defaults, "cpu_compute": compute, **options})
    return build_engine(config, CpuPlatform(), spec, Poisoned(source, value)).engine


def run(engine: LLMEngine, prompts: list[list[int]], **options: Any) -> list[GenerationOutput]:
    params = SamplingParams(**{"max_tokens": 12, "seed": 5, "logit_bias": {POISON: -100.0}, **options})  # nobody draws it
    outputs = engine.generate(prompts, params)
    drain(engine)
    assert_nothing_is_held(engine)
    return outputs


def assert_failed(output: GenerationOutput) -> None:
    for completion in output.completions:
        assert (completion.finish_reason, completion.stop_reason) == ("error", NONFINITE_LOGITS)
        assert not completion.token_ids


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("compute", COMPUTES)
def test_who_shares_steps_with_a_poisoned_request_draws_the_same_tokens(compute, value):
    expected = [output.token_ids for output in run(make_engine(compute), HEALTHY)]
    mixed = [prompt for pair in zip(HEALTHY, POISONED) for prompt in pair]
    outputs = run(make_engine(compute, value), mixed)
    assert [output.token_ids for output in outputs[::2]] == expected
    for output in outputs[1::2]:
        assert_failed(output)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("num_steps_ahead", [0, 1])
def test_for_every_way_of_drawing(way, num_steps_ahead):
    engine = make_engine(num_steps_ahead=num_steps_ahead)
    healthy, failed = run(engine, [BASE[:4], POISONED[0]], **{"logit_bias": {}, **way}, allowed_token_ids=[1, 2, 3])
    assert len(healthy.token_ids) == 12
    assert_failed(failed)


@pytest.mark.parametrize("compute", COMPUTES)
def test_blocks_that_a_poisoned_request_has_left_do_not_reach_the_next(compute):
    expected = run(make_engine(compute), [BASE[:17]])[0].token_ids
    engine = make_engine(compute, num_kv_blocks=8)  # everybody gets the same ones
    for _ in range(3):
        assert_failed(run(engine, [[POISON] * 18])[0])
        assert run(engine, [BASE[:17]])[0].token_ids == expected


def test_several_completions_and_log_probabilities():
    engine = make_engine()
    healthy, failed = run(engine, [BASE[:4], POISONED[0]], n=3, logprobs=2, temperature=0.5)
    assert [len(completion.token_ids) for completion in healthy.completions] == [12] * 3
    assert [len(completion.logprobs or ()) for completion in healthy.completions] == [12] * 3
    assert_failed(failed)
    assert [completion.logprobs for completion in failed.completions] == [[], [], []]


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_vector_that_is_no_vector_is_an_error(pooling):
    healthy, failed = make_engine().generate([BASE[:4], POISONED[0]], pooling=pooling)
    assert torch.tensor(healthy.embedding).isfinite().all()
    assert_failed(failed)
