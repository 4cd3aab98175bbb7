"""Writes `deploy/observability/grafana-dashboard.json`: the panels are a table here, and the JSON is made of it.

python scripts/dashboard.py            # write
python scripts/dashboard.py --check    # fail when the file is not current
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

PATH = Path(__file__).resolve().parent.parent / "deploy" / "observability" / "grafana-dashboard.json"
WIDTH, HEIGHT, COLUMNS = 8, 8, 3
RANGE = "$__rate_interval"


def quantiles(name: str) -> list[tuple[str, str]]:
    return [
        (f"p{round(share * 100)}", f"histogram_quantile({share}, sum by (le) (rate({name}_bucket[{RANGE}])))")
        for share in (0.5, 0.9, 0.99)
    ]


def rate(name: str, by: str = "") -> str:
    return f"sum {f'by ({by}) ' if by else ''}(rate({name}[{RANGE}]))"


def mean(name: str) -> str:
    return f"{rate(f'{name}_sum')} / {rate(f'{name}_count')}"


def share(work: str, peak: str) -> str:
    """Of what the devices could have done in the time that they worked."""
    return f"{rate(work)} / sum({peak} * on (instance, model_name) rate({DEVICE}[{RANGE}]))"


STEPS, DEVICE = "nanovllm:engine_steps_total", "nanovllm:engine_forward_seconds_total"
ENERGY, GENERATED = "nanovllm:energy_joules_total", rate("vllm:generation_tokens_total")
PANELS: list[tuple[str, str, list[tuple[str, str]]]] = [  # title, unit, (legend, query)
    ("Time to first token", "s", quantiles("vllm:time_to_first_token_seconds")),
    (
        "Time to first token by part (mean)",
        "s",
        [(part, mean(f"nanovllm:ttft_{part}_seconds")) for part in ("queue", "prefill", "first_decode", "front_end")],
    ),
    ("Time per output token", "s", quantiles("vllm:request_time_per_output_token_seconds")),
    ("Time between tokens", "s", quantiles("vllm:inter_token_latency_seconds")),
    ("End to end", "s", quantiles("vllm:e2e_request_latency_seconds")),
    ("Queue time", "s", quantiles("vllm:request_queue_time_seconds")),
    (
        "Tokens per second",
        "short",
        [("prompt", rate("vllm:prompt_tokens_total")), ("generated", GENERATED)],
    ),
    ("Requests per second, by end", "reqps", [("{{finished_reason}}", rate("vllm:request_success_total", "finished_reason"))]),
    ("Refused per second, by reason", "reqps", [("{{reason}}", rate("nanovllm:requests_refused_total", "reason"))]),
    (
        "Sequences",
        "short",
        [
            ("running", "sum(vllm:num_requests_running)"),
            ("waiting: {{reason}}", "sum by (reason) (nanovllm:num_requests_waiting_by_reason)"),
        ],
    ),
    ("KV cache in use", "percentunit", [("{{instance}}", "vllm:kv_cache_usage_perc")]),
    (
        "Prefix cache hit rate",
        "percentunit",
        [("hits", f"{rate('vllm:prefix_cache_hits_total')} / {rate('vllm:prefix_cache_queries_total')}")],
    ),
    (
        "Preemptions and evictions per second",
        "short",
        [
            ("preemptions", rate("vllm:num_preemptions_total")),
            ("evicted blocks", rate("nanovllm:prefix_cache_evictions_total")),
        ],
    ),
    (
        "Time per step",
        "s",
        [
            ("device", f"{rate(DEVICE)} / {rate(STEPS)}"),
            ("host: scheduling", f"{rate('nanovllm:engine_schedule_seconds_total')} / {rate(STEPS)}"),
            ("host: applying", f"{rate('nanovllm:engine_apply_seconds_total')} / {rate(STEPS)}"),
        ],
    ),
    (
        "Roofline: share of the device's peak",
        "percentunit",
        [
            ("of the roof", f"{rate('nanovllm:engine_roof_seconds_total')} / {rate(DEVICE)}"),
            ("bandwidth", share("nanovllm:engine_model_bytes_total", "nanovllm:device_peak_bytes_per_second")),
            ("operations", share("nanovllm:engine_model_operations_total", "nanovllm:device_peak_operations_per_second")),
        ],
    ),
    (
        "Bytes per second while the device works",
        "Bps",
        [("moved", f"{rate('nanovllm:engine_model_bytes_total')} / {rate(DEVICE)}")],
    ),
    ("Tokens per step", "short", [("tokens", f"{rate('nanovllm:engine_computed_tokens_total')} / {rate(STEPS)}")]),
    ("Power, where the hardware tells", "watt", [("{{instance}} {{device}}", rate(ENERGY, "instance, device"))]),
    (
        "Joules per token, where the hardware tells",
        "joule",
        [
            ("per generated token", f"{rate(ENERGY)} / ({GENERATED} > 0)"),
            ("per token, prompts included", f"{rate(ENERGY)} / ({rate('vllm:prompt_tokens_total')} + {GENERATED} > 0)"),
        ],
    ),
    ("HTTP responses per second", "reqps", [("{{status}}", rate("nanovllm:http_responses_total", "status"))]),
]


def panel(number: int, title: str, unit: str, queries: list[tuple[str, str]]) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    targets = [
        {"refId": chr(ord("A") + index), "datasource": source, "expr": query, "legendFormat": legend}
        for index, (legend, query) in enumerate(queries)
    ]
    return {
        "id": number + 1,
        "title": title,
        "type": "timeseries",
        "datasource": source,
        "gridPos": {"h": HEIGHT, "w": WIDTH, "x": number % COLUMNS * WIDTH, "y": number // COLUMNS * HEIGHT},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": targets,
    }


def dashboard() -> dict[str, Any]:
    return {
        "uid": "nanovllm",
        "title": "nanovllm",
        "tags": ["nanovllm", "vllm"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": [{"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"}]},
        "panels": [panel(number, *row) for number, row in enumerate(PANELS)],
    }


def main() -> int:
    text = json.dumps(dashboard(), indent=2) + "\n"
    if "--check" in sys.argv[1:]:
        is_current = PATH.is_file() and PATH.read_text(encoding="utf-8") == text
        if not is_current:
            print(f"{PATH.name} is not current: run python scripts/dashboard.py", file=sys.stderr)
        return 0 if is_current else 1
    PATH.parent.mkdir(parents=True, exist_ok=True)
    PATH.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
