"""Hours of odd requests in minutes: random lengths, options, aborts and preemptions, and what must not change meanwhile.

    python benchmarks/gpu_soak.py --minutes 20 --record gpu-soak

The KV cache is small, so that sequences are preempted all the time. Every two minutes the engine is drained: every block
must be free, the block manager's invariants must hold, and a fixed seeded request must give the tokens that it gave at
the start. Memory of the device and of the process, and kernels compiled late, are in the record. A step that takes
longer than 30 s is a hang, and ends the run.
"""

from __future__ import annotations

import argparse
import faulthandler
import random
import resource
import time
from pathlib import Path

import torch
from gpu_offline import build

from nanovllm import SamplingParams
from nanovllm.bench.record import write_record
from nanovllm.engine.llm_engine import LLMEngine

PROBE = [7, 11, 13] * 40
PROBE_PARAMS = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)


def random_params(rng: random.Random) -> SamplingParams:
    kind = rng.random()
    common = {"max_tokens": rng.randint(1, 300), "ignore_eos": True, "n": 2 if rng.random() < 0.05 else 1}
    if kind < 0.5:
        return SamplingParams(temperature=0.7, **common)
    if kind < 0.6:
        return SamplingParams(temperature=0.0, **common)
    if kind < 0.75:
        return SamplingParams(temperature=1.0, top_p=rng.uniform(0.1, 0.99), min_p=rng.choice([0.0, 0.05]), **common)
    if kind < 0.85:
        return SamplingParams(temperature=1.0, top_k=rng.choice([1, 20, 500]), top_p=0.9, **common)
    if kind < 0.95:
        return SamplingParams(temperature=0.8, repetition_penalty=1.2, presence_penalty=0.5, logprobs=3, **common)
    return SamplingParams(temperature=0.8, prompt_logprobs=1, **common)


def probe(engine: LLMEngine) -> list[int]:
    return engine.generate([PROBE], PROBE_PARAMS, cache_salt=str(time.time()))[0].token_ids


def churn(engine: LLMEngine, rng: random.Random, seconds: float, counts: dict[str, int]) -> None:
    """Keep 100 to 300 requests alive for so long, then let them finish."""
    live: set[str] = set()
    end = time.monotonic() + seconds
    while live or time.monotonic() < end:
        while len(live) < rng.randint(100, 300) and time.monotonic() < end:
            length = rng.choice([1, 5, 64, rng.randint(1, 300), rng.randint(1, 4000)])
            prompt = [rng.randrange(100) for _ in range(length)] if rng.random() < 0.8 else list(range(length % 700 + 1))
            live.add(engine.add_request(prompt, random_params(rng)))
            counts["requests"] += 1
        if live and rng.random() < 0.05:
            victim = rng.choice(sorted(live))
            if engine.abort(victim) is not None:
                counts["aborts"] += 1
            live.discard(victim)
        faulthandler.dump_traceback_later(30, exit=True)
        for output in engine.step():
            if output.finished:
                counts["tokens"] += output.metrics.num_generated_tokens
                counts["preemptions"] += output.metrics.num_preemptions
                live.discard(output.request_id)
        faulthandler.cancel_dump_traceback_later()
        counts["steps"] += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--model", default="qwen3-0.6b")
    parser.add_argument("--record", metavar="NAME")
    arguments = parser.parse_args()
    engine = build(arguments.model, num_kv_blocks=700, gpu_memory_utilization=None, max_model_len=8192).engine
    runner, blocks = engine.executor.runner, engine.scheduler.block_manager
    rng, counts = random.Random(0), dict.fromkeys(("requests", "tokens", "steps", "aborts", "preemptions"), 0)
    expected, rounds = probe(engine), []
    start = time.monotonic()
    while (elapsed := time.monotonic() - start) < arguments.minutes * 60:
        churn(engine, rng, min(120.0, arguments.minutes * 60 - elapsed), counts)
        blocks.check_invariants([])
        facts = {
            "minute": round((time.monotonic() - start) / 60, 1),
            "free_blocks": blocks.num_free_blocks,
            "device_mb": torch.cuda.memory_allocated() >> 20,
            "device_reserved_mb": torch.cuda.memory_reserved() >> 20,
            "process_mb": int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20,
            "late_compiles": len(runner.late_compiles),
            "same_tokens": probe(engine) == expected,
            **counts,
        }
        rounds.append(facts)
        print(facts, flush=True)
        if facts["free_blocks"] != blocks.num_blocks or not facts["same_tokens"]:
            raise SystemExit("the soak failed")
    if arguments.record:
        print(write_record(arguments.record, gpu=torch.cuda.get_device_name(), model=arguments.model, rounds=rounds))


if __name__ == "__main__":
    main()
