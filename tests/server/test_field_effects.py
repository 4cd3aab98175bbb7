"""What each honoured field does, on the tiny model: completions and chats. `honours` marks are counted in test_fields.py."""

from __future__ import annotations

import itertools
import json
import re

import pytest
from live_server import close_decision

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BOTH = pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
PROMPT = "Once upon a time there was a fox"
GREEDY = {"temperature": 0, "max_tokens": 6, "ignore_eos": True, "return_token_ids": True}
END, START = 2, 1  # <|im_end|>, which ends a text, and <|im_start|>
TWO = (3000, 4000)  # two tokens that write something
QUIET = {"chat_template_kwargs": {"enable_thinking": False}}  # a model without sense would begin to think by chance


def post(server, path, **fields):
    start = {"prompt": PROMPT} if path == COMPLETIONS else {"messages": [{"role": "user", "content": PROMPT}]}
    return server.post(path, {**start, **GREEDY, **fields})


def answer(server, path, **fields):
    reply = post(server, path, **fields)
    assert reply.status == 200, reply.body
    return reply.json


def choice(server, path, **fields):
    return answer(server, path, **fields)["choices"][0]


def ids(server, path, **fields):
    return choice(server, path, **fields)["token_ids"]


def text_of(one):
    return one["text"] if "text" in one else one["message"]["content"]


def prompt_ids(server, path, **fields):
    reply = answer(server, path, **fields)
    return reply["choices"][0]["prompt_token_ids"] if path == COMPLETIONS else reply["prompt_token_ids"]


def prompt_text(server, **fields):
    return server.post("/detokenize", {"tokens": prompt_ids(server, CHAT, **fields)}).json["prompt"]


def param(server, path, **fields):
    """The field that is blamed."""
    reply = post(server, path, **fields)
    assert reply.status == 400, reply.body
    return reply.error["param"]


def joined(lists):
    return [*itertools.chain.from_iterable(lists)]


# --- drawing


@pytest.mark.honours(COMPLETIONS, "temperature top_p top_k min_p seed")
@pytest.mark.honours(CHAT, "temperature top_p top_k min_p seed")
@BOTH
def test_temperature_filters_and_seed(tiny, path):
    greedy = ids(tiny, path)
    assert ids(tiny, path, temperature=1, seed=1) == ids(tiny, path, temperature=1, seed=1) != greedy
    assert ids(tiny, path, temperature=1, seed=2) != ids(tiny, path, temperature=1, seed=1)
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert ids(tiny, path, temperature=1, seed=1, **narrow) == greedy
    assert [param(tiny, path, **wrong) for wrong in ({"temperature": -1}, {"top_p": 0}, {"top_k": -2}, {"min_p": 2})] == [
        "temperature",
        "top_p",
        "top_k",
        "min_p",
    ]


@pytest.mark.honours(COMPLETIONS, "logit_bias allowed_token_ids bad_words")
@pytest.mark.honours(CHAT, "logit_bias allowed_token_ids bad_words")
@BOTH
def test_tokens_are_pushed_allowed_and_forbidden(tiny, path):
    assert ids(tiny, path, logit_bias={str(TWO[0]): 100}) == [TWO[0]] * 6
    assert set(ids(tiny, path, allowed_token_ids=[*TWO])) <= set(TWO)
    plain = ids(tiny, path, max_tokens=1)
    word = tiny.post("/detokenize", {"tokens": plain}).json["prompt"]
    assert ids(tiny, path, max_tokens=1, bad_words=[word.strip()]) != plain
    assert param(tiny, path, logit_bias={"x": 1}) == "logit_bias"
    assert param(tiny, path, logit_bias={"1": 101}) == "logit_bias"
    assert param(tiny, path, allowed_token_ids=[]) == "allowed_token_ids"


@pytest.mark.honours(COMPLETIONS, "presence_penalty frequency_penalty repetition_penalty")
@pytest.mark.honours(CHAT, "presence_penalty frequency_penalty repetition_penalty")
@BOTH
def test_penalties_turn_a_close_decision(tiny, path):
    options, a, b = close_decision(tiny, prompt_ids(tiny, path))
    options["max_tokens"] = 2
    assert ids(tiny, path, **options) == [a, a]
    for penalty in ({"presence_penalty": 2}, {"frequency_penalty": 2}, {"repetition_penalty": 2.0}):
        assert ids(tiny, path, **options, **penalty) == [a, b], penalty
    assert param(tiny, path, presence_penalty=3) == "presence_penalty"


# --- where it ends


