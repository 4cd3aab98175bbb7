"""Two servers for all tests of the endpoints: the real model, and a tiny one where sense does not matter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from live_server import LiveServer, live_server, write_tiny_model


@pytest.fixture(scope="session")
def live() -> Iterator[LiveServer]:
    with live_server(
        "--dtype", "float32", "--max-model-len", "1024", "--kv-cache-memory-bytes", str(2**27), "--max-num-seqs", "16"
    ) as server:
        yield server


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = write_tiny_model(tmp_path_factory.mktemp("models") / "tiny-qwen")
    options = ("--served-model-name", "tiny-qwen", "--max-model-len", "512", "--kv-cache-memory-bytes", str(2**24))
    with live_server(
        "--model", str(folder), *options, "--num-threads", "1", "--max-num-seqs", "16", "--max-prompts-per-request", "8"
    ) as server:
        yield server
