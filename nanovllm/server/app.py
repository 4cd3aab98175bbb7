"""The ASGI application: layers around the routes, from outside to inside.

    Gate            request id, header size, refusal while draining, access log; turns every error into an answer
    CORS            only where origins are named
    Answering       the same error answers, inside CORS, so that browsers can read them
    Authentication  who is it (`auth.py`)
    Router          the routes of the endpoint modules

The error handling is ours at every level, so that no framework page, path or traceback can leave.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import re
import time
import uuid
from collections.abc import Iterable
from itertools import count
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers, State
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Router

from nanovllm.log import Fields
from nanovllm.server.auth import Authentication, Keyring
from nanovllm.server.context import Server
from nanovllm.server.errors import ClientGone, HttpError, Unavailable, as_http_error, encoded_error
from nanovllm.server.options import ServerOptions
from nanovllm.server.shared import SharedFolder

if TYPE_CHECKING:
    from nanovllm.engine.async_engine import AsyncEngine

access_log = logging.getLogger("nanovllm.access")

ENDPOINT_MODULES = (  # their routes are tried in this order
    "completions",
    "chat",
    "responses",
    "anthropic",
    "embeddings",
    "load",
    "admin",
    "tokenize",
    "models",
    "restored",
    "openapi",
    "page",
)
NEVER_REFUSED = ("/health", "/ready", "/metrics", "/load", "/version")  # answered while draining, too
REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


class App:
    """The ASGI callable. Handlers find it as `request.app`, and its `Server` as `request.app.state.server`."""

    def __init__(self, server: Server, keyring: Keyring, routes: Iterable[Any], open_paths: Iterable[str] = ()) -> None:
        self.server = server
        self.state = State({"server": server})
        options = server.options
        layers: Any = Router(list(routes), redirect_slashes=False)
        layers = Answering(Authentication(layers, keyring, options, open_paths))
        origins = options.origins
        if origins:
            layers = CORSMiddleware(layers, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
        self._layers = Gate(layers, server, self)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._layers(scope, receive, send)


def create_app(
    engine: AsyncEngine,
    options: ServerOptions,
    keyring: Keyring | None = None,
    *,
    routes: Iterable[Any] | None = None,
    shared: SharedFolder | None = None,
) -> App:
    """`keyring`: None: that of the environment and of `api_key_file`. `routes`: None: all endpoint modules."""
    modules = [importlib.import_module(name) for name in _endpoint_modules()]
    open_paths = [path for module in modules for path in getattr(module, "open_paths", ())]
    if routes is None:
        routes = [route for module in modules for route in module.routes]
    server = Server(engine, options, shared=shared)
    return App(server, Keyring.load(options) if keyring is None else keyring, routes, open_paths)


def _endpoint_modules() -> list[str]:
    names = [f"nanovllm.server.{name}" for name in ENDPOINT_MODULES]
    return [name for name in names if importlib.util.find_spec(name) is not None]


class Gate:
    """The outermost layer: nothing passes it without a request id, and nothing leaves it unlogged."""

    def __init__(self, app: Any, server: Server, owner: App) -> None:
        self.app, self.server, self.owner = app, server, owner
        self._prefix, self._numbers = uuid.uuid4().hex[:12], count()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await _decline(scope, receive, send)
            return
        scope["app"] = self.owner
        state = scope.setdefault("state", {})
        state["arrived"], state["request_id"] = time.monotonic(), self._request_id(scope["headers"])
        ended: float | None = None  # when the last byte was sent
        counts = not scope["path"].startswith(("/admin/", *NEVER_REFUSED))
        self.server.num_open += counts
        status = 0

        async def watch(message: Any) -> None:
            nonlocal status, ended
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", state["request_id"].encode())]
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                ended = time.monotonic()

        try:
            await answer_errors(self._admit, scope, receive, watch)
        finally:
            self.server.num_open -= counts
            if "gone" in state:
                state["gone"].cancel()
            self._log(scope, status)
            if self.server.options.tells_requests and "records" in state:
                self.server.report(scope, ended)

    async def _admit(self, scope: Any, receive: Any, send: Any) -> None:
        size = sum(len(name) + len(value) for name, value in scope["headers"])
        limit = self.server.options.max_header_bytes
        if size > limit:
            message = f"the headers are longer than max_header_bytes={limit}"
            raise HttpError(431, message, code="headers_too_large", headers={"Connection": "close"})
        if self.server.is_draining and not scope["path"].startswith("/admin/") and scope["path"] not in NEVER_REFUSED:
            error = Unavailable("the server is shutting down", round(self.server.options.drain_timeout_s) or 1, "shutting_down")
            error.headers["Connection"] = "close"
            raise error
        await self.app(scope, receive, send)

    def _request_id(self, headers: Iterable[tuple[bytes, bytes]]) -> str:
        """The client's own x-request-id if it is harmless, else a new one."""
        for name, value in headers:
            if name == b"x-request-id" and REQUEST_ID.fullmatch(value):
                return value.decode()
        return f"req-{self._prefix}-{next(self._numbers)}"

    def _log(self, scope: Any, status: int) -> None:
        """One line of JSON: metadata only. A query string is not in it, because people put keys there."""
        status = status or 499
        self.server.metrics.count("nanovllm:http_responses", str(status))
        if not self.server.options.access_log or not access_log.isEnabledFor(logging.INFO):
            return
        state = scope["state"]
        line = Fields(
            time=round(time.time(), 3),
            id=state["request_id"],
            key=state["key"].name if "key" in state else None,
            method=scope["method"],
            path=scope["path"][:200],
            status=status,
            seconds=round(time.monotonic() - state["arrived"], 4),
        )
        records = state.get("records", ())
        if records:
            line["completions"] = [record.describe() for record in records[:16]]
        access_log.info(line)


class Answering:
    """Errors to answers, for what is inside."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await answer_errors(self.app, scope, receive, send)


async def answer_errors(app: Any, scope: Any, receive: Any, send: Any) -> None:
    """Run `app`; what it raises before its answer has begun becomes the answer."""
    has_begun = False

    async def watch(message: Any) -> None:
        nonlocal has_begun
        has_begun = True
        await send(message)

    try:
        await app(scope, receive, watch)
    except Exception as error:
        known = as_http_error(_translated(error, scope), scope["state"]["request_id"], scope["path"])
        if has_begun or isinstance(known, ClientGone):
            return  # the server closes a connection whose answer is not complete
        body = encoded_error(scope["path"], known, scope["state"]["request_id"])
        headers = {"content-type": "application/json", "content-length": str(len(body)), **known.headers}
        await send({"type": "http.response.start", "status": known.status, "headers": Headers(headers).raw})
        await send({"type": "http.response.body", "body": body})


def _translated(error: Exception, scope: Any) -> Exception:
    """The router's errors, in our words."""
    if not isinstance(error, HTTPException):
        return error
    what = {404: "there is no such route", 405: "this route does not take this method"}.get(error.status_code, error.detail)
    return HttpError(error.status_code, f"{what}: {scope['method']} {scope['path'][:200]}", headers=error.headers)


async def _decline(scope: Any, receive: Any, send: Any) -> None:
    """Scopes that are not HTTP: there is nothing to start or stop in here, and no websocket."""
    if scope["type"] == "lifespan":
        for answer in ("lifespan.startup.complete", "lifespan.shutdown.complete"):
            await receive()
            await send({"type": answer})
    elif scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1008})
