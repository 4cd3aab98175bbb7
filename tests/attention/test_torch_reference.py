"""TorchAttention against a loop over tokens in float64, and the promises about its memory."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nanovllm.attention.base import AttentionInputs, AttentionSpec
from nanovllm.attention.torch_reference import TorchAttention

CPU = torch.device("cpu")


class Batch:
    """A ragged step over a cache whose blocks are dealt out at random and whose unused slots hold garbage."""

    def __init__(
        self,
        starts: list[int],
        lengths: list[int],
        *,
        block_size: int = 4,
        num_kv_heads: int = 2,
        group_size: int = 2,
        head_dim: int = 8,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        self.starts, self.lengths = starts, lengths
        self.spec = AttentionSpec(num_kv_heads * group_size, num_kv_heads, head_dim, block_size)
        self.backend = TorchAttention(self.spec, dtype, CPU)
        self.generator = torch.Generator().manual_seed(seed)
        contexts = [start + length for start, length in zip(starts, lengths, strict=True)]
        counts = [-(-context // block_size) for context in contexts]
        num_blocks = sum(counts) + 5
        order = torch.randperm(num_blocks, generator=self.generator).tolist()
        self.tables = torch.zeros(len(starts), max(counts), dtype=torch.int32)
        for chunk, count in enumerate(counts):
            self.tables[chunk, :count] = torch.tensor([order.pop() for _ in range(count)])
        self.contexts = [self.random(context, num_kv_heads, head_dim, dtype=dtype) for context in contexts]  # keys
        self.values = [self.random(context, num_kv_heads, head_dim, dtype=dtype) for context in contexts]
        self.query = self.random(sum(lengths), self.spec.num_heads, head_dim, dtype=dtype)
        self.cache = self.random(*self.backend.kv_cache_shape(num_blocks), dtype=torch.float32).mul_(1e30).to(dtype)

    def random(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(dtype)

    def slots(self, chunk: int, start: int, end: int) -> Tensor:
        positions = torch.arange(start, end)
        return self.tables[chunk][positions // self.spec.block_size].long() * self.spec.block_size + (
            positions % self.spec.block_size
        )

    def store(self) -> None:
        """The earlier tokens first, each sequence alone; then this step's, all together."""
        for chunk, start in enumerate(self.starts):
            old = self.contexts[chunk][:start], self.values[chunk][:start]
            write(self.cache, *old, self.slots(chunk, 0, start))
        pairs = list(enumerate(zip(self.starts, self.lengths, strict=True)))
        keys = torch.cat([self.contexts[chunk][start:] for chunk, (start, _) in pairs])
        values = torch.cat([self.values[chunk][start:] for chunk, (start, _) in pairs])
        slots = torch.cat([self.slots(chunk, start, start + length) for chunk, (start, length) in pairs])
        write(self.cache, keys, values, slots)

    def inputs(self) -> AttentionInputs:
        return AttentionInputs(self.starts, self.lengths, list(range(len(self.starts))), self.tables)

    def attend(self) -> Tensor:
        return self.backend.attend(self.query, self.cache, self.backend.plan(self.inputs()))

    def naive(self) -> Tensor:
        """[num_tokens, num_heads * head_dim] float64: one token and one head at a time."""
        rows, token = [], 0
        for chunk, (start, length) in enumerate(zip(self.starts, self.lengths, strict=True)):
            keys, values = self.contexts[chunk].double(), self.values[chunk].double()
            for position in range(start, start + length):
                heads = []
                for head in range(self.spec.num_heads):
                    kv_head = head // self.spec.group_size
                    scores = keys[: position + 1, kv_head] @ self.query[token, head].double() / math.sqrt(self.spec.head_dim)
                    heads.append(scores.softmax(0) @ values[: position + 1, kv_head])
                rows.append(torch.cat(heads))
                token += 1
        return torch.stack(rows)


