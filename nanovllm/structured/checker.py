"""Compiles grammars of strangers in a process of its own, with a deadline.

For the front end of a server: whatever a schema or a regular expression does to the compiler, it costs its sender an
error and nobody else anything. The worker (`worker.py`) is started once, and killed and replaced when a grammar makes it
hang, die or outgrow its memory. It compiles with the same code, vocabulary and limits as the engine, so what passes
here compiles there. Messages are lines of JSON over pipes.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from nanovllm.child_process import child_command
from nanovllm.errors import CapacityError, InvalidGrammar
from nanovllm.log import logger
from nanovllm.sampling_params import StructuredOutput
from nanovllm.structured.limits import check_limits
from nanovllm.tokenizer import Tokenizer

START_TIMEOUT = 60.0  # seconds; it takes less than one on an idle machine
MAX_WAIT = 10.0  # seconds for the turn of a grammar
MAX_VERDICTS = 256  # remembered, good and bad


@dataclass(slots=True)
class _Worker:
    process: subprocess.Popen[bytes]
    reader: int  # file descriptor of what it says
    unread: bytes = b""

    def send(self, message: object) -> None:
        self.process.stdin.write(json.dumps(message).encode() + b"\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]

    def receive(self, timeout: float) -> dict | None:
        """Its next line; None when it does not come in time. Raises `EOFError` when the worker has died."""
        deadline = time.monotonic() + timeout
        while b"\n" not in self.unread:
            if not select.select([self.reader], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return None
            data = os.read(self.reader, 65536)
            if not data:
                raise EOFError("the worker died")
            self.unread += data
        line, self.unread = self.unread.split(b"\n", 1)
        return json.loads(line)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(OSError):  # what was still to be written goes nowhere
                pipe.close()  # type: ignore[union-attr]


class GrammarChecker:
    """Thread-safe; grammars are checked one after the other. Call it from a thread where an event loop runs."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_token_ids: Sequence[int]) -> None:
        self._model = {"tokenizer": tokenizer.to_json(), "vocab_size": vocab_size, "end_token_ids": list(end_token_ids)}
        self._lock = threading.Lock()
        self._worker: _Worker | None = None
        self._verdicts: dict[StructuredOutput, str | None] = {}
        self._is_closed = False

    def check_grammar(self, structured: StructuredOutput, timeout_s: float) -> None:
        """Return if it compiles within `timeout_s` seconds; else raise `InvalidGrammar`.

        Raises `CapacityError` when the grammars before it in the line take too long.
        """
        check_limits(structured)
        if not self._lock.acquire(timeout=MAX_WAIT):
            raise CapacityError("too many grammars wait to be compiled; try again later")
        try:
            error = self._judge(structured, timeout_s)
        finally:
            self._lock.release()
        if error is not None:
            raise InvalidGrammar(error)

    def knows(self, structured: StructuredOutput) -> bool:
        """Whether it was checked lately: then it compiles, or this raises `InvalidGrammar`. Waits for nobody."""
        if structured not in self._verdicts:
            return False
        error = self._verdicts.get(structured)
        if error is not None:
            raise InvalidGrammar(error)
        return True

    def _judge(self, structured: StructuredOutput, timeout_s: float) -> str | None:
        if self._is_closed:
            raise RuntimeError("the checker is closed")
        if structured not in self._verdicts:
            verdict = self._ask(structured, timeout_s)
            if len(self._verdicts) >= MAX_VERDICTS:
                del self._verdicts[next(iter(self._verdicts))]
            self._verdicts[structured] = verdict
        return self._verdicts[structured]

    def close(self) -> None:
        """End the worker. Idempotent."""
        with self._lock:
            self._is_closed = True
            self._stop()

    def _ask(self, structured: StructuredOutput, timeout_s: float) -> str | None:
        worker = self._worker or self._start()
        try:
            worker.send({"kind": structured.kind, "value": structured.value, "timeout_s": timeout_s})
            answer = worker.receive(timeout_s)
        except (EOFError, OSError):
            answer = {"error": f"{structured.kind}: the compiler gave up; it is too complex"}
            self._stop()
        if answer is None:
            logger.warning("a grammar (%s) took longer than %g s to compile: its worker is replaced", structured.kind, timeout_s)
            self._stop()
            return f"{structured.kind}: it takes longer than {timeout_s:g} seconds to compile; it is too complex"
        return answer["error"]

    def _start(self) -> _Worker:
        command = child_command("nanovllm.structured.worker")
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        worker = self._worker = _Worker(process, process.stdout.fileno())  # type: ignore[union-attr]
        cause = None
        try:
            worker.send(self._model)
            if worker.receive(START_TIMEOUT) == {"ready": True}:
                return worker
        except (EOFError, OSError) as error:
            cause = error
        self._stop()
        raise RuntimeError("the process that compiles grammars did not start") from cause

    def _stop(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker = None
