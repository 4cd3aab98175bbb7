"""What each honoured field of the other endpoints does, on the tiny model: responses, embeddings, messages, tokenize."""

from __future__ import annotations

import base64
import json
import math
import struct

import numpy as np
import pytest
from live_server import close_decision

RESPONSES, EMBEDDINGS, MESSAGES, COUNT = "/v1/responses", "/v1/embeddings", "/v1/messages", "/v1/messages/count_tokens"
GREEDY = {"temperature": 0, "max_output_tokens": 6, "ignore_eos": True}
TOKEN = 3000
END = 2
SCHEMA = {"type": "object", "properties": {"n": {"enum": [7]}}, "required": ["n"], "additionalProperties": False, "x-guidance": {"whitespace_flexible": False}}  # fmt: skip


def post(server, path, **fields):
    reply = server.post(path, fields)
    assert reply.status == 200, reply.body
    return reply.json


def param(server, path, **fields):
    reply = server.post(path, fields)
    assert reply.status == 400, reply.body
    return reply.error["param"]


# --- responses


def respond(server, **fields):
    return post(server, RESPONSES, **{"input": "Tell me", **GREEDY, **fields})


def text_of(response):
    return "".join(part["text"] for item in response["output"] if item["type"] == "message" for part in item["content"])


def blamed(server, **fields):
    return param(server, RESPONSES, **{"input": "Tell me", **GREEDY, **fields})


