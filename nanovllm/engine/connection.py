"""A front end's end of the line: the socket to an engine process, on the running event loop, and that process's life.

Owns the DEALER socket, the child process if this front end started it, and its private folder. Sending never waits;
what arrives is decoded and handed to one callback. The death of the engine is noticed by the closing of its socket,
whoever its parent is; that it hangs, by its silence (`watch`). Knows nothing of requests: `async_engine.py` does. Sockets
are unix sockets in a folder that only this user can enter, which is all the access control there is and needs to be.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from nanovllm.child_process import child_command
from nanovllm.config import EngineConfig
from nanovllm.engine.messages import Goodbye, Shutdown, decode_for_frontend, encode
from nanovllm.errors import EngineDead
from nanovllm.log import logger

MAX_SOCKET_PATH = 100  # characters; the system's limit is 107
MAX_MESSAGES_PER_TURN = 8  # then the consumers of what was received have their turn
EXIT_SECONDS = 5.0  # that the engine process has to leave by itself
LINGER_MS = 500  # that closing may take to deliver a goodbye


@dataclass(frozen=True, slots=True)
class EngineChild:
    """A started engine process and the folder that belongs to it."""

    process: subprocess.Popen[bytes]
    folder: Path

    @property
    def address(self) -> str:
        return address_in(self.folder)

    async def wait(self, seconds: float) -> bool:
        """False: it still runs."""
        for _ in range(int(seconds * 100)):
            if self.process.poll() is not None:
                return True
            await asyncio.sleep(0.01)
        return self.process.poll() is not None

    def release(self) -> None:
        """End the process, if it has not, and remove the folder. Idempotent."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def describe_end(self) -> str:
        status = self.process.poll()
        if status is None:
            return "closed its connection"
        return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"


def address_in(folder: Path) -> str:
    return f"ipc://{folder}/engine.sock"


def spawn_engine(config: EngineConfig, builder: str, builder_options: dict[str, Any] | None = None) -> EngineChild:
    """Start an engine process. It sees our `sys.path`, gets its config as JSON, and ends when we do.

    `builder` is code's choice ("package.module:function"), never a user's.
    """
    folder = Path(tempfile.mkdtemp(prefix="nanovllm-"))  # mode 0700
    if len(address_in(folder)) > MAX_SOCKET_PATH:
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix="nanovllm-", dir="/tmp"))
    process = subprocess.Popen(child_command("nanovllm.engine.engine_main", builder), stdin=subprocess.PIPE)
    child = EngineChild(process, folder)
    start = {
        "address": child.address,
        "folder": str(folder),
        "parent": os.getpid(),
        "log_level": logger.getEffectiveLevel(),
        "config": dataclasses.asdict(config),
        "builder_options": builder_options or {},
    }
    stdin = process.stdin
    if stdin is not None:
        with contextlib.suppress(BrokenPipeError):  # it is dead already, which is noticed soon
            stdin.write(json.dumps(start).encode() + b"\n")
            stdin.flush()
    return child


