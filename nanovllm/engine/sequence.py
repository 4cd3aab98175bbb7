"""Sequence: one stream of tokens, and how far it has got.

There are no phases. `num_computed_tokens` chases `num_tokens`; prompt chunks, prefix hits, decoding and recomputing
after a preemption are the same chase from different starting points. All counts below are half-open ranges from 0:

    [0, num_cached_tokens)        KV shared when the sequence was first admitted
    [0, num_computed_tokens)      KV dispatched: written, or being written by a step in flight
    [0, num_tokens)               tokens known on the host
    [num_tokens, num_tokens + num_pending_tokens)   sampled on the device, not yet seen by the host

Only the scheduler writes a Sequence. Read next: `block_manager.py`, then `scheduler.py`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from nanovllm.engine.batch import RowSampling
from nanovllm.outputs import PositionLogprobs
from nanovllm.sampling_params import SamplingParams
from nanovllm.structured.base import Matcher


class SequenceStatus(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """One of the n completions of a request, prompt included."""

    # --- fixed on arrival
    seq_id: int
    request_id: str
    index: int  # which of the request's n completions
    num_prompt_tokens: int
    max_num_tokens: int  # prompt and output together, never above max_model_len
    sampling: RowSampling
    stop_token_ids: frozenset[int]  # drawing one of them ends the sequence
    priority: int = 0  # smaller is more urgent
    cache_salt: str = ""  # sequences share cached blocks only within one salt
    arrival_time: float = 0.0
    sibling: Sequence | None = None  # index 0 of the same request: its prompt's KV is shared
    matcher: Matcher | None = None  # its place in the grammar that its text must follow

    # --- the stream
    token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_pending_tokens: int = 0
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    prompt_logprobs: list[PositionLogprobs] = field(default_factory=list)
    embedding: list[float] | None = None

    # --- what it holds while running
    row: int = -1
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[int] = field(default_factory=list)  # chained content hashes of the full blocks hashed so far
    content_id: int | None = 0  # identity of the last published block's content; None: the chain is broken, publish no more
    num_published_blocks: int = 0

    # --- its history
    status: SequenceStatus = SequenceStatus.WAITING
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    first_scheduled_time: float | None = None

    @property
    def params(self) -> SamplingParams:
        return self.sampling.params

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_generated_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def is_finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens that a step could compute now. The last token that fits is never fed back: nothing would follow it."""
        return min(len(self.token_ids) + self.num_pending_tokens, self.max_num_tokens - 1) - self.num_computed_tokens
