"""The front end's times, found again in what it makes of the loads that `benchmarks/front_end_costs.py` measures."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nanovllm.simulation.calibrate import calibrate_front_end
from nanovllm.simulation.front_end import SHARE_END, FrontEnd, Told
from nanovllm.simulation.hardware import PROFILES

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from front_end_bursts import simulated

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CALIBRATION = PROFILES["h200"].calibration


def record() -> dict:
    return json.loads((BENCHMARKS / "records/2026-11-29-front-end-costs-h.json").read_text())


def test_what_an_event_costs_is_found_in_the_bursts_that_a_simulated_server_makes():
    truth = replace(CALIBRATION, frontend_told_s=9e-6, frontend_event_s=40e-6)
    rows = [{"size": size, "words": 512, "clients": clients} for size, clients in ((1, 1), (128, 1), (128, 4), (256, 4))]
    bursts = [{**row, "times": simulated(truth, row)} for row in rows]
    found = calibrate_front_end(CALIBRATION, {**record(), "bursts": bursts})
    assert found.frontend_told_s == pytest.approx(9e-6, rel=0.1)
    assert found.frontend_event_s == pytest.approx(40e-6, rel=0.02)


def test_a_request_alone_takes_as_long_as_the_record_says():
    """From the turns of a simulated front end, and not as the calibration adds them up."""
    costs, seen = record(), []
    num_words, engine = costs["alone"]["words"], costs["engine"]["512"]
    front_end = FrontEnd(CALIBRATION, lambda told, time: seen.append(time))
    front_end.arrive(0.0, 0, num_words)
    in_engine_s = 1e-6 * sum(engine[key]["median"] for key in ("intake_us", "admit_us"))
    front_end.tell(front_end.wait() + in_engine_s, 1, [Told(0, 0, is_first=True, is_last=True)])
    front_end.advance(float("inf"))
    end_s = SHARE_END * CALIBRATION.frontend_request_s  # of the answer, which the client does not see before
    assert seen[0] + end_s == pytest.approx(1e-6 * costs["alone"]["wall_us"]["median"], rel=0.02)
