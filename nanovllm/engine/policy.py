"""Scheduling policies: who comes first, and whether decoding may wait for prompts.

The scheduler asks two questions and decides everything else itself. A new policy is one class with these two methods
and one line in `POLICIES`.
"""

from __future__ import annotations

from typing import Protocol

from nanovllm.engine.sequence import Sequence
from nanovllm.errors import ConfigError, did_you_mean


class SchedulerPolicy(Protocol):
    def rank(self, sequence: Sequence) -> tuple:
        """Smaller is served first and preempted last. Must not change while the sequence lives; must be unique."""
        ...

    def decodes_may_wait(self, num_steps_waited: int) -> bool:
        """May this step serve prompts only, when decoding sequences have been passed over `num_steps_waited` times?"""
        ...


class FirstComeFirstServed:
    """By arrival. Decoding sequences are part of every step."""

    def rank(self, sequence: Sequence) -> tuple:
        return sequence.arrival_time, sequence.seq_id

    def decodes_may_wait(self, num_steps_waited: int) -> bool:
        return False


class PriorityFirst(FirstComeFirstServed):
    """By `priority` (smaller is more urgent), then by arrival."""

    def rank(self, sequence: Sequence) -> tuple:
        return sequence.priority, sequence.arrival_time, sequence.seq_id


class PrefillFirst(FirstComeFirstServed):
    """Prompts before decoding, as nano-vllm does: best time to first token, at the cost of stalls between tokens.

    Unbounded, a steady arrival of prompts starves every running sequence; after `max_consecutive_prefills` steps
    without decoding, one step of the ordinary kind follows.
    """

    def __init__(self, max_consecutive_prefills: int = 4) -> None:
        self.max_consecutive_prefills = max_consecutive_prefills

    def decodes_may_wait(self, num_steps_waited: int) -> bool:
        return num_steps_waited < self.max_consecutive_prefills


POLICIES: dict[str, type[SchedulerPolicy]] = {
    "fcfs": FirstComeFirstServed,
    "priority": PriorityFirst,
    "prefill_first": PrefillFirst,
}


def make_policy(name: str) -> SchedulerPolicy:
    if name not in POLICIES:
        raise ConfigError(f"scheduling_policy={name!r} is not one of {', '.join(POLICIES)}{did_you_mean(name, POLICIES)}")
    return POLICIES[name]()
