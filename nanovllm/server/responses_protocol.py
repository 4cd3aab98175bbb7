"""Responses protocol: the structs of POST /v1/responses. Beside `protocol.py`, which explains how they are used.

Items of the input are read one by one (`INPUT_ITEMS`), because a message may leave out its type. Items of the output are
tagged with theirs.
"""

from __future__ import annotations

from typing import Any, Literal

from nanovllm.server.protocol import Body, FunctionTool, Reply, StructuredOutputs, TokenLogprobs

# --- requests


class InputMessage(Body, kw_only=True):
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[dict[str, Any]]
    type: Literal["message"] = "message"
    id: str | None = None
    status: str | None = None
    phase: None = None


class InputFunctionCall(Body, kw_only=True):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None


class InputFunctionOutput(Body, kw_only=True):
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[dict[str, Any]]
    id: str | None = None
    status: str | None = None


class InputReasoning(Body, kw_only=True):
    type: Literal["reasoning"]
    summary: list[dict[str, Any]] | None = None
    content: list[dict[str, Any]] | None = None
    id: str | None = None
    status: str | None = None
    encrypted_content: None = None


InputItem = InputMessage | InputFunctionCall | InputFunctionOutput | InputReasoning
INPUT_ITEMS: dict[str, type[InputItem]] = {
    "message": InputMessage,
    "function_call": InputFunctionCall,
    "function_call_output": InputFunctionOutput,
    "reasoning": InputReasoning,
}


class FlatFunctionTool(FunctionTool, kw_only=True):
    type: Literal["function"]


class FlatToolChoice(Body, kw_only=True):
    type: Literal["function"]
    name: str


class TextFormat(Body, kw_only=True):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class TextConfig(Body, kw_only=True):
    format: TextFormat | None = None


class ReasoningConfig(Body, kw_only=True):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None


class ResponsesRequest(Body, kw_only=True):
    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    include: list[Literal["message.output_text.logprobs"]] | None = None
    top_logprobs: int | None = None
    text: TextConfig | None = None
    structured_outputs: StructuredOutputs | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningConfig | None = None
    include_reasoning: bool | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    background: bool | None = None
    truncation: Literal["disabled"] | None = None
    service_tier: str | None = None
    priority: int | None = None
    cache_salt: str | None = None
    prompt_cache_key: str | None = None
    user: str | None = None
    safety_identifier: str | None = None


# --- responses


class OutputText(Reply, kw_only=True, tag="output_text", tag_field="type"):
    text: str
    annotations: list[Any]
    logprobs: list[TokenLogprobs] | None = None


class ReasoningText(Reply, kw_only=True, tag="reasoning_text", tag_field="type"):
    text: str


class OutputMessage(Reply, kw_only=True, tag="message", tag_field="type"):
    id: str
    role: str
    status: str
    content: list[OutputText]


class OutputReasoning(Reply, kw_only=True, tag="reasoning", tag_field="type"):
    id: str
    status: str
    summary: list[Any]
    content: list[ReasoningText]


class OutputCall(Reply, kw_only=True, tag="function_call", tag_field="type"):
    id: str
    call_id: str
    name: str
    arguments: str
    status: str


OutputItem = OutputMessage | OutputReasoning | OutputCall


class InputTokensDetails(Reply, kw_only=True):
    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(Reply, kw_only=True):
    reasoning_tokens: int


class ResponsesUsage(Reply, kw_only=True):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponsesResponse(Reply, kw_only=True):
    id: str
    object: str
    created_at: int
    status: str  # in_progress, completed, incomplete
    model: str
    output: list[OutputItem]
    error: None
    incomplete_details: dict[str, str] | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: ReasoningConfig
    store: bool
    background: bool
    temperature: float
    top_p: float
    text: TextConfig
    tool_choice: str | FlatToolChoice
    tools: list[dict[str, Any]]
    truncation: str
    usage: ResponsesUsage | None
    service_tier: str | None = None
    top_logprobs: int | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    user: str | None = None
    completed_at: int | None = None


# --- events of a stream, numbered from 0


class ResponseEvent(Reply, kw_only=True):
    type: str  # response.created, .in_progress, .completed, .incomplete
    sequence_number: int
    response: ResponsesResponse


class ItemEvent(Reply, kw_only=True):
    type: str  # response.output_item.added, .done
    sequence_number: int
    output_index: int
    item: OutputItem


class PartEvent(Reply, kw_only=True):
    type: str  # response.content_part.added, .done
    sequence_number: int
    output_index: int
    content_index: int
    item_id: str
    part: OutputText | ReasoningText


class TextEvent(Reply, kw_only=True):
    """Of text and of reasoning; the latter has no logprobs."""

    type: str  # response.output_text.delta, response.reasoning_text.done, ...
    sequence_number: int
    output_index: int
    content_index: int
    item_id: str
    delta: str | None = None
    text: str | None = None
    logprobs: list[TokenLogprobs] | None = None


class ArgumentsEvent(Reply, kw_only=True):
    type: str  # response.function_call_arguments.delta, .done
    sequence_number: int
    output_index: int
    item_id: str
    delta: str | None = None
    arguments: str | None = None
    name: str | None = None
