"""Toy checkpoints made by Transformers, and a way to drive the model runner by hand: explicit rows, blocks and chunks.

`make_toy` writes a folder with random weights and returns the Transformers model that it was saved from: the oracle.
`Driver` owns the block tables that the block manager would own, so that a test can lay out the cache as it likes.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import atexit
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

from nanovllm.attention.base import AttentionSpec
from nanovllm.attention.torch_reference import TorchAttention
from nanovllm.engine.batch import BlockUpdate, RowSampling, ScheduledBatch, Seat, StepResult
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.loaders.checkpoint import open_checkpoint
from nanovllm.loaders.load import load_weights
from nanovllm.model_spec import ModelSpec, RopeSpec
from nanovllm.models.decoder import Decoder
from nanovllm.models.registry import find_family, read_model_spec
from nanovllm.parallel.group import ParallelGroup
from nanovllm.sampling_params import SamplingParams

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0)
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
CONFIGS = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config}


class Toy(NamedTuple):
    folder: Path
    oracle: transformers.PreTrainedModel  # float32, evaluation mode

    @torch.no_grad()
    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """[num_tokens, vocab_size], without a cache and without a batch."""
        return self.oracle(torch.tensor([list(token_ids)]), use_cache=False).logits[0]


def make_toy(family: str, folder: Path | None = None, seed: int = 0, **changes: Any) -> Toy:
    """A checkpoint of `family` ("llama", "qwen2", "qwen3") whose every weight, norms and biases included, is random."""
    if family == "qwen3":
        changes.setdefault("head_dim", 20)  # 6 heads of 20 for a hidden size of 48
    config = CONFIGS[family](**{**SIZES, **changes})
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 2 and "embed_tokens" not in name:
            noise *= 1.5 * parameter.shape[1] ** -0.5
        parameter.data.copy_(1 + 0.3 * noise if "norm" in name else noise)
    if folder is None:
        folder = Path(mkdtemp(prefix="nanovllm-toy-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    model.save_pretrained(folder, safe_serialization=True)
    return Toy(folder, model)


def load_toy(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    """Our model from the same folder, through the same doors as `LLM`."""
    checkpoint = open_checkpoint(folder)
    spec = read_model_spec(checkpoint.config, checkpoint.name)
    model = find_family(spec.architecture)(spec, ParallelGroup(), dtype)
    load_weights(model, checkpoint.weights)
    model.finish_loading(CPU, spec.max_position)
    return model


def toy_spec(architecture: str = "LlamaForCausalLM", **changes: Any) -> ModelSpec:
    """The sizes above as a ModelSpec, for tests that need no checkpoint."""
    numbers: dict[str, Any] = {
        "architecture": architecture,
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 100,
        "num_layers": 2,
        "total_num_heads": 6,
        "total_num_kv_heads": 2,
        "head_dim": 8,
        "norm_eps": 1e-5,
        "rope": RopeSpec(10000.0),
        "max_position": 512,
        "dtype": "float32",
    }
    return ModelSpec(**{**numbers, **changes})


@cache
def shapes_of(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint of this spec, for RandomWeights."""
    model = find_family(spec.architecture)(spec, ParallelGroup(), torch.float32)
    return {name: slot.shape for name, slot in model.weight_slots().items()}


def make_runner(
    model: Decoder, block_size: int = 4, num_blocks: int = 64, max_num_seqs: int = 8, max_model_len: int = 128
) -> ModelRunner:
    spec = AttentionSpec(model.num_heads, model.num_kv_heads, model.spec.head_dim, block_size)
    backend = TorchAttention(spec, model.dtype, CPU)
    caches = [torch.zeros(backend.kv_cache_shape(num_blocks), dtype=model.dtype) for _ in range(model.spec.num_layers)]
    sizes = {"block_size": block_size, "max_num_seqs": max_num_seqs, "max_model_len": max_model_len}
    return ModelRunner(model, backend, caches, **sizes, device=CPU)


class Chunk(NamedTuple):
    row: int
    start: int
    length: int


class Driver:
    """Runs hand-written steps and remembers the hidden states of each."""

    def __init__(self, model: Decoder, **sizes: Any) -> None:
        self.model = model
        self.runner = make_runner(model, **sizes)
        self.result: StepResult | None = None
        self.hidden: list[Tensor] = []
        self._num_steps = 0
        self._news: dict[str, list[Any]] = {"seats": [], "block_updates": []}
        self.sees_all = True  # else the last layer is computed only for tokens that draw, as usual
        model.register_forward_pre_hook(self._ask_for_all)
        model.register_forward_hook(lambda module, inputs, output: self.hidden.append(output))

    def seat(
        self,
        row: int,
        token_ids: Sequence[int],
        block_ids: Sequence[int],
        params: SamplingParams = GREEDY,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Goes down with the next step."""
        sampling = RowSampling(params, 0, (), (), num_prompt_tokens or len(token_ids))
        self._news["seats"].append(Seat(row, list(token_ids), sampling))
        self._news["block_updates"].append(BlockUpdate(row, 0, list(block_ids)))

    def step(self, *chunks: Chunk | tuple[int, int, int], sampled: Sequence[int] = ()) -> list[Tensor]:
        """The logits of each chunk, [length, vocab_size]; `sampled` chunks draw a token as well."""
        rows, starts, lengths = (list(column) for column in zip(*chunks, strict=True))
        batch = ScheduledBatch(self._num_steps, rows, starts, lengths, list(sampled), **self._news)
        self._num_steps += 1
        self._news = {"seats": [], "block_updates": []}
        self.result = self.runner.run(batch).result()
        with torch.inference_mode():
            logits = self.model.compute_logits(self.hidden[-1])
        return list(logits.clone().split(lengths)) if self.sees_all else [logits.clone()]

    def _ask_for_all(self, module: Any, inputs: tuple[Any, ...]) -> None:
        if self.sees_all:
            inputs[1].needed_tokens = None
