from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st
from support import assert_nothing_is_held, drain, greedy, make_engine, make_scheduler, naive_generate

from nanovllm.engine.engine_process import max_admissible_tokens, why_first_waits
from nanovllm.engine.policy import PrefillFirst
from nanovllm.errors import ConfigError


def lengths_of(engine) -> list[list[int]]:
    return [batch.lengths for batch in engine.executor.batches]


def test_a_long_prompt_is_computed_in_chunks_of_the_budget():
    engine = make_engine(budget=8, num_steps_ahead=0)
    engine.add_request(list(range(20)), greedy(3))
    drain(engine)
    assert lengths_of(engine) == [[8], [8], [4], [1], [1]]


def test_running_sequences_decode_while_a_long_prompt_is_chunked():
    engine = make_engine(budget=8, num_steps_ahead=0)
    engine.add_request([1, 2, 3], greedy(8))
    engine.step()
    engine.add_request(list(range(20)), greedy(2))
    drain(engine)
    assert lengths_of(engine)[1:4] == [[1, 7], [1, 7], [1, 6]], "one decode token in every step, the rest is prompt"


def test_the_cap_per_prompt_leaves_room_for_others_in_the_same_step():
    engine = make_engine(budget=12, num_steps_ahead=0, max_prompt_chunk=4)
    engine.add_request(list(range(20)), greedy(2))
    engine.add_request([5, 6, 7], greedy(2))
    engine.step()
    assert lengths_of(engine) == [[4, 3]]


def test_every_sequence_may_be_chunked_not_just_the_first():
    engine = make_engine(budget=16, num_steps_ahead=0, max_prompt_chunk=6)
    for start in range(3):
        engine.add_request([start] * 20, greedy(1))
    engine.step()
    assert lengths_of(engine) == [[6, 6, 4]]


@pytest.mark.parametrize("others", [0, 1])
def test_the_longest_prompt_that_is_admissible_is_admitted_and_one_token_more_is_not(others):
    def engine():
        made = make_engine(num_blocks=20, block_size=4, watermark=0.2, num_steps_ahead=0, prefix_caching=False, max_num_seqs=2)
        for _ in range(others):
            made.add_request([1] * 13, greedy(40))
            made.step()
        return made

    longest = max_admissible_tokens(engine())
    assert longest == (4 * (20 - 4 - 4) if others else 80)  # of the others, four blocks; of the watermark, four
    for length, is_admitted in ((longest, True), (longest + 1, False)):
        if length < engine().max_model_len:
            made = engine()
            made.add_request([2] * length, greedy(1))
            made.scheduler.schedule()
            assert (not made.scheduler.waiting) == is_admitted, length
            assert is_admitted or why_first_waits(made.scheduler) == "blocks"
    made = engine()
    for _ in range(2 - others):
        made.add_request([3], greedy(20))
        made.step()
    assert max_admissible_tokens(made) == 0 and why_first_waits(made.scheduler) == "rows"


def test_admission_leaves_the_watermark_free_but_never_blocks_an_idle_engine():
    engine = make_engine(num_blocks=10, block_size=4, watermark=0.3, num_steps_ahead=0, prefix_caching=False)
    engine.add_request([1] * 36, greedy(1))  # nine blocks of ten: allowed alone
    drain(engine)
    engine.add_request([1] * 16, greedy(4))
    engine.add_request([2] * 14, greedy(4))  # would leave two blocks of ten
    engine.step()
    assert len(engine.scheduler.running) == 1 and len(engine.scheduler.waiting) == 1
    drain(engine)
    assert_nothing_is_held(engine)


def test_the_youngest_is_preempted_and_finishes_with_the_same_tokens():
    engine = make_engine(num_blocks=8, block_size=4, watermark=0.0)
    prompts = [[1] * 8, [2] * 8, [3] * 8]
    outputs = engine.generate(prompts, greedy(16))
    assert [output.token_ids for output in outputs] == [naive_generate(prompt, 16) for prompt in prompts]
    assert outputs[0].metrics.num_preemptions == 0
    assert sum(output.metrics.num_preemptions for output in outputs) > 0
    assert_nothing_is_held(engine)


def test_preemption_takes_the_lowest_priority_first():
    engine = make_engine(num_blocks=8, block_size=4, watermark=0.0, policy="priority", num_steps_ahead=0)
    urgent_id = None
    for priority in (5, 1, 9):
        urgent_id = engine.add_request([priority] * 8, greedy(16), priority=priority)
    finished = []
    while engine.has_work:
        finished += [output.request_id for output in engine.step() if output.finished]
        engine.scheduler.check_invariants()
    assert finished == ["request-1", "request-0", "request-2"] and urgent_id == "request-2"


