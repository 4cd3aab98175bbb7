"""Fields: what every request field of every endpoint does, or why it is refused. The one table of the service.

Owns the promise "honoured or refused, never ignored". `Server.read` refuses what `refused(endpoint)` names; the structs
of the endpoints have exactly the honoured fields (a test compares them); `docs/server/fields.md` is written from this
table by `scripts/field_table.py`. The names are those of OpenAI, Anthropic and vLLM; the notes say what is not obvious.
Knows nothing of HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Field:
    """One request field of one endpoint. A name with a dot is a field inside an object."""

    name: str
    note: str = ""  # what it does, or which of its values are refused
    refused: str = ""  # the reason; empty: honoured

    @property
    def is_honoured(self) -> bool:
        return not self.refused


def _honoured(**notes: str) -> list[Field]:
    return [Field(name, note=note) for name, note in notes.items()]


def _refused(**reasons: str) -> list[Field]:
    return [Field(name, refused=reason) for name, reason in reasons.items()]


_NO_EFFECT = "names the end user; taken, written to no log, without effect on the answer"
_STATELESS = "the server keeps no state between requests"
_NO_MEDIA = "only text is understood"
_NO_TRANSFER = "the KV cache is not moved between machines"
_PLUGIN = "the server has no plug-ins that could read it"
_HINT = "a hint for routing; one cache serves all, so nothing is left to do"

_MODEL = _honoured(model="the served name, or left out; another name is a 404")

_SAMPLING = _honoured(
    temperature="default 1; 0 is greedy",
    top_p="default 1",
    top_k="default 0 (or -1): all tokens",
    min_p="default 0",
    n="completions per prompt, default 1; at most the server's `max_n`",
    seed="the same seed gives the same tokens, whatever else runs",
    stop="one string or a list; the text ends before it",
    stop_token_ids="ids that end the text, as the model's own end token does",
    include_stop_str_in_output="keep the stop string in the text",
    ignore_eos="go on after the model's end token",
    min_tokens="no end before so many tokens",
    presence_penalty="-2 to 2",
    frequency_penalty="-2 to 2",
    repetition_penalty="default 1",
    logit_bias="keys are token ids written as strings, values -100 to 100",
    allowed_token_ids="nothing else is drawn",
    bad_words="words that are not written",
    prompt_logprobs="candidates per prompt token, in `prompt_logprobs`; of a stream, in the first chunk",
    skip_special_tokens="default true: special tokens are left out of the text",
)

_ENGINE = _honoured(
    stream="answer in server-sent events",
    stream_options="`include_usage`: a last chunk with usage; `continuous_usage_stats`: usage in every chunk",
    truncate_prompt_tokens="keep so many tokens of the prompt; -1: as many as fit",
    truncation_side="`left` (default) keeps the end of the prompt, `right` its beginning",
    add_special_tokens="put the tokenizer's special tokens around the prompt; default true; chats: false, templates write them",
    priority="smaller is more urgent; moves within the class of the API key",
    request_id="becomes the end of the answer's id; must not be in use",
    cache_salt="cached prefixes are shared within one salt only (and within one API key)",
    return_token_ids="adds `token_ids` and `prompt_token_ids`",
    return_tokens_as_token_ids="log-probabilities name tokens as `token_id:123`",
    response_format="`text`, `json_object`, `json_schema`; other types are refused; in chats it holds after the reasoning",
    structured_outputs="`json`, `json_object`, `regex`, `choice` or `grammar`, one of them; the other keys are refused",
    guided_json="older name of `structured_outputs.json`",
    guided_regex="older name of `structured_outputs.regex`",
    guided_choice="older name of `structured_outputs.choice`",
    guided_grammar="older name of `structured_outputs.grammar`",
    user=_NO_EFFECT,
)

_NOT_IN_THE_SAMPLER = _refused(
    use_beam_search="beam search is not implemented; `n` gives several independent completions",
    length_penalty="it belongs to beam search, which is not implemented",
    early_stopping="it belongs to beam search, which is not implemented",
    spaces_between_special_tokens="text is decoded exactly as the tokenizer writes it",
    logprob_token_ids="log-probabilities are reported for the most likely tokens only; use `logprobs` / `top_logprobs`",
    logits_processors="code in a request is never run",
    repetition_detection="not implemented; use `repetition_penalty` or `frequency_penalty`",
    thinking_token_budget="not implemented; use `max_completion_tokens`",
    guided_decoding_backend="there is one grammar engine",
    guided_whitespace_pattern="white space inside JSON is up to the model",
)

_NOT_IN_THE_ENGINE = _refused(
    prompt_embeds="prompts are text or token ids; tensors are not read from requests",
    session_id="requests are not tied to sessions; cached prefixes are found without it",
    return_token_offsets="not implemented; completions with `logprobs` have `text_offset`",
    routed_experts_prompt_start="no expert routing is reported",
    kv_transfer_params=_NO_TRANSFER,
    ec_transfer_params=_NO_TRANSFER,
    vllm_xargs=_PLUGIN,
    stream_interval="every step's tokens are sent at once",
)

_CHAT_TEMPLATE = _honoured(
    add_generation_prompt="open the assistant's turn; default: unless the last message is continued",
    continue_final_message="the answer goes on with the last message",
    chat_template_kwargs="variables for the template, such as `enable_thinking` (false is obeyed by a template that always opens "
    "`<think>`, too); the names that the engine sets are refused",
    tools="functions that the model may call",
)

_NO_REQUEST_TEMPLATE = _refused(chat_template="templates are programs; only the model's own is run")

_NO_MEDIA_OPTIONS = _refused(media_io_kwargs=_NO_MEDIA, mm_processor_kwargs=_NO_MEDIA)

COMPLETIONS = [
    *_MODEL,
    *_honoured(
        prompt="a string, token ids, or a list of either; one answer per prompt and `n`",
        max_tokens="default 16; 0 only with `echo`; more than fits is allowed, and ends with the context",
        echo="the prompt comes first; with `logprobs` its log-probabilities too",
        logprobs="candidates per token",
        best_of="only when it equals `n`: there is no ranking of more completions than are returned",
    ),
    *_SAMPLING,
    *_ENGINE,
    *_refused(suffix="filling in the middle needs a format that the model was trained on, and none is known"),
    *_NOT_IN_THE_SAMPLER,
    *_NOT_IN_THE_ENGINE,
]

CHAT = [
    *_MODEL,
    *_honoured(
        messages="text only: a string or parts of type `text`; role `developer` is shown to the template as `system`",
        max_completion_tokens="default: until the context is full; more than fits is allowed, and ends there",
        max_tokens="older name of `max_completion_tokens`",
        logprobs="true: log-probabilities of the answer's tokens",
        top_logprobs="candidates per token; needs `logprobs`",
        tool_choice="`none`, `auto`, `required`, or one function by name",
        parallel_tool_calls="false: calls after the first one are left out",
        reasoning_effort="handed to the template; refused when the template does not read it; `none`: no reasoning",
        include_reasoning="false: what stands between `<think>` and `</think>` is left out of the answer",
        documents="handed to the template; refused when the template does not read it",
        echo="the last message, when it is the assistant's, comes before the answer",
        metadata="given back with the answer, not stored; up to 16 entries",
        store="only false: nothing is stored",
        service_tier="`auto` and `default`; there are no others",
        modalities='only `["text"]`',
        prompt_cache_key=_HINT,
        safety_identifier=_NO_EFFECT,
    ),
    *_CHAT_TEMPLATE,
    *_SAMPLING,
    *_ENGINE,
    *_refused(
        functions="replaced by `tools`",
        function_call="replaced by `tool_choice`",
        audio=_NO_MEDIA,
        prediction="predicted outputs are not implemented",
        verbosity="no template reads it; say it in a message",
        web_search_options="the server does not search",
        moderation="there is no moderation model",
        prompt_cache_options="prefixes stay cached until their memory is needed",
        prompt_cache_retention="prefixes stay cached until their memory is needed",
        return_prompt_text="use /tokenize with `return_token_strs`",
        return_assistant_tokens_mask="it serves training, not inference",
    ),
    *_NO_REQUEST_TEMPLATE,
    *_NO_MEDIA_OPTIONS,
    *_NOT_IN_THE_SAMPLER,
    *_NOT_IN_THE_ENGINE,
]

RESPONSES = [
    *_MODEL,
    *_honoured(
        input="a string, or messages, `function_call`, `function_call_output` and `reasoning` items; text only",
        instructions="the system message",
        max_output_tokens="default: until the context is full",
        temperature="default 1; 0 is greedy",
        top_p="default 1",
        top_k="default 0: all tokens",
        presence_penalty="-2 to 2",
        frequency_penalty="-2 to 2",
        repetition_penalty="default 1",
        logit_bias="keys are token ids written as strings",
        seed="the same seed gives the same tokens",
        stop="one string or a list",
        ignore_eos="go on after the model's end token",
        stream="answer in server-sent events",
        include="only `message.output_text.logprobs`",
        top_logprobs="candidates per token; needs `include`",
        text="`format`: `text`, `json_object` or `json_schema`; other keys are refused",
        structured_outputs="as for chats",
        tools="functions; built-in tools are refused by type",
        tool_choice="`none`, `auto`, `required`, or one function by name",
        parallel_tool_calls="false: calls after the first one are left out",
        reasoning="`effort`, when the template reads it; other keys are refused",
        include_reasoning="false: reasoning is left out of the answer",
        metadata="given back with the answer, not stored; up to 16 entries",
        store="only false: nothing is stored",
        background="only false",
        truncation="only `disabled`: an input that is too long is a 400",
        service_tier="`auto` and `default`; there are no others",
        priority="smaller is more urgent; moves within the class of the API key",
        cache_salt="cached prefixes are shared within one salt only",
        prompt_cache_key=_HINT,
        user=_NO_EFFECT,
        safety_identifier=_NO_EFFECT,
    ),
    *_refused(
        previous_response_id=_STATELESS + "; send the earlier items in `input`",
        conversation=_STATELESS + "; send the earlier items in `input`",
        prompt="prompt templates are not stored here; send `input`",
        max_tool_calls="it limits built-in tools, and there are none",
        stream_options="the last event has usage; obfuscation is not implemented",
        context_management=_STATELESS,
        background_options="there are no background responses",
        moderation="there is no moderation model",
        image=_NO_MEDIA,
        access_programs="they belong to another service",
        prompt_cache_options="prefixes stay cached until their memory is needed",
        prompt_cache_retention="prefixes stay cached until their memory is needed",
    ),
]

EMBEDDINGS = [
    *_MODEL,
    *_honoured(
        input="a string, token ids, or a list of either",
        messages="instead of `input`: a chat, through the model's template",
        encoding_format="`float` or `base64`",
        embed_dtype="of base64: `float32` (default) or `float16`",
        endianness="of base64: `little` (default), `native` or `big`",
        use_activation="default true: scaled to length 1",
        pooling="`mean` (default) or `last`: of the final hidden states; our own field",
        add_special_tokens="default true, for `messages` false",
        truncate_prompt_tokens="keep so many tokens of the input; -1: as many as fit",
        truncation_side="`left` (default) keeps the end, `right` the beginning",
        priority="smaller is more urgent",
        cache_salt="cached prefixes are shared within one salt only",
        request_id="becomes the end of the answer's id",
        user=_NO_EFFECT,
    ),
    *_refused(dimensions="the model was not trained to be cut; take all of its dimensions"),
]

TOKENIZE = [
    *_MODEL,
    *_honoured(
        prompt="a text, or",
        messages="a chat, through the model's template",
        add_special_tokens="default true, for `messages` false",
        return_token_strs="adds `token_strs`: the tokens as the vocabulary spells them",
    ),
    *_CHAT_TEMPLATE,
    *_NO_REQUEST_TEMPLATE,
    *_NO_MEDIA_OPTIONS,
]

DETOKENIZE = [*_MODEL, *_honoured(tokens="token ids")]

MESSAGES = [
    *_MODEL,
    *_honoured(
        messages="text, `tool_use`, `tool_result` and `thinking` blocks; images and documents are refused by type",
        system="a string or text blocks",
        max_tokens="must be given",
        stop_sequences="the text ends before them; `stop_sequence` says which",
        stream="answer in server-sent events",
        temperature="default 1",
        top_p="default 1",
        top_k="default: all tokens",
        tools="functions; built-in tools are refused by type",
        tool_choice="`auto`, `any`, `tool`, `none`; `disable_parallel_tool_use`",
        thinking="`enabled`, when the template reads `enable_thinking`, and `disabled`; budgets are refused",
        output_config="`format` of type `json_schema`; `effort` when the template reads it",
        metadata="`user_id`: " + _NO_EFFECT,
        service_tier="`auto` and `standard_only`: there is one tier",
    ),
    *_refused(
        container="no code is run here",
        mcp_servers="the server calls no tools itself",
        context_management=_STATELESS,
        cache_control="prefixes are cached by themselves, and stay until their memory is needed",
        inference_geo="there is one machine, this one",
        speed="there is one speed",
        diagnostics="they belong to another service",
        user_profile_id="they belong to another service",
        workspace_id="they belong to another service",
        betas="they belong to another service",
        output_format="replaced by `output_config`",
    ),
]

_COUNTED = ("model", "messages", "system", "tools", "tool_choice", "thinking", "output_config")
_NOT_COUNTED = (
    "cache_control",
    "speed",
    "user_profile_id",
    "workspace_id",
    "mcp_servers",
    "context_management",
    "betas",
    "output_format",
)
COUNT_TOKENS = [field for field in MESSAGES if field.name in (*_COUNTED, *_NOT_COUNTED)]

ENDPOINTS: Mapping[str, list[Field]] = {
    "/v1/completions": COMPLETIONS,
    "/v1/chat/completions": CHAT,
    "/v1/responses": RESPONSES,
    "/v1/embeddings": EMBEDDINGS,
    "/v1/messages": MESSAGES,
    "/v1/messages/count_tokens": COUNT_TOKENS,
    "/tokenize": TOKENIZE,
    "/detokenize": DETOKENIZE,
}


def refused(endpoint: str) -> dict[str, str]:
    """Top-level field -> the reason why it is refused: for `Server.read`."""
    return {field.name: field.refused for field in ENDPOINTS[endpoint] if not field.is_honoured}


def honoured(endpoint: str) -> set[str]:
    return {field.name for field in ENDPOINTS[endpoint] if field.is_honoured}


def render_page() -> str:
    """The text of `docs/server/fields.md`."""
    lines = [
        "# Request fields",
        "",
        "Every field of vLLM's, OpenAI's and Anthropic's requests is honoured, or refused with a 400 that names it. A field",
        "that is not in this table is refused as unknown. `null` always means left out. Defaults are those of this page: a",
        "checkpoint's `generation_config.json` brings end tokens, no sampling values. Written by `scripts/field_table.py` from",
        "`nanovllm/server/fields.py`; do not edit.",
    ]
    for endpoint, table in ENDPOINTS.items():
        lines += ["", f"## POST {endpoint}", "", "| field | honoured | notes |", "| --- | --- | --- |"]
        for field in sorted(table, key=lambda field: (not field.is_honoured, field.name)):
            text = (field.note or field.refused).replace("|", "\\|")
            lines.append(f"| `{field.name}` | {'yes' if field.is_honoured else 'no'} | {text} |")
    return "\n".join(lines) + "\n"
