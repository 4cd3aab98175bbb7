"""Tool calls and reasoning: the same parts for every way to cut the text, whatever the model writes."""

from __future__ import annotations

import itertools
import json
import time

import pytest
from hypothesis import given, settings, strategies as st

from nanovllm.errors import ConfigError
from nanovllm.server.json_scanner import JsonScanner
from nanovllm.server.output_parser import make_output_parser
from nanovllm.server.parts import Part, Reasoning, Text, ToolCallArguments, ToolCallStart, merge
from nanovllm.server.pythonic import parse_call_list
from nanovllm.server.reasoning import detect_reasoning, prompt_opens_reasoning
from nanovllm.server.tool_calls import MAX_HELD
from nanovllm.server.tool_formats import TOOL_FORMATS

FORMATS = sorted(TOOL_FORMATS)


def parse(tool_format: str | None, pieces: list[str], **options) -> list[Part]:
    parser = make_output_parser(tool_format, options.pop("reasoning", True), **options)
    return merge([part for piece in pieces for part in parser.push(piece)] + parser.finish())


def plain(parts: list[Part]) -> list[tuple]:
    """Calls without their random ids."""
    rows: list[tuple] = []
    for part in parts:
        if isinstance(part, ToolCallStart):
            rows.append(("call", part.index, part.name))
        elif isinstance(part, ToolCallArguments):
            rows.append(("arguments", part.index, part.fragment))
        else:
            rows.append((type(part).__name__.lower(), part.text))
    return rows


def cut(text: str, places: list[int]) -> list[str]:
    edges = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[start:end] for start, end in itertools.pairwise(edges)]


def calls(*named: tuple[str, str]) -> list[tuple]:
    return [
        row for index, (name, arguments) in enumerate(named) for row in (("call", index, name), ("arguments", index, arguments))
    ]


# --- what models write

CASES = {
    "hermes": [
        (
            'Let me see.\n<tool_call>\n{"name": "f", "arguments": {"a": [1, "x\\n"]}}\n</tool_call>\n',
            [("text", "Let me see."), *calls(("f", '{"a": [1, "x\\n"]}'))],
        ),
        (
            '<tool_call>{"arguments": {"b": 2}, "name": "g"}</tool_call>\n<tool_call>{"name": "h"}</tool_call> Done',
            [*calls(("g", '{"b": 2}'), ("h", "{}")), ("text", "Done")],
        ),
        ('<tool_call>[{"name":"f"}, {"name": "g", "arguments": null}]</tool_call>', calls(("f", "{}"), ("g", "{}"))),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}', calls(("f", '{"a": 1}'))),
        # Wrong, but certain: a missing bracket at the end.
        ('<tool_call>\n{"name": "f", "arguments": {"a": 1}\n</tool_call>', calls(("f", '{"a": 1}'))),
        ('<tool_call>\n{"name": "f", "arguments": {"a": 1</tool_call>!', [*calls(("f", '{"a": 1')), ("text", "!")]),
        # A raw line break inside a string is escaped.
        ('<tool_call>{"name": "f", "arguments": {"a": "1\n2"}}</tool_call>', calls(("f", '{"a": "1\\n2"}'))),
        # Two calls where the first was not closed.
        ('<tool_call>{"name": "f"}\n<tool_call>{"name": "g"}</tool_call>', calls(("f", "{}"), ("g", "{}"))),
    ],
    "llama3_json": [
        ('{"name": "f", "parameters": {"a": 1}}', calls(("f", '{"a": 1}'))),
        ('{"name": "f", "parameters": {}}; {"name": "g", "parameters": {"b": 2}}', calls(("f", "{}"), ("g", '{"b": 2}'))),
        ('{"name": "f", "parameters": {}}\n{"name": "g", "arguments": {}}', calls(("f", "{}"), ("g", "{}"))),
        (
            'I look.\n<|python_tag|>{"type": "function", "name": "f", "parameters": {"a": 1}}',
            [("text", "I look."), *calls(("f", '{"a": 1}'))],
        ),
    ],
    "mistral": [
        (
            '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]',
            calls(("f", '{"a": 1}'), ("g", "{}")),
        ),
        ('[TOOL_CALLS][{"name": "f", "arguments": {}, "id": "abcdefghi"}]', calls(("f", "{}"))),
        ('Hi[TOOL_CALLS]f{"a": 1}[TOOL_CALLS]g{"b": 2}', [("text", "Hi"), *calls(("f", '{"a": 1}'), ("g", '{"b": 2}'))]),
        ('[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{"a": 1}', calls(("f", '{"a": 1}'))),
        ('[{"name": "f", "arguments": {"a": 1}}]', calls(("f", '{"a": 1}'))),
    ],
    "pythonic": [
        ("[f(a=1, b='x')]", calls(("f", '{"a": 1, "b": "x"}'))),
        (
            '[f(), g.h(c=[-1.5, {"k": None}], d=true, e=(1, 2))] ok',
            [*calls(("f", "{}"), ("g.h", '{"c": [-1.5, {"k": null}], "d": true, "e": [1, 2]}')), ("text", " ok")],
        ),
        ('<|python_start|>[f(a="]\\"")]<|python_end|>\n\nyes', [*calls(("f", '{"a": "]\\""}')), ("text", "yes")]),
        ('Hi <|tool_call_start|>[f(a="\\ud83d")]<|tool_call_end|>', [("text", "Hi"), *calls(("f", '{"a": "\\ud83d"}'))]),
        ('[{"name": "f", "arguments": {}}]', calls(("f", "{}"))),
        ("[move(from='if(', to=\"class=\")]", calls(("move", '{"from": "if(", "to": "class="}'))),
        ("[import(), a.in.if(None=None, not = not_)]", [("text", "[import(), a.in.if(None=None, not = not_)]")]),
        ("[import(), a.in.if(None=None, is = [1])]", calls(("import", "{}"), ("a.in.if", '{"None": null, "is": [1]}'))),
    ],
}
CUT = {
    "hermes": '<tool_call>\n{"name": "f", "arguments": {"a": {"b": 1}}}\n</tool_call>',
    "llama3_json": '{"name": "f", "parameters": {"a": {"b": 1}}}',
    "mistral": '[TOOL_CALLS]f{"a": {"b": 1}}',
    "pythonic": '[{"name": "f", "arguments": {"a": {"b": 1}}}]',
}


