"""The two messages between the planes: `ScheduledBatch` down, `StepResult` up.

Control plane and data plane share nothing else. Both messages are plain integers and lists, so that they can cross a
process boundary as they are (in place of matchers their masks would). The batch is stored by columns (one list per
property, all of one length), because a step of 256 sequences then costs four list appends per sequence and turns into
device tensors in one copy each.
Read next: `scheduler.py` writes the batch, `model_runner.py` reads it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from nanovllm.outputs import PositionLogprobs
from nanovllm.sampling_params import SamplingParams
from nanovllm.structured.base import Matcher


@dataclass(frozen=True, slots=True)
class RowSampling:
    """What the sampler must know of one sequence; sent once, when the sequence is seated."""

    params: SamplingParams
    seed: int  # 64 bits, always set: the engine draws one where the user gave none
    stop_token_ids: tuple[int, ...]  # may not be drawn before min_tokens
    bad_words: tuple[tuple[int, ...], ...]  # token sequences that may not be completed
    num_prompt_tokens: int
    pooling: str | None = None  # "mean", "last": the prompt's vector is wanted, and not what is drawn

    @property
    def reads_whole_prompt(self) -> bool:
        """Every position of the prompt must be computed: what is cached has no hidden states."""
        return self.params.prompt_logprobs is not None or self.pooling == "mean"


class Seat(NamedTuple):
    """A sequence arrives in a row. Leaving needs no message: the next seat overwrites the row."""

    row: int
    token_ids: list[int]  # every token known so far: the prompt, and what was generated before a preemption
    sampling: RowSampling


class BlockUpdate(NamedTuple):
    """`block_table[row][first_index : first_index + len(block_ids)] = block_ids`."""

    row: int
    first_index: int
    block_ids: list[int]


class BlockCopy(NamedTuple):
    """Copy the KV of a whole block before the forward pass (copy-on-write)."""

    source: int
    destination: int


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """One step's work: chunk i computes tokens [starts[i], starts[i] + lengths[i]) of the sequence in rows[i].

    The tokens themselves are on the device already: from the seat, or sampled there by an earlier step.
    """

    step: int  # counts from 0; results come back in the same order
    rows: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    sampled_chunks: list[int] = field(default_factory=list)  # chunks that reach their sequence's end: they draw a token
    seats: list[Seat] = field(default_factory=list)
    block_updates: list[BlockUpdate] = field(default_factory=list)
    block_copies: list[BlockCopy] = field(default_factory=list)
    matchers: dict[int, Matcher] = field(default_factory=dict)  # place in sampled_chunks -> whose mask that draw obeys

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step produced; entry i of the lists belongs to `sampled_chunks[i]` of its batch."""

    step: int
    token_ids: list[list[int]]  # one drawn token each; more when a draft was accepted; -1: the logits were not finite numbers
    logprobs: list[PositionLogprobs | None] | None = None  # None: no row asked
    prompt_logprobs: dict[int, list[PositionLogprobs]] = field(default_factory=dict)  # chunk index -> its positions' targets
    embeddings: dict[int, list[float]] = field(default_factory=dict)  # chunk index -> the vector of the prompt that it ended
    forward_ns: int = 0  # the device's time, nanoseconds; on a GPU without a draw that waited for grammars
