"""ObservabilityOptions: what is written about a running engine, and where. `nanovllm serve --help` shows them.

All off costs nothing: then no listener is attached. Imports nothing of the engine.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from nanovllm.errors import ConfigError, did_you_mean

BUILDER = "nanovllm.observability.observer:build"  # of an observed engine
LOG_FORMATS = ("json", "text")
NUMBERS = ("flight_recorder_steps", "watchdog_seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservabilityOptions:
    stage_log: str | None = None  # file for one line per stage of each request; "-": standard error
    stage_log_format: str = "json"  # json, text: [timestamp] request_id stage prompt_len generated_len batch_size
    stage_log_steps: bool = False  # also one line per step
    lifecycle_file: str | None = None  # JSON lines: nine stages per request
    trace_file: str | None = None  # Chrome trace of steps and requests, for Perfetto; complete when the engine ends
    otlp_endpoint: str | None = None  # OpenTelemetry spans go there, such as http://127.0.0.1:4318/v1/traces; extra `trace`
    flight_recorder_steps: int = 0  # last steps kept in memory and written on a crash, SIGUSR2 or demand; 0: none
    flight_recorder_dir: str | None = None  # folder for those files; None: the system's temporary folder
    watchdog_seconds: float = 0.0  # shortest time after which a step counts as stalled; 0: no watchdog

    def __post_init__(self) -> None:
        for field in fields(self):
            value, kind = getattr(self, field.name), str(field.type)
            if "str" in kind and not (isinstance(value, str) or (value is None and "None" in kind)):
                raise ConfigError(f"{field.name} must be a string, got {value!r}")
        if self.stage_log_format not in LOG_FORMATS:
            known = ", ".join(LOG_FORMATS)
            raise ConfigError(f"stage_log_format={self.stage_log_format!r} is not one of {known}")
        if not isinstance(self.stage_log_steps, bool):
            raise ConfigError(f"stage_log_steps must be True or False, got {self.stage_log_steps!r}")
        for name in NUMBERS:
            value = getattr(self, name)
            kinds = (int,) if name == "flight_recorder_steps" else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds) or not 0 <= value < 2**31:
                raise ConfigError(f"{name}={value!r} must be a number of at least 0")

    @classmethod
    def from_options(cls, **options: Any) -> ObservabilityOptions:
        """Options from keywords; an unknown name is an error with a suggestion."""
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise ConfigError(f"unknown option {name!r}{did_you_mean(name, known)}")
        return cls(**options)

    @property
    def tells_requests(self) -> bool:
        """Something wants the stages of requests; without it nobody follows them."""
        return any((self.stage_log, self.lifecycle_file, self.trace_file, self.otlp_endpoint))

    @property
    def is_on(self) -> bool:
        return self.tells_requests or self.flight_recorder_steps > 0 or self.watchdog_seconds > 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
