"""AsyncEngine in front of real engine processes: the embedded model, and fake executors for hostility and death."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import asyncio
import dataclasses
import gc
import importlib.metadata
import json
import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from served import counting as serve_counting, make_tokenizer
from support import VOCAB_SIZE, naive_generate

from nanovllm import LLM, AsyncEngine, SamplingParams, StructuredOutput, errors
from nanovllm.config import EngineConfig
from nanovllm.engine import engine_process, messages
from nanovllm.engine.async_engine import LiveRequest
from nanovllm.engine.messages import AddRequest, Call, Failure, Hello, decode_for_frontend, encode
from nanovllm.errors import (
    ConfigError,
    EngineDead,
    InvalidGrammar,
    InvalidPrompt,
    InvalidSamplingParams,
    ModelNotFound,
    PromptTooLong,
    RequestError,
)
from nanovllm.loaders.checkpoint import DEMO_PACKAGE
from nanovllm.outputs import GenerationOutput, PositionLogprobs, TokenLogprob

TESTS = Path(__file__).resolve().parent.parent
OPTIONS: dict[str, Any] = {"dtype": "float32", "num_threads": 1, "num_kv_blocks": 256, "max_num_seqs": 16}
FOREVER = SamplingParams(temperature=0, max_tokens=None)


def greedy(max_tokens: int = 16, **options: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, **options)


async def finish(engine: AsyncEngine, prompt: Any, params: SamplingParams | None = None, **options: Any) -> GenerationOutput:
    output = None
    async for output in engine.generate(prompt, params, **options):
        assert output.completions
    assert output is not None and output.finished
    return output


async def eventually(condition: Callable[[], Awaitable[bool]], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < end, "waited in vain"
        await asyncio.sleep(0.02)


async def assert_nothing_is_held(engine: AsyncEngine) -> None:
    async def is_empty() -> bool:
        stats = await engine.stats()
        is_idle = stats["num_running"] == stats["num_waiting"] == stats["num_open_requests"] == 0
        return is_idle and stats["num_free_blocks"] == stats["num_kv_blocks"]

    await eventually(is_empty)
    assert not engine._requests and not engine._completions and not engine._calls


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def folder_of(engine: AsyncEngine) -> Path:
    return Path(engine.address.removeprefix("ipc://")).parent


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


class Service:
    """One engine for many tests, and the event loop that it lives on."""

    def __init__(self, **options: Any) -> None:
        self.loop = asyncio.new_event_loop()
        self.engine: AsyncEngine = self.run(AsyncEngine.start(**options))

    def run(self, what: Awaitable[Any]) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(what, 60))

    def close(self) -> None:
        self.run(self.engine.close())
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()


# --- the real model


def is_installed() -> bool:
    try:
        return bool(importlib.metadata.version(DEMO_PACKAGE))
    except importlib.metadata.PackageNotFoundError:
        return False


PROMPTS = [
    "The capital of France is",
    "def fibonacci(n: int) -> list[int]:\n",
    "Things to pack for a week in the mountains:\n1. A warm jacket\n2.",
    "I love pizza 🍕 and my favourite animals are 🐶, 🐱 and",
]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(**OPTIONS) as llm:
        yield llm


@pytest.fixture(scope="module")
def real() -> Iterator[Service]:
    service = Service(**OPTIONS)
    yield service
    service.run(assert_nothing_is_held(service.engine))
    service.close()


@pytest.mark.skipif(not is_installed() and not os.environ.get("CI"), reason="the demo model is not installed")
class TestWithTheModel:
    def check(self, llm: LLM, real: Service, params: SamplingParams, prompts: list[str] = PROMPTS) -> list[GenerationOutput]:
        """The same answers from both, all prompts at once."""
        expected = llm.generate(prompts, params, use_tqdm=False)

        async def all_at_once() -> list[GenerationOutput]:
            return await asyncio.gather(*[finish(real.engine, prompt, params) for prompt in prompts])

        outputs = real.run(all_at_once())
        for output, other in zip(outputs, expected):
            assert output.prompt == other.prompt and output.prompt_token_ids == other.prompt_token_ids
            for mine, theirs in zip(output.completions, other.completions, strict=True):
                assert (mine.token_ids, mine.text) == (theirs.token_ids, theirs.text)
                assert (mine.finish_reason, mine.stop_reason) == (theirs.finish_reason, theirs.stop_reason)
            metrics = output.metrics
            assert metrics.num_generated_tokens == other.metrics.num_generated_tokens
            assert metrics.num_prompt_tokens == len(output.prompt_token_ids)
            assert metrics.arrival_time <= metrics.first_scheduled_time <= metrics.first_token_time <= metrics.finish_time
        return outputs

    def test_tokens_and_text_are_those_of_llm(self, llm, real):
        self.check(llm, real, greedy(12))

    def test_several_completions_are_those_of_llm(self, llm, real):
        self.check(llm, real, SamplingParams(temperature=0.8, seed=3, n=3, max_tokens=6), PROMPTS[:1])

    @pytest.mark.parametrize("includes", [False, True])
    def test_stop_strings_end_the_text_and_the_sequence(self, llm, real, includes):
        params = greedy(12, stop=["Paris", "return", "\n3"], include_stop_str_in_output=includes, logprobs=0)
        outputs = self.check(llm, real, params, PROMPTS[:3])
        completions = [output.completions[0] for output in outputs]
        assert len({completion.stop_reason for completion in completions} & {"Paris", "return", "\n3"}) >= 2
        assert all(len(completion.logprobs) == len(completion.token_ids) for completion in completions)

    def test_one_of_several_completions_ends_at_a_stop_string(self, llm, real):
        outputs = self.check(llm, real, SamplingParams(temperature=1.2, seed=5, n=4, max_tokens=12, stop=["the"]), PROMPTS[:1])
        assert {completion.finish_reason for completion in outputs[0].completions} == {"stop", "length"}

    def test_bad_words_are_spelled_here_and_avoided_there(self, llm, real):
        (output,) = self.check(llm, real, greedy(8, bad_words=["Paris"]), PROMPTS[:1])
        assert "Paris" not in output.text

    def test_end_tokens_and_stop_tokens_end_a_sequence(self, llm, real):
        token_id = llm.tokenizer.encode(" Paris")[0]
        (output,) = self.check(llm, real, greedy(8, stop_token_ids=[token_id]), PROMPTS[:1])
        assert output.completions[0].stop_reason == token_id
        assert set(real.engine.facts.eos_token_ids) == set(real.engine.tokenizer.end_token_ids)

    def test_log_probabilities_come_through(self, llm, real):
        params = greedy(4, logprobs=2, prompt_logprobs=1)
        (expected,) = llm.generate(PROMPTS[:1], params, use_tqdm=False)
        (output,) = self.check(llm, real, params, PROMPTS[:1])
        mine, theirs = output.completions[0].logprobs, expected.completions[0].logprobs
        assert isinstance(mine[0], PositionLogprobs) and isinstance(mine[0].chosen, TokenLogprob) and len(mine[0].top) == 2
        for ours, other in zip([*mine, *output.prompt_logprobs[1:]], [*theirs, *expected.prompt_logprobs[1:]], strict=True):
            assert [top.token_id for top in ours.top] == [top.token_id for top in other.top]
            assert ours.chosen.logprob == pytest.approx(other.chosen.logprob, abs=1e-4)
        assert output.prompt_logprobs[0] is None

    def test_prompt_log_probabilities_come_with_the_first_token(self, real):
        async def first() -> GenerationOutput:
            stream = real.engine.generate(PROMPTS[0], greedy(8, prompt_logprobs=0))
            try:
                return await anext(stream)
            finally:
                await stream.aclose()

        assert len(real.run(first()).prompt_logprobs) == 5

    @pytest.mark.parametrize("pooling", ["mean", "last"])
    def test_embeddings_are_those_of_llm(self, llm, real, pooling):
        (expected,) = llm.embed(PROMPTS[:1], pooling)
        output = real.run(real.engine.embed(PROMPTS[0], pooling))
        assert output.embedding == pytest.approx(expected.embedding, abs=1e-4) and len(output.embedding) == llm.spec.hidden_size
        assert output.num_prompt_tokens == expected.num_prompt_tokens

    def test_structured_output_is_that_of_llm(self, llm, real):
        params = greedy(12, structured=StructuredOutput("choice", ("Lyon", "Marseille")))
        (output,) = self.check(llm, real, params, PROMPTS[:1])
        assert output.text in ("Lyon", "Marseille")

    def test_a_malformed_grammar_is_an_answer_to_its_request(self, real):
        with pytest.raises(InvalidGrammar):
            real.run(finish(real.engine, PROMPTS[0], greedy(4, structured=StructuredOutput("grammar", "start: ((("))))

    def test_a_second_request_finds_the_prefix_of_the_first_unless_the_salt_differs(self, real):
        async def three() -> list[int]:
            prompt = [7] * 40
            outputs = [await finish(real.engine, prompt, greedy(2), cache_salt=salt) for salt in ("a", "a", "b")]
            return [output.metrics.num_cached_tokens for output in outputs]

        assert real.run(three()) == [0, 32, 0]

    def test_a_request_leaves_nothing_to_the_garbage_collector(self, real):
        """Twenty thousand leftovers stop a front end for up to 80 ms when the collector comes (LOG.md, 2026-11-29)."""
        real.run(finish(real.engine, PROMPTS[0], greedy(4, n=2)))
        gc.collect()
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            real.run(finish(real.engine, PROMPTS[0], greedy(4, n=2)))
            gc.collect()
            assert not [one for one in gc.garbage if isinstance(one, LiveRequest | GenerationOutput)]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()

    def test_the_tokenizer_is_that_of_the_checkpoint(self, llm, real):
        tokenizer = real.engine.tokenizer
        for text in [*PROMPTS, "<|im_start|>user\nHi<|im_end|>"]:
            assert tokenizer.encode(text) == llm.tokenizer.encode(text)
        messages = [{"role": "user", "content": "Hi"}]
        assert tokenizer.apply_chat_template(messages) == llm.tokenizer.apply_chat_template(messages)
        assert real.engine.facts.has_chat_template and tokenizer.end_token_ids == llm.tokenizer.end_token_ids

    def test_facts_are_those_of_the_resolved_config(self, llm, real):
        facts = real.engine.facts
        assert facts.config == dataclasses.asdict(llm.config) and facts.max_model_len == llm.memory_plan.max_model_len
        assert (facts.vocab_size, facts.num_kv_blocks, facts.block_size) == (llm.spec.vocab_size, 256, 16)
        assert "KV cache" in facts.memory_plan and facts.pid != os.getpid() and is_running(facts.pid)

    def test_a_profile_is_a_chrome_trace(self, real):
        async def both() -> str:
            path, _ = await asyncio.gather(real.engine.profile(0.2), finish(real.engine, PROMPTS[0], greedy(2)))
            return path

        trace = json.loads(Path(real.run(both())).read_text())
        assert any("linear" in str(event.get("name")) or "mm" in str(event.get("name")) for event in trace["traceEvents"])

    def test_a_model_that_is_not_there_is_named(self):
        with pytest.raises(ModelNotFound, match="no-such-model"):
            asyncio.run(AsyncEngine.start("/tmp/no-such-model.gguf"))


# --- the door


@pytest.fixture(scope="module")
def slow() -> Iterator[Service]:
    """100 steps per second; every test leaves it empty."""
    service = Service(builder="served:slow", num_kv_blocks=512, max_num_seqs=16)
    yield service
    service.close()


@pytest.fixture
def service(slow: Service) -> Iterator[Service]:
    yield slow
    slow.run(assert_nothing_is_held(slow.engine))


BAD_INPUT = [
    ("", {}, InvalidPrompt, "empty"),
    ([], {}, InvalidPrompt, "no tokens"),
    ([1, VOCAB_SIZE], {}, InvalidPrompt, "0 to 49"),
    (["a"], {}, InvalidPrompt, "token ids"),
    (7, {}, InvalidPrompt, "int"),
    ("\ud800", {}, InvalidPrompt, "surrogate"),
    ([1] * 4000, {}, PromptTooLong, "4000 tokens"),
    ("w1 " * 100_000, {}, PromptTooLong, "300000 characters"),
    ([1], {"params": {"temperature": 0}}, InvalidSamplingParams, "SamplingParams"),
    ([1], {"params": greedy(stop_token_ids=[50])}, InvalidSamplingParams, "stop_token_ids"),
    ([1], {"params": SamplingParams(min_tokens=3000, max_tokens=None)}, InvalidSamplingParams, "min_tokens"),
    ([1], {"priority": "high"}, RequestError, "priority"),
    ([1], {"priority": 2**70}, RequestError, "cannot be sent"),
    ([1], {"cache_salt": 3}, RequestError, "cache_salt"),
    ([1], {"request_id": 3}, RequestError, "request_id"),
    ([1], {"request_id": "\ud800"}, RequestError, "cannot be sent"),
]


class TestTheDoor:
    @pytest.mark.parametrize(("prompt", "options", "kind", "message"), BAD_INPUT, ids=[case[3] for case in BAD_INPUT])
    def test_bad_input_is_refused_before_anything_is_sent(self, service, prompt, options, kind, message):
        num_requests = service.run(service.engine.stats())["num_requests"]
        with pytest.raises(kind, match=message):
            service.run(finish(service.engine, prompt, **options))
        assert service.run(service.engine.stats())["num_requests"] == num_requests

    def test_a_request_id_in_use_is_refused(self, service):
        async def twice() -> None:
            stream = service.engine.generate([1], FOREVER, request_id="mine")
            await anext(stream)
            with pytest.raises(RequestError, match="mine"):
                await finish(service.engine, [2], request_id="mine")
            await stream.aclose()
            await finish(service.engine, [2], greedy(2), request_id="mine")

        service.run(twice())

    def test_what_only_the_engine_refuses_is_an_answer_to_that_request_alone(self, service, monkeypatch):
        async def both() -> None:
            stream = service.engine.generate([1, 2], greedy(30))
            await anext(stream)
            check = service.engine._door.check
            monkeypatch.setattr(service.engine._door, "check", lambda *args: check(*args)._replace(token_ids=[1, 77]))
            with pytest.raises(InvalidPrompt, match="0 to 49"):
                await finish(service.engine, [1], greedy(2))
            monkeypatch.undo()
            outputs = [output async for output in stream]
            assert outputs[-1].token_ids == naive_generate([1, 2], 30)

        service.run(both())

    def test_a_long_text_does_not_hold_up_the_loop(self, service):
        async def longest_pause() -> tuple[float, float]:
            text = "w1 w2 " * 300
            encode = service.engine.tokenizer.encode
            service.engine.tokenizer.encode = lambda text, *rest: (time.sleep(0.8), encode(text, *rest))[1]
            try:
                started = time.monotonic()
                task = asyncio.ensure_future(finish(service.engine, text, greedy(1)))
                await asyncio.sleep(0.02)
                pause = time.monotonic() - started
                await task
                return pause, time.monotonic() - started
            finally:
                del service.engine.tokenizer.encode

        pause, total = service.run(longest_pause())
        assert pause < 0.6 and total > 0.8

    def test_encoding_lets_other_threads_run(self):
        tokenizer = make_tokenizer()
        text = "w1 w2 w3 " * 100_000
        started = time.monotonic()
        tokenizer.encode(text)
        alone = time.monotonic() - started

        async def longest_pause() -> float:
            task, worst, last = asyncio.ensure_future(asyncio.to_thread(tokenizer.encode, text)), 0.0, time.monotonic()
            while not task.done():
                await asyncio.sleep(0.001)
                worst, last = max(worst, time.monotonic() - last), time.monotonic()
            return worst

        assert asyncio.run(longest_pause()) < alone / 2

    def test_embeddings_are_refused_by_name_when_the_pooling_is_unknown(self, service):
        with pytest.raises(RequestError, match="'max' is not one of mean, last"):
            service.run(service.engine.embed([1], "max"))


# --- streams


class TestStreams:
    def test_a_failure_of_one_text_is_that_requests_alone(self, service, caplog, monkeypatch):
        async def both() -> None:
            bad, good = service.engine.generate([1], FOREVER), service.engine.generate([2], greedy(40))
            await anext(bad)
            await anext(good)
            (request,) = [one for one in service.engine._requests.values() if one.output.prompt_token_ids == [1]]
            monkeypatch.setattr(request.completions[0], "detokenizer", None)
            with pytest.raises(errors.NanoVllmError, match="internal error: AttributeError"):
                async for _ in bad:
                    pass
            assert [output async for output in good][-1].token_ids == naive_generate([2], 40)

        service.run(both())

    def test_many_at_once_each_get_their_own_tokens(self, service):
        async def many() -> list[GenerationOutput]:
            prompts = [[i % 40 + 1, i % 7] for i in range(40)]
            return await asyncio.gather(*[finish(service.engine, prompt, greedy(20)) for prompt in prompts])

        for i, output in enumerate(service.run(many())):
            assert output.token_ids == naive_generate([i % 40 + 1, i % 7], 20)
            assert output.text == " ".join(f"w{token_id}" for token_id in output.token_ids)

    def test_the_output_is_one_live_object_that_grows(self, service):
        async def watch() -> list[tuple[int, int]]:
            return [(id(output), len(output.token_ids)) async for output in service.engine.generate([1], greedy(10))]

        seen = service.run(watch())
        assert len({identity for identity, _ in seen}) == 1
        lengths = [length for _, length in seen]
        assert lengths[0] < 10 and lengths[-1] == 10 and lengths == sorted(set(lengths) | {10})

    def test_a_slow_reader_misses_states_and_nothing_else(self, service):
        async def read_slowly() -> tuple[int, GenerationOutput]:
            outputs = []
            async for output in service.engine.generate([1], greedy(60)):
                outputs.append(output)
                await asyncio.sleep(0.2)
            return len(outputs), outputs[-1]

        num_yields, output = service.run(read_slowly())
        assert num_yields < 10 and output.token_ids == naive_generate([1], 60)

    def test_closing_a_generator_frees_its_blocks(self, service):
        async def leave() -> None:
            stream = service.engine.generate([1] * 40, FOREVER)
            await anext(stream)
            assert (await service.engine.stats())["num_free_blocks"] < 512
            await stream.aclose()
            await assert_nothing_is_held(service.engine)

        service.run(leave())

    def test_cancelled_readers_free_their_blocks_and_the_others_go_on(self, service):
        async def leave() -> None:
            tasks = [asyncio.ensure_future(finish(service.engine, [i + 1], FOREVER)) for i in range(20)]
            other = asyncio.ensure_future(finish(service.engine, [3, 3], greedy(40)))
            await asyncio.sleep(0.1)
            for task in tasks:
                task.cancel()
            assert (await other).token_ids == naive_generate([3, 3], 40)
            await assert_nothing_is_held(service.engine)
            assert all(task.cancelled() for task in tasks)

        service.run(leave())

    def test_abort_from_elsewhere_ends_the_generator_with_what_there_is(self, service):
        async def abort() -> GenerationOutput:
            task = asyncio.ensure_future(finish(service.engine, [1], FOREVER, request_id="long"))
            await asyncio.sleep(0.1)
            await service.engine.abort("long")
            await service.engine.abort("unknown")
            return await task

        output = service.run(abort())
        assert output.completions[0].finish_reason == "abort"
        assert output.token_ids == naive_generate([1], len(output.token_ids)) and output.token_ids

    def test_a_stop_string_frees_the_sequence_in_the_engine(self, service):
        expected = naive_generate([1], 20)
        stop = f"w{expected[10]}"
        first = expected.index(expected[10])

        async def stop_early() -> GenerationOutput:
            return await finish(service.engine, [1], SamplingParams(temperature=0, max_tokens=None, stop=[f" {stop}"]))

        completion = service.run(stop_early()).completions[0]
        assert (completion.finish_reason, completion.stop_reason) == ("stop", f" {stop}")
        assert first <= 10 and completion.text == " ".join(
            f"w{token_id}" for token_id in expected[: len(completion.token_ids) - 1]
        )

    def test_a_request_that_waits_in_the_queue_can_leave(self, service):
        async def leave() -> None:
            running = [asyncio.ensure_future(finish(service.engine, [i + 1], FOREVER)) for i in range(16)]
            await asyncio.sleep(0.1)
            waiting = asyncio.ensure_future(finish(service.engine, [5], FOREVER))
            await asyncio.sleep(0.05)
            stats = await service.engine.stats()
            assert stats["num_waiting"] == stats["num_waiting_rows"] == 1
            waiting.cancel()

            async def is_gone() -> bool:
                return (await service.engine.stats())["num_waiting"] == 0

            await eventually(is_gone)
            for task in running:
                task.cancel()
            await asyncio.gather(*running, waiting, return_exceptions=True)

        service.run(leave())


# --- other calls


class TestCalls:
    def test_limits_change_while_it_runs(self, service):
        assert service.run(service.engine.set_limits(max_num_seqs=2))["max_num_seqs"] == 2

        async def two_run() -> dict[str, Any]:
            tasks = [asyncio.ensure_future(finish(service.engine, [i + 1], greedy(20))) for i in range(4)]
            await asyncio.sleep(0.1)
            seen = await service.engine.inspect()
            await asyncio.gather(*tasks)
            return seen

        seen = service.run(two_run())
        assert len(seen["running"]) == len(seen["waiting"]) == 2 and seen["limits"]["max_num_seqs"] == 2
        assert service.run(service.engine.set_limits(max_num_seqs=16))["max_num_seqs"] == 16

    @pytest.mark.parametrize("limits", [{"max_num_seqs": 17}, {"max_num_seqs": True}, {"max_num_seqs": [1]}, {"max_nm_seqs": 1}])
    def test_impossible_limits_are_config_errors(self, service, limits):
        with pytest.raises(ConfigError, match=next(iter(limits))):
            service.run(service.engine.set_limits(**limits))

    def test_inspect_says_what_runs_and_no_text(self, service):
        async def look() -> dict[str, Any]:
            stream = service.engine.generate("w1 w2 w3 w4 w5", FOREVER, request_id="secret-free", priority=3)
            await anext(stream)
            seen = await service.engine.inspect()
            await stream.aclose()
            return seen

        seen = service.run(look())
        (sequence,) = seen["running"]
        assert sequence["request_id"].endswith("/secret-free") and sequence["priority"] == 3
        assert sequence["num_prompt_tokens"] == 5 and sequence["num_blocks"] == len(sequence["block_ids"]) >= 2
        assert seen["num_free_blocks"] == 512 - sequence["num_blocks"] and "w1" not in repr(seen)

    def test_the_prefix_cache_can_be_forgotten(self, service):
        async def cached_after_reset() -> list[int]:
            first, second = await finish(service.engine, [9] * 33, greedy(1)), await finish(service.engine, [9] * 33, greedy(1))
            assert await service.engine.reset_prefix_cache()
            third = await finish(service.engine, [9] * 33, greedy(1))
            return [output.metrics.num_cached_tokens for output in (first, second, third)]

        assert service.run(cached_after_reset()) == [0, 32, 0]

    def test_counters_count(self, service):
        async def difference() -> dict[str, float]:
            before = await service.engine.stats()
            await finish(service.engine, [1, 2, 3], greedy(10))
            after = await service.engine.stats()
            return {name: after[name] - before[name] for name in after}

        grown = service.run(difference())
        assert (grown["num_requests"], grown["num_prompt_tokens"], grown["num_generated_tokens"]) == (1, 3, 10)
        assert 10 <= grown["num_steps"] <= 12 and grown["schedule_ns"] > 0 and grown["apply_ns"] > 0
        assert 9 <= grown["num_steps_up_to_1"] <= 11 and grown["num_steps_up_to_4"] == 1 and grown["num_steps_up_to_2"] == 0

    @pytest.mark.parametrize("seconds", [0, -1, 61, True, "1", float("nan")])
    def test_a_profile_of_an_impossible_length_is_refused(self, service, seconds):
        with pytest.raises(RequestError, match="seconds"):
            service.run(service.engine.profile(seconds))

    def test_an_unknown_call_is_refused(self, service):
        with pytest.raises(RequestError, match="'shutdown_now'"):
            service.run(service.engine._call("shutdown_now"))


# --- several front ends

OTHER_FRONTEND = """
import asyncio, sys
from nanovllm import AsyncEngine, SamplingParams

