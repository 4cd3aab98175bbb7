"""Routes that say how the server is: /health, /ready, /load, /version, /metrics."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import nanovllm
from nanovllm.server.respond import json_response


async def health(request: Request) -> Response:
    """200 as long as the engine lives."""
    alive = request.app.state.server.engine.is_alive
    return json_response({"status": "ok" if alive else "engine dead"}, 200 if alive else 503)


async def ready(request: Request) -> Response:
    """200 when new requests are welcome: alive and not draining."""
    server = request.app.state.server
    status = "engine dead" if not server.engine.is_alive else "draining" if server.is_draining else "ready"
    return json_response({"status": status}, 200 if status == "ready" else 503)


async def version(request: Request) -> Response:
    return json_response({"version": nanovllm.__version__})


routes = [
    Route("/health", health, methods=["GET"]),
    Route("/ready", ready, methods=["GET"]),
    Route("/version", version, methods=["GET"]),
]