@pytest.mark.honours(COMPLETIONS, "max_tokens n")
@pytest.mark.honours(CHAT, "max_tokens max_completion_tokens n")
@BOTH
def test_numbers_of_tokens_and_of_completions(tiny, path):
    reply = answer(tiny, path, n=3, max_tokens=4, temperature=1, seed=5)
    assert [one["index"] for one in reply["choices"]] == [0, 1, 2]
    assert len({tuple(one["token_ids"]) for one in reply["choices"]}) == 3
    assert reply["usage"]["completion_tokens"] == 12
    assert {one["finish_reason"] for one in reply["choices"]} == {"length"}
    assert param(tiny, path, n=0) == "n"
    assert param(tiny, path, n=129) == "n"
    assert param(tiny, path, max_tokens=0) == "max_tokens"
    if path == CHAT:
        assert len(ids(tiny, path, max_completion_tokens=3, max_tokens=None)) == 3
        assert len(ids(tiny, path, max_completion_tokens=None, max_tokens=None)) > 400
        assert param(tiny, path, max_completion_tokens=0, max_tokens=None) == "max_completion_tokens"
        assert param(tiny, path, max_completion_tokens=3, max_tokens=4) == "max_tokens"
    else:
        assert len(ids(tiny, path, max_tokens=None)) == 16


@pytest.mark.honours(COMPLETIONS, "stop stop_token_ids include_stop_str_in_output")
@pytest.mark.honours(CHAT, "stop stop_token_ids include_stop_str_in_output")
@BOTH
def test_stop_strings_and_stop_tokens(tiny, path):
    whole = choice(tiny, path)
    text, token_ids = text_of(whole), whole["token_ids"]
    word = text[4:8]
    stopped = choice(tiny, path, stop=word)
    assert (text_of(stopped), stopped["finish_reason"], stopped["stop_reason"]) == (text[: text.index(word)], "stop", word)
    assert text_of(choice(tiny, path, stop=["\0never", word])) == text_of(stopped)
    assert text_of(choice(tiny, path, stop=word, include_stop_str_in_output=True)) == text[: text.index(word)] + word
    by_token = choice(tiny, path, stop_token_ids=[token_ids[2]])
    assert by_token["token_ids"] == token_ids[: token_ids.index(token_ids[2]) + 1]
    assert (by_token["finish_reason"], by_token["stop_reason"]) == ("stop", token_ids[2])
    assert param(tiny, path, stop="") == "stop"


@pytest.mark.honours(COMPLETIONS, "ignore_eos min_tokens skip_special_tokens")
@pytest.mark.honours(CHAT, "ignore_eos min_tokens skip_special_tokens")
@BOTH
def test_end_tokens_and_special_tokens(tiny, path):
    likely_end = {"allowed_token_ids": [END, TWO[0]], "logit_bias": {str(END): 100}}
    ended = choice(tiny, path, ignore_eos=False, **likely_end)
    assert (ended["token_ids"], ended["finish_reason"]) == ([END], "stop")
    assert ids(tiny, path, **likely_end) == [END] * 6
    assert ids(tiny, path, ignore_eos=False, min_tokens=3, **likely_end)[:3] == [TWO[0]] * 3
    assert text_of(choice(tiny, path, allowed_token_ids=[START])) == ""
    assert text_of(choice(tiny, path, allowed_token_ids=[START], skip_special_tokens=False)) == "<|im_start|>" * 6
    assert param(tiny, path, min_tokens=9) == "min_tokens"


# --- log-probabilities


