"""Roofline: the bytes that a step must move and the operations that it must do, counted from shapes; and what devices can.

    product        its weights once                            2 * rows * weights
    attention      keys and values, known and new, once        4 * heads * head_dim * pairs of queries and keys

The last layer of a step goes on only with the tokens that draw. Activations are not counted, as they can stay in caches,
nor is padding: this is the least that a step needs. `simulation/cost.py` makes times from the same shapes, and adds both.
Arithmetic only. Knows no clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

from nanovllm.engine.batch import ScheduledBatch
from nanovllm.model_spec import ModelSpec

ITEM_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
MAX_KNOWN = 4096  # sums remembered; one for each number of tokens and draws that occurred


class Product(NamedTuple):
    """[num_rows, num_in] times [num_in, num_out]."""

    num_rows: int
    num_in: int
    num_out: int


class StepWork(NamedTuple):
    num_bytes: float
    num_operations: float
    num_written: float = 0.0  # of the bytes: new keys and values


@dataclass(frozen=True, slots=True)
class Peak:
    """What a device can do at most. `source`: "data sheet of h200", or "measured"."""

    bytes_per_s: float
    operations_per_s: float  # multiplications and additions of matrices in the engine's dtype
    source: str

    def roof_s(self, work: StepWork) -> float:
        """The least seconds that the work can take."""
        return max(work.num_bytes / self.bytes_per_s, work.num_operations / self.operations_per_s)


DATA_SHEETS = {  # name -> (bytes per second, dense bf16 operations per second)
    "a10g": (600e9, 70e12),
    "l4": (300e9, 121e12),
    "a100": (2039e9, 312e12),  # SXM, 80 GB
    "h100": (3350e9, 989e12),  # SXM
    "h200": (4800e9, 989e12),
    "rtx4090": (1008e9, 165e12),
}


def find_peak(device: str) -> Peak | None:
    """Of a card by the name that its driver tells, such as "NVIDIA H200"; None for cards that nobody has looked up."""
    words = device.lower().replace("rtx ", "rtx").replace("-", " ").split()
    for name, rates in DATA_SHEETS.items():
        if name in words and "pcie" not in words:  # slower than the SXM boards of the same name
            return Peak(*rates, f"data sheet of {name}")
    return None


# --- shapes


def layer_products(spec: ModelSpec, num_tokens: int, num_needed: int) -> list[Product]:
    """Of one layer. `num_needed`: tokens that go on after their keys and values are written."""
    query, kv = spec.total_num_heads * spec.head_dim, spec.total_num_kv_heads * spec.head_dim
    return [
        Product(num_tokens, spec.hidden_size, query + 2 * kv),
        Product(num_needed, query, spec.hidden_size),
        Product(num_needed, spec.hidden_size, 2 * spec.intermediate_size),
        Product(num_needed, spec.intermediate_size, spec.hidden_size),
    ]


def output_product(spec: ModelSpec, num_samples: int) -> Product:
    """Hidden states to logits."""
    return Product(num_samples, spec.hidden_size, spec.vocab_size)


def attention_operations(spec: ModelSpec, pairs: float, num_layers: int) -> float:
    """`pairs`: of queries and keys, of one layer. A pair is a product with the key and one with the value."""
    return 4.0 * spec.total_num_heads * spec.head_dim * pairs * num_layers


# --- a step


@dataclass(slots=True)
class WorkCounter:
    """Counts steps of one model. Not thread-safe: it remembers sums."""

    spec: ModelSpec
    weight_bytes: float  # of one weight, mean over the model
    value_bytes: int  # of one number of the KV cache
    _known: dict[tuple[int, int], StepWork] = field(init=False, default_factory=dict)
    _kv_bytes: int = field(init=False)  # of one token, all layers

    def __post_init__(self) -> None:
        self._kv_bytes = self.spec.kv_bytes_per_token(self.value_bytes)

    def count(self, batch: ScheduledBatch) -> StepWork:
        starts, lengths, samples, spec = batch.starts, batch.lengths, batch.sampled_chunks, self.spec
        num_tokens = sum(lengths)
        num_keys = sum(starts) + num_tokens
        if num_tokens == len(lengths) == len(samples):  # single tokens: each is paired with its keys, in every layer
            pairs = last_pairs = num_keys
        else:
            pairs = sum([length * start + length * (length + 1) // 2 for start, length in zip(starts, lengths)])
            last_pairs = sum([starts[chunk] + lengths[chunk] for chunk in samples])
        common = self._known.get((num_tokens, len(samples))) or self._sum_up(num_tokens, len(samples))
        operations = attention_operations(spec, pairs, spec.num_layers - 1) + attention_operations(spec, last_pairs, 1)
        num_bytes = common.num_bytes + num_keys * self._kv_bytes
        return StepWork(num_bytes, common.num_operations + operations, num_tokens * self._kv_bytes)

    def _sum_up(self, num_tokens: int, num_samples: int) -> StepWork:
        """All that does not depend on contexts."""
        products = [one for _ in range(self.spec.num_layers - 1) for one in layer_products(self.spec, num_tokens, num_tokens)]
        products += [*layer_products(self.spec, num_tokens, num_samples), output_product(self.spec, num_samples)]
        num_weights = sum(one.num_in * one.num_out for one in products if one.num_rows)
        operations = sum(2 * one.num_rows * one.num_in * one.num_out for one in products)
        if len(self._known) >= MAX_KNOWN:
            self._known.clear()
        work = self._known[num_tokens, num_samples] = StepWork(num_weights * self.weight_bytes, operations)
        return work


def counter_of(spec: Mapping[str, Any], dtype: str, roofline: Mapping[str, Any]) -> WorkCounter | None:
    """Of the fields of `EngineFacts` or of a flight record; None when they do not tell the model."""
    if not spec:
        return None
    size = ITEM_SIZES.get(dtype, 2)
    return WorkCounter(msgspec.convert(spec, ModelSpec), roofline.get("weight_bytes", size), size)


def peak_of(roofline: Mapping[str, Any]) -> Peak | None:
    """Of the same field."""
    return None if roofline.get("peak") is None else Peak(**roofline["peak"])