def write(kv_cache: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """keys, values: [n, num_kv_heads, head_dim] into the slots, by the layout that the backend documents."""
    flat = kv_cache.flatten(2, 3)
    flat[0].index_copy_(1, slots, keys.transpose(0, 1))
    flat[1].index_copy_(1, slots, values.transpose(0, 1))


CHUNKS = st.lists(st.tuples(st.integers(0, 40), st.sampled_from([1, 1, 1, 2, 5, 17])), min_size=1, max_size=7)


class TestAgainstTheLoop:
    @settings(max_examples=80, deadline=None)
    @given(
        chunks=CHUNKS,
        block_size=st.sampled_from([1, 3, 4, 16]),
        num_kv_heads=st.integers(1, 3),
        group_size=st.sampled_from([1, 2, 3, 7]),
        head_dim=st.sampled_from([2, 8, 20]),
        seed=st.integers(0, 5),
    )
    def test_any_ragged_batch_over_any_blocks_in_float32(self, chunks, **shape):
        starts, lengths = (list(column) for column in zip(*chunks, strict=True))
        batch = Batch(starts, lengths, **shape)
        batch.store()
        torch.testing.assert_close(batch.attend().double(), batch.naive(), rtol=0, atol=1e-5)

    @settings(max_examples=20, deadline=None)
    @given(chunks=CHUNKS, block_size=st.sampled_from([1, 4, 16]), group_size=st.sampled_from([1, 3]))
    def test_any_ragged_batch_in_bfloat16(self, chunks, **shape):
        starts, lengths = (list(column) for column in zip(*chunks, strict=True))
        batch = Batch(starts, lengths, dtype=torch.bfloat16, **shape)
        batch.store()
        torch.testing.assert_close(batch.attend().double(), batch.naive(), rtol=0, atol=0.04)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_prompts_longer_than_one_tile(self, dtype):
        """Tiles of queries end inside the chunk, at its end, and one token after it."""
        batch = Batch([0, 131, 5, 700], [300, 128, 129, 1], block_size=16, dtype=dtype)
        batch.store()
        torch.testing.assert_close(batch.attend().double(), batch.naive(), rtol=0, atol=1e-5 if dtype == torch.float32 else 0.04)

    def test_decoding_rows_of_very_different_lengths(self):
        batch = Batch([2000, 0, 3, 150, 600, 1, 149], [1] * 7, block_size=16)
        batch.store()
        torch.testing.assert_close(batch.attend().double(), batch.naive(), rtol=0, atol=1e-5)

    def test_large_scores_do_not_overflow(self):
        batch = Batch([30, 0], [1, 20])
        batch.query *= 1e4
        batch.store()
        torch.testing.assert_close(batch.attend().double(), batch.naive(), rtol=0, atol=1e-4)


class Meter(TorchDispatchMode):
    """Sizes of the tensors that operations make; views and results in place cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.total = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {place_of(tensor) for tensor in args if isinstance(tensor, Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and place_of(tensor) not in known:
                self.largest = max(self.largest, tensor.numel())
                self.total += tensor.numel()
        return result


def place_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def metered(batch: Batch) -> Meter:
    """Of planning and attending; the cache may hold anything."""
    with torch.inference_mode(), Meter() as meter:
        assert batch.attend().isfinite().all()
    return meter


def in_plain_slots(batch: Batch) -> Batch:
    batch.cache.zero_()
    return batch


class TestMemory:
    def test_of_a_long_prompt_grows_with_its_length_not_with_its_square(self):
        sizes = {"num_kv_heads": 1, "group_size": 4, "head_dim": 4, "block_size": 16}
        largest = {n: metered(in_plain_slots(Batch([0], [n], **sizes))).largest for n in (2048, 4096, 8192)}
        assert largest[8192] < 8192 * 8192 / 16, "no score matrix of context x context, not even of one head"
        assert largest[8192] <= 2.1 * largest[4096]
        resumed = metered(in_plain_slots(Batch([8000], [192], **sizes))).largest
        assert resumed <= largest[8192] * 1.01

    def test_of_one_long_context_among_short_ones_is_not_padded_to_the_longest(self):
        lone = metered(in_plain_slots(Batch([3999], [1], block_size=16))).total
        mixed = metered(in_plain_slots(Batch([3999, *range(20, 51)], [1] * 32, block_size=16))).total
        short = metered(in_plain_slots(Batch([*range(20, 51)], [1] * 31, block_size=16))).total
        assert mixed < 1.2 * (lone + short), "the parts cost what they cost alone"
        assert mixed < 5 * lone, "padded, it would be 32 times the lone one"

    def test_of_many_long_contexts_is_bounded_by_groups(self):
        sizes = {"num_kv_heads": 1, "group_size": 1, "head_dim": 4, "block_size": 16}
        few = metered(in_plain_slots(Batch([4000] * 8, [1] * 8, **sizes))).largest
        many = metered(in_plain_slots(Batch([4000] * 32, [1] * 32, **sizes))).largest
        assert many < 2 * few

    @settings(max_examples=100, deadline=None)
    @given(contexts=st.lists(st.integers(1, 3000), min_size=1, max_size=40))
    def test_padding_never_more_than_doubles_a_batch_of_decoding_rows(self, contexts):
        """The plan gathers each row once, with at most as much padding as tokens, and a constant for short rows."""
        batch = in_plain_slots(Batch([context - 1 for context in contexts], [1] * len(contexts), num_kv_heads=1, head_dim=2))
        plan = batch.backend.plan(batch.inputs())
        rows = [group.tokens.tolist() if group.tokens is not None else range(len(contexts)) for group in plan.groups]
        assert sorted(row for group in rows for row in group) == list(range(len(contexts)))
        gathered = sum(len(group.block_ids) for group in plan.groups) * batch.spec.block_size
        assert gathered <= sum(2 * context + 128 + batch.spec.block_size for context in contexts)


def test_copied_blocks_hold_the_same_keys_and_values_in_every_head_and_the_rest_stays():
    batch = Batch([9, 0], [4, 6], num_kv_heads=3)
    batch.store()
    before = batch.cache.clone()
    blocks = batch.tables[0].tolist()
    free = [block for block in range(batch.cache.shape[2]) if block not in batch.tables.flatten().tolist()]
    assert len(free) >= 2
    batch.backend.copy_blocks(batch.cache, torch.tensor(blocks[:2]), torch.tensor(free[:2]))
    expected = batch.naive()
    batch.tables[0, :2] = torch.tensor(free[:2], dtype=torch.int32)
    torch.testing.assert_close(batch.attend().double(), expected, rtol=0, atol=1e-5)
    untouched = [block for block in range(batch.cache.shape[2]) if block not in free[:2]]
    assert torch.equal(batch.cache[:, :, untouched], before[:, :, untouched])
