"""Errors on the wire: which status and body an error becomes, and what a client may know of it.

The body has OpenAI's shape, `{"error": {"message", "type", "param", "code"}}`; under /v1/messages it has Anthropic's. What
was not raised on purpose becomes "internal error" with the id of the request: no text of it, no path and no traceback
leaves the process, the log has them. Knows no routes; read next: `context.py`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from nanovllm.errors import (
    CacheTooSmall,
    CapacityError,
    EngineDead,
    InvalidPrompt,
    NanoVllmError,
    NotFinite,
    PromptTooLong,
    RequestError,
)

log = logging.getLogger("nanovllm.server")

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
PROMPT_FIELDS = {  # which field the prompt came in
    "/v1/completions": "prompt",
    "/v1/chat/completions": "messages",
    "/v1/messages": "messages",
    "/v1/responses": "input",
    "/v1/embeddings": "input",
}
MAX_PARAM = 200  # characters; the name of an unknown field is the client's
MAX_MESSAGE = 2000  # characters; a message may quote what the client sent


class HttpError(NanoVllmError):
    """An answer other than success. `param`: the field that is to blame; `code`: for programs; `headers`: to add."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.type = type or TYPES.get(status, "api_error")
        self.headers = dict(headers or {})


class BadField(HttpError):
    """400: one field of the body is malformed, unknown or not supported."""

    def __init__(self, param: str | None, message: str, code: str | None = None) -> None:
        super().__init__(400, message, param=param and param[:MAX_PARAM], code=code)


class QueueFull(HttpError):
    """429: no place in the queue, or the key has used up its share. `Retry-After` says when there may be one, in seconds."""

    def __init__(self, message: str, retry_after: int, code: str = "queue_full") -> None:
        super().__init__(429, message, code=code, headers={"Retry-After": str(retry_after)})


class Unavailable(HttpError):
    """503: draining, or nothing could be started in time."""

    def __init__(self, message: str, retry_after: int, code: str) -> None:
        super().__init__(503, message, code=code, headers={"Retry-After": str(retry_after)})


class DeadlineExceeded(HttpError):
    """504: the request ran longer than `request_timeout_s`."""

    def __init__(self, seconds: float) -> None:
        super().__init__(504, f"the request was not finished within request_timeout_s={seconds:g}", code="request_timeout")


class ClientGone(HttpError):
    """The client closed the connection. Nobody reads the answer; 499 is for the log."""

    def __init__(self) -> None:
        super().__init__(499, "the client closed the connection", code="client_gone")


def as_http_error(error: BaseException, request_id: str = "", path: str = "") -> HttpError:
    """What the client is told about any error. Logs those that nobody raised on purpose."""
    if isinstance(error, HttpError):
        return error
    param = getattr(error, "param", None)
    if param is None and isinstance(error, (PromptTooLong, CacheTooSmall, InvalidPrompt)):
        param = PROMPT_FIELDS.get(path)
    if isinstance(error, (PromptTooLong, CacheTooSmall)):
        return HttpError(400, str(error), param=param, code="context_length_exceeded")
    if isinstance(error, RequestError):
        return HttpError(400, str(error), param=param or _field_of(str(error)))
    if isinstance(error, NotFinite):
        return HttpError(500, str(error), type="api_error", code="nonfinite_logits")
    if isinstance(error, CapacityError):
        return HttpError(503, str(error), headers={"Retry-After": "1"})
    if isinstance(error, EngineDead):
        return HttpError(503, "the engine has stopped; this server is shutting down", type="api_error", code="engine_dead")
    log.error("request %s: internal error", request_id, exc_info=error)
    return HttpError(500, f"internal error (request {request_id})", type="api_error", code="internal_error")


def error_body(error: BaseException, request_id: str = "", path: str = "") -> tuple[int, dict[str, Any]]:
    """(status, body in OpenAI's shape)."""
    known = as_http_error(error, request_id, path)
    body = {"message": _clean(known.message), "type": known.type, "param": known.param, "code": known.code}
    return known.status, {"error": body}


def encoded_error(path: str, error: BaseException, request_id: str = "") -> bytes:
    """The JSON of an error, in the shape that the clients of `path` expect."""
    _, body = error_body(error, request_id, path)
    if path.startswith("/v1/messages"):
        body = {"type": "error", **body, "request_id": request_id or None}
    return msgspec.json.encode(body)


def error_event(path: str, error: BaseException, request_id: str = "") -> bytes:
    """The server-sent event that ends a stream which had begun."""
    name = b"event: error\n" if path.startswith("/v1/messages") else b""
    return name + b"data: " + encoded_error(path, error, request_id) + b"\n\n"


def _field_of(message: str) -> str | None:
    """ "temperature=3 is outside ..." and "stop has 65 entries ..." name their field first."""
    match = re.match(r"([a-z][a-z_]*[a-z])(?:=| must | has | holds | is |\[|:)", message)
    return match[1] if match and ("_" in match[1] or message[match.end(1)] == "=") else None


def _clean(message: str) -> str:
    """Bounded, and without characters that are half of a pair."""
    return message[:MAX_MESSAGE].encode("utf-8", "replace").decode()
