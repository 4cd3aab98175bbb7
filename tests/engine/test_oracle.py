"""The oracle property: whatever the limits, cache state, preemption, priorities, overlap or aborts, every request that
runs to its end has exactly the tokens of the naive loop, the books agree after every step, and nothing is held at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import HealthCheck, given, settings, strategies as st
from support import assert_nothing_is_held, greedy, make_engine, make_scheduler, naive_generate

from nanovllm.engine.block_manager import hash_block
from nanovllm.engine.policy import POLICIES

HASHES = {"xxhash": hash_block, "weak": lambda previous, data: (previous + sum(data)) % 7, "constant": lambda previous, data: 0}


@dataclass(frozen=True)
class Call:
    prompt: list[int]
    max_tokens: int
    n: int
    priority: int
    salt: str
    arrives_at: int  # engine step
    aborts_at: int | None


@dataclass(frozen=True)
class Machine:
    num_blocks: int
    block_size: int
    max_num_seqs: int
    budget: int
    max_prompt_chunk: int | None
    watermark: float
    policy: str
    prefix_caching: bool
    hash_name: str
    num_steps_ahead: int
    eos: tuple[int, ...]


# Few different tokens, and prompts grown from common beginnings: shared prefixes and equal blocks are the rule.
beginnings = st.sampled_from([[], [1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 1, 1, 1, 1, 1]])
prompts = st.builds(lambda head, tail: head + tail, beginnings, st.lists(st.integers(0, 2), min_size=1, max_size=8))
calls = st.builds(
    Call,
    prompt=prompts,
    max_tokens=st.integers(1, 14),
    n=st.sampled_from([1, 1, 1, 2, 3]),
    priority=st.integers(0, 2),
    salt=st.sampled_from(["", "", "tenant"]),
    arrives_at=st.integers(0, 12),
    aborts_at=st.one_of(st.none(), st.none(), st.integers(0, 25)),
)
machines = st.builds(
    Machine,
    num_blocks=st.integers(8, 40),
    block_size=st.integers(4, 6),
    max_num_seqs=st.integers(1, 6),
    budget=st.integers(1, 24),
    max_prompt_chunk=st.one_of(st.none(), st.integers(1, 8)),
    watermark=st.sampled_from([0.0, 0.01, 0.3]),
    policy=st.sampled_from(list(POLICIES)),
    prefix_caching=st.booleans(),
    hash_name=st.sampled_from(list(HASHES)),
    num_steps_ahead=st.integers(0, 3),
    eos=st.sampled_from([(), (0,), (1, 2, 3, 4, 5, 6, 7, 8)]),
)


def build(machine: Machine):
    scheduler = make_scheduler(
        machine.num_blocks,
        machine.block_size,
        machine.max_num_seqs,
        machine.budget,
        machine.policy,
        machine.prefix_caching,
        HASHES[machine.hash_name],
        max_prompt_chunk=machine.max_prompt_chunk,
        watermark=machine.watermark,
    )
    return make_engine(scheduler, num_steps_ahead=machine.num_steps_ahead, eos=machine.eos)


def run(engine, workload: list[Call]) -> dict[str, tuple[Call, object]]:
    """Play arrivals and aborts against the step counter; returns the finished outputs by request id."""
    ids: dict[str, Call] = {}
    finished = {}
    step = 0
    while engine.has_work or any(call.arrives_at >= step for call in workload):
        for call in workload:
            if call.arrives_at == step:
                params = greedy(call.max_tokens, n=call.n)
                ids[engine.add_request(call.prompt, params, priority=call.priority, cache_salt=call.salt)] = call
        for request_id, call in ids.items():
            if call.aborts_at is not None and call.aborts_at == step - call.arrives_at:
                engine.abort(request_id)
        for output in engine.step():
            if output.finished:
                assert output.request_id not in finished, "a request ended twice"
                finished[output.request_id] = (ids[output.request_id], output)
        engine.scheduler.check_invariants()
        step += 1
        assert step < 5_000, "the engine makes no progress"
    return finished


@given(machine=machines, workload=st.lists(calls, min_size=1, max_size=8))
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_greedy_outputs_equal_the_naive_loop_whatever_happens(machine, workload):
    engine = build(machine)
    limit = engine.max_model_len
    finished = run(engine, workload)
    for call, output in finished.values():
        expected = naive_generate(call.prompt, min(call.max_tokens, limit - len(call.prompt)), machine.eos)
        for completion in output.completions:
            if completion.finish_reason != "abort":
                assert completion.token_ids == expected
            else:
                assert completion.token_ids == expected[: len(completion.token_ids)]
    assert len(finished) >= sum(call.aborts_at is None for call in workload)
    assert_nothing_is_held(engine)


@given(machine=machines, workload=st.lists(calls, min_size=2, max_size=8))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_limits_may_change_at_any_step(machine, workload):
    engine = build(machine)
    original_step = engine.step
    counter = iter(range(10_000))

    def step_with_changes():
        number = next(counter)
        engine.scheduler.set_limits(max_num_batched_tokens=1 + number % 9, max_num_seqs=1 + number % machine.max_num_seqs)
        return original_step()

    engine.step = step_with_changes  # type: ignore[method-assign]
    for call, output in run(engine, workload).values():
        expected = naive_generate(call.prompt, min(call.max_tokens, engine.max_model_len - len(call.prompt)), machine.eos)
        for completion in output.completions:
            assert completion.token_ids == expected[: len(completion.token_ids)]
    assert_nothing_is_held(engine)
