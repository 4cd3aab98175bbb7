"""POST /tokenize and /detokenize: text to token ids as the model would see it, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nanovllm.server.errors import BadField
from nanovllm.server.fields import refused
from nanovllm.server.prompts import check_model, off_loop, plain_messages, plain_tools, render
from nanovllm.server.protocol import DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse
from nanovllm.server.respond import json_response

if TYPE_CHECKING:
    from nanovllm.server.context import Server

REFUSED = {path: refused(path) for path in ("/tokenize", "/detokenize")}


async def tokenize(request: Request) -> Response:
    server: Server = request.app.state.server
    body = await server.read(request, TokenizeRequest, REFUSED["/tokenize"])
    check_model(server, body.model)
    text = await _text(server, body)
    special = body.messages is None if body.add_special_tokens is None else body.add_special_tokens
    token_ids = await server.engine.encode(text, special)
    tokenizer = server.engine.tokenizer
    strings = [tokenizer.id_to_token(token_id) or "" for token_id in token_ids] if body.return_token_strs else None
    max_model_len = server.engine.facts.max_model_len
    return json_response(
        TokenizeResponse(count=len(token_ids), max_model_len=max_model_len, tokens=token_ids, token_strs=strings)
    )


async def _text(server: Server, body: TokenizeRequest) -> str:
    if (body.prompt is None) == (body.messages is None):
        raise BadField("prompt", "give either prompt or messages")
    if body.prompt is None:
        messages = plain_messages(server, body.messages or [])
        return await render(server, messages, body, plain_tools(server, body.tools))
    for name in ("tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message"):
        if getattr(body, name) is not None:
            raise BadField(name, f"{name} goes with messages, not with prompt")
    return body.prompt


async def detokenize(request: Request) -> Response:
    server: Server = request.app.state.server
    body = await server.read(request, DetokenizeRequest, REFUSED["/detokenize"])
    check_model(server, body.model)
    vocab_size = server.engine.facts.vocab_size
    if body.tokens and not 0 <= min(body.tokens) <= max(body.tokens) < vocab_size:
        raise BadField("tokens", f"tokens must be token ids from 0 to {vocab_size - 1}")
    text = await off_loop(len(body.tokens), server.engine.tokenizer.decode, body.tokens, False)
    return json_response(DetokenizeResponse(prompt=text))


routes = [
    Route("/tokenize", tokenize, methods=["POST"]),
    Route("/detokenize", detokenize, methods=["POST"]),
]
