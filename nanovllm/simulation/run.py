"""One simulated run: the real engine, scheduler and block manager, driven by arrivals on a virtual clock.

Requests come through a front end (`front_end.py`), and are taken in between two steps, as `engine_process.py` does. An
offline run has no front end, and starts the device while requests are still added, as `LLMEngine.generate` does. Only
the executor is not real.

Read next: `report.py`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple

from nanovllm.config import EngineConfig, SchedulerLimits, gpu_max_num_seqs
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.policy import make_policy
from nanovllm.engine.progress import no_collections
from nanovllm.engine.scheduler import Scheduler
from nanovllm.model_spec import ModelSpec
from nanovllm.outputs import GenerationOutput
from nanovllm.runner.memory_plan import plan_memory
from nanovllm.sampling_params import SamplingParams
from nanovllm.simulation.cost import BYTES_PER_VALUE, CostModel
from nanovllm.simulation.executor import SimulatedExecutor, VirtualClock, Work
from nanovllm.simulation.front_end import FrontEnd, Told
from nanovllm.simulation.hardware import Hardware
from nanovllm.workloads import Request

MAX_RECEIVE_SECONDS = 0.005  # `engine/engine_process.py`'s: for requests between two steps
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
    has_server: bool = True  # else `LLM.generate`, where all requests are there at the beginning


class Finished(NamedTuple):
    """One request's times, seconds since the beginning, as its client sees them."""

    sent: float
    first_token: float
    finish: float
    num_input: int
    num_output: int
    num_cached: int
    num_preemptions: int

    @property
    def ttft(self) -> float:
        return self.first_token - self.sent

    @property
    def tpot(self) -> float:
        return (self.finish - self.first_token) / max(1, self.num_output - 1)

    @property
    def latency(self) -> float:
        return self.finish - self.sent


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
    clients: Sequence[int] = (),
    on_finish: Callable[[], object] = lambda: None,
    on_step: Callable[[LLMEngine], None] | None = None,
) -> Run:
    """Run `requests` to their end.

    `clients`: which program sends each, a number; none: one sends all. `on_step`, for tests, sees the engine after every step.
    """
    with no_collections():  # nothing here makes cycles, and looking for them takes longer than the run
        return _Simulation(deployment, requests, clients, on_finish).run(on_step)


class _Simulation:
    def __init__(
        self,
        deployment: Deployment,
        requests: Sequence[Request],
        clients: Sequence[int],
        on_finish: Callable[[], object],
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
        self.has_server = deployment.has_server
        self.calibration = deployment.hardware.calibration
        self.run_so_far = Run(work=self.executor.work)
        self._front_end = FrontEnd(self.calibration, self._see, clients)
        self._first_token: dict[int, float] = {}  # by index: when its client had it
        self._ended: dict[int, GenerationOutput] = {}  # by the engine; their clients do not know it yet
        self._turns_after: dict[int, list[int]] = defaultdict(list)  # index of a request -> those that wait for its answer
        for index, one in enumerate(requests):
            if one.after is not None:
                self._turns_after[one.after].append(index)
            elif self.has_server:
                self._arrive(one.arrival_s, index)
        self._on_finish = on_finish
        self._params: dict[int, SamplingParams] = {}

    def run(self, on_step: Callable[[LLMEngine], None] | None) -> Run:
        engine, clock, front_end = self.engine, self.clock, self._front_end
        if not self.has_server:
            self._start_early()
        while True:
            if not engine.has_work:
                begin = front_end.wait()
                if begin == inf:
                    return self.run_so_far
                clock.now = max(clock.now, begin)
            self._take_in()
            self._hand_over(engine.step())
            if on_step is not None:
                on_step(engine)

    def _take_in(self) -> None:
        """Requests that have come, those too that come while others are taken in."""
        end_time = self.clock.now + MAX_RECEIVE_SECONDS
        while self.clock.now < end_time:
            self._front_end.advance(self.clock.now)
            index = self._front_end.take(self.clock.now)
            if index is None:
                return
            self._add(index)

    def _start_early(self) -> None:
        """`generate` dispatches one step when enough prompts for it are there, then adds the others."""
        budget = self.engine.scheduler.limits.max_num_batched_tokens
        for index, request in enumerate(self.requests):
            self._front_end.sent[index] = 0.0
            self._add(index)
            missing, budget = budget, budget - len(request.prompt)
            if budget <= 0 < missing and index + 1 < len(self.requests):
                self.engine.step(may_collect=False)

    def _arrive(self, time: float, index: int) -> None:
        self._front_end.arrive(time, index, len(self.requests[index].prompt))

    def _add(self, index: int) -> None:
        request = self.requests[index]
        self.clock.now += self.calibration.host_request_s + len(request.prompt) * self.calibration.host_token_s
        self.engine.add_request(request.prompt, self._params_of(request.num_output), request_id=str(index))

    def _params_of(self, num_output: int) -> SamplingParams:
        if num_output not in self._params:
            self._params[num_output] = SamplingParams(temperature=0.0, max_tokens=num_output, ignore_eos=True)
        return self._params[num_output]

    def _hand_over(self, outputs: list[GenerationOutput]) -> None:
        """The tokens of a step go to their clients."""
        if not outputs:
            return
        now, told = self.clock.now, []
        for place, output in enumerate(outputs):
            is_first = output.metrics.first_token_time == now
            if is_first or output.finished:
                index = int(output.request_id)
                told.append(Told(place, index, is_first, output.finished))
                if output.finished:
                    self._ended[index] = output
        if self.has_server:
            self._front_end.tell(self.clock.now, len(outputs), told)
        else:
            for one in told:
                self._see(one, now)

    def _see(self, told: Told, time: float) -> None:
        """A client has these tokens."""
        index = told.request
        if told.is_first:
            self._first_token[index] = time
        if not told.is_last:
            return
        times = self._ended.pop(index).metrics
        self.run_so_far.finished.append(
            Finished(
                self._front_end.sent.pop(index),
                self._first_token.pop(index),
                time,
                times.num_prompt_tokens,
                times.num_generated_tokens,
                times.num_cached_tokens,
                times.num_preemptions,
            )
        )
        for turn in self._turns_after.pop(index, ()):
            self._arrive(time + self.requests[turn].arrival_s, turn)
        self._on_finish()
