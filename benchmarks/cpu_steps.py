"""Whole engines by instruction set of the compiled step, by turns: tokens a second of a prompt of 512, and of decoding.

    python benchmarks/cpu_steps.py --record cpu-steps
    taskset -c 0,1 python benchmarks/cpu_steps.py --sets amx avx512-bf16 --weights int8 bf16 --turns 5

Random weights in the sizes of SmolLM2-135M, so no checkpoint is needed; as many threads as the process has cores. B sequences
of 32 random prompt tokens decode greedily; B divided by the median time of a step counts. Both sets' engines stay loaded.
`cpu_products.py` measures the products alone, `cpu_compare.py` other engines beside this one.
"""

from __future__ import annotations

import argparse
import os
import statistics
from functools import cache
from random import Random

import torch
from cpu_compare import step_times

from nanovllm.bench.record import summary, write_record
from nanovllm.config import EngineConfig
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.kernels.cpu.build import available_instruction_sets
from nanovllm.llm import build_engine
from nanovllm.loaders.weight_source import RandomWeights
from nanovllm.model_spec import ModelSpec, RopeSpec
from nanovllm.models.registry import find_family
from nanovllm.parallel.group import ParallelGroup
from nanovllm.platforms.cpu import CpuPlatform

SPEC = ModelSpec("LlamaForCausalLM", 49152, 576, 1536, 30, 9, 3, 64, 1e-5, RopeSpec(1e5), 8192, tie_word_embeddings=True)
BATCHES = (1, 8, 32)
NUM_PROMPT, NUM_LONG_PROMPT, NUM_NEW = 32, 512, 12


class KeptWeights(RandomWeights):
    """Made once, for all engines."""

    load = cache(RandomWeights.load)


def load_engine(instruction_set: str, compute: str, weights: RandomWeights) -> LLMEngine:
    os.environ["NANOVLLM_CPU_ISA"] = instruction_set
    num_threads = len(os.sched_getaffinity(0))
    options = {"enable_prefix_caching": False, "num_kv_blocks": 300, "block_size": 16, "dtype": "bfloat16"}
    config = EngineConfig(cpu_compute=compute, num_threads=num_threads, **options)
    return build_engine(config, CpuPlatform(), SPEC, weights).engine


def turn(engine: LLMEngine) -> dict[str, float]:
    """Tokens a second."""
    speeds = {"prefill_512": NUM_LONG_PROMPT / sum(step_times(engine, Random(0), 1, NUM_LONG_PROMPT, 1))}
    for batch in BATCHES:
        times = step_times(engine, Random(0), batch, NUM_PROMPT, NUM_NEW + 1)[-NUM_NEW:]
        speeds[f"decode_{batch}"] = batch / statistics.median(times)
    return speeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sets = available_instruction_sets()
    parser.add_argument("--sets", nargs="+", choices=sets, default=[name for name in sets if name != "portable"] or sets)
    parser.add_argument("--weights", nargs="+", choices=["bf16", "int8", "int4"], default=["bf16", "int8", "int4"])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--record", metavar="NAME")
    arguments = parser.parse_args()
    slots = find_family(SPEC.architecture)(SPEC, ParallelGroup(), torch.float32).weight_slots()
    weights = KeptWeights({name: slot.shape for name, slot in slots.items()})
    names = ["prefill_512", *(f"decode_{batch}" for batch in BATCHES)]
    print("tokens/s".ljust(18), *(f"{name:>12}" for name in names), flush=True)
    results: dict[str, dict[str, object]] = {}
    for compute in arguments.weights:
        engines = {name: load_engine(name, compute, weights) for name in arguments.sets}
        for engine in engines.values():
            step_times(engine, Random(0), 1, NUM_PROMPT, 2)
        turns = [{name: turn(engine) for name, engine in engines.items()} for _ in range(arguments.turns)]
        for name in engines:
            results[f"{compute} {name}"] = {measured: summary([one[name][measured] for one in turns]) for measured in names}
            medians = [statistics.median(one[name][measured] for one in turns) for measured in names]
            print(f"{compute:5}{name:13}", *(f"{value:12.0f}" for value in medians), flush=True)
    if arguments.record:
        workload = {"model": "SmolLM2-135M's sizes", "num_prompt": NUM_PROMPT, "num_new": NUM_NEW, "seed": 0}
        workload["num_threads"] = len(os.sched_getaffinity(0))
        print(write_record(arguments.record, unit="tokens a second", workload=workload, results=results))


if __name__ == "__main__":
    main()
