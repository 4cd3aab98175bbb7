"""The simulated loop: times by hand, nothing lost, the engine's books, more hardware is never slower."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import inf

import pytest

import nanovllm.engine.connection
import nanovllm.engine.engine_process
import nanovllm.simulation.front_end
import nanovllm.simulation.run
from nanovllm.config import SchedulerLimits
from nanovllm.simulation.front_end import EventLoop, FrontEnd, Told
from nanovllm.simulation.hardware import PROFILES, Calibration, Hardware
from nanovllm.simulation.run import Deployment, simulate
from nanovllm.simulation.shapes import SHAPES
from nanovllm.workloads import Request, make_workload, parse_workload

SPEC = SHAPES["qwen3-0.6b"]
ZERO = Calibration(**dict.fromkeys(Calibration.__dataclass_fields__, 0))
# Everything is free but attention, which makes a step of any kind take one second, and the host's quarter of a second.
ONE_SECOND = replace(
    ZERO,
    memory=1,
    product=1,
    burst_product=1,
    overlap=1,
    attention=1,
    elementwise=1,
    attention_s=1 / SPEC.num_layers,
    host_step_s=0.25,
    frontend_latency_s=0.5,
)
CLOCKWORK = Hardware("clockwork", 10**11, 1e30, 1e30, ONE_SECOND, has_graphs=False)


def request(arrival_s: float, num_input: int, num_output: int, after: int | None = None) -> Request:
    return Request(arrival_s, tuple(range(1, num_input + 1)), num_output, after=after)


def deployment(hardware: Hardware = PROFILES["h200"], **changes) -> Deployment:
    values = {"limits": SchedulerLimits(16, 512), "num_blocks": 200, "block_size": 16, "max_model_len": 2048}
    return Deployment(spec=SPEC, hardware=hardware, **{**values, **changes})


def test_two_requests_take_the_time_that_a_hand_computes():
    # A enters the engine at 0.5. Its steps are launched at 0.75 and 1.0 and run from 0.75 to 1.75 and 1.75 to 2.75. B enters
    # at 1.4 and is seen at 1.75, so it is in the step from 2.75 to 3.75, and in one more. Half a second is the way out.
    a, b = sorted(simulate(deployment(CLOCKWORK), [request(0.0, 4, 3), request(0.9, 4, 2)]).finished)
    assert (a.first_token, a.finish) == pytest.approx((2.25, 4.25))
    assert (b.first_token, b.finish) == pytest.approx((4.25, 5.25))
    assert (a.ttft, b.ttft, a.tpot) == pytest.approx((2.25, 3.35, 1.0))


def test_what_becomes_ready_during_a_turn_waits_for_the_next():
    loop, ran = EventLoop(), []

    def step(name: str, seconds: float, then: str = ""):
        def run(now: float) -> float:
            ran.append((name, now))
            if then:
                loop.add(now + 0.5, step(then, 1.0))
            return seconds

        return run

    loop.add(0.0, step("a", 1.0, then="c"))
    loop.add(0.0, step("b", 3.0))
    loop.add(9.0, step("d", 1.0))
    while loop.next_turn < inf:
        loop.run_turn(loop.next_turn)
    assert ran == [("a", 0.0), ("b", 1.0), ("c", 4.0), ("d", 9.0)]


def test_two_requests_at_once_pass_the_front_end_turn_by_turn():
    # Five turns of the client's loop, a second each: sent at 9 and 10. Of the server's hundred seconds 8, 10 and 16 pass
    # before tokenising, which takes one, and 3, 3, 3 and 35 after it. Turns begin at 19 (A), 27 (B, A), 45 (B, A), 71 (B),
    # 87 (A), 90 (B, A), 96 (B, A), 102 (B, A), 140 (B).
    costs = replace(ZERO, client_request_s=5.0, frontend_request_s=100.0, tokenize_token_s=0.5, frontend_latency_s=10.0)
    front_end = FrontEnd(costs, lambda told, time: None)
    for index in (0, 1):
        front_end.arrive(0.0, index, num_tokens=2)
    front_end.advance(101.0)
    assert front_end.sent == {0: 0.0, 1: 1.0}
    assert front_end.wait() == pytest.approx(140.0)
    assert front_end.take(139.9) is None and front_end.take(140.1) == 0
    front_end.advance(inf)
    assert front_end.take(174.9) is None and front_end.take(175.1) == 1
    assert front_end.wait() == inf


def test_a_step_has_its_message_and_a_stream_its_end():
    costs = replace(ZERO, frontend_message_s=2.0, frontend_event_s=1.0, client_message_s=0.5, frontend_request_s=100.0)
    seen = []
    front_end = FrontEnd(costs, lambda told, time: seen.append((told.request, time)))
    front_end.tell(0.0, 2, [Told(0, 7, True, True), Told(1, 8, True, False)])  # read until 2, written at 3 and 4
    front_end.tell(1.0, 1, [Told(0, 8, False, True)])  # 7 ends from 4 to 26; read until 28, written at 29
    front_end.advance(inf)
    assert seen == [(7, pytest.approx(3.5)), (8, pytest.approx(4.0)), (8, pytest.approx(29.5))]


def test_all_streams_of_a_step_are_told_before_one_is_written():
    costs = replace(ZERO, frontend_told_s=1.0, frontend_event_s=10.0)
    seen = []
    front_end = FrontEnd(costs, lambda told, time: seen.append((told.request, time)))
    front_end.tell(0.0, 2, [Told(0, 7, True, False), Told(1, 8, True, False)])  # told until 2, written until 22
    front_end.tell(1.0, 2, [Told(1, 8, False, True)])
    front_end.tell(3.0, 1, [Told(0, 7, False, True)])  # with the one before: told from 22 to 25; an event each
    front_end.advance(inf)
    assert sorted(seen) == [(7, 12.0), (7, 35.0), (8, 22.0), (8, 45.0)]


def test_requests_that_come_while_others_are_taken_in_are_taken_in_too_unless_that_has_taken_long(monkeypatch):
    # A token of a prompt costs the engine a second, so B, which comes at 1, is there before A's first step begins at 4.
    monkeypatch.setattr(nanovllm.simulation.run, "MAX_RECEIVE_SECONDS", 5.0)
    calm = replace(ONE_SECOND, host_token_s=1.0, host_step_s=0.0, frontend_latency_s=0.0)
    hardware = replace(CLOCKWORK, calibration=calm)
    a, b = simulate(deployment(hardware), [request(0.0, 4, 1), request(1.0, 4, 1)]).finished
    assert (a.first_token, b.first_token) == (9.0, 9.0)  # eight seconds of prompts, one step
    monkeypatch.setattr(nanovllm.simulation.run, "MAX_RECEIVE_SECONDS", 3.0)
    a, b = simulate(deployment(hardware), [request(0.0, 4, 1), request(1.0, 4, 1)]).finished
    assert (a.first_token, b.first_token) == (8.0, 9.0)


def test_tokens_are_written_one_after_the_other_and_share_events_when_the_front_end_is_busy():
    costs = replace(ZERO, frontend_event_s=1.0, client_event_s=0.25, frontend_latency_s=10.0)
    seen = []
    front_end = FrontEnd(costs, lambda told, time: seen.append((told.request, time)))
    # At the server at 10; events are out at 11, 12, 13.
    front_end.tell(0.0, 3, [Told(0, 7, True, False), Told(2, 8, True, False)])
    # These two come at 11 and 12, while it writes: taken together at 13, two times two tokens and only two events.
    front_end.tell(1.0, 2, [Told(0, 7, False, True)])
    front_end.tell(2.0, 2, [Told(1, 8, False, True)])
    front_end.advance(inf)
    assert seen == [(7, 11.0), (8, 13.0), (7, 14.0), (8, 15.0)]


def test_client_programs_share_the_events():
    costs = replace(ZERO, client_event_s=1.0)
    ends = []
    for clients in ([0, 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 1]):
        seen = []
        front_end = FrontEnd(costs, lambda told, time: seen.append((told.request, time)), clients)  # noqa: B023  used at once
        front_end.tell(0.0, 4, [Told(place, place, True, False) for place in range(4)])
        front_end.tell(5.0, 4, [Told(3, 3, False, True)])
        front_end.advance(inf)
        ends.append([time for request, time in seen if request == 3])
    assert ends == [[3.0, 8.0], [1.5, 6.5], [0.75, 5.75]]  # request 3's events, which its client reads last


def test_without_a_step_ahead_the_host_is_on_the_path():
    arrivals = [request(0.0, 4, 5)]
    ahead, not_ahead = (
        simulate(deployment(CLOCKWORK, num_steps_ahead=number, has_server=False), arrivals).finished[0].finish
        for number in (1, 0)
    )
    assert ahead == pytest.approx(0.25 + 5 * 1.0)
    assert not_ahead == pytest.approx(5 * 1.25)


def test_every_request_finishes_and_tokens_add_up():
    workload = parse_workload("poisson:rate=200,num_requests=80,num_input=150,num_output=20,spread=0.9", seed=3)
    run = simulate(deployment(), workload.requests)
    assert len(run.finished) == 80
    wanted = sorted((len(one.prompt), one.num_output) for one in workload.requests)
    assert wanted == sorted((one.num_input, one.num_output) for one in run.finished)
    due = sorted(one.arrival_s for one in workload.requests)
    assert all(0 <= sent - time < 0.01 for sent, time in zip(sorted(one.sent for one in run.finished), due, strict=True))
    assert all(one.sent < one.first_token <= one.finish for one in run.finished)
    num_preemptions = sum(one.num_preemptions for one in run.finished)
    computed = sum(one.num_input + one.num_output - 1 - one.num_cached for one in run.finished)
    assert run.work.num_tokens >= computed
    assert num_preemptions or run.work.num_tokens == computed


def test_the_engine_keeps_its_invariants_and_holds_nothing_at_the_end():
    engines = []

    def look(engine):
        engine.scheduler.check_invariants()
        engines[:] = [engine]

    workload = parse_workload("poisson:rate=500,num_requests=40,num_input=125,num_output=70,spread=0.5")
    tight = deployment(num_blocks=40)
    run = simulate(tight, workload.requests, on_step=look)
    assert sum(one.num_preemptions for one in run.finished) > 0, "this load should not fit"
    assert engines[0].scheduler.block_manager.num_free_blocks == 40
    assert not engines[0].has_work


def test_equal_arguments_give_equal_runs_and_seeds_differ():
    runs = [
        simulate(deployment(), parse_workload("poisson:rate=100,num_requests=50,num_input=50,num_output=20", seed).requests)
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


@pytest.mark.parametrize("name", ["bandwidth", "flops"])
def test_more_of_the_hardware_is_never_slower(name):
    requests = parse_workload("fixed:num_requests=20,num_input=300,num_output=20").requests
    ends = []
    for factor in (0.25, 0.5, 1.0, 2.0, 4.0):
        hardware = PROFILES["h200"]
        hardware = replace(hardware, **{name: factor * getattr(hardware, name)})
        ends.append(max(one.finish for one in simulate(deployment(hardware), requests).finished))
    assert ends == sorted(ends, reverse=True)
    assert ends[0] > ends[-1]


def test_cards_are_ordered_by_their_bandwidth_and_every_profile_runs():
    speeds = {}
    for name, hardware in PROFILES.items():
        (one,) = simulate(replace(deployment(hardware), spec=SHAPES["qwen3-8b"]), [request(0.0, 100, 50)]).finished
        speeds[name] = one.tpot
    cards = sorted((name for name in PROFILES if name != "cpu"), key=lambda name: -PROFILES[name].bandwidth)
    assert sorted(cards, key=speeds.__getitem__) == cards
    for name in cards:  # one stream reads all weights for each token
        assert 1 < speeds[name] * PROFILES[name].bandwidth / (2 * SHAPES["qwen3-8b"].num_parameters) < 1.5


def test_shared_prefixes_are_found_in_the_cache_and_different_prompts_are_not():
    one_document = make_workload(
        "shared-prefix", rate=10, num_requests=20, num_documents=1, document=128, question=40, num_output=4
    )
    shared = simulate(deployment(), one_document.requests)
    cached = sorted(one.num_cached for one in shared.finished)
    assert cached == [0] + [128] * 19
    apart = simulate(deployment(), make_workload("poisson", rate=10, num_requests=20, num_input=168, num_output=4).requests)
    assert not any(one.num_cached for one in apart.finished)


def test_eager_launches_cost_host_time():
    arrivals = [request(0.0, 20, 10)]
    graphs, eager = (simulate(deployment(use_graphs=on), arrivals).finished[0].tpot for on in (True, False))
    assert eager > 1.5 * graphs


def test_nothing_arrives_before_the_front_end_let_it_through():
    (one,) = simulate(deployment(), [request(5.0, 10, 1)]).finished
    assert one.ttft > 2 * PROFILES["h200"].calibration.frontend_latency_s
    assert one.finish > 5.0


def test_a_turn_comes_after_the_answer_before_it_and_finds_the_conversation_in_the_cache():
    workload = make_workload("multi-turn", num_sessions=3, num_turns=4, rate=5.0, think_s=0.5)
    run = simulate(deployment(), workload.requests)
    assert len(run.finished) == 12
    by_length = {one.num_input: [] for one in run.finished}
    for one in run.finished:
        by_length[one.num_input].append(one)
    lengths = sorted(by_length)
    assert len(lengths) == 4, "every turn is longer than the one before"
    for before, after in pairwise(lengths):
        due = sorted(one.finish + 0.5 for one in by_length[before])
        assert sorted(one.sent for one in by_length[after]) == pytest.approx(due, abs=1e-3)
        assert all(one.num_cached >= before // 16 * 16 - 16 for one in by_length[after])


def test_limits_that_are_written_again_are_those_of_the_engine():
    """Not imported: the engine process can reach torch, and the simulator must not."""
    assert nanovllm.simulation.run.MAX_RECEIVE_SECONDS == nanovllm.engine.engine_process.MAX_RECEIVE_SECONDS
    assert nanovllm.simulation.front_end.MAX_MESSAGES_PER_TURN == nanovllm.engine.connection.MAX_MESSAGES_PER_TURN
