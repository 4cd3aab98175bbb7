"""What one completion consists of: text, reasoning and tool calls, in the order in which the model wrote them.

`OutputParser` makes these, the endpoints turn them into their protocols (OpenAI deltas, Anthropic blocks). A stream of
parts is additive: neighbours of one kind may be merged, and how often a stream was cut changes nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Text:
    """Text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """What the model wrote between `<think>` and `</think>`."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """A call begins; its arguments follow as `ToolCallArguments` of the same index."""

    index: int  # 0, 1, ... within the completion
    call_id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """The next piece of a call's arguments. Joined, the pieces are JSON text of one object, or a beginning of it when
    the model broke off or went wrong in the middle."""

    index: int
    fragment: str


Part = Text | Reasoning | ToolCallStart | ToolCallArguments


def merge(parts: Sequence[Part]) -> list[Part]:
    """The same parts with neighbours of one kind joined and empty ones dropped."""
    if len(parts) == 1 and not (isinstance(parts[0], (Text, Reasoning)) and not parts[0].text):
        return list(parts)
    merged: list[Part] = []
    for part in parts:
        last = merged[-1] if merged else None
        if isinstance(part, Text) and isinstance(last, Text):
            merged[-1] = Text(last.text + part.text)
        elif isinstance(part, Reasoning) and isinstance(last, Reasoning):
            merged[-1] = Reasoning(last.text + part.text)
        elif isinstance(part, ToolCallArguments) and isinstance(last, ToolCallArguments) and part.index == last.index:
            merged[-1] = ToolCallArguments(part.index, last.fragment + part.fragment)
        elif not isinstance(part, (Text, Reasoning)) or part.text:
            merged.append(part)
    return merged
