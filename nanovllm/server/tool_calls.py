"""Finds tool calls in a completion while it arrives, for every format of `tool_formats.py`.

Text passes through at the speed of `str.find`. After a mark, or at a bare start, characters are held until a call is
certain; from then on its arguments stream. What turns out not to be a call comes out as text, unchanged. Whitespace
next to calls belongs to them. At most `MAX_HELD` characters are held, each is looked at a constant number of times,
and nothing that a model writes raises. Results do not depend on how the text was cut.
"""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Collection

from nanovllm.server.call_reader import CallReader
from nanovllm.server.parts import Part, Text, ToolCallArguments, ToolCallStart
from nanovllm.server.pythonic import CallListScanner, parse_call_list
from nanovllm.server.reasoning import len_partial_mark
from nanovllm.server.tool_formats import ToolFormat

MAX_HELD = 65536  # characters that may still become a call
MAX_SPACE = 64  # characters of whitespace before a call that count as part of it
MAX_NAMED_HEAD = 512  # characters between "[TOOL_CALLS]" and "{"
CHUNK = 1024  # characters looked at in one go: long texts are not copied or searched again and again

_NAMED_HEAD = re.compile(r"\s*([\w.:/-]{1,256})(?:\[CALL_ID\]\w*)?(?:\[ARGS\])?\s*")
_NAMED_HEAD_OTHERS = ".:/-_[] \t\r\n"  # characters of a head besides letters and digits
_ALPHABET = string.ascii_letters + string.digits


