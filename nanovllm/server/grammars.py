"""Grammars: what clients ask their output to look like, compiled once on trial before the engine sees it.

A front end has one `Grammars`; the compiler runs in a process of its own (`structured/checker.py`), which starts with the
first grammar. One thread waits for it, so that other work that leaves the event loop is never behind a slow grammar.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nanovllm.errors import InvalidGrammar
from nanovllm.sampling_params import StructuredOutput
from nanovllm.server.errors import BadField, Unavailable
from nanovllm.structured.checker import GrammarChecker

if TYPE_CHECKING:
    from nanovllm.engine.async_engine import AsyncEngine
    from nanovllm.server.options import ServerOptions

MAX_WAITING = 256  # grammars of one key, all different

KEY: ContextVar[str] = ContextVar("KEY", default="")  # whose request this task serves; set when its body is read


class Turns:
    """One at a time; those who wait take turns by key, so that a key with slow grammars delays itself."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # the next key first
        self._is_taken = False

    @asynccontextmanager
    async def turn(self, key: str) -> AsyncIterator[None]:
        """Raises `Unavailable` (503) when too many of this key wait."""
        waiting = self._waiting.get(key, ())
        if len(waiting) >= MAX_WAITING:
            raise Unavailable(f"{MAX_WAITING} grammars of this key wait to be compiled", 1, "grammars_waiting")
        if self._is_taken:
            mine = asyncio.get_running_loop().create_future()
            self._waiting.setdefault(key, deque()).append(mine)
            try:
                await mine
            except asyncio.CancelledError:
                if mine.done() and not mine.cancelled():
                    self._pass_on()
                raise
        self._is_taken = True
        try:
            yield
        finally:
            self._pass_on()

    def _pass_on(self) -> None:
        self._is_taken = False
        for key in list(self._waiting):
            waiting = self._waiting.pop(key)
            while waiting and not self._is_taken:
                one = waiting.popleft()
                if not one.done():  # else its request has left
                    one.set_result(None)
                    self._is_taken = True
            if waiting:
                self._waiting[key] = waiting  # at the end
            if self._is_taken:
                return


@dataclass(slots=True)
class _Check:
    task: asyncio.Task[None]
    num_waiting: int = 0  # requests


class Grammars:
    def __init__(self, engine: AsyncEngine, options: ServerOptions) -> None:
        self._engine, self._options = engine, options
        self._checker: GrammarChecker | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._turns = Turns()
        self._under_way: dict[tuple[str, StructuredOutput], _Check] = {}

    async def make(self, field: str, kind: str, value: str | tuple[str, ...]) -> StructuredOutput:
        """A structured output that compiles. What is wrong with it is reported under the client's `field`."""
        num_bytes = len("".join(value).encode(errors="replace"))
        if num_bytes > self._options.max_schema_bytes:
            limit = f"max_schema_bytes={self._options.max_schema_bytes}"
            raise BadField(field, f"{field}: {kind} has {num_bytes} bytes; at most {limit} are allowed")
        try:
            structured = StructuredOutput(kind, value)
            await self._check(structured)
        except InvalidGrammar as error:
            raise BadField(field, f"{field}: {error}") from None
        return structured

    async def _check(self, structured: StructuredOutput) -> None:
        if self._checker is None or self._thread is None:
            facts = self._engine.facts
            self._checker = GrammarChecker(self._engine.tokenizer, facts.vocab_size, facts.eos_token_ids)
            self._thread = ThreadPoolExecutor(1, "grammars")
        if self._checker.knows(structured):
            return
        place = KEY.get(), structured  # a line is a key's own: nobody waits in that of another
        check = self._under_way.get(place)
        if check is None:
            check = self._under_way[place] = _Check(asyncio.ensure_future(self._check_anew(*place, self._checker)))
            check.task.add_done_callback(lambda _: self._under_way.pop(place, None))
        check.num_waiting += 1
        try:
            await asyncio.shield(check.task)
        finally:
            check.num_waiting -= 1
            if check.num_waiting == 0:
                check.task.cancel()  # if it is not done: whoever wanted it has left

    async def _check_anew(self, key: str, structured: StructuredOutput, checker: GrammarChecker) -> None:
        async with self._turns.turn(key):
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._thread, checker.check_grammar, structured, self._options.grammar_timeout_s)

    def close(self) -> None:
        """End the compiler's process. Idempotent."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
        if self._checker is not None:
            self._checker.close()