async def main():
    engine = await AsyncEngine.connect(sys.argv[1])
    streams = [engine.generate([i + 1], SamplingParams(max_tokens=None), request_id=str(i)) for i in range(5)]
    for stream in streams:
        await anext(stream)
    print("open", flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


class TestSeveralFrontends:
    def test_share_an_engine_and_use_the_same_request_ids(self, service):
        async def both() -> None:
            other = await AsyncEngine.connect(service.engine.address)
            assert other.facts == service.engine.facts and other.tokenizer.encode("w3 w4") == [3, 4]
            mine, theirs = await asyncio.gather(
                finish(service.engine, [1], greedy(20), request_id="x"), finish(other, [2], greedy(20), request_id="x")
            )
            assert mine.token_ids == naive_generate([1], 20) and theirs.token_ids == naive_generate([2], 20)
            await other.close()

        service.run(both())
        assert service.engine.is_alive

    def test_one_that_closes_leaves_nothing_behind_and_the_engine_running(self, service):
        async def close_one() -> None:
            other = await AsyncEngine.connect(service.engine.address)
            stream = other.generate([1], FOREVER)
            await anext(stream)
            await other.close()
            with pytest.raises(EngineDead, match="closed"):
                async for _ in stream:
                    pass
            with pytest.raises(EngineDead, match="closed"):
                await other.stats()
            assert str(await other.wait_dead()) == "the engine was closed" and not other.is_alive
            await other.close()
            await assert_nothing_is_held(service.engine)
            assert (await finish(service.engine, [4], greedy(5))).token_ids == naive_generate([4], 5)

        service.run(close_one())

    def test_one_that_is_killed_leaves_nothing_behind(self, service):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-c", OTHER_FRONTEND, service.engine.address]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
            assert process.stdout.readline() == b"open\n"
            assert service.run(service.engine.stats())["num_open_requests"] == 5
            process.kill()
        service.run(assert_nothing_is_held(service.engine))

        async def is_forgotten() -> bool:
            return (await service.engine.stats())["num_frontends"] == 1

        service.run(eventually(is_forgotten))

    def test_nobody_listens(self, tmp_path):
        with pytest.raises(EngineDead, match="no engine listens"):
            asyncio.run(AsyncEngine.connect(f"ipc://{tmp_path}/engine.sock"))


class TestHostility:
    @pytest.fixture
    def stranger(self, service) -> Iterator[zmq.Socket]:
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.setsockopt(zmq.RCVTIMEO, 10_000)
            socket.setsockopt(zmq.RCVHWM, 1)
            socket.setsockopt(zmq.LINGER, 1000)
            socket.connect(service.engine.address)
            yield socket

    @pytest.mark.parametrize(
        "payload", [b"", b"\x00", b"\xff" * 1000, encode({"type": "no such"}), encode([1, 2]), encode({"type": "add"})]
    )
    def test_what_is_not_a_message_is_ignored(self, service, stranger, payload):
        stranger.send(payload)
        stranger.send_multipart([payload, b"", payload])
        stranger.send(encode(Hello()))
        stranger.send(payload)
        assert isinstance(decode_for_frontend(stranger.recv()), messages.Ready)
        assert service.run(finish(service.engine, [1], greedy(3))).token_ids == naive_generate([1], 3)

    def test_a_request_from_one_who_has_not_said_hello_is_ignored(self, service, stranger):
        before = service.run(service.engine.stats())["num_requests"]
        stranger.send(encode(AddRequest(0, "x", [1], greedy(), [], 0, "")))
        stranger.send(encode(Hello()))
        stranger.recv()
        assert service.run(service.engine.stats())["num_requests"] == before

    def test_a_malformed_request_is_answered_by_its_handle(self, service, stranger):
        add = {"type": "add", "handle": 7, "request_id": "x", "token_ids": [1], "bad_words": [], "priority": 0, "cache_salt": ""}
        stranger.send(encode(Hello()))
        stranger.recv()
        stranger.send(encode({**add, "params": {"temperature": -1.0}}))
        stranger.send(encode({"type": "call", "call_id": 8, "name": 3, "arguments": {}}))
        refused, answers = [], []
        while not (refused and answers):
            message = decode_for_frontend(stranger.recv())
            refused += message.refused
            answers += message.answers
        assert refused[0].handle == 7 and "temperature" in refused[0].failure.message
        assert answers[0].call_id == 8 and answers[0].failure is not None

    def test_a_handle_in_use_and_empty_bad_words_are_refused(self, service, stranger):
        stranger.send(encode(Hello()))
        stranger.recv()
        stranger.send(encode(AddRequest(0, "a", [1], FOREVER, [], 0, "")))
        stranger.send(encode(AddRequest(0, "b", [1], FOREVER, [], 0, "")))
        stranger.send(encode(AddRequest(1, "c", [1], FOREVER, [[]], 0, "")))
        stranger.send(encode(AddRequest(2, "d", [1], FOREVER, [[99]], 0, "")))
        refused = {}
        while len(refused) < 3:
            refused |= {entry.handle: entry.failure.message for entry in decode_for_frontend(stranger.recv()).refused}
        assert "in use" in refused[0] and "no token ids" in refused[1] and "99" in refused[2]
        stranger.send(encode(messages.Goodbye()))

    def test_one_that_does_not_read_finds_everything_later_and_disturbs_nobody(self):
        """Its queue is full after a few messages; what follows is gathered in one."""
        service = Service(builder="served:counting", num_kv_blocks=60_000, max_num_seqs=4)
        try:
            with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
                stranger.setsockopt(zmq.RCVHWM, 1)
                stranger.setsockopt(zmq.RCVTIMEO, 10_000)
                stranger.connect(service.engine.address)
                stranger.send(encode(Hello()))
                stranger.recv()
                stranger.send(encode(AddRequest(0, "x", [1], greedy(30_000), [], 0, "")))

                async def is_done() -> bool:
                    stats = await service.engine.stats()
                    return stats["num_requests"] == 1 and stats["num_open_requests"] == 0

                service.run(eventually(is_done, 50))
                assert service.run(finish(service.engine, [1], greedy(50))).token_ids == [7] * 50
                num_tokens, num_messages, ended = 0, 0, []
                while not ended:
                    message = decode_for_frontend(stranger.recv())
                    num_tokens, num_messages, ended = num_tokens + len(message.token_ids), num_messages + 1, message.ended
            assert num_tokens == 30_000 and ended[0].finish_reason == "length"
            assert num_messages < 15_000
        finally:
            service.close()


def test_one_that_does_not_read_for_too_long_has_its_requests_aborted(tmp_path, monkeypatch):
    """The loop alone, in a thread, with a queue of one message and half a second of patience."""
    monkeypatch.setattr(engine_process, "MAX_STALL_SECONDS", 0.5)
    served = serve_counting(EngineConfig(num_kv_blocks=100_000, max_num_seqs=4))
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router, context.socket(zmq.DEALER) as stranger:
        router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        router.setsockopt(zmq.SNDHWM, 1)
        for socket in (router, stranger):
            socket.setsockopt(zmq.LINGER, 0)
        stranger.setsockopt(zmq.RCVHWM, 1)
        stranger.setsockopt(zmq.RCVTIMEO, 10_000)
        router.bind(f"ipc://{tmp_path}/s")
        stranger.connect(f"ipc://{tmp_path}/s")
        process = engine_process.EngineProcess(served, router, tmp_path, {})
        thread = threading.Thread(target=process.serve)
        thread.start()
        stranger.send(encode(Hello()))
        stranger.recv()
        stranger.send(encode(AddRequest(0, "x", [1], FOREVER, [], 0, "")))
        wait_until(lambda: process._num_requests == 1 and not served.engine.has_work, 30)
        ended: list[Any] = []
        while not ended:
            ended = decode_for_frontend(stranger.recv()).ended
        assert ended[0].finish_reason == "abort"
        stranger.send(encode(messages.Shutdown()))
        thread.join(10)
        assert not thread.is_alive() and not process._requests


# --- life and death


def test_the_socket_of_the_engine_is_in_a_folder_of_its_user_alone():
    async def test() -> None:
        async with started() as engine:
            folder = folder_of(engine)
            assert engine.address.startswith("ipc://") and folder.stat().st_mode & 0o777 == 0o700
            assert folder.stat().st_uid == os.getuid() and (folder / "engine.sock").is_socket()

    asyncio.run(test())


@asynccontextmanager
async def started(builder: str = "served:slow", **options: Any) -> AsyncIterator[AsyncEngine]:
    engine = await AsyncEngine.start(builder=builder, num_kv_blocks=512, **options)
    folder, pid = folder_of(engine), engine.facts.pid
    assert is_running(pid)
    try:
        yield engine
    finally:
        await engine.close()
        assert not folder.exists() and not is_running(pid)


async def read_until_dead(engine: AsyncEngine, prompt: list[int]) -> str:
    with pytest.raises(EngineDead) as caught:
        await finish(engine, prompt, FOREVER)
    return str(caught.value)


class TestLifeAndDeath:
    def test_closing_ends_the_process_and_removes_its_folder(self):
        async def close() -> None:
            async with started() as engine:
                await finish(engine, [1], greedy(2))
                waiter = asyncio.ensure_future(engine.wait_dead())
                await asyncio.sleep(0)
                await asyncio.gather(engine.close(), engine.close())
                assert isinstance(await waiter, EngineDead)
                with pytest.raises(EngineDead, match="closed"):
                    await finish(engine, [1])

        asyncio.run(close())

    def test_a_killed_engine_is_told_to_every_reader(self):
        async def kill() -> None:
            async with started() as engine:
                other = await AsyncEngine.connect(engine.address)
                readers = [read_until_dead(one, [i + 1]) for i in range(10) for one in (engine, other)]
                tasks = [asyncio.ensure_future(reader) for reader in readers]
                await asyncio.sleep(0.1)
                os.kill(engine.facts.pid, signal.SIGKILL)
                killed = time.monotonic()
                error = await asyncio.wait_for(engine.wait_dead(), 5)
                assert isinstance(error, EngineDead) and "killed by signal 9" in str(error)
                reasons = set(await asyncio.wait_for(asyncio.gather(*tasks), 5))
                assert reasons == {str(error), "the engine process closed its connection"}
                assert time.monotonic() - killed < 2 and not engine.is_alive and not other.is_alive
                with pytest.raises(EngineDead, match="signal 9"):
                    await engine.stats()
                with pytest.raises(EngineDead, match="signal 9"):
                    await finish(engine, [1])
                await other.close()

        asyncio.run(kill())

    def test_a_failing_engine_leaves_its_traceback_in_the_log_and_a_status(self, caplog, monkeypatch):
        monkeypatch.setattr(logging.getLogger("nanovllm"), "propagate", True)

        async def fail() -> None:
            async with started("served:failing") as engine:
                reasons = await asyncio.gather(*[read_until_dead(engine, [i]) for i in range(5)])
                assert set(reasons) == {"the engine failed: RuntimeError"}
                await asyncio.to_thread(engine._connection.child.process.wait)
                assert engine._connection.child.process.returncode == 1

        with caplog.at_level(logging.ERROR, "nanovllm"):
            asyncio.run(fail())
        assert "the fake device caught fire" in caplog.text and "Traceback" in caplog.text

    def test_a_start_that_fails_for_an_unknown_reason_leaves_its_traceback_in_the_log(self, caplog, monkeypatch):
        monkeypatch.setattr(logging.getLogger("nanovllm"), "propagate", True)
        with caplog.at_level(logging.ERROR, "nanovllm"), pytest.raises(errors.NanoVllmError, match="RuntimeError"):
            asyncio.run(AsyncEngine.start(builder="served:refusing"))
        assert "no such device" in caplog.text

    def test_an_unknown_option_starts_nothing(self):
        with pytest.raises(ConfigError, match="did you mean 'max_num_seqs'"):
            asyncio.run(AsyncEngine.start(max_num_seq=3))

    def test_a_start_that_is_cancelled_leaves_nothing(self, tmp_path, monkeypatch):
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

        async def cancel() -> None:
            task = asyncio.ensure_future(AsyncEngine.start(builder="served:slow"))
            await asyncio.sleep(0.1)
            assert len(list(tmp_path.iterdir())) == 1 or len(str(tmp_path)) > 70
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(cancel())
        assert not list(tmp_path.iterdir())

    def test_a_long_temporary_folder_is_avoided(self, tmp_path, monkeypatch):
        folder = tmp_path / ("x" * 120)
        folder.mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(folder))

        async def start() -> None:
            async with started() as engine:
                assert engine.address.startswith("ipc:///tmp/nanovllm-")

        asyncio.run(start())
        assert not list(folder.iterdir())

    def test_ctrl_c_and_sigterm_are_the_parents_business(self):
        async def interrupt() -> None:
            async with started() as engine:
                task = asyncio.ensure_future(finish(engine, [1], greedy(40)))
                for number in (signal.SIGINT, signal.SIGTERM):
                    await asyncio.sleep(0.05)
                    os.kill(engine.facts.pid, number)
                assert (await task).token_ids == naive_generate([1], 40)

        asyncio.run(interrupt())

    @pytest.mark.parametrize("ending", ["os.kill(os.getpid(), 9)", "sys.exit(0)", "raise KeyboardInterrupt", "del engine"])
    def test_the_engine_does_not_outlive_its_parent(self, tmp_path, ending):
        program = f"""
import asyncio, os, sys
from nanovllm import AsyncEngine, SamplingParams

async def main():
    engine = await AsyncEngine.start(builder="served:slow")
    await anext(engine.generate([1], SamplingParams(max_tokens=None)))
    print(engine.facts.pid, engine.address, flush=True)
    {ending}

asyncio.run(main())
"""
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TMPDIR": "/tmp"}
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=30)
        pid, address = result.stdout.split()
        folder = Path(address.removeprefix("ipc://")).parent
        wait_until(lambda: not is_running(int(pid)) and not folder.exists(), 5)

    def test_an_idle_engine_sleeps(self):
        async def ticks() -> int:
            async with started() as engine:
                await finish(engine, [1], greedy(2))

                def used() -> int:
                    fields = Path(f"/proc/{engine.facts.pid}/stat").read_text().rpartition(")")[2].split()
                    return int(fields[11]) + int(fields[12])

                before = used()
                await asyncio.sleep(1.5)
                return used() - before

        assert asyncio.run(ticks()) <= 3  # hundredths of a second

    def test_more_than_one_turn_of_messages_arrives(self):
        """More requests than the engine takes between two steps: it takes 50 us or more for each."""
        num_requests = round(2 * engine_process.MAX_RECEIVE_SECONDS / 50e-6)

        async def many() -> None:
            async with started("served:fake", max_num_seqs=64) as engine:
                outputs = await asyncio.gather(*[finish(engine, [i % 50], greedy(2)) for i in range(num_requests)])
                assert [output.token_ids for output in outputs] == [naive_generate([i % 50], 2) for i in range(num_requests)]
                await assert_nothing_is_held(engine)

        asyncio.run(many())


