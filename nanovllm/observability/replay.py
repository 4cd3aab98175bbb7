"""Replay: the real scheduler again, on what a flight recorder has seen, and where its decisions differ.

Arrivals, aborts and ends of sequences come from the record; every batch, admission and preemption is decided anew and
compared. Tokens are invented such that blocks are equal exactly where they were: the last token of a full block is the
record's number of the block's whole prefix, all other tokens are 0. So prefix hits repeat without anybody's prompt.
The same code on the same record agrees in every step; after a change of the scheduler, the first difference is what it did.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from nanovllm.config import SchedulerLimits
from nanovllm.engine.batch import RowSampling, ScheduledBatch, StepResult
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.events import Event, Events, SequenceAdmitted, SequencePreempted
from nanovllm.engine.policy import make_policy
from nanovllm.engine.scheduler import Scheduler, _Plan
from nanovllm.engine.sequence import Sequence, SequenceStatus
from nanovllm.errors import ConfigError
from nanovllm.observability.flight_recorder import VERSION
from nanovllm.sampling_params import SamplingParams

R = TypeVar("R", bound="Replay")
COLUMNS = ("rows", "starts", "lengths", "sampled")


@dataclass(frozen=True, slots=True)
class Difference:
    """The first step in which the scheduler decided otherwise."""

    step: int
    what: str
    recorded: Any
    replayed: Any

    def __str__(self) -> str:
        return f"step {self.step}: {self.what}: recorded {self.recorded}, replayed {self.replayed}"


@dataclass(frozen=True, slots=True)
class ReplayReport:
    reason: str  # why the record was written
    num_steps: int  # compared, up to the first difference
    num_requests: int  # that arrived meanwhile
    difference: Difference | None

    def __str__(self) -> str:
        seen = f"flight record ({self.reason}): {self.num_steps} steps and {self.num_requests} arrivals replayed"
        return f"{seen}; {self.difference or 'every decision is the same'}"


def replay_file(path: str, policy: str | None = None) -> ReplayReport:
    """`policy`: another scheduling policy than the recorded one, to see where it would have decided otherwise."""
    return run_record(read_record(path), path, policy)[1]


def read_record(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} is not a flight record: {error}") from error


def run_record(payload: bytes, name: str, policy: str | None = None, kind: type[R] | None = None) -> tuple[R, ReplayReport]:
    """Replay the bytes of a record to its end, as a `kind` of `Replay`. `name`: of the record, in errors (`ConfigError`)."""
    try:
        record = msgspec.json.decode(payload)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{name} is not a flight record: {error}") from error
    if not isinstance(record, dict) or record.get("version") != VERSION:
        raise ConfigError(f"{name} is not a flight record of version {VERSION}")
    try:
        replay = (kind or Replay)(record, policy)
        return replay, replay.run()  # type: ignore[return-value]  # a Replay when no kind is asked for
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ConfigError(f"{name} is damaged: {error!r}") from error


class Replay:
    def __init__(self, record: Mapping[str, Any], policy: str | None = None) -> None:
        policy = policy or record["policy"]
        if policy is None:
            raise ConfigError("the record was made with a policy that is not in POLICIES; say which one to replay")
        self.record = record
        self.sequences: dict[int, Sequence] = {}
        self._decisions: list[tuple] = []  # admissions and preemptions of the step being scheduled
        self._hashes = _hashes_of(record)
        self._ends = {entry[2]: (entry[3], entry[4]) for entry in record["entries"] if entry[0] == "finish"}
        blocks = BlockManager(record["num_blocks"], record["block_size"], record["prefix_caching"], _Identity())
        limits = SchedulerLimits(**record["keyframe"]["limits"])
        self.scheduler = Scheduler(blocks, limits, make_policy(policy), Events([self]))
        self._restore(record["keyframe"], record["num_rows"])

    def on_event(self, event: Event) -> None:
        if isinstance(event, SequenceAdmitted):
            self._decisions.append(("admit", event.seq_id, event.num_cached_tokens))
        elif isinstance(event, SequencePreempted):
            self._decisions.append(("preempt", event.seq_id))

    def run(self) -> ReplayReport:
        num_steps = num_requests = 0
        difference = None
        expected: list[tuple] = []  # decisions of the step that comes next in the record
        ends: list[tuple[int, str]] = []  # that the next result must bring
        for kind, *entry in self.record["entries"]:
            if kind == "add":
                num_requests += 1
                self._add(entry[1], entry[2])
            elif kind == "limits":
                self.scheduler.set_limits(**entry[0])
            elif kind in ("admit", "preempt"):
                expected.append(("admit", entry[1], entry[3]) if kind == "admit" else ("preempt", entry[1]))
            elif kind == "finish" and entry[2] == "abort":
                self.scheduler.finish(self.sequences[entry[1]], "abort")
            elif kind == "finish":
                ends.append((entry[1], entry[2]))
            elif kind == "step":
                num_steps += 1
                difference = self._compare_step(entry, expected)
                expected = []
            elif kind == "result":
                difference = self._apply(entry[1], ends)
                ends = []
            if difference is not None:
                break
        return ReplayReport(self.record["reason"], num_steps, num_requests, difference)

    def _compare_step(self, entry: list[Any], expected: list[tuple]) -> Difference | None:
        self._decisions = []
        step, recorded = entry[1], entry[2:6]
        batch = self.scheduler.schedule()
        if self._decisions != expected:
            return Difference(step, "admissions and preemptions", expected, self._decisions)
        if batch is None:
            return Difference(step, "batch", "one of %d chunks" % len(recorded[0]), "none")  # noqa: UP031
        for name, old, new in zip(COLUMNS, recorded, (batch.rows, batch.starts, batch.lengths, batch.sampled_chunks)):
            if old != new:
                return Difference(step, name, old, new)
        num_free = self.scheduler.block_manager.num_free_blocks
        return None if num_free == entry[8] else Difference(step, "free blocks", entry[8], num_free)

    def _apply(self, step: int, ends: list[tuple[int, str]]) -> Difference | None:
        plan = self.scheduler._in_flight[0]
        if plan.batch.step != step:
            return Difference(step, "order of results", step, plan.batch.step)
        chosen = [plan.sequences[chunk] for chunk in plan.batch.sampled_chunks]
        self.scheduler.apply(StepResult(step, [[self._token(one.seq_id, one.num_tokens)] for one in chosen]))
        for seq_id, reason in ends:  # a stop string is seen after the scheduler, whose own ends come by themselves
            self.scheduler.finish(self.sequences[seq_id], reason)
        ended = sorted(sequence.seq_id for sequence in self.scheduler.take_finished() if sequence.finish_reason != "abort")
        recorded = sorted(seq_id for seq_id, _ in ends)
        return None if ended == recorded else Difference(step, "sequences that ended", recorded, ended)

    # --- sequences whose tokens are invented

    def _add(self, request_id: str, births: list[dict[str, Any]]) -> None:
        self.scheduler.add([self._make(request_id, birth, birth["num_prompt_tokens"]) for birth in births])

    def _make(self, request_id: str, birth: Mapping[str, Any], num_tokens: int) -> Sequence:
        seq_id = birth["seq_id"]
        reason, num_generated = self._ends.get(seq_id, ("", 0))
        stop_token_ids: tuple[int, ...] = ()
        if reason in ("stop", "error") and num_generated:
            stop_token_ids = (self._token(seq_id, birth["num_prompt_tokens"] + num_generated - 1),)
        params = SamplingParams(
            max_tokens=None, min_tokens=max(num_generated, 0), prompt_logprobs=0 if birth["reads_whole_prompt"] else None
        )
        sequence = self.sequences[seq_id] = Sequence(
            seq_id=seq_id,
            request_id=request_id,
            index=birth["index"],
            num_prompt_tokens=birth["num_prompt_tokens"],
            max_num_tokens=birth["max_num_tokens"],
            sampling=RowSampling(params, 0, stop_token_ids, (), birth["num_prompt_tokens"]),
            stop_token_ids=frozenset(stop_token_ids),
            priority=birth["priority"],
            arrival_time=birth["arrival_time"],
            sibling=self.sequences.get(birth["sibling"]) if birth["sibling"] is not None else None,
            token_ids=[self._token(seq_id, position) for position in range(num_tokens)],
        )
        return sequence

    def _token(self, seq_id: int, position: int) -> int:
        block, place = divmod(position, self.record["block_size"])
        hashes = self._hashes.get(seq_id, ())
        is_last = place == self.record["block_size"] - 1
        return hashes[block] if is_last and block < len(hashes) else 0

    # --- the state at the beginning

    def _restore(self, keyframe: Mapping[str, Any], num_rows: int) -> None:
        scheduler = self.scheduler
        for state in keyframe["sequences"]:
            sequence = self._make(state["request_id"], state, state["num_tokens"])
            for name in ("num_computed_tokens", "num_pending_tokens", "row", "block_table", "content_id"):
                setattr(sequence, name, state[name])
            for name in ("num_published_blocks", "num_preemptions", "first_scheduled_time"):
                setattr(sequence, name, state[name])
            sequence.block_hashes = list(state["hashes"])
            sequence.status = SequenceStatus(state["status"])
        for state in keyframe["sequences"]:  # a sibling may have come later in the list
            if state["sibling"] is not None:
                self.sequences[state["seq_id"]].sibling = self.sequences.get(state["sibling"])
        behind = {int(first): [self.sequences[i] for i in others] for first, others in keyframe["siblings"].items()}
        hidden = {sequence.seq_id for others in behind.values() for sequence in others}
        queued = [sequence for sequence in self.sequences.values() if sequence.seq_id not in hidden]
        rank = scheduler.policy.rank
        scheduler.running = sorted((one for one in queued if one.status is SequenceStatus.RUNNING), key=rank)
        scheduler.waiting = sorted((one for one in queued if one.status is SequenceStatus.WAITING), key=rank)
        scheduler._siblings = behind
        scheduler._num_rows, scheduler._free_rows = num_rows, list(keyframe["free_rows"])
        scheduler._num_steps = keyframe["num_steps"]
        scheduler._num_steps_decodes_waited = keyframe["num_steps_decodes_waited"]
        scheduler._refused = tuple(keyframe["refused"])
        for step, seq_ids, starts, lengths, sampled in keyframe["in_flight"]:
            rows = [self.sequences[seq_id].row for seq_id in seq_ids]
            plan = _Plan(ScheduledBatch(step, rows, starts, lengths, sampled), 0)
            plan.sequences.extend(self.sequences[seq_id] for seq_id in seq_ids)
            scheduler._in_flight.append(plan)
        self._restore_blocks(keyframe)

    def _restore_blocks(self, keyframe: Mapping[str, Any]) -> None:
        manager = self.scheduler.block_manager
        size = manager.block_size
        for sequence in self.scheduler.running:
            for block_id in sequence.block_table:
                manager._blocks[block_id].ref_count += 1
        manager._free.clear()
        manager._free.update(dict.fromkeys(keyframe["free_blocks"]))
        manager._num_contents = keyframe["num_contents"]
        for block_id, number, content_id, parent_id in keyframe["cached"]:
            block = manager._index[number] = manager._blocks[block_id]
            tokens = Sequence(0, "", 0, 0, 0, _NO_SAMPLING, frozenset(), token_ids=[0] * (size - 1) + [number])
            block.token_ids, manager._hashes[block_id] = manager._tokens_of(tokens, 0), number
            manager._content_ids[block_id], manager._parent_ids[block_id] = content_id, parent_id


class _Identity:
    """In place of a hash: the number that the last token is. A block without one is like no other."""

    def __init__(self) -> None:
        self._others = itertools.count(1 << 63)

    def __call__(self, previous: int, token_bytes: bytes) -> int:
        number = int.from_bytes(token_bytes[-4:], "little")
        return number or next(self._others)


_NO_SAMPLING = RowSampling(SamplingParams(), 0, (), (), 0)


def _hashes_of(record: Mapping[str, Any]) -> dict[int, list[int]]:
    """Numbers of the blocks of each sequence, as far as they were ever known: the latest mention knows most."""
    hashes = {state["seq_id"]: state["hashes"] for state in record["keyframe"]["sequences"]}
    hashes |= {entry[2]: entry[5] for entry in record["entries"] if entry[0] == "finish"}
    return hashes | {int(seq_id): numbers for seq_id, numbers in record["live"].items()}
