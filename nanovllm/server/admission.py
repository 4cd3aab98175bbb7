"""Admission: who may enter the engine now, who waits, and who is told to come back later.

The engine gets as many completions as it can run plus a few, so that it never waits for the front end. The rest wait here,
the most urgent key first, in a queue with an end. Behind the end there is a 429 whose Retry-After comes from the rate at
which requests have lately been served. Keys have their own limits: completions at once, and tokens per minute.

Plain counts and one heap, driven by one event loop; knows no HTTP and no engine. All counts are completions: a request
with n=4 counts four times.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

from nanovllm.server.auth import Key
from nanovllm.server.errors import BadField, QueueFull, Unavailable

RATE_WINDOW_S = 60.0  # how far back "lately" reaches
UNKNOWN_RETRY_S = 5  # when nothing has been served lately
MAX_RETRY_S = 120
MAX_SERVED = 4096
MAX_GONE = 64  # tickets that have left and are still in the heap, besides half of it


@dataclass(slots=True, eq=False)
class Ticket:
    """One request between its arrival and its end."""

    key: Key
    rank: tuple[int, int, int]  # key's class, request's priority, order of arrival
    weight: int  # completions
    reserved_tokens: int
    turn: asyncio.Future[None] | None = None  # None: it did not have to wait
    state: str = "waiting"  # waiting, running, left
    candidates: int = 0  # log-probabilities that it may come to hold

    def __lt__(self, other: Ticket) -> bool:
        return self.rank < other.rank


@dataclass(slots=True)
class Account:
    """What one key uses. `balance`: tokens that it may still ask for; below zero it has to wait."""

    num_open: int = 0
    balance: float = 0.0
    updated: float = 0.0


class Admission:
    """`enter` or be refused, wait for `turn`, `leave` exactly once."""

    def __init__(
        self,
        *,
        capacity: int,
        max_queued: int,
        share: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`capacity`: completions in the engine at once. `share`: this process's part of each key's limits."""
        self.capacity, self.max_queued = capacity, max_queued
        self.num_running = self.num_waiting = 0
        self._share, self._clock = share, clock
        self._heap: list[Ticket] = []
        self._num_gone = 0  # of those in the heap, at most: some are dropped when they come to its top
        self._numbers = count()
        self._num_by_class: Counter[int] = Counter()  # waiting completions by their key's priority
        self._accounts: dict[str, Account] = {}
        self._served: deque[tuple[float, int]] = deque()  # lately, at most MAX_SERVED
        self._num_served = 0  # completions in it

    def enter(self, key: Key, priority: int = 0, weight: int = 1, tokens: int = 0) -> Ticket:
        """A place in the engine or in the queue. `tokens`: the most that it can use. Raises `QueueFull`."""
        self._check_limits_of(key, weight)
        ticket = Ticket(key, (key.priority, priority, next(self._numbers)), weight, tokens)
        if not self.num_waiting and self._has_room(weight):
            ticket.state = "running"
            self.num_running += weight
        else:
            self._make_place(ticket)
            ticket.turn = asyncio.get_running_loop().create_future()
            heapq.heappush(self._heap, ticket)
            self._count_waiting(ticket, weight)
        account = self._account(key)
        account.num_open += weight
        account.balance -= tokens
        return ticket

    def leave(self, ticket: Ticket, used_tokens: int = 0) -> None:
        """The end, however it came. Tokens that were reserved and not used are given back. Idempotent."""
        if ticket.state == "left":
            return
        if ticket.state == "waiting":
            self._count_waiting(ticket, -ticket.weight)
            self._num_gone += 1
        else:
            self.num_running -= ticket.weight
            self._served.append((self._clock(), ticket.weight))
            self._num_served += ticket.weight
            if len(self._served) > MAX_SERVED:
                self._num_served -= self._served.popleft()[1]
        ticket.state = "left"
        account = self._account(ticket.key)
        account.num_open -= ticket.weight
        account.balance += ticket.reserved_tokens - used_tokens
        if self._num_gone > MAX_GONE + len(self._heap) // 2:
            self._heap = [other for other in self._heap if other.state == "waiting"]
            heapq.heapify(self._heap)
            self._num_gone = 0
        self.advance()

    def advance(self) -> None:
        """Let in whoever has room now. The head of the queue is not overtaken, or a wide request would starve."""
        while self._heap:
            head = self._heap[0]
            if head.state == "waiting":
                if not self._has_room(head.weight):
                    return
                head.state = "running"
                self._count_waiting(head, -head.weight)
                self.num_running += head.weight
                if head.turn is not None and not head.turn.done():
                    head.turn.set_result(None)
            heapq.heappop(self._heap)

    def retry_after(self) -> int:
        """Seconds until what waits now will have been served, at the rate of the last minute."""
        now = self._clock()
        while self._served and self._served[0][0] < now - RATE_WINDOW_S:
            self._num_served -= self._served.popleft()[1]
        if not self._served:
            return UNKNOWN_RETRY_S
        rate = self._num_served / max(now - self._served[0][0], 1.0)
        return min(MAX_RETRY_S, max(1, math.ceil((self.num_waiting + 1) / rate)))

    def _count_waiting(self, ticket: Ticket, change: int) -> None:
        self.num_waiting += change
        self._num_by_class[ticket.key.priority] += change

    def _has_room(self, weight: int) -> bool:
        return self.num_running + weight <= self.capacity or self.num_running == 0

    def _make_place(self, ticket: Ticket) -> None:
        """A full queue refuses the newcomer, unless it is of a more urgent class than somebody who waits."""
        if self.num_waiting + ticket.weight <= self.max_queued:
            return
        missing = self.num_waiting + ticket.weight - self.max_queued
        if sum(number for priority, number in self._num_by_class.items() if priority > ticket.key.priority) < missing:
            raise QueueFull(f"{self.num_waiting} completions wait already (max_queued_requests)", self.retry_after())
        for other in sorted((other for other in self._heap if other.state == "waiting"), reverse=True):
            if missing <= 0:
                break
            missing -= other.weight
            error = QueueFull("a more urgent request has taken this one's place in the queue", self.retry_after(), "displaced")
            self.expire(other, error)

    def expire(self, ticket: Ticket, error: Exception) -> None:
        """End the wait of a request with an error."""
        if ticket.state == "waiting" and ticket.turn is not None and not ticket.turn.done():
            ticket.turn.set_exception(error)
            self.leave(ticket)

    def describe(self) -> dict[str, Any]:
        """For people: who waits, and what the keys use."""
        accounts = {name: {"open": account.num_open, "balance": account.balance} for name, account in self._accounts.items()}
        return {"running": self.num_running, "waiting": self.num_waiting, "capacity": self.capacity, "keys": accounts}

    # --- limits of keys

    def _check_limits_of(self, key: Key, weight: int) -> None:
        account = self._account(key)
        if key.max_concurrent is not None:
            limit = max(1, math.ceil(key.max_concurrent * self._share))
            if weight > limit:  # no 429: waiting would not help
                raise BadField(
                    "n", f"n={weight}: this key may have {limit} completions at once (max_concurrent)", "concurrency_limit"
                )
            if account.num_open + weight > limit:
                raise QueueFull(
                    f"this key may have {limit} completions at once (max_concurrent), and has {account.num_open}",
                    self.retry_after(),
                    "concurrency_limit",
                )
        if key.tokens_per_minute is not None and account.balance <= 0:
            wait = math.ceil((1 - account.balance) * 60 / (key.tokens_per_minute * self._share))
            raise QueueFull(f"this key has used its {key.tokens_per_minute} tokens per minute", max(1, wait), "token_quota")

    def _account(self, key: Key) -> Account:
        """Refilled up to now: a bucket of one minute's tokens, which fills at the quota's rate."""
        now = self._clock()
        account = self._accounts.get(key.name)
        if account is None:
            full = 0.0 if key.tokens_per_minute is None else key.tokens_per_minute * self._share
            account = self._accounts[key.name] = Account(0, full, now)
        elif key.tokens_per_minute is not None:
            full = key.tokens_per_minute * self._share
            account.balance = min(full, account.balance + full * (now - account.updated) / 60)
            account.updated = now
        return account


def queue_timed_out(seconds: float, retry_after: int) -> Unavailable:
    return Unavailable(f"nothing was generated within queue_timeout_s={seconds:g}", retry_after, "queue_timeout")
