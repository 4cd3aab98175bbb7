"""What slow masks may cost a step: one budget for all sequences of an engine, so that many of them cannot slow everybody.

A grammar that is ambiguous enough makes each mask slower than the one before. What masks take beyond the usual comes out of
the budget, which refills with time. When it is empty, the sequence that has taken most out of it ends, with an error of its
own. So the slow masks of one step together take half a second once, and half of the time in the long run, however many
sequences there are; and an ordinary mask is never charged. Knows no grammar.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Protocol
from weakref import WeakKeyDictionary

FREE_SECONDS = 0.001  # of processor time, per mask; usual ones take less than half of it
USUAL_SECONDS = 0.00005
SECONDS_AT_ONCE = 0.5
SHARE_OF_TIME = 0.5  # that slow masks may take: the other steps take at most twice as long
SECONDS_PER_ENDED = 0.05  # given back when a sequence ends, so that not all end at once
NUM_STEPS_WATCHED = 16  # at least, after one whose masks took long


class Spender(Protocol):
    def give_up(self) -> None: ...


class MaskBudget:
    """Used by the thread that drives the engine."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, num_threads: int = 1) -> None:
        """`num_threads`: that compute the masks of a step at once."""
        self.num_threads = num_threads
        self.clock = clock
        self._seconds_left, self._time = SECONDS_AT_ONCE, clock()
        self._spent: WeakKeyDictionary[Spender, float] = WeakKeyDictionary()
        self._lots = random.Random()
        self._num_steps_to_watch, self._watched_until = 0, clock()
        self._unpaid = 0.0  # seconds of slow masks that threads computed, since somebody is watched

    def note_together(self, num_masks: int, seconds: float) -> None:
        """What a step has waited for masks that threads computed. Nobody was slow if it was not long.

        Watched until that time has been made good: who is slow again after that has taken no more than slow masks may.
        """
        excess = seconds - FREE_SECONDS - USUAL_SECONDS * num_masks / self.num_threads
        if excess > 0:
            self._num_steps_to_watch = NUM_STEPS_WATCHED
            self._watched_until = max(self._watched_until, self.clock() + excess / SHARE_OF_TIME)
            self._unpaid += max(0.0, seconds - FREE_SECONDS * (1 + num_masks / self.num_threads))

    def draw_lots(self, number: int, num_drawn: int) -> set[int]:
        """Who of `number` pays this time: nobody while masks come soon.

        By chance, so that nobody can be slow just when others are looked at.
        """
        if self._num_steps_to_watch:
            self._num_steps_to_watch -= 1
        elif self.clock() >= self._watched_until:
            self._unpaid = 0.0
            return set()
        return set(self._lots.sample(range(number), num_drawn))

    def charge(self, spender: Spender, seconds: float, stands_for: float = 1.0) -> None:
        """`spender` has taken `seconds` for a mask. May call `give_up`, also of another.

        Drawn by lot it `stands_for` so many masks, and pays for all of them, as far as steps have waited for slow ones.
        """
        excess = seconds - FREE_SECONDS
        if excess <= 0:
            return
        if stands_for > 1:
            excess = min(self._unpaid, excess * stands_for)
            self._unpaid -= excess
        now = self.clock()
        refilled = self._seconds_left + SHARE_OF_TIME * (now - self._time)
        self._seconds_left, self._time = min(SECONDS_AT_ONCE, refilled) - excess, now
        self._spent[spender] = self._spent.get(spender, 0.0) + excess
        if self._seconds_left < 0:
            slowest = max(self._spent, key=lambda one: self._spent[one])
            del self._spent[slowest]
            self._seconds_left = SECONDS_PER_ENDED
            slowest.give_up()
