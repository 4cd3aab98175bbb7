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
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from nanovllm.child_process import child_command
from nanovllm.engine.async_engine import DEFAULT_BUILDER, AsyncEngine
from nanovllm.errors import ConfigError
from nanovllm.log import logger
from nanovllm.observability.options import BUILDER as OBSERVER, ObservabilityOptions
from nanovllm.server.app import create_app
from nanovllm.server.auth import Keyring
from nanovllm.server.context import served_name
from nanovllm.server.lifetime import allow_open_files, bind, run_app, run_process, settle_memory
from nanovllm.server.options import ServerOptions

YOUNG_S = 5.0  # a front end that dies younger than this would do it again


def serve(options: ServerOptions, engine_options: dict[str, Any], observability: ObservabilityOptions | None = None) -> int:
    """Run until a signal or the death of the engine; returns the exit status. Raises `ConfigError`, `ModelError`."""
    if options.checkpoint is not None:
        from nanovllm.recovery.keeper import checkpointed  # the engine's side: only its process needs the rest

        engine_options = {**engine_options, **checkpointed(options.checkpoint, options.checkpoint_keep_s, engine_options)}
    if observability is not None and observability.is_on:
        options = replace(options, tells_requests=observability.tells_requests)
        engine_options = {**engine_options, **observed(options, engine_options, observability)}
    keyring = Keyring.load(options)  # before anything takes time
    allow_open_files(options.max_connections)
    listener = bind(options)
    run = _serve_alone if options.num_frontends == 1 else _serve_with_front_ends
    try:
        return run_process(lambda: run(options, engine_options, keyring, listener))
    finally:
        listener.close()
        if options.uds is not None:
            Path(options.uds).unlink(missing_ok=True)


def observed(options: ServerOptions, engine_options: dict[str, Any], observability: ObservabilityOptions) -> dict[str, Any]:
    """Options of `AsyncEngine.start` for an engine with listeners."""
    inner, inner_options = engine_options.get("builder", DEFAULT_BUILDER), engine_options.get("builder_options", {})
    model = served_name(options, engine_options.get("model"))
    of_observer = {"inner": inner, "inner_options": inner_options, "options": observability.as_dict(), "model": model}
    return {"builder": OBSERVER, "builder_options": of_observer}


# --- one process


async def _serve_alone(options: ServerOptions, engine_options: dict[str, Any], keyring: Keyring, listener: socket.socket) -> int:
    engine = await AsyncEngine.start(**engine_options)
    try:
        app = create_app(engine, options, keyring)
        settle_memory()
        return await run_app(app, listener, on_listening=lambda: announce(options, engine, keyring, listener))
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
        family = FrontEnds(engine, options, listener, folder)
        if options.engine_timeout_s:
            engine.watch(options.engine_timeout_s)  # its parent is the one that can end it
        await family.start()
        announce(options, engine, keyring, listener)
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
        await asyncio.gather(*(self._start_one(index) for index in range(self.options.num_frontends)))
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
            *child_command("nanovllm.server.frontend"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            pass_fds=() if fd is None else (fd,),
            start_new_session=True,  # Ctrl-C reaches this process, which passes it on
        )
        self.processes[index] = process  # at once: a signal is for those that start, too
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("a process without pipes")
        process.stdin.write(msgspec.json.encode(setup) + b"\n")
        await process.stdin.drain()
        if await process.stdout.readline() != b"listening\n" and not self._is_stopping:
            raise ConfigError(f"front end {index} did not start; its reason is above")

    async def run(self) -> int:
        """Until all have ended. 0 after a drain, 1 when the engine died or a front end cannot stay up."""
        statuses = await asyncio.gather(*(self._keep_up(index) for index in range(self.options.num_frontends)))
        return max(statuses)

    async def _keep_up(self, index: int) -> int:
        while True:
            started = time.monotonic()
            status = await self.processes[index].wait()
            if self._is_stopping or not self.engine.is_alive:
                return 0 if status in (0, -signal.SIGTERM) else 1  # the latter: it had not even begun
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


def announce(options: ServerOptions, engine: AsyncEngine, keyring: Keyring, listener: socket.socket) -> None:
    """The line that people and scripts wait for; the memory plan has been logged before."""
    facts, name = engine.facts, served_name(options, engine.facts.model)
    place = f"unix:{options.uds}" if options.uds is not None else _url(listener)
    keys = "with keys" if keyring.has_user_keys else "without keys"
    logger.info(
        "serving %s at %s (%s): %s, %s; context of %d tokens, %d KV blocks of %d tokens, %d sequences at once, %d front end(s)",
        *(name, place, keys, facts.device, facts.dtype, facts.max_model_len, facts.num_kv_blocks, facts.block_size),
        *(facts.max_num_seqs, options.num_frontends),
    )


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
