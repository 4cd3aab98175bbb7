"""What a GPU uses at rest and in products, and how long its matrix units keep their first rate. A record.

    python benchmarks/gpu_power.py [--record gpu-power]

Three seconds of nothing, then three of bf16 products (8,192 cubed, random values) without a pause. The rate of every ten
products is kept: at first the card runs at its highest clock, until power limits it. Joules are NVML's, as our probe reads
them (`nanovllm/energy.py`); how often its counter moves is measured too. Not run on a GPU yet (2026-11-29).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from itertools import pairwise
from statistics import fmean
from typing import Any

import torch

from nanovllm.bench.record import write_record
from nanovllm.energy import NVML, EnergyMeter, nvml_sources

SIZE, WINDOW = 8192, 10  # of a product; products of a window: about 15 ms
FLOPS = 2 * SIZE**3


def energy_during(work: Callable[[], object]) -> dict[str, float]:
    """Seconds, joules and watts of the first GPU."""
    meter = EnergyMeter()
    if "gpu0" not in meter.joules():
        raise SystemExit(f"no energy of a GPU: {meter.describe()}")
    before, begin = meter.joules()["gpu0"], time.perf_counter()
    work()
    seconds, joules = time.perf_counter() - begin, meter.joules()["gpu0"] - before
    return {"seconds": round(seconds, 3), "joules": round(joules, 3), "watts": round(joules / seconds, 1)}


def products(seconds: float) -> list[tuple[float, float]]:
    """(seconds since the beginning, operations per second) of each window."""
    a, b = (torch.randn(SIZE, SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True)]
    events[0].record()
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds:
        for _ in range(WINDOW):
            torch.mm(a, b)
        events.append(torch.cuda.Event(enable_timing=True))
        events[-1].record()
        if len(events) > 4:
            events[-4].synchronize()  # the host stays three windows ahead
    torch.cuda.synchronize()
    ends = [events[0].elapsed_time(event) * 1e-3 for event in events]
    return [(round(end, 4), WINDOW * FLOPS / (end - start)) for start, end in pairwise(ends)]


def counter_period_ms(seconds: float = 1.0) -> float | None:
    """Between two readings of the energy counter that differ; None: it did not move twice."""
    source, begin = nvml_sources(NVML)[0], time.perf_counter()
    last, moved = source.read(), []
    while time.perf_counter() - begin < seconds:
        now = source.read()
        if now != last:
            moved.append(time.perf_counter())
            last = now
    return round(1e3 * (moved[-1] - moved[0]) / (len(moved) - 1), 2) if len(moved) > 1 else None


def measure(seconds: float) -> dict[str, Any]:
    matrix = torch.randn(SIZE, SIZE, device="cuda", dtype=torch.bfloat16)
    torch.mm(matrix, matrix)  # compiled, loaded, warm
    torch.cuda.synchronize()
    time.sleep(2.0)
    idle = energy_during(lambda: time.sleep(seconds))
    windows: list[tuple[float, float]] = []
    busy = energy_during(lambda: windows.extend(products(seconds)))
    return {
        "idle": idle,
        "products": {**busy, "flop_per_joule": round(len(windows) * WINDOW * FLOPS / busy["joules"])},
        "counter_period_ms": counter_period_ms(),
        "windows": [[end, round(rate / 1e12, 1)] for end, rate in windows],  # seconds since the beginning, TFLOP/s
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="of each of the two")
    parser.add_argument("--record", help="write a record with this name")
    arguments = parser.parse_args()
    content = measure(arguments.seconds)
    for name in ("idle", "products", "counter_period_ms"):
        print(name, content[name])
    rates = [rate for _, rate in content["windows"]]
    print(f"TFLOP/s: first windows {rates[:3]}, last tenth {fmean(rates[-len(rates) // 10 :]):.1f}")
    if arguments.record:
        print(write_record(arguments.record, gpu=torch.cuda.get_device_name(), settings=vars(arguments), **content))


if __name__ == "__main__":
    main()
