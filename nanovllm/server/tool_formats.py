"""How model families write tool calls: a table, how to recognise a family, and how to make a model call a tool.

Owns `TOOL_FORMATS`; `tool_calls.py` reads text by it. A new family whose calls are JSON objects, `name{...}` or Python
calls is one entry here. `tool_choice_constraint` turns tool_choice "required", or a named tool, into a grammar in the
model's own format where its marks are plain text, and into bare JSON, which the parser knows too, where they are not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanovllm.errors import RequestError
from nanovllm.sampling_params import StructuredOutput
from nanovllm.server.call_reader import NAME

MAX_DEPTH = 64  # of a tool's parameters
MAX_PARALLEL_CALLS = 16  # that a grammar allows; without a bound a small model repeats itself until its tokens end


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    """One way to write calls. Calls stand in a section: after one of `opens`, or bare at the start of the answer."""

    opens: tuple[str, ...]  # marks that begin a section, anywhere in the text
    closes: tuple[str, ...] = ()  # marks that may end it
    bare: str = ""  # characters that begin a section without a mark, at the start of the answer only
    separators: str = ""  # may stand between two calls outside a list
    has_named_calls: bool = False  # name{...}, besides {"name": ..., "arguments": {...}}
    has_python_calls: bool = False  # [name(...)]
    arguments_key: str = "arguments"
    id_prefix: str = "call_"
    id_length: int = 24  # of the random part
    has_special_marks: bool = False  # marks are special tokens: generate with skip_special_tokens=False
    template_marks: tuple[str, ...]  # a chat template that has one of these writes calls so


TOOL_FORMATS: Mapping[str, ToolFormat] = {
    "mistral": ToolFormat(
        opens=("[TOOL_CALLS]",),
        bare="[",
        has_named_calls=True,
        id_prefix="",
        id_length=9,  # its templates refuse other lengths
        has_special_marks=True,
        template_marks=("[TOOL_CALLS]",),
    ),
    "pythonic": ToolFormat(
        opens=("<|python_start|>", "<|tool_call_start|>"),
        closes=("<|python_end|>", "<|tool_call_end|>"),
        bare="[",
        has_python_calls=True,
        has_special_marks=True,
        template_marks=("<|python_start|>", "<|tool_call_start|>", "[func_name1(", "[func1("),
    ),
    "llama3_json": ToolFormat(
        opens=("<|python_tag|>",),
        bare="{",
        separators=";,",
        arguments_key="parameters",
        has_special_marks=True,
        template_marks=("<|python_tag|>", '{"name": function name, "parameters":'),
    ),
    "hermes": ToolFormat(opens=("<tool_call>",), closes=("</tool_call>",), template_marks=("<tool_call>",)),
}
_OTHER_MARKS = ("<function=", "<|tool▁call", "<arg_key>", "<|channel|>")  # formats that look similar and are not ours


def detect_tool_format(chat_template: str | None, model_name: str = "") -> str | None:
    """The key in `TOOL_FORMATS`, or None when the template knows no tools or writes calls in a way that is not ours.

    A template that says nothing of tools is "hermes" for models known to be trained on it (by `model_name`)."""
    if chat_template is None or any(mark in chat_template for mark in _OTHER_MARKS):
        return None
    for name, tool_format in TOOL_FORMATS.items():
        if any(mark in chat_template for mark in tool_format.template_marks):
            return name
    knows_hermes = any(family in model_name.lower() for family in ("qwen", "hermes", "smollm"))
    return "hermes" if knows_hermes and "<|im_start|>" in chat_template else None


def describe_tools(tools: Sequence[Mapping[str, Any]]) -> str:
    """A system message that teaches the hermes format, for templates that leave `tools` out."""
    lines = "\n".join(json.dumps(dict(tool), ensure_ascii=False) for tool in tools)
    return (
        f"You can call these tools, one JSON description a line:\n<tools>\n{lines}\n</tools>\n"
        "To call one, write its name and arguments as JSON between tags, and nothing else:\n"
        '<tool_call>\n{"name": "NAME", "arguments": {"ARGUMENT": "VALUE"}}\n</tool_call>\n'
        "Answer without a call when no tool helps."
    )


# --- tool_choice


def tool_choice_constraint(
    tools: Sequence[Mapping[str, Any]], tool_choice: str | Mapping[str, Any] | None, tool_format: str, *, parallel: bool = True
) -> StructuredOutput | None:
    """What a completion has to look like: None for "none" and "auto"; a call for "required" and named tools.

    `tools` and `tool_choice` have OpenAI's shape. Raises `RequestError` when they do not, or name an unknown tool.
    """
    functions = [_function(tool, index) for index, tool in enumerate(tools)]
    name = _chosen_name(tool_choice)
    if name is not None:
        functions = [function for function in functions if function["name"] == name]
        if not functions:
            raise RequestError(f"tool_choice names the tool {name!r}, which is not in tools")
    elif tool_choice in (None, "none", "auto"):
        return None
    if not functions:
        raise RequestError("tool_choice is 'required', but tools is empty")
    may_repeat = parallel and name is None
    key = TOOL_FORMATS[tool_format].arguments_key
    if tool_format == "hermes":
        return StructuredOutput("grammar", _hermes_grammar(_any_call(functions, key, "#"), may_repeat))
    if tool_format == "llama3_json":
        return StructuredOutput("json_schema", json.dumps(_any_call(functions, key, "#") | _COMPACT))
    num_calls = {"minItems": 1, "maxItems": MAX_PARALLEL_CALLS if may_repeat else 1}
    calls = {"type": "array", "items": _any_call(functions, key, "#/items"), **num_calls, **_COMPACT}
    return StructuredOutput("json_schema", json.dumps(calls))


# No free whitespace: a small model under a grammar can write it without end.
_COMPACT = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}


def _function(tool: Any, index: int) -> Mapping[str, Any]:
    function = tool.get("function") if isinstance(tool, Mapping) and tool.get("type") == "function" else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RequestError(f"tools[{index}] must be {{'type': 'function', 'function': {{'name': ..., 'parameters': ...}}}}")
    if NAME.fullmatch(function["name"]) is None:
        raise RequestError(
            f"tools[{index}].function.name must be 1 to 256 letters, digits, _, -, ., : or /, got {function['name']!r}"
        )
    if not isinstance(function.get("parameters") or {}, Mapping):
        raise RequestError(f"tools[{index}].function.parameters must be a JSON schema of type object")
    return function


def _chosen_name(tool_choice: Any) -> str | None:
    if tool_choice is None or tool_choice in ("none", "auto", "required"):
        return None
    function = tool_choice.get("function") if isinstance(tool_choice, Mapping) and tool_choice.get("type") == "function" else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        known = "'none', 'auto', 'required' or {'type': 'function', 'function': {'name': ...}}"
        raise RequestError(f"tool_choice must be {known}, got {tool_choice!r}")
    return function["name"]


def _hermes_grammar(call: dict[str, Any], may_repeat: bool) -> str:
    """In llguidance's dialect of Lark, where `%json` stands for a schema."""
    more = f' ("\\n" section){{0,{MAX_PARALLEL_CALLS - 1}}}' if may_repeat else ""
    schema = json.dumps(call | _COMPACT)
    return f'start: section{more}\nsection: "<tool_call>\\n" call "\\n</tool_call>"\ncall: %json {schema}\n'


