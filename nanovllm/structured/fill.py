"""The masks of one step, in threads where there are many: a grammar engine computes without Python's lock."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np

from nanovllm.structured.base import Matcher

MIN_PER_THREAD = 4  # below, handing out costs more than it saves
MAX_THREADS = 8


def fill_masks(matchers: Sequence[Matcher], masks: np.ndarray) -> None:
    """Line i of `masks`, [number of matchers, num_mask_words] int32 and 0 before, is what matcher i allows: its bits are set."""
    num_threads = max(1, min(_num_free_processors(), len(matchers) // MIN_PER_THREAD))
    parts = [slice(i * len(matchers) // num_threads, (i + 1) * len(matchers) // num_threads) for i in range(num_threads)]
    others = [_threads().submit(_fill, matchers[part], masks[part]) for part in parts[1:]]
    _fill(matchers[parts[0]], masks[parts[0]])
    for other in others:
        other.result()


def _fill(matchers: Sequence[Matcher], masks: np.ndarray) -> None:
    for matcher, mask in zip(matchers, masks):
        matcher.fill_mask(mask)


@cache
def _num_free_processors() -> int:
    """Half of them; on a CPU the model has the others."""
    return min(MAX_THREADS, len(os.sched_getaffinity(0)) // 2) if hasattr(os, "sched_getaffinity") else 1


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_num_free_processors() - 1, "nanovllm-masks")
