"""What the server itself says of a repeat: its histograms' sums in /metrics, before and after.

The client's TTFT begins before it connects and ends when the first event is there; the server's begins when the head of the
request has been read and ends when the first token is with its front end. What lies between the two is the HTTP path:
connecting, the way in, the first event's way out, and the client's own turn. Ours also tells the parts of its TTFT.
"""

from __future__ import annotations

import asyncio
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from nanovllm.bench.http_client import Endpoint, get_text
from nanovllm.bench.load import Row, Target
from nanovllm.errors import ConfigError

TTFT, TPOT = "vllm:time_to_first_token_seconds", "vllm:request_time_per_output_token_seconds"
PARTS = {f"nanovllm:ttft_{part}_seconds": part for part in ("queue", "prefill", "first_decode", "front_end")}
LINE = re.compile(r"^([\w:]+)_(sum|count)(?:\{.*\})? (\S+)$", re.MULTILINE)
PATIENCE_S, PERIOD_S = 2.0, 0.25  # front ends of one server know of each other after a second

Totals = dict[str, tuple[float, float]]  # histogram -> (sum, count)


async def scrape(target: Target) -> Totals:
    """Of all label sets together; empty when the server has no such lines."""
    try:
        return read_totals(await get_text(Endpoint(target.url, "/metrics", target.api_key)))
    except ConfigError:
        return {}


def read_totals(text: str) -> Totals:
    totals: Totals = {}
    for name, kind, value in LINE.findall(text):
        if name in (TTFT, TPOT, *PARTS):
            total, count = totals.get(name, (0.0, 0.0))
            totals[name] = (total + float(value), count) if kind == "sum" else (total, count + float(value))
    return totals


async def told(target: Target, before: Totals, rows: Sequence[Row]) -> dict[str, Any]:
    """`told_between`, as soon as the server has counted all of them."""
    expected, waited = sum(not row.error for row in rows), 0.0
    after = await scrape(target)
    while TTFT in after and after[TTFT][1] - before.get(TTFT, (0, 0))[1] < expected and waited < PATIENCE_S:
        await asyncio.sleep(PERIOD_S)
        waited += PERIOD_S
        after = await scrape(target)
    return told_between(before, after, rows)


def told_between(before: Mapping[str, tuple[float, float]], after: Totals, rows: Sequence[Row]) -> dict[str, Any]:
    """Means in milliseconds; `http` is the client's TTFT less the server's. Or `missing`: why there are none."""
    good = [row for row in rows if not row.error]
    grown = {
        name: (total - before.get(name, (0, 0))[0], count - before.get(name, (0, 0))[1]) for name, (total, count) in after.items()
    }
    if TTFT not in grown:
        return {"missing": f"its /metrics has no {TTFT}"}
    count = round(grown[TTFT][1])
    if count != len(good) or not good:
        return {"missing": f"the server counted {count} first tokens, the client {len(good)}: others use it, or requests failed"}
    means = {name: round(total / count * 1e3, 3) for name, (total, count) in grown.items() if count}
    answer: dict[str, Any] = {
        "ttft_ms": means[TTFT],
        "http_ms": round(statistics.fmean(row.ttft_ms for row in good) - means[TTFT], 3),
    }
    if TPOT in means:
        answer["tpot_ms"] = means[TPOT]
    if parts := {part: means[name] for name, part in PARTS.items() if name in means}:
        answer["ttft_parts_ms"] = parts
    return answer