@pytest.mark.parametrize("tool_format", FORMATS)
def test_a_call_that_is_cut_inside_its_arguments_is_known(tool_format):
    for end in range(1, len(CUT[tool_format]) + 1):
        parser = make_output_parser(tool_format, False, tool_names=["f"])
        parts = merge(parser.push(CUT[tool_format][:end]) + parser.finish())
        arguments = "".join(part.fragment for part in parts if isinstance(part, ToolCallArguments))
        assert parser.has_cut_call == (0 < len(arguments) < len('{"a": {"b": 1}}')), CUT[tool_format][:end]


NOT_CALLS = {
    "hermes": [
        "Use <tool_call> and </tool_call>.",
        '<tool_call>{"nam": "f"}</tool_call>',
        '<tool_call>{"name": 1}</tool_call>',
        '<tool_call>{"name": ""}</tool_call>',
        '<tool_call>{"name": "\\ud800"}</tool_call>',
        '<tool_call>{"name": "f", "name": "g"',
        '<tool_call>{"name": "f", "arguments": [1]}',
        '<tool_call>{"name": "f", "arguments": "{"}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": \\"\\ud800\\"}"}</tool_call>',
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>\n{"name": "f"',
        "<tool_call",
        "  \n ",
    ],
    "llama3_json": [
        '{"answer": 42}',
        '{"name": "Bob", "age": 3}',
        "{}",
        'Say {"name": "f", "parameters": {}}',
        "<|python_tag|>print(1)",
    ],
    "mistral": ["[TOOL_CALLS]f(1)", "[TOOL_CALLS]", "[TOOL_CALLS][]", "[1, 2]", "[T", "[TOOL_CALLS]a b{}"],
    "pythonic": [
        "[link](http://x)",
        "[1, 2, 3]",
        "[f(1)]",
        "[f(a=b)]",
        "[f(a=__import__('os'))]",
        "[f(a=1+1)]",
        "[f(**{})]",
        "[f(a=1, a=2)]",
        "[f(a=1e999)]",
        "[f(a=1j)]",
        "[f(a={1: 2})]",
        "[f(a=" + "(" * 1000,
        "[f(a=" + "-" * 5000 + "1)]",
        "[f(a=1)",
        "[f[0](a=1)]",
        "[f(a='\n')]",
        "[f(a='\x00')]",
        "[x for x in y]",
        "see [f(a=1)]",
        "[]",
    ],
}


@pytest.mark.parametrize(("tool_format", "text", "expected"), [(name, *case) for name in CASES for case in CASES[name]])
def test_calls_are_found_however_the_text_is_cut(tool_format, text, expected):
    for size in (len(text), 1, 2, 3, 5, 8):
        assert plain(parse(tool_format, [text[i : i + size] for i in range(0, len(text), size)])) == expected


@pytest.mark.parametrize(("tool_format", "text"), [(name, text) for name in NOT_CALLS for text in NOT_CALLS[name]])
def test_what_is_not_a_call_comes_out_unchanged(tool_format, text):
    assert plain(parse(tool_format, [text])) == plain(parse(tool_format, list(text))) == [("text", text)]


@pytest.mark.parametrize("tool_format", FORMATS)
def test_call_ids_are_unique_and_of_the_length_that_templates_want(tool_format):
    text = CASES[tool_format][0][0]
    ids = {part.call_id for _ in range(50) for part in parse(tool_format, [text]) if isinstance(part, ToolCallStart)}
    assert len(ids) >= 50
    assert all(len(call_id) == 9 if tool_format == "mistral" else call_id.startswith("call_") for call_id in ids)


def test_a_bare_call_must_name_a_tool_of_the_request():
    text = '{"name": "Bob", "parameters": {"age": 3}}'
    assert plain(parse("llama3_json", [text], tool_names=["f"])) == [("text", text)]
    assert plain(parse("llama3_json", [text], tool_names=["Bob"])) == calls(("Bob", '{"age": 3}'))
    assert plain(parse("llama3_json", ["<|python_tag|>" + text], tool_names=["f"])) == calls(("Bob", '{"age": 3}'))
    for text in ("[g(a=1)]", "[f(a=1), g()]"):
        assert plain(parse("pythonic", [text], tool_names=["f"])) == [("text", text)]


def test_arguments_stream_while_they_arrive():
    parser = make_output_parser("hermes", reasoning=False)
    assert parser.push('<tool_call>{"name": "f", "argu') == []
    (start, first) = parser.push('ments": {"a": "Par')
    assert isinstance(start, ToolCallStart) and first == ToolCallArguments(0, '{"a": "Par')
    assert parser.push("is") == [ToolCallArguments(0, "is")]
    assert parser.push('"}}') == [ToolCallArguments(0, '"}')]
    assert parser.push("</tool_call>") == parser.finish() == []


def test_text_is_not_held_back_longer_than_needed():
    parser = make_output_parser("hermes", reasoning=False)
    assert parser.push("Hello") == [Text("Hello")]
    assert parser.push(" <tool") == []
    assert parser.push("box") == [Text(" <toolbox")]
    assert make_output_parser("pythonic", reasoning=False).push("[x](") == [Text("[x](")]
    assert make_output_parser("llama3_json", reasoning=False).push('{"a":') == [Text('{"a":')]


def test_a_format_nobody_knows_is_refused():
    with pytest.raises(ConfigError, match="did you mean 'hermes'"):
        make_output_parser("hermess", reasoning=False)


# --- reasoning


@pytest.mark.parametrize(
    ("text", "starts_inside", "expected"),
    [
        ("<think>\nHm.\n</think>\n\nYes", False, [("reasoning", "Hm.\n"), ("text", "Yes")]),
        ("\n<think></think>Yes", False, [("text", "Yes")]),
        ("Hm</think> Yes", True, [("reasoning", "Hm"), ("text", "Yes")]),
        ("<think>Hm</think> Yes", True, [("reasoning", "Hm"), ("text", "Yes")]),
        ("<think>Hm, never ends </thin", False, [("reasoning", "Hm, never ends </thin")]),
        ("<thinker>", False, [("text", "<thinker>")]),
        (" <thi", False, [("text", " <thi")]),
        ("So: <think>x</think>", False, [("text", "So: <think>x</think>")]),
        ("a</think>b</think>c", True, [("reasoning", "a"), ("text", "b</think>c")]),
    ],
)
def test_reasoning_is_split_off_the_beginning(text, starts_inside, expected):
    for size in (len(text), 1, 2, 3):
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        assert plain(parse(None, pieces, prompt_opens_reasoning=starts_inside)) == expected


def test_without_reasoning_the_marks_are_text():
    assert parse(None, ["<think>a</think>"], reasoning=False) == [Text("<think>a</think>")]


def test_a_call_inside_reasoning_is_not_made():
    text = '<think>I could <tool_call>{"name": "f"}</tool_call></think><tool_call>{"name": "g"}</tool_call>'
    assert plain(parse("hermes", [text]))[1:] == calls(("g", "{}"))


def test_reasoning_is_known_by_the_template():
    assert detect_reasoning("{% if x %}<think>{% endif %}... </think>")
    assert not detect_reasoning("{{ messages }}") and not detect_reasoning(None)
    assert prompt_opens_reasoning("<|assistant|><think>\n")
    assert not prompt_opens_reasoning("<think>\n\n</think>\n\n")


# --- for every text and every cut

MARKS = sorted(
    {mark for f in TOOL_FORMATS.values() for mark in (*f.opens, *f.closes)} | {"<think>", "</think>", "[ARGS]", "[CALL_ID]"}
)
PIECES = [
    *MARKS,
    *"{}[](),:;=\"'\\ \n\tae1-.",
    '{"name": "f"',
    '"arguments": {',
    '"parameters": {"a": 1}',
    "f(a=1)",
    "\ud83d\ude00"[:0] + "é",
    "</",
    "<tool_",
]
GARBAGE = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=40).map("".join),
    st.text(max_size=60),
    st.lists(st.sampled_from([text for cases in CASES.values() for text, _ in cases] + PIECES), max_size=6).map("".join),
)
PLACES = st.lists(st.integers(0, 10_000), max_size=30)