# --- messages


class TestMessages:
    def test_sampling_params_travel_as_they_are(self):
        structured = StructuredOutput("choice", ("yes", "no"))
        params = SamplingParams(
            temperature=0.5,
            top_k=3,
            seed=2**64 - 1,
            stop_token_ids=[3],
            logit_bias={5: 1, 6: -2.5},
            allowed_token_ids=[1, 2],
            max_tokens=None,
            structured=structured,
        )
        message = AddRequest(0, "x", [1, 2], params, [[1]], -5, "salt")
        assert messages.decode_for_engine(encode(message)) == message

    def test_every_field_of_sampling_params_has_a_type_that_travels(self):
        msgspec.msgpack.Decoder(SamplingParams)
        fields = {field.name for field in dataclasses.fields(SamplingParams)}
        assert set(msgspec.msgpack.decode(encode(SamplingParams()))) == fields

    @pytest.mark.parametrize("kind", [ConfigError, InvalidPrompt, PromptTooLong, ModelNotFound, errors.CacheTooSmall, EngineDead])
    def test_errors_arrive_as_what_they_were(self, kind):
        error = msgspec.msgpack.decode(encode(Failure.of(kind("because"))), type=Failure).to_error()
        assert type(error) is kind and str(error) == "because"

    def test_an_error_that_needs_more_than_a_message_arrives_as_its_parent(self):
        error = Failure.of(errors.WeightMismatch(missing=["a"])).to_error()
        assert type(error) is errors.ModelError and "missing" in str(error)

    def test_other_errors_say_nothing_of_the_machine(self):
        error = Failure.of(OSError("/root/secret")).to_error()
        assert type(error) is errors.NanoVllmError and "secret" not in str(error)

    def test_an_unknown_kind_is_an_error_all_the_same(self):
        assert type(Failure("EvilThing", "x").to_error()) is errors.NanoVllmError

    def test_a_front_end_needs_no_torch(self):
        program = "import sys, nanovllm.engine.async_engine; sys.exit('torch' in sys.modules)"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        assert subprocess.run([sys.executable, "-c", program], env=environment).returncode == 0

    def test_a_call_takes_only_plain_values(self):
        message = Call(1, "set_limits", {"max_num_seqs": 3})
        assert messages.decode_for_engine(encode(message)) == message


