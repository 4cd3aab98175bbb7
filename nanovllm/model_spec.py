"""ModelSpec: a checkpoint's architecture in numbers, read strictly and once.

A checkpoint's config (`config.json`, or GGUF metadata translated into the same keys) goes through `ConfigReader`.
Families (`models/llama.py` and its neighbours) say which values they support through `expect`; whatever is not
understood is refused by name, because a config key that is ignored is a model that is quietly wrong.

Control plane: imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, overload

from nanovllm.errors import UnsupportedConfigValue

T = TypeVar("T")
_REQUIRED: Any = object()


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding and its context extension (`layers/rotary.py` turns it into frequencies)."""

    theta: float
    scaling: str = "none"  # "none", "linear", "llama3" or "yarn"
    factor: float = 1.0
    original_max_position: int = 0  # context length before extension; llama3 and yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn; None: from the factor
    truncate: bool = True  # yarn: round the correction range to whole dimensions


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """All that the engine needs to know about a model before it sees a weight."""

    architecture: str  # a key of models/registry.py, such as "LlamaForCausalLM"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    total_num_heads: int
    total_num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: RopeSpec
    max_position: int  # longest context that the checkpoint claims, tokens
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False  # bias of the attention's output projection
    qk_norm: bool = False  # RMSNorm over each head of q and k (Qwen3)
    dtype: str = "bfloat16"  # the checkpoint's own dtype

    @property
    def num_parameters(self) -> int:
        """Weights of the decoder family, tied embeddings counted once."""
        query_size, kv_size = self.total_num_heads * self.head_dim, self.total_num_kv_heads * self.head_dim
        attention = self.hidden_size * (2 * query_size + 2 * kv_size)
        attention += (query_size + 2 * kv_size) * self.qkv_bias + self.hidden_size * self.output_bias
        attention += 2 * self.head_dim * self.qk_norm
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * layer + embeddings + self.hidden_size

    def kv_bytes_per_token(self, bytes_per_value: int) -> int:
        """Bytes of keys and values that one token leaves in the cache, over all layers and heads."""
        return 2 * self.num_layers * self.total_num_kv_heads * self.head_dim * bytes_per_value


