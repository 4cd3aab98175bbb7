"""The device's time of a step: on a CPU from call to return, on a GPU from its stream's arrival to the tokens on the host."""

from __future__ import annotations

import time

import pytest
import torch

from nanovllm.engine.batch import ScheduledBatch
from nanovllm.executor.in_process import InProcessExecutor
from nanovllm.runner.pending import Events, PendingStep, begin_timing


def test_a_cpus_time_ends_when_the_step_has_been_computed_not_when_it_is_asked_for():
    def draw():
        time.sleep(0.03)
        return torch.tensor([3, 4]), None

    pending = PendingStep(7, held=draw)
    started = begin_timing(None)
    time.sleep(0.02)
    pending.end_timing(started)
    time.sleep(0.1)  # the draw waits for its grammars, and the step does not count that
    result = pending.result()
    assert result.token_ids == [[3], [4]] and 0.05e9 <= result.forward_ns < 0.1e9


class Done:
    """Of a GPU's step."""

    def __init__(self, log: list[str], has_failed: bool = False) -> None:
        self.log, self.has_failed = log, has_failed

    def synchronize(self) -> None:
        self.log.append("the device is done")
        if self.has_failed:
            raise RuntimeError("CUDA error")


@pytest.mark.parametrize("has_failed", [False, True])
def test_who_is_closed_waits_for_the_step_that_may_still_write_to_the_hosts_memory(has_failed):
    class Runner:
        def run(self, batch: ScheduledBatch, before: PendingStep | None) -> PendingStep:
            return PendingStep(batch.step, done=Done(log, has_failed))

        def __del__(self) -> None:
            log.append("memory is free")

    log: list[str] = []
    executor = InProcessExecutor(Runner())  # type: ignore[arg-type]
    executor.dispatch(ScheduledBatch(0))
    executor.close()
    executor.close()
    assert log == ["the device is done", "memory is free"]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["draws", "no draw", "held draw"])
def test_a_gpus_time_is_its_own_and_not_that_of_the_launches(kind):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    tokens = torch.zeros(4, dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    pending, launch_s, events = [], [], Events()
    for step in range(2):  # the second waits in the stream for the first, and that is not its time
        before = time.perf_counter()
        started = begin_timing(events)
        torch.cuda._sleep(100_000_000)  # cycles: about 50 ms
        one = PendingStep(step, held=lambda: (tokens, None)) if kind == "held draw" else PendingStep(step)
        if kind == "draws":
            one.send(tokens)
        one.end_timing(started, events)
        one.draw()
        launch_s.append(time.perf_counter() - before)
        pending.append(one)
    seconds = [one.result().forward_ns * 1e-9 for one in pending]
    assert launch_s[1] < 0.02 < seconds[1] and seconds[1] == pytest.approx(seconds[0], rel=0.2)