@pytest.mark.honours(RESPONSES, "model input instructions max_output_tokens")
def test_items_go_in_as_messages(tiny):
    call = {"type": "function_call", "call_id": "c1", "name": "look", "arguments": '{"n": 7}'}
    items = [
        {"role": "user", "content": "one"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "two", "annotations": []}]},
        {"role": "user", "content": [{"type": "input_text", "text": "three"}]},
        call,
        {"type": "function_call_output", "call_id": "c1", "output": "seven"},
    ]
    chat = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two", "reasoning": "Hm."},
        {"role": "user", "content": "three"},
        {"role": "assistant", "tool_calls": [{"id": "c1", "function": {"name": "look", "arguments": '{"n": 7}'}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "seven"},
    ]
    response = respond(tiny, input=items, instructions="Be short.", model="tiny-qwen")
    assert response["usage"]["input_tokens"] == post(tiny, "/tokenize", messages=chat)["count"]
    assert response["instructions"] == "Be short." and response["max_output_tokens"] == 6
    assert response["status"] == "incomplete" and response["incomplete_details"] == {"reason": "max_output_tokens"}
    again = respond(tiny, input=[*items, *response["output"], {"role": "user", "content": "more"}])
    assert again["usage"]["input_tokens"] > response["usage"]["input_tokens"]
    image = [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x"}]}]
    assert blamed(tiny, input=image) == "input[0].content[0]"
    assert blamed(tiny, input=[{"type": "web_search_call"}]) == "input[0]"
    assert blamed(tiny, input=[]) == "input"
    assert blamed(tiny, input=[{"role": "user", "content": "a", "colour": 1}]) == "input[0].colour"
    assert blamed(tiny, max_output_tokens=0) == "max_output_tokens"
    assert tiny.post(RESPONSES, {"input": "a", "model": "gpt-4"}).status == 404


@pytest.mark.honours(RESPONSES, "temperature top_p top_k seed presence_penalty frequency_penalty repetition_penalty logit_bias")
@pytest.mark.honours(RESPONSES, "stop ignore_eos")
def test_sampling_of_responses(tiny):
    greedy = text_of(respond(tiny))
    warm = {"temperature": 1, "seed": 1}
    assert text_of(respond(tiny, **warm)) == text_of(respond(tiny, **warm)) != greedy
    assert text_of(respond(tiny, **warm, top_k=1)) == text_of(respond(tiny, **warm, top_p=1e-6)) == greedy
    pushed = text_of(respond(tiny, logit_bias={str(TOKEN): 30}))
    assert pushed == pushed[: len(pushed) // 6] * 6
    prompt = post(tiny, "/tokenize", messages=[{"role": "user", "content": "Tell me"}])["tokens"]
    options, a, b = close_decision(tiny, prompt)
    two = {"logit_bias": options["logit_bias"], "max_output_tokens": 2}
    assert text_of(respond(tiny, **two)) == post(tiny, "/detokenize", tokens=[a, a])["prompt"]
    for penalty in ({"presence_penalty": 2}, {"frequency_penalty": 2}, {"repetition_penalty": 2}):
        assert text_of(respond(tiny, **two, **penalty)) == post(tiny, "/detokenize", tokens=[a, b])["prompt"], penalty
    assert text_of(respond(tiny, stop=greedy[5:8])) == greedy[: greedy.index(greedy[5:8])]
    ended = respond(tiny, logit_bias={str(END): 100}, ignore_eos=False)
    assert ended["usage"]["output_tokens"] == 1 and ended["status"] == "completed"
    gone_on = respond(tiny, logit_bias={str(END): 100})
    assert gone_on["usage"]["output_tokens"] == 6 and gone_on["status"] == "incomplete"
    assert blamed(tiny, temperature=-1) == "temperature"


@pytest.mark.honours(RESPONSES, "stream include top_logprobs")
def test_the_events_of_a_response(tiny):
    options = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    whole = respond(tiny, **options)
    logprobs = whole["output"][0]["content"][0]["logprobs"]
    assert "".join(position["token"] for position in logprobs) == text_of(whole)
    assert {len(position["top_logprobs"]) for position in logprobs} == {2}
    reply = tiny.post(RESPONSES, {"input": "Tell me", **GREEDY, **options, "stream": True})
    names = [line.removeprefix("event: ") for line in reply.body.decode().splitlines() if line.startswith("event: ")]
    events = reply.events
    assert names == [event["type"] for event in events]
    assert [event["sequence_number"] for event in events] == [*range(len(events))]
    assert [name for name in names if name != "response.output_text.delta"] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert "".join(event["delta"] for event in deltas) == text_of(whole) == text_of(events[-1]["response"])
    assert [position["token"] for event in deltas for position in event["logprobs"]] == [one["token"] for one in logprobs]
    assert blamed(tiny, top_logprobs=2) == "top_logprobs"
    assert blamed(tiny, include=["reasoning.encrypted_content"]).startswith("include")


def test_a_stream_of_a_response_loses_no_log_probability(tiny):
    """Not that of a token which is only a part of a character, and not that of the end token."""
    options = {"include": ["message.output_text.logprobs"], "structured_outputs": {"regex": "é 🎉!"}, "ignore_eos": False}
    options["max_output_tokens"] = 40
    whole = respond(tiny, **options)["output"][0]["content"][0]
    events = tiny.post(RESPONSES, {"input": "Tell me", **GREEDY, **options, "stream": True}).events
    last = events[-1]["response"]["output"][0]["content"][0]
    assert whole["text"] == last["text"] == "é 🎉!"
    tokens = [position["token"] for position in whole["logprobs"]]
    assert [position["token"] for position in last["logprobs"]] == tokens
    done = next(event for event in events if event["type"] == "response.output_text.done")
    assert [position["token"] for position in done["logprobs"]] == tokens


@pytest.mark.honours(RESPONSES, "text structured_outputs")
def test_the_form_of_a_response(tiny):
    free = {"ignore_eos": False, "max_output_tokens": 40}
    form = {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}
    response = respond(tiny, text={"format": form}, **free)
    assert json.loads(text_of(response)) == {"n": 7} and response["status"] == "completed"
    assert response["text"]["format"]["type"] == "json_schema"
    assert text_of(respond(tiny, text={"format": {"type": "json_object"}}, **free)).lstrip().startswith("{")
    assert text_of(respond(tiny, text={"format": {"type": "text"}})) == text_of(respond(tiny))
    assert text_of(respond(tiny, structured_outputs={"regex": "ab"}, **free)) == "ab"
    assert blamed(tiny, text={"format": {"type": "json_schema", "name": "n"}}) == "text.format"
    assert blamed(tiny, text={"format": form}, structured_outputs={"regex": "ab"}) == "structured_outputs"


@pytest.mark.honours(RESPONSES, "tools tool_choice parallel_tool_calls reasoning include_reasoning")
def test_tools_and_reasoning_of_responses(tiny):
    tool = {"type": "function", "name": "look", "description": "Look it up", "parameters": SCHEMA, "strict": True}
    free = {"ignore_eos": False, "max_output_tokens": 80, "reasoning": {"effort": "none"}}  # thought by chance, else
    named = {"type": "function", "name": "look"}
    response = respond(tiny, tools=[tool], tool_choice=named, **free)
    (call,) = response["output"]
    assert (call["type"], call["name"], json.loads(call["arguments"])) == ("function_call", "look", {"n": 7})
    assert response["tools"] == [tool] and response["tool_choice"] == named
    two = '<think>Hm</think>Yes<tool_call>\n{"name": "look", "arguments": {"n": 7}}\n</tool_call>'
    twice = {"structured_outputs": {"grammar": f"start: {json.dumps(two)} {json.dumps(two[20:])}"}, "tools": [tool], **free}
    whole = respond(tiny, **twice)
    assert [item["type"] for item in whole["output"]] == ["reasoning", "message", "function_call", "function_call"]
    assert whole["output"][0]["content"] == [{"type": "reasoning_text", "text": "Hm"}]
    assert whole["usage"]["output_tokens_details"]["reasoning_tokens"] >= 1
    fewer = respond(tiny, **twice, parallel_tool_calls=False, include_reasoning=False)
    assert [item["type"] for item in fewer["output"]] == ["message", "function_call"]
    assert fewer["parallel_tool_calls"] is False
    events = tiny.post(RESPONSES, {"input": "Tell me", **GREEDY, **twice, "stream": True}).events
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert [item["type"] for item in done] == ["reasoning", "message", "function_call", "function_call"]
    arguments = [event["delta"] for event in events if event["type"] == "response.function_call_arguments.delta"]
    assert "".join(arguments) == done[2]["arguments"] + done[3]["arguments"]
    assert "".join(event["delta"] for event in events if event["type"] == "response.reasoning_text.delta") == "Hm"
    begins = {"logit_bias": {"44": 100}, "max_output_tokens": 12}  # "<", and then it can only think
    for form in (
        {"text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}}},
        {"tools": [tool], "tool_choice": named},
    ):
        assert [item["type"] for item in respond(tiny, **begins, **form)["output"]] == ["reasoning"]
    plain = respond(tiny)["usage"]["input_tokens"]
    assert respond(tiny, reasoning={"effort": "high"})["usage"]["input_tokens"] > plain
    assert blamed(tiny, tool_choice="required") == "tool_choice"


def test_a_required_call_that_is_cut_is_incomplete_in_both_protocols(tiny):
    """And the calls before it are complete."""
    tool = {"type": "function", "name": "look", "parameters": SCHEMA}
    seen, quiet = set(), {"effort": "none"}
    for limit in range(4, 60, 3):
        forced = {"tools": [tool], "tool_choice": "required", "logit_bias": {str(END): -100}, "reasoning": quiet}
        response = respond(tiny, **forced, max_output_tokens=limit)
        assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
        for item in (item for item in response["output"] if item["type"] == "function_call"):
            assert (item["status"] == "completed") == (item["arguments"] == '{"n": 7}')
            seen.add(item["status"])
        reply = message(tiny, tools=[TOOL], tool_choice={"type": "any"}, max_tokens=limit, thinking={"type": "disabled"})
        blocks = [block for block in reply["content"] if block["type"] == "tool_use"]
        assert reply["stop_reason"] in ("max_tokens", "tool_use") and not [b for b in reply["content"] if b.get("text")]
        assert all(block["input"] == {"n": 7} for block in blocks[:-1])
        assert not blocks or blocks[-1]["input"] == {"n": 7} or reply["stop_reason"] == "max_tokens"
    assert seen == {"completed", "incomplete"}


def test_an_effort_that_the_template_does_not_read_is_refused(live):
    assert blamed(live, reasoning={"effort": "high"}) == "reasoning.effort"
    assert param(live, MESSAGES, **ASK, output_config={"effort": "high"}) == "output_config.effort"
    assert param(live, MESSAGES, **ASK, thinking={"type": "enabled"}) == "thinking"


@pytest.mark.honours(RESPONSES, "metadata store background truncation service_tier priority cache_salt")
@pytest.mark.honours(RESPONSES, "prompt_cache_key user safety_identifier")
def test_fields_of_a_service(tiny):
    names = {"metadata": {"a": "b"}, "user": "zaphod-names", "prompt_cache_key": "zaphod-names"}
    fields = {"store": False, "background": False, "truncation": "disabled", "service_tier": "default", "priority": 2}
    response = respond(tiny, **names, **fields, safety_identifier="zaphod-names")
    for name, value in {**names, **fields, "safety_identifier": "zaphod-names"}.items():
        assert name == "priority" or response[name] == value
    assert text_of(response) == text_of(respond(tiny))
    assert "zaphod-names" not in "".join(tiny.log)
    long = "responses in the cache " * 10

    def cached(salt):
        return respond(tiny, input=long, cache_salt=salt)["usage"]["input_tokens_details"]["cached_tokens"]

    assert cached("r1") == 0 and cached("r1") > 16 and cached("r2") == 0
    for wrong in ({"store": True}, {"background": True}, {"truncation": "auto"}, {"service_tier": "flex"}, {"priority": 9999}):
        assert blamed(tiny, **wrong) == next(iter(wrong))


# --- embeddings


@pytest.mark.honours(EMBEDDINGS, "model input messages encoding_format embed_dtype endianness use_activation pooling")
def test_embeddings_of_every_form(tiny):
    def vectors(**fields):
        return [one["embedding"] for one in post(tiny, EMBEDDINGS, **fields)["data"]]

    token_ids = post(tiny, "/tokenize", prompt="good words")["tokens"]
    (text,), (ids,) = vectors(input="good words", model="tiny-qwen"), vectors(input=token_ids)
    assert text == pytest.approx(ids, abs=1e-5) and len(text) == 64
    assert math.dist(text, [0] * 64) == pytest.approx(1, abs=1e-5)
    several = post(tiny, EMBEDDINGS, input=["good words", "others", token_ids])
    assert [one["index"] for one in several["data"]] == [0, 1, 2]
    assert several["data"][0]["embedding"] == pytest.approx(text, abs=1e-5)
    assert several["usage"]["prompt_tokens"] == several["usage"]["total_tokens"] > 2 * len(token_ids)
    (raw,) = vectors(input="good words", use_activation=False)
    assert np.linalg.norm(raw) > 1.5  # of 64 numbers that a norm has brought to 1 each
    assert np.array(raw) / np.linalg.norm(raw) == pytest.approx(np.array(text), abs=1e-4)
    (last,), (mean_of_one,), (last_of_one,) = (
        vectors(input="good words", pooling="last"),
        vectors(input=[5]),
        vectors(input=[5], pooling="last"),
    )
    assert last != pytest.approx(text, abs=1e-3)
    assert mean_of_one == pytest.approx(last_of_one, abs=1e-5)
    (coded,) = vectors(input="good words", encoding_format="base64")
    assert struct.unpack("<64f", base64.b64decode(coded)) == pytest.approx(text, abs=1e-5)
    (half,) = vectors(input="good words", encoding_format="base64", embed_dtype="float16", endianness="big")
    assert np.frombuffer(base64.b64decode(half), ">f2") == pytest.approx(text, abs=1e-2)
    (chat,) = vectors(messages=[{"role": "user", "content": "good words"}])
    assert chat != pytest.approx(text, abs=1e-3)
    for wrong in ({}, {"input": "a", "messages": []}, {"input": []}, {"input": "a", "embed_dtype": "float16"}):
        assert param(tiny, EMBEDDINGS, **wrong) in ("input", "encoding_format")
    assert tiny.post(EMBEDDINGS, {"input": ""}).status == 400
    assert tiny.post(EMBEDDINGS, {"input": "a", "model": "gpt-4"}).status == 404


@pytest.mark.honours(EMBEDDINGS, "truncate_prompt_tokens truncation_side add_special_tokens priority cache_salt request_id user")
def test_the_inputs_of_embeddings(tiny):
    def count(**fields):
        return post(tiny, EMBEDDINGS, input="some good words", **fields)["usage"]["prompt_tokens"]

    whole = count()
    assert count(add_special_tokens=False) == whole - 1
    assert count(truncate_prompt_tokens=2) == count(truncate_prompt_tokens=2, truncation_side="right") == 2
    left, right, words = (
        post(tiny, EMBEDDINGS, input="some good words", truncate_prompt_tokens=1, truncation_side=side)["data"][0]["embedding"]
        for side in ("left", "right", "left")
    )
    assert left == pytest.approx(words) and left != pytest.approx(right, abs=1e-3)
    assert count(priority=1, cache_salt="s", user="zaphod-vectors") == whole
    assert post(tiny, EMBEDDINGS, input="a", request_id="mine")["id"] == "embd-mine"
    salted = [*range(300, 364)]  # what an embedding leaves in the cache is found with its salt only
    post(tiny, EMBEDDINGS, input=salted, cache_salt="of vectors")
    found = [
        post(tiny, "/v1/completions", prompt=salted, max_tokens=1, cache_salt=salt)["usage"]["prompt_tokens_details"]
        for salt in ("another", "of vectors")
    ]
    assert [details["cached_tokens"] for details in found] == [0, 48]
    assert param(tiny, EMBEDDINGS, input="a", priority=9999) == "priority"
    assert "zaphod-vectors" not in "".join(tiny.log)


# --- messages

ASK = {"messages": [{"role": "user", "content": "Tell me"}], "max_tokens": 5, "temperature": 0}
TOOL = {"name": "look", "description": "Look it up", "input_schema": SCHEMA, "cache_control": {"type": "ephemeral"}}


def message(server, **fields):
    return post(server, MESSAGES, **{**ASK, **fields})


@pytest.mark.honours(MESSAGES, "model messages system max_tokens")
@pytest.mark.honours(COUNT, "model messages system tools tool_choice thinking output_config")
def test_blocks_go_in_as_messages(tiny):
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "one", "cache_control": {"type": "ephemeral"}}]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm.", "signature": ""}, {"type": "text", "text": "two"}, {"type": "tool_use", "id": "c1", "name": "look", "input": {"n": 7}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "seven"}]}, {"type": "text", "text": "three"}]},
    ]  # fmt: skip
    chat = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two", "reasoning": "Hm.", "tool_calls": [{"id": "c1", "function": {"name": "look", "arguments": '{"n": 7}'}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "seven"},
        {"role": "user", "content": "three"},
    ]  # fmt: skip
    expected = post(tiny, "/tokenize", messages=chat)["count"]
    system = [{"type": "text", "text": "Be short."}]
    assert post(tiny, COUNT, messages=turns, system=system, model="tiny-qwen")["input_tokens"] == expected
    usage = message(tiny, messages=turns, system="Be short.")["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == expected and usage["output_tokens"] == 5

    def count(**fields):
        return post(tiny, COUNT, messages=turns, **fields)["input_tokens"]

    assert count(tools=[TOOL], tool_choice={"type": "any"}) > count()
    assert count(tools=[TOOL], tool_choice={"type": "none"}) == count()
    assert count(thinking={"type": "disabled"}) > count() < count(output_config={"effort": "high"})
    assert tiny.post(COUNT, {"messages": turns, "model": "claude"}).status == 404
    prefilled = [*ASK["messages"], {"role": "assistant", "content": "Well"}]
    assert (
        post(tiny, COUNT, messages=prefilled)["input_tokens"] < post(tiny, COUNT, messages=[*prefilled, *turns])["input_tokens"]
    )
    assert message(tiny, messages=prefilled)["content"][0]["text"]
    for kind in ("image", "document", "server_tool_use"):
        reply = tiny.post(MESSAGES, {**ASK, "messages": [{"role": "user", "content": [{"type": kind}]}]})
        assert (reply.status, reply.error["param"], reply.json["type"]) == (400, "messages[0].content[0]", "error")
        assert kind in reply.error["message"]
    assert param(tiny, MESSAGES, messages=ASK["messages"]) == "max_tokens"
    assert tiny.post(MESSAGES, {**ASK, "model": "claude"}).json["error"]["type"] == "not_found_error"
    failed = [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "no", "is_error": True}]}]
    assert post(tiny, COUNT, messages=failed)["input_tokens"] > 5


