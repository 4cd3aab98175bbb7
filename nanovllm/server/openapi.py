"""GET /openapi.json: the service as an OpenAPI 3.1 document, made from the structs that it really decodes and encodes.

`OPERATIONS` is the list of what there is; a test compares it with the routes. The document is made once per process.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import nanovllm
from nanovllm.server import anthropic_protocol, protocol, responses_protocol, restored
from nanovllm.server.respond import json_response

STREAMS = "With `stream: true` the answer is `text/event-stream`."


@dataclass(frozen=True, slots=True)
class Operation:
    """`reply`: a struct; None: any JSON object; str: plain text."""

    method: str
    path: str
    summary: str
    body: type | None = None
    reply: type | None = None
    streams: bool = False
    is_open: bool = False  # needs no key
    parameters: tuple[str, ...] = ()  # of the path


OPERATIONS = [
    Operation("post", "/v1/completions", "Complete prompts", protocol.CompletionRequest, protocol.CompletionResponse, True),
    Operation("post", "/v1/chat/completions", "Answer a chat", protocol.ChatRequest, protocol.ChatResponse, True),
    Operation(
        "post",
        "/v1/responses",
        "Answer items, without state",
        responses_protocol.ResponsesRequest,
        responses_protocol.ResponsesResponse,
        True,
    ),
    Operation("post", "/v1/embeddings", "Texts to vectors", protocol.EmbeddingRequest, protocol.EmbeddingResponse),
    Operation(
        "post",
        "/v1/messages",
        "Answer a chat, Anthropic's API",
        anthropic_protocol.MessagesRequest,
        anthropic_protocol.MessageReply,
        True,
    ),
    Operation(
        "post",
        "/v1/messages/count_tokens",
        "Count the tokens of a chat, Anthropic's API",
        anthropic_protocol.CountTokensRequest,
        anthropic_protocol.TokenCount,
    ),
    Operation("get", "/v1/models", "The model of this server", reply=protocol.ModelList),
    Operation("get", "/v1/models/{model}", "One model", reply=protocol.Model, parameters=("model",)),
    Operation("get", "/v1/restored", "What was restored after a crash, of this key", reply=restored.RestoredList),
    Operation(
        "get",
        "/v1/restored/{request_id}",
        "The answers of one restored call, by its x-request-id",
        reply=restored.RestoredList,
        parameters=("request_id",),
    ),
    Operation("post", "/tokenize", "Text or a chat to token ids", protocol.TokenizeRequest, protocol.TokenizeResponse),
    Operation("post", "/detokenize", "Token ids to text", protocol.DetokenizeRequest, protocol.DetokenizeResponse),
    Operation("get", "/health", "200 while the engine lives", is_open=True),
    Operation("get", "/ready", "200 while new requests are welcome", is_open=True),
    Operation("get", "/load", "What runs and what waits"),
    Operation("get", "/version", "The version of nanovllm"),
    Operation("get", "/metrics", "Prometheus metrics", reply=str),
    Operation("get", "/openapi.json", "This document"),
]
ERRORS = {
    400: "A field is malformed, unknown, or not supported; `param` names it",
    401: "The API key is missing or unknown",
    403: "The API key may not do this",
    404: "There is no such model or route",
    408: "The body did not arrive in time",
    413: "The body is too long",
    415: "The body is encoded",
    429: "No place in the queue, or the key's share is used up; see Retry-After",
    500: "A fault of the server",
    503: "Draining, overloaded, or the engine is dead",
    504: "The request took too long",
}


async def show_document(request: Request) -> Response:
    return json_response(document())


@functools.cache
def document() -> dict[str, Any]:
    structs = [struct for one in OPERATIONS for struct in (one.body, one.reply) if struct not in (None, str)]
    structs += [protocol.ErrorResponse, anthropic_protocol.AnthropicError]
    _, schemas = msgspec.json.schema_components(structs, ref_template="#/components/schemas/{name}")
    paths: dict[str, Any] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _described(operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "nanovllm",
            "version": nanovllm.__version__,
            "description": "Which fields are honoured, and how: docs/server/fields.md.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
        "security": [{"bearer": []}, {"x-api-key": []}],
    }


def _described(operation: Operation) -> dict[str, Any]:
    error = "AnthropicError" if operation.path.startswith("/v1/messages") else "ErrorResponse"
    refused = {str(status): {"description": text, "content": _content(_reference(error))} for status, text in ERRORS.items()}
    described: dict[str, Any] = {
        "summary": operation.summary,
        "operationId": _operation_id(operation),
        "responses": {"200": _success(operation), **refused},
    }
    if operation.is_open:
        described["security"] = []
    if operation.parameters:
        described["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in operation.parameters
        ]
    if operation.body is not None:
        described["requestBody"] = {"required": True, "content": _content(_reference(operation.body.__name__))}
    if operation.streams:
        described["description"] = STREAMS
    return described


def _operation_id(operation: Operation) -> str:
    words = operation.path.strip("/").replace(".", "/").replace("{", "").replace("}", "").split("/")
    return "_".join([operation.method, *words])


def _success(operation: Operation) -> dict[str, Any]:
    if operation.reply is str:
        return {"description": operation.summary, "content": {"text/plain": {"schema": {"type": "string"}}}}
    content = _content({"type": "object"} if operation.reply is None else _reference(operation.reply.__name__))
    if operation.streams:
        content["text/event-stream"] = {}
    return {"description": operation.summary, "content": content}


def _content(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _reference(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


routes = [Route("/openapi.json", show_document, methods=["GET"])]
