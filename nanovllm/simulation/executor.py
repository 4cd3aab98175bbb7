"""SimulatedExecutor: an executor that computes nothing and knows when it would have been done.

The engine's thread and the device are two timelines. Scheduling, preparing and launching a step costs host time; the
device starts it when it is launched *and* the step before it has ended. Collecting waits for the device: the clock jumps
to the end of the step. So with one step in flight the host's time vanishes behind the device's, as long as it is shorter,
exactly as in the engine's real loop.

    host    [launch 1][launch 2]     [wait][apply 1, launch 3] [wait][apply 2, launch 4]
    device            [ step 1          ][ step 2             ][ step 3             ]

Read next: `run.py`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from nanovllm.engine.batch import ScheduledBatch, StepResult
from nanovllm.simulation.cost import CostModel

TOKEN = [7]  # what every draw yields; nobody writes to it


def num_prompt_tokens(batch: ScheduledBatch) -> int:
    """Of the prompts that end in this step, cached tokens too: what has been hashed for them."""
    lengths = batch.lengths
    return sum(batch.starts[chunk] + lengths[chunk] for chunk in batch.sampled_chunks if lengths[chunk] > 1)


@dataclass(slots=True)
class VirtualClock:
    """Seconds since the simulation began. Called like `time.monotonic`."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass(slots=True)
class Work:
    """What the device did, summed over steps."""

    num_steps: int = 0
    busy_s: float = 0.0
    host_s: float = 0.0  # of the engine's thread, waiting not counted
    num_bytes: float = 0.0
    num_operations: float = 0.0
    num_chunks: int = 0
    num_tokens: int = 0


class SimulatedExecutor:
    def __init__(self, cost: CostModel, clock: VirtualClock) -> None:
        self.cost = cost
        self.clock = clock
        self.work = Work()
        self._in_flight: deque[tuple[float, StepResult]] = deque()  # (when it ends, what it yields)
        self._device_free_at = 0.0

    def dispatch(self, batch: ScheduledBatch) -> None:
        cost, work, num_chunks = self.cost.step(batch), self.work, len(batch.rows)
        calibration = self.cost.hardware.calibration
        host_s = calibration.host_step_s + num_chunks * calibration.host_sequence_s + cost.launch_s
        host_s += num_prompt_tokens(batch) * calibration.host_admit_token_s
        self.clock.now += host_s
        idle_s = 0.0 if self._in_flight else calibration.idle_s
        self._device_free_at = max(self._device_free_at, self.clock.now + idle_s) + cost.device_s
        self._in_flight.append((self._device_free_at, StepResult(batch.step, [TOKEN] * len(batch.sampled_chunks))))
        work.num_steps += 1
        work.busy_s += cost.device_s
        work.host_s += host_s
        work.num_bytes += cost.num_bytes
        work.num_operations += cost.num_operations
        work.num_chunks += num_chunks
        work.num_tokens += sum(batch.lengths)

    def collect(self) -> StepResult:
        ends_at, result = self._in_flight.popleft()
        self.clock.now = max(self.clock.now, ends_at)
        return result

    def begin_draw(self) -> None:
        """Nothing is drawn."""

    def close(self) -> None:
        self._in_flight.clear()
