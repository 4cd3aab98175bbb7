"""The values of a checkpoint's config that `model_spec.py` refuses: they come from the same hostile files."""

from __future__ import annotations

from typing import Any

import pytest

from nanovllm.errors import UnsupportedConfigValue
from nanovllm.model_spec import ConfigReader, RopeSpec, read_decoder_spec

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "rms_norm_eps": 1e-5, "max_position_embeddings": 512,
}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architectures", []),
        ("architectures", [7]),
        ("architectures", ["A", "B"]),
        ("rms_norm_eps", -1.0),
        ("rms_norm_eps", 10**400),
        ("rope_theta", 0.0),
        ("rope_theta", -1),
    ],
)
def test_impossible_values_are_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(UnsupportedConfigValue, match=key):
        read_decoder_spec(ConfigReader({**CONFIG, key: value}), qkv_bias=False)


def test_a_feature_without_any_supported_value_is_refused_in_plain_words() -> None:
    with pytest.raises(UnsupportedConfigValue, match=r"quantization_config=\{'bits': 4\} is not implemented$"):
        read_decoder_spec(ConfigReader({**CONFIG, "quantization_config": {"bits": 4}}), qkv_bias=False)


def test_theta_of_the_rope_parameters_goes_before_the_old_key() -> None:
    parameters = {"rope_theta": 7.0, "rope_type": "default"}
    spec = read_decoder_spec(ConfigReader({**CONFIG, "rope_theta": 5.0, "rope_parameters": parameters}), qkv_bias=False)
    assert spec.rope == RopeSpec(7.0)