@pytest.mark.honours(COMPLETIONS, "logprobs prompt_logprobs echo return_tokens_as_token_ids return_token_ids")
def test_log_probabilities_of_completions(tiny):
    one = choice(tiny, COMPLETIONS, logprobs=2, echo=True, prompt_logprobs=1)
    logprobs, num_prompt = one["logprobs"], len(one["prompt_token_ids"])
    assert one["text"].startswith(PROMPT)
    assert {len(values) for values in logprobs.values()} == {num_prompt + 6}
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    drawn = logprobs["tokens"][num_prompt:]
    assert "".join(drawn) == one["text"].removeprefix(PROMPT)
    for token, logprob, top in list(zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"]))[1:]:
        assert top[token] == logprob <= max(top.values()) and len(top) in (2, 3)
    assert [max(top, key=top.__getitem__) for top in logprobs["top_logprobs"][num_prompt:]] == drawn  # greedy
    assert one["text"][logprobs["text_offset"][num_prompt] :].startswith(drawn[0])
    assert one["prompt_logprobs"][0] is None
    assert {len(position) for position in one["prompt_logprobs"][1:]} <= {1, 2}
    assert str(one["prompt_token_ids"][1]) in one["prompt_logprobs"][1]
    named = choice(tiny, COMPLETIONS, logprobs=0, return_tokens_as_token_ids=True)
    assert named["logprobs"]["tokens"] == [f"token_id:{token_id}" for token_id in named["token_ids"]]
    assert choice(tiny, COMPLETIONS, echo=True, max_tokens=0)["text"] == PROMPT
    assert choice(tiny, COMPLETIONS, return_token_ids=None).keys() == {"index", "text", "logprobs", "finish_reason"}
    assert param(tiny, COMPLETIONS, logprobs=65) == "logprobs"
    assert param(tiny, COMPLETIONS, logprobs=64, n=128, max_tokens=512, prompt=["a"] * 2) == "logprobs"  # too large an answer
    assert param(tiny, COMPLETIONS, prompt_logprobs=-1) == "prompt_logprobs"


@pytest.mark.honours(CHAT, "logprobs top_logprobs prompt_logprobs return_tokens_as_token_ids return_token_ids")
def test_log_probabilities_of_chats(tiny):
    reply = answer(tiny, CHAT, logprobs=True, top_logprobs=3, prompt_logprobs=0)
    one = reply["choices"][0]
    content = one["logprobs"]["content"]
    assert "".join(position["token"] for position in content) == one["message"]["content"]
    assert bytes(value for position in content for value in position["bytes"]).decode() == one["message"]["content"]
    assert all(position["top_logprobs"][0]["logprob"] == position["logprob"] for position in content)  # greedy
    assert {len(position["top_logprobs"]) for position in content} == {3}
    assert len(reply["prompt_logprobs"]) == len(reply["prompt_token_ids"]) == reply["usage"]["prompt_tokens"]
    assert choice(tiny, CHAT, logprobs=True)["logprobs"]["content"][0]["top_logprobs"] == []
    named = choice(tiny, CHAT, logprobs=True, return_tokens_as_token_ids=True)
    assert [position["token"] for position in named["logprobs"]["content"]] == [f"token_id:{one}" for one in named["token_ids"]]
    assert param(tiny, CHAT, top_logprobs=2) == "top_logprobs"
    assert param(tiny, CHAT, logprobs=True, top_logprobs=65) == "top_logprobs"


def test_half_characters_have_their_bytes(tiny):
    """A token that is a part of a character."""
    first, *_ = tiny.post("/tokenize", {"prompt": "\U0001f98a", "add_special_tokens": False}).json["tokens"]
    one = choice(tiny, CHAT, logprobs=True, allowed_token_ids=[first], max_tokens=1)
    position = one["logprobs"]["content"][0]
    assert "\N{REPLACEMENT CHARACTER}" in position["token"]
    assert "\U0001f98a".encode().startswith(bytes(position["bytes"]))


# --- the prompt


@pytest.mark.honours(COMPLETIONS, "model prompt best_of")
def test_prompts_of_every_form(tiny):
    token_ids = prompt_ids(tiny, COMPLETIONS)
    greedy = ids(tiny, COMPLETIONS)
    assert ids(tiny, COMPLETIONS, prompt=token_ids) == greedy
    several = answer(tiny, COMPLETIONS, prompt=[PROMPT, token_ids, "Other"], n=2, best_of=2)
    assert [one["index"] for one in several["choices"]] == [*range(6)]
    assert [one["token_ids"] == greedy for one in several["choices"]] == [True] * 4 + [False] * 2
    for wrong in ([], [1, "a"], [[1], 2], [[]], ["a"] * 9, {}, "", [-1], [10**6], [True]):
        reply = post(tiny, COMPLETIONS, prompt=wrong)
        assert reply.status == 400, wrong
        assert PROMPT not in reply.error["message"]
    assert param(tiny, COMPLETIONS, prompt=["a"] * 9) == "prompt"
    assert param(tiny, COMPLETIONS, best_of=2) == "best_of"
    reply = post(tiny, COMPLETIONS, model="gpt-4")
    assert (reply.status, reply.error["code"], reply.error["param"]) == (404, "model_not_found", "model")
    assert answer(tiny, COMPLETIONS, model="tiny-qwen")["model"] == "tiny-qwen"


@pytest.mark.honours(COMPLETIONS, "truncate_prompt_tokens truncation_side add_special_tokens")
@pytest.mark.honours(CHAT, "truncate_prompt_tokens truncation_side add_special_tokens")
@BOTH
def test_truncation_and_special_tokens(tiny, path):
    token_ids = prompt_ids(tiny, path)
    assert prompt_ids(tiny, path, truncate_prompt_tokens=3) == token_ids[-3:]
    assert prompt_ids(tiny, path, truncate_prompt_tokens=3, truncation_side="right") == token_ids[:3]
    with_special = prompt_ids(tiny, path, add_special_tokens=True)
    assert prompt_ids(tiny, path, add_special_tokens=False) == with_special[1:]
    assert token_ids == (with_special if path == COMPLETIONS else with_special[1:])
    long = "word " * 600
    start = {"prompt": long} if path == COMPLETIONS else {"messages": [{"role": "user", "content": long}]}
    reply = post(tiny, path, **start)
    assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")
    assert len(prompt_ids(tiny, path, truncate_prompt_tokens=-1, **start)) == 512 - 6
    for wrong in (0, -2):
        assert param(tiny, path, truncate_prompt_tokens=wrong) == "truncate_prompt_tokens"


@pytest.mark.honours(COMPLETIONS, "cache_salt request_id user priority")
@pytest.mark.honours(CHAT, "cache_salt request_id user priority prompt_cache_key safety_identifier")
@BOTH
def test_salt_names_and_priority(tiny, path):
    long = "salted words for the cache " * 8 + path
    start = {"prompt": long} if path == COMPLETIONS else {"messages": [{"role": "user", "content": long}]}

    def cached(**fields):
        return answer(tiny, path, **start, **fields)["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached(cache_salt="one") == 0
    assert cached(cache_salt="one") > 16
    assert cached(cache_salt="two") == 0
    prefix = "cmpl-" if path == COMPLETIONS else "chatcmpl-"
    assert answer(tiny, path, request_id="my-own.id")["id"] == prefix + "my-own.id"
    assert param(tiny, path, request_id="two\nlines") == "request_id"
    greedy = ids(tiny, path)
    assert ids(tiny, path, user="zaphod-secret", priority=-3) == greedy
    assert param(tiny, path, priority=10**6) == "priority"
    if path == CHAT:
        assert ids(tiny, path, prompt_cache_key="zaphod-secret", safety_identifier="zaphod-secret") == greedy
    assert "zaphod-secret" not in "".join(tiny.log)


# --- streams


@pytest.mark.honours(COMPLETIONS, "stream stream_options")
def test_a_stream_of_a_completion_adds_up_to_the_whole(tiny):
    options = {"n": 2, "logprobs": 1, "echo": True, "prompt_logprobs": 0, "prompt": [PROMPT, "Other words"], "seed": 3}
    whole = answer(tiny, COMPLETIONS, **options, temperature=1)
    stream = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    events = post(tiny, COMPLETIONS, **options, temperature=1, **stream).events
    assert events[-1] == "[DONE]"
    assert events[-2]["choices"] == []
    assert events[-2]["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
    chunks = events[:-2]
    assert all(len(chunk["choices"]) == 1 and chunk["usage"]["prompt_tokens"] for chunk in chunks)
    assert len({(chunk["id"], chunk["system_fingerprint"], chunk["object"]) for chunk in events[:-1]}) == 1
    for expected in whole["choices"]:
        parts = [one for chunk in chunks for one in chunk["choices"] if one["index"] == expected["index"]]
        assert "".join(part["text"] for part in parts) == expected["text"]
        assert joined(part["token_ids"] for part in parts) == expected["token_ids"]
        for name in ("tokens", "text_offset"):
            assert joined(part["logprobs"][name] for part in parts) == expected["logprobs"][name]
        streamed = joined(part["logprobs"]["token_logprobs"] for part in parts)
        assert streamed[1:] == pytest.approx(expected["logprobs"]["token_logprobs"][1:], abs=1e-3)
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["length"]
        assert parts[0]["prompt_token_ids"] == expected["prompt_token_ids"]
        assert len(parts[0]["prompt_logprobs"]) == len(expected["prompt_logprobs"])
    assert param(tiny, COMPLETIONS, stream_options={"include_usage": True}) == "stream_options"


def test_offsets_of_a_stream_are_those_of_its_text_though_some_of_it_is_held_back(tiny):
    """Characters of several tokens, and what might become a stop string."""
    text = "é 🎉 one two onto the end"
    form = {"structured_outputs": {"regex": text}, "stop": ["one two only", "end of it"]}
    options = {**form, "prompt": "x", "logprobs": 0, "max_tokens": 60, "ignore_eos": False}
    whole = answer(tiny, COMPLETIONS, **options)["choices"][0]
    events = post(tiny, COMPLETIONS, **options, stream=True).events[:-1]
    streamed = joined(event["choices"][0]["logprobs"]["text_offset"] for event in events)
    assert whole["text"] == text and streamed == whole["logprobs"]["text_offset"]
    for token, offset in zip(whole["logprobs"]["tokens"], streamed):
        assert "\ufffd" in token or token.startswith("<|") or text.startswith(token, offset)


@pytest.mark.honours(CHAT, "stream stream_options")
def test_a_stream_of_a_chat_adds_up_to_the_whole(tiny):
    options = {"n": 2, "logprobs": True, "top_logprobs": 1, "prompt_logprobs": 0, "seed": 3, "temperature": 1}
    whole = answer(tiny, CHAT, **options)
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    events = post(tiny, CHAT, **options, **stream).events
    assert events[-1] == "[DONE]" and events[-2]["choices"] == []
    assert events[-2]["usage"]["completion_tokens"] == 12
    assert all(chunk["usage"] is None for chunk in events[:-2])
    for expected in whole["choices"]:
        parts = [one for chunk in events[:-2] for one in chunk["choices"] if one["index"] == expected["index"]]
        assert parts[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(part["delta"].get("content", "") for part in parts) == expected["message"]["content"]
        content = [position for part in parts if part["logprobs"] for position in part["logprobs"]["content"]]
        assert [position["token"] for position in content] == [one["token"] for one in expected["logprobs"]["content"]]
        assert parts[-1]["finish_reason"] == "length"
    assert events[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    every = post(tiny, CHAT, stream=True, stream_options={"continuous_usage_stats": True}).events
    assert [chunk["usage"]["completion_tokens"] for chunk in every[1:-1]][-1] == 6


def test_the_request_of_vllms_benchmark_works_unchanged(tiny):
    body = {
        "model": "tiny-qwen",
        "prompt": PROMPT,
        "temperature": 0.0,
        "repetition_penalty": 1.0,
        "max_tokens": 5,
        "logprobs": None,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    for extra in ({}, {"best_of": 1}):
        events = tiny.post(COMPLETIONS, {**body, **extra}).events
        chunks = events[:-2]
        assert 1 <= len(chunks) <= 5, "a busy front end puts tokens that came meanwhile into one chunk"
        assert all(chunk["choices"][0]["text"] is not None for chunk in chunks)
        assert events[-2]["usage"]["completion_tokens"] == 5 and events[-1] == "[DONE]"


# --- the form of the output


@pytest.mark.honours(COMPLETIONS, "response_format structured_outputs guided_json guided_regex guided_choice guided_grammar")
@pytest.mark.honours(CHAT, "response_format structured_outputs guided_json guided_regex guided_choice guided_grammar")
@BOTH
def test_structured_output_in_all_its_spellings(tiny, path):
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    free = {"max_tokens": 40, "ignore_eos": False, **(QUIET if path == CHAT else {})}
    compact = {**schema, "x-guidance": {"whitespace_flexible": False}}

    def text(**fields):
        return text_of(choice(tiny, path, **free, **fields))

    as_schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": compact, "strict": True}}
    for fields in (
        {"response_format": as_schema},
        {"structured_outputs": {"json": compact}},
        {"structured_outputs": {"json": json.dumps(compact)}},
        {"guided_json": compact},
    ):
        assert json.loads(text(**fields))["a"] in (1, 2), fields
    for fields in ({"structured_outputs": {"regex": "[ab]{3}"}}, {"guided_regex": "[ab]{3}"}):
        assert set(text(**fields)) <= set("ab") and len(text(**fields)) == 3
    for fields in ({"structured_outputs": {"choice": ["yes", "no"]}}, {"guided_choice": ["yes", "no"]}):
        assert text(**fields) in ("yes", "no")
    for fields in ({"structured_outputs": {"grammar": 'start: "x" "y"'}}, {"guided_grammar": 'start: "x" "y"'}):
        assert text(**fields) == "xy"
    for fields in ({"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}):
        assert text(**fields).lstrip().startswith("{")
    assert text(response_format={"type": "text"}) == text()
    assert param(tiny, path, guided_regex="(((") == "guided_regex"
    assert param(tiny, path, guided_choice=[]) == "guided_choice"
    assert param(tiny, path, structured_outputs={}) == "structured_outputs"
    assert param(tiny, path, structured_outputs={"json": {}, "regex": "a"}) == "structured_outputs.regex"
    assert param(tiny, path, guided_regex="a", response_format={"type": "json_object"}) == "guided_regex"
    assert param(tiny, path, response_format={"type": "json_schema"}) == "response_format"
    wrong = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "nonsense"}}}
    assert param(tiny, path, response_format=wrong) == "response_format"
    assert param(tiny, path, guided_regex="a" * 70_000) == "guided_regex"
    assert param(tiny, path, guided_regex="\U0007ebfb") == "guided_regex"  # no token of this vocabulary has its first byte
    impossible = post(tiny, path, **free, guided_regex="[ab]\U0007ebfb")
    assert (impossible.status, impossible.error["code"]) == (400, "grammar_failed")


# --- chats


TOOL = {"type": "function", "function": {"name": "look", "description": "Look it up", "parameters": {"type": "object", "properties": {"n": {"enum": [7]}}, "required": ["n"], "additionalProperties": False}}}  # fmt: skip
OTHER_TOOL = {"type": "function", "function": {"name": "stop_now"}}


@pytest.mark.honours(CHAT, "messages model echo")
def test_messages_of_every_form(tiny):
    messages = [
        {"role": "developer", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}], "name": "ann"},
        {"role": "assistant", "content": None, "refusal": None, "reasoning": "Hm.", "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"n": 7}'}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "seven"},
    ]  # fmt: skip
    text = prompt_text(tiny, messages=messages)
    assert "<|im_start|>system\nBe short.<|im_end|>" in text
    assert "<|im_start|>user\none\ntwo<|im_end|>" in text
    assert '<think>Hm.</think><tool_call>{"name": "look", "arguments": {"n": 7}}</tool_call>' in text
    assert text.endswith("<|im_start|>tool\nseven<|im_end|>\n<|im_start|>assistant\n")
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]
    reply = post(tiny, CHAT, messages=image)
    assert reply.status == 400 and "image_url" in reply.error["message"]
    for wrong in ([], [{"role": "king", "content": "a"}], [{"role": "user"}], [{"role": "user", "content": "a", "colour": 1}]):
        assert post(tiny, CHAT, messages=wrong).status == 400
    started = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "Well, "}]
    whole = choice(tiny, CHAT, messages=started, continue_final_message=True, echo=True)["message"]["content"]
    assert whole.startswith("Well, ") and len(whole) > 6
    events = post(tiny, CHAT, messages=started, continue_final_message=True, echo=True, stream=True).events
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in events[:-1]) == whole
    assert post(tiny, CHAT, model="gpt-4").status == 404


