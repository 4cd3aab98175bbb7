"""Conversation: from messages and tools to a prompt, and from the generated text to its parts. For chats of all protocols.

Owns what depends on the model's template: whether it knows tools and reasoning, which variables it reads, which form a
required call has. The endpoints translate their protocol into `ChatMessage`, `Tool` and `TemplateFields`, and parts back
into their protocol. Read next: `chat.py`, `responses.py`, `anthropic.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from nanovllm.errors import RequestError
from nanovllm.outputs import add_text
from nanovllm.sampling_params import StructuredOutput
from nanovllm.server.errors import BadField
from nanovllm.server.output_parser import make_output_parser
from nanovllm.server.parts import Part, Reasoning, Text, ToolCallArguments, ToolCallStart
from nanovllm.server.prompts import LONG_TEXT, SHORT_MESSAGE, off_loop, plain_messages, plain_tools, render
from nanovllm.server.protocol import ChatMessage, NamedToolChoice, Template
from nanovllm.server.reasoning import (
    CLOSE,
    OPEN,
    asks_for_none,
    detect_reasoning,
    prompt_closes_reasoning,
    prompt_opens_reasoning,
)
from nanovllm.server.streaming import Delta
from nanovllm.server.tool_formats import TOOL_FORMATS, describe_tools, detect_tool_format, tool_choice_constraint
from nanovllm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from nanovllm.server.context import Server

ToolChoice = str | NamedToolChoice | None


@dataclass(frozen=True, slots=True)
class Conversation:
    """One turn that the model is asked for."""

    prompt: str
    constraint: StructuredOutput | None  # what makes the model call a tool
    tool_format: str | None  # None: calls are not looked for
    tool_names: tuple[str, ...]
    has_reasoning: bool
    opens_reasoning: bool  # the prompt ends inside of it
    may_reason: bool  # else what comes is the answer
    keeps_parallel: bool  # more than one call
    keeps_reasoning: bool

    @property
    def needs_special_tokens(self) -> bool:
        """The marks of calls are special tokens, so these must stay in the text until it is parsed."""
        return self.tool_format is not None and TOOL_FORMATS[self.tool_format].has_special_marks

    def after_reasoning(self, form: StructuredOutput) -> StructuredOutput:
        """`form` for the answer alone: what is thought before it is free."""
        if not self.may_reason:
            return form
        return replace(form, after=CLOSE, opened_by=None if self.opens_reasoning else OPEN)


class TurnReader:
    """The parts of one completion, without those that the client does not want. Counts what it reads."""

    def __init__(self, turn: Conversation, tokenizer: Tokenizer) -> None:
        self._turn, self._tokenizer = turn, tokenizer
        self._parser = None
        if turn.tool_format is not None or turn.has_reasoning:
            self._parser = make_output_parser(
                turn.tool_format, turn.has_reasoning, tool_names=turn.tool_names, prompt_opens_reasoning=turn.opens_reasoning
            )
        self.has_calls = False
        self.num_reasoning = 0  # tokens

    def read(self, delta: Delta) -> list[Part]:
        if self._parser is None:
            return [Text(delta.text)] if delta.text else []
        has_ended = delta.finish_reason is not None
        parts = self._parser.push(self._visible(delta)) + (self._parser.finish() if has_ended else [])
        self.num_reasoning += self._num_reasoning_tokens(parts, delta)
        kept = [part for part in parts if self._is_wanted(part)]
        self.has_calls = self.has_calls or any(isinstance(part, ToolCallStart) for part in kept)
        return kept

    def finish_reason(self, delta: Delta) -> str | None:
        is_whole = delta.finish_reason == "stop" and not self.has_cut_call
        return "tool_calls" if self.has_calls and is_whole else delta.finish_reason

    @property
    def has_cut_call(self) -> bool:
        """At the end: `max_tokens` or a stop string ended the text inside of the last call."""
        return self._parser is not None and self._parser.has_cut_call

    def _visible(self, delta: Delta) -> str:
        """Where special tokens stay in the text, the end token is one of them. A grammar can end a text without one."""
        if self._turn.needs_special_tokens and delta.finish_reason == "stop" and not isinstance(delta.stop_reason, str):
            ends = [token_id for token_id in delta.token_ids[-1:] if token_id in self._tokenizer.special_token_ids]
            return delta.text.removesuffix(self._tokenizer.decode(ends, False))
        return delta.text

    def _num_reasoning_tokens(self, parts: list[Part], delta: Delta) -> int:
        """Exact while the model only thinks; where that ends within a delta, what the text would take."""
        texts = [part.text for part in parts if isinstance(part, Reasoning)]
        if not texts:
            return 0
        return len(delta.token_ids) if len(texts) == len(parts) else len(self._tokenizer.encode("".join(texts), False))

    def _is_wanted(self, part: Part) -> bool:
        if isinstance(part, (ToolCallStart, ToolCallArguments)):
            return self._turn.keeps_parallel or part.index == 0
        if isinstance(part, Text):
            return self._turn.constraint is None  # else all is calls, and text the beginning of one that was cut
        return self._turn.keeps_reasoning or not isinstance(part, Reasoning)


@dataclass(slots=True)
class Item:
    """A run of parts of one kind: all text between two calls, all reasoning, or one call."""

    kind: str  # "text", "reasoning", "call"
    index: int
    call_id: str = ""
    name: str = ""
    text: str = ""  # or the arguments of a call


class Items:
    """Cuts the parts of a turn into items, for protocols that send them one after the other.

    `feed` and `close` yield (what happened, item, new text), what happened being "open", "grow" or "close".
    """

    def __init__(self) -> None:
        self.all: list[Item] = []
        self._is_open = False

    def feed(self, parts: list[Part]) -> Iterator[tuple[str, Item, str]]:
        for part in parts:
            if isinstance(part, ToolCallStart):
                yield from self._open("call", part.call_id, part.name)
                continue
            kind = "text" if isinstance(part, Text) else "reasoning" if isinstance(part, Reasoning) else "call"
            if not self._is_open or self.all[-1].kind != kind:
                yield from self._open(kind)
            fragment = part.fragment if isinstance(part, ToolCallArguments) else part.text
            add_text(self.all[-1], fragment)
            yield "grow", self.all[-1], fragment

    def close(self) -> Iterator[tuple[str, Item, str]]:
        """The turn has ended. It has at least one item."""
        if not self.all:
            yield from self._open("text")
        if self._is_open:
            self._is_open = False
            yield "close", self.all[-1], ""

    def _open(self, kind: str, call_id: str = "", name: str = "") -> Iterator[tuple[str, Item, str]]:
        if self._is_open:
            yield "close", self.all[-1], ""
        self.all.append(Item(kind, len(self.all), call_id, name))
        self._is_open = True
        yield "open", self.all[-1], ""


async def begin_conversation(
    server: Server,
    messages: list[ChatMessage],
    body: Template,
    *,
    tool_choice: ToolChoice = None,
    parallel: bool | None = None,
    include_reasoning: bool | None = None,
    effort: str | None = None,
    documents: list[dict[str, Any]] | None = None,
    names: Mapping[str, str] | None = None,
) -> Conversation:
    """Check, render, and decide how the answer is to be read. `names`: this function's name -> the client's field."""
    names = names or {}
    template = server.engine.tokenizer.chat_template
    num_calls = sum(len(message.tool_calls or ()) for message in messages)
    plain = await off_loop(num_calls * SHORT_MESSAGE, plain_messages, server, messages)
    tools = plain_tools(server, body.tools) or None
    if tool_choice == "none":
        tools = None
    tool_format = detect_tool_format(template, server.model_name) if tools else None
    size = 0 if tool_choice in (None, "none", "auto") else LONG_TEXT + 1
    constraint = await off_loop(size, _constraint, server, tools, tool_choice, tool_format, parallel)
    variables = _variables(template or "", effort, documents, names)
    shown = tools
    if tools and "tools" not in (template or ""):
        plain, shown = _with_tools_described(plain, tools), None
    if "tool_calls" not in (template or ""):
        plain = [_with_calls_written(message) for message in plain]
    prompt = await render(server, plain, body, shown, variables)
    opens, has_reasoning = prompt_opens_reasoning(prompt), detect_reasoning(template)
    is_quiet = asks_for_none({**(body.chat_template_kwargs or {}), **variables}) or prompt_closes_reasoning(prompt)
    return Conversation(
        prompt=prompt,
        constraint=constraint,
        tool_format=tool_format,
        tool_names=tuple(tool["function"]["name"] for tool in tools or ()),
        has_reasoning=has_reasoning,
        opens_reasoning=opens,
        may_reason=has_reasoning and (opens or not (is_quiet or body.continue_final_message)),
        keeps_parallel=parallel is not False,
        keeps_reasoning=include_reasoning is not False,
    )


def _constraint(
    server: Server, tools: list[dict[str, Any]] | None, choice: ToolChoice, tool_format: str | None, parallel: bool | None
) -> StructuredOutput | None:
    if tools and tool_format is None:
        raise BadField("tools", f"tools: {server.model_name!r} writes calls in a form that is not known here, or not at all")
    if choice in (None, "none", "auto"):
        return None
    if tools is None or tool_format is None:
        raise BadField("tool_choice", "tool_choice asks for a call, but there are no tools")
    named = choice if isinstance(choice, str) else {"type": "function", "function": {"name": choice.function.name}}
    try:
        return tool_choice_constraint(tools, named, tool_format, parallel=parallel is not False)
    except RequestError as error:
        raise BadField("tool_choice", str(error)) from None


def _variables(
    template: str, effort: str | None, documents: list[dict[str, Any]] | None, names: Mapping[str, str]
) -> dict[str, Any]:
    """Variables that only some templates read; for others the field is refused."""
    variables: dict[str, Any] = {}
    if documents is not None:
        variables["documents"] = documents
    if effort == "none" and "enable_thinking" in template:
        variables["enable_thinking"] = False
    elif effort is not None:
        variables["reasoning_effort"] = effort
    for name in variables:
        if name not in template:
            field = names.get(name, name)
            raise BadField(field, f"{field} has no effect: the chat template of this model does not read it", "unsupported_field")
    return variables


def _with_tools_described(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For templates that leave tools out: they stand in the system message."""
    text = describe_tools(tools)
    if messages and messages[0]["role"] == "system" and isinstance(messages[0]["content"], str):
        return [{**messages[0], "content": messages[0]["content"] + "\n\n" + text}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _with_calls_written(message: dict[str, Any]) -> dict[str, Any]:
    """For templates that leave calls out: they stand in the text, as `describe_tools` teaches to write them."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    texts = [message["content"]] if message["content"] else []
    texts += [f"<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>" for call in calls]
    return {**{name: value for name, value in message.items() if name != "tool_calls"}, "content": "\n".join(texts)}