@pytest.fixture
def grammars() -> Iterator[Service]:
    service = Service(builder="served:slow_grammars", max_num_seqs=16)
    yield service
    service.close()


class TestGrammarsAreCompiledBesideTheLoop:
    """One takes a second."""

    def test_others_go_on_meanwhile_and_the_request_is_served_then(self, grammars):
        async def test(engine: AsyncEngine) -> tuple[float, float, GenerationOutput]:
            form = greedy(5, structured=StructuredOutput("regex", "others"))
            task, begun = asyncio.ensure_future(finish(engine, [1, 2], form)), time.monotonic()
            last, longest = begun, 0.0
            async for _ in engine.generate([3, 4], FOREVER):
                longest, last = max(longest, time.monotonic() - last), time.monotonic()
                if task.done():
                    break
            return longest, time.monotonic() - begun, task.result()

        longest, took, output = grammars.run(test(grammars.engine))
        assert 0.9 < took < 5 and longest < 0.5
        assert output.token_ids == naive_generate([1, 2], 5)

    def test_it_counts_as_waiting_for_its_grammar(self, grammars):
        async def count(engine: AsyncEngine) -> list[int | float]:
            task = asyncio.ensure_future(finish(engine, [1, 2], greedy(5, structured=StructuredOutput("regex", "counted"))))
            await asyncio.sleep(0.2)
            during = await engine.stats()
            await task
            return [stats["num_waiting_grammar"] for stats in (during, await engine.stats())]

        assert grammars.run(count(grammars.engine)) == [1, 0]

    def test_an_idle_loop_wakes_up_for_it(self, grammars):
        begun = time.monotonic()
        grammars.run(finish(grammars.engine, [1, 2], greedy(5, structured=StructuredOutput("regex", "idle"))))
        assert 0.9 < time.monotonic() - begun < 1.7

    def test_what_does_not_compile_is_the_answer_to_its_request(self, grammars):
        with pytest.raises(InvalidGrammar, match="as told"):
            grammars.run(finish(grammars.engine, [1, 2], greedy(5, structured=StructuredOutput("regex", "bad"))))

    def test_who_leaves_before_it_is_compiled_is_forgotten(self, grammars):
        async def test(engine: AsyncEngine) -> list[Any]:
            before = (await engine.stats())["num_requests"]
            task = asyncio.ensure_future(finish(engine, [1, 2], greedy(5, structured=StructuredOutput("regex", "left"))))
            await asyncio.sleep(0.3)
            waiting = (await engine.stats())["num_waiting"]
            task.cancel()
            await asyncio.sleep(1.2)
            stats = await engine.stats()
            return [waiting, stats["num_waiting"], stats["num_requests"] - before]

        assert grammars.run(test(grammars.engine)) == [1, 0, 0]
