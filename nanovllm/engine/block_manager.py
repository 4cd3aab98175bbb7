"""BlockManager: who holds which block of the KV cache, and which blocks hold known content.

The KV cache is an array of blocks of `block_size` token slots. A sequence's *block table* lists the blocks that hold
its tokens, in order. The manager owns the pool (free list, reference counts) and the *prefix index*: full blocks are
found again by the chained hash of all tokens up to their end, so that a later sequence with the same beginning shares
them. A block is in exactly one of these states:

    held            ref_count >= 1      in that many block tables
    free, cached    ref_count == 0      on the free list, content still in the index: revived by a hit
    free, blank     ref_count == 0      on the free list, nothing known about its content

A hash only proposes. A hit counts when salt and token ids are equal *and* the block before it is the very content that
this one continued (`parent_id`), so the result is exact whatever the hash function does; a collision just costs a
fresh block. Sequences of different salts never share, for the same reason. Paging: Kwon et al. 2023, PagedAttention, section 4.

Knows no queues and no policy; does not write sequences. Read next: `scheduler.py`.
"""

from __future__ import annotations

import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import xxhash

from nanovllm.engine.sequence import Sequence

ROOT = 0  # content id before the first block
HashFunction = Callable[[int, bytes], int]


def hash_block(previous_hash: int, token_bytes: bytes) -> int:
    """64-bit hash of a block's packed token ids, chained to everything before it."""
    return xxhash.xxh3_64_intdigest(token_bytes, seed=previous_hash)


@dataclass(slots=True)
class Block:
    """One unit of KV storage. Only the block manager writes it."""

    block_id: int
    ref_count: int = 0
    token_ids: array | None = None  # not None: in the index; its tokens, for comparison on a hit
    cache_salt: str = ""  # whose content it is
    published_time: float = 0.0


class PrefixMatch(NamedTuple):
    """The longest cached beginning of a sequence."""

    block_ids: list[int]
    content_id: int  # of the last matched block

    @property
    def num_blocks(self) -> int:
        return len(self.block_ids)


@dataclass(slots=True)
class CacheStats:
    """Prefix cache counters since the start."""

    num_queried_tokens: int = 0
    num_hit_tokens: int = 0
    num_evictions: int = 0
    total_lifetime: float = 0.0  # seconds from publishing to eviction, summed over evictions

    @property
    def hit_rate(self) -> float:
        return self.num_hit_tokens / self.num_queried_tokens if self.num_queried_tokens else 0.0

    @property
    def mean_lifetime(self) -> float:
        """Mean seconds that an evicted block had been cached."""
        return self.total_lifetime / self.num_evictions if self.num_evictions else 0.0


