"""What takes long for a front end does not take the event loop, whatever shape the client gives it."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from nanovllm.errors import InvalidSamplingParams
from nanovllm.sampling_params import SamplingParams
from nanovllm.server import conversation, prompts, responses
from nanovllm.server.admission import Admission
from nanovllm.server.answers import begin
from nanovllm.server.conversation import begin_conversation
from nanovllm.server.errors import BadField
from nanovllm.server.options import ServerOptions
from nanovllm.server.params import make_params
from nanovllm.server.protocol import ChatMessage, FunctionTool, TemplateFields, Tool
from nanovllm.server.responses_protocol import ResponsesRequest


class Recorder:
    """A tokenizer, and a server with it, that remember where their work was done."""

    chat_template = "{{ tools }}<tool_call>"

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []
        self.server: Any = SimpleNamespace(engine=SimpleNamespace(tokenizer=self), options=ServerOptions(), model_name="m")

    def apply_chat_template(self, *_: Any, **__: Any) -> str:
        self.threads.append(threading.current_thread())
        return "prompt"

    def begin(self, messages: list[ChatMessage], template: TemplateFields, **options: Any) -> bool:
        """Whether all of it was done on the loop."""
        asyncio.run(begin_conversation(self.server, messages, template, **options))
        return set(self.threads) == {threading.current_thread()}


@pytest.mark.parametrize(
    ("messages", "template"),
    [
        ([ChatMessage(role="user", content="a")] * 4000, TemplateFields()),
        ([ChatMessage(role="assistant", content="a", reasoning="b" * 9000)], TemplateFields()),
        ([ChatMessage(role="user", content="a")], TemplateFields(chat_template_kwargs={"x": ["y"] * 9000})),
    ],
)
def test_long_prompts_are_rendered_in_a_thread(messages, template):
    assert Recorder().begin([ChatMessage(role="user", content="a" * 4000)] * 2, TemplateFields())
    assert not Recorder().begin(messages, template)


def test_the_form_of_a_required_call_is_made_in_a_thread(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(
        conversation, "tool_choice_constraint", lambda *_, **__: recorder.threads.append(threading.current_thread())
    )
    template = TemplateFields(tools=[Tool(function=FunctionTool(name="f"))])
    recorder.begin([ChatMessage(role="user", content="a")], template, tool_choice="required")
    assert threading.current_thread() not in recorder.threads


def test_items_are_counted_before_they_are_read():
    server: Any = SimpleNamespace(options=ServerOptions(max_messages=3))
    with pytest.raises(BadField, match="max_messages=3"):
        responses._messages(server, ResponsesRequest(input=[{"nonsense": 1}] * 4))


@pytest.mark.parametrize(
    "fields",
    [
        {"stop": ["x"] * 65},
        {"stop": ["x" * 1025]},
        {"bad_words": ["x"] * 1025},
        {"bad_words": ["x" * 1025]},
        {"stop_token_ids": [1] * (2**18 + 1)},
        {"allowed_token_ids": [1] * (2**18 + 1)},
        {"logit_bias": dict.fromkeys(map(str, range(2**18 + 1)), 1.0)},
    ],
    ids=str,
)
def test_lists_of_strings_and_token_ids_are_bounded(fields):
    (name,) = fields
    with pytest.raises(BadField, match=f"^{name} (has|holds)") as caught:
        make_params(SimpleNamespace(**fields))
    assert caught.value.param == name


def test_messages_tools_and_prompts_are_counted():
    server: Any = SimpleNamespace(options=ServerOptions(max_messages=3, max_tools=2, max_prompts_per_request=4))
    for read, items, limit, field in (
        (prompts.plain_messages, [ChatMessage(role="user", content="a")] * 4, "max_messages=3", "messages"),
        (prompts.plain_tools, [Tool(function=FunctionTool(name=name)) for name in "abc"], "max_tools=2", "tools"),
        (lambda server, items: prompts.read_prompts(server, items, "prompt"), ["a"] * 5, "max_prompts_per_request=4", "prompt"),
    ):
        assert len(read(server, items[:-1])) == len(items) - 1
        with pytest.raises(BadField, match=limit) as caught:
            read(server, items)
        assert caught.value.param == field


def test_stop_strings_are_bounded_together():
    """Each of their characters is a state that the front end keeps."""
    SamplingParams(stop=["x" * 1024] * 8)
    with pytest.raises(InvalidSamplingParams, match="stop has 9000 characters"):
        SamplingParams(stop=["x" * 1000] * 9)


def test_the_servers_own_limit_of_n_is_kept():
    server: Any = SimpleNamespace(options=ServerOptions(max_n=3))
    with pytest.raises(BadField, match="max_n=3") as caught:
        begin(server, None, [[1]], SamplingParams(n=4), None, None)  # type: ignore[arg-type]
    assert caught.value.param == "n"


def test_completions_that_would_never_find_a_place_together_are_no_matter_of_waiting():
    server: Any = SimpleNamespace(options=ServerOptions(), admission=Admission(capacity=4, max_queued=5))
    for params, field in ((SamplingParams(n=5), "n"), (SamplingParams(), "prompt")):
        with pytest.raises(BadField, match="10 completions; 9 are the engine and its queue") as caught:
            begin(server, None, [[1]] * (10 // params.n), params, None, None)  # type: ignore[arg-type]
        assert caught.value.param == field
