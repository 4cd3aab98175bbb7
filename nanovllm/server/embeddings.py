"""POST /v1/embeddings: one vector per input, from the final hidden states of the loaded model."""

from __future__ import annotations

import asyncio
import base64
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nanovllm.server.answers import Identity
from nanovllm.server.errors import BadField
from nanovllm.server.fields import refused
from nanovllm.server.prompts import check_model, encode_prompt, plain_messages, read_prompts, render
from nanovllm.server.protocol import Embedding, EmbeddingRequest, EmbeddingResponse, EmbeddingUsage, TemplateFields
from nanovllm.server.respond import json_response

if TYPE_CHECKING:
    from nanovllm.server.context import Server

PATH = "/v1/embeddings"
REFUSED = refused(PATH)
BYTE_ORDERS: dict[str, Literal["<", ">", "="]] = {"little": "<", "big": ">", "native": "="}


async def create_embeddings(request: Request) -> Response:
    server: Server = request.app.state.server
    body = await server.read(request, EmbeddingRequest, REFUSED)
    check_model(server, body.model)
    if body.encoding_format != "base64" and (body.embed_dtype or body.endianness):
        raise BadField("encoding_format", "embed_dtype and endianness go with encoding_format='base64'")
    prompts = await _prompts(server, body)
    identity = Identity.of(server, request, "embd-", body.request_id)
    results = await server.run(request, _embed_all(server, request, prompts, body))
    num_tokens = sum(result.num_prompt_tokens for result in results)
    vectors = [_encoded(np.asarray(result.embedding, np.float32), body) for result in results]
    answer = EmbeddingResponse(
        id=identity.id,
        object="list",
        created=identity.created,
        model=identity.model,
        data=[Embedding(index=index, object="embedding", embedding=vector) for index, vector in enumerate(vectors)],
        usage=EmbeddingUsage(prompt_tokens=num_tokens, total_tokens=num_tokens),
    )
    return json_response(answer)


async def _prompts(server: Server, body: EmbeddingRequest) -> list[list[int]]:
    if (body.input is None) == (body.messages is None):
        raise BadField("input", "give either input or messages")
    if body.messages is not None:
        text = await render(server, plain_messages(server, body.messages), TemplateFields(add_generation_prompt=False), None)
        return [await encode_prompt(server, text, body, 0, special=False)]
    return [await encode_prompt(server, one, body, 0) for one in read_prompts(server, body.input or [], "input")]


async def _embed_all(server: Server, request: Request, prompts: list[list[int]], body: EmbeddingRequest) -> list[Any]:
    """All at once; if one fails, the others are cancelled."""
    tasks = [
        asyncio.ensure_future(
            server.embed(request, prompt, body.pooling or "mean", priority=body.priority or 0, cache_salt=body.cache_salt)
        )
        for prompt in prompts
    ]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _encoded(vector: np.ndarray, body: EmbeddingRequest) -> list[float] | str:
    if body.use_activation is not False:
        vector = vector / max(float(np.linalg.norm(vector)), 1e-12)
    if body.encoding_format != "base64":
        return vector.tolist()
    dtype = np.dtype(body.embed_dtype or "float32").newbyteorder(BYTE_ORDERS[body.endianness or "little"])
    return base64.b64encode(vector.astype(dtype).tobytes()).decode()


routes = [Route(PATH, create_embeddings, methods=["POST"])]
