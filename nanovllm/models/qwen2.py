"""Qwen2 and Qwen2.5: Llama with biases on query, key and value."""

from __future__ import annotations

from nanovllm.model_spec import ConfigReader, ModelSpec, read_decoder_spec
from nanovllm.models.decoder import Decoder


class Qwen2ForCausalLM(Decoder):
    @staticmethod
    def read_spec(reader: ConfigReader) -> ModelSpec:
        reader.expect("use_sliding_window", False)
        return read_decoder_spec(reader, qkv_bias=True)
