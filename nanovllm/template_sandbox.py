"""The room in which a chat template runs: Jinja's immutable sandbox, plus limits on time and memory.

Templates come with checkpoints, so they are foreign code, and the messages that they handle are foreign data. Jinja's
sandbox keeps them away from Python; it does not stop a loop that prints nothing or `'a' * 10**9`. Here every loop
turn, macro call and expensive operation first asks the budget of the running render. Loops and macros cannot avoid
it, because the question is compiled into them; filters and methods are lists of what is allowed, not of what is not.
Knows nothing of messages or tokenizers: `chat_template.py` is the only caller.
"""

from __future__ import annotations

import functools
import json
import math
import re
import threading
import time
from collections.abc import Callable, ItemsView, Iterator, KeysView, ValuesView
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

WORK_PER_OUTPUT_BYTE = 32  # intermediate strings may total this many times the size of the largest allowed output
MAX_NUMBER_BITS = 4096
MAX_WIDTH = 100  # of an indent, or of the precision of a round


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Filters whose result depends on all of their input: sized before they start. The rest look at one level only.
_DEEP_FILTERS = _words(
    """capitalize dictsort e escape float format groupby indent int join lower max min replace safe sort string striptags
    title tojson trim truncate unique upper wordcount"""
)
_FLAT_FILTERS = _words("abs count d default first items last length list map reject rejectattr reverse round select selectattr")
_DEEP_TESTS = _words("eq equalto == ne != lt lessthan < le <= gt greaterthan > ge >= in")

# Left out of the methods: what pads to a width, what changes its object, and the ways to bytes.
_STRING_METHODS = _words(
    """capitalize casefold count endswith find format format_map index isalnum isalpha isascii isdecimal isdigit
    isidentifier islower isnumeric isprintable isspace istitle isupper join lower lstrip partition removeprefix
    removesuffix replace rfind rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title upper"""
)
_METHODS: tuple[tuple[type | tuple[type, ...], frozenset[str]], ...] = (
    (str, _STRING_METHODS),
    (dict, _words("get items keys values copy")),
    ((list, tuple, range), _words("count index copy")),
    ((int, float, bytes), _words("is_integer bit_length")),
)
_WIDE_FORMAT = re.compile(r"\d{4,}|\*|\{[^{}]*\{")  # a width of four digits, or one that comes from an argument


class LimitExceeded(Exception):
    """The template ran too long or asked for too much memory."""


class RefusedByTemplate(Exception):
    """The template itself called `raise_exception`."""


