"""Flight recorder: the last steps and requests in memory, and a file of them when something goes wrong.

Kept in two segments, the older of which is dropped when the newer is full: so a record holds between N and 2N steps. A
segment begins with a *keyframe*, the whole state of scheduler and block manager, from which `replay.py` goes on. Recording a
step is one append; a keyframe costs a walk over the blocks, once in N steps. It keeps columns of numbers and no object for
a block: thousands of new objects at one moment would call the garbage collector, for longer than ten steps.

No prompt is in the file: blocks of tokens are told apart by numbers that mean nothing elsewhere. Reads the scheduler's
private state, as its tests do; writes nothing of it.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from nanovllm.engine.events import (
    Event,
    RequestAdded,
    SequenceAdmitted,
    SequenceFinished,
    SequencePreempted,
    StepCollected,
    StepDispatched,
)
from nanovllm.engine.policy import POLICIES
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence, SequenceStatus
from nanovllm.log import logger

VERSION = 1


class FlightRecorder:
    """A `Listener`. `num_steps`: of one segment."""

    def __init__(self, scheduler: Scheduler, num_steps: int, folder: str | None = None) -> None:
        self._scheduler = scheduler
        self._num_steps = num_steps
        self._folder = Path(folder or tempfile.gettempdir())
        self._numbers = itertools.count()
        self._live: dict[int, Sequence] = {
            sequence.seq_id: sequence for sequence in [*scheduler.running, *scheduler.waiting, *_siblings(scheduler)]
        }
        self._older: Segment | None = None
        self._segment = Segment(keyframe_of(scheduler))
        self._limits = scheduler.limits
        self._num_dropped = 0  # entries of segments that are gone
        self.facts: dict[str, Any] = {}  # what a record says of model and device

    def on_event(self, event: Event) -> None:
        entries = self._segment.entries
        if isinstance(event, StepDispatched):
            self._note_limits(entries)
            batch = event.batch
            columns = batch.rows, batch.starts, batch.lengths, batch.sampled_chunks
            entries.append(("step", event.time, event.step, *columns, *event[5:9]))
        elif isinstance(event, StepCollected):
            entries.append(("result", *event))
            self._segment.num_steps += 1
            if self._segment.num_steps >= self._num_steps:
                self._num_dropped += len(self._older.entries) if self._older else 0
                self._older, self._segment = self._segment, Segment(keyframe_of(self._scheduler))
        elif isinstance(event, RequestAdded):
            sequences: list[Sequence] = event.request.sequences
            self._live.update((sequence.seq_id, sequence) for sequence in sequences)
            entries.append(("add", event.time, event.request_id, [_birth_of(sequence) for sequence in sequences]))
        elif isinstance(event, SequenceAdmitted):
            row = self._live[event.seq_id].row if event.seq_id in self._live else -1
            entries.append(("admit", event.time, event.seq_id, event.num_tokens, event.num_cached_tokens, row))
        elif isinstance(event, SequencePreempted):
            entries.append(("preempt", event.time, event.seq_id, event.num_tokens))
        elif isinstance(event, SequenceFinished):
            sequence = self._live.pop(event.seq_id, None)
            hashes = sequence.block_hashes if sequence is not None else []
            entries.append(("finish", event.time, event.seq_id, event.reason, event.num_generated_tokens, hashes))

    def _note_limits(self, entries: list[tuple]) -> None:
        """They change between steps; those of this step were in force before its first admission."""
        if self._scheduler.limits is not self._limits:
            self._limits = self._scheduler.limits
            place = len(entries)
            while place and entries[place - 1][0] in ("admit", "preempt"):
                place -= 1
            entries.insert(place, ("limits", dataclasses.asdict(self._limits)))

    def since(self, cursor: int) -> tuple[int, list[tuple] | None]:
        """The cursor of the next call, and the entries that came after `cursor`; None when some of them are gone."""
        entries = [*(self._older.entries if self._older else ()), *self._segment.entries]
        end = self._num_dropped + len(entries)
        return end, entries[cursor - self._num_dropped :] if self._num_dropped <= cursor <= end else None

    # --- the file

    def describe(self) -> dict[str, Any]:
        """The record as plain data. May be called from another thread, while the engine stands or runs."""
        first = self._older or self._segment
        entries = [*(self._older.entries if self._older else ()), *self._segment.entries]
        names = Numbering()
        scheduler = self._scheduler
        live = {str(seq_id): names.of(sequence.block_hashes) for seq_id, sequence in list(self._live.items())}
        return {
            "version": VERSION,
            "written": time.time(),
            "pid": os.getpid(),
            "facts": self.facts,
            "policy": next((name for name, kind in POLICIES.items() if type(scheduler.policy) is kind), None),
            "num_rows": scheduler._num_rows,
            "num_blocks": scheduler.block_manager.num_blocks,
            "block_size": scheduler.block_manager.block_size,
            "prefix_caching": scheduler.block_manager.enable_prefix_caching,
            "keyframe": names.hide(first.keyframe),
            "entries": [names.of_entry(entry) for entry in entries],
            "live": live,
        }

    def dump(self, reason: str) -> str:
        """Write the record; returns the path of the file. It is for this user's eyes."""
        path = self._folder / f"nanovllm-flight-{os.getpid()}-{next(self._numbers)}.json"
        payload = msgspec.json.encode({"reason": reason, **self.describe()})
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(payload)
        logger.warning("flight record (%s): %s; look at it with: nanovllm replay %s", reason, path, path)
        return str(path)


