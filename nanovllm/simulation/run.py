"""One simulated run: the real engine, scheduler and block manager, driven by arrivals on a virtual clock.

The front end is one process that does one thing at a time (`FrontEnd`): it reads requests and writes tokens. A request
that has come through is taken in between two steps, as `engine_process.py` does. An offline run has no front end, and
starts the device while requests are still added, as `LLMEngine.generate` does. Only the executor is not real.

Read next: `report.py`.
"""

from __future__ import annotations

import gc
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import NamedTuple

from nanovllm.config import EngineConfig, SchedulerLimits, gpu_max_num_seqs
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.policy import make_policy
from nanovllm.engine.scheduler import Scheduler
from nanovllm.model_spec import ModelSpec
from nanovllm.outputs import GenerationOutput
from nanovllm.runner.memory_plan import plan_memory
from nanovllm.sampling_params import SamplingParams
from nanovllm.simulation.cost import BYTES_PER_VALUE, CostModel
from nanovllm.simulation.executor import SimulatedExecutor, VirtualClock, Work
from nanovllm.simulation.hardware import Hardware
from nanovllm.workloads import Request

ANY_TOKEN = 1 << 31  # the engine's vocabulary: a workload need not know the model's


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """One engine on one device."""

    spec: ModelSpec
    hardware: Hardware
    limits: SchedulerLimits
    num_blocks: int
    block_size: int
    max_model_len: int
    policy: str = "fcfs"
    is_greedy: bool = True
    use_graphs: bool = True
    enable_prefix_caching: bool = True
    num_steps_ahead: int = 1


class Finished(NamedTuple):
    """One request's times, seconds since the beginning, as its client sees them."""

    arrival: float
    first_token: float
    finish: float
    num_input: int
    num_output: int
    num_cached: int
    num_preemptions: int

    @property
    def ttft(self) -> float:
        return self.first_token - self.arrival

    @property
    def tpot(self) -> float:
        return (self.finish - self.first_token) / max(1, self.num_output - 1)

    @property
    def latency(self) -> float:
        return self.finish - self.arrival


@dataclass(slots=True)
class Run:
    """What one engine did."""

    finished: list[Finished] = field(default_factory=list)  # in the order of their ends
    work: Work = field(default_factory=Work)


def deploy(
    spec: ModelSpec, hardware: Hardware, config: EngineConfig, *, is_greedy: bool = True, max_num_seqs: int | None = None
) -> Deployment:
    """Size the cache as the engine would. Raises `NotEnoughMemory`, which names the option that would help."""
    resolved = config.with_changes(
        block_size=config.block_size or hardware.block_size,
        max_num_batched_tokens=config.max_num_batched_tokens or hardware.max_num_batched_tokens,
        gpu_memory_utilization=config.gpu_memory_utilization or 0.9,
        max_num_seqs=max_num_seqs or config.max_num_seqs or gpu_max_num_seqs(hardware.memory_bytes),
    )
    total = hardware.memory_bytes
    plan = plan_memory(spec, resolved, bytes_per_value=BYTES_PER_VALUE, total=total, free=total, max_default_kv=None)
    ahead = hardware.num_steps_ahead if config.num_steps_ahead is None else config.num_steps_ahead
    return Deployment(
        spec=spec,
        hardware=hardware,
        limits=resolved.scheduler_limits,
        num_blocks=plan.num_blocks,
        block_size=plan.block_size,
        max_model_len=plan.max_model_len,
        policy=config.scheduling_policy,
        is_greedy=is_greedy,
        use_graphs=not config.enforce_eager,
        enable_prefix_caching=config.enable_prefix_caching,
        num_steps_ahead=ahead,
    )


def simulate(
    deployment: Deployment,
    requests: Sequence[Request],
    *,
    is_offline: bool = False,
    on_finish: Callable[[], object] = lambda: None,
    on_step: Callable[[LLMEngine], None] | None = None,
) -> Run:
    """Run `requests` to their end. `on_step` sees the engine after every step: for tests."""
    with _without_garbage_collection():
        return _Simulation(deployment, requests, is_offline, on_finish).run(on_step)


class FrontEnd:
    """A queue with one server. All times in seconds since the beginning.

    Reading a request costs a time, and writing a token to its client another; beside that everything takes `latency_s`
    each way. Tokens that wait while it is busy are written together: a step that ends meanwhile adds nothing but them.
    """

    def __init__(self, latency_s: float, request_s: float, token_s: float) -> None:
        self.latency_s, self.request_s, self.token_s = latency_s, request_s, token_s
        self._free_at = 0.0
        self._batch_begin, self._batch_size = -1.0, 0  # of the last tokens that were written, or will be

    def read(self, arrival: float) -> float:
        """When a request that arrives then is at the engine."""
        self._free_at = max(self._free_at, arrival) + self.request_s
        return self._free_at + self.latency_s

    def write(self, now: float, num_tokens: int) -> float:
        """When clients have the tokens of a step that ended now."""
        if now < self._batch_begin:  # the batch before has not begun: they join it
            self._free_at += max(0, num_tokens - self._batch_size) * self.token_s
            self._batch_size = max(self._batch_size, num_tokens)
        else:
            self._batch_begin, self._batch_size = max(self._free_at, now), num_tokens
            self._free_at = self._batch_begin + num_tokens * self.token_s
        return self._free_at + self.latency_s


