"""Observer: everything that `ObservabilityOptions` switches on, attached to one engine, and taken off again.

    with observe(llm.engine, ObservabilityOptions(trace_file="trace.json")):
        llm.generate(prompts)

`build` does the same in the engine process of a server: an engine builder around another one. There the front ends send what
they know of each request (`note_request`), and the flight record can be asked for by a call or by SIGUSR2.
"""

from __future__ import annotations

import importlib
import signal
import threading
from dataclasses import replace
from types import FrameType
from typing import Any

from nanovllm.config import EngineConfig
from nanovllm.engine.engine_process import ServedEngine
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.errors import RequestError
from nanovllm.log import logger
from nanovllm.observability.chrome_trace import ChromeTrace
from nanovllm.observability.film import news
from nanovllm.observability.flight_recorder import FlightRecorder
from nanovllm.observability.lifecycle import LifecycleFile
from nanovllm.observability.options import ObservabilityOptions
from nanovllm.observability.otel import OtelSpans
from nanovllm.observability.stage_log import StageLog
from nanovllm.observability.tracker import Sink, Tracker
from nanovllm.observability.watchdog import Watchdog


class Observer:
    """Made by `observe`."""

    def __init__(self, engine: LLMEngine, options: ObservabilityOptions, model: str, joins: bool) -> None:
        self._listeners = engine.events.listeners
        self.recorder = self.watchdog = self.tracker = None
        sinks = open_sinks(options, model)
        if sinks:
            self.tracker = Tracker(sinks, joins)
        if options.flight_recorder_steps:
            self.recorder = FlightRecorder(engine.scheduler, options.flight_recorder_steps, options.flight_recorder_dir)
        if options.watchdog_seconds:
            self.watchdog = Watchdog(options.watchdog_seconds, self.recorder and self.recorder.dump)
        self._mine = [one for one in (self.tracker, self.recorder, self.watchdog) if one is not None]
        self._listeners.extend(self._mine)

    def close(self, error: BaseException | None = None) -> None:
        """Stop listening and complete the files. `error`: what ended the engine; it is worth a flight record."""
        mine, self._mine = self._mine, []
        for listener in mine:
            self._listeners.remove(listener)
        if self.recorder is not None and error is not None and mine:
            self.dump(f"crash: {type(error).__name__}")
        for part in (self.watchdog, self.tracker):
            if part is not None and part in mine:
                part.close()

    def dump(self, reason: str) -> str | None:
        """The path of a flight record; None when it could not be written, which is logged."""
        try:
            return self.need_recorder().dump(reason)
        except OSError:
            logger.exception("the flight record could not be written")
            return None

    def need_recorder(self) -> FlightRecorder:
        if self.recorder is None:
            raise RequestError("there is no flight recorder: start with flight_recorder_steps above 0")
        return self.recorder

    def __enter__(self) -> Observer:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.close(error)


def observe(engine: LLMEngine, options: ObservabilityOptions, model: str = "model", joins: bool = False) -> Observer:
    """Listen to an engine. `joins`: front ends in other processes report on each request. `model`: its name in spans."""
    return Observer(engine, options, model, joins)


def open_sinks(options: ObservabilityOptions, model: str) -> list[Sink]:
    sinks: list[Sink] = []
    if options.stage_log is not None:
        sinks.append(StageLog(options.stage_log, options.stage_log_format, options.stage_log_steps))
    if options.lifecycle_file is not None:
        sinks.append(LifecycleFile(options.lifecycle_file))
    if options.trace_file is not None:
        sinks.append(ChromeTrace(options.trace_file))
    if options.otlp_endpoint is not None:
        sinks.append(OtelSpans(options.otlp_endpoint, model))
    return sinks


# --- in the engine process of a server


def build(
    config: EngineConfig,
    inner: str,
    options: dict[str, Any],
    model: str | None = None,
    inner_options: dict[str, Any] | None = None,
) -> ServedEngine:
    """The engine of the builder `inner`, observed. `model`: what clients call it."""
    module, _, name = inner.partition(":")
    observability = ObservabilityOptions(**options)
    served: ServedEngine = getattr(importlib.import_module(module), name)(config, **(inner_options or {}))
    observer = observe(served.engine, observability, model or served.facts.model or "model", joins=True)
    if observer.recorder is not None:
        facts = served.facts
        observer.recorder.facts = {name: getattr(facts, name) for name in ("device", "dtype", "spec", "roofline")}
        observer.recorder.facts["model"] = model
    if observability.flight_recorder_steps and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGUSR2, lambda number, frame: _on_signal(observer, number, frame))

    def note_request(frontend: int, request_id: str, facts: dict[str, Any]) -> None:
        if observer.tracker is not None:
            observer.tracker.join(f"{frontend}/{request_id}", facts)

    def flight_record(frontend: int) -> str | None:
        return observer.dump("asked for")

    def inspector(frontend: int, after: int | None) -> dict[str, Any]:
        return news(observer.need_recorder(), served.engine.scheduler, after)

    def on_end(error: BaseException | None) -> None:
        observer.close(error)
        if served.on_end is not None:
            served.on_end(error)

    calls = {**served.calls, "note_request": note_request, "flight_record": flight_record, "inspector": inspector}
    return replace(served, calls=calls, on_end=on_end)


def _on_signal(observer: Observer, number: int, frame: FrameType | None) -> None:
    observer.dump("SIGUSR2")
