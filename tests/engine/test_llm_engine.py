from __future__ import annotations

import gc
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from support import VOCAB_SIZE, assert_nothing_is_held, drain, greedy, make_engine, naive_generate, next_token

from nanovllm.engine.door import Door
from nanovllm.engine.events import (
    RequestAdded,
    SequenceAdmitted,
    SequenceFinished,
    SequencePreempted,
    StepCollected,
    StepDispatched,
)
from nanovllm.errors import (
    CacheTooSmall,
    EngineDead,
    InvalidPrompt,
    InvalidSamplingParams,
    PromptTooLong,
    RequestError,
)


class TestOneStepAhead:
    def test_step_n_plus_1_is_dispatched_before_the_result_of_step_n_is_collected(self):
        engine = make_engine(num_steps_ahead=1, seconds_per_step=0.002)
        engine.generate([[1, 2, 3], [4, 5]], greedy(6))
        order = engine.executor.log
        for step in range(5):
            assert order.index(("dispatch", step + 1)) < order.index(("collect", step))

    def test_host_work_hides_behind_the_device(self):
        """20 steps of 5 ms on the device and 4 ms on the host: in turns 180 ms, overlapped little over 100 ms."""

        class SlowHost:
            def on_event(self, event):
                if isinstance(event, StepCollected):
                    time.sleep(0.004)

        def seconds(num_steps_ahead: int) -> float:
            engine = make_engine(num_steps_ahead=num_steps_ahead, seconds_per_step=0.005)
            engine.events.listeners.append(SlowHost())
            start = time.perf_counter()
            engine.generate([[1, 2]], greedy(20))
            return time.perf_counter() - start

        assert seconds(1) < 0.8 * seconds(0)

    @pytest.mark.parametrize("depth", [0, 1, 2, 4])
    def test_a_stop_token_found_late_leaks_neither_token_block_nor_cache_entry(self, depth):
        prompt = [3, 1, 4]
        stop = naive_generate(prompt, 40)[9]
        expected = naive_generate(prompt, 40, stop=(stop,))
        engine = make_engine(num_steps_ahead=depth, eos=(stop,), block_size=2)
        output = engine.generate([prompt], greedy(40))[0]
        assert output.token_ids == expected
        assert output.completions[0].finish_reason == "stop"
        drain(engine)
        assert_nothing_is_held(engine)
        known = {tuple(block.token_ids) for block in engine.scheduler.block_manager._index.values()}
        stream = [*prompt, *expected]
        assert known <= {tuple(stream[i : i + 2]) for i in range(0, len(stream), 2)}, "a dropped token was published"

    def test_the_row_and_blocks_of_a_late_stop_are_reused_safely(self):
        prompts = [[i, i + 1, i + 2] for i in range(30)]
        engine = make_engine(num_steps_ahead=2, eos=(1, 2, 3, 4, 5), num_blocks=12, block_size=2, max_num_seqs=3)
        outputs = engine.generate(prompts, greedy(12))
        assert [o.token_ids for o in outputs] == [naive_generate(p, 12, stop=(1, 2, 3, 4, 5)) for p in prompts]
        assert_nothing_is_held(engine)

    def test_known_lengths_cost_no_extra_step(self):
        engine = make_engine(num_steps_ahead=1)
        engine.generate([[1, 2, 3]], greedy(5))
        assert sum(len(batch.rows) for batch in engine.executor.batches) == 5


