"""Deltas, merged streams, the parts of a turn, and items: without a model."""

from __future__ import annotations

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest
from hypothesis import given, strategies as st

from nanovllm.errors import InvalidGrammar
from nanovllm.llm import load_tokenizer
from nanovllm.loaders.checkpoint import open_checkpoint
from nanovllm.outputs import CompletionOutput, GenerationOutput, RequestMetrics
from nanovllm.sampling_params import StructuredOutput
from nanovllm.server.conversation import Conversation, Items, TurnReader
from nanovllm.server.errors import BadField, HttpError, Unavailable
from nanovllm.server.grammars import KEY, MAX_WAITING, Grammars, Turns
from nanovllm.server.options import ServerOptions
from nanovllm.server.parts import Reasoning, Text, ToolCallArguments, ToolCallStart
from nanovllm.server.protocol import CompletionChoice
from nanovllm.server.streaming import ChunkWriter, Delta, Deltas, finished, merged


def make_output(n: int = 1, **fields: Any) -> GenerationOutput:
    completions = [CompletionOutput(index, **fields) for index in range(n)]
    return GenerationOutput("r", None, [1, 2, 3], completions, RequestMetrics(0.0))


def make_delta(text: str, finish_reason: str | None = None, stop_reason: Any = None, token_ids: Any = (7,)) -> Delta:
    return Delta(0, False, text, list(token_ids), None, finish_reason, stop_reason)


# --- deltas


@given(st.lists(st.tuples(st.integers(0, 1), st.text(max_size=3), st.booleans()), max_size=30))
def test_deltas_add_up_however_often_one_looks(steps):
    output, deltas = make_output(2), Deltas(2)
    found: list[Delta] = []
    for number, (index, text, looks) in enumerate(steps):
        output.completions[index].text += text
        output.completions[index].token_ids.append(number)
        if looks:
            found += deltas.take(output)
    for completion in output.completions:
        completion.finish_reason = "stop"
    found += deltas.take(output)
    assert deltas.take(output) == []
    for completion in output.completions:
        own = [delta for delta in found if delta.index == completion.index]
        assert "".join(delta.text for delta in own) == completion.text
        assert [token_id for delta in own for token_id in delta.token_ids] == completion.token_ids
        assert [delta.is_first for delta in own] == [True] + [False] * (len(own) - 1)
        assert [delta.finish_reason for delta in own if delta.finish_reason] == ["stop"]


def test_a_generation_that_failed_is_an_error():
    with pytest.raises(HttpError, match="the grammar broke") as caught:
        Deltas(1).take(make_output(finish_reason="error", stop_reason="the grammar broke"))
    assert caught.value.status == 400
    with pytest.raises(HttpError) as caught:
        Deltas(1).take(make_output(finish_reason="error"))
    assert caught.value.status == 500


# --- several streams


async def grow(output: GenerationOutput, times: int, log: list[str], error: Exception | None = None):
    try:
        for _ in range(times):
            await asyncio.sleep(0)
            yield output
        if error is not None:
            raise error
    finally:
        log.append(output.request_id)


def test_several_streams_run_together_and_come_out_in_order():
    outputs, log = [make_output() for _ in range(5)], []
    streams = [grow(output, 3 + index % 2, log) for index, output in enumerate(outputs)]
    assert [id(one) for one in asyncio.run(finished(streams))] == [id(output) for output in outputs]
    assert len(log) == 5


def test_an_error_of_one_stream_ends_all():
    log: list[str] = []

    async def run() -> None:
        streams = [grow(make_output(), 1000, log), grow(make_output(), 2, log, Unavailable("full", 1, "full"))]
        await finished(streams)

    with pytest.raises(Unavailable):
        asyncio.run(run())
    assert len(log) == 2, "a stream was left open"


@pytest.mark.parametrize("num_streams", [1, 3])
def test_leaving_a_merged_stream_closes_what_it_is_made_of(num_streams):
    log: list[str] = []

    async def run() -> None:
        stream = merged([grow(make_output(), 1000, log) for _ in range(num_streams)])
        await anext(stream)
        await stream.aclose()

    asyncio.run(run())
    assert len(log) == num_streams


# --- chunks


