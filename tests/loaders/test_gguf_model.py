from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import gguf.quants
import numpy as np
import pytest
import torch

from nanovllm.errors import InvalidCheckpoint, UnsupportedArchitecture, UnsupportedConfigValue
from nanovllm.loaders.checkpoint import Checkpoint, open_checkpoint
from nanovllm.loaders.gguf_file import GGUFFile
from nanovllm.loaders.gguf_model import config_from_gguf, hf_name
from nanovllm.model_spec import ConfigReader, RopeSpec, read_decoder_spec

Kinds = gguf.GGUFValueType
Builder = Callable[..., Path]


def gguf_row_order(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """What converting a llama model to GGUF does to the rows of its query and key projections."""
    return weight.reshape(num_heads, 2, len(weight) // num_heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def config_of(path: Path) -> dict[str, Any]:
    return config_from_gguf(GGUFFile(path))


def rope_of(path: Path) -> RopeSpec:
    return read_decoder_spec(ConfigReader(config_of(path)), qkv_bias=False).rope


def test_the_config_says_what_the_metadata_says(write_model: Builder) -> None:
    assert config_of(write_model()) == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": None,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": [2],
    }


@pytest.mark.parametrize(
    ("architecture", "hf_class"), [("llama", "LlamaForCausalLM"), ("qwen2", "Qwen2ForCausalLM"), ("qwen3", "Qwen3ForCausalLM")]
)
def test_all_tensors_of_each_architecture_get_hugging_face_names(architecture: str, hf_class: str, write_model: Builder) -> None:
    checkpoint = open_checkpoint(write_model(architecture))
    layer = r"model\.layers\.[01]\."
    projection = r"(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight"
    norm = r"(input_layernorm|post_attention_layernorm|self_attn\.[qk]_norm)\.weight"
    known = rf"{layer}({projection}|{norm}|self_attn\.[qkv]_proj\.bias)|model\.(embed_tokens|norm)\.weight"
    assert checkpoint.config["architectures"] == [hf_class]
    assert checkpoint.gguf is not None and len(checkpoint.weights.names()) == len(checkpoint.gguf.tensor_names)
    assert [name for name in checkpoint.weights.names() if not re.fullmatch(known, name)] == []


def test_names_that_are_not_in_the_dictionary_stay_visible() -> None:
    assert hf_name("output.weight") == "lm_head.weight"
    assert hf_name("blk.12.ffn_down.weight") == "model.layers.12.mlp.down_proj.weight"
    for unknown in (
        "blk.0.ffn_gate_exps.weight",
        "blk.0.attn_q.scale",
        "blk.0.token_embd.weight",
        "attn_q.weight",
        "rope_freqs.weight",
    ):
        assert hf_name(unknown) == unknown


def test_a_tensor_under_both_of_its_names_is_refused(write_model: Builder) -> None:
    path = write_model(tensors={"model.norm.weight": np.zeros(32, np.float32)})
    with pytest.raises(InvalidCheckpoint, match="both"):
        open_checkpoint(path)


def test_rows_of_llama_queries_and_keys_return_to_hugging_face_order(write_model: Builder) -> None:
    random = np.random.default_rng(5)
    query, key, bias = random.standard_normal((32, 32)), random.standard_normal((16, 32)), random.standard_normal(32)
    query, key, bias = query.astype(np.float32), key.astype(np.float32), bias.astype(np.float32)
    path = write_model(
        tensors={
            "blk.0.attn_q.weight": gguf_row_order(query, 4),
            "blk.0.attn_k.weight": gguf_row_order(key, 2),
            "blk.0.attn_q.bias": gguf_row_order(bias, 4),
            "blk.0.attn_v.weight": key,
        }
    )
    checkpoint = open_checkpoint(path)
    prefix = "model.layers.0.self_attn"
    assert checkpoint.config["attention_bias"] is True
    assert torch.equal(checkpoint.weights.load(f"{prefix}.q_proj.weight"), torch.from_numpy(query))
    assert torch.equal(checkpoint.weights.load(f"{prefix}.k_proj.weight"), torch.from_numpy(key))
    assert torch.equal(checkpoint.weights.load(f"{prefix}.q_proj.bias"), torch.from_numpy(bias))
    assert torch.equal(checkpoint.weights.load(f"{prefix}.v_proj.weight"), torch.from_numpy(key))


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_rows_of_qwen_queries_are_left_alone(architecture: str, write_model: Builder) -> None:
    checkpoint = open_checkpoint(write_model(architecture))
    assert checkpoint.gguf is not None
    stored = checkpoint.gguf.load("blk.1.attn_q.weight")
    assert torch.equal(checkpoint.weights.load("model.layers.1.self_attn.q_proj.weight"), stored)


def test_raw_blocks_come_in_the_same_row_order_as_loaded_values(write_model: Builder) -> None:
    query = np.random.default_rng(6).standard_normal((32, 32)).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q4_1
    path = write_model(tensors={"blk.0.attn_q.weight": (gguf.quants.quantize(query, kind), kind)})
    weights: Any = open_checkpoint(path).weights
    name = "model.layers.0.self_attn.q_proj.weight"
    assert weights.type_name(name) == "Q4_1"
    assert np.array_equal(gguf.quants.dequantize(weights.raw(name), kind), weights.load(name).numpy())


def test_an_output_tensor_unties_the_embeddings(write_model: Builder) -> None:
    checkpoint = open_checkpoint(write_model(tensors={"output.weight": np.zeros((40, 32), np.float32)}))
    assert checkpoint.config["tie_word_embeddings"] is False
    assert checkpoint.weights.shape("lm_head.weight") == (40, 32)


def test_head_size_comes_from_the_key_length(write_model: Builder) -> None:
    lengths = {"qwen3.attention.key_length": (16, Kinds.UINT32), "qwen3.attention.value_length": (16, Kinds.UINT32)}
    assert config_of(write_model("qwen3", metadata=lengths))["head_dim"] == 16


def test_ends_of_turns_and_messages_end_a_sequence_too(write_model: Builder) -> None:
    ids = {f"tokenizer.ggml.{kind}_token_id": (number, Kinds.UINT32) for kind, number in (("eot", 7), ("eom", 8))}
    assert open_checkpoint(write_model(metadata=ids)).eos_token_ids == (2, 7, 8)


def test_another_architecture_is_refused_by_name(write_model: Builder) -> None:
    with pytest.raises(UnsupportedArchitecture, match="'gemma3'"):
        config_of(write_model("gemma3"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.expert_count", (8, Kinds.UINT32)),
        ("llama.attention.sliding_window", (4096, Kinds.UINT32)),
        ("llama.attention.value_length", (16, Kinds.UINT32)),
        ("llama.rope.dimension_count", (4, Kinds.UINT32)),
        ("llama.attention.key_length", (7, Kinds.UINT32)),
        ("llama.attention.key_length", (0, Kinds.UINT32)),
        ("llama.rope.scaling.attn_factor", (1.5, Kinds.FLOAT32)),
        ("llama.brand_new_feature", (True, Kinds.BOOL)),
        ("llama.block_count", ("two", Kinds.STRING)),
        ("llama.block_count", (0, Kinds.UINT32)),
        ("llama.attention.head_count", ([4, 4], Kinds.ARRAY)),
        ("llama.attention.head_count_kv", ([2, 1], Kinds.ARRAY)),
        ("llama.rope.scaling.type", ("longrope", Kinds.STRING)),
        ("general.type", ("adapter", Kinds.STRING)),
        ("split.count", (3, Kinds.UINT16)),
    ],
)
def test_metadata_that_would_change_the_computation_is_refused_by_name(key: str, value: Any, write_model: Builder) -> None:
    with pytest.raises(UnsupportedConfigValue, match=key if "length" not in key else "attention|rotated"):
        config_of(write_model(metadata={key: value}))


def test_features_that_are_switched_off_do_no_harm(write_model: Builder) -> None:
    off = {"llama.expert_count": (0, Kinds.UINT32), "llama.rope.scaling.type": ("none", Kinds.STRING)}
    assert rope_of(write_model(metadata=off)) == RopeSpec(theta=500000.0)


def test_linear_scaling_is_translated(write_model: Builder) -> None:
    scaling = {"llama.rope.scaling.type": ("linear", Kinds.STRING), "llama.rope.scaling.factor": (4.0, Kinds.FLOAT32)}
    assert rope_of(write_model(metadata=scaling)) == RopeSpec(500000.0, "linear", 4.0)


def test_yarn_scaling_is_translated(write_model: Builder) -> None:
    scaling = {
        "llama.rope.scaling.type": ("yarn", Kinds.STRING),
        "llama.rope.scaling.factor": (4.0, Kinds.FLOAT32),
        "llama.rope.scaling.original_context_length": (128, Kinds.UINT32),
        "llama.rope.scaling.yarn_beta_fast": (16.0, Kinds.FLOAT32),
    }
    assert rope_of(write_model(metadata=scaling)) == RopeSpec(500000.0, "yarn", 4.0, 128, beta_fast=16.0)


def llama3_factors(factor: float, low: float = 1.0, high: float = 4.0, original: int = 8192, head_dim: int = 8) -> np.ndarray:
    """The tensor that llama.cpp writes, in the words of the Llama 3 reference, one frequency at a time."""
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * 500000.0 ** (i / head_dim)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3_factors_become_llama_3_scaling(factor: float, write_model: Builder) -> None:
    checkpoint = open_checkpoint(write_model(tensors={"rope_freqs.weight": llama3_factors(factor)}))
    rope = read_decoder_spec(ConfigReader(checkpoint.config), qkv_bias=False).rope
    assert rope == RopeSpec(500000.0, "llama3", factor, 8192, low_freq_factor=1.0, high_freq_factor=4.0)
    assert "rope_freqs.weight" not in checkpoint.weights.names()


def test_factors_inside_the_transition_zone_are_matched_too(write_model: Builder) -> None:
    factors = llama3_factors(32.0, head_dim=64)
    assert np.any((factors > 1) & (factors < 32))
    metadata = {f"llama.attention.{kind}_length": (64, Kinds.UINT32) for kind in ("key", "value")}
    config = config_of(write_model(tensors={"rope_freqs.weight": factors}, metadata=metadata))
    assert config["rope_scaling"]["factor"] == 32.0


def test_factors_of_one_scale_nothing(write_model: Builder) -> None:
    assert rope_of(write_model(tensors={"rope_freqs.weight": np.ones(4, np.float32)})) == RopeSpec(500000.0)


@pytest.mark.parametrize(
    "factors",
    [[1, 2, 3, 4], [8, 8, 8, 8], [1, 1, 8], [1, 1, 1, float("nan")], [1, 1, 1, float("inf")], [1, 1, 1, 0], [-1, -1, -1, -1]],
)
def test_other_rotary_factors_are_refused_and_never_ignored(factors: list[float], write_model: Builder) -> None:
    path = write_model(tensors={"rope_freqs.weight": np.array(factors, np.float32)})
    with pytest.raises(UnsupportedConfigValue, match=r"rope_freqs\.weight"):
        config_of(path)


def test_rotary_factors_beside_another_scaling_are_refused(write_model: Builder) -> None:
    scaling = {"llama.rope.scaling.type": ("linear", Kinds.STRING), "llama.rope.scaling.factor": (4.0, Kinds.FLOAT32)}
    with pytest.raises(UnsupportedConfigValue, match="both"):
        config_of(write_model(tensors={"rope_freqs.weight": llama3_factors(8.0)}, metadata=scaling))


def test_the_demo_model_is_described_completely(demo: Checkpoint) -> None:
    spec = read_decoder_spec(ConfigReader(demo.config), qkv_bias=False)
    assert (spec.hidden_size, spec.num_layers, spec.vocab_size) == (576, 30, 49152)
    assert (spec.total_num_heads, spec.total_num_kv_heads, spec.head_dim) == (9, 3, 64)
    assert spec.tie_word_embeddings and spec.norm_eps == 1e-5 and spec.rope == RopeSpec(theta=100000.0)
    assert demo.eos_token_ids == (2,)
    layer_names = [
        *(f"self_attn.{kind}_proj" for kind in "qkvo"),
        *(f"mlp.{kind}_proj" for kind in ("gate", "up", "down")),
        *("input_layernorm", "post_attention_layernorm"),
    ]
    expected = {f"model.layers.{layer}.{name}.weight" for layer in range(30) for name in layer_names}
    assert set(demo.weights.names()) == expected | {"model.embed_tokens.weight", "model.norm.weight"}
    assert sum(np.prod(demo.weights.shape(name)) for name in demo.weights.names()) == spec.num_parameters


def test_queries_of_the_demo_model_are_reordered(demo: Checkpoint) -> None:
    assert demo.gguf is not None
    loaded = demo.weights.load("model.layers.3.self_attn.q_proj.weight").numpy()
    assert np.array_equal(gguf_row_order(loaded, 9), demo.gguf.load("blk.3.attn_q.weight").numpy())
