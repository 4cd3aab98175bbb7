"""The compiled step through the real engine: the torch model's states, and the same tokens whatever the schedule."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings, strategies as st
from kernels.instruction_sets import HERE, WITH_TILES
from kernels.test_cpu_step import rounded, unpack
from models.toys import CPU, Driver, make_toy
from support import assert_nothing_is_held, drain
from torch import Tensor

from nanovllm.attention.base import AttentionSpec
from nanovllm.attention.compiled import CompiledAttention
from nanovllm.config import EngineConfig
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.errors import ConfigError
from nanovllm.kernels.cpu import build
from nanovllm.kernels.cpu.packing import Kind
from nanovllm.layers.embedding import OutputHead
from nanovllm.layers.linear import Linear
from nanovllm.llm import build_engine
from nanovllm.loaders.checkpoint import open_checkpoint
from nanovllm.loaders.load import load_weights
from nanovllm.loaders.weight_source import WeightSource
from nanovllm.model_spec import ModelSpec
from nanovllm.models.compiled_decoder import CompiledDecoder, natural_compute
from nanovllm.models.registry import find_family, read_model_spec
from nanovllm.parallel.group import ParallelGroup
from nanovllm.platforms.cpu import CpuPlatform
from nanovllm.sampling_params import SamplingParams

COMPUTES = ["bf16", "int8", "int4"]
TOYS: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 96, "attention_bias": True},  # heads of 16, biases everywhere
    "qwen2": {"hidden_size": 96, "num_key_value_heads": 6, "tie_word_embeddings": True},  # no grouping
    "qwen3": {"head_dim": 80, "num_key_value_heads": 1, "hidden_size": 50},  # all share one; sizes that need padding
}
PROMPTS = [torch.randint(0, 97, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (1, 3, 9, 17, 33, 70)]
LONG = 2100  # tokens, three segments of keys
TIES = 0.01  # relative error that activations rounded to another side may cause
pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="no C++ compiler")


@cache
def toy_source(family: str) -> tuple[ModelSpec, WeightSource]:
    checkpoint = open_checkpoint(make_toy(family, **TOYS[family]).folder)
    return read_model_spec(checkpoint.config, checkpoint.name), checkpoint.weights


class AsPacked:
    """The same checkpoint with every matrix as the compiled step holds it, for the torch model."""

    def __init__(self, source: WeightSource, model: CompiledDecoder) -> None:
        self.source, self.model = source, model
        self.names, self.shape = source.names, source.shape

    def load(self, name: str) -> Tensor:
        matrix = self.model._matrices.get(name.removesuffix(".weight"))
        return self.source.load(name) if matrix is None else unpack(matrix)


def compiled(
    family: str, compute: str, instruction_set: str, dtype: torch.dtype = torch.float32, threads: int = 1
) -> CompiledDecoder:
    spec, source = toy_source(family)
    library = build.load_step(instruction_set)
    assert library is not None
    model = CompiledDecoder(spec, compute, dtype, library, threads)
    load_weights(model, source)
    model.finish_loading(CPU, LONG)
    return model


def torch_twin(model: CompiledDecoder, family: str) -> Any:
    spec, source = toy_source(family)
    twin = find_family(spec.architecture)(spec, ParallelGroup(), torch.float32)
    load_weights(twin, AsPacked(source, model))  # type: ignore[arg-type]
    twin.finish_loading(CPU, LONG)
    kind = Kind.BFLOAT16 if model.compute == "bf16" else Kind.INT8_GROUP
    for module in twin.modules():
        if isinstance(module, Linear | OutputHead):
            module.register_forward_pre_hook(lambda module, inputs: (rounded(inputs[0], kind), *inputs[1:]))
    return twin


class CompiledDriver(Driver):
    """Drives the compiled model as `Driver` does a torch module."""

    def __init__(self, model: CompiledDecoder, **sizes: Any) -> None:
        self.hooks: list[Any] = []
        super().__init__(Hooked(model), **sizes)  # type: ignore[arg-type]
        spec = AttentionSpec(model.num_heads, model.num_kv_heads, model.spec.head_dim, self.runner.block_size)
        self.runner.backend = CompiledAttention(spec)


class Hooked:
    def __init__(self, model: CompiledDecoder) -> None:
        self.model = model
        self.hooks: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def register_forward_pre_hook(self, hook: Any) -> None:
        self.before = hook

    def register_forward_hook(self, hook: Any) -> None:
        self.after = hook

    def __call__(self, *inputs: Any) -> Tensor:
        self.before(self, inputs)
        out = self.model(*inputs)
        self.after(self, inputs, out)
        return out


def drive(driver: Driver) -> list[Tensor]:
    """Prompts of several lengths in scattered blocks, a chunk on top of others, then prompts and decoding rows mixed."""
    driver.seat(0, PROMPTS[4], [9, 3, 5, 20, 21, 22, 23, 24, 25])
    driver.seat(1, PROMPTS[2], [7, 1, 2])
    first = driver.step((0, 0, 20), (1, 0, 8))
    driver.seat(2, PROMPTS[1], [6])
    return [*first, *driver.step((1, 8, 1), (0, 20, 13), (2, 0, 3))]


@pytest.mark.parametrize("instruction_set", HERE)
@pytest.mark.parametrize("family", TOYS)
class TestLogitsAreThoseOfTheTorchModel:
    @pytest.mark.parametrize("compute", COMPUTES)
    def test_with_the_same_weights(self, family, instruction_set, compute):
        """The twin rounds activations as the step does; near a tie they may still fall to different sides."""
        model = compiled(family, compute, instruction_set)
        for ours, theirs in zip(drive(CompiledDriver(model)), drive(Driver(torch_twin(model, family))), strict=True):
            assert (ours - theirs).norm() / theirs.norm() < TIES

    def test_with_a_bfloat16_cache(self, family, instruction_set):
        model = compiled(family, "bf16", instruction_set, torch.bfloat16)
        for ours, theirs in zip(drive(CompiledDriver(model)), drive(Driver(torch_twin(model, family))), strict=True):
            assert (ours - theirs).norm() / theirs.norm() < 0.02


@pytest.mark.parametrize("instruction_set", HERE[:-1])
@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("family", TOYS)
def test_instruction_sets_agree_with_the_portable_one(family, compute, instruction_set):
    """Sums have another order, so an activation may be rounded to the other side of a tie: not every last bit."""
    ours, theirs = (torch.cat(drive(CompiledDriver(compiled(family, compute, name)))) for name in (instruction_set, HERE[-1]))
    assert (ours - theirs).norm() / theirs.norm() < TIES


@pytest.mark.parametrize("instruction_set", sorted({HERE[0], WITH_TILES}))
@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("family", TOYS)
def test_states_are_the_same_bits_for_any_chunks_neighbours_and_threads(family, compute, instruction_set):
    token_ids = PROMPTS[5]

    def states(*lengths: int, threads: int = 1, neighbour: bool = False) -> Tensor:
        driver = CompiledDriver(compiled(family, compute, instruction_set, threads=threads))
        driver.seat(0, token_ids, [5, 4, 3, 2, 1, 0, *range(20, 33)])
        if neighbour:
            driver.seat(1, PROMPTS[3], [40, 41, 42, 43, 44])
        start, parts = 0, []
        for length in lengths:
            more = [(1, 0, 17)] if neighbour else []
            parts.append(driver.step(*more, (0, start, length))[-1])
            start += length
        return torch.cat(parts)

    whole = states(70)
    assert torch.equal(whole, states(1, 3, 29, 37, threads=3))
    assert torch.equal(whole, states(64, 5, 1, neighbour=True))


class TestALongRow:
    """Its keys are seen in segments, which threads share when it decodes."""

    token_ids = torch.randint(0, 97, (LONG,), generator=torch.Generator().manual_seed(1)).tolist()
    sizes: ClassVar = {"block_size": 16, "num_blocks": 160, "max_model_len": LONG}

    def logits(self, driver: Driver, *lengths: int, neighbour: bool = False) -> Tensor:
        driver.seat(0, self.token_ids, range(5, 5 + -(-LONG // 16)))
        if neighbour:
            driver.seat(1, PROMPTS[3], [150, 149])
        start, parts = 0, []
        for length in lengths:
            parts.append(driver.step(*([(1, 0, 17)] if neighbour else []), (0, start, length))[-1])
            start += length
        return torch.cat(parts)

    @pytest.mark.parametrize("family", TOYS)
    def test_is_the_same_bits_alone_shared_and_in_a_chunk(self, family):
        whole = self.logits(CompiledDriver(compiled(family, "bf16", HERE[0]), **self.sizes), LONG)
        lengths = [1019, *[1] * 12, 1012, *[1] * 12, LONG - 2055]
        for threads, neighbour in ((1, True), (3, False)):
            driver = CompiledDriver(compiled(family, "bf16", HERE[0], threads=threads), **self.sizes)
            assert torch.equal(whole, self.logits(driver, *lengths, neighbour=neighbour))

    def test_attends_as_the_torch_model_does(self):
        model = compiled("qwen2", "bf16", HERE[0])
        ours = self.logits(CompiledDriver(model, **self.sizes), LONG - 1, 1)
        theirs = self.logits(Driver(torch_twin(model, "qwen2"), **self.sizes), LONG)
        assert (ours - theirs).norm() / theirs.norm() < TIES


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("instruction_set", HERE)
@pytest.mark.parametrize("family", TOYS)
def test_states_are_the_same_bits_for_any_block_size(family, instruction_set, dtype):
    """Blocks of 16 or 32 are read a register at a time, others value by value."""

    def states(block_size: int) -> Tensor:
        driver = CompiledDriver(compiled(family, "int4", instruction_set, dtype), block_size=block_size)
        driver.seat(0, PROMPTS[5], [5, 4, 3, 2, 1, 0, *range(20, 33)])
        driver.seat(1, PROMPTS[4], [19, 18, 17, 15, 16, 14, 13, 12, 11])
        first = driver.step((0, 0, 45), (1, 0, 17))
        return torch.cat([*first, *driver.step((1, 17, 1), (0, 45, 25))])

    assert torch.equal(states(4), states(16))
    assert torch.equal(states(4), states(32))


def make_engine(family: str = "qwen3", **options: Any) -> LLMEngine:
    defaults = {
        "dtype": "float32",
        "num_threads": 1,
        "num_kv_blocks": 200,
        "max_num_seqs": 8,
        "block_size": 4,
        "cpu_compute": "int8",
    }
    return build_engine(EngineConfig(**{**defaults, **options}), CpuPlatform(), *toy_source(family)).engine


def generate(engine: LLMEngine, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    params = SamplingParams(**{"temperature": 0, "max_tokens": 16, "ignore_eos": True, **options})
    outputs = engine.generate(prompts, params)
    drain(engine)
    assert_nothing_is_held(engine)
    return [output.token_ids for output in outputs]


@cache
def alone(family: str, compute: str, dtype: str, prompt: tuple[int, ...]) -> list[int]:
    return generate(make_engine(family, cpu_compute=compute, dtype=dtype), [list(prompt)])[0]


@settings(max_examples=40, deadline=None)
@given(
    family=st.sampled_from(list(TOYS)),
    compute=st.sampled_from(COMPUTES),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    chosen=st.lists(st.integers(0, len(PROMPTS) - 1), min_size=1, max_size=6),
    budget=st.sampled_from([1, 2, 5, 16, 40, 200]),
    block_size=st.sampled_from([1, 4, 16]),
    spare_blocks=st.sampled_from([0, 1, 3, 12, 60]),
    caching=st.booleans(),
    steps_ahead=st.integers(0, 1),
    threads=st.sampled_from([1, 2]),
)
def test_tokens_are_those_of_one_sequence_alone_for_any_schedule(
    family, compute, dtype, chosen, budget, block_size, spare_blocks, caching, steps_ahead, threads
):
    before = torch.get_num_threads()
    engine = make_engine(
        family,
        cpu_compute=compute,
        dtype=dtype,
        max_num_batched_tokens=budget,
        block_size=block_size,
        num_kv_blocks=-(-(70 + 16) // block_size) + spare_blocks,
        enable_prefix_caching=caching,
        num_steps_ahead=steps_ahead,
        num_threads=threads,
    )
    outputs = generate(engine, [PROMPTS[i] for i in chosen])
    torch.set_num_threads(before)
    assert outputs == [alone(family, compute, dtype, tuple(PROMPTS[i])) for i in chosen]


class TestEverythingElseOfTheEngine:
    @pytest.mark.parametrize("family", TOYS)
    def test_prompt_logprobs_are_nearly_those_of_the_torch_path(self, family):
        scores = []
        for compute in ("torch", "bf16"):
            engine = make_engine(family, cpu_compute=compute, max_num_batched_tokens=7)
            (output,) = engine.generate([PROMPTS[4]], SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=0))
            assert output.prompt_logprobs is not None
            scores.append([position.chosen.logprob for position in output.prompt_logprobs if position is not None])
        assert len(scores[0]) == 32
        torch.testing.assert_close(torch.tensor(scores[1]), torch.tensor(scores[0]), atol=0.15, rtol=0.05)

    def test_sampling_with_a_seed_repeats(self):
        twice = [generate(make_engine(), PROMPTS, temperature=0.8, seed=5, top_p=0.9) for _ in range(2)]
        assert twice[0] == twice[1]

    @pytest.mark.parametrize("options", [{"temperature": 1.5}, {"temperature": 1.0, "top_p": 0.8, "min_p": 0.01}])
    def test_draws_the_tokens_that_the_torch_sampler_draws(self, options):
        drawn = []
        for is_native in (True, False):
            engine = make_engine()
            assert engine.executor.runner.sampler.race is not None
            if not is_native:
                engine.executor.runner.sampler.race = None
            drawn.append(generate(engine, PROMPTS, seed=5, **options))
        assert drawn[0] == drawn[1]
        assert drawn[0] != generate(make_engine(), PROMPTS)

    def test_completions_of_one_prompt_share_its_cache(self):
        engine = make_engine()
        (output,) = engine.generate([PROMPTS[3]], SamplingParams(temperature=0, max_tokens=8, n=3, ignore_eos=True))
        alone_ids = alone("qwen3", "int8", "float32", tuple(PROMPTS[3]))[:8]
        assert [completion.token_ids for completion in output.completions] == [alone_ids] * 3

    @pytest.mark.parametrize("pooling", ["mean", "last"])
    def test_embeddings_are_nearly_those_of_the_torch_path(self, pooling):
        vectors = []
        for compute in ("torch", "bf16"):
            outputs = make_engine(cpu_compute=compute, max_num_batched_tokens=11).generate(PROMPTS[2:], pooling=pooling)
            vectors.append(torch.tensor([output.embedding for output in outputs]))
        assert (vectors[0] - vectors[1]).norm() / vectors[0].norm() < 0.03


class TestTheChoice:
    @staticmethod
    def resolved(spec: ModelSpec, source: WeightSource, **options: Any) -> str:
        config = EngineConfig(num_threads=1, num_kv_blocks=40, block_size=4, **options)
        return build_engine(config, CpuPlatform(), spec, source).config.cpu_compute

    @pytest.mark.parametrize(
        "options, chosen",
        [
            ({}, "bf16"),  # the toy is stored in float32
            ({"dtype": "bfloat16"}, "bf16"),
            ({"dtype": "float32"}, "torch"),
            ({"dtype": "float32", "cpu_compute": "int4"}, "int4"),
            ({"cpu_compute": "torch"}, "torch"),
        ],
    )
    def test_by_options(self, options, chosen):
        assert self.resolved(*toy_source("qwen3"), **options) == (chosen if HERE[0] != "portable" else "torch")

    def test_is_torch_by_itself_where_only_the_portable_code_runs(self, monkeypatch):
        monkeypatch.setenv("NANOVLLM_CPU_ISA", "portable")
        assert self.resolved(*toy_source("qwen3")) == "torch"
        assert self.resolved(*toy_source("qwen3"), cpu_compute="bf16") == "bf16"

    def test_is_torch_by_itself_for_a_head_size_that_the_step_cannot_run(self):
        checkpoint = open_checkpoint(make_toy("qwen3").folder)
        assert self.resolved(read_model_spec(checkpoint.config, checkpoint.name), checkpoint.weights) == "torch"

    @pytest.mark.parametrize(
        "types, chosen",
        [
            (["Q4_0"], "int4"),
            (["Q4_0", "Q4_1", "Q8_0"], "int4"),
            (["Q8_0"], "int8"),
            (["Q4_K", "Q6_K"], "int8"),
            (["Q4_0", "Q6_K"], "int8"),
            (["F16"], "bf16"),
        ],
    )
    def test_by_what_the_file_stores(self, types, chosen):
        stored = {f"model.layers.{i}.mlp.up_proj.weight": ((64, 64), name) for i, name in enumerate(types)}
        around = {"model.embed_tokens.weight": ((97, 64), "Q6_K"), "model.norm.weight": ((64,), "F32")}
        assert natural_compute({**around, **stored}) == chosen

    @pytest.mark.parametrize("compute", COMPUTES)
    @pytest.mark.parametrize("family", TOYS)
    def test_the_plan_counts_the_bytes_that_are_loaded(self, family, compute):
        spec, source = toy_source(family)
        config = EngineConfig(cpu_compute=compute, num_threads=1, num_kv_blocks=40, block_size=4)
        built = build_engine(config, CpuPlatform(), spec, source)
        assert built.memory_plan.weights == compiled(family, compute, HERE[0]).num_bytes

    def test_of_an_unknown_form_is_refused(self):
        with pytest.raises(ConfigError, match="int8"):
            EngineConfig(cpu_compute="int9")

    def test_is_refused_for_a_head_size_that_it_cannot_run(self):
        checkpoint = open_checkpoint(make_toy("qwen3").folder)
        spec = read_model_spec(checkpoint.config, checkpoint.name)
        with pytest.raises(ConfigError, match=r"head size is 20.*cpu_compute='torch'"):
            build_engine(EngineConfig(cpu_compute="int8", num_kv_blocks=40), CpuPlatform(), spec, checkpoint.weights)

    def test_falls_back_to_torch_without_a_compiler(self, monkeypatch):
        monkeypatch.setenv("CXX", "no-such-compiler")
        spec, source = toy_source("qwen3")
        config = EngineConfig(cpu_compute="int8", num_threads=1, num_kv_blocks=40, block_size=4)
        assert build_engine(config, CpuPlatform(), spec, source).config.cpu_compute == "torch"


SANITIZED = """
import sys, ctypes, torch
sys.path.insert(0, sys.argv[1])
from nanovllm.kernels.cpu import compiler
compiler.COMMON_FLAGS = (*compiler.COMMON_FLAGS, "-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
from kernels import test_cpu_draw as drawing, test_cpu_step as products
from runner import test_compiled_step as steps
for name in products.HERE:
    for pack in products.PACKERS:
        for shape in ((17, 33), (100, 48)):
            for num_rows in (9, 70):
                products.multiply(pack(products.random(*shape)), products.random(num_rows, shape[1]), name, num_threads=3)
    for vocab_size in (5, 97):
        for way in drawing.WAYS:
            drawing.draws_the_same(name, vocab_size, [drawing.SamplingParams(**way)] * 9, share=0.3, num_threads=3)
    for family in steps.TOYS:
        for compute in steps.COMPUTES:
            steps.drive(steps.CompiledDriver(steps.compiled(family, compute, name, torch.bfloat16, threads=2)))
print("clean")
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_sanitizer_complains():
    """Addresses and undefined behaviour, over all formats, families and instruction sets of this processor."""
    compiler = build.find_compiler()
    assert compiler is not None
    runtime = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip("this compiler has no address sanitizer to load into Python")
    program = [sys.executable, "-c", SANITIZED, str(Path(__file__).parents[1])]
    environment = {**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert done.stdout.strip().endswith("clean"), done.stderr[-3000:]
