"""POST /v1/responses: OpenAI's Responses API without state. Items in, items out, or a stream of named events.

Nothing is stored: a client sends the earlier items again. What a field means stands in `fields.py`. The translation to
messages is `_messages`; the events are made by `Writer`, in the order that the API prescribes.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nanovllm.outputs import GenerationOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.server.answers import Identity, begin, token_names, whole_reply
from nanovllm.server.chat import check_metadata, check_service
from nanovllm.server.conversation import Conversation, Item, Items, TurnReader, begin_conversation
from nanovllm.server.errors import BadField
from nanovllm.server.fields import refused
from nanovllm.server.logprobs import chat_logprobs
from nanovllm.server.params import constraint_of, from_format, make_params, structured_of
from nanovllm.server.prompts import check_model, convert, off_loop, text_of_parts
from nanovllm.server.protocol import (
    ChatMessage,
    FunctionCall,
    FunctionName,
    FunctionTool,
    GenerationFields,
    JsonSchema,
    NamedToolChoice,
    TemplateFields,
    TokenLogprobs,
    Tool,
    ToolCall,
)
from nanovllm.server.responses_protocol import (
    INPUT_ITEMS,
    ArgumentsEvent,
    FlatFunctionTool,
    FlatToolChoice,
    InputFunctionCall,
    InputFunctionOutput,
    InputMessage,
    InputReasoning,
    InputTokensDetails,
    ItemEvent,
    OutputCall,
    OutputItem,
    OutputMessage,
    OutputReasoning,
    OutputText,
    OutputTokensDetails,
    PartEvent,
    ReasoningConfig,
    ReasoningText,
    ResponseEvent,
    ResponsesRequest,
    ResponsesResponse,
    ResponsesUsage,
    TextConfig,
    TextEvent,
    TextFormat,
)
from nanovllm.server.streaming import Delta, Deltas, Outputs, finished, named_event, usage_of

if TYPE_CHECKING:
    from nanovllm.server.context import Server

PATH = "/v1/responses"
REFUSED = refused(PATH)
ID_PREFIXES = {"text": "msg_", "reasoning": "rs_", "call": "fc_"}
TEXT_PARTS = ("input_text", "output_text", "text")


async def create_response(request: Request) -> Response:
    server: Server = request.app.state.server
    body = await server.read(request, ResponsesRequest, REFUSED)
    check_model(server, body.model)
    check_service(body.store, body.service_tier)
    check_metadata(body.metadata)
    if body.background:
        raise BadField("background", "background=true is not supported: nothing is stored")
    turn = await begin_conversation(
        server,
        await off_loop(request.state.body_size, _messages, server, body),
        TemplateFields(tools=_tools(body)),
        tool_choice=_tool_choice(body.tool_choice),
        parallel=body.parallel_tool_calls,
        include_reasoning=body.include_reasoning,
        effort=body.reasoning.effort if body.reasoning else None,
        names={"reasoning_effort": "reasoning.effort", "enable_thinking": "reasoning.effort"},
    )
    params = await _params(server, body, turn)
    token_ids = await server.engine.encode(turn.prompt, False)
    identity = Identity.of(server, request, "resp_")
    writer = Writer(server, body, params, identity, turn)
    streams = begin(server, request, [token_ids], params, body, identity)
    if body.stream:
        return server.sse(request, writer.events(streams[0]))
    outputs = await server.run(request, finished(streams))
    return await whole_reply(params, writer.whole, outputs[0])


async def _params(server: Server, body: ResponsesRequest, turn: Conversation) -> SamplingParams:
    options: dict[str, Any] = {"max_tokens": body.max_output_tokens}
    if body.include:
        options["logprobs"] = body.top_logprobs or 0
    elif body.top_logprobs:
        raise BadField("top_logprobs", 'top_logprobs needs include=["message.output_text.logprobs"]')
    structured = await structured_of(server, GenerationFields(structured_outputs=body.structured_outputs))
    form = body.text.format if body.text else None
    if form is not None:
        schema = JsonSchema(schema=form.schema) if form.type == "json_schema" else None
        found = from_format("text.format", form.type, schema)
        if found and structured is not None:
            raise BadField("structured_outputs", "structured_outputs and text.format exclude each other; send only one of them")
        structured = await server.grammars.make(*found[0]) if found else structured
    options |= await constraint_of(server, structured, turn, "text.format")
    if turn.needs_special_tokens:
        options["skip_special_tokens"] = False
    return make_params(body, names={"max_tokens": "max_output_tokens", "logprobs": "top_logprobs"}, **options)


# --- in


def _messages(server: Server, body: ResponsesRequest) -> list[ChatMessage]:
    messages = [ChatMessage(role="system", content=body.instructions)] if body.instructions else []
    if isinstance(body.input, str):
        return [*messages, ChatMessage(role="user", content=body.input)]
    if not body.input:
        raise BadField("input", "input is an empty list; give at least one item")
    if len(body.input) > server.options.max_messages:
        text = f"input has {len(body.input)} items; at most max_messages={server.options.max_messages} are allowed"
        raise BadField("input", text)
    reasoning: str | None = None  # belongs to what the assistant does next
    for index, raw in enumerate(body.input):
        where = f"input[{index}]"
        item = _item(raw, where)
        if isinstance(item, InputReasoning):
            reasoning = text_of_parts(item.content or item.summary or [], ("reasoning_text", "summary_text"), where)
        elif isinstance(item, InputMessage):
            content = text_of_parts(item.content, TEXT_PARTS, f"{where}.content")
            messages.append(
                ChatMessage(role=item.role, content=content, reasoning=reasoning if item.role == "assistant" else None)
            )
            reasoning = None
        elif isinstance(item, InputFunctionOutput):
            content = text_of_parts(item.output, TEXT_PARTS, f"{where}.output")
            messages.append(ChatMessage(role="tool", content=content, tool_call_id=item.call_id))
        else:
            _add_call(messages, item, reasoning)
            reasoning = None
    return messages


def _item(raw: dict[str, Any], where: str) -> Any:
    kind = raw.get("type") or "message"
    if not isinstance(kind, str) or kind not in INPUT_ITEMS:
        raise BadField(where, f"{where} is of type {str(kind)[:40]!r}; supported are {', '.join(INPUT_ITEMS)}")
    return convert({**raw, "type": kind}, INPUT_ITEMS[kind], where)


def _add_call(messages: list[ChatMessage], item: InputFunctionCall, reasoning: str | None) -> None:
    """Calls of one turn belong to one message."""
    call = ToolCall(id=item.call_id, function=FunctionCall(name=item.name, arguments=item.arguments))
    if messages and messages[-1].role == "assistant":
        messages[-1].tool_calls = [*(messages[-1].tool_calls or []), call]
    else:
        messages.append(ChatMessage(role="assistant", tool_calls=[call], reasoning=reasoning))


def _tools(body: ResponsesRequest) -> list[Tool] | None:
    if body.tools is None:
        return None
    tools = []
    for index, raw in enumerate(body.tools):
        where, kind = f"tools[{index}]", raw.get("type")
        if kind != "function":
            raise BadField(where, f"{where} is of type {str(kind)[:40]!r}; only functions are supported")
        flat = convert(raw, FlatFunctionTool, where)
        function = FunctionTool(name=flat.name, description=flat.description, parameters=flat.parameters, strict=flat.strict)
        tools.append(Tool(function=function))
    return tools


def _tool_choice(choice: str | FlatToolChoice | None) -> str | NamedToolChoice | None:
    return NamedToolChoice(function=FunctionName(name=choice.name)) if isinstance(choice, FlatToolChoice) else choice


# --- out

Event = ResponseEvent | ItemEvent | PartEvent | TextEvent | ArgumentsEvent


class Writer:
    """One response: whole, or event by event."""

    def __init__(
        self, server: Server, body: ResponsesRequest, params: SamplingParams, identity: Identity, turn: Conversation
    ) -> None:
        self._body, self._params, self._identity = body, params, identity
        self._names = token_names(server, body, params)
        self._reader = TurnReader(turn, server.engine.tokenizer)
        self._items = Items()
        self._logprobs: dict[int, list[TokenLogprobs]] = {}  # of text items, by index
        self._unsent: list[TokenLogprobs] = []  # of tokens whose text is still held back
        self._is_cut = False  # the last item ended because there was no room for more
        self._num_events = 0

    def whole(self, output: GenerationOutput) -> ResponsesResponse:
        for delta in Deltas(1).take(output):
            for _ in self._read(delta):
                pass
        return self._response(output)

    async def events(self, stream: Outputs) -> AsyncIterator[bytes]:
        deltas, output = Deltas(1), None
        async with aclosing(stream) as growing:  # type: ignore[type-var]
            async for output in growing:
                events = [event for delta in deltas.take(output) for event in self._read(delta)]
                if events:
                    yield b"".join(map(named_event, events))
        if output is not None:
            final = self._response(output)
            yield named_event(ResponseEvent(type=f"response.{final.status}", sequence_number=self._next(), response=final))

    def _read(self, delta: Delta) -> Iterator[Event]:
        """The events of one delta."""
        if delta.is_first:
            yield ResponseEvent(type="response.created", sequence_number=self._next(), response=self._response())
            yield ResponseEvent(type="response.in_progress", sequence_number=self._next(), response=self._response())
        if delta.logprobs:
            self._unsent += chat_logprobs(self._names, delta.logprobs)
        for change, item, text in self._items.feed(self._reader.read(delta)):
            yield from self._events_of(change, item, text)
        if delta.finish_reason is not None:
            self._is_cut = delta.finish_reason != "stop"
            if self._items.all and self._items.all[-1].kind == "text":
                self._take_logprobs(self._items.all[-1])
            for change, item, text in self._items.close():
                yield from self._events_of(change, item, text)

    def _take_logprobs(self, item: Item) -> list[TokenLogprobs]:
        taken, self._unsent = self._unsent, []
        self._logprobs.setdefault(item.index, []).extend(taken)
        return taken

    def _events_of(self, change: str, item: Item, text: str) -> Iterator[Event]:
        place = {"output_index": item.index, "item_id": self._item_id(item)}
        if change == "grow":
            yield self._growth(item, text, place)
            return
        if change == "close":
            yield self._end(item, place)
        phase = "added" if change == "open" else "done"
        output_item = self._output_item(item, is_open=change == "open")
        whole = ItemEvent(type=f"response.output_item.{phase}", sequence_number=0, output_index=item.index, item=output_item)
        part = None
        if item.kind != "call":
            kind = f"response.content_part.{phase}"
            part = PartEvent(type=kind, sequence_number=0, content_index=0, part=self._part(item), **place)
        for event in (whole, part) if change == "open" else (part, whole):
            if event is not None:
                event.sequence_number = self._next()
                yield event

    def _growth(self, item: Item, text: str, place: dict[str, Any]) -> Event:
        if item.kind == "call":
            kind = "response.function_call_arguments.delta"
            return ArgumentsEvent(type=kind, sequence_number=self._next(), delta=text, **place)
        if item.kind == "reasoning":
            return TextEvent(
                type="response.reasoning_text.delta", sequence_number=self._next(), content_index=0, delta=text, **place
            )
        kind, logprobs = "response.output_text.delta", self._take_logprobs(item)
        return TextEvent(type=kind, sequence_number=self._next(), content_index=0, delta=text, logprobs=logprobs, **place)

    def _end(self, item: Item, place: dict[str, Any]) -> Event:
        number = self._next()
        if item.kind == "call":
            kind = "response.function_call_arguments.done"
            return ArgumentsEvent(type=kind, sequence_number=number, arguments=item.text, name=item.name, **place)
        if item.kind == "reasoning":
            return TextEvent(
                type="response.reasoning_text.done", sequence_number=number, content_index=0, text=item.text, **place
            )
        logprobs = self._logprobs.get(item.index, [])
        kind = "response.output_text.done"
        return TextEvent(type=kind, sequence_number=number, content_index=0, text=item.text, logprobs=logprobs, **place)

    def _part(self, item: Item) -> OutputText | ReasoningText:
        if item.kind == "reasoning":
            return ReasoningText(text=item.text)
        return OutputText(text=item.text, annotations=[], logprobs=self._logprobs.get(item.index, []))

    def _item_id(self, item: Item) -> str:
        return f"{ID_PREFIXES[item.kind]}{self._identity.id.removeprefix('resp_')}_{item.index}"

    def _output_item(self, item: Item, is_open: bool = False) -> OutputItem:
        is_last = item.index == len(self._items.all) - 1
        is_cut = self._reader.has_cut_call if item.kind == "call" else self._is_cut
        status = "in_progress" if is_open else "incomplete" if is_cut and is_last else "completed"
        name = self._item_id(item)
        if item.kind == "call":
            return OutputCall(id=name, call_id=item.call_id, name=item.name, arguments=item.text, status=status)
        content = [] if is_open else [self._part(item)]
        if item.kind == "reasoning":
            return OutputReasoning(id=name, status=status, summary=[], content=content)  # type: ignore[arg-type]
        return OutputMessage(id=name, role="assistant", status=status, content=content)  # type: ignore[arg-type]

    def _response(self, output: GenerationOutput | None = None) -> ResponsesResponse:
        """Finished with an output, in progress without."""
        body, params, identity = self._body, self._params, self._identity
        status = "in_progress" if output is None else "incomplete" if self._is_cut else "completed"
        return ResponsesResponse(
            id=identity.id,
            object="response",
            created_at=identity.created,
            completed_at=int(time.time()) if status == "completed" else None,
            status=status,
            model=identity.model,
            output=[] if output is None else [self._output_item(item) for item in self._items.all],
            error=None,
            incomplete_details={"reason": "max_output_tokens"} if status == "incomplete" else None,
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            metadata=body.metadata or {},
            parallel_tool_calls=body.parallel_tool_calls is not False,
            previous_response_id=None,
            reasoning=body.reasoning or ReasoningConfig(),
            store=False,
            background=False,
            temperature=params.temperature,
            top_p=params.top_p,
            text=body.text or TextConfig(format=TextFormat(type="text")),
            tool_choice=body.tool_choice or "auto",
            tools=body.tools or [],
            truncation="disabled",
            usage=None if output is None else self._usage(output),
            service_tier="default" if body.service_tier else None,
            top_logprobs=body.top_logprobs,
            prompt_cache_key=body.prompt_cache_key,
            safety_identifier=body.safety_identifier,
            user=body.user,
        )

    def _usage(self, output: GenerationOutput) -> ResponsesUsage:
        usage = usage_of([output])
        return ResponsesUsage(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=InputTokensDetails(
                cached_tokens=output.metrics.num_cached_tokens,
                cache_write_tokens=usage.prompt_tokens - output.metrics.num_cached_tokens,
            ),
            output_tokens=usage.completion_tokens,
            output_tokens_details=OutputTokensDetails(reasoning_tokens=self._reader.num_reasoning),
            total_tokens=usage.total_tokens,
        )

    def _next(self) -> int:
        self._num_events += 1
        return self._num_events - 1


routes = [Route(PATH, create_response, methods=["POST"])]
