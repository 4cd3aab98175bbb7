"""The film of the inspector: what a flight record becomes is what the scheduler really did, step by step."""

from __future__ import annotations

import dataclasses
import json
import random
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from support import make_engine, make_scheduler

from nanovllm.cli import main
from nanovllm.engine.events import StepDispatched
from nanovllm.errors import ConfigError
from nanovllm.observability.film import add_costs, film_of, hardware, news, snapshot
from nanovllm.observability.flight_recorder import FlightRecorder, decode, encode
from nanovllm.sampling_params import SamplingParams
from nanovllm.simulation.shapes import find_shape

LECTURE = Path(__file__).parents[2] / "docs/inspector-lecture.json"


class Witness:
    """Takes down the state of every step while it happens."""

    def __init__(self, scheduler) -> None:
        self.scheduler, self.states = scheduler, []

    def on_event(self, event) -> None:
        if isinstance(event, StepDispatched):
            contents = self.scheduler.block_manager._content_ids.tolist()
            self.states.append((snapshot(self.scheduler), contents))


def run_with_witness(seed, ahead, begin_after=0):
    rng = random.Random(seed)
    scheduler = make_scheduler(num_blocks=24, block_size=4, max_num_seqs=6, budget=16)
    engine = make_engine(scheduler, num_steps_ahead=ahead, eos=(3, 4))
    beginnings = [[rng.randrange(50) for _ in range(12)] for _ in range(3)]
    recorder = witness = None
    num_requests = 40
    while num_requests or engine.has_work:
        if recorder is None and num_requests <= 40 - begin_after:
            recorder, witness = FlightRecorder(scheduler, 10_000), Witness(scheduler)
            engine.events.listeners += [recorder, witness]
        if num_requests and rng.random() < 0.4:
            num_requests -= 1
            prompt = rng.choice(beginnings)[: rng.randint(1, 12)] + [rng.randrange(50) for _ in range(rng.randint(0, 9))]
            engine.add_request(prompt, SamplingParams(max_tokens=rng.randint(1, 24), temperature=0, n=rng.choice((1, 1, 3))))
        engine.step()
    return msgspec.json.encode({"reason": "test", **recorder.describe()}), witness.states


def unrolled(film):
    """Whole states: what the page makes of the changes."""
    states, codes, tables = [], [], {}
    for frame in film["frames"]:
        state = dict(frame["state"])
        codes = list(state.pop("blocks")) if "blocks" in state else codes.copy()
        for place, code in state.pop("changed", ()):
            codes[place] = code
        state["running"] = [[*one[:5], one[5] if len(one) > 5 else tables[one[0]]] for one in state["running"]]
        tables = {one[0]: one[5] for one in state["running"]}
        states.append({**state, "blocks": "".join(codes)})
    return states


@pytest.mark.parametrize("begin_after", [0, 15])
@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("seed", [1, 2])
def test_every_frame_is_the_state_that_the_engine_was_in(seed, ahead, begin_after):
    record, seen = run_with_witness(seed, ahead, begin_after)
    film = film_of(record)
    states = unrolled(film)[1 : len(seen) + 1]  # the first is before the first step, the last after the last one
    counts = ("evictions", "queried", "hit")  # since the beginning of the engine, of the record
    drop = lambda state: {name: value for name, value in state.items() if name not in (*counts, "evicted", "reasons")}  # noqa: E731
    assert len(states) == len(seen) > 50
    for state, (real, _) in zip(states, seen):
        assert drop(state) == drop(real)
        assert dict(state["reasons"]) == dict(real["reasons"])
    reasons = {reason for state in states for reason in state["reasons"]}
    assert {"rows", "behind"} <= reasons
    for (_, before), (_, after), state in zip(seen, seen[1:], states[1:]):
        lost = [place for place, (old, new) in enumerate(zip(before, after)) if old and old != new]
        assert set(state["evicted"]) == set(lost)
    assert any(state["evicted"] for state in states)


def test_all_entries_are_in_the_frames_and_no_hash():
    record, _ = run_with_witness(3, 0)
    entries = json.loads(record)["entries"]
    shown = [entry for frame in film_of(record)["frames"][1:] for entry in frame["entries"]]
    assert [entry[:5] for entry in shown] == [entry[:5] for entry in entries]
    assert all(len(entry) == 5 for entry in shown if entry[0] == "finish")


def test_a_step_is_shown_up_to_where_the_scheduler_now_decides_otherwise():
    record = json.loads(run_with_witness(2, 0)[0])
    step = [entry for entry in record["entries"] if entry[0] == "step"][30]
    step[5][0] += 1
    film = film_of(msgspec.json.encode(record))
    assert len(film["frames"]) == 31 and f"step {step[2]}: lengths" in film["report"]


def test_news_come_once_and_begin_with_those_who_are_there():
    scheduler = make_scheduler(max_num_seqs=2)
    engine = make_engine(scheduler, num_steps_ahead=0)
    recorder = FlightRecorder(scheduler, 3)
    engine.events.listeners.append(recorder)
    for _ in range(3):
        engine.add_request([1, 2, 3, 4, 5], SamplingParams(max_tokens=12, temperature=0))
    engine.step()
    first = news(recorder, scheduler, None)
    assert [entry[0] for entry in first["entries"]] == ["add", "admit", "add", "admit", "add"]
    assert first["state"]["reasons"] == {"rows": 1} and first["state"]["waiting"] == [[2, "rows"]]
    cursor, steps = first["cursor"], []
    while engine.has_work:  # many segments of three steps
        engine.step()
        answer = decode(encode(news(recorder, scheduler, cursor)))
        cursor = answer["cursor"]
        steps += [entry[2] for entry in answer["entries"] if entry[0] == "step"]
    assert steps == list(range(1, scheduler._num_steps))
    assert news(recorder, scheduler, cursor)["entries"] == []
    assert not answer["is_first"]
    for gone in (0, cursor + 1):  # entries that were dropped; a cursor of another engine
        anew = news(recorder, scheduler, gone)
        assert anew["is_first"] and anew["cursor"] == cursor and anew["entries"] == []