class ToolCallParser:
    """`push` and `finish` return the parts that became certain.

    With `tool_names`, calls at a bare start must be of these tools; after a mark any name is a call, so that the caller
    can tell the model about an unknown one.
    """

    def __init__(self, tool_format: ToolFormat, tool_names: Collection[str] | None = None) -> None:
        self._format = tool_format
        self._first_characters = frozenset(mark[0] for mark in tool_format.opens)
        self._names = tool_names
        self._num_calls = 0
        self._parts: list[Part] = []
        self._read = self._at_start  # the state: reads from a position on, returns the new position
        self._held = ""  # in text: whitespace and the beginning of a mark
        self._skips_space = False  # in text: right after a section
        self._section: list[str] = []  # what was read since the mark, or since the last certain thing
        self._len_section = 0
        self._is_bare = False  # the section has no mark
        self._is_list = False  # within [ ] of a section
        self._list_start = 0  # where in the section
        self._calls = CallReader()
        self._is_announced = False  # the call in `_calls` is certain
        self._python = CallListScanner()
        self._head = ""  # of a named call
        self._tail = ""  # after a call: the beginning of what ends the section
        self.has_cut_call = False  # the text ended inside the arguments of the last call

    def push(self, text: str) -> list[Part]:
        if self._is_plain(text):
            return [Text(text)]
        for start in range(0, len(text), CHUNK):
            chunk, position = text[start : start + CHUNK], 0
            while position < len(chunk):
                position = self._read(chunk, position)
        return self._take()

    def finish(self) -> list[Part]:
        self.has_cut_call = self._is_announced and self._read == self._in_call and self._calls.is_in_arguments
        if self._read in (self._in_text, self._at_start):
            self._emit(self._held)
        else:
            left = "".join(self._section)
            self._emit("" if self._is_announced and left.isspace() else left)
        self._held, self._section, self._read = "", [], self._in_text
        return self._take()

    def _is_plain(self, text: str) -> bool:
        """Nearly every token: text in which no mark and no whitespace before one can begin."""
        if self._read != self._in_text or self._held or self._skips_space or not text or text[-1].isspace():
            return False
        return self._first_characters.isdisjoint(text)

    # --- outside calls

    def _at_start(self, text: str, position: int) -> int:
        char = text[position]
        if char.isspace() and len(self._held) < MAX_SPACE:
            self._held += char
            return position + 1
        if char in self._format.bare:
            self._begin_section(self._held, is_bare=True)
            return position
        self._read = self._in_text
        return position

    def _in_text(self, text: str, position: int) -> int:
        if self._skips_space:
            while position < len(text) and text[position].isspace():
                position += 1
            if position == len(text):
                return position
            self._skips_space = False
        size_held = len(self._held)
        text = self._held + text[position:]
        position -= size_held
        found = [place for mark in self._format.opens if (place := text.find(mark)) >= 0]
        if found:
            start = min(found)
            end = start + next(len(mark) for mark in self._format.opens if text.startswith(mark, start))
            before = _without_space(text[:start])
            self._emit(before)
            self._begin_section(text[len(before) : end], is_bare=False)
            return position + end
        keep = len(_without_space(text[: len(text) - len_partial_mark(text, self._format.opens)]))
        self._emit(text[:keep])
        self._held = text[keep:]
        return position + len(text)

    def _begin_section(self, source: str, is_bare: bool) -> None:
        self._held, self._section, self._len_section = "", [source], len(source)
        self._is_bare, self._is_list, self._is_announced = is_bare, False, False
        self._read = self._before_call

    # --- inside a section

    def _before_call(self, text: str, position: int) -> int:
        char = text[position]
        if char == "{":
            self._calls, self._is_announced = CallReader(), False
            self._read = self._in_call
            return position
        if char == "[" and not self._is_list and self._len_section < MAX_HELD:
            self._is_list, self._list_start = True, self._len_section
        elif self._format.has_python_calls and self._is_list and (char.isalpha() or char == "_"):
            return self._begin_python(position)
        elif self._format.has_named_calls and not self._is_list and (char.isalnum() or char == "_"):
            self._head, self._read = "", self._in_named_head
            return position
        elif not char.isspace() or self._len_section >= MAX_HELD:
            # A bare "[" can also be the first character of "[TOOL_CALLS]".
            return self._read_again(position) if self._is_bare and not self._is_announced else self._give_up(position)
        return self._hold(text, position, position + 1)

    def _in_call(self, text: str, position: int) -> int:
        """One step of the reader; the call is announced as soon as it is certain, then its arguments pass through."""
        was_in_arguments = self._is_announced and self._calls.is_in_arguments
        end = len(text) if was_in_arguments else min(len(text), position + MAX_HELD - self._len_section)
        if position >= end:
            return self._give_up(position)
        start, position = position, self._calls.feed(text, position, end)
        if not was_in_arguments:
            self._hold(text, start, position)
        if self._is_announced:
            self._emit_arguments(self._calls.take_arguments())
        if self._calls.is_broken:
            if self._is_announced and any(text.startswith(mark[0], position) for mark in self._format.closes):
                self._tail, self._read = "", self._after_call  # a bracket is missing, perhaps, and the section ends here
                return position
            return self._give_up(position)
        if not self._is_announced and self._calls.name is not None and (self._calls.has_arguments or self._calls.is_done):
            if not self._is_known(self._calls.name):
                return self._give_up(position)
            self._announce(self._calls.name)
            self._emit_arguments(self._calls.take_arguments() if self._calls.has_arguments else "{}")
        if self._calls.is_done:
            self._end_call()
        return position

    def _in_named_head(self, text: str, position: int) -> int:
        char = text[position]
        if char == "{":
            head = _NAMED_HEAD.fullmatch(self._head)
            if head is None:
                return self._give_up(position)
            self._calls, self._read = CallReader(head[1]), self._in_call
            self._announce(head[1])
            return position
        self._head += char
        if len(self._head) > MAX_NAMED_HEAD or not (char.isalnum() or char in _NAMED_HEAD_OTHERS):
            return self._give_up(position)
        return self._hold(text, position, position + 1)

    def _begin_python(self, position: int) -> int:
        self._python, self._read = CallListScanner(), self._in_python
        self._python.step("[")
        return position

    def _in_python(self, text: str, position: int) -> int:
        self._python.step(text[position])
        if self._python.is_broken or self._len_section >= MAX_HELD or not self._is_python_name_known():
            return self._give_up(position)
        position = self._hold(text, position, position + 1)
        if self._python.is_done:
            calls = parse_call_list("".join(self._section)[self._list_start :])
            if calls is None or not all(self._is_known(name) for name, _ in calls):
                return self._give_up(position)
            self._is_list = False
            for name, arguments in calls:
                self._announce(name)
                self._emit_arguments(arguments)
                self._end_call()
        return position

    def _after_call(self, text: str, position: int) -> int:
        """A call is complete. What follows ends the section, leads to the next call, or is text."""
        char = text[position]
        self._tail += char if self._tail or not char.isspace() else ""
        tail, closes = self._tail, self._format.closes
        separators = "," if self._is_list else self._format.separators
        if tail in closes or (tail == "]" and self._is_list):
            self._drop_section()
            self._tail, self._is_list = "", False
            if tail in closes:
                self._read, self._skips_space = self._in_text, True
            return position + 1
        if tail == "{" and separators and not self._is_list:
            self._read = self._before_call
            return position
        if tail and tail in separators:
            self._read = self._before_call
        elif self._len_section >= MAX_HELD or (tail and not any(mark.startswith(tail) for mark in closes)):
            return self._read_again(position)
        return self._hold(text, position, position + 1)

    # --- small things

    def _is_python_name_known(self) -> bool:
        return not self._python.has_name or self._is_known(self._python.name)

    def _is_known(self, name: str) -> bool:
        return not self._is_bare or self._names is None or name in self._names

    def _hold(self, text: str, start: int, end: int) -> int:
        if end > start:
            self._section.append(text[start:end])
            self._len_section += end - start
        return end

    def _drop_section(self) -> None:
        self._section, self._len_section = [], 0

    def _give_up(self, position: int) -> int:
        """What was held is text after all."""
        self._emit("".join(self._section))
        self._drop_section()
        self._read = self._in_text
        return position

    def _read_again(self, position: int) -> int:
        """The same, but what was held may end in the beginning of a mark."""
        self._held = "".join(self._section)
        self._drop_section()
        self._read = self._in_text
        return position

    def _announce(self, name: str) -> None:
        call_id = self._format.id_prefix + "".join(secrets.choice(_ALPHABET) for _ in range(self._format.id_length))
        self._parts.append(ToolCallStart(self._num_calls, call_id, name))
        self._num_calls += 1
        self._is_announced = True
        self._drop_section()

    def _end_call(self) -> None:
        self._drop_section()
        self._tail, self._read = "", self._after_call

    def _emit(self, text: str) -> None:
        if text:
            self._parts.append(Text(text))

    def _emit_arguments(self, text: str) -> None:
        if text:
            self._parts.append(ToolCallArguments(self._num_calls - 1, text))

    def _take(self) -> list[Part]:
        parts, self._parts = self._parts, []
        return parts


def _without_space(text: str) -> str:
    """`text` without up to MAX_SPACE characters of whitespace at its end."""
    return text[: max(len(text.rstrip()), len(text) - MAX_SPACE)]
