"""How long requests that come together take through server and client, by the clock on the wall, and in the simulator.

    python benchmarks/front_end_costs.py --only-bursts [--record front-end-bursts]     measures, with the functions here
    python benchmarks/front_end_bursts.py RECORD [--gpu h200]                          prints measured beside simulated

`front_end_costs.py` counts processor time. What a loop waits for, the interpreter's lock above all, only a clock sees. So
the engine process of a server writes down when it has taken each request, and when each of its steps ended; it computes
nothing, holds its first step until a whole burst is there, and then steps at a pace. The clients are those of `nanovllm
bench serve`. Both clocks are one: CLOCK_MONOTONIC.

*Bursts* of N requests at once: when they began, were at the engine, and had their first tokens; then some steps of N streams.
*Singles*: requests one by one, while others decode at 700 steps a second.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path
from random import Random
from statistics import median
from typing import Any, NamedTuple

from front_end import STEPS_PER_SECOND, running_server, thread_times

from nanovllm.bench.clients import send
from nanovllm.bench.load import Row, Target
from nanovllm.bench.serve import allow_connections
from nanovllm.config import EngineConfig, SchedulerLimits
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.scheduler import Scheduler
from nanovllm.simulation.front_end import FrontEnd, Told
from nanovllm.simulation.hardware import Calibration, find_hardware
from nanovllm.simulation.report import percentile
from nanovllm.simulation.validate import TIMER_S
from nanovllm.workloads import Workload, make_workload, shifted

STAMPS = "NANOVLLM_BENCH_STAMPS"  # tells the engine process where it writes
SERVER_STAMPS = "NANOVLLM_BENCH_SERVER_STAMPS"  # and the server
STAGES = ("accepted", "read", "handled", "tokenising", "tokenised", "resumed", "handed")
SIZES = (1, 8, 32, 64, 128, 256, 512)
WORDS = {4: (128, 512), 512: SIZES, 1024: SIZES}  # words of a prompt -> sizes of bursts; 4 are tokenised without a thread
NUM_TOKENS = 5  # of an answer in a burst: the first, three of steady steps, the last
BURST_STEPS_PER_SECOND = 100.0
MANY_STREAMS = 64  # a step of more takes longer, in proportion, so that every token is an event of its own
SINGLE_STEPS_PER_SECOND = 700.0
NUM_SINGLES = 120
STREAMS = (20, 30, 60)  # that decode beside the singles
FEW_PER_CLIENT = 8  # with fewer requests for each, four client processes tell nothing new
NAP_S = 1e-4  # of an engine that waits: how exact its times of requests are
PERCENTS = {"first": 0, "p10": 10, "p50": 50, "p90": 90, "last": 100}


# --- the engine process


def stamped(config: EngineConfig) -> Any:
    """The builder: "front_end_bursts:stamped"."""
    import tokenizers
    from served import serve
    from support import CountingExecutor

    from nanovllm.tokenizer import Tokenizer
    from nanovllm.tokenizer_files import TokenizerParts

    class StampedEngine(LLMEngine):
        """Writes down its requests and steps. A request with seed n is one of n that come together."""

        stamps = Path(os.environ[STAMPS]).open("w")  # noqa: SIM115  for the life of the process
        pause_s = 1 / float(os.environ[STEPS_PER_SECOND])
        next_step, num_missing = 0.0, 0

        def add_request(self, prompt: Any, params: Any = None, **options: Any) -> str:
            self.stamps.write(f'["taken", {time.perf_counter()}]\n')
            self.num_missing = (self.num_missing or params.seed or 1) - 1
            return super().add_request(prompt, params, **options)

        def step(self, may_collect: bool = True) -> list[Any]:
            now = time.perf_counter()
            if self.num_missing or now < self.next_step:
                time.sleep(NAP_S)
                return []
            outputs = super().step(may_collect)
            pause_s = self.pause_s * max(1.0, len(outputs) / MANY_STREAMS)
            self.next_step = max(self.next_step, now - 10 * NAP_S) + pause_s  # the rate stays when a step is a little late
            num_begun = sum(len(output.completions[0].token_ids) == 1 for output in outputs)
            self.stamps.write(f'["step", {time.perf_counter()}, {num_begun}]\n')
            if not self.has_work:
                self.stamps.flush()
            return outputs

    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({f"t{number}": number for number in range(10_000)}, unk_token="t0")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = Tokenizer(TokenizerParts(backend, {}, frozenset(), {}))
    num_blocks, num_seqs = 131_072, max(SIZES)
    scheduler = Scheduler(BlockManager(num_blocks, 16, False), SchedulerLimits(num_seqs, num_seqs * max(WORDS)))
    engine = StampedEngine(scheduler, CountingExecutor(), vocab_size=10_000, max_model_len=16_384, num_steps_ahead=0)
    served = serve(config, engine.executor)
    facts = replace(served.facts, vocab_size=10_000, max_model_len=16_384, block_size=16, max_num_seqs=num_seqs)
    return replace(served, engine=engine, tokenizer=tokenizer, facts=facts)


# --- the server


class ServerStamps:
    """When a server accepted, read, tokenised and handed over its requests; written when its last connection has gone."""

    def __init__(self) -> None:
        from nanovllm.engine.async_engine import AsyncEngine
        from nanovllm.server.http import BoundedHttp
        from nanovllm.tokenizer import Tokenizer

        self._path = Path(os.environ[SERVER_STAMPS])
        self._times: dict[str, list[float]] = {kind: [] for kind in STAGES}
        self._stamp(BoundedHttp, "connection_made", before="accepted")
        self._stamp(BoundedHttp, "on_message_complete", before="read")
        self._stamp(AsyncEngine, "_check_length", before="handled")
        self._stamp(Tokenizer, "encode", before="tokenising", after="tokenised")
        self._stamp(AsyncEngine, "_open", before="resumed", after="handed")
        lost = BoundedHttp.connection_lost

        def connection_lost(protocol: Any, exc: Exception | None) -> None:
            lost(protocol, exc)
            if not protocol.connections and self._times["handed"]:  # else somebody has tried whether we are there
                self._write()

        BoundedHttp.connection_lost = connection_lost  # type: ignore[method-assign]

    def _stamp(self, owner: type, name: str, before: str = "", after: str = "") -> None:
        function, clock = getattr(owner, name), time.perf_counter
        note_before = self._times[before].append if before else id
        note_after = self._times[after].append if after else id

        def stamped(*arguments: Any, **options: Any) -> Any:
            note_before(clock())
            result = function(*arguments, **options)
            note_after(clock())
            return result

        setattr(owner, name, stamped)

    def _write(self) -> None:
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps(self._times))
        new.rename(self._path)
        for times in self._times.values():
            times.clear()


# --- measuring


class Times(NamedTuple):
    """Of one load, by the clock of all processes."""

    start: float
    rows: list[Row]  # what the clients saw
    stages: dict[str, list[float]]  # what the server wrote down, in the order in which it happened
    taken: list[float]  # when the engine took a request
    steps: list[tuple[float, int]]  # when one ended, and how many first tokens it brought


class Stamps:
    """What engine process and server write, read as it goes on."""

    def __init__(self, folder: Path) -> None:
        self._engine, self._server = folder / "engine", folder / "server"
        self._num_read = 0
        os.environ |= {STAMPS: str(self._engine), SERVER_STAMPS: str(self._server)}

    def read(self, start: float, rows: list[Row]) -> Times:
        """What is new."""
        while not self._server.exists():  # the server may not have heard yet that the last client has gone
            time.sleep(0.005)
        stages = json.loads(self._server.read_text())
        self._server.unlink()
        lines = self._engine.read_text().splitlines()
        new, self._num_read = [json.loads(line) for line in lines[self._num_read :]], len(lines)
        taken, steps = [line[1] for line in new if line[0] == "taken"], [(line[1], line[2]) for line in new if line[0] == "step"]
        return Times(start, rows, {stage: times[-len(rows) :] for stage, times in stages.items()}, taken, steps)


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """Milliseconds."""
    ordered = sorted(seconds)
    return {name: round(percentile(ordered, percent) * 1e3, 3) for name, percent in PERCENTS.items()}


def token_times(row: Row) -> list[float]:
    """Since the start of the repeat."""
    return [value / 1e3 for value in accumulate([row.sent_ms + row.ttft_ms, *row.itl_ms])]


def burst_times(load: Times) -> dict[str, Any]:
    """Quantiles of one burst: since its start, or (tokens) since the engine's step."""
    start, rows = load.start, load.rows
    ends = [end - start for end, _ in load.steps]
    read = [token_times(row) for row in rows]
    whole = [times for times in read if len(times) == NUM_TOKENS]  # else a step was late, and met the next
    steady = [quantiles([times[place] - ends[place] for times in whole]) for place in range(1, NUM_TOKENS - 1)] if whole else []
    return {
        "begun": quantiles([row.sent_ms / 1e3 for row in rows]),
        "connected": quantiles([(row.sent_ms + row.connect_ms) / 1e3 for row in rows]),
        **{stage: quantiles([one - start for one in times]) for stage, times in load.stages.items() if times},
        "taken": quantiles([one - start for one in load.taken]),
        "first token": quantiles([times[0] - ends[0] for times in read]),
        "step": _medians(steady) if steady else {},
        "late": {"share": 1 - len(whole) / len(rows)},
    }