@pytest.mark.honours(CHAT, "add_generation_prompt continue_final_message chat_template_kwargs documents reasoning_effort")
def test_what_the_template_is_told(tiny):
    assert not prompt_text(tiny, add_generation_prompt=False).endswith("assistant\n")
    started = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "Well"}]
    assert prompt_text(tiny, messages=started, continue_final_message=True).endswith("<|im_start|>assistant\nWell")
    both = {"continue_final_message": True, "add_generation_prompt": True}
    assert param(tiny, CHAT, messages=started, **both) == "continue_final_message"
    assert prompt_text(tiny, chat_template_kwargs={"enable_thinking": False}).endswith("<think></think>")
    assert prompt_text(tiny, reasoning_effort="none").endswith("<think></think>")
    assert "<|im_start|>effort\nhigh<|im_end|>" in prompt_text(tiny, reasoning_effort="high")
    assert '[{"title": "T"}]' in prompt_text(tiny, documents=[{"title": "T"}])
    for name in ("messages", "tools", "add_generation_prompt", "tokenize", "chat_template", "bos_token", "self"):
        assert param(tiny, CHAT, chat_template_kwargs={name: "x"}) == "chat_template_kwargs"


def test_what_the_template_does_not_read_is_refused(live):
    for field in ({"reasoning_effort": "high"}, {"documents": [{"title": "T"}]}):
        assert param(live, CHAT, **field) == next(iter(field))


