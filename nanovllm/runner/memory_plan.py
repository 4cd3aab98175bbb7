"""MemoryPlan: how much memory the model needs, and what is left for the KV cache. Arithmetic only.

Made before a weight is read, so that what cannot fit is refused in the first second, with the option that would help.
"""

from __future__ import annotations

from dataclasses import dataclass

from nanovllm.config import EngineConfig
from nanovllm.errors import NotEnoughMemory
from nanovllm.model_spec import ModelSpec

MiB = 1 << 20


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes, except where a name says otherwise."""

    total: int
    free: int
    budget: int  # what the engine may use
    weights: int
    activations: int
    kv_cache: int
    kv_bytes_per_token: int
    block_size: int  # tokens
    num_blocks: int
    max_model_len: int  # tokens

    @property
    def num_cached_tokens(self) -> int:
        return self.num_blocks * self.block_size

    def describe(self) -> str:
        """A table for people."""
        rows = (
            ("memory of the device", self.total, ""),
            ("free now", self.free, ""),
            ("budget of the engine", self.budget, ""),
            ("weights", self.weights, ""),
            ("activations, at most", self.activations, ""),
            ("KV cache", self.kv_cache, f"{self.num_blocks} blocks of {self.block_size} = {self.num_cached_tokens} tokens"),
        )
        lines = [f"  {name:<22}{size / MiB:>11,.0f} MiB  {note}".rstrip() for name, size, note in rows]
        ratio = self.num_cached_tokens / self.max_model_len
        lines.append(f"  sequences of full length ({self.max_model_len} tokens) that fit at once: {ratio:.1f}")
        return "\n".join(lines)


def plan_memory(
    spec: ModelSpec,
    config: EngineConfig,
    *,
    bytes_per_value: int,
    total: int,
    free: int,
    share: float,
    max_default_kv: int | None,
) -> MemoryPlan:
    """Divide the budget; `config` has its token budget decided. Raises `NotEnoughMemory` naming what would help."""
    budget = min(int(total * share), free)
    weights = _weight_bytes(spec, bytes_per_value)
    activations = _activation_bytes(spec, config, bytes_per_value)
    per_token = spec.kv_bytes_per_token(bytes_per_value)
    per_block = per_token * config.block_size
    limit = config.max_model_len or spec.max_position
    if config.num_kv_blocks is not None:
        num_blocks = config.num_kv_blocks
    elif config.kv_cache_memory_bytes is not None:
        num_blocks = config.kv_cache_memory_bytes // per_block
    else:
        available = max(0, budget - weights - activations)
        usable = -(-limit // config.block_size) * config.max_num_seqs  # more could never be used at once
        if max_default_kv is not None:
            available = min(available, max_default_kv)
        num_blocks = min(available // per_block, usable)
    needed = weights + activations + num_blocks * per_block
    if weights + activations >= free or (needed > free and _is_sized_by_user(config)):
        raise NotEnoughMemory(_explain(weights, activations, num_blocks * per_block, free))
    max_model_len = min(limit, num_blocks * config.block_size)
    wanted = config.max_model_len or 2
    if max_model_len < wanted:
        wanted_bytes = -(-wanted // config.block_size) * per_block
        raise NotEnoughMemory(
            f"max_model_len={wanted} needs {wanted_bytes / MiB:.0f} MiB of KV cache, and there is room for {num_blocks} blocks "
            f"({num_blocks * config.block_size} tokens, {num_blocks * per_block / MiB:.0f} MiB); lower max_model_len to at most "
            f"{max_model_len}, or raise gpu_memory_utilization (now {share:g}) or kv_cache_memory_bytes (to {wanted_bytes})"
        )
    kv_cache = num_blocks * per_block
    return MemoryPlan(
        total, free, budget, weights, activations, kv_cache, per_token, config.block_size, num_blocks, max_model_len
    )


def _weight_bytes(spec: ModelSpec, bytes_per_value: int) -> int:
    """Parameters, and the repacked copy of a tied output head."""
    tied_head = spec.vocab_size * spec.hidden_size if spec.tie_word_embeddings else 0
    return (spec.num_parameters + tied_head) * bytes_per_value


def _activation_bytes(spec: ModelSpec, config: EngineConfig, bytes_per_value: int) -> int:
    """The largest step's temporaries: the widest layer of all tokens, and the logits of all sequences."""
    budget = config.max_num_batched_tokens or 0
    query_kv = (spec.total_num_heads + 2 * spec.total_num_kv_heads) * spec.head_dim
    per_token = 4 * spec.hidden_size + max(3 * spec.intermediate_size, 3 * query_kv)
    logits = min(config.max_num_seqs, budget) * spec.vocab_size * (4 + 4 + bytes_per_value)
    return budget * per_token * bytes_per_value + logits


def _is_sized_by_user(config: EngineConfig) -> bool:
    return config.num_kv_blocks is not None or config.kv_cache_memory_bytes is not None


def _explain(weights: int, activations: int, kv_cache: int, free: int) -> str:
    room = max(0, free - weights - activations)
    advice = (
        f"set kv_cache_memory_bytes to at most {room}"
        if room and kv_cache
        else "use a smaller model, dtype='bfloat16', or a smaller max_num_batched_tokens or max_num_seqs"
    )
    return (
        f"the model does not fit: weights {weights / MiB:.0f} MiB + activations {activations / MiB:.0f} MiB "
        f"+ KV cache {kv_cache / MiB:.0f} MiB, and {free / MiB:.0f} MiB are free; {advice}"
    )
