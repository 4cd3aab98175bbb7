"""Attention in plain torch: the specification that kernels are tested against, and the CPU path.

Keys of a sequence are gathered from its blocks, then it is textbook attention with grouped heads: the query heads that
share a KV head are rows of one matrix product. Decoding sequences of similar length are batched; a prompt chunk goes
tile by tile over its queries, so that memory is O(context), never O(context squared).

B sequences, T context tokens (padded to whole blocks), Q queries, K KV heads, G query heads per KV head, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.attention.base import AttentionInputs, AttentionSpec, HeadNorm, Rotary
from nanovllm.kernels.rotary import apply_rotary

MAX_GATHERED_TOKENS = 16_384  # per group of decoding sequences: bounds the copy, and keeps it near the cache
MAX_SCORES = 1 << 20  # per query tile, over all heads
MAX_TILE, MIN_TILE = 128, 16  # queries


@dataclass(slots=True)
class DecodeGroup:
    """Sequences with one new token each and contexts of similar length."""

    tokens: Tensor | None  # [B] int64, places among the step's tokens; None: all of them, in order
    block_ids: Tensor  # [B * T / block_size] int64
    is_padding: Tensor  # [B, 1, T], True where there is no key


@dataclass(slots=True)
class PromptChunk:
    """Several new tokens of one sequence, on top of `start` earlier ones."""

    first_token: int
    num_tokens: int
    start: int
    block_ids: Tensor  # [T / block_size] int64


@dataclass(slots=True)
class TorchPlan:
    groups: list[DecodeGroup] = field(default_factory=list)
    chunks: list[PromptChunk] = field(default_factory=list)


class TorchAttention:
    """Cache layout: [2 (key, value), num_kv_heads, num_blocks, block_size, head_dim]; a head's tokens are adjacent."""

    def __init__(self, spec: AttentionSpec, dtype: torch.dtype, device: torch.device) -> None:
        self.spec = spec
        self.dtype = dtype
        self.device = device
        self._is_later = torch.ones(MAX_TILE, MAX_TILE, dtype=torch.bool, device=device).triu_(1)  # [query, key]

    def kv_cache_shape(self, num_blocks: int) -> tuple[int, ...]:
        return 2, self.spec.num_kv_heads, num_blocks, self.spec.block_size, self.spec.head_dim

    def rotate_and_store(
        self, heads: Tensor, head_norm: HeadNorm | None, rotary: Rotary, kv_cache: Tensor, slot_mapping: Tensor
    ) -> Tensor:
        spec = self.spec
        query_key, value = heads.split((spec.num_heads + spec.num_kv_heads, spec.num_kv_heads), dim=1)
        if head_norm is not None:
            query_key = F.rms_norm(query_key, (spec.head_dim,), None, head_norm.eps) * head_norm.weight
        query_key = apply_rotary(query_key, *rotary)
        query, key = query_key.split((spec.num_heads, spec.num_kv_heads), dim=1)
        slots = kv_cache.flatten(2, 3)  # [2, K, num_slots, D]
        slots[0].index_copy_(1, slot_mapping, key.transpose(0, 1))
        # Padding is read with weight 0, and 0 * inf is not 0: an overflow must not reach another sequence.
        slots[1].index_copy_(1, slot_mapping, value.nan_to_num().transpose(0, 1))
        return query

    def copy_blocks(self, kv_cache: Tensor, sources: Tensor, destinations: Tensor) -> None:
        kv_cache.index_copy_(2, destinations, kv_cache.index_select(2, sources))

    # --- once per step

    def plan(self, inputs: AttentionInputs) -> TorchPlan:
        plan = TorchPlan()
        decodes = []  # (context length, row, first token)
        first_token = 0
        for row, start, length in zip(inputs.rows, inputs.starts, inputs.lengths):
            if length == 1:
                decodes.append((start + 1, row, first_token))
            else:
                num_blocks = -(-(start + length) // self.spec.block_size)
                block_ids = inputs.block_tables[row, :num_blocks].long()
                plan.chunks.append(PromptChunk(first_token, length, start, block_ids))
            first_token += length
        if decodes and not plan.chunks and self._fits_one_group(min(decodes)[0], max(decodes)[0], len(decodes)):
            plan.groups.append(self._make_group(decodes, inputs.block_tables, is_all=True))
        else:
            for group in self._split(sorted(decodes)):
                plan.groups.append(self._make_group(group, inputs.block_tables, is_all=False))
        return plan

    def _fits_one_group(self, shortest: int, longest: int, count: int) -> bool:
        """Padding at most doubles the work, and the gathered copy stays small."""
        return longest <= 2 * shortest + 128 and (count == 1 or longest * count <= MAX_GATHERED_TOKENS)

    def _split(self, decodes: list[tuple[int, int, int]]) -> list[list[tuple[int, int, int]]]:
        groups: list[list[tuple[int, int, int]]] = []
        for decode in decodes:
            if groups and self._fits_one_group(groups[-1][0][0], decode[0], len(groups[-1]) + 1):
                groups[-1].append(decode)
            else:
                groups.append([decode])
        return groups

    def _make_group(self, decodes: list[tuple[int, int, int]], block_tables: Tensor, is_all: bool) -> DecodeGroup:
        context_lens = torch.tensor([decode[0] for decode in decodes], device=self.device)  # [B]
        num_blocks = -(-max(decode[0] for decode in decodes) // self.spec.block_size)
        rows = torch.tensor([decode[1] for decode in decodes], device=self.device)
        block_ids = block_tables[rows, :num_blocks].long().flatten()
        key_positions = torch.arange(num_blocks * self.spec.block_size, device=self.device)  # [T]
        is_padding = (key_positions >= context_lens[:, None])[:, None]
        tokens = None if is_all else torch.tensor([decode[2] for decode in decodes], device=self.device)
        return DecodeGroup(tokens, block_ids, is_padding)

    # --- once per layer

    def attend(self, query: Tensor, kv_cache: Tensor, plan: TorchPlan) -> Tensor:
        query = query * self.spec.scale
        if len(plan.groups) == 1 and plan.groups[0].tokens is None:
            return self._attend_group(query, kv_cache, plan.groups[0])
        output = torch.empty_like(query).flatten(1)  # [num_tokens, H * D]
        for chunk in plan.chunks:
            self._attend_chunk(query, kv_cache, chunk, output)
        for group in plan.groups:
            output[group.tokens] = self._attend_group(query[group.tokens], kv_cache, group)
        return output

    def _gather(self, kv_cache: Tensor, block_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the blocks, in their order: two of [K, len(block_ids) * block_size, D]."""
        key_blocks, value_blocks = kv_cache.flatten(3).unbind(0)  # [K, num_blocks, block_size * D]
        shape = self.spec.num_kv_heads, -1, self.spec.head_dim
        keys, values = key_blocks.index_select(1, block_ids), value_blocks.index_select(1, block_ids)
        return keys.view(shape), values.view(shape)

    def _attend_group(self, query: Tensor, kv_cache: Tensor, group: DecodeGroup) -> Tensor:
        """query: [B, H, D], scaled -> [B, H * D]."""
        spec, num_sequences = self.spec, len(query)
        keys, values = self._gather(kv_cache, group.block_ids)
        shape = spec.num_kv_heads, num_sequences, -1, spec.head_dim
        grouped = query.view(num_sequences, spec.num_kv_heads, spec.group_size, spec.head_dim).transpose(0, 1)  # [K, B, G, D]
        scores = grouped @ keys.view(shape).transpose(2, 3)  # [K, B, G, T]
        weights = scores.masked_fill_(group.is_padding, float("-inf")).softmax(dim=-1)  # whatever the padding holds
        return (weights @ values.view(shape)).transpose(0, 1).reshape(num_sequences, -1)

    def _attend_chunk(self, query: Tensor, kv_cache: Tensor, chunk: PromptChunk, output: Tensor) -> None:
        keys, values = self._gather(kv_cache, chunk.block_ids)
        num_scores_per_query = self.spec.num_heads * (chunk.start + chunk.num_tokens)
        tile_size = min(MAX_TILE, max(MIN_TILE, MAX_SCORES // num_scores_per_query))
        for first in range(0, chunk.num_tokens, tile_size):
            last = min(first + tile_size, chunk.num_tokens)
            rows = slice(chunk.first_token + first, chunk.first_token + last)
            output[rows] = self._attend_tile(query[rows], keys, values, chunk.start + first)

    def _attend_tile(self, query: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
        """query: [Q, H, D] at positions from `start`; keys, values: [K, >= start + Q, D] -> [Q, H * D]."""
        spec, num_queries = self.spec, len(query)
        end = start + num_queries
        shape = spec.num_kv_heads, spec.group_size, num_queries, end
        grouped = query.view(num_queries, spec.num_kv_heads, spec.group_size, spec.head_dim).permute(1, 2, 0, 3)
        grouped = grouped.reshape(spec.num_kv_heads, -1, spec.head_dim)  # [K, G * Q, D]
        scores = torch.bmm(grouped, keys[:, :end].transpose(1, 2))  # [K, G * Q, end]
        scores.view(shape)[..., start:].masked_fill_(self._is_later[:num_queries, :num_queries], float("-inf"))  # also NaN
        mixed = torch.bmm(scores.softmax(dim=-1), values[:, :end])  # [K, G * Q, D]
        mixed = mixed.view(spec.num_kv_heads, spec.group_size, num_queries, spec.head_dim)
        return mixed.permute(2, 0, 1, 3).reshape(num_queries, -1)
