"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's Messages API, whole and as a stream of named events.

Owns the translation of blocks to chat messages and back. What a field means stands in `fields.py`. Errors have
Anthropic's shape on these paths (`errors.encoded_error`).
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nanovllm.outputs import GenerationOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.server.answers import Identity, begin
from nanovllm.server.anthropic_protocol import (
    BLOCKS,
    AnthropicToolChoice,
    AnthropicUsage,
    BlockDelta,
    BlockReply,
    BlockStart,
    BlockStop,
    CountTokensRequest,
    CustomTool,
    Ending,
    InputGrowth,
    InputTurn,
    MessageDelta,
    MessageReply,
    MessagesRequest,
    MessageStart,
    MessageStop,
    TextBlock,
    TextGrowth,
    TextReply,
    Thinking,
    ThinkingBlock,
    ThinkingGrowth,
    ThinkingReply,
    TokenCount,
    ToolResultBlock,
    ToolUseBlock,
    ToolUseReply,
)
from nanovllm.server.chat import check_service
from nanovllm.server.conversation import Conversation, Item, Items, ToolChoice, TurnReader, begin_conversation
from nanovllm.server.errors import BadField
from nanovllm.server.fields import refused
from nanovllm.server.params import constraint_of, make_params, schema_text
from nanovllm.server.prompts import check_model, convert, off_loop, text_of_parts
from nanovllm.server.protocol import (
    ChatMessage,
    FunctionCall,
    FunctionName,
    FunctionTool,
    NamedToolChoice,
    TemplateFields,
    Tool,
    ToolCall,
)
from nanovllm.server.respond import json_response
from nanovllm.server.streaming import Delta, Deltas, Outputs, finished, named_event

if TYPE_CHECKING:
    from nanovllm.server.context import Server

PATH = "/v1/messages"
COUNT_PATH = "/v1/messages/count_tokens"
REFUSED = {path: refused(path) for path in (PATH, COUNT_PATH)}
CHOICES = {"auto": "auto", "any": "required", "none": "none"}
STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


async def create_message(request: Request) -> Response:
    server: Server = request.app.state.server
    body = await server.read(request, MessagesRequest, REFUSED[PATH])
    check_model(server, body.model)
    check_service(None, body.service_tier, ("auto", "standard_only"))
    turn = await _begin(server, request, body)
    params = await _params(server, body, turn)
    token_ids = await server.engine.encode(turn.prompt, False)
    identity = Identity.of(server, request, "msg_")
    writer = Writer(server, identity, turn)
    streams = begin(server, request, [token_ids], params, body, identity)
    if body.stream:
        return server.sse(request, writer.events(streams[0]))
    outputs = await server.run(request, finished(streams))
    return json_response(writer.whole(outputs[0]))


async def count_tokens(request: Request) -> Response:
    server: Server = request.app.state.server
    body = await server.read(request, CountTokensRequest, REFUSED[COUNT_PATH])
    check_model(server, body.model)
    turn = await _begin(server, request, body)
    return json_response(TokenCount(input_tokens=len(await server.engine.encode(turn.prompt, False))))


async def _begin(server: Server, request: Request, body: CountTokensRequest) -> Conversation:
    choice = body.tool_choice
    template = TemplateFields(tools=_tools(body))
    if body.messages and body.messages[-1].role == "assistant":  # its beginning is given, the model goes on
        template.continue_final_message = True
    if body.thinking is not None:
        template.chat_template_kwargs = _thinking(server, body.thinking)
    return await begin_conversation(
        server,
        await off_loop(request.state.body_size, _messages, body),
        template,
        tool_choice=_tool_choice(choice),
        parallel=not (choice and choice.disable_parallel_tool_use),
        effort=body.output_config.effort if body.output_config else None,
        names={"reasoning_effort": "output_config.effort"},
    )


