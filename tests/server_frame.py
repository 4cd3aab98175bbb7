"""A server frame on a real socket, with a fake engine behind it, and a client that can be as rude as a socket allows."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
from server_fakes import FakeAsyncEngine
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nanovllm.sampling_params import SamplingParams
from nanovllm.server import admin, load
from nanovllm.server.app import App, create_app
from nanovllm.server.auth import Keyring
from nanovllm.server.lifetime import bind, run_app
from nanovllm.server.options import ServerOptions
from nanovllm.server.respond import json_response
from nanovllm.server.streaming import finished


class RunRequest(msgspec.Struct):
    """Of the one endpoint that these tests have."""

    prompt: str | list[int]
    stream: bool = False
    max_tokens: int = 4
    n: int = 1
    priority: int = 0
    pad: int = 0  # bytes that are added to each event
    cache_salt: str | None = None
    extra: Any = None


async def run(request: Request) -> Response:
    server = request.app.state.server
    body = await server.read(request, RunRequest, {"suffix": "the model does not fill gaps"})
    params = SamplingParams(max_tokens=body.max_tokens, temperature=0, n=body.n)
    stream = server.submit(request, body.prompt, params, priority=body.priority, cache_salt=body.cache_salt)
    if not body.stream:
        (output,) = await server.run(request, finished([stream]))
        return json_response({"text": output.text, "cached": output.metrics.num_cached_tokens})

    async def events():
        sent = 0
        async for output in stream:
            text, sent = output.text[sent:], len(output.text)
            yield f"data: {text}{'.' * body.pad}\n\n".encode()

    return server.sse(request, events())


async def crash(request: Request) -> Response:
    raise OSError("cannot open /secret/path")


async def crash_later(request: Request) -> Response:
    async def events():
        yield b"data: 1\n\n"
        raise OSError("cannot open /secret/path")

    return request.app.state.server.sse(request, events())


async def embed(request: Request) -> Response:
    server = request.app.state.server
    result = await server.run(request, server.embed(request, [1, 2, 3]))
    return json_response(result.embedding)


ROUTES = [
    Route("/run", run, methods=["POST"]),
    Route("/crash", crash),
    Route("/crash_later", crash_later),
    Route("/embed", embed, methods=["POST"]),
    *load.routes,
    *admin.routes,
]


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        return self.json["error"]

    @property
    def events(self) -> list[str]:
        return [line.removeprefix("data: ") for line in self.body.decode().splitlines() if line.startswith("data: ")]


@dataclass
class Frame:
    """A running server: its parts live on the loop of another thread; look at them through `call`."""

    app: App
    engine: FakeAsyncEngine
    port: int
    loop: asyncio.AbstractEventLoop
    ended: Future[int]
    connections: list[socket.socket] = field(default_factory=list)  # closed at the end

    @property
    def server(self) -> Any:
        return self.app.server

    def call(self, function: Callable[[], Any]) -> Any:
        """Run on the server's loop."""

        async def run() -> Any:
            result = function()
            return await result if asyncio.iscoroutine(result) else result

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(20)

    def request(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            data = body if isinstance(body, (bytes, str)) or body is None else json.dumps(body)
            connection.request(method, path, data, headers or {})
            response = connection.getresponse()
            return Reply(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Reply:
        return self.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})

    def post(self, path: str, body: Any = None, **headers: str) -> Reply:
        return self.request("POST", path, body, {name.replace("_", "-"): value for name, value in headers.items()})

    def run(self, prompt: Any = "hello", key: str | None = None, **fields: Any) -> Reply:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return self.request("POST", "/run", {"prompt": prompt, **fields}, headers)

    def connect(self) -> socket.socket:
        self.connections.append(socket.create_connection(("127.0.0.1", self.port), timeout=20))
        return self.connections[-1]

    def raw(self, data: bytes, wait: float = 20) -> bytes:
        """Send these bytes, return all that comes until the connection ends or nothing comes for `wait` seconds."""
        with self.connect() as connection:
            connection.sendall(data)
            return read_all(connection, wait)

    def start_run(self, **fields: Any) -> socket.socket:
        """A request that is sent and not waited for."""
        connection = self.connect()
        body = json.dumps({"prompt": "hello", **fields}).encode()
        connection.sendall(b"POST /run HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        return connection

    def wait_until(self, condition: Callable[[], bool], seconds: float = 10) -> None:
        end = time.monotonic() + seconds
        while not self.call(condition):
            assert time.monotonic() < end, "it did not come to pass"
            time.sleep(0.01)

    def assert_nothing_is_held(self) -> None:
        """No request, no block, no place, whatever happened before."""
        blocks, server = self.engine.llm_engine.scheduler.block_manager, self.server
        self.wait_until(lambda: blocks.num_free_blocks == blocks.num_blocks and not self.engine.llm_engine._requests)
        self.wait_until(lambda: not server.num_open and not server.admission.num_running and not server.admission.num_waiting)
        assert not self.call(lambda: [a for a in server.admission._accounts.values() if a.num_open])


def read_all(connection: socket.socket, wait: float = 20) -> bytes:
    connection.settimeout(wait)
    received = b""
    try:
        while data := connection.recv(65536):
            received += data
    except (TimeoutError, ConnectionResetError):
        pass
    return received


@contextmanager
def serving(keyring: Keyring | None = None, options: dict[str, Any] | None = None, **engine_options: Any) -> Iterator[Frame]:
    """A frame with these options, in a thread with its own loop."""
    server_options = ServerOptions(port=0, **(options or {}))
    listener = bind(server_options)
    begun: Future[Frame] = Future()
    ended: Future[int] = Future()

    async def main() -> int:
        engine = FakeAsyncEngine(**engine_options)
        app = create_app(engine, server_options, keyring or Keyring(), routes=ROUTES)  # type: ignore[arg-type]
        running = Frame(app, engine, listener.getsockname()[1], asyncio.get_running_loop(), ended)
        try:
            return await run_app(app, listener, on_listening=lambda: begun.set_result(running))
        finally:
            await engine.close()

    def thread_main() -> None:
        try:
            ended.set_result(asyncio.run(main()))
        except BaseException as error:
            ended.set_exception(error)
            if not begun.done():
                begun.set_exception(error)

    thread = threading.Thread(target=thread_main)
    thread.start()
    frame = begun.result(20)
    try:
        yield frame
    finally:
        if not ended.done():
            frame.loop.call_soon_threadsafe(lambda: (frame.server.stop_open_requests(), frame.server.begin_drain()))
        for connection in frame.connections:
            connection.close()
        thread.join(20)
        listener.close()
        assert not thread.is_alive(), "the server did not end"