def test_priority_decides_who_is_admitted_first():
    engine = make_engine(max_num_seqs=1, policy="priority", num_steps_ahead=0)
    for priority in (3, 1, 2):
        engine.add_request([priority], greedy(2), priority=priority)
    order = []
    while engine.has_work:
        order += [output.prompt_token_ids[0] for output in engine.step() if output.finished]
    assert order == [1, 2, 3]


def test_prefill_first_delays_decoding_but_only_for_the_bound():
    scheduler = make_scheduler(budget=4, policy="prefill_first", max_num_seqs=40)
    scheduler.policy = PrefillFirst(max_consecutive_prefills=3)
    engine = make_engine(scheduler, num_steps_ahead=0)
    engine.add_request([1, 2], greedy(30))
    engine.step()
    waits = longest = 0
    for number in range(25):  # a steady arrival of prompts
        engine.add_request([number] * 4, greedy(1))
        engine.step()
        is_decoding = 0 in engine.executor.batches[-1].rows or any(s > 1 for s in engine.executor.batches[-1].starts)
        decoded = any(start >= 2 and length == 1 for start, length in zip(*_columns(engine)))
        waits = 0 if decoded else waits + 1
        longest = max(longest, waits)
        assert is_decoding or waits <= 3
    assert longest == 3, "decoding waits as long as the bound allows, and no longer"
    drain(engine)


def _columns(engine):
    batch = engine.executor.batches[-1]
    return batch.starts, batch.lengths


def test_fcfs_never_lets_decoding_wait():
    engine = make_engine(budget=8, num_steps_ahead=0, max_num_seqs=40)
    engine.add_request([1, 2], greedy(20))
    engine.step()
    for number in range(10):
        engine.add_request([number] * 7, greedy(1))
        engine.step()
        assert 0 in engine.executor.batches[-1].rows
    drain(engine)


def test_limits_change_between_steps():
    engine = make_engine(max_num_seqs=4, num_steps_ahead=0)
    for number in range(4):
        engine.add_request([number], greedy(6))
    engine.scheduler.set_limits(max_num_seqs=2)
    engine.step()
    assert len(engine.scheduler.running) == 2
    engine.scheduler.set_limits(max_num_seqs=4, max_num_batched_tokens=3)
    engine.step()
    assert len(engine.scheduler.running) == 3
    drain(engine)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_num_seqs": 9}, "room for 8"),
        ({"max_num_seqs": 0}, "at least 1"),
        ({"max_num_seqs": True}, "whole number"),
        ({"max_num_batched_token": 5}, "did you mean 'max_num_batched_tokens'"),
        ({"watermark": 1.5}, "watermark=1.5"),
    ],
)
def test_impossible_limits_are_refused_and_change_nothing(changes, message):
    scheduler = make_scheduler()
    before = scheduler.limits
    with pytest.raises(ConfigError, match=message):
        scheduler.set_limits(**changes)
    assert scheduler.limits == before


def test_a_later_prompt_in_the_same_step_shares_blocks_that_this_step_computes():
    engine = make_engine(num_steps_ahead=0)
    prompt = list(range(12))
    outputs = engine.generate([prompt, prompt], greedy(4))
    assert engine.executor.batches[0].lengths == [12, 4]
    assert outputs[0].token_ids == outputs[1].token_ids == naive_generate(prompt, 4)


def test_a_prompt_that_is_cached_entirely_still_computes_its_last_block():
    engine = make_engine(block_size=4, num_steps_ahead=0)
    prompt = list(range(8))
    first = engine.generate([prompt], greedy(3))[0]
    second = engine.generate([prompt], greedy(3))[0]
    assert first.token_ids == second.token_ids
    assert second.metrics.num_cached_tokens == 4


def test_generated_blocks_serve_the_next_turn_of_a_conversation():
    engine = make_engine(block_size=4)
    first = engine.generate([[1, 2, 3]], greedy(14))[0]
    history = [1, 2, 3, *first.token_ids, 9]
    second = engine.generate([history], greedy(2))[0]
    assert second.metrics.num_cached_tokens == 16
    assert second.token_ids == naive_generate(history, 2)


