"""The GPU's path without a GPU: `make interpret` runs Triton's kernels in its interpreter, slowly, on small shapes.

Attention, rotary and KV write, norms, SiLU, inputs, draws with and without grammars; steps are "replayed" as CUDA graphs
are. What stands in for a device: a graph is its function run again, and memory is not pinned. Tokens equal the torch twin's.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from nanovllm.attention.triton_paged import TritonAttention
from nanovllm.config import EngineConfig
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.progress import no_collections
from nanovllm.kernels.triton_language import HAS_TRITON
from nanovllm.llm import build_engine, make_kv_caches
from nanovllm.loaders.weight_source import RandomWeights
from nanovllm.model_spec import ModelSpec, RopeSpec
from nanovllm.models.registry import find_family
from nanovllm.parallel.group import ParallelGroup
from nanovllm.platforms.base import select_platform
from nanovllm.runner import cuda_graphs
from nanovllm.runner.cuda_graphs import AnyToken, Bucket, CudaGraphs, Replayed
from nanovllm.sampling_params import SamplingParams, StructuredOutput

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1" or not HAS_TRITON, reason="make interpret"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),  # hashes wrap
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # the interpreter's own
    pytest.mark.timeout(600),
]
SPEC = ModelSpec("Qwen3ForCausalLM", 101, 64, 128, 2, 4, 2, 64, 1e-6, RopeSpec(10_000.0), 512, qk_norm=True)
RULED = StructuredOutput("json_object")
PARAMS = [
    SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, structured=RULED),
    SamplingParams(temperature=0, max_tokens=6, ignore_eos=True),
    SamplingParams(temperature=0.8, seed=2, max_tokens=7, ignore_eos=True, structured=RULED),
    SamplingParams(temperature=0.8, seed=3, max_tokens=5, ignore_eos=True),
    SamplingParams(temperature=0.9, seed=4, top_p=0.8, max_tokens=4, ignore_eos=True, structured=RULED),
]
PROMPTS = [[3, 5, 7] * k for k in (1, 4, 14, 2, 20)]  # the last is longer than the budget of a step


class EveryThird:
    """Allows the tokens whose number, plus that of the tokens so far, is a multiple of three."""

    error: str | None = None

    def __init__(self) -> None:
        self.num_tokens = 0

    def compile(self, structured: StructuredOutput, can_end_early: bool = True) -> EveryThird:
        return EveryThird()

    def fill_mask(self, mask: np.ndarray) -> None:
        bits = (np.arange(mask.size * 32) + self.num_tokens) % 3 == 0
        mask[:] = np.packbits(bits, bitorder="little").view(np.int32)

    def accept(self, token_id: int) -> str | None:
        assert (token_id + self.num_tokens) % 3 == 0
        self.num_tokens += 1
        return None


class Staging:
    def __init__(self, num_words: int) -> None:
        self.words = np.zeros(num_words, np.int32)

    def place(self, num_words: int) -> np.ndarray:
        return self.words[:num_words]

    def send(self, target: torch.Tensor) -> None:
        target.copy_(torch.from_numpy(self.words[: len(target)]))


class Graph:
    def __init__(self, run: Callable[[], torch.Tensor], logits: torch.Tensor) -> None:
        self.run, self.logits, self.num_replays = run, logits, 0

    def replay(self) -> None:
        self.num_replays += 1
        self.logits.copy_(self.run())


def capture(self: CudaGraphs, bucket: Bucket) -> None:
    buffer = torch.from_numpy(self._empty(bucket).copy())
    tensors = self._views(bucket, buffer)
    forward_step, drawn = self.forward_step, self._drawn
    logits = forward_step(tensors, drawn)
    graph: Any = Graph(lambda: forward_step(tensors, drawn), logits)
    self._buffers[bucket] = buffer
    self._graphs[bucket] = graph, Replayed(logits, drawn, tensors, self.token_table, self._masks)


def warm_up(runner: Any, backend: TritonAttention, config: EngineConfig, plan: Any, platform: Any, spec: Any, dtype: Any, _: Any):
    sizes = {"max_num_seqs": config.max_num_seqs, "max_tokens": config.max_num_batched_tokens}
    sizes |= {"max_in_flight": (config.num_steps_ahead or 0) + 2, "vocab_size": spec.vocab_size}
    graphs = CudaGraphs(runner.forward_step, backend, runner.state, **sizes)
    runner.kv_caches = make_kv_caches(platform, backend, plan, spec, dtype)
    graphs._masks.begin({0: AnyToken()})
    graphs.run_padding(graphs.decode_buckets[0]).draw_under_masks()
    if not config.enforce_eager:
        graphs.capture_all()
        runner.graphs = graphs
    return plan


def make(**options: Any) -> LLMEngine:
    model = find_family(SPEC.architecture)(SPEC, ParallelGroup(), torch.float32)
    weights = RandomWeights({name: slot.shape for name, slot in model.weight_slots().items()}, std=0.2)
    options = {"max_num_seqs": 3, "max_num_batched_tokens": 32, "num_kv_blocks": 40, "block_size": 16, **options}
    config = EngineConfig(device="cpu", dtype="float32", num_threads=1, cpu_compute="torch", **options)
    engine = build_engine(config, select_platform("cpu"), SPEC, weights).engine
    engine._door._grammar = EveryThird()  # type: ignore[assignment]
    return engine


def tokens(engine: LLMEngine) -> list[list[int]]:
    return [output.token_ids for output in engine.generate(PROMPTS, PARAMS)]


@pytest.fixture(scope="module")
def twin() -> list[list[int]]:
    return tokens(make())


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanovllm.llm.select_backend", TritonAttention)
    monkeypatch.setattr("nanovllm.llm.warm_up_gpu", warm_up)
    for name in ("rms_norm", "activation"):
        monkeypatch.setattr(f"nanovllm.kernels.{name}.use_kernel", lambda *_: True)
        for signal in ("gdc_wait", "gdc_launch_dependents"):  # one kernel after another: nothing to wait for
            monkeypatch.setattr(f"nanovllm.kernels.{name}.{signal}", lambda: None)
    monkeypatch.setattr(cuda_graphs, "Staging", Staging)
    monkeypatch.setattr(CudaGraphs, "_capture", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)


def test_what_a_closed_engine_held_is_free_at_once(interpreted: None) -> None:
    engine = make(num_steps_ahead=1)
    tokens(engine)
    runner: Any = engine.executor.runner  # type: ignore[attr-defined]
    left = weakref.ref(runner), weakref.ref(runner.graphs), weakref.ref(runner.kv_caches[0])
    assert runner.graphs._graphs
    del runner
    with no_collections():
        engine.close()
        assert [one() for one in left] == [None, None, None]


@pytest.mark.parametrize("options", [{}, {"num_steps_ahead": 1}, {"num_steps_ahead": 2}, {"enforce_eager": True}], ids=str)
def test_the_gpus_steps_give_the_tokens_of_the_twin(twin: list[list[int]], interpreted: None, options: dict[str, Any]) -> None:
    engine = make(**options)
    assert tokens(engine) == twin
    graphs = engine.executor.runner.graphs  # type: ignore[attr-defined]
    num_replays = sum(graph.num_replays for graph, _ in graphs._graphs.values()) if graphs else 0
    assert bool(num_replays) is not options.get("enforce_eager", False)
