"""The four ways to draw a token, each for a group of samples: greedy, from all, within top-p, within top-k.

Owns the grouping of a batch by way of drawing, and the limits of each group as tensors. All ways draw by the noise of
`gumbel.py`, so a token that survives one filter wins as it would have without it. The filters are in `filters.py`. A
library that draws in all these ways at once, and under grammars, takes their place as a `Race`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanovllm.kernels.draw_top_p import draw_within_top_p
from nanovllm.kernels.triton_language import use_kernel
from nanovllm.kernels.upload import upload
from nanovllm.sampling import filters
from nanovllm.sampling.gumbel import exponential_noise
from nanovllm.sampling.penalties import upload_masks
from nanovllm.sampling_params import SamplingParams
from nanovllm.structured.base import Matchers

# Rows with top_k are grouped by its size, so that one large top_k does not slow the small ones.
GREEDY, FROM_ALL, WITHIN_TOP_P, WITHIN_SMALL_TOP_K, WITHIN_TOP_K, WITHIN_LARGE_TOP_K, EVERY_WAY = range(7)
SMALL_TOP_K, LARGE_TOP_K = 64, 1024

LIMITS = [
    ("method", np.int8),
    ("inverse_temperature", np.float32),
    ("top_k", np.int64),
    ("top_p", np.float32),
    ("min_p", np.float32),
]


def limits_of(params: SamplingParams, vocab_size: int) -> tuple[int, float, int, float, float]:
    """The values of `LIMITS` for one row."""
    inverse_temperature = 0.0 if params.is_greedy else 1.0 / params.temperature
    return _method_of(params, vocab_size), inverse_temperature, params.top_k, params.top_p, params.min_p


def _method_of(params: SamplingParams, vocab_size: int) -> int:
    if params.is_greedy:
        return GREEDY
    if not 0 < params.top_k < vocab_size:
        return WITHIN_TOP_P if params.top_p < 1.0 else FROM_ALL
    if params.top_k <= SMALL_TOP_K:
        return WITHIN_SMALL_TOP_K
    return WITHIN_TOP_K if params.top_k <= LARGE_TOP_K else WITHIN_LARGE_TOP_K


@dataclass(frozen=True, slots=True)
class Group:
    """The samples of a batch that draw in the same way, g of them, with their limits as columns on the device."""

    method: int
    samples: Tensor  # [g] int64
    inverse_temperature: Tensor  # [g, 1] float32
    top_k: Tensor  # [g, 1] int64
    top_p: Tensor  # [g, 1] float32
    min_p: Tensor | None  # [g, 1] float32; None if all are 0
    max_top_k: int

    def __getitem__(self, lines: slice) -> Group:
        limits = (self.inverse_temperature[lines], self.top_k[lines], self.top_p[lines])
        min_p = None if self.min_p is None else self.min_p[lines]
        return Group(self.method, self.samples[lines], *limits, min_p, self.max_top_k)


def build_groups(limits: np.ndarray, device: torch.device, is_one: bool = False) -> list[Group]:
    """Groups of a batch whose samples have `limits`, [num_samples] with the fields of `LIMITS`; `is_one`: one for a `Race`."""
    if is_one:
        return [_build_group(EVERY_WAY, np.arange(len(limits)), limits, device)]
    methods = limits["method"]
    return [_build_group(int(one), np.flatnonzero(methods == one), limits, device) for one in np.unique(methods)]


def _build_group(method: int, samples: np.ndarray, limits: np.ndarray, device: torch.device) -> Group:
    own = limits[samples][:, None]  # [g, 1]
    return Group(
        method=method,
        samples=upload(samples, device),
        inverse_temperature=upload(own["inverse_temperature"], device),
        top_k=upload(own["top_k"], device),
        top_p=upload(own["top_p"], device),
        min_p=upload(own["min_p"], device) if own["min_p"].any() else None,
        max_top_k=int(own["top_k"].max()),
    )


# (logits, hashes, keys, inverse_temperature, top_p, top_k, min_p, masks, mask_lines) -> token ids. 1 / temperature is 0 for
# greedy samples; of masks, and which sample has which, penalties.py says more (`upload_masks`).
Race = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None], Tensor]


def race_all(race: Race, scores: Tensor, group: Group, hashes: Tensor, keys: Tensor, matchers: Matchers | None = None) -> Tensor:
    """`draw` of a whole batch by `race`, and under the grammars of `matchers`, which come last as in `penalties.py`."""
    masks = upload_masks(matchers, len(scores), scores.shape[1], scores.device) if matchers else (None, None)
    return race(scores, hashes, keys, group.inverse_temperature, group.top_p, group.top_k, group.min_p, *masks)


def draw_groups(scores: Tensor, groups: list[Group], hashes: Tensor, keys: Tensor) -> Tensor:
    """`draw` of a whole batch, each sample in the way of its group: [num_samples] int64."""
    if len(groups) == 1:
        return draw(scores, groups[0], hashes, keys)
    token_ids = torch.empty(len(scores), dtype=torch.int64, device=scores.device)
    for group in groups:
        own_scores, own_keys = scores.index_select(0, group.samples), keys.index_select(0, group.samples)
        token_ids.index_copy_(0, group.samples, draw(own_scores, group, hashes, own_keys))
    return token_ids


def draw(scores: Tensor, group: Group, hashes: Tensor, keys: Tensor) -> Tensor:
    """Tokens for a group, [g] int64, from its `scores`, [g, vocab], its `keys`, [g], and `hashes` of the vocabulary.

    `filters.NO_TOKEN` where the scores hold NaN or plus infinity, or nothing but minus infinity.
    """
    if group.method == GREEDY:
        return filters.winner_of(scores)
    if group.method >= WITHIN_SMALL_TOP_K:
        return _draw_within_top_k(scores, group, hashes, keys)
    if group.method == WITHIN_TOP_P and use_kernel("draw_top_p", scores):
        return draw_within_top_p(scores, group.inverse_temperature, group.top_p, group.min_p, keys)
    blocks = filters.row_blocks(scores)
    return torch.cat([_draw_from_block(scores[lines], group[lines], hashes, keys[lines]) for lines in blocks])


def warm_up(vocab_size: int, dtype: torch.dtype, hashes: Tensor) -> None:
    """Compile the kernels that only some requests need; `dtype` is that of logits, `hashes` those of the vocabulary."""
    logits = torch.zeros(1, vocab_size, dtype=dtype, device=hashes.device)
    zero = torch.zeros(1, dtype=torch.int32, device=hashes.device)
    for min_p in (0.0, 0.1):
        limits = np.array([limits_of(SamplingParams(top_p=0.9, min_p=min_p), vocab_size)], dtype=np.dtype(LIMITS))
        group = build_groups(limits, hashes.device)[0]
        for scores in (logits, logits.float()):  # edited logits may be float32
            draw(scores, group, hashes, zero)


def _draw_from_block(scores: Tensor, group: Group, hashes: Tensor, keys: Tensor) -> Tensor:
    weights = _weights_above_min_p(scores, group)  # [b, vocab]
    race = exponential_noise(hashes, keys)  # [b, vocab]
    torch.div(weights, race, out=race)
    if group.method == WITHIN_TOP_P:
        return filters.winner_within_top_p(scores, weights, race, group.top_p)
    return filters.winner_of(race)


def _draw_within_top_k(scores: Tensor, group: Group, hashes: Tensor, keys: Tensor) -> Tensor:
    """Only the candidates need weights and noise."""
    logits, token_ids = filters.most_likely(scores, group.max_top_k)  # [g, k]
    weights = _weights_above_min_p(logits, group)
    filters.drop_beyond_top_k_top_p(weights, group.top_k, group.top_p)
    race = weights / exponential_noise(hashes[token_ids], keys)  # [g, k]
    winner = filters.argmax(race)  # [g]
    drawn = token_ids.gather(-1, winner[:, None])[:, 0]
    return torch.where(filters.unless_not_finite(winner, race) < 0, filters.NO_TOKEN, drawn)


def _weights_above_min_p(scores: Tensor, group: Group) -> Tensor:
    weights = filters.relative_weights(scores, group.inverse_temperature)
    return weights if group.min_p is None else filters.drop_below_min_p(weights, group.min_p)
