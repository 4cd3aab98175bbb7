"""From a list of chat messages to the prompt text that a model was trained on.

Owns what a message may look like (`check_messages`) and the rendering of a checkpoint's Jinja template. Messages are
copied into plain JSON types first, so a template can neither reach an object of ours nor change the caller's data.
Malformed messages raise `InvalidPrompt` with their index; a template that refuses, fails or exceeds its limits raises
`InvalidChatTemplate`. The limits themselves live in `template_sandbox.py`. Knows nothing of token ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError

from nanovllm.errors import InvalidChatTemplate, InvalidPrompt
from nanovllm.template_sandbox import LimitExceeded, RefusedByTemplate, TemplateSandbox

DEFAULT_MAX_BYTES = 8 * 2**20  # of the rendered text
DEFAULT_MAX_SECONDS = 2.0
MAX_SOURCE_LENGTH = 2**20
MAX_DEPTH = 64  # of nested lists and objects in messages, tools and variables
RESERVED_VARIABLES = frozenset(("messages", "tools", "add_generation_prompt"))

# Stands at the end of the final message while it is rendered. The space tells whether the template trims messages:
# then it is gone, and the text before the mark has to be trimmed too.
_END_MARK = "\ue0f0end of final message\ue0f1"


class ChatTemplate:
    """One compiled template. Safe to render from several threads."""

    def __init__(self, source: str, *, max_bytes: int = DEFAULT_MAX_BYTES, max_seconds: float = DEFAULT_MAX_SECONDS) -> None:
        if len(source) > MAX_SOURCE_LENGTH:
            raise InvalidChatTemplate(f"the chat template has {len(source)} characters; at most {MAX_SOURCE_LENGTH} are allowed")
        self._sandbox = TemplateSandbox(max_bytes, max_seconds)
        self._max_bytes = max_bytes
        self._template = self._compile(source)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of `messages`. It ends with the opening of the assistant's turn, or, with
        `continue_final_message`, right after the text of the last message.
        """
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        if add_generation_prompt and continue_final_message:
            raise InvalidChatTemplate("add_generation_prompt and continue_final_message exclude each other; set only one of them")
        chat = check_messages(messages)
        if continue_final_message:
            chat = _mark_end(chat)
        text = self._run(
            {
                **_check_variables(variables or {}),
                "messages": chat,
                "tools": _plain(tools, "tools") if tools else None,
                "add_generation_prompt": add_generation_prompt,
            }
        )
        return _cut_at_mark(text) if continue_final_message else text

    def _compile(self, source: str) -> Template:
        self._sandbox.start_budget()
        try:
            code = self._sandbox.compile_with_limits(source)
            return Template.from_code(self._sandbox, code, self._sandbox.make_globals(None))
        except TemplateSyntaxError as error:
            raise InvalidChatTemplate(f"line {error.lineno} of the chat template is not valid Jinja: {error.message}") from error
        except Exception as error:  # foreign code, run in part while constants are folded
            raise InvalidChatTemplate(f"the chat template could not be compiled: {_describe(error)}") from error

    def _run(self, variables: dict[str, Any]) -> str:
        self._sandbox.start_budget()
        pieces, size = [], 0
        try:
            for piece in self._template.generate(variables):
                size += len(piece)
                if size > self._max_bytes:
                    raise LimitExceeded(f"its output is longer than {self._max_bytes} characters")
                pieces.append(piece)
        except RefusedByTemplate as error:
            raise InvalidChatTemplate(f"the chat template refused the messages: {error}") from None
        except LimitExceeded as error:
            raise InvalidChatTemplate(f"the chat template was stopped: {error}") from None
        except Exception as error:  # foreign code may raise anything; none of it is a fault of the engine
            raise InvalidChatTemplate(f"the chat template failed: {_describe(error)}") from error
        return "".join(pieces)


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """A plain copy of `messages`, every content a string (or None where an assistant only calls tools)."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise InvalidPrompt(f"messages must be a list of objects with role and content, got {type(messages).__name__}")
    if not messages:
        raise InvalidPrompt("messages is empty; give at least one message")
    return [_check_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _check_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidPrompt(f"{where} must be an object with role and content, got {type(message).__name__}")
    plain = _plain(message, where)
    role = plain.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidPrompt(f"{where}.role must be a non-empty string, got {role!r}")
    calls_tools = role == "assistant" and bool(plain.get("tool_calls"))
    plain["content"] = _check_content(plain.get("content"), calls_tools, f"{where}.content")
    return plain


def _check_content(content: Any, may_be_none: bool, where: str) -> str | None:
    """Text parts are joined by line breaks: templates of text models expect one string."""
    if isinstance(content, str) or (content is None and may_be_none):
        return content
    if not isinstance(content, list):
        raise InvalidPrompt(f"{where} must be a string or a list of text parts, got {type(content).__name__}")
    return "\n".join(_text_of_part(part, f"{where}[{index}]") for index, part in enumerate(content))


def _text_of_part(part: Any, where: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise InvalidPrompt(f"{where} is of type {kind!r}; only {{'type': 'text', 'text': '...'}} is supported")
    return part["text"]


def _check_variables(variables: Mapping[str, Any]) -> dict[str, Any]:
    for name in variables:
        if name in RESERVED_VARIABLES:
            raise InvalidChatTemplate(f"{name!r} is set by the engine and cannot be a template variable")
    return _plain(variables, "template variables")


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy made of JSON types only; objects with methods of their own must not reach a template."""
    if value is None or type(value) in (str, bool, int, float):
        return value
    if depth >= MAX_DEPTH:
        raise InvalidPrompt(f"{where} is nested more than {MAX_DEPTH} levels deep")
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise InvalidPrompt(f"{where} has a key that is not a string")
        return {str.__str__(key): _plain(item, where, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, where, depth + 1) for item in value]
    if isinstance(value, str):  # of an enum or another subclass, the bare value
        return str.__str__(value)
    for kind in (int, float):
        if isinstance(value, kind):
            return kind(value)
    raise InvalidPrompt(f"{where} holds a {type(value).__name__}; only JSON values are allowed")


def _mark_end(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    last = messages[-1]
    if last["content"] is None:
        raise InvalidChatTemplate("continue_final_message needs text in the last message; it has none")
    return [*messages[:-1], {**last, "content": last["content"] + _END_MARK + " "}]


def _cut_at_mark(text: str) -> str:
    """Worked example: 'A: hi<mark> <end>' gives 'A: hi'; 'A: hi <mark><end>' (trimmed by the template) gives 'A: hi'."""
    position = text.rfind(_END_MARK)
    if position < 0:
        raise InvalidChatTemplate("continue_final_message: the chat template leaves out or changes the text of the last message")
    was_trimmed = not text.startswith(" ", position + len(_END_MARK))
    return text[:position].rstrip() if was_trimmed else text[:position]


def _describe(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return text if isinstance(error, TemplateError) else f"{type(error).__name__}: {text}"