def test_costs_are_those_of_the_weights_and_the_cache():
    spec = find_shape("smollm2-135m")
    step = ["step", 0.0, 7, [0], [99], [1], [0], 0, 1, 9, 1000]
    facts = {"spec": dataclasses.asdict(spec), "dtype": "bfloat16"}
    (cost,) = add_costs([step], facts)
    num_weights = spec.num_parameters  # tied: the output projection is the embedding, which is read once
    assert cost[:11] == step
    assert cost[11] == pytest.approx(2 * num_weights + 100 * spec.kv_bytes_per_token(2), rel=0.02)
    attention = spec.num_layers * 100 * 4 * spec.total_num_heads * spec.head_dim
    assert cost[12] == pytest.approx(2 * num_weights + attention, rel=0.02)
    assert add_costs([step], {**facts, "dtype": "float32"})[0][11] == 2 * cost[11]
    (packed,) = add_costs([step], {**facts, "roofline": {"weight_bytes": 0.5}})
    assert packed[11] == pytest.approx(0.5 * num_weights + 100 * spec.kv_bytes_per_token(2), rel=0.02)
    assert add_costs([step], {}) == [step]


def test_the_roof_of_the_device_comes_first_where_it_is_known():
    peak = {"bytes_per_s": 5e9, "operations_per_s": 7e9, "source": "measured"}
    assert next(iter(hardware({"peak": peak}).items())) == ("this device", (5e9, 7e9))
    assert hardware({}) == hardware({"peak": None}) and "this device" not in hardware({}) and "cpu" in hardware({})


def test_the_record_of_the_lecture_shows_what_the_lecture_says():
    film = film_of(LECTURE.read_bytes())
    assert "every decision is the same" in film["report"], "a meant change of the scheduler? python scripts/record_lecture.py"
    assert LECTURE.stat().st_size < 100_000
    kinds = [entry[0] for frame in film["frames"] for entry in frame["entries"]]
    states = unrolled(film)
    reasons = {reason for state in states for reason in state["reasons"]}
    assert kinds.count("preempt") == 2 and {"rows", "blocks", "sibling", "behind"} <= reasons
    assert max(int(code, 36) // 2 for state in states for code in state["blocks"]) >= 6, "six hold the same beginning"
    assert any(state["evicted"] for state in states)
    times = [frame["entries"][-1][1] for frame in film["frames"][1:]]
    assert all(before <= after for before, after in pairwise(times))


@pytest.mark.parametrize(
    ("step", "lengths", "reasons", "num_holders"),
    [  # what docs/inspector.md says of the steps
        (10, [1], {}, []),
        (20, [1, 95], {}, []),
        (22, [1, 95], {}, []),
        (55, [1, 1, 5, 5], {}, [3] * 5),
        (80, [1, 1, 1, 4], {"sibling": 2}, [4] * 5),
        (81, [1] * 6, {}, [6] * 5),
        (111, [17, 17, 17, 17, 17, 11], {"rows": 1}, [6] * 5),
        (176, [1] * 5, {"next": 1, "behind": 1}, [5] * 5),
        (177, [1] * 5, {"blocks": 1, "behind": 1}, [5] * 5),
        (207, [1] * 4, {"next": 1, "behind": 2}, [4] * 5),
        (221, [65, 31], {"next": 1}, [2] * 5),
    ],
)
def test_the_steps_of_the_lecture_are_as_told(step, lengths, reasons, num_holders):
    film = film_of(LECTURE.read_bytes())
    (place,) = [i for i, frame in enumerate(film["frames"]) for one in frame["entries"] if one[0] == "step" and one[2] == step]
    (entry,) = [one for one in film["frames"][place]["entries"] if one[0] == "step"]
    state = unrolled(film)[place]
    counts = [int(code, 36) // 2 for code in state["blocks"]]
    assert entry[5] == lengths and dict(state["reasons"]) == reasons and [one for one in counts if one > 1] == num_holders
    admitted = [tuple(one[2:5]) for one in film["frames"][place]["entries"] if one[0] == "admit"]
    assert step != 221 or admitted == [(12, 193, 128), (13, 161, 80)]
    assert step != 111 or len(state["evicted"]) == 8


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda record: record.update(version=9), "version"),
        (lambda record: record["facts"].update(spec={"architecture": 1}), "damaged"),
        (lambda record: record["entries"].insert(0, ["step", 0.0]), "damaged"),
        (lambda record: record.pop("keyframe"), "damaged"),
    ],
)
def test_a_damaged_record_is_refused(damage, error):
    record = json.loads(LECTURE.read_bytes())
    damage(record)
    with pytest.raises(ConfigError, match=error):
        film_of(msgspec.json.encode(record))


def test_the_command_writes_a_film(tmp_path, capsys):
    path = tmp_path / "film.json"
    assert main(["replay", str(LECTURE), "--film", str(path)]) == 0
    assert json.loads(path.read_bytes())["film"] == 1 and "every decision is the same" in capsys.readouterr().out
    assert main(["replay", str(LECTURE), "--film", str(tmp_path)]) != 0
