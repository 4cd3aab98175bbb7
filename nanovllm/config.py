"""EngineConfig: every option of the engine, flat for the user, with its default and its unit.

Frozen: nobody writes to it. `None` and "auto" mean "decided from the model and the machine"; `llm.build_engine` decides
each once and builds a new config, which is logged and stored in benchmark records. What is measured (the number of KV
blocks) is in the `MemoryPlan`, not here. Control plane: imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from nanovllm.errors import ConfigError, did_you_mean

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
CPU_COMPUTES = ("auto", "torch", "bf16", "int8", "int4")
ALIASES = {  # names that nano-vllm's and vLLM's scripts use
    "kvcache_block_size": "block_size",
    "num_kvcache_blocks": "num_kv_blocks",
    "long_prefill_token_threshold": "max_prompt_chunk",
}
LARGE_GPU_BYTES = 64 << 30


def gpu_max_num_seqs(total_bytes: int) -> int:
    """The default: twice as many where their KV has room, for more tokens a second at once and a shorter queue."""
    return 512 if total_bytes >= LARGE_GPU_BYTES else 256


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """What may change while the engine runs (`Scheduler.set_limits`)."""

    max_num_seqs: int = 256  # sequences running at once
    max_num_batched_tokens: int = 2048  # token budget of one step
    max_prompt_chunk: int | None = None  # tokens of one prompt per step; None: the whole budget
    watermark: float = 0.01  # share of the blocks that admission leaves free, so that it does not cause a preemption

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_prompt_chunk"):
            value = getattr(self, name)
            if value is None and name == "max_prompt_chunk":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}={value!r} must be a whole number of at least 1")
        if isinstance(self.watermark, bool) or not isinstance(self.watermark, (int, float)) or not 0 <= self.watermark < 1:
            raise ConfigError(f"watermark={self.watermark!r} must be a number from 0 up to, but not including, 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    # --- model
    model: str | None = None  # folder, .gguf file or hub id; None: the embedded SmolLM2-135M-Instruct
    revision: str | None = None  # of a hub id
    hub: str = "huggingface"  # or "modelscope"
    dtype: str = "auto"  # auto: bfloat16 where the processor computes in it, else float32
    max_model_len: int | None = None  # tokens of prompt and output together; None: what the model allows and the cache holds
    seed: int = 0  # of requests that bring no seed of their own

    # --- scheduling
    max_num_seqs: int | None = None  # sequences running at once; None: 256, on a GPU of 64 GiB and more 512
    max_num_batched_tokens: int | None = None  # token budget of a step; None: 2048 on a CPU, 8192 on a GPU
    max_prompt_chunk: int | None = None  # tokens of one prompt per step; None: the whole budget
    watermark: float = 0.01  # share of the KV blocks that admission leaves free
    scheduling_policy: str = "fcfs"  # fcfs, priority, prefill_first
    num_steps_ahead: int | None = None  # steps dispatched before the oldest result is needed; None: 1 on a GPU, 0 on a CPU

    # --- KV cache and memory
    block_size: int | None = None  # tokens per KV block; None: 16 on a CPU, 64 on a GPU
    enable_prefix_caching: bool = True
    gpu_memory_utilization: float | None = None  # share of the device's memory to use; None: 0.9 on a GPU, 0.5 on a CPU
    kv_cache_memory_bytes: int | None = None  # absolute size of the KV cache, bytes; overrides the share
    num_kv_blocks: int | None = None  # absolute size of the KV cache, blocks; overrides both

    # --- execution
    device: str = "auto"  # auto: cuda if there is one
    enforce_eager: bool = False  # no CUDA graphs
    tensor_parallel_size: int = 1  # ranks that share one model
    num_threads: int | None = None  # CPU threads; None: as many as this process may use
    cpu_compute: str = "auto"  # torch, or the compiled step with weights in bf16, int8, int4; auto: as stored (docs/cpu-step.md)
    cpu_pin_threads: bool = False  # each thread of the compiled step stays on one core; only for a machine without neighbours

    def __post_init__(self) -> None:
        if isinstance(self.model, Path):
            object.__setattr__(self, "model", str(self.model))
        self._check_choices()
        self._check_numbers()

    @classmethod
    def from_options(cls, **options: Any) -> EngineConfig:
        """A config from keyword options; an unknown name is an error with a suggestion."""
        known = [field.name for field in fields(cls)]
        translated: dict[str, Any] = {}
        for name, value in options.items():
            target = ALIASES.get(name, name)
            if target not in known:
                raise ConfigError(f"unknown option {name!r}{did_you_mean(name, [*known, *ALIASES])}")
            if target in translated:
                raise ConfigError(f"option {target!r} is given twice (also as {name!r})")
            translated[target] = value
        return cls(**translated)

    def with_changes(self, **changes: Any) -> EngineConfig:
        return replace(self, **changes)

    @property
    def scheduler_limits(self) -> SchedulerLimits:
        """Of a resolved config."""
        if self.max_num_batched_tokens is None or self.max_num_seqs is None:
            raise ConfigError("max_num_batched_tokens and max_num_seqs are not decided yet: resolve the config first")
        return SchedulerLimits(self.max_num_seqs, self.max_num_batched_tokens, self.max_prompt_chunk, self.watermark)

    def _check_choices(self) -> None:
        hubs = ("huggingface", "modelscope")
        for name, choices in (("dtype", DTYPES), ("device", DEVICES), ("hub", hubs), ("cpu_compute", CPU_COMPUTES)):
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(f"{name}={value!r} is not one of {', '.join(choices)}{did_you_mean(str(value), choices)}")
        for name in ("model", "revision", "scheduling_policy"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ConfigError(f"{name} must be a string, got {value!r}")
        for name in ("enable_prefix_caching", "enforce_eager", "cpu_pin_threads"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r}")

    def _check_numbers(self) -> None:
        self._check_int("tensor_parallel_size", 1)
        for name in (
            "max_num_seqs",
            "block_size",
            "max_num_batched_tokens",
            "max_prompt_chunk",
            "kv_cache_memory_bytes",
            "num_kv_blocks",
            "num_threads",
        ):
            if getattr(self, name) is not None:
                self._check_int(name, 1)
        if self.num_threads is not None and self.num_threads > 4096:
            raise ConfigError(f"num_threads={self.num_threads} is more than any machine has")
        if self.max_model_len is not None:
            self._check_int("max_model_len", 2)
        if self.num_steps_ahead is not None:
            self._check_int("num_steps_ahead", 0)
        self._check_int("seed", -(2**63))
        self._check_share("watermark", self.watermark, low_is_allowed=True)
        if self.gpu_memory_utilization is not None:
            self._check_share("gpu_memory_utilization", self.gpu_memory_utilization, low_is_allowed=False)
        if self.tensor_parallel_size > 1:
            raise ConfigError(f"tensor_parallel_size={self.tensor_parallel_size}: only 1 is implemented so far (see ROADMAP.md)")

    def _check_int(self, name: str, low: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ConfigError(f"{name}={value!r} must be a whole number of at least {low}")

    def _check_share(self, name: str, value: Any, low_is_allowed: bool) -> None:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not (0 <= value < 1 if low_is_allowed else 0 < value <= 1):
            raise ConfigError(f"{name}={value!r} must be a share between 0 and 1")