class Segment:
    __slots__ = ("entries", "keyframe", "num_steps")

    def __init__(self, keyframe: dict[str, Any]) -> None:
        self.keyframe, self.entries, self.num_steps = keyframe, [], 0  # type: ignore[var-annotated]


class Numbering:
    """Chained block hashes to small numbers: equal contents stay equal, and nothing can be guessed from them."""

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}

    def of(self, hashes: Iterable[int]) -> list[int]:
        return [self._numbers.setdefault(block_hash, len(self._numbers) + 1) for block_hash in list(hashes)]

    def of_entry(self, entry: tuple) -> tuple:
        return (*entry[:5], self.of(entry[5])) if entry[0] == "finish" else entry

    def hide(self, keyframe: dict[str, Any]) -> dict[str, Any]:
        block_ids, hashes, *more = keyframe["cached"]
        cached = list(zip(block_ids, self.of(hashes), *more))
        sequences = [{**state, "hashes": self.of(state["hashes"])} for state in keyframe["sequences"]]
        return {**keyframe, "cached": cached, "sequences": sequences}


# --- state


def keyframe_of(scheduler: Scheduler) -> dict[str, Any]:
    """All that the scheduler's next decisions depend on. Between two steps."""
    blocks = scheduler.block_manager
    behind = _siblings(scheduler)
    cached = [block for block in blocks._blocks if block.block_hash is not None]
    return {
        "limits": dataclasses.asdict(scheduler.limits),
        "num_steps": scheduler._num_steps,
        "num_steps_decodes_waited": scheduler._num_steps_decodes_waited,
        "refused": scheduler._refused,
        "free_rows": list(scheduler._free_rows),
        "free_blocks": list(blocks._free),
        "num_contents": blocks._num_contents,
        "cached": (
            [block.block_id for block in cached],
            [block.block_hash for block in cached],
            [block.content_id for block in cached],
            [block.parent_id for block in cached],
        ),
        "sequences": [state_of(sequence) for sequence in _with_ended_siblings(scheduler, behind)],
        "siblings": {str(first): [one.seq_id for one in others] for first, others in scheduler._siblings.items()},
        "in_flight": [
            (
                plan.batch.step,
                [s.seq_id for s in plan.sequences],
                plan.batch.starts,
                plan.batch.lengths,
                plan.batch.sampled_chunks,
            )
            for plan in scheduler._in_flight
        ],
    }


def _siblings(scheduler: Scheduler) -> list[Sequence]:
    """Those that wait for the first of their request."""
    return [sequence for others in scheduler._siblings.values() for sequence in others]


def _with_ended_siblings(scheduler: Scheduler, behind: list[Sequence]) -> list[Sequence]:
    """Every sequence that a decision can look at: also ended ones that are in flight or have living siblings."""
    in_flight = [sequence for plan in scheduler._in_flight for sequence in plan.sequences]
    known = {s.seq_id: s for s in [*scheduler.running, *scheduler.waiting, *behind, *in_flight]}
    firsts = {s.sibling.seq_id: s.sibling for s in known.values() if s.sibling is not None}
    return list({**firsts, **known}.values())


def _birth_of(sequence: Sequence) -> dict[str, Any]:
    return {
        "seq_id": sequence.seq_id,
        "index": sequence.index,
        "num_prompt_tokens": sequence.num_prompt_tokens,
        "max_num_tokens": sequence.max_num_tokens,
        "priority": sequence.priority,
        "arrival_time": sequence.arrival_time,
        "reads_whole_prompt": sequence.sampling.reads_whole_prompt,
        "sibling": None if sequence.sibling is None else sequence.sibling.seq_id,
    }


def state_of(sequence: Sequence) -> dict[str, Any]:
    return {
        **_birth_of(sequence),
        "request_id": sequence.request_id,
        "status": sequence.status.value,
        "is_running": sequence.status is SequenceStatus.RUNNING,
        "num_tokens": sequence.num_tokens,
        "num_computed_tokens": sequence.num_computed_tokens,
        "num_pending_tokens": sequence.num_pending_tokens,
        "row": sequence.row,
        "block_table": list(sequence.block_table),
        "content_id": sequence.content_id,
        "num_published_blocks": sequence.num_published_blocks,
        "num_preemptions": sequence.num_preemptions,
        "first_scheduled_time": sequence.first_scheduled_time,
        "hashes": sequence.block_hashes,
    }