class TestGenerate:
    def test_outputs_come_in_the_order_of_the_prompts(self):
        prompts = [[i] for i in range(20)]
        params = [greedy(1 + (7 * i) % 11) for i in range(20)]
        outputs = make_engine(max_num_seqs=3).generate(prompts, params)
        assert [o.token_ids for o in outputs] == [naive_generate(p, s.max_tokens) for p, s in zip(prompts, params)]

    def test_a_refused_prompt_leaves_nothing_behind_and_disturbs_nobody(self):
        engine = make_engine()
        other = engine.add_request([1, 2], greedy(4))
        with pytest.raises(InvalidPrompt):
            engine.generate([[1], [2], [VOCAB_SIZE]], greedy(4))
        outputs = []
        while engine.has_work:
            outputs += [output for output in engine.step() if output.finished]
        assert [output.request_id for output in outputs] == [other]
        assert_nothing_is_held(engine)

    def test_params_must_match_prompts_in_number(self):
        with pytest.raises(InvalidSamplingParams, match="2 prompts need as many"):
            make_engine().generate([[1], [2]], [greedy()])

    def test_no_prompts_give_no_outputs(self):
        assert make_engine().generate([], greedy()) == []

    def test_metrics_are_filled(self):
        output = make_engine().generate([[1, 2, 3]], greedy(5))[0]
        metrics = output.metrics
        assert metrics.num_prompt_tokens == 3 and metrics.num_generated_tokens == 5
        assert 0 <= metrics.arrival_time <= metrics.first_scheduled_time <= metrics.first_token_time <= metrics.finish_time
        assert metrics.tpot == pytest.approx((metrics.finish_time - metrics.first_token_time) / 4)

    def test_one_token_has_no_time_per_output_token(self):
        assert make_engine().generate([[1]], greedy(1))[0].metrics.tpot is None

    def test_output_ends_at_the_context_limit(self):
        output = make_engine(max_model_len=10).generate([[1, 2, 3]], greedy(50))[0]
        assert len(output.token_ids) == 7 and output.completions[0].finish_reason == "length"
        unlimited = make_engine(max_model_len=10).generate([[1, 2, 3]], greedy(None))[0]
        assert unlimited.token_ids == output.token_ids

    def test_min_tokens_postpones_the_stop(self):
        everything = tuple(range(VOCAB_SIZE))
        engine = make_engine(eos=everything)
        assert len(engine.generate([[1]], greedy(10, min_tokens=4))[0].token_ids) == 4
        assert len(engine.generate([[1]], greedy(10))[0].token_ids) == 1
        assert len(engine.generate([[1]], greedy(10, ignore_eos=True))[0].token_ids) == 10

    def test_stop_token_ids_end_it_and_are_named(self):
        expected = naive_generate([5], 20)
        completion = make_engine().generate([[5]], greedy(20, stop_token_ids=[expected[3]]))[0].completions[0]
        index = expected.index(expected[3])
        assert completion.token_ids == expected[: index + 1]
        assert (completion.finish_reason, completion.stop_reason) == ("stop", expected[3])


class TestAbort:
    @pytest.mark.parametrize("num_steps", [0, 1, 2, 5])
    def test_abort_in_any_state_frees_everything_once(self, num_steps):
        engine = make_engine(budget=4, num_steps_ahead=1)
        request_id = engine.add_request(list(range(9)), greedy(10))
        keep = engine.add_request([1, 2], greedy(10))
        for _ in range(num_steps):
            engine.step()
        output = engine.abort(request_id)
        assert output.finished and output.completions[0].finish_reason == "abort"
        assert engine.abort(request_id) is None
        results = {}
        while engine.has_work:
            results.update({o.request_id: o for o in engine.step()})
            engine.scheduler.check_invariants()
        assert results[keep].token_ids == naive_generate([1, 2], 10)
        assert request_id not in results
        assert_nothing_is_held(engine)

    def test_abort_of_an_unknown_request_is_harmless(self):
        assert make_engine().abort("nobody") is None

    def test_an_abort_by_a_listener_takes_effect_after_the_step_and_ends_generate(self):
        engine = make_engine()

        class Aborter:
            def on_event(self, event):
                if isinstance(event, StepDispatched) and event.step == 3:
                    engine.abort("request-0")

        engine.events.listeners.append(Aborter())
        outputs = engine.generate([[1, 2, 3], [4, 5]], greedy(20))
        assert outputs[0].completions[0].finish_reason == "abort" and 0 < len(outputs[0].token_ids) < 20
        assert outputs[1].token_ids == naive_generate([4, 5], 20)
        assert_nothing_is_held(engine)

    def test_an_abort_from_a_finalizer_waits_for_the_next_step(self):
        engine = make_engine()
        request_id = engine.add_request([1, 2, 3], greedy(20))
        engine.step()
        engine.abort_later(request_id)
        assert engine.scheduler.running
        drain(engine)
        assert_nothing_is_held(engine)

    def test_ctrl_c_ends_generate_between_two_steps_and_leaves_a_working_engine(self):
        engine = make_engine()

        class Interrupter:
            def on_event(self, event):
                if isinstance(event, StepDispatched) and event.step == 3:
                    signal.raise_signal(signal.SIGINT)

        engine.events.listeners.append(Interrupter())
        with pytest.raises(KeyboardInterrupt):
            engine.generate([[1, 2, 3]], greedy(20))
        engine.events.listeners.clear()
        assert engine.generate([[1, 2]], greedy(5))[0].token_ids == naive_generate([1, 2], 5)
        assert_nothing_is_held(engine)


