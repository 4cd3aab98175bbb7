"""`bench serve --client-processes N`: a workload sent by several processes, which start at one moment.

One process parses only so many events a second; beyond that the client would be what is measured. Each process gets its
requests, says that it is ready, and is then told when the repeat starts: `time.perf_counter` is one clock for all processes
of a machine. Messages are JSON. What a process does with its requests is `load.py`'s.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import msgspec

from nanovllm.bench.load import Part, Row, Target, ignore, send_part, send_workload
from nanovllm.child_process import child_command
from nanovllm.errors import NanoVllmError
from nanovllm.workloads import Workload, deal as deal_out

LEAD_S = 0.2  # from when all are ready to the start
READY = b"ready\n"


async def send(
    target: Target, workload: Workload, repeat: int = 0, on_start: Callable[[float], None] = ignore
) -> tuple[list[Row], float]:
    """(a row per request in their order, seconds from the start to the last answer), sent by `target.client_processes`.

    `on_start` is told when the repeat starts, by `time.perf_counter`. Raises `NanoVllmError` when a process ends before its
    rows are there.
    """
    if target.client_processes == 1:
        return await send_workload(target, workload, repeat, on_start)
    clients: list[_Client] = []
    try:
        for part in deal(target, workload, repeat):
            clients.append(await _Client.open(part))
        await asyncio.gather(*(client.is_ready() for client in clients))
        start = time.perf_counter() + LEAD_S
        on_start(start)
        answers = await asyncio.gather(*(client.send(start) for client in clients))
    finally:
        for client in clients:
            await client.close()
    rows = sorted((row for part, _ in answers for row in part), key=lambda row: row.index)
    return rows, max(ended for _, ended in answers) - start


def deal(target: Target, workload: Workload, repeat: int = 0) -> list[Part]:
    """Round-robin; a request that waits for another goes where that one went. `max_concurrency` is dealt out too."""
    count = min(target.client_processes, sum(request.after is None for request in workload.requests))
    return [
        Part(_share(target, number, count), repeat, workload.temperature, requests, indices)
        for number, (indices, requests) in enumerate(deal_out(workload.requests, count))
    ]


def _share(target: Target, number: int, count: int) -> Target:
    """10 in flight by 4 processes: 2, 2, 3, 3."""
    limit = target.max_concurrency
    return replace(target, client_processes=1, max_concurrency=None if limit is None else (limit + number) // count)


class _Client:
    """This side of a process that runs `main`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("a process without pipes")
        self._process, self._stdin, self._stdout = process, process.stdin, process.stdout

    @classmethod
    async def open(cls, part: Part) -> _Client:
        pipe = asyncio.subprocess.PIPE
        client = cls(await asyncio.create_subprocess_exec(*child_command(__name__), stdin=pipe, stdout=pipe))
        client._stdin.write(msgspec.json.encode(part) + b"\n")
        return client

    async def is_ready(self) -> None:
        if await self._stdout.readline() != READY:
            raise await self._failure()

    async def send(self, start: float) -> tuple[list[Row], float]:
        """(its rows, when the last answer had come)."""
        self._stdin.write(b"%r\n" % start)
        answer = await self._stdout.read()
        if not answer:
            raise await self._failure()
        await self._process.wait()  # or `close` might kill one that has ended, which asyncio warns of
        return msgspec.json.decode(answer, type=tuple[list[Row], float])

    async def _failure(self) -> NanoVllmError:
        return NanoVllmError(f"a client process ended with status {await self._process.wait()}; its reason is above")

    async def close(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()


def main() -> int:
    """A client process: a part from standard input, then the start; rows to standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    part = msgspec.json.decode(sys.stdin.buffer.readline(), type=Part)
    bodies, endpoint = part.bodies(), part.target.endpoint()
    endpoint.settle()
    sys.stdout.buffer.write(READY)
    sys.stdout.buffer.flush()
    start = float(sys.stdin.buffer.readline())
    rows = asyncio.run(send_part(part, bodies, endpoint, start))
    sys.stdout.buffer.write(msgspec.json.encode((rows, time.perf_counter())))
    return 0
