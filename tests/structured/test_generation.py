"""Structured output by the real model: texts have their form, and are the best that the model can do within it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
from structured.model import PERSON, allowed_tokens, answer, greedy, make_llm, prompt, schema
from support import assert_nothing_is_held
from test_real_model import pytestmark as needs_the_model

from nanovllm import LLM, SamplingParams, StructuredOutput
from nanovllm.config import EngineConfig
from nanovllm.engine import engine_main
from nanovllm.errors import InvalidGrammar
from nanovllm.structured.llguidance_backend import LLGuidanceGrammar

pytestmark = needs_the_model

SHORT = {"type": "string", "maxLength": 12}
SCHEMAS: dict[str, dict[str, Any]] = {
    "person": PERSON,
    "nested": {
        "type": "object",
        "properties": {
            "title": SHORT,
            "author": {"type": "object", "properties": {"name": SHORT, "born": {"type": "integer", "minimum": 1000, "maximum": 2100}}, "required": ["name"], "additionalProperties": False},
            "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 1, "maxItems": 3},
        },
        "required": ["title", "author", "tags"],
        "additionalProperties": False,
    },
    "alternatives": {"anyOf": [{"type": "null"}, {"type": "integer", "minimum": -5, "maximum": 5}, {"const": "none"}]},
    "array": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    "pattern": {"type": "object", "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}(-[0-9]{4})?$"}}, "required": ["zip"], "additionalProperties": False},
    "formats": {"type": "object", "properties": {"day": {"type": "string", "format": "date"}}, "required": ["day"], "additionalProperties": False},
    "references": {"$defs": {"point": {"type": "array", "prefixItems": [{"enum": [0, 1]}, {"enum": [2, 3]}], "items": False, "minItems": 2}}, "type": "object", "properties": {"a": {"$ref": "#/$defs/point"}, "b": {"$ref": "#/$defs/point"}}, "required": ["a", "b"], "additionalProperties": False},
    "no whitespace to spare": {"type": "object", "properties": {"é 🎉\n": {"const": 'quo"te\\'}}, "required": ["é 🎉\n"], "additionalProperties": False},
}  # fmt: skip


def test_texts_validate_against_their_schemas(llm):
    """Drawn at temperature 1, all in one batch."""
    cases = [(name, 7) for name in SCHEMAS]
    params = [
        SamplingParams(temperature=1.0, seed=seed, max_tokens=64, structured=StructuredOutput("json_schema", SCHEMAS[name])) for name, seed in cases
    ]  # fmt: skip
    outputs = llm.generate([prompt(llm, f"Write JSON: {name}") for name, _ in cases], params, use_tqdm=False)
    num_ended = 0
    for (name, _), output in zip(cases, outputs, strict=True):
        if output.completions[0].finish_reason == "stop":
            num_ended += 1
            jsonschema.validate(json.loads(output.text), SCHEMAS[name], format_checker=jsonschema.FormatChecker())
    assert num_ended >= len(cases) - 1


@pytest.mark.parametrize("num_steps_ahead", [1, 2])
def test_steps_ahead_change_no_token(llm, num_steps_ahead):
    """Requests with grammars of several lengths, others beside them, and fewer rows than requests."""
    forms = [
        StructuredOutput("json_schema", PERSON),
        None,
        StructuredOutput("regex", "[a-z]{3,9}"),
        StructuredOutput("choice", ["yes", "no"]),
    ]
    params = [
        SamplingParams(temperature=t, seed=5, max_tokens=20 + 3 * i, structured=form)
        for t in (0, 1)
        for i, form in enumerate(forms)
    ]
    prompts = [prompt(llm, f"Say something, number {i}.") for i in range(len(params))]
    expected = [output.token_ids for output in llm.generate(prompts, params, use_tqdm=False)]
    with make_llm(num_steps_ahead=num_steps_ahead, max_num_seqs=5, max_num_batched_tokens=64) as ahead:
        assert [output.token_ids for output in ahead.generate(prompts, params, use_tqdm=False)] == expected
        assert_nothing_is_held(ahead.engine)


@pytest.mark.parametrize(
    ("structured", "fits"),
    [
        (StructuredOutput("json_object"), lambda text: isinstance(json.loads(text), dict)),
        (StructuredOutput("regex", r"[A-Z][a-z]{2,8} \d{3}"), lambda text: re.fullmatch(r"[A-Z][a-z]{2,8} \d{3}", text)),
        (StructuredOutput("choice", ["Paris", "Berlin", "東京"]), lambda text: text in ("Paris", "Berlin", "東京")),
        (StructuredOutput("grammar", 'start: N ("+" N){1,2} "=" N\nN: /[0-9]{1,2}/'), lambda text: re.fullmatch(r"\d{1,2}(\+\d{1,2}){1,2}=\d{1,2}", text)),
        (StructuredOutput("grammar", 'root ::= "yes" | "no" [.!]'), lambda text: text in ("yes", "no.", "no!")),
    ],
    ids=lambda value: value.kind if isinstance(value, StructuredOutput) else "",
)  # fmt: skip
def test_every_kind_of_form_is_kept(llm, structured: StructuredOutput, fits: Callable[[str], Any]):
    requests = [greedy(structured), *(greedy(structured, temperature=1.2, seed=seed, max_tokens=40) for seed in range(2))]
    for output in llm.generate([prompt(llm)] * 3, requests, use_tqdm=False):
        if structured.kind != "json_object" or output.completions[0].finish_reason == "stop":
            assert output.completions[0].finish_reason == "stop" and fits(output.text)


def naive_loop(llm: LLM, structured: StructuredOutput, max_tokens: int) -> list[int]:
    """One token at a time by another way through the sampler: the list of allowed tokens."""
    vocab_size = llm.spec.vocab_size
    matcher = LLGuidanceGrammar(llm.tokenizer, vocab_size, [2]).compile(structured)
    start = prompt(llm)
    tokens: list[int] = []
    while len(tokens) < max_tokens:
        params = SamplingParams(temperature=0, max_tokens=1, allowed_token_ids=allowed_tokens(matcher, vocab_size))
        (output,) = llm.generate([start + tokens], params, use_tqdm=False)
        tokens += output.token_ids
        if matcher.accept(tokens[-1]):
            break
    return tokens


@pytest.mark.parametrize("structured", [schema(**PERSON), StructuredOutput("regex", "[a-z ]{1,40}[.]")], ids=["schema", "regex"])
def test_the_greedy_answer_is_that_of_a_naive_loop(llm, structured):
    assert answer(llm, greedy(structured, max_tokens=12)).token_ids == naive_loop(llm, structured, 12)


def test_batch_mates_do_not_notice(llm):
    prompts = [prompt(llm, text) for text in ("Name three colours.", "Describe a person.", "What is the capital of France?")]
    seeded = SamplingParams(temperature=0.8, top_p=0.9, seed=5, max_tokens=16, ignore_eos=True)
    plain = greedy(None, max_tokens=16, ignore_eos=True)

    def mates(middle: SamplingParams) -> list[list[int]]:
        outputs = llm.generate(prompts, [plain, middle, seeded], use_tqdm=False)
        return [outputs[0].token_ids, outputs[2].token_ids]

    assert mates(greedy(schema(**PERSON), max_tokens=16)) == mates(plain)


def test_texts_keep_their_form_through_preemptions_one_step_ahead():
    """That the tokens are the same is shown with a fake model, where rounding plays no part."""
    form = r"(\d{2}-){5}\d{2}"
    with make_llm(num_kv_blocks=14, block_size=4, watermark=0.0, num_steps_ahead=1, max_num_seqs=4) as small:
        requests = [greedy(StructuredOutput("regex", form), seed=seed, temperature=1.0, max_tokens=24) for seed in range(3)]
        requests.append(greedy(None, max_tokens=24, ignore_eos=True))
        outputs = small.generate([f"Write JSON {i}:" for i in range(4)], requests, use_tqdm=False)
        assert sum(output.metrics.num_preemptions for output in outputs) > 0
        for output in outputs[:3]:
            assert output.completions[0].finish_reason == "stop" and re.fullmatch(form, output.text)
        assert len(outputs[3].token_ids) == 24
        assert_nothing_is_held(small.engine)


class TestEnds:
    def test_a_complete_text_stops_without_an_end_token(self, llm):
        completion = answer(llm, greedy(StructuredOutput("choice", ["Paris"])))
        assert (completion.text, completion.finish_reason, completion.stop_reason) == ("Paris", "stop", None)
        assert 2 not in completion.token_ids

    def test_the_model_may_end_where_the_grammar_may(self, llm):
        ended = answer(llm, greedy(StructuredOutput("regex", r"(.|\n)*")), "What is the capital of France?")
        assert ended.token_ids[-1] == 2 and ended.finish_reason == "stop" and "Paris" in ended.text

    def test_ignore_eos_goes_on_while_the_grammar_can(self, llm):
        structured = StructuredOutput("regex", r"(.|\n)*")
        completion = answer(llm, greedy(structured, ignore_eos=True, max_tokens=16), "What is the capital of France?")
        assert completion.finish_reason == "length" and 2 not in completion.token_ids
        assert answer(llm, greedy(StructuredOutput("regex", "a{2}"), ignore_eos=True)).finish_reason == "stop"

    def test_min_tokens_puts_the_end_off_as_long_as_the_grammar_allows(self, llm):
        structured = StructuredOutput("regex", "(a ){1,12}")
        ended = answer(llm, greedy(structured, logit_bias={2: 100.0}))
        assert ended.finish_reason == "stop" and len(ended.token_ids) < 8
        put_off = answer(llm, greedy(structured, logit_bias={2: 100.0}, min_tokens=9))
        assert put_off.finish_reason == "stop" and len(put_off.token_ids) > 9
        complete = answer(llm, greedy(StructuredOutput("choice", ["a"]), min_tokens=20))
        assert (complete.text, complete.finish_reason) == ("a", "stop")

    def test_a_stop_string_ends_the_text_within_the_grammar(self, llm):
        completion = answer(llm, greedy(schema(**PERSON), stop='"age'))
        assert (completion.finish_reason, completion.stop_reason) == ("stop", '"age')
        assert completion.text.startswith("{") and '"age' not in completion.text

    def test_the_grammar_wins_over_what_contradicts_it(self, llm):
        structured = StructuredOutput("choice", ["yes", "no"])
        params = greedy(structured, allowed_token_ids=llm.tokenizer.encode("perhaps"), temperature=1.0, top_k=3, seed=1)
        assert answer(llm, params).text in ("yes", "no")
        assert answer(llm, greedy(structured, bad_words=["yes", "no"], logit_bias={2: 100})).text in ("yes", "no")

    def test_bad_words_choose_within_the_grammar(self, llm):
        structured = StructuredOutput("choice", ["yes", "no"])
        first = answer(llm, greedy(structured)).token_ids[0]
        word = llm.tokenizer.decode([first])
        completion = answer(llm, greedy(structured, bad_words=[word]))
        assert first not in completion.token_ids and completion.text in ("yes", "no")


def test_each_of_several_completions_follows_the_schema(llm):
    params = SamplingParams(temperature=1.0, n=3, seed=1, max_tokens=80, structured=schema(**PERSON), logprobs=1)
    (output,) = llm.generate([prompt(llm)], params, use_tqdm=False)
    for completion in output.completions:
        assert completion.finish_reason == "stop"
        jsonschema.validate(json.loads(completion.text), PERSON)
        assert len(completion.logprobs) == len(completion.token_ids)
    assert len({completion.text for completion in output.completions}) == 3


def test_a_stream_can_be_left_in_the_middle(llm):
    stream = llm.stream(prompt(llm), greedy(schema(**PERSON)))
    assert next(stream).text.startswith("{")
    stream.close()
    while llm.engine.has_work:
        llm.engine.step()
    assert_nothing_is_held(llm.engine)


def test_an_invalid_grammar_is_refused_and_nothing_has_changed(llm):
    for structured in (StructuredOutput("regex", "(a"), schema(type="objekt")):
        with pytest.raises(InvalidGrammar, match="unclosed group|objekt"):
            llm.engine.add_request(prompt(llm), greedy(structured), request_id="refused")
    assert not llm.engine.has_work
    assert_nothing_is_held(llm.engine)
    llm.engine.abort(llm.engine.add_request(prompt(llm), greedy(None), request_id="refused"))


def test_a_servers_engine_has_looked_at_the_vocabulary_before_it_is_ready():
    """It holds Python's lock: with the first request all others would stand still, for a second on large vocabularies."""
    served = engine_main.build(EngineConfig(num_threads=1, num_kv_blocks=64))
    try:
        assert "_vocabulary" in vars(served.grammar)
    finally:
        served.engine.close()
