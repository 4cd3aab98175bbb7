"""What a replayed step is told: the quick way for steps that only decode gives what the general way gives."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest

from nanovllm.attention.triton_paged import MIN_SPLIT, DecodeItems, plan_decodes
from nanovllm.engine.batch import ScheduledBatch
from nanovllm.runner.cuda_graphs import Bucket, CudaGraphs

MAX_EXTRA = 12


def sorted_items(items: np.ndarray) -> list[tuple[int, ...]]:
    return sorted(map(tuple, items.tolist()))


@pytest.mark.parametrize("seed", range(8))
def test_items_of_step_after_step_are_those_planned_anew(seed):
    """Sequences grow over the borders of splits, leave, and others take their rows."""
    choose = random.Random(seed)
    running = {row: choose.randrange(0, 6 * MIN_SPLIT) for row in range(choose.randrange(1, 6))}
    planner = DecodeItems(MAX_EXTRA)
    for _ in range(400):
        rows, starts = np.array(list(running)), np.array(list(running.values()))
        items = planner.plan(starts, rows)
        assert sorted_items(items) == sorted_items(plan_decodes(starts, np.arange(len(rows)), rows, MAX_EXTRA))
        running = {row: start + 1 for row, start in running.items()}
        if choose.random() < 0.03:
            running[choose.randrange(6)] = choose.randrange(0, 6 * MIN_SPLIT)
        if choose.random() < 0.02 and len(running) > 1:
            running.pop(choose.choice(list(running)))


@pytest.mark.parametrize("num_sequences", [1, 3, 8])
def test_a_step_that_only_decodes_is_filled_as_any_other(num_sequences):
    rows, starts = list(range(num_sequences, 0, -1)), [17 * i for i in range(num_sequences)]
    lengths, chunks = [1] * num_sequences, list(range(num_sequences))
    batch = ScheduledBatch(0, rows=rows, starts=starts, lengths=lengths, sampled_chunks=chunks)
    graphs = SimpleNamespace(backend=SimpleNamespace(max_extra_items=MAX_EXTRA), _decode_items=DecodeItems(MAX_EXTRA))
    bucket = Bucket(8, 8, 0, 8 + MAX_EXTRA)
    filled = []
    for fill in (CudaGraphs._fill, CudaGraphs._fill_decodes):
        words = np.full(bucket.num_words, -7, np.int32)
        fill(graphs, bucket.split(words), batch)
        filled.append(words)
    assert np.array_equal(*filled)
