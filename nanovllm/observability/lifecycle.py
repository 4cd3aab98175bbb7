"""The lifecycle file: JSON lines {request_id, stage, timestamp_ms, metadata}, nine per request, in the order of time.

The form of the course's request profiler. `timestamp_ms` is of the monotonic clock. The metadata of the last stage carries
what is known at the end: counts, spans, TTFT and its parts. Never a prompt, never a token id.
"""

from __future__ import annotations

from typing import Any

import msgspec

from nanovllm.observability.timeline import STAGES, Timeline, plane_of
from nanovllm.observability.tracker import Sink


class LifecycleFile(Sink):
    def __init__(self, path: str) -> None:
        self._file = open(path, "ab")  # noqa: SIM115  closed by `close`

    def on_request(self, timeline: Timeline) -> None:
        for line in lifecycle_lines(timeline):
            self._file.write(msgspec.json.encode(line) + b"\n")

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def lifecycle_lines(timeline: Timeline) -> list[dict[str, Any]]:
    """Fewer than nine for a request that ended early."""
    reached = [stage for stage in STAGES if stage in timeline.times]
    return [
        {
            "request_id": timeline.request_id,
            "stage": stage,
            "timestamp_ms": timeline.times[stage] * 1e3,
            "metadata": {"plane": plane_of(stage), **(_summary(timeline) if stage == reached[-1] else {})},
        }
        for stage in reached
    ]


def _summary(timeline: Timeline) -> dict[str, Any]:
    parts = timeline.ttft_parts()
    spans = {name: (end - start) * 1e3 for name, (start, end) in timeline.spans().items()}
    return {
        **timeline.facts(),
        "ttft_ms": None if timeline.ttft is None else timeline.ttft * 1e3,
        "tpot_ms": None if timeline.tpot is None else timeline.tpot * 1e3,
        "ttft_parts_ms": None if parts is None else {name: value * 1e3 for name, value in parts.items()},
        "spans_ms": spans,
        "longest_span": max(spans, key=lambda name: spans[name]) if spans else None,  # where, not why
    }
