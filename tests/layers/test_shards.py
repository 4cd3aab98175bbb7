"""Which rows and columns a rank takes: every value of a checkpoint exactly once, key/value heads perhaps more often."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layers.ranks import MODELS, toy
from torch import Tensor

from nanovllm.layers.embedding import VocabTable
from nanovllm.layers.linear import ColumnParallelLinear, QKVLinear, RowParallelLinear
from nanovllm.models.registry import find_family
from nanovllm.parallel.group import ParallelGroup

F32 = torch.float32


def load_numbered(layer: Any) -> dict[str, range]:
    """Every slot gets a tensor whose values count on from the slot before; returns the values of each."""
    first, values = 1, {}
    for name, slot in layer.weight_slots("x."):
        num_values = torch.Size(slot.shape).numel()
        values[name] = range(first, first + num_values)
        slot.load(torch.arange(first, first + num_values, dtype=F32).view(slot.shape))
        first += num_values
    return values


def counts_over_ranks(make: Any, size: int) -> dict[str, Tensor]:
    """How often each value of each checkpoint tensor is held by the ranks together."""
    held: list[Tensor] = []
    values: dict[str, range] = {}
    for rank in range(size):
        layer = make(ParallelGroup(rank, size))
        values = load_numbered(layer)
        held += [tensor.flatten() for tensor in (layer.weight, getattr(layer, "bias", None)) if tensor is not None]
    counts = torch.cat(held).long().bincount(minlength=1 + max(span.stop - 1 for span in values.values()))
    return {name: counts[span.start : span.stop] for name, span in values.items()}


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_column_parallel_layer_holds_each_value_once(size):
    counts = counts_over_ranks(lambda group: ColumnParallelLinear(["gate", "up"], 6, 8, group, bias=True, dtype=F32), size)
    assert set(counts) == {"x.gate.weight", "x.up.weight", "x.gate.bias", "x.up.bias"}
    assert all((count == 1).all() for count in counts.values())


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_row_parallel_layer_holds_each_weight_once_and_its_bias_everywhere(size):
    counts = counts_over_ranks(lambda group: RowParallelLinear("down", 8, 6, group, bias=True, dtype=F32), size)
    assert (counts["x.down.weight"] == 1).all()
    assert (counts["x.down.bias"] == size).all(), "until finish_loading, which leaves it on rank 0 alone"


@pytest.mark.parametrize("size", [2, 4])
def test_the_bias_of_a_row_parallel_layer_is_added_by_rank_0_alone(size):
    for rank in range(size):
        layer = RowParallelLinear("down", 8, 6, ParallelGroup(rank, size), bias=True, dtype=F32)
        load_numbered(layer)
        layer.finish_loading(torch.device("cpu"))
        partial = layer.product(torch.zeros(1, 8 // size))
        assert (partial != 0).all() if rank == 0 else (partial == 0).all()


@pytest.mark.parametrize(("size", "num_kv_heads", "copies"), [(1, 4, 1), (2, 4, 1), (4, 4, 1), (2, 1, 2), (4, 2, 2), (8, 2, 4)])
def test_query_heads_are_held_once_and_kv_heads_by_all_the_ranks_that_need_them(size, num_kv_heads, copies):
    counts = counts_over_ranks(lambda group: QKVLinear(5, 8, num_kv_heads, 3, group, bias=True, dtype=F32), size)
    for name, count in counts.items():
        assert (count == (1 if "q_proj" in name else copies)).all(), name


@pytest.mark.parametrize(("size", "num_kv_heads"), [(2, 4), (4, 4), (4, 2), (8, 2), (2, 1)])
def test_a_rank_has_the_kv_heads_that_its_query_heads_use(size, num_kv_heads):
    """Values are head numbers: query head h shares KV head h // (8 / num_kv_heads) in the whole model."""
    for rank in range(size):
        layer = QKVLinear(5, 8, num_kv_heads, 2, ParallelGroup(rank, size), bias=False, dtype=F32)
        for _, slot in layer.weight_slots("x."):
            slot.load(torch.arange(slot.shape[0] // 2, dtype=F32).repeat_interleave(2)[:, None].expand(slot.shape))
        heads = layer.weight[::2, 0].long().tolist()
        query, key = heads[: layer.num_heads], heads[layer.num_heads : layer.num_heads + layer.num_kv_heads]
        group_size = layer.num_heads // layer.num_kv_heads
        for place, head in enumerate(query):
            assert key[place // group_size] == head // (8 // num_kv_heads)


@pytest.mark.parametrize(("vocab_size", "size"), [(12, 1), (12, 4), (13, 2), (13, 4), (37, 8), (9, 8)])
def test_a_vocabulary_is_split_without_overlap_and_padded_with_zeros(vocab_size, size):
    counts = counts_over_ranks(lambda group: VocabTable(vocab_size, 3, group, dtype=F32), size)
    assert (counts["x..weight"] == 1).all()
    tables = [VocabTable(vocab_size, 3, ParallelGroup(rank, size), dtype=F32) for rank in range(size)]
    for table in tables:
        load_numbered(table)
    rows = torch.cat([table.weight for table in tables])
    assert len({len(table.weight) for table in tables}) == 1, "equal shares, so that logits can be gathered"
    assert torch.equal(rows[:vocab_size].flatten(), torch.arange(1, vocab_size * 3 + 1, dtype=F32))
    assert (rows[vocab_size:] == 0).all()


@pytest.mark.parametrize("name", MODELS)
def test_a_slot_names_the_whole_tensor_whatever_the_rank(name):
    spec = MODELS[name]
    alone, second = (
        {key: slot.shape for key, slot in find_family(spec.architecture)(spec, group, F32).weight_slots().items()}
        for group in (ParallelGroup(), ParallelGroup(1, 2))
    )
    assert alone == second


class TestSharesThatDoNotExist:
    def test_attention_heads(self):
        with pytest.raises(ValueError, match="attention heads: 6 cannot be split evenly over 4 ranks"):
            QKVLinear(24, 6, 2, 4, ParallelGroup(0, 4), bias=False, dtype=F32)

    @pytest.mark.parametrize(("num_heads", "num_kv_heads", "size"), [(12, 6, 4), (12, 3, 2), (12, 4, 6)])
    def test_key_value_heads(self, num_heads, num_kv_heads, size):
        with pytest.raises(ValueError, match=f"{num_kv_heads} key/value heads cannot be split evenly over {size} ranks"):
            QKVLinear(24, num_heads, num_kv_heads, 4, ParallelGroup(0, size), bias=False, dtype=F32)

    def test_columns_and_rows(self):
        with pytest.raises(ValueError, match="gate_proj and up_proj: 10 cannot be split evenly over 4 ranks"):
            ColumnParallelLinear(["gate_proj", "up_proj"], 8, 10, ParallelGroup(0, 4), bias=False, dtype=F32)
        with pytest.raises(ValueError, match="down_proj: 10 cannot be split evenly over 4 ranks"):
            RowParallelLinear("down_proj", 10, 8, ParallelGroup(0, 4), bias=False, dtype=F32)

    def test_of_a_whole_model(self):
        spec = toy("LlamaForCausalLM")
        with pytest.raises(ValueError, match="4 cannot be split evenly over 3 ranks"):
            find_family(spec.architecture)(spec, ParallelGroup(2, 3), F32)

    @pytest.mark.parametrize(("rank", "size"), [(2, 2), (-1, 2), (0, 0)])
    def test_a_rank_outside_its_group(self, rank, size):
        with pytest.raises(ValueError, match=f"rank {rank} is not in a group of {size}"):
            ParallelGroup(rank, size)
