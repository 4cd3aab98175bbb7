from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given, settings, strategies as st

from nanovllm.server.admission import MAX_RETRY_S, UNKNOWN_RETRY_S, Admission
from nanovllm.server.auth import Key
from nanovllm.server.errors import HttpError, QueueFull

PLAIN = Key(name="plain", digest=b"1")
URGENT = Key(name="urgent", digest=b"2", priority=-1)
LAZY = Key(name="lazy", digest=b"3", priority=1)


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def in_loop(test):
    """Futures want a running loop."""

    async def run():
        return test()

    return asyncio.run(run())


def make(capacity=2, max_queued=3, **options):
    clock = Clock()
    return Admission(capacity=capacity, max_queued=max_queued, clock=clock, **options), clock


def states(tickets):
    return [ticket.state for ticket in tickets]


def test_capacity_then_queue_then_429_and_the_queue_moves_up_in_order():
    def test():
        admission, _ = make()
        tickets = [admission.enter(PLAIN) for _ in range(5)]
        assert states(tickets) == ["running"] * 2 + ["waiting"] * 3
        with pytest.raises(QueueFull, match="max_queued_requests") as caught:
            admission.enter(PLAIN)
        assert caught.value.status == 429 and caught.value.headers["Retry-After"] == str(UNKNOWN_RETRY_S)
        admission.leave(tickets[1])
        assert states(tickets) == ["running", "left", "running", "waiting", "waiting"]
        assert tickets[2].turn.done() and not tickets[3].turn.done()
        admission.leave(tickets[3])  # gives up
        admission.leave(tickets[0])
        assert states(tickets) == ["left", "left", "running", "left", "running"]

    in_loop(test)


def test_the_more_urgent_class_goes_first_and_within_it_the_requests_priority():
    def test():
        admission, _ = make(capacity=1, max_queued=10)
        first = admission.enter(PLAIN)
        lazy, plain, urgent, soon = (
            admission.enter(LAZY),
            admission.enter(PLAIN),
            admission.enter(URGENT),
            admission.enter(PLAIN, priority=-5),
        )
        order = []
        running = first
        for _ in range(4):
            admission.leave(running)
            (running,) = [ticket for ticket in (lazy, plain, urgent, soon) if ticket.state == "running"]
            order.append(running)
        assert order == [urgent, soon, plain, lazy]

    in_loop(test)


def test_a_full_queue_makes_place_for_a_more_urgent_class_only():
    def test():
        admission, _ = make(capacity=1, max_queued=2)
        admission.enter(PLAIN)
        first, last = admission.enter(LAZY), admission.enter(LAZY)
        with pytest.raises(QueueFull):
            admission.enter(LAZY, priority=-1000)
        plain = admission.enter(PLAIN)
        assert states([first, last, plain]) == ["waiting", "left", "waiting"] and admission.num_waiting == 2
        error = last.turn.exception()
        assert error.status == 429 and error.code == "displaced"
        admission.leave(last)  # its request notices
        assert admission.num_waiting == 2

    in_loop(test)


def test_who_has_left_the_queue_is_forgotten_however_long_others_wait_before_it():
    def test():
        admission, _ = make(capacity=1, max_queued=100)
        admission.enter(PLAIN)
        waiting = admission.enter(URGENT)
        for _ in range(5000):
            admission.leave(admission.enter(LAZY))
        assert len(admission._heap) < 200 and waiting.state == "waiting" and admission.num_waiting == 1

    in_loop(test)


def test_a_wide_request_at_the_head_is_not_overtaken_and_not_starved():
    def test():
        admission, _ = make(capacity=4, max_queued=20)
        small = [admission.enter(PLAIN) for _ in range(4)]
        wide = admission.enter(PLAIN, weight=3)
        after = admission.enter(PLAIN)
        for ticket in small[:2]:
            admission.leave(ticket)
            assert wide.state == "waiting" and after.state == "waiting"
        admission.leave(small[2])
        assert states([wide, after]) == ["running", "waiting"] and admission.num_running == 4

    in_loop(test)


def test_a_request_wider_than_the_engine_runs_alone():
    def test():
        admission, _ = make(capacity=4, max_queued=200)
        first = admission.enter(PLAIN)
        wide = admission.enter(PLAIN, weight=100)
        assert wide.state == "waiting"
        admission.leave(first)
        assert wide.state == "running"

    in_loop(test)


