from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator

import pytest
from structured.model import make_llm

from nanovllm import LLM


@pytest.fixture(scope="package")
def llm() -> Iterator[LLM]:
    with make_llm() as llm:
        yield llm
