"""The front end of a simulated server, and its client: programs with one event loop each.

An event loop does one thing at a time, in turns: what becomes ready during a turn waits for the next. So of requests that
come at one moment none reaches the engine before all of them have been read, and the first token of one waits for the
tokens of the others. The way of a request, with whom it keeps busy:

    client    connect, and send the request
    server    accept, read and parse it
    (thread)  tokenise: nobody waits but the request
    server    check it, hand it to the engine

and of the tokens of a step:

    server    take the engine's message, and tell each stream; in a later turn, write an event for each
    client    read each event

Messages that wait while the server is busy are taken together, and a stream's tokens are then one event. What nobody's
processor is busy with (sockets, threads that wake up) is a latency, each way. Times in seconds. Read next: `run.py`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from heapq import heappop, heappush
from math import inf
from typing import NamedTuple

from nanovllm.simulation.hardware import Calibration

MAX_MESSAGES_PER_TURN = 8  # `engine/connection.py`'s
CLIENT_TURNS = 5  # begin, and connect; be connected; hear of it; make the protocol; write (Python 3.12; 3.11 takes one more)
# Turns of the server, with their shares of a request's time, about as seen in a run of 512 at once (benchmarks/LOG.md).
TURNS_BEFORE_TOKENS = (0.08, 0.10, 0.16)  # accept; receive; run the handler until it waits for the thread that tokenises
TURNS_WITH_TOKENS = (0.03, 0.03, 0.03, 0.35)  # hear of the tokens; go on; let others run; check, hand over, begin the answer
SHARE_END = 0.22  # after the last token


class EventLoop:
    """Runs callbacks in turns, each as long as it says."""

    def __init__(self) -> None:
        self._free_at = 0.0
        self._ready: list[tuple[float, int, Callable[[float], float]]] = []  # a heap: (when, order, what)
        self._num_added = 0

    def add(self, time: float, run: Callable[[float], float]) -> None:
        """At `time`, or in the first turn after it: run(now), which returns the seconds that it takes."""
        heappush(self._ready, (time, self._num_added, run))
        self._num_added += 1

    @property
    def next_turn(self) -> float:
        """When it begins; infinity: there is nothing to do."""
        return max(self._free_at, self._ready[0][0]) if self._ready else inf

    def run_turn(self, start: float) -> None:
        """`start`: `next_turn`."""
        now, turn = start, []
        while self._ready and self._ready[0][0] <= start:
            turn.append(heappop(self._ready)[2])
        for run in turn:
            now += run(now)
        self._free_at = now


def _run_turns(
    loop: EventLoop,
    time: float,
    costs: Sequence[float],
    then: Callable[[float], None],
    begin: Callable[[float], None] | None = None,
) -> None:
    """A turn of `loop` for each of `costs`, seconds, the first at `time`. Then `then(now)`."""

    def turn(now: float) -> float:
        if begin is not None:
            begin(now)
        end = now + costs[0]
        if len(costs) > 1:
            _run_turns(loop, end, costs[1:], then)
        else:
            then(end)
        return costs[0]

    loop.add(time, turn)


class Told(NamedTuple):
    """A stream of a step's message that somebody wants to know about: its first token, or its last."""

    place: int  # among the streams of the message
    request: int
    is_first: bool
    is_last: bool


