"""What a replayed step is told: the quick way for steps that only decode gives what the general way gives."""

from __future__ import annotations

import random
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nanovllm.attention.triton_paged import MIN_SPLIT
from nanovllm.engine.batch import ScheduledBatch, Seat
from nanovllm.runner.cuda_graphs import Bucket, CudaGraphs, Decoding
from nanovllm.sampling.gumbel import KeysOfSteps

MAX_EXTRA = 12


def sorted_items(items: np.ndarray) -> list[tuple[int, ...]]:
    return sorted(map(tuple, items.tolist()))


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
    graphs._padding, graphs.spare_row, graphs._decoding = {}, 99, None
    graphs._staging, graphs._drawn, graphs._place = Staging(1000), [None] * 3, 0
    return graphs


def a_step(running: dict[int, int], matchers: Iterable[int] = (), seats: Iterable[Seat] = ()) -> ScheduledBatch:
    rows, chunks = list(running), list(range(len(running)))
    masks = dict.fromkeys(chunk for chunk in chunks if rows[chunk] in matchers)
    step = ScheduledBatch(0, rows, list(running.values()), [1] * len(rows), chunks, list(seats))
    step.matchers.update(masks)
    return step


def fill(graphs: CudaGraphs, batch: ScheduledBatch) -> tuple[Bucket, dict[str, np.ndarray]]:
    """As a model runner does it. Seeds and temperatures are those of the rows."""
    if (bucket := graphs.advance(batch)) is None:
        positions, rows = np.array(batch.starts) + 1, np.array(batch.rows)
        keys = KeysOfSteps(rows.astype(np.uint64), positions)
        bucket = graphs.fill(batch, positions, rows.astype(np.float32), keys, bool(batch.matchers))
    assert bucket is not None
    return bucket, bucket.split(graphs._staging.place(bucket.num_words))


@pytest.mark.parametrize("seed", range(8))
def test_steps_that_follow_each_other_are_filled_as_if_each_were_the_first(seed, monkeypatch):
    """Sequences decode on over the borders of splits, come and go, under grammars and not, and buckets change."""
    choose, advanced = random.Random(seed), []
    advance = Decoding.advance
    monkeypatch.setattr(Decoding, "advance", lambda self: (advanced.append(1), advance(self)))
    running = {row: choose.randrange(0, 6 * MIN_SPLIT) for row in range(3)}
    graphs, matchers, seats = make_graphs(), {1, 2, 6}, []
    for _ in range(300):
        batch = a_step(running, matchers, seats)
        bucket, parts = fill(graphs, batch)
        again, expected = fill(make_graphs(), batch)
        assert (bucket.num_tokens, parts.pop("place")[0]) == (again.num_tokens, graphs._place)
        del expected["place"]
        assert sorted_items(parts.pop("decode_items")) == sorted_items(expected.pop("decode_items"))
        assert all(np.array_equal(parts[name], expected[name]) for name in expected)
        running, seats = {row: start + 1 for row, start in running.items()}, []
        if choose.random() < 0.05:  # arrives, where nobody was or where another has left
            row = choose.randrange(8)
            running[row] = choose.choice([running.get(row, 0), choose.randrange(0, 6 * MIN_SPLIT)])
            seats = [Seat(row, [], None)]
            matchers ^= {row} if choose.random() < 0.5 else set()
        if choose.random() < 0.05 and len(running) > 1:
            running.pop(choose.choice(list(running)))
        if choose.random() < 0.05:  # one waits for a step
            batch = a_step(dict(list(running.items())[1:]), matchers)
            running.update((row, running[row] + 1) for row in batch.rows)
            if batch.rows:
                fill(graphs, batch)
    assert len(advanced) > 100


@pytest.mark.parametrize("number", [0, 1, 2])
def test_masks_are_numbered_by_the_samples_that_have_one(number):
    _, parts = fill(make_graphs(), a_step({5: 1, 4: 7, 3: 9}, [4, 3][:number]))
    assert parts["mask_lines"].tolist() == [[-1, -1, -1, -1], [-1, 0, -1, -1], [-1, 0, 1, -1]][number]


@pytest.mark.parametrize("num_sequences", [1, 3, 8])
def test_a_step_that_only_decodes_is_filled_as_any_other(num_sequences):
    batch = a_step({num_sequences - i: 17 * i for i in range(num_sequences)})
    graphs, bucket = make_graphs(), Bucket(8, 8, 0, 8 + MAX_EXTRA)
    filled = []
    for write in (graphs._fill, lambda parts, batch: graphs._fill_decodes(parts, batch.rows, np.array(batch.starts) + 1)):
        words = np.full(bucket.num_words, -7, np.int32)
        write(bucket.split(words), batch)
        filled.append(words)
    assert np.array_equal(*filled)
