"""Validation: predictions beside what one H200 measured, line by line, with the error.

Of these lines three were used to calibrate (marked *): they gave the three costs of the front end. Everything else is
predicted from times of kernels and of the host's steps. The serving records are replayed request by request, at the
moments when their client really sent them, and token by token: loads of equally long prompts share them, and the
server's prefix cache found them.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from nanovllm.config import EngineConfig
from nanovllm.errors import ConfigError
from nanovllm.simulation.hardware import PROFILES
from nanovllm.simulation.report import percentile
from nanovllm.simulation.run import Deployment, Finished, deploy, simulate
from nanovllm.simulation.shapes import SHAPES
from nanovllm.workloads import Request, make_workload, shifted

RECORDS = Path("benchmarks/records")
OFFLINE = ("2026-11-29-gpu-qwen3-0.6b.json", "2026-11-25-gpu-qwen3-8b.json")
SERVING = ("at-once-128", "50", "100", "at-once-512", "20")  # in the order in which one server met them
FITTED = {(f"{rate} requests/s", "TTFT p50, ms") for rate in (20, 50, 100)}
PAUSE_S = 60.0  # between two loads: long enough for the last answer
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
    loads = [load for name in SERVING for load in _loads(folder / f"2026-11-29-gpu-serve-{name}.json")]
    return lines + list(_serving(loads, _read(folder / OFFLINE[0])))


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

    def seconds(requests: list[Request]) -> float:
        return max(one.finish for one in simulate(deployment, requests, is_offline=True).finished)

    def at_once(num_requests: int, num_input: int, num_output: int) -> float:
        return seconds(make_workload("fixed", num_requests=num_requests, num_input=num_input, num_output=num_output).requests)

    def line(metric: str, key: str, predicted: float) -> Line:
        return Line(f"{model} offline", metric, record["results"][key]["median"], predicted)

    benchmark = make_workload("nano-vllm").requests
    num_output = sum(one.num_output for one in benchmark)
    yield line("benchmark, output tok/s", "benchmark_output_tok_s", num_output / seconds(benchmark))
    one_stream = (at_once(1, 128, 545) - at_once(1, 128, 33)) / 512
    yield line("one stream, ms per token", "one_stream_ms_per_token", one_stream * 1e3)
    for length in (512, 8192):
        yield line(f"first token of {length:,}, ms", f"ttft_{length}_ms", at_once(1, length, 1) * 1e3)
    yield line("64 x 2,048 prompts, tok/s", "prompt_tok_s_64x2048", 64 * 2048 / at_once(64, 2048, 1))


@dataclass(slots=True)
class Load:
    """One repeat of a serving record."""

    what: str
    requests: list[Request]  # times since the load began
    rows: list[dict[str, Any]]  # what its client saw
    is_last_repeat: bool


def _loads(path: Path) -> Iterator[Load]:
    parameters = _read(path)["workload"]["parameters"]
    with gzip.open(path.with_suffix(".rows.jsonl.gz"), "rt") as lines:
        rows = [json.loads(line) for line in lines]
    rate = float(parameters["rate"])
    workload = make_workload("poisson", **{**parameters, "rate": rate})
    repeats = sorted({row["repeat"] for row in rows})
    for repeat in repeats:
        requests = shifted(workload, repeat).requests if repeat else workload.requests
        ours = [row for row in rows if row["repeat"] == repeat]
        what = f"{len(requests)} at once" if rate == float("inf") else f"{rate:g} requests/s"
        yield Load(what, requests, ours, repeat == repeats[-1])


def _serving(loads: list[Load], engine: dict[str, Any]) -> Iterator[Line]:
    """All loads in one run, as they met one server: the later ones find prompts of the earlier ones in its cache.

    Of repeats the last is compared: the first finds a server that has just started.
    """
    deployment = _deployment(engine, is_greedy=True)
    requests: list[Request] = []
    begins = []
    for load in loads:
        begins.append(requests[-1].arrival_s + PAUSE_S if requests else 0.0)
        requests += [replace(one, arrival_s=one.arrival_s + begins[-1]) for one in load.requests]
    finished = simulate(deployment, requests).finished
    for load, begin, end in zip(loads, begins, [*begins[1:], float("inf")]):
        if load.is_last_repeat:
            ours = [one for one in finished if begin <= one.sent < end]
            yield from _compare(load, ours, begin)


def _compare(load: Load, ours: list[Finished], begin: float) -> Iterator[Line]:
    num_tokens = sum(one.num_output for one in ours)
    measured_s = max(row["sent_ms"] + row["latency_ms"] for row in load.rows) / 1e3
    seconds = max(one.finish for one in ours) - begin
    yield Line(load.what, "output tok/s", num_tokens / measured_s, num_tokens / seconds)
    times = {
        "ttft": [row["ttft_ms"] for row in load.rows],
        "tpot": [(row["latency_ms"] - row["ttft_ms"]) / max(1, row["num_output"] - 1) for row in load.rows],
    }
    for name, q in (("ttft", 50), ("ttft", 99), ("tpot", 50)):
        predicted = percentile(sorted(getattr(one, name) for one in ours), q) * 1e3
        metric = f"{name.upper()} p{q}, ms"
        yield Line(load.what, metric, percentile(sorted(times[name]), q), predicted, (load.what, metric) in FITTED)


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
