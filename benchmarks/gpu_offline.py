"""The offline lines of the performance table on one GPU, with random weights of a model's shape, as a record.

    python benchmarks/gpu_offline.py --model qwen3-0.6b --record gpu-qwen3-0.6b

Lines: nano-vllm's benchmark (256 requests, seed 0, prompts shifted between repeats so that the prefix cache cannot
help), time per token of one stream, time to first token of 512- and 8,192-token prompts, prompt tokens per second of
64 prompts of 2,048 tokens. Random weights, made here by name and seed: no checkpoint is needed, and random data is
slower than zeros, as real data is.
Floors: `gpu_floor.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from random import Random
from typing import Any

import torch

from nanovllm import SamplingParams
from nanovllm.bench.record import summary, write_record
from nanovllm.config import EngineConfig
from nanovllm.engine.batch import ScheduledBatch
from nanovllm.engine.events import StepCollected, StepDispatched
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.layers.weight_slot import WeightSlot
from nanovllm.llm import BuiltEngine, build_engine
from nanovllm.model_spec import ModelSpec, RopeSpec
from nanovllm.models.registry import find_family
from nanovllm.parallel.group import ParallelGroup
from nanovllm.platforms.base import select_platform
from nanovllm.runner.pending import PendingStep

ROPE = RopeSpec(1_000_000.0)
SHAPES = {
    "qwen3-0.6b": ModelSpec("Qwen3ForCausalLM", 151_936, 1024, 3072, 28, 16, 8, 128, 1e-6, ROPE, 40_960, True, qk_norm=True),
    "qwen3-8b": ModelSpec("Qwen3ForCausalLM", 151_936, 4096, 12_288, 36, 32, 8, 128, 1e-6, ROPE, 40_960, qk_norm=True),
}


class RandomOnGpu:
    """A weight source that makes tensors on the card: a hundred times faster than on the host."""

    def __init__(self, slots: dict[str, WeightSlot]) -> None:
        self._shapes = {name: slot.shape for name, slot in slots.items()}
        self._generator = torch.Generator("cuda").manual_seed(0)

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def load(self, name: str) -> torch.Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(self._shapes[name])
        return (torch.randn(self._shapes[name], generator=self._generator, device="cuda") * 0.02).bfloat16().cpu()


def build(model: str, **options: Any) -> BuiltEngine:
    """The engine of a shape with random weights, with the options of the comparison unless told otherwise."""
    spec = SHAPES[model]
    options = {"max_model_len": 16_384, "max_num_seqs": 256, "gpu_memory_utilization": 0.85, **options}
    config = EngineConfig(device="cuda", **options)
    source = RandomOnGpu(find_family(spec.architecture)(spec, ParallelGroup(), torch.bfloat16).weight_slots())
    return build_engine(config, select_platform("cuda"), spec, source)


def sampling(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=num_tokens)


def seconds(engine: LLMEngine, prompts: list[list[int]], params: list[SamplingParams]) -> float:
    start = time.perf_counter()
    engine.generate(prompts, params)
    return time.perf_counter() - start


Seconds = Callable[[LLMEngine, list[list[int]], list[SamplingParams]], float]


def measure(engine: LLMEngine, repeats: int, run: Seconds = seconds) -> dict[str, dict]:
    """`run`: the seconds that prompts with their params take; `gpu_floor.py` has another."""
    rng = Random(0)

    def prompt(length: int) -> list[int]:
        return [rng.randint(0, 10_000) for _ in range(length)]

    def repeat(one: Callable[[int], float]) -> dict:
        return summary([one(number) for number in range(repeats)])

    prompts = [prompt(rng.randint(100, 1024)) for _ in range(256)]
    params = [sampling(rng.randint(100, 1024)) for _ in range(256)]
    num_output = sum(one.max_tokens or 0 for one in params)
    shifted = [[[(token + 7 * number) % 10_000 for token in one] for one in prompts] for number in range(repeats)]
    run(engine, [prompt(300) for _ in range(64)], [sampling(32)] * 64)  # warm up
    results = {"benchmark_output_tok_s": repeat(lambda number: num_output / run(engine, shifted[number], params))}

    def time_per_token(_: int) -> float:
        short = statistics.median(run(engine, [prompt(128)], [sampling(33)]) for _ in range(3))
        return (run(engine, [prompt(128)], [sampling(545)]) - short) / 512 * 1e3

    results["one_stream_ms_per_token"] = repeat(time_per_token)
    for length in (512, 8192):
        results[f"ttft_{length}_ms"] = repeat(lambda _, n=length: run(engine, [prompt(n)], [sampling(1)]) * 1e3)
    many = [[prompt(2048) for _ in range(64)] for _ in range(repeats)]
    results["prompt_tok_s_64x2048"] = repeat(lambda number: 64 * 2048 / run(engine, many[number], [sampling(1)] * 64))
    return results


class HostTimes:
    """A listener: the host's share of every step, microseconds: to schedule, to dispatch, and to apply the result."""

    def __init__(self, engine: LLMEngine) -> None:
        self.by_size: dict[int, list[float]] = {}
        self._open: dict[int, tuple[int, float]] = {}
        self._engine, self._run = engine, engine.executor.runner.run
        engine.executor.runner.run = self._timed_run
        engine.events.listeners.append(self)

    def close(self) -> None:
        self._engine.executor.runner.run = self._run
        self._engine.events.listeners.remove(self)

    def on_event(self, event: Any) -> None:
        if isinstance(event, StepDispatched):
            self._open[event.step] = event.num_sequences, event.schedule_ns / 1e3
        elif isinstance(event, StepCollected):
            size, before_us = self._open.pop(event.step, (0, 0.0))
            self.by_size.setdefault(size, []).append(before_us + event.apply_ns / 1e3)

    def _timed_run(self, batch: ScheduledBatch, before: PendingStep | None = None) -> PendingStep:
        started = time.perf_counter_ns()
        pending = self._run(batch, before)
        size, schedule_us = self._open[batch.step]
        self._open[batch.step] = size, schedule_us + (time.perf_counter_ns() - started) / 1e3
        return pending


