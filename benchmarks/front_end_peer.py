"""What a streamed token costs in the front ends of two servers, on one tiny model: CPU time of the HTTP process per token.

    python benchmarks/front_end_peer.py --record front-end-peer \
        --server nanovllm 'PYTHON -m nanovllm serve --model MODEL --port PORT --no-access-log' 'nanovllm serve' \
        --server vllm 'VENV/bin/vllm serve MODEL --port PORT' 'vllm serve'

A server is a name, its command (MODEL and PORT are filled in, PYTHON is this interpreter), and a pattern of the command
line of its HTTP process. The model has one layer, random weights and SmolLM2's tokenizer, so that the engine costs
little; the same streamed completions go to both, one server after the other, in turns. The rate depends on how the
processes share the cores; the CPU time of the HTTP process is what one of its tokens costs.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from front_end import TESTS, cpu_seconds, stream

from nanovllm.bench.record import summary, write_record

PORT = 8477


def tree_of(root: int) -> dict[int, str]:
    """Command lines of a process and all below it, by id."""
    lines = subprocess.run(
        ["ps", "-eww", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    rows = [(int(pid), int(parent), command) for pid, parent, command in (line.split(None, 2) for line in lines)]
    found = {pid: command for pid, _, command in rows if pid == root}
    while more := {pid: command for pid, parent, command in rows if parent in found and pid not in found}:
        found |= more
    return found


def wait_until_ready(process: subprocess.Popen, seconds: float = 240.0) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise SystemExit(f"the server ended with {process.returncode}")
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=2)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise SystemExit("the server was not ready in time")


async def load(model: str, streams: int, tokens: int) -> tuple[float, int]:
    body = {
        "model": model,
        "prompt": "Once upon a time",
        "max_tokens": tokens,
        "stream": True,
        "ignore_eos": True,
        "temperature": 0,
    }
    started = time.perf_counter()
    results = await asyncio.gather(*(stream(PORT, body) for _ in range(streams)))
    if any(status != 200 for status, _ in results):
        raise SystemExit(f"statuses {sorted({status for status, _ in results})}")
    return time.perf_counter() - started, sum(events for _, events in results)


def measure(command: str, pattern: str, model: str, arguments: argparse.Namespace) -> dict[str, Any]:
    words = [word.replace("MODEL", model).replace("PORT", str(PORT)) for word in shlex.split(command)]
    words = [sys.executable if word == "PYTHON" else word for word in words]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        wait_until_ready(process)
        pids = [pid for pid, text in tree_of(process.pid).items() if re.search(pattern, text)]
        if len(pids) != 1:
            raise SystemExit(f"{pattern!r} should name one process, it names {len(pids)}")
        asyncio.run(load(model, arguments.streams, 20))  # warm
        values: dict[str, list[float]] = {"tokens_per_second": [], "front_end_cpu_us_per_token": [], "events_per_token": []}
        num_tokens = arguments.streams * arguments.tokens
        for _ in range(arguments.repeats):
            before = cpu_seconds(pids)
            seconds, num_events = asyncio.run(load(model, arguments.streams, arguments.tokens))
            values["tokens_per_second"].append(num_tokens / seconds)
            values["front_end_cpu_us_per_token"].append((cpu_seconds(pids) - before) / num_tokens * 1e6)
            values["events_per_token"].append(num_events / num_tokens)
        return {name: summary(numbers) for name, numbers in values.items()}
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", nargs=3, action="append", required=True, metavar=("NAME", "COMMAND", "PATTERN"))
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=100, help="per stream")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--record", metavar="NAME")
    arguments = parser.parse_args()
    sys.path.insert(0, str(TESTS))
    from live_server import write_tiny_model

    results = {}
    with tempfile.TemporaryDirectory() as folder:
        model = str(write_tiny_model(Path(folder) / "tiny"))
        for name, command, pattern in arguments.server:
            results[name] = measure(command, pattern, model, arguments)
            print(name, {key: round(value["median"], 2) for key, value in results[name].items()}, flush=True)
    if arguments.record:
        settings = {"streams": arguments.streams, "tokens": arguments.tokens, "servers": arguments.server}
        print(write_record(arguments.record, settings=settings, **results))


if __name__ == "__main__":
    main()
