"""Reads one tool call that is written as a JSON object: `{"name": "f", "arguments": {...}}`, keys in any order.

Owns what such an object may hold. The arguments can be taken while they arrive, once the name is known. Knows nothing
of the text around a call; that is `tool_calls.py`. Nothing that a model writes raises: the reader is `is_broken` then.
"""

from __future__ import annotations

import json
import re

from nanovllm.server.json_scanner import WHITESPACE, JsonScanner, is_object_text

NAME = re.compile(r"[\w.:/-]{1,256}")  # of a tool; wider than what OpenAI allows, and nothing that UTF-8 cannot carry

# Key -> what its value may begin with. Llama writes "parameters", and sometimes a "type"; Mistral may add an "id".
_KEYS = {"name": '"', "arguments": '{"n', "parameters": '{"n', "id": '"', "type": '"'}
_ARGUMENTS = ("arguments", "parameters")


class CallReader:
    """`feed` it until `is_done` or `is_broken`. With `name` given, only the arguments object is read."""

    def __init__(self, name: str | None = None) -> None:
        self.name = name
        self.is_done = False
        self.is_broken = False
        self.has_arguments = name is not None  # text of them may be taken: they began as an object, or are complete
        self._ends_with_arguments = name is not None
        self._state = "open" if name is None else "value"
        self._key = "" if name is None else "arguments"
        self._seen: set[str] = set()
        self._scanner: JsonScanner | None = None  # of the key or value being read
        self._first = ""  # character of the value being read
        self._arguments = ""  # complete ones that nobody has taken yet

    @property
    def is_in_arguments(self) -> bool:
        """The next characters belong to the arguments object."""
        return self.has_arguments and self._scanner is not None and self._state == "value" and self._key in _ARGUMENTS

    def feed(self, text: str, position: int, end: int) -> int:
        """Read one character of structure, or as much of one key or value as there is; returns the new position."""
        if self._scanner is None:
            return position + self._structure(text[position])
        position = self._scanner.feed(text, position, end)
        if self._scanner.is_broken:
            self.is_broken = True
        elif self._scanner.is_done:
            scanner, self._scanner = self._scanner, None
            self._end_token(scanner.take())
        return position

    def take_arguments(self) -> str:
        """JSON text of the arguments that was read since the last call."""
        text, self._arguments = self._arguments, ""
        if self._scanner is not None and self.is_in_arguments:
            text += self._scanner.take()
        return text

    def _structure(self, char: str) -> bool:
        """Whether `char` was read. If not, a key or value begins with it, or the reader is broken."""
        state = self._state
        if char in WHITESPACE:
            return True
        if (state, char) in _NEXT_STATE:
            self._state = _NEXT_STATE[state, char]
            self.is_done = self._state == "done"
            self.is_broken = self.is_done and self.name is None
            return not self.is_broken
        if state in ("key", "first key") and char == '"':
            self._state = "key"
            self._scanner = JsonScanner()
        elif state == "value" and char in _KEYS[self._key]:
            self._scanner, self._first = JsonScanner(), char
            self.has_arguments = self.has_arguments or (self._key in _ARGUMENTS and char == "{")
        else:
            self.is_broken = True
        return False

    def _end_token(self, source: str) -> None:
        if self._state == "key":
            self._end_key(json.loads(source))
        else:
            self._end_value(source)

    def _end_key(self, key: str) -> None:
        group = "arguments" if key in _ARGUMENTS else key
        self.is_broken = key not in _KEYS or group in self._seen
        self._seen.add(group)
        self._state, self._key = "colon", key

    def _end_value(self, source: str) -> None:
        self._state = "after"
        self.is_done = self._ends_with_arguments
        if self._key == "name":
            self.name = json.loads(source)
            self.is_broken = NAME.fullmatch(self.name) is None
        elif self._key in _ARGUMENTS:
            self._arguments += self._unwrap(source)
            self.has_arguments = True

    def _unwrap(self, source: str) -> str:
        """Arguments may also be null, or a string that holds the object: `"{\\"a\\": 1}"`."""
        if self._first == "n":
            return "{}"
        if self._first == '"':
            source = json.loads(source)
            self.is_broken = not is_object_text(source)
        return source


_NEXT_STATE = {
    ("open", "{"): "first key",
    ("first key", "}"): "done",
    ("colon", ":"): "value",
    ("after", ","): "key",
    ("after", "}"): "done",
}