class ConfigReader:
    """Strict access to a checkpoint's config. Errors name the key, the value and the checkpoint."""

    def __init__(self, config: Mapping[str, Any], source: str = "config.json") -> None:
        self.config = config
        self.source = source

    @overload
    def get(self, key: str, kind: type[T], default: None) -> T | None: ...
    @overload
    def get(self, key: str, kind: type[T], default: T) -> T: ...
    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of `key` as `kind`; `default` when it is absent or null."""
        value = self.config.get(key)
        if value is None:
            if default is _REQUIRED:
                raise UnsupportedConfigValue(f"{self.source} has no {key!r}; it is needed to build the model")
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value) if abs(value) < 2**1000 else math.inf
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise UnsupportedConfigValue(f"{self.source}: {key}={value!r} should be of type {kind.__name__}")
        if kind is float and not math.isfinite(value):
            raise UnsupportedConfigValue(f"{self.source}: {key}={value!r} is not a finite number")
        return value

    def require(self, key: str, kind: type[T]) -> T:
        """The value of `key` as `kind`; an error when it is absent."""
        value: T = self.get(key, kind, _REQUIRED)  # pyright: ignore[reportAssignmentType]  (never None: that raises)
        return value

    def require_positive(self, key: str) -> int:
        value = self.require(key, int)
        if not 0 < value < 2**31:
            raise UnsupportedConfigValue(f"{self.source}: {key}={value} must be positive")
        return value

    def expect(self, key: str, *supported: Any) -> None:
        """Refuse the checkpoint unless `key` is absent, null, or one of `supported`."""
        value = self.config.get(key)
        if value is not None and value not in supported:
            only = f" (only {' or '.join(repr(value) for value in supported)} is)" if supported else ""
            raise UnsupportedConfigValue(f"{self.source}: {key}={value!r} is not implemented{only}")


def read_decoder_spec(reader: ConfigReader, *, qkv_bias: bool, output_bias: bool = False, qk_norm: bool = False) -> ModelSpec:
    """The numbers that all pre-norm, rotary, SwiGLU decoders share; families add their own `expect` lines."""
    reader.expect("hidden_act", "silu", "swish")
    reader.expect("quantization_config")
    reader.expect("partial_rotary_factor", 1.0)
    hidden_size = reader.require_positive("hidden_size")
    num_heads = reader.require_positive("num_attention_heads")
    num_kv_heads = reader.get("num_key_value_heads", int, num_heads)
    head_dim = reader.get("head_dim", int, hidden_size // num_heads)
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise UnsupportedConfigValue(
            f"{reader.source}: {num_heads} query heads cannot share {num_kv_heads} key/value heads evenly"
        )
    if head_dim < 2 or head_dim % 2:
        raise UnsupportedConfigValue(f"{reader.source}: head_dim={head_dim} must be even; rotary embedding turns pairs")
    max_position = reader.require_positive("max_position_embeddings")
    norm_eps = reader.require("rms_norm_eps", float)
    if norm_eps < 0:
        raise UnsupportedConfigValue(f"{reader.source}: rms_norm_eps={norm_eps} must not be negative")
    return ModelSpec(
        architecture=read_architecture(reader),
        vocab_size=reader.require_positive("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=reader.require_positive("intermediate_size"),
        num_layers=reader.require_positive("num_hidden_layers"),
        total_num_heads=num_heads,
        total_num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        norm_eps=norm_eps,
        rope=read_rope_spec(reader, max_position),
        max_position=max_position,
        tie_word_embeddings=reader.get("tie_word_embeddings", bool, False),
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        qk_norm=qk_norm,
        dtype=str(reader.config.get("dtype") or reader.config.get("torch_dtype") or "float32"),
    )


def read_architecture(reader: ConfigReader) -> str:
    """The one class name in `architectures`."""
    architectures = reader.require("architectures", list)
    if len(architectures) != 1 or not isinstance(architectures[0], str):
        raise UnsupportedConfigValue(f"{reader.source}: architectures={architectures!r} should hold exactly one name")
    return architectures[0]


def read_rope_spec(reader: ConfigReader, max_position: int) -> RopeSpec:
    """`rope_parameters` (Transformers 5) or `rope_theta` with `rope_scaling` (before). Unknown kinds are refused."""
    rope = ConfigReader(_merge_rope_parameters(reader), f"{reader.source}: rope scaling")
    theta = rope.get("rope_theta", float, reader.get("rope_theta", float, 10000.0))
    if theta <= 0:
        raise UnsupportedConfigValue(f"{rope.source}: rope_theta={theta} must be positive")
    rope.expect("partial_rotary_factor", 1.0)
    kind = rope.config.get("rope_type") or "default"
    if kind == "default":
        return RopeSpec(theta=theta)
    if kind not in ("linear", "llama3", "yarn"):
        raise UnsupportedConfigValue(f"{rope.source}: rope_type={kind!r} is not implemented (only linear, llama3 and yarn are)")
    factor = rope.require("factor", float)
    original = rope.get("original_max_position_embeddings", int, max_position)
    original = reader.get("original_max_position_embeddings", int, original)
    if factor <= 0 or original <= 0:
        raise UnsupportedConfigValue(
            f"{rope.source}: factor={factor} and original_max_position_embeddings={original} must be positive"
        )
    if kind == "linear":
        return RopeSpec(theta=theta, scaling="linear", factor=factor)
    if kind == "llama3":
        low, high = rope.require("low_freq_factor", float), rope.require("high_freq_factor", float)
        if low >= high:
            raise UnsupportedConfigValue(f"{rope.source}: low_freq_factor={low} must be below high_freq_factor={high}")
        return RopeSpec(theta, "llama3", factor, original, low_freq_factor=low, high_freq_factor=high)
    fast, slow = rope.get("beta_fast", float, 32.0), rope.get("beta_slow", float, 1.0)
    if not fast > slow > 0:
        raise UnsupportedConfigValue(f"{rope.source}: beta_fast={fast} must be above beta_slow={slow}, and both positive")
    rope.expect("mscale")
    rope.expect("mscale_all_dim")
    return RopeSpec(
        theta,
        "yarn",
        factor,
        original,
        beta_fast=fast,
        beta_slow=slow,
        attention_factor=rope.get("attention_factor", float, None),
        truncate=rope.get("truncate", bool, True),
    )


def _merge_rope_parameters(reader: ConfigReader) -> dict[str, Any]:
    """Both spellings in one; `rope_scaling`, which people add by hand to extend a context, wins."""
    merged: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        parameters = dict(reader.get(key, dict, {}))
        if any(isinstance(value, dict) for value in parameters.values()):
            raise UnsupportedConfigValue(f"{reader.source}: {key} differs by layer, which is not implemented")
        if "type" in parameters:
            parameters.setdefault("rope_type", parameters.pop("type"))
        merged.update(parameters)
    return merged