class BlockManager:
    """The pool of KV blocks and the index of their contents. Every operation is O(blocks it touches)."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        enable_prefix_caching: bool = True,
        hash_function: HashFunction = hash_block,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.stats = CacheStats()
        self._blocks = [Block(block_id) for block_id in range(num_blocks)]
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # least recently used first
        self._index: dict[int, Block] = {}
        # By block id, in arrays: to copy the state costs bytes and no walk. A content id is unique; ROOT: not in the index.
        self._hashes, self._content_ids, self._parent_ids = (array("Q", bytes(8 * num_blocks)) for _ in range(3))
        self._num_contents = 0
        self._hash = hash_function
        self._clock = clock

    # --- the pool

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def is_shared(self, block_id: int) -> bool:
        """True when a write needs a private copy first: other tables, or the index, rely on the content."""
        block = self._blocks[block_id]
        return block.ref_count > 1 or block.token_ids is not None

    def num_free_among(self, block_ids: Iterable[int]) -> int:
        """How many of these are on the free list: taking them shrinks it."""
        return sum(self._blocks[block_id].ref_count == 0 for block_id in block_ids)

    def allocate(self, num_blocks: int) -> list[int]:
        """Take `num_blocks` blank blocks, evicting the least recently used cached content. The caller has checked."""
        if num_blocks > len(self._free):
            raise RuntimeError(f"{num_blocks} blocks wanted, {len(self._free)} free: the scheduler must check first")
        block_ids = []
        for _ in range(num_blocks):
            block = self._blocks[self._free.popitem(last=False)[0]]
            if block.token_ids is not None:
                self._evict(block)
            block.ref_count = 1
            block_ids.append(block.block_id)
        return block_ids

    def share(self, block_ids: Iterable[int]) -> None:
        """One more table holds these blocks; cached free ones come back to life."""
        for block_id in block_ids:
            block = self._blocks[block_id]
            if block.ref_count == 0:
                del self._free[block_id]
            block.ref_count += 1

    def free(self, block_ids: list[int]) -> None:
        """A table lets go. Tail blocks become evictable first, so that shared beginnings live longest."""
        for block_id in reversed(block_ids):
            block = self._blocks[block_id]
            block.ref_count -= 1
            if block.ref_count == 0:
                self._free[block_id] = None
                if block.token_ids is None:  # nothing to keep: reuse it before any cached content
                    self._free.move_to_end(block_id, last=False)

    # --- the prefix index

    def match_prefix(self, sequence: Sequence) -> PrefixMatch:
        """The cached blocks that `sequence` can start from. Always leaves it at least one token to compute."""
        block_ids: list[int] = []
        content_id = ROOT
        if self.enable_prefix_caching and not sequence.sampling.reads_whole_prompt:
            max_blocks = (sequence.num_tokens - 1) // self.block_size
            self.hash_blocks(sequence, max_blocks)
            for index in range(max_blocks):
                if (block := self._find(sequence, index, content_id)) is None:
                    break
                block_ids.append(block.block_id)
                content_id = self._content_ids[block.block_id]
        return PrefixMatch(block_ids, content_id)

    def count_query(self, num_tokens: int, num_hit_tokens: int) -> None:
        """Called once per admission, not per attempt, so that the hit rate means what it says."""
        self.stats.num_queried_tokens += num_tokens
        self.stats.num_hit_tokens += num_hit_tokens

    def publish(self, sequence: Sequence, block_index: int, content_id: int) -> int | None:
        """Make a full block findable. Returns the content id to continue from, None when the chain ends here.

        The same content may be in the index already, under another sequence's block: that one stays, ours is a
        duplicate that nobody finds. Another content under the same hash is a collision: the chain ends.
        """
        self.hash_blocks(sequence, block_index + 1)
        block_hash = sequence.block_hashes[block_index]
        if block_hash in self._index:
            if (existing := self._find(sequence, block_index, content_id)) is not None:
                return self._content_ids[existing.block_id]
            if not self._is_same(self._index[block_hash], sequence, block_index):
                return None
            self._erase(self._index[block_hash])  # it continued a content that was evicted since: nobody could find it
        block_id = sequence.block_table[block_index]
        block = self._index[block_hash] = self._blocks[block_id]
        block.token_ids, block.cache_salt = self._tokens_of(sequence, block_index), sequence.cache_salt
        block.published_time = self._clock()
        self._num_contents += 1
        self._content_ids[block_id] = self._num_contents
        self._hashes[block_id], self._parent_ids[block_id] = block_hash, content_id
        return self._num_contents

    def reset_prefix_cache(self) -> None:
        """Forget all cached content that no running sequence holds."""
        for block_id in self._free:
            if (block := self._blocks[block_id]).token_ids is not None:
                self._erase(block)

    def hash_blocks(self, sequence: Sequence, num_blocks: int) -> None:
        """Extend `sequence.block_hashes` to `num_blocks` entries; a cache of a pure function of its tokens."""
        hashes = sequence.block_hashes
        if len(hashes) < num_blocks:
            previous = hashes[-1] if hashes else self._hash(0, sequence.cache_salt.encode())
            for index in range(len(hashes), num_blocks):
                previous = self._hash(previous, self._tokens_of(sequence, index).tobytes())
                hashes.append(previous)

    def _tokens_of(self, sequence: Sequence, block_index: int) -> array:
        start = block_index * self.block_size
        return array("i", sequence.token_ids[start : start + self.block_size])

    def _find(self, sequence: Sequence, block_index: int, parent_id: int) -> Block | None:
        block = self._index.get(sequence.block_hashes[block_index])
        if block is None or self._parent_ids[block.block_id] != parent_id:
            return None
        return block if self._is_same(block, sequence, block_index) else None

    def _is_same(self, block: Block, sequence: Sequence, block_index: int) -> bool:
        """Equal salt and tokens; what came before is not looked at."""
        return block.cache_salt == sequence.cache_salt and block.token_ids == self._tokens_of(sequence, block_index)

    def _evict(self, block: Block) -> None:
        self.stats.num_evictions += 1
        self.stats.total_lifetime += self._clock() - block.published_time
        self._erase(block)

    def _erase(self, block: Block) -> None:
        del self._index[self._hashes[block.block_id]]
        block.token_ids, self._content_ids[block.block_id] = None, ROOT

    # --- for tests and the watchdog

    def check_invariants(self, tables: Iterable[list[int]]) -> None:
        """Raise AssertionError unless counts equal the tables that contain each block, and list and index agree."""
        counts = [0] * self.num_blocks
        for table in tables:
            for block_id in table:
                counts[block_id] += 1
        for block in self._blocks:
            _require(block.ref_count == counts[block.block_id], f"{block} is in {counts[block.block_id]} tables")
            _require((block.ref_count == 0) == (block.block_id in self._free), f"{block} and the free list disagree")
            is_cached, is_numbered = block.token_ids is not None, self._content_ids[block.block_id] != ROOT
            is_found = self._index.get(self._hashes[block.block_id]) is block
            _require(is_found == is_cached == is_numbered, f"{block}, its content id and the index disagree")
        _require(sum(block.token_ids is not None for block in self._blocks) == len(self._index), "index has stale entries")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)
