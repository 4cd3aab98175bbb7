"""Answers: what the generating endpoints have in common once their request is understood.

Owns the identity of an answer (id, time, model, fingerprint) and how its prompts go to the engine. Read next:
`completions.py`, the plainest user.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import nanovllm
from nanovllm.sampling_params import SamplingParams
from nanovllm.server.errors import BadField
from nanovllm.server.logprobs import TokenNames, num_candidates, num_prompt_candidates
from nanovllm.server.prompts import check_request_id
from nanovllm.server.respond import json_response
from nanovllm.server.streaming import Outputs

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from nanovllm.server.context import Server


@dataclass(frozen=True, slots=True)
class Identity:
    """What every part of an answer carries."""

    id: str
    created: int  # seconds since 1970
    model: str
    system_fingerprint: str

    @classmethod
    def of(cls, server: Server, request: Request, prefix: str, request_id: str | None = None) -> Identity:
        check_request_id(request_id)
        name = request_id or request.state.request_id.removeprefix("req-")
        return cls(prefix + name, int(time.time()), server.model_name, fingerprint(server))

    def head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
        }


def fingerprint(server: Server) -> str:
    """Changes when the same seed might give another answer: version, model, dtype, device."""
    facts = server.engine.facts
    return _fingerprint(nanovllm.__version__, str(facts.model), str(facts.dtype), str(facts.device))


@functools.cache
def _fingerprint(*facts: str) -> str:
    return "fp_" + hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]


def begin(
    server: Server, request: Request, prompts: Sequence[list[int]], params: SamplingParams, body: Any, identity: Identity
) -> list[Outputs]:
    """One stream per prompt; nothing happens before they are read. Raises `BadField` for what is too much at once."""
    if params.n > server.options.max_n:
        raise BadField("n", f"n={params.n} is more than max_n={server.options.max_n}")
    num_completions, most = len(prompts) * params.n, server.admission.capacity + server.admission.max_queued
    if len(prompts) > 1 and num_completions > most:  # no 429: waiting would not help
        text = f"{len(prompts)} prompts of n={params.n} are {num_completions} completions; {most} are the engine and its queue"
        raise BadField("n" if params.n > 1 else "prompt", f"{text} (max_queued_requests)")
    _check_candidates(server, prompts, params)
    priority, salt = getattr(body, "priority", None) or 0, getattr(body, "cache_salt", None)
    is_named = getattr(body, "request_id", None) is not None  # by the client; other names are unique by themselves
    return [
        server.submit(
            request,
            prompt,
            params,
            priority=priority,
            cache_salt=salt,
            request_id=f"{identity.id}-{number}" if is_named else None,
            number=number,
        )
        for number, prompt in enumerate(prompts)
    ]


def _check_candidates(server: Server, prompts: Sequence[list[int]], params: SamplingParams) -> None:
    """Log-probabilities are the one part of an answer that is far larger than what it tells about."""
    options, room = server.options, server.engine.facts.max_model_len
    of_prompts = sum(num_prompt_candidates(len(prompt), params) for prompt in prompts)
    if of_prompts > options.max_prompt_logprobs:
        limit = f"max_prompt_logprobs={options.max_prompt_logprobs}"
        raise BadField("prompt_logprobs", f"prompt_logprobs: {of_prompts} candidates for these prompts; at most {limit} are sent")
    of_answers = len(prompts) * num_candidates(params, room)
    if of_answers > options.max_logprobs:
        text = f"up to {of_answers} candidates; at most max_logprobs={options.max_logprobs} are sent"
        raise BadField("logprobs", f"logprobs: {text}: ask for fewer tokens or candidates")
    if of_prompts + of_answers > options.max_open_logprobs:
        limit = f"max_open_logprobs={options.max_open_logprobs}"
        raise BadField("logprobs", f"logprobs: {of_prompts + of_answers} candidates; at most {limit} may be under way")


async def whole_reply(params: SamplingParams, make: Callable[..., Any], *arguments: Any) -> Response:
    """An answer in one piece. With log-probabilities it is made in a thread: there may be a million of them."""
    if params.logprobs is None and params.prompt_logprobs is None:
        return json_response(make(*arguments))
    return await asyncio.to_thread(lambda: json_response(make(*arguments)))


def token_names(server: Server, body: Any, params: SamplingParams) -> TokenNames:
    as_ids = bool(getattr(body, "return_tokens_as_token_ids", None))
    return TokenNames(server.engine.tokenizer, as_ids, params.skip_special_tokens)
