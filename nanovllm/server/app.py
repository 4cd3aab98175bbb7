"""The ASGI application: layers around the routes, from outside to inside.

    Gate            request id, header size, refusal while draining, access log; turns every error into an answer
    CORS            only where origins are named
    Authentication  who is it (`auth.py`)
    Router          the routes of the endpoint modules

The error handling is ours at every level, so that no framework page, path or traceback can leave.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import time
import uuid
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers, State
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Router

from nanovllm.server.auth import Authentication, Keyring
from nanovllm.server.context import Server
from nanovllm.server.errors import ClientGone, HttpError, as_http_error, encoded_error
from nanovllm.server.options import ServerOptions

if TYPE_CHECKING:
    from nanovllm.engine.async_engine import AsyncEngine

access = logging.getLogger("nanovllm.access")

ENDPOINT_MODULES = ("load", "admin", "completions", "chat", "responses", "embeddings", "tokenize", "models", "anthropic", "page")
ALWAYS_OPEN = ("/health", "/ready", "/metrics", "/load", "/version")  # answered while draining, too


def create_app(engine: AsyncEngine, options: ServerOptions, keyring: Keyring | None = None, routes: Any = None) -> Any:
    """The ASGI app. `.server` of the result is its `Server`."""
    server = Server(engine, options)
    router = Router(endpoint_routes() if routes is None else routes, redirect_slashes=False)
    app: Any = Authentication(router, keyring or Keyring.load(options), options)
    origins = [origin.strip() for origin in options.cors_origins.split(",") if origin.strip()]
    if origins:
        app = CORSMiddleware(app, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    return Gate(app, server)


def endpoint_routes() -> list[Any]:
    routes: list[Any] = []
    for name in ENDPOINT_MODULES:
        if importlib.util.find_spec(f"nanovllm.server.{name}") is not None:
            routes += importlib.import_module(f"nanovllm.server.{name}").routes
    return routes


class Gate:
    """The outermost layer."""

    def __init__(self, app: Any, server: Server) -> None:
        self.app, self.server = app, server
        self.state = State({"server": server})  # what handlers find as request.app.state

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            raise NotImplementedError
        state = scope.setdefault("state", {})
        state["request_id"], state["arrived"] = f"req-{uuid.uuid4().hex[:24]}", time.monotonic()
        scope["app"] = self
        begun = False

        async def watch(message: Any) -> None:
            nonlocal begun
            begun = begun or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, watch)
        except Exception as error:
            if begun:
                raise
            await _answer(scope, send, error)


async def _answer(scope: Any, send: Any, error: BaseException) -> None:
    if isinstance(error, HTTPException):
        error = HttpError(error.status_code, f"{error.detail}: {scope['method']} {scope['path'][:200]}")
    known = as_http_error(error, scope["state"]["request_id"])
    if isinstance(known, ClientGone):
        return
    body = encoded_error(scope["path"], known)
    headers = {"content-type": "application/json", "content-length": str(len(body)), **known.headers}
    await send({"type": "http.response.start", "status": known.status, "headers": Headers(headers).raw})
    await send({"type": "http.response.body", "body": body})
