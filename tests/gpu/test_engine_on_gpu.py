"""The engine on a GPU gives the tokens of the torch twin, whatever is switched on or off."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch

from nanovllm.attention.torch_reference import TorchAttention
from nanovllm.config import EngineConfig
from nanovllm.llm import build_engine
from nanovllm.loaders.weight_source import RandomWeights
from nanovllm.model_spec import ModelSpec, RopeSpec
from nanovllm.models.registry import find_family
from nanovllm.parallel.group import ParallelGroup
from nanovllm.platforms.base import select_platform
from nanovllm.sampling_params import SamplingParams, StructuredOutput

pytestmark = pytest.mark.gpu
SPEC = ModelSpec("Qwen3ForCausalLM", 3001, 256, 640, 4, 8, 4, 64, 1e-6, RopeSpec(10_000.0), 2048, qk_norm=True)
LLAMA = dataclasses.replace(
    SPEC, architecture="LlamaForCausalLM", qk_norm=False, total_num_heads=6, total_num_kv_heads=2, head_dim=80
)
PROMPTS = [
    [random.Random(i).randrange(3000) for _ in range(n)] for i, n in enumerate((5, 100, 700, 33, 64, 1500, 17, 250, 1, 129))
]
GREEDY = [SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)] * len(PROMPTS)


def make(spec: ModelSpec = SPEC, **options):
    model = find_family(spec.architecture)(spec, ParallelGroup(), torch.float32)
    weights = RandomWeights({name: slot.shape for name, slot in model.weight_slots().items()}, std=0.08)
    options = {"dtype": "float32", "max_num_seqs": 16, "max_num_batched_tokens": 512, "num_kv_blocks": 200, **options}
    return build_engine(EngineConfig(device="cuda", **options), select_platform("cuda"), spec, weights).engine


def run(engine, prompts=PROMPTS, params=GREEDY) -> list[list[int]]:
    try:
        return [output.token_ids for output in engine.generate(prompts, params)]
    finally:
        engine.close()


@pytest.fixture(scope="module")
def twin_tokens():
    """The torch twin on the same device, eager and synchronous."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanovllm.llm.select_backend", lambda spec, dtype, device: TorchAttention(spec, dtype, device))
        for name in ("rms_norm", "activation", "one_token"):
            patch.setattr(f"nanovllm.kernels.{name}.use_kernel", lambda *_: False)
        return {
            "qwen3": run(make(enforce_eager=True, num_steps_ahead=0)),
            "llama": run(make(LLAMA, enforce_eager=True, num_steps_ahead=0)),
        }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"enforce_eager": True},
        {"num_steps_ahead": 0},
        {"max_num_batched_tokens": 64},
        {"max_prompt_chunk": 50},
        {"block_size": 16, "num_kv_blocks": 800},
        {"block_size": 128, "num_kv_blocks": 100},
        {"max_num_seqs": 3},
        {"num_kv_blocks": 48},  # preempts
        {"enable_prefix_caching": False},
    ],
    ids=str,
)
def test_greedy_tokens_equal_the_twin(twin_tokens, options):
    assert run(make(**options)) == twin_tokens["qwen3"]


def test_another_family_and_head_size_equal_the_twin(twin_tokens):
    assert run(make(LLAMA)) == twin_tokens["llama"]


def test_a_cached_prefix_gives_the_same_tokens(twin_tokens):
    engine = make()
    cold = [output.token_ids for output in engine.generate(PROMPTS, GREEDY)]
    hits = engine.generate(PROMPTS, GREEDY)
    assert [output.token_ids for output in hits] == cold == twin_tokens["qwen3"]
    assert hits[5].metrics.num_cached_tokens >= 1400
    engine.close()


def test_two_hundred_seeded_tokens_are_equal_alone_and_in_a_batch():
    params = [SamplingParams(temperature=0.9, seed=i, max_tokens=200, ignore_eos=True) for i in range(6)]
    together = run(make(), PROMPTS[:6], params)
    alone = [run(make(enable_prefix_caching=False), [PROMPTS[i]], [params[i]])[0] for i in (0, 3, 5)]
    assert alone == [together[0], together[3], together[5]]