def _thinking(server: Server, thinking: Thinking) -> dict[str, Any]:
    kind = thinking.type
    if kind == "adaptive":
        raise BadField(
            "thinking.type", "thinking.type: `adaptive` is not supported, use `enabled` or `disabled`", "unsupported_field"
        )
    if thinking.budget_tokens is not None:
        text = "thinking.budget_tokens is not supported: leave it out; `max_tokens` bounds thinking and answer together"
        raise BadField("thinking.budget_tokens", text, "unsupported_field")
    if kind == "enabled" and "enable_thinking" not in (server.engine.tokenizer.chat_template or ""):
        text = "thinking: the chat template of this model has no switch for it"
        raise BadField("thinking", text, "unsupported_field")
    return {"enable_thinking": kind == "enabled"}


async def _params(server: Server, body: MessagesRequest, turn: Conversation) -> SamplingParams:
    options: dict[str, Any] = {"max_tokens": body.max_tokens, "stop": body.stop_sequences or ()}
    form = body.output_config.format if body.output_config else None
    field = "output_config.format"
    structured = None if form is None else await server.grammars.make(field, "json_schema", schema_text(form.schema))
    options |= await constraint_of(server, structured, turn, field)
    if turn.needs_special_tokens:
        options["skip_special_tokens"] = False
    return make_params(body, names={"stop": "stop_sequences"}, **options)


# --- in


def _messages(body: CountTokensRequest) -> list[ChatMessage]:
    messages = []
    if body.system is not None:
        messages.append(ChatMessage(role="system", content=_text(body.system, "system")))
    for index, turn in enumerate(body.messages):
        messages += _turn(turn, f"messages[{index}]")
    return messages


def _text(content: str | list[dict[str, Any]], where: str) -> str:
    if isinstance(content, list):
        text_of_parts(content, ("text",), where)  # names what is not text before it names unknown fields of it
        for index, part in enumerate(content):
            convert(part, TextBlock, f"{where}[{index}]")
    return text_of_parts(content, ("text",), where)


def _turn(turn: InputTurn, where: str) -> list[ChatMessage]:
    """One turn is one message; results of tools become messages of their own, before the rest of the user's turn."""
    if isinstance(turn.content, str):
        return [ChatMessage(role=turn.role, content=turn.content)]
    message = ChatMessage(role=turn.role)
    texts: list[str] = []
    results: list[ChatMessage] = []
    for index, raw in enumerate(turn.content):
        block = _block(raw, f"{where}.content[{index}]")
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, ThinkingBlock):
            message.reasoning = (message.reasoning or "") + block.thinking
        elif isinstance(block, ToolUseBlock):
            call = FunctionCall(name=block.name, arguments=json.dumps(block.input, ensure_ascii=False))
            message.tool_calls = [*(message.tool_calls or []), ToolCall(id=block.id, function=call)]
        else:
            results.append(_result(block, f"{where}.content[{index}].content"))
    if texts or not results:
        message.content = "\n".join(texts) if texts or not message.tool_calls else None
        results.append(message)
    return results


def _block(raw: dict[str, Any], where: str) -> Any:
    kind = raw.get("type")
    if not isinstance(kind, str) or kind not in BLOCKS:
        raise BadField(where, f"{where} is of type {str(kind)[:40]!r}; supported are {', '.join(BLOCKS)}")
    return convert(raw, BLOCKS[kind], where)


def _result(block: ToolResultBlock, where: str) -> ChatMessage:
    text = _text(block.content, where)
    return ChatMessage(role="tool", tool_call_id=block.tool_use_id, content=f"Error: {text}" if block.is_error else text)


def _tools(body: CountTokensRequest) -> list[Tool] | None:
    if body.tools is None:
        return None
    tools = []
    for index, raw in enumerate(body.tools):
        where, kind = f"tools[{index}]", raw.get("type")
        if kind not in (None, "custom"):
            raise BadField(where, f"{where} is of type {str(kind)[:40]!r}; only tools that the client runs are supported")
        tool = convert(raw, CustomTool, where)
        tools.append(Tool(function=FunctionTool(name=tool.name, description=tool.description, parameters=tool.input_schema)))
    return tools


def _tool_choice(choice: AnthropicToolChoice | None) -> ToolChoice:
    if choice is None:
        return None
    if (choice.name is not None) != (choice.type == "tool"):
        raise BadField("tool_choice", "tool_choice: name goes with type 'tool', and only with it")
    return CHOICES[choice.type] if choice.name is None else NamedToolChoice(function=FunctionName(name=choice.name))


