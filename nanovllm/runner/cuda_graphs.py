"""CUDA graphs of whole steps: prompt chunks, decoding, output head and sampler, replayed as one launch.

A graph has fixed shapes, so it is captured per *bucket*: a number of tokens T and of samples S. All that changes from
step to step is in one int32 buffer of the bucket, filled on the host and copied before the replay: where each token
is, which tokens draw, and the attention's work items. Unused places are padding: tokens without a row are not stored,
work items without queries end at once, samples without a row draw into a spare row. Everything else (tokens, block
tables) is read from the row state on the device. A step in which the sequences of the last one decode on is filled by
one addition (`Decoding`). Drawn tokens are written to, and masks of grammars read from, the host's pinned memory.

`fill` returns None where no bucket fits, and the caller runs the step eagerly. Owns the buckets and the capture;
what a step computes is `ModelRunner.forward_step`.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanovllm.attention.triton_paged import (
    ITEM_FIELDS,
    TritonAttention,
    TritonPlan,
    num_steps_planned,
    plan_decodes,
    plan_prompts,
)
from nanovllm.engine.batch import ScheduledBatch
from nanovllm.engine.progress import no_collections
from nanovllm.kernels.draw_token import draw_tokens
from nanovllm.log import degraded, logger
from nanovllm.runner.state import RowState
from nanovllm.sampling.gumbel import KeysOfSteps
from nanovllm.sampling.sampler import SampledTokens
from nanovllm.structured.base import Matchers, begin_masks, num_mask_words


@dataclass(slots=True)
class StepTensors:
    """One step on the device; views of one buffer. All int32 but inverse_temperature, whose bits are float32."""

    token_rows: Tensor  # [T], -1 for padding
    positions: Tensor  # [T]
    sample_tokens: Tensor  # [S], places among the tokens
    sample_rows: Tensor  # [S]
    sample_positions: Tensor  # [S], that the drawn tokens take
    inverse_temperature: Tensor  # [S] float32, 0 for greedy
    keys: Tensor  # [S]
    mask_lines: Tensor  # [S], -1 without a mask
    held: Tensor  # first word: 1 where the tokens are drawn afterwards, not by the graph
    place: Tensor  # first word: the line of the drawn tokens
    plan: TritonPlan
    needed_plan: TritonPlan | None  # of the tokens that draw, for the last layer; None where all do


@dataclass(frozen=True)
class Bucket:
    """Sizes of a graph. A bucket for decoding has no prompt items and as many samples as tokens."""

    num_tokens: int
    num_samples: int
    num_prompt_items: int
    num_decode_items: int

    @property
    def is_decode(self) -> bool:
        return self.num_prompt_items == 0

    @cached_property
    def sections(self) -> list[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the buffer's parts, in order."""
        tokens, samples = self.num_tokens, self.num_samples
        return [
            ("held", (4,)),  # one word, and room: kernels are compiled by the alignment of addresses
            ("place", (4,)),
            ("token_rows", (tokens,)),
            ("positions", (tokens,)),
            ("sample_tokens", (samples,)),
            ("sample_rows", (samples,)),
            ("sample_positions", (samples,)),
            ("inverse_temperature", (samples,)),
            ("keys", (samples,)),
            ("mask_lines", (samples,)),
            ("decode_items", (self.num_decode_items, ITEM_FIELDS)),
            ("prompt_items", (self.num_prompt_items, ITEM_FIELDS)),
            ("needed_items", (0 if self.is_decode else self.num_decode_items, ITEM_FIELDS)),
        ]

    @cached_property
    def num_words(self) -> int:
        return sum(math.prod(shape) for _, shape in self.sections)

    def split(self, buffer: Any) -> dict[str, Any]:
        """The parts of a flat array or tensor of `num_words`, by name; views."""
        parts, offset = {}, 0
        for name, shape in self.sections:
            size = math.prod(shape)
            parts[name] = buffer[offset : offset + size].reshape(shape)
            offset += size
        return parts


