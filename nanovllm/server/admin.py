"""Routes for the operator, under /admin, with a key of their own: drain, limits, cache, profile, inspect, flight record.

`auth.py` keeps everybody else out; `_checked` looks a second time, so that a mistake in a path rule opens nothing. With
several front ends, what is changed here reaches all of them: through the engine, or through the shared folder.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from nanovllm.child_process import child_command
from nanovllm.errors import ConfigError, RequestError
from nanovllm.observability.film import add_costs, hardware
from nanovllm.server.body import read_body
from nanovllm.server.context import LIVE_LIMITS
from nanovllm.server.errors import BadField, HttpError
from nanovllm.server.respond import json_response

MAX_PROFILE_S = 60.0
MAX_FILM_S = 30.0

Handler = Callable[[Request], Awaitable[Response]]


class ProfileRequest(msgspec.Struct):
    seconds: float = 3.0


class LimitsRequest(msgspec.Struct):
    """What may change while the server runs; what is left out stays."""

    max_num_seqs: int | msgspec.UnsetType = msgspec.UNSET
    max_num_batched_tokens: int | msgspec.UnsetType = msgspec.UNSET
    max_prompt_chunk: int | msgspec.UnsetType | None = msgspec.UNSET
    watermark: float | msgspec.UnsetType = msgspec.UNSET
    max_queued_requests: int | msgspec.UnsetType = msgspec.UNSET
    queue_timeout_s: float | msgspec.UnsetType = msgspec.UNSET
    request_timeout_s: float | msgspec.UnsetType = msgspec.UNSET


async def drain(request: Request) -> Response:
    """No new requests from now on; the process ends when the open ones have, or after `drain_timeout_s`."""
    server = request.app.state.server
    server.begin_drain()
    return json_response({"status": "draining", "open": server.num_open}, 202)


async def show_limits(request: Request) -> Response:
    server = request.app.state.server
    own = {name: getattr(server.limits, name) for name in LIVE_LIMITS}
    return json_response({**await server.engine.set_limits(), **own})


async def set_limits(request: Request) -> Response:
    """Engine limits and server limits in one object; all of them, or none if one is wrong."""
    server = request.app.state.server
    asked: LimitsRequest = await server.read(request, LimitsRequest, {})
    changes = {name: value for name, value in msgspec.structs.asdict(asked).items() if value is not msgspec.UNSET}
    own = {name: changes.pop(name) for name in LIVE_LIMITS if name in changes}
    try:
        limits = server.check_limits(own)
        engine_limits = await server.engine.set_limits(**changes)
    except ConfigError as error:
        raise BadField(str(error).partition("=")[0], str(error)) from error
    server.share_limits(limits, engine_limits["max_num_seqs"])
    return json_response({**engine_limits, **{name: getattr(server.limits, name) for name in LIVE_LIMITS}})


async def reset_prefix_cache(request: Request) -> Response:
    return json_response({"reset": await request.app.state.server.engine.reset_prefix_cache()})


async def profile(request: Request) -> Response:
    """Profile the engine for `seconds`; the answer is a Chrome trace (open it in Perfetto)."""
    server = request.app.state.server
    seconds = (await server.read(request, ProfileRequest, {})).seconds
    if not 0 < seconds <= MAX_PROFILE_S:
        raise BadField("seconds", f"seconds={seconds} must be more than 0 and at most {MAX_PROFILE_S:g}")
    path = await server.engine.profile(seconds)
    return FileResponse(path, media_type="application/json", filename="trace.json", background=BackgroundTask(os.unlink, path))


async def flight_record(request: Request) -> Response:
    """The last steps and requests, as a file for `nanovllm replay`. It stays on the server, too."""
    return FileResponse(await _write_record(request), media_type="application/json", filename="flight-record.json")


async def _write_record(request: Request) -> str:
    path = await _ask_recorder(request, "flight_record")
    if path is None:
        raise HttpError(500, "the flight record could not be written; the reason is in the server's log")
    return path


async def _ask_recorder(request: Request, name: str, **arguments: Any) -> Any:
    try:
        return await request.app.state.server.engine.call(name, **arguments)
    except RequestError as error:
        raise HttpError(404, str(error), code="no_flight_recorder") from error


async def inspector(request: Request) -> Response:
    """For the page /inspector: the state, and what happened since `?after=`, the `cursor` of an earlier answer."""
    server = request.app.state.server
    after, facts = request.query_params.get("after"), server.engine.facts
    if after is not None and not (after.isascii() and after.isdigit() and len(after) <= 15):
        raise BadField("after", f"after={after[:32]!r} must be the cursor of an earlier answer")
    news = await _ask_recorder(request, "inspector", after=None if after is None else int(after))
    news["entries"] = add_costs(news["entries"], {"spec": facts.spec, "dtype": facts.dtype, "roofline": facts.roofline})
    if news["is_first"]:
        sizes = {"num_blocks": facts.num_kv_blocks, "block_size": facts.block_size, "num_rows": facts.max_num_seqs}
        news["facts"] = {
            "model": server.model_name,
            "device": facts.device,
            "dtype": facts.dtype,
            **sizes,
            "hardware": hardware(facts.roofline),
        }
    return json_response({**news, "door": server.admission.num_waiting})


async def film(request: Request) -> Response:
    """A flight record step by step, for the same page: of the body or, without one, of what this engine has just done."""
    record = await read_body(request, request.app.state.server.options)
    if not record:
        record = await asyncio.to_thread(Path(await _write_record(request)).read_bytes)
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), asyncio.subprocess.PIPE)
    process = await asyncio.create_subprocess_exec(*child_command("nanovllm.observability.film"), **pipes)
    try:
        made, reason = await asyncio.wait_for(process.communicate(record), MAX_FILM_S)
    except asyncio.TimeoutError:
        raise BadField(None, f"the film was not ready after {MAX_FILM_S:g} s: the record is too long") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        raise BadField(None, reason.decode(errors="replace")[-500:] or "the record is too long to be shown")
    return Response(made, media_type="application/json")


async def inspect(request: Request) -> Response:
    """Who runs and who waits: ids and counts, no text."""
    server = request.app.state.server
    return json_response({"engine": await server.engine.inspect(), "frontend": server.admission.describe()})


def _checked(handler: Handler) -> Handler:
    async def call(request: Request) -> Response:
        if not request.state.key.is_admin:
            raise HttpError(403, "admin routes need an admin key", code="admin_key_required")
        return await handler(request)

    return call


def _route(path: str, handler: Handler, method: str) -> Route:
    return Route(path, _checked(handler), methods=[method])


routes: list[Any] = [
    _route("/admin/drain", drain, "POST"),
    _route("/admin/limits", show_limits, "GET"),
    _route("/admin/limits", set_limits, "POST"),
    _route("/admin/reset_prefix_cache", reset_prefix_cache, "POST"),
    _route("/admin/profile", profile, "POST"),
    _route("/admin/inspect", inspect, "GET"),
    _route("/admin/flight_record", flight_record, "POST"),
    _route("/admin/inspector", inspector, "GET"),
    _route("/admin/inspector/film", film, "POST"),
]
