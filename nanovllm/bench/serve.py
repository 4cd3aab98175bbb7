"""`nanovllm bench serve`: a workload, warmed up and repeated, against a server; or against two in ABBA order.

Writes what a record holds; how a request is sent is `load.py`'s.
"""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from nanovllm.bench.check import SCHEMA
from nanovllm.bench.clients import send
from nanovllm.bench.load import Row, Target, find_model
from nanovllm.bench.record import command_line, write_record
from nanovllm.bench.results import Slo, by_tenant, joules_of, result_table, summarize_repeat
from nanovllm.bench.server_metrics import scrape, told
from nanovllm.energy import EnergyMeter
from nanovllm.errors import ConfigError
from nanovllm.workloads import Workload, shifted

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True)
class Plan:
    """How a workload is measured, whatever runs it."""

    workload: Workload
    repeats: int = 3
    warmup_repeats: int = 1  # whole workloads before the first that counts
    warmup_requests: int | None = None  # only so many of it; None: all
    slo: Slo = Slo()  # noqa: RUF009  frozen
    price_per_hour: float | None = None  # of all that serves
    keep_prompts: bool = False  # every repeat sends the same prompts, so that a prefix cache finds them

    def __post_init__(self) -> None:
        if self.repeats < 1 or self.warmup_repeats < 0 or (self.warmup_requests or 1) < 1:
            raise ConfigError("repeats and warmup_requests must be at least 1, warmup_repeats at least 0")
        if self.price_per_hour is not None and not self.price_per_hour >= 0:
            raise ConfigError(f"price_per_hour={self.price_per_hour} must not be negative")

    def part(self, repeat: int) -> Workload:
        """What one repeat sends; warm-ups are numbered -1, -2, ..."""
        whole = self.workload if self.keep_prompts or repeat == 0 else shifted(self.workload, repeat)
        return whole if repeat >= 0 else replace(whole, requests=whole.requests[: self.warmup_requests])

    @property
    def settings(self) -> dict[str, Any]:
        """What belongs to the boundary of a record."""
        slo = {name: value for name, value in asdict(self.slo).items() if value is not None}
        return {"slo": slo, "price_per_hour": self.price_per_hour, "keep_prompts": self.keep_prompts}


class Run:
    """The repeats of one side, as they come. `meter`: of the machine that serves; a text: why there is none."""

    def __init__(self, plan: Plan, meter: EnergyMeter | str) -> None:
        self.plan = plan
        self._meter = meter
        self._used: dict[str, float] = {}  # joules by device, when the repeat began
        self.energy: dict[str, Any] = {"missing": meter} if isinstance(meter, str) else {"joules": {}, "missing": meter.missing}
        self.rows: list[Row] = []
        self.seconds: list[float] = []
        self.warmup_s: list[float] = []
        self.server: list[dict[str, Any]] = []  # what it told of each repeat, see `server_metrics.py`
        self.order: list[int] = []  # place of each repeat among all repeats of both sides

    def begin(self) -> None:
        """A repeat begins; `add` ends it."""
        if not isinstance(self._meter, str):
            self._used = self._meter.joules()

    def add(self, rows: Sequence[Row], seconds: float) -> dict[str, float]:
        if not isinstance(self._meter, str):
            for name, joules in self._meter.joules().items():
                self.energy["joules"].setdefault(name, []).append(round(joules - self._used[name], 3))
        seconds = round(seconds, 6)
        self.rows += rows
        self.seconds.append(seconds)
        return self._summary(rows, len(self.seconds) - 1)

    def _summary(self, rows: Sequence[Row], repeat: int) -> dict[str, float]:
        joules = joules_of(self.energy, repeat)
        return summarize_repeat(rows, self.seconds[repeat], self.plan.slo, self.plan.price_per_hour, joules)

    def content(self) -> dict[str, Any]:
        """The fields of the record that follow from what was measured."""
        plan, count = self.plan, len(self.plan.workload.requests)
        parts = [self.rows[start : start + count] for start in range(0, len(self.rows), count)]
        table = result_table([self._summary(part, repeat) for repeat, part in enumerate(parts)])
        failed = [row for row in self.rows if row.error]
        status = f"failed: {len(failed)} of {len(self.rows)} requests, the first: {failed[0].error}" if failed else "ok"
        return {
            "schema": SCHEMA,
            "status": status,
            "workload": plan.workload.describe(),
            "warmup": {
                "repeats": plan.warmup_repeats,
                "requests": len(plan.part(-1).requests) if plan.warmup_repeats else 0,
                "seconds": self.warmup_s,
            },
            "num_requests": count,
            "seconds": self.seconds,
            "order": self.order,
            "energy": self.energy,
            "result_table": table,
            "tenants": by_tenant(parts[-1], self.seconds[-1], plan.slo),
        }


