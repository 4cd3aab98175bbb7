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

from nanovllm.attention.base import AttentionInputs, AttentionSpec, HeadNorm, Rotary
from nanovllm.kernels.rotary import rotate_and_store
from nanovllm.kernels.triton_language import TensorDescriptor, gdc_launch_dependents, gdc_wait, tl, triton
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
    split = split_length(context, max_extra_items)
    num_splits = -(-context // split)
    first_slot = np.cumsum(num_splits) - num_splits
    items = np.empty((len(starts), ITEM_FIELDS), dtype=np.int32)  # of whole sequences first
    for column, values in enumerate((tokens, 1, rows, starts, 0, context, -1, first_slot, num_splits)):
        items[:, column] = values
    items = np.repeat(items, num_splits, axis=0)
    number = np.arange(len(items)) - items[:, 7]  # item -> which split of its sequence
    items[:, 4] = begin = number * split
    items[:, 5] = end = np.minimum(begin + split, items[:, 5])
    items[:, 6] = np.where(items[:, 8] > 1, items[:, 7] + number, -1)
    return items[np.argsort(begin - end, kind="stable")]


def split_length(context: np.ndarray, max_extra_items: int) -> int:
    split = max(MIN_SPLIT, -(-int(context.sum()) // max(max_extra_items, 1)))
    return -(-split // MIN_SPLIT) * MIN_SPLIT


def num_steps_planned(context: np.ndarray, max_extra_items: int) -> int:
    """For how many steps, each with one token more of every sequence, `plan_decodes` splits them as it does for `context`."""
    split = split_length(context, max_extra_items)
    until_longer_splits = (split * max(max_extra_items, 1) - context.sum()) // len(context)
    return int(min(until_longer_splits, (-context % split).min()))


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


class TritonAttention:
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


def attend_decodes(query: Tensor, kv_cache: Tensor, out: Tensor, plan: TritonPlan, arrivals: Tensor, spec: AttentionSpec) -> None:
    """Tiles of one query each, padded to 16 rows for the matrix units. Tile sizes were measured on an H200."""
    use_pdl = len(query) <= 512 and query.is_cuda
    shape = len(plan.decode_items), spec.num_heads, spec.head_dim
    partial = torch.empty(shape, dtype=torch.float32, device=query.device)
    weight = torch.empty(shape[:2], dtype=torch.float32, device=query.device)  # log2 of the sum of exponentials
    _decode_kernel[(len(plan.decode_items), spec.num_kv_heads)](
        query,
        kv_cache[0],
        kv_cache[1],
        out,
        plan.block_tables,
        plan.decode_items,
        partial,
        weight,
        arrivals,
        plan.block_tables.stride(0),
        spec.scale * LOG2_E,
        spec.num_heads,
        spec.num_kv_heads,
        spec.group_size,
        spec.head_dim,
        triton.next_power_of_2(spec.head_dim),
        spec.block_size,
        max(16, triton.next_power_of_2(spec.group_size)),
        32 if spec.head_dim > 128 or query.dtype == torch.float32 else 64,
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
    _prompt_kernel[(spec.num_kv_heads, len(plan.prompt_items))](
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


# Items are part of a larger buffer in a captured step, and a tensor of their own in others: one kernel for both.
@triton.jit(do_not_specialize_on_alignment=["item_ptr"])
def _decode_kernel(
    query_ptr, key_ptr, value_ptr, out_ptr, table_ptr, item_ptr, partial_ptr, weight_ptr, arrival_ptr, table_stride,
    scale,
    H: tl.constexpr, K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    item_ptr += tl.program_id(0) * 9
    kv_head = tl.program_id(1)
    if tl.load(item_ptr + 1) == 0:
        return
    token, table_row = tl.load(item_ptr).to(tl.int64), tl.load(item_ptr + 2).to(tl.int64)
    begin, end = tl.load(item_ptr + 4), tl.load(item_ptr + 5)
    table_ptr += table_row * table_stride
    if PDL:
        gdc_wait()
    head, column = tl.arange(0, M), tl.arange(0, BLOCK_D)
    mask = (head < G)[:, None] & (column < D)[None, :]
    place = ((token * H + kv_head * G + head) * D)[:, None] + column[None, :]  # in query and out
    query = tl.load(query_ptr + place, mask, other=0.0)  # [M, D]
    running_max = tl.full([M], float("-inf"), tl.float32)
    running_sum = tl.zeros([M], tl.float32)
    total = tl.zeros([M, BLOCK_D], tl.float32)
    for first_key in range(begin, end, N):
        position = first_key + tl.arange(0, N)
        is_key = position < end
        if PAGE % N == 0:  # the tile lies in one block: splits begin at multiples of MIN_SPLIT
            block_id = tl.load(table_ptr + first_key // PAGE).to(tl.int64)
        else:
            block_id = tl.load(table_ptr + position // PAGE, is_key, other=0).to(tl.int64)
        source = ((block_id * K + kv_head) * PAGE + position % PAGE) * D  # [N]
        key = tl.load(key_ptr + source[None, :] + column[:, None], is_key[None, :] & (column < D)[:, None], other=0.0)
        value = tl.load(value_ptr + source[:, None] + column[None, :], is_key[:, None] & (column < D)[None, :], other=0.0)
        scores = tl.dot(query, key, input_precision="ieee") * scale  # [M, N]
        scores = tl.where(is_key[None, :], scores, float("-inf"))
        new_max = tl.maximum(running_max, tl.max(scores, 1))
        correction, weights = tl.exp2(running_max - new_max), tl.exp2(scores - new_max[:, None])
        running_sum = running_sum * correction + tl.sum(weights, 1)
        total = total * correction[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        running_max = new_max
    result = total / running_sum[:, None]
    slot = tl.load(item_ptr + 6).to(tl.int64)
    if slot < 0:
        tl.store(out_ptr + place, result.to(out_ptr.dtype.element_ty), mask)
        return
    line = slot * H + kv_head * G + head
    tl.store(partial_ptr + (line * D)[:, None] + column[None, :], result, mask)
    tl.store(weight_ptr + line, running_max + tl.log2(running_sum), head < G)
    # The last of the sequence's programs to arrive here combines their results.
    first_slot, count = tl.load(item_ptr + 7).to(tl.int64), tl.load(item_ptr + 8)
    tl.debug_barrier()
    if tl.atomic_add(arrival_ptr + first_slot * K + kv_head, 1, sem="acq_rel") < count - 1:
        return
    tl.store(arrival_ptr + first_slot * K + kv_head, 0)
    first_line = first_slot * H + kv_head * G
    result = _combine(partial_ptr, weight_ptr, first_line, count, H, G, D, BLOCK_D, M)
    tl.store(out_ptr + place, result.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def _combine(
    partial_ptr, weight_ptr, first_line, count,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """The mean of `count` partial results by their weights, which are logarithms to base 2: [M, BLOCK_D]."""
    head, column = tl.arange(0, M), tl.arange(0, BLOCK_D)
    mask = (head < G)[:, None] & (column < D)[None, :]
    running_max = tl.full([M], float("-inf"), tl.float32)
    running_sum = tl.zeros([M], tl.float32)
    total = tl.zeros([M, BLOCK_D], tl.float32)
    for number in range(count):
        line = first_line + number * H + head
        weight = tl.load(weight_ptr + line, head < G, other=0.0, cache_modifier=".cg")
        part = tl.load(partial_ptr + (line * D)[:, None] + column[None, :], mask, other=0.0, cache_modifier=".cg")
        new_max = tl.maximum(running_max, weight)
        correction, share = tl.exp2(running_max - new_max), tl.exp2(weight - new_max)
        total = total * correction[:, None] + share[:, None] * part
        running_sum = running_sum * correction + share
        running_max = new_max
    return total / running_sum[:, None]


@triton.jit(do_not_specialize_on_alignment=["item_ptr"])
def _prompt_kernel(
    query_ptr, key_ptr, value_ptr, key_descriptor, value_descriptor, out_ptr, table_ptr, item_ptr, table_stride, scale,
    H: tl.constexpr, K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(0)
    item_ptr += tl.program_id(1) * 9
    num_queries = tl.load(item_ptr + 1)
    if num_queries == 0:
        return
    token, table_row = tl.load(item_ptr).to(tl.int64), tl.load(item_ptr + 2).to(tl.int64)
    first_position, end = tl.load(item_ptr + 3), tl.load(item_ptr + 5)
    row, column = tl.arange(0, M), tl.arange(0, BLOCK_D)  # query row // G, head row % G
    mask = (row < num_queries * G)[:, None] & (column < D)[None, :]
    place = (((token + row // G) * H + kv_head * G + row % G) * D)[:, None] + column[None, :]  # in query and out
    query = tl.load(query_ptr + place, mask, other=0.0)  # [M, D]
    position = first_position + row // G  # [M]
    running_max = tl.full([M], -1e30, tl.float32)
    running_sum = tl.zeros([M], tl.float32)
    total = tl.zeros([M, BLOCK_D], tl.float32)
    table_ptr += table_row * table_stride
    all_see = first_position // N * N  # keys before it are visible to every query of the tile
    for stage in tl.static_range(2):
        for first_key in range(0 if stage == 0 else all_see, all_see if stage == 0 else end, N):
            key_position = first_key + tl.arange(0, N)
            if TMA:  # the tile lies in one block
                line = ((tl.load(table_ptr + first_key // PAGE) * K + kv_head) * PAGE + first_key % PAGE).to(tl.int32)
                key = key_descriptor.load([line, 0]).T  # [D, N]
                value = value_descriptor.load([line, 0])  # [N, D]
            else:
                is_key = key_position < end
                block_id = tl.load(table_ptr + key_position // PAGE, is_key, other=0).to(tl.int64)
                source = ((block_id * K + kv_head) * PAGE + key_position % PAGE) * D  # [N]
                key_mask = is_key[None, :] & (column < D)[:, None]
                key = tl.load(key_ptr + source[None, :] + column[:, None], key_mask, other=0.0)
                value_mask = is_key[:, None] & (column < D)[None, :]
                value = tl.load(value_ptr + source[:, None] + column[None, :], value_mask, other=0.0)
            scores = tl.dot(query, key, input_precision="ieee")  # [M, N]
            if stage == 1:
                scores = tl.where(key_position[None, :] <= position[:, None], scores, float("-inf"))
                value = tl.where((key_position < end)[:, None], value, 0.0)  # 0 * inf is not 0
            new_max = tl.maximum(running_max, tl.max(scores, 1) * scale)
            correction, weights = tl.exp2(running_max - new_max), tl.exp2(scores * scale - new_max[:, None])
            running_sum = running_sum * correction + tl.sum(weights, 1)
            total = tl.dot(weights.to(value.dtype), value, total * correction[:, None], input_precision="ieee")
            running_max = new_max
    tl.store(out_ptr + place, (total / running_sum[:, None]).to(out_ptr.dtype.element_ty), mask)