class TestTheDoor:
    @pytest.mark.parametrize(
        ("prompt", "error", "message"),
        [
            ([], InvalidPrompt, "no tokens"),
            ([VOCAB_SIZE], InvalidPrompt, "from 0 to 49"),
            ([-1], InvalidPrompt, "from 0 to 49"),
            ([1.5], InvalidPrompt, "whole numbers"),
            ([True], InvalidPrompt, "whole numbers"),
            (["a"], InvalidPrompt, "whole numbers"),
            (None, InvalidPrompt, "NoneType"),
            (b"bytes", InvalidPrompt, "bytes"),
            ("text", InvalidPrompt, "no tokenizer"),
            ("\ud800", InvalidPrompt, "surrogate"),
            ([1] * 300, PromptTooLong, "300 tokens"),
        ],
    )
    def test_bad_prompts_are_refused_with_the_reason(self, prompt, error, message):
        engine = make_engine()
        with pytest.raises(error, match=message):
            engine.add_request(prompt, greedy())
        assert_nothing_is_held(engine)

    def test_a_prompt_larger_than_the_cache_is_refused(self):
        engine = make_engine(num_blocks=4, block_size=4)
        engine._door = Door(replace(engine.bounds, max_model_len=1000), None)
        with pytest.raises(CacheTooSmall, match="holds 16 in all"):
            engine.add_request([1] * 16, greedy())

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"params": {"temperature": 0}}, "must be SamplingParams"),
            ({"params": greedy(stop_token_ids=[VOCAB_SIZE])}, "stop_token_ids: token id 50"),
            ({"params": greedy(allowed_token_ids=[99])}, "allowed_token_ids: token id 99"),
            ({"params": greedy(logit_bias={77: 1.0})}, "logit_bias: token id 77"),
            ({"params": greedy(stop=["x"])}, "need a tokenizer"),
            ({"priority": "high"}, "priority"),
            ({"priority": True}, "priority"),
            ({"cache_salt": 5}, "cache_salt"),
            ({"cache_salt": "\ud800"}, "cache_salt"),
            ({"request_id": 5}, "request_id must be a string"),
            ({"params": greedy(None, min_tokens=300)}, "room for 255 tokens"),
        ],
    )
    def test_bad_options_are_refused_with_the_reason(self, options, message):
        with pytest.raises(RequestError, match=message):
            make_engine().add_request([1], **options)

    @pytest.mark.parametrize("prompts", [None, 5, "text", {1: 2}, {1, 2}, (token for token in [1])])
    def test_prompts_must_be_a_list(self, prompts):
        with pytest.raises(InvalidPrompt, match="prompts must be a list"):
            make_engine().generate(prompts, greedy())

    @pytest.mark.parametrize("params", [5, "greedy", dict])
    def test_params_must_be_sampling_params(self, params):
        with pytest.raises(InvalidSamplingParams):
            make_engine().generate([[1]], params)

    def test_given_ids_do_not_collide_with_generated_ones(self):
        engine = make_engine()
        engine.add_request([1], greedy(), request_id="request-0")
        assert engine.add_request([2], greedy()) == "request-1"

    def test_a_request_id_in_use_is_refused(self):
        engine = make_engine()
        engine.add_request([1], greedy(), request_id="a")
        with pytest.raises(RequestError, match="already in use"):
            engine.add_request([2], greedy(), request_id="a")
        drain(engine)
        engine.add_request([2], greedy(), request_id="a")


