"""What a streamed token costs in the front end: 256 streams of /v1/completions from an engine that computes nothing.

    python benchmarks/front_end.py [--streams 256] [--tokens 200] [--front-ends 1] [--record front-end]

Three kinds of processes, as in reality: the engine (real scheduler, no model), one or more front ends, and this client,
which reads raw bytes. Two loads. *Saturated*: the engine is as fast as it can be; the front end falls behind, and puts the
tokens that have come meanwhile into one event. *Paced*: so many steps per second that the front end keeps up, and every
token is an event of its own. Where the processes share few cores the rate says how the cores were shared; the CPU time per
token is what the front end costs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanovllm.bench.record import summary, write_record
from nanovllm.config import EngineConfig

TESTS = Path(__file__).parent.parent / "tests"
PROGRAM = """
import sys
sys.path[:0] = {path!r}
from nanovllm.log import configure_logging
from nanovllm.server.options import ServerOptions
from nanovllm.server.serve import serve
configure_logging()
{prepare}
sys.exit(serve(ServerOptions(**{options!r}), {engine!r}))
"""
STEPS_PER_SECOND = "NANOVLLM_BENCH_STEPS_PER_SECOND"  # tells the engine process, which is made by `paced`
TICKS = os.sysconf("SC_CLK_TCK")


def paced(config: EngineConfig) -> Any:
    """The builder of the engine process: "front_end:paced"."""
    from served import serve
    from support import CountingExecutor

    class PacedExecutor(CountingExecutor):
        next_step = 0.0

        def collect(self) -> Any:
            now = time.monotonic()
            time.sleep(max(0.0, self.next_step - now))
            self.next_step = max(now, self.next_step) + 1 / float(os.environ[STEPS_PER_SECOND])
            return super().collect()

    return serve(config, PacedExecutor())


@contextlib.contextmanager
def running_server(
    options: dict[str, Any], engine: dict[str, Any], prepare: str = ""
) -> Iterator[tuple[int, dict[str, list[int]]]]:
    """(port, kind of process -> ids) of a server that is ready. `prepare`: a line of Python that it runs before."""
    path, options = [str(TESTS), str(Path(__file__).parent)], {"port": 0, "access_log": False, **options}
    program = PROGRAM.format(path=path, options=options, engine=engine, prepare=prepare)
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    if process.stderr is None:
        raise RuntimeError("no standard error")
    port = 0
    for line in process.stderr:
        if found := re.search(r" serving .* at http://[^:]*:(\d+) ", line):
            port = int(found[1])
            break
    if not port:
        raise SystemExit("the server did not start")
    try:
        yield port, processes_of(process.pid)
    finally:
        process.terminate()
        process.communicate()


def processes_of(server: int) -> dict[str, list[int]]:
    """The engine is the server's child; so are the front ends, or the server is the only one."""
    command = ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(server)]
    children = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    engine = [int(line.split()[0]) for line in children if "nanovllm.engine." in line]
    front_ends = [int(line.split()[0]) for line in children if "nanovllm.server.frontend" in line]
    return {"engine": engine, "front end": front_ends or [server]}


def cpu_seconds(pids: list[int]) -> float:
    """User and system time so far."""
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICKS


def thread_times(pid: int) -> tuple[float, float]:
    """Processor time of a process so far, seconds: (its main thread, its other threads)."""
    times = {path.name: int((path / "schedstat").read_text().split()[0]) / 1e9 for path in Path(f"/proc/{pid}/task").iterdir()}
    main = times.pop(str(pid))
    return main, sum(times.values())


def resident_mib(pids: list[int]) -> float:
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


async def stream(port: int, body: dict[str, Any]) -> tuple[int, int]:
    """(status, events) of one streamed request."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    status, num_events = 0, 0
    while part := await reader.read(2**16):
        status = status or int(part.split(b" ", 2)[1])
        num_events += part.count(b"data: ")
    writer.close()
    return status, num_events


async def stream_all(port: int, num_streams: int, num_tokens: int) -> tuple[float, int]:
    """(seconds, events) of so many streams at once."""
    body = {"model": "fake", "prompt": "w1 w2 w3 w4", "max_tokens": num_tokens, "stream": True, "ignore_eos": True}
    started = time.perf_counter()
    results = await asyncio.gather(*(stream(port, body) for _ in range(num_streams)))
    seconds = time.perf_counter() - started
    if any(status != 200 for status, _ in results):
        raise SystemExit(f"statuses {sorted({status for status, _ in results})}")
    return seconds, sum(events for _, events in results)


def measure(builder: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One server, measured several times."""
    engine = {"builder": builder, "max_num_seqs": arguments.streams, "num_kv_blocks": 65536}
    num_tokens = arguments.streams * arguments.tokens
    values: dict[str, list[float]] = {name: [] for name in ("tokens_per_second", "events_per_token")}
    with running_server({"num_frontends": arguments.front_ends}, engine) as (port, pids):
        asyncio.run(stream_all(port, arguments.streams, 20))  # warm
        for _ in range(arguments.repeats):
            before = {kind: cpu_seconds(ids) for kind, ids in pids.items()} | {"client": time.process_time()}
            seconds, num_events = asyncio.run(stream_all(port, arguments.streams, arguments.tokens))
            after = {kind: cpu_seconds(ids) for kind, ids in pids.items()} | {"client": time.process_time()}
            values["tokens_per_second"].append(num_tokens / seconds)
            values["events_per_token"].append(num_events / num_tokens)
            for kind in after:
                used = (after[kind] - before[kind]) / num_tokens * 1e6
                values.setdefault(f"{kind.replace(' ', '_')}_cpu_us_per_token", []).append(used)
        memory = {kind: round(resident_mib(ids), 1) for kind, ids in pids.items()}
    return {**{name: summary(numbers) for name, numbers in values.items()}, "resident_mib": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=200, help="per stream")
    parser.add_argument("--steps-per-second", type=float, default=10.0, help="of the paced load")
    parser.add_argument("--front-ends", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--record", help="write a record with this name")
    arguments = parser.parse_args()
    os.environ[STEPS_PER_SECOND] = str(arguments.steps_per_second)
    results = {"saturated": measure("served:counting", arguments), "paced": measure("front_end:paced", arguments)}
    for load, result in results.items():
        print(load, {name: round(value["median"], 2) for name, value in result.items() if "median" in value})
    if arguments.record:
        print(write_record(arguments.record, settings={**vars(arguments)}, **results))


if __name__ == "__main__":
    main()
