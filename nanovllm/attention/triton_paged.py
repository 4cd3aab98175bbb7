"""Paged attention in Triton: decoding and prompt chunks, one kernel.

A *work item* is a tile of queries of one sequence against a range of its context, for one KV head. The G query heads
that share the KV head are rows of the tile, so each key and value is read once for all of them. A decoding sequence
with a long context is split into several items whose partial results a second kernel combines (Flash-Decoding, Dao et
al. 2023); the softmax is the on-line one (Milakov and Gimelshein 2018). The host plans the items once per step from
lengths that it knows; every layer reuses the plan. Items are ordered longest first, so that the last wave is short.

M query rows of a tile, N keys of a tile, G group size, K KV heads, D head size, PAGE block size.
Cache layout: [2 (key, value), num_blocks, K, PAGE, D]: a head's part of a block is contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanovllm.attention.base import AttentionInputs, AttentionSpec, HeadNorm, Rotary
from nanovllm.kernels.rotary import rotate_and_store
from nanovllm.kernels.triton_language import tl, triton

ITEM_FIELDS = 7  # first token, number of queries, table row, position of the first query, context begin, end, partial slot
LOG2_E = 1.4426950408889634
MIN_SPLIT = 64  # context tokens of the smallest split
PROGRAMS_PER_SM = 4  # that splitting aims at when there are few sequences


@dataclass(slots=True)
class TritonPlan:
    """Device int32 tensors. Items beyond the true number have zero queries, so that a grid may be an upper bound."""

    block_tables: Tensor  # [max_num_seqs, max_blocks]
    decode_items: Tensor  # [num_items, ITEM_FIELDS]
    combine: Tensor  # [num_decodes, 3] token, first partial slot, number of partials (0: nothing to combine)
    prompt_items: Tensor  # [num_items, ITEM_FIELDS]
    num_partials: int


def plan_decodes(starts: np.ndarray, tokens: np.ndarray, rows: np.ndarray, max_extra_items: int) -> tuple[np.ndarray, np.ndarray]:
    """Items and combine entries of sequences with one new token. All [num_decodes]: position, flat token, table row.

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
    items = np.stack([tokens[owner], np.ones_like(owner), rows[owner], starts[owner], begin, end, slot], axis=1)
    combine = np.stack([tokens, first_slot, np.where(num_splits > 1, num_splits, 0)], axis=1)
    return items[np.argsort(begin - end, kind="stable")].astype(np.int32), combine.astype(np.int32)


