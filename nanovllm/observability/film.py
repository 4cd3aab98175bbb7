"""Film: what the inspector page shows, from a running engine or from a flight record.

A film is frames. A frame is the flight recorder's entries since the frame before it, and the state after them: who runs, who
waits and why, which blocks are held. A running engine makes one frame whenever somebody asks (`news`) and none when nobody
does: it needs no listener besides the recorder. A record becomes one frame per step (`film_of`): the real scheduler decides
everything again, so that the blocks of each step are known although no record holds them. Never a prompt or a token id.

`main` makes a film in a process of its own, within limits, because a record may come from anywhere.
"""

from __future__ import annotations

import dataclasses
import resource
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from nanovllm.engine.batch import ScheduledBatch
from nanovllm.engine.engine_process import why_first_waits
from nanovllm.engine.roofline import counter_of, peak_of
from nanovllm.engine.scheduler import Scheduler
from nanovllm.errors import ConfigError
from nanovllm.observability.flight_recorder import FlightRecorder, _birth_of, _siblings
from nanovllm.observability.replay import Replay, ReplayReport, read_record, run_record
from nanovllm.simulation.hardware import PROFILES

MAX_ENTRIES = 4000  # of one answer to a page
MAX_BLOCKS = 1 << 15  # shown on the map
MAX_WAITING = 100  # shown one by one; all are counted
CODES = "0123456789abcdefghijklmnopqrstuvwxyz"  # of a block: 2 * tables that hold it, + 1 when a prefix search finds it
CODES += "yz" * (1 << 14)  # 17 tables, or more
STRIDE = 128  # blocks that are compared at once
CPU_SECONDS, MEMORY_BYTES = 60, 4 << 30  # of the process that makes a film


# --- the state between two steps


def snapshot(scheduler: Scheduler) -> dict[str, Any]:
    """Plain data: `running` is [seq_id, row, tokens, computed, preemptions, block table], `waiting` [seq_id, reason]."""
    blocks, queue = scheduler.block_manager, list(_waiting(scheduler))
    return {
        "limits": dataclasses.asdict(scheduler.limits),
        "blocks": "".join([CODES[2 * one.ref_count + (one.token_ids is not None)] for one in blocks._blocks[:MAX_BLOCKS]]),
        "free": blocks.num_free_blocks,
        "evictions": blocks.stats.num_evictions,
        "queried": blocks.stats.num_queried_tokens,
        "hit": blocks.stats.num_hit_tokens,
        "running": [
            [one.seq_id, one.row, one.num_tokens, one.num_computed_tokens, one.num_preemptions, list(one.block_table)]
            for one in scheduler.running
        ],
        "waiting": [[one.seq_id, reason] for one, reason in queue[:MAX_WAITING]],
        "reasons": Counter(reason for _, reason in queue),
    }


def _waiting(scheduler: Scheduler) -> Any:
    """(sequence, why it does not run): nobody overtakes the head of the queue, so only the head has a reason of its own."""
    for place, sequence in enumerate(scheduler.waiting):
        yield sequence, "behind" if place else why_first_waits(scheduler)
    for sequence in _siblings(scheduler):
        yield sequence, "sibling"


def prelude(scheduler: Scheduler) -> list[tuple]:
    """Entries that introduce those who are there already."""
    entries: list[tuple] = []
    for one in [*scheduler.running, *scheduler.waiting, *_siblings(scheduler)]:
        entries.append(("add", one.arrival_time, one.request_id, [_birth_of(one)]))
        if one.first_scheduled_time is not None:
            entries.append(("admit", one.first_scheduled_time, one.seq_id, one.num_tokens, one.num_cached_tokens, one.row))
    return entries


# --- of a running engine


def news(recorder: FlightRecorder, scheduler: Scheduler, after: int | None) -> dict[str, Any]:
    """One frame, and a `cursor` to ask for the next one with. It begins anew (`is_first`) without `after`, or after a gap."""
    cursor, entries = recorder.since(-1 if after is None else after)
    is_first = entries is None or len(entries) > MAX_ENTRIES
    shown = prelude(scheduler) if is_first else [_shown(entry) for entry in entries or ()]
    return {"cursor": cursor, "is_first": is_first, "time": scheduler._clock(), "entries": shown, "state": snapshot(scheduler)}


def _shown(entry: Any) -> Any:
    """For an answer: what is encoded already goes as it is."""
    return msgspec.Raw(entry) if isinstance(entry, bytes) else _without_hashes(entry)


def _without_hashes(entry: Any) -> Any:
    return entry[:5] if entry[0] == "finish" else entry


