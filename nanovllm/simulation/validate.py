"""Validation: predictions beside what one H200 measured, line by line, with the error.

One of these lines was used to calibrate (marked *). All else is predicted from times of kernels, of the host's steps and
of event loops. The loads of one server are simulated in one run, token by token: loads of equally long prompts share
them, and its prefix cache found them. Of a load with repeats the median of each metric is compared, measured and simulated
alike.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from random import Random
from statistics import median
from typing import Any, NamedTuple

from nanovllm.config import EngineConfig
from nanovllm.errors import ConfigError
from nanovllm.simulation.hardware import PROFILES
from nanovllm.simulation.report import percentile
from nanovllm.simulation.run import Deployment, Finished, deploy, simulate
from nanovllm.simulation.shapes import SHAPES
from nanovllm.workloads import Request, make_workload, shifted

RECORDS = Path("benchmarks/records")
OFFLINE = ("2026-11-29-gpu-qwen3-0.6b-2.json", "2026-11-25-gpu-qwen3-8b.json")
FITTED = {("qwen3-0.6b offline", "first token of 512, ms")}
PAUSE_S = 60.0  # between two loads: long enough for the last answer
TIMER_S = 1e-6  # client processes have a timer for each request; timers of one moment differ by so much, in no order
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


class Server(NamedTuple):
    """Serving records of one server, in the order in which it met their loads."""

    records: tuple[str, ...]
    max_num_seqs: int


SERVERS = (
    Server(("20-d", "50-d", "100-d", "at-once-128-d", "at-once-512-d"), max_num_seqs=512),
    Server(("at-once-512-gc",), max_num_seqs=256),
)


def validate(folder: Path = RECORDS) -> list[Line]:
    """All lines. Raises `ConfigError` where the records are not there."""
    lines = [line for name in OFFLINE for line in _offline(_read(folder / name))]
    engine = _read(folder / OFFLINE[0])
    return lines + [line for server in SERVERS for line in _serving(server, folder, engine)]


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
    deployment, model = replace(_deployment(record, is_greedy=False), has_server=False), record["model"]

    def seconds(requests: list[Request]) -> float:
        return max(one.finish for one in simulate(deployment, requests).finished)

    def at_once(num_requests: int, num_input: int, num_output: int) -> float:
        return seconds(make_workload("fixed", num_requests=num_requests, num_input=num_input, num_output=num_output).requests)

    def line(metric: str, key: str, predicted: float) -> Line:
        what = f"{model} offline"
        return Line(what, metric, record["results"][key]["median"], predicted, (what, metric) in FITTED)

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
    num_clients: int


def _loads(folder: Path, server: Server) -> Iterator[Load]:
    for name in server.records:
        path = folder / f"2026-11-29-gpu-serve-{name}.json"
        record = _read(path)
        parameters = record["workload"]["parameters"]
        with gzip.open(path.with_suffix(".rows.jsonl.gz"), "rt") as lines:
            rows = [json.loads(line) for line in lines]
        rate = float(parameters["rate"])
        workload = make_workload("poisson", **{**parameters, "rate": rate})
        what = f"{len(workload.requests)} at once" if rate == float("inf") else f"{rate:g} requests/s"
        what += ", 256 rows" if server.max_num_seqs == 256 else ""
        num_clients = record["settings"].get("client_processes", 1)
        for repeat in range(1 + max(row["repeat"] for row in rows)):
            requests = shifted(workload, repeat).requests if repeat else workload.requests
            ours = [row for row in rows if row["repeat"] == repeat]
            yield Load(what, requests, ours, num_clients)


def _serving(server: Server, folder: Path, engine: dict[str, Any]) -> Iterator[Line]:
    """All loads in one run: the later ones find prompts of the earlier ones in its cache."""
    deployment = _deployment(engine, is_greedy=True)
    deployment = replace(deployment, limits=replace(deployment.limits, max_num_seqs=server.max_num_seqs))
    loads, begins, requests, clients = list(_loads(folder, server)), [], [], []
    noise = Random(0)
    for load in loads:
        begin = max(one.arrival_s for one in requests) + PAUSE_S if requests else 0.0
        begins.append(begin)
        timer_s = TIMER_S if load.num_clients > 1 else 0.0
        requests += [replace(one, arrival_s=begin + one.arrival_s + timer_s * noise.random()) for one in load.requests]
        clients += [number % load.num_clients for number in range(len(load.requests))]
    run = simulate(deployment, requests, clients=clients)
    repeats = []
    for load, begin, end in zip(loads, begins, [*begins[1:], float("inf")]):
        ours = [one for one in run.finished if begin <= one.sent < end]
        repeats.append((load.what, _measured(load.rows), _simulated(ours, begin)))
    for what, group in groupby(repeats, key=lambda repeat: repeat[0]):
        _, measured, simulated = zip(*group)
        for metric in measured[0]:
            ours, theirs = (median(one[metric] for one in side) for side in (simulated, measured))
            yield Line(what, metric, theirs, ours, (what, metric) in FITTED)


def _measured(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Metrics of one repeat."""
    seconds = max(row["sent_ms"] + row["latency_ms"] for row in rows) / 1e3
    ttft = [row["ttft_ms"] for row in rows]
    tpot = [(row["latency_ms"] - row["ttft_ms"]) / max(1, row["num_output"] - 1) for row in rows]
    return _metrics(sum(row["num_output"] for row in rows) / seconds, ttft, tpot)


def _simulated(finished: list[Finished], begin: float) -> dict[str, float]:
    """The same metrics, of a repeat that began then."""
    seconds = max(one.finish for one in finished) - begin
    ttft, tpot = [1e3 * one.ttft for one in finished], [1e3 * one.tpot for one in finished]
    return _metrics(sum(one.num_output for one in finished) / seconds, ttft, tpot)


def _metrics(output_tok_s: float, ttft_ms: list[float], tpot_ms: list[float]) -> dict[str, float]:
    return {
        "output tok/s": output_tok_s,
        "TTFT p50, ms": percentile(sorted(ttft_ms), 50),
        "TTFT p99, ms": percentile(sorted(ttft_ms), 99),
        "TPOT p50, ms": percentile(sorted(tpot_ms), 50),
    }


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