class _Simulation:
    def __init__(
        self, deployment: Deployment, requests: Sequence[Request], is_offline: bool, on_finish: Callable[[], object]
    ) -> None:
        self.clock = VirtualClock()
        limits, spec = deployment.limits, deployment.spec
        blocks = BlockManager(deployment.num_blocks, deployment.block_size, deployment.enable_prefix_caching, clock=self.clock)
        scheduler = Scheduler(blocks, limits, make_policy(deployment.policy), clock=self.clock)
        cost = CostModel(
            spec,
            deployment.hardware,
            limits.max_num_seqs,
            limits.max_num_batched_tokens,
            deployment.is_greedy,
            deployment.use_graphs,
        )
        self.executor = SimulatedExecutor(cost, self.clock)
        self.engine = LLMEngine(
            scheduler,
            self.executor,
            vocab_size=ANY_TOKEN,
            max_model_len=deployment.max_model_len,
            num_steps_ahead=deployment.num_steps_ahead,
            clock=self.clock,
        )
        self.requests = requests
        self.is_offline = is_offline
        self.calibration = deployment.hardware.calibration
        self.run_so_far = Run(work=self.executor.work)
        costs = self.calibration
        frontend = (0.0, 0.0, 0.0) if is_offline else (costs.frontend_s, costs.frontend_request_s, costs.frontend_token_s)
        self._frontend = FrontEnd(*frontend)
        self._to_come = [(one.arrival_s, index) for index, one in enumerate(requests) if one.after is None]  # a heap
        heapify(self._to_come)
        self._turns_after: dict[int, list[int]] = defaultdict(list)  # index of a request -> those that wait for its answer
        for index, one in enumerate(requests):
            if one.after is not None:
                self._turns_after[one.after].append(index)
        self._read: deque[tuple[float, int]] = deque()  # (when it is at the engine, index): the front end has begun with them
        self._arrival: dict[int, float] = {}  # by index: of the requests that have arrived and are not finished
        self._first_token: dict[str, float] = {}  # when its client had it
        self._on_finish = on_finish
        self._params: dict[int, SamplingParams] = {}

    def run(self, on_step: Callable[[LLMEngine], None] | None) -> Run:
        engine, clock = self.engine, self.clock
        if self.is_offline:
            self._start_early()
        while self._to_come or self._read or engine.has_work:
            if not engine.has_work:
                clock.now = max(clock.now, self._read[0][0] if self._read else self._to_come[0][0])
            self._read_arrivals()
            while self._read and self._read[0][0] <= clock.now:
                self._add(self._read.popleft()[1])
            if engine.has_work:
                self._hand_over(engine.step())
                if on_step is not None:
                    on_step(engine)
        return self.run_so_far

    def _start_early(self) -> None:
        """`generate` dispatches one step when enough prompts for it are there, then adds the others."""
        budget = self.engine.scheduler.limits.max_num_batched_tokens
        while self._to_come:
            arrival, index = heappop(self._to_come)
            self._arrival[index] = arrival
            self._add(index)
            missing, budget = budget, budget - len(self.requests[index].prompt)
            if budget <= 0 < missing and self._to_come:
                self.engine.step(may_collect=False)

    def _read_arrivals(self) -> None:
        while self._to_come and self._to_come[0][0] <= self.clock.now:
            arrival, index = heappop(self._to_come)
            self._arrival[index] = arrival
            self._read.append((self._frontend.read(arrival), index))

    def _add(self, index: int) -> None:
        request = self.requests[index]
        self.clock.now += len(request.prompt) * self.calibration.host_token_s
        self.engine.add_request(request.prompt, self._params_of(request.num_output), request_id=str(index))

    def _params_of(self, num_output: int) -> SamplingParams:
        if num_output not in self._params:
            self._params[num_output] = SamplingParams(temperature=0.0, max_tokens=num_output, ignore_eos=True)
        return self._params[num_output]

    def _hand_over(self, outputs: list) -> None:
        """The tokens of a step go to their clients."""
        if not outputs:
            return
        self._read_arrivals()  # what came before this step ended is ahead of its tokens
        now = self.clock.now
        seen = self._frontend.write(now, len(outputs))
        for output in outputs:
            if output.metrics.first_token_time == now:
                self._first_token[output.request_id] = seen
            if output.finished:
                self._close(output, seen)

    def _close(self, output: GenerationOutput, seen: float) -> None:
        times, index = output.metrics, int(output.request_id)
        self.run_so_far.finished.append(
            Finished(
                self._arrival.pop(index),
                self._first_token.pop(output.request_id),
                seen,
                times.num_prompt_tokens,
                times.num_generated_tokens,
                times.num_cached_tokens,
                times.num_preemptions,
            )
        )
        for turn in self._turns_after.pop(index, ()):
            heappush(self._to_come, (seen + self.requests[turn].arrival_s, turn))
        self._on_finish()


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Nothing here makes cycles, and looking for them in a million live objects takes longer than the run."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
