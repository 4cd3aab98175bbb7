"""A stand-in for `AsyncEngine` in one process: the real `LLMEngine` on a `FakeExecutor`, stepped by an asyncio task.

A token's text is one letter, so texts can be predicted. For tests of load and hostility; tests of answers use the real model.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace
from typing import Any

from support import VOCAB_SIZE, make_engine

from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.errors import EngineDead, RequestError
from nanovllm.outputs import GenerationOutput
from nanovllm.sampling_params import SamplingParams


def letters(token_ids: list[int]) -> str:
    return "".join(chr(ord("a") + token_id % 26) for token_id in token_ids)


@dataclass
class FakeFacts:
    model: str = "fake"
    max_model_len: int = 10_000
    vocab_size: int = VOCAB_SIZE
    eos_token_ids: tuple[int, ...] = ()
    block_size: int = 4
    num_kv_blocks: int = 64
    max_num_seqs: int = 8
    device: str = "cpu"
    dtype: str = "float32"
    memory_plan: str = "no memory at all"
    chat_template: str | None = None
    config: dict[str, Any] = field(default_factory=dict)


class FakeTokenizer:
    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(character) % VOCAB_SIZE for character in text]

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        return letters(token_ids)


class FakeAsyncEngine:
    """Options are those of `support.make_engine`."""

    def __init__(self, **options: Any) -> None:
        self.llm_engine: LLMEngine = make_engine(num_steps_ahead=0, **options)
        blocks = self.llm_engine.scheduler.block_manager
        self.facts = FakeFacts(
            max_model_len=self.llm_engine.max_model_len,
            block_size=blocks.block_size,
            num_kv_blocks=blocks.num_blocks,
            max_num_seqs=options.get("max_num_seqs", 8),
        )
        self.tokenizer = FakeTokenizer()
        self.is_alive = True
        self.is_paused = False
        self.aborted: set[str] = set()
        self.num_steps = 0
        self.trace = ""  # path that `profile` returns
        self._waiters: dict[str, asyncio.Event] = {}
        self._dead: asyncio.Future[BaseException] | None = None
        self._task: asyncio.Task[None] | None = None

    async def generate(
        self,
        prompt: str | list[int],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        origin: object = None,
    ) -> AsyncIterator[GenerationOutput]:
        self._check_alive()
        token_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        name = self.llm_engine.add_request(token_ids, params, request_id=request_id, priority=priority, cache_salt=cache_salt)
        output = self.llm_engine.output_of(name)
        grown = self._waiters[name] = asyncio.Event()
        if self._task is None or self._task.done():
            self._task = asyncio.ensure_future(self._loop())
        try:
            while not output.finished:
                await grown.wait()
                grown.clear()
                self._check_alive()
                for completion in output.completions:
                    completion.text += letters(completion.token_ids[len(completion.text) :])
                yield output
        finally:
            del self._waiters[name]
            self.llm_engine.abort(name)

    async def embed(self, prompt: str | list[int], pooling: str = "mean", *, request_id: str = "", **_: Any) -> Any:
        self._check_alive()
        while self.is_paused:
            await asyncio.sleep(0.01)
            if request_id in self.aborted:
                raise RequestError("the request was aborted")
        return SimpleNamespace(embedding=[1.0, 0.0], num_prompt_tokens=len(prompt))

    async def abort(self, request_id: str) -> None:
        self.llm_engine.abort(request_id)
        self.aborted.add(request_id)
        if request_id in self._waiters:
            self._waiters[request_id].set()

    async def stats(self) -> dict[str, float | int]:
        self._check_alive()
        scheduler = self.llm_engine.scheduler
        return {
            "num_waiting": len(scheduler.waiting),
            "num_running": len(scheduler.running),
            "num_free_blocks": scheduler.block_manager.num_free_blocks,
            "num_kv_blocks": scheduler.block_manager.num_blocks,
        }

    async def set_limits(self, **limits: Any) -> dict[str, Any]:
        return asdict(self.llm_engine.scheduler.set_limits(**limits))

    async def reset_prefix_cache(self) -> bool:
        self.llm_engine.scheduler.block_manager.reset_prefix_cache()
        return True

    async def inspect(self) -> dict[str, Any]:
        return {"running": [], "waiting": []}

    async def profile(self, seconds: float) -> str:
        await asyncio.sleep(seconds)
        return self.trace

    def watch(self, max_silence: float) -> None:
        """It has no process that could hang."""

    async def wait_dead(self) -> BaseException:
        return await self._death()

    def die(self) -> None:
        self.is_alive = False
        self._death().set_result(EngineDead("killed by the test at /secret/path"))
        for event in self._waiters.values():
            event.set()

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
        self.llm_engine.close()

    def _death(self) -> asyncio.Future[BaseException]:
        if self._dead is None:
            self._dead = asyncio.get_running_loop().create_future()
        return self._dead

    def _check_alive(self) -> None:
        if not self.is_alive:
            raise EngineDead("killed by the test at /secret/path")

    async def _loop(self) -> None:
        engine = self.llm_engine
        while self.is_alive and (engine.has_work or self._waiters):
            if engine.has_work and not self.is_paused:
                outputs = await asyncio.to_thread(engine.step) if engine.executor.seconds_per_step else engine.step()  # type: ignore[attr-defined]
                self.num_steps += 1
                for output in outputs:
                    if output.request_id in self._waiters:
                        self._waiters[output.request_id].set()
            await asyncio.sleep(0)
