"""Grammars: what clients ask their output to look like, compiled once on trial before the engine sees it.

A front end has one `Grammars`; the compiler runs in a process of its own (`structured/checker.py`), which starts with the
first grammar. One thread waits for it, so that other work that leaves the event loop is never behind a slow grammar.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from nanovllm.errors import InvalidGrammar
from nanovllm.sampling_params import StructuredOutput
from nanovllm.server.errors import BadField, Unavailable
from nanovllm.structured.checker import GrammarChecker

if TYPE_CHECKING:
    from nanovllm.engine.async_engine import AsyncEngine
    from nanovllm.server.options import ServerOptions

MAX_WAITING = 64  # grammars


class Grammars:
    def __init__(self, engine: AsyncEngine, options: ServerOptions) -> None:
        self._engine, self._options = engine, options
        self._checker: GrammarChecker | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._num_waiting = 0

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
        if self._num_waiting >= MAX_WAITING:
            raise Unavailable(f"{MAX_WAITING} grammars wait to be compiled", 1, "grammars_waiting")
        if self._checker is None or self._thread is None:
            facts = self._engine.facts
            self._checker = GrammarChecker(self._engine.tokenizer, facts.vocab_size, facts.eos_token_ids)
            self._thread = ThreadPoolExecutor(1, "grammars")
        self._num_waiting += 1
        try:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._thread, self._checker.check_grammar, structured, self._options.grammar_timeout_s)
        finally:
            self._num_waiting -= 1

    def close(self) -> None:
        """End the compiler's process. Idempotent."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
        if self._checker is not None:
            self._checker.close()
