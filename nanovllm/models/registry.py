"""Which class serves which architecture. Adding a family: one short file and one line here."""

from __future__ import annotations

import importlib
from typing import Any

from nanovllm.errors import UnsupportedArchitecture, did_you_mean
from nanovllm.model_spec import ConfigReader, ModelSpec
from nanovllm.models.decoder import Decoder

FAMILIES = {
    "LlamaForCausalLM": "nanovllm.models.llama",
    "Qwen2ForCausalLM": "nanovllm.models.qwen2",
    "Qwen3ForCausalLM": "nanovllm.models.qwen3",
}


def find_family(architecture: str) -> type[Decoder]:
    """The model class of a checkpoint's architecture, imported on demand."""
    if architecture not in FAMILIES:
        hint = f"{did_you_mean(architecture, FAMILIES)} (known: {', '.join(FAMILIES)})"
        raise UnsupportedArchitecture(f"architecture {architecture!r} is not implemented{hint}")
    return getattr(importlib.import_module(FAMILIES[architecture]), architecture)


def read_model_spec(config: dict[str, Any], source: str) -> ModelSpec:
    """A checkpoint's config, read by its family."""
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        raise UnsupportedArchitecture(f"{source}: 'architectures' should name the model class, got {architectures!r}")
    return find_family(architectures[0]).read_spec(ConfigReader(config, source))
