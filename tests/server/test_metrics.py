from __future__ import annotations

from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families
from server_fakes import FakeAsyncEngine
from server_frame import serving

from nanovllm.engine.messages import STEP_SIZE_EDGES
from nanovllm.sampling_params import SamplingParams
from nanovllm.server.app import create_app
from nanovllm.server.auth import Keyring
from nanovllm.server.metrics import Histogram, Metrics, _one_two_five, render
from nanovllm.server.options import ServerOptions
from nanovllm.server.shared import SharedFolder

VLLM_NAMES = [
    "num_requests_running",
    "num_requests_waiting",
    "num_requests_waiting_by_reason",
    "kv_cache_usage_perc",
    "cache_config_info",
    "prompt_tokens",
    "prompt_tokens_cached",
    "generation_tokens",
    "request_success",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_inference_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_max_num_generation_tokens",
    "request_params_n",
    "request_params_max_tokens",
    "request_prefill_kv_computed_tokens",
]
VLLM_ENGINE_NAMES = ["prefix_cache_queries", "prefix_cache_hits", "num_preemptions"]


@pytest.fixture(scope="module")
def frame():
    with serving(options={"served_model_name": "the-model"}) as running:
        yield running


def families(frame):
    reply = frame.get("/metrics")
    assert reply.status == 200 and reply.headers["content-type"].startswith("text/plain")
    return {family.name: family for family in text_string_to_metric_families(reply.body.decode())}


def value(found, name, suffix="", **labels):
    (one,) = [s.value for s in found[name].samples if s.name == name + suffix and labels.items() <= s.labels.items()]
    return one


def test_the_names_labels_and_buckets_of_vllm(frame):
    found = families(frame)
    assert not [name for name in VLLM_NAMES if f"vllm:{name}" not in found]
    for family in found.values():
        for sample in family.samples:
            if family.name != "vllm:cache_config_info":
                assert sample.labels["model_name"] == "the-model" and sample.labels["engine"] == "0"
    edges = {sample.labels["le"] for sample in found["vllm:inter_token_latency_seconds"].samples if "le" in sample.labels}
    assert {"0.0005", "0.01", "0.025", "80.0", "+Inf"} <= edges
    edges = {sample.labels["le"] for sample in found["vllm:e2e_request_latency_seconds"].samples if "le" in sample.labels}
    assert {"0.3", "0.5", "7680.0"} <= edges


def test_lines_of_the_engine_come_from_its_stats():
    stats = {
        "num_running": 3,
        "num_waiting": 2,
        "num_free_blocks": 25,
        "num_kv_blocks": 100,
        "num_preemptions": 7,
        "forward_ns": 2e9,
        "joules_package-0": 7.5,
    }
    stats |= {"num_prefix_queried_tokens": 50, "num_prefix_hit_tokens": 20}
    stats |= {f"num_steps_up_to_{edge}": 0 for edge in [*STEP_SIZE_EDGES, "inf"]}
    stats |= {"num_steps_up_to_1": 3, "num_steps_up_to_256": 4, "num_steps_up_to_inf": 2, "num_computed_tokens": 90_000}
    stats |= {"num_waiting_rows": 1, "num_waiting_blocks": 0, "num_waiting_grammar": 1}
    stats |= {"model_bytes": 100.0, "read_bytes": 90.0, "written_bytes": 10.0, "max_admissible_tokens": 64}
    counts = Metrics(100).counts
    counts.gauges = {"requests_queued": 5}
    found = {f.name: f for f in text_string_to_metric_families(render(counts, stats, "m", {"block_size": 4}).decode())}
    assert not [name for name in VLLM_ENGINE_NAMES if f"vllm:{name}" not in found]
    assert value(found, "vllm:num_requests_waiting") == 7 and value(found, "vllm:num_requests_running") == 3
    waiting = "num_requests_waiting_by_reason"
    assert [value(found, f"vllm:{waiting}", reason=reason) for reason in ("capacity", "deferred")] == [6, 1]
    reasons = {sample.labels["reason"]: sample.value for sample in found[f"nanovllm:{waiting}"].samples}
    assert reasons == {"door": 5, "rows": 1, "blocks": 0, "grammar": 1}
    assert value(found, "vllm:estimated_write_bytes_per_gpu", "_total") == 10
    assert value(found, "vllm:kv_cache_usage_perc") == 0.75
    assert value(found, "vllm:num_preemptions", "_total") == 7
    assert value(found, "nanovllm:engine_forward_seconds", "_total") == 2
    assert value(found, "nanovllm:energy_joules", "_total", device="package-0") == 7.5
    assert value(found, "vllm:cache_config_info", block_size="4") == 1
    sizes = "vllm:iteration_tokens_total"
    assert [value(found, sizes, "_bucket", le=edge) for edge in ("128.0", "256.0", "16384.0", "+Inf")] == [3, 7, 7, 9]
    assert value(found, sizes, "_count") == 9 and value(found, sizes, "_sum") == 90_000


def test_a_dead_engine_has_no_lines_and_does_not_break_the_others():
    found = {f.name: f for f in text_string_to_metric_families(render(Metrics(100).counts, {}, "m", {}).decode())}
    assert "nanovllm:energy_joules" not in found  # no device tells
    assert "vllm:num_requests_running" not in found and "vllm:request_success" in found