@settings(max_examples=400, deadline=None)
@given(
    tool_format=st.sampled_from([*FORMATS, None]),
    text=GARBAGE,
    places=PLACES,
    inside=st.booleans(),
    names=st.sampled_from([None, ["f"]]),
)
def test_parts_do_not_depend_on_the_cut(tool_format, text, places, inside, names):
    whole = plain(parse(tool_format, [text], prompt_opens_reasoning=inside, tool_names=names))
    for pieces in (cut(text, places), list(text)):
        assert plain(parse(tool_format, pieces, prompt_opens_reasoning=inside, tool_names=names)) == whole


@settings(max_examples=400, deadline=None)
@given(tool_format=st.sampled_from(FORMATS), text=GARBAGE, places=PLACES)
def test_garbage_loses_no_character(tool_format, text, places):
    """Without a call, the text is what it was. With calls, what is missing is nothing but the syntax of calls."""
    parts = parse(tool_format, cut(text, places), reasoning=False)
    if not any(isinstance(part, ToolCallStart) for part in parts):
        assert "".join(part.text for part in parts if isinstance(part, Text)) == text
        return
    position = 0
    for part in parts:
        if isinstance(part, Text):
            position = text.index(part.text, position) + len(part.text)


@settings(max_examples=150, deadline=None)
@given(tool_format=st.sampled_from(FORMATS), text=GARBAGE, places=PLACES)
def test_arguments_are_json_or_a_beginning_of_it(tool_format, text, places):
    for part in parse(tool_format, cut(text, places), reasoning=False):
        if isinstance(part, ToolCallArguments):
            scanner = JsonScanner()
            assert scanner.feed(part.fragment, 0, len(part.fragment)) == len(part.fragment) and not scanner.is_broken
            if scanner.is_done:
                assert isinstance(json.loads(part.fragment), dict)


