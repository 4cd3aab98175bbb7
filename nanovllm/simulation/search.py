"""Searches: the smallest number of replicas, and the best limits, by running the simulation for each candidate.

Replicas get requests in turn (round-robin), the later turns of a conversation where it began, and know nothing of each
other. More replicas never make a load worse beyond
noise, so their number is doubled until the objectives hold, and then bisected. Limits are a small grid, tried in full;
the cache keeps the size that it has with the limits that were asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from nanovllm.simulation.report import Objectives, summarize
from nanovllm.simulation.run import Deployment, Run, simulate
from nanovllm.workloads import Workload, deal

NUM_SEQUENCES = (32, 64, 128, 256, 512)  # tried for max_num_seqs, up to what was asked for
BUDGETS = (512, 1024, 2048, 4096, 8192, 16_384)  # tried for max_num_batched_tokens
MAX_REPLICAS = 1024


def run_replicas(
    deployment: Deployment, workload: Workload, num_replicas: int, on_finish: Callable[[], object] = lambda: None
) -> list[Run]:
    """One run for each replica that got a request."""
    shares = [share for _, share in deal(workload.requests, num_replicas) if share]
    return [simulate(deployment, share, on_finish=on_finish) for share in shares]


def find_replicas(
    deployment: Deployment, workload: Workload, objectives: Objectives, share: float, note: Callable[[str], None]
) -> tuple[int | None, dict[int, dict[str, Any]]]:
    """The smallest number of replicas with which at least `share` of the requests meet the objectives; None: no number does."""
    tried: dict[int, dict[str, Any]] = {}

    def is_enough(number: int) -> bool:
        tried[number] = summarize(deployment, run_replicas(deployment, workload, number), objectives)
        note(f"{number} replica{'s' * (number > 1)}: {tried[number]['goodput_share']:.2%} within the objectives")
        return tried[number]["goodput_share"] >= share

    limit = min(MAX_REPLICAS, len(workload.requests))
    low, high = 0, 1  # `low` is not enough
    while not is_enough(high):
        if high == limit:
            return None, tried
        low, high = high, min(2 * high, limit)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high, tried


def find_limits(
    deployment: Deployment, workload: Workload, objectives: Objectives, num_replicas: int, note: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Every pair of limits with its report, best first: by share within the objectives, then by output per second."""
    rows = []
    for candidate in _candidates(deployment):
        report = summarize(candidate, run_replicas(candidate, workload, num_replicas), objectives)
        limits = candidate.limits
        rows.append({"max_num_seqs": limits.max_num_seqs, "max_num_batched_tokens": limits.max_num_batched_tokens, **report})
        note(
            f"max_num_seqs={limits.max_num_seqs} max_num_batched_tokens={limits.max_num_batched_tokens}: "
            f"{report['goodput_share']:.2%}, {report['output_tok_s']:,.0f} tok/s"
        )
    return sorted(rows, key=_badness)


def _candidates(deployment: Deployment) -> Iterator[Deployment]:
    limits = deployment.limits
    sequences: Sequence[int] = sorted({*(n for n in NUM_SEQUENCES if n < limits.max_num_seqs), limits.max_num_seqs})
    for max_num_seqs in sequences:
        for budget in sorted({*BUDGETS, limits.max_num_batched_tokens}):
            yield replace(deployment, limits=replace(limits, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget))


def _badness(row: dict[str, Any]) -> tuple[float, float, int, int]:
    return -row["goodput_share"], -row["output_tok_s"], row["max_num_seqs"], row["max_num_batched_tokens"]
