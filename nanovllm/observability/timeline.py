"""Timeline: when one request passed which stage. Stages, spans and the parts of TTFT are all read from here.

    received  tokenized  queued  scheduled  prefill_done  first_token  decode_done  stream_done  cleanup_done

Times are seconds of the monotonic clock, which all processes of a machine share. Inside the engine's process nobody sees
HTTP: `received` and `tokenized` then equal `queued`, and `stream_done` equals `decode_done`; the front end's facts replace
them when they arrive (`join`). Never holds a prompt or a token id.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

STAGES = (
    "received",
    "tokenized",
    "queued",
    "scheduled",
    "prefill_done",
    "first_token",
    "decode_done",
    "stream_done",
    "cleanup_done",
)
SPANS = {  # name -> (from, to)
    "tokenization": ("received", "tokenized"),
    "dispatch": ("tokenized", "queued"),
    "queueing": ("queued", "scheduled"),
    "prefill": ("scheduled", "first_token"),
    "decode": ("first_token", "decode_done"),
    "streaming": ("decode_done", "stream_done"),
    "cleanup": ("stream_done", "cleanup_done"),
}
DATA_PLANE = ("prefill_done", "first_token", "decode_done", "step")
TTFT_PARTS = ("queue", "prefill", "first_decode", "front_end")


def plane_of(stage: str) -> str:
    """Who is at work there: the plane that decides, or the one that computes."""
    return "data" if stage in DATA_PLANE else "control"


@dataclass(slots=True)
class Timeline:
    """Written by the `Tracker` alone."""

    request_id: str
    num_prompt_tokens: int
    num_sequences: int
    times: dict[str, float]  # stage -> seconds
    request: Any = None  # the engine's live object, until the request has ended
    num_unfinished: int = 1
    engine_first_token: float | None = None
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    num_preemptions: int = 0
    finish_reasons: list[str] = field(default_factory=list)
    operation: str = "text_completion"  # of OpenTelemetry's GenAI conventions
    traceparent: str | None = None  # W3C, as the HTTP request brought it

    @property
    def ttft(self) -> float | None:
        """Seconds from `received` to `first_token`."""
        first = self.times.get("first_token")
        return None if first is None else first - self.times["received"]

    @property
    def tpot(self) -> float | None:
        """Seconds per output token after the first."""
        if self.num_generated_tokens < 2 or "first_token" not in self.times or "decode_done" not in self.times:
            return None
        return (self.times["decode_done"] - self.times["first_token"]) / (self.num_generated_tokens - 1)

    def ttft_parts(self) -> dict[str, float] | None:
        """Seconds by part; they add up to `ttft`. `front_end`: everything outside the engine, before and after it."""
        times, ttft = self.times, self.ttft
        if ttft is None or self.engine_first_token is None or "scheduled" not in times:
            return None
        queue = times["scheduled"] - times["queued"]
        prefill = times["prefill_done"] - times["scheduled"]
        first_decode = self.engine_first_token - times["prefill_done"]
        return dict(zip(TTFT_PARTS, (queue, prefill, first_decode, ttft - queue - prefill - first_decode)))

    def spans(self) -> dict[str, tuple[float, float]]:
        """Name -> (start, end) in seconds, one after the other; only those whose two ends are known."""
        times = self.times
        return {name: (times[a], times[b]) for name, (a, b) in SPANS.items() if a in times and b in times}

    def join(self, facts: dict[str, Any]) -> None:
        """Take over what a front end knows: stage times, `operation`, `traceparent`."""
        self.operation = facts.get("operation", self.operation)
        self.traceparent = facts.get("traceparent")
        known = {name: facts[name] for name in STAGES if isinstance(facts.get(name), float)}
        self.times.update(known)
        if "decode_done" in self.times and "first_token" in self.times:  # the front end may have had to wait for its turn
            self.times["decode_done"] = max(self.times["decode_done"], self.times["first_token"])
        if "stream_done" in known:
            self.times["stream_done"] = max(known["stream_done"], self.times.get("decode_done", 0.0))
            self.times["cleanup_done"] = max(self.times.get("cleanup_done", 0.0), self.times["stream_done"])

    def facts(self) -> dict[str, Any]:
        """Counts, for a log line."""
        return {
            "prompt_len": self.num_prompt_tokens,
            "generated_len": self.num_generated_tokens,
            "cached_len": self.num_cached_tokens,
            "num_sequences": self.num_sequences,
            "num_preemptions": self.num_preemptions,
            "finish_reasons": self.finish_reasons,
        }
