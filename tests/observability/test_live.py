"""A real server with every listener on: what it writes, and that trace, metrics and records tell the same story."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import signal
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from fake_nvml import COMPILER, write_nvml
from live_server import live_server, write_tiny_model
from prometheus_client.parser import text_string_to_metric_families
from prometheus_server import NAME, PROMETHEUS, dashboard_queries, loaded_rules, prometheus, rules, samples

from nanovllm.observability.replay import replay_file
from nanovllm.observability.timeline import STAGES, TTFT_PARTS

opentelemetry = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")

TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SECRET = "xylophone"
NUM_REQUESTS = 5


class Collector(BaseHTTPRequestHandler):
    """An OTLP receiver: decodes the protobuf."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        request = opentelemetry.ExportTraceServiceRequest()
        request.ParseFromString(body)
        self.server.received.append((self.path, request))
        self.send_response(200)
        self.send_header("Content-Type", "application/x-protobuf")
        self.end_headers()
        self.wfile.write(opentelemetry.ExportTraceServiceResponse().SerializeToString())

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def collector():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    server.received = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def run(tmp_path_factory, collector):
    """A finished run of a server with everything on: its files, metrics, flight record, and what Prometheus said of it."""
    folder = tmp_path_factory.mktemp("observed")
    model = write_tiny_model(folder / "model")
    files = {name: str(folder / name) for name in ("stages.jsonl", "lifecycle.jsonl", "trace.json")}
    options = ["--model", str(model), "--served-model-name", "tiny", "--stage-log", files["stages.jsonl"]]
    options += ["--lifecycle-file", files["lifecycle.jsonl"], "--trace-file", files["trace.json"], "--stage-log-steps"]
    options += ["--otlp-endpoint", f"http://127.0.0.1:{collector.server_port}/v1/traces"]
    options += ["--flight-recorder-dir", str(folder), "--log-level", "INFO"]
    environment = {"NANOVLLM_ADMIN_KEYS": "admin-key-of-this-test"}
    if COMPILER:  # two GPUs that tell their energy
        environment["LD_LIBRARY_PATH"] = f"{write_nvml(folder).parent}:{os.environ.get('LD_LIBRARY_PATH', '')}".rstrip(":")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        with live_server(*options) as server:
            ask(server, "chat/completions", {"messages": [{"role": "user", "content": f"Tell me of the {SECRET}."}]}, stream=True)
            for number in range(4):
                ask(server, "completions", {"prompt": f"{SECRET} " * (10 + 40 * number)}, stream=number % 2 == 0)
            headers = {"Authorization": "Bearer admin-key-of-this-test"}
            request = urllib.request.Request(f"{server.url}/admin/flight_record", b"", headers)
            with urllib.request.urlopen(request) as reply:
                record = reply.read()
            engine = engine_pid(server.process.pid)
            os.kill(engine, signal.SIGUSR2)
            wait_for(lambda: len(list(folder.glob("nanovllm-flight-*.json"))) == 2)
            metrics = server.get("/metrics").body.decode()
            answers = ask_prometheus(server, folder / "prometheus") if PROMETHEUS else None
    assert not [line for line in server.log if SECRET in line]
    return folder, metrics, record, answers


def ask_prometheus(server, folder):
    """(query of the dashboard -> values, rules, name of a recorded rule -> values), under load."""

    def make_load():
        server.post("/v1/completions", {"prompt": "a b c d " * 20, "max_tokens": 8, "ignore_eos": True})

    with prometheus(int(server.url.rpartition(":")[2]), folder, make_load) as address:
        loaded = loaded_rules(address)
        values = {query: samples(address, query.replace("$__rate_interval", "1m")) for query in dashboard_queries()}
        recorded = {rule["record"]: samples(address, rule["record"]) for rule in rules() if "record" in rule}
    return values, loaded, recorded


