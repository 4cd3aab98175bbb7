"""Builders for `AsyncEngine.start(builder="served:...")`: real engine processes without a model.

The vocabulary is the words w0 to w49, and a text is words with spaces between, so a test reads token ids from the text.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections import deque

import numpy as np
import tokenizers
from support import VOCAB_SIZE, CountingExecutor, FakeExecutor, make_scheduler

from nanovllm.config import EngineConfig
from nanovllm.engine.batch import ScheduledBatch, StepResult
from nanovllm.engine.engine_process import ServedEngine
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.messages import EngineFacts
from nanovllm.errors import InvalidGrammar
from nanovllm.executor.base import Executor
from nanovllm.sampling_params import StructuredOutput
from nanovllm.structured.base import Grammar
from nanovllm.tokenizer import Tokenizer
from nanovllm.tokenizer_files import TokenizerParts

BLOCK_SIZE = 4


class FailingExecutor(FakeExecutor):
    """Breaks in its fifth step."""

    def dispatch(self, batch: ScheduledBatch) -> None:
        if batch.step == 4:
            raise RuntimeError("the fake device caught fire")
        super().dispatch(batch)


class PacedExecutor(CountingExecutor):
    """A step is ready so long after it was dispatched, or after the one before was ready."""

    def __init__(self, seconds_per_step: float) -> None:
        super().__init__()
        self._seconds_per_step = seconds_per_step
        self._ready_at: deque[float] = deque([0.0])

    def dispatch(self, batch: ScheduledBatch) -> None:
        self._ready_at.append(max(self._ready_at[-1], time.monotonic()) + self._seconds_per_step)
        super().dispatch(batch)

    def collect(self) -> StepResult:
        if len(self._ready_at) > 1:
            self._ready_at.popleft()
        time.sleep(max(0.0, self._ready_at[0] - time.monotonic()))
        return super().collect()


def make_tokenizer() -> Tokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(VOCAB_SIZE)}, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return Tokenizer(TokenizerParts(backend, {"eos_token": "w49"}, frozenset([49]), {"default": "{{ messages[0].content }}"}))


class SlowGrammar:
    """Takes a second for each new form, which is then kept; "bad" is refused after it. Its matchers allow everything."""

    error: str | None = None

    def __init__(self) -> None:
        self.known: set[str] = set()

    def prepare(self, structured: StructuredOutput) -> None:
        if structured.text not in self.known:
            time.sleep(1.0)
            if structured.text == "bad":
                raise InvalidGrammar("regex: as told")
            self.known.add(structured.text)

    def compile(self, structured: StructuredOutput, can_end_early: bool = True) -> SlowGrammar:
        assert structured.text in self.known, "compiled in the engine's thread"
        return self

    def fill_mask(self, mask: np.ndarray) -> None:
        mask[:] = -1

    def accept(self, token_id: int) -> str | None:
        return None


def serve(config: EngineConfig, executor: Executor, grammar: Grammar | None = None) -> ServedEngine:
    """Never ends by itself: there are no end tokens."""
    num_blocks, max_num_seqs = config.num_kv_blocks or 4096, config.max_num_seqs or 256
    scheduler = make_scheduler(num_blocks, BLOCK_SIZE, max_num_seqs, 2048)
    max_model_len = num_blocks * BLOCK_SIZE
    engine = LLMEngine(
        scheduler, executor, vocab_size=VOCAB_SIZE, max_model_len=max_model_len, grammar=grammar, num_steps_ahead=1
    )
    tokenizer = make_tokenizer()
    facts = EngineFacts(
        model="fake",
        vocab_size=VOCAB_SIZE,
        max_model_len=max_model_len,
        block_size=BLOCK_SIZE,
        num_kv_blocks=num_blocks,
        max_num_seqs=max_num_seqs,
        eos_token_ids=(),
        has_chat_template=True,
        device="fake",
        dtype="float32",
        memory_plan="none",
        config=dataclasses.asdict(config),
        pid=os.getpid(),
    )
    return ServedEngine(engine, tokenizer, facts, grammar)


def fake(config: EngineConfig) -> ServedEngine:
    return serve(config, FakeExecutor(config.num_kv_blocks or 4096, BLOCK_SIZE))


def slow(config: EngineConfig) -> ServedEngine:
    """100 steps per second."""
    return serve(config, FakeExecutor(config.num_kv_blocks or 4096, BLOCK_SIZE, seconds_per_step=0.01))


def slow_grammars(config: EngineConfig) -> ServedEngine:
    """100 steps per second, and a second per grammar."""
    return serve(config, FakeExecutor(config.num_kv_blocks or 4096, BLOCK_SIZE, seconds_per_step=0.01), SlowGrammar())


def paced(config: EngineConfig) -> ServedEngine:
    """One step takes as many seconds as the environment says. Draws without looking."""
    return serve(config, PacedExecutor(float(os.environ["NANOVLLM_TEST_STEP_S"])))


def counting(config: EngineConfig) -> ServedEngine:
    """As fast as the host side goes; every token is w7."""
    return serve(config, CountingExecutor())


def failing(config: EngineConfig) -> ServedEngine:
    return serve(config, FailingExecutor(config.num_kv_blocks or 4096, BLOCK_SIZE))


def refusing(config: EngineConfig) -> ServedEngine:
    raise RuntimeError("no such device")


def never_ready(config: EngineConfig) -> ServedEngine:
    """A model that loads for ever."""
    print("loading for ever", file=sys.stderr, flush=True)
    time.sleep(600)
    raise SystemExit("a test has waited for ten minutes")
