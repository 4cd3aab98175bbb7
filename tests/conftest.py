"""The GPU machine has neither gguf nor a usable Transformers: what needs them is not collected there."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator

import pytest

collect_ignore: list[str] = []
if importlib.util.find_spec("gguf") is None:
    collect_ignore = ["loaders", "models", "layers", "runner", "test_llm.py", "test_real_model.py", "test_chat_template.py"]
    collect_ignore += ["test_tokenizer.py", "test_tokenizer_gguf.py", "test_tokenizer_streams.py"]
if any(importlib.util.find_spec(name) is None for name in ("msgspec", "starlette", "openai", "jsonschema", "yaml", "zmq")):
    collect_ignore += ["server", "structured", "engine", "recovery", "bench", "observability"]
    collect_ignore += ["test_cli.py", "test_deploy.py", "test_remote_chat.py", "test_degradations.py", "test_retry.py"]


@pytest.fixture(autouse=True)
def log_as_before() -> Iterator[None]:
    """A test that sets up logging leaves no handler behind that writes into its captured, closed stream."""
    logger = logging.getLogger("nanovllm")
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = handlers, level, propagate
