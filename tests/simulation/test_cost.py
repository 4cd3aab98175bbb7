"""The cost model beside kernels, steps and the engine's own tables; calibration reproduces the profile."""

from __future__ import annotations

import gzip
import json
from dataclasses import fields, replace
from pathlib import Path

import pytest

from nanovllm.engine.batch import ScheduledBatch
from nanovllm.errors import ConfigError
from nanovllm.simulation import cost as cost_module
from nanovllm.simulation.calibrate import calibrate, calibrate_front_end, calibrate_requests
from nanovllm.simulation.cost import CostModel
from nanovllm.simulation.hardware import H200_CALIBRATION, PROFILES, find_hardware
from nanovllm.simulation.shapes import SHAPES, find_shape
from nanovllm.simulation.validate import OFFLINE, Line, Server, _loads, _serving, describe_lines, validate
from nanovllm.workloads import make_workload, shifted

RECORDS = Path(__file__).resolve().parents[2] / "benchmarks/records"


def record(name: str) -> dict:
    return json.loads((RECORDS / f"2026-11-25-gpu-{name}.json").read_text())


def model(shape: str = "qwen3-0.6b", **options) -> CostModel:
    return CostModel(SHAPES[shape], PROFILES["h200"], is_greedy=False, **options)


def batch(*chunks: tuple[int, int], sampled: int | None = None) -> ScheduledBatch:
    starts, lengths = map(list, zip(*chunks))
    count = len(chunks) if sampled is None else sampled
    return ScheduledBatch(0, list(range(len(chunks))), starts, lengths, list(range(count)))


def test_the_profile_is_what_the_records_say():
    offline, kernels, costs = (
        json.loads((RECORDS / f"2026-11-29-{name}.json").read_text())
        for name in ("gpu-qwen3-0.6b-2", "gpu-kernels", "front-end-costs-h")
    )
    computed = calibrate(PROFILES["h200"], kernels, record("steps-qwen3-0.6b"), [offline])
    computed = calibrate_requests(calibrate_front_end(computed, costs), costs["engine"])
    for field in fields(H200_CALIBRATION):
        assert getattr(H200_CALIBRATION, field.name) == pytest.approx(getattr(computed, field.name), rel=0.01), field.name
    long_products = record("kernels")["ceilings"]["bf16_flop_per_s"] / PROFILES["h200"].flops
    assert H200_CALIBRATION.product == pytest.approx(long_products, rel=0.01)  # of the session whose 8B lines are compared


def test_decoding_steps_are_within_a_tenth_of_the_record():
    costs = model()
    for row in record("steps-qwen3-0.6b")["steps"]:
        predicted = costs.decode(row["batch"], row["batch"] * (row["context"] + 1)).device_s * 1e6
        assert predicted == pytest.approx(row["us"], rel=0.14 if row["batch"] == 1 else 0.10), row


def test_products_of_prompts_are_within_a_seventh_of_the_record():
    costs = model("qwen3-8b")
    errors = []
    for row in json.loads((RECORDS / "2026-11-29-gpu-products.json").read_text())["kernels"]:
        total = cost_module._Sum()
        costs._add_product(total, 1, *map(int, row["shape"].split(" x ")))
        errors.append(abs(total.seconds * 1e6 / row["us"] - 1))
    assert len(errors) == 20 and max(errors) < 0.14 and sorted(errors)[10] < 0.05


def test_a_step_of_single_tokens_is_a_decoding_step():
    costs = model()
    assert costs.step(batch((99, 1), (199, 1))) == costs.decode(2, 300)


def test_bytes_and_operations_of_a_step_are_those_of_the_shape():
    spec, costs = SHAPES["qwen3-8b"], model("qwen3-8b", use_graphs=False)
    cost = costs.decode(3, 3000)
    weights = spec.num_parameters - spec.vocab_size * spec.hidden_size  # the embedding is not read as a whole
    assert cost.num_bytes == pytest.approx(2 * weights + 3000 * spec.kv_bytes_per_token(2), rel=0.01)
    assert cost.num_operations == pytest.approx(3 * 2 * weights, rel=0.01)


def test_more_tokens_keys_and_sequences_cost_more():
    costs = model()
    assert costs.decode(4, 4000).device_s > costs.decode(4, 400).device_s
    assert costs.decode(200, 4000).device_s > costs.decode(4, 4000).device_s
    assert costs.step(batch((0, 4096))).device_s > costs.step(batch((0, 2048))).device_s > costs.step(batch((0, 512))).device_s
    assert costs.step(batch((4096, 512))).device_s > costs.step(batch((0, 512))).device_s