@dataclass(slots=True)
class Decoding:
    """Sequences that decode on: while their attention is split alike, the inputs change by the same from step to step."""

    bucket: Bucket
    words: np.ndarray  # [num_words] int32, the inputs of the last step
    parts: dict[str, np.ndarray]  # of them
    keys: KeysOfSteps
    rows: list[int]
    next_starts: list[int]
    num_steps_left: int
    change: np.ndarray | None = None  # [num_words] int32

    def leads_to(self, batch: ScheduledBatch) -> bool:
        """Whether `batch`, which seats nobody, is the next step of the same sequences."""
        num_tokens = len(self.rows)
        return (
            self.num_steps_left > 0
            and batch.starts == self.next_starts
            and batch.rows == self.rows
            and len(batch.sampled_chunks) == num_tokens == sum(batch.lengths)
        )

    def advance(self) -> None:
        if self.change is None:
            self.change = self._change()
        self.words += self.change
        self.parts["keys"][: len(self.rows)] = self.keys.next()
        self.next_starts = [start + 1 for start in self.next_starts]
        self.num_steps_left -= 1

    def _change(self) -> np.ndarray:
        """Positions grow by one, and so does the end of an attention item that is its sequence's last."""
        change, num_tokens = np.zeros_like(self.words), len(self.rows)
        parts, items = self.bucket.split(change), self.parts["decode_items"]
        parts["positions"][:num_tokens] = parts["sample_positions"][:num_tokens] = 1
        is_used = items[:, 1] > 0
        parts["decode_items"][:, 3] = is_used
        parts["decode_items"][:, 5] = is_used & (items[:, 5] == self.parts["sample_positions"][items[:, 0]])
        return change


class Staging:
    """Pinned host memory that steps are written to, a few places in turn: a copy may be under way while the next is filled."""

    def __init__(self, num_words: int, num_places: int = 3) -> None:
        self._buffers = [torch.empty(num_words, dtype=torch.int32, pin_memory=True) for _ in range(num_places)]
        self._arrays = [buffer.numpy() for buffer in self._buffers]
        self._copied = [torch.cuda.Event() for _ in range(num_places)]
        self._next = 0

    def place(self, num_words: int) -> np.ndarray:
        """Where to write what is sent next: [num_words] int32."""
        self._copied[self._next].synchronize()
        return self._arrays[self._next][:num_words]

    def send(self, target: Tensor) -> None:
        """Start the copy of what was written to `place`."""
        place, self._next = self._next, (self._next + 1) % len(self._buffers)
        target.copy_(self._buffers[place][: len(target)], non_blocking=True)
        self._copied[place].record()


