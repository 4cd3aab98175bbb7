"""One streamed completion over HTTP/1.1, with the time of each event: a protocol of asyncio, and no library.

A load client must not be what is measured. `asyncio.Protocol` hands bytes over in the loop turn in which they arrive, so
a time is taken before anything is parsed, and no task is woken per token. What such a client needs of HTTP is small: one
POST per connection, a status, a body in chunks or up to the end. Knows nothing of workloads.
"""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import msgspec

from nanovllm.errors import ConfigError
from nanovllm.retry import STATUSES, retry_after_s

MAX_HEAD = 2**16  # bytes
MAX_ERROR_TEXT = 200  # characters of a refusal that are kept
SETTLE_S = 2.0  # for each address of a name


@dataclass(slots=True)
class Exchange:
    """What came back. Times are `time.perf_counter` seconds."""

    sent_at: float  # before connecting
    connected_at: float = 0.0
    token_times: list[float] = field(default_factory=list)  # of events that carry a choice
    num_input: int | None = None  # tokens, as the server counted them; None: it did not say
    num_output: int | None = None
    text: list[str] = field(default_factory=list)
    error: str = ""
    may_retry: bool = False  # it failed before any token, and may go better another time
    retry_after_s: float | None = None  # as the server asked
    num_retries: int = 0  # before this exchange


class Endpoint:
    """Where requests go. Raises `ConfigError` for a URL that is not one."""

    def __init__(self, url: str, path: str, api_key: str | None = None) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1 or parts.query:
            raise ConfigError(f"url={url!r} is not the address of a server, such as http://127.0.0.1:8000")
        self.host, self.is_tls = parts.hostname, parts.scheme == "https"
        self._address = self.host
        self.port = port or (443 if self.is_tls else 80)
        self.path = parts.path.rstrip("/").removesuffix("/v1") + path
        self._key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        if not self._key.isascii() or self._key.count("\n") > 1:
            raise ConfigError("the API key has characters that no HTTP header can carry")

    def settle(self) -> None:
        """Look the name up once, and now: every connection would do it in a thread, and its time be the request's.

        Takes the first address that answers. Where none does, requests say so.
        """
        with suppress(OSError), socket.create_connection((self.host, self.port), SETTLE_S) as probe:
            self._address = probe.getpeername()[0]

    async def connect(self, protocol: asyncio.Protocol) -> asyncio.Transport:
        tls = {"ssl": ssl.create_default_context(), "server_hostname": self.host} if self.is_tls else {}
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_connection(lambda: protocol, self._address, self.port, **tls)
        return transport

    def head(self, length: int | None) -> bytes:
        """Of a POST with a body of `length` bytes; None: of a GET."""
        body = "" if length is None else f"Content-Type: application/json\r\nContent-Length: {length}\r\n"
        method = "GET" if length is None else "POST"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{method} {self.path} HTTP/1.1\r\nHost: {host}:{self.port}\r\nConnection: close\r\n{self._key}{body}\r\n".encode()


async def stream(endpoint: Endpoint, data: bytes, timeout_s: float, keep_text: bool = False) -> Exchange:
    """`data`: JSON, made before the clock runs. Never raises for what a server does: the error is in the exchange."""
    exchange = Exchange(time.perf_counter())
    reader = _EventReader(exchange, keep_text)
    error = await _exchange(endpoint, endpoint.head(len(data)) + data, reader, timeout_s)
    exchange.error = exchange.error or error
    exchange.may_retry = not exchange.token_times and (reader.is_cut or reader.status in STATUSES)
    exchange.retry_after_s = retry_after_s(reader.fields)
    if not exchange.error and not reader.is_done:
        exchange.error = "the stream ended early"
    return exchange


async def get_json(endpoint: Endpoint, timeout_s: float = 30.0) -> Any:
    """Raises `ConfigError` when there is no server, or it answers with something else."""
    try:
        return json.loads(await get_text(endpoint, timeout_s))
    except ValueError as problem:
        raise _no_answer(endpoint, problem) from problem


async def get_text(endpoint: Endpoint, timeout_s: float = 30.0) -> str:
    """Raises `ConfigError` when there is no server, or it refuses."""
    reader = _BodyReader()
    error = await _exchange(endpoint, endpoint.head(None), reader, timeout_s)
    if error or reader.status != 200:
        raise _no_answer(endpoint, error or f"status {reader.status}")
    return reader.body.decode(errors="replace")


def _no_answer(endpoint: Endpoint, problem: object) -> ConfigError:
    return ConfigError(f"no answer from {endpoint.host}:{endpoint.port}{endpoint.path}: {problem}")


async def _exchange(endpoint: Endpoint, request: bytes, reader: _BodyReader, timeout_s: float) -> str:
    """Send, and read to the end. Returns what went wrong, or an empty string."""
    try:
        await asyncio.wait_for(_send(endpoint, request, reader), timeout_s)
    except asyncio.TimeoutError:
        return f"no end within {timeout_s:g} s"
    except (OSError, ValueError) as error:
        reader.is_cut = isinstance(error, OSError)
        return f"{type(error).__name__}: {error}"
    return ""