def test_no_admission_in_a_step_that_preempted():
    engine = make_engine(num_blocks=8, block_size=4, watermark=0.0, num_steps_ahead=0)
    for token in range(4):
        engine.add_request([token] * 7, greedy(16))
    while engine.has_work:
        before = engine.scheduler.waiting[:]
        preempted = sum(sequence.num_preemptions for sequence in [*engine.scheduler.waiting, *engine.scheduler.running])
        engine.step()
        now = [*engine.scheduler.waiting, *engine.scheduler.running]
        if sum(sequence.num_preemptions for sequence in now) > preempted:
            assert not engine.executor.batches[-1].seats
            assert set(before) <= set(engine.scheduler.waiting)


def test_cached_tokens_are_counted_at_the_first_admission_only():
    engine = make_engine(num_blocks=8, block_size=4, watermark=0.0)
    outputs = engine.generate([[1] * 8, [2] * 8, [3] * 8], greedy(16))
    assert any(output.metrics.num_preemptions for output in outputs)
    assert [output.metrics.num_cached_tokens for output in outputs] == [0, 0, 0]


def test_no_more_run_than_the_budget_can_serve():
    engine = make_engine(num_steps_ahead=0, budget=2, max_num_seqs=8)
    for token in range(8):
        engine.add_request([token], greedy(6))
    engine.step()
    assert len(engine.scheduler.running) == 2
    drain(engine)


class TestSeveralCompletions:
    def test_siblings_share_the_prompt_and_copy_the_partly_filled_block(self):
        engine = make_engine(block_size=4, prefix_caching=False, num_steps_ahead=0)
        output = engine.generate([[1, 2, 3, 4, 5, 6]], greedy(5, n=3))[0]
        assert [completion.token_ids for completion in output.completions] == [naive_generate([1, 2, 3, 4, 5, 6], 5)] * 3
        copies = [copy for batch in engine.executor.batches for copy in batch.block_copies]
        assert len(copies) == 2, "each sibling copies the partly filled block once"
        prompt_tokens = sum(sum(n for n in batch.lengths if n > 1) for batch in engine.executor.batches)
        assert prompt_tokens == 6, "the prompt is computed once, also without a prefix cache"
        assert_nothing_is_held(engine)

    @settings(max_examples=300, deadline=None)
    @given(
        requests=st.lists(
            st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=8), st.integers(1, 12), st.integers(1, 3)), max_size=3
        ),
        num_blocks=st.integers(6, 12),
        block_size=st.integers(2, 4),
        budget=st.integers(2, 5),
        depth=st.integers(0, 1),
        caching=st.booleans(),
    )
    def test_in_caches_so_small_that_siblings_preempt_each_other(self, requests, num_blocks, block_size, budget, depth, caching):
        engine = make_engine(
            num_blocks=num_blocks,
            block_size=block_size,
            budget=budget,
            num_steps_ahead=depth,
            prefix_caching=caching,
            watermark=0.0,
        )
        requests = [request for request in requests if len(request[0]) < engine.max_model_len]
        outputs = engine.generate([prompt for prompt, _, _ in requests], [greedy(length, n=n) for _, length, n in requests])
        for (prompt, length, _), output in zip(requests, outputs):
            expected = naive_generate(prompt, min(length, engine.max_model_len - len(prompt)))
            assert all(completion.token_ids == expected for completion in output.completions)
        assert_nothing_is_held(engine)

    @pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9])
    @pytest.mark.parametrize("caching", [True, False])
    def test_any_prompt_length_against_the_block_size(self, length, caching):
        engine = make_engine(block_size=4, prefix_caching=caching)
        prompt = list(range(length))
        output = engine.generate([prompt], greedy(6, n=4))[0]
        assert {tuple(completion.token_ids) for completion in output.completions} == {tuple(naive_generate(prompt, 6))}
        assert_nothing_is_held(engine)

    def test_siblings_are_admitted_when_the_first_one_has_ended_already(self):
        engine = make_engine(num_steps_ahead=0)
        output = engine.generate([[1, 2, 3]], greedy(1, n=3))[0]
        assert [len(completion.token_ids) for completion in output.completions] == [1, 1, 1]
        assert_nothing_is_held(engine)

    def test_abort_before_the_first_token_takes_the_siblings_along(self):
        engine = make_engine(budget=4)
        request_id = engine.add_request(list(range(20)), greedy(5, n=3))
        engine.step()
        output = engine.abort(request_id)
        assert [completion.finish_reason for completion in output.completions] == ["abort"] * 3
        drain(engine)
        assert_nothing_is_held(engine)
