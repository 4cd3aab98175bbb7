"""Anthropic protocol: the structs of POST /v1/messages. Beside `protocol.py`, which explains how they are used."""

from __future__ import annotations

from typing import Any, Literal

from nanovllm.server.protocol import Body, Reply

# --- requests


class CacheControl(Body, kw_only=True):
    """Taken inside of blocks and tools, where clients put it by habit: prefixes are cached without it."""

    type: Literal["ephemeral"]
    ttl: str | None = None


class TextBlock(Body, kw_only=True):
    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None
    citations: None = None


class ThinkingBlock(Body, kw_only=True):
    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class ToolUseBlock(Body, kw_only=True):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    cache_control: CacheControl | None = None
    caller: dict[str, Any] | None = None


class ToolResultBlock(Body, kw_only=True):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[dict[str, Any]] = ""
    is_error: bool | None = None
    cache_control: CacheControl | None = None


Block = TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock
BLOCKS: dict[str, type[Block]] = {
    "text": TextBlock,
    "thinking": ThinkingBlock,
    "tool_use": ToolUseBlock,
    "tool_result": ToolResultBlock,
}


class InputTurn(Body, kw_only=True):
    role: Literal["user", "assistant", "system"]
    content: str | list[dict[str, Any]]


class CustomTool(Body, kw_only=True):
    name: str
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None
    cache_control: CacheControl | None = None
    strict: bool | None = None


class AnthropicToolChoice(Body, kw_only=True):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Body, kw_only=True):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Any = None


class OutputFormat(Body, kw_only=True):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(Body, kw_only=True):
    format: OutputFormat | None = None
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None


class MessageMetadata(Body, kw_only=True):
    user_id: str | None = None


class CountTokensRequest(Body, kw_only=True):
    messages: list[InputTurn]
    model: str | None = None
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: AnthropicToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None


class MessagesRequest(CountTokensRequest, kw_only=True):
    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    metadata: MessageMetadata | None = None
    service_tier: str | None = None


# --- responses


class TextReply(Reply, kw_only=True, tag="text", tag_field="type"):
    text: str


class ThinkingReply(Reply, kw_only=True, tag="thinking", tag_field="type"):
    thinking: str
    signature: str


class ToolUseReply(Reply, kw_only=True, tag="tool_use", tag_field="type"):
    id: str
    name: str
    input: dict[str, Any]


BlockReply = TextReply | ThinkingReply | ToolUseReply


class AnthropicUsage(Reply, kw_only=True):
    input_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int
    output_tokens: int


class MessageReply(Reply, kw_only=True):
    id: str
    type: str
    role: str
    model: str
    content: list[BlockReply]
    stop_reason: str | None
    stop_sequence: str | None
    usage: AnthropicUsage


class TokenCount(Reply, kw_only=True):
    input_tokens: int


# --- events of a stream


class MessageStart(Reply, kw_only=True):
    type: str
    message: MessageReply


class BlockStart(Reply, kw_only=True):
    type: str
    index: int
    content_block: BlockReply


class TextGrowth(Reply, kw_only=True, tag="text_delta", tag_field="type"):
    text: str


class ThinkingGrowth(Reply, kw_only=True, tag="thinking_delta", tag_field="type"):
    thinking: str


class InputGrowth(Reply, kw_only=True, tag="input_json_delta", tag_field="type"):
    partial_json: str


class BlockDelta(Reply, kw_only=True):
    type: str
    index: int
    delta: TextGrowth | ThinkingGrowth | InputGrowth


class BlockStop(Reply, kw_only=True):
    type: str
    index: int


class Ending(Reply, kw_only=True):
    stop_reason: str
    stop_sequence: str | None


class MessageDelta(Reply, kw_only=True):
    type: str
    delta: Ending
    usage: AnthropicUsage


class MessageStop(Reply, kw_only=True):
    type: str


class AnthropicErrorDetail(Reply, kw_only=True):
    type: str
    message: str


class AnthropicError(Reply, kw_only=True):
    type: str
    error: AnthropicErrorDetail
    request_id: str | None = None