class EngineConnection:
    """`dead` is a future that tells why the engine is no more; it never raises."""

    def __init__(self, address: str, child: EngineChild | None, on_message: Callable[[Any], None]) -> None:
        self.address = address
        self.child = child
        self._loop = asyncio.get_running_loop()
        self.dead: asyncio.Future[EngineDead] = self._loop.create_future()
        self._on_message = on_message
        self._burial: asyncio.Task[None] | None = None
        self._watch: asyncio.Task[None] | None = None
        self._heard = 0.0  # when the last message came, of the monotonic clock
        self._is_drain_due = False
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.SNDHWM, 0)  # what is sent is bounded by the requests that are open
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._socket.connect(address)
        self._loop.add_reader(self._socket.fileno(), self._drain)
        self._loop.add_reader(self._monitor.fileno(), self._on_disconnect)
        self._is_open = True
        self._on_disconnect()  # a descriptor signals only what comes after a look that found nothing
        if child is not None:  # also when the program ends without `close`, or forgets this object
            weakref.finalize(self, child.release)

    @property
    def is_alive(self) -> bool:
        return self._is_open and not self.dead.done() and self._burial is None

    def send(self, message: Any) -> None:
        """Raises `EngineDead`, and TypeError, ValueError or OverflowError for what msgpack cannot say."""
        if not self.is_alive:
            raise self.death()
        self._socket.send(encode(message), zmq.NOBLOCK)
        self._drain_soon()  # sending can swallow the sign that something has arrived

    def death(self) -> EngineDead:
        """A new exception each time: one that is raised in several places grows a traceback of all."""
        return EngineDead(str(self.dead.result()) if self.dead.done() else "the engine process has stopped")

    def _drain_soon(self) -> None:
        if not self._is_drain_due:
            self._is_drain_due = True
            self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        """Take what has arrived, a few messages at a time."""
        self._is_drain_due = False
        for _ in range(MAX_MESSAGES_PER_TURN):
            if not self._is_open or (payload := self._receive()) is None:
                return
            self._on_message(decode_for_frontend(payload))
        self._drain_soon()

    def _receive(self) -> bytes | None:
        try:
            payload = self._socket.recv(zmq.NOBLOCK)
        except zmq.Again:
            return None
        self._heard = time.monotonic()
        return payload

    def watch(self, max_silence: float) -> None:
        """From now on an engine that says nothing for `max_silence` seconds is dead, and is killed if it is our child.

        A living one says something between two steps, at least once a second (`SIGN_OF_LIFE_SECONDS`).
        """
        self._watch = self._loop.create_task(self._listen_for_life(max_silence))

    async def _listen_for_life(self, max_silence: float) -> None:
        self._heard = time.monotonic()
        while self.is_alive:
            await asyncio.sleep(min(1.0, max_silence / 4))
            self._drain()  # if it was us who hung, its messages wait here
            if time.monotonic() - self._heard > max_silence:
                reason = f"the engine process has given no sign of life for {max_silence:g} seconds"
                logger.error("%s", reason)
                self.die(reason)
                if self.child is not None:
                    self.child.process.kill()

    def _on_disconnect(self) -> None:
        while self._is_open:
            try:
                recv_monitor_message(self._monitor, zmq.NOBLOCK)
            except zmq.Again:
                return
            if self._burial is None and not self.dead.done():
                self._burial = self._loop.create_task(self._bury())

    async def _bury(self) -> None:
        """Hear the last words, then say how it ended."""
        while self._is_open and (payload := self._receive()) is not None:
            self._on_message(decode_for_frontend(payload))
        if self.child is not None:
            await self.child.wait(EXIT_SECONDS)
        self.die(f"the engine process {self.child.describe_end() if self.child else 'closed its connection'}")

    def die(self, reason: str) -> None:
        """Only the first reason counts."""
        if not self.dead.done():
            self.dead.set_result(EngineDead(reason))

    async def close(self) -> None:
        """Leave the engine; end it, if it is our child. Idempotent."""
        if not self._is_open:
            return
        if self.is_alive:
            self.send(Goodbye() if self.child is None else Shutdown())
        self.die("the engine was closed")
        for task in (self._burial, self._watch):
            if task is not None:
                task.cancel()
        try:
            if self.child is not None:
                await self.child.wait(EXIT_SECONDS)
        finally:
            self._close_sockets()
            if self.child is not None:
                self.child.release()

    def _close_sockets(self) -> None:
        if not self._is_open:
            return
        self._is_open = False
        for a_socket in (self._socket, self._monitor):
            self._loop.remove_reader(a_socket.fileno())
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close(linger=LINGER_MS)
        self._context.term()


def check_somebody_listens(address: str) -> None:
    """Raise `EngineDead` unless a process listens at this address."""
    path = address.removeprefix("ipc://")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError as error:
            raise EngineDead(f"no engine listens at {address}: {error.strerror}") from None