class TestFailure:
    def test_a_failed_step_stops_the_engine_and_says_why(self):
        engine = make_engine(next_one=lambda context, seed: 1 // (len(context) < 6))
        engine.add_request([1, 2, 3], greedy(10))
        with pytest.raises(ZeroDivisionError):
            drain(engine)
        with pytest.raises(EngineDead, match="ZeroDivisionError"):
            engine.step()
        with pytest.raises(EngineDead):
            engine.add_request([1], greedy())

    def test_close_is_idempotent_and_final(self):
        engine = make_engine()
        engine.close()
        engine.close()
        with pytest.raises(EngineDead, match="closed"):
            engine.add_request([1], greedy())


class TestEvents:
    def test_listeners_see_the_life_of_a_request(self):
        engine = make_engine(num_blocks=6, block_size=4, watermark=0.0)
        seen = []
        engine.events.listeners.append(type("Listener", (), {"on_event": lambda self, event: seen.append(event)})())
        engine.generate([[1] * 6, [2] * 6], greedy(12))
        kinds = {type(event) for event in seen}
        assert kinds == {RequestAdded, SequenceAdmitted, SequencePreempted, SequenceFinished, StepDispatched, StepCollected}
        steps = [event for event in seen if isinstance(event, StepDispatched)]
        assert [event.step for event in steps] == list(range(len(steps)))
        assert sum(event.num_new_tokens for event in seen if isinstance(event, StepCollected)) == 24

    def test_nothing_is_emitted_without_listeners(self, monkeypatch):
        engine = make_engine()
        monkeypatch.setattr(type(engine.events), "emit", lambda *_: pytest.fail("emitted to nobody"))
        engine.generate([[1, 2]], greedy(3))


class TestImports:
    def test_the_scheduler_needs_no_torch_and_loads_at_once(self):
        """A tenth of a second of a processor's time; with torch it would be seconds."""
        code = (
            "import time; start = time.process_time(); import nanovllm.engine.scheduler; took = time.process_time() - start\n"
            "import sys; heavy = {'torch', 'transformers', 'triton'} & set(sys.modules); print(took, sorted(heavy))"
        )
        runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)]
        assert all(run.stdout.split(None, 1)[1].strip() == "[]" for run in runs)
        assert min(float(run.stdout.split()[0]) for run in runs) < 0.3

    def test_the_engine_and_the_config_need_no_torch(self):
        code = "import nanovllm.engine.llm_engine, nanovllm.config, nanovllm.model_spec, sys; assert 'torch' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], check=True)


def test_the_fake_model_depends_on_the_whole_prefix():
    assert len({next_token([a, 1, 2]) for a in range(50)}) > 20


def test_requests_leave_no_work_for_the_garbage_collector():
    """So a server's engine has it look at everything a hundred times less often than usual (`engine_main.py`)."""
    engine = make_engine(num_blocks=256)
    gc.collect()
    gc.disable()
    try:
        for number in range(40):
            engine.add_request([number] * 9, greedy(6, n=1 + number % 3), request_id=str(number))
            with pytest.raises(RequestError):
                engine.add_request([-1], greedy())
            engine.step()
            if number % 5 == 0:
                engine.abort(str(number))
        while engine.has_work:
            engine.step()
        num_leftovers = gc.collect()
        assert num_leftovers < 40  # less than one for each request
    finally:
        gc.enable()