def test_filters_penalties_and_logprobs_run_beside_plain_rows(twin_tokens):
    special = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, repetition_penalty=1.3, logprobs=3)
    filtered = SamplingParams(temperature=0.8, seed=1, top_k=20, top_p=0.9, max_tokens=30, ignore_eos=True)
    engine = make()
    outputs = engine.generate(PROMPTS[:4], [GREEDY[0], special, GREEDY[0], filtered])
    assert [outputs[0].token_ids, outputs[2].token_ids] == [twin_tokens["qwen3"][0], twin_tokens["qwen3"][2]]
    assert len(outputs[1].completions[0].logprobs) == 30
    alone = engine.generate([PROMPTS[1]], special)[0]
    assert alone.token_ids == outputs[1].token_ids
    engine.close()


def test_prompt_logprobs_are_the_twins():
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    fast, slow = make(), make(enforce_eager=True, max_num_batched_tokens=100)
    ours, theirs = (engine.generate([PROMPTS[7]], params)[0].prompt_logprobs[1:] for engine in (fast, slow))
    assert [p.chosen.token_id for p in ours] == PROMPTS[7][1:]
    assert all(abs(a.chosen.logprob - b.chosen.logprob) < 1e-3 for a, b in zip(ours, theirs))
    fast.close(), slow.close()


def test_n_completions_share_their_prompt():
    engine = make()
    output = engine.generate([PROMPTS[3]], SamplingParams(temperature=0, n=4, max_tokens=20, ignore_eos=True))[0]
    assert len({tuple(completion.token_ids) for completion in output.completions}) == 1
    engine.close()


@pytest.mark.parametrize("number", [11, 21, 31])  # with 11 and 31, parts of the largest step's inputs are aligned as in no other
def test_every_batch_size_up_to_the_limit_has_a_graph(number):
    engine = make(max_num_seqs=number)
    graphs = engine.executor.runner.graphs
    assert len(graphs._graphs) == len(graphs.decode_buckets) + len(graphs.mixed_buckets)
    outputs = engine.generate(
        [[i + 1] for i in range(number)],
        [SamplingParams(temperature=0, max_tokens=5 + i, ignore_eos=True) for i in range(number)],
    )
    assert [len(output.token_ids) for output in outputs] == [5 + i for i in range(number)]
    engine.close()


def test_bfloat16_runs_and_graphs_equal_eager():
    assert run(make(dtype="bfloat16")) == run(make(dtype="bfloat16", enforce_eager=True))


class EveryThird:
    """Allows the tokens whose number, plus that of the tokens so far, is a multiple of three."""

    error = None

    def __init__(self) -> None:
        self.num_tokens = 0

    def compile(self, structured, can_end_early=True):
        return EveryThird()

    def fill_mask(self, mask) -> None:
        bits = (np.arange(mask.size * 32) + self.num_tokens) % 3 == 0
        mask[:] = np.packbits(bits, bitorder="little").view(np.int32)

    def accept(self, token_id):
        assert (token_id + self.num_tokens) % 3 == 0
        self.num_tokens += 1


def test_grammars_in_a_captured_step_give_the_tokens_of_the_eager_one():
    ruled = SamplingParams(temperature=0, max_tokens=30, structured=StructuredOutput("json_object"))
    params = [ruled if i % 2 else GREEDY[i] for i in range(len(PROMPTS))]
    outputs = []
    for eager, steps_ahead in ((False, 1), (True, 1), (False, 0), (False, 2)):
        engine = make(enforce_eager=eager, num_steps_ahead=steps_ahead)
        engine._door._grammar = EveryThird()
        runner = engine.executor.runner
        outputs.append(run(engine, params=params))
        assert eager or runner.late_compiles == []
    assert outputs[0] == outputs[1] == outputs[2] == outputs[3]
    assert outputs[0][0] == run(make())[0], "a neighbour with a grammar changes nothing"