WORD = st.text(st.sampled_from("abcdefghij éß中"), min_size=1, max_size=12).map(str.strip).filter(bool)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
CALL = st.tuples(
    st.from_regex(r"[a-z_]{1,8}", fullmatch=True),
    st.dictionaries(st.from_regex(r"k[a-z_]{1,6}", fullmatch=True), VALUES, max_size=3),
)


def write(tool_format: str, made: list[tuple[str, dict]]) -> str:
    if tool_format == "hermes":
        return "\n".join(f"<tool_call>\n{json.dumps({'name': n, 'arguments': a})}\n</tool_call>" for n, a in made)
    if tool_format == "llama3_json":
        return "<|python_tag|>" + "; ".join(json.dumps({"name": n, "parameters": a}) for n, a in made)
    if tool_format == "mistral":
        return "".join(f"[TOOL_CALLS]{n}{json.dumps(a)}" for n, a in made)
    return (
        "<|python_start|>["
        + ", ".join(f"{n}({', '.join(f'{k}={v!r}' for k, v in a.items())})" for n, a in made)
        + "]<|python_end|>"
    )


@settings(max_examples=150, deadline=None)
@given(tool_format=st.sampled_from(FORMATS), words=WORD, made=st.lists(CALL, min_size=1, max_size=3), places=PLACES)
def test_well_formed_calls_come_back_as_they_were_written(tool_format, words, made, places):
    text = f"{words}\n{write(tool_format, made)}"
    parts = parse(tool_format, cut(text, places), reasoning=False)
    assert parts[0] == Text(words)
    got = [part for part in parts if isinstance(part, ToolCallStart)]
    arguments = {part.index: json.loads(part.fragment) for part in parts if isinstance(part, ToolCallArguments)}
    assert [(part.name, arguments[part.index]) for part in got] == made
    assert not [part for part in parts[1:] if isinstance(part, (Text, Reasoning))]


