"""Qwen3 (dense): Llama with an RMSNorm on every query and key head."""

from __future__ import annotations

from nanovllm.model_spec import ConfigReader, ModelSpec, read_decoder_spec
from nanovllm.models.decoder import Decoder


class Qwen3ForCausalLM(Decoder):
    @staticmethod
    def read_spec(reader: ConfigReader) -> ModelSpec:
        reader.expect("use_sliding_window", False)
        has_bias = reader.get("attention_bias", bool, False)
        return read_decoder_spec(reader, qkv_bias=has_bias, output_bias=has_bias, qk_norm=True)
