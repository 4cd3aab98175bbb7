"""Scheduler: which tokens of which sequences the next step computes.

There is no prefill phase and no decode phase. A step is a budget of tokens, handed out to running sequences first and
to waiting ones with what is left; each sequence's `num_computed_tokens` chases its `num_tokens`. Chunked prompts,
prefix hits, preemption and recomputation all are this one chase.

The scheduler runs ahead of the device: `schedule()` may be called again before the tokens of the last step are known.
A sampled token then counts as *pending*; it already has a position, and a block if it needs one. `apply()` brings the
tokens in, in order. A sequence that turns out to have ended leaves at once: whatever a step in flight still writes for
it lands, in stream order, before anything that reuses its row and its blocks, and what that step draws is dropped here.

Only the scheduler writes a `Sequence`. Knows no tensors and no text. Read next: `llm_engine.py`.
"""

from __future__ import annotations

import time
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from nanovllm.config import SchedulerLimits
from nanovllm.engine.batch import BlockCopy, BlockUpdate, ScheduledBatch, Seat, StepResult
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.events import Events, SequenceAdmitted, SequenceFinished, SequencePreempted
from nanovllm.engine.policy import FirstComeFirstServed, SchedulerPolicy
from nanovllm.engine.sequence import Sequence, SequenceStatus
from nanovllm.errors import NONFINITE_LOGITS, ConfigError, did_you_mean


@dataclass(slots=True)
class _Plan:
    """One step under construction."""

    batch: ScheduledBatch
    budget: int
    sequences: list[Sequence] = field(default_factory=list)  # one per chunk
    has_preempted: bool = False


