"""OpenTelemetry spans of requests, by the GenAI semantic conventions, sent by OTLP over HTTP. Needs the extra `trace`.

One server span per request, a child of the caller's span when the HTTP request brought a W3C `traceparent`, and one child
per span of the timeline. Spans are made when a request has ended, with the times that were measured.
"""

from __future__ import annotations

import re
import time
from typing import Any

from nanovllm.errors import ConfigError
from nanovllm.observability.timeline import Timeline
from nanovllm.observability.tracker import Sink
from nanovllm.version import __version__

TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
TIMEOUT_S = 5  # of one export; a collector that is away must not hold up the end of the engine


class OtelSpans(Sink):
    """`model`: what spans call the model."""

    def __init__(self, endpoint: str, model: str) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ModuleNotFoundError as error:
            raise ConfigError(f"otlp_endpoint needs {error.name!r}: pip install 'nanovllm[trace]'") from error
        resource = Resource.create({"service.name": "nanovllm", "service.version": __version__})
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, timeout=TIMEOUT_S)))
        self._tracer = self._provider.get_tracer("nanovllm")
        self._model = model
        self._epoch_ns = time.time_ns() - time.monotonic_ns()

    def on_request(self, timeline: Timeline) -> None:
        from opentelemetry import trace

        start, end = timeline.times["received"], timeline.times["cleanup_done"]
        span = self._tracer.start_span(
            f"{timeline.operation} {self._model}",
            context=parent_context(timeline.traceparent),
            kind=trace.SpanKind.SERVER,
            attributes=attributes_of(timeline, self._model),
            start_time=self._ns(start),
        )
        inside = trace.set_span_in_context(span)
        for name, (first, last) in timeline.spans().items():
            child = self._tracer.start_span(name, context=inside, start_time=self._ns(first))
            child.end(self._ns(last))
        if timeline.finish_reasons and all(reason == "error" for reason in timeline.finish_reasons):
            span.set_status(trace.StatusCode.ERROR)
        span.end(self._ns(end))

    def _ns(self, seconds: float) -> int:
        return round(seconds * 1e9) + self._epoch_ns

    def close(self) -> None:
        self._provider.shutdown()


def attributes_of(timeline: Timeline, model: str) -> dict[str, Any]:
    """GenAI conventions, and `nanovllm.` for what they have no name for. Times are seconds."""
    attributes: dict[str, Any] = {
        "gen_ai.operation.name": timeline.operation,
        "gen_ai.provider.name": "nanovllm",
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
        "gen_ai.response.id": timeline.request_id,
        "gen_ai.response.finish_reasons": list(timeline.finish_reasons),
        "gen_ai.usage.input_tokens": timeline.num_prompt_tokens,
        "gen_ai.usage.output_tokens": timeline.num_generated_tokens,
        "gen_ai.request.choice.count": timeline.num_sequences,
        "nanovllm.cached_tokens": timeline.num_cached_tokens,
        "nanovllm.preemptions": timeline.num_preemptions,
    }
    if timeline.ttft is not None:
        attributes["gen_ai.server.time_to_first_token"] = timeline.ttft
    if timeline.tpot is not None:
        attributes["gen_ai.server.time_per_output_token"] = timeline.tpot
    for name, seconds in (timeline.ttft_parts() or {}).items():
        attributes[f"nanovllm.ttft.{name}"] = seconds
    return attributes


def parent_context(traceparent: str | None) -> Any:
    """The caller's context; None for none, or for one that is not valid."""
    from opentelemetry import trace

    match = TRACEPARENT.fullmatch(traceparent or "")
    if match is None or traceparent is None or traceparent.startswith("ff"):
        return None
    trace_id, span_id, flags = (int(part, 16) for part in match.groups())
    if not trace_id or not span_id:
        return None
    parent = trace.SpanContext(trace_id, span_id, is_remote=True, trace_flags=trace.TraceFlags(flags))
    return trace.set_span_in_context(trace.NonRecordingSpan(parent))
