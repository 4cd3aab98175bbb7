"""The official Anthropic client drives /v1/messages of a real server with the real SmolLM2."""

from __future__ import annotations

import anthropic
import pytest

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
MODEL = "SmolLM2-135M-Instruct"
WEATHER = {
    "name": "get_weather",
    "description": "The weather in a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def client(live):
    with anthropic.Anthropic(base_url=live.url, api_key="none", max_retries=0) as client:
        yield client


def test_a_message(client):
    message = client.messages.create(
        model=MODEL, max_tokens=8, messages=QUESTION, system="Be short.", extra_body={"temperature": 0}
    )
    (block,) = message.content
    assert block.type == "text" and "Paris" in block.text
    assert message.stop_reason in ("max_tokens", "end_turn") and message.role == "assistant"
    assert message.usage.output_tokens <= 8
    count = client.messages.count_tokens(model=MODEL, messages=QUESTION, system="Be short.")
    assert count.input_tokens == message.usage.input_tokens + message.usage.cache_read_input_tokens


def test_a_stop_sequence(client):
    message = client.messages.create(
        model=MODEL, max_tokens=12, messages=QUESTION, stop_sequences=["France"], extra_body={"temperature": 0}
    )
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "France")
    assert "France" not in message.content[0].text


def test_the_events_add_up_to_the_message(client):
    options = {"model": MODEL, "max_tokens": 6, "messages": QUESTION, "extra_body": {"temperature": 0}}
    whole = client.messages.create(**options)
    with client.messages.stream(**options) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == final.content[0].text == whole.content[0].text
    assert final.usage.output_tokens == whole.usage.output_tokens and final.stop_reason == whole.stop_reason


def test_a_tool_is_called_and_answered(client):
    choice = {"type": "any", "disable_parallel_tool_use": True}
    options = {"model": MODEL, "max_tokens": 40, "messages": QUESTION, "tools": [WEATHER], "tool_choice": choice}
    with client.messages.stream(**options) as stream:
        message = stream.get_final_message()
    (call,) = message.content
    assert (call.type, call.name, message.stop_reason) == ("tool_use", "get_weather", "tool_use")
    assert call.input["city"] in ("Paris", "Rome")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "Sunny"}
    told = [*QUESTION, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    answer = client.messages.create(model=MODEL, max_tokens=2, messages=told, tools=[WEATHER])
    assert answer.usage.output_tokens == 2


def test_the_beginning_of_the_answer_can_be_given(client):
    begun = [*QUESTION, {"role": "assistant", "content": "The capital of France is"}]
    message = client.messages.create(model=MODEL, max_tokens=3, messages=begun, extra_body={"temperature": 0})
    assert message.content[0].text.lstrip().startswith("Paris")


@pytest.mark.parametrize(
    ("word", "options"),
    [
        ("temperature", {"extra_body": {"temperature": 200}}),
        ("speed", {"speed": "fast"}),
        ("image", {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "http://x"}}]}]}),
        ("bash_20250124", {"tools": [{"type": "bash_20250124", "name": "bash"}]}),
        ("budget_tokens", {"thinking": {"type": "enabled", "budget_tokens": 1024}}),
    ],
)
def test_a_bad_request_names_what_is_wrong(client, word, options):
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.messages.create(**{"model": MODEL, "max_tokens": 2, "messages": QUESTION, **options})
    assert caught.value.body["error"]["type"] == "invalid_request_error"
    assert word in caught.value.body["error"]["message"]


def test_an_unknown_model_is_not_found(client):
    with pytest.raises(anthropic.NotFoundError) as caught:
        client.messages.create(model="claude-0", max_tokens=2, messages=QUESTION)
    assert caught.value.body["error"]["type"] == "not_found_error"
