"""Workloads are data: the same everywhere, and what their names promise."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from math import inf
from pathlib import Path

import pytest

from nanovllm.errors import ConfigError
from nanovllm.workloads import Request, deal, make_workload, parse_parameters, shifted, write_trace

ROOT = Path(__file__).resolve().parents[1]
CHECKSUMS = {
    "nano-vllm": "33611acecf1cde71",
    "fixed": "4f012ece65fe4e70",
    "poisson": "42a8c292d36f19b6",
    "bursty": "4fd3f1a57dc72dbf",
    "shared-prefix": "b93c2f3b3119da24",
    "multi-turn": "7e5e7a311840e1e4",
    "long-context": "2d1f528fba109f39",
    "multi-tenant": "4cf677005c93ae60",
}
PROGRAM = """
import sys
from nanovllm.workloads import MAKERS, make_workload
print(*(f"{name} {make_workload(name).checksum}" for name in MAKERS if name != "trace"), sep="\\n")
sys.exit("torch" in sys.modules)
"""


def other_pythons() -> list[str]:
    """The oldest and the newest that this machine has."""
    found = {path.parent.parent.name: str(path) for path in Path.home().glob(".pyenv/versions/3.1*/bin/python")}
    found |= {f"3.{minor}": path for minor in range(10, 16) if (path := shutil.which(f"python3.{minor}"))}
    ordered = sorted(found, key=lambda version: int(version.split(".")[1]))
    return [found[version] for version in {*ordered[:1], *ordered[-1:]}]


@pytest.mark.parametrize("python", [sys.executable, *other_pythons()])
def test_checksums_are_the_same_in_every_python_and_no_torch_is_loaded(python):
    probe = subprocess.run([python, "-c", "import sys; sys.exit(sys.version_info < (3, 10))"], capture_output=True)
    if probe.returncode:
        pytest.skip("too old, or does not start")
    command = [python, "-c", PROGRAM]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)})
    assert ran.returncode == 0, ran.stderr
    assert dict(line.split() for line in ran.stdout.splitlines()) == CHECKSUMS


def test_the_seeds_workload_is_that_of_nano_vllm():
    random.seed(0)
    prompts = [[random.randint(0, 10000) for _ in range(random.randint(100, 1024))] for _ in range(256)]
    lengths = [random.randint(100, 1024) for _ in range(256)]
    workload = make_workload("nano-vllm")
    assert [list(one.prompt) for one in workload.requests] == prompts
    assert [one.num_output for one in workload.requests] == lengths
    assert workload.temperature == 0.6


def test_whatever_is_sent_or_when_changes_the_checksum():
    known = {make_workload("poisson").checksum}
    for change in (
        {"seed": 1},
        {"rate": 5.0},
        {"num_input": 255},
        {"num_output": 127},
        {"vocabulary": 9999},
        {"num_requests": 199},
    ):
        known.add(make_workload("poisson", **change).checksum)
    assert len(known) == 7


def test_arrivals_have_the_rate_that_was_asked_for():
    for name in ("poisson", "bursty"):
        requests = make_workload(name, num_requests=4000, rate=10.0, num_input=1).requests
        assert requests[-1].arrival_s == pytest.approx(400, rel=0.2)
    gaps = {round(one.arrival_s, 6) for one in make_workload("bursty", num_requests=64, burst=16, num_input=1).requests}
    assert len(gaps) == 4
    assert {one.arrival_s for one in make_workload("poisson", rate=inf, num_input=1).requests} == {0.0}


def test_documents_are_shared_and_questions_are_not():
    requests = make_workload("shared-prefix", num_documents=3, document=50, question=5).requests
    assert len({one.prompt[:50] for one in requests}) == 3
    assert len({one.prompt[50:] for one in requests}) == len(requests)


def test_a_turn_contains_the_whole_conversation_before_it():
    requests = make_workload("multi-turn", num_sessions=3, num_turns=4).requests
    assert sum(one.after is None for one in requests) == 3
    for one in requests:
        if one.after is not None:
            before = requests[one.after]
            assert one.prompt[: len(before.prompt)] == before.prompt
            assert len(one.prompt) == len(before.prompt) + before.num_output + 64


def test_tenants_have_their_own_shapes_and_come_in_order():
    requests = make_workload("multi-tenant").requests
    lengths = {tenant: {len(one.prompt) for one in requests if one.tenant == tenant} for tenant in ("chat", "batch", "report")}
    assert lengths == {"chat": {128}, "batch": {64}, "report": {1024}}
    assert [one.arrival_s for one in requests] == sorted(one.arrival_s for one in requests)


def test_a_shifted_workload_shares_the_same_things_in_other_words():
    workload = make_workload("shared-prefix", num_requests=20, document=40)
    other = shifted(workload, 2)
    assert other.checksum != workload.checksum and shifted(workload, 0).checksum == workload.checksum
    flat = [token for one in workload.requests for token in one.prompt]
    moved = [token for one in other.requests for token in one.prompt]
    assert len(set(zip(flat, moved))) == len(set(flat)) == len(set(moved))  # one to one
    assert (min(moved), max(moved)) >= (min(flat), 1) and max(moved) <= max(flat)
    assert not {one.prompt[:40] for one in other.requests} & {one.prompt[:40] for one in workload.requests}


def test_requests_are_dealt_in_turn_and_a_conversation_stays_where_it_began():
    requests = [Request(0.0, (1,), number, after=after) for number, after in enumerate((None, None, 1, None, 2))]
    (first, evens), (second, odds) = deal(requests, 2)
    assert (first, second) == ([0, 3], [1, 2, 4])
    assert [one.num_output for one in evens] == first and [one.num_output for one in odds] == second
    assert [one.after for one in evens] == [None, None] and [one.after for one in odds] == [None, 0, 1]


def test_a_trace_replays_what_was_written(tmp_path):
    workload = make_workload("multi-turn", num_sessions=2)
    write_trace(workload, tmp_path / "trace.jsonl")
    replayed = make_workload("trace", path=str(tmp_path / "trace.jsonl"))
    assert replayed.checksum == workload.checksum and replayed.requests == workload.requests


def test_a_trace_of_mooncake_shares_the_blocks_that_its_ids_share(tmp_path):
    lines = [
        {"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [1, 2, 3]},
        {"timestamp": 2500, "input_length": 600, "output_length": 7, "hash_ids": [1, 4]},
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    first, second = make_workload("trace", path=str(tmp_path / "m.jsonl"), speed=5.0).requests
    assert (len(first.prompt), len(second.prompt), second.arrival_s, second.num_output) == (1100, 600, 0.5, 7)
    assert first.prompt[:512] == second.prompt[:512] and first.prompt[512:600] != second.prompt[512:]


@pytest.mark.parametrize(
    ("name", "parameters", "problem"),
    [
        ("poison", {}, "did you mean 'poisson'"),
        ("poisson", {"rat": 3}, "did you mean 'rate'"),
        ("poisson", {"rate": 0}, "rate=0"),
        ("poisson", {"rate": float("nan")}, "rate=nan"),
        ("poisson", {"num_requests": 0}, "num_requests=0"),
        ("poisson", {"num_requests": 1.5}, "num_requests=1.5"),
        ("poisson", {"num_input": True}, "num_input=True"),
        ("nano-vllm", {"shortest": 9, "longest": 8}, "cannot be made"),
        ("trace", {}, "needs a file: path=FILE"),
        ("trace", {"path": "/nowhere"}, "cannot be read"),
        ("trace", {"path": 3}, "path=3"),
    ],
)
def test_a_workload_that_makes_no_sense_is_refused(name, parameters, problem):
    with pytest.raises(ConfigError, match=problem):
        make_workload(name, **parameters)


@pytest.mark.parametrize(("line", "problem"), [("arrival_s", "request 1 comes at -1"), ("after", "request 1 comes after 1")])
def test_a_request_that_cannot_come_is_named(tmp_path, line, problem):
    rows = [{"arrival_s": 0, "num_input": 4, "num_output": 2}, {"arrival_s": 1, "num_input": 4, "num_output": 2}]
    rows[1] |= {"arrival_s": -1} if line == "arrival_s" else {"after": 1}
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ConfigError, match=problem):
        make_workload("trace", path=str(tmp_path / "t.jsonl"))


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"arrival_s": 1}', '{"arrival_s": "x", "num_input": 1, "num_output": 1}', '{"timestamp": 1}']
)
def test_a_line_that_is_no_request_is_named(tmp_path, line):
    (tmp_path / "t.jsonl").write_text('{"arrival_s": 0, "num_input": 4, "num_output": 2}\n' + line)
    with pytest.raises(ConfigError, match="line 2"):
        make_workload("trace", path=str(tmp_path / "t.jsonl"))


def test_settings_become_numbers_where_they_are():
    assert parse_parameters(["rate=inf", "num-requests=8", "spread=0.5", "path=a=b"]) == {
        "rate": inf,
        "num_requests": 8,
        "spread": 0.5,
        "path": "a=b",
    }
    with pytest.raises(ConfigError, match="PARAMETER=VALUE"):
        parse_parameters(["rate"])
