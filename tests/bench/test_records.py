"""Figures from rows, records that are complete and agree with themselves, comparisons that know boundaries and noise."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanovllm.bench.check import REQUIRED, check_fields, check_record
from nanovllm.bench.compare import compare_figure, compare_records, differing_boundaries, noise_margin, rank_sums, ratio_interval
from nanovllm.bench.exports import (
    CONSTRAINT_METRICS,
    busiest_second,
    leaderboard_entry,
    leaderboard_manifest,
    most_at_once,
    vllm_result,
)
from nanovllm.bench.load import Row
from nanovllm.bench.record import read_record, write_record
from nanovllm.bench.report import write_report
from nanovllm.bench.results import Slo, percentile, result_table, summarize_repeat
from nanovllm.bench.serve import Plan, Run, turns
from nanovllm.cli import main
from nanovllm.energy import EnergyMeter
from nanovllm.errors import ConfigError
from nanovllm.workloads import make_workload

NUM_REQUESTS = 6


def make_row(repeat: int, index: int, factor: float = 1.0, **changes: Any) -> Row:
    gaps = [round(10.0 * factor, 3)] * 3
    ttft = round((50.0 + index) * factor, 3)
    row = Row(repeat, index, "", 100.0 * index, 0.1, 0.2, ttft, round(ttft + sum(gaps), 3), 8, 4, gaps)
    return replace(row, **changes)


def make_record(
    folder: Path,
    name: str = "one",
    noise: float = 0.0,
    factor: float = 1.0,
    repeats: int = 5,
    seed: int = 0,
    meter: EnergyMeter | str = "nobody counts",
    **changes,
):
    """A record as `bench serve` writes it, of a run that never was."""
    rng = random.Random(seed)
    workload = make_workload("fixed", num_requests=NUM_REQUESTS, num_input=8, num_output=4)
    run = Run(Plan(workload, repeats=repeats, slo=Slo(ttft_ms=52.5)), meter)
    for repeat in range(repeats):
        slowness = factor * (1 + rng.gauss(0, noise))
        run.begin()
        run.add([make_row(repeat, index, slowness) for index in range(NUM_REQUESTS)], 2.0 * slowness)
    fields = {
        "kind": "serve",
        "model": "org/toy-1B",
        "precision": "bfloat16",
        "max_model_len": 4096,
        "command": "nanovllm bench serve",
        "settings": {"form": "ids", "max_concurrency": None, **run.plan.settings},
        **run.content(),
        **changes,
    }
    return write_record(name, rows=[asdict(row) for row in run.rows], folder=folder, **fields)


def edit(path: Path, change) -> None:
    record = read_record(path)
    change(record)
    path.write_text(json.dumps(record))


# --- figures


def test_percentiles_are_numpys():
    rng = random.Random(1)
    for count in (1, 2, 3, 10, 101):
        values = [rng.random() for _ in range(count)]
        for q in (0, 50, 90, 99, 100):
            assert percentile(values, q) == pytest.approx(float(np.percentile(values, q)))
    assert percentile([], 50) == 0.0


def test_the_figures_of_one_repeat_by_hand():
    rows = [make_row(0, 0), make_row(0, 1), make_row(0, 2, error="broke off", num_output=99)]
    figures = summarize_repeat(rows, 2.0, Slo.parse("ttft=50.5ms,e2e=1s"), price_per_hour=7.2)
    assert (figures["completed"], figures["failed"]) == (2, 1)
    assert (figures["requests_per_s"], figures["output_tok_s"], figures["total_tok_s"]) == (1.0, 4.0, 12.0)
    assert (figures["ttft_ms.p50"], figures["tpot_ms.p50"], figures["itl_ms.p99"], figures["e2e_ms.p50"]) == (
        50.5,
        10.0,
        10.0,
        80.5,
    )
    assert (figures["goodput_per_s"], figures["slo_attainment"]) == (0.5, 0.3333)  # the second is too slow, the third failed
    assert figures["cost_per_million_output_tok"] == pytest.approx(7.2 / 3600 * 2 / 8 * 1e6)


def test_the_table_has_every_repeat_and_their_median():
    table = result_table([{"x": 1.0}, {"x": 4.0}, {"x": 2.0}])
    assert table == {"x": {"median": 2.0, "spread": 1.5, "repeats": [1.0, 4.0, 2.0]}}


def test_an_slo_is_read_with_its_units():
    assert Slo.parse("ttft=2s,tpot=20ms,e2e=900") == Slo(2000.0, 20.0, 900.0)
    assert not Slo.parse("").is_given
    for text in ("itl=3ms", "ttft=fast", "ttft"):
        with pytest.raises(ConfigError, match="SLO"):
            Slo.parse(text)


def test_two_sides_take_turns():
    assert turns(3, 2) == [0, 1, 1, 0, 0, 1]
    assert turns(2, 1) == [0, 0]


# --- records


def test_a_complete_record_has_no_problems(tmp_path):
    assert check_record(make_record(tmp_path)) == []


@pytest.mark.parametrize("field", REQUIRED)
def test_each_required_field_that_is_missing_is_named(tmp_path, field):
    path = make_record(tmp_path)
    edit(path, lambda record: record.pop(field))
    problems = check_record(path)
    assert len(problems) == 1 and f"missing field {field!r}" in problems[0]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", " "),
        ("precision", None),
        ("max_model_len", 0),
        ("max_model_len", "4096"),
        ("workload", {"name": "fixed", "seed": 0, "parameters": {}}),
        ("warmup", {"requests": 3}),
        ("num_requests", True),
        ("command", ["nanovllm"]),
        ("logs", {"rows": "x"}),
        ("result_table", {}),
        ("result_table", {"ttft_ms.p50": {"median": 3}}),
        ("schema", "another"),
        ("environment", {"commit": "abc"}),
    ],
)
def test_each_field_that_is_wrong_is_named(tmp_path, field, value):
    path = make_record(tmp_path)
    edit(path, lambda record: record.update({field: value}))
    assert any(repr(field) in problem for problem in check_record(path))


def test_a_record_that_contradicts_itself_is_found(tmp_path):
    def problems_after(change) -> str:
        path = make_record(tmp_path)
        edit(path, change)
        return " ".join(check_record(path))

    assert "ttft_ms.p50 do not follow" in problems_after(lambda r: r["result_table"]["ttft_ms.p50"].update(median=1.0))
    assert "output_tok_s" in problems_after(lambda r: r["seconds"].__setitem__(0, 1.0))
    assert "'num_requests'" in problems_after(lambda r: r.update(num_requests=5))
    assert "'status'" in problems_after(lambda r: r.update(status="failed: nothing"))
    assert "rows are missing" in problems_after(lambda r: r["logs"].update(rows="gone.gz"))
    assert "names no file" in problems_after(lambda r: r["logs"].update(rows="../x.gz"))


def test_rows_that_were_changed_are_found(tmp_path):
    path = make_record(tmp_path)
    rows = path.with_name(read_record(path)["logs"]["rows"])
    rows.write_bytes(rows.read_bytes()[:-1] + b"x")
    assert "checksum differs" in check_record(path)[0]


def test_energy_is_part_of_the_figures_and_of_their_check(tmp_path):
    zone = tmp_path / "intel-rapl:0"
    zone.mkdir()
    for file, text in (("name", "package-0"), ("energy_uj", "0"), ("max_energy_range_uj", "262143328850")):
        (zone / file).write_text(text)

    class Busy(EnergyMeter):
        """Of a processor that uses 12 J between two readings."""

        def joules(self):
            (zone / "energy_uj").write_text(str(int((zone / "energy_uj").read_text()) + 12_000_000))
            return super().joules()

    path = make_record(tmp_path, meter=Busy(tmp_path, "no-nvml.so"))
    record = read_record(path)
    assert record["energy"]["joules"] == {"package-0": [12.0] * 5} and "no-nvml.so" in record["energy"]["missing"][0]
    assert record["result_table"]["joules_per_output_tok"]["repeats"] == [12.0 / (NUM_REQUESTS * 4)] * 5
    assert check_record(path) == []
    edit(path, lambda record: record["energy"]["joules"]["package-0"].__setitem__(2, 6.0))
    assert check_record(path) == ["wrong field 'result_table': joules_per_output_tok do not follow from the rows"]
    without = read_record(make_record(tmp_path, "without"))
    assert without["energy"] == {"missing": "nobody counts"} and "joules_per_output_tok" not in without["result_table"]


def test_a_record_is_never_written_over_another(tmp_path):
    paths = [make_record(tmp_path) for _ in range(3)]
    assert len(set(paths)) == 3 and all(check_record(path) == [] for path in paths)


def test_what_is_no_record_is_told(tmp_path):
    (tmp_path / "a.json").write_text("[1]")
    (tmp_path / "b.json").write_text("{")
    assert "not a record" in check_record(tmp_path / "a.json")[0] and "not a record" in check_record(tmp_path / "b.json")[0]
    assert len(check_fields({})) == 14


def test_check_says_so_in_its_exit_status(tmp_path, capsys):
    good, bad = make_record(tmp_path), make_record(tmp_path)
    edit(bad, lambda record: record.pop("precision"))
    assert main(["bench", "check", str(good)]) == 0
    assert main(["bench", "check", str(good), str(bad)]) == 1
    assert "missing field 'precision'" in capsys.readouterr().out


# --- comparisons


def test_records_with_other_boundaries_are_refused_with_their_names(tmp_path, capsys):
    a = make_record(tmp_path)
    b = make_record(tmp_path, precision="float16", max_model_len=2048)
    assert differing_boundaries(read_record(a), read_record(b)) == [
        "precision: 'bfloat16', 'float16'",
        "max_model_len: 4096, 2048",
    ]
    assert main(["bench", "compare", str(a), str(b)]) == 1
    message = capsys.readouterr().err
    assert "precision" in message and "max_model_len" in message
    vary = ["--vary", "precision", "--vary", "max_model_len"]
    assert main(["bench", "compare", str(a), str(b), *vary]) == 0


@pytest.mark.parametrize("name", ["workload", "warmup", "num_requests", "settings", "environment.processor", "environment.gpus"])
def test_every_boundary_counts(tmp_path, name):
    a = read_record(make_record(tmp_path))
    b = json.loads(json.dumps(a))
    *parents, last = name.split(".")
    place = b[parents[0]] if parents else b
    place[last] = {**place[last], "seed": 9} if isinstance(place[last], dict) else "another"
    (problem,) = differing_boundaries(a, b)
    assert problem.startswith(name)
    with pytest.raises(ConfigError, match=name):
        compare_records(a, b)


def test_time_commit_and_command_are_no_boundaries(tmp_path):
    a = read_record(make_record(tmp_path))
    b = json.loads(json.dumps(a))
    b["environment"].update(commit="other", time="later", load_average=9.0)
    b.update(command="another", name="another", note="x")
    b["warmup"]["seconds"] = [3.0]
    assert differing_boundaries(a, b) == []


def test_failed_runs_are_not_compared(tmp_path):
    a = read_record(make_record(tmp_path))
    with pytest.raises(ConfigError, match="not of a good run"):
        compare_records(a, {**a, "status": "failed: 1 of 3"})


def test_rank_sums_are_those_of_all_orders():
    for m, n in ((1, 1), (2, 3), (3, 3), (4, 4)):
        counts = [0] * (m * n + 1)
        for places in combinations(range(m + n), m):
            counts[sum(place - number for number, place in enumerate(places))] += 1
        assert rank_sums(m, n) == counts


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = random.Random(5)
    for count in (3, 5, 8):
        covered, trials = 0, 400
        for _ in range(trials):
            a = [rng.lognormvariate(0, 0.1) for _ in range(count)]
            b = [1.2 * rng.lognormvariate(0, 0.1) for _ in range(count)]
            low, high, confidence = ratio_interval(a, b)
            covered += low <= 1.2 <= high
        assert covered / trials > confidence - 0.04
    assert ratio_interval([1.0] * 3, [2.0] * 3)[2] == pytest.approx(0.9)


def test_equal_runs_are_not_called_different_and_ten_percent_is_found():
    false_alarms = found = called_equal = 0
    for seed in range(100):
        rng = random.Random(seed)
        a, same, slower = ([factor * rng.gauss(100, 1.0) for _ in range(7)] for factor in (1.0, 1.0, 0.9))
        word = compare_figure("output_tok_s", a, same).word
        false_alarms += word in ("faster", "slower")
        called_equal += word == "equal"
        found += compare_figure("output_tok_s", a, slower).word == "slower"
    assert false_alarms <= 3 and called_equal >= 95 and found == 100


def test_faster_means_more_tokens_and_less_time():
    a, b = [100.0, 101.0, 99.0, 100.5], [110.0, 111.0, 109.0, 110.5]
    assert compare_figure("output_tok_s", a, b).word == "faster" == compare_figure("ttft_ms.p50", b, a).word
    assert compare_figure("ttft_ms.p50", a, b).word == "slower" == compare_figure("goodput_per_s", b, a).word
    assert compare_figure("ttft_ms.p50", a, b, margin=0.2).word == "equal"
    assert compare_figure("ttft_ms.p50", [1.0, 2.0, 3.0], [1.5, 2.5, 3.5]).word == "unclear"
    assert compare_figure("goodput_per_s", [0.0] * 3, [0.0] * 3).word == "equal"
    with pytest.raises(ConfigError, match="2 and 3 repeats"):
        compare_figure("output_tok_s", [1.0, 2.0], [1.0, 2.0, 3.0])


def verdict_of(figure: str, output: str) -> str:
    return next(line.split()[-1] for line in output.splitlines() if line.startswith(figure))


def test_the_noise_of_two_equal_runs_widens_the_margin(tmp_path, capsys):
    a, again, b = (
        make_record(tmp_path, factor=factor, noise=0.001, seed=number) for number, factor in enumerate((1.0, 1.05, 1.04))
    )
    assert main(["bench", "compare", str(a), str(b)]) == 0
    assert verdict_of("ttft_ms.p50", capsys.readouterr().out) == "slower"
    assert main(["bench", "compare", str(a), str(b), "--noise", str(a), str(again)]) == 0
    assert verdict_of("ttft_ms.p50", capsys.readouterr().out) == "equal"
    other = make_record(tmp_path, precision="float16")
    assert main(["bench", "compare", str(a), str(b), "--noise", str(other), str(other)]) == 1
    assert "another boundary" in capsys.readouterr().err
    assert noise_margin(read_record(a), read_record(again))["ttft_ms.p50"] == pytest.approx(0.05, rel=0.1)


# --- reports and exports


def test_a_report_has_boundaries_figures_verdicts_and_plots_and_is_the_same_twice(tmp_path, capsys):
    files = [
        str(make_record(tmp_path, name, factor=factor, noise=0.002, seed=7)) for name, factor in (("old", 1.0), ("new", 0.8))
    ]
    for folder in ("first", "second"):
        assert main(["bench", "report", *files, "--out", str(tmp_path / folder)]) == 0
    capsys.readouterr()
    contents = [{path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()} for folder in ("first", "second")]
    assert contents[0] == contents[1]
    assert set(contents[0]) == {"report.md", "report.html", "throughput.svg", "ttft.svg", "tpot.svg", "itl.svg", "e2e.svg"}
    page, text = contents[0]["report.html"].decode(), contents[0]["report.md"].decode()
    for word in ("bfloat16", "faster", "TTFT p99, ms", "fixed, seed 0"):
        assert word in page and word in text
    assert page.count("<svg") == 5 and "http://" not in page.replace("http://www.w3.org/2000/svg", "")


def test_a_report_says_why_two_records_have_no_verdict(tmp_path):
    paths = [make_record(tmp_path), make_record(tmp_path, precision="float16"), make_record(tmp_path, repeats=2)]
    items = [(path.stem, read_record(path), [make_row(0, 0)]) for path in paths]
    markdown, _ = write_report(items, tmp_path / "out")
    assert "not comparable" in markdown.read_text() and "2 repeats" in markdown.read_text()


def test_names_of_records_cannot_write_html(tmp_path):
    path = make_record(tmp_path, "one", model="<script>alert(1)</script>")
    _, page = write_report([("<b>", read_record(path), [make_row(0, 0)])], tmp_path / "out")
    assert "<script>" not in page.read_text() and "<b>" not in page.read_text()


def test_the_export_has_the_keys_of_vllms_client(tmp_path, capsys):
    path = make_record(tmp_path)
    assert main(["bench", "export", str(path), "--format", "vllm"]) == 0
    result = json.loads(capsys.readouterr().out)
    keys = "date endpoint_type backend label model_id tokenizer_id num_prompts request_rate burstiness max_concurrency duration"
    keys += " completed failed total_input_tokens total_output_tokens request_throughput request_goodput output_throughput"
    keys += " total_token_throughput max_output_tokens_per_s max_concurrent_requests rtfx"
    keys += "".join(f" {kind}_{name}_ms" for kind in ("mean", "median", "std", "p99") for name in ("ttft", "tpot", "itl"))
    assert not set(keys.split()) - set(result)
    assert (result["completed"], result["total_output_tokens"], result["duration"]) == (6, 24, 2.0)
    assert (result["median_tpot_ms"], result["max_concurrent_requests"]) == (10.0, 1)


def test_the_busiest_second_and_the_most_at_once():
    rows = [make_row(0, 0), make_row(0, 0, sent_ms=20.0), make_row(0, 0, sent_ms=1930.0)]
    # tokens at 50 to 80, 70 to 100, and 1980, 1990, 2000, 2010
    assert busiest_second(rows) == 8.0 and busiest_second(rows[2:]) == 2.0
    assert most_at_once(rows) == 2


def test_a_leaderboard_entry_claims_nothing(tmp_path, capsys):
    path = make_record(tmp_path)
    assert main(["bench", "export", str(path), "--format", "leaderboard"]) == 1
    assert "--peak-mem-mb" in capsys.readouterr().err
    entry = leaderboard_entry(read_record(path), "somebody", 1000.0)
    assert entry["metadata"]["verified"] is False and "not for publication" in entry["metadata"]["notes"]
    assert len(CONSTRAINT_METRICS) == 16 and set(entry["constraints"]["metrics"].values()) == {None}
    assert entry["constraints"]["accountable_scope"]["representative_model_band"] == "7B-13B"
    assert entry["model"]["canonical_id"] == "hf:org/toy-1B" and entry["model"]["parameters"] == "1B"
    assert entry["metrics"]["throughput_tps"] == 12.0 and entry["metrics"]["error_rate"] == 0.0
    assert leaderboard_entry(read_record(path), "somebody", 1000.0) == entry
    manifest = leaderboard_manifest(entry, "run_leaderboard.json")
    assert manifest["schema_version"] == "leaderboard-export-manifest/v2"
    assert manifest["entries"][0]["idempotency_key"] == entry["metadata"]["idempotency_key"]


def test_vllms_form_of_an_offline_record_has_no_gaps(tmp_path):
    record = read_record(make_record(tmp_path))
    rows = [make_row(repeat, index, itl_ms=[]) for repeat in range(5) for index in range(NUM_REQUESTS)]
    result = vllm_result({**record, "settings": {"engine": {}}}, rows)
    assert result["p99_itl_ms"] is None and result["max_output_tokens_per_s"] is None