def test_a_graph_costs_its_bucket_and_no_launches():
    graphs, eager = model(), model(use_graphs=False)
    assert graphs.decode(9, 900).device_s == graphs.decode(16, 900).device_s
    assert eager.decode(9, 900).device_s < eager.decode(16, 900).device_s
    assert graphs.decode(9, 900).launch_s == 0 < eager.decode(9, 900).launch_s


def test_buckets_are_those_of_the_engine():
    graphs = pytest.importorskip("nanovllm.runner.cuda_graphs", reason="needs Triton", exc_type=ImportError)
    for limit in (1, 3, 256, 300, 1000):
        assert cost_module.decode_sizes(limit) == graphs.decode_sizes(limit)
        assert cost_module.mixed_sizes(64 * limit) == graphs.mixed_sizes(64 * limit)


def test_offline_lines_of_prompts_hold_the_bar():
    from nanovllm.simulation.run import simulate
    from nanovllm.simulation.validate import _deployment
    from nanovllm.workloads import Request

    for name in ("qwen3-0.6b", "qwen3-8b"):
        measured = record(name)
        deployment = replace(_deployment(measured, is_greedy=False), has_server=False)
        prompts = simulate(deployment, make_workload("fixed", num_requests=64, num_input=2048, num_output=1).requests).finished
        rate = 64 * 2048 / max(one.finish for one in prompts)
        assert rate == pytest.approx(measured["results"]["prompt_tok_s_64x2048"]["median"], rel=0.10)
        (long,) = simulate(deployment, [Request(0.0, (1,) * 8192, 1)]).finished
        assert long.ttft * 1e3 == pytest.approx(measured["results"]["ttft_8192_ms"]["median"], rel=0.10)


def test_the_requests_of_the_serving_records_are_simulated():
    """Prompts are those that `bench serve` makes, moved for each repeat."""
    loads = list(_loads(RECORDS, Server(("at-once-128",), 256)))
    workload = make_workload("poisson", rate=float("inf"), num_requests=128, num_input=1024, num_output=512)
    assert [load.requests for load in loads] == [shifted(workload, repeat).requests for repeat in (0, 1, 2)]
    assert loads[0].what == "128 at once, 256 rows"
    assert all(len(load.rows) == 128 and load.rows[0]["repeat"] == repeat for repeat, load in enumerate(loads))


def test_of_repeats_each_metric_has_its_median(tmp_path):
    """Three repeats of two requests at once; the slow one is neither the first nor the last."""
    settings = {"workload": {"parameters": {"rate": "inf", "num_requests": 2, "num_input": 8, "num_output": 2}}, "settings": {}}
    (tmp_path / "2026-11-29-gpu-serve-x.json").write_text(json.dumps(settings))
    times = {"sent_ms": 0.0, "latency_ms": 50.0, "num_output": 2}
    rows = [{"repeat": repeat, "ttft_ms": ttft, **times} for repeat, ttft in ((0, 10.0), (1, 30.0), (2, 20.0)) for _ in range(2)]
    with gzip.open(tmp_path / "2026-11-29-gpu-serve-x.rows.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, rows)))
    engine = json.loads((RECORDS / OFFLINE[0]).read_text())
    lines = {line.metric: line for line in _serving(Server(("x",), 512), tmp_path, engine)}
    assert lines["TTFT p50, ms"].measured == 20.0 and lines["TPOT p50, ms"].measured == 30.0
    assert lines["output tok/s"].measured == pytest.approx(4 / 0.05)
    assert 3 < lines["TTFT p50, ms"].predicted < 15


def test_the_table_of_lines_counts_what_holds_the_bar():
    text = describe_lines([Line("a", "x", 100.0, 104.0), Line("a", "y", 100.0, 120.0), Line("a", "z", 100.0, 101.0, True)])
    assert "1 of 2 predicted lines are within 10%, 1 within 5%" in text
    assert "| a | y | 100.00 | 120.00 | +20.0% |" in text


def test_validation_without_records_says_what_is_missing(tmp_path):
    with pytest.raises(ConfigError, match="validate needs the record .*gpu-qwen3-0.6b-2.json"):
        validate(tmp_path)


def test_unknown_names_are_refused_with_a_suggestion(tmp_path):
    with pytest.raises(ConfigError, match="gpu='h20' .*h200"):
        find_hardware("h20")
    with pytest.raises(ConfigError, match="model='qwen3-8' .*qwen3-8b"):
        find_shape("qwen3-8")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="model=.* does not hold an object"):
        find_shape(str(tmp_path))


def test_a_config_file_is_a_shape(tmp_path):
    keys = {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 1000,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 512,
    }
    (tmp_path / "config.json").write_text(json.dumps(keys))
    spec = find_shape(str(tmp_path))
    assert (spec.num_layers, spec.hidden_size, spec.qk_norm) == (2, 64, True)
