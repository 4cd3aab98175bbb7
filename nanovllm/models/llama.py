"""Llama 2 and 3, and what shares their shape (SmolLM2, TinyLlama, ...)."""

from __future__ import annotations

from nanovllm.model_spec import ConfigReader, ModelSpec, read_decoder_spec
from nanovllm.models.decoder import Decoder


class LlamaForCausalLM(Decoder):
    @staticmethod
    def read_spec(reader: ConfigReader) -> ModelSpec:
        reader.expect("mlp_bias", False)
        has_bias = reader.get("attention_bias", bool, False)
        return read_decoder_spec(reader, qkv_bias=has_bias, output_bias=has_bias)