def _any_call(functions: Sequence[Mapping[str, Any]], arguments_key: str, place: str) -> dict[str, Any]:
    """The schema of a call of one of `functions`, for use at the JSON pointer `place`."""
    calls = []
    for index, function in enumerate(functions):
        parameters = function.get("parameters") or {"properties": {}, "additionalProperties": False}
        moved = _move_references(parameters, f"{place}/anyOf/{index}/properties/{arguments_key}")
        properties = {"name": {"const": function["name"]}, arguments_key: {"type": "object", **moved}}
        calls.append({"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False})
    return {"anyOf": calls}


def _move_references(schema: Any, place: str, depth: int = 0) -> Any:
    """A copy whose references to its own parts still hold when it stands at `place`: "#/$defs/A" -> "#/items/$defs/A"."""
    if depth > MAX_DEPTH:
        raise RequestError(f"the parameters of a tool are nested more than {MAX_DEPTH} levels deep")
    if isinstance(schema, (list, tuple)):
        return [_move_references(item, place, depth + 1) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved = {}
    for key, value in schema.items():
        if key == "$ref" and isinstance(value, str) and value.startswith("#"):
            moved[key] = place + value[1:]
        elif key in ("const", "enum", "default", "examples"):  # data, not schemas
            moved[key] = value
        else:
            moved[key] = _move_references(value, place, depth + 1)
    return moved
