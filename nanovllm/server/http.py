"""The HTTP side of uvicorn with the limits that it lacks: header bytes, time, connections, and readers that stall.

uvicorn already stops reading a body that nobody takes, and stops a response whose client does not read. Added here: a head
that is too long or too slow ends its connection; so does a client that takes nothing of its answer for too long; beyond
`max_connections` a connection gets a 503. Signals are handled by `serve.py`, not by uvicorn.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from nanovllm.server.options import ServerOptions

KEEP_ALIVE_S = 75  # longer than the idle time of the usual load balancers
SHUTDOWN_S = 3  # for the last bytes, once no request is open
CROWDED = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class HttpServer(uvicorn.Server):
    """uvicorn without its own signal handling."""

    on_listening: Callable[[], None] | None = None  # called when connections are accepted

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.on_listening is not None:
            self.on_listening()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def make_http_server(app: Any, options: ServerOptions) -> HttpServer:
    class Protocol(BoundedHttp):
        limits = options

    config = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=SHUTDOWN_S,
    )
    return HttpServer(config)


class HeadTooLarge(Exception):
    """Raised in a parser callback, which turns it into an answer."""


class BoundedHttp(HttpToolsProtocol):
    """One connection."""

    limits: ServerOptions
    _head_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None
    _num_head_bytes = 0
    _num_heads = 0  # that were complete
    _has_head = False  # the parser is past the headers of a request, in its body
    _is_too_large = False

    def connection_made(self, transport: Any) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections:
            transport.write(CROWDED)
            transport.close()
            return
        transport.set_write_buffer_limits(high=self.limits.max_stream_buffer)
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timers()
        super().connection_lost(exc)

    # --- heads

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        had_head, num_heads = self._has_head, self._num_heads
        super().data_received(data)
        if not had_head and num_heads == self._num_heads and not self.transport.is_closing():
            self._num_head_bytes += len(data)  # all of it belongs to a head, which the parser keeps until it is complete
            if self._num_head_bytes > 2 * self.limits.max_header_bytes:
                self._is_too_large = True
                self.send_400_response("")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._num_head_bytes, self._has_head = 0, False
        if self._head_timer is None:
            self._start_head_timer()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Also those that follow a chunked body."""
        self._num_head_bytes += len(name) + len(value)
        if self._num_head_bytes > 2 * self.limits.max_header_bytes:
            self._is_too_large = True
            raise HeadTooLarge
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._has_head = True
        self._num_heads += 1
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._num_head_bytes, self._has_head = 0, False

    def send_400_response(self, msg: str) -> None:
        if not self._is_too_large:
            super().send_400_response(msg)
            return
        self.transport.write(b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        self.transport.close()

    def _start_head_timer(self) -> None:
        if self.limits.body_timeout_s:
            self._head_timer = self.loop.call_later(self.limits.body_timeout_s, self._head_is_late)

    def _head_is_late(self) -> None:
        self.transport.close()

    # --- readers

    def pause_writing(self) -> None:
        """The client does not take its answer as fast as it comes."""
        super().pause_writing()
        self._watch_reader(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None
        super().resume_writing()

    def _watch_reader(self, waiting: int) -> None:
        if self.limits.stalled_client_timeout_s:
            self._stall_timer = self.loop.call_later(self.limits.stalled_client_timeout_s, self._check_reader, waiting)

    def _check_reader(self, waiting: int) -> None:
        still_waiting = self.transport.get_write_buffer_size()
        if still_waiting >= waiting:
            own = self.transport.get_extra_info("socket")
            own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # the kernel drops its part, too
            self.transport.abort()
        else:
            self._watch_reader(still_waiting)

    def _stop_timers(self) -> None:
        for timer in (self._head_timer, self._stall_timer):
            if timer is not None:
                timer.cancel()
        self._head_timer = self._stall_timer = None