@pytest.mark.honours(CHAT, "tools tool_choice parallel_tool_calls")
def test_tools(tiny):
    free = {"max_tokens": 60, "ignore_eos": False, "tools": [TOOL, OTHER_TOOL], **QUIET}
    assert '"name": "look"' in prompt_text(tiny, tools=[TOOL])
    assert '"name": "look"' not in prompt_text(tiny, tools=[TOOL], tool_choice="none")
    named = {"type": "function", "function": {"name": "look"}}
    for options in ({"tool_choice": named}, {"tool_choice": "required", "parallel_tool_calls": False}):
        one = choice(tiny, CHAT, **free, **options)
        (call,) = one["message"]["tool_calls"]
        assert one["finish_reason"] == "tool_calls" and one["message"]["content"] is None
        assert call["type"] == "function" and call["id"].startswith("call_") and "index" not in call
        if call["function"]["name"] == "look":
            assert json.loads(call["function"]["arguments"]) == {"n": 7}
    two = '<tool_call>\n{"name": "look", "arguments": {"n": 7}}\n</tool_call>'
    twice = {
        "guided_grammar": f"start: {json.dumps(two)} {json.dumps(two)}",
        "tools": [TOOL],
        "max_tokens": 80,
        "ignore_eos": False,
        **QUIET,
    }
    assert len(choice(tiny, CHAT, **twice)["message"]["tool_calls"]) == 2
    assert len(choice(tiny, CHAT, **twice, parallel_tool_calls=False)["message"]["tool_calls"]) == 1
    assert choice(tiny, CHAT, **{**twice, "tools": None})["message"].keys() == {"role", "content"}
    events = post(tiny, CHAT, **twice, stream=True).events
    calls: dict[int, list] = {}
    for chunk in events[:-1]:
        for call in chunk["choices"][0]["delta"].get("tool_calls", []):
            calls.setdefault(call["index"], []).append(call)
    assert [json.loads("".join(part["function"]["arguments"] for part in parts)) for parts in calls.values()] == [{"n": 7}] * 2
    assert [parts[0]["function"]["name"] for parts in calls.values()] == ["look"] * 2
    assert events[-2]["choices"][0]["finish_reason"] == "tool_calls"
    unknown = {"type": "function", "function": {"name": "fly"}}
    assert param(tiny, CHAT, tools=[TOOL], tool_choice=unknown) == "tool_choice"
    assert param(tiny, CHAT, tool_choice="required") == "tool_choice"
    assert param(tiny, CHAT, tools=[TOOL, TOOL]) == "tools"
    assert param(tiny, CHAT, tools=[TOOL], tool_choice="required", guided_regex="a") == "tool_choice"


