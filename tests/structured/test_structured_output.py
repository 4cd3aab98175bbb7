"""StructuredOutput says what is wrong with it; the limits of schemas are kept before any compiler runs."""

from __future__ import annotations

import json

import pytest

from nanovllm import SamplingParams, StructuredOutput
from nanovllm.errors import InvalidGrammar, InvalidSamplingParams, RequestError
from nanovllm.sampling_params import MAX_CHOICE_STRINGS, MAX_STRUCTURED_BYTES
from nanovllm.structured import limits


def test_a_schema_is_kept_as_text_in_the_order_of_its_properties():
    schema = {"type": "object", "properties": {"z": {}, "a": {"const": "é"}}}
    kept = StructuredOutput("json_schema", schema)
    assert json.loads(kept.text) == schema and kept.text.index('"z"') < kept.text.index('"a"') and "é" in kept.text
    assert kept == StructuredOutput("json_schema", kept.text) and hash(kept) == hash(StructuredOutput("json_schema", schema))


def test_choices_are_kept_as_a_tuple():
    assert StructuredOutput("choice", ["a", "b"]).choices == ("a", "b")
    assert StructuredOutput("regex", "a+").choices == () and StructuredOutput("choice", ["a"]).text == ""


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("json-schema", "{}", "did you mean 'json_schema'"),
        (None, "", "kind of structured output"),
        ("json_object", "{}", "takes no value"),
        ("json_schema", "", "is empty"),
        ("json_schema", [1], "must be a string"),
        ("json_schema", {"a": {1, 2}}, "cannot be written as JSON"),
        ("json_schema", {"a": float("nan")}, "cannot be written as JSON"),
        ("regex", b"a", "must be a string, got bytes"),
        ("regex", ("a",), "must be a string, got tuple"),
        ("regex", "", "is empty"),
        ("regex", "\ud800", "surrogate"),
        ("regex", "a" * (MAX_STRUCTURED_BYTES + 1), "at most 262144"),
        ("grammar", None, "must be a string"),
        ("choice", "yes", "list of strings"),
        ("choice", [], "is empty"),
        ("choice", ["a", ""], "non-empty strings"),
        ("choice", ["a", 1], "non-empty strings, got 1"),
        ("choice", ["a"] * (MAX_CHOICE_STRINGS + 1), "1001 entries"),
        ("choice", ["é" * (MAX_STRUCTURED_BYTES // 2), "x"], "at most 262144"),
    ],
)
def test_what_is_wrong_is_named(kind, value, message):
    with pytest.raises(InvalidGrammar, match=message):
        StructuredOutput(kind, value)


def test_sampling_params_take_nothing_else():
    assert issubclass(InvalidGrammar, RequestError)
    with pytest.raises(InvalidSamplingParams, match="structured must be a StructuredOutput, got dict"):
        SamplingParams(structured={"kind": "regex", "value": "a"})


def nested(depth: int) -> str:
    return '{"items":' * depth + "{}" + "}" * depth


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "must be an object, got list"),
        ("true", "must be an object, got bool"),
        (nested(limits.MAX_SCHEMA_DEPTH), "nested deeper than 64"),
        (nested(20_000), "nested deeper than 64"),
        ('{"a":' + "[" * 100_000, "nested deeper than 64|not valid JSON"),
        (json.dumps({"enum": list(range(limits.MAX_ENUM_SIZE + 1))}), "'enum' of the JSON schema has 1001 entries"),
        (json.dumps({"properties": {"a": {"anyOf": [{}] * 129}}}), "'anyOf' of the JSON schema has 129"),
        (json.dumps({"allOf": [{}] * 9}), "'allOf' of the JSON schema has 9"),
        (json.dumps({"a": [0] * limits.MAX_SCHEMA_NODES}), "more than 20000 values"),
        (json.dumps({"items": {"pattern": "a" * 8193}}), "8193 characters"),
    ],
)
def test_schemas_beyond_the_limits_are_refused(schema, message):
    with pytest.raises(InvalidGrammar, match=message):
        limits.check_limits(StructuredOutput("json_schema", schema))


def test_schemas_at_the_limits_pass():
    for schema in (nested(limits.MAX_SCHEMA_DEPTH - 1), json.dumps({"enum": list(range(limits.MAX_ENUM_SIZE))}), '{"enum": 3}'):
        limits.check_limits(StructuredOutput("json_schema", schema))
    with pytest.raises(InvalidGrammar, match="8193 characters"):
        limits.check_limits(StructuredOutput("regex", "a" * 8193))
