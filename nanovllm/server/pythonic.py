"""Tool calls that are written as Python: `[get_weather(city="Paris"), add(a=1, b=[2, 3])]`.

Nothing is ever evaluated: `ast` parses the text once it is complete, and only calls whose keyword arguments are plain
literals are accepted. `CallListScanner` finds the end of the list and refuses early what cannot become one, so that
prose, Markdown links and lists of numbers are not held back. Nothing that a model writes raises.
"""

from __future__ import annotations

import ast
import json
import keyword
import math
import re
import warnings
from collections.abc import Iterator
from typing import Any

from nanovllm.server.call_reader import NAME

MAX_BRACKETS = 64  # open at once

_PARTNERS = {")": "(", "]": "[", "}": "{"}
_WORDS = {"true": True, "false": False, "null": None}  # of JSON; some models mix them in
_OUTSIDE_STRINGS = frozenset(" \t\r\n,=:.+-_")  # besides letters, digits and brackets

# A string, or a name that Python keeps for itself, of a function or an argument: `[move(from="a", to="b")]`.
_STRING = r"""("(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')"""
_STRING_OR_RESERVED = re.compile(rf"{_STRING}|\b({'|'.join(keyword.kwlist)})(?=\s*[=(.])", re.DOTALL)
_RESERVED = "__reserved__"  # put behind such a name while `ast` reads it


class CallListScanner:
    """Reads `[name(...), ...]` a character at a time until `is_done` or `is_broken`."""

    def __init__(self) -> None:
        self.is_done = False
        self.is_broken = False
        self.name = ""  # of the first call; complete once `has_name`
        self.has_name = False
        self._open: list[str] = []
        self._quote = ""
        self._is_escaped = False

    def step(self, char: str) -> None:
        if self._quote:
            self._step_in_string(char)
        elif char in "([{":
            self._open.append(char)
            self.has_name = self.has_name or len(self._open) == 2
            self.is_broken = len(self._open) > MAX_BRACKETS
        elif char in ")]}":
            self.is_broken = not self.has_name or not self._open or self._open.pop() != _PARTNERS[char]
            self.is_done = not self._open and not self.is_broken
        elif not self.has_name:
            self.name = (self.name + char).lstrip()
            self.is_broken = bool(self.name) and NAME.fullmatch(self.name) is None
        elif char in "\"'":
            self._quote = char
        else:
            self.is_broken = not (char in _OUTSIDE_STRINGS or char.isalnum())

    def _step_in_string(self, char: str) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif char == "\\":
            self._is_escaped = True
        elif char == self._quote:
            self._quote = ""


def parse_call_list(source: str) -> list[tuple[str, str]] | None:
    """(name, arguments as JSON text) of each call; None when `source` is not a list of calls with literal arguments."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes such as "\\d": the style of a model is not our concern
            readable = _STRING_OR_RESERVED.sub(lambda found: found[1] or found[2] + _RESERVED, source.strip())
            tree = ast.parse(readable, mode="eval").body
        if not isinstance(tree, ast.List) or not tree.elts:
            return None
        return [_call(node) for node in tree.elts]
    except (SyntaxError, ValueError, MemoryError, RecursionError):  # the last three: null bytes, and nesting that is too deep
        return None


def _call(node: ast.expr) -> tuple[str, str]:
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError("not a call with keyword arguments")
    arguments: dict[str, Any] = {}
    for argument in node.keywords:
        if argument.arg is None or argument.arg.removesuffix(_RESERVED) in arguments:
            raise ValueError("** or a repeated keyword")
        arguments[argument.arg.removesuffix(_RESERVED)] = _literal(argument.value)
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        text = json.dumps(arguments)  # halves of surrogate pairs, which only escapes can carry
    return ".".join(_name(node.func)), text


def _name(node: ast.expr) -> Iterator[str]:
    if isinstance(node, ast.Attribute):
        yield from _name(node.value)
        yield node.attr.removesuffix(_RESERVED)
    elif isinstance(node, ast.Name):
        yield node.id.removesuffix(_RESERVED)
    else:
        raise ValueError("what is called is not a name")


def _literal(node: ast.expr) -> Any:
    """The JSON value of a literal. Raises `ValueError` for everything else."""
    if isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, (str, bool, int))):
        return node.value
    if isinstance(node, ast.Constant) and isinstance(node.value, float) and math.isfinite(node.value):
        return node.value
    if isinstance(node, ast.Name) and node.id in _WORDS:
        return _WORDS[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        value = _literal(node.operand)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_literal(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        keys = [_literal(key) if key is not None else None for key in node.keys]
        if all(isinstance(key, str) for key in keys):
            return dict(zip(keys, map(_literal, node.values)))
    raise ValueError(f"{type(node).__name__} is not a literal")
