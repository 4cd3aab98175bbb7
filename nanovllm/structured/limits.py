"""What a grammar may ask for, looked at before any compiler sees it.

Compilers bound their own work, but some shapes cost seconds before they give up, or recurse. So nesting, enums and
regular expressions of a JSON schema are counted here first, and the sizes of everything else. The limits are far above
what people write. `StructuredOutput` has checked types and total bytes already.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from nanovllm.errors import InvalidGrammar
from nanovllm.sampling_params import StructuredOutput

MAX_REGEX_LENGTH = 8192  # characters, also of each "pattern" in a schema
MAX_SCHEMA_DEPTH = 64  # objects and arrays inside each other
MAX_SCHEMA_NODES = 20_000  # objects, arrays and values together
MAX_ENUM_SIZE = 1000  # values of one "enum"
MAX_ALTERNATIVES = 128  # of one "anyOf", "oneOf"
MAX_CONJUNCTIONS = 8  # of one "allOf": the cost of an intersection doubles with each
COUNTED_KEYWORDS = {"enum": MAX_ENUM_SIZE, "anyOf": MAX_ALTERNATIVES, "oneOf": MAX_ALTERNATIVES, "allOf": MAX_CONJUNCTIONS}


def check_limits(structured: StructuredOutput) -> None:
    """Raises `InvalidGrammar`, which names the limit."""
    if structured.kind == "regex":
        _check_regex(structured.text)
    elif structured.kind == "json_schema":
        _check_schema(_parse(structured.text))


def _parse(text: str) -> dict[str, Any]:
    try:
        schema = json.loads(text)
    except ValueError as error:
        raise InvalidGrammar(f"the JSON schema is not valid JSON: {error}") from None
    except RecursionError:
        raise InvalidGrammar(f"the JSON schema is nested deeper than {MAX_SCHEMA_DEPTH} levels") from None
    if not isinstance(schema, dict):
        raise InvalidGrammar(f"a JSON schema must be an object, got {type(schema).__name__}")
    return schema


def _check_schema(schema: dict[str, Any]) -> None:
    num_nodes = 0
    level: list[Any] = [schema]
    for _ in range(MAX_SCHEMA_DEPTH):
        num_nodes += len(level)
        if num_nodes > MAX_SCHEMA_NODES:
            raise InvalidGrammar(f"the JSON schema has more than {MAX_SCHEMA_NODES} values")
        below: list[Any] = []
        for node in level:
            if isinstance(node, Mapping):
                _check_keywords(node)
                below.extend(node.values())
            elif isinstance(node, list):
                below.extend(node)
        if not below:
            return
        level = below
    raise InvalidGrammar(f"the JSON schema is nested deeper than {MAX_SCHEMA_DEPTH} levels")


def _check_keywords(node: Mapping[str, Any]) -> None:
    for keyword, limit in COUNTED_KEYWORDS.items():
        values = node.get(keyword)
        if isinstance(values, list) and len(values) > limit:
            raise InvalidGrammar(f"{keyword!r} of the JSON schema has {len(values)} entries; at most {limit} are allowed")
    if isinstance(pattern := node.get("pattern"), str):
        _check_regex(pattern)


def _check_regex(regex: str) -> None:
    if len(regex) > MAX_REGEX_LENGTH:
        raise InvalidGrammar(f"a regular expression of {len(regex)} characters; at most {MAX_REGEX_LENGTH} are allowed")
