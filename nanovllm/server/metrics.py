"""What /metrics counts: names, labels and buckets of vLLM, so that its dashboards work, and ours under `nanovllm:`.

Counting is on the path of every token, so a histogram is a list of counts and one binary search; prometheus-client only
writes the text. A `Snapshot` is plain data: front ends leave theirs in a shared folder and whoever is asked adds them up.
vLLM's edges are kept and finer ones added below, where a small model lives. Knows no HTTP; read next: `load.py`.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from nanovllm.engine.messages import STEP_SIZE_EDGES
from nanovllm.log import DEGRADATIONS
from nanovllm.outputs import GenerationOutput
from nanovllm.sampling_params import SamplingParams

FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
PER_TOKEN = (0.0005, 0.001, 0.002, 0.003, 0.004, 0.005, 0.0075, *PER_TOKEN)
REQUEST = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
REQUEST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, *REQUEST)
COMPLETIONS = (1, 2, 5, 10, 20)
PART = (0.00001, 0.0001, 0.0005, *FIRST_TOKEN)

TIMES = {  # histograms in seconds
    "vllm:time_to_first_token_seconds": ("time to first token", FIRST_TOKEN),
    "vllm:inter_token_latency_seconds": ("time between tokens, per token", PER_TOKEN),
    "vllm:request_time_per_output_token_seconds": ("mean time per output token after the first, per request", PER_TOKEN),
    "vllm:e2e_request_latency_seconds": ("time from arrival to the last token", REQUEST),
    "vllm:request_queue_time_seconds": ("time from arrival to the first scheduling", REQUEST),
    "vllm:request_inference_time_seconds": ("time from the first scheduling to the last token", REQUEST),
    "vllm:request_prefill_time_seconds": ("time from the first scheduling to the first token", REQUEST),
    "vllm:request_decode_time_seconds": ("time from the first token to the last", REQUEST),
    "nanovllm:ttft_queue_seconds": ("part of the time to first token: waiting in the engine", PART),
    "nanovllm:ttft_prefill_seconds": ("part of the time to first token: computing the prompt", PART),
    "nanovllm:ttft_first_decode_seconds": ("part of the time to first token: from the result to an output", PART),
    "nanovllm:ttft_front_end_seconds": ("part of the time to first token: before and after the engine process", PART),
}
SIZES = {  # histograms of tokens per request
    "vllm:request_prompt_tokens": "prompt tokens",
    "vllm:request_generation_tokens": "generated tokens",
    "vllm:request_max_num_generation_tokens": "generated tokens of the longest completion",
    "vllm:request_params_max_tokens": "max_tokens as asked for",
    "vllm:request_prefill_kv_computed_tokens": "prompt tokens that were not cached",
}
COUNTERS = {  # name -> (help, label or None)
    "vllm:prompt_tokens": ("prompt tokens of requests that got a first token", None),
    "vllm:prompt_tokens_cached": ("of them, found in the prefix cache", None),
    "vllm:generation_tokens": ("generated tokens", None),
    "vllm:request_success": ("completions that ended, by reason", "finished_reason"),
    "nanovllm:requests_refused": ("requests that were not served, by reason", "reason"),
    "nanovllm:http_responses": ("HTTP responses, by status", "status"),
}
ENGINE_GAUGES = {  # name -> (help, key of `AsyncEngine.stats`)
    "vllm:num_requests_running": ("sequences in the running batch", "num_running"),
    "nanovllm:kv_cache_free_blocks": ("KV blocks that nobody holds", "num_free_blocks"),
    "nanovllm:max_admissible_tokens": ("longest prompt that would be admitted now", "max_admissible_tokens"),
    "nanovllm:device_peak_bytes_per_second": ("of the data sheet; measured on a CPU", "peak_bytes_per_s"),
    "nanovllm:device_peak_operations_per_second": ("of the data sheet; measured on a CPU", "peak_operations_per_s"),
    "nanovllm:engine_bandwidth_share": ("bytes per second of the last step, as a share of the device's peak", "bandwidth_share"),
    "nanovllm:engine_operations_share": ("operations per second of the last step, as a share of the peak", "operations_share"),
}
ENGINE_COUNTERS = {  # name -> (help, key of `AsyncEngine.stats`, factor)
    "vllm:prefix_cache_queries": ("tokens looked up in the prefix cache", "num_prefix_queried_tokens", 1),
    "vllm:prefix_cache_hits": ("tokens found in the prefix cache", "num_prefix_hit_tokens", 1),
    "vllm:num_preemptions": ("sequences that gave their blocks back and started again", "num_preemptions", 1),
    "vllm:corrupted_requests": ("completions that ended because of NaN or infinity", "num_nonfinite_logits", 1),
    "vllm:estimated_flops_per_gpu": ("operations that steps had to do at least", "model_operations", 1),
    "vllm:estimated_read_bytes_per_gpu": ("bytes of weights, keys and values that steps had to read", "read_bytes", 1),
    "vllm:estimated_write_bytes_per_gpu": ("bytes of keys and values that steps had to write", "written_bytes", 1),
    "nanovllm:engine_steps": ("steps of the engine", "num_steps", 1),
    "nanovllm:engine_computed_tokens": ("tokens that went through the model", "num_computed_tokens", 1),
    "nanovllm:engine_forward_seconds": ("time that the steps spent on the device", "forward_ns", 1e-9),
    "nanovllm:engine_schedule_seconds": ("host time of deciding what a step computes", "schedule_ns", 1e-9),
    "nanovllm:engine_apply_seconds": ("host time of appending tokens, stopping and publishing blocks", "apply_ns", 1e-9),
    "nanovllm:engine_model_bytes": ("bytes of weights, keys and values that steps had to move at least", "model_bytes", 1),
    "nanovllm:engine_model_operations": ("operations that steps had to do at least", "model_operations", 1),
    "nanovllm:engine_roof_seconds": ("least time of the same steps at the device's peak", "roof_ns", 1e-9),
    "nanovllm:nonfinite_logits": ("completions that ended because the model computed NaN or infinity", "num_nonfinite_logits", 1),
    "nanovllm:prefix_cache_evictions": ("cached blocks that were overwritten", "num_prefix_evictions", 1),
}


class Histogram(msgspec.Struct):
    """Counts per bucket; the last one is for values beyond the last edge."""

    edges: list[float]
    counts: list[int]
    total: float = 0.0

    @classmethod
    def of(cls, edges: Iterable[float]) -> Histogram:
        edges = list(edges)
        return cls(edges, [0] * (len(edges) + 1))

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.edges, value)] += times
        self.total += value * times

    def add(self, other: Histogram) -> None:
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts)]
        self.total += other.total


class Snapshot(msgspec.Struct):
    """All counts of one front end. `gauges` are of now and are not carried over when a process is replaced."""

    histograms: dict[str, Histogram]
    counters: dict[str, dict[str, float]]  # name -> label value ("" without a label) -> count
    gauges: dict[str, float] = {}

    def add(self, other: Snapshot) -> None:
        for name, histogram in other.histograms.items():
            if name in self.histograms and self.histograms[name].edges == histogram.edges:
                self.histograms[name].add(histogram)
        for name, values in other.counters.items():
            mine = self.counters.setdefault(name, {})
            for label, value in values.items():
                mine[label] = mine.get(label, 0) + value
        for name, value in other.gauges.items():
            self.gauges[name] = self.gauges.get(name, 0) + value


class Metrics:
    """The counts of this process."""

    def __init__(self, max_model_len: int) -> None:
        sizes = _one_two_five(max_model_len)
        histograms = {name: Histogram.of(edges) for name, (_, edges) in TIMES.items()}
        histograms |= {name: Histogram.of(sizes) for name in SIZES}
        histograms["vllm:request_params_n"] = Histogram.of(COMPLETIONS)
        counters: dict[str, dict[str, float]] = {name: {} if label else {"": 0} for name, (_, label) in COUNTERS.items()}
        counters["vllm:request_success"] = dict.fromkeys(("stop", "length", "abort", "error"), 0)
        counters["nanovllm:requests_refused"] = dict.fromkeys(("queue_full", "queue_timeout"), 0)  # a rate needs a first 0
        self.counts = Snapshot(histograms, counters)

    def begin(self, params: SamplingParams, arrived: float | None = None, name: str = "") -> RequestRecord:
        """`arrived`: when the HTTP request did, in seconds of the monotonic clock; None: now."""
        return RequestRecord(self, params, time.monotonic() if arrived is None else arrived, name)

    def count(self, name: str, label: str = "", by: float = 1) -> None:
        values = self.counts.counters[name]
        values[label] = values.get(label, 0) + by

    def observe(self, name: str, value: float | None) -> None:
        if value is not None:
            self.counts.histograms[name].observe(max(0.0, value))

    def refused(self, reason: str) -> None:
        self.count("nanovllm:requests_refused", reason)


class RequestRecord:
    """One request while it runs: what its tokens add to the counts, and what the access log says of it."""

    __slots__ = ("_inter_token", "_last", "_metrics", "_num_tokens", "_params", "arrived", "first_token_s", "name", "output")

    def __init__(self, metrics: Metrics, params: SamplingParams, arrived: float, name: str) -> None:
        self._metrics, self._params = metrics, params
        self.name = name  # the request id in the engine
        self.arrived = self._last = arrived
        self._num_tokens = 0
        self._inter_token = metrics.counts.histograms["vllm:inter_token_latency_seconds"]
        self.first_token_s: float | None = None
        self.output: GenerationOutput | None = None

    def grew(self, output: GenerationOutput) -> None:
        now = time.monotonic()
        completions = output.completions
        num_tokens = len(completions[0].token_ids)
        if len(completions) > 1:
            num_tokens = sum(len(completion.token_ids) for completion in completions)
        num_new = num_tokens - self._num_tokens
        if num_new > 0:
            if self.first_token_s is None:
                self._first(output, now)
            else:
                self._inter_token.observe((now - self._last) / num_new, num_new)
            self._num_tokens, self._last = num_tokens, now

    def _first(self, output: GenerationOutput, now: float) -> None:
        self.output, self.first_token_s = output, now - self.arrived
        self._metrics.observe("vllm:time_to_first_token_seconds", self.first_token_s)
        if (parts := output.metrics.ttft_parts) is not None:
            for name, seconds in zip(parts._fields, parts):
                self._metrics.observe(f"nanovllm:ttft_{name}_seconds", seconds)
            self._metrics.observe("nanovllm:ttft_front_end_seconds", self.first_token_s - sum(parts))
        self._metrics.count("vllm:prompt_tokens", by=len(output.prompt_token_ids))

    def ended(self, error: BaseException | None) -> int:
        """Whatever ended it. Returns the tokens that it used."""
        metrics, output = self._metrics, self.output
        metrics.observe("vllm:request_params_n", self._params.n)
        metrics.observe("vllm:request_params_max_tokens", self._params.max_tokens)
        if output is None:
            if error is not None:
                metrics.count("vllm:request_success", "error", self._params.n)
            return 0
        metrics.count("vllm:generation_tokens", by=self._num_tokens)
        for completion in output.completions:
            reason = completion.finish_reason or ("abort" if error is None else "error")
            metrics.count("vllm:request_success", reason)
        self._observe_sizes(output)
        if output.finished:
            self._observe_times(output)
        return len(output.prompt_token_ids) + self._num_tokens

    def describe(self) -> dict[str, Any]:
        """For the access log."""
        if self.output is None:
            return {"prompt_tokens": None, "tokens": 0}
        return {
            "prompt_tokens": len(self.output.prompt_token_ids),
            "cached_tokens": self.output.metrics.num_cached_tokens,
            "tokens": self._num_tokens,
            "ttft": None if self.first_token_s is None else round(self.first_token_s, 4),
            "finish": [completion.finish_reason for completion in self.output.completions],
        }

    def _observe_sizes(self, output: GenerationOutput) -> None:
        metrics, num_prompt_tokens = self._metrics, len(output.prompt_token_ids)
        num_cached = output.metrics.num_cached_tokens
        metrics.count("vllm:prompt_tokens_cached", by=num_cached)
        metrics.observe("vllm:request_prompt_tokens", num_prompt_tokens)
        metrics.observe("vllm:request_prefill_kv_computed_tokens", num_prompt_tokens - num_cached)
        metrics.observe("vllm:request_generation_tokens", self._num_tokens)
        longest = max(len(completion.token_ids) for completion in output.completions)
        metrics.observe("vllm:request_max_num_generation_tokens", longest)

    def _observe_times(self, output: GenerationOutput) -> None:
        """The engine's times are of the same monotonic clock as ours."""
        metrics, times = self._metrics, output.metrics
        metrics.observe("vllm:e2e_request_latency_seconds", self._last - self.arrived)
        scheduled, first, finish = times.first_scheduled_time, times.first_token_time, times.finish_time
        if finish is not None and self.first_token_s is not None and times.num_generated_tokens > 1:
            decode = finish - self.arrived - self.first_token_s  # so that TTFT and the tokens after it add up
            metrics.observe("vllm:request_time_per_output_token_seconds", decode / (times.num_generated_tokens - 1))
        if scheduled is not None:
            metrics.observe("vllm:request_queue_time_seconds", scheduled - self.arrived)
            metrics.observe("vllm:request_inference_time_seconds", None if finish is None else finish - scheduled)
            metrics.observe("vllm:request_prefill_time_seconds", None if first is None else first - scheduled)
        if first is not None and finish is not None:
            metrics.observe("vllm:request_decode_time_seconds", finish - first)


