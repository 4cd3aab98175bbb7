"""The life of one HTTP process: from the listening socket to the exit status.

SIGTERM or Ctrl-C drains: new requests get 503, open ones have `drain_timeout_s`, then the status is 0; a second signal does
not wait. An engine that dies, or is silent for `engine_timeout_s`, ends it with status 1, after a moment in which probes can
see why. Knows nothing of how the engine came to be; `serve.py` does.
"""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

from nanovllm.errors import ConfigError
from nanovllm.log import logger
from nanovllm.server.app import App
from nanovllm.server.http import HttpServer, make_http_server
from nanovllm.server.options import ServerOptions

DEAD_LINGER_S = 1.0  # how long a server says that its engine is dead, before it exits
OTHER_FILES = 256  # besides connections
BACKLOG = 2048  # connections that wait to be accepted
LAST_ANSWERS_S = 3.0  # for requests that the end of a drain has stopped


async def run_app(
    app: App,
    listener: socket.socket,
    *,
    on_listening: Callable[[], None] | None = None,
    on_drain: Callable[[], None] | None = None,
) -> int:
    """Serve until a drain has ended (0) or the engine has died (1).

    `on_drain`: whom an admin's wish to drain goes to; None: this process.
    """
    http = make_http_server(app, app.server.options)
    http.on_listening = on_listening
    stopper = Stopper(app, http)
    app.server.on_drain = on_drain or stopper.on_signal
    stopper.listen_to_signals()
    if seconds := app.server.options.engine_timeout_s:
        app.server.engine.watch(seconds)
    helpers = [asyncio.ensure_future(stopper.watch_engine()), asyncio.ensure_future(app.server.keep_in_step())]
    try:
        await http.serve(sockets=[listener])
    finally:
        for helper in helpers:
            helper.cancel()
        await asyncio.to_thread(app.server.close)  # it waits for a grammar that is being compiled
    return stopper.status


def run_process(main: Callable[[], Coroutine[Any, Any, int]]) -> int:
    """`asyncio.run`, on uvloop where there is one. A SIGTERM before `main` has its own handler ends it in good order: 0."""

    async def stoppable() -> int:
        task = asyncio.current_task()
        if task is not None and threading.current_thread() is threading.main_thread():
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await main()

    try:
        import uvloop
    except ImportError:
        run = asyncio.run
    else:
        run = uvloop.run
    try:
        return run(stoppable())
    except asyncio.CancelledError:
        logger.info("stopped while it was starting")
        return 0


def settle_memory() -> None:
    """What is loaded by now stays: the collector need not look at it again, and it comes round less often.

    With thousands of open requests its rounds took more time than everything else together (tests/server/test_load.py).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def allow_open_files(max_connections: int) -> None:
    """Every connection is an open file, and the usual limit of a shell, 1024, is less than `max_connections`."""
    wanted = max_connections + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))
    if allowed < wanted:
        logger.info("max_connections=%d, but only %d open files are allowed: ulimit -Hn would raise it", max_connections, hard)


class Stopper:
    """Ends one front end, in good order or not."""

    def __init__(self, app: App, http: HttpServer) -> None:
        self.server, self.http = app.server, http
        self.status = 0
        self._drain: asyncio.Task[None] | None = None

    def listen_to_signals(self) -> None:
        if threading.current_thread() is threading.main_thread():  # elsewhere, signals are somebody else's
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self.on_signal)

    def on_signal(self) -> None:
        """The first one drains, the second one ends."""
        self.server.is_draining = True
        if self._drain is None:
            self._drain = asyncio.ensure_future(self._drain_and_exit())
        else:
            self.server.stop_open_requests()

    async def _drain_and_exit(self) -> None:
        limit = self.server.options.drain_timeout_s
        logger.info("draining: %d requests are open and have %g s", self.server.num_open, limit)
        if not await self._wait_for_requests(limit):
            logger.warning("%d requests are still open after drain_timeout_s=%g, and are ended", self.server.num_open, limit)
            self.server.stop_open_requests()
            await self._wait_for_requests(LAST_ANSWERS_S)
        self.http.should_exit = True

    async def _wait_for_requests(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while self.server.num_open and time.monotonic() < end:
            await asyncio.sleep(0.02)
        return not self.server.num_open

    async def watch_engine(self) -> None:
        """Its streams end with `EngineDead` by themselves; probes see it for a moment, then the process ends."""
        error = await self.server.engine.wait_dead()
        logger.error("the engine has died: %s", error)
        self.server.is_draining, self.status = True, 1
        await asyncio.sleep(DEAD_LINGER_S)
        self.server.stop_open_requests()
        self.http.should_exit = True


# --- the address


def bind(options: ServerOptions) -> socket.socket:
    """The listening address, taken before the model is loaded. Raises `ConfigError`."""
    try:
        if options.uds is not None:
            return _bind_unix(options.uds)
        family, _, _, _, address = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0]
        if options.num_frontends > 1:
            _refuse_taken_port(family, address)
        return bind_tcp(family, address, is_shared=options.num_frontends > 1)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"cannot listen on {options.uds or f'{options.host}:{options.port}'}: {error}") from error


def bind_tcp(family: int, address: Any, is_shared: bool) -> socket.socket:
    """`is_shared`: other processes of this user may bind the same port, and connections are spread over them."""
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


def _bind_unix(path: str) -> socket.socket:
    """It listens at once, so that nobody takes the path of a server that is still loading for one that was killed."""
    _remove_if_abandoned(path)
    listener = socket.socket(socket.AF_UNIX)
    before = os.umask(0o177)  # for this user alone
    try:
        listener.bind(path)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    finally:
        os.umask(before)
    return listener


def _remove_if_abandoned(path: str) -> None:
    """A server that was killed leaves its socket, and nobody listens to it."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return  # binding it will say what is wrong
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1.0)
            probe.connect(path)
    except ConnectionRefusedError:
        logger.warning("%s was left by a server that is no more, and is taken over", path)
        os.unlink(path)
    except OSError:
        return


def _refuse_taken_port(family: int, address: Any) -> None:
    """With SO_REUSEPORT a second server would quietly share the port of the first."""
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)
