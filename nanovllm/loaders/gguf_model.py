"""A GGUF file in Hugging Face terms: config keys, tensor names, and the row order of rotary projections.

GGUF describes a model by metadata such as `llama.attention.head_count` and names such as `blk.0.attn_q.weight`. The
rest of nanovllm knows only `num_attention_heads` and `model.layers.0.self_attn.q_proj.weight`; this module is the
dictionary between the two. Metadata under the architecture's prefix that is not in the dictionary is refused by name:
a key that is ignored is a model that is quietly wrong.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from nanovllm.errors import InvalidCheckpoint, UnsupportedArchitecture, UnsupportedConfigValue
from nanovllm.loaders.gguf_file import GGUFFile
from nanovllm.model_spec import ConfigReader

if TYPE_CHECKING:
    from torch import Tensor

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

# Metadata below the architecture's prefix that `config_from_gguf` reads, or that says nothing about the computation.
UNDERSTOOD_KEYS = {
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.layer_norm_rms_epsilon",
    "attention.value_length", "block_count", "context_length", "embedding_length", "feed_forward_length", "rope.dimension_count",
    "rope.freq_base", "rope.scaling.factor", "rope.scaling.finetuned", "rope.scaling.original_context_length",
    "rope.scaling.type", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow", "tensor_data_layout", "vocab_size",
}  # fmt: skip
# Keys of features that are not implemented, with the values that switch them off.
NEUTRAL_VALUES: dict[str, Any] = {
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attention.sliding_window": 0,
    "embedding_scale": 1.0,
    "expert_count": 0,
    "expert_used_count": 0,
    "logit_scale": 1.0,
    "residual_scale": 1.0,
    "rope.scale_linear": 1.0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
}

TENSOR_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_TENSOR_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"
LLAMA3_LOW_FREQ_FACTOR, LLAMA3_HIGH_FREQ_FACTOR, LLAMA3_ORIGINAL_CONTEXT = 1.0, 4.0, 8192


def hf_name(gguf_name: str) -> str:
    """The Hugging Face name of a tensor; a name that is not in the dictionary stays, so that it is seen and refused."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", gguf_name, re.ASCII)
    if match is None:
        return gguf_name
    layer, stem, kind = match.groups()
    if layer is None:
        return f"{TENSOR_NAMES[stem]}.{kind}" if stem in TENSOR_NAMES else gguf_name
    return f"model.layers.{layer}.{LAYER_TENSOR_NAMES[stem]}.{kind}" if stem in LAYER_TENSOR_NAMES else gguf_name


