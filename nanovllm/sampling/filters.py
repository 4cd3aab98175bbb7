"""min_p, top_k and top_p: which of the tokens may still win.

Pure functions of tensors. All of them agree on one order of the vocabulary, "more likely first, the lower id among
equals", and on `relative_weights`, the probabilities up to a factor, so the vocabulary is never sorted nor normalised.
Only `winner_within_top_p` waits for the device, and on a GPU `kernels/draw_top_p.py` runs in its place. What wins is
decided by the noise of `gumbel.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

NO_TOKEN = -1  # drawn from logits that are not finite numbers: there is nothing to draw
MAX_BLOCK_ELEMENTS = 2**25  # logits worked on at a time on an accelerator: 128 MB for each float32 temporary


def row_blocks(logits: Tensor, rows_on_cpu: int = 1) -> Iterator[slice]:
    """Slices of the lines of `logits`, [n, vocab], that bound the temporaries; one empty slice if there are no lines.

    A CPU takes one row at a time: its temporaries stay in the cache, and no sum depends on the neighbours.
    """
    num_rows, vocab_size = logits.shape
    step = rows_on_cpu if logits.is_cpu else max(1, MAX_BLOCK_ELEMENTS // vocab_size)
    yield from (slice(start, start + step) for start in range(0, max(num_rows, 1), step))


def relative_weights(logits: Tensor, inverse_temperature: Tensor) -> Tensor:
    """exp((logits - max) / T), a new float32 tensor. `logits` [b, n], `inverse_temperature` [b, 1]."""
    weights = logits.float() - logits.amax(-1, keepdim=True)  # [b, n]
    return weights.mul_(inverse_temperature).exp_()


def drop_below_min_p(weights: Tensor, min_p: Tensor) -> Tensor:
    """Zero what is less likely than the share `min_p`, [b, 1], of the most likely token, whose weight is 1. In place."""
    return weights.mul_(torch.ge(weights, min_p, out=torch.empty_like(weights)))


def drop_beyond_top_k_top_p(weights: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Zero the candidates after the first `top_k`, then those after the first to reach `top_p` of the rest's sum.

    `weights` [b, n], most likely first; `top_k`, `top_p` [b, 1]. In place.
    Weights 8 4 2 1 1, top_k 4, top_p 0.8: 8 4 2 1 sum to 15; 8 + 4 reach 12, so 8 4 stay.
    """
    ranks = torch.arange(weights.shape[-1], device=weights.device)  # [n]
    weights *= ranks < top_k
    reached = weights.cumsum(-1)  # [b, n]
    weights[:, 1:] *= reached[:, :-1] < _share(top_p, reached[:, -1:])
    return weights


def winner_within_top_p(logits: Tensor, weights: Tensor, scores: Tensor, top_p: Tensor) -> Tensor:
    """The token with the best score in the smallest set of likely tokens that holds `top_p` of the weight: [b] int64.

    `logits`, `weights`, `scores` [b, vocab]; overwrites `scores`. Instead of building the set: look whether the leader
    of the race is in it, that is whether the tokens ahead of it weigh less than top_p. If not, nothing from the leader
    downwards is in it, so the race goes on among those ahead. The first leader is in it with a probability of top_p or
    more. Each round waits for the device. `NO_TOKEN` where the winner's score is not finite.
    """
    nucleus = _share(top_p, weights.sum(-1, keepdim=True))  # [b, 1]
    while True:
        winner = argmax(scores)  # [b]
        ahead = tokens_ahead(logits, winner)  # [b, vocab]
        weight_ahead = (ahead * weights).sum(-1, keepdim=True)  # [b, 1]; the most likely token has none ahead
        is_outside = (weight_ahead >= nucleus) & (weight_ahead > 0)  # [b, 1]; never so where NaN is
        if not is_outside.any():
            return unless_not_finite(winner, scores)
        scores *= torch.maximum(ahead, (~is_outside).float())


def tokens_ahead(logits: Tensor, token_ids: Tensor) -> Tensor:
    """1.0 for each token that comes before `token_ids`, [b], in the order of likelihood, else 0.0: [b, vocab] float32."""
    limit = logits.gather(-1, token_ids[:, None])  # [b, 1]
    ids = torch.arange(logits.shape[-1], dtype=torch.int32, device=logits.device)  # [vocab]
    # Comparisons write floats: five times as fast as booleans on a CPU, and the callers multiply and sum them.
    ahead = torch.eq(logits, limit, out=torch.empty_like(logits, dtype=torch.float32))
    ahead *= torch.lt(ids, token_ids[:, None].int(), out=torch.empty_like(ahead))
    return ahead.add_(torch.gt(logits, limit, out=torch.empty_like(ahead)))


def most_likely(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of `logits`, [n, vocab], largest first, lowest ids first among equals: values and ids, [n, count].

    `topk` alone leaves it open which of the equals it takes, and in bf16 there are many. So it ranks 64-bit integers:
    above, the bits of the float, arranged so that they sort as it does; below, the id counted from the end.
    """
    last_id = logits.shape[-1] - 1
    ids_from_end = torch.arange(last_id, -1, -1, device=logits.device)  # [vocab]
    ids = torch.empty(len(logits), count, dtype=torch.int64, device=logits.device)
    for lines in row_blocks(logits):
        order = _sortable(logits[lines]).long().bitwise_left_shift_(32).bitwise_or_(ids_from_end)  # [b, vocab]
        ids[lines] = last_id - (order.topk(count, -1).values & 0xFFFFFFFF)
    return logits.gather(-1, ids), ids


def _sortable(values: Tensor) -> Tensor:
    """Floats as int32 that sort in the same way: negative ones sort backwards by their bits, so all but the sign flip."""
    bits = (values.float() + 0.0).view(torch.int32)  # + 0.0 copies, and turns -0.0 into 0.0
    return bits.bitwise_xor_((bits >> 31).bitwise_and_(0x7FFFFFFF))


def argmax(values: Tensor) -> Tensor:
    """[..., n] to [...] int64: the first of the largest. NaN counts as largest, so the result is always in range."""
    if values.is_cpu:  # NumPy finds it ten times as fast
        return torch.from_numpy(np.asarray(values.float().numpy().argmax(-1)))
    return values.argmax(-1)


def winner_of(values: Tensor) -> Tensor:
    """`argmax`, but `NO_TOKEN` where the largest is NaN or infinite: [..., n] to [...] int64."""
    return unless_not_finite(argmax(values), values)


def unless_not_finite(winner: Tensor, values: Tensor) -> Tensor:
    """`winner`, [...] places in `values`, [..., n]; `NO_TOKEN` where the value there is not finite."""
    best = values.gather(-1, winner[..., None])[..., 0]
    return torch.where(best.abs() < torch.inf, winner, NO_TOKEN)


def _share(top_p: Tensor, total: Tensor) -> Tensor:
    """What the tokens ahead must weigh less than; unlimited for 1.0, where rounding could otherwise cost the last tokens."""
    return torch.where(top_p < 1.0, top_p * total, torch.inf)
