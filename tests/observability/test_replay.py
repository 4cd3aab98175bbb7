"""The flight recorder and its replay, on schedules that have everything: preemption, prefix hits, forks, aborts, stops."""

from __future__ import annotations

import gc
import json
import random
import sys
from pathlib import Path

import msgspec
import pytest
from support import make_engine, make_scheduler

from nanovllm.errors import ConfigError
from nanovllm.observability.flight_recorder import DROPPED_PER_STEP, FlightRecorder, Numbering, arrays_of, keyframe_of
from nanovllm.observability.observer import observe
from nanovllm.observability.options import ObservabilityOptions
from nanovllm.observability.replay import Replay, replay_file
from nanovllm.sampling_params import SamplingParams


def busy_run(tmp_path, seed, policy="fcfs", ahead=1, segment=10_000, num_requests=40):
    """A random load on a small cache; returns the record as replay sees it, through JSON."""
    rng = random.Random(seed)
    scheduler = make_scheduler(num_blocks=24, block_size=4, max_num_seqs=6, budget=16, policy=policy)
    engine = make_engine(scheduler, num_steps_ahead=ahead, eos=(3, 4))
    recorder = FlightRecorder(scheduler, segment, str(tmp_path))
    engine.events.listeners.append(recorder)
    beginnings = [[rng.randrange(50) for _ in range(12)] for _ in range(3)]
    names = []
    while num_requests or engine.has_work:
        if num_requests and rng.random() < 0.4:
            num_requests -= 1
            prompt = rng.choice(beginnings)[: rng.randint(1, 12)] + [rng.randrange(50) for _ in range(rng.randint(0, 9))]
            params = SamplingParams(
                max_tokens=rng.randint(1, 24), temperature=0, n=rng.choice((1, 1, 1, 3)), prompt_logprobs=None
            )
            names.append(engine.add_request(prompt, params, priority=rng.randrange(3)))
        if names and rng.random() < 0.05:
            engine.abort(rng.choice(names))
        if rng.random() < 0.02:
            scheduler.set_limits(max_num_batched_tokens=rng.choice((8, 16, 24)), max_num_seqs=rng.choice((4, 6)))
        engine.step()
    return msgspec.json.decode(msgspec.json.encode({"reason": "test", **recorder.describe()}))


@pytest.mark.parametrize("policy", ["fcfs", "priority", "prefill_first"])
@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_same_scheduler_decides_the_same(tmp_path, policy, ahead, seed):
    record = busy_run(tmp_path, seed, policy, ahead)
    kinds = {entry[0] for entry in record["entries"]}
    assert {"add", "step", "admit", "preempt", "finish", "result"} <= kinds
    assert any(entry[4] for entry in record["entries"] if entry[0] == "admit"), "no prefix was shared"
    report = Replay(record).run()
    assert report.difference is None, str(report)
    assert report.num_requests == 40 and report.num_steps > 50


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("segment", [7, 20, 33])
@pytest.mark.parametrize("seed", [4, 5])
def test_a_record_that_begins_in_the_middle_goes_on_from_its_keyframe(tmp_path, ahead, segment, seed):
    record = busy_run(tmp_path, seed, ahead=ahead, segment=segment)
    num_steps = sum(entry[0] == "step" for entry in record["entries"])
    assert num_steps <= 2 * segment + 1 and record["keyframe"]["num_steps"] > 0
    report = Replay(record).run()
    assert report.difference is None, str(report)
    assert report.num_steps == num_steps


def test_every_beginning_can_be_replayed(tmp_path):
    """Keyframes in every state that a run goes through."""
    rng = random.Random(0)
    scheduler = make_scheduler(num_blocks=20, block_size=4, max_num_seqs=5, budget=16)
    engine = make_engine(scheduler, num_steps_ahead=1, eos=(3,))
    recorders = []
    for number in range(60):
        if number % 2 == 0:
            prompt = [1, 2, 3, 4, 5, 6, 7, 8][: rng.randint(1, 8)] + [rng.randrange(50) for _ in range(rng.randint(0, 5))]
            engine.add_request(prompt, SamplingParams(max_tokens=rng.randint(1, 20), temperature=0, n=rng.choice((1, 2))))
        engine.step()
        recorders.append(FlightRecorder(scheduler, 10_000))
        engine.events.listeners.append(recorders[-1])
    while engine.has_work:
        engine.step()
    for recorder in recorders:
        report = Replay(msgspec.json.decode(msgspec.json.encode({"reason": "test", **recorder.describe()}))).run()
        assert report.difference is None, str(report)


def test_another_policy_differs_and_the_report_says_where(tmp_path):
    record = busy_run(tmp_path, 1, "prefill_first")
    difference = Replay(record, "fcfs").run().difference
    assert difference is not None and difference.recorded != difference.replayed
    assert str(difference).startswith(f"step {difference.step}: ")


def test_a_planted_change_of_a_decision_is_found(tmp_path):
    record = busy_run(tmp_path, 2)
    step = [entry for entry in record["entries"] if entry[0] == "step"][30]
    step[5][0] += 1  # the length of its first chunk
    difference = Replay(record).run().difference
    assert (difference.step, difference.what) == (step[2], "lengths")