FORCED = {"tools": [TOOL], "tool_choice": "required", "ignore_eos": False, "bad_words": ["<|im_end|>"], **QUIET}


def gathered(events: list) -> tuple[str, list[tuple[str, str]], str]:
    """(content, (name, arguments) of each call, finish reason) of a streamed chat."""
    content, reason, calls = "", "", {}
    for choice in (chunk["choices"][0] for chunk in events[:-1]):
        content += choice["delta"].get("content") or ""
        for piece in choice["delta"].get("tool_calls") or []:
            name, arguments = calls.get(piece["index"], ("", ""))
            function = piece["function"]
            calls[piece["index"]] = (name + (function.get("name") or ""), arguments + function["arguments"])
        reason = choice["finish_reason"] or reason
    return content, list(calls.values()), reason


def test_a_required_call_that_max_tokens_cuts_is_the_last_one_and_the_reason_says_so(tiny):
    """Its end token is forbidden, so the model has to begin another call: what is cut is seen at every place."""
    seen = set()
    for max_tokens in range(1, 70):
        one = choice(tiny, CHAT, **FORCED, max_tokens=max_tokens)
        calls = [(call["function"]["name"], call["function"]["arguments"]) for call in one["message"].get("tool_calls") or []]
        assert not one["message"]["content"], "the beginning of a call is no text"
        assert one["finish_reason"] == "length"
        for name, arguments in calls[:-1]:
            assert (name, json.loads(arguments)) == ("look", {"n": 7})
        if calls:
            assert calls[-1][0] == "look" and '{"n": 7}'.startswith(calls[-1][1])
            seen.add((len(calls), calls[-1][1] == '{"n": 7}'))
        assert gathered(post(tiny, CHAT, **FORCED, max_tokens=max_tokens, stream=True).events) == ("", calls, "length")
    assert {(1, False), (1, True), (2, False), (2, True)} <= seen