async def _send(endpoint: Endpoint, request: bytes, reader: _BodyReader) -> None:
    transport = await endpoint.connect(reader)
    try:
        reader.on_connected()
        transport.write(request)
        await reader.ended
    finally:
        transport.close()


class _BodyReader(asyncio.Protocol):
    """Splits an answer into head and body, and undoes chunks. `ended` is done when the body is whole or the peer is gone."""

    def __init__(self) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.status = 0
        self.fields: dict[str, str] = {}  # of the head, names in small letters
        self.is_cut = False  # there was no connection, or it broke
        self.body = bytearray()
        self._raw = bytearray()
        self._is_chunked = False
        self._left = -1  # bytes of the body, or of this chunk, that are still to come; -1: not known

    def on_connected(self) -> None:
        """The connection stands; the request goes out now."""

    def on_body(self, data: bytes, now: float) -> None:
        self.body += data

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        self._raw += data
        try:
            if self.status or self._take_head():
                self._take_body(now)
        except ValueError as error:
            self._end(ValueError(f"not HTTP: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        is_cut = self._is_chunked or self._left > 0 or not self.status
        self._end(exc or (ConnectionError("the server closed the connection") if is_cut else None))

    def _end(self, error: Exception | None = None) -> None:
        if not self.ended.done():
            if error is None:
                self.ended.set_result(None)
            else:
                self.ended.set_exception(error)

    def _take_head(self) -> bool:
        end = self._raw.find(b"\r\n\r\n")
        if end < 0:
            if len(self._raw) > MAX_HEAD:
                raise ValueError("the head is too long")
            return False
        first, *lines = self._raw[:end].decode("latin-1").split("\r\n")
        del self._raw[: end + 4]
        self.status = int(first.split(" ", 2)[1]) if first.startswith("HTTP/1.") and " " in first else 0
        if not self.status:
            raise ValueError(repr(first[:40]))
        fields = self.fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        self._is_chunked = "chunked" in fields.get("transfer-encoding", "").lower()
        if not self._is_chunked and "content-length" in fields:
            self._left = int(fields["content-length"])
        return True

    def _take_body(self, now: float) -> None:
        if not self._is_chunked:
            self._left -= len(self._raw) if self._left > 0 else 0
            self._deliver(len(self._raw), now)
            if self._left == 0:
                self._end()
            return
        while self._raw:
            if self._left < 0:  # a size is next
                end = self._raw.find(b"\r\n")
                if end < 0:
                    return
                self._left = int(self._raw[:end].split(b";")[0], 16)
                del self._raw[: end + 2]
                if self._left == 0:
                    self._end()
                    return
            if len(self._raw) < self._left + 2:
                return  # a chunk is an event or several: it is waited for
            self._deliver(self._left, now)
            del self._raw[:2]
            self._left = -1

    def _deliver(self, count: int, now: float) -> None:
        self.on_body(bytes(self._raw[:count]), now)
        del self._raw[:count]


class _EventReader(_BodyReader):
    """Server-sent events of a completion or a chat completion."""

    _decode = msgspec.json.Decoder().decode

    def __init__(self, exchange: Exchange, keep_text: bool) -> None:
        super().__init__()
        self.exchange = exchange
        self.is_done = False
        self._keep_text = keep_text
        self._line = b""

    def on_connected(self) -> None:
        self.exchange.connected_at = time.perf_counter()

    def on_body(self, data: bytes, now: float) -> None:
        if self.status != 200:
            self.exchange.error = (self.exchange.error or f"status {self.status}: ") + data.decode(errors="replace")
            self.exchange.error = self.exchange.error[:MAX_ERROR_TEXT]
            return
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._on_event(line[5:].strip(), now)

    def _on_event(self, data: bytes, now: float) -> None:
        if data == b"[DONE]":
            self.is_done = True
            return
        try:
            event = self._decode(data)
            if event.get("error"):
                self.exchange.error = str(event["error"])[:MAX_ERROR_TEXT]
            if event.get("choices"):
                self._on_choice(event["choices"][0], now)
            if usage := event.get("usage"):
                self.exchange.num_input, self.exchange.num_output = usage["prompt_tokens"], usage["completion_tokens"]
        except (msgspec.DecodeError, AttributeError, LookupError, TypeError) as error:
            self.exchange.error = f"an event that is not a completion: {error!r}"

    def _on_choice(self, choice: dict[str, Any], now: float) -> None:
        delta = choice.get("delta")
        text = (
            choice.get("text")
            if delta is None
            else delta.get("content") or delta.get("reasoning") or delta.get("reasoning_content")
        )
        if delta is not None and not text and not choice.get("finish_reason"):
            return  # a chat opens with a delta that has a role and no token
        self.exchange.token_times.append(now)
        if self._keep_text and text:
            self.exchange.text.append(text)
