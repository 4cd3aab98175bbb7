"""Stopwatch: whose seconds are whose."""

from __future__ import annotations

import time

from nanovllm.runner.stopwatch import Stopwatch


def test_only_the_first_engine_of_a_process_pays_for_the_imports():
    Stopwatch()
    second = Stopwatch()
    assert second.laps == {}
    time.sleep(0.02)
    second.lap("plan")
    second.lap("weights")
    second.lap("plan")
    assert second.laps["plan"] >= 0.02 and list(second.laps) == ["plan", "weights"]
    assert second.describe().startswith("0.0 s (plan 0.0, weights 0.0") and sum(second.laps.values()) < 1