@pytest.mark.honours(MESSAGES, "temperature top_p top_k stop_sequences metadata service_tier stream")
def test_sampling_and_events_of_messages(tiny):
    whole = message(tiny)
    text = whole["content"][0]["text"]
    assert (whole["stop_reason"], whole["stop_sequence"], whole["type"], whole["role"]) == (
        "max_tokens",
        None,
        "message",
        "assistant",
    )
    assert (
        message(tiny, temperature=1, top_k=1)["content"]
        == message(tiny, temperature=1, top_p=1e-6)["content"]
        == whole["content"]
    )
    stopped = message(tiny, stop_sequences=[text[4:7]])
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", text[4:7])
    assert message(tiny, metadata={"user_id": "zaphod-messages"}, service_tier="auto")["content"] == whole["content"]
    assert "zaphod-messages" not in "".join(tiny.log)
    events = tiny.post(MESSAGES, {**ASK, "stream": True}).events
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert "".join(event["delta"]["text"] for event in events if event["type"] == "content_block_delta") == text
    assert events[-2]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] == 5
    for wrong in ({"temperature": -1}, {"stop_sequences": [""]}, {"service_tier": "flex"}, {"top_k": -2}):
        assert param(tiny, MESSAGES, **{**ASK, **wrong}) == next(iter(wrong))


