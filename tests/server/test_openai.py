"""The official OpenAI client drives every endpoint of a real server with the real SmolLM2."""

from __future__ import annotations

import json
import math

import openai
import pytest

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "is_large": {"type": "boolean"}},
    "required": ["city", "is_large"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
WEATHER = {
    "name": "get_weather",
    "description": "The weather in a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def client(live):
    with openai.OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def model(client):
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id) == model
    return model.id


# --- completions


def test_a_completion(client, model):
    answer = client.completions.create(model=model, prompt="The capital of France is", max_tokens=3, temperature=0)
    (choice,) = answer.choices
    assert "Paris" in choice.text and choice.finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (5, 3, 8)
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-") and answer.system_fingerprint


def test_a_streamed_completion_with_n_and_several_prompts(client, model):
    options = {"prompt": ["One, two,", "Red, green,"], "n": 2, "max_tokens": 4, "temperature": 0.8, "seed": 7}
    whole = client.completions.create(model=model, **options)
    texts = [""] * 4
    reasons = [None] * 4
    for chunk in client.completions.create(model=model, **options, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
        usage = chunk.usage
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == ["length"] * 4
    assert usage.completion_tokens == whole.usage.completion_tokens == 16


def test_stop_logprobs_and_echo(client, model):
    answer = client.completions.create(
        model=model, prompt="The capital of France is", max_tokens=8, temperature=0, stop=["."], logprobs=2, echo=True
    )
    (choice,) = answer.choices
    assert choice.text == "The capital of France is Paris" and choice.finish_reason == "stop"
    assert choice.stop_reason == "."
    assert choice.logprobs.tokens[:2] == ["The", " capital"]
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.text_offset[:3] == [0, 3, 11]
    assert choice.logprobs.token_logprobs[5] == max(choice.logprobs.top_logprobs[5].values())


# --- chats


def test_a_chat(client, model):
    answer = client.chat.completions.create(model=model, messages=QUESTION, max_completion_tokens=8, temperature=0)
    (choice,) = answer.choices
    assert "Paris" in choice.message.content and choice.message.role == "assistant"
    again = client.chat.completions.create(model=model, messages=QUESTION, max_completion_tokens=2, temperature=0)
    assert again.usage.prompt_tokens_details.cached_tokens >= 16


def test_a_streamed_chat_with_log_probabilities(client, model):
    options = {"messages": QUESTION, "max_completion_tokens": 5, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(model=model, **options).choices[0]
    text, tokens = "", []
    for chunk in client.chat.completions.create(model=model, **options, stream=True):
        choice = chunk.choices[0]
        text += choice.delta.content or ""
        tokens += choice.logprobs.content if choice.logprobs else []
    assert text == whole.message.content and choice.finish_reason == "length"
    assert [one.token for one in tokens] == [one.token for one in whole.logprobs.content]
    assert all(len(one.top_logprobs) == 2 and one.logprob <= 0 for one in tokens)


def test_the_streaming_helper_of_the_client(client, model):
    options = {"messages": QUESTION, "max_completion_tokens": 8, "temperature": 0, "stop": [" is"]}
    with client.chat.completions.stream(model=model, **options) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == client.chat.completions.create(model=model, **options).choices[0].message.content


def test_a_json_schema(client, model):
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
    answer = client.chat.completions.create(
        model=model, messages=QUESTION, response_format=form, max_completion_tokens=30, temperature=0
    )
    value = json.loads(answer.choices[0].message.content)
    assert set(value) == {"city", "is_large"} and answer.choices[0].finish_reason == "stop"


def test_a_tool_is_called_and_answered(client, model):
    tools = [{"type": "function", "function": WEATHER}]
    options = {"messages": QUESTION, "tools": tools, "tool_choice": "required", "parallel_tool_calls": False, "temperature": 0}
    choice = client.chat.completions.create(model=model, **options, max_completion_tokens=40).choices[0]
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and call.function.name == "get_weather"
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    pieces = []
    for chunk in client.chat.completions.create(model=model, **options, max_completion_tokens=40, stream=True):
        pieces += chunk.choices[0].delta.tool_calls or []
    assert pieces[0].function.name == "get_weather"
    assert "".join(piece.function.arguments for piece in pieces) == call.function.arguments
    told = [*QUESTION, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "Sunny"}]
    answer = client.chat.completions.create(model=model, messages=told, tools=tools, max_completion_tokens=2)
    assert answer.usage.completion_tokens == 2


# --- responses


def test_a_response(client, model):
    options = {"input": "What is the capital of France?", "instructions": "Answer in one word.", "temperature": 0}
    whole = client.responses.create(model=model, **options, max_output_tokens=5)
    assert whole.output_text and whole.usage.output_tokens <= 5
    events = [*client.responses.create(model=model, **options, max_output_tokens=5, stream=True)]
    assert [events[0].type, events[-1].type] == ["response.created", f"response.{whole.status}"]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    with client.responses.stream(model=model, **options, max_output_tokens=9, extra_body={"stop": [" "]}) as stream:
        assert stream.get_final_response().output_text == whole.output_text.partition(" ")[0]
    history = [{"role": "user", "content": "Hi"}, *whole.output, {"role": "user", "content": "And now?"}]
    assert client.responses.create(model=model, input=history, max_output_tokens=2).usage.output_tokens == 2


def test_a_response_with_a_schema_and_with_a_call(client, model):
    form = {"format": {"type": "json_schema", "name": "city", "schema": CITY, "strict": True}}
    shaped = client.responses.create(model=model, input="Paris", text=form, max_output_tokens=30, temperature=0)
    assert set(json.loads(shaped.output_text)) == {"city", "is_large"}
    tools = [{"type": "function", "strict": True, **WEATHER}]
    called = client.responses.create(
        model=model, input="Paris", tools=tools, tool_choice="required", parallel_tool_calls=False, max_output_tokens=40
    )
    (call,) = called.output
    assert call.type == "function_call" and json.loads(call.arguments)["city"] in ("Paris", "Rome")


# --- embeddings


def test_embeddings_tell_near_from_far(client, model):
    texts = ["The cat sleeps on the sofa.", "A kitten naps on the couch.", "Stock markets fell sharply today."]
    answer = client.embeddings.create(model=model, input=texts, encoding_format="float")
    cat, kitten, stocks = (one.embedding for one in answer.data)
    assert math.dist(cat, kitten) < math.dist(cat, stocks)
    assert sum(value * value for value in cat) == pytest.approx(1, abs=1e-4)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 15
    (by_default,) = client.embeddings.create(model=model, input=texts[0]).data  # the client asks for base64 by itself
    assert by_default.embedding == pytest.approx(cat, abs=1e-2)


# --- errors


@pytest.mark.parametrize(
    ("param", "options"),
    [
        ("temperature", {"temperature": 200}),
        ("top_p", {"top_p": 0}),
        ("n", {"n": 0}),
        ("max_completion_tokens", {"max_completion_tokens": 0}),
        ("top_logprobs", {"logprobs": True, "top_logprobs": 99}),
        ("logit_bias", {"logit_bias": {"no": 1}}),
        ("stop", {"stop": ["x"] * 65}),
        ("audio", {"audio": {"voice": "alloy", "format": "wav"}}),
        ("store", {"store": True}),
        ("function_call", {"function_call": "auto"}),
        ("response_format", {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "no"}}}}),
        ("reasoning_effort", {"reasoning_effort": "high"}),
        ("messages[0].role", {"messages": [{"role": "king", "content": "a"}]}),
        ("surprise", {"extra_body": {"surprise": 1}}),
    ],
)
def test_a_bad_request_names_its_field(client, model, param, options):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": model, "messages": QUESTION, "max_completion_tokens": 1, **options})
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"


def test_errors_of_a_stream_come_before_it(client, model):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=model, prompt="word " * 2000, stream=True)
    assert caught.value.code == "context_length_exceeded"


def test_other_errors(client, model):
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4", messages=QUESTION)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve("resp_1")
    with pytest.raises(openai.BadRequestError) as image:
        parts = [{"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}]
        client.chat.completions.create(model=model, messages=[{"role": "user", "content": parts}])
    assert "image_url" in image.value.message
    with pytest.raises(openai.BadRequestError) as state:
        client.responses.create(model=model, input="a", previous_response_id="resp_1")
    assert state.value.param == "previous_response_id"


def test_a_client_that_hangs_up_frees_its_place(client, live, model):
    stream = client.completions.create(model=model, prompt="Once", max_tokens=900, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    for _ in range(100):
        if not live.get("/load").json["running"]:
            return
    raise AssertionError("the request still runs")