def decode_sizes(max_num_seqs: int) -> list[int]:
    """1, 2, 4, then every 8 up to 64, every 16 up to 256, every 64 beyond; the last is always `max_num_seqs`."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_num_seqs + 1, 64)]
    return sorted({size for size in sizes if size < max_num_seqs} | {max_num_seqs})


def mixed_sizes(max_tokens: int) -> list[int]:
    """Powers of two and their three-quarter points from 64 on; the last is always `max_tokens`."""
    sizes = [size for power in range(6, 20) for size in (1 << power, 3 << (power - 1))]
    return sorted({size for size in sizes if size < max_tokens} | {max_tokens})


class HostMasks:
    """What grammars allow in one step: in pinned memory, from where the device reads it when it draws.

    One place is enough, and nobody waits for it: masks follow from tokens that were read, so the draw before is over.
    """

    def __init__(self, max_num_samples: int, vocab_size: int, is_pinned: bool) -> None:
        self.words = torch.empty(max_num_samples, num_mask_words(vocab_size), dtype=torch.int32, pin_memory=is_pinned)
        self._array = self.words.numpy()
        self.finish: Callable[[], None]  # waits until the masks are there

    def begin(self, matchers: Matchers) -> None:
        """Begin to write the masks, line by line, while the host goes on."""
        self.finish = begin_masks(list(matchers.values()), self._array[: len(matchers)])


@dataclass(frozen=True, slots=True)
class Replayed:
    """A replayed step, in static buffers: until the next one is replayed."""

    logits: Tensor  # [num_samples, vocab]
    drawn: Tensor  # [max_in_flight, max_num_seqs] int64, on the host: the device writes there
    step: StepTensors
    token_table: Tensor
    masks: HostMasks
    draw: torch.cuda.CUDAGraph | None = None  # of `draw_allowed`
    place: int = 0  # line of `drawn`, until so many steps later

    @property
    def token_ids(self) -> Tensor:
        """[num_samples] int64, there when the device has come to the draw's end."""
        return self.drawn[self.place, : len(self.logits)]

    @torch.inference_mode()
    def draw_under_masks(self) -> SampledTokens:
        """What the graph has left: under the masks that were begun."""
        self.masks.finish()
        if self.draw is None:
            self.draw_allowed()
        else:
            self.draw.replay()
        return SampledTokens(self.token_ids, None)

    def draw_allowed(self) -> None:
        step = self.step
        places = step.sample_rows, step.sample_positions, self.token_table
        masks = self.masks.words, step.mask_lines
        draw_tokens(self.logits, step.inverse_temperature, step.keys, *places, self.drawn, *masks, place=step.place)


class AnyToken:
    """A matcher that allows everything: for compiling ahead."""

    error: str | None = None

    def fill_mask(self, mask: np.ndarray) -> None:
        mask.fill(-1)

    def accept(self, token_id: int) -> str | None:
        return None