def test_requests_are_counted(frame):
    before = families(frame)
    frame.run(prompt=[1] * 10, max_tokens=6, stream=True)
    frame.run(prompt=[1] * 10, max_tokens=4, n=2)
    frame.run(prompt=[])
    frame.wait_until(lambda: frame.server.num_open == 0)
    after = families(frame)

    def grown(name, suffix, **labels):
        return value(after, name, suffix, **labels) - value(before, name, suffix, **labels)

    assert grown("vllm:prompt_tokens", "_total") == 20 and grown("vllm:generation_tokens", "_total") == 14
    assert grown("vllm:prompt_tokens_cached", "_total") == 8
    assert grown("vllm:request_success", "_total", finished_reason="length") == 3
    assert grown("vllm:request_success", "_total", finished_reason="error") == 1
    assert grown("vllm:time_to_first_token_seconds", "_count") == 2
    assert grown("vllm:inter_token_latency_seconds", "_count") == 5 + 7  # all but the first of each request
    assert grown("vllm:e2e_request_latency_seconds", "_count") == 2
    assert grown("vllm:request_max_num_generation_tokens", "_sum") == 10
    assert grown("vllm:request_params_max_tokens", "_sum") == 6 + 4 + 4
    assert grown("vllm:request_params_n", "_sum") == 1 + 2 + 1
    assert grown("vllm:request_decode_time_seconds", "_count") == 2
    assert grown("nanovllm:http_responses", "_total", status="200") == 3  # and /metrics itself


def test_refusals_are_counted_by_reason():
    with serving(options={"max_queued_requests": 0}, max_num_seqs=1) as frame:
        frame.call(lambda: setattr(frame.server.admission, "num_running", 100))
        assert frame.run().status == 429
        assert value(families(frame), "nanovllm:requests_refused", "_total", reason="queue_full") == 1
        frame.call(lambda: setattr(frame.server.admission, "num_running", 0))


def test_load_says_what_is_open_queued_and_running():
    with serving(max_num_seqs=1) as frame:
        frame.call(lambda: setattr(frame.engine, "is_paused", True))
        for _ in range(8):
            frame.start_run()
        frame.wait_until(lambda: frame.server.num_open == 8 and len(frame.engine.llm_engine._requests) == 5)
        load = frame.get("/load").json
        assert (
            load["server_load"] == 8 and load["queued"] == 3 and load["waiting"] + load["running"] == 5 and not load["draining"]
        )
        frame.call(lambda: setattr(frame.engine, "is_paused", False))
        frame.wait_until(lambda: frame.server.num_open == 0)
        assert frame.get("/load").json["server_load"] == 0


def test_a_histogram_puts_a_value_at_its_edge_below_it_and_adds_up():
    histogram = Histogram.of([1, 2, 5])
    for number in (0.5, 1, 1.5, 5, 6):
        histogram.observe(number)
    histogram.observe(2, times=3)
    assert histogram.counts == [2, 4, 1, 1] and histogram.total == 20
    other = Histogram.of([1, 2, 5])
    other.observe(9)
    histogram.add(other)
    assert histogram.counts == [2, 4, 1, 2] and histogram.total == 29


def test_token_edges_go_up_to_the_context_length():
    assert _one_two_five(300) == [1, 2, 5, 10, 20, 50, 100, 200]


def test_front_ends_add_up_their_counts_and_a_new_process_goes_on_from_the_old_ones(tmp_path):
    def front_end(index):
        options = ServerOptions(num_frontends=2, max_queued_requests=11)
        shared = SharedFolder(tmp_path, index)
        return create_app(FakeAsyncEngine(), options, Keyring(), routes=[], shared=shared).server, shared  # type: ignore[arg-type]

    (first, _), (second, second_shared) = front_end(0), front_end(1)
    assert first.admission.max_queued == 6 and first.admission.capacity == 6  # of 11, and of 12
    first.metrics.count("vllm:generation_tokens", by=5)
    second.metrics.count("vllm:generation_tokens", by=7)
    second.metrics.observe("vllm:time_to_first_token_seconds", 0.3)
    second.num_open = 4
    second_shared.write_counts(second.all_counts())
    together = first.all_counts()
    assert together.counters["vllm:generation_tokens"][""] == 12 and together.gauges["requests_open"] == 4
    assert sum(together.histograms["vllm:time_to_first_token_seconds"].counts) == 1
    replaced, _ = front_end(1)
    assert (
        replaced.metrics.counts.counters["vllm:generation_tokens"][""] == 7 and replaced.all_counts().gauges["requests_open"] == 0
    )


def test_limits_that_an_admin_changed_reach_the_other_front_ends(tmp_path):
    first, second = SharedFolder(tmp_path, 0), SharedFolder(tmp_path, 1)
    assert second.changed_limits() is None
    first.write_limits({"max_queued_requests": 3})
    assert second.changed_limits() == {"max_queued_requests": 3} and second.changed_limits() is None


def test_a_record_counts_tokens_that_came_together_one_by_one():
    metrics = Metrics(100)
    record = metrics.begin(SamplingParams(max_tokens=9))
    completion = SimpleNamespace(token_ids=[1], finish_reason=None)
    output = SimpleNamespace(
        completions=[completion],
        prompt_token_ids=[1, 2],
        metrics=SimpleNamespace(num_cached_tokens=0, ttft_parts=None),
        finished=False,
    )
    record.grew(output)
    completion.token_ids += [1, 2, 3]
    record.grew(output)
    assert sum(metrics.counts.histograms["vllm:inter_token_latency_seconds"].counts) == 3
    assert record.ended(None) == 6
