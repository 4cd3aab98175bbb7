"""Host time per engine step, without a model: scheduling, block tables, applying, outputs.

    python benchmarks/host_time.py [--record host-time]

10,000 requests through the real engine and scheduler, with an executor that answers at once. Reported for steps in
which 1, and 256, sequences were running; one step ahead, no listeners, no text.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from support import CountingExecutor

from nanovllm import SamplingParams
from nanovllm.bench.record import summary, write_record
from nanovllm.config import SchedulerLimits
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.scheduler import Scheduler


def measure(num_running: int, num_requests: int) -> dict[str, float]:
    """Milliseconds per step over all steps with `num_running` sequences: median, mean and 99th percentile."""
    rng = random.Random(0)
    scheduler = Scheduler(BlockManager(20_000, 16), SchedulerLimits(num_running, 2048))
    engine = LLMEngine(scheduler, CountingExecutor(), vocab_size=50_000, max_model_len=8_192)
    for _ in range(num_requests):
        prompt = [rng.randrange(50_000) for _ in range(rng.randint(20, 60))]
        engine.add_request(prompt, SamplingParams(temperature=0, max_tokens=rng.randint(40, 120), ignore_eos=True))
    gc.freeze()
    times = []
    while engine.has_work:
        is_full = len(scheduler.running) >= num_running - num_running // 32
        start = time.perf_counter()
        engine.step()
        if is_full:
            times.append((time.perf_counter() - start) * 1e3)
    times.sort()
    return {
        "steps": len(times),
        "median_ms": times[len(times) // 2],
        "mean_ms": sum(times) / len(times),
        "p99_ms": times[int(0.99 * len(times))],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", metavar="NAME")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    results = {}
    for num_running, num_requests in ((1, 200), (256, 10_000)):
        runs = [measure(num_running, num_requests) for _ in range(arguments.repeats)]
        results[str(num_running)] = {"runs": runs, "median_ms": summary([run["median_ms"] for run in runs])}
        print(f"{num_running:4d} running: median {results[str(num_running)]['median_ms']['median']:.4f} ms per step", runs[-1])
    if arguments.record:
        print(write_record(arguments.record, unit="milliseconds of host time per step", results=results))


if __name__ == "__main__":
    main()