def test_a_chunk_is_one_event_of_json():
    head = {"id": "x", "object": "text_completion"}
    choice = CompletionChoice(index=0, text='"\n\u2028', logprobs=None, finish_reason=None)
    writer = ChunkWriter(head, include_usage=True)
    for chunk in (writer.chunk(choice), writer.chunk_with(choice), writer.chunk_with(choice, more=[1])):
        assert chunk.startswith(b"data: {") and chunk.endswith(b"}\n\n") and chunk.count(b"\n") == 2
        value = json.loads(chunk.removeprefix(b"data: "))
        assert value | {"more": 0} == {**head, "choices": [msgspec.to_builtins(choice)], "usage": None, "more": 0}
    assert json.loads(writer.chunk_with(None, usage=1).removeprefix(b"data: ")) == {**head, "choices": [], "usage": 1}
    assert b"usage" not in ChunkWriter(head, include_usage=False).chunk(choice)


# --- turns


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(open_checkpoint(None))


def make_turn(**fields: Any) -> Conversation:
    options = {"constraint": None, "tool_format": None, "tool_names": (), "has_reasoning": False, "opens_reasoning": False}
    return Conversation(
        **{"prompt": "", "may_reason": False, **options, "keeps_parallel": True, "keeps_reasoning": True, **fields}
    )


def test_the_end_token_is_no_part_of_a_text_that_keeps_special_tokens(tokenizer):
    """The marks of this format are special tokens, so all special tokens are in the text, also the last one."""
    turn = make_turn(tool_format="llama3_json", tool_names=("look",))
    end = tokenizer.token_to_id("<|im_end|>")
    read = TurnReader(turn, tokenizer).read
    assert read(make_delta("Hello<|im_end|>", "stop", None, [5, end])) == [Text("Hello")]
    read = TurnReader(turn, tokenizer).read
    assert read(make_delta("Hello<|im_end|>", "stop", "Hello<|im_end|>", [5, end])) == [Text("Hello<|im_end|>")]


def test_a_text_that_its_grammar_ends_keeps_its_last_token(tokenizer):
    """A grammar may end a text without an end token; then the last token is part of a call."""
    read = TurnReader(make_turn(tool_format="llama3_json", tool_names=("look",)), tokenizer).read
    parts = read(make_delta('{"name": "look", "parameters": {"a": 1')) + read(
        make_delta("}}", "stop", None, [tokenizer.token_to_id("}}")])
    )
    assert "".join(part.fragment for part in parts if isinstance(part, ToolCallArguments)) == '{"a": 1}'


def test_what_the_client_does_not_want_is_left_out(tokenizer):
    call = '<tool_call>{"name": "look", "arguments": {}}</tool_call>'
    text = f"<think>Hm</think>Yes{call}{call}"
    turn = make_turn(tool_format="hermes", tool_names=("look",), has_reasoning=True)
    whole = TurnReader(turn, tokenizer).read(make_delta(text, "stop"))
    assert [type(part) for part in whole if not isinstance(part, ToolCallArguments)] == [
        Reasoning,
        Text,
        ToolCallStart,
        ToolCallStart,
    ]
    less = make_turn(tool_format="hermes", tool_names=("look",), has_reasoning=True, keeps_parallel=False, keeps_reasoning=False)
    reader = TurnReader(less, tokenizer)
    kept = reader.read(make_delta(text, "stop"))
    assert [type(part) for part in kept if not isinstance(part, ToolCallArguments)] == [Text, ToolCallStart]
    assert reader.has_calls and reader.num_reasoning == len(tokenizer.encode("Hm", False))


def test_items_open_grow_and_close_in_turn():
    items = Items()
    parts = [
        Reasoning("a"),
        Text("b"),
        Text("c"),
        ToolCallStart(0, "i", "f"),
        ToolCallArguments(0, "{"),
        ToolCallStart(1, "j", "g"),
    ]
    changes = [*items.feed(parts[:3]), *items.feed(parts[3:]), *items.close(), *items.close()]
    assert [(change, item.index, text) for change, item, text in changes] == [
        ("open", 0, ""),
        ("grow", 0, "a"),
        ("close", 0, ""),
        ("open", 1, ""),
        ("grow", 1, "b"),
        ("grow", 1, "c"),
        ("close", 1, ""),
        ("open", 2, ""),
        ("grow", 2, "{"),
        ("close", 2, ""),
        ("open", 3, ""),
        ("close", 3, ""),
    ]
    assert [(item.kind, item.text) for item in items.all] == [("reasoning", "a"), ("text", "bc"), ("call", "{"), ("call", "")]
    empty = Items()
    assert [change for change, *_ in empty.close()] == ["open", "close"]


# --- grammars


