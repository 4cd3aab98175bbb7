from __future__ import annotations

import time

import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule
from support import greedy

from nanovllm.engine.batch import RowSampling
from nanovllm.engine.block_manager import ROOT, BlockManager
from nanovllm.engine.sequence import Sequence


def make_sequence(token_ids: list[int], salt: str = "", **params) -> Sequence:
    sampling = RowSampling(greedy(**params), 0, (), (), len(token_ids))
    return Sequence(
        0, "r", 0, len(token_ids), len(token_ids) + 8, sampling, frozenset(), cache_salt=salt, token_ids=list(token_ids)
    )


def fill(blocks: BlockManager, sequence: Sequence) -> None:
    """Allocate and publish all full blocks, as the scheduler would."""
    match = blocks.match_prefix(sequence)
    blocks.share(match.block_ids)
    sequence.block_table = match.block_ids + blocks.allocate(blocks.num_blocks_for(sequence.num_tokens) - match.num_blocks)
    content_id: int | None = match.content_id
    for index in range(match.num_blocks, sequence.num_tokens // blocks.block_size):
        if content_id is not None:
            content_id = blocks.publish(sequence, index, content_id)


def test_allocate_takes_each_block_once_and_free_gives_it_back():
    blocks = BlockManager(8, 4)
    table = blocks.allocate(8)
    assert sorted(table) == list(range(8))
    assert blocks.num_free_blocks == 0
    with pytest.raises(RuntimeError, match="1 blocks wanted, 0 free"):
        blocks.allocate(1)
    blocks.free(table)
    blocks.check_invariants([])
    assert blocks.num_free_blocks == 8


def test_a_second_sequence_shares_the_full_blocks_of_the_first():
    blocks = BlockManager(16, 4)
    first, second = make_sequence(list(range(10))), make_sequence([*range(8), 30, 31])
    fill(blocks, first)
    match = blocks.match_prefix(second)
    assert match.block_ids == first.block_table[:2]


def test_at_least_one_token_is_left_to_compute_when_the_whole_prompt_is_cached():
    blocks = BlockManager(16, 4)
    fill(blocks, make_sequence(list(range(8))))
    assert blocks.match_prefix(make_sequence(list(range(8)))).num_blocks == 1


def test_order_of_blocks_matters():
    blocks = BlockManager(16, 4)
    fill(blocks, make_sequence([1, 1, 1, 1, 2, 2, 2, 2]))
    assert blocks.match_prefix(make_sequence([2, 2, 2, 2, 1, 1, 1, 1, 0])).num_blocks == 0


def test_different_salts_never_share():
    blocks = BlockManager(16, 4)
    fill(blocks, make_sequence(list(range(9)), salt="a"))
    assert blocks.match_prefix(make_sequence(list(range(9)), salt="b")).num_blocks == 0
    fill(blocks, make_sequence(list(range(9)), salt="b"))
    assert blocks.match_prefix(make_sequence(list(range(9)), salt="b")).num_blocks == 2, "each salt has its own"
    assert blocks.match_prefix(make_sequence(list(range(9)), salt="a")).num_blocks == 2


def test_different_salts_do_not_share_even_when_their_hashes_collide():
    blocks = BlockManager(16, 4, hash_function=lambda previous, data: 1)
    fill(blocks, make_sequence(list(range(5)), salt="a"))
    assert blocks.match_prefix(make_sequence(list(range(5)), salt="b")).num_blocks == 0
    assert blocks.match_prefix(make_sequence(list(range(5)), salt="a")).num_blocks == 1


def test_prompt_logprobs_need_every_position_and_so_skip_the_cache():
    blocks = BlockManager(16, 4)
    fill(blocks, make_sequence(list(range(9))))
    assert blocks.match_prefix(make_sequence(list(range(9)), prompt_logprobs=1)).num_blocks == 0


def test_switched_off_nothing_is_found():
    blocks = BlockManager(16, 4, enable_prefix_caching=False)
    sequence = make_sequence(list(range(9)))
    sequence.block_table = blocks.allocate(3)
    assert blocks.match_prefix(make_sequence(list(range(9)))).num_blocks == 0


@pytest.mark.parametrize(
    "hash_function", [lambda previous, data: 1, lambda previous, data: sum(data) % 3], ids=["constant", "weak"]
)
def test_a_hash_collision_allocates_a_new_block(hash_function):
    blocks = BlockManager(16, 4, hash_function=hash_function)
    first, second = make_sequence([1, 2, 3, 4, 9]), make_sequence([4, 3, 2, 1, 9])  # equal sums
    fill(blocks, first)
    assert blocks.match_prefix(second).num_blocks == 0
    fill(blocks, second)
    assert blocks.match_prefix(make_sequence([1, 2, 3, 4, 0])).block_ids == first.block_table[:1]
    assert blocks.match_prefix(make_sequence([4, 3, 2, 1, 0])).num_blocks == 0, "the collision stays unpublished"
    blocks.check_invariants([first.block_table, second.block_table])


def test_equal_block_after_a_colliding_prefix_is_not_a_hit():
    """Both prefixes hash alike, the second blocks hold equal tokens: only the parent's identity tells them apart."""
    blocks = BlockManager(16, 4, hash_function=lambda previous, data: 10 * previous + 1 if len(data) == 16 else 0)
    first, second = make_sequence([1, 1, 1, 1, 5, 5, 5, 5, 0]), make_sequence([2, 2, 2, 2, 5, 5, 5, 5, 0])
    fill(blocks, first)
    blocks.free(first.block_table)
    index = blocks._blocks[first.block_table[0]]
    blocks._erase(index)  # the first block is evicted, its child stays in the index
    again = make_sequence([2, 2, 2, 2, 5, 5, 5, 5, 0])
    assert blocks.match_prefix(again).num_blocks == 0
    second.block_table = blocks.allocate(3)
    content = blocks.publish(second, 0, ROOT)
    assert blocks.match_prefix(again).block_ids == second.block_table[:1], "not the other prefix's second block"
    blocks.publish(second, 1, content)
    assert blocks.match_prefix(again).block_ids == second.block_table[:2], "what nobody could find made room"
    blocks.check_invariants([second.block_table])


def test_freed_cached_blocks_are_revived_with_their_content():
    blocks = BlockManager(4, 4)
    first = make_sequence(list(range(9)))
    fill(blocks, first)
    blocks.free(first.block_table)
    assert blocks.num_free_blocks == 4
    match = blocks.match_prefix(make_sequence(list(range(9))))
    assert match.block_ids == first.block_table[:2]
    assert blocks.num_free_among(match.block_ids) == 2
    blocks.share(match.block_ids)
    assert blocks.num_free_blocks == 2
    blocks.check_invariants([match.block_ids])


def test_eviction_is_least_recently_used_first_tail_before_head_and_erases_the_index():
    blocks = BlockManager(4, 4)
    old, new = make_sequence([1] * 9), make_sequence([2] * 5)
    fill(blocks, old)
    blocks.free(old.block_table)
    fill(blocks, new)
    blocks.free(new.block_table)
    taken = blocks.allocate(1)  # the blank one: new's second
    assert blocks.stats.num_evictions == 0
    taken += blocks.allocate(1)
    assert taken[-1] == old.block_table[1], "the tail of the oldest goes first"
    assert blocks.match_prefix(make_sequence([1] * 9)).num_blocks == 1
    assert blocks.stats.num_evictions == 1
    blocks.check_invariants([taken])


def test_lifetime_is_measured_from_publishing_to_eviction():
    now = [3.0]
    blocks = BlockManager(1, 2, clock=lambda: now[0])
    sequence = make_sequence([1, 2])
    fill(blocks, sequence)
    blocks.free(sequence.block_table)
    now[0] = 8.0
    blocks.allocate(1)
    assert blocks.stats.mean_lifetime == 5.0


def test_duplicates_are_not_merged_and_their_chain_continues():
    blocks = BlockManager(16, 4)
    first, second = make_sequence(list(range(4))), make_sequence(list(range(8)))
    first.block_table, second.block_table = blocks.allocate(1), blocks.allocate(2)  # computed side by side
    content = blocks.publish(first, 0, ROOT)
    assert blocks.publish(second, 0, ROOT) == content, "the duplicate continues the published content"
    blocks.publish(second, 1, content)
    match = blocks.match_prefix(make_sequence([*range(8), 0]))
    assert match.block_ids == [first.block_table[0], second.block_table[1]]
    blocks.check_invariants([first.block_table, second.block_table])


def test_a_prefix_stays_cacheable_after_a_duplicate_chain_lost_its_head():
    """Two sequences compute one prompt side by side; the first one's head is evicted, the second one's tail survives."""
    blocks = BlockManager(16, 4)
    first, second = make_sequence(list(range(4))), make_sequence(list(range(9)))
    first.block_table, second.block_table = blocks.allocate(1), blocks.allocate(3)
    content = blocks.publish(first, 0, ROOT)
    blocks.publish(second, 1, blocks.publish(second, 0, ROOT))
    blocks._erase(blocks._blocks[first.block_table[0]])
    assert content and blocks.match_prefix(make_sequence(list(range(9)))).num_blocks == 0
    third = make_sequence(list(range(9)))
    fill(blocks, third)
    assert blocks.match_prefix(make_sequence(list(range(9)))).block_ids == third.block_table[:2]
    blocks.check_invariants([first.block_table, second.block_table, third.block_table])


def test_published_and_shared_blocks_need_a_copy_before_a_write():
    blocks = BlockManager(4, 4)
    sequence = make_sequence(list(range(6)))
    fill(blocks, sequence)
    published, private = sequence.block_table
    assert blocks.is_shared(published) and not blocks.is_shared(private)
    blocks.share([private])
    assert blocks.is_shared(private)


def test_reset_forgets_cached_content_but_keeps_what_is_held():
    blocks = BlockManager(8, 4)
    freed, held = make_sequence([1] * 5), make_sequence([2] * 5)
    fill(blocks, freed)
    fill(blocks, held)
    blocks.free(freed.block_table)
    blocks.reset_prefix_cache()
    assert blocks.match_prefix(make_sequence([1] * 5)).num_blocks == 0
    assert blocks.match_prefix(make_sequence([2] * 5)).num_blocks == 1
    blocks.check_invariants([held.block_table])


def test_invariants_catch_a_leak():
    blocks = BlockManager(4, 4)
    blocks.allocate(1)
    with pytest.raises(AssertionError, match="is in 0 tables"):
        blocks.check_invariants([])


def test_removal_from_the_middle_of_a_large_pool_is_constant_time():
    def seconds_per_revival(num_blocks: int) -> float:
        blocks = BlockManager(num_blocks, 1)
        ids = blocks.allocate(num_blocks)
        blocks.free(ids)
        middle = ids[num_blocks // 2 : num_blocks // 2 + 200]
        start = time.perf_counter()
        for block_id in middle:
            blocks.share([block_id])
        return time.perf_counter() - start

    small, large = min(seconds_per_revival(2_000) for _ in range(5)), min(seconds_per_revival(200_000) for _ in range(3))
    assert large < 20 * small, "a hundred times more blocks must not cost a hundred times more"


class BlockManagerMachine(RuleBasedStateMachine):
    """Random allocation, sharing, freeing and copying under a hash with four values, books checked throughout."""

    sequences = Bundle("sequences")

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(12, 2, hash_function=lambda previous, data: (previous * 31 + sum(data)) % 4)
        self.contents: dict[int, list[int]] = {}  # id(sequence) -> tokens, to compare matched content with
        self.alive: list[Sequence] = []
        self.block_tokens: dict[int, list[int]] = {}  # what each block really holds

    @rule(target=sequences, tokens=st.lists(st.integers(0, 2), min_size=1, max_size=9))
    def start(self, tokens):
        sequence = make_sequence(tokens)
        match = self.blocks.match_prefix(sequence)
        for index, block_id in enumerate(match.block_ids):
            assert self.block_tokens[block_id] == tokens[: 2 * (index + 1)], "a hit on another content"
        missing = self.blocks.num_blocks_for(len(tokens)) - match.num_blocks
        if self.blocks.num_free_blocks - self.blocks.num_free_among(match.block_ids) < missing:
            return sequence
        self.blocks.share(match.block_ids)
        sequence.block_table = match.block_ids + self.blocks.allocate(missing)
        content_id: int | None = match.content_id
        for index in range(match.num_blocks, len(sequence.block_table)):
            self.block_tokens[sequence.block_table[index]] = tokens[: 2 * (index + 1)]
            if 2 * (index + 1) <= len(tokens) and content_id is not None:
                content_id = self.blocks.publish(sequence, index, content_id)
        self.alive.append(sequence)
        return sequence

    @rule(sequence=sequences)
    def stop(self, sequence):
        if sequence in self.alive:
            self.alive.remove(sequence)
            self.blocks.free(sequence.block_table)

    @rule()
    def reset(self):
        self.blocks.reset_prefix_cache()

    @invariant()
    def books_agree(self):
        self.blocks.check_invariants([sequence.block_table for sequence in self.alive])


BlockManagerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestRandomOperations = BlockManagerMachine.TestCase


@given(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=40))
@settings(max_examples=50, deadline=None)
def test_hashes_chain_over_everything_before(tokens):
    blocks = BlockManager(4, 2)
    whole, changed = make_sequence(tokens), make_sequence([tokens[0] ^ 1, *tokens[1:]])
    num_blocks = len(tokens) // 2
    blocks.hash_blocks(whole, num_blocks)
    blocks.hash_blocks(changed, num_blocks)
    assert not set(whole.block_hashes) & set(changed.block_hashes)
