"""What listeners cost per step, on the host: each alone and all together, against an engine that nobody listens to.

    python benchmarks/observe_cost.py [--record observe-cost] [--real-ms 5.0]

The load of `host_time.py`: the real engine and scheduler on an executor that answers at once, 32 sequences running.
Variants alternate (ABBA), so that a drift of the machine hits all alike. Times are processor times, because machines are
shared, and the least disturbed repeat counts. The share is of a real step: of --real-ms, or of the decode step of as many
sequences in the record of the CPU benchmark. Writers work in a thread of their own, and where cores are few that time is
the engine's too: so the time of all threads is reported beside that of the engine's.
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
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from support import CountingExecutor

from nanovllm import SamplingParams
from nanovllm.bench.record import write_record
from nanovllm.config import SchedulerLimits
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.scheduler import Scheduler
from nanovllm.observability.observer import observe
from nanovllm.observability.options import ObservabilityOptions
from nanovllm.recovery.keeper import Keeper

NUM_RUNNING = 32
RECORD = Path(__file__).parent / "records" / "2026-11-20-cpu-torch.json"


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

    def kept(engine: LLMEngine) -> Keeper:
        Path(folder, "journal").unlink(missing_ok=True)
        tokenizer: Any = None  # read only where a text ends at a stop string
        return Keeper(engine, f"{folder}/journal", tokenizer, {}, keep_s=3600.0)

    return {
        "off": observed(),
        **{name: observed(**{name: path}) for name, path in files.items()},
        "flight recorder and watchdog (default of serve)": observed(**safety),
        "all": observed(**files, **safety),
        "checkpoint": kept,
    }


def measure(listen: Listen, num_requests: int) -> dict[str, float]:
    """Milliseconds of processor time per step: mean of the engine's thread, and of all threads."""
    rng = random.Random(0)
    scheduler = Scheduler(BlockManager(20_000, 16), SchedulerLimits(NUM_RUNNING, 2048))
    engine = LLMEngine(scheduler, CountingExecutor(), vocab_size=50_000, max_model_len=8_192)
    times: list[float] = []
    with listen(engine):
        for _ in range(num_requests):
            prompt = [rng.randrange(50_000) for _ in range(rng.randint(20, 60))]
            engine.add_request(prompt, SamplingParams(temperature=0, max_tokens=rng.randint(40, 120), ignore_eos=True))
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
    """Milliseconds of a decode step of SmolLM2-135M on a CPU with `NUM_RUNNING` sequences, from the benchmark record."""
    tokens_per_second = json.loads(RECORD.read_text())["results"]["nanovllm"][f"decode_{NUM_RUNNING}"]["median"]
    return NUM_RUNNING / tokens_per_second * 1e3


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
    results: dict = {"real_step_ms": real_ms, "num_running": NUM_RUNNING}
    off = {key: min(run[key] for run in runs["off"]) for key in ("thread_ms", "processor_ms")}
    print(f"a real step of {NUM_RUNNING} sequences: {real_ms:.2f} ms; nobody listens: {off['thread_ms']:.4f} ms of host time")
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