class _Budget:
    """What one render may still use."""

    def __init__(self, max_bytes: int, max_seconds: float) -> None:
        self._bytes_left = max_bytes * WORK_PER_OUTPUT_BYTE
        self._max_seconds = max_seconds
        self._deadline = time.monotonic() + max_seconds

    def spend(self, num_bytes: int) -> None:
        self._bytes_left -= num_bytes
        if self._bytes_left < 0:
            raise LimitExceeded("it builds more text than its memory limit allows")
        if time.monotonic() > self._deadline:
            raise LimitExceeded(f"it ran longer than {self._max_seconds:g} s")


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """A Jinja environment for one chat template. Several threads may render from it at the same time."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, max_bytes: int, max_seconds: float) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag], finalize=self._finalize)
        self.max_bytes = max_bytes
        self.max_seconds = max_seconds
        self._running = threading.local()  # .budget of the render in this thread
        self._restrict_filters_and_tests()
        del self.globals["lipsum"]
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now, "dict": _make_dict}

    def start_budget(self) -> None:
        """Time and memory count from here; call before compiling and before each render."""
        self._running.budget = _Budget(self.max_bytes, self.max_seconds)

    def compile_with_limits(self, source: str) -> Any:
        """Code of a template that asks `spend` in every loop turn and macro call."""
        return self.compile(_InsertLimits().visit(self.parse(source)))

    # What compiled templates call.

    def spend(self, num_bytes: int = 0) -> bool:
        self._running.budget.spend(num_bytes)
        return True

    def measured(self, value: Any) -> Any:
        """`value` itself, once it is known that reading all of it is affordable."""
        self._size_of(value)
        return value

    def concatenate(self, *values: Any) -> str:
        """The `~` operator."""
        self.spend(sum(map(self._size_of, values)))
        return "".join(map(str, values))

    # What the sandbox asks.

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for kind, allowed in _METHODS:
            if isinstance(obj, kind):
                return attr in allowed and super().is_safe_attribute(obj, attr, value)
        return super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        raise SecurityError(f"access to {attribute!r} of a {type(obj).__name__} is not allowed")

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format` with narrow fields only, and no more text than the budget allows."""
        formatter = super().wrap_str_format(value)
        if formatter is None:
            return None
        text = value.__self__
        _check_format(text)

        def limited_format(*args: Any, **kwargs: Any) -> str:
            self.spend(len(text) + text.count("{") * self._size_of([args, kwargs]))
            return formatter(*args, **kwargs)

        return limited_format

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(function, "__self__", None)
        if owner is not self and not isinstance(function, Macro):  # macros only bind their arguments
            args = tuple(list(self._counted(arg)) if isinstance(arg, Iterator) else arg for arg in args)
            self._size_of([args, kwargs])
            if isinstance(owner, str):
                self.spend(self._cost_of_string_method(owner, function.__name__, args))
            elif isinstance(owner, (list, tuple)):
                self._size_of(owner)  # index and count compare with every item
        return super().call(context, function, *args, **kwargs)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(argument, tuple):  # hashing a tuple reads all of it
            self._size_of(argument)
        return super().getitem(obj, argument)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            _check_format(left)
            self.spend(len(left) + left.count("%") * self._size_of(right))
        elif operator == "+":
            self.spend(_length(left) + _length(right))
        elif operator == "*":
            self._check_product(left, right)
        elif operator == "**":
            _check_power(left, right)
        return super().call_binop(context, operator, left, right)

    def _finalize(self, value: Any) -> Any:
        self.spend(self._size_of(value))
        return value

    def _restrict_filters_and_tests(self) -> None:
        own = {"tojson": _to_json, "format": _percent_format, "round": _round}
        known = self.filters | own
        self.filters = {name: self._limited(known[name], name, True) for name in _DEEP_FILTERS}
        self.filters |= {name: self._limited(known[name], name, False) for name in _FLAT_FILTERS}
        self.tests |= {name: self._limited(self.tests[name], name, True) for name in _DEEP_TESTS}

    def _limited(self, function: Callable[..., Any], name: str, is_deep: bool) -> Callable[..., Any]:
        num_hidden = 1 if getattr(function, "jinja_pass_arg", None) is not None else 0  # context or environment

        @functools.wraps(function)
        def limited(*args: Any, **kwargs: Any) -> Any:
            hidden, shown = args[:num_hidden], list(args[num_hidden:])
            self.spend(0)
            if is_deep:
                shown = [list(self._counted(value)) if isinstance(value, Iterator) else value for value in shown]
                self.spend(self._size_of(shown) + self._growth_by_filter(name, shown, kwargs))
            return self._charged(function(*hidden, *shown, **kwargs))

        return limited

    def _growth_by_filter(self, name: str, args: list[Any], kwargs: dict[str, Any]) -> int:
        """Bytes that the result may have beyond the size of the arguments."""
        args = args + list(kwargs.values())
        if name == "join":
            return _length(args[0]) * sum(map(_length, args[1:]))
        if name == "replace":
            return (len(str(args[0])) + 1) * sum(map(_length, args[1:]))
        if name == "indent":
            _check_widths(args[1:])
            return (str(args[0]).count("\n") + 1) * (MAX_WIDTH + sum(map(_length, args[1:])))
        return 0

    def _cost_of_string_method(self, owner: str, name: str, args: tuple[Any, ...]) -> int:
        if name == "join":
            return self._size_of(args) + sum(map(_length, args)) * len(owner)
        if name == "replace" and len(args) >= 2 and isinstance(args[0], str):
            return len(owner) + owner.count(args[0]) * _length(args[1])
        return len(owner) * (8 if "split" in name else 1)  # a list of short pieces weighs more than its text

    def _check_product(self, left: Any, right: Any) -> None:
        if isinstance(left, (int, float)) and isinstance(right, (int, float)):
            if _bits(left) + _bits(right) > MAX_NUMBER_BITS:
                raise LimitExceeded("it multiplies numbers of thousands of digits")
        else:
            factors = [value if isinstance(value, int) else _length(value) for value in (left, right)]
            self.spend(max(0, factors[0]) * max(0, factors[1]))

    def _charged(self, result: Any) -> Any:
        if isinstance(result, Iterator):
            return self._counted(result)
        self.spend(_length(result))
        return result

    def _counted(self, items: Iterator[Any]) -> Iterator[Any]:
        for item in items:
            self.spend(64)
            yield item

    def _size_of(self, value: Any) -> int:
        """Size of `value` when printed, within a factor of a few; refuses what is larger than any output may be.

        Ten nested lists of ten references each are small in memory and ten billion items long on paper.
        """
        self.spend(0)
        size, stack = 0, [value]
        while stack:
            item = stack.pop()
            size += 8 + _length(item)
            if size > self.max_bytes:
                raise LimitExceeded(f"it reads a value of more than {self.max_bytes} bytes")
            if isinstance(item, dict):
                stack.extend(item)
                stack.extend(item.values())
            elif isinstance(item, (list, tuple, KeysView, ItemsView, ValuesView)):
                stack.extend(item)
            elif isinstance(item, Namespace):
                raise SecurityError("a namespace cannot be printed or compared")
        return size


