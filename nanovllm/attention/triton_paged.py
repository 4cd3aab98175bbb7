"""Paged attention in Triton: decoding and prompt chunks, one kernel.

A *work item* is a tile of queries of one sequence against a range of its context, for one KV head. The G query heads
that share the KV head are rows of the tile, so each key and value is read once for all of them. A decoding sequence
with a long context is split into several items, and the last of them to finish combines the partial results
(Flash-Decoding, Dao et al. 2023); the softmax is the on-line one (Milakov and Gimelshein 2018). The host plans the
items once per step from lengths that it knows; every layer reuses the plan. Items are ordered longest first, so that
the last wave is short.

M query rows of a tile, N keys of a tile, G group size, K KV heads, D head size, PAGE block size.
Cache layout: [2 (key, value), num_blocks, K, PAGE, D]: a head's part of a block is contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanovllm.attention.base import AttentionBackend, AttentionInputs, AttentionSpec, HeadNorm, Rotary
from nanovllm.kernels.paged_attention import decode_kernel, prompt_kernel
from nanovllm.kernels.rotary import rotate_and_store
from nanovllm.kernels.triton_language import TensorDescriptor, triton
from nanovllm.kernels.upload import upload

# Of a work item: first token, number of queries, table row, position of the first query, context begin and end, slot of
# its partial result (-1: it has the whole context), first slot and number of the partial results to combine.
ITEM_FIELDS = 9
LOG2_E = 1.4426950408889634
MIN_SPLIT = 64  # context tokens of the smallest split
PROGRAMS_PER_SM = 4  # that splitting aims at when there are few sequences


@dataclass(slots=True)
class TritonPlan:
    """Device int32 tensors. Items beyond the true number have zero queries, so that a grid may be an upper bound."""

    block_tables: Tensor  # [max_num_seqs, max_blocks]
    decode_items: Tensor  # [num_items, ITEM_FIELDS]
    prompt_items: Tensor  # [num_items, ITEM_FIELDS]


def plan_decodes(starts: np.ndarray, tokens: np.ndarray, rows: np.ndarray, max_extra_items: int) -> np.ndarray:
    """Items of sequences with one new token. All [num_decodes]: position, flat token, table row.

    The split length makes at most `max_extra_items` items more than there are sequences.
    """
    context = starts + 1
    split = max(MIN_SPLIT, -(-int(context.sum()) // max(max_extra_items, 1)))
    split = -(-split // MIN_SPLIT) * MIN_SPLIT
    num_splits = -(-context // split)
    first_slot = np.cumsum(num_splits) - num_splits
    owner = np.repeat(np.arange(len(starts)), num_splits)  # item -> sequence
    number = np.arange(len(owner)) - first_slot[owner]  # item -> which split of its sequence
    begin = number * split
    end = np.minimum(begin + split, context[owner])
    slot = np.where(num_splits[owner] > 1, first_slot[owner] + number, -1)
    columns = [
        tokens[owner],
        np.ones_like(owner),
        rows[owner],
        starts[owner],
        begin,
        end,
        slot,
        first_slot[owner],
        num_splits[owner],
    ]
    return np.stack(columns, axis=1)[np.argsort(begin - end, kind="stable")].astype(np.int32)


def plan_prompts(starts: np.ndarray, lengths: np.ndarray, tokens: np.ndarray, rows: np.ndarray, tile: int) -> np.ndarray:
    """Items of chunks with several new tokens, `tile` queries each; later tiles see more context and come first."""
    num_tiles = -(-lengths // tile)
    owner = np.repeat(np.arange(len(starts)), num_tiles)
    offset = (np.arange(len(owner)) - np.repeat(np.cumsum(num_tiles) - num_tiles, num_tiles)) * tile
    count = np.minimum(tile, lengths[owner] - offset)
    position = starts[owner] + offset
    zeros = np.zeros_like(owner)
    columns = [tokens[owner] + offset, count, rows[owner], position, zeros, position + count, zeros - 1, zeros, zeros]
    return np.stack(columns, axis=1)[np.argsort(-position - count, kind="stable")].astype(np.int32)


class TritonAttention(AttentionBackend):
    def __init__(self, spec: AttentionSpec, dtype: torch.dtype, device: torch.device) -> None:
        self.spec, self.dtype, self.device = spec, dtype, device
        num_sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
        self.max_extra_items = max(1, num_sms * PROGRAMS_PER_SM // spec.num_kv_heads)
        # How many of a sequence's items have finished; every launch leaves zeros behind.
        self._arrivals = torch.zeros(0, spec.num_kv_heads, dtype=torch.int32, device=device)
        self.prompt_rows = 128 if dtype != torch.float32 else 32
        self.prompt_tile = max(1, self.prompt_rows // spec.group_size)

    def kv_cache_shape(self, num_blocks: int) -> tuple[int, ...]:
        return 2, num_blocks, self.spec.num_kv_heads, self.spec.block_size, self.spec.head_dim

    def copy_blocks(self, kv_cache: Tensor, sources: Tensor, destinations: Tensor) -> None:
        kv_cache.index_copy_(1, destinations, kv_cache.index_select(1, sources))

    def rotate_and_store(
        self, heads: Tensor, head_norm: HeadNorm | None, rotary: Rotary, kv_cache: Tensor, slot_mapping: Tensor
    ) -> Tensor:
        return rotate_and_store(heads, head_norm, *rotary, kv_cache, slot_mapping, self.spec.num_heads)

    def plan(self, inputs: AttentionInputs) -> TritonPlan:
        starts, lengths = np.array(inputs.starts), np.array(inputs.lengths)
        tokens = np.cumsum(lengths) - lengths
        rows = np.array(inputs.rows)
        one, many = lengths == 1, lengths > 1
        empty = np.zeros((0, ITEM_FIELDS), dtype=np.int32)
        decodes = plan_decodes(starts[one], tokens[one], rows[one], self.max_extra_items) if one.any() else empty
        prompts = plan_prompts(starts[many], lengths[many], tokens[many], rows[many], self.prompt_tile) if many.any() else empty
        return TritonPlan(inputs.block_tables, upload(decodes, self.device), upload(prompts, self.device))

    def store_and_attend(
        self,
        heads: Tensor,
        head_norm: HeadNorm | None,
        rotary: Rotary,
        kv_cache: Tensor,
        slot_mapping: Tensor,
        plan: TritonPlan,
    ) -> Tensor:
        """In a step without prompt chunks all of it is one kernel: a launch less, and the queries stay in registers."""
        if len(plan.prompt_items) or not len(plan.decode_items):
            query = self.rotate_and_store(heads, head_norm, rotary, kv_cache, slot_mapping)
            return self.attend(query, kv_cache, plan)
        out = heads.new_empty(len(heads), self.spec.num_heads, self.spec.head_dim)
        self.reserve(len(plan.decode_items))
        attend_decodes(heads, kv_cache, out, plan, self._arrivals, self.spec, (head_norm, rotary))
        return out.flatten(1)

    def attend(self, query: Tensor, kv_cache: Tensor, plan: TritonPlan) -> Tensor:
        """query: [N, H, D] -> [N, H * D]."""
        out = torch.empty_like(query)
        if len(plan.prompt_items):
            attend_prompts(query, kv_cache, out, plan, self.spec, self.prompt_rows)
        if len(plan.decode_items):
            self.reserve(len(plan.decode_items))
            attend_decodes(query, kv_cache, out, plan, self._arrivals, self.spec)
        return out.flatten(1)

    def reserve(self, num_items: int) -> None:
        """Room for steps of so many decode items. Captured graphs keep the address: reserve before capturing."""
        if len(self._arrivals) < num_items:
            self._arrivals = torch.zeros(num_items, self.spec.num_kv_heads, dtype=torch.int32, device=self.device)


def attend_decodes(
    query: Tensor,
    kv_cache: Tensor,
    out: Tensor,
    plan: TritonPlan,
    arrivals: Tensor,
    spec: AttentionSpec,
    new: tuple[HeadNorm | None, Rotary] | None = None,
) -> None:
    """Tiles of one query each, padded to 16 rows for the matrix units. Tile sizes were measured on an H200.

    With `new`, query is what the QKV product gave, [N, H + 2 K, D], and the kernel norms, turns and stores on its way.
    """
    use_pdl = len(query) <= 512 and query.is_cuda
    shape = len(plan.decode_items), spec.num_heads, spec.head_dim
    partial = torch.empty(shape, dtype=torch.float32, device=query.device)
    weight = torch.empty(shape[:2], dtype=torch.float32, device=query.device)  # log2 of the sum of exponentials
    head_norm, (cos, signed_sin) = new if new is not None else (None, (query, query))
    norm_weight, eps = head_norm if head_norm is not None else (query, 0.0)
    decode_kernel[(len(plan.decode_items), spec.num_kv_heads)](
        query,
        norm_weight,
        cos,
        signed_sin,
        kv_cache[0],
        kv_cache[1],
        out,
        plan.block_tables,
        plan.decode_items,
        partial,
        weight,
        arrivals,
        plan.block_tables.stride(0),
        query.stride(0),
        spec.scale * LOG2_E,
        eps,
        spec.num_heads,
        spec.num_kv_heads,
        spec.group_size,
        spec.head_dim,
        triton.next_power_of_2(spec.head_dim),
        spec.block_size,
        max(16, triton.next_power_of_2(spec.group_size)),
        32 if spec.head_dim > 128 or query.dtype == torch.float32 else 64,
        new is not None,
        head_norm is not None,
        use_pdl,
        num_warps=4,
        num_stages=2,
        launch_pdl=use_pdl,
    )


def attend_prompts(query: Tensor, kv_cache: Tensor, out: Tensor, plan: TritonPlan, spec: AttentionSpec, num_rows: int) -> None:
    """Tiles of `num_rows` query rows. Keys come through the tensor memory accelerator where a tile is one block."""
    num_keys = 32 if query.dtype == torch.float32 or spec.head_dim > 128 else 64
    width = triton.next_power_of_2(spec.head_dim)
    by_tma = query.is_cuda and query.element_size() == 2 and spec.block_size % num_keys == 0 and width == spec.head_dim
    key, value = kv_cache[0], kv_cache[1]
    descriptors = (key, value)
    if by_tma:
        lines = key.numel() // width
        descriptors = tuple(TensorDescriptor(part, [lines, width], [width, 1], [num_keys, width]) for part in (key, value))
    prompt_kernel[(spec.num_kv_heads, len(plan.prompt_items))](
        query,
        key,
        value,
        *descriptors,
        out,
        plan.block_tables,
        plan.prompt_items,
        plan.block_tables.stride(0),
        spec.scale * LOG2_E,
        spec.num_heads,
        spec.num_kv_heads,
        spec.group_size,
        spec.head_dim,
        width,
        spec.block_size,
        num_rows,
        num_keys,
        by_tma,
        num_warps=4,
        num_stages=3 if by_tma else 2,
    )
