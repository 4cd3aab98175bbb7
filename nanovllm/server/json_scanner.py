"""Reads one JSON value from text that arrives in pieces, and knows at every character whether it can still be JSON.

Strict JSON (RFC 8259), with one kindness: raw control characters inside strings, which models do write, come out
escaped. What has been read so far is always a beginning of valid JSON, so it can be passed on before the end is known.
Time is linear in the text; memory is what `take` has not collected yet, and a stack of at most `MAX_DEPTH` brackets.
"""

from __future__ import annotations

import json
import re

MAX_DEPTH = 128
WHITESPACE = " \t\n\r"

_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')  # of a string: all that needs no look
# State of a number -> next state by character ("1-9": those digits). RFC 8259, section 6.
_NUMBER: dict[str, dict[str, str]] = {
    "minus": {"0": "zero", "1-9": "integer"},
    "zero": {".": "point", "e": "exponent", "E": "exponent"},
    "integer": {"0": "integer", "1-9": "integer", ".": "point", "e": "exponent", "E": "exponent"},
    "point": {"0": "fraction", "1-9": "fraction"},
    "fraction": {"0": "fraction", "1-9": "fraction", "e": "exponent", "E": "exponent"},
    "exponent": {"0": "power", "1-9": "power", "+": "sign", "-": "sign"},
    "sign": {"0": "power", "1-9": "power"},
    "power": {"0": "power", "1-9": "power"},
}
_NUMBER_MAY_END = ("zero", "integer", "fraction", "power")


class JsonScanner:
    """`feed` it until `is_done` or `is_broken`; `take` gives the new JSON text at any time.

    A number at the top has no end of its own and is never done; objects, lists, strings and words are.
    """

    def __init__(self) -> None:
        self.is_done = False
        self.is_broken = False
        self._state = "value"
        self._open: list[str] = []  # brackets that wait for their partner
        self._is_key = False  # the string being read is a key
        self._rest = ""  # of the word being read (true, false, null), or one "h" per hex digit to come
        self._pieces: list[str] = []

    def feed(self, text: str, position: int, end: int) -> int:
        """Read `text[position:end]`, up to the last character of the value; returns the position after what was read."""
        while position < end and not (self.is_done or self.is_broken):
            if self._state == "string" and (plain := _PLAIN.match(text, position, end)):
                self._pieces.append(plain.group())
                position = plain.end()
            elif self._step(text[position]):
                position += 1
        return position

    def take(self) -> str:
        """The JSON text that was read since the last call."""
        text = "".join(self._pieces)
        self._pieces.clear()
        return text

    def _step(self, char: str) -> bool:
        """Whether `char` was read. If not, the scanner is broken, or a number ended before it."""
        state = self._state
        if state in _NUMBER:
            known = _NUMBER[state].get("1-9" if char in "123456789" else char)
            if known is None:
                if state not in _NUMBER_MAY_END or not self._open:
                    self.is_broken = True
                else:
                    self._state = "after"
                return False
            self._state = known
        elif state in ("string", "escape", "hex", "word"):
            return self._step_in_token(char)
        elif char not in WHITESPACE and not self._structure(char):
            self.is_broken = True
            return False
        self._pieces.append(char)
        return True

    def _step_in_token(self, char: str) -> bool:
        piece = char
        if self._state == "string":
            if char == '"':
                self._end_string()
            elif char == "\\":
                self._state = "escape"
            else:  # a raw control character
                piece = json.dumps(char)[1:-1]
        elif self._state == "escape" and char in '"\\/bfnrt':
            self._state = "string"
        elif self._state == "escape" and char == "u":
            self._state, self._rest = "hex", "hhhh"
        elif self._state == "hex" and char in "0123456789abcdefABCDEF":
            self._rest = self._rest[1:]
            self._state = "hex" if self._rest else "string"
        elif self._state == "word" and self._rest.startswith(char):
            self._rest = self._rest[1:]
            if not self._rest:
                self._end_value()
        else:
            self.is_broken = True
            return False
        self._pieces.append(piece)
        return True

    def _structure(self, char: str) -> bool:
        """Brackets, commas, colons, and the first character of everything else."""
        state = self._state
        if state == "after":
            if char == ",":
                self._state = "key" if self._open[-1] == "{" else "value"
                return True
            return self._close(char)
        if state == "colon":
            self._state = "value"
            return char == ":"
        if state in ("key", "first key"):
            self._state, self._is_key = "string", True
            return char == '"' or (state == "first key" and self._close(char))
        return (state == "first item" and self._close(char)) or self._begin_value(char)

    def _begin_value(self, char: str) -> bool:
        if char in "{[":
            self._open.append(char)
            self._state = "first key" if char == "{" else "first item"
            return len(self._open) <= MAX_DEPTH
        if char == '"':
            self._state, self._is_key = "string", False
        elif char in "-0123456789":
            self._state = {"-": "minus", "0": "zero"}.get(char, "integer")
        elif char in "tfn":
            self._state, self._rest = "word", {"t": "rue", "f": "alse", "n": "ull"}[char]
        else:
            return False
        return True

    def _close(self, char: str) -> bool:
        if not self._open or char != {"{": "}", "[": "]"}[self._open[-1]]:
            return False
        self._open.pop()
        self._end_value()
        return True

    def _end_string(self) -> None:
        if self._is_key:
            self._state = "colon"
        else:
            self._end_value()

    def _end_value(self) -> None:
        self._state = "after"
        self.is_done = not self._open


def is_object_text(text: str) -> bool:
    """Whether `text` is exactly one JSON object, whitespace around it aside, that can be sent as UTF-8."""
    stripped = text.strip(WHITESPACE)
    if any("\ud800" <= char <= "\udfff" for char in stripped):
        return False
    scanner = JsonScanner()
    return stripped.startswith("{") and scanner.feed(stripped, 0, len(stripped)) == len(stripped) and scanner.is_done
