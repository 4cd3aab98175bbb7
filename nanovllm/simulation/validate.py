"""Validation: predictions beside what one H200 measured, line by line, with the error.

Of these lines one was used to calibrate: TTFT p50 of "50 requests/s" (marked *) gave the front end's latency. Everything
else is predicted from times of kernels and of the host's steps. The arrivals of the serving record are replayed
exactly, token by token: its client draws prompts and then arrivals from `random.Random(0)` for every load, so the loads
share prompts, and the server's prefix cache found them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from nanovllm.config import EngineConfig
from nanovllm.errors import ConfigError
from nanovllm.simulation.hardware import PROFILES
from nanovllm.simulation.report import percentile
from nanovllm.simulation.run import Deployment, deploy, simulate
from nanovllm.simulation.shapes import SHAPES
from nanovllm.simulation.workload import Arrival, nano_vllm_benchmark

RECORDS = Path("benchmarks/records")
OFFLINE = ("2026-11-25-gpu-qwen3-0.6b.json", "2026-11-25-gpu-qwen3-8b.json")
SERVING = "2026-11-25-gpu-serve-qwen3-0.6b.json"
FITTED = {("50 requests/s", "TTFT p50, ms")}
CLIENT_VOCABULARY = 10_000  # of the client that made the records: today `bench serve`, workload poisson
PAUSE_S = 60.0  # between two loads of the serving record: long enough for the last answer
BAR, GOAL = 0.10, 0.05


class Line(NamedTuple):
    what: str
    metric: str
    measured: float
    predicted: float
    is_fitted: bool = False

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def validate(folder: Path = RECORDS) -> list[Line]:
    """All lines. Raises `ConfigError` where the records are not there."""
    lines = [line for name in OFFLINE for line in _offline(_read(folder / name))]
    return lines + list(_serving(_read(folder / SERVING), _read(folder / OFFLINE[0])))


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"validate needs the record {path}; run it in a clone of the repository ({error})") from error


def _deployment(record: dict[str, Any], is_greedy: bool) -> Deployment:
    """The engine of an offline record, with the cache that it had."""
    config, plan = record["config"], record["memory_plan"]
    names = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size")
    chosen = EngineConfig(**{name: config[name] for name in names}, num_kv_blocks=plan["num_blocks"])
    return deploy(SHAPES[record["model"]], PROFILES["h200"], chosen, is_greedy=is_greedy)


def _offline(record: dict[str, Any]) -> Iterator[Line]:
    deployment, model = _deployment(record, is_greedy=False), record["model"]

    def seconds(arrivals: list[Arrival]) -> float:
        return max(one.finish for one in simulate(deployment, arrivals, is_offline=True).finished)

    def line(metric: str, key: str, predicted: float) -> Line:
        return Line(f"{model} offline", metric, record["results"][key]["median"], predicted)

    benchmark = nano_vllm_benchmark()
    num_output = sum(arrival.num_output for arrival in benchmark)
    yield line("benchmark, output tok/s", "benchmark_output_tok_s", num_output / seconds(benchmark))
    one_stream = (seconds([Arrival(0.0, 128, 545)]) - seconds([Arrival(0.0, 128, 33)])) / 512
    yield line("one stream, ms per token", "one_stream_ms_per_token", one_stream * 1e3)
    for length in (512, 8192):
        yield line(f"first token of {length:,}, ms", f"ttft_{length}_ms", seconds([Arrival(0.0, length, 1)]) * 1e3)
    yield line("64 x 2,048 prompts, tok/s", "prompt_tok_s_64x2048", 64 * 2048 / seconds([Arrival(0.0, 2048, 1)] * 64))


def _serving(record: dict[str, Any], engine: dict[str, Any]) -> Iterator[Line]:
    """All loads in one run, as they met one server: the later ones find prompts of the earlier ones in its cache."""
    deployment = _deployment(engine, is_greedy=True)
    arrivals: list[Arrival] = []
    begins = []
    for measured in record["loads"]:
        begins.append(arrivals[-1].time + PAUSE_S if arrivals else 0.0)
        arrivals += client_arrivals(measured, begins[-1])
    finished = simulate(deployment, arrivals).finished
    for measured, begin, end in zip(record["loads"], begins, [*begins[1:], float("inf")]):
        ours = [one for one in finished if begin <= one.arrival < end]
        rate, num_requests = float(measured["load"]["requests_per_s"]), measured["load"]["requests"]
        what = f"{num_requests} at once" if rate == float("inf") else f"{rate:g} requests/s"
        seconds = max(one.finish for one in ours) - begin
        yield Line(what, "output tok/s", measured["output_tok_s"], sum(one.num_output for one in ours) / seconds)
        for name, q in (("ttft", 50), ("ttft", 99), ("tpot", 50)):
            predicted = percentile(sorted(getattr(one, name) for one in ours), q) * 1e3
            metric = f"{name.upper()} p{q}, ms"
            yield Line(what, metric, measured[f"{name}_ms"][f"p{q}"], predicted, (what, metric) in FITTED)


def client_arrivals(measured: dict[str, Any], begin: float) -> list[Arrival]:
    """What the client of the records did, as `bench serve` does: all prompts first, then the gaps, from one generator.

    "All at once" takes its one process a while: the last request ends that much later than its latency.
    """
    load = measured["load"]
    rng, now, rate = random.Random(0), begin, float(load["requests_per_s"])
    at_once_s = (measured["seconds"] - measured["latency_ms"]["p99"] / 1e3) / load["requests"]
    num_input = load["input"]
    prompts = [[rng.randrange(1, CLIENT_VOCABULARY) for _ in range(num_input)] for _ in range(load["requests"])]
    arrivals = []
    for prompt in prompts:
        arrivals.append(Arrival(now, num_input, load["output"], token_ids=prompt))
        now += rng.expovariate(rate) if rate < float("inf") else at_once_s
    return arrivals


def describe_lines(lines: list[Line]) -> str:
    """A Markdown table, and how many lines hold the bar and the goal."""
    rows = ["| run | metric | measured | simulated | error |", "| --- | --- | ---: | ---: | ---: |"]
    for line in lines:
        mark = " *" if line.is_fitted else ""
        rows.append(f"| {line.what} | {line.metric} | {line.measured:,.2f} | {line.predicted:,.2f} | {line.error:+.1%}{mark} |")
    free = [abs(line.error) for line in lines if not line.is_fitted]
    ordered = sorted(free)
    rows.append("")
    rows.append(
        f"{sum(error <= BAR for error in free)} of {len(free)} predicted lines are within {BAR:.0%}, "
        f"{sum(error <= GOAL for error in free)} within {GOAL:.0%}; median error {percentile(ordered, 50):.1%}, "
        f"largest {ordered[-1]:.1%}. *: used to calibrate."
    )
    return "\n".join(rows)
