"""Greedy and temperature sampling of a whole batch in two small kernels, by the specification in `sampling/gumbel.py`.

Here in the form argmax(logit / T - log(-log(u))), which needs no maximum first and so one pass over the logits; greedy
rows have 1 / T = 0 and compare the logits alone. Each program reduces one tile of the vocabulary of one sample; a second
kernel reduces the tiles, and writes the token to the output and into the row state, where the next step reads it.
NaN competes as plus infinity; a winner that is not finite is no token: -1. S samples, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanovllm.kernels.triton_language import tl, triton

TILE = 2048  # tokens; with 4 warps, measured on an H200
FORBIDDEN = tl.constexpr(-1e20)  # as in sampling/penalties.py


def draw_tokens(
    logits: Tensor,
    inverse_temperature: Tensor,
    keys: Tensor,
    rows: Tensor,
    positions: Tensor,
    token_table: Tensor,
    token_ids: Tensor,
    masks: Tensor | None = None,
    mask_lines: Tensor | None = None,
    held: Tensor | None = None,
    place: Tensor | None = None,
) -> None:
    """Write one token per sample to `token_ids`, [S] int64, and to `token_table[rows, positions]`; -1 there as 0.

    logits: [S, V]; inverse_temperature: [S] float32; keys, rows, positions: [S] int32. Under grammars only tokens whose bit
    is set: masks: [m, num_mask_words] int32, token t is bit t % 32 of word t // 32; mask_lines: [S] int32, -1 without a mask.
    held: [1 or more] int32; where the first is not 0 nothing is drawn or written. place: [1 or more] int32, the first is the line
    of `token_ids`, [m, at least S] then, to write to. Both `masks` and `token_ids` may be pinned memory of the host.
    """
    num_samples, vocab_size = logits.shape
    num_tiles = triton.cdiv(vocab_size, TILE)
    best = torch.empty(num_samples, num_tiles, dtype=torch.float32, device=logits.device)
    best_id = torch.empty(num_samples, num_tiles, dtype=torch.int32, device=logits.device)
    _reduce_tile_kernel[(num_samples, num_tiles)](
        logits,
        inverse_temperature,
        keys,
        masks,
        mask_lines,
        held,
        best,
        best_id,
        logits.stride(0),
        0 if masks is None else masks.stride(0),
        vocab_size,
        num_tiles,
        TILE,
        num_warps=4,
    )
    _reduce_row_kernel[(num_samples,)](
        best,
        best_id,
        rows,
        positions,
        token_table,
        token_ids,
        held,
        place,
        token_table.stride(0),
        token_ids.stride(0),
        num_tiles,
        triton.next_power_of_2(num_tiles),
        num_warps=1,
    )


@triton.jit
def _mix(x):
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


@triton.jit
def _reduce_tile_kernel(
    logits_ptr,
    inverse_temperature_ptr,
    key_ptr,
    mask_ptr,
    mask_line_ptr,
    held_ptr,
    best_ptr,
    best_id_ptr,
    stride,
    mask_stride,
    vocab_size,
    num_tiles,
    TILE: tl.constexpr,
):
    if held_ptr is not None:  # noqa: SIM102 - of an `and` both sides would be compiled
        if tl.load(held_ptr) != 0:
            return
    sample, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = tile * TILE + tl.arange(0, TILE)
    logit = tl.load(logits_ptr + sample * stride + token, token < vocab_size, other=float("-inf")).to(tl.float32)
    score, live = logit, tl.full([], 1, tl.int32)
    if mask_ptr is not None:
        line = tl.load(mask_line_ptr + sample).to(tl.int64)
        if line >= 0:
            word = tile * (TILE // 32) + tl.arange(0, TILE // 32)
            # Each word once: the host's memory is far.
            words = tl.load(mask_ptr + line * mask_stride + word, word * 32 < vocab_size, other=0)
            live = tl.max((words != 0).to(tl.int32), 0)  # 0: nothing of this tile may come, so it needs no noise
            bits = tl.reshape((words[:, None] >> tl.arange(0, 32)[None, :]) & 1, [TILE])
            lowest = tl.maximum(logit, FORBIDDEN)  # above the rest even if the model says -inf
            score = tl.where((bits != 0) & (token < vocab_size), lowest, float("-inf"))
    score = tl.where(logit == logit, score, float("inf"))  # NaN wins, and is then found out
    inverse_temperature = tl.load(inverse_temperature_ptr + sample)
    if (inverse_temperature > 0.0) & (live != 0):
        score = score_of(score * inverse_temperature, draw_bits(token, tl.load(key_ptr + sample).to(tl.uint32, bitcast=True)))
    best, winner = leader(score, token)
    tl.store(best_ptr + sample * num_tiles + tile, best)
    tl.store(best_id_ptr + sample * num_tiles + tile, winner)


@triton.jit
def draw_bits(token, key):
    """u of the token is (this + 0.5) * 2 ** -23."""
    return (_mix(_mix(token.to(tl.uint32)) + key) >> 9).to(tl.float32)


@triton.jit
def leader(score, token):
    """The best score and its token; the lowest id among equals."""
    best = tl.max(score, 0)
    return best, tl.min(tl.where(score == best, token, 2147483647), 0)


@triton.jit
def score_of(score, draw):
    """The inner logarithm must be right near u = 1, where winners come from; the outer one only to 1e-6."""
    u = (draw + 0.5) * 1.1920928955078125e-07
    return score - tl.log2(-tl.log(u)) * 0.6931471805599453


@triton.jit
def _reduce_row_kernel(
    best_ptr,
    best_id_ptr,
    row_ptr,
    position_ptr,
    table_ptr,
    token_ptr,
    held_ptr,
    place_ptr,
    table_stride,
    token_stride,
    num_tiles,
    BLOCK: tl.constexpr,
):
    if held_ptr is not None:  # noqa: SIM102 - of an `and` both sides would be compiled
        if tl.load(held_ptr) != 0:
            return
    sample = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, BLOCK)
    score = tl.load(best_ptr + sample * num_tiles + tile, tile < num_tiles, other=float("-inf"))
    token = tl.load(best_id_ptr + sample * num_tiles + tile, tile < num_tiles, other=2147483647)
    best = tl.max(score, 0)
    winner = tl.min(tl.where(score == best, token, 2147483647), 0)
    is_finite = (best > float("-inf")) & (best < float("inf"))
    if place_ptr is not None:
        token_ptr += tl.load(place_ptr).to(tl.int64) * token_stride
    tl.store(token_ptr + sample, tl.where(is_finite, winner, -1).to(tl.int64))
    row, position = tl.load(row_ptr + sample).to(tl.int64), tl.load(position_ptr + sample)
    tl.store(table_ptr + row * table_stride + position, tl.where(is_finite, winner, 0))
