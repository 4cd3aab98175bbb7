"""Shapes of models: what the cost model must know of them, without a weight and without torch.

A name of the table, or the path of a `config.json` of a decoder with SwiGLU. Read next: `cost.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

from nanovllm.errors import ConfigError, did_you_mean
from nanovllm.model_spec import ConfigReader, ModelSpec, RopeSpec, read_decoder_spec


def _qwen3(hidden: int, inner: int, layers: int, heads: int, is_tied: bool) -> ModelSpec:
    rope = RopeSpec(1_000_000.0)
    return ModelSpec("Qwen3ForCausalLM", 151_936, hidden, inner, layers, heads, 8, 128, 1e-6, rope, 40_960, is_tied, qk_norm=True)


def _llama(
    vocabulary: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, is_tied: bool, limit: int
) -> ModelSpec:
    rope = RopeSpec(500_000.0)
    head_dim = hidden // heads
    return ModelSpec("LlamaForCausalLM", vocabulary, hidden, inner, layers, heads, kv_heads, head_dim, 1e-5, rope, limit, is_tied)


SHAPES: dict[str, ModelSpec] = {
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, True),
    "qwen3-8b": _qwen3(4096, 12_288, 36, 32, False),
    "qwen3-14b": _qwen3(5120, 17_408, 40, 40, False),
    "qwen3-32b": _qwen3(5120, 25_600, 64, 64, False),
    "llama-3.2-1b": _llama(128_256, 2048, 8192, 16, 32, 8, True, 131_072),
    "llama-3.1-8b": _llama(128_256, 4096, 14_336, 32, 32, 8, False, 131_072),
    "smollm2-135m": _llama(49_152, 576, 1536, 30, 9, 3, True, 8192),
}


def find_shape(name: str) -> ModelSpec:
    if name in SHAPES:
        return SHAPES[name]
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        known = ", ".join(SHAPES)
        raise ConfigError(f"model={name!r} is neither one of {known} nor a config.json{did_you_mean(name, SHAPES)}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model={name!r}: {path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"model={name!r}: {path} does not hold an object")
    family = str(config.get("model_type"))
    return read_decoder_spec(ConfigReader(config, str(path)), qkv_bias=family == "qwen2", qk_norm=family == "qwen3")
