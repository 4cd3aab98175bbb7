"""`nanovllm simulate`: options, the run or search that they ask for, and what is printed.

    nanovllm simulate --gpu h200 --model qwen3-8b --workload poisson:rate=20,num_requests=2000,num_input=512 \
        --slo ttft=200ms,tpot=20ms --search replicas

Imports no torch. The report goes to standard output, progress to standard error.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from typing import Any

from tqdm import tqdm

from nanovllm.config import EngineConfig
from nanovllm.errors import ConfigError
from nanovllm.simulation.hardware import find_hardware
from nanovllm.simulation.report import Objectives, describe, summarize
from nanovllm.simulation.run import Deployment, deploy
from nanovllm.simulation.search import find_limits, find_replicas, run_replicas
from nanovllm.simulation.shapes import find_shape
from nanovllm.simulation.validate import describe_lines, validate
from nanovllm.workloads import Workload, parse_workload

SEARCHES = ("none", "replicas", "limits")
PROGRESS_REQUESTS = 5000  # runs of at least so many show a bar, on a terminal


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

    def deployment(self, workload: Workload) -> Deployment:
        names = ("max_num_seqs", "max_num_batched_tokens", "max_prompt_chunk", "max_model_len", "scheduling_policy")
        names += ("enable_prefix_caching", "enforce_eager", "gpu_memory_utilization", "num_kv_blocks")
        config = EngineConfig(**{name: getattr(self, name) for name in names})
        temperature = workload.temperature if self.temperature is None else self.temperature
        has_server = not workload.is_all_at_once if self.server is None else self.server
        if not has_server and not workload.is_all_at_once:
            raise ConfigError(f"server=False: the requests of workload={self.workload!r} do not all come at once")
        shape, hardware = find_shape(self.model), find_hardware(self.gpu)
        return replace(deploy(shape, hardware, config, is_greedy=temperature == 0), has_server=has_server)


def run_simulation(options: SimulateOptions) -> int:
    if options.validate:
        print(describe_lines(validate()))
        return 0
    report = simulate_options(options)
    print(json.dumps(report, indent=1) if options.json else _describe(report))
    return 0


def simulate_options(options: SimulateOptions) -> dict[str, Any]:
    """The whole answer as a dictionary; equal options give equal answers."""
    workload = parse_workload(options.workload, options.workload_seed)
    deployment = options.deployment(workload)
    objectives = Objectives.parse(options.slo)
    report: dict[str, Any] = {
        "through": "a server" if deployment.has_server else "LLM.generate",
        "gpu": options.gpu,
        "is_calibrated": deployment.hardware.is_calibrated,
        "model": options.model,
        "workload": options.workload,
        "workload_seed": options.workload_seed,
        "workload_checksum": workload.checksum,
        "slo": options.slo,
        "num_kv_blocks": deployment.num_blocks,
        "limits": _limits(deployment),
    }
    if options.search == "replicas":
        number, tried = find_replicas(deployment, workload, objectives, options.share, _note)
        best = tried[number or max(tried)]
        report |= {"replicas": number or max(tried), "replicas_needed": number, "share_wanted": options.share}
        report["tried"] = {str(count): tried[count]["goodput_share"] for count in sorted(tried)}
    elif options.search == "limits":
        rows = find_limits(deployment, workload, objectives, options.replicas, _note)
        best = {name: value for name, value in rows[0].items() if name not in ("max_num_seqs", "max_num_batched_tokens")}
        report |= {"replicas": options.replicas, "limits": {**report["limits"], **_pair(rows[0])}}
        report["tried"] = [{**_pair(row), **{name: row[name] for name in ("goodput_share", "output_tok_s")}} for row in rows]
    else:
        best = _run(deployment, workload, objectives, options.replicas)
        report["replicas"] = options.replicas
    return {**report, "result": best}


def _run(deployment: Deployment, workload: Workload, objectives: Objectives, num_replicas: int) -> dict[str, Any]:
    total = len(workload.requests)
    with tqdm(
        total=total, desc="Simulating", unit="req", disable=None if total >= PROGRESS_REQUESTS else True, mininterval=0.5
    ) as bar:
        return summarize(deployment, run_replicas(deployment, workload, num_replicas, bar.update), objectives)


def _pair(row: dict[str, Any]) -> dict[str, int]:
    return {name: row[name] for name in ("max_num_seqs", "max_num_batched_tokens")}


def _limits(deployment: Deployment) -> dict[str, Any]:
    limits = deployment.limits
    return {name: getattr(limits, name) for name in type(limits).__dataclass_fields__}


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _describe(report: dict[str, Any]) -> str:
    kind = "calibrated" if report["is_calibrated"] else "NOT calibrated: see docs/simulator.md"
    limits = report["limits"]
    lines = [
        f"{report['model']} on {report['replicas']} x {report['gpu']} ({kind}), {report['num_kv_blocks']:,} KV blocks, "
        f"max_num_seqs={limits['max_num_seqs']}, max_num_batched_tokens={limits['max_num_batched_tokens']}, "
        f"through {report['through']}",
        describe(report["result"]),
    ]
    if "replicas_needed" in report:
        needed = report["replicas_needed"]
        answer = (
            ("1 replica meets" if needed == 1 else f"{needed} replicas meet")
            if needed
            else f"no number of replicas (up to {report['replicas']}) meets"
        )
        lines.append(f"answer    {answer} {report['slo']} for {report['share_wanted']:.1%} of the requests")
    elif "tried" in report:
        lines.append(f"answer    best of {len(report['tried'])} pairs of limits; they are in the first line")
    return "\n".join(lines)
