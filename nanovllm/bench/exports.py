"""A record in other tools' forms: the result of `vllm bench serve`, and the course's leaderboard entry.

Both show one run: the repeat with the median throughput. What a record cannot know stays null, and the leaderboard entry
says of itself that it is a teaching record: its schema forces a model band that a small model cannot claim.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from nanovllm.bench.load import Row
from nanovllm.bench.results import LATENCIES, percentile
from nanovllm.errors import ConfigError
from nanovllm.version import __version__

MANIFEST_SCHEMA = "leaderboard-export-manifest/v2"
NOTES = "teaching record, not for publication"
CONSTRAINT_METRICS = (
    "single_chip_effective_utilization_pct",
    "typical_throughput_ratio_vs_baseline",
    "typical_ttft_reduction_pct_vs_baseline",
    "typical_tpot_reduction_pct_vs_baseline",
    "long_context_length",
    "long_context_throughput_stable",
    *(f"long_context_{name}_{end}" for end in ("ms", "stable") for name in ("ttft_p95", "ttft_p99", "tpot_p95", "tpot_p99")),
    "unit_token_cost_reduction_pct",
    "multi_tenant_high_utilization",
)


def median_repeat(record: Mapping[str, Any]) -> int:
    """Which repeat has the median output throughput (the lower one of two)."""
    values = record["result_table"]["output_tok_s"]["repeats"]
    return sorted(range(len(values)), key=lambda repeat: values[repeat])[(len(values) - 1) // 2]


def vllm_result(record: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """The keys of `vllm bench serve --save-result`."""
    repeat = median_repeat(record)
    own = [row for row in rows if row.repeat == repeat]
    good = [row for row in own if not row.error]
    figures = {name: line["repeats"][repeat] for name, line in record["result_table"].items()}
    parameters, settings = record["workload"]["parameters"], record["settings"]
    result = {
        "date": re.sub(r"[-:]", "", record["environment"]["time"][:19]).replace("T", "-"),
        "endpoint_type": "openai-chat" if settings.get("form") == "chat" else "openai",
        "backend": "openai-chat" if settings.get("form") == "chat" else "openai",
        "label": record["name"],
        "model_id": record["model"],
        "tokenizer_id": record["model"],
        "num_prompts": record["num_requests"],
        "request_rate": parameters.get("rate", "inf"),
        "burstiness": 1.0 if "spread" in parameters else None,
        "max_concurrency": settings.get("max_concurrency"),
        "duration": record["seconds"][repeat],
        "completed": len(good),
        "failed": len(own) - len(good),
        "total_input_tokens": sum(row.num_input for row in good),
        "total_output_tokens": sum(row.num_output for row in good),
        "request_throughput": figures["requests_per_s"],
        "request_goodput": figures.get("goodput_per_s"),
        "output_throughput": figures["output_tok_s"],
        "total_token_throughput": figures["total_tok_s"],
        "max_output_tokens_per_s": busiest_second(good),
        "max_concurrent_requests": most_at_once(good),
        "rtfx": 0.0,  # of audio models
    }
    for name, values_of in LATENCIES.items():
        key = "e2el_ms" if name == "e2e_ms" else name
        values = [value for row in good for value in values_of(row)]
        result |= {
            f"mean_{key}": figures.get(f"{name}.mean"),
            f"median_{key}": figures.get(f"{name}.p50"),
            f"std_{key}": figures.get(f"{name}.std"),
            f"p99_{key}": round(percentile(values, 99), 4) if values else None,
        }
    return result


def busiest_second(rows: Sequence[Row]) -> float | None:
    """Tokens in the fullest second since the start, an event counting as its share of the request's tokens; None: not known."""
    seconds: dict[int, float] = {}
    for row in rows:
        if not row.itl_ms and row.num_output > 1:
            return None
        at, share = row.sent_ms + row.ttft_ms, row.num_output / (len(row.itl_ms) + 1)
        for gap in (0.0, *row.itl_ms):
            at += gap
            seconds[int(at // 1000)] = seconds.get(int(at // 1000), 0.0) + share
    return round(max(seconds.values(), default=0.0), 2)


def most_at_once(rows: Sequence[Row]) -> int:
    changes = sorted([(row.sent_ms, 1) for row in rows] + [(row.sent_ms + row.latency_ms, -1) for row in rows])
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def leaderboard_entry(record: Mapping[str, Any], submitter: str, peak_mem_mb: float | None = None) -> dict[str, Any]:
    """Schema leaderboard_v1. Raises `ConfigError` when the record does not know what the schema demands."""
    plan = record.get("memory_plan")
    if peak_mem_mb is None and plan:
        peak_mem_mb = sum(plan[name] for name in ("weights", "activations", "rows", "kv_cache")) / 1e6
    if peak_mem_mb is None:
        raise ConfigError("a record of a server does not know its memory, and a leaderboard entry needs it: give --peak-mem-mb")
    table, environment, workload = record["result_table"], record["environment"], record["workload"]
    key = hashlib.sha256(f"{record['name']}|{environment['time']}|{workload['checksum']}".encode()).hexdigest()
    num_failed, num_all = sum(table["failed"]["repeats"]), record["num_requests"] * len(record["seconds"])
    return {
        "entry_id": str(uuid.uuid5(uuid.NAMESPACE_URL, key)),
        "engine": "nanovllm",
        "engine_version": __version__,
        "config_type": "multi_gpu" if len(environment["gpus"]) > 1 else "single_gpu",
        "hardware": _hardware(environment),
        "model": _model(record),
        "workload": {
            "name": workload["name"],
            "input_length": round(workload["input_tokens"]["median"]),
            "output_length": round(workload["output_tokens"]["median"]),
            "batch_size": None,
            "concurrent_requests": record["settings"].get("max_concurrency"),
            "dataset": f"{workload['name']}, seed {workload['seed']}, checksum {workload['checksum']}",
        },
        "metrics": {
            "ttft_ms": table["ttft_ms.mean"]["median"],
            "throughput_tps": table["output_tok_s"]["median"],
            "peak_mem_mb": round(peak_mem_mb, 1),
            "error_rate": num_failed / num_all,
            "tpot_ms": table["tpot_ms.mean"]["median"] if "tpot_ms.mean" in table else None,
            "tbt_ms": table["itl_ms.mean"]["median"] if "itl_ms.mean" in table else None,
        },
        "constraints": _constraints(),
        "cluster": None,
        "versions": {
            "protocol": "openai-v1",
            "backend": str(environment["libraries"].get("torch")),
            "core": environment["commit"] or __version__,
        },
        "environment": {"os": environment["system"], "python_version": environment["python"]},
        "metadata": {
            "submitted_at": environment["time"],
            "submitter": submitter,
            "data_source": f"nanovllm bench {record['kind']}",
            "reproducible_cmd": record["command"],
            "git_commit": environment["commit"],
            "notes": NOTES,
            "verified": False,
            "idempotency_key": key,
        },
    }


def _constraints() -> dict[str, Any]:
    """Nothing is claimed; the schema allows no other model band."""
    scope = {
        "domestic_chip_class": "none",
        "representative_model_band": "7B-13B",
        "representative_business_scenario": "teaching",
        "baseline_engine": "none",
        "owner_confirmed": None,
    }
    return {"scenario_source": "vllm-benchmark", "accountable_scope": scope, "metrics": dict.fromkeys(CONSTRAINT_METRICS)}


def _hardware(environment: Mapping[str, Any]) -> dict[str, Any]:
    gpus = environment["gpus"]
    chip = gpus[0].split(",")[0] if gpus else environment["processor"]
    vendors = {"nvidia": "NVIDIA", "amd": "AMD", "intel": "Intel", "arm": "Arm"}
    vendor = next((name for word, name in vendors.items() if word in chip.lower()), "unknown")
    count = max(1, len(gpus))
    return {"vendor": vendor, "chip_model": chip, "chip_count": count, "interconnect": "None" if count == 1 else "unknown"}


def _model(record: Mapping[str, Any]) -> dict[str, Any]:
    name = record["model"]
    short = name.rstrip("/").rpartition("/")[2]
    size = re.search(r"(\d+(?:\.\d+)?[BM])(?![a-zA-Z])", short, re.IGNORECASE)
    return {
        "canonical_id": f"hf:{name}" if name.count("/") == 1 and not name.startswith("/") else f"local:{short}",
        "repo_id": name,
        "short_name": short,
        "display_name": short,
        "name": name,
        "parameters": size[1].upper() if size else "unknown",
        "precision": record["precision"],
        "quantization": None,
    }


def leaderboard_manifest(entry: Mapping[str, Any], artifact: str) -> dict[str, Any]:
    """`artifact`: the file that holds the entry."""
    return {
        "schema_version": MANIFEST_SCHEMA,
        "generated_at": entry["metadata"]["submitted_at"],
        "entries": [{"idempotency_key": entry["metadata"]["idempotency_key"], "leaderboard_artifact": artifact}],
    }
