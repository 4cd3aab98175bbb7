"""What a replayed step is told: the quick way for steps that only decode gives what the general way gives."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

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
    planner, num_advanced, is_next = DecodeItems(MAX_EXTRA), 0, False
    for _ in range(400):
        rows, starts = np.array(list(running)), np.array(list(running.values()))
        items = planner.advance() if is_next else None
        num_advanced += items is not None
        items = planner.plan(starts, rows) if items is None else items
        assert sorted_items(items) == sorted_items(plan_decodes(starts, np.arange(len(rows)), rows, MAX_EXTRA))
        running, is_next = {row: start + 1 for row, start in running.items()}, True
        if choose.random() < 0.03:
            running[choose.randrange(6)], is_next = choose.randrange(0, 6 * MIN_SPLIT), False
        if choose.random() < 0.02 and len(running) > 1:
            running.pop(choose.choice(list(running)))
            is_next = False
    assert num_advanced > 200


class Staging:
    def __init__(self, num_words: int) -> None:
        self.words = np.full(num_words, -7, np.int32)

    def place(self, num_words: int) -> np.ndarray:
        return self.words[:num_words]


def make_graphs() -> CudaGraphs:
    graphs: Any = object.__new__(CudaGraphs)
    graphs.backend = SimpleNamespace(max_extra_items=MAX_EXTRA)
    graphs.decode_buckets, graphs.mixed_buckets = [Bucket(n, n, 0, n + MAX_EXTRA) for n in (2, 4, 8)], []
    graphs._graphs = dict.fromkeys(graphs.decode_buckets)
    graphs._padding, graphs._filled, graphs.spare_row = {}, {}, 99
    graphs._decoded, graphs._decode_items = (None, [], np.empty(0)), DecodeItems(MAX_EXTRA)
    graphs._staging, graphs._drawn, graphs._place = Staging(1000), [None] * 3, 0
    return graphs


def a_step(running: dict[int, int], matchers: list[int]) -> ScheduledBatch:
    rows, chunks = list(running), list(range(len(running)))
    masks = dict.fromkeys(chunk for chunk in chunks if rows[chunk] in matchers)
    starts = list(running.values())
    return ScheduledBatch(0, rows=rows, starts=starts, lengths=[1] * len(rows), sampled_chunks=chunks, matchers=masks)


def fill(graphs: CudaGraphs, batch: ScheduledBatch) -> tuple[Bucket, dict[str, np.ndarray]]:
    positions, number = np.array(batch.starts) + 1, len(batch.rows)
    temperature = np.array(batch.rows, dtype=np.float32)
    bucket = graphs.fill(batch, positions, temperature, np.arange(number, dtype=np.int32) * 7, bool(batch.matchers))
    assert bucket is not None
    return bucket, bucket.split(graphs._staging.place(bucket.num_words))


@pytest.mark.parametrize("seed", range(8))
def test_steps_that_follow_each_other_are_filled_as_if_each_were_the_first(seed):
    """Sequences decode on, come and go, under grammars and not, and buckets change."""
    choose = random.Random(seed)
    running = {row: choose.randrange(0, 6 * MIN_SPLIT) for row in range(3)}
    graphs = make_graphs()
    for _ in range(300):
        batch = a_step(running, matchers=[row for row in running if choose.random() < 0.5] if choose.random() < 0.3 else [])
        bucket, parts = fill(graphs, batch)
        again, expected = fill(make_graphs(), batch)
        assert (bucket.num_tokens, parts.pop("place")[0]) == (again.num_tokens, graphs._place)
        expected.pop("place")
        number = len(batch.rows)
        items, expected_items = parts.pop("decode_items"), expected.pop("decode_items")
        assert sorted_items(items) == sorted_items(expected_items)
        assert all(np.array_equal(parts[name], expected[name]) for name in expected)
        assert parts["mask_lines"].tolist()[:number] == [
            [*batch.matchers].index(i) if i in batch.matchers else -1 for i in range(number)
        ]
        running = {row: start + 1 for row, start in running.items()}
        if choose.random() < 0.05:
            running[choose.randrange(8)] = choose.randrange(0, 6 * MIN_SPLIT)
        if choose.random() < 0.05 and len(running) > 1:
            running.pop(choose.choice(list(running)))
        if choose.random() < 0.05:  # one is computed anew after a preemption, in the row that it had
            running[choose.choice(list(running))] = 5


@pytest.mark.parametrize("num_sequences", [1, 3, 8])
def test_a_step_that_only_decodes_is_filled_as_any_other(num_sequences):
    rows, starts = list(range(num_sequences, 0, -1)), [17 * i for i in range(num_sequences)]
    batch = a_step(dict(zip(rows, starts, strict=True)), [])
    graphs, bucket = make_graphs(), Bucket(8, 8, 0, 8 + MAX_EXTRA)
    filled = []
    for write in (graphs._fill, lambda parts, batch: graphs._fill_decodes(parts, batch.rows, np.array(batch.starts) + 1)):
        words = np.full(bucket.num_words, -7, np.int32)
        write(bucket.split(words), batch)
        filled.append(words)
    assert np.array_equal(*filled)
