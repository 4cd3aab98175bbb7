"""The least that the offline lines of one GPU could take, and the share of it that a record reached. Needs no GPU.

    python benchmarks/gpu_floor.py benchmarks/records/2026-11-29-gpu-qwen3-0.6b.json ... [--record gpu-floor]

The workload of `gpu_offline.py` goes through the real engine and scheduler; a step takes the larger of its bytes over the
card's bandwidth and its operations over its matrix rate (`engine/roofline.py`), one after another, and the host nothing.
The rates were measured on the card: reading 4.51 TB/s with a loop over 4 GB, and 790 TFLOP/s for an 8,192 cubed product.
"""

from __future__ import annotations

import argparse
import json
from collections import deque
from pathlib import Path

from gpu_offline import SHAPES, measure

from nanovllm import SamplingParams
from nanovllm.bench.record import write_record
from nanovllm.config import SchedulerLimits
from nanovllm.engine.batch import ScheduledBatch, StepResult
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.roofline import Peak, WorkCounter
from nanovllm.engine.scheduler import Scheduler

BYTES_PER_VALUE = 2  # bfloat16


class RooflineExecutor:
    """Draws without looking, and adds up what the steps must take."""

    def __init__(self, counter: WorkCounter, peak: Peak) -> None:
        self.seconds = 0.0
        self._counter, self._peak = counter, peak
        self._results: deque[StepResult] = deque()

    def dispatch(self, batch: ScheduledBatch) -> None:
        self.seconds += self._peak.roof_s(self._counter.count(batch))
        self._results.append(StepResult(batch.step, [[7] for _ in batch.sampled_chunks]))

    def collect(self) -> StepResult:
        return self._results.popleft()

    def begin_draw(self) -> None:
        pass

    def close(self) -> None:
        self._results.clear()


def floors(model: str, peak: Peak) -> dict[str, float]:
    """Line of `gpu_offline.py`: its value at the roofline."""
    spec = SHAPES[model]
    executor = RooflineExecutor(WorkCounter(spec, BYTES_PER_VALUE, BYTES_PER_VALUE), peak)
    scheduler = Scheduler(BlockManager(17_000, 64, True), SchedulerLimits(256, 8192))
    engine = LLMEngine(scheduler, executor, vocab_size=spec.vocab_size, max_model_len=16_384, num_steps_ahead=0)

    def run(_: LLMEngine, prompts: list[list[int]], params: list[SamplingParams]) -> float:
        before = executor.seconds
        engine.generate(prompts, params)
        return executor.seconds - before

    return {name: result["median"] for name, result in measure(engine, 1, run).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", type=Path, help="records of gpu_offline.py")
    parser.add_argument("--bandwidth", type=float, default=4.51e12, help="bytes per second that can be read")
    parser.add_argument("--rate", type=float, default=790e12, help="operations per second of a large product")
    parser.add_argument("--record", metavar="NAME")
    arguments = parser.parse_args()
    peak = Peak(arguments.bandwidth, arguments.rate, "measured")
    tables = {}
    for path in arguments.records:
        record = json.loads(path.read_text())
        tables[path.name] = rows = {}
        print(f"{path.name}\n{'':<26}{'measured':>12}{'floor':>12}{'share':>8}{'spread':>8}")
        for name, floor in floors(record["model"], peak).items():
            result = record["results"][name]
            median = result["median"]
            share = median / floor if "tok_s" in name else floor / median
            spread = (result["max"] - result["min"]) / median
            rows[name] = {"median": median, "floor": floor, "share": round(share, 4), "spread": round(spread, 4)}
            print(f"{name:<26}{median:>12,.2f}{floor:>12,.2f}{share:>8.0%}{spread:>8.1%}")
    if arguments.record:
        print(write_record(arguments.record, bytes_per_s=peak.bytes_per_s, operations_per_s=peak.operations_per_s, lines=tables))


if __name__ == "__main__":
    main()
