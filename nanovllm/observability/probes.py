"""The course's three small interfaces, for experiments and lectures. A probe of one program, without an engine.

    logger.info("decode", request_id, batch_size)
    metrics.observe("ttft_ms", value)
    trace.annotate("decode_step_begin")

The engine itself uses none of them: what it tells comes through `engine/events.py`. Metrics of a server are in
`server/metrics.py`; this registry is for the values that an experiment measures.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

import msgspec

from nanovllm.observability.stage_log import timestamp
from nanovllm.observability.timeline import plane_of


class StageLogger:
    """Lines of the same fields as `StageLog`, where a program says them itself."""

    def __init__(self, file: TextIO | None = None, form: str = "text") -> None:
        self.file, self.form = file, form

    def info(
        self, stage: str, request_id: str, batch_size: int, prompt_len: int = 0, generated_len: int = 0, **facts: Any
    ) -> None:
        """`facts`: numbers and names, never text of a prompt. They are in the JSON form only."""
        when = timestamp(time.time())
        if self.form == "text":
            line = f"[{when}] {request_id} {stage} {prompt_len} {generated_len} {batch_size}"
        else:
            fields = {"timestamp": when, "request_id": request_id, "stage": stage, "prompt_len": prompt_len}
            fields |= {"generated_len": generated_len, "batch_size": batch_size, "plane": plane_of(stage), **facts}
            line = msgspec.json.encode(fields).decode()
        print(line, file=self.file or sys.stderr, flush=True)


class MetricsRegistry:
    """Values by name, and their percentiles."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}

    def observe(self, name: str, value: float) -> None:
        self.values.setdefault(name, []).append(value)

    def percentile(self, name: str, share: float) -> float:
        """The smallest value that is not exceeded by `share` (0 to 1) of the values. KeyError for an unknown name."""
        values = sorted(self.values[name])
        return values[max(0, math.ceil(share * len(values)) - 1)]

    def summary(self) -> dict[str, dict[str, float]]:
        """name -> count, mean, p50, p99."""
        return {
            name: {
                "count": len(values),
                "mean": sum(values) / len(values),
                "p50": self.percentile(name, 0.5),
                "p99": self.percentile(name, 0.99),
            }
            for name, values in self.values.items()
        }


class Trace:
    """Named moments. `sink(name, seconds)`: also told of each, such as `ChromeTrace.annotate`."""

    def __init__(self, sink: Callable[[str, float], None] | None = None) -> None:
        self.marks: list[tuple[str, float]] = []
        self.sink = sink

    def annotate(self, name: str) -> None:
        now = time.monotonic()
        self.marks.append((name, now))
        if self.sink is not None:
            self.sink(name, now)

    def seconds_between(self, first: str, second: str) -> list[float]:
        """From each `first` to the next `second`."""
        spans, start = [], None
        for name, when in self.marks:
            if name == first:
                start = when
            elif name == second and start is not None:
                spans.append(when - start)
                start = None
        return spans