def config_from_gguf(file: GGUFFile) -> dict[str, Any]:
    """The file's metadata as the `config.json` of the same model would put it."""
    reader = ConfigReader(file.metadata, str(file.path))
    architecture = reader.require("general.architecture", str)
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UnsupportedArchitecture(f"{file.path}: general.architecture={architecture!r} is not implemented (only {known} are)")
    refuse_unknown_metadata(reader, architecture)
    hidden_size = reader.require_positive(f"{architecture}.embedding_length")
    num_heads = reader.require_positive(f"{architecture}.attention.head_count")
    config = {
        "architectures": [ARCHITECTURES[architecture]],
        "model_type": architecture,
        "vocab_size": file.shape("token_embd.weight")[0],
        "hidden_size": hidden_size,
        "intermediate_size": reader.require_positive(f"{architecture}.feed_forward_length"),
        "num_hidden_layers": reader.require_positive(f"{architecture}.block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": reader.get(f"{architecture}.attention.head_count_kv", int, num_heads),
        "head_dim": read_head_dim(reader, architecture, hidden_size, num_heads),
        "hidden_act": "silu",
        "rms_norm_eps": shortest_float(reader.require(f"{architecture}.attention.layer_norm_rms_epsilon", float)),
        "max_position_embeddings": reader.require_positive(f"{architecture}.context_length"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "dtype": {"F32": "float32", "F16": "float16"}.get(file.type_name("token_embd.weight"), "bfloat16"),
        **read_special_tokens(file.metadata),
    }
    config.update(read_rope(reader, architecture, file, config["head_dim"]))
    if architecture != "qwen2":  # whose query, key and value always have biases and whose config has no such key
        config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if architecture == "llama":
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in file.tensors
    return config


def refuse_unknown_metadata(reader: ConfigReader, architecture: str) -> None:
    reader.expect("general.type", "model")
    reader.expect("general.quantization_version", 2)
    reader.expect("split.count", 0, 1)
    for key, neutral in NEUTRAL_VALUES.items():
        reader.expect(f"{architecture}.{key}", neutral)
    prefix = architecture + "."
    for key in reader.config:
        if key.startswith(prefix) and not {key.removeprefix(prefix)} & (UNDERSTOOD_KEYS | NEUTRAL_VALUES.keys()):
            raise UnsupportedConfigValue(f"{reader.source}: the metadata {key}={str(reader.config[key])[:100]} is not understood")


def read_head_dim(reader: ConfigReader, architecture: str, hidden_size: int, num_heads: int) -> int:
    head_dim = reader.get(f"{architecture}.attention.key_length", int, hidden_size // num_heads)
    if head_dim < 2 or head_dim % 2:
        raise UnsupportedConfigValue(f"{reader.source}: heads of size {head_dim} cannot be rotated in pairs")
    reader.expect(f"{architecture}.attention.value_length", head_dim)
    reader.expect(f"{architecture}.rope.dimension_count", head_dim)
    return head_dim


def read_special_tokens(metadata: dict[str, Any]) -> dict[str, Any]:
    """Beginning and end; chat models may end a turn (`eot`) and a message (`eom`) with tokens of their own."""
    ends = [metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    return {
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": [token_id for token_id in ends if token_id is not None],
    }


def read_rope(reader: ConfigReader, architecture: str, file: GGUFFile, head_dim: int) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`; the scaling comes from metadata or from a tensor of factors, never from both."""
    prefix = f"{architecture}.rope.scaling"
    theta = shortest_float(reader.get(f"{architecture}.rope.freq_base", float, 10000.0))
    kind = reader.get(f"{prefix}.type", str, "none")
    if kind == "none":
        scaling = read_rope_factors(file, theta, head_dim) if ROPE_FACTORS in file.tensors else None
        return {"rope_theta": theta, "rope_scaling": scaling}
    if ROPE_FACTORS in file.tensors:
        raise UnsupportedConfigValue(f"{file.path}: both {prefix}.type={kind!r} and the tensor {ROPE_FACTORS} scale the rotation")
    reader.expect(f"{prefix}.type", "linear", "yarn")
    scaling = {"rope_type": kind, "factor": reader.require(f"{prefix}.factor", float)}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = reader.require_positive(f"{prefix}.original_context_length")
        scaling["beta_fast"] = reader.get(f"{prefix}.yarn_beta_fast", float, 32.0)
        scaling["beta_slow"] = reader.get(f"{prefix}.yarn_beta_slow", float, 1.0)
    return {"rope_theta": theta, "rope_scaling": scaling}


def read_rope_factors(file: GGUFFile, theta: float, head_dim: int) -> dict[str, Any] | None:
    """The `rope_scaling` that gives the factors by which the file divides its frequencies; refused if there is none.

    The factors of a Llama 3 file follow from one number, the largest of them: the other constants never varied.
    """
    factors = file.load(ROPE_FACTORS).double().flatten().numpy()  # [head_dim / 2]
    if np.all(factors == 1.0):
        return None
    factor = shortest_float(float(factors.max()))
    if len(factors) == head_dim // 2 and np.allclose(factors, llama3_factors(theta, head_dim, factor), rtol=1e-5, atol=0.0):
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": LLAMA3_LOW_FREQ_FACTOR,
            "high_freq_factor": LLAMA3_HIGH_FREQ_FACTOR,
            "original_max_position_embeddings": LLAMA3_ORIGINAL_CONTEXT,
        }
    raise UnsupportedConfigValue(
        f"{file.path}: the {len(factors)} rotary factors in {ROPE_FACTORS} (largest {factor}) are not those of Llama 3 scaling "
        f"for head_dim={head_dim} and theta={theta}; no other kind is implemented"
    )


def llama3_factors(theta: float, head_dim: int, factor: float) -> np.ndarray:
    """By what Llama 3 scaling divides each frequency: 1 for the fast ones, `factor` for the slow ones, [head_dim / 2]."""
    with np.errstate(all="ignore"):  # hostile values give NaN, which equals no factor
        wavelengths = 2 * math.pi * np.float64(theta) ** (np.arange(0, head_dim, 2) / head_dim)
        turns = LLAMA3_ORIGINAL_CONTEXT / wavelengths  # within the original context
        smooth = (turns - LLAMA3_LOW_FREQ_FACTOR) / (LLAMA3_HIGH_FREQ_FACTOR - LLAMA3_LOW_FREQ_FACTOR)
        smooth = smooth.clip(0.0, 1.0)
        return 1 / ((1 - smooth) / np.float64(factor) + smooth)


def shortest_float(value: float) -> float:
    """GGUF stores float32. 9.999999747378752e-06 is the float32 for 1e-05, which the original config says."""
    with np.errstate(over="ignore"):
        return float(str(np.float32(value)))


def rotary_row_order(num_heads: int, head_dim: int) -> np.ndarray:
    """The row of a llama GGUF that each row of the Hugging Face projection comes from.

    GGUF turns neighbouring pairs of rows, Hugging Face turns row i with row i + head_dim / 2. One head, head_dim 6:

        Hugging Face row   0  1  2  3  4  5      pairs (0, 3) (1, 4) (2, 5)
        GGUF row           0  2  4  1  3  5      pairs (0, 1) (2, 3) (4, 5)
    """
    return np.arange(num_heads * head_dim).reshape(num_heads, head_dim // 2, 2).swapaxes(1, 2).reshape(-1)


class GGUFWeights:
    """The tensors of a GGUF file under their Hugging Face names and in Hugging Face's row order (a `WeightSource`)."""

    def __init__(self, file: GGUFFile, config: dict[str, Any]) -> None:
        self.file = file
        self._head_dim: int = config["head_dim"]
        self._rows_are_interleaved = config["model_type"] == "llama"
        # The factors went into the config's rope_scaling; they are no weight of the model.
        gguf_names = [name for name in file.tensor_names if name != ROPE_FACTORS]
        self._gguf_names = {hf_name(name): name for name in gguf_names}
        if len(self._gguf_names) != len(gguf_names):
            raise InvalidCheckpoint(f"{file.path} has tensors under both their GGUF and their Hugging Face names")

    def names(self) -> list[str]:
        return list(self._gguf_names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.file.shape(self._gguf_name(name))

    def type_name(self, name: str) -> str:
        """How the tensor is stored, such as "Q4_1"."""
        return self.file.type_name(self._gguf_name(name))

    def load(self, name: str) -> Tensor:
        """Float32, or the stored type for F16 and BF16; [rows, columns] or [values] for norms and biases."""
        tensor = self.file.load(self._gguf_name(name))
        order = self._row_order(name)
        return tensor if order is None else tensor[order]

    def raw(self, name: str) -> np.ndarray:
        """The stored blocks of a matrix, [num_rows, bytes_per_row] uint8, read-only; rows in the order of `load`."""
        blocks = self.file.raw(self._gguf_name(name))
        order = self._row_order(name)
        return blocks if order is None else blocks[order]

    def _gguf_name(self, name: str) -> str:
        if name not in self._gguf_names:
            raise InvalidCheckpoint(f"{self.file.path} has no tensor for {name!r}")
        return self._gguf_names[name]

    def _row_order(self, name: str) -> np.ndarray | None:
        """How to reorder the rows of this tensor; None when they are stored as they should be."""
        if not self._rows_are_interleaved or not re.search(r"\.self_attn\.[qk]_proj\.(weight|bias)$", name):
            return None
        num_rows = self.shape(name)[0]
        if num_rows % self._head_dim:
            raise InvalidCheckpoint(
                f"{self.file.path}: {name!r} has {num_rows} rows, not a multiple of head_dim={self._head_dim}"
            )
        return rotary_row_order(num_rows // self._head_dim, self._head_dim)
