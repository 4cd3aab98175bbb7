"""Answers: what the generating endpoints have in common once their request is understood.

Owns the identity of an answer (id, time, model, fingerprint) and how its prompts go to the engine. Read next:
`completions.py`, the plainest user.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import nanovllm
from nanovllm.sampling_params import SamplingParams
from nanovllm.server.logprobs import TokenNames
from nanovllm.server.prompts import check_request_id
from nanovllm.server.streaming import Outputs

if TYPE_CHECKING:
    from starlette.requests import Request

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
    """One stream per prompt; nothing happens before they are read."""
    priority, salt = getattr(body, "priority", None) or 0, getattr(body, "cache_salt", None)
    return [
        server.submit(request, prompt, params, priority=priority, cache_salt=salt, request_id=f"{identity.id}-{number}")
        for number, prompt in enumerate(prompts)
    ]


def token_names(server: Server, body: Any, params: SamplingParams) -> TokenNames:
    as_ids = bool(getattr(body, "return_tokens_as_token_ids", None))
    return TokenNames(server.engine.tokenizer, as_ids, params.skip_special_tokens)
