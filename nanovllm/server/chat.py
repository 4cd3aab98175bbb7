"""POST /v1/chat/completions: messages in, the assistant's message out: text, reasoning, tool calls.

Speaks OpenAI's protocol with vLLM's additions. What a field means stands in `fields.py`; what depends on the model's
template in `conversation.py`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nanovllm.outputs import GenerationOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.server.answers import Identity, begin, token_names, whole_reply
from nanovllm.server.completions import check_stream_options
from nanovllm.server.conversation import Conversation, TurnReader, begin_conversation
from nanovllm.server.errors import BadField
from nanovllm.server.fields import refused
from nanovllm.server.logprobs import chat_logprobs, prompt_logprobs
from nanovllm.server.params import constraint_of, make_params, structured_of
from nanovllm.server.parts import Part, Reasoning, Text, ToolCallArguments, ToolCallStart
from nanovllm.server.prompts import check_model, encode_prompt
from nanovllm.server.protocol import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatRequest,
    ChatResponse,
    FunctionCallReply,
    ToolCallReply,
)
from nanovllm.server.streaming import DONE, ChunkWriter, Delta, Deltas, Outputs, finished, merged, usage_of, usage_options

if TYPE_CHECKING:
    from nanovllm.server.context import Server

PATH = "/v1/chat/completions"
REFUSED = refused(PATH)
MAX_METADATA, MAX_METADATA_KEY, MAX_METADATA_VALUE = 16, 64, 512


async def create_chat_completion(request: Request) -> Response:
    server: Server = request.app.state.server
    body = await server.read(request, ChatRequest, REFUSED)
    check_model(server, body.model)
    _check(body)
    conversation = await begin_conversation(
        server,
        body.messages,
        body,
        tool_choice=body.tool_choice,
        parallel=body.parallel_tool_calls,
        include_reasoning=body.include_reasoning,
        effort=body.reasoning_effort,
        documents=body.documents,
    )
    params = await _params(server, body, conversation)
    ids = await encode_prompt(server, conversation.prompt, body, params.max_tokens or 1, special=False)
    identity = Identity.of(server, request, "chatcmpl-", body.request_id)
    answer = Answer(server, body, params, identity, conversation)
    streams = begin(server, request, [ids], params, body, identity)
    if body.stream:
        return server.sse(request, answer.events(streams))
    outputs = await server.run(request, finished(streams))
    return await whole_reply(params, answer.whole, outputs[0])


def _check(body: ChatRequest) -> None:
    check_stream_options(body)
    check_service(body.store, body.service_tier)
    check_metadata(body.metadata)
    if body.modalities is not None and body.modalities != ["text"]:
        raise BadField("modalities", 'modalities: only ["text"] is supported')
    if body.top_logprobs and not body.logprobs:
        raise BadField("top_logprobs", "top_logprobs needs logprobs=true")
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise BadField("max_tokens", "max_tokens and max_completion_tokens differ; send only max_completion_tokens")


def check_service(store: bool | None, service_tier: str | None, tiers: tuple[str, ...] = ("auto", "default")) -> None:
    if store:
        raise BadField("store", "store=true is not supported: nothing is stored")
    if service_tier is not None and service_tier not in tiers:
        raise BadField("service_tier", f"service_tier={service_tier[:40]!r} does not exist here; there are {' and '.join(tiers)}")


def check_metadata(metadata: dict[str, str] | None) -> None:
    """OpenAI's limits."""
    for key, value in (metadata or {}).items():
        if len(key) > MAX_METADATA_KEY or len(value) > MAX_METADATA_VALUE:
            text = f"keys have at most {MAX_METADATA_KEY} characters, values {MAX_METADATA_VALUE}"
            raise BadField("metadata", f"metadata: {text}")
    if len(metadata or ()) > MAX_METADATA:
        raise BadField("metadata", f"metadata has {len(metadata or ())} entries; at most {MAX_METADATA} are allowed")


async def _params(server: Server, body: ChatRequest, conversation: Conversation) -> SamplingParams:
    options: dict[str, Any] = {}
    names = {"logprobs": "top_logprobs"}
    if body.logprobs:
        options["logprobs"] = body.top_logprobs or 0
    max_tokens = body.max_completion_tokens
    if max_tokens is None:
        max_tokens = body.max_tokens
    else:
        names["max_tokens"] = "max_completion_tokens"
    form = await structured_of(server, body)
    options |= await constraint_of(server, form, conversation, "response_format")
    if conversation.needs_special_tokens:
        if body.skip_special_tokens:
            raise BadField("skip_special_tokens", "skip_special_tokens=true would hide the marks of tool calls; leave it out")
        options["skip_special_tokens"] = False
    return make_params(body, names=names, max_tokens=max_tokens, **options)