# --- out

Event = MessageStart | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop


class Writer:
    """One message: whole, or event by event."""

    def __init__(self, server: Server, identity: Identity, turn: Conversation) -> None:
        self._identity = identity
        self._reader = TurnReader(turn, server.engine.tokenizer)
        self._items = Items()
        self._ending = Ending(stop_reason="end_turn", stop_sequence=None)

    def whole(self, output: GenerationOutput) -> MessageReply:
        for delta in Deltas(1).take(output):
            for _ in self._read(delta, output):
                pass
        return self._message(output, [self._block(item) for item in self._items.all], self._ending)

    async def events(self, stream: Outputs) -> AsyncIterator[bytes]:
        deltas, output = Deltas(1), None
        async with aclosing(stream) as growing:  # type: ignore[type-var]
            async for output in growing:
                events = [event for delta in deltas.take(output) for event in self._read(delta, output)]
                if events:
                    yield b"".join(map(named_event, events))
        if output is not None:
            yield named_event(MessageDelta(type="message_delta", delta=self._ending, usage=_usage(output)))
            yield named_event(MessageStop(type="message_stop"))

    def _read(self, delta: Delta, output: GenerationOutput) -> Iterator[Event]:
        if delta.is_first:
            yield MessageStart(type="message_start", message=self._message(output, [], None))
        for change, item, text in self._items.feed(self._reader.read(delta)):
            yield self._event_of(change, item, text)
        if delta.finish_reason is not None:
            self._ending = self._ending_of(delta)
            for change, item, text in self._items.close():
                yield self._event_of(change, item, text)

    def _event_of(self, change: str, item: Item, text: str) -> Event:
        if change == "open":
            return BlockStart(type="content_block_start", index=item.index, content_block=self._block(item, is_open=True))
        if change == "close":
            return BlockStop(type="content_block_stop", index=item.index)
        growth = (
            InputGrowth(partial_json=text)
            if item.kind == "call"
            else ThinkingGrowth(thinking=text)
            if item.kind == "reasoning"
            else TextGrowth(text=text)
        )
        return BlockDelta(type="content_block_delta", index=item.index, delta=growth)

    def _block(self, item: Item, is_open: bool = False) -> BlockReply:
        text = "" if is_open else item.text
        if item.kind == "reasoning":
            return ThinkingReply(thinking=text, signature="")
        if item.kind == "text":
            return TextReply(text=text)
        return ToolUseReply(id=item.call_id, name=item.name, input=_arguments(text))

    def _ending_of(self, delta: Delta) -> Ending:
        reason = self._reader.finish_reason(delta)
        if reason == "stop" and isinstance(delta.stop_reason, str):
            return Ending(stop_reason="stop_sequence", stop_sequence=delta.stop_reason)
        return Ending(stop_reason=STOP_REASONS.get(reason or "", "end_turn"), stop_sequence=None)

    def _message(self, output: GenerationOutput, content: list[BlockReply], ending: Ending | None) -> MessageReply:
        return MessageReply(
            id=self._identity.id,
            type="message",
            role="assistant",
            model=self._identity.model,
            content=content,
            stop_reason=ending and ending.stop_reason,
            stop_sequence=ending and ending.stop_sequence,
            usage=_usage(output),
        )


def _arguments(text: str) -> dict[str, Any]:
    """The protocol wants an object even where the model broke off in the middle of one."""
    try:
        arguments = msgspec.json.decode(text or "{}")
    except msgspec.DecodeError:
        arguments = None
    return arguments if isinstance(arguments, dict) else {}


def _usage(output: GenerationOutput) -> AnthropicUsage:
    """Here, `input_tokens` leaves out what came from the cache."""
    num_cached = output.metrics.num_cached_tokens
    return AnthropicUsage(
        input_tokens=len(output.prompt_token_ids) - num_cached,
        cache_read_input_tokens=num_cached,
        cache_creation_input_tokens=0,
        output_tokens=sum(len(completion.token_ids) for completion in output.completions),
    )


routes = [
    Route(PATH, create_message, methods=["POST"]),
    Route(COUNT_PATH, count_tokens, methods=["POST"]),
]