class Scheduler:
    """Queues, budget, preemption. `schedule` and `apply` alternate, up to the number of steps in flight."""

    def __init__(
        self,
        block_manager: BlockManager,
        limits: SchedulerLimits = SchedulerLimits(),
        policy: SchedulerPolicy | None = None,
        events: Events | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.block_manager = block_manager
        self.limits = limits
        self.policy = policy or FirstComeFirstServed()
        self.events = events or Events()
        self.waiting: list[Sequence] = []  # by rank
        self.running: list[Sequence] = []  # by rank; the last one is preempted first
        self.finished: list[Sequence] = []  # ended since `take_finished` was last called
        self._num_rows = limits.max_num_seqs
        self._free_rows = list(reversed(range(self._num_rows)))
        self._in_flight: deque[_Plan] = deque()
        self._siblings: dict[int, list[Sequence]] = {}  # seq_id of index 0 -> those that wait for its prompt's KV
        self._refused = (-1, 0)  # seq_id and number of free blocks of the last admission that failed
        self._num_steps = 0
        self._num_steps_decodes_waited = 0
        self._clock = clock

    # --- the door

    def add(self, sequences: list[Sequence]) -> None:
        """The sequences of one request. The first computes the prompt; the others join when it is done."""
        first, *others = sequences
        if others:
            self._siblings[first.seq_id] = others
        insort(self.waiting, first, key=self.policy.rank)

    def resume(self, sequence: Sequence, token_ids: list[int]) -> None:
        """Before its first step: it drew these tokens in an earlier process, and goes on as after a preemption."""
        sequence.num_preemptions += 1
        self._append(sequence, token_ids)

    def set_limits(self, **changes: Any) -> SchedulerLimits:
        """Change limits between two steps. `max_num_seqs` cannot exceed what the engine was started with."""
        known = SchedulerLimits.__dataclass_fields__
        for name in changes.keys() - known.keys():
            raise ConfigError(f"unknown limit {name!r}{did_you_mean(name, known)} (limits: {', '.join(known)})")
        limits = replace(self.limits, **changes)
        if limits.max_num_seqs > self._num_rows:
            raise ConfigError(f"max_num_seqs={limits.max_num_seqs}: the engine was started with room for {self._num_rows}")
        self.limits = limits
        self._refused = (-1, 0)
        return limits

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running or self._in_flight)

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    # --- one step down

    def schedule(self) -> ScheduledBatch | None:
        """The next step's batch; None when nothing can be computed before more results are applied."""
        if len(self._in_flight) > 1 and self._in_flight[-1].batch.matchers:
            return None  # that step draws when the next one is dispatched; its grammars must have read the tokens before
        plan = _Plan(ScheduledBatch(self._num_steps), self.limits.max_num_batched_tokens)
        if self.policy.decodes_may_wait(self._num_steps_decodes_waited):
            self._continue_running(plan, prompts_only=True)
            self._admit_waiting(plan)
        self._num_steps_decodes_waited = self._num_steps_decodes_waited + 1 if plan.sequences else 0
        if not plan.sequences:
            self._continue_running(plan, prompts_only=False)
            if not plan.has_preempted:
                self._admit_waiting(plan)
        if not plan.sequences:
            return None
        self._num_steps += 1
        self._in_flight.append(plan)
        return plan.batch

    def _continue_running(self, plan: _Plan, prompts_only: bool) -> None:
        running = self.running
        index = 0
        while index < len(running) and plan.budget > 0:  # the list shrinks at its end when sequences are preempted
            sequence = running[index]
            index += 1
            num_new_tokens = sequence.num_uncomputed_tokens
            if num_new_tokens <= 0 or (prompts_only and sequence.num_computed_tokens >= sequence.num_prompt_tokens):
                continue
            num_new_tokens = self._clip(num_new_tokens, plan)
            if self._make_room(sequence, sequence.num_computed_tokens + num_new_tokens, plan):
                self._add_chunk(sequence, num_new_tokens, plan)

    def _admit_waiting(self, plan: _Plan) -> None:
        max_running = min(self.limits.max_num_seqs, self.limits.max_num_batched_tokens)  # each needs a token per step
        while self.waiting and plan.budget > 0 and self._free_rows and len(self.running) < max_running:
            sequence = self.waiting[0]
            if sequence.num_pending_tokens or self._is_known_to_wait(sequence):
                return  # nobody overtakes: it is preempted with a token in flight, or there is no room for it yet
            if not self._admit(sequence, plan):
                self._refused = sequence.seq_id, self.block_manager.num_free_blocks
                return
            self._add_chunk(sequence, self._clip(sequence.num_uncomputed_tokens, plan), plan)

    def _is_known_to_wait(self, sequence: Sequence) -> bool:
        """It did not fit, others still run, and no block came free since: do not look its prefix up again."""
        seq_id, num_free_blocks = self._refused
        return seq_id == sequence.seq_id and bool(self.running) and self.block_manager.num_free_blocks <= num_free_blocks

    def _clip(self, num_new_tokens: int, plan: _Plan) -> int:
        return 1 if num_new_tokens == 1 else min(num_new_tokens, plan.budget, self.limits.max_prompt_chunk or plan.budget)

    def _add_chunk(self, sequence: Sequence, num_new_tokens: int, plan: _Plan) -> None:
        batch = plan.batch
        start = sequence.num_computed_tokens
        end = start + num_new_tokens
        if end == len(sequence.token_ids) + sequence.num_pending_tokens:
            if sequence.matcher is not None:
                batch.matchers[len(batch.sampled_chunks)] = sequence.matcher
            batch.sampled_chunks.append(len(plan.sequences))
            sequence.num_pending_tokens += 1
        plan.sequences.append(sequence)
        batch.rows.append(sequence.row)
        batch.starts.append(start)
        batch.lengths.append(num_new_tokens)
        plan.budget -= num_new_tokens
        sequence.num_computed_tokens = end
        if num_new_tokens > 1:  # later prompts may share these blocks from now on: their reads come after these writes
            self._publish(sequence)

    # --- blocks and rows

    def _admit(self, sequence: Sequence, plan: _Plan) -> bool:
        """Seat `sequence` in a row, on shared blocks as far as they go and fresh ones for the rest of its tokens."""
        blocks = self.block_manager
        match = blocks.match_prefix(sequence)
        num_shared_tokens = match.num_blocks * blocks.block_size
        shared = match.block_ids
        if self._can_fork(sequence):
            num_shared_tokens = sequence.num_prompt_tokens - 1  # the last one is computed again, for its logits
            shared = shared + sequence.sibling.block_table[match.num_blocks : blocks.num_blocks_for(num_shared_tokens)]  # type: ignore[union-attr]
        num_missing = blocks.num_blocks_for(sequence.num_tokens) - len(shared) + (num_shared_tokens % blocks.block_size > 0)
        reserve = int(self.limits.watermark * blocks.num_blocks) if self.running else 0
        if blocks.num_free_blocks - blocks.num_free_among(shared) < num_missing + reserve:
            return False
        blocks.share(shared)
        blocks.count_query(sequence.num_tokens, num_shared_tokens)
        self.waiting.pop(0)
        sequence.status = SequenceStatus.RUNNING
        sequence.row = self._free_rows.pop()
        sequence.block_table = list(shared)
        sequence.content_id, sequence.num_published_blocks = match.content_id, match.num_blocks
        sequence.num_computed_tokens = num_shared_tokens
        insort(self.running, sequence, key=self.policy.rank)
        plan.batch.seats.append(Seat(sequence.row, list(sequence.token_ids), sequence.sampling))
        if shared:
            plan.batch.block_updates.append(BlockUpdate(sequence.row, 0, list(shared)))
        self._extend(sequence, sequence.num_tokens, plan)
        self._note_admission(sequence, num_shared_tokens)
        return True

    def _can_fork(self, sequence: Sequence) -> bool:
        """The sibling's prompt KV was complete before its first token arrived, and is where it was."""
        sibling = sequence.sibling
        return (
            sibling is not None
            and sibling.status is SequenceStatus.RUNNING
            and sibling.num_preemptions == 0
            and sequence.num_generated_tokens == 0
        )

    def _make_room(self, sequence: Sequence, end: int, plan: _Plan) -> bool:
        """Blocks for tokens [0, end) of a running sequence, preempting from the tail. False: it was preempted itself."""
        while not self._extend(sequence, end, plan):
            victim = self.running[-1]
            self._preempt(victim)
            plan.has_preempted = True
            if victim is sequence:
                return False
        return True

    def _extend(self, sequence: Sequence, end: int, plan: _Plan) -> bool:
        """Append blocks up to `end`, and copy the block that the next write falls into if others rely on it."""
        blocks, table, start = self.block_manager, sequence.block_table, sequence.num_computed_tokens
        num_missing = blocks.num_blocks_for(end) - len(table)
        is_copy = start % blocks.block_size > 0 and blocks.is_shared(table[start // blocks.block_size])
        if not is_copy and num_missing <= 0:
            return True
        if blocks.num_free_blocks < num_missing + is_copy:
            return False
        if is_copy:
            self._copy_on_write(sequence, start // blocks.block_size, plan)
        if num_missing > 0:
            block_ids = blocks.allocate(num_missing)
            plan.batch.block_updates.append(BlockUpdate(sequence.row, len(table), block_ids))
            table.extend(block_ids)
        return True

    def _copy_on_write(self, sequence: Sequence, block_index: int, plan: _Plan) -> None:
        source = sequence.block_table[block_index]
        destination = self.block_manager.allocate(1)[0]
        self.block_manager.free([source])
        sequence.block_table[block_index] = destination
        plan.batch.block_copies.append(BlockCopy(source, destination))
        plan.batch.block_updates.append(BlockUpdate(sequence.row, block_index, [destination]))

    def _publish(self, sequence: Sequence) -> None:
        """Put the blocks that are full of known, dispatched tokens into the prefix index."""
        if not self.block_manager.enable_prefix_caching:
            return
        num_full = min(sequence.num_computed_tokens, len(sequence.token_ids)) // self.block_manager.block_size
        while sequence.num_published_blocks < num_full and sequence.content_id is not None:
            sequence.content_id = self.block_manager.publish(sequence, sequence.num_published_blocks, sequence.content_id)
            sequence.num_published_blocks += 1

    def _preempt(self, sequence: Sequence) -> None:
        """Give everything back and wait again; cached blocks usually survive, the rest is recomputed."""
        self._leave(sequence)
        sequence.status = SequenceStatus.WAITING
        sequence.num_preemptions += 1
        insort(self.waiting, sequence, key=self.policy.rank)
        if self.events.listeners:
            self.events.emit(SequencePreempted(self._clock(), sequence.request_id, sequence.seq_id, sequence.num_tokens))

    def _leave(self, sequence: Sequence) -> None:
        _remove(self.running, sequence, self.policy)
        self.block_manager.free(sequence.block_table)
        self._free_rows.append(sequence.row)
        sequence.block_table, sequence.row, sequence.num_computed_tokens = [], -1, 0

    def _note_admission(self, sequence: Sequence, num_shared_tokens: int) -> None:
        if sequence.first_scheduled_time is None:
            sequence.first_scheduled_time = self._clock()
            sequence.num_cached_tokens = num_shared_tokens
        if self.events.listeners:
            event = SequenceAdmitted(self._clock(), sequence.request_id, sequence.seq_id, sequence.num_tokens, num_shared_tokens)
            self.events.emit(event)

    # --- one step up

    def apply(self, result: StepResult) -> list[Sequence]:
        """Bring the tokens of the oldest step in flight into their sequences. Returns those that grew."""
        plan = self._in_flight.popleft()
        if result.step != plan.batch.step:
            raise RuntimeError(f"result of step {result.step} arrived, step {plan.batch.step} was expected")
        grown = []
        for entry, chunk in enumerate(plan.batch.sampled_chunks):
            sequence = plan.sequences[chunk]
            sequence.num_pending_tokens -= 1
            if result.token_ids[entry][0] < 0:  # no token
                self.finish(sequence, "error", NONFINITE_LOGITS)
            elif sequence.status is not SequenceStatus.FINISHED:  # else it ended meanwhile, and this token never was
                if result.logprobs is not None and (logprobs := result.logprobs[entry]) is not None:
                    sequence.logprobs.append(logprobs)
                self._append(sequence, result.token_ids[entry])
                grown.append(sequence)
        for chunk, logprobs in result.prompt_logprobs.items():
            start = plan.batch.starts[chunk]
            plan.sequences[chunk].prompt_logprobs[start : start + len(logprobs)] = logprobs
        for chunk, embedding in result.embeddings.items():
            plan.sequences[chunk].embedding = embedding
        return grown

    def _append(self, sequence: Sequence, token_ids: list[int]) -> None:
        is_first = self._siblings and sequence.num_generated_tokens == 0
        reason = None
        for token_id in token_ids:
            sequence.token_ids.append(token_id)
            reason = self._finish_reason(sequence, token_id)
            if reason:
                break
        if (sequence.num_published_blocks + 1) * self.block_manager.block_size <= sequence.num_computed_tokens:
            self._publish(sequence)
        if is_first:
            self._release_siblings(sequence)
        if reason:
            last = sequence.token_ids[-1]
            self.finish(sequence, reason, last if reason == "stop" and last in sequence.params.stop_token_ids else None)

    def _release_siblings(self, sequence: Sequence) -> None:
        """The prompt's KV is there (or never will be): the other completions of the request may be admitted."""
        for sibling in self._siblings.pop(sequence.seq_id, ()):
            insort(self.waiting, sibling, key=self.policy.rank)

    def _finish_reason(self, sequence: Sequence, token_id: int) -> str | None:
        if (matcher := sequence.matcher) is not None and (reason := matcher.accept(token_id)):
            return reason
        if token_id in sequence.stop_token_ids and sequence.num_generated_tokens >= sequence.params.min_tokens:
            return "stop"
        return "length" if len(sequence.token_ids) >= sequence.max_num_tokens else None

    def finish(self, sequence: Sequence, reason: str, stop_reason: int | str | None = None) -> None:
        """End a sequence in whatever state it is: stop token, limit, stop string, error, abort. Ending twice is harmless."""
        if sequence.status is SequenceStatus.FINISHED:
            return
        self._release_siblings(sequence)
        if sequence.status is SequenceStatus.RUNNING:
            self._leave(sequence)
        elif sequence.sibling is not None and sequence in (behind := self._siblings.get(sequence.sibling.seq_id, ())):
            behind.remove(sequence)  # type: ignore[union-attr]  # a found one is in a list
        else:
            _remove(self.waiting, sequence, self.policy)
        sequence.status = SequenceStatus.FINISHED
        sequence.finish_reason, sequence.stop_reason = reason, stop_reason
        self.finished.append(sequence)
        if self.events.listeners:
            num_tokens = sequence.num_generated_tokens
            self.events.emit(SequenceFinished(self._clock(), sequence.request_id, sequence.seq_id, reason, num_tokens))

    def take_finished(self) -> list[Sequence]:
        """The sequences that ended since the last call."""
        finished, self.finished = self.finished, []
        return finished

    # --- for tests and the watchdog

    def check_invariants(self) -> None:
        """Raise AssertionError unless queues, rows, counts and blocks agree."""
        self.block_manager.check_invariants([sequence.block_table for sequence in self.running])
        rows = sorted(self._free_rows + [sequence.row for sequence in self.running])
        _require(rows == list(range(self._num_rows)), f"rows are lost or used twice: {rows}")
        for queue, status in ((self.waiting, SequenceStatus.WAITING), (self.running, SequenceStatus.RUNNING)):
            ranks = [self.policy.rank(sequence) for sequence in queue]
            _require(ranks == sorted(ranks), f"the {status.value} queue is out of order: {ranks}")
            _require(all(sequence.status is status for sequence in queue), f"wrong status in the {status.value} queue")
        for sequence in self.waiting:
            _require(not sequence.block_table and sequence.row == -1, f"waiting sequence {sequence.seq_id} holds something")
        for sequence in self.running:
            known = sequence.num_tokens + sequence.num_pending_tokens
            _require(0 <= sequence.num_computed_tokens <= known, f"sequence {sequence.seq_id} computed past its end")
            capacity = len(sequence.block_table) * self.block_manager.block_size
            _require(sequence.num_computed_tokens <= capacity, f"sequence {sequence.seq_id} computed past its blocks")


def _remove(queue: list[Sequence], sequence: Sequence, policy: SchedulerPolicy) -> None:
    """O(log n) search by rank, which is unique."""
    del queue[bisect_left(queue, policy.rank(sequence), key=policy.rank)]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)