def add_costs(entries: list[Any], facts: Mapping[str, Any]) -> list[Any]:
    """Each step also with the bytes and operations that it takes at least; as they are where `facts` do not tell the model.

    `facts`: the fields `spec`, `dtype` and `roofline` of `EngineFacts`, or what a record has of them.
    """
    work = counter_of(facts.get("spec", {}), facts.get("dtype", ""), facts.get("roofline", {}))
    if work is None:
        return entries
    return [[*entry, *work.count(ScheduledBatch(*entry[2:7]))[:2]] if entry[0] == "step" else entry for entry in entries]


def hardware(roofline: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Name -> (bytes per second, operations per second): this device, if its peak is known, and the simulator's profiles."""
    peak = peak_of(roofline)
    own = {} if peak is None else {"this device": (peak.bytes_per_s, peak.operations_per_s)}
    return {**own, **{name: (profile.bandwidth, profile.flops) for name, profile in PROFILES.items()}}


# --- of a flight record


class Camera(Replay):
    """A replay that takes a frame after every step is scheduled."""

    def __init__(self, record: dict[str, Any], policy: str | None = None) -> None:
        super().__init__(record, policy)
        self._contents: list[int] = []
        self._codes: str | None = None
        self._tables: dict[int, list[int]] = {}
        self._entries, self._place = record["entries"], 0
        self.frames = [{"entries": prelude(self.scheduler), "state": self._changes()}]

    def run(self) -> ReplayReport:
        report = super().run()
        if report.difference is None and self._place < len(self._entries):
            self._shoot(len(self._entries))  # what came after the last step
        return report

    def _compare_step(self, entry: list[Any], expected: list[tuple]) -> Any:
        difference = super()._compare_step(entry, expected)
        if difference is None:
            place = self._place
            while self._entries[place][0] != "step":
                place += 1
            self._shoot(place + 1)
        return difference

    def _shoot(self, end: int) -> None:
        entries = [_without_hashes(entry) for entry in self._entries[self._place : end]]
        self._place = end
        self.frames.append({"entries": entries, "state": self._changes()})

    def _changes(self) -> dict[str, Any]:
        """A snapshot, but after the first one only what is new of blocks and block tables; and which content was lost."""
        state = snapshot(self.scheduler)
        codes, contents = state["blocks"], self.scheduler.block_manager._content_ids.tolist()
        state["evicted"] = [place for place in _differences(self._contents, contents) if self._contents[place]]
        if self._codes is not None:
            del state["blocks"]
            state["changed"] = [[place, codes[place]] for place in _differences(self._codes, codes)]
        tables = {one[0]: one[5] for one in state["running"]}
        state["running"] = [one[:5] if self._tables.get(one[0]) == one[5] else one for one in state["running"]]
        self._codes, self._contents, self._tables = codes, contents, tables
        return state


def _differences(old: Any, new: Any) -> list[int]:
    """Places where two lists or strings differ; most of a cache does not change in a step."""
    starts = [start for start in range(0, len(old), STRIDE) if old[start : start + STRIDE] != new[start : start + STRIDE]]
    return [place for start in starts for place in range(start, min(start + STRIDE, len(old))) if old[place] != new[place]]


def film_of(payload: bytes, name: str = "the file", policy: str | None = None) -> dict[str, Any]:
    """All frames of a flight record, up to the first step that the scheduler now decides otherwise. Raises `ConfigError`."""
    camera, report = run_record(payload, name, policy, Camera)
    record = camera.record
    facts = {**record.get("facts", {}), **{key: record[key] for key in ("num_blocks", "block_size", "num_rows", "policy")}}
    try:
        for frame in camera.frames:
            frame["entries"] = add_costs(frame["entries"], facts)
        roofs = hardware(facts.get("roofline", {}))
    except (msgspec.ValidationError, TypeError, AttributeError) as error:  # TypeError: fields of another kind
        raise ConfigError(f"{name} is damaged: {error}") from error
    return {"film": 1, "report": str(report), "facts": {**facts, "hardware": roofs}, "frames": camera.frames}


def write_film(path: str, record: str, policy: str | None = None) -> None:
    """The film of the flight record in the file `record`, into the file `path`."""
    made = msgspec.json.encode(film_of(read_record(record), record, policy))
    try:
        Path(path).write_bytes(made)
    except OSError as error:
        raise ConfigError(f"film={path!r} cannot be written: {error}") from error


def main() -> int:
    """A flight record on standard input, its film on standard output; or the reason why not, and status 1."""
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    try:
        film = msgspec.json.encode(film_of(sys.stdin.buffer.read()))
    except Exception as error:  # whatever may be wrong with a file from anywhere
        sys.stderr.write(str(error) if isinstance(error, ConfigError) else f"the record is damaged or too large: {error!r}")
        return 1
    sys.stdout.buffer.write(film)
    return 0
