"""The cost model: how long one step takes on the device and on the host, by the roofline.

A step is its kernels, one after another. A kernel takes a latency of its kind, plus the longer of two times: its bytes
at the bandwidth that streams reach, or its operations at the matrix rate:

    product        latency + the longer of weights / bandwidth and 2 * tokens * weights_count / matrix rate,
                   and a share of the shorter, which does not hide wholly behind it
    attention      latency + bytes of keys and values / bandwidth          each sequence that computes one token
                   latency + 4 * heads * head_dim * pairs / matrix rate    prompt chunks; pairs of queries and keys,
                   or the keys of the longest chunk, one after another, where that takes longer
    elementwise    latency + bytes of activations / bandwidth              two norms, rotary with KV write, SiLU
    sampler        logits * time per logit

A graph replay has the fixed shapes of its bucket, and padding costs as much as tokens do; `decode_sizes` and
`mixed_sizes` are those of `runner/cuda_graphs.py` (which imports torch; a test compares them). The last layer of a step
with prompts computes keys and values for all tokens and the rest for those that draw. Products begin at the card's
highest clock; what a step has of them beyond `burst_s` runs at the one that power allows. What does not depend on
contexts is computed once per bucket. What is counted is in `engine/roofline.py`. Knows no clock. Read next: `executor.py`.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from typing import NamedTuple

from nanovllm.engine.batch import ScheduledBatch
from nanovllm.engine.roofline import attention_operations, layer_products, output_product
from nanovllm.model_spec import ModelSpec
from nanovllm.simulation.hardware import Hardware

BYTES_PER_VALUE = 2  # bfloat16


class StepCost(NamedTuple):
    """Seconds; and what the device must do at least, for utilisation."""

    device_s: float
    launch_s: float  # host time of the launches: 0 for a graph
    num_bytes: float
    num_operations: float


def decode_sizes(max_num_seqs: int) -> list[int]:
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_num_seqs + 1, 64)]
    return sorted({size for size in sizes if size < max_num_seqs} | {max_num_seqs})


def mixed_sizes(max_tokens: int) -> list[int]:
    sizes = [size for power in range(6, 20) for size in (1 << power, 3 << (power - 1))]
    return sorted({size for size in sizes if size < max_tokens} | {max_tokens})


@dataclass(slots=True)
class _Sum:
    """Kernels of a step, added up."""

    seconds: float = 0.0
    num_kernels: int = 0
    num_bytes: float = 0.0
    num_operations: float = 0.0

    def add(self, count: int, seconds: float, num_bytes: float = 0.0, num_operations: float = 0.0) -> None:
        """`count` equal kernels."""
        self.seconds += count * seconds
        self.num_kernels += count
        self.num_bytes += count * num_bytes
        self.num_operations += count * num_operations


@dataclass(slots=True)
class CostModel:
    """Costs of steps of one model on one device. Not thread-safe: it remembers buckets."""

    spec: ModelSpec
    hardware: Hardware
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    is_greedy: bool = True
    use_graphs: bool = True
    bandwidth: float = field(init=False)  # bytes per second that streams reach
    matrix_rate: float = field(init=False)  # operations per second that products reach, for a short while
    attention_rate: float = field(init=False)
    _decode_sizes: list[int] = field(init=False)
    _mixed_sizes: list[int] = field(init=False)
    _known: dict[tuple[int, int, bool], _Sum] = field(init=False, default_factory=dict)
    _kv_bytes: int = field(init=False)  # of one token, all layers

    def __post_init__(self) -> None:
        shares = self.hardware.calibration
        self.bandwidth = shares.memory * self.hardware.bandwidth
        self.matrix_rate = shares.burst_product * self.hardware.flops
        self.attention_rate = shares.attention * self.hardware.flops
        self.use_graphs = self.use_graphs and self.hardware.has_graphs
        self._decode_sizes = decode_sizes(self.max_num_seqs)
        self._mixed_sizes = mixed_sizes(self.max_num_batched_tokens)
        self._kv_bytes = self.spec.kv_bytes_per_token(BYTES_PER_VALUE)

    def step(self, batch: ScheduledBatch) -> StepCost:
        """The cost of one scheduled batch."""
        num_chunks, num_samples = len(batch.lengths), len(batch.sampled_chunks)
        num_tokens = sum(batch.lengths)
        if num_tokens == num_chunks == num_samples:
            return self.decode(num_tokens, sum(batch.starts) + num_tokens)
        return self._mixed(batch, num_tokens, num_samples)

    def decode(self, num_tokens: int, num_keys: int) -> StepCost:
        """A step of single tokens that read `num_keys` keys in all."""
        padded = self._pad(self._decode_sizes, num_tokens)
        known = self._common(padded, padded, True)
        kv_bytes = num_keys * self._kv_bytes
        seconds = known.seconds + kv_bytes / self.bandwidth
        return self._cost(known, seconds, kv_bytes, 0.0)

    def num_kernels(self, num_tokens: int) -> int:
        """Of a step of single tokens."""
        padded = self._pad(self._decode_sizes, num_tokens)
        return self._common(padded, padded, True).num_kernels

    def _mixed(self, batch: ScheduledBatch, num_tokens: int, num_samples: int) -> StepCost:
        padded, samples = self._pad(self._mixed_sizes, num_tokens), num_samples
        if self.use_graphs:
            samples = max(num_samples, min(padded, self.max_num_seqs))
        known = self._common(padded, samples, False)
        spec, tile_keys = self.spec, self.hardware.calibration.tile_keys
        num_keys, pairs, num_prompt_keys, longest = 0, 0.0, 0, 0
        for start, length in zip(batch.starts, batch.lengths):
            if length == 1:
                num_keys += start + 1
            else:
                num_prompt_keys += start + length
                longest = max(longest, start + length)
                pairs += length * (start + 0.5 * length + tile_keys)
        operations = attention_operations(spec, pairs, spec.num_layers - 1)
        prompt_bytes = num_prompt_keys * self._kv_bytes
        one_by_one_s = longest * self.hardware.calibration.prompt_key_s * (spec.num_layers - 1)
        seconds = known.seconds + max(operations / self.attention_rate, prompt_bytes / self.bandwidth, one_by_one_s)
        seconds += num_keys * self._kv_bytes / self.bandwidth
        return self._cost(known, seconds, prompt_bytes + num_keys * self._kv_bytes, operations)

    def _cost(self, known: _Sum, seconds: float, more_bytes: float, more_operations: float) -> StepCost:
        launch_s = 0.0 if self.use_graphs else known.num_kernels * self.hardware.calibration.eager_launch_s
        return StepCost(seconds, launch_s, known.num_bytes + more_bytes, known.num_operations + more_operations)

    def _pad(self, sizes: list[int], size: int) -> int:
        if not self.use_graphs:
            return size
        place = bisect_left(sizes, size)
        return sizes[place] if place < len(sizes) else size

    def _common(self, num_tokens: int, num_samples: int, is_decode: bool) -> _Sum:
        """All that does not depend on contexts."""
        key = num_tokens, num_samples, is_decode
        if key not in self._known:
            self._known[key] = self._sum_up(*key)
        return self._known[key]

    def _sum_up(self, num_tokens: int, num_samples: int, is_decode: bool) -> _Sum:
        spec, shares, total = self.spec, self.hardware.calibration, _Sum()
        if is_decode:
            self._add_layers(total, spec.num_layers, num_tokens, num_tokens)
        else:
            self._add_layers(total, spec.num_layers - 1, num_tokens, num_tokens)
            self._add_layers(total, 1, num_tokens, num_samples)
        self._add_product(total, 1, *output_product(spec, num_samples))
        rest = max(0.0, total.num_operations - shares.burst_s * self.matrix_rate)
        total.seconds += rest * (1 / (shares.product * self.hardware.flops) - 1 / self.matrix_rate)
        logit_s = shares.greedy_logit_s if self.is_greedy else shares.logit_s
        total.add(1, shares.elementwise_s + num_samples * spec.vocab_size * logit_s)
        # The kernels for one token are launched before the one ahead of them has ended: no gaps.
        is_fused = is_decode and num_tokens == 1 and self.use_graphs
        total.seconds += 0.0 if is_fused else total.num_kernels * shares.gap_s
        if not is_decode and self.use_graphs:  # a graph holds both attention kernels, used or not
            total.seconds += (spec.num_layers - 1) * shares.attention_s
        return total

    def _add_layers(self, total: _Sum, count: int, num_tokens: int, num_needed: int) -> None:
        """`count` layers. `num_needed`: tokens that go on after their keys and values are written."""
        spec, shares = self.spec, self.hardware.calibration
        for product in layer_products(spec, num_tokens, num_needed):
            self._add_product(total, count, *product)
        total.add(count, shares.attention_s)
        query, kv = spec.total_num_heads * spec.head_dim, spec.total_num_kv_heads * spec.head_dim
        self._add_elementwise(total, count, num_tokens, 2 * (query + 2 * kv))
        if not (num_tokens == 1 and self.use_graphs):  # else they are inside the products
            self._add_elementwise(total, count, num_tokens, 4 * spec.hidden_size)
            self._add_elementwise(total, count, num_needed, 4 * spec.hidden_size)
            self._add_elementwise(total, count, num_needed, 3 * spec.intermediate_size)

    def _add_product(self, total: _Sum, count: int, num_rows: int, num_in: int, num_out: int) -> None:
        """[num_rows, num_in] times [num_in, num_out]."""
        shares = self.hardware.calibration
        num_bytes = num_in * num_out * BYTES_PER_VALUE
        operations = 2.0 * num_rows * num_in * num_out
        latency = shares.one_token_product_s if num_rows == 1 and self.use_graphs else shares.product_s
        shorter, longer = sorted((num_bytes / self.bandwidth, operations / self.matrix_rate))
        seconds = latency + longer + (1 - shares.overlap) * shorter
        total.add(count, seconds, num_bytes, operations)

    def _add_elementwise(self, total: _Sum, count: int, num_tokens: int, values_per_token: int) -> None:
        shares = self.hardware.calibration
        num_bytes = num_tokens * values_per_token * BYTES_PER_VALUE
        total.add(count, shares.elementwise_s + num_bytes / (self.bandwidth * shares.elementwise), num_bytes)