def plan_prompts(starts: np.ndarray, lengths: np.ndarray, tokens: np.ndarray, rows: np.ndarray, tile: int) -> np.ndarray:
    """Items of chunks with several new tokens, `tile` queries each; later tiles see more context and come first."""
    num_tiles = -(-lengths // tile)
    owner = np.repeat(np.arange(len(starts)), num_tiles)
    offset = (np.arange(len(owner)) - np.repeat(np.cumsum(num_tiles) - num_tiles, num_tiles)) * tile
    count = np.minimum(tile, lengths[owner] - offset)
    position = starts[owner] + offset
    zeros = np.zeros_like(owner)
    items = np.stack([tokens[owner] + offset, count, rows[owner], position, zeros, position + count, zeros - 1], axis=1)
    return items[np.argsort(-items[:, 5], kind="stable")].astype(np.int32)


class TritonAttention:
    def __init__(self, spec: AttentionSpec, dtype: torch.dtype, device: torch.device) -> None:
        self.spec, self.dtype, self.device = spec, dtype, device
        num_sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
        self.max_extra_items = max(1, num_sms * PROGRAMS_PER_SM // spec.num_kv_heads)
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
        decode_items, combine = empty, np.zeros((0, 3), dtype=np.int32)
        if one.any():
            decode_items, combine = plan_decodes(starts[one], tokens[one], rows[one], self.max_extra_items)
        prompt_items = (
            plan_prompts(starts[many], lengths[many], tokens[many], rows[many], self.prompt_tile) if many.any() else empty
        )
        upload = lambda array: torch.from_numpy(array).to(self.device, non_blocking=True)  # noqa: E731
        return TritonPlan(
            inputs.block_tables, upload(decode_items), upload(combine), upload(prompt_items), int((decode_items[:, 6] >= 0).sum())
        )

    def attend(self, query: Tensor, kv_cache: Tensor, plan: TritonPlan) -> Tensor:
        """query: [N, H, D] -> [N, H * D]."""
        out = torch.empty_like(query)
        if len(plan.prompt_items):
            attend_items(query, kv_cache, out, plan.block_tables, plan.prompt_items, None, None, self.spec, self.prompt_rows)
        if len(plan.decode_items):
            slots = len(plan.decode_items)
            shape = slots, self.spec.num_heads, self.spec.head_dim
            partial = torch.empty(shape, dtype=torch.float32, device=query.device)
            weight = torch.empty(shape[:2], dtype=torch.float32, device=query.device)  # log2 of the sum of exponentials
            rows = max(16, triton.next_power_of_2(self.spec.group_size))
            attend_items(query, kv_cache, out, plan.block_tables, plan.decode_items, partial, weight, self.spec, rows)
            if plan.num_partials:
                combine_partials(partial, weight, plan.combine, out)
        return out.flatten(1)


def attend_items(
    query: Tensor,
    kv_cache: Tensor,
    out: Tensor,
    block_tables: Tensor,
    items: Tensor,
    partial: Tensor | None,
    partial_weight: Tensor | None,
    spec: AttentionSpec,
    num_rows: int,
    tile_keys: int | None = None,
    num_warps: int | None = None,
    num_stages: int | None = None,
) -> None:
    """Launch the kernel over `items`; `num_rows` is the M of a tile, at least 16. Tile sizes were measured on an H200."""
    is_decode = partial is not None
    is_wide = spec.head_dim > 128 or query.dtype == torch.float32
    _attend_kernel[(len(items), spec.num_kv_heads)](
        query,
        kv_cache,
        kv_cache.select(0, 1),
        out,
        block_tables,
        items,
        partial if partial is not None else out,
        partial_weight if partial_weight is not None else out,
        block_tables.stride(0),
        spec.scale * LOG2_E,
        spec.num_heads,
        spec.num_kv_heads,
        spec.group_size,
        spec.head_dim,
        triton.next_power_of_2(spec.head_dim),
        spec.block_size,
        num_rows,
        tile_keys or (32 if is_wide else 64 if is_decode else 128),
        is_decode,
        num_warps=num_warps or (4 if is_decode else 8),
        num_stages=num_stages or (2 if is_decode or is_wide else 3),
    )


def combine_partials(partial: Tensor, weight: Tensor, combine: Tensor, out: Tensor) -> None:
    num_heads, head_dim = out.shape[1:]
    block = triton.next_power_of_2(head_dim)
    _combine_kernel[(len(combine), num_heads)](partial, weight, combine, out, num_heads, head_dim, block, num_warps=1)


@triton.jit
def _attend_kernel(
    query_ptr, key_ptr, value_ptr, out_ptr, table_ptr, item_ptr, partial_ptr, weight_ptr, table_stride, scale,
    H: tl.constexpr, K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, IS_DECODE: tl.constexpr,
):  # fmt: skip
    item_ptr += tl.program_id(0) * 7
    kv_head = tl.program_id(1)
    num_queries = tl.load(item_ptr + 1)
    if num_queries == 0:
        return
    first_token, table_row = tl.load(item_ptr).to(tl.int64), tl.load(item_ptr + 2).to(tl.int64)
    first_position = tl.load(item_ptr + 3)
    begin, end = tl.load(item_ptr + 4), tl.load(item_ptr + 5)

    row = tl.arange(0, M)  # query row // G, head row % G
    column = tl.arange(0, BLOCK_D)
    is_row = row < num_queries * G
    row_place = (first_token + row // G) * H + kv_head * G + row % G  # of a [D] vector in query and out
    row_mask = is_row[:, None] & (column < D)[None, :]
    query = tl.load(query_ptr + row_place[:, None] * D + column[None, :], row_mask, other=0.0)  # [M, D]
    position = first_position + row // G  # [M]

    running_max = tl.full([M], float("-inf"), tl.float32)
    running_sum = tl.zeros([M], tl.float32)
    total = tl.zeros([M, BLOCK_D], tl.float32)
    table_ptr += table_row * table_stride
    for first_key in range(begin, end, N):
        key_position = first_key + tl.arange(0, N)
        is_key = key_position < end
        block_id = tl.load(table_ptr + key_position // PAGE, is_key, other=0).to(tl.int64)
        place = ((block_id * K + kv_head) * PAGE + key_position % PAGE) * D  # [N]
        key = tl.load(key_ptr + place[None, :] + column[:, None], is_key[None, :] & (column < D)[:, None], other=0.0)  # [D, N]
        value = tl.load(
            value_ptr + place[:, None] + column[None, :], is_key[:, None] & (column < D)[None, :], other=0.0
        )  # [N, D]
        scores = tl.dot(query, key, input_precision="ieee") * scale  # [M, N]
        visible = is_key[None, :]
        if not IS_DECODE:
            visible = visible & (key_position[None, :] <= position[:, None])
        scores = tl.where(visible, scores, float("-inf"))
        new_max = tl.maximum(running_max, tl.max(scores, 1))
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)  # rows that see nothing yet
        correction = tl.exp2(running_max - safe_max)
        weights = tl.exp2(scores - safe_max[:, None])
        running_sum = running_sum * correction + tl.sum(weights, 1)
        total = total * correction[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        running_max = new_max

    result = total / running_sum[:, None]
    slot = tl.load(item_ptr + 6).to(tl.int64)
    if IS_DECODE and slot >= 0:
        slot_place = slot * H + kv_head * G + row
        tl.store(partial_ptr + slot_place[:, None] * D + column[None, :], result, row_mask)
        tl.store(weight_ptr + slot_place, running_max + tl.log2(running_sum), is_row)
    else:
        tl.store(out_ptr + row_place[:, None] * D + column[None, :], result.to(out_ptr.dtype.element_ty), row_mask)


@triton.jit
def _combine_kernel(partial_ptr, weight_ptr, combine_ptr, out_ptr, H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    combine_ptr += tl.program_id(0) * 3
    count = tl.load(combine_ptr + 2)
    if count == 0:
        return
    head = tl.program_id(1)
    token, first_slot = tl.load(combine_ptr).to(tl.int64), tl.load(combine_ptr + 1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < D
    running_max = float("-inf")
    running_sum = 0.0
    total = tl.zeros([BLOCK], tl.float32)
    for number in range(count):
        place = (first_slot + number) * H + head
        weight = tl.load(weight_ptr + place)
        new_max = tl.maximum(running_max, weight)
        correction, share = tl.exp2(running_max - new_max), tl.exp2(weight - new_max)
        total = total * correction + share * tl.load(partial_ptr + place * D + column, mask, other=0.0)
        running_sum = running_sum * correction + share
        running_max = new_max
    result = total / running_sum
    tl.store(out_ptr + (token * H + head) * D + column, result.to(out_ptr.dtype.element_ty), mask)
