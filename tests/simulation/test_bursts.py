"""Bursts: the front end's times, found again in what it makes of the bursts that `benchmarks/front_end_costs.py` measures."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nanovllm.simulation.calibrate import calibrate_bursts
from nanovllm.simulation.hardware import PROFILES

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from front_end_bursts import simulated

TRUTH = replace(
    PROFILES["h200"].calibration,
    frontend_accept_s=100e-6,
    frontend_handle_s=150e-6,
    frontend_handle_token_s=0.1e-6,
    frontend_hand_over_s=200e-6,
    frontend_hand_over_token_s=0.2e-6,
    frontend_told_s=4e-6,
    frontend_begin_s=50e-6,
    frontend_latency_in_s=0.7e-3,
    frontend_latency_out_s=0.2e-3,
)


@pytest.fixture(scope="module")
def record() -> dict:
    sizes = [(1, 1), (128, 1), (256, 1), (128, 4), (256, 4)]
    rows = [{"size": size, "words": words, "clients": clients} for words in (512, 1024) for size, clients in sizes]
    return {"bursts": [{**row, "times": simulated(TRUTH, row)} for row in rows]}


def test_wall_times_of_bursts_give_the_time_of_every_turn(record):
    """Where the client is no slower than the server: else it is the client's pace that the server keeps."""
    found = calibrate_bursts(PROFILES["h200"].calibration, record)
    exact = ("event_s", "told_s", "begin_s", "latency_in_s")
    for name in (*exact, "accept_s", "handle_s", "handle_token_s", "hand_over_s", "hand_over_token_s"):
        field = f"frontend_{name}"
        assert getattr(found, field) == pytest.approx(getattr(TRUTH, field), rel=0.03 if name in exact else 0.2), field
    assert found.tokenize_token_s == pytest.approx(TRUTH.tokenize_token_s, rel=0.01)


def test_with_the_times_that_a_record_gives_its_bursts_come_out_again(record):
    found = calibrate_bursts(PROFILES["h200"].calibration, record)
    for row in record["bursts"]:
        again = simulated(found, row)
        for stage in ("taken", "first token"):
            assert again[stage] == pytest.approx(row["times"][stage], rel=0.08, abs=0.1), (row["size"], row["clients"], stage)
