"""MemoryPlan: how much memory the model needs, and what is left for the KV cache. Arithmetic only.

Made before a weight is read, so that what cannot fit is refused in the first second, with the option that would help.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from nanovllm.config import EngineConfig
from nanovllm.errors import NotEnoughMemory
from nanovllm.model_spec import ModelSpec

MiB = 1 << 20


class Measured(NamedTuple):
    """Bytes that the engine holds without a KV cache."""

    weights: int  # and rows, tables, the library's own
    activations: int  # of the largest step, and of its graphs


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes, except where a name says otherwise."""

    total: int
    free: int
    budget: int  # what the engine may use
    weights: int
    activations: int
    rows: int  # tokens and block tables of the running sequences
    kv_cache: int
    block_size: int  # tokens
    num_blocks: int
    max_model_len: int  # tokens
    asked: str  # which options decided
    is_measured: bool = False  # else computed from the shapes

    @property
    def num_cached_tokens(self) -> int:
        return self.num_blocks * self.block_size

    def describe(self) -> str:
        """A table for people."""
        lines = (
            ("memory of the device", self.total, ""),
            ("used by others", self.total - self.free, ""),
            ("budget of the engine", self.budget, f"asked: {self.asked}"),
            ("weights", self.weights, "measured, with rows and workspaces" if self.is_measured else ""),
            ("activations, at most", self.activations, "measured, with graphs" if self.is_measured else ""),
            ("rows of sequences", self.rows, ""),
            ("KV cache", self.kv_cache, f"{self.num_blocks} blocks of {self.block_size} = {self.num_cached_tokens} tokens"),
        )
        table = [f"  {name:<22}{size / MiB:>11,.0f} MiB  {note}".rstrip() for name, size, note in lines]
        ratio = self.num_cached_tokens / self.max_model_len
        table.append(f"  sequences of full length ({self.max_model_len} tokens) that fit at once: {ratio:.1f}")
        return "\n".join(table)