def ask(server, path, body, stream):
    body = {**body, "max_tokens": 12, "temperature": 0, "stream": stream, "ignore_eos": True}
    headers = {"Content-Type": "application/json", "traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}
    request = urllib.request.Request(f"{server.url}/v1/{path}", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as reply:
        reply.read()


def engine_pid(parent):
    return int(Path(f"/proc/{parent}/task/{parent}/children").read_text().split()[0])


def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def summaries(folder):
    """Of the five requests that were there before Prometheus came."""
    ended = [line for line in lines(folder / "lifecycle.jsonl") if "spans_ms" in line["metadata"]]
    return {line["request_id"]: line["metadata"] for line in ended[:NUM_REQUESTS]}


def test_every_request_has_nine_stages_in_order(run):
    folder, *_ = run
    by_request: dict[str, list] = {}
    for line in lines(folder / "lifecycle.jsonl"):
        by_request.setdefault(line["request_id"], []).append(line)
    assert len(by_request) >= NUM_REQUESTS
    for entries in by_request.values():
        assert [entry["stage"] for entry in entries] == list(STAGES)
        times = [entry["timestamp_ms"] for entry in entries]
        assert times == sorted(times), dict(zip(STAGES, times))
        assert {entry["metadata"]["plane"] for entry in entries} == {"control", "data"}
        assert sum(entries[-1]["metadata"]["spans_ms"].values()) == pytest.approx(times[-1] - times[0])


def test_the_parts_of_ttft_add_up_in_record_trace_and_metrics_alike(run, collector):
    folder, metrics, *_ = run
    record = summaries(folder)
    families = {family.name: family for family in text_string_to_metric_families(metrics)}

    def total(name):
        return next(sample.value for sample in families[name].samples if sample.name.endswith("_sum"))

    assert all(value["ttft_ms"] == pytest.approx(sum(value["ttft_parts_ms"].values())) for value in record.values())
    ttft = sum(value["ttft_ms"] for value in record.values()) / 1e3
    assert total("vllm:time_to_first_token_seconds") == pytest.approx(ttft, rel=0.01)
    for part in TTFT_PARTS:
        of_record = sum(value["ttft_parts_ms"][part] for value in record.values()) / 1e3
        assert total(f"nanovllm:ttft_{part}_seconds") == pytest.approx(of_record, rel=0.01, abs=1e-6), part
    assert total("vllm:request_time_per_output_token_seconds") == pytest.approx(
        sum(value["tpot_ms"] for value in record.values()) / 1e3, rel=0.01
    )
    spans = root_spans(collector)
    for request_id, value in record.items():
        attributes = attributes_of(spans[request_id])
        assert attributes["gen_ai.server.time_to_first_token"] == pytest.approx(value["ttft_ms"] / 1e3, rel=0.01)
        assert sum(attributes[f"nanovllm.ttft.{part}"] for part in TTFT_PARTS) == pytest.approx(value["ttft_ms"] / 1e3, rel=0.01)
        (decode,) = [
            span for span in all_spans(collector) if span.parent_span_id == spans[request_id].span_id and span.name == "decode"
        ]
        seconds = (decode.end_time_unix_nano - decode.start_time_unix_nano) / 1e9
        assert seconds / (attributes["gen_ai.usage.output_tokens"] - 1) == pytest.approx(value["tpot_ms"] / 1e3, rel=0.01)
    parts = sum(total(f"nanovllm:ttft_{part}_seconds") for part in TTFT_PARTS)
    assert parts == pytest.approx(total("vllm:time_to_first_token_seconds"), rel=0.01)


def all_spans(collector):
    return [
        span
        for _, request in collector.received
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]


def attributes_of(span):
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}


def root_spans(collector):
    return {
        attributes_of(span)["gen_ai.response.id"]: span for span in all_spans(collector) if span.kind == span.SPAN_KIND_SERVER
    }


def test_spans_arrive_at_an_otlp_receiver_under_the_callers_trace(run, collector):
    assert {path for path, _ in collector.received} == {"/v1/traces"}
    every_root = root_spans(collector)
    assert all(not root.parent_span_id for root in every_root.values() if root.trace_id.hex() != TRACE_ID)
    roots = {name: root for name, root in every_root.items() if root.trace_id.hex() == TRACE_ID}
    spans = [span for span in all_spans(collector) if span.trace_id.hex() == TRACE_ID]
    assert len(roots) == NUM_REQUESTS
    assert sorted(root.name for root in roots.values()) == ["chat tiny", *["text_completion tiny"] * 4]
    for root in roots.values():
        assert root.parent_span_id.hex() == PARENT_ID
        attributes = attributes_of(root)
        assert attributes["gen_ai.request.model"] == "tiny" and attributes["gen_ai.usage.output_tokens"] == 12
        assert attributes["gen_ai.usage.input_tokens"] > 10
        children = [span for span in spans if span.parent_span_id == root.span_id]
        assert {"tokenization", "queueing", "prefill", "decode", "streaming"} <= {span.name for span in children}
        for child in children:
            assert root.start_time_unix_nano <= child.start_time_unix_nano <= child.end_time_unix_nano
            assert child.end_time_unix_nano <= root.end_time_unix_nano
        assert abs(root.end_time_unix_nano / 1e9 - time.time()) < 300


PHASES = {
    "M": {"name", "args"},
    "X": {"name", "dur", "cat", "args"},
    "C": {"name", "args"},
    "b": {"name", "cat", "id"},
    "e": {"name", "cat", "id"},
}


def test_the_trace_is_what_perfetto_reads(run):
    folder, *_ = run
    trace = json.loads((folder / "trace.json").read_text())
    assert set(trace) == {"traceEvents", "displayTimeUnit"}
    events = trace["traceEvents"]
    for event in events:
        assert PHASES[event["ph"]] <= set(event) and isinstance(event["ts"], (int, float)) and event["ts"] >= 0
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int)
        assert event["ph"] != "X" or event["dur"] >= 0
    for lane in (1, 2):  # slices of one lane do not overlap
        slices = sorted((e["ts"], e["dur"]) for e in events if e["ph"] == "X" and e["tid"] == lane)
        assert slices
        assert all(ts + dur <= following + 1 for (ts, dur), (following, _) in itertools.pairwise(slices))
    opened: dict[tuple, int] = {}
    for event in events:
        if event["ph"] in "be":
            key = event["id"], event["name"]
            opened[key] = opened.get(key, 0) + (1 if event["ph"] == "b" else -1)
    assert len({request for request, _ in opened}) >= NUM_REQUESTS and not any(opened.values())
    assert {e["args"]["plane"] for e in events if e["ph"] == "X"} == {"control", "data"}