class Answer:
    """One answer: whole, or chunk by chunk."""

    def __init__(
        self, server: Server, body: ChatRequest, params: SamplingParams, identity: Identity, conversation: Conversation
    ) -> None:
        self._body, self._params, self._identity = body, params, identity
        self._names = token_names(server, body, params)
        self._readers = [TurnReader(conversation, server.engine.tokenizer) for _ in range(params.n)]
        self._has_reasoning = conversation.has_reasoning
        self._echo = _echo(body)

    def whole(self, output: GenerationOutput) -> ChatResponse:
        choices = []
        for delta in Deltas(self._params.n).take(output):
            reader = self._readers[delta.index]
            grown = delta_of(reader.read(delta))
            content = self._echo + (grown.content or "")
            message = AssistantMessage(
                role="assistant",
                content=None if grown.tool_calls and not content else content,
                reasoning=grown.reasoning,
                tool_calls=_without_index(grown.tool_calls),
            )
            choices.append(
                ChatChoice(
                    index=delta.index,
                    message=message,
                    logprobs=self._logprobs(delta),
                    finish_reason=reader.finish_reason(delta),
                    stop_reason=delta.stop_reason,
                    token_ids=delta.token_ids if self._body.return_token_ids else None,
                )
            )
        return ChatResponse(
            **self._identity.head("chat.completion"),
            choices=choices,
            usage=self._usage(output),
            metadata=self._body.metadata,
            service_tier="default" if self._body.service_tier else None,
            **self._prompt_fields(output),
        )

    async def events(self, streams: list[Outputs]) -> AsyncIterator[bytes]:
        include_usage, continuous = usage_options(self._body)
        writer = ChunkWriter(self._identity.head("chat.completion.chunk"), include_usage)
        deltas = Deltas(self._params.n)
        output = None
        async with aclosing(merged(streams)) as growing:
            async for _, output in growing:
                chunks: list[bytes] = []
                for delta in deltas.take(output):
                    if delta.is_first:
                        chunks.append(self._opening(writer, delta, output))
                    choice = self._chunk_choice(delta)
                    if choice is not None and continuous:
                        chunks.append(writer.chunk_with(choice, usage=self._usage(output)))
                    elif choice is not None:
                        chunks.append(writer.chunk(choice))
                if chunks:
                    yield b"".join(chunks)
        if include_usage and output is not None:
            yield writer.chunk_with(None, usage=self._usage(output))
        yield DONE

    def _opening(self, writer: ChunkWriter, delta: Delta, output: GenerationOutput) -> bytes:
        """The first chunk of a choice: the role, and what belongs to the prompt."""
        opening = ChatDelta(role="assistant", content=self._echo)
        choice = ChatChunkChoice(index=delta.index, delta=opening, logprobs=None, finish_reason=None)
        extra = self._prompt_fields(output) if delta.index == 0 else {}
        return writer.chunk_with(choice, **extra) if extra else writer.chunk(choice)

    def _chunk_choice(self, delta: Delta) -> ChatChunkChoice | None:
        """None: nothing that the client could see has come yet."""
        reader = self._readers[delta.index]
        parts = reader.read(delta)
        if not (parts or delta.finish_reason or self._body.logprobs or self._body.return_token_ids):
            return None
        return ChatChunkChoice(
            index=delta.index,
            delta=delta_of(parts),
            logprobs=self._logprobs(delta),
            finish_reason=reader.finish_reason(delta),
            stop_reason=delta.stop_reason,
            token_ids=delta.token_ids if self._body.return_token_ids else None,
        )

    def _logprobs(self, delta: Delta) -> ChatLogprobs | None:
        return None if delta.logprobs is None else ChatLogprobs(content=chat_logprobs(self._names, delta.logprobs))

    def _prompt_fields(self, output: GenerationOutput) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        if self._body.return_token_ids:
            fields["prompt_token_ids"] = output.prompt_token_ids
        if self._body.prompt_logprobs is not None:
            fields["prompt_logprobs"] = prompt_logprobs(self._names, output.prompt_logprobs, self._body.prompt_logprobs)
        return fields

    def _usage(self, output: GenerationOutput) -> Any:
        num_reasoning = sum(reader.num_reasoning for reader in self._readers)
        return usage_of([output], num_reasoning if self._has_reasoning else None)


def _echo(body: ChatRequest) -> str:
    """The text of the last message, if the answer goes on with it."""
    last = body.messages[-1]
    return last.content if body.echo and last.role == "assistant" and isinstance(last.content, str) else ""


def delta_of(parts: list[Part]) -> ChatDelta:
    """Parts in OpenAI's shape: text and reasoning joined, pieces of each call together."""
    delta = ChatDelta()
    calls: dict[int, ToolCallReply] = {}
    for part in parts:
        if isinstance(part, Text):
            delta.content = (delta.content or "") + part.text
        elif isinstance(part, Reasoning):
            delta.reasoning = (delta.reasoning or "") + part.text
        elif isinstance(part, ToolCallStart):
            function = FunctionCallReply(name=part.name, arguments="")
            calls[part.index] = ToolCallReply(index=part.index, id=part.call_id, type="function", function=function)
        elif isinstance(part, ToolCallArguments):
            call = calls.setdefault(part.index, ToolCallReply(index=part.index, function=FunctionCallReply(arguments="")))
            call.function.arguments = (call.function.arguments or "") + part.fragment
    if calls:
        delta.tool_calls = list(calls.values())
    return delta


def _without_index(calls: list[ToolCallReply] | None) -> list[ToolCallReply] | None:
    """In a whole answer the place in the list is the index."""
    for call in calls or ():
        call.index = None
    return calls


routes = [Route(PATH, create_chat_completion, methods=["POST"])]
