"""One of several front-end processes, started by `serve.py` alone.

Reads its setup from standard input, connects to the engine, listens, says "listening" and serves until it is told to stop.
Loads no model and no tensor library.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from pathlib import Path

import msgspec

from nanovllm.engine.async_engine import AsyncEngine
from nanovllm.log import configure_logging
from nanovllm.server.app import create_app
from nanovllm.server.lifetime import bind_tcp, run_app, run_process, settle_memory
from nanovllm.server.options import ServerOptions
from nanovllm.server.serve import FrontEndSetup
from nanovllm.server.shared import SharedFolder


def main() -> int:
    configure_logging()
    setup = msgspec.json.decode(sys.stdin.buffer.readline(), type=FrontEndSetup)
    return run_process(lambda: run(setup))


async def run(setup: FrontEndSetup) -> int:
    options = ServerOptions(**setup.options)
    engine = await AsyncEngine.connect(setup.address)
    try:
        app = create_app(engine, options, shared=SharedFolder(Path(setup.folder), setup.index))
        listener = _listen(setup, options)
        settle_memory()
        asyncio.get_running_loop().add_reader(sys.stdin.fileno(), _parent_has_gone)
        return await run_app(app, listener, on_listening=_say_listening, on_drain=lambda: os.kill(os.getppid(), signal.SIGTERM))
    finally:
        await engine.close()


def _say_listening() -> None:
    print("listening", flush=True)


def _parent_has_gone() -> None:
    """Standard input is a pipe that the parent never writes to again; when it ends, so did the parent."""
    os._exit(1)


def _listen(setup: FrontEndSetup, options: ServerOptions) -> socket.socket:
    if setup.listener_fd is not None:
        return socket.socket(fileno=os.dup(setup.listener_fd))
    family, _, _, _, address = socket.getaddrinfo(options.host, setup.port, type=socket.SOCK_STREAM)[0]
    return bind_tcp(family, address, is_shared=True)
