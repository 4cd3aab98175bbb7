"""Small GGUF files, written by the `gguf` package, and the real demo model when it is installed."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from nanovllm.errors import ModelNotFound
from nanovllm.loaders.checkpoint import Checkpoint, open_checkpoint

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INTERMEDIATE, LAYERS, VOCAB = 4, 2, 8, 32, 64, 2, 40

GGUFBuilder = Callable[..., Path]


def build_gguf(
    path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, tuple[Any, gguf.GGUFValueType]], architecture: str = "llama"
) -> Path:
    """`tensors`: float arrays, or (blocks, type) for quantised ones. `metadata`: (value, type)."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, (value, kind) in metadata.items():
        sub_type = gguf.GGUFValueType.STRING if kind == gguf.GGUFValueType.ARRAY and isinstance(value[0], str) else None
        writer.add_key_value(key, value, kind, sub_type)
    for name, tensor in tensors.items():
        data, kind = tensor if isinstance(tensor, tuple) else (tensor, None)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def model_metadata(architecture: str = "llama") -> dict[str, tuple[Any, gguf.GGUFValueType]]:
    kinds = gguf.GGUFValueType
    return {
        f"{architecture}.block_count": (LAYERS, kinds.UINT32),
        f"{architecture}.context_length": (512, kinds.UINT32),
        f"{architecture}.embedding_length": (HIDDEN, kinds.UINT32),
        f"{architecture}.feed_forward_length": (INTERMEDIATE, kinds.UINT32),
        f"{architecture}.attention.head_count": (HEADS, kinds.UINT32),
        f"{architecture}.attention.head_count_kv": (KV_HEADS, kinds.UINT32),
        f"{architecture}.attention.layer_norm_rms_epsilon": (1e-5, kinds.FLOAT32),
        f"{architecture}.rope.freq_base": (500000.0, kinds.FLOAT32),
        "tokenizer.ggml.bos_token_id": (1, kinds.UINT32),
        "tokenizer.ggml.eos_token_id": (2, kinds.UINT32),
        "tokenizer.ggml.tokens": ([f"t{i}" for i in range(VOCAB)], kinds.ARRAY),
    }


def model_tensors(architecture: str = "llama") -> dict[str, np.ndarray]:
    shapes = {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.attn_norm.weight": (HIDDEN,),
            f"blk.{layer}.attn_q.weight": (HEADS * HEAD_DIM, HIDDEN),
            f"blk.{layer}.attn_k.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"blk.{layer}.attn_v.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"blk.{layer}.attn_output.weight": (HIDDEN, HEADS * HEAD_DIM),
            f"blk.{layer}.ffn_norm.weight": (HIDDEN,),
            f"blk.{layer}.ffn_gate.weight": (INTERMEDIATE, HIDDEN),
            f"blk.{layer}.ffn_up.weight": (INTERMEDIATE, HIDDEN),
            f"blk.{layer}.ffn_down.weight": (HIDDEN, INTERMEDIATE),
        }
        if architecture == "qwen2":
            shapes |= {f"blk.{layer}.attn_q.bias": (HEADS * HEAD_DIM,)}
            shapes |= {f"blk.{layer}.attn_{kind}.bias": (KV_HEADS * HEAD_DIM,) for kind in "kv"}
        if architecture == "qwen3":
            shapes |= {f"blk.{layer}.attn_{kind}_norm.weight": (HEAD_DIM,) for kind in "qk"}
    random = np.random.default_rng(0)
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="session")
def write_gguf(tmp_path_factory: pytest.TempPathFactory) -> GGUFBuilder:
    """Write a GGUF file with the given tensors and metadata and nothing else."""

    def write(tensors: Mapping[str, Any], metadata: Mapping[str, Any] | None = None, architecture: str = "llama") -> Path:
        return build_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf", tensors, metadata or {}, architecture)

    return write


@pytest.fixture(scope="session")
def write_model(tmp_path_factory: pytest.TempPathFactory) -> GGUFBuilder:
    """Write a complete tiny model; keyword arguments add to or replace its tensors and metadata (None removes)."""

    def write(
        architecture: str = "llama", *, tensors: Mapping[str, Any] | None = None, metadata: Mapping[str, Any] | None = None
    ) -> Path:
        all_tensors: dict[str, Any] = {**model_tensors(architecture), **(tensors or {})}
        all_metadata: dict[str, Any] = {**model_metadata(architecture), **(metadata or {})}
        return build_gguf(
            tmp_path_factory.mktemp("model") / "tiny.gguf",
            {name: tensor for name, tensor in all_tensors.items() if tensor is not None},
            {key: value for key, value in all_metadata.items() if value is not None},
            architecture,
        )

    return write


@pytest.fixture(scope="session")
def demo() -> Checkpoint:
    """SmolLM2-135M-Instruct, Q4_1."""
    try:
        return open_checkpoint(None)
    except ModelNotFound as error:
        pytest.skip(str(error))
