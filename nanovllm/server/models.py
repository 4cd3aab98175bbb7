"""GET /v1/models and /v1/models/{id}: the one model of this server."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nanovllm.server.prompts import check_model
from nanovllm.server.protocol import Model, ModelList
from nanovllm.server.respond import json_response

if TYPE_CHECKING:
    from nanovllm.server.context import Server


async def list_models(request: Request) -> Response:
    return json_response(ModelList(object="list", data=[_model(request.app.state.server)]))


async def get_model(request: Request) -> Response:
    server: Server = request.app.state.server
    check_model(server, request.path_params["model"])
    return json_response(_model(server))


def _model(server: Server) -> Model:
    return Model(
        id=server.model_name,
        object="model",
        created=server.started_at,
        owned_by="nanovllm",
        max_model_len=server.engine.facts.max_model_len,
    )


routes = [
    Route("/v1/models", list_models, methods=["GET"]),
    Route("/v1/models/{model:path}", get_model, methods=["GET"]),
]
