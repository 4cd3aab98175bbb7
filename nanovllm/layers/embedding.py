"""Token embedding and output head, split over the vocabulary. Tied models share one table."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovllm.kernels.linear import Product, packed_product, plain_product
from nanovllm.layers.weight_slot import WeightSlot
from nanovllm.parallel.group import ParallelGroup


class VocabTable(nn.Module):
    """Rows [first, first + num_rows) of a [vocab_size, hidden_size] table; the last rank's may be padded with zeros."""

    def __init__(self, vocab_size: int, hidden_size: int, group: ParallelGroup, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.vocab_size, self.hidden_size, self.group = vocab_size, hidden_size, group
        self.num_rows = -(-vocab_size // group.size)
        self.first = group.rank * self.num_rows
        self.weight = torch.zeros(self.num_rows, hidden_size, dtype=dtype)

    def weight_slots(self, prefix: str) -> Iterator[tuple[str, WeightSlot]]:
        yield f"{prefix}.weight", WeightSlot((self.vocab_size, self.hidden_size), self._load)

    def _load(self, tensor: Tensor) -> None:
        rows = tensor[self.first : self.first + self.num_rows]
        self.weight[: len(rows)].copy_(rows)

    def finish_loading(self, device: torch.device) -> None:
        self.weight = self.weight.to(device)


class VocabEmbedding(VocabTable):
    def forward(self, token_ids: Tensor) -> Tensor:
        """[num_tokens] -> [num_tokens, hidden_size]. A rank contributes zeros for tokens that are not its own."""
        if self.group.size == 1:
            return F.embedding(token_ids, self.weight)
        is_ours = (token_ids >= self.first) & (token_ids < self.first + self.num_rows)
        embedded = F.embedding((token_ids - self.first) * is_ours, self.weight)
        return self.group.all_reduce(embedded * is_ours.unsqueeze(-1))


class OutputHead(nn.Module):
    """Logits from the head's own table, or from the embedding's when they are tied."""

    def __init__(self, table: VocabTable, is_tied: bool) -> None:
        super().__init__()
        self.table, self.is_tied = table, is_tied
        self.product: Product = plain_product(table.weight, None)

    def forward(self, hidden: Tensor) -> Tensor:
        """[n, hidden_size] -> [n, vocab_size], on every rank."""
        logits = self.table.group.all_gather(self.product(hidden))
        return logits[:, : self.table.vocab_size]

    def weight_slots(self, prefix: str) -> Iterator[tuple[str, WeightSlot]]:
        if not self.is_tied:
            yield from self.table.weight_slots(prefix)

    def finish_loading(self, device: torch.device) -> None:
        """Call after the table's own `finish_loading`."""
        if not self.is_tied:
            self.table.finish_loading(device)
        self.product = packed_product(self.table.weight, None)
