"""Flight recorder: the last steps and requests in memory, and a file of them when something goes wrong.

Kept in two segments, the older of which is dropped when the newer is full: so a record holds between N and 2N steps. A
segment begins with a *keyframe*, the whole state of scheduler and block manager, from which `replay.py` goes on.

It must not stop the engine. A keyframe copies columns into memory that was used before, and walks over no blocks; it gets
the form of the file when one is written. A step is kept as bytes, and a keyframe in few objects, because the garbage
collector looks at all that a list holds. What is dropped goes in parts, with the steps that follow.

No prompt is in the file: blocks of tokens are told apart by numbers that mean nothing elsewhere. Reads the scheduler's
private state, as its tests do; writes nothing of it.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import tempfile
import time
from array import array
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from nanovllm.engine.block_manager import ROOT
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
FINISHED = SequenceStatus.FINISHED
DROPPED_PER_STEP = 32  # entries of a segment that is too old
NUM_SPARE = 2  # sets of arrays: those of a dropped keyframe change a segment later, when no thread reads them any more
encode, decode = msgspec.msgpack.Encoder().encode, msgspec.msgpack.Decoder().decode
Entry = tuple | bytes  # bytes: of a step


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
        self._births = {seq_id: _birth_of(sequence) for seq_id, sequence in self._live.items()}
        self._spare = deque([one[:] for one in arrays_of(scheduler)] for _ in range(NUM_SPARE + 1))
        self._segment = Segment(keyframe_of(scheduler, self._spare.popleft(), self._births))
        self._segments: tuple[Segment, ...] = (self._segment,)  # at most two, the older first
        self._limits = scheduler.limits
        self._num_dropped = 0  # entries of segments that are gone
        self._leaving: list[Any] = []  # some of them, and block tables
        self.facts: dict[str, Any] = {}  # what a record says of model and device

    def on_event(self, event: Event) -> None:
        entries = self._segment.entries
        if isinstance(event, StepDispatched):
            self._note_limits(entries)
            batch = event.batch
            columns = batch.rows, batch.starts, batch.lengths, batch.sampled_chunks
            entries.append(encode(("step", event.time, event.step, *columns, *event[5:9])))
            del self._leaving[-DROPPED_PER_STEP:]
        elif isinstance(event, StepCollected):
            entries.append(("result", *event))
            self._segment.num_steps += 1
            if self._segment.num_steps >= self._num_steps:
                self._begin_segment()
        elif isinstance(event, RequestAdded):
            sequences: list[Sequence] = event.request.sequences
            births = [_birth_of(sequence) for sequence in sequences]
            self._live.update((sequence.seq_id, sequence) for sequence in sequences)
            self._births.update((birth["seq_id"], birth) for birth in births)
            entries.append(("add", event.time, event.request_id, births))
        elif isinstance(event, SequenceAdmitted):
            row = self._live[event.seq_id].row if event.seq_id in self._live else -1
            entries.append(("admit", event.time, event.seq_id, event.num_tokens, event.num_cached_tokens, row))
        elif isinstance(event, SequencePreempted):
            entries.append(("preempt", event.time, event.seq_id, event.num_tokens))
        elif isinstance(event, SequenceFinished):
            sequence = self._live.pop(event.seq_id, None)
            self._births.pop(event.seq_id, None)
            hashes = sequence.block_hashes if sequence is not None else []
            entries.append(("finish", event.time, event.seq_id, event.reason, event.num_generated_tokens, hashes))

    def _begin_segment(self) -> None:
        for old in self._segments[:-1]:
            self._num_dropped += len(old.entries)
            self._leaving = [*old.entries, *old.keyframe["tables"]]  # `describe` may be at work on the others
            self._spare.append(old.keyframe["arrays"])
        self._segment = Segment(keyframe_of(self._scheduler, self._spare.popleft(), self._births))
        self._segments = self._segments[-1], self._segment

    def _note_limits(self, entries: list[Entry]) -> None:
        """They change between steps; those of this step were in force before its first admission."""
        if self._scheduler.limits is not self._limits:
            self._limits = self._scheduler.limits
            place = len(entries)
            while place and entries[place - 1][0] in ("admit", "preempt"):
                place -= 1
            entries.insert(place, ("limits", dataclasses.asdict(self._limits)))

    def since(self, cursor: int) -> tuple[int, list[Entry] | None]:
        """The cursor of the next call, and the entries that came after `cursor`; None when some of them are gone."""
        entries = list(itertools.chain.from_iterable(segment.entries for segment in self._segments))
        end = self._num_dropped + len(entries)
        return end, entries[cursor - self._num_dropped :] if self._num_dropped <= cursor <= end else None

    # --- the file

    def describe(self) -> dict[str, Any]:
        """The record as plain data. May be called from another thread, while the engine stands or runs."""
        segments = self._segments
        entries = list(itertools.chain.from_iterable(segment.entries for segment in segments))
        names = Numbering()
        keyframe = names.hide(segments[0].keyframe)
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
            "keyframe": keyframe,
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
        self.keyframe, self.num_steps = keyframe, 0
        self.entries: list[Entry] = []


class Numbering:
    """Chained block hashes to small numbers: equal contents stay equal, and nothing can be guessed from them."""

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}

    def of(self, hashes: Iterable[int]) -> list[int]:
        return [self._numbers.setdefault(block_hash, len(self._numbers) + 1) for block_hash in list(hashes)]

    def of_entry(self, entry: Entry) -> Any:
        if isinstance(entry, bytes):
            return decode(entry)
        return (*entry[:5], self.of(entry[5])) if entry[0] == "finish" else entry

    def hide(self, keyframe: dict[str, Any]) -> dict[str, Any]:
        """In the form of the file: a row for each sequence and for each cached block."""
        keyframe = dict(keyframe)
        arrays, lengths = [one[:] for one in keyframe.pop("arrays")], keyframe.pop("num_blocks")
        columns = {**keyframe.pop("columns"), "births": keyframe.pop("births")}
        columns["block_table"] = [table[:length] for table, length in zip(keyframe.pop("tables"), lengths)]
        cached = [row for row in zip(itertools.count(), *arrays) if row[2] != ROOT]
        numbers = self.of(row[1] for row in cached)
        return {
            **keyframe,
            "limits": dataclasses.asdict(keyframe["limits"]),
            "cached": [(row[0], number, *row[2:]) for row, number in zip(cached, numbers)],
            "sequences": [self._row(dict(zip(columns, values))) for values in zip(*columns.values())],
        }

    def _row(self, state: dict[str, Any]) -> dict[str, Any]:
        return {**state.pop("births"), **state, "hashes": self.of(state["hashes"]), "status": state["status"].value}


# --- state


def keyframe_of(scheduler: Scheduler, arrays: list[array], births: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """All that the scheduler's next decisions depend on, between two steps. `Numbering.hide` gives it the form of the file.

    The state of blocks is copied into `arrays`. Block tables are not copied: between two steps a table that is there only
    grows or goes, so its length is enough. `births`: by seq_id, of those who have not ended.
    """
    sequences = _sequences(scheduler)
    for copy, one in zip(arrays, arrays_of(scheduler)):
        copy[:] = one
    return {
        "limits": scheduler.limits,
        "num_steps": scheduler._num_steps,
        "num_steps_decodes_waited": scheduler._num_steps_decodes_waited,
        "refused": scheduler._refused,
        "free_rows": list(scheduler._free_rows),
        "free_blocks": list(scheduler.block_manager._free),
        "num_contents": scheduler.block_manager._num_contents,
        "arrays": arrays,
        "births": [births.get(one.seq_id) or _birth_of(one) for one in sequences],
        "tables": [one.block_table for one in sequences],
        "num_blocks": [len(one.block_table) for one in sequences],
        "columns": _columns_of(sequences),
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


def arrays_of(scheduler: Scheduler) -> list[array]:
    """What the block manager knows of the content of each block: hash, content id, parent id."""
    blocks = scheduler.block_manager
    return [blocks._hashes, blocks._content_ids, blocks._parent_ids]


def _siblings(scheduler: Scheduler) -> list[Sequence]:
    """Those that wait for the first of their request."""
    return [sequence for others in scheduler._siblings.values() for sequence in others]


def _sequences(scheduler: Scheduler) -> list[Sequence]:
    """Every sequence that a decision can look at: also ended ones that are in flight or have living siblings."""
    living = [*scheduler.running, *scheduler.waiting, *_siblings(scheduler)]
    in_flight = [one for plan in scheduler._in_flight for one in plan.sequences if one.status is FINISHED]
    firsts = [one.sibling for one in [*living, *in_flight] if one.sibling is not None and one.sibling.status is FINISHED]
    return [*{one.seq_id: one for one in [*firsts, *in_flight]}.values(), *living]


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


def _columns_of(sequences: list[Sequence]) -> dict[str, list[Any]]:
    """What of a sequence changes."""
    return {
        "request_id": [one.request_id for one in sequences],
        "status": [one.status for one in sequences],
        "num_tokens": [len(one.token_ids) for one in sequences],
        "num_computed_tokens": [one.num_computed_tokens for one in sequences],
        "num_pending_tokens": [one.num_pending_tokens for one in sequences],
        "row": [one.row for one in sequences],
        "content_id": [one.content_id for one in sequences],
        "num_published_blocks": [one.num_published_blocks for one in sequences],
        "num_preemptions": [one.num_preemptions for one in sequences],
        "first_scheduled_time": [one.first_scheduled_time for one in sequences],
        # The hashes of those who have not ended come with the entry of their end, or with `live`.
        "hashes": [tuple(one.block_hashes) if one.status is FINISHED else () for one in sequences],
    }
