"""Splits `<think>...</think>` off the beginning of a completion, in one pass over text that arrives in pieces.

Some templates open `<think>` at the end of the prompt; then the completion begins inside (`starts_inside`). Whitespace
around the marks belongs to them; all else is passed on. Knows nothing of tool calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OPEN, CLOSE = "<think>", "</think>"
MAX_LEADING_SPACE = 64  # characters of whitespace before OPEN


def detect_reasoning(chat_template: str | None) -> bool:
    """Whether the model behind this template writes its reasoning between `<think>` and `</think>`."""
    return chat_template is not None and CLOSE in chat_template


def prompt_opens_reasoning(prompt: str) -> bool:
    """Whether a rendered prompt ends inside a `<think>` that the model has to close."""
    return prompt.rstrip().endswith(OPEN)


def prompt_closes_reasoning(prompt: str) -> bool:
    """Whether a rendered prompt ends behind it: what comes is the answer."""
    return prompt.rstrip().endswith(CLOSE)


def asks_for_none(variables: Mapping[str, Any]) -> bool:
    """Whether these variables of a template tell the model not to think."""
    return variables.get("enable_thinking") is False or variables.get("reasoning_effort") == "none"


def close_reasoning(prompt: str) -> str:
    """The prompt with the `<think>` at its end closed, as Qwen3's own template does for answers without reasoning."""
    return f"{prompt.rstrip()}\n\n{CLOSE}\n\n"


class ReasoningSplitter:
    """`push` and `finish` return what became known, as (is_reasoning, text)."""

    def __init__(self, starts_inside: bool = False) -> None:
        self._starts_inside = starts_inside
        self._state = "start"  # then "inside" or, directly, "outside"
        self._skips_space = False
        self._held = ""  # beginning of a mark, or whitespace before it

    @property
    def is_over(self) -> bool:
        """All that follows is outside, unchanged."""
        return self._state == "outside" and not self._skips_space

    def push(self, text: str) -> list[tuple[bool, str]]:
        text, self._held = self._held + text, ""
        if self._state == "start":
            text = self._start(text)
        pieces: list[tuple[bool, str]] = []
        if self._state == "inside":
            text = self._skip_space(text)
            reasoning, text = self._inside(text)
            pieces.append((True, reasoning))
        if self._state == "outside":
            pieces.append((False, self._skip_space(text)))
        return pieces

    def finish(self) -> list[tuple[bool, str]]:
        held, self._held = self._held, ""
        return [(self._state == "inside" or (self._state == "start" and self._starts_inside), held)]

    def _start(self, text: str) -> str:
        """Decide between inside and outside; returns the text that is left."""
        mark = text.lstrip()
        space = len(text) - len(mark)
        if space <= MAX_LEADING_SPACE and mark.startswith(OPEN):
            self._state, self._skips_space = "inside", True
            return mark[len(OPEN) :]
        if space <= MAX_LEADING_SPACE and OPEN.startswith(mark):
            self._held = text
            return ""
        self._state = "inside" if self._starts_inside else "outside"
        self._skips_space = self._starts_inside
        return text

    def _inside(self, text: str) -> tuple[str, str]:
        """(reasoning, the rest after CLOSE)."""
        position = text.find(CLOSE)
        if position >= 0:
            self._state, self._skips_space = "outside", True
            return text[:position], text[position + len(CLOSE) :]
        keep = len(text) - len_partial_mark(text, (CLOSE,))
        self._held = text[keep:]
        return text[:keep], ""

    def _skip_space(self, text: str) -> str:
        if self._skips_space:
            text = text.lstrip()
            self._skips_space = not text
        return text


def len_partial_mark(text: str, marks: tuple[str, ...]) -> int:
    """Length of the longest end of `text` that is a proper beginning of one of `marks`: "a <to" and "<tool>" give 3."""
    longest = 0
    for mark in marks:
        if mark[0] not in text:  # nearly always
            continue
        for length in range(min(len(mark) - 1, len(text)), longest, -1):
            if text.endswith(mark[:length]):
                longest = length
                break
    return longest
