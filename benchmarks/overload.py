"""Overload: more requests than a server can do, for some minutes. Who is accepted must not suffer, memory must not grow.

    python benchmarks/overload.py [--factor 3] [--seconds 120] [--model DIR] [--fake] [--record overload]

First the capacity is measured: as many requests as the engine takes at once, for a while, one after the other. Then
requests arrive at random moments (Poisson) at `factor` times that rate, without waiting for answers, as users do. The bound
for accepted requests is stated before the run: what the queue holds at the measured rate, plus the time of a request at
full load, and half as much again. Every refusal must be a 429 with Retry-After. RSS is read every second.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections import Counter
from typing import Any

from front_end import cpu_seconds, resident_mib, running_server

from nanovllm.bench.record import write_record

WARM_S = 5.0


async def request(port: int, num_tokens: int) -> dict[str, Any]:
    """One streamed completion: status, seconds to the first event and to the end."""
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    prompt = random.choices(range(10, 40), k=16)
    data = json.dumps(
        {"model": "overload", "prompt": prompt, "max_tokens": num_tokens, "stream": True, "ignore_eos": True}
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    answer, end, first = b"", b"", None
    while part := await reader.read(2**16):
        if first is None and b"data: " in part:
            first = time.perf_counter() - started
        answer, end = answer or part, (end + part)[-64:]
    writer.close()
    status = int(answer.split(b" ", 2)[1])
    is_whole = status != 200 or b"[DONE]" in end
    has_hint = b"retry-after: " in answer.lower()
    return {"status": status if is_whole else 0, "ttft": first, "seconds": time.perf_counter() - started, "has_hint": has_hint}


async def closed_loop(port: int, concurrency: int, seconds: float, num_tokens: int) -> tuple[float, float]:
    """(requests per second, their 99th percentile in seconds) when each answer is followed by the next request."""
    end = time.monotonic() + seconds
    results: list[dict[str, Any]] = []

    async def user() -> None:
        while time.monotonic() < end:
            results.append(await request(port, num_tokens))

    started = time.monotonic()
    await asyncio.gather(*(user() for _ in range(concurrency)))
    rate = len(results) / (time.monotonic() - started)
    return rate, percentile([result["seconds"] for result in results], 0.99)


async def open_loop(port: int, rate: float, seconds: float, num_tokens: int, pids: dict[str, list[int]]) -> dict[str, Any]:
    tasks: list[asyncio.Task[dict[str, Any]]] = []
    memory: list[dict[str, float]] = []
    rng = random.Random(0)
    started = time.monotonic()
    due, sample_at = started, started
    while (now := time.monotonic()) < started + seconds:
        if now >= sample_at:
            memory.append({kind: round(resident_mib(ids), 1) for kind, ids in pids.items()})
            sample_at += 1
        if now >= due:
            tasks.append(asyncio.ensure_future(request(port, num_tokens)))
            due += rng.expovariate(rate)
        await asyncio.sleep(max(0.0, min(due, sample_at) - time.monotonic()))
    return {"results": await asyncio.gather(*tasks), "memory": memory}


def percentile(values: list[float], share: float) -> float:
    return round(sorted(values)[min(len(values) - 1, int(len(values) * share))], 3) if values else 0.0


async def overload(port: int, pids: dict[str, list[int]], arguments: argparse.Namespace) -> dict[str, Any]:
    concurrency = arguments.max_num_seqs
    await closed_loop(port, concurrency, WARM_S, arguments.tokens)
    capacity, full_load_p99 = await closed_loop(port, concurrency, arguments.capacity_seconds, arguments.tokens)
    bound = 1.5 * ((arguments.max_queued_requests + concurrency / 4) / capacity + full_load_p99)
    print(
        f"capacity {capacity:.1f} requests/s, each at most {full_load_p99:.2f} s; the bound of accepted ones is {bound:.2f} s",
        flush=True,
    )
    before = {kind: cpu_seconds(ids) for kind, ids in pids.items()} | {"client": time.process_time()}
    run = await open_loop(port, arguments.factor * capacity, arguments.seconds, arguments.tokens, pids)
    after = {kind: cpu_seconds(ids) for kind, ids in pids.items()} | {"client": time.process_time()}
    results, memory = run["results"], run["memory"]
    accepted = [result for result in results if result["status"] == 200]
    third = max(1, len(memory) // 3)
    growth = {kind: round(memory[-1][kind] - memory[third][kind], 1) for kind in memory[0]}  # after the first third
    return {
        "capacity_per_second": round(capacity, 2),
        "offered": len(results),
        "statuses": dict(Counter(result["status"] for result in results)),
        "refused_without_retry_after": sum(result["status"] == 429 and not result["has_hint"] for result in results),
        "accepted_per_second": round(len(accepted) / arguments.seconds, 2),
        "bound_s": round(bound, 3),
        "accepted_seconds": {f"p{100 * s:g}": percentile([r["seconds"] for r in accepted], s) for s in (0.5, 0.9, 0.99)},
        "accepted_ttft": {f"p{100 * s:g}": percentile([r["ttft"] for r in accepted], s) for s in (0.5, 0.9, 0.99)},
        "cpu_seconds": {kind: round(after[kind] - before[kind], 2) for kind in after},
        "rss_mib_each_second": memory,
        "rss_mib_growth_after_a_third": growth,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--factor", type=float, default=3.0)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--capacity-seconds", type=float, default=20.0)
    parser.add_argument("--tokens", type=int, default=32, help="generated per request")
    parser.add_argument("--max-num-seqs", type=int, default=16)
    parser.add_argument("--max-queued-requests", type=int, default=32)
    parser.add_argument("--front-ends", type=int, default=1)
    parser.add_argument("--model", help="folder, file or hub id; default: the embedded one")
    parser.add_argument("--fake", action="store_true", help="an engine of 100 steps per second instead of a model")
    parser.add_argument("--record", help="write a record with this name")
    arguments = parser.parse_args()
    engine: dict[str, Any] = {"max_num_seqs": arguments.max_num_seqs}
    engine |= (
        {"builder": "served:slow", "num_kv_blocks": 4096} if arguments.fake else {"model": arguments.model, "max_model_len": 512}
    )
    options = {"max_queued_requests": arguments.max_queued_requests, "num_frontends": arguments.front_ends}
    with running_server({**options, "served_model_name": "overload"}, engine) as (port, pids):
        result = asyncio.run(overload(port, pids, arguments))
    print(json.dumps({name: value for name, value in result.items() if name != "rss_mib_each_second"}, indent=1))
    is_good = (
        set(result["statuses"]) <= {200, 429}
        and not result["refused_without_retry_after"]
        and result["accepted_seconds"]["p99"] <= result["bound_s"]
    )
    print("as stated" if is_good else "NOT as stated")
    if arguments.record:
        print(write_record(arguments.record, settings=vars(arguments), is_as_stated=is_good, **result))
    raise SystemExit(not is_good)


if __name__ == "__main__":
    main()
