"""Workloads of the simulator: when requests arrive, and how many tokens they bring and want. No text, no token ids.

    burst:requests=512,input=1024,output=512            all at once
    poisson:rate=50,requests=1500,input=512,output=128  independent arrivals
    bursty:rate=50,burstiness=0.3,...                   gamma intervals; 1 is Poisson, smaller comes in clumps
    shared:rate=50,prefix=2000,groups=10,...            as poisson; each request begins with one of `groups` prefixes
    seeds                                               nano-vllm's benchmark, 256 requests of 100 to 1,024 tokens
    trace:path=FILE                                     JSON lines {"arrival": s, "input": tokens, "output": tokens}

`input` and `output` are a number, or a range such as 100-1024 that is drawn from evenly. Everything follows from the seed.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nanovllm.errors import ConfigError, did_you_mean


class Arrival(NamedTuple):
    time: float  # seconds since the beginning
    num_input: int  # tokens
    num_output: int
    prefix: int = -1  # number of the shared beginning; -1: none
    num_prefix: int = 0  # its tokens, part of `num_input`
    token_ids: list[int] | None = None  # the prompt itself, where a record says what it was


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in the order of arrival."""

    name: str
    arrivals: list[Arrival]

    @property
    def is_offline(self) -> bool:
        """Everything is there at the beginning."""
        return self.arrivals[-1].time == 0.0


DEFAULTS: dict[str, dict[str, str]] = {
    "burst": {"requests": "256", "input": "512", "output": "128"},
    "poisson": {"rate": "10", "requests": "1000", "input": "512", "output": "128"},
    "bursty": {"rate": "10", "burstiness": "0.3", "requests": "1000", "input": "512", "output": "128"},
    "shared": {"rate": "10", "requests": "1000", "prefix": "2000", "groups": "10", "input": "100-200", "output": "128"},
    "seeds": {},
    "trace": {"path": ""},
}


def parse_workload(text: str, seed: int = 0) -> Workload:
    """A workload by its description. Raises `ConfigError` that names what is wrong."""
    kind, _, rest = text.partition(":")
    if kind not in DEFAULTS:
        raise ConfigError(f"workload={text!r}: {kind!r} is not one of {', '.join(DEFAULTS)}{did_you_mean(kind, DEFAULTS)}")
    values = dict(DEFAULTS[kind])
    for part in filter(None, rest.split(",")):
        name, sign, value = part.partition("=")
        if not sign or name not in values:
            known = ", ".join(values) or "nothing"
            raise ConfigError(f"workload={text!r}: {part!r} is not understood; {kind} takes {known}{did_you_mean(name, values)}")
        values[name] = value
    if kind == "seeds":
        return Workload(text, nano_vllm_benchmark())
    if kind == "trace":
        return Workload(text, _read_trace(values["path"]))
    return Workload(text, _draw(text, kind, values, seed))


def nano_vllm_benchmark() -> list[Arrival]:
    """Lengths of the 256 requests of nano-vllm's bench.py, drawn in its order from its seed."""
    rng = random.Random(0)
    lengths = [len([rng.randint(0, 10_000) for _ in range(rng.randint(100, 1024))]) for _ in range(256)]
    return [Arrival(0.0, length, rng.randint(100, 1024)) for length in lengths]


def _draw(text: str, kind: str, values: dict[str, str], seed: int) -> list[Arrival]:
    def number(name: str, convert: Callable[[str], Any], is_valid: Callable[[Any], bool], wanted: str) -> Any:
        try:
            value = convert(values[name])
        except ValueError:
            value = math.nan
        if not is_valid(value):
            raise ConfigError(f"workload={text!r}: {name}={values[name]!r} must be {wanted}")
        return value

    def count(name: str) -> int:
        return number(name, int, lambda value: value >= 1, "a whole number of at least 1")

    def span(name: str) -> tuple[int, int]:
        wanted = "a number of tokens of at least 1, or a range such as 100-1024"
        return number(name, _span, lambda value: isinstance(value, tuple) and 1 <= value[0] <= value[1], wanted)

    def positive(name: str) -> float:
        return number(name, float, lambda value: 0 < value < math.inf, "a number above 0")

    num_requests, inputs, outputs = count("requests"), span("input"), span("output")
    rate = positive("rate") if "rate" in values else math.inf
    shape = positive("burstiness") if kind == "bursty" else 1.0
    num_prefix, num_groups = (count("prefix"), count("groups")) if kind == "shared" else (0, 0)
    times, lengths = random.Random(f"times {seed}"), random.Random(f"lengths {seed}")
    arrivals, now = [], 0.0
    for _ in range(num_requests):
        num_input, num_output = lengths.randint(*inputs), lengths.randint(*outputs)
        prefix = lengths.randrange(num_groups) if num_groups else -1
        arrivals.append(Arrival(now, num_prefix + num_input, num_output, prefix, num_prefix))
        if rate < math.inf:
            now += times.gammavariate(shape, 1 / (rate * shape))
    return arrivals


def _span(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    return int(low), int(high or low)


def _read_trace(name: str) -> list[Arrival]:
    try:
        lines = Path(name).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"workload: path={name!r} cannot be read: {error}") from error
    arrivals = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            arrival = Arrival(float(entry["arrival"]), int(entry["input"]), int(entry["output"]))
        except (ValueError, KeyError, TypeError) as error:
            wanted = '{"arrival": seconds, "input": tokens, "output": tokens}'
            raise ConfigError(f"workload: {name}, line {number} is not {wanted}: {error!r}") from error
        if not (0 <= arrival.time < math.inf and arrival.num_input >= 1 and arrival.num_output >= 1):
            raise ConfigError(f"workload: {name}, line {number}: times must be at least 0, and counts at least 1")
        arrivals.append(arrival)
    if not arrivals:
        raise ConfigError(f"workload: {name} holds no requests")
    return sorted(arrivals, key=lambda arrival: arrival.time)