def test_a_stop_string_inside_of_a_call_is_no_finished_call(tiny):
    one = choice(tiny, CHAT, **FORCED, max_tokens=60, stop=["7}"])
    (call,) = one["message"]["tool_calls"]
    assert (call["function"]["arguments"], one["finish_reason"], one["stop_reason"]) == ('{"n": ', "stop", "7}")
    assert gathered(post(tiny, CHAT, **FORCED, max_tokens=60, stop=["7}"], stream=True).events)[2] == "stop"


@pytest.mark.honours(CHAT, "include_reasoning")
def test_reasoning_is_split_off(tiny):
    thought = {"guided_regex": "<think>Hm\\. So</think>Yes", "ignore_eos": False, "max_tokens": 40, **QUIET}
    reply = answer(tiny, CHAT, **thought)
    assert reply["choices"][0]["message"] == {"role": "assistant", "content": "Yes", "reasoning": "Hm. So"}
    assert 2 <= reply["usage"]["completion_tokens_details"]["reasoning_tokens"] <= reply["usage"]["completion_tokens"]
    assert choice(tiny, CHAT, **thought, include_reasoning=False)["message"] == {"role": "assistant", "content": "Yes"}
    deltas = [chunk["choices"][0]["delta"] for chunk in post(tiny, CHAT, **thought, stream=True).events[:-1]]
    assert "".join(delta.get("reasoning", "") for delta in deltas) == "Hm. So"
    assert "".join(delta.get("content", "") for delta in deltas) == "Yes"


PIECES = ["</", "think", ">", "<", "and"]  # a model that can write little else closes its reasoning soon
OPENED = {"chat_template_kwargs": {"thinks_first": True}}


def thinking(server, **fields):
    """Options of a model that thinks about its reasoning's end."""
    token_ids = [server.post("/tokenize", {"prompt": piece, "add_special_tokens": False}).json["tokens"] for piece in PIECES]
    assert all(len(piece) == 1 for piece in token_ids)
    return {"temperature": 100, "seed": 7, "allowed_token_ids": joined(token_ids), "max_tokens": 400, **OPENED, **fields}


YES = {"ignore_eos": False, "guided_choice": ["yes</think>"]}


