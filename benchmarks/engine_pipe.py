"""Tokens per second from the engine's loop, through the socket, to text in a generator. Without a model or HTTP.

    python benchmarks/engine_pipe.py [--streams 256] [--tokens 400] [--record engine-pipe]

The engine process is real, with an executor that answers at once; each stream is read by a task of its own. Processor
time is told for both processes, because on a machine with other work it is steadier than the rate.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))  # the engine process gets our sys.path

from nanovllm import AsyncEngine, SamplingParams
from nanovllm.bench.record import summary, write_record


def processor_seconds(pid: int) -> float:
    """Of all threads of a process, by the kernel's count."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def measure(engine: AsyncEngine, num_streams: int, num_tokens: int) -> dict[str, float]:
    """One round; microseconds per token where the name says so."""
    params = SamplingParams(temperature=0, max_tokens=num_tokens)
    num_yields = 0

    async def read(number: int) -> None:
        nonlocal num_yields
        async for _ in engine.generate([number % 50, 2, 3], params):
            num_yields += 1

    before = processor_seconds(os.getpid()), processor_seconds(engine.facts.pid)
    started = time.perf_counter()
    await asyncio.gather(*[read(number) for number in range(num_streams)])
    seconds, total = time.perf_counter() - started, num_streams * num_tokens
    return {
        "tokens_per_second": total / seconds,
        "front_end_us_per_token": (processor_seconds(os.getpid()) - before[0]) / total * 1e6,
        "engine_us_per_token": (processor_seconds(engine.facts.pid) - before[1]) / total * 1e6,
        "yields_per_token": num_yields / total,
    }


async def run(num_streams: int, num_tokens: int, num_rounds: int) -> list[dict[str, float]]:
    options = {"num_kv_blocks": num_streams * (num_tokens // 4 + 2), "max_num_seqs": num_streams}
    async with await AsyncEngine.start(builder="served:counting", **options) as engine:
        await measure(engine, num_streams, 50)
        return [await measure(engine, num_streams, num_tokens) for _ in range(num_rounds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=400, help="per stream")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--record", metavar="NAME")
    arguments = parser.parse_args()
    rounds = asyncio.run(run(arguments.streams, arguments.tokens, arguments.rounds))
    results = {name: summary([one[name] for one in rounds]) for name in rounds[0]}
    for name, values in results.items():
        print(f"{name:<24}{values['median']:12,.2f}  ({values['min']:,.2f} to {values['max']:,.2f})")
    if arguments.record:
        load = {"streams": arguments.streams, "tokens": arguments.tokens}
        print(write_record(arguments.record, load=load, results=results))


if __name__ == "__main__":
    main()
