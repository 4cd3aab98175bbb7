"""What listeners cost per step, on the host: each alone and all together, against an engine that nobody listens to.

    python benchmarks/observe_cost.py [--record observe-cost] [--real-ms 5.0]

The load of `host_time.py`: the real engine and scheduler on an executor that answers at once, 32 sequences running.
Variants alternate (ABBA), so that a drift of the machine hits all alike. Times are processor times, because machines are
shared, and the least disturbed repeat counts. The share is of a real step: of --real-ms, or of the shortest decode step of
as many sequences in the record of the CPU benchmark. Writers work in a thread of their own, and where cores are few that
time is the engine's too: so the time of all threads is reported beside that of the engine's.

What it costs that somebody *could* listen is far below the noise of two runs. So it is not a difference: the tests of the
empty list are counted in a whole run, and one is timed alone, a million at a time.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from support import CountingExecutor

from nanovllm import SamplingParams
from nanovllm.bench.record import write_record
from nanovllm.config import SchedulerLimits
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.engine_process import Counters
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.roofline import Peak, WorkCounter
from nanovllm.engine.scheduler import Scheduler
from nanovllm.observability.observer import observe
from nanovllm.observability.options import ObservabilityOptions
from nanovllm.recovery.keeper import Keeper
from nanovllm.simulation.shapes import SHAPES

NUM_RUNNING = 32
RECORD = Path(__file__).parent / "records" / "2026-11-29-cpu-compiled.json"
NUM_TIMED = 1_000_000

RECEIVER = """
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Taker(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
    def log_message(self, *arguments):
        pass
server = ThreadingHTTPServer(("127.0.0.1", 0), Taker)
print(server.server_port, flush=True)
server.serve_forever()
"""


Listen = Callable[[LLMEngine], AbstractContextManager]


def variants(folder: str, port: int) -> dict[str, Listen]:
    """`port`: of a process that takes OpenTelemetry spans and forgets them."""
    files = {
        "stage_log": f"{folder}/stages.jsonl",
        "lifecycle_file": f"{folder}/lifecycle.jsonl",
        "trace_file": f"{folder}/trace.json",
        "otlp_endpoint": f"http://127.0.0.1:{port}/v1/traces",
    }
    safety: dict = {"flight_recorder_steps": 1024, "flight_recorder_dir": folder, "watchdog_seconds": 60.0}

    def observed(**options: Any) -> Listen:
        return lambda engine: observe(engine, ObservabilityOptions(**options))

    def counted(engine: LLMEngine) -> AbstractContextManager:
        engine.events.listeners.append(Counters(WorkCounter(SHAPES["smollm2-135m"], 2, 2), Peak(35e9, 500e9, "by hand")))
        return nullcontext()

    def everything(engine: LLMEngine) -> AbstractContextManager:
        counted(engine)
        return observed(**files, **safety)(engine)

    def kept(engine: LLMEngine) -> Keeper:
        Path(folder, "journal").unlink(missing_ok=True)
        tokenizer: Any = None  # read only where a text ends at a stop string
        return Keeper(engine, f"{folder}/journal", tokenizer, {}, keep_s=3600.0)

    return {
        "off": observed(),
        "counts of /metrics (always in serve)": counted,
        **{name: observed(**{name: path}) for name, path in files.items()},
        "flight recorder and watchdog (default of serve)": observed(**safety),
        "all": everything,
        "checkpoint": kept,
    }


class CountingList(list):
    """Nobody listens; how often the engine asks."""

    num_asked = 0

    def __len__(self) -> int:
        self.num_asked += 1
        return super().__len__()


def measure_tests(num_requests: int, repeats: int) -> dict[str, float]:
    """Tests of the empty list per step, those of arriving and ending requests included, and nanoseconds of one."""
    engine = make_engine()
    engine.events.listeners = asked = CountingList()
    add_load(engine, num_requests)
    num_steps = 0
    while engine.has_work:
        engine.step()
        num_steps += 1
    engine.events.listeners = []
    names = {"engine": engine, "loop": range(NUM_TIMED)}
    test, nothing = (
        min(timeit.repeat(f"for _ in loop:\n    {body}", globals=names, number=1, repeat=repeats, timer=time.process_time))
        for body in ("if engine.events.listeners: raise", "pass")
    )
    per_step, one_ns = asked.num_asked / num_steps, (test - nothing) / NUM_TIMED * 1e9
    return {"tests_per_step": per_step, "test_ns": one_ns, "added_ms": per_step * one_ns * 1e-6}


def make_engine() -> LLMEngine:
    scheduler = Scheduler(BlockManager(20_000, 16), SchedulerLimits(NUM_RUNNING, 2048))
    return LLMEngine(scheduler, CountingExecutor(), vocab_size=50_000, max_model_len=8_192)


def add_load(engine: LLMEngine, num_requests: int) -> None:
    rng = random.Random(0)
    for _ in range(num_requests):
        prompt = [rng.randrange(50_000) for _ in range(rng.randint(20, 60))]
        engine.add_request(prompt, SamplingParams(temperature=0, max_tokens=rng.randint(40, 120), ignore_eos=True))


def measure(listen: Listen, num_requests: int) -> dict[str, float]:
    """Milliseconds of processor time per step: mean of the engine's thread, and of all threads."""
    engine = make_engine()
    times: list[float] = []
    with listen(engine):
        add_load(engine, num_requests)
        gc.collect()
        gc.freeze()
        begin = time.process_time()
        while engine.has_work:
            start = time.thread_time()  # of this thread alone: others on the machine do not count
            engine.step()
            times.append(time.thread_time() - start)
        # what the writers have not written yet is written when the observer closes, and counts
    processor = time.process_time() - begin
    return {"thread_ms": statistics.mean(times) * 1e3, "processor_ms": processor / len(times) * 1e3}


def recorded_real_ms() -> float:
    """Milliseconds of our shortest decode step with `NUM_RUNNING` sequences in the record of the CPU benchmark."""
    results = json.loads(RECORD.read_text())["results"]
    rates = [one[f"decode_{NUM_RUNNING}"]["median"] for name, one in results.items() if name.startswith("nanovllm")]
    return NUM_RUNNING / max(rates) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", metavar="NAME")
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--num-requests", type=int, default=1000)
    parser.add_argument("--real-ms", type=float, help="milliseconds of a real step; default: of the CPU benchmark's record")
    arguments = parser.parse_args()
    real_ms = arguments.real_ms or recorded_real_ms()
    runs: dict[str, list[dict[str, float]]] = {}
    receiver = subprocess.Popen([sys.executable, "-c", RECEIVER], stdout=subprocess.PIPE)
    port = int(receiver.stdout.readline()) if receiver.stdout is not None else 0
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(arguments.repeats):
            chosen = variants(folder, port)
            names = list(chosen)
            for name in names if repeat % 2 == 0 else reversed(names):
                runs.setdefault(name, []).append(measure(chosen[name], arguments.num_requests))
    receiver.kill()
    tests = measure_tests(arguments.num_requests, arguments.repeats)
    tests["share_of_real_step_percent"] = 100 * tests["added_ms"] / real_ms
    results: dict = {"real_step_ms": real_ms, "num_running": NUM_RUNNING, "nobody listens": tests}
    off = {key: min(run[key] for run in runs["off"]) for key in ("thread_ms", "processor_ms")}
    print(f"a real step of {NUM_RUNNING} sequences: {real_ms:.2f} ms; nobody listens: {off['thread_ms']:.4f} ms of host time")
    print(
        f"that somebody could listen: {tests['tests_per_step']:.1f} tests per step of {tests['test_ns']:.1f} ns: "
        f"{tests['added_ms'] * 1e3:.2f} us per step ({tests['share_of_real_step_percent']:.5f} %)"
    )
    for name, of_variant in runs.items():
        cost = {key: min(run[key] for run in of_variant) - off[key] for key in off}
        share = {key.replace("_ms", "_percent"): 100 * value / real_ms for key, value in cost.items()}
        results[name] = {"runs": of_variant, "added": cost, "share_of_real_step": share}
        step, total = share["thread_percent"], share["processor_percent"]
        print(f"{name:<50} {cost['thread_ms'] * 1e3:8.1f} us per step ({step:6.3f} %), all threads {total:6.3f} %")
    if arguments.record:
        print(write_record(arguments.record, unit="milliseconds per step", results=results))


if __name__ == "__main__":
    main()
