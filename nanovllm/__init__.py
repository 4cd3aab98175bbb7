"""nanovllm: an LLM inference engine that a person reads in an evening.

    from nanovllm import LLM, SamplingParams

Public names are imported on first use, so that control-plane modules (scheduler, block manager, simulator) need no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from nanovllm.platforms.openmp import set_waiting_policy
from nanovllm.version import __version__ as __version__

if TYPE_CHECKING:
    from nanovllm.config import EngineConfig
    from nanovllm.engine.async_engine import AsyncEngine
    from nanovllm.engine.llm_engine import LLMEngine
    from nanovllm.llm import LLM, CompletionDelta
    from nanovllm.outputs import CompletionOutput, EmbeddingOutput, GenerationOutput
    from nanovllm.sampling_params import SamplingParams, StructuredOutput

__all__ = [
    "LLM",
    "AsyncEngine",
    "CompletionDelta",
    "CompletionOutput",
    "EmbeddingOutput",
    "EngineConfig",
    "GenerationOutput",
    "LLMEngine",
    "SamplingParams",
    "StructuredOutput",
]

_HOMES = {
    "LLM": "nanovllm.llm",
    "AsyncEngine": "nanovllm.engine.async_engine",
    "CompletionDelta": "nanovllm.llm",
    "CompletionOutput": "nanovllm.outputs",
    "EmbeddingOutput": "nanovllm.outputs",
    "EngineConfig": "nanovllm.config",
    "GenerationOutput": "nanovllm.outputs",
    "LLMEngine": "nanovllm.engine.llm_engine",
    "SamplingParams": "nanovllm.sampling_params",
    "StructuredOutput": "nanovllm.sampling_params",
}

set_waiting_policy()  # before anything imports torch


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'nanovllm' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
