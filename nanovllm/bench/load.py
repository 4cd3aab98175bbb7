"""A workload sent to an OpenAI-compatible server: one row per request, failed ones too.

The load is open: a request leaves at its time whether or not earlier ones have been answered, and the row says how late
it left (`lag_ms`: above a few milliseconds the client is what was measured). `max_concurrency` closes it: then a request
waits in the client, which is not part of its latency, but the lag shows it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from nanovllm.bench.http_client import Endpoint, Exchange, get_json, stream
from nanovllm.errors import ConfigError
from nanovllm.retry import Retrier, RetryPolicy
from nanovllm.workloads import Request, Workload

FORMS = ("ids", "words", "chat")


@dataclass(frozen=True, slots=True)
class Target:
    """The server, and how prompts reach it. `form`: token ids, a text of words t1 t2 ..., or a chat message of such words."""

    url: str
    model: str
    form: str = "ids"
    api_key: str | None = field(default=None, repr=False)
    max_concurrency: int | None = None  # requests in flight; None: no limit
    timeout_s: float = 600.0  # of one request
    extra_body: dict[str, Any] = field(default_factory=dict)  # more fields of every request
    retries: RetryPolicy = RetryPolicy()  # noqa: RUF009  frozen; none: so that figures tell of the server alone
    client_processes: int = 1  # that send: see `clients.py`

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ConfigError(f"form={self.form!r} must be one of {', '.join(FORMS)}")
        if self.max_concurrency is not None and self.max_concurrency < 1:
            raise ConfigError(f"max_concurrency={self.max_concurrency} must be at least 1")
        if self.client_processes < 1:
            raise ConfigError(f"client_processes={self.client_processes} must be at least 1")
        if self.max_concurrency is not None and self.max_concurrency < self.client_processes:
            raise ConfigError(f"max_concurrency={self.max_concurrency} cannot be shared by {self.client_processes} processes")

    def endpoint(self) -> Endpoint:
        return Endpoint(self.url, "/v1/chat/completions" if self.form == "chat" else "/v1/completions", self.api_key)

    def body(self, request: Request, temperature: float) -> dict[str, Any]:
        words = " ".join(f"t{token}" for token in request.prompt) if self.form != "ids" else ""
        prompt = {
            "ids": {"prompt": request.prompt},
            "words": {"prompt": words},
            "chat": {"messages": [{"role": "user", "content": words}]},
        }[self.form]
        return {
            "model": self.model,
            **prompt,
            "max_tokens": request.num_output,
            "temperature": temperature,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.extra_body,
        }


@dataclass(frozen=True, slots=True)
class Row:
    """One request of one repeat. Times in milliseconds; TTFT and latency count from before the connection is made."""

    repeat: int
    index: int  # in the workload
    tenant: str
    sent_ms: float  # since the start of the repeat
    lag_ms: float  # later than its arrival time
    connect_ms: float
    ttft_ms: float
    latency_ms: float  # to the last token
    num_input: int
    num_output: int
    itl_ms: list[float]  # gaps between events that carry tokens
    error: str = ""
    num_retries: int = 0  # times are then from the first attempt on, waits included

    @property
    def tpot_ms(self) -> float:
        """As vLLM's client counts: without the first token."""
        return (self.latency_ms - self.ttft_ms) / max(1, self.num_output - 1)


async def find_model(url: str, api_key: str | None) -> tuple[str, int | None]:
    """(name, longest context where the server tells it) of the first model."""
    answer = await get_json(Endpoint(url, "/v1/models", api_key))
    try:
        return answer["data"][0]["id"], answer["data"][0].get("max_model_len")
    except (LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"{url}/v1/models does not name a model: {error!r}") from error


@dataclass(frozen=True, slots=True)
class Part:
    """What one process sends: all of a workload, or its share. `after` of a request is a place in `requests`."""

    target: Target
    repeat: int
    temperature: float
    requests: list[Request]
    indices: list[int]  # of the requests, in the workload

    def bodies(self) -> list[bytes]:
        return [json.dumps(self.target.body(request, self.temperature)).encode() for request in self.requests]


def ignore(start: float) -> None:
    """Nobody wants to know when a repeat starts."""


async def send_workload(
    target: Target, workload: Workload, repeat: int = 0, on_start: Callable[[float], None] = ignore
) -> tuple[list[Row], float]:
    """By this process: (a row per request, seconds from the first request to the last answer)."""
    part = Part(target, repeat, workload.temperature, workload.requests, list(range(len(workload.requests))))
    bodies, endpoint = part.bodies(), target.endpoint()
    endpoint.settle()
    start = time.perf_counter()
    on_start(start)
    return await send_part(part, bodies, endpoint, start), time.perf_counter() - start


async def send_part(part: Part, bodies: list[bytes], endpoint: Endpoint, start: float) -> list[Row]:
    """`start`: of the repeat, by `time.perf_counter`; it may be still to come."""
    target = part.target
    ended = [asyncio.Event() for _ in bodies]
    gate = asyncio.Semaphore(target.max_concurrency or len(bodies))
    retrier = Retrier(target.retries)

    async def send(place: int) -> Row:
        request = part.requests[place]
        due = start + request.arrival_s
        if request.after is not None:
            await ended[request.after].wait()
            due = time.perf_counter() + request.arrival_s
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        async with gate:
            exchange = await _persist(endpoint, bodies[place], target.timeout_s, retrier)
        ended[place].set()
        return _row(part.repeat, part.indices[place], request, exchange, start, due)

    return await asyncio.gather(*(send(place) for place in range(len(bodies))))


async def _persist(endpoint: Endpoint, body: bytes, timeout_s: float, retrier: Retrier) -> Exchange:
    """Send, and send again as long as the policy allows it."""
    retrier.begin()
    exchange = await stream(endpoint, body, timeout_s)
    sent_at, num_retries = exchange.sent_at, 0
    while exchange.may_retry and (wait := retrier.wait_s(num_retries, exchange.retry_after_s)) is not None:
        await asyncio.sleep(wait)
        num_retries += 1
        exchange = await stream(endpoint, body, timeout_s)
    exchange.sent_at, exchange.num_retries = sent_at, num_retries
    return exchange


def _row(repeat: int, index: int, request: Request, exchange: Exchange, start: float, due: float) -> Row:
    times = exchange.token_times
    error = exchange.error
    if not error and not times:
        error = "an answer without a token"
    if not error and exchange.num_output is not None and exchange.num_output != request.num_output:
        error = f"{exchange.num_output} tokens instead of {request.num_output}: does the server know ignore_eos?"
    return Row(
        repeat=repeat,
        index=index,
        tenant=request.tenant,
        sent_ms=_ms(exchange.sent_at - start),
        lag_ms=_ms(exchange.sent_at - due),
        connect_ms=_ms(max(0.0, exchange.connected_at - exchange.sent_at)),
        ttft_ms=_ms(times[0] - exchange.sent_at) if times else 0.0,
        latency_ms=_ms(times[-1] - exchange.sent_at) if times else 0.0,
        num_input=exchange.num_input if exchange.num_input is not None else len(request.prompt),
        num_output=exchange.num_output if exchange.num_output is not None else len(times),
        itl_ms=[_ms(after - before) for before, after in pairwise(times)],
        error=error,
        num_retries=exchange.num_retries,
    )


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)
