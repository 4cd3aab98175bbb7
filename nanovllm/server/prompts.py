"""Prompts: from what a client sends to token ids.

Owns the shapes that a prompt may have, the rendering of messages, truncation, and the rule that long work leaves the
event loop. Characters are bounded before they are tokenised. No error and no log line carries any text of a prompt.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from nanovllm.errors import InvalidChatTemplate, InvalidPrompt
from nanovllm.server.errors import BadField, HttpError
from nanovllm.server.protocol import ChatMessage, PromptFields, Template, Tool, ToolCall
from nanovllm.server.reasoning import asks_for_none, close_reasoning, prompt_opens_reasoning

if TYPE_CHECKING:
    from nanovllm.server.context import Server

LONG_TEXT = 8192  # characters; longer text is rendered and tokenised in a thread: about a millisecond of work
SHORT_MESSAGE = 64  # characters that would take as long to render as a message without any
RESERVED_KWARGS = {
    *("messages", "conversation", "tools", "documents", "add_generation_prompt", "continue_final_message", "self"),
    *("chat_template", "tokenize", "bos_token", "eos_token", "unk_token", "pad_token", "padding", "truncation"),
}
Result = TypeVar("Result")


def check_model(server: Server, model: str | None) -> None:
    if model is not None and model != server.model_name:
        message = f"the model {model[:200]!r} does not exist; this server has {server.model_name!r}"
        raise HttpError(404, message, param="model", code="model_not_found")


def check_request_id(request_id: str | None) -> None:
    """It appears in logs and in the answer."""
    if request_id is not None and not (0 < len(request_id) <= 128 and request_id.isascii() and request_id.isprintable()):
        raise BadField("request_id", "request_id must have 1 to 128 printable ASCII characters")


async def off_loop(size: int, function: Callable[..., Result], *args: Any, **options: Any) -> Result:
    """Short work at once, long work in a thread. `size`: in characters."""
    if size <= LONG_TEXT:
        return function(*args, **options)
    return await asyncio.to_thread(function, *args, **options)


def read_prompts(server: Server, value: str | list[Any], field: str) -> list[str | list[int]]:
    """One prompt or many: "a", ["a", "b"], [1, 2], [[1, 2], [3]]."""
    if isinstance(value, str):
        return [value]
    if not value:
        raise BadField(field, f"{field} is an empty list; give at least one")
    kinds = {int if isinstance(item, int) else type(item) for item in value}
    if kinds == {int}:
        return [value]
    if int in kinds:
        raise BadField(field, f"{field} mixes token ids with other things; a list holds token ids, or prompts")
    most = server.options.max_prompts_per_request
    if len(value) > most:
        raise BadField(field, f"{field} has {len(value)} entries; at most max_prompts_per_request={most} are allowed")
    return value


async def encode_prompt(
    server: Server, prompt: str | list[int], body: PromptFields, room: int, special: bool = True
) -> list[int]:
    """The token ids of one prompt, truncated as asked. `room`: tokens that truncate_prompt_tokens=-1 leaves for the answer."""
    if not prompt:
        raise InvalidPrompt("the prompt is empty")
    if isinstance(prompt, str):
        add_special_tokens = special if body.add_special_tokens is None else body.add_special_tokens
        token_ids = await server.engine.encode(prompt, add_special_tokens)
        await asyncio.sleep(0)  # of many prompts each is short, and others want to run in between
    else:
        token_ids = prompt
    limit = body.truncate_prompt_tokens
    if limit is None:
        return token_ids
    if limit == -1:
        limit = max(1, server.engine.facts.max_model_len - room)
    if limit < 1:
        raise BadField("truncate_prompt_tokens", f"truncate_prompt_tokens={limit} must be at least 1, or -1")
    return token_ids[:limit] if body.truncation_side == "right" else token_ids[-limit:]


# --- parts of messages, whose shapes depend on a type inside of them


def convert(value: dict[str, Any], kind: type[Result], where: str) -> Result:
    """`value` as a struct; `where` is its place in the request."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        text, _, path = str(error).partition(" - at `$")
        named = re.search(r"(?:required|unknown) field `([^`]*)`", text)
        place = where + path.rstrip("`") + (f".{named[1]}" if named else "")
        raise BadField(place, f"{place}: {text}") from None


def text_of_parts(content: str | list[dict[str, Any]], kinds: Sequence[str], where: str) -> str:
    """Parts of the types `kinds` are joined by line breaks; others are refused by their type."""
    if isinstance(content, str):
        return content
    texts = []
    for index, part in enumerate(content):
        kind, text = part.get("type"), part.get("text")
        if kind not in kinds:
            place = f"{where}[{index}]"
            raise BadField(place, f"{place} is of type {str(kind)[:40]!r}; only text is supported: {', '.join(kinds)}")
        if not isinstance(text, str):
            raise BadField(f"{where}[{index}].text", f"{where}[{index}].text must be a string")
        texts.append(text)
    return "\n".join(texts)


# --- messages


def plain_messages(server: Server, messages: list[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as templates know them: arguments of tool calls as objects, `developer` as `system`."""
    if not messages:
        raise BadField("messages", "messages is empty; give at least one message")
    if len(messages) > server.options.max_messages:
        text = f"messages has {len(messages)} entries; at most max_messages={server.options.max_messages} are allowed"
        raise BadField("messages", text)
    return [_plain_message(message, index) for index, message in enumerate(messages)]


def _plain_message(message: ChatMessage, index: int) -> dict[str, Any]:
    plain: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role, "content": message.content}
    for name in ("name", "tool_call_id"):
        if getattr(message, name) is not None:
            plain[name] = getattr(message, name)
    reasoning = message.reasoning if message.reasoning is not None else message.reasoning_content
    if reasoning is not None:
        plain["reasoning_content"] = reasoning
    if message.tool_calls:
        where = f"messages[{index}].tool_calls"
        plain["tool_calls"] = [_plain_call(call, where) for call in message.tool_calls]
    return plain


def _plain_call(call: ToolCall, where: str) -> dict[str, Any]:
    function = {"name": call.function.name, "arguments": parsed_arguments(call.function.arguments, where)}
    return {"id": call.id, "type": "function", "function": function}


def parsed_arguments(text: str, where: str) -> dict[str, Any]:
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise BadField(where, f"{where}: the arguments of a call must be a JSON object, as text")
    return arguments


def plain_tools(server: Server, tools: list[Tool] | None) -> list[dict[str, Any]] | None:
    """Tools as templates know them."""
    if tools is None:
        return None
    if len(tools) > server.options.max_tools:
        raise BadField("tools", f"tools has {len(tools)} entries; at most max_tools={server.options.max_tools} are allowed")
    names = [tool.function.name for tool in tools]
    if not all(0 < len(name) <= 64 and name.isprintable() for name in names):
        raise BadField("tools", "tools: the name of a function has 1 to 64 characters")
    if len(set(names)) < len(names):
        raise BadField("tools", "tools: two functions have the same name")
    return [{"type": "function", "function": _without_none(msgspec.to_builtins(tool.function))} for tool in tools]


def _without_none(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _size_of(message: dict[str, Any]) -> int:
    """In characters; a short message takes as long as some text does."""
    return SHORT_MESSAGE + sum(map(_size, message.values()))


def _size(value: Any) -> int:
    """What is neither a text nor a single value may be anything."""
    return len(value) if isinstance(value, str) else LONG_TEXT if isinstance(value, (list, dict)) else 0


async def render(
    server: Server,
    messages: list[dict[str, Any]],
    body: Template,
    tools: list[dict[str, Any]] | None,
    variables: dict[str, Any] | None = None,
) -> str:
    """The prompt text of a chat. Who asks for no reasoning gets none, also from a template that opens it without asking."""
    kwargs = body.chat_template_kwargs or {}
    for name in kwargs:
        if name in RESERVED_KWARGS:
            raise BadField("chat_template_kwargs", f"chat_template_kwargs: {name!r} is set by the server and cannot be given")
    if body.add_generation_prompt and body.continue_final_message:
        text = "add_generation_prompt and continue_final_message exclude each other; set only one of them"
        raise BadField("continue_final_message", text)
    variables = {**kwargs, **(variables or {})}
    size = sum(map(_size_of, messages)) + sum(map(_size, variables.values())) + (LONG_TEXT if tools else 0)
    try:
        prompt = await off_loop(
            size,
            server.engine.tokenizer.apply_chat_template,
            messages,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=bool(body.continue_final_message),
            tools=tools,
            **variables,
        )
    except InvalidChatTemplate as error:
        raise BadField("messages", str(error)) from None
    return close_reasoning(prompt) if asks_for_none(variables) and prompt_opens_reasoning(prompt) else prompt
