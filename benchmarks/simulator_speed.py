"""How long the simulator takes for 100,000 requests, and that equal options and seeds give equal bytes; as a record.

    python benchmarks/simulator_speed.py [--repeats 3] [--record simulator-speed]

Every repeat is a `nanovllm simulate --json` of its own, as a user starts it: imports, making the prompts, the run, the
report. Exit status 1 when two answers differ, or when the median takes a minute or longer.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time

from nanovllm.bench.record import summary, write_record

WORKLOAD = "poisson:rate=150,num_requests={},num_input=256,num_output=32"
BAR_S = 60.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--record", help="write a record with this name")
    arguments = parser.parse_args()
    options = ["--gpu", "h200", "--model", "qwen3-0.6b", "--workload", WORKLOAD.format(arguments.requests), "--json"]
    answers, seconds, cpu_seconds = [], [], []
    for _ in range(arguments.repeats):
        started, before = time.perf_counter(), os.times()
        ran = subprocess.run([sys.executable, "-m", "nanovllm", "simulate", *options], stdout=subprocess.PIPE, check=True)
        seconds.append(time.perf_counter() - started)
        after = os.times()
        cpu_seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
        answers.append(ran.stdout)
        print(f"{seconds[-1]:.1f} s, {cpu_seconds[-1]:.1f} s of processor time", flush=True)
    digests = sorted({hashlib.sha256(answer).hexdigest() for answer in answers})
    report = json.loads(answers[0])
    results = {"seconds": summary(seconds), "processor_seconds": summary(cpu_seconds), "answers": digests, "report": report}
    result = report["result"]
    print(f"{result['requests']:,} requests, {result['device']['steps']:,} steps, {len(digests)} distinct answer(s)")
    if arguments.record:
        print(write_record(arguments.record, command_simulated=["nanovllm", "simulate", *options], results=results))
    return 0 if len(digests) == 1 and results["seconds"]["median"] < BAR_S else 1


if __name__ == "__main__":
    sys.exit(main())
