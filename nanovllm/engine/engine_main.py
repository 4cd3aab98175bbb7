"""The process that owns an engine, from its first line to its last: build, serve, end.

Started by `connection.spawn_engine` with the name of a builder as argument and its config on standard input. The loop
is in `engine_process.py`. It ends when it is told to, when the engine fails (status 1), or when its parent has gone; a
start that fails is explained to whoever says hello.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import json
import os
import select
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import zmq

from nanovllm.config import EngineConfig
from nanovllm.engine.engine_process import EngineProcess, ServedEngine, traceback_of
from nanovllm.engine.messages import EngineFacts, Failure, LastWords, encode
from nanovllm.engine.progress import few_full_collections
from nanovllm.errors import InvalidGrammar, NanoVllmError
from nanovllm.log import DegradationCounter, configure_logging, logger
from nanovllm.sampling_params import StructuredOutput

HELLO_SECONDS = 5.0  # to wait for somebody who can be told that the start has failed


def build(config: EngineConfig) -> ServedEngine:
    """The builder of real engines."""
    from nanovllm.llm import open_engine  # torch: with another builder this process does without

    built, tokenizer = open_engine(config, speaks_text=False)
    peak = built.platform.peak(built.config.dtype)
    facts = EngineFacts(
        model=config.model,
        vocab_size=built.spec.vocab_size,
        max_model_len=built.memory_plan.max_model_len,
        block_size=built.memory_plan.block_size,
        num_kv_blocks=built.memory_plan.num_blocks,
        max_num_seqs=built.config.scheduler_limits.max_num_seqs,
        eos_token_ids=built.eos_token_ids,
        has_chat_template=tokenizer.chat_template is not None,
        device=built.platform.describe(),
        dtype=built.config.dtype,
        memory_plan=built.memory_plan.describe(),
        config=dataclasses.asdict(built.config),
        pid=os.getpid(),
        spec=dataclasses.asdict(built.spec),
        roofline={"weight_bytes": built.weight_bytes, "peak": peak and dataclasses.asdict(peak)},
    )
    if built.grammar is not None:
        with contextlib.suppress(InvalidGrammar):  # without its library there are none
            built.grammar.prepare(StructuredOutput("json_object"))  # its view of the vocabulary takes all steps' time, once
    return ServedEngine(built.engine, tokenizer, facts, built.grammar)


def main(builder: str) -> None:
    """`builder`: "package.module:function", makes a `ServedEngine`. The rest is a line of JSON on standard input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C and a service manager's SIGTERM go to the whole group, but the
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # parent decides: it may want to finish what runs. It tells us, or dies
    start = json.loads(sys.stdin.buffer.readline())
    folder = Path(start["folder"])
    threading.Thread(target=die_with_parent, args=(folder, start["parent"]), name="die-with-parent", daemon=True).start()
    configure_logging()
    logger.setLevel(start["log_level"])
    context = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # sending to one who has gone is an error, not silence
    socket.setsockopt(zmq.LINGER, 2000)
    socket.bind(start["address"])
    try:
        run(builder, EngineConfig(**start["config"]), socket, folder, start["builder_options"])
    finally:
        socket.close()
        context.term()


def run(builder: str, config: EngineConfig, socket: zmq.Socket, folder: Path, options: dict[str, Any]) -> None:
    degradations = DegradationCounter()
    try:
        module, _, name = builder.partition(":")
        served = getattr(importlib.import_module(module), name)(config, **options)
        process = EngineProcess(served, socket, folder, degradations.counts)
    except BaseException as error:
        refuse_to_start(socket, error)
        sys.exit(1)
    gc.collect()
    gc.freeze()  # the model's objects live as long as the process: no collection need look at them
    try:
        with few_full_collections():
            process.serve()
    except Exception as error:
        logger.error("the engine failed: %r", error)  # the front ends have the traceback
        sys.exit(1)


def refuse_to_start(socket: zmq.Socket, error: BaseException) -> None:
    """Tell whoever says hello why there will be no engine."""
    failure = Failure.of(error)
    words = LastWords(failure, "" if isinstance(error, NanoVllmError) else traceback_of(error))
    end_time = time.monotonic() + HELLO_SECONDS
    while socket.poll(max(0, int((end_time - time.monotonic()) * 1000))):
        identity, *_ = socket.recv_multipart()
        with contextlib.suppress(zmq.ZMQError):  # it has gone
            socket.send_multipart([identity, encode(words)], zmq.NOBLOCK)
        end_time = min(end_time, time.monotonic() + 0.1)


def die_with_parent(folder: Path, parent: int) -> None:
    """Standard input is a pipe that the parent never writes to again: its end is the parent's end."""
    while os.getppid() == parent and not select.select([sys.stdin], [], [], 1.0)[0]:
        pass
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)
