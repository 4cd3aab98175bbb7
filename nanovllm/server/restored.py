"""GET /v1/restored and /v1/restored/{request_id}: answers whose clients were cut off by a crash (`recovery/keeper.py`).

A client asks with the x-request-id of its call and the key that made it; another key's calls are as if they were not
there. The answer is the plain text and the token ids: tools and reasoning are not taken apart again.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nanovllm.recovery.journal import Entry
from nanovllm.server.errors import HttpError
from nanovllm.server.protocol import Usage
from nanovllm.server.respond import json_response

if TYPE_CHECKING:
    from nanovllm.server.context import Server


class RestoredChoice(msgspec.Struct):
    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: int | str | None


class RestoredAnswer(msgspec.Struct):
    """To one prompt of a call."""

    id: str  # the x-request-id of the call
    object: str
    path: str
    prompt_index: int
    status: str  # running, finished, failed
    error: str | None  # why it failed
    lost: list[str]  # fields of the request that the answer cannot honour
    created: int  # seconds since 1970
    expires_at: int | None  # when it will be forgotten; null while it runs
    usage: Usage | None  # null in the list of all calls, as
    choices: list[RestoredChoice]  # these are empty there


class RestoredList(msgspec.Struct):
    object: str
    data: list[RestoredAnswer]


async def list_restored(request: Request) -> Response:
    return json_response(_listed([_answer(request.app.state.server, entry) for entry in await _entries(request)]))


async def get_restored(request: Request) -> Response:
    server: Server = request.app.state.server
    entries = await _entries(request, request.path_params["request_id"])
    if not entries:
        message = "no call with this id was restored: it was answered, or never accepted, or its answer has expired"
        raise HttpError(404, message, code="not_restored")
    return json_response(_listed(await asyncio.to_thread(lambda: [_with_choices(server, entry) for entry in entries])))


async def _entries(request: Request, name: str | None = None) -> list[Entry]:
    server: Server = request.app.state.server
    if not server.engine.facts.has_checkpoint:
        raise HttpError(404, "this server keeps no checkpoint; see --checkpoint", code="no_checkpoint")
    return msgspec.convert(await server.engine.call("restored", owner=server.key_of(request).salt, of_call=name), list[Entry])


def _listed(answers: list[RestoredAnswer]) -> RestoredList:
    return RestoredList("list", sorted(answers, key=lambda answer: (answer.created, answer.id, answer.prompt_index)))


def _with_choices(server: Server, entry: Entry) -> RestoredAnswer:
    output, answer = entry.output(server.engine.tokenizer), _answer(server, entry)
    num_prompt_tokens, num_tokens = len(entry.token_ids), output.metrics.num_generated_tokens
    total = num_prompt_tokens + num_tokens
    answer.usage = Usage(prompt_tokens=num_prompt_tokens, completion_tokens=num_tokens, total_tokens=total)
    answer.choices = [
        RestoredChoice(one.index, one.text, one.token_ids, one.finish_reason, one.stop_reason) for one in output.completions
    ]
    return answer


def _answer(server: Server, entry: Entry) -> RestoredAnswer:
    return RestoredAnswer(
        id=entry.origin.name,
        object="restored",
        path=entry.origin.path,
        prompt_index=entry.origin.number,
        status="failed" if entry.error is not None else "running" if entry.ended is None else "finished",
        error=entry.error,
        lost=entry.lost,
        created=int(entry.arrived),
        expires_at=None if entry.ended is None else int(entry.ended + server.options.checkpoint_keep_s),
        usage=None,
        choices=[],
    )


routes = [
    Route("/v1/restored", list_restored, methods=["GET"]),
    Route("/v1/restored/{request_id}", get_restored, methods=["GET"]),
]