def watch_steps(engine: LLMEngine, size: int) -> dict[str, float]:
    """Decode `size` sequences: the host's time per step without a profiler, and the device's idle share with one."""
    rng = Random(1)
    for _ in range(size):
        engine.add_request([rng.randint(0, 10_000) for _ in range(rng.randint(100, 1024))], sampling(400))
    while engine.scheduler.waiting or any(s.num_generated_tokens < 2 for s in engine.scheduler.running):
        engine.step()
    times = HostTimes(engine)
    for _ in range(100):
        engine.step()
    times.close()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(40):
            engine.step()
        torch.cuda.synchronize()
    while engine.has_work:
        engine.step()
    spans = sorted(
        (e.start_ns(), e.start_ns() + e.duration_ns())
        for e in profile.profiler.kineto_results.events()
        if e.device_type().name == "CUDA"
    )  # type: ignore[union-attr]
    busy, reached, longest = 0, spans[0][0], 0
    for begin, end in spans:
        longest = max(longest, begin - reached)
        busy += max(0, end - max(begin, reached))
        reached = max(reached, end)
    return {
        "host_us_per_step": statistics.median(times.by_size[size]),
        "device_idle_share": 1 - busy / (reached - spans[0][0]),
        "longest_gap_us": longest / 1e3,
        "device_us_per_step": (reached - spans[0][0]) / 40e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SHAPES), default="qwen3-0.6b")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--record", metavar="NAME")
    arguments = parser.parse_args()
    start = time.perf_counter()
    built = build(arguments.model)
    startup_s = time.perf_counter() - start
    results = measure(built.engine, arguments.repeats)
    for name, result in results.items():
        print(f"{name:<26}{result['median']:>12,.2f}   {result['min']:,.2f} to {result['max']:,.2f}")
    steps = {str(size): watch_steps(built.engine, size) for size in (1, 256)}
    late_compiles = built.engine.executor.runner.late_compiles
    print(json.dumps({"steps": steps, "late_compiles": late_compiles, "startup": built.startup}))
    if arguments.record:
        facts = {"gpu": torch.cuda.get_device_name(), "model": arguments.model, "build_engine_s": startup_s}
        facts |= {"startup_s": built.startup, "steps": steps, "late_compiles": len(late_compiles)}
        facts |= {"memory_plan": dataclasses.asdict(built.memory_plan)}
        resolved = {name: getattr(built.config, name) for name in built.config.__dataclass_fields__}
        workload = {"seed": 0, "requests": 256, "lengths": [100, 1024]}
        print(write_record(arguments.record, **facts, config=resolved, workload=workload, results=results))
    print(json.dumps({name: result["median"] for name, result in results.items()}))


if __name__ == "__main__":
    main()
