"""Bodies: read with limits, parsed strictly.

Refused: more bytes than `max_body_bytes`, a body that does not arrive in time, what is not JSON (NaN, lone surrogates,
numbers beyond a float, invalid UTF-8), a key twice in one object, deep nesting, unknown fields, and fields that are known
but not supported. A refusal names the field. Knows no endpoint.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
import msgspec.inspect
from starlette.requests import Request

from nanovllm.errors import did_you_mean
from nanovllm.server.errors import BadField, ClientGone, HttpError
from nanovllm.server.options import ServerOptions

T = TypeVar("T")
LONG_BODY = 256 * 1024  # bytes; longer ones are parsed in a thread
MAX_INT = 2**64  # beyond it an integer fits no counter, seed or token id
FREE_FORM = frozenset(  # what is passed on as it is: a null in it has a meaning of its own
    ("arguments", "chat_template_kwargs", "documents", "guided_json", "input", "input_schema", "json", "parameters", "schema")
)


async def read_body(request: Request, options: ServerOptions) -> bytes:
    """All bytes of a body, or 413 / 408. A declared length is believed only in order to refuse."""
    declared = request.headers.get("content-length", "0")
    if not declared.isascii() or not declared.isdigit() or len(declared) > 18 or int(declared) > options.max_body_bytes:
        raise _too_large(options)
    if request.headers.get("content-encoding", "identity") != "identity":
        raise HttpError(415, "content-encoding is not supported: send the body as it is", code="unsupported_encoding")
    chunks, size, more = [], 0, True
    with _Alarm(options.body_timeout_s):
        while more:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > options.max_body_bytes:
                raise _too_large(options)
            chunks.append(chunk)
            more = message.get("more_body", False)
    return b"".join(chunks)


class _Alarm:
    """408 when the block takes longer. Most bodies are there already, and `asyncio.wait_for` would start a task for each."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._has_rung = seconds, False

    def __enter__(self) -> None:
        self._task = asyncio.current_task()
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self._ring) if self._seconds else None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._has_rung and kind is asyncio.CancelledError:
            message = f"the body did not arrive within body_timeout_s={self._seconds:g}"
            raise HttpError(408, message, code="body_timeout", headers={"Connection": "close"}) from None

    def _ring(self) -> None:
        self._has_rung = True
        if self._task is not None:
            self._task.cancel()


def _too_large(options: ServerOptions) -> HttpError:
    message = f"the body is longer than max_body_bytes={options.max_body_bytes}"
    return HttpError(413, message, param="body", code="body_too_large", headers={"Connection": "close"})


async def parse_body(body: bytes, struct_type: type[T], refused: Mapping[str, str], options: ServerOptions) -> T:
    if len(body) <= LONG_BODY:
        return parse(body, struct_type, refused, options.max_json_depth)
    return await asyncio.to_thread(parse, body, struct_type, refused, options.max_json_depth)


def parse(body: bytes, struct_type: type[T], refused: Mapping[str, str], max_depth: int) -> T:
    """Bytes to struct. Raises `BadField`."""
    fields = _decode(body, max_depth)
    if not isinstance(fields, dict):
        raise BadField(None, "the body must be a JSON object")
    known: tuple[str, ...] = struct_type.__struct_encode_fields__  # type: ignore[attr-defined]
    for name in [name for name in fields if name not in known]:
        if fields[name] is None:
            del fields[name]
        elif name not in refused:
            raise BadField(name, f"unknown field {name[:64]!r}{did_you_mean(name[:64], [*known, *refused])}", "unknown_field")
        else:
            raise BadField(name, f"field {name!r} is not supported: {refused[name]}", "unsupported_field")
    _drop_nulls(fields)
    try:
        return msgspec.convert(fields, struct_type)
    except msgspec.ValidationError as error:
        raise _as_bad_field(str(error), struct_type) from None


def _decode(body: bytes, max_depth: int) -> Any:
    """Twice: msgspec is strict about bytes and numbers, and only the standard library shows a key that comes twice."""
    try:
        fields = msgspec.json.decode(body)
        _check_values(fields, max_depth)
        json.loads(body, object_pairs_hook=_refuse_duplicates)
    except RecursionError:
        raise BadField(None, f"the body is nested deeper than max_json_depth={max_depth}", "too_deep") from None
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError) as error:
        detail = str(error) if isinstance(error, msgspec.DecodeError) else "it is not valid UTF-8 or holds an impossible number"
        raise BadField(None, f"the body is not valid JSON: {detail}", "invalid_json") from None
    return fields


def _drop_nulls(root: dict[str, Any]) -> None:
    """null means left out, at every level: clients send the unset fields of their own newer versions back as nulls."""
    found: list[Any] = [root]
    while found:
        container = found.pop()
        if type(container) is dict:
            for name in [name for name, value in container.items() if value is None]:
                del container[name]
            found += [value for name, value in container.items() if name not in FREE_FORM or type(value) is list]
        elif type(container) is list:
            found += [value for value in container if type(value) is dict or type(value) is list]


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> None:
    names: set[str] = set()
    for name, _ in pairs:
        if name in names:
            raise BadField(name, f"field {name[:64]!r} is given twice", "duplicate_field")
        names.add(name)


def _check_values(root: Any, max_depth: int) -> None:
    """Depth and integers, without recursion."""
    level, depth = [root], 0
    while level:
        depth += 1
        if depth > max_depth:
            raise BadField(None, f"the body is nested deeper than max_json_depth={max_depth}", "too_deep")
        below: list[Any] = []
        for container in level:
            for value in container.values() if type(container) is dict else container if type(container) is list else ():
                if type(value) is int:
                    if not -MAX_INT < value < MAX_INT:
                        fields: dict[str, Any] = root if container is root and type(root) is dict else {}
                        name = next((name for name, own in fields.items() if own is value), None)
                        text = f"{name or 'the body'} holds an integer of more than 64 bits"
                        raise BadField(name, text, "integer_out_of_range")
                elif type(value) is dict or type(value) is list:
                    below.append(value)
        level = below


def _names_at(struct_type: type, path: str) -> list[str]:
    """The fields that an object at `path`, such as "messages[...].content", may have."""
    found = [msgspec.inspect.type_info(struct_type)]
    for step in path.replace("[", ".[").split("."):
        fields = [field for one in found for field in getattr(one, "fields", ()) if field.encode_name == step]
        found = (
            [field.type for field in fields] if not step.startswith("[") else [getattr(one, "item_type", one) for one in found]
        )
        found = [choice for one in found for choice in getattr(one, "types", [one])]
    return [field.encode_name for one in found for field in getattr(one, "fields", ())]


def _as_bad_field(message: str, struct_type: type) -> BadField:
    """ "Expected `int`, got `str` - at `$.max_tokens`" names its field."""
    text, _, path = message.partition(" - at `")
    path = path.rstrip("`").removeprefix("$").removeprefix(".")
    missing = re.search(r"(?:required|unknown) field `([^`]*)`", text)
    if missing and "unknown" in text:
        text += did_you_mean(missing[1][:64], _names_at(struct_type, path))
    if missing:
        path = f"{path}.{missing[1]}" if path else missing[1]
    return BadField(path or None, f"{path}: {text}" if path and not missing else text)
