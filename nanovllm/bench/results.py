"""From rows to figures: percentiles, goodput, cost, stability. Pure arithmetic, so that a record can be recomputed.

A repeat is summarised by itself, from its own rows; the table gives the median of the repeats' figures with all of them
(never percentiles of pooled rows, never the best run). Only output tokens count as throughput unless the name says total.
Failed requests are counted, and are part of no latency. Percentiles interpolate linearly, as NumPy's do.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanovllm.bench.load import Row
from nanovllm.errors import ConfigError

PERCENTILES = (50, 90, 99)
LATENCIES: dict[str, Callable[[Row], list[float]]] = {
    "ttft_ms": lambda row: [row.ttft_ms],
    "tpot_ms": lambda row: [row.tpot_ms] if row.num_output > 1 else [],
    "itl_ms": lambda row: row.itl_ms,
    "e2e_ms": lambda row: [row.latency_ms],
}
HIGHER_IS_BETTER = ("requests_per_s", "output_tok_s", "total_tok_s", "goodput_per_s", "slo_attainment")


@dataclass(frozen=True, slots=True)
class Slo:
    """What a request must keep to count as good. Milliseconds; None: no bound."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None

    @classmethod
    def parse(cls, text: str) -> Slo:
        """ "ttft=200ms,tpot=20ms,e2e=2s"; a bare number is milliseconds."""
        bounds: dict[str, float] = {}
        for part in filter(None, text.split(",")):
            name, _, value = part.partition("=")
            if name not in ("ttft", "tpot", "e2e"):
                raise ConfigError(f"SLO {part!r}: the names are ttft, tpot and e2e")
            factor = 1.0 if value.endswith("ms") else 1e3 if value.endswith("s") else 1.0
            try:
                bounds[f"{name}_ms"] = float(value.removesuffix("ms").removesuffix("s")) * factor
            except ValueError as error:
                raise ConfigError(f"SLO {part!r}: not a time such as 200ms or 2s") from error
        return cls(**bounds)

    def is_kept(self, row: Row) -> bool:
        got = (row.ttft_ms, row.tpot_ms, row.latency_ms)
        return not row.error and all(b is None or g <= b for g, b in zip(got, (self.ttft_ms, self.tpot_ms, self.e2e_ms)))

    @property
    def is_given(self) -> bool:
        return (self.ttft_ms, self.tpot_ms, self.e2e_ms) != (None, None, None)


def percentile(values: Sequence[float], q: float) -> float:
    """`values` need not be sorted; 0.0 for none."""
    ordered = sorted(values)
    if not ordered:
        return 0.0
    place = (len(ordered) - 1) * q / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summarize_repeat(
    rows: Sequence[Row], seconds: float, slo: Slo, price_per_hour: float | None = None, joules: float | None = None
) -> dict[str, float]:
    """The figures of one repeat, flat: "ttft_ms.p50" and so on.

    `price_per_hour`: of all that serves, any currency; `joules`: that the machine used.
    """
    good = [row for row in rows if not row.error]
    num_output = sum(row.num_output for row in good)
    figures = {
        "seconds": seconds,
        "completed": len(good),
        "failed": len(rows) - len(good),
        "requests_per_s": len(good) / seconds,
        "output_tok_s": num_output / seconds,
        "total_tok_s": (num_output + sum(row.num_input for row in good)) / seconds,
        "lag_ms.p99": percentile([row.lag_ms for row in rows], 99),
    }
    for name, values_of in LATENCIES.items():
        values = [value for row in good for value in values_of(row)]
        if values:
            figures |= {f"{name}.p{q}": percentile(values, q) for q in PERCENTILES}
            figures |= {f"{name}.mean": statistics.fmean(values), f"{name}.std": statistics.pstdev(values)}
    if slo.is_given:
        num_kept = sum(map(slo.is_kept, rows))
        figures |= {"goodput_per_s": num_kept / seconds, "slo_attainment": num_kept / len(rows)}
    if price_per_hour is not None and num_output:
        figures["cost_per_million_output_tok"] = price_per_hour / 3600 * seconds / num_output * 1e6
    if joules is not None and num_output:
        figures["joules_per_output_tok"] = joules / num_output
    return {name: round(value, 4) for name, value in figures.items()}


def joules_of(energy: Mapping[str, Any], repeat: int) -> float | None:
    """Of all devices in one repeat; None where no device tells. `energy`: the field of a record."""
    return sum(values[repeat] for values in energy["joules"].values()) if energy.get("joules") else None


def result_table(repeats: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """For each figure its median, its repeats, and their spread: (max - min) / median."""
    names = [name for name in repeats[0] if all(name in one for one in repeats)]
    return {name: _line([one[name] for one in repeats]) for name in names}


def _line(values: list[float]) -> dict[str, Any]:
    median = statistics.median(values)
    spread = (max(values) - min(values)) / median if median else 0.0
    return {"median": round(median, 4), "spread": round(spread, 4), "repeats": values}


def by_tenant(rows: Sequence[Row], seconds: float, slo: Slo) -> dict[str, dict[str, float]]:
    """The figures of each tenant; nothing when there is only one."""
    tenants = sorted({row.tenant for row in rows})
    if len(tenants) < 2:
        return {}
    return {tenant: summarize_repeat([row for row in rows if row.tenant == tenant], seconds, slo) for tenant in tenants}