def single_times(load: Times) -> dict[str, Any]:
    """Quantiles of the requests after the first, which are the streams beside them: each one's since its client began."""
    began = [load.start + row.sent_ms / 1e3 for row in load.rows]
    ends = [end for end, num_begun in load.steps for _ in range(num_begun)]  # of the step with each one's first token
    read = [at + row.ttft_ms / 1e3 for at, row in zip(began, load.rows)]

    def since(before: list[float], after: list[float]) -> dict[str, float]:
        return quantiles([end - start for start, end in list(zip(before, after))[-NUM_SINGLES:]])

    stages = {**load.stages, "taken": load.taken}
    return {**{stage: since(began, times) for stage, times in stages.items() if times}, "first token": since(ends, read)}


def _medians(each: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of each name; what was not measured, because it was disturbed, is empty."""
    return {name: round(median(one[name] for one in each if one), 3) for name in each[0] or each[-1]}


def measure_bursts(repeats: int) -> list[dict[str, Any]]:
    """A row for each kind of burst: of each time the medians over repeats, and all repeats of two."""
    allow_connections(max(SIZES))
    rows = []
    with _stamped_server(BURST_STEPS_PER_SECOND) as (target, stamps, server):
        for num_words, sizes in WORDS.items():
            for num_clients in (1, 4):
                for size in sizes:
                    if num_clients > 1 and size < FEW_PER_CLIENT * num_clients:
                        continue
                    ours = replace(target, client_processes=num_clients, extra_body={"seed": size})
                    load = make_workload("fixed", num_requests=size, num_input=num_words, num_output=NUM_TOKENS)
                    _send(ours, shifted(load, -1), stamps)  # warm
                    before = thread_times(server)
                    each = [_send(ours, shifted(load, number), stamps) for number in range(repeats)]
                    busy = [(end - start) / size / repeats * 1e6 for start, end in zip(before, thread_times(server))]
                    times = {name: _medians([one[name] for one in each]) for name in each[0]}
                    rows.append({"size": size, "words": num_words, "clients": num_clients, "times": times})
                    rows[-1] |= {"loop_us": round(busy[0], 1), "threads_us": round(busy[1], 1)}  # of a request and its tokens
                    rows[-1]["repeats"] = {name: [one[name] for one in each] for name in ("taken", "first token")}
                    print(f"{size} of {num_words} words from {num_clients}: taken {times['taken']}", flush=True)
    return rows


def measure_singles() -> list[dict[str, Any]]:
    rows = []
    with _stamped_server(SINGLE_STEPS_PER_SECOND) as (target, stamps, _):
        for num_streams in STREAMS:
            rows.append({"streams": num_streams, "times": _send(target, singles_beside(num_streams), stamps, single_times)})
            print(f"one beside {num_streams} streams: {rows[-1]['times']}", flush=True)
    return rows


def singles_beside(num_streams: int, lead_s: float = 0.5, gap_s: float = 0.02) -> Workload:
    """Streams that last, and requests for one token, one after another, at distances that vary by a quarter."""
    noise = Random(0)
    arrivals = list(accumulate([lead_s, *(gap_s * noise.uniform(0.75, 1.25) for _ in range(NUM_SINGLES - 1))]))
    num_output = int(SINGLE_STEPS_PER_SECOND * (arrivals[-1] + lead_s))
    load = make_workload("fixed", num_requests=num_streams + NUM_SINGLES, num_input=512, num_output=num_output)
    streams, singles = load.requests[:num_streams], load.requests[num_streams:]
    return replace(load, requests=streams + [replace(one, arrival_s=at, num_output=1) for one, at in zip(singles, arrivals)])


@contextlib.contextmanager
def _stamped_server(steps_per_second: float) -> Iterator[tuple[Target, Stamps, int]]:
    """A server whose threads exist and whose code is warm, what it and its engine write, and its process."""
    with tempfile.TemporaryDirectory() as folder:
        stamps = Stamps(Path(folder))
        os.environ[STEPS_PER_SECOND] = str(steps_per_second)
        prepare = "import front_end_bursts; front_end_bursts.ServerStamps()"
        with running_server({}, {"builder": "front_end_bursts:stamped"}, prepare) as (port, pids):
            target = Target(f"http://127.0.0.1:{port}", "fake", "words")
            for _ in range(3):
                _send(target, make_workload("fixed", num_requests=128, num_input=512, num_output=NUM_TOKENS), stamps)
            yield target, stamps, pids["front end"][0]


def _send(
    target: Target, load: Workload, stamps: Stamps, times_of: Callable[..., dict[str, Any]] = burst_times
) -> dict[str, Any]:
    starts: list[float] = []
    rows, _ = asyncio.run(send(target, load, on_start=starts.append))
    if errors := {row.error for row in rows if row.error}:
        raise SystemExit(f"failed: {sorted(errors)}")
    return times_of(stamps.read(starts[0], rows))


# --- the same, simulated


class Replay:
    """A load of `_send`, with the simulator's front end and an engine like `stamped`'s."""

    def __init__(
        self, calibration: Calibration, load: Workload, num_clients: int, steps_per_second: float, num_held: int
    ) -> None:
        noise = Random(0)
        requests = load.requests
        self._costs, self._requests, self._pause_s = calibration, requests, 1 / steps_per_second
        self._num_missing = num_held
        self._front_end = FrontEnd(calibration, self._see, [index % num_clients for index in range(len(requests))])
        for index, one in enumerate(requests):
            timer_s = TIMER_S * noise.random() if num_clients > 1 else 0.0
            self._front_end.arrive(one.arrival_s + timer_s, index, len(one.prompt))
        self._read: list[list[float]] = [[] for _ in requests]
        self._running: dict[int, int] = {}  # request -> tokens so far
        self._taken: list[float] = []
        self._steps: list[tuple[float, int]] = []

    def run(self) -> Times:
        now = next_step = 0.0
        while len(self._taken) < len(self._requests) or self._running:
            now = self._take_in(now)
            if self._num_missing > 0 or now < next_step or not self._running:
                now = now + NAP_S if self._running else self._front_end.wait()
                continue
            next_step = max(next_step, now - 10 * NAP_S) + self._pause_s * max(1.0, len(self._running) / MANY_STREAMS)
            self._step(now)
        self._front_end.advance(float("inf"))
        return Times(0.0, self._rows(), {}, self._taken, self._steps)

    def _take_in(self, now: float) -> float:
        self._front_end.advance(now)
        while (index := self._front_end.take(now)) is not None:
            self._taken.append(now)
            self._running[index] = 0
            self._num_missing -= 1
            now += self._costs.host_request_s + len(self._requests[index].prompt) * self._costs.host_token_s
            self._front_end.advance(now)
        return now

    def _step(self, now: float) -> None:
        told = []
        for place, (index, num_tokens) in enumerate(list(self._running.items())):
            is_last = num_tokens + 1 == self._requests[index].num_output
            told.append(Told(place, index, num_tokens == 0, is_last))
            self._running[index] += 1
            if is_last:
                del self._running[index]
        self._steps.append((now, sum(one.is_first for one in told)))
        self._front_end.tell(now, len(told), told)

    def _see(self, told: Told, time: float) -> None:
        self._read[told.request].append(time)

    def _rows(self) -> list[Row]:
        rows = []
        for index, times in enumerate(self._read):
            sent, gaps = self._front_end.sent[index], [after - before for before, after in pairwise(times)]
            row = Row(
                0, index, "", sent * 1e3, 0.0, 0.0, (times[0] - sent) * 1e3, 0.0, 0, len(times), [gap * 1e3 for gap in gaps]
            )
            rows.append(row)
        return rows


def simulated(calibration: Calibration, row: dict[str, Any]) -> dict[str, Any]:
    """The times of a row of the record."""
    if "streams" in row:
        return single_times(Replay(calibration, singles_beside(row["streams"]), 1, SINGLE_STEPS_PER_SECOND, 0).run())
    load = make_workload("fixed", num_requests=row["size"], num_input=row["words"], num_output=NUM_TOKENS)
    return burst_times(Replay(calibration, load, row["clients"], BURST_STEPS_PER_SECOND, row["size"]).run())


def compare(record: dict[str, Any], calibration: Calibration) -> Iterator[str]:
    """Measured -> simulated, milliseconds, line by line."""
    for row in record["bursts"] + record["singles"]:
        name = f"beside {row['streams']}" if "streams" in row else f"{row['size']:3} x {row['words']}, {row['clients']} clients"
        ours = simulated(calibration, row)
        for what, measured in row["times"].items():
            if what in ours and measured and what not in ("connected", "late"):
                pairs = "  ".join(f"{measured[key]:8.2f} {ours[what][key]:8.2f}" for key in PERCENTS)
                yield f"{name:22} {what:12} {pairs}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("record", type=Path, help="of front_end_costs.py")
    parser.add_argument("--gpu", default="h200", help="whose calibration")
    arguments = parser.parse_args()
    print(f"{'ms, measured and simulated':35} " + "  ".join(f"{name:>17}" for name in PERCENTS))
    for line in compare(json.loads(arguments.record.read_text()), find_hardware(arguments.gpu).calibration):
        print(line)


if __name__ == "__main__":
    main()
