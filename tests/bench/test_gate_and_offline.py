"""The regression gate, and the offline benchmark on a fake executor and on the real model."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from live_server import write_tiny_model
from support import greedy, make_engine

from nanovllm.bench.check import check_record
from nanovllm.bench.offline import run_workload
from nanovllm.bench.record import read_record
from nanovllm.cli import main
from nanovllm.workloads import make_workload

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def gate():
    spec = importlib.util.spec_from_file_location("regression_gate", ROOT / "scripts/regression_gate.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["regression_gate"] = module
    spec.loader.exec_module(module)
    return module


def test_greedy_tokens_of_the_embedded_model_are_the_stored_ones(gate, capsys):
    assert gate.check_correctness(is_update=False) == 0, capsys.readouterr().out


def test_a_changed_token_is_named(gate):
    expected = json.loads(gate.GOLDEN.read_text())
    first = next(iter(expected))
    got = {**expected, first: [*expected[first][:5], 1, *expected[first][6:]]}
    (line,) = gate.differences(expected, got)
    assert repr(first) in line and "token 5" in line
    assert gate.differences(expected, expected) == []


def test_the_gate_fails_for_a_loss_passes_without_one_and_skips_in_noise(gate):
    quiet, slower = [100.0, 101.0, 99.0, 100.5, 99.5], [90.0, 91.0, 89.0, 90.5, 89.5]
    assert gate.judge(quiet, slower, 0.03, 0.15)[0] == "failed"
    assert gate.judge(quiet, quiet, 0.03, 0.15)[0] == gate.judge(slower, quiet, 0.03, 0.15)[0] == "passed"
    noisy = [60.0, 130.0, 100.0, 80.0, 120.0]
    assert gate.judge(noisy, slower, 0.03, 0.15)[0] == "skipped"


def test_an_open_workload_offline_keeps_arrivals_turns_and_lengths():
    engine = make_engine(num_blocks=512, seconds_per_step=0.005)
    llm = SimpleNamespace(engine=engine)
    workload = make_workload(
        "multi-turn", num_sessions=3, rate=30.0, num_turns=3, system=8, message=4, num_output=4, think_s=0.02, vocabulary=40
    )
    rows, seconds = run_workload(llm, workload, 0)
    assert [row.num_output for row in rows] == [4] * 9 and not any(row.error for row in rows)
    for row, request in zip(rows, workload.requests):
        if request.after is not None:
            assert row.sent_ms >= rows[request.after].sent_ms + rows[request.after].latency_ms + 20 - 1
        assert row.ttft_ms >= 4.5 and row.latency_ms >= 4 * 5 - 1
    assert seconds * 1e3 >= max(row.sent_ms + row.latency_ms for row in rows) - 1
    assert greedy(1).max_tokens == 1 and not engine.has_work


def test_the_offline_command_writes_a_complete_record(tmp_path, capsys):
    options = [
        "--workload",
        "nano-vllm",
        "--set",
        "num_requests=3",
        "--set",
        "shortest=4",
        "--set",
        "longest=8",
        "--repeats",
        "2",
    ]
    model = write_tiny_model(tmp_path / "tiny")
    engine = ["--model", str(model), "--max-model-len", "128", "--kv-cache-memory-bytes", str(2**25), "--num-threads", "1"]
    assert (
        main(["bench", "offline", *options, *engine, "--record", "small", "--folder", str(tmp_path), "--print-effective-config"])
        == 0
    )
    out = capsys.readouterr().out
    fixed, _ = json.JSONDecoder().raw_decode(out)
    assert fixed["workload"]["parameters"]["longest"] == 8 and fixed["engine"]["max_num_batched_tokens"] == 2048
    path = Path(out.splitlines()[-1])
    assert check_record(path) == []
    record = read_record(path)
    energy = record["energy"]
    assert energy["joules"] or len(energy["missing"]) == 2  # a figure, or why there is none
    assert (record["kind"], record["max_model_len"], record["settings"]["engine"]["num_threads"]) == ("offline", 128, 1)
    assert main(["bench", "export", str(path), "--format", "leaderboard"]) == 0  # an engine knows its memory
    assert json.loads(capsys.readouterr().out)["metrics"]["peak_mem_mb"] > 1


def test_kernels_say_that_they_need_a_gpu(capsys):
    assert main(["bench", "kernels"]) == 1
    assert "no CUDA device" in capsys.readouterr().err