def test_grammars_have_a_size_and_a_queue_with_an_end():
    grammars = Grammars(None, ServerOptions(max_schema_bytes=100))  # type: ignore[arg-type]
    with pytest.raises(BadField, match="max_schema_bytes=100") as caught:
        asyncio.run(grammars.make("response_format", "regex", "a" * 101))
    assert caught.value.param == "response_format"
    grammars.close()


def test_keys_take_turns_at_the_compiler_and_one_that_fills_its_queue_is_told_so():
    async def test() -> None:
        turns, order, gate = Turns(), [], asyncio.Event()

        async def work(key: str, number: int) -> None:
            async with turns.turn(key):
                order.append((key, number))
                await gate.wait()

        tasks = [asyncio.ensure_future(work("greedy", number)) for number in range(MAX_WAITING + 1)]
        await asyncio.sleep(0)
        with pytest.raises(Unavailable) as caught:
            await work("greedy", 99)
        assert caught.value.code == "grammars_waiting"
        tasks += [asyncio.ensure_future(work("other", number)) for number in range(3)]
        await asyncio.sleep(0)
        tasks.pop(2).cancel()  # who leaves the queue is forgotten
        gate.set()
        await asyncio.gather(*tasks)
        assert order[:6] == [("greedy", 0), ("greedy", 1), ("other", 0), ("greedy", 3), ("other", 1), ("greedy", 4)]
        assert len(order) == MAX_WAITING + 3
        await work("later", 1)

    asyncio.run(test())


class OneByOne:
    """A checker that refuses what begins with a bracket, and counts."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.may_go_on = threading.Event()
        self._verdicts: dict[StructuredOutput, bool] = {}

    def knows(self, structured: StructuredOutput) -> bool:
        if self._verdicts.get(structured) is False:
            raise InvalidGrammar("a bracket, again")
        return structured in self._verdicts

    def check_grammar(self, structured: StructuredOutput, timeout_s: float) -> None:
        self.asked.append(structured.text)
        assert self.may_go_on.wait(10)
        self._verdicts[structured] = not structured.text.startswith("(")
        if not self._verdicts[structured]:
            raise InvalidGrammar("a bracket")

    def close(self) -> None: ...


def test_requests_with_one_grammar_share_its_check_and_those_that_come_later_need_none():
    async def test() -> None:
        grammars, checker = Grammars(None, ServerOptions()), OneByOne()  # type: ignore[arg-type]
        grammars._checker, grammars._thread = checker, ThreadPoolExecutor(1)  # type: ignore[assignment]

        def make(text: str) -> asyncio.Task[StructuredOutput]:
            return asyncio.ensure_future(grammars.make("form", "regex", text))

        same, bad, gone = [make("a+") for _ in range(600)], [make("(") for _ in range(5)], make("gone")
        await asyncio.sleep(0.05)
        same.pop(0).cancel()  # who asked first leaves, and the others do not notice
        gone.cancel()
        await asyncio.sleep(0)
        checker.may_go_on.set()
        assert {structured.text for structured in await asyncio.gather(*same)} == {"a+"}
        assert all(isinstance(error, BadField) for error in await asyncio.gather(*bad, return_exceptions=True))
        assert checker.asked == ["a+", "("] and not grammars._under_way
        checker.may_go_on.clear()  # now whoever asks would wait
        await asyncio.gather(*[make("a+") for _ in range(600)])
        with pytest.raises(BadField, match="a bracket, again"):
            await make("(")
        grammars.close()

    asyncio.run(test())


def test_a_grammar_that_waits_in_one_keys_line_is_not_waited_for_by_another_key():
    async def test() -> None:
        grammars, checker = Grammars(None, ServerOptions()), OneByOne()  # type: ignore[arg-type]
        grammars._checker, grammars._thread = checker, ThreadPoolExecutor(1)  # type: ignore[assignment]

        async def make(key: str, text: str) -> str:
            KEY.set(key)
            await grammars.make("form", "regex", text)
            order.append((key, text))
            return key

        order: list[tuple[str, str]] = []
        tasks = [asyncio.ensure_future(make("greedy", f"slow{number}")) for number in range(20)]
        tasks += [asyncio.ensure_future(make(key, "popular")) for key in ("greedy", "other")]
        await asyncio.sleep(0.05)
        checker.may_go_on.set()
        await asyncio.gather(*tasks)
        assert order.index(("other", "popular")) < 4 and order[-1] == ("greedy", "popular")
        grammars.close()

    asyncio.run(test())
