"""Rotary position embedding (Su et al. 2021), half-split pairing; and its fusion with the head norms and the KV write.

Dimension i turns with dimension i + D/2: with (a, b) the halves of a head, the result is (a cos - b sin, b cos + a sin).
N tokens, H query heads, K KV heads, D head size. The fused kernel has one program per token and head group; queries go
to a new tensor, keys and values straight into the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanovllm.kernels.triton_language import gdc_launch_dependents, gdc_wait, tl, triton


def apply_rotary(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Turn every head of x by its token's angles.

    x: [N, num_heads, D]; cos, signed_sin: [N, 1, D], where both halves of cos are equal and the first half of
    signed_sin is negated, so that the turn is two products and a sum.
    """
    half = x.shape[-1] // 2
    swapped = torch.cat((x[..., half:], x[..., :half]), dim=-1)
    return torch.addcmul(x * cos, swapped, signed_sin)


def rotate_and_store(
    heads: Tensor,
    head_norm: tuple[Tensor, float] | None,
    cos: Tensor,
    signed_sin: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    num_heads: int,
) -> Tensor:
    """Norm (where the family has one), turn and store in one kernel.

    heads: [N, H + 2 K, D]; head_norm: ([H + K, D] weight, eps); kv_cache: [2, num_blocks, K, block_size, D];
    slot_mapping: [N] -> the queries, [N, H, D].
    """
    num_tokens, total_heads, head_dim = heads.shape
    num_kv_heads = (total_heads - num_heads) // 2
    query = heads.new_empty(num_tokens, num_heads, head_dim)
    weight, eps = head_norm if head_norm is not None else (heads, 0.0)
    heads_per_program = 1 if num_tokens <= 64 else min(32, triton.next_power_of_2(total_heads))
    use_pdl = num_tokens <= 512 and heads.is_cuda
    _rotate_and_store_kernel[(num_tokens, triton.cdiv(total_heads, heads_per_program))](
        heads,
        weight,
        cos,
        signed_sin,
        query,
        kv_cache,
        slot_mapping,
        heads.stride(0),
        kv_cache.stride(0),
        eps,
        num_heads,
        num_kv_heads,
        head_dim // 2,
        triton.next_power_of_2(head_dim // 2),
        heads_per_program,
        kv_cache.shape[3],
        head_norm is not None,
        use_pdl,
        num_warps=1 if heads_per_program == 1 else 4,
        launch_pdl=use_pdl,
    )
    return query


@triton.jit
def _rotate_and_store_kernel(
    heads_ptr, weight_ptr, cos_ptr, sin_ptr, query_ptr, cache_ptr, slot_ptr, token_stride, value_offset, eps,
    H: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr,
    NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * GROUP + tl.arange(0, GROUP)[:, None]  # [GROUP, 1]
    pair = tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    mask = (head < H + 2 * K) & (pair < HALF)
    source = heads_ptr + token * token_stride + head * 2 * HALF + pair
    a, b = tl.load(source, mask, other=0.0), tl.load(source + HALF, mask, other=0.0)
    turns = mask & (head < H + K)
    a32, b32 = a.to(tl.float32), b.to(tl.float32)
    if NORM:
        scale = tl.rsqrt((tl.sum(a32 * a32, 1) + tl.sum(b32 * b32, 1)) / (2 * HALF) + eps)[:, None]
        weight = weight_ptr + head * 2 * HALF + pair
        a32 = (a32 * scale).to(a.dtype).to(tl.float32) * tl.load(weight, turns, other=0.0).to(tl.float32)
        b32 = (b32 * scale).to(a.dtype).to(tl.float32) * tl.load(weight + HALF, turns, other=0.0).to(tl.float32)
        a32, b32 = a32.to(a.dtype).to(tl.float32), b32.to(a.dtype).to(tl.float32)
    cos = tl.load(cos_ptr + token * 2 * HALF + pair, pair < HALF, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * 2 * HALF + HALF + pair, pair < HALF, other=0.0).to(tl.float32)
    turned_a = tl.where(turns, a32 * cos - b32 * sin, a.to(tl.float32)).to(a.dtype)
    turned_b = tl.where(turns, b32 * cos + a32 * sin, b.to(tl.float32)).to(a.dtype)
    is_query = mask & (head < H)
    target = query_ptr + (token * H + head) * 2 * HALF + pair
    tl.store(target, turned_a, is_query)
    tl.store(target + HALF, turned_b, is_query)
    slot = tl.load(slot_ptr + token).to(tl.int64)
    kv_head = (head - H) % K  # keys, then values
    is_value = head >= H + K
    # A value is also read with weight 0, and 0 * NaN is not 0: what overflowed must not reach another token.
    turned_a = tl.where(is_value & ~(tl.abs(a32) < float("inf")), 0.0, turned_a)
    turned_b = tl.where(is_value & ~(tl.abs(b32) < float("inf")), 0.0, turned_b)
    place = is_value.to(tl.int64) * value_offset + ((slot // PAGE * K + kv_head) * PAGE + slot % PAGE) * 2 * HALF
    is_kept = mask & (head >= H) & (slot >= 0)
    tl.store(cache_ptr + place + pair, turned_a, is_kept)
    tl.store(cache_ptr + place + HALF + pair, turned_b, is_kept)
