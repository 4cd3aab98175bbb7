"""Params: from the fields of a request to `SamplingParams`, and to the grammar that its output must follow.

Owns the names: what is wrong is reported under the name that the client used, with its value's reason. Ranges are
checked by `SamplingParams` itself. Knows nothing of prompts or of HTTP beyond the error for a bad field.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nanovllm.errors import InvalidSamplingParams
from nanovllm.sampling_params import SamplingParams, StructuredOutput
from nanovllm.server.errors import BadField
from nanovllm.server.protocol import GenerationFields, JsonSchema, ResponseFormat, StructuredOutputs

if TYPE_CHECKING:
    from nanovllm.server.context import Server
    from nanovllm.server.conversation import Conversation

MAX_TOKEN_IDS = 2**18  # more than any vocabulary has
SAME_NAME = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "n",
    "seed",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "allowed_token_ids",
    "bad_words",
    "prompt_logprobs",
    "skip_special_tokens",
)


def make_params(body: Any, *, names: Mapping[str, str] | None = None, **options: Any) -> SamplingParams:
    """The params of a request: its fields of the same name, then `options`.

    `names`: parameter -> the request's name for it, where they differ.
    """
    given = {name: value for name in SAME_NAME if (value := getattr(body, name, None)) is not None}
    for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
        if len(getattr(body, name, None) or ()) > MAX_TOKEN_IDS:
            raise BadField(name, f"{name} has more than {MAX_TOKEN_IDS} entries")
    bias = getattr(body, "logit_bias", None)
    if bias is not None:
        given["logit_bias"] = {_token_id(key): value for key, value in bias.items()}
    try:
        return SamplingParams(**{**given, **options})
    except InvalidSamplingParams as error:
        message = str(error)
        match = re.match(r"[a-z_]+", message)
        own_name = match[0] if match else ""
        name = (names or {}).get(own_name, own_name)
        raise BadField(name, name + message.removeprefix(own_name)) from None


def _token_id(key: str) -> int:
    if not (key.isascii() and key.isdecimal() and len(key) <= 10):
        raise BadField("logit_bias", f"logit_bias: the keys must be token ids, got {key[:40]!r}")
    return int(key)


# --- structured output


async def structured_of(server: Server, body: GenerationFields) -> StructuredOutput | None:
    """The form that a completion or chat asks for. One at most; it is known to compile."""
    found = [
        *_from_response_format(body.response_format),
        *_from_structured_outputs(body.structured_outputs),
        *_from_guided(body),
    ]
    if len(found) > 1:
        raise BadField(found[1][0], f"{found[0][0]} and {found[1][0]} each ask for a form of the output; send only one of them")
    return await server.grammars.make(*found[0]) if found else None


async def constraint_of(server: Server, form: StructuredOutput | None, turn: Conversation, field: str) -> dict[str, Any]:
    """Of a chat: the params' option for `form`, or for the call that the model has to make. `field`: asked for `form`."""
    call = turn.constraint
    if call is not None:
        if form is not None:
            raise BadField("tool_choice", f"a required tool call has a form of its own; leave out {field}")
        form = await server.grammars.make("tools", call.kind, call.value)  # type: ignore[arg-type]
    return {} if form is None else {"structured": turn.after_reasoning(form)}


def schema_text(schema: Any) -> str:
    """A JSON schema as text. Clients may send it as text themselves."""
    return schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False)


Found = tuple[str, str, str | tuple[str, ...]]  # the client's field, kind, value


def _from_response_format(wanted: ResponseFormat | None) -> list[Found]:
    if wanted is None:
        return []
    if (wanted.json_schema is not None) != (wanted.type == "json_schema"):
        raise BadField("response_format", "response_format: json_schema goes with type 'json_schema', and only with it")
    return from_format("response_format", wanted.type, wanted.json_schema)


def from_format(field: str, kind: str, schema: JsonSchema | None) -> list[Found]:
    if kind == "text":
        return []
    if schema is None:
        return [(field, "json_object", "")]
    if schema.schema is None:
        raise BadField(field, f"{field}: json_schema needs a schema")
    return [(field, "json_schema", schema_text(schema.schema))]


def _from_structured_outputs(wanted: StructuredOutputs | None) -> list[Found]:
    if wanted is None:
        return []
    name = "structured_outputs"
    found = _keyed(name + ".", wanted.json, wanted.regex, wanted.choice, wanted.grammar)
    if wanted.json_object:
        found.append((name + ".json_object", "json_object", ""))
    if not found:
        raise BadField(name, f"{name} is empty; give json, json_object, regex, choice or grammar")
    return found


def _from_guided(body: GenerationFields) -> list[Found]:
    return _keyed("guided_", body.guided_json, body.guided_regex, body.guided_choice, body.guided_grammar)


def _keyed(prefix: str, schema: Any, regex: str | None, choice: list[str] | None, grammar: str | None) -> list[Found]:
    found: list[Found] = []
    if schema is not None:
        found.append((prefix + "json", "json_schema", schema_text(schema)))
    if regex is not None:
        found.append((prefix + "regex", "regex", regex))
    if choice is not None:
        found.append((prefix + "choice", "choice", tuple(choice)))
    if grammar is not None:
        found.append((prefix + "grammar", "grammar", grammar))
    return found
