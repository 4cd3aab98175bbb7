"""Linear layers that know their shard.

Each layer knows which checkpoint tensors it is made of and which slice of each belongs to this rank, and says so as
`weight_slots`. A layer of several checkpoint tensors (q, k, v; gate, up) is one product. Weights are
[out_features, in_features] as in torch. After loading, `finish_loading` may repack the weight for the processor.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nanovllm.kernels.linear import Product, can_pack, packed_product, plain_product
from nanovllm.layers.weight_slot import WeightSlot
from nanovllm.parallel.group import ParallelGroup


class Part(NamedTuple):
    """One checkpoint tensor of a layer: its rows [first_row, first_row + num_rows) are ours, at `offset` in ours."""

    name: str  # such as "q_proj"
    total_rows: int
    first_row: int
    num_rows: int
    offset: int


class Linear(nn.Module):
    """Rows of one or more checkpoint tensors, stacked; columns [first_column, first_column + in_features) of each."""

    def __init__(
        self, parts: list[Part], total_columns: int, first_column: int, in_features: int, *, bias: bool, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.parts = parts
        self.total_columns, self.first_column, self.in_features = total_columns, first_column, in_features
        out_features = sum(part.num_rows for part in parts)
        self.weight: Tensor | None = torch.empty(out_features, in_features, dtype=dtype)
        self.bias: Tensor | None = torch.zeros(out_features, dtype=dtype) if bias else None
        self.product: Product = plain_product(self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[num_tokens, in_features] -> [num_tokens, out_features of this rank]."""
        return self.product(x)

    def weight_slots(self, prefix: str) -> Iterator[tuple[str, WeightSlot]]:
        """`prefix` is the module that the checkpoint's tensors live in, such as "model.layers.0.self_attn."."""
        for part in self.parts:
            yield f"{prefix}{part.name}.weight", WeightSlot((part.total_rows, self.total_columns), self._weight_loader(part))
            if self.bias is not None:
                yield f"{prefix}{part.name}.bias", WeightSlot((part.total_rows,), self._bias_loader(part))

    def _weight_loader(self, part: Part):
        def load(tensor: Tensor) -> None:
            columns = slice(self.first_column, self.first_column + self.in_features)
            rows = slice(part.first_row, part.first_row + part.num_rows)
            self.weight[part.offset : part.offset + part.num_rows].copy_(tensor[rows, columns])  # type: ignore[index]

        return load

    def _bias_loader(self, part: Part):
        def load(tensor: Tensor) -> None:
            rows = slice(part.first_row, part.first_row + part.num_rows)
            self.bias[part.offset : part.offset + part.num_rows].copy_(tensor[rows])  # type: ignore[index]

        return load

    def finish_loading(self, device: torch.device) -> None:
        """Move to the device; on a CPU, repack for its kernels and drop the original."""
        self.weight = self.weight.to(device)  # type: ignore[union-attr]
        self.bias = self.bias.to(device) if self.bias is not None else None
        self.product = packed_product(self.weight, self.bias)
        if can_pack(self.weight):
            self.weight = None


class ColumnParallelLinear(Linear):
    """Output features split over the ranks, for one or more tensors of `total_rows` each; no communication."""

    def __init__(
        self, names: list[str], total_columns: int, total_rows: int, group: ParallelGroup, *, bias: bool, dtype: torch.dtype
    ) -> None:
        num_rows = group.split(total_rows, " and ".join(names))
        parts = [Part(name, total_rows, group.rank * num_rows, num_rows, i * num_rows) for i, name in enumerate(names)]
        super().__init__(parts, total_columns, 0, total_columns, bias=bias, dtype=dtype)


class QKVLinear(Linear):
    """Query, key and value heads in one product. With more ranks than KV heads, ranks share a KV head."""

    def __init__(
        self,
        hidden_size: int,
        total_num_heads: int,
        total_num_kv_heads: int,
        head_dim: int,
        group: ParallelGroup,
        *,
        bias: bool,
        dtype: torch.dtype,
    ) -> None:
        self.num_heads = group.split(total_num_heads, "attention heads")
        ranks_per_kv_head = max(1, group.size // total_num_kv_heads)
        self.num_kv_heads = max(1, total_num_kv_heads // group.size)
        if self.num_kv_heads * group.size != total_num_kv_heads * ranks_per_kv_head:
            raise ValueError(f"{total_num_kv_heads} key/value heads cannot be split evenly over {group.size} ranks")
        query_rows, kv_rows = self.num_heads * head_dim, self.num_kv_heads * head_dim
        first_kv_row = group.rank // ranks_per_kv_head * kv_rows
        parts = [
            Part("q_proj", total_num_heads * head_dim, group.rank * query_rows, query_rows, 0),
            Part("k_proj", total_num_kv_heads * head_dim, first_kv_row, kv_rows, query_rows),
            Part("v_proj", total_num_kv_heads * head_dim, first_kv_row, kv_rows, query_rows + kv_rows),
        ]
        super().__init__(parts, hidden_size, 0, hidden_size, bias=bias, dtype=dtype)


class RowParallelLinear(Linear):
    """Input features split over the ranks; the partial products are summed. The bias is added once, on rank 0."""

    def __init__(
        self, name: str, total_columns: int, total_rows: int, group: ParallelGroup, *, bias: bool, dtype: torch.dtype
    ) -> None:
        in_features = group.split(total_columns, name)
        parts = [Part(name, total_rows, 0, total_rows, 0)]
        super().__init__(parts, total_columns, group.rank * in_features, in_features, bias=bias, dtype=dtype)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        return self.group.all_reduce(self.product(x))

    def finish_loading(self, device: torch.device) -> None:
        if self.bias is not None and self.group.rank > 0:
            self.bias.zero_()
        super().finish_loading(device)