def test_the_record_holds_no_tokens(tmp_path):
    scheduler = make_scheduler(num_blocks=16, block_size=4)
    engine = make_engine(scheduler)
    with observe(engine, ObservabilityOptions(flight_recorder_steps=100, flight_recorder_dir=str(tmp_path))) as observer:
        engine.generate([[41, 42, 43, 44, 45, 46]], SamplingParams(max_tokens=4, temperature=0))
        path = observer.dump("test")
    text = Path(path).read_text()
    record = json.loads(text)
    assert not {41, 42, 43, 44, 45, 46} & set(integers([record["keyframe"], record["entries"], record["live"]]))
    hashes = set(scheduler.block_manager._index)
    assert hashes and not [one for one in hashes if str(one) in text]
    assert oct(Path(path).stat().st_mode)[-3:] == "600"
    assert "every decision is the same" in str(replay_file(path))


def integers(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for one in value for number in integers(one)]
    return [value] if isinstance(value, int) else []


def test_what_is_no_record_is_refused(tmp_path):
    for text in ("", "[]", "{}", json.dumps({"version": 99}), json.dumps({"version": 1, "policy": "fcfs"})):
        path = tmp_path / "record.json"
        path.write_text(text)
        with pytest.raises(ConfigError, match="record"):
            replay_file(str(path))
    with pytest.raises(ConfigError, match="not a flight record"):
        replay_file(str(tmp_path / "none.json"))


def work_of_a_keyframe(num_blocks):
    """(opcodes, new objects that the garbage collector looks at), with 40 sequences that hold nearly all blocks."""
    scheduler = make_scheduler(num_blocks=num_blocks, block_size=4, max_num_seqs=40, budget=4 * num_blocks)
    engine = make_engine(scheduler)
    for index in range(40):
        engine.add_request([index] * (num_blocks // 10 - 8), SamplingParams(max_tokens=9, temperature=0))
    engine.step()
    recorder = FlightRecorder(scheduler, 10)
    assert len(scheduler.running) == 40 and len(scheduler.block_manager._index) > num_blocks / 2
    for name in ("_blocks", "_index"):  # C walks over these in one opcode
        setattr(scheduler.block_manager, name, None)
    num_opcodes = 0

    def count(frame, event, argument):
        nonlocal num_opcodes
        num_opcodes += event == "opcode"
        frame.f_trace_opcodes = True
        return count

    gc.collect()
    gc.disable()
    before, trace = gc.get_count()[0], sys.gettrace()
    sys.settrace(count)
    try:
        keyframe = keyframe_of(scheduler, recorder._spare[0], recorder._births)
    finally:
        sys.settrace(trace)
        num_objects = gc.get_count()[0] - before
        gc.enable()
    assert len(keyframe["tables"]) == 40
    return num_opcodes, num_objects


def test_a_keyframe_walks_over_no_blocks_and_makes_no_object_for_a_sequence():
    """Or the engine stands still whenever a segment is full: for the walk, and for the garbage collector."""
    (few, num_objects), (many, _) = work_of_a_keyframe(500), work_of_a_keyframe(5000)
    assert few == many > 40
    assert num_objects < 40


def test_what_is_dropped_is_dropped_in_parts():
    engine = make_engine(num_blocks=400)
    recorder = FlightRecorder(engine.scheduler, 50)
    engine.events.listeners.append(recorder)
    for _ in range(8):
        engine.add_request([1, 2, 3], SamplingParams(max_tokens=150, temperature=0))
    while not recorder._leaving:
        engine.step()
    sizes = [len(recorder._leaving)]
    while recorder._leaving:
        engine.step()
        sizes.append(len(recorder._leaving))
    assert sizes[0] > 100 and sizes == [*range(sizes[0], 0, -DROPPED_PER_STEP), 0]


def test_a_keyframe_stays_as_it_was_while_the_engine_goes_on():
    """Another thread may be writing it. Tables are not copied, and the arrays of a dropped one are used again."""
    scheduler = make_scheduler(num_blocks=24, block_size=4, max_num_seqs=6, budget=16)
    engine = make_engine(scheduler)
    recorder = FlightRecorder(scheduler, 10)
    engine.events.listeners.append(recorder)
    rng = random.Random(0)
    kept = []
    file_of = lambda keyframe: msgspec.json.encode(Numbering().hide(keyframe))  # noqa: E731
    for step in range(60):
        if len(scheduler.waiting) < 4:  # forks, which copy a block before they write into it
            prompt = [rng.randrange(3) for _ in range(rng.randint(3, 12))]
            engine.add_request(prompt, SamplingParams(max_tokens=rng.randint(2, 12), temperature=0, n=rng.choice((1, 3))))
        engine.step()
        keyframe = keyframe_of(scheduler, [one[:] for one in arrays_of(scheduler)], recorder._births)
        kept.append((keyframe, file_of(keyframe)))
        if step == 45:
            oldest = recorder._segments[0].keyframe
            kept.append((oldest, file_of(oldest)))
    assert recorder._segments[0].keyframe is not oldest
    assert [file_of(keyframe) for keyframe, _ in kept] == [file for _, file in kept]