@dataclass(frozen=True, slots=True)
class Side:
    """One server of a comparison."""

    name: str  # of the record
    target: Target
    precision: str
    max_model_len: int


async def open_side(name: str, target: Target, precision: str, max_model_len: int | None) -> Side:
    """Asks the server for what was not given."""
    model, length = target.model, max_model_len
    if not model or length is None:
        found, told = await find_model(target.url, target.api_key)
        model, length = model or found, length or told
    if length is None:
        raise ConfigError(f"the server at {target.url} does not tell its longest context: give --max-model-len")
    return Side(name, replace(target, model=model), precision, length)


async def measure(plan: Plan, sides: Sequence[Side], tell: Callable[[str], None] = print) -> list[Run]:
    """One run per side. Two sides take turns A B B A A B B A, so that a drift of the machine hits both alike."""
    is_here = all(urlsplit(side.target.url).hostname in LOOPBACK for side in sides)
    meter = EnergyMeter() if is_here else "the server is on another machine"
    runs = [Run(plan, meter) for _ in sides]
    for side, run in zip(sides, runs):
        for number in range(plan.warmup_repeats):
            _, seconds = await send(side.target, plan.part(-1 - number))
            run.warmup_s.append(round(seconds, 3))
    for place, which in enumerate(turns(plan.repeats, len(sides))):
        run = runs[which]
        repeat = len(run.seconds)
        part = plan.part(repeat)
        before = await scrape(sides[which].target)
        run.begin()
        rows, seconds = await send(sides[which].target, part, repeat)
        run.order.append(place)
        tell(describe_repeat(f"{sides[which].name} {repeat + 1}/{plan.repeats}", run.add(rows, seconds)))
        run.server.append(await told(sides[which].target, before, rows))
    return runs


def turns(repeats: int, num_sides: int) -> list[int]:
    """2 sides, 3 repeats: A B, B A, A B."""
    order = list(range(num_sides))
    return [side for number in range(repeats) for side in (order if number % 2 == 0 else order[::-1])]


def describe_repeat(name: str, figures: dict[str, float]) -> str:
    text = f"{name}: {figures['seconds']:.2f} s, {figures['completed']:.0f} completed, {figures['failed']:.0f} failed, "
    text += f"{figures['output_tok_s']:.1f} output tok/s"
    for label, key in (("TTFT", "ttft_ms"), ("TPOT", "tpot_ms"), ("end to end", "e2e_ms")):
        if f"{key}.p50" in figures:
            text += f", {label} {figures[f'{key}.p50']:.2f} / {figures[f'{key}.p99']:.2f} ms"
    if "slo_attainment" in figures:
        text += f", {figures['slo_attainment']:.1%} within the SLO"
    return text


def write_serve_record(side: Side, run: Run, note: str, folder: Path) -> Path:
    target = side.target
    sending = {"form": target.form, "max_concurrency": target.max_concurrency, "extra_body": target.extra_body}
    more: dict[str, Any] = {}
    if target.client_processes > 1:
        sending["client_processes"] = target.client_processes
    if target.retries.max_retries:
        sending["retries"] = asdict(target.retries)
        more["num_retries"] = sum(row.num_retries for row in run.rows)
    return write_record(
        side.name,
        rows=[asdict(row) for row in run.rows],
        folder=folder,
        kind="serve",
        model=target.model,
        precision=side.precision,
        max_model_len=side.max_model_len,
        command=command_line(),
        settings={**sending, **run.plan.settings},
        url=target.url,
        server=run.server,
        note=note,
        **more,
        **run.content(),
    )


def allow_connections(count: int) -> None:
    """Each request in flight is an open file; the usual limit of 1,024 is raised as far as the system lets us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def run_serve_bench(
    plan: Plan, sides: Sequence[tuple[str, Target]], precision: str, max_model_len: int | None
) -> tuple[list[Side], list[Run]]:
    async def run() -> tuple[list[Side], list[Run]]:
        opened = [await open_side(name, target, precision, max_model_len) for name, target in sides]
        return opened, await measure(plan, opened)

    allow_connections(len(plan.workload.requests))
    return asyncio.run(run())
