"""`nanovllm bench offline`: a workload on an engine in this process, without a server.

What arrives at once goes through `LLM.generate`, as nano-vllm's benchmark does. Otherwise requests are added at their
times while the loop turns. Times are the engine's own, so a row's TTFT has no network in it. The only module of the kit
that reaches torch, and only when it runs.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from nanovllm.bench.load import Row
from nanovllm.bench.record import command_line, write_record
from nanovllm.bench.serve import Plan, Run, describe_repeat
from nanovllm.energy import EnergyMeter
from nanovllm.sampling_params import SamplingParams
from nanovllm.workloads import Request, Workload

if TYPE_CHECKING:
    from nanovllm.llm import LLM
    from nanovllm.outputs import GenerationOutput


def run_offline(llm: LLM, plan: Plan, name: str = "offline") -> Run:
    run = Run(plan, EnergyMeter())
    for number in range(plan.warmup_repeats):
        _, seconds = run_workload(llm, plan.part(-1 - number), 0)
        run.warmup_s.append(round(seconds, 3))
    for repeat in range(plan.repeats):
        run.order.append(repeat)
        part = plan.part(repeat)
        run.begin()
        figures = run.add(*run_workload(llm, part, repeat))
        print(describe_repeat(f"{name} {repeat + 1}/{plan.repeats}", figures), flush=True)
    return run


def run_workload(llm: LLM, workload: Workload, repeat: int) -> tuple[list[Row], float]:
    """(a row per request, seconds)."""
    is_at_once = all(one.arrival_s == 0 and one.after is None for one in workload.requests)
    run = _run_at_once if is_at_once else _run_by_arrival
    start, started = time.monotonic(), time.perf_counter()
    outputs, due = run(llm, workload)
    seconds = time.perf_counter() - started
    return [
        _row(repeat, index, workload.requests[index], output, start, due[index]) for index, output in enumerate(outputs)
    ], seconds


def _params(workload: Workload, request: Request) -> SamplingParams:
    return SamplingParams(temperature=workload.temperature, ignore_eos=True, max_tokens=request.num_output)


def _run_at_once(llm: LLM, workload: Workload) -> tuple[list[GenerationOutput], list[float]]:
    params = [_params(workload, one) for one in workload.requests]
    now = time.monotonic()
    outputs = llm.generate([list(one.prompt) for one in workload.requests], params, use_tqdm=False)
    return outputs, [now] * len(outputs)


def _run_by_arrival(llm: LLM, workload: Workload) -> tuple[list[GenerationOutput], list[float]]:
    engine, requests = llm.engine, workload.requests
    start = time.monotonic()
    due = {index: start + one.arrival_s for index, one in enumerate(requests) if one.after is None}
    left, outputs = dict(due), {}
    index_of: dict[str, int] = {}
    while left or engine.has_work:
        now = time.monotonic()
        for index in [index for index, at in left.items() if at <= now]:
            request_id = engine.add_request(list(requests[index].prompt), _params(workload, requests[index]))
            index_of[request_id] = index
            del left[index]
        if not engine.has_work:
            time.sleep(max(0.0, min(left.values()) - time.monotonic()))
            continue
        for output in engine.step():
            if output.finished:
                ended = index_of[output.request_id]
                outputs[ended] = output
                following = {i: time.monotonic() + one.arrival_s for i, one in enumerate(requests) if one.after == ended}
                left |= following
                due |= following
    return [outputs[index] for index in range(len(requests))], [due[index] for index in range(len(requests))]


def _row(repeat: int, index: int, request: Request, output: GenerationOutput, start: float, due: float) -> Row:
    times = output.metrics
    first, end = times.first_token_time or times.arrival_time, times.finish_time or times.arrival_time
    count = times.num_generated_tokens
    return Row(
        repeat=repeat,
        index=index,
        tenant=request.tenant,
        sent_ms=round((times.arrival_time - start) * 1e3, 3),
        lag_ms=round(max(0.0, times.arrival_time - due) * 1e3, 3),
        connect_ms=0.0,
        ttft_ms=round((first - times.arrival_time) * 1e3, 3),
        latency_ms=round((end - times.arrival_time) * 1e3, 3),
        num_input=times.num_prompt_tokens,
        num_output=count,
        itl_ms=[],  # the engine keeps the first and the last time only
        error="" if count == request.num_output else f"{count} tokens instead of {request.num_output}",
    )


def write_offline_record(llm: LLM, run: Run, name: str, note: str, folder: Path) -> Path:
    config = {key: value for key, value in asdict(llm.config).items() if key != "model"}
    return write_record(
        name,
        rows=[asdict(row) for row in run.rows],
        folder=folder,
        kind="offline",
        model=llm.config.model or "SmolLM2-135M-Instruct (embedded)",
        precision=llm.config.dtype,
        max_model_len=llm.engine.max_model_len,
        command=command_line(),
        settings={"engine": config, **run.plan.settings},
        memory_plan=asdict(llm.memory_plan),
        note=note,
        **run.content(),
    )
