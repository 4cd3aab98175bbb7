"""What tests share: an executor without a model, and builders that need four integers.

`FakeExecutor` plays the data plane faithfully where it matters to the control plane: it keeps rows, block tables and a
simulated KV cache of tokens. The next token is a function of what it *reads back through the block table*, and a slot
that holds another token than the one that belongs there is an error. So a block that was shared, freed, copied or
reused wrongly cannot go unnoticed.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence as AbstractSequence
from typing import Any

from nanovllm.config import SchedulerLimits
from nanovllm.engine.batch import ScheduledBatch, StepResult
from nanovllm.engine.block_manager import BlockManager, hash_block
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.policy import make_policy
from nanovllm.engine.scheduler import Scheduler
from nanovllm.sampling_params import SamplingParams

VOCAB_SIZE = 50
NextToken = Callable[[AbstractSequence[int], int], int]


def next_token(prefix: AbstractSequence[int], seed: int = 0) -> int:
    """The fake model: any change of the prefix changes the rest of the sequence."""
    return hash((*prefix, seed)) % VOCAB_SIZE


def naive_generate(prompt: list[int], max_tokens: int, stop: tuple[int, ...] = (), next_one: NextToken = next_token) -> list[int]:
    """The oracle: one sequence, no cache, no batch."""
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(next_one(tokens, 0))
        if tokens[-1] in stop:
            break
    return tokens[len(prompt) :]


class FakeExecutor:
    """Computes at dispatch, delivers at collect. `log` records the order of ("dispatch" | "collect", step)."""

    def __init__(self, num_blocks: int, block_size: int, next_one: NextToken = next_token, seconds_per_step: float = 0.0) -> None:
        self.block_size = block_size
        self.next_one = next_one
        self.seconds_per_step = seconds_per_step
        self.log: list[tuple[str, int]] = []
        self.batches: list[ScheduledBatch] = []
        self._slots: list[list[int | None]] = [[None] * block_size for _ in range(num_blocks)]
        self._tokens: dict[int, list[int]] = {}  # row -> tokens on the device
        self._tables: dict[int, list[int]] = {}
        self._pending: deque[tuple[float, StepResult]] = deque()
        self._ready_at = 0.0

    def dispatch(self, batch: ScheduledBatch) -> None:
        self.log.append(("dispatch", batch.step))
        self.batches.append(batch)
        for seat in batch.seats:
            self._tokens[seat.row] = list(seat.token_ids)
            self._tables[seat.row] = []
        for source, destination in batch.block_copies:
            self._slots[destination] = list(self._slots[source])
        for row, first, block_ids in batch.block_updates:
            table = self._tables[row]
            assert first <= len(table), "a block update leaves a hole"
            table[first : first + len(block_ids)] = block_ids
        for row, start, length in zip(batch.rows, batch.starts, batch.lengths):
            for position in range(start, start + length):  # as in each layer: all KV of the step is written first
                self._slots[self._block(row, position)][position % self.block_size] = self._tokens[row][position]
        drawn = [[self._draw(batch, chunk)] for chunk in batch.sampled_chunks]
        self._ready_at = max(self._ready_at, time.monotonic()) + self.seconds_per_step
        self._pending.append((self._ready_at, StepResult(batch.step, drawn)))

    def collect(self) -> StepResult:
        ready_at, result = self._pending.popleft()
        time.sleep(max(0.0, ready_at - time.monotonic()))
        self.log.append(("collect", result.step))
        return result

    def begin_draw(self) -> None:
        pass

    def close(self) -> None:
        self._pending.clear()

    def _block(self, row: int, position: int) -> int:
        return self._tables[row][position // self.block_size]

    def _draw(self, batch: ScheduledBatch, chunk: int) -> int:
        row, end = batch.rows[chunk], batch.starts[chunk] + batch.lengths[chunk]
        context = [self._slots[self._block(row, position)][position % self.block_size] for position in range(end)]
        assert context == self._tokens[row][:end], f"row {row} reads KV that is not its own"
        token = self.next_one(context, 0)  # type: ignore[arg-type]
        del self._tokens[row][end:]
        self._tokens[row].append(token)
        return token


class CountingExecutor:
    """Draws without looking: for measuring the host side alone."""

    def __init__(self) -> None:
        self._pending: deque[StepResult] = deque()

    def dispatch(self, batch: ScheduledBatch) -> None:
        self._pending.append(StepResult(batch.step, [[7] for _ in batch.sampled_chunks]))

    def collect(self) -> StepResult:
        return self._pending.popleft()

    def begin_draw(self) -> None:
        pass

    def close(self) -> None:
        self._pending.clear()


def make_scheduler(
    num_blocks: int = 64,
    block_size: int = 4,
    max_num_seqs: int = 8,
    budget: int = 64,
    policy: str = "fcfs",
    prefix_caching: bool = True,
    hash_function: Callable[[int, bytes], int] = hash_block,
    **limits: Any,
) -> Scheduler:
    blocks = BlockManager(num_blocks, block_size, prefix_caching, hash_function)
    return Scheduler(blocks, SchedulerLimits(max_num_seqs, budget, **limits), make_policy(policy))


def make_engine(
    scheduler: Scheduler | None = None,
    *,
    num_steps_ahead: int = 1,
    next_one: NextToken = next_token,
    eos: tuple[int, ...] = (),
    max_model_len: int = 10_000,
    seconds_per_step: float = 0.0,
    **options: Any,
) -> LLMEngine:
    scheduler = scheduler or make_scheduler(**options)
    blocks = scheduler.block_manager
    executor = FakeExecutor(blocks.num_blocks, blocks.block_size, next_one, seconds_per_step)
    limit = min(max_model_len, blocks.num_blocks * blocks.block_size)
    return LLMEngine(
        scheduler, executor, vocab_size=VOCAB_SIZE, max_model_len=limit, eos_token_ids=eos, num_steps_ahead=num_steps_ahead
    )


def greedy(max_tokens: int = 8, **options: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, **options)


def drain(engine: LLMEngine) -> None:
    """Step to the end, checking the books after every step."""
    while engine.has_work:
        engine.step()
        engine.scheduler.check_invariants()


def assert_nothing_is_held(engine: LLMEngine) -> None:
    scheduler = engine.scheduler
    scheduler.check_invariants()
    assert not scheduler.waiting and not scheduler.running and not scheduler.num_in_flight
    assert scheduler.block_manager.num_free_blocks == scheduler.block_manager.num_blocks
    assert not engine._requests and not scheduler._siblings