@pytest.mark.honours(MESSAGES, "tools tool_choice thinking output_config")
def test_tools_thinking_and_form_of_messages(tiny):
    free = {"max_tokens": 60, "tools": [TOOL], "thinking": {"type": "disabled"}}
    for choice in ({"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "look"}):
        called = message(tiny, **free, tool_choice=choice)
        (block,) = called["content"]
        assert (block["type"], block["name"], block["input"], called["stop_reason"]) == ("tool_use", "look", {"n": 7}, "tool_use")
    events = tiny.post(MESSAGES, {**ASK, **free, "tool_choice": {"type": "tool", "name": "look"}, "stream": True}).events
    assert events[1]["content_block"] == {"type": "tool_use", "id": events[1]["content_block"]["id"], "name": "look", "input": {}}
    assert json.loads("".join(event["delta"]["partial_json"] for event in events if event["type"] == "content_block_delta")) == {
        "n": 7
    }
    form = {"format": {"type": "json_schema", "schema": SCHEMA}}
    assert json.loads(message(tiny, max_tokens=40, output_config=form, thinking={"type": "disabled"})["content"][0]["text"]) == {
        "n": 7
    }
    off = message(tiny, thinking={"type": "disabled"})["usage"]
    on = message(tiny, thinking={"type": "enabled"})["usage"]
    assert sum(off.values()) > sum(on.values())  # "<think></think>" is in the prompt
    assert param(tiny, MESSAGES, **ASK, tool_choice={"type": "tool"}) == "tool_choice"
    assert param(tiny, MESSAGES, **ASK, tool_choice={"type": "any"}) == "tool_choice"
    assert message(tiny, tools=[TOOL], tool_choice={"type": "none"})["usage"]["output_tokens"] <= 5


# --- tokenize


@pytest.mark.honours("/tokenize", "model prompt messages add_special_tokens return_token_strs tools")
@pytest.mark.honours("/tokenize", "add_generation_prompt continue_final_message chat_template_kwargs")
@pytest.mark.honours("/detokenize", "model tokens")
def test_tokens_there_and_back(tiny):
    reply = post(tiny, "/tokenize", prompt="Two words", return_token_strs=True, model="tiny-qwen")
    assert reply["count"] == len(reply["tokens"]) == len(reply["token_strs"]) == 3
    assert reply["token_strs"] == ["<|endoftext|>", "Two", "Ġwords"] and reply["max_model_len"] == 512
    plain = post(tiny, "/tokenize", prompt="Two words", add_special_tokens=False)
    assert plain["tokens"] == reply["tokens"][1:] and "token_strs" not in plain
    assert post(tiny, "/detokenize", tokens=plain["tokens"], model="tiny-qwen") == {"prompt": "Two words"}
    assert post(tiny, "/detokenize", tokens=[]) == {"prompt": ""}

    def chat(*messages, **fields):
        tokens = post(tiny, "/tokenize", messages=[*messages], **fields)["tokens"]
        return post(tiny, "/detokenize", tokens=tokens)["prompt"]

    user = {"role": "user", "content": "Hi"}
    assert chat(user) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert chat(user, add_generation_prompt=False) == "<|im_start|>user\nHi<|im_end|>\n"
    assert chat(user, {"role": "assistant", "content": "Well"}, continue_final_message=True).endswith("assistant\nWell")
    assert chat(user, chat_template_kwargs={"enable_thinking": False}).endswith("<think></think>")
    assert '"name": "look"' in chat(user, tools=[{"type": "function", "function": {"name": "look"}}])
    for wrong in ({}, {"prompt": "a", "messages": [user]}, {"prompt": "a", "tools": []}, {"messages": []}):
        assert param(tiny, "/tokenize", **wrong) in ("prompt", "tools", "messages")
    for tokens in ([-1], [10**6], ["a"], [True]):
        assert tiny.post("/detokenize", {"tokens": tokens}).status == 400
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        assert tiny.post(path, {**body, "model": "gpt-4"}).status == 404
