"""The whole engine over a real toy model: whatever the schedule, the tokens are those of one sequence alone."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from models.toys import Toy, make_toy, shapes_of, toy_spec
from support import assert_nothing_is_held, drain

from nanovllm.config import EngineConfig
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.llm import build_engine
from nanovllm.loaders.checkpoint import open_checkpoint
from nanovllm.loaders.weight_source import RandomWeights, WeightSource
from nanovllm.model_spec import ModelSpec
from nanovllm.models.registry import read_model_spec
from nanovllm.outputs import GenerationOutput
from nanovllm.platforms.cpu import CpuPlatform
from nanovllm.sampling_params import SamplingParams

MAX_TOKENS = 20
LONGEST_PROMPT = 33
BASE = torch.randint(0, 97, (30,), generator=torch.Generator().manual_seed(4)).tolist()
PROMPTS = [
    BASE[:1],
    BASE[:4],
    BASE[:17],
    [*BASE, 1, 2, 3],
    [*BASE[:16], 9],
    [*BASE[:8], *BASE[:8]],
    [7, 7, 7, 7, 7],
    [*BASE[:24], 50, 60, 70, 80],
]


@cache
def toy() -> Toy:
    return make_toy("qwen3")


@cache
def toy_source() -> tuple[ModelSpec, WeightSource]:
    checkpoint = open_checkpoint(toy().folder)
    return read_model_spec(checkpoint.config, checkpoint.name), checkpoint.weights


@cache
def naive(prompt: tuple[int, ...]) -> list[int]:
    """Transformers, one sequence, no cache. Ties would make the comparison a matter of luck: there are none."""
    tokens = list(prompt)
    for _ in range(MAX_TOKENS):
        best, second = toy().logits(tokens)[-1].topk(2).values.tolist()
        assert best - second > 1e-3, "choose other prompts"
        tokens.append(int(toy().logits(tokens)[-1].argmax()))
    return tokens[len(prompt) :]


def until(tokens: list[int], eos: tuple[int, ...]) -> list[int]:
    ends = [place + 1 for place, token in enumerate(tokens) if token in eos]
    return tokens[: min(ends, default=len(tokens))]


def make_engine(eos: tuple[int, ...] = (), source: Any = None, **options: Any) -> LLMEngine:
    spec, weights = source or toy_source()
    options = {"dtype": "float32", "num_threads": 1, "num_kv_blocks": 200, "max_num_seqs": 8, "block_size": 4, **options}
    return build_engine(EngineConfig(**options), CpuPlatform(), spec, weights, eos_token_ids=eos).engine


def greedy(**options: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": MAX_TOKENS, **options})


def tokens_of(outputs: list[GenerationOutput]) -> list[list[int]]:
    return [output.token_ids for output in outputs]


class TestGreedyOutputIsThatOfOneSequenceAlone:
    @settings(max_examples=60, deadline=None)
    @given(
        chosen=st.lists(st.integers(0, len(PROMPTS) - 1), min_size=1, max_size=6),
        budget=st.sampled_from([1, 2, 5, 16, 40, 200]),
        block_size=st.sampled_from([1, 2, 4, 16]),
        spare_blocks=st.sampled_from([0, 1, 3, 12, 60]),
        max_num_seqs=st.integers(1, 5),
        num_steps_ahead=st.integers(0, 2),
        caching=st.booleans(),
        max_prompt_chunk=st.sampled_from([None, 3]),
        stops=st.booleans(),
    )
    def test_for_any_schedule(self, chosen, budget, block_size, spare_blocks, max_num_seqs, num_steps_ahead, caching, **more):
        eos = (naive(tuple(PROMPTS[2]))[4], naive(tuple(PROMPTS[6]))[9]) if more["stops"] else ()
        engine = make_engine(
            eos,
            max_num_batched_tokens=budget,
            block_size=block_size,
            num_kv_blocks=-(-(LONGEST_PROMPT + MAX_TOKENS) // block_size) + spare_blocks,
            max_num_seqs=max_num_seqs,
            num_steps_ahead=num_steps_ahead,
            enable_prefix_caching=caching,
            max_prompt_chunk=more["max_prompt_chunk"],
            watermark=0.0,
        )
        prompts = [PROMPTS[index] for index in chosen]
        outputs = engine.generate(prompts, greedy())
        assert tokens_of(outputs) == [until(naive(tuple(prompt)), eos) for prompt in prompts]
        drain(engine)
        assert_nothing_is_held(engine)

    @pytest.mark.parametrize("num_steps_ahead", [0, 1, 2])
    def test_when_small_caches_force_preemptions(self, num_steps_ahead):
        engine = make_engine(num_kv_blocks=24, watermark=0.0, num_steps_ahead=num_steps_ahead)
        outputs = engine.generate(PROMPTS, greedy())
        assert tokens_of(outputs) == [naive(tuple(prompt)) for prompt in PROMPTS]
        assert sum(output.metrics.num_preemptions for output in outputs) > 0

    def test_when_its_prefix_was_cached_by_another_request(self):
        engine = make_engine()
        engine.generate([PROMPTS[3]], greedy())
        (output,) = engine.generate([PROMPTS[7]], greedy())
        assert output.metrics.num_cached_tokens == 24
        assert output.token_ids == naive(tuple(PROMPTS[7]))

    def test_when_it_is_asked_again_and_only_the_last_prompt_token_is_computed(self):
        engine = make_engine()
        for _ in range(2):
            (output,) = engine.generate([PROMPTS[5]], greedy())
            assert output.token_ids == naive(tuple(PROMPTS[5]))
        assert output.metrics.num_cached_tokens > 0


class TestSeveralCompletions:
    def test_share_the_prompt_and_copy_the_block_that_they_write(self):
        engine = make_engine(num_steps_ahead=1)
        copies: list[int] = []
        copy_blocks = engine.executor.runner.backend.copy_blocks
        engine.executor.runner.backend.copy_blocks = lambda *args: copies.append(len(args[1])) or copy_blocks(*args)
        (output,) = engine.generate([PROMPTS[7]], greedy(n=3))
        assert [completion.token_ids for completion in output.completions] == [naive(tuple(PROMPTS[7]))] * 3
        assert copies, "27 of 28 prompt tokens are shared: the seventh block of 4 is written by all three"

    @pytest.mark.parametrize("caching", [True, False])
    def test_differ_by_seed_and_are_those_of_three_requests(self, caching):
        engine = make_engine(enable_prefix_caching=caching)
        params = SamplingParams(temperature=1, seed=40, n=3, max_tokens=MAX_TOKENS)
        (together,) = engine.generate([PROMPTS[7]], params)
        alone = [
            make_engine().generate([PROMPTS[7]], SamplingParams(temperature=1, seed=40 + index, max_tokens=MAX_TOKENS))[0]
            for index in range(3)
        ]
        assert [completion.token_ids for completion in together.completions] == tokens_of(alone)
        assert len({tuple(output.token_ids) for output in alone}) == 3


class TestSeeds:
    PARAMS = tuple(SamplingParams(temperature=1, seed=index, max_tokens=MAX_TOKENS) for index in range(len(PROMPTS)))

    @staticmethod
    @cache
    def source() -> tuple[ModelSpec, RandomWeights]:
        spec = toy_spec("Qwen3ForCausalLM", qk_norm=True)
        return spec, RandomWeights(shapes_of(spec), std=0.2)

    @classmethod
    @cache
    def alone(cls, index: int) -> list[int]:
        return make_engine(source=cls.source()).generate([PROMPTS[index]], cls.PARAMS[index])[0].token_ids

    @pytest.mark.parametrize("num_steps_ahead", [0, 2])
    @pytest.mark.parametrize("options", [{}, {"num_kv_blocks": 24, "watermark": 0.0}, {"max_num_batched_tokens": 6}])
    def test_give_the_same_tokens_alone_and_inside_any_batch(self, num_steps_ahead, options):
        engine = make_engine(source=self.source(), num_steps_ahead=num_steps_ahead, **options)
        order = [3, 0, 7, 5, 1, 6, 2, 4]
        outputs = engine.generate([PROMPTS[index] for index in order], [self.PARAMS[index] for index in order])
        assert tokens_of(outputs) == [self.alone(index) for index in order]

    def test_are_not_all_alike(self):
        engine = make_engine(source=self.source())
        outputs = engine.generate([PROMPTS[0]] * 4, list(self.PARAMS[:4]))
        assert len({tuple(output.token_ids) for output in outputs}) == 4

    def test_neighbours_without_a_seed_or_with_other_options_change_nothing(self):
        engine = make_engine(source=self.source())
        others = [SamplingParams(temperature=1.5, top_k=5), SamplingParams(temperature=0), SamplingParams(top_p=0.5, logprobs=3)]
        outputs = engine.generate([PROMPTS[1], *PROMPTS[2:5]], [self.PARAMS[1], *others])
        assert outputs[0].token_ids == self.alone(1)


class TestLogprobs:
    @pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 5}, {"num_kv_blocks": 16, "watermark": 0.0}])
    def test_of_prompt_and_output_are_those_of_transformers(self, options):
        engine = make_engine(num_steps_ahead=1, **options)
        prompts = [PROMPTS[3], PROMPTS[7], PROMPTS[2]]
        outputs = engine.generate(prompts, greedy(prompt_logprobs=2, logprobs=0))
        for prompt, output in zip(prompts, outputs, strict=True):
            tokens = [*prompt, *output.token_ids]
            expected = toy().logits(tokens).log_softmax(-1)
            assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == len(prompt)
            scores = [*output.prompt_logprobs[1:], *output.completions[0].logprobs]
            assert [score.chosen.token_id for score in scores] == tokens[1:]
            wanted = [expected[place, token].item() for place, token in enumerate(tokens[1:])]
            assert [score.chosen.logprob for score in scores] == pytest.approx(wanted, abs=1e-4)

    def test_of_a_prompt_are_complete_although_its_prefix_is_cached(self):
        engine = make_engine()
        engine.generate([PROMPTS[3]], greedy())
        (output,) = engine.generate([PROMPTS[3]], greedy(prompt_logprobs=0))
        assert all(score is not None for score in output.prompt_logprobs[1:]) and len(output.prompt_logprobs) == 33


def test_the_bfloat16_path_runs_and_mostly_agrees():
    engine = make_engine(dtype="bfloat16")
    outputs = engine.generate(PROMPTS, greedy(max_tokens=1))
    agreeing = sum(output.token_ids == naive(tuple(prompt))[:1] for prompt, output in zip(PROMPTS, outputs, strict=True))
    assert agreeing >= len(PROMPTS) - 1


@pytest.mark.parametrize("caching", [True, False])
def test_a_request_that_is_aborted_midway_leaves_its_neighbours_alone(caching):
    engine = make_engine(num_steps_ahead=2, enable_prefix_caching=caching, num_kv_blocks=40)
    ids = [engine.add_request(prompt, greedy()) for prompt in (PROMPTS[3], PROMPTS[7], PROMPTS[5])]
    outputs: dict[str, GenerationOutput] = {}
    for step in range(200):
        if step == 5:
            engine.abort(ids[1])
            ids.append(engine.add_request(PROMPTS[4], greedy()))
        outputs.update((output.request_id, output) for output in engine.step() if output.finished)
        if not engine.has_work:
            break
    for request_id, prompt in zip((ids[0], ids[2], ids[3]), (PROMPTS[3], PROMPTS[5], PROMPTS[4]), strict=True):
        assert outputs[request_id].token_ids == naive(tuple(prompt))
    assert_nothing_is_held(engine)