def test_retry_after_is_the_time_that_the_queue_takes_at_the_rate_of_the_last_minute():
    def test():
        admission, clock = make(capacity=1, max_queued=40)
        for _ in range(20):  # two a second
            clock.now += 0.5
            admission.leave(admission.enter(PLAIN))
        tickets = [admission.enter(PLAIN) for _ in range(31)]
        assert 14 <= admission.retry_after() <= 17
        for ticket in tickets:
            admission.leave(ticket)
        clock.now += 61
        assert admission.retry_after() == UNKNOWN_RETRY_S
        admission.leave(admission.enter(PLAIN))
        clock.now += 59
        for _ in range(41):
            admission.enter(PLAIN)
        assert admission.retry_after() == MAX_RETRY_S

    in_loop(test)


def test_a_key_has_so_many_completions_at_once_waiting_or_not():
    def test():
        key = Key(name="k", digest=b"k", max_concurrent=3)
        admission, _ = make(capacity=2, max_queued=10)
        tickets = [admission.enter(key, weight=2), admission.enter(key)]
        with pytest.raises(QueueFull, match="max_concurrent") as caught:
            admission.enter(key)
        assert caught.value.code == "concurrency_limit"
        admission.enter(PLAIN)  # others are not concerned
        admission.leave(tickets[0])
        admission.enter(key, weight=2)

    in_loop(test)


def test_more_completions_than_a_key_may_ever_have_are_no_matter_of_waiting():
    def test():
        admission, _ = make(capacity=9, max_queued=9)
        with pytest.raises(HttpError) as caught:
            admission.enter(Key(name="k", digest=b"4", max_concurrent=2), weight=3)
        assert caught.value.status == 400 and caught.value.param == "n"

    in_loop(test)


def test_a_key_has_so_many_tokens_per_minute_reserved_first_and_settled_at_the_end():
    def test():
        key = Key(name="k", digest=b"k", tokens_per_minute=600)
        admission, clock = make(capacity=10)
        ticket = admission.enter(key, tokens=1000)  # more than there are: the last one may go into debt
        with pytest.raises(QueueFull, match="600 tokens per minute") as caught:
            admission.enter(key, tokens=1)
        assert caught.value.code == "token_quota" and caught.value.headers["Retry-After"] == "41"
        admission.leave(ticket, used_tokens=300)
        admission.leave(admission.enter(key, tokens=300), used_tokens=300)
        with pytest.raises(QueueFull):
            admission.enter(key)
        clock.now += 2  # 10 tokens a second
        admission.leave(admission.enter(key, tokens=5), used_tokens=5)
        clock.now += 3600
        assert admission._account(key).balance == 600

    in_loop(test)


def test_each_of_two_front_ends_has_half_of_a_keys_limits():
    def test():
        key = Key(name="k", digest=b"k", max_concurrent=5, tokens_per_minute=600)
        admission, _ = make(capacity=10, share=0.5)
        for _ in range(3):
            admission.enter(key)
        with pytest.raises(QueueFull, match="may have 3"):
            admission.enter(key)
        assert admission._account(key).balance == 300

    in_loop(test)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["enter", "leave", "expire"]), st.integers(0, 2), st.integers(1, 5), st.integers(0, 99))),
    st.integers(1, 6),
    st.integers(0, 6),
)
def test_whatever_happens_the_counts_are_those_of_the_tickets(actions, capacity, max_queued):
    def test():
        admission, _ = make(capacity, max_queued)
        keys = (PLAIN, URGENT, LAZY)
        tickets = []
        for action, which, weight, number in actions:
            open_tickets = [ticket for ticket in tickets if ticket.state != "left"]
            if action == "enter":
                try:
                    tickets.append(admission.enter(keys[which], number % 3, weight, number))
                except QueueFull:
                    assert admission.num_waiting + weight > max_queued
            elif open_tickets:
                ticket = random.Random(number).choice(open_tickets)
                if action == "leave":
                    admission.leave(ticket, number)
                else:
                    admission.expire(ticket, QueueFull("expired", 1))
            for ticket in tickets:
                if ticket.turn is not None and ticket.turn.done():
                    ticket.turn.exception()
            assert admission.num_running == sum(ticket.weight for ticket in tickets if ticket.state == "running")
            assert admission.num_waiting == sum(ticket.weight for ticket in tickets if ticket.state == "waiting") <= max_queued
            assert admission.num_running <= capacity or len([t for t in tickets if t.state == "running"]) == 1
            assert not admission.num_waiting or admission.num_running  # nobody waits for nothing
            for key in keys:
                assert admission._account(key).num_open == sum(t.weight for t in tickets if t.key is key and t.state != "left")

    in_loop(test)
