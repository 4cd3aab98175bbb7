"""Two real servers with a paced fake executor: a step of A takes 100 ms, one of B 10 % more."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pytest

STEP_S = 0.1
PROGRAM = """
import sys
from nanovllm.log import configure_logging
from nanovllm.server.options import ServerOptions
from nanovllm.server.serve import serve
configure_logging()
sys.exit(serve(ServerOptions(port=0, access_log=False), {"builder": "served:paced", "max_num_seqs": 64}))
"""


@dataclass(frozen=True)
class PacedServer:
    url: str
    step_s: float


@contextmanager
def paced_server(step_s: float) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "NANOVLLM_TEST_STEP_S": str(step_s)}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stderr=subprocess.PIPE, text=True, env=environment)
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=20)


def url_of(process: subprocess.Popen[str]) -> str:
    end, log = time.monotonic() + 60, []
    while time.monotonic() < end and (line := process.stderr.readline()):
        log.append(line)
        if found := re.search(r"at (http://[^ ]*:\d+)", line):
            return found[1]
    raise AssertionError("".join(log))


@pytest.fixture(scope="session")
def two_servers() -> Iterator[tuple[PacedServer, PacedServer]]:
    paces = (STEP_S, STEP_S * 1.1)
    with ExitStack() as stack:
        processes = [stack.enter_context(paced_server(pace)) for pace in paces]
        a, b = [PacedServer(url_of(process), pace) for process, pace in zip(processes, paces)]
        yield a, b
