"""`cpu_pin_threads`: which thread may run where, as the system itself tells, and what is refused."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kernels.test_cpu_step import HERE, library
from runner.test_compiled_step import PROMPTS, generate, make_engine, toy_source

from nanovllm.config import EngineConfig
from nanovllm.errors import ConfigError
from nanovllm.kernels.cpu import build
from nanovllm.llm import build_engine
from nanovllm.models.compiled_decoder import CompiledDecoder
from nanovllm.platforms import cpu
from nanovllm.platforms.cpu import CpuPlatform, own_cores

CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
pytestmark = [
    pytest.mark.skipif(build.find_compiler() is None, reason="no C++ compiler"),
    pytest.mark.skipif(len(CORES) < 2, reason="needs Linux and two cores"),
]


def allowed_cores(thread: int) -> str:
    """As in "0-1,4"; the thread is one of this process, by the system's number."""
    status = Path(f"/proc/self/task/{thread}/status").read_text()
    return next(line for line in status.splitlines() if line.startswith("Cpus_allowed_list")).split()[1]


def started_by(work: Callable[[], object]) -> list[int]:
    before = set(os.listdir("/proc/self/task"))
    work()
    return [int(thread) for thread in os.listdir("/proc/self/task") if thread not in before]


def test_each_thread_stays_on_its_core_and_draws_the_same_tokens():
    expected = generate(make_engine(), PROMPTS)
    engine = make_engine(num_threads=2, cpu_pin_threads=True)
    tokens: list[list[int]] = []
    started = started_by(lambda: tokens.extend(generate(engine, PROMPTS)))
    assert tokens == expected
    lists = [allowed_cores(thread) for thread in started]
    assert [one for one in lists if one.isdigit()] == [str(own_cores(2)[1])]


def test_without_the_option_every_thread_may_run_everywhere():
    engine, everywhere = make_engine(num_threads=2), allowed_cores(threading.get_native_id())
    started = started_by(lambda: generate(engine, PROMPTS))
    assert started and {allowed_cores(thread) for thread in started} == {everywhere}


def test_the_caller_is_bound_while_it_computes_and_what_it_starts_later_is_not():
    engine, caller = make_engine(num_threads=2, cpu_pin_threads=True), threading.get_native_id()
    everywhere, seen, is_done = allowed_cores(caller), set(), threading.Event()

    def look() -> None:
        while not is_done.is_set():
            seen.add(allowed_cores(caller))

    watcher = threading.Thread(target=look)
    watcher.start()
    deadline = time.monotonic() + 30
    while str(own_cores(2)[0]) not in seen and time.monotonic() < deadline:
        generate(engine, PROMPTS)
    is_done.set()
    watcher.join()
    assert seen <= {everywhere, str(own_cores(2)[0])} and len(seen) == 2
    inherited: list[str] = []
    late = threading.Thread(target=lambda: inherited.append(allowed_cores(threading.get_native_id())))
    late.start()
    late.join()
    assert inherited == [everywhere] == [allowed_cores(caller)]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"num_threads": len(CORES) + 1}, f"{len(CORES) + 1} threads.*{len(CORES)} cores"),
        ({"num_threads": 1, "cpu_compute": "torch"}, "compiled step.*torch"),
        ({"num_threads": 1, "dtype": "float32"}, "compiled step.*torch"),
    ],
)
def test_what_cannot_be_is_refused(options, words):
    spec, source = toy_source("qwen3")
    config = EngineConfig(**{"num_kv_blocks": 40, "block_size": 4, "cpu_compute": "auto", "cpu_pin_threads": True, **options})
    with pytest.raises(ConfigError, match=f"cpu_pin_threads.*{words}"):
        build_engine(config, CpuPlatform(), spec, source)


def test_is_refused_without_a_compiler_and_where_it_is_no_yes_or_no(monkeypatch):
    with pytest.raises(ConfigError, match="cpu_pin_threads must be True or False"):
        EngineConfig(cpu_pin_threads=1)  # type: ignore[arg-type]
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"cpu_pin_threads.*missing compiler"):
        build_engine(EngineConfig(num_threads=1, num_kv_blocks=40, cpu_pin_threads=True), CpuPlatform(), *toy_source("qwen3"))


def test_is_refused_outside_linux(monkeypatch):
    monkeypatch.delattr(os, "sched_setaffinity")
    with pytest.raises(ConfigError, match="cpu_pin_threads=True needs Linux"):
        own_cores(1)


@pytest.mark.parametrize("cores", [[CORES[0], 1023], [1023, CORES[0]], [CORES[0], 5000]] if CORES else [])
def test_a_core_that_the_system_does_not_give_is_refused(cores):
    decoder = CompiledDecoder(toy_source("qwen3")[0], "int8", torch.float32, library(HERE[0]), 2, cores)
    with pytest.raises(ConfigError, match=r"cpu_pin_threads.*does not let threads stay on the cores"):
        make_first_step(decoder)


def make_first_step(decoder: CompiledDecoder) -> None:
    engine = make_engine(num_threads=2)
    runner = engine.executor.runner
    decoder._matrices, decoder._vectors = runner.model._matrices, runner.model._vectors
    decoder._attach(runner.kv_caches, torch.zeros(1, 1, dtype=torch.int32))


def test_threads_of_one_processor_core_are_taken_last(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 3, 6})
    siblings = {0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3", 6: "6-7"}
    monkeypatch.setattr(cpu, "_read", lambda path: siblings[int(path.split("/cpu/cpu")[1].split("/")[0])])
    assert own_cores(5) == [0, 2, 6, 1, 3]
    monkeypatch.setattr(cpu, "_read", lambda path: "")
    assert own_cores(3) == [0, 1, 2]
