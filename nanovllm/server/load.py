"""Routes that say how the server is: /health, /ready, /load, /version, /metrics.

/health and /ready are open to everybody and answer from memory: a probe must not wait for a busy engine. The numbers of
/load and /metrics are those of all front ends together, whichever of them is asked.
"""

from __future__ import annotations

import asyncio
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import nanovllm
from nanovllm.errors import NanoVllmError
from nanovllm.server.metrics import render
from nanovllm.server.respond import json_response

STATS_TIMEOUT_S = 5.0  # a step of a large batch may take a while


async def health(request: Request) -> Response:
    """200 as long as the engine lives; 503 afterwards. For liveness probes."""
    is_alive = request.app.state.server.engine.is_alive
    return json_response({"status": "ok" if is_alive else "engine dead"}, 200 if is_alive else 503)


async def ready(request: Request) -> Response:
    """200 when new requests are welcome: the engine lives and nobody is draining. For readiness probes."""
    server = request.app.state.server
    status = "engine dead" if not server.engine.is_alive else "draining" if server.is_draining else "ready"
    return json_response({"status": status}, 200 if status == "ready" else 503)


async def load(request: Request) -> Response:
    """`server_load` is vLLM's: requests in flight. The rest says where they are."""
    server = request.app.state.server
    gauges, stats = server.all_counts().gauges, await engine_stats(server)
    return json_response(
        {
            "server_load": int(gauges["requests_open"]),
            "queued": int(gauges["requests_queued"]),
            "waiting": stats.get("num_waiting", 0),
            "running": stats.get("num_running", 0),
            "free_kv_blocks": stats.get("num_free_blocks", 0),
            "kv_blocks": stats.get("num_kv_blocks", 0),
            "draining": server.is_draining,
        }
    )


async def metrics(request: Request) -> Response:
    server = request.app.state.server
    facts = server.engine.facts
    stats = await engine_stats(server)
    text = render(server.all_counts(), stats, server.model_name, {**facts.config, "num_gpu_blocks": facts.num_kv_blocks})
    return Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST})


async def version(request: Request) -> Response:
    return json_response({"version": nanovllm.__version__})


async def engine_stats(server: Any) -> dict[str, Any]:
    """Empty when the engine does not answer."""
    try:
        return await asyncio.wait_for(server.engine.stats(), STATS_TIMEOUT_S)
    except (NanoVllmError, asyncio.TimeoutError):
        return {}


routes = [
    Route("/health", health, methods=["GET"]),
    Route("/ready", ready, methods=["GET"]),
    Route("/load", load, methods=["GET"]),
    Route("/version", version, methods=["GET"]),
    Route("/metrics", metrics, methods=["GET"]),
]
