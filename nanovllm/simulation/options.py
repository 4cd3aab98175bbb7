"""SimulateOptions: what `nanovllm simulate --help` shows. Imports nothing of the simulator."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nanovllm.errors import ConfigError

SEARCHES = ("none", "replicas", "limits")


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulateOptions:
    gpu: str = "h200"  # a10g, l4, a100, h100, h200, rtx4090, cpu; only h200 is calibrated
    model: str = "qwen3-0.6b"  # a shape such as qwen3-8b or llama-3.1-8b, or a folder with config.json
    workload: str = "poisson:rate=10,num_requests=1000,num_input=512"  # NAME or NAME:PARAMETER=VALUE,...; see `bench workload`
    workload_seed: int = 0  # of arrivals and lengths
    server: bool | None = None  # requests go through a server, or LLM.generate; None: a server, unless all come at once
    slo: str = ""  # objectives of a request, such as ttft=200ms,tpot=20ms,latency=5s
    share: float = 0.99  # of the requests that must meet them, for --search replicas
    replicas: int = 1  # engines, each on its own device; requests go to them in turn
    search: str = "none"  # none, replicas: the fewest that meet the objectives, limits: the best max_num_seqs and budget
    temperature: float | None = None  # only whether it is 0 matters: argmax is cheaper than drawing; None: the workload's
    max_num_seqs: int | None = None  # sequences running at once; None: 256, with 64 GiB and more 512
    max_num_batched_tokens: int | None = None  # token budget of a step; None: 8192, on cpu 2048
    max_prompt_chunk: int | None = None  # tokens of one prompt per step; None: the whole budget
    max_model_len: int | None = None  # tokens of prompt and output together; None: what the model allows
    scheduling_policy: str = "fcfs"  # fcfs, priority, prefill_first
    enable_prefix_caching: bool = True
    enforce_eager: bool = False  # no CUDA graphs: every launch costs host time
    gpu_memory_utilization: float = 0.9  # share of the device's memory to use
    num_kv_blocks: int | None = None  # size of the KV cache, blocks; overrides the share
    json: bool = False  # print the report as JSON
    validate: bool = False  # compare with the H200 records instead; run in a clone of the repository

    def __post_init__(self) -> None:
        if self.search not in SEARCHES:
            raise ConfigError(f"search={self.search!r} is not one of {', '.join(SEARCHES)}")
        if self.search == "replicas" and not self.slo:
            raise ConfigError("search='replicas' needs objectives: give slo, such as ttft=200ms,tpot=20ms")
        if isinstance(self.replicas, bool) or not isinstance(self.replicas, int) or self.replicas < 1:
            raise ConfigError(f"replicas={self.replicas!r} must be a whole number of at least 1")
        if not 0 < self.share <= 1:
            raise ConfigError(f"share={self.share!r} must be above 0 and at most 1")
        if self.temperature is not None and not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature={self.temperature!r} must be at least 0")
        if self.validate and replace(self, validate=False) != SimulateOptions():
            raise ConfigError("validate=True compares with the records of one H200 and takes no other option")