def test_the_stage_log_has_every_field(run):
    folder, *_ = run
    entries = lines(folder / "stages.jsonl")
    fields = {"timestamp", "request_id", "stage", "prompt_len", "generated_len", "batch_size", "plane", "step"}
    fields |= {"running_size", "waiting_len", "free_blocks", "ts_ns"}
    assert all(set(entry) == fields for entry in entries)
    assert set(STAGES) | {"step"} == {entry["stage"] for entry in entries}
    assert all(entry["plane"] in ("control", "data") for entry in entries)


def test_nothing_that_was_written_holds_a_word_of_the_prompt(run, collector):
    folder, metrics, record, _ = run
    written = [path.read_text() for path in folder.glob("*.json*")]
    assert len(written) == 5 and SECRET not in "".join(written) + metrics + record.decode()
    assert SECRET.encode() not in b"".join(request.SerializeToString() for _, request in collector.received)


needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler, so no library that tells energy")


@needs_compiler
def test_every_name_in_dashboard_and_rules_is_in_a_scrape(run):
    known = {sample.name for family in text_string_to_metric_families(run[1]) for sample in family.samples}
    known |= {rule["record"] for rule in rules() if "record" in rule}
    used = {name for query in [*dashboard_queries(), *(rule["expr"] for rule in rules())] for name in NAME.findall(query)}
    assert len(used) > 25 and not used - known


@needs_compiler
@pytest.mark.skipif(PROMETHEUS is None, reason="there is no prometheus (apt-get install prometheus)")
def test_a_real_prometheus_answers_every_query_and_takes_every_rule(run):
    values, loaded, recorded = run[3]
    assert not {query: found for query, found in values.items() if not found or "NaN" in found}
    assert {rule["health"] for rule in loaded} == {"ok"} and len(loaded) == len(rules())
    assert not [rule["name"] for rule in loaded if rule.get("state") == "firing"]
    assert not [name for name, found in recorded.items() if not found]


def test_flight_records_of_a_live_server_replay(run):
    folder, _, record, _ = run
    paths = sorted(folder.glob("nanovllm-flight-*.json"))
    assert paths[0].read_bytes() == record
    for path, reason in zip(paths, ("asked for", "SIGUSR2")):
        report = replay_file(str(path))
        assert report.difference is None and report.reason == reason and report.num_requests == 5 and report.num_steps >= 50
