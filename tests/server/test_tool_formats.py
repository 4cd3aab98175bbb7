"""Formats are recognised by their templates, and tool_choice becomes a grammar whose every text the parser reads as calls."""

from __future__ import annotations

import json

import pytest

from nanovllm.errors import RequestError
from nanovllm.server.output_parser import make_output_parser
from nanovllm.server.parts import ToolCallArguments, ToolCallStart, merge
from nanovllm.server.tool_formats import (
    MAX_PARALLEL_CALLS,
    TOOL_FORMATS,
    describe_tools,
    detect_tool_format,
    tool_choice_constraint,
)

FORMATS = sorted(TOOL_FORMATS)
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"place": {"$ref": "#/$defs/Place"}, "unit": {"enum": ["C", "F"]}},
            "required": ["place", "unit"],
            "additionalProperties": False,
            "$defs": {"Place": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}},
        },
    },
}
TIME = {"type": "function", "function": {"name": "now", "description": "the time"}}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
GOOD = ("get_weather", {"place": {"city": "Paris"}, "unit": "C"})


@pytest.mark.parametrize(
    ("template", "model_name", "expected"),
    [
        ("{% for tool in tools %}...{% endfor %}<tool_call>{{ call }}</tool_call>", "x", "hermes"),
        ("[AVAILABLE_TOOLS]{{ tools }}[/AVAILABLE_TOOLS] [TOOL_CALLS]", "x", "mistral"),
        ('Respond in the format {"name": function name, "parameters": dictionary}.', "x", "llama3_json"),
        ("{% if builtin_tools %}<|python_tag|>{% endif %}", "x", "llama3_json"),
        ("<|python_start|>[func_name1(params_name1=params_value1)]<|python_end|>", "x", "pythonic"),
        ("<|tool_call_start|>[f()]<|tool_call_end|>", "x", "pythonic"),
        ("<tool_call><function=f><parameter=a>", "x", None),
        ("<|im_start|>{{ role }}", "HuggingFaceTB/SmolLM2-135M-Instruct", "hermes"),
        ("<|im_start|>{{ role }}", "someone/else", None),
        ("{{ messages }}", "Qwen/Qwen3-0.6B", None),
        (None, "Qwen/Qwen3-0.6B", None),
    ],
)
def test_the_format_is_known_by_the_template(template, model_name, expected):
    assert detect_tool_format(template, model_name) == expected


def test_tools_can_be_described_to_a_template_without_them():
    text = describe_tools([WEATHER, TIME])
    assert json.dumps(TIME) in text and "<tool_call>" in text


@pytest.mark.parametrize("tool_choice", [None, "auto", "none"])
def test_a_free_choice_constrains_nothing(tool_choice):
    assert tool_choice_constraint([WEATHER], tool_choice, "hermes") is None


@pytest.mark.parametrize(
    ("tools", "tool_choice", "message"),
    [
        ([WEATHER], {"type": "function", "function": {"name": "nope"}}, "'nope', which is not in tools"),
        ([WEATHER], "sometimes", "must be 'none', 'auto', 'required'"),
        ([WEATHER], {"name": "get_weather"}, "must be 'none'"),
        ([WEATHER], {"type": "function", "function": {}}, "must be 'none'"),
        ([], "required", "tools is empty"),
        ([{"type": "web_search"}], "required", "tools\\[0\\] must be"),
        ([WEATHER, {"type": "function", "function": {"name": "a b"}}], "auto", "tools\\[1\\].function.name"),
        ([{"type": "function", "function": {"name": "f", "parameters": [1]}}], "auto", "parameters must be a JSON schema"),
    ],
)
def test_malformed_tools_are_refused_with_their_place(tools, tool_choice, message):
    with pytest.raises(RequestError, match=message):
        tool_choice_constraint(tools, tool_choice, "hermes")


def test_deeply_nested_parameters_are_refused():
    parameters: dict = {}
    for _ in range(5000):
        parameters = {"items": parameters}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    with pytest.raises(RequestError, match="nested more than 64 levels"):
        tool_choice_constraint([tool], "required", "hermes")


# --- the grammars


def write(tool_format: str, *calls: tuple[str, dict]) -> str:
    key = TOOL_FORMATS[tool_format].arguments_key
    objects = [json.dumps({"name": name, key: arguments}) for name, arguments in calls]
    if tool_format == "hermes":
        return "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in objects)
    return objects[0] if tool_format == "llama3_json" else f"[{', '.join(objects)}]"


def accepts(tool_format: str, tool_choice, text: str, parallel: bool = True) -> bool:
    llguidance = pytest.importorskip("llguidance")
    structured = tool_choice_constraint([WEATHER, TIME], tool_choice, tool_format, parallel=parallel)
    assert structured is not None
    matcher = llguidance.LLMatcher
    source = (matcher.grammar_from_lark if structured.kind == "grammar" else matcher.grammar_from_json_schema)(structured.value)
    tokenizer = llguidance.LLTokenizer("byte")
    state = matcher(tokenizer, source)
    assert not state.get_error()
    ids = tokenizer.tokenize_str(text)
    return state.try_consume_tokens(ids) == len(ids) and state.is_accepting()


@pytest.mark.parametrize("tool_format", FORMATS)
def test_a_required_call_is_valid_and_nothing_else_is(tool_format):
    assert accepts(tool_format, "required", write(tool_format, GOOD))
    assert accepts(tool_format, "required", write(tool_format, ("now", {})))
    assert not accepts(tool_format, "required", "Hello")
    assert not accepts(tool_format, "required", write(tool_format, ("nope", {})))
    assert not accepts(tool_format, "required", write(tool_format, ("now", {"x": 1})))
    assert not accepts(tool_format, "required", write(tool_format, ("get_weather", {"place": {"city": 1}, "unit": "C"})))
    assert not accepts(tool_format, NAMED, write(tool_format, ("now", {})))
    assert accepts(tool_format, NAMED, write(tool_format, GOOD))


@pytest.mark.parametrize("tool_format", ["hermes", "mistral", "pythonic"])
def test_parallel_calls_are_allowed_unless_refused_or_named(tool_format):
    two = write(tool_format, GOOD, ("now", {}))
    assert accepts(tool_format, "required", two)
    assert not accepts(tool_format, "required", two, parallel=False)
    assert not accepts(tool_format, NAMED, write(tool_format, GOOD, GOOD))
    assert accepts(tool_format, "required", write(tool_format, *[("now", {})] * MAX_PARALLEL_CALLS))
    assert not accepts(tool_format, "required", write(tool_format, *[("now", {})] * (MAX_PARALLEL_CALLS + 1)))


@pytest.mark.parametrize("tool_format", FORMATS)
def test_the_parser_reads_what_the_grammar_allows(tool_format):
    text = write(tool_format, GOOD)
    parser = make_output_parser(tool_format, reasoning=False, tool_names=["get_weather", "now"])
    start, arguments = merge([part for char in text for part in parser.push(char)] + parser.finish())
    assert isinstance(start, ToolCallStart) and start.name == GOOD[0]
    assert isinstance(arguments, ToolCallArguments) and json.loads(arguments.fragment) == GOOD[1]