class CudaGraphs:
    def __init__(
        self,
        forward_step: Callable[[StepTensors, Tensor], Tensor],
        backend: TritonAttention,
        state: RowState,
        *,
        max_num_seqs: int,
        max_tokens: int,
        max_in_flight: int,
        vocab_size: int,
    ) -> None:
        self.forward_step = forward_step
        self.backend = backend
        self.block_tables, self.token_table = state.block_tables, state.token_ids
        self.spare_row = state.spare_row
        self.device = state.token_ids.device
        extra = backend.max_extra_items
        backend.reserve(max_num_seqs + extra)
        self.decode_buckets = [Bucket(size, size, 0, size + extra) for size in decode_sizes(max_num_seqs)]
        self.mixed_buckets = [self._mixed_bucket(size, min(size, max_num_seqs), extra) for size in mixed_sizes(max_tokens)]
        self._buffers: dict[Bucket, Tensor] = {}
        self._padding: dict[Bucket, np.ndarray] = {}
        self._decoding: Decoding | None = None  # if the step filled last does nothing else
        self._staging = Staging(max(bucket.num_words for bucket in [*self.decode_buckets, *self.mixed_buckets]))
        is_gpu = self.device.type == "cuda"
        self._masks = HostMasks(max_num_seqs, vocab_size, is_gpu)
        self._drawn = torch.zeros(max_in_flight, max_num_seqs, dtype=torch.int64, pin_memory=is_gpu)  # by a step each
        self._place = 0
        self._graphs: dict[Bucket, tuple[torch.cuda.CUDAGraph, Replayed]] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def _mixed_bucket(self, num_tokens: int, num_samples: int, extra: int) -> Bucket:
        return Bucket(num_tokens, num_samples, num_tokens // self.backend.prompt_tile + num_samples, num_samples + extra)

    # --- before and while capturing

    def peak_bytes(self) -> int:
        """What the largest step takes beside weights and caches: measured, by running one of padding."""
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        self.run_padding(self.mixed_buckets[-1])
        torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device) - before
        torch.cuda.empty_cache()  # or what is free would look smaller than it is
        return peak

    def warm_up(self) -> None:
        """Run steps that need every variant of the kernels: they differ by the number of tokens."""
        for bucket in [*self.decode_buckets[:4], *self.mixed_buckets]:
            self._masks.begin({0: AnyToken()})
            self.run_padding(bucket).draw_under_masks()
            torch.cuda.synchronize(self.device)

    def run_padding(self, bucket: Bucket) -> Replayed:
        tensors = self._views(bucket, torch.from_numpy(self._empty(bucket)).to(self.device))
        return Replayed(self.forward_step(tensors, self._drawn), self._drawn, tensors, self.token_table, self._masks)

    @no_collections()
    def capture_all(self) -> None:
        """Smallest first. Running out of memory drops the larger buckets; another failure drops them all."""
        gc.collect()  # a graph that an older engine has left behind, freed within a capture, breaks that (pytorch#161037)
        started = time.perf_counter()
        for bucket in [*self.decode_buckets, *self.mixed_buckets]:
            try:
                self._capture(bucket)
            except torch.OutOfMemoryError:
                degraded("graph_memory", "none for the CUDA graph of %d tokens: larger steps run eagerly", bucket.num_tokens)
                torch.cuda.empty_cache()
                break
            except RuntimeError as error:
                degraded("cuda_graphs", "they are off, steps run eagerly: %s", error)
                self._graphs.clear()
                break
        logger.info("captured %d CUDA graphs in %.1f s", len(self._graphs), time.perf_counter() - started)

    def _capture(self, bucket: Bucket) -> None:
        buffer = torch.from_numpy(self._empty(bucket)).to(self.device)
        tensors = self._views(bucket, buffer)
        rest = self._drawn, tensors, self.token_table, self._masks
        Replayed(self.forward_step(tensors, self._drawn), *rest).draw_allowed()  # compiles, and lets libraries allocate
        torch.cuda.synchronize()
        graph, draw = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self.forward_step(tensors, self._drawn)
        replayed = Replayed(logits, *rest, draw)
        with torch.cuda.graph(draw, pool=self._pool):
            replayed.draw_allowed()
        self._buffers[bucket] = buffer
        self._graphs[bucket] = graph, replayed

    def _empty(self, bucket: Bucket) -> np.ndarray:
        """[num_words] int32: a step of nothing but padding. Not to be written to."""
        if bucket not in self._padding:
            buffer = np.zeros(bucket.num_words, dtype=np.int32)
            parts = bucket.split(buffer)
            parts["token_rows"][:] = -1
            parts["sample_rows"][:] = self.spare_row
            parts["mask_lines"][:] = -1
            self._padding[bucket] = buffer
        return self._padding[bucket]

    def _views(self, bucket: Bucket, buffer: Tensor) -> StepTensors:
        parts = bucket.split(buffer)
        plan = TritonPlan(self.block_tables, parts.pop("decode_items"), parts.pop("prompt_items"))
        needed_items = parts.pop("needed_items")
        needed_plan = None if bucket.is_decode else TritonPlan(self.block_tables, needed_items, needed_items[:0])
        parts["inverse_temperature"] = parts["inverse_temperature"].view(torch.float32)
        return StepTensors(**parts, plan=plan, needed_plan=needed_plan)

    # --- replay

    def fill(
        self,
        batch: ScheduledBatch,
        positions: np.ndarray,
        inverse_temperature: np.ndarray,
        keys: KeysOfSteps,
        is_held: bool,
    ) -> Bucket | None:
        """Write the inputs of a step on the host. Returns the bucket to replay; None when no captured one fits.

        positions: [num_samples] int64, that the drawn tokens take; inverse_temperature: [num_samples] float32. `is_held`:
        the graph is not to draw.
        """
        self._decoding = None
        bucket = self._find(batch)
        if bucket is None:
            return None
        words = self._empty(bucket).copy()
        parts = bucket.split(words)
        if bucket.is_decode:
            self._fill_decodes(parts, batch.rows, positions)
            num_planned = num_steps_planned(positions, self.backend.max_extra_items)
            starts = [start + 1 for start in batch.starts]
            self._decoding = Decoding(bucket, words, parts, keys, batch.rows, starts, num_planned)
        else:
            self._fill(parts, batch)
        num_samples = len(positions)
        parts["inverse_temperature"][:num_samples] = inverse_temperature.view(np.int32)
        parts["keys"][:num_samples] = keys.next()
        parts["mask_lines"][list(batch.matchers)] = np.arange(len(batch.matchers))
        parts["held"][0] = is_held
        self._stage(words, parts)
        return bucket

    def advance(self, batch: ScheduledBatch) -> Bucket | None:
        """`fill` in a fraction of its time, for a step in which the sequences of the last one decode on. None for others."""
        last = self._decoding
        if last is None or batch.seats or not last.leads_to(batch):
            return None
        last.advance()
        self._stage(last.words, last.parts)
        return last.bucket

    def _stage(self, words: np.ndarray, parts: dict[str, np.ndarray]) -> None:
        self._place = parts["place"][0] = (self._place + 1) % len(self._drawn)
        self._staging.place(len(words))[:] = words

    def replay(self, bucket: Bucket, num_samples: int) -> Replayed:
        """Run the step that was filled last."""
        self._staging.send(self._buffers[bucket])
        graph, replayed = self._graphs[bucket]
        graph.replay()
        return replace(replayed, logits=replayed.logits[:num_samples], place=self._place)

    def _find(self, batch: ScheduledBatch) -> Bucket | None:
        num_tokens, num_chunks = sum(batch.lengths), len(batch.lengths)
        buckets = self.decode_buckets if num_tokens == num_chunks == len(batch.sampled_chunks) else self.mixed_buckets
        for bucket in buckets:
            if bucket.num_tokens >= num_tokens and bucket.num_samples >= num_chunks and bucket in self._graphs:
                return bucket
        return None

    def _fill_decodes(self, parts: dict[str, np.ndarray], rows: list[int], positions: np.ndarray) -> None:
        """What `_fill` does, where each chunk is one token that draws."""
        num_tokens = len(rows)
        number = np.arange(num_tokens)
        parts["token_rows"][:num_tokens] = parts["sample_rows"][:num_tokens] = rows
        parts["positions"][:num_tokens] = positions - 1
        parts["sample_tokens"][:num_tokens] = number
        parts["sample_positions"][:num_tokens] = positions
        items = plan_decodes(positions - 1, number, np.array(rows), self.backend.max_extra_items)
        parts["decode_items"][: len(items)] = items

    def _fill(self, parts: dict[str, np.ndarray], batch: ScheduledBatch) -> None:
        rows, starts, lengths = np.array(batch.rows), np.array(batch.starts), np.array(batch.lengths)
        ends = np.cumsum(lengths)
        first_tokens = ends - lengths
        num_tokens = int(ends[-1])
        parts["token_rows"][:num_tokens] = np.repeat(rows, lengths)
        parts["positions"][:num_tokens] = np.arange(num_tokens) + np.repeat(starts - first_tokens, lengths)
        chunks, num_samples = batch.sampled_chunks, len(batch.sampled_chunks)
        parts["sample_tokens"][:num_samples] = ends[chunks] - 1
        parts["sample_rows"][:num_samples] = rows[chunks]
        parts["sample_positions"][:num_samples] = (starts + lengths)[chunks]
        one, extra = lengths == 1, self.backend.max_extra_items
        if one.any():
            items = plan_decodes(starts[one], first_tokens[one], rows[one], extra)
            parts["decode_items"][: len(items)] = items
        if num_samples and len(parts["needed_items"]):
            items = plan_decodes((starts + lengths - 1)[chunks], np.arange(num_samples), rows[chunks], extra)
            parts["needed_items"][: len(items)] = items
        if not one.all():
            many = ~one
            items = plan_prompts(starts[many], lengths[many], first_tokens[many], rows[many], self.backend.prompt_tile)
            parts["prompt_items"][: len(items)] = items