def plan_memory(
    spec: ModelSpec,
    config: EngineConfig,
    *,
    bytes_per_value: int,
    total: int,
    free: int,
    max_default_kv: int | None,
    measured: Measured | None = None,
    packed_weights: int | None = None,
) -> MemoryPlan:
    """Divide the budget of a resolved config. Raises `NotEnoughMemory` naming the option that would help, and its value.

    `free` is what was free before the engine took anything. Called with arithmetic before a weight is read, and again
    with what was measured after, where the device can tell. `packed_weights`: bytes, of the compiled CPU step, whose
    activations are float32.
    """
    share = config.gpu_memory_utilization or 1.0
    budget = min(int(total * share), free)
    if packed_weights is None:
        computed = Measured(_weight_bytes(spec, bytes_per_value), _activation_bytes(spec, config, bytes_per_value))
    else:
        computed = Measured(packed_weights, _activation_bytes(spec, config, 4))
    weights, activations = measured or computed
    limit = config.max_model_len or spec.max_position
    rows = 0 if measured else ((config.max_num_seqs or 1) + 1) * (limit + 1 + limit // (config.block_size or 1)) * 4
    fixed = weights + activations + rows
    per_block = spec.kv_bytes_per_token(bytes_per_value) * (config.block_size or 1)
    num_blocks = _num_blocks(config, limit, per_block, max(0, budget - fixed), max_default_kv)
    if fixed + per_block > free or (_is_sized_by_user(config) and fixed + num_blocks * per_block > free):
        raise NotEnoughMemory(_explain(weights, activations, rows, num_blocks * per_block, free))
    max_model_len = min(limit, num_blocks * (config.block_size or 1))
    if max_model_len < (config.max_model_len or 2):
        raise NotEnoughMemory(_explain_length(config, config.max_model_len or 2, per_block, num_blocks, fixed, total))
    return MemoryPlan(
        total,
        free,
        budget,
        weights,
        activations,
        rows,
        num_blocks * per_block,
        config.block_size or 1,
        num_blocks,
        max_model_len,
        _asked(config, share),
        measured is not None,
    )


def _num_blocks(config: EngineConfig, limit: int, per_block: int, available: int, max_default_kv: int | None) -> int:
    if config.num_kv_blocks is not None:
        return config.num_kv_blocks
    if config.kv_cache_memory_bytes is not None:
        return config.kv_cache_memory_bytes // per_block
    if max_default_kv is not None:
        available = min(available, max_default_kv)
    usable = -(-limit // (config.block_size or 1)) * (config.max_num_seqs or 1)  # more could never be used at once
    return min(available // per_block, usable)


def _weight_bytes(spec: ModelSpec, bytes_per_value: int) -> int:
    """Parameters, and the repacked copy of a tied output head."""
    tied_head = spec.vocab_size * spec.hidden_size if spec.tie_word_embeddings else 0
    return (spec.num_parameters + tied_head) * bytes_per_value


def _activation_bytes(spec: ModelSpec, config: EngineConfig, bytes_per_value: int) -> int:
    """The largest step's temporaries: the widest layer of all tokens, and the logits of all sequences."""
    budget = config.max_num_batched_tokens or 0
    query_kv = (spec.total_num_heads + 2 * spec.total_num_kv_heads) * spec.head_dim
    per_token = 4 * spec.hidden_size + max(3 * spec.intermediate_size, 3 * query_kv)
    logits = min(config.max_num_seqs or 1, budget) * spec.vocab_size * (4 + 4 + bytes_per_value)
    return budget * per_token * bytes_per_value + logits


def _is_sized_by_user(config: EngineConfig) -> bool:
    return config.num_kv_blocks is not None or config.kv_cache_memory_bytes is not None


def _asked(config: EngineConfig, share: float) -> str:
    for name in ("num_kv_blocks", "kv_cache_memory_bytes"):
        if getattr(config, name) is not None:
            return f"{name}={getattr(config, name)}"
    return f"gpu_memory_utilization={share:g}"


def _explain(weights: int, activations: int, rows: int, kv_cache: int, free: int) -> str:
    room = max(0, free - weights - activations - rows)
    advice = (
        f"set kv_cache_memory_bytes to at most {room}"
        if room and kv_cache
        else "use a smaller model, dtype='bfloat16', or a smaller max_num_batched_tokens, max_num_seqs or max_model_len"
    )
    return (
        f"the model does not fit: weights {weights / MiB:.0f} MiB + activations {activations / MiB:.0f} MiB + rows of sequences "
        f"{rows / MiB:.0f} MiB + KV cache {kv_cache / MiB:.0f} MiB, and {free / MiB:.0f} MiB are free; {advice}"
    )


def _explain_length(config: EngineConfig, wanted: int, per_block: int, num_blocks: int, fixed: int, total: int) -> str:
    block_size = config.block_size or 1
    wanted_blocks = -(-wanted // block_size)
    advice = [f"lower max_model_len to at most {num_blocks * block_size}"] if num_blocks * block_size >= 2 else []
    if config.num_kv_blocks is not None:
        advice.append(f"raise num_kv_blocks to {wanted_blocks}")
    else:
        advice.append(f"raise kv_cache_memory_bytes to {wanted_blocks * per_block}")
    needed_share = (fixed + wanted_blocks * per_block) / total
    if not _is_sized_by_user(config) and needed_share <= 1:
        advice.append(
            f"raise gpu_memory_utilization to {needed_share + 0.005:.2f} (now {config.gpu_memory_utilization or 1.0:g})"
        )
    return (
        f"max_model_len={wanted} needs {wanted_blocks * per_block / MiB:.0f} MiB of KV cache, and there is room for {num_blocks} "
        f"blocks ({num_blocks * block_size} tokens); {', or '.join(advice)}"
    )
