"""`nanovllm simulate` as a user meets it: reports, searches, workloads, refusals, and no torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from nanovllm.cli import main
from nanovllm.errors import ConfigError
from nanovllm.simulation.command import SimulateOptions, simulate_options
from nanovllm.simulation.report import Objectives, percentile
from nanovllm.workloads import MAKERS, PRESETS, make_workload, write_trace

SMALL = "poisson:rate=50,num_requests=30,num_input=64,num_output=8"


def test_a_report_is_printed_for_people(capsys):
    assert main(["simulate", "--gpu", "h200", "--model", "qwen3-8b", "--workload", SMALL, "--slo", "ttft=200ms,tpot=20ms"]) == 0
    out = capsys.readouterr().out
    assert "qwen3-8b on 1 x h200 (calibrated)" in out
    assert "goodput" in out and "TTFT" in out and "100.00% of all" in out


def test_a_card_that_was_not_measured_says_so(capsys):
    assert main(["simulate", "--gpu", "l4", "--workload", SMALL]) == 0
    assert "NOT calibrated" in capsys.readouterr().out


WITHOUT_TORCH = """
import sys
sys.modules.update(torch=None, numpy=None, triton=None, transformers=None)  # importing one of them is an error now
from nanovllm.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--slo", "ttft=200ms,tpot=20ms", "--search", "replicas"],
        ["--slo", "ttft=200ms", "--search", "limits", "--max-num-seqs", "32"],
        ["--gpu", "cpu", "--model", "smollm2-135m"],
    ],
)
def test_equal_seeds_give_equal_bytes_where_torch_cannot_be_imported(options):
    command = [sys.executable, "-c", WITHOUT_TORCH, "simulate", "--json", "--workload", SMALL, "--workload-seed", "4", *options]
    first, second = (subprocess.run(command, capture_output=True) for _ in range(2))
    assert first.returncode == 0, first.stderr.decode()
    assert first.stdout == second.stdout
    report = json.loads(first.stdout)
    assert report["result"]["requests"] == 30 and report["result"]["output_tokens"] == 240


def test_the_smallest_number_of_replicas_is_found_and_one_less_is_not_enough():
    load = "poisson:rate=300,num_requests=200,num_output=16"
    options = {"gpu": "l4", "model": "qwen3-0.6b", "workload": load, "slo": "ttft=150ms,tpot=20ms"}
    report = simulate_options(SimulateOptions(**options, search="replicas", share=0.95))
    needed = report["replicas_needed"]
    assert needed > 1
    assert report["result"]["goodput_share"] >= 0.95
    fewer = simulate_options(SimulateOptions(**options, replicas=needed - 1))
    assert fewer["result"]["goodput_share"] < 0.95


def test_objectives_that_no_number_of_replicas_meets_are_said_to_be_so(capsys):
    options = [
        "--workload",
        "poisson:rate=50,num_requests=6,num_input=64,num_output=2",
        "--slo",
        "ttft=1us",
        "--search",
        "replicas",
    ]
    assert main(["simulate", *options]) == 0
    assert "no number of replicas (up to 6) meets ttft=1us" in capsys.readouterr().out


def test_the_best_limits_are_not_worse_than_any_that_were_tried():
    options = SimulateOptions(
        workload="fixed:num_requests=12,num_input=600,num_output=8", slo="ttft=30ms", search="limits", max_num_seqs=64
    )
    report = simulate_options(options)
    pairs = {(row["max_num_seqs"], row["max_num_batched_tokens"]) for row in report["tried"]}
    assert len(pairs) == len(report["tried"]) == 12
    assert (report["limits"]["max_num_seqs"], report["limits"]["max_num_batched_tokens"]) in pairs
    assert report["result"]["goodput_share"] == max(row["goodput_share"] for row in report["tried"])


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("gpu", "h201", "gpu='h201'.*h200"),
        ("model", "nothing", "model='nothing'"),
        ("workload", "poison:rate=1", "workload 'poison'.*poisson"),
        ("workload", "poisson:rat=1", "workload 'poisson' has no parameter 'rat'.*rate"),
        ("workload", "poisson:rate=0", "rate=0 must be a number above 0"),
        ("workload", "poisson:rate", "'rate' is not of the form"),
        ("workload", "fixed:num_requests=0", "num_requests=0 must be a whole number"),
        ("workload", "trace:path=/nowhere", "path='/nowhere' cannot be read"),
        ("server", False, "server=False.*do not all come at once"),
        ("slo", "ttft=200", "slo='ttft=200'.*unit"),
        ("slo", "ttf=2s", "slo='ttf=2s'.*ttft"),
        ("replicas", 0, "replicas=0"),
        ("share", 1.5, "share=1.5"),
        ("temperature", -1.0, "temperature=-1.0"),
        ("search", "replicas", "search='replicas' needs objectives"),
        ("search", "all", "search='all' is not one of"),
        ("max_num_seqs", 0, "max_num_seqs=0"),
        ("scheduling_policy", "fifo", "scheduling_policy='fifo'"),
        ("validate", True, "validate=True compares .* no other option"),  # a workload is given too
    ],
)
def test_errors_name_the_option(option, value, message):
    with pytest.raises(ConfigError, match=message):
        simulate_options(SimulateOptions(**{"workload": SMALL, option: value}))


def test_a_burst_goes_through_generate_unless_a_server_is_asked_for():
    load = {"workload": "fixed:num_requests=20,num_input=64,num_output=4"}
    offline, online = (simulate_options(SimulateOptions(**load, server=server)) for server in (None, True))
    assert (offline["through"], online["through"]) == ("LLM.generate", "a server")
    assert online["result"]["ttft_ms"]["p50"] > offline["result"]["ttft_ms"]["p50"] + 1


def test_a_model_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="does not fit"):
        simulate_options(SimulateOptions(gpu="a10g", model="qwen3-32b", workload=SMALL))


def test_percentiles_interpolate_linearly():
    assert percentile([1.0, 2.0, 3.0, 4.0], 50) == 2.5
    assert percentile([1.0, 2.0], 99) == pytest.approx(1.99)
    assert percentile([7.0], 99) == 7.0


def test_objectives_have_units():
    assert Objectives.parse("ttft=200ms,latency=1.5s,tpot=500us") == Objectives(0.2, 0.0005, 1.5)


# --- workloads


@pytest.mark.parametrize("name", [*MAKERS, *PRESETS])
def test_every_workload_of_the_benchmarks_is_simulated(name, tmp_path):
    text = {
        "nano-vllm": "nano-vllm:num_requests=20",
        "multi-tenant": "multi-tenant:seconds=10,scale=4",
        "trace": f"trace:path={tmp_path / 'trace.jsonl'}",
    }.get(name, name)
    write_trace(make_workload("multi-turn", num_sessions=3), tmp_path / "trace.jsonl")
    parameters = {"nano-vllm": {"num_requests": 20}, "multi-tenant": {"seconds": 10.0, "scale": 4}}.get(name, {})
    workload = make_workload(name, **({"path": str(tmp_path / "trace.jsonl")} if name == "trace" else parameters))
    report = simulate_options(SimulateOptions(workload=text))
    assert report["workload_checksum"] == workload.checksum
    assert report["result"]["requests"] == len(workload.requests)
    assert report["result"]["output_tokens"] == sum(one.num_output for one in workload.requests)
