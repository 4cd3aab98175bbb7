"""The structured log: one line per stage of each request, as JSON or in the course's text form.

    [2026-11-25T15:36:00.123456] req-1 first_token 17 1 8
     timestamp                   id    stage prompt_len generated_len batch_size

The JSON form has the same fields and plane, step, running_size, waiting_len, free_blocks and ts_ns. Counts and ids only.
"""

from __future__ import annotations

import sys
import time
from datetime import datetime, timezone
from typing import Any, BinaryIO

import msgspec

from nanovllm.engine.events import StepCollected
from nanovllm.observability.timeline import Timeline, plane_of
from nanovllm.observability.tracker import Sink, StepFacts


class StageLog(Sink):
    """`path` "-": standard error. `with_steps`: also one line per step, whose request id is "-"."""

    def __init__(self, path: str, form: str = "json", with_steps: bool = False) -> None:
        self._file: BinaryIO = sys.stderr.buffer if path == "-" else open(path, "ab")  # noqa: SIM115  closed by `close`
        self._form = {"json": _json_line, "text": _text_line}[form]
        self._with_steps = with_steps
        self._epoch = time.time() - time.monotonic()

    def on_stage(self, timeline: Timeline, stage: str, time: float, num_generated: int, step: StepFacts) -> None:
        self._line(time, timeline.request_id, stage, timeline.num_prompt_tokens, num_generated, step)

    def on_request(self, timeline: Timeline) -> None:
        """The stages that only the front end knows, and the last one."""
        from_front_end = timeline.times["received"] != timeline.times["queued"]
        stages = ("received", "tokenized", "stream_done") if from_front_end else ()
        for stage in (*stages, "cleanup_done"):
            num_generated = timeline.num_generated_tokens if stage.endswith("_done") else 0
            when = timeline.times[stage]
            self._line(when, timeline.request_id, stage, timeline.num_prompt_tokens, num_generated, _BETWEEN_STEPS)

    def on_step(self, dispatched: StepFacts, collected: StepCollected) -> None:
        if self._with_steps:
            self._line(collected.time, "-", "step", dispatched.num_tokens, collected.num_new_tokens, dispatched)

    def _line(self, when: float, request_id: str, stage: str, prompt_len: int, generated_len: int, step: StepFacts) -> None:
        self._file.write(self._form(when + self._epoch, when, request_id, stage, prompt_len, generated_len, step))

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.flush()
        if self._file is not sys.stderr.buffer:
            self._file.close()


_BETWEEN_STEPS = StepFacts(0.0, -1, 0, 0, 0, 0, 0, 0, 0)


def timestamp(epoch_seconds: float) -> str:
    return datetime.fromtimestamp(epoch_seconds, timezone.utc).replace(tzinfo=None).isoformat(timespec="microseconds")


def _text_line(epoch: float, when: float, request_id: str, stage: str, prompt: int, generated: int, step: StepFacts) -> bytes:
    return f"[{timestamp(epoch)}] {request_id} {stage} {prompt} {generated} {step.batch_size}\n".encode()


def _json_line(epoch: float, when: float, request_id: str, stage: str, prompt: int, generated: int, step: StepFacts) -> bytes:
    line: dict[str, Any] = {
        "timestamp": timestamp(epoch),
        "request_id": request_id,
        "stage": stage,
        "prompt_len": prompt,
        "generated_len": generated,
        "batch_size": step.batch_size,
        "plane": plane_of(stage),
        "step": step.step,
        "running_size": step.running_size,
        "waiting_len": step.waiting_len,
        "free_blocks": step.free_blocks,
        "ts_ns": int(when * 1e9),
    }
    return msgspec.json.encode(line) + b"\n"