def test_a_form_begins_after_what_is_thought(tiny):
    """Wherever the mark is cut into tokens; the answer may hold it again."""
    assert prompt_text(tiny, **OPENED, **YES).endswith("assistant\n<think>\n")
    reply = answer(tiny, CHAT, **thinking(tiny, **YES, n=3))
    for one in reply["choices"]:
        assert one["finish_reason"] == "stop" and one["message"]["content"] == "yes</think>"
        assert set(re.findall("and|think", one["message"]["reasoning"]))
        assert END not in one["token_ids"]
    assert len({one["message"]["reasoning"] for one in reply["choices"]}) == 3
    assert reply["usage"]["completion_tokens_details"]["reasoning_tokens"] > 3
    streamed = {0: ["", ""], 1: ["", ""], 2: ["", ""]}
    for chunk in post(tiny, CHAT, **thinking(tiny, **YES, n=3), stream=True).events[:-1]:
        delta = chunk["choices"][0]["delta"]
        for place, name in enumerate(("reasoning", "content")):
            streamed[chunk["choices"][0]["index"]][place] += delta.get(name) or ""
    whole = [[one["message"]["reasoning"], one["message"]["content"]] for one in reply["choices"]]
    assert list(streamed.values()) == whole
    hidden = choice(tiny, CHAT, **thinking(tiny, **YES), include_reasoning=False)["message"]
    assert hidden == {"role": "assistant", "content": "yes</think>"}


def test_a_required_call_comes_after_what_is_thought(tiny):
    forced = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "ignore_eos": False}
    one = choice(tiny, CHAT, **thinking(tiny, **forced))
    (call,) = one["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"n": 7} and one["finish_reason"] == "tool_calls"
    assert one["message"]["reasoning"] and one["message"]["content"] is None
    content, calls, reason = gathered(post(tiny, CHAT, **thinking(tiny, **forced), stream=True).events)
    assert (content, calls, reason) == ("", [("look", '{"n": 7}')], "tool_calls")


def test_what_is_thought_cannot_be_the_end(tiny):
    """An end token is not drawn, however likely; what the client asks to be the end is."""
    ends = thinking(tiny, **YES, logit_bias={str(END): 100}, allowed_token_ids=None, temperature=0, max_tokens=30)
    cut = choice(tiny, CHAT, **ends)
    assert (cut["finish_reason"], cut["message"]["content"], END in cut["token_ids"]) == ("length", "", False)
    stopped = choice(tiny, CHAT, **thinking(tiny, **YES), stop="and")
    assert (stopped["finish_reason"], stopped["stop_reason"], stopped["message"]["content"]) == ("stop", "and", "")


def test_who_asks_for_no_reasoning_has_the_form_at_once(tiny):
    """Also from a template that opens it without being asked, and with no form."""
    for quiet in (
        {"chat_template_kwargs": {"thinks_first": True, "enable_thinking": False}},
        {**OPENED, "reasoning_effort": "none"},
    ):
        assert prompt_text(tiny, **quiet).endswith("<think>\n\n</think>\n\n")
        assert "reasoning" not in choice(tiny, CHAT, **quiet)["message"]
        one = choice(tiny, CHAT, **YES, **quiet)
        assert one["message"] == {"role": "assistant", "content": "yes</think>"} and len(one["token_ids"]) < 9


def test_who_may_think_or_answer_does_either(tiny):
    """The template opens nothing, so the model does, or begins its answer; but not where an answer is gone on with."""
    (yes,) = tiny.post("/tokenize", {"prompt": "yes", "add_special_tokens": False}).json["tokens"]
    answered = choice(tiny, CHAT, **YES, logit_bias={str(yes): 100})["message"]
    assert answered == {"role": "assistant", "content": "yes</think>"}
    pieces = thinking(tiny, **YES, chat_template_kwargs={})
    thought = choice(tiny, CHAT, **pieces)["message"]
    assert thought["content"] == "yes</think>" and thought["reasoning"]
    continued = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "It is "}]
    going_on = {"messages": continued, "continue_final_message": True, "add_generation_prompt": False}
    assert choice(tiny, CHAT, **pieces, **going_on)["message"] == answered


@pytest.mark.honours(CHAT, "metadata store service_tier modalities")
def test_fields_of_a_service(tiny):
    reply = answer(tiny, CHAT, metadata={"a": "b"}, store=False, service_tier="auto", modalities=["text"])
    assert reply["metadata"] == {"a": "b"} and reply["service_tier"] == "default"
    for wrong in ({"k" * 65: "v"}, {"k": "v" * 513}, {str(number): "v" for number in range(17)}):
        assert param(tiny, CHAT, metadata=wrong) == "metadata"
    assert param(tiny, CHAT, store=True) == "store"
    assert param(tiny, CHAT, service_tier="flex") == "service_tier"
    assert param(tiny, CHAT, modalities=["text", "audio"]) == "modalities"
