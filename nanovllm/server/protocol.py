"""Protocol: what OpenAI-style clients send and receive, as msgspec structs.

A request struct has exactly the fields that `fields.py` calls honoured; anything else is refused before it is decoded.
`None` means "left out" everywhere. Ranges are checked by `SamplingParams` and by the endpoint, types by msgspec. In a
response, a field with a default is left out when it has that value; a field without one is always written. The structs
of /v1/responses and /v1/messages are in `responses_protocol.py` and `anthropic_protocol.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct


class Body(Struct, kw_only=True, forbid_unknown_fields=True):
    """A request body, or an object inside of one."""


class Reply(Struct, kw_only=True, omit_defaults=True):
    """A response body, or an object inside of one."""


# --- parts of requests


class StreamOptions(Body, kw_only=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchema(Body, kw_only=True):
    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | bool | None = None
    strict: bool | None = None


class ResponseFormat(Body, kw_only=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Body, kw_only=True):
    """One of them. vLLM's other keys are refused as unknown."""

    json: dict[str, Any] | str | bool | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class FunctionTool(Body, kw_only=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body, kw_only=True):
    function: FunctionTool
    type: Literal["function"] = "function"


class FunctionName(Body, kw_only=True):
    name: str


class NamedToolChoice(Body, kw_only=True):
    function: FunctionName
    type: Literal["function"] = "function"


class FunctionCall(Body, kw_only=True):
    name: str
    arguments: str = "{}"


class ToolCall(Body, kw_only=True):
    function: FunctionCall
    id: str | None = None
    type: Literal["function"] = "function"
    index: int | None = None  # clients that put stream deltas together keep it


class ChatMessage(Body, kw_only=True):
    """What clients get back from a server may be sent again as it is: fields that are empty for text are known here."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Meta(max_length=0)] | None = None


# --- requests


class PromptFields(Body, kw_only=True):
    """How a prompt becomes token ids, and whose cache it may use: of every endpoint that runs the model."""

    model: str | None = None
    user: str | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left", "right"] | None = None
    add_special_tokens: bool | None = None
    priority: int | None = None
    request_id: str | None = None
    cache_salt: str | None = None


class GenerationFields(PromptFields, kw_only=True):
    """What completions and chats have in common."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool | None = None
    max_tokens: int | None = None
    echo: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None


class CompletionRequest(GenerationFields, kw_only=True):
    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None
    best_of: int | None = None


class TemplateFields(Body, kw_only=True):
    """How messages become a prompt."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None


class ChatRequest(GenerationFields, kw_only=True):
    messages: list[ChatMessage]
    add_generation_prompt: bool | None = None  # these four are those of TemplateFields: structs have one parent
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    include_reasoning: bool | None = None
    documents: list[dict[str, Any]] | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    modalities: list[str] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None


Template = TemplateFields | ChatRequest  # whatever has the fields


class EmbeddingRequest(PromptFields, kw_only=True):
    input: str | list[str | int | list[int]] | None = None
    messages: list[ChatMessage] | None = None
    encoding_format: Literal["float", "base64"] | None = None
    embed_dtype: Literal["float32", "float16"] | None = None
    endianness: Literal["little", "native", "big"] | None = None
    use_activation: bool | None = None
    pooling: Literal["mean", "last"] | None = None


class TokenizeRequest(TemplateFields, kw_only=True):
    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Body, kw_only=True):
    tokens: list[int]
    model: str | None = None


# --- responses


class PromptTokensDetails(Reply, kw_only=True):
    cached_tokens: int


class CompletionTokensDetails(Reply, kw_only=True):
    reasoning_tokens: int


class Usage(Reply, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None
    completion_tokens_details: CompletionTokensDetails | None = None


class Candidate(Reply, kw_only=True):
    """One entry of `prompt_logprobs`, keyed by its token id."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, Candidate] | None]  # nothing precedes the first token


class CompletionLogprobs(Reply, kw_only=True):
    """Four lists of one length. `text_offset` counts characters from the start of the choice's text."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(Reply, kw_only=True):
    """Of an answer, and of a chunk of it: then text, logprobs and ids are those of the chunk."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None


class CompletionResponse(Reply, kw_only=True):
    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class TopLogprob(Reply, kw_only=True):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprobs(Reply, kw_only=True):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Reply, kw_only=True):
    content: list[TokenLogprobs]


class FunctionCallReply(Reply, kw_only=True):
    """In a stream, the first delta of a call has the name, the others fragments of the arguments."""

    name: str | None = None
    arguments: str | None = None


class ToolCallReply(Reply, kw_only=True):
    function: FunctionCallReply
    id: str | None = None
    type: str | None = None
    index: int | None = None


class AssistantMessage(Reply, kw_only=True):
    role: str
    content: str | None
    reasoning: str | None = None
    tool_calls: list[ToolCallReply] | None = None


class ChatChoice(Reply, kw_only=True):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatResponse(Reply, kw_only=True):
    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None


class ChatDelta(Reply, kw_only=True):
    role: str | None = None
    content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCallReply] | None = None


class ChatChunkChoice(Reply, kw_only=True):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class Embedding(Reply, kw_only=True):
    index: int
    object: str
    embedding: list[float] | str  # a string: base64 of the numbers


class EmbeddingUsage(Reply, kw_only=True):
    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(Reply, kw_only=True):
    id: str
    object: str
    created: int
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage


class TokenizeResponse(Reply, kw_only=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeResponse(Reply, kw_only=True):
    prompt: str


class Model(Reply, kw_only=True):
    id: str
    object: str
    created: int
    owned_by: str
    max_model_len: int


class ModelList(Reply, kw_only=True):
    object: str
    data: list[Model]


class ErrorDetail(Reply, kw_only=True):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(Reply, kw_only=True):
    error: ErrorDetail
