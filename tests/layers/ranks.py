"""One rank of two: builds sharded layers and toy models, runs them, and saves what it saw. No test framework here.

    python ranks.py RANK WORLD_SIZE FOLDER        rendezvous and results are files in FOLDER

The same `run_everything` runs in the test's own process with the group of one: that is the reference.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nanovllm.attention.base import AttentionSpec
from nanovllm.attention.torch_reference import TorchAttention
from nanovllm.engine.batch import BlockUpdate, RowSampling, ScheduledBatch, Seat
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.kernels.activation import silu_and_mul
from nanovllm.layers.embedding import OutputHead, VocabEmbedding, VocabTable
from nanovllm.layers.linear import ColumnParallelLinear, QKVLinear, RowParallelLinear
from nanovllm.loaders.load import load_weights
from nanovllm.loaders.weight_source import RandomWeights
from nanovllm.model_spec import ModelSpec, RopeSpec
from nanovllm.models.registry import find_family
from nanovllm.parallel.group import ParallelGroup
from nanovllm.sampling_params import SamplingParams

CPU = torch.device("cpu")
F32 = torch.float32
HIDDEN, VOCAB, HEADS, HEAD_DIM = 24, 37, 4, 6  # 37 rows over two ranks: the last one's table is padded


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fill(layer: Any, prefix: str = "x.", seed: int = 0) -> None:
    slots = dict(layer.weight_slots(prefix))
    source = RandomWeights({name: slot.shape for name, slot in slots.items()}, seed, std=0.3)
    for name, slot in slots.items():
        slot.load(source.load(name))
    layer.finish_loading(CPU)


def whole(x: Tensor, group: ParallelGroup, sections: list[int]) -> Tensor:
    """The output of a column-parallel layer of several parts, gathered in the order of one rank's."""
    return torch.cat([group.all_gather(part) for part in x.split(sections, dim=-1)], dim=-1)


def run_layers(group: ParallelGroup) -> dict[str, Tensor]:
    x, seen = random(5, HIDDEN), {}
    for bias in (False, True):
        column = ColumnParallelLinear(["gate", "up"], HIDDEN, 16, group, bias=bias, dtype=F32)
        fill(column)
        y = column(x)
        seen[f"column, bias={bias}"] = whole(y, group, [16 // group.size] * 2)
        row = RowParallelLinear("down", 16, HIDDEN, group, bias=bias, dtype=F32)
        fill(row)
        seen[f"column then row, bias={bias}"] = row(silu_and_mul(y))
    for num_kv_heads in (4, 2, 1):
        qkv = QKVLinear(HIDDEN, HEADS, num_kv_heads, HEAD_DIM, group, bias=True, dtype=F32)
        fill(qkv)
        query_size, kv_size = qkv.num_heads * HEAD_DIM, qkv.num_kv_heads * HEAD_DIM
        gathered = whole(qkv(x), group, [query_size, kv_size, kv_size])
        if num_kv_heads == 1 and group.size == 2:  # both ranks hold the one head: two copies
            query, keys, values = gathered.split([HEADS * HEAD_DIM, 2 * HEAD_DIM, 2 * HEAD_DIM], dim=-1)
            seen["copies of the one key head differ by"] = (keys[:, :HEAD_DIM] - keys[:, HEAD_DIM:]).abs().max()
            gathered = torch.cat([query, keys[:, :HEAD_DIM], values[:, HEAD_DIM:]], dim=-1)
        seen[f"qkv, {num_kv_heads} KV heads"] = gathered
    embedding = VocabEmbedding(VOCAB, HIDDEN, group, dtype=F32)
    fill(embedding, "embed")
    token_ids = torch.tensor([0, 36, 18, 19, 5, 35, 20])
    seen["embedding"] = embedding(token_ids)
    for name, table, is_tied in (("tied", embedding, True), ("own", VocabTable(VOCAB, HIDDEN, group, dtype=F32), False)):
        head = OutputHead(table, is_tied)
        if is_tied:
            head.finish_loading(CPU)
        else:
            fill(head, "head", seed=1)
        seen[f"{name} head"] = head(x)
    return seen


def toy(architecture: str, **changes: Any) -> ModelSpec:
    numbers: dict[str, Any] = {
        "architecture": architecture,
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 40,
        "num_layers": 2,
        "total_num_heads": HEADS,
        "total_num_kv_heads": 2,
        "head_dim": HEAD_DIM,
        "norm_eps": 1e-6,
        "rope": RopeSpec(10000.0),
        "max_position": 64,
    }
    return ModelSpec(**{**numbers, **changes})


MODELS = {
    "qwen3": toy("Qwen3ForCausalLM", qk_norm=True, head_dim=10),
    "qwen3, tied, one KV head": toy("Qwen3ForCausalLM", qk_norm=True, tie_word_embeddings=True, total_num_kv_heads=1),
    "llama, biases": toy("LlamaForCausalLM", qkv_bias=True, output_bias=True),
    "llama, as many KV heads as heads": toy("LlamaForCausalLM", total_num_kv_heads=4),
}


def run_model(spec: ModelSpec, group: ParallelGroup) -> dict[str, Tensor]:
    """Two prompts, one of them in two chunks, then a few decoding steps, through the paged runner."""
    model = find_family(spec.architecture)(spec, group, F32)
    load_weights(model, RandomWeights({name: slot.shape for name, slot in model.weight_slots().items()}, std=0.3))
    model.finish_loading(CPU, 64)
    backend = TorchAttention(AttentionSpec(model.num_heads, model.num_kv_heads, spec.head_dim, 4), F32, CPU)
    caches = [torch.zeros(backend.kv_cache_shape(12)) for _ in range(spec.num_layers)]
    runner = ModelRunner(model, backend, caches, block_size=4, max_num_seqs=3, max_model_len=32, device=CPU)
    hidden: list[Tensor] = []
    model.register_forward_hook(lambda module, inputs, output: hidden.append(output.clone()))
    prompts = [[1, 36, 3, 18, 19, 6, 7, 8, 9, 10, 11], [20, 21, 22]]
    tables = [[7, 2, 9, 4], [0, 11]]
    sampling = RowSampling(SamplingParams(temperature=0), 0, (), (), 3)
    batches = [
        ScheduledBatch(
            0,
            rows=[2, 0],
            starts=[0, 0],
            lengths=[7, 3],
            sampled_chunks=[1],
            seats=[Seat(2, prompts[0], sampling), Seat(0, prompts[1], sampling)],
            block_updates=[BlockUpdate(2, 0, tables[0]), BlockUpdate(0, 0, tables[1])],
        ),
        ScheduledBatch(1, rows=[0, 2], starts=[3, 7], lengths=[1, 4], sampled_chunks=[0, 1]),
    ]
    batches += [ScheduledBatch(2 + i, [2, 0], [11 + i, 4 + i], [1, 1], [0, 1]) for i in range(3)]
    tokens = [runner.run(batch).result().token_ids for batch in batches]
    everything = torch.cat(hidden)
    with torch.inference_mode():
        return {
            "hidden": everything,
            "logits": model.compute_logits(everything),
            "tokens": torch.tensor([row for step in tokens for row in step]),
        }


def run_everything(group: ParallelGroup) -> dict[str, Tensor]:
    seen = run_layers(group)
    for name, spec in MODELS.items():
        seen.update({f"{name}: {key}": tensor for key, tensor in run_model(spec, group).items()})
    return {name: tensor.detach().clone() for name, tensor in seen.items()}


def main(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=30))
    try:
        torch.save(run_everything(ParallelGroup(rank, size, dist.group.WORLD)), folder / f"rank{rank}.pt")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
