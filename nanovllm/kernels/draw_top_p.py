"""Sampling within top-p without sorting and without the host: one program per row runs the race of `filters.py`.

The leader of the race among all tokens is taken if the tokens ahead of it in likelihood weigh less than top_p; if not,
nothing from the leader downwards is in the nucleus, and the race goes on among those ahead. A first leader is inside
with a probability of top_p or more, so there are few rounds, and each is two passes over logits that are in the cache.
B rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanovllm.kernels.draw_token import draw_bits, leader, score_of
from nanovllm.kernels.triton_language import tl, triton

TILE = 8192


def draw_within_top_p(logits: Tensor, inverse_temperature: Tensor, top_p: Tensor, min_p: Tensor | None, keys: Tensor) -> Tensor:
    """The twin of `filters.winner_within_top_p`, with its weights. logits: [B, V]; keys: [B] int32; the others: [B, 1] -> [B]."""
    token_ids = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    _race_kernel[(len(logits),)](
        logits,
        inverse_temperature.contiguous(),
        top_p.contiguous(),
        min_p.contiguous() if min_p is not None else top_p,
        keys,
        token_ids,
        logits.stride(0),
        logits.shape[1],
        TILE,
        min_p is not None,
        num_warps=16,
    )
    return token_ids


@triton.jit
def _race_kernel(
    logits_ptr, inverse_temperature_ptr, top_p_ptr, min_p_ptr, key_ptr, token_ptr, stride, V: tl.constexpr,
    TILE: tl.constexpr, MIN_P: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    inverse_temperature, key = tl.load(inverse_temperature_ptr + row), tl.load(key_ptr + row).to(tl.uint32, bitcast=True)
    least = 0.0
    if MIN_P:
        least = tl.load(min_p_ptr + row)
    offset = tl.arange(0, TILE)
    highest = tl.full([], float("-inf"), tl.float32)
    for start in range(0, V, TILE):
        logit = tl.load(logits_ptr + start + offset, start + offset < V, other=float("-inf")).to(tl.float32)
        highest = tl.maximum(highest, tl.max(tl.where(logit == logit, logit, float("inf")), 0))  # then all weights are 0
    total = tl.full([], 0.0, tl.float32)
    for start in range(0, V, TILE):
        logit = tl.load(logits_ptr + start + offset, start + offset < V, other=float("-inf")).to(tl.float32)
        total += tl.sum(_weight(logit, highest, inverse_temperature, least), 0)
    nucleus = tl.load(top_p_ptr + row) * total
    limit, winner = (
        tl.full([], float("-inf"), tl.float32),
        tl.full([], V, tl.int32),
    )  # the race is among the tokens ahead of this one
    is_outside = total > 0.0
    while is_outside:
        best, next_winner = tl.full([], float("-inf"), tl.float32), tl.full([], V - 1, tl.int32)
        for start in range(0, V, TILE):
            token = start + offset
            logit = tl.load(logits_ptr + token, token < V, other=float("-inf")).to(tl.float32)
            runs = (logit > limit) | ((logit == limit) & (token < winner))
            runs = runs & (_weight(logit, highest, inverse_temperature, least) > 0.0)
            score = tl.where(runs, score_of(logit * inverse_temperature, draw_bits(token, key)), float("-inf"))
            tile_best, tile_winner = leader(score, token)
            if tile_best > best:
                best, next_winner = tile_best, tile_winner
        winner = next_winner
        limit = tl.load(logits_ptr + winner).to(tl.float32)
        ahead = tl.full([], 0.0, tl.float32)
        for start in range(0, V, TILE):
            token = start + offset
            logit = tl.load(logits_ptr + token, token < V, other=float("-inf")).to(tl.float32)
            is_ahead = (logit > limit) | ((logit == limit) & (token < winner))
            ahead += tl.sum(tl.where(is_ahead, _weight(logit, highest, inverse_temperature, least), 0.0), 0)
        is_outside = (ahead >= nucleus) & (ahead > 0.0)
    tl.store(token_ptr + row, tl.where(total > 0.0, winner, -1).to(tl.int64))  # -1: the logits are not finite numbers


@triton.jit
def _weight(logit, highest, inverse_temperature, least):
    """Relative to the most likely token's; 0 for what min_p excludes, and for NaN."""
    weight = tl.exp((logit - highest) * inverse_temperature)
    return tl.where(weight >= least, weight, 0.0)