class FrontEnd:
    """Requests in, at `arrive`; out to the engine, at `take`; tokens in, at `tell`; out to `on_seen`.

    `on_seen(told, time)`: a client has these tokens. It may let further requests arrive. `clients`: the number of the
    program that sends each request; none: one program sends all.
    """

    def __init__(self, costs: Calibration, on_seen: Callable[[Told, float], None], clients: Sequence[int] = ()) -> None:
        self._costs = costs
        self._on_seen = on_seen
        self.sent: dict[int, float] = {}  # by request, until somebody takes it out: when its client began with it
        self._server = EventLoop()
        self._client_of = clients
        self._clients = [EventLoop() for _ in range(max(clients, default=0) + 1)]
        self._num_open = [0] * len(self._clients)  # streams of each client that have begun and not ended
        self._at_engine: deque[tuple[float, int]] = deque()  # (when, index)
        self._messages: deque[tuple[float, int, Sequence[Told]]] = deque()  # (when, streams, told): not taken yet
        self._is_draining = False

    # --- time

    def advance(self, until: float) -> None:
        """Run all turns that begin by then."""
        loop, start = self._next_turn()
        while start <= until and start < inf:
            loop.run_turn(start)
            loop, start = self._next_turn()

    def wait(self) -> float:
        """Run until a request is at the engine. Returns when it is; infinity: nothing will come any more."""
        loop, start = self._next_turn()
        while not self._at_engine and start < inf:
            loop.run_turn(start)
            loop, start = self._next_turn()
        return self._at_engine[0][0] if self._at_engine else inf

    def _next_turn(self) -> tuple[EventLoop, float]:
        first, start = self._server, self._server.next_turn
        for client in self._clients:
            if (turn := client.next_turn) < start:
                first, start = client, turn
        return first, start

    # --- requests

    def arrive(self, time: float, index: int, num_tokens: int) -> None:
        """A request of so many tokens is due then."""
        costs = self._costs
        request_s = costs.frontend_request_s + num_tokens * costs.frontend_token_s
        before, after = ([share * request_s for share in shares] for shares in (TURNS_BEFORE_TOKENS, TURNS_WITH_TOKENS))

        def begin(now: float) -> None:
            self.sent[index] = now

        def send(now: float) -> None:
            _run_turns(self._server, now + costs.frontend_latency_s, before, tokenize)

        def tokenize(now: float) -> None:
            _run_turns(self._server, now + num_tokens * costs.tokenize_token_s, after, hand_over)

        def hand_over(now: float) -> None:
            self._at_engine.append((now, index))

        client = self._clients[self._number_of(index)]
        _run_turns(client, time, [costs.client_request_s / CLIENT_TURNS] * CLIENT_TURNS, send, begin)

    def _number_of(self, index: int) -> int:
        return self._client_of[index] if self._client_of else 0

    def take(self, now: float) -> int | None:
        """The next request that has come to the engine by now."""
        return self._at_engine.popleft()[1] if self._at_engine and self._at_engine[0][0] <= now else None

    # --- tokens

    def tell(self, now: float, num_streams: int, told: Sequence[Told]) -> None:
        """The engine sends a token for each of so many streams."""
        self._messages.append((now + self._costs.frontend_latency_s, num_streams, told))
        if not self._is_draining:
            self._is_draining = True
            self._server.add(self._messages[0][0], self._drain)

    def _drain(self, now: float) -> float:
        num_events = num_tokens = 0
        told: list[Told] = []
        for _ in range(MAX_MESSAGES_PER_TURN):
            if not self._messages or self._messages[0][0] > now:
                break
            _, num_streams, more = self._messages.popleft()
            num_events = max(num_events, num_streams)
            num_tokens += num_streams
            told += more
        self._server.add(now, partial(self._write, num_events=num_events, told=told))
        self._is_draining = bool(self._messages)
        if self._messages:
            self._server.add(max(now, self._messages[0][0]), self._drain)
        return self._costs.frontend_message_s + num_tokens * self._costs.frontend_told_s

    def _write(self, now: float, num_events: int, told: list[Told]) -> float:
        """An event for each stream, one after the other; the clients read them as they come."""
        event_s = self._costs.frontend_event_s
        for one in told:
            self._num_open[self._number_of(one.request)] += one.is_first
        num_open = sum(self._num_open)
        for number, client in enumerate(self._clients):
            if share := self._num_open[number] / num_open:
                ours = [one for one in told if self._number_of(one.request) == number]
                client.add(now + event_s, partial(self._read, now, num_events, share, ours))
        num_ended = 0
        for one in told:
            if one.is_last:
                num_ended += 1
                self._num_open[self._number_of(one.request)] -= 1
        return num_events * event_s + num_ended * SHARE_END * self._costs.frontend_request_s

    def _read(self, written: float, num_events: int, share: float, told: list[Told], now: float) -> float:
        """`share`: of the events, that are this client's."""
        event_s, read_s = self._costs.frontend_event_s, self._costs.client_event_s
        now += self._costs.client_message_s
        for one in told:
            self._on_seen(one, max(written + (one.place + 1) * event_s, now + one.place * share * read_s))
        return self._costs.client_message_s + num_events * share * read_s
