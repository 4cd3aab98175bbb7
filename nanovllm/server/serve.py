"""`nanovllm serve`: the processes of a server, from the first socket to the exit status.

One front end: this process speaks HTTP, and the engine is its child. Several: this process owns the engine and starts
front ends (`frontend.py`), which listen on one port (SO_REUSEPORT: the kernel spreads connections over them) and share one
engine. SIGTERM or Ctrl-C drains: new requests get 503, open ones have `drain_timeout_s`, then exit status 0; a second
signal does not wait. The death of the engine ends everything with exit status 1.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from nanovllm.engine.async_engine import AsyncEngine
from nanovllm.errors import ConfigError
from nanovllm.log import logger
from nanovllm.server.app import App, create_app
from nanovllm.server.auth import Keyring
from nanovllm.server.lifetime import bind, run_app
from nanovllm.server.options import ServerOptions

YOUNG_S = 5.0  # a front end that dies younger than this would do it again


def serve(options: ServerOptions, engine_options: dict[str, Any]) -> int:
    """Run until a signal or the death of the engine; returns the exit status. Raises `ConfigError`, `ModelError`."""
    keyring = Keyring.load(options)  # before anything takes time
    listener = bind(options)
    run = _serve_alone if options.num_frontends == 1 else _serve_with_front_ends
    try:
        if sys.version_info >= (3, 11) and (factory := _loop_factory()) is not None:
            with asyncio.Runner(loop_factory=factory) as runner:
                return runner.run(run(options, engine_options, keyring, listener))
        return asyncio.run(run(options, engine_options, keyring, listener))
    finally:
        listener.close()
        if options.uds is not None:
            Path(options.uds).unlink(missing_ok=True)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


# --- one process


async def _serve_alone(options: ServerOptions, engine_options: dict[str, Any], keyring: Keyring, listener: socket.socket) -> int:
    engine = await AsyncEngine.start(**engine_options)
    try:
        app = create_app(engine, options, keyring)
        return await run_app(app, listener, on_listening=lambda: announce(options, app, listener))
    finally:
        await engine.close()


# --- several processes


class FrontEndSetup(msgspec.Struct):
    """What a front end is told on its standard input."""

    address: str  # of the engine
    index: int
    folder: str
    options: dict[str, Any]
    port: int  # the one that was taken
    listener_fd: int | None  # of an inherited unix socket


async def _serve_with_front_ends(
    options: ServerOptions, engine_options: dict[str, Any], keyring: Keyring, listener: socket.socket
) -> int:
    engine = await AsyncEngine.start(**engine_options)
    folder = Path(tempfile.mkdtemp(prefix="nanovllm-"))  # 0700
    try:
        app = create_app(engine, options, keyring, routes=[])  # for its words only: this process speaks no HTTP
        family = FrontEnds(engine, options, listener, folder)
        await family.start()
        announce(options, app, listener)
        return await family.run()
    finally:
        await engine.close()
        shutil.rmtree(folder, ignore_errors=True)


class FrontEnds:
    """The children. One that dies is replaced; a signal reaches all of them."""

    def __init__(self, engine: AsyncEngine, options: ServerOptions, listener: socket.socket, folder: Path) -> None:
        self.engine, self.options, self.listener, self.folder = engine, options, listener, folder
        self.processes: dict[int, asyncio.subprocess.Process] = {}
        self._is_stopping = False

    async def start(self) -> None:
        if self.options.uds is not None:
            self.listener.listen(2048)
        for index in range(self.options.num_frontends):
            await self._start_one(index)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._pass_on, number)

    async def _start_one(self, index: int) -> None:
        inherited = self.options.uds is not None
        port = 0 if inherited else self.listener.getsockname()[1]
        fields = {name: getattr(self.options, name) for name in self.options.__dataclass_fields__}
        fd = self.listener.fileno() if inherited else None
        setup = FrontEndSetup(self.engine.address, index, str(self.folder), fields, port, fd)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "nanovllm.server.frontend"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            pass_fds=() if fd is None else (fd,),
            start_new_session=True,  # Ctrl-C reaches this process, which passes it on
        )
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(msgspec.json.encode(setup) + b"\n")
        await process.stdin.drain()
        if await process.stdout.readline() != b"listening\n":
            raise ConfigError(f"front end {index} did not start; its reason is above")
        self.processes[index] = process

    async def run(self) -> int:
        """Until all have ended. 0 after a drain, 1 when the engine died or a front end cannot stay up."""
        statuses = await asyncio.gather(*(self._keep_up(index) for index in range(self.options.num_frontends)))
        return max(statuses)

    async def _keep_up(self, index: int) -> int:
        while True:
            started = time.monotonic()
            status = await self.processes[index].wait()
            if self._is_stopping or not self.engine.is_alive:
                return status if status in (0, 1) else 1
            logger.error("front end %d ended with status %d", index, status)
            if time.monotonic() - started < YOUNG_S:
                self._pass_on(signal.SIGTERM)
                return 1
            await self._start_one(index)

    def _pass_on(self, number: int) -> None:
        self._is_stopping = True
        for process in self.processes.values():
            if process.returncode is None:
                process.send_signal(number)


# --- words


def announce(options: ServerOptions, app: App, listener: socket.socket) -> None:
    """The line that people and scripts wait for."""
    facts, server = app.server.engine.facts, app.server
    place = f"unix:{options.uds}" if options.uds is not None else _url(listener)
    keys = "keys are asked for" if Keyring.load(options).has_user_keys else "no keys"
    logger.info(
        "serving %s at %s (%s): %s, %s; context of %d tokens, %d KV blocks of %d tokens, %d sequences at once, %d front end(s)",
        *(server.model_name, place, keys, facts.device, facts.dtype, facts.max_model_len, facts.num_kv_blocks, facts.block_size),
        *(facts.max_num_seqs, options.num_frontends),
    )


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
