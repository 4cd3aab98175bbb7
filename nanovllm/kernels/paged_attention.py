"""Kernels of paged attention: decoding, where new tokens may be normed, turned and stored on the way, and prompt chunks.

What a work item is, and who launches these: attention/triton_paged.py. M query rows of a tile, N keys of a tile, H query
heads, G of them to each of K KV heads, D head size, PAGE block size.
"""

from __future__ import annotations

from nanovllm.kernels.rotary import turn
from nanovllm.kernels.triton_language import gdc_launch_dependents, gdc_wait, tl, triton


# Items are part of a larger buffer in a captured step, and a tensor of their own in others: one kernel for both.
@triton.jit(do_not_specialize_on_alignment=["item_ptr"])
def decode_kernel(
    query_ptr, norm_ptr, cos_ptr, sin_ptr, key_ptr, value_ptr, out_ptr, table_ptr, item_ptr, partial_ptr, weight_ptr,
    arrival_ptr, table_stride, token_stride, scale, eps,
    H: tl.constexpr, K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, NEW: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
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
    place = ((token * H + kv_head * G + head) * D)[:, None] + column[None, :]  # in out
    query_ptr += token * token_stride
    running_max = tl.full([M], float("-inf"), tl.float32)
    running_sum = tl.zeros([M], tl.float32)
    total = tl.zeros([M, BLOCK_D], tl.float32)
    if NEW:
        cos_ptr, sin_ptr = cos_ptr + token * D, sin_ptr + token * D
        query = turn(query_ptr, norm_ptr, cos_ptr, sin_ptr, kv_head * G + head, head < G, eps, D, BLOCK_D, NORM)
        newest = tl.load(item_ptr + 3)
        if end > newest:  # this item has the new key and value: it stores them, and begins with them
            end = newest
            key, value = _store_new(
                query_ptr, norm_ptr, cos_ptr, sin_ptr, key_ptr, value_ptr, table_ptr, kv_head, newest, eps,
                H, K, D, BLOCK_D, PAGE, NORM,
            )  # fmt: skip
            running_max = tl.sum(query.to(tl.float32) * key.to(tl.float32), 1) * scale
            running_sum += 1.0
            total += value.to(tl.float32)
    else:
        query = tl.load(query_ptr + ((kv_head * G + head) * D)[:, None] + column[None, :], mask, other=0.0)  # [M, D]
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
def _store_new(
    heads_ptr, norm_ptr, cos_ptr, sin_ptr, key_ptr, value_ptr, table_ptr, kv_head, position, eps,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """The new token's key, turned, and its value, put into their block; both [1, BLOCK_D]."""
    one, column = tl.arange(0, 1), tl.arange(0, BLOCK_D)
    is_column = (one == 0)[:, None] & (column < D)[None, :]
    key = turn(heads_ptr, norm_ptr, cos_ptr, sin_ptr, H + kv_head + one, one == 0, eps, D, BLOCK_D, NORM)
    value = tl.load(heads_ptr + (H + K + kv_head + one)[:, None] * D + column[None, :], is_column, other=0.0)
    block_id = tl.load(table_ptr + position // PAGE).to(tl.int64)
    place = ((block_id * K + kv_head) * PAGE + position % PAGE) * D + one[:, None] + column[None, :]
    tl.store(key_ptr + place, key, is_column)
    tl.store(value_ptr + place, value, is_column)
    return key, value


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
def prompt_kernel(
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