class _InsertLimits(NodeTransformer):
    """Compiles the budget's question into everything that repeats, and sizes what `~` and comparisons read."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self._ask_in_body(node)
        if node.test is not None:
            node.test = nodes.And(_ask("spend"), node.test)
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:
        self._ask_in_body(node)
        return node

    visit_CallBlock = visit_Macro

    def visit_Block(self, node: nodes.Block) -> nodes.Block:
        self._ask_in_body(node)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        return _ask("concatenate", *node.nodes)

    def visit_Pair(self, node: nodes.Pair) -> nodes.Pair:
        self.generic_visit(node)
        node.key = _measured(node.key)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        self.generic_visit(node)
        node.expr = _measured(node.expr)
        for operand in node.ops:
            operand.expr = _measured(operand.expr)
        return node

    def _ask_in_body(self, node: Any) -> None:
        num_bytes = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_ask("spend", nodes.Const(num_bytes))).set_lineno(node.lineno))


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's text for training; when serving, its body is printed as it is."""

    tags = {"generation"}  # noqa: RUF012 (declared by Jinja)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _ask(method: str, *args: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), list(args), [], None, None)


def _measured(expression: nodes.Expr) -> nodes.Expr:
    return expression if isinstance(expression, nodes.Const) else _ask("measured", expression)


def _length(value: Any) -> int:
    """Bytes that a copy of the outermost level takes, roughly."""
    if isinstance(value, (str, bytes)):
        return len(value)
    return 8 * len(value) if isinstance(value, (list, tuple, dict, range)) else 0


def _bits(number: float) -> int:
    return number.bit_length() if isinstance(number, int) else 64


def _check_power(base: Any, exponent: Any) -> None:
    if isinstance(base, int) and isinstance(exponent, int) and _bits(base) * abs(exponent) > MAX_NUMBER_BITS:
        raise LimitExceeded("it computes a power of thousands of digits")


def _check_format(text: str) -> None:
    if _WIDE_FORMAT.search(text):
        raise LimitExceeded(f"it formats text to a great or computed width: {text[:60]!r}")


def _check_widths(values: list[Any]) -> None:
    for value in values:
        if isinstance(value, (int, float)) and abs(value) > MAX_WIDTH:
            raise LimitExceeded(f"a width or precision of {value} is more than {MAX_WIDTH}")


def _percent_format(text: Any, *args: Any, **kwargs: Any) -> str:
    _check_format(str(text))
    return str(text) % (kwargs or args)


def _round(value: Any, precision: int = 0, method: str = "common") -> Any:
    _check_widths([precision])
    if method not in ("common", "ceil", "floor"):
        raise TypeError("the method of round must be common, ceil or floor")
    if method == "common":
        return round(value, precision)
    return getattr(math, method)(value * 10**precision) / 10**precision


def _to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    """Plain JSON: Jinja's own filter escapes HTML and non-ASCII text, which models were not trained on."""
    _check_widths([indent])
    if isinstance(indent, str) and len(indent) > MAX_WIDTH:
        raise LimitExceeded("tojson was asked for a very long indent")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: Any) -> None:
    raise RefusedByTemplate(str(message)[:2000])


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form[:256])


def _make_dict(*args: Any, **kwargs: Any) -> dict[str, Any]:
    return dict(*args, **kwargs)
