"""Time of one decoding step on one GPU by batch size and context, as a record: graph replays, and the floor beside them.

    python benchmarks/gpu_steps.py --model qwen3-0.6b --record gpu-steps-qwen3-0.6b

A step is a replay of its CUDA graph, sampler included, with random weights and a random cache; the host is not in it.
Floor: each weight and each key and value read once at the measured bandwidth of the card.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import torch
from gpu_offline import SHAPES, build

from nanovllm.bench.record import write_record
from nanovllm.engine.batch import ScheduledBatch
from nanovllm.engine.model_runner import ModelRunner

READ_BANDWIDTH = 4.51e12  # bytes per second, a Triton loop over 4 GB on one H200 (shared figure of the machine)


@torch.inference_mode()
def step_us(runner: ModelRunner, size: int, context: int, repeats: int = 20) -> float:
    """Median microseconds of a decoding step of `size` sequences, each with `context` tokens before it."""
    graphs, block_size = runner.graphs, runner.block_size
    assert graphs is not None, "this needs CUDA graphs"
    rng = np.random.default_rng(0)
    num_blocks = runner.kv_caches[0].shape[1]
    tables = torch.from_numpy(rng.permutation(num_blocks)[: size * (context // block_size + 1)].astype(np.int32))
    width = context // block_size + 1
    runner.state.block_tables[:size, :width] = tables.view(size, width).cuda()
    batch = ScheduledBatch(0, list(range(size)), [context] * size, [1] * size, list(range(size)))
    bucket = graphs._find(batch)
    assert bucket is not None
    host, parts = graphs._empty(bucket)
    graphs._fill(parts, batch)
    parts["inverse_temperature"][:size] = np.full(size, 1 / 0.6, np.float32).view(np.int32)
    graphs._buffers[bucket].copy_(torch.from_numpy(host))
    graph = graphs._graphs[bucket][0]
    times = []
    for number in range(repeats + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(4):
            graph.replay()
        end.record()
        end.synchronize()
        if number >= 3:
            times.append(begin.elapsed_time(end) / 4 * 1e3)
    return float(np.median(times))


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SHAPES), default="qwen3-0.6b")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 820])
    parser.add_argument("--record", metavar="NAME")
    arguments = parser.parse_args()
    spec = SHAPES[arguments.model]
    built = build(arguments.model)
    runner = built.engine.executor.runner
    for cache in runner.kv_caches:
        cache.normal_()
    weights = (spec.num_parameters - (0 if spec.tie_word_embeddings else spec.vocab_size * spec.hidden_size)) * 2
    rows = []
    print(f"{'batch':>6}{'context':>9}{'us':>10}{'floor us':>10}{'share':>8}")
    for context in arguments.contexts:
        for size in arguments.sizes:
            time_us = step_us(runner, size, context)
            floor_us = (weights + size * context * spec.kv_bytes_per_token(2)) / READ_BANDWIDTH * 1e6
            rows.append({"batch": size, "context": context, "us": round(time_us, 1), "floor_us": round(floor_us, 1)})
            print(f"{size:>6}{context:>9}{time_us:>10.1f}{floor_us:>10.1f}{floor_us / time_us:>8.0%}", flush=True)
    if arguments.record:
        print(write_record(arguments.record, gpu=torch.cuda.get_device_name(), model=arguments.model, steps=rows))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
