"""`nanovllm simulate`: options, the run or search that they ask for, and what is printed.

    nanovllm simulate --gpu h200 --model qwen3-8b --workload poisson:rate=20,num_requests=2000,num_input=512 \
        --slo ttft=200ms,tpot=20ms --search replicas

Imports no torch. The report goes to standard output, progress to standard error.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from nanovllm.config import EngineConfig
from nanovllm.errors import ConfigError
from nanovllm.simulation.hardware import find_hardware
from nanovllm.simulation.options import SimulateOptions
from nanovllm.simulation.report import Objectives, describe, summarize
from nanovllm.simulation.run import Deployment, deploy
from nanovllm.simulation.search import find_limits, find_replicas, run_replicas
from nanovllm.simulation.shapes import find_shape
from nanovllm.simulation.validate import describe_lines, validate
from nanovllm.workloads import Workload, parse_workload

PROGRESS_REQUESTS = 5000  # runs of at least so many show a bar, on a terminal


def deployment_of(options: SimulateOptions, workload: Workload) -> Deployment:
    names = ("max_num_seqs", "max_num_batched_tokens", "max_prompt_chunk", "max_model_len", "scheduling_policy")
    names += ("enable_prefix_caching", "enforce_eager", "gpu_memory_utilization", "num_kv_blocks")
    config = EngineConfig(**{name: getattr(options, name) for name in names})
    temperature = workload.temperature if options.temperature is None else options.temperature
    has_server = not workload.is_all_at_once if options.server is None else options.server
    if not has_server and not workload.is_all_at_once:
        raise ConfigError(f"server=False: the requests of workload={options.workload!r} do not all come at once")
    shape, hardware = find_shape(options.model), find_hardware(options.gpu)
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
    deployment = deployment_of(options, workload)
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
