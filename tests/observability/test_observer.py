"""Listeners on an engine in this process: stages, logs, watchdog, crash, and the small interfaces."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
import time
from pathlib import Path

import pytest
from support import FakeExecutor, greedy, make_engine, make_scheduler

from nanovllm.engine.async_engine import AsyncEngine
from nanovllm.errors import ConfigError, EngineDead, RequestError
from nanovllm.observability.observer import observe
from nanovllm.observability.options import BUILDER, ObservabilityOptions
from nanovllm.observability.probes import MetricsRegistry, StageLogger, Trace
from nanovllm.observability.replay import replay_file
from nanovllm.observability.timeline import STAGES
from nanovllm.observability.tracker import Sink, Tracker
from nanovllm.observability.watchdog import Watchdog

TEXT_LINE = re.compile(r"\[\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\] (\S+) (\w+) (\d+) (\d+) (\d+)")


class Collected(Sink):
    def __init__(self):
        self.stages, self.requests = [], []

    def on_stage(self, timeline, stage, time, num_generated, step):
        self.stages.append((timeline.request_id, stage, num_generated))

    def on_request(self, timeline):
        self.requests.append(timeline)


@pytest.fixture
def messages():
    """What the package logs, whatever other tests have done to its logger."""
    found = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    logging.getLogger("nanovllm").addHandler(handler)
    yield found
    logging.getLogger("nanovllm").removeHandler(handler)


def run(engine, sinks=None, joins=False):
    sink = Collected()
    tracker = Tracker([sink, *(sinks or [])], joins)
    engine.events.listeners.append(tracker)
    return sink, tracker


# --- the tracker


@pytest.mark.parametrize("ahead", [0, 1])
def test_stages_times_and_counts_are_those_of_the_engine(ahead):
    engine = make_engine(num_steps_ahead=ahead, budget=8, seconds_per_step=0.002)
    sink, tracker = run(engine)
    outputs = engine.generate([[1] * 20, [2] * 3], greedy(5, n=2))
    tracker.close()
    assert [stage for name, stage, _ in sink.stages if name == "request-0"] == [
        "queued",
        "scheduled",
        "prefill_done",
        "first_token",
        "decode_done",
    ]
    by_id = {timeline.request_id: timeline for timeline in sink.requests}
    for output in outputs:
        timeline, metrics = by_id[output.request_id], output.metrics
        assert timeline.ttft == metrics.ttft and timeline.times["decode_done"] == metrics.finish_time
        assert timeline.times["scheduled"] == metrics.first_scheduled_time
        assert timeline.num_generated_tokens == metrics.num_generated_tokens == 10
        assert timeline.tpot == metrics.tpot
        parts = timeline.ttft_parts()
        assert sum(parts.values()) == pytest.approx(timeline.ttft) and all(value >= -1e-9 for value in parts.values())
        assert parts["front_end"] == pytest.approx(0, abs=1e-9) and parts["prefill"] > 0.001
        assert [timeline.times[stage] for stage in STAGES] == sorted(timeline.times[stage] for stage in STAGES)
        assert timeline.finish_reasons == ["length", "length"] and timeline.request is None
    assert not tracker._open and not tracker._steps and not tracker._without_token and not tracker._ending


def test_preemptions_and_aborts_in_every_state_leave_nothing_behind():
    engine = make_engine(num_blocks=8, max_num_seqs=4, budget=32)
    sink, tracker = run(engine)
    names = [engine.add_request([number] * 9, greedy(12)) for number in range(6)]
    engine.abort(names[5])
    for _ in range(4):
        engine.step()
    engine.abort(names[0])
    while engine.has_work:
        engine.step()
    tracker.close()
    assert len(sink.requests) == 6
    by_id = {timeline.request_id: timeline for timeline in sink.requests}
    assert by_id[names[5]].finish_reasons == ["abort"] and "scheduled" not in by_id[names[5]].times
    assert by_id[names[5]].ttft is None and by_id[names[5]].ttft_parts() is None
    assert any(timeline.num_preemptions for timeline in sink.requests)
    assert not tracker._open and not tracker._without_token and not tracker._ending


def test_facts_of_the_front_end_are_joined_whichever_side_is_first():
    engine = make_engine()
    sink, tracker = run(engine, joins=True)
    first, second, third = (engine.add_request([1, 2, 3], greedy(3)) for _ in range(3))
    now = time.monotonic()
    facts = {"received": now - 1, "tokenized": now - 0.5, "first_token": now + 1, "stream_done": now + 2, "operation": "chat"}
    tracker.join(first, facts)
    while engine.has_work:
        engine.step()
    tracker.join(second, facts)
    tracker.join("unknown", facts)
    tracker.close()
    assert [timeline.request_id for timeline in sink.requests] == [first, second, third]
    for timeline in sink.requests[:2]:
        assert timeline.ttft == pytest.approx(2) and timeline.operation == "chat"
        assert sum(timeline.ttft_parts().values()) == pytest.approx(2) and timeline.ttft_parts()["front_end"] > 1.9
        times = [timeline.times[stage] for stage in STAGES]
        assert times == sorted(times)


def test_a_sink_that_fails_is_left_out_and_the_engine_does_not_notice(messages):
    class Broken(Sink):
        def on_stage(self, *arguments):
            raise OSError("the disk is full")

    engine = make_engine()
    sink, tracker = run(engine, [Broken()])
    engine.generate([[1, 2, 3]], greedy(3))
    tracker.close()
    assert len(sink.requests) == 1
    assert len([message for message in messages if "switched off" in message]) == 1


def test_what_cannot_be_written_in_time_is_counted_and_dropped(monkeypatch):
    monkeypatch.setattr("nanovllm.observability.tracker.MAX_QUEUED", 3)
    monkeypatch.setattr("nanovllm.observability.tracker.PERIOD_S", 60.0)
    engine = make_engine()
    _, tracker = run(engine)
    engine.generate([[1, 2, 3]], greedy(10))
    assert len(tracker._queue) == 3 and tracker.num_lost > 5
    tracker.close()


# --- files


def test_the_text_log_has_the_fields_of_the_course(tmp_path):
    path = tmp_path / "stages.log"
    engine = make_engine()
    with observe(engine, ObservabilityOptions(stage_log=str(path), stage_log_format="text", stage_log_steps=True)):
        engine.generate([[1, 2, 3, 4, 5]], greedy(4))
    matches = [TEXT_LINE.fullmatch(line) for line in path.read_text().splitlines()]
    assert matches and all(matches)
    stages = [match[2] for match in matches if match[1] != "-"]
    assert stages == ["queued", "scheduled", "prefill_done", "first_token", "decode_done", "cleanup_done"]
    (done,) = [match for match in matches if match[2] == "decode_done"]
    assert (done[1], done[3], done[4]) == ("request-0", "5", "4")
    assert len([match for match in matches if match[2] == "step"]) >= 4


def test_with_everything_off_nobody_listens():
    engine = make_engine()
    assert not ObservabilityOptions().is_on
    with observe(engine, ObservabilityOptions()):
        assert not engine.events.listeners
    everything = ObservabilityOptions(flight_recorder_steps=10, watchdog_seconds=1, lifecycle_file="/dev/null")
    with observe(engine, everything) as observer:
        assert len(engine.events.listeners) == 3
    assert not engine.events.listeners
    observer.close()  # again


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage_log_format": "xml"}, "json, text"),
        ({"flight_recorder_steps": -1}, "at least 0"),
        ({"flight_recorder_steps": 1.5}, "at least 0"),
        ({"watchdog_seconds": "1"}, "at least 0"),
        ({"trace_file": 3}, "must be a string"),
        ({"stage_log_steps": 1}, "True or False"),
        ({"trace_fiel": "x"}, "trace_file"),
    ],
)
def test_wrong_options_are_refused_by_name(options, message):
    with pytest.raises(ConfigError, match=message):
        ObservabilityOptions.from_options(**options)


# --- watchdog and crash


class HangingExecutor(FakeExecutor):
    """Its fifth step takes long."""

    def collect(self):
        if self.log.count(("collect", 3)):
            time.sleep(0.6)
        return super().collect()


def test_a_stalled_step_is_told_once_with_its_batch_all_stacks_and_a_record(tmp_path, messages):
    scheduler = make_scheduler()
    engine = make_engine(scheduler, num_steps_ahead=0)
    engine.executor = HangingExecutor(64, 4)
    options = ObservabilityOptions(watchdog_seconds=0.1, flight_recorder_steps=50, flight_recorder_dir=str(tmp_path))
    with observe(engine, options) as observer:
        observer.watchdog._recent.clear()
        engine.generate([[1, 2, 3], [4, 5]], greedy(5))
        assert observer.watchdog.num_stalls == 1
    (text,) = [message for message in messages if "deadline" in message]
    assert "step 4 has taken" in text and "row 0: [6, 7)" in text and "row 1: [5, 6)" in text
    assert "thread MainThread" in text and "in collect" in text and "thread nanovllm-watchdog" in text
    (path,) = tmp_path.glob("nanovllm-flight-*.json")
    report = replay_file(str(path))
    assert report.difference is None and report.num_steps == 5 and report.reason == "step 4 stalled"


def test_the_deadline_follows_the_steps_and_an_idle_engine_is_not_stalled():
    engine = make_engine(seconds_per_step=0.01)
    watchdog = Watchdog(0.05)
    engine.events.listeners.append(watchdog)
    engine.generate([[1, 2, 3]], greedy(10))
    assert 0.2 <= watchdog.deadline < 2
    time.sleep(watchdog.deadline + 0.1)
    engine.generate([[1, 2, 3]], greedy(3))
    watchdog.close()
    assert watchdog.num_stalls == 0


def test_a_crash_of_the_engine_process_leaves_a_record_that_replays(tmp_path):
    async def crash():
        options = {"flight_recorder_steps": 50, "flight_recorder_dir": str(tmp_path), "lifecycle_file": str(tmp_path / "life")}
        setup = {"inner": "served:failing", "options": options}
        async with await AsyncEngine.start(builder=BUILDER, builder_options=setup) as engine:
            with pytest.raises(EngineDead):
                async for _ in engine.generate([1, 2, 3, 4, 5, 6], greedy(30)):
                    pass
            await engine.wait_dead()

    asyncio.run(crash())
    (path,) = tmp_path.glob("nanovllm-flight-*.json")
    report = replay_file(str(path))
    assert report.reason == "crash: RuntimeError" and report.difference is None and report.num_steps == 5


def test_calls_that_no_builder_has_added_are_refused(tmp_path):
    async def ask():
        async with await AsyncEngine.start(builder="served:fake") as engine:
            with pytest.raises(RequestError, match="unknown call"):
                await engine.call("flight_record")
        setup = {"inner": "served:fake", "options": {}}
        async with await AsyncEngine.start(builder=BUILDER, builder_options=setup) as engine:
            with pytest.raises(RequestError, match="flight_recorder_steps"):
                await engine.call("flight_record")

    asyncio.run(ask())


# --- the small interfaces


def test_the_three_calls_of_the_course():
    text, machine = io.StringIO(), io.StringIO()
    StageLogger(text).info("decode", "r1", 4)
    assert TEXT_LINE.fullmatch(text.getvalue().strip()).groups() == ("r1", "decode", "0", "0", "4")
    StageLogger(machine, "json").info("first_token", "r1", 4, prompt_len=7, step=3)
    line = json.loads(machine.getvalue())
    assert line["plane"] == "data" and line["prompt_len"] == 7 and line["step"] == 3 and line["batch_size"] == 4

    metrics = MetricsRegistry()
    for value in range(1, 101):
        metrics.observe("ttft_ms", value)
    assert metrics.summary() == {"ttft_ms": {"count": 100, "mean": 50.5, "p50": 50, "p99": 99}}

    seen = []
    trace = Trace(lambda name, when: seen.append(name))
    for name in ("decode_step_begin", "decode_step_end", "decode_step_begin", "decode_step_end"):
        trace.annotate(name)
    assert len(trace.seconds_between("decode_step_begin", "decode_step_end")) == 2 and len(seen) == 4


def test_with_nobody_listening_a_step_asks_a_handful_of_times_and_makes_no_event():
    """benchmarks/observe_cost.py says what one such test costs: some nanoseconds."""

    class Asked(list):
        times = 0

        def __len__(self):
            self.times += 1
            return 0

        def __iter__(self):
            raise AssertionError("an event was made")

    engine = make_engine()
    engine.events.listeners = asked = Asked()
    for number in range(4):
        engine.add_request([number] * 9, greedy(30))
    num_steps, asked.times = 0, 0
    while engine.has_work:
        engine.step()
        num_steps += 1
    assert num_steps >= 30 and 2 * num_steps <= asked.times <= 6 * num_steps


def test_the_engine_reaches_no_observability():
    engine = Path(__file__).parent.parent.parent / "nanovllm" / "engine"
    assert not [
        path.name for path in engine.glob("*.py") if re.search(r"(from|import) nanovllm\.observability", path.read_text())
    ]