def _one_two_five(limit: int) -> list[int]:
    """1, 2, 5, 10, 20, ... up to `limit`."""
    edges = [mantissa * 10**exponent for exponent in range(10) for mantissa in (1, 2, 5)]
    return [edge for edge in edges if edge <= limit]


# --- text


def render(counts: Snapshot, stats: Mapping[str, Any], model_name: str, config: Mapping[str, Any]) -> bytes:
    """Prometheus text. `stats`: of the engine; empty when it is dead, then its lines are missing."""
    registry = CollectorRegistry()
    registry.register(_Families([*_of_counts(counts, model_name), *_of_engine(counts, stats, model_name, config)]))  # type: ignore[arg-type]
    return generate_latest(registry)


class _Families:
    def __init__(self, families: list[Any]) -> None:
        self._families = families

    def collect(self) -> list[Any]:
        return self._families


def _of_counts(counts: Snapshot, model_name: str) -> Iterable[Any]:
    for name, histogram in counts.histograms.items():
        text = TIMES[name][0] if name in TIMES else SIZES.get(name, "completions per request")
        family = HistogramMetricFamily(name, text, labels=["model_name", "engine"])
        cumulated, buckets = 0, []
        for edge, number in zip([*histogram.edges, float("inf")], histogram.counts):
            cumulated += number
            buckets.append(("+Inf" if edge == float("inf") else repr(float(edge)), cumulated))
        family.add_metric([model_name, "0"], buckets, histogram.total)
        yield family
    for name, values in counts.counters.items():
        text, label = COUNTERS[name]
        counter = CounterMetricFamily(name, text, labels=["model_name", "engine", *([label] if label else [])])
        for value_of_label, value in values.items():
            counter.add_metric([model_name, "0", *([value_of_label] if label else [])], value)
        yield counter
    for name, value in counts.gauges.items():
        yield _gauge(f"nanovllm:{name}", "of all front ends", model_name, value)


