"""From the text of one completion to its parts: reasoning, text and tool calls, while it is being generated.

    parser = make_output_parser(tool_format="hermes", reasoning=True)
    parts = [*parser.push("<think>Hm"), *parser.push("...</think>Hello"), *parser.finish()]

One parser per completion. For every way to cut the text, the parts add up to the parse of the whole; nothing that a
model writes raises or is lost. The pieces are `reasoning.py`, `tool_calls.py` and the table `tool_formats.py`.
"""

from __future__ import annotations

from collections.abc import Collection

from nanovllm.errors import ConfigError, did_you_mean
from nanovllm.server.parts import Part, Reasoning, Text, merge
from nanovllm.server.reasoning import ReasoningSplitter
from nanovllm.server.tool_calls import ToolCallParser
from nanovllm.server.tool_formats import TOOL_FORMATS


class OutputParser:
    """Feed the text with `push`, call `finish` once at its end; both return the parts that became certain."""

    def __init__(self, tool_calls: ToolCallParser | None, reasoning: ReasoningSplitter | None) -> None:
        self._tool_calls = tool_calls
        self._reasoning = reasoning

    def push(self, text: str) -> list[Part]:
        if self._reasoning is None:
            return self._content(text)
        parts = self._route(self._reasoning.push(text))
        if self._reasoning.is_over:
            self._reasoning = None
        return merge(parts)

    def finish(self) -> list[Part]:
        parts = self._route(self._reasoning.finish()) if self._reasoning is not None else []
        if self._tool_calls is not None:
            parts += self._tool_calls.finish()
        return merge(parts)

    @property
    def has_cut_call(self) -> bool:
        """After `finish`: the text ended inside the arguments of the last call."""
        return self._tool_calls is not None and self._tool_calls.has_cut_call

    def _route(self, pieces: list[tuple[bool, str]]) -> list[Part]:
        parts: list[Part] = []
        for is_reasoning, text in pieces:
            parts += [Reasoning(text)] if is_reasoning else self._content(text)
        return parts

    def _content(self, text: str) -> list[Part]:
        if self._tool_calls is None:
            return [Text(text)] if text else []
        return merge(self._tool_calls.push(text))


def make_output_parser(
    tool_format: str | None, reasoning: bool, *, tool_names: Collection[str] | None = None, prompt_opens_reasoning: bool = False
) -> OutputParser:
    """A parser for one completion.

    `tool_format`: a key of `TOOL_FORMATS`, or None to leave calls in the text. `tool_names`: the tools of the request;
    guards formats whose calls have no mark. `prompt_opens_reasoning`: the prompt ends inside `<think>` (see
    `reasoning.prompt_opens_reasoning`). Raises `ConfigError` for an unknown format.
    """
    if tool_format is not None and tool_format not in TOOL_FORMATS:
        known = ", ".join(TOOL_FORMATS)
        raise ConfigError(f"tool format {tool_format!r} is unknown; known are {known}{did_you_mean(tool_format, TOOL_FORMATS)}")
    return OutputParser(
        ToolCallParser(TOOL_FORMATS[tool_format], tool_names) if tool_format is not None else None,
        ReasoningSplitter(prompt_opens_reasoning) if reasoning else None,
    )
