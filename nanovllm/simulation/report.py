"""Reports: what a run means in numbers, as a dictionary (JSON) and as a table for people.

Percentiles interpolate linearly, as NumPy's do. A request meets the objectives when its TTFT, its TPOT and its latency
all do; goodput counts those per second. Equal runs give byte-equal reports: nothing here looks at a real clock.
Read next: `search.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanovllm.errors import ConfigError, did_you_mean
from nanovllm.simulation.run import Deployment, Finished, Run

PERCENTILES = (50, 90, 99)
UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclass(frozen=True, slots=True)
class Objectives:
    """Latency objectives, seconds. Infinity: none."""

    ttft: float = math.inf
    tpot: float = math.inf
    latency: float = math.inf

    @classmethod
    def parse(cls, text: str) -> Objectives:
        """`ttft=200ms,tpot=20ms`; units are us, ms and s. Raises `ConfigError`."""
        values: dict[str, float] = {}
        for part in filter(None, text.split(",")):
            name, _, value = part.partition("=")
            if name not in cls.__dataclass_fields__:
                known = cls.__dataclass_fields__
                raise ConfigError(f"slo={text!r}: {name!r} is not one of {', '.join(known)}{did_you_mean(name, known)}")
            values[name] = _seconds(text, value)
        return cls(**values)

    def are_met_by(self, one: Finished) -> bool:
        return one.ttft <= self.ttft and one.tpot <= self.tpot and one.latency <= self.latency


def _seconds(text: str, value: str) -> float:
    unit = next((unit for unit in ("us", "ms", "s") if value.endswith(unit)), None)
    try:
        seconds = float(value.removesuffix(unit or "")) * UNITS[unit or ""]
    except (KeyError, ValueError):
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise ConfigError(f"slo={text!r}: {value!r} must be a time above 0 with its unit, such as 200ms or 1.5s")
    return seconds


def percentile(ordered: Sequence[float], q: float) -> float:
    """Of sorted values, by linear interpolation between neighbours."""
    place = (len(ordered) - 1) * q / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def summarize(deployment: Deployment, runs: Sequence[Run], objectives: Objectives) -> dict[str, Any]:
    """One report over the replicas of a deployment. Times in milliseconds, rates per second."""
    finished = [one for run in runs for one in run.finished]
    seconds = max(one.finish for one in finished)
    num_good = sum(objectives.are_met_by(one) for one in finished)
    num_output = sum(one.num_output for one in finished)
    num_input = sum(one.num_input for one in finished)
    report: dict[str, Any] = {
        "requests": len(finished),
        "seconds": round(seconds, 6),
        "input_tokens": num_input,
        "output_tokens": num_output,
        "cached_tokens": sum(one.num_cached for one in finished),
        "preemptions": sum(one.num_preemptions for one in finished),
        "requests_per_s": round(len(finished) / seconds, 3),
        "output_tok_s": round(num_output / seconds, 1),
        "input_tok_s": round(num_input / seconds, 1),
        "goodput_requests_per_s": round(num_good / seconds, 3),
        "goodput_share": round(num_good / len(finished), 6),
    }
    for name in ("ttft", "tpot", "latency"):
        ordered = sorted(getattr(one, name) for one in finished)
        report[f"{name}_ms"] = {f"p{q}": round(percentile(ordered, q) * 1e3, 3) for q in PERCENTILES}
        report[f"{name}_ms"]["mean"] = round(sum(ordered) / len(ordered) * 1e3, 3)
    report["device"] = _device(deployment, runs, seconds)
    return report


def _device(deployment: Deployment, runs: Sequence[Run], seconds: float) -> dict[str, Any]:
    works = [run.work for run in runs]
    num_steps, total = sum(work.num_steps for work in works), seconds * len(runs)
    hardware = deployment.hardware
    return {
        "steps": num_steps,
        "mean_batch": round(sum(work.num_chunks for work in works) / num_steps, 2),
        "busy_share": round(sum(work.busy_s for work in works) / total, 4),
        "host_share": round(sum(work.host_s for work in works) / total, 4),
        "bandwidth_share": round(sum(work.num_bytes for work in works) / total / hardware.bandwidth, 4),
        "matrix_share": round(sum(work.num_operations for work in works) / total / hardware.flops, 4),
    }


def describe(report: dict[str, Any]) -> str:
    """The report for people."""
    device = report["device"]
    lines = [
        f"{report['requests']:,} requests in {report['seconds']:,.1f} s of virtual time: "
        f"{report['requests_per_s']:,.2f} requests/s, {report['output_tok_s']:,.0f} output tokens/s",
        f"{'ms':<10}{'p50':>12}{'p90':>12}{'p99':>12}{'mean':>12}",
    ]
    for name in ("ttft", "tpot", "latency"):
        values = report[f"{name}_ms"]
        lines.append(f"{name.upper() if name != 'latency' else name:<10}" + "".join(f"{values[q]:>12,.2f}" for q in values))
    lines += [
        f"goodput   {report['goodput_requests_per_s']:,.2f} requests/s, {report['goodput_share']:.2%} of all",
        f"device    busy {device['busy_share']:.1%}, bandwidth {device['bandwidth_share']:.1%} and matrix units "
        f"{device['matrix_share']:.1%} of the data sheet; host {device['host_share']:.1%}",
        f"steps     {device['steps']:,}, {device['mean_batch']:,.1f} sequences on average",
        f"cache     {report['cached_tokens']:,} of {report['input_tokens']:,} prompt tokens; "
        f"{report['preemptions']:,} preemptions",
    ]
    return "\n".join(lines)