# --- the JSON scanner


@settings(max_examples=150, deadline=None)
@given(
    value=st.dictionaries(st.text(max_size=5), VALUES, max_size=4),
    indent=st.sampled_from([None, 1]),
    places=PLACES,
    tail=st.text(max_size=3),
)
def test_the_scanner_reads_exactly_one_value(value, indent, places, tail):
    source = json.dumps(value, indent=indent)
    scanner, taken, num_read = JsonScanner(), "", 0
    for piece in [*cut(source, places), tail]:
        num_read += scanner.feed(piece, 0, len(piece))
        assert not scanner.is_broken
        taken += scanner.take()
    assert scanner.is_done and num_read == len(source) and taken == source


@settings(max_examples=500, deadline=None)
@given(value=VALUES, place=st.integers(0, 200), char=st.sampled_from('{}[],:"\\0-.eE+tfnu 1x'), deletes=st.booleans())
def test_the_scanner_accepts_what_json_accepts(value, place, char, deletes):
    source = json.dumps([value])
    place %= len(source)
    source = source[:place] + char + source[place + deletes :]
    scanner = JsonScanner()
    num_read = scanner.feed(source, 0, len(source))
    try:
        json.loads(source)
        is_json = True
    except ValueError:
        is_json = False
    words = any(word in source for word in ("NaN", "Infinity"))
    assert words or is_json == (scanner.is_done and not source[num_read:].strip())


# --- limits


@pytest.mark.parametrize(
    ("tool_format", "text"),
    [
        ("hermes", "<tool_call>" * 6_000),
        ("hermes", "<tool_call>x" * 6_000),
        ("hermes", '<tool_call>{"name": "' + "a" * 100_000),
        ("hermes", '<tool_call>{"arguments": {"a": "' + "a" * 100_000),
        ("hermes", '<tool_call>{"name": "f"}\n' * 3_000),
        ("hermes", "<tool_call>" + " " * 100_000),
        ("hermes", '<tool_call>{"name": "f"}' + " " * 100_000),
        ("hermes", " " * 100_000),
        ("hermes", "<" * 100_000),
        ("hermes", '<tool_call>{"name": "f", "arguments": ' + '{"a":' * 20_000),
        ("mistral", "[TOOL_CALLS]" + "a" * 100_000),
        ("mistral", "[" * 100_000),
        ("pythonic", "[f(a='" + "a" * 100_000),
        ("pythonic", "[f(a=" + "[" * 100_000),
        ("pythonic", "[f()]" * 20_000),
        ("pythonic", "<|python_start|>[f()]" * 3_000),
        ("llama3_json", '{"name": "f"};' * 6_000),
        ("llama3_json", "{" * 100_000),
    ],
)
def test_hostile_texts_take_linear_time_and_bounded_memory(tool_format, text):
    """100,000 characters in a few seconds at most, whole or in small pieces; quadratic work would take minutes."""
    start = time.perf_counter()
    whole = parse(tool_format, [text])
    parser = make_output_parser(tool_format, reasoning=True)
    streamed: list[Part] = []
    for position in range(0, len(text), 7):
        streamed += parser.push(text[position : position + 7])
        tool_calls = parser._tool_calls
        assert len(tool_calls._held) + tool_calls._len_section <= MAX_HELD + 1024
    assert plain(merge(streamed + parser.finish())) == plain(whole)
    assert time.perf_counter() - start < 20


def test_the_python_reader_parses_and_never_evaluates():
    assert parse_call_list("[f(a=1)]") == [("f", '{"a": 1}')]
    assert parse_call_list("[f(a=print('x'))]") is None
    assert parse_call_list("[f(a='\\d')]") == [("f", '{"a": "\\\\d"}')]
    assert parse_call_list("f(a=1)") is None