def _of_engine(counts: Snapshot, stats: Mapping[str, Any], model_name: str, config: Mapping[str, Any]) -> Iterable[Any]:
    num_queued = counts.gauges.get("requests_queued", 0)
    num_waiting = num_queued + stats.get("num_waiting", 0)
    yield _gauge(
        "vllm:num_requests_waiting", "completions that wait, in the front ends or in the engine", model_name, num_waiting
    )
    by_reason = GaugeMetricFamily("vllm:num_requests_waiting_by_reason", "why", labels=["model_name", "engine", "reason"])
    num_deferred = stats.get("num_waiting_grammar", 0)
    by_reason.add_metric([model_name, "0", "capacity"], num_waiting - num_deferred)
    by_reason.add_metric([model_name, "0", "deferred"], num_deferred)
    yield by_reason
    reasons = {"door": num_queued, **{key: value for key, value in stats.items() if key.startswith("num_waiting_")}}
    text = "door: max_num_seqs and a quarter are in the engine; there, by the reason of the first"
    finer = GaugeMetricFamily("nanovllm:num_requests_waiting_by_reason", text, labels=["model_name", "engine", "reason"])
    for reason, number in reasons.items():
        finer.add_metric([model_name, "0", reason.removeprefix("num_waiting_")], number)
    yield finer
    names = sorted(config)
    facts = GaugeMetricFamily("vllm:cache_config_info", "options of the engine", labels=["engine", *names])
    facts.add_metric(["0", *(str(config[name]) for name in names)], 1)
    yield facts
    for name, (text, key) in ENGINE_GAUGES.items():
        if key in stats:
            yield _gauge(name, text, model_name, stats[key])
    if stats.get("num_kv_blocks"):
        usage = 1 - stats["num_free_blocks"] / stats["num_kv_blocks"]
        yield _gauge("vllm:kv_cache_usage_perc", "share of the KV blocks that are held, 0 to 1", model_name, usage)
    for name, (text, key, factor) in ENGINE_COUNTERS.items():
        if key in stats:
            counter = CounterMetricFamily(name, text, labels=["model_name", "engine"])
            counter.add_metric([model_name, "0"], stats[key] * factor)
            yield counter
    energy = CounterMetricFamily(
        "nanovllm:energy_joules", "used by a device, by all programs", labels=["model_name", "engine", "device"]
    )
    for key, joules in stats.items():
        if key.startswith("joules_"):
            energy.add_metric([model_name, "0", key.removeprefix("joules_")], joules)
    if energy.samples:
        yield energy
    if "num_steps_up_to_1" in stats:
        yield _step_sizes(stats, model_name)
    text = "times that something became worse than asked for, by reason; the log has a line for each"
    degradations = CounterMetricFamily("nanovllm:degradations", text, labels=["model_name", "engine", "reason"])
    for reason in DEGRADATIONS:
        if (number := stats.get(f"num_degraded_{reason}")) is not None:
            degradations.add_metric([model_name, "0", reason], number)
    yield degradations


def _step_sizes(stats: Mapping[str, Any], model_name: str) -> Any:
    family = HistogramMetricFamily("vllm:iteration_tokens_total", "tokens of a step", labels=["model_name", "engine"])
    cumulated, buckets = 0, []
    for edge in STEP_SIZE_EDGES:
        cumulated += stats[f"num_steps_up_to_{edge}"]
        buckets.append((repr(float(edge)), cumulated))
    buckets.append(("+Inf", cumulated + stats["num_steps_up_to_inf"]))
    family.add_metric([model_name, "0"], buckets, stats["num_computed_tokens"])
    return family


def _gauge(name: str, text: str, model_name: str, value: float) -> Any:
    family = GaugeMetricFamily(name, text, labels=["model_name", "engine"])
    family.add_metric([model_name, "0"], value)
    return family
