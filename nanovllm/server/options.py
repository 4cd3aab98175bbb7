"""ServerOptions: every option of the server, with its default and its unit. `nanovllm serve --help` is made of it.

Frozen, like `EngineConfig`. Keys are not options: they come from files or the environment, so that no process list shows
them (`auth.py`). With several front-end processes each has its share of the limits that count something.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, fields
from typing import Any

from nanovllm.errors import ConfigError, did_you_mean

MIN_ENGINE_TIMEOUT_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    # --- address
    host: str = "127.0.0.1"  # address to listen on; beyond loopback, keys are required
    port: int = 8000  # 0: any free one
    uds: str | None = None  # path of a unix socket, instead of host and port
    num_frontends: int = 1  # processes for HTTP and text, which share the port and one engine
    served_model_name: str | None = None  # what clients call the model; None: what --model says
    insecure: bool = False  # listen beyond loopback without keys: whoever reaches the port may use the model
    cors_origins: str = ""  # origins whose pages may call the API from a browser, comma-separated; empty: none

    # --- keys
    api_key_file: str | None = None  # JSON or TOML with keys, their classes and limits; see docs/server/keys.md
    share_prefix_cache: bool = False  # keys share cached prefixes: faster, but timing tells one key what another has asked

    # --- load
    max_queued_requests: int = 1024  # completions that wait for the engine; more get 429
    queue_timeout_s: float = 60.0  # seconds until the first token; then 503. 0: no limit
    request_timeout_s: float = 600.0  # seconds of a whole request; then 504. 0: no limit
    drain_timeout_s: float = 30.0  # seconds that open requests have after SIGTERM
    stalled_client_timeout_s: float = 30.0  # seconds that a client may take nothing of its answer; then it is aborted
    engine_timeout_s: float = 120.0  # seconds without a sign of life, longer than any step; then status 1. 0: no limit
    body_timeout_s: float = 30.0  # seconds for a request's headers and body to arrive
    max_connections: int = 20000  # open connections of one front end; more are answered 503
    max_stream_buffer: int = 262144  # bytes of a stream that wait for a slow client; it reads on when they are taken

    # --- crashes
    checkpoint: str | None = None  # file from which accepted requests go on after a crash; see docs/server/crashes.md
    checkpoint_keep_s: float = 3600.0  # seconds that the answers of such requests are kept for their clients

    # --- size
    max_body_bytes: int = 8388608  # of one request
    max_header_bytes: int = 32768  # of one request, all headers together
    max_json_depth: int = 64  # objects and arrays inside each other
    max_prompts_per_request: int = 128  # prompts of one completions request, and inputs of one embeddings request
    max_n: int = 128  # completions per prompt
    max_messages: int = 4096  # of one conversation
    max_tools: int = 128  # of one request
    max_logprobs: int = 4194304  # candidates of one request's completions, if all become as long as they may
    max_prompt_logprobs: int = 1048576  # candidates of one request's prompts; about 100 MB while they are made
    max_open_logprobs: int = 8388608  # candidates of all requests under way, both kinds together; more get 429
    max_schema_bytes: int = 65536  # of one JSON schema, regular expression or grammar
    grammar_timeout_s: float = 5.0  # seconds for compiling a grammar

    # --- log
    access_log: bool = True  # one line per request on standard error: metadata only, never a prompt or an answer

    # --- set by `nanovllm serve` from the options of observability
    tells_requests: bool = False  # report each request's HTTP times to the engine process, for its logs and traces

    def __post_init__(self) -> None:
        for field in fields(self):
            self._check(field.name, str(field.type))
        if self.port > 65535:
            raise ConfigError(f"port={self.port} is more than 65535")
        if self.served_model_name == "":
            raise ConfigError("served_model_name is empty; leave it out to use what --model says")
        if 0 < self.engine_timeout_s < MIN_ENGINE_TIMEOUT_S:
            low = f"{MIN_ENGINE_TIMEOUT_S:g} seconds, several signs of life; 0 is no limit"
            raise ConfigError(f"engine_timeout_s={self.engine_timeout_s:g} is less than {low}")
        for origin in self.origins:
            if origin != "*" and "://" not in origin:
                raise ConfigError(f"cors_origins: {origin!r} is not an origin, such as https://example.com")

    @classmethod
    def from_options(cls, **options: Any) -> ServerOptions:
        """Options from keywords; an unknown name is an error with a suggestion."""
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise ConfigError(f"unknown server option {name!r}{did_you_mean(name, known)}")
        return cls(**options)

    @property
    def origins(self) -> list[str]:
        return [origin.strip() for origin in self.cors_origins.split(",") if origin.strip()]

    @property
    def is_loopback(self) -> bool:
        """Nobody but this machine can connect."""
        if self.uds is not None or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def _check(self, name: str, annotation: str) -> None:
        value = getattr(self, name)
        if value is None and annotation.endswith("| None"):
            return
        kind = annotation.split(" |")[0]
        if kind == "bool" and not isinstance(value, bool):
            raise ConfigError(f"{name} must be True or False, got {value!r}")
        if kind == "str" and not isinstance(value, str):
            raise ConfigError(f"{name} must be a string, got {value!r}")
        if kind in ("int", "float"):
            allowed = (int,) if kind == "int" else (int, float)
            low = 0 if kind == "float" or name in ("port", "max_queued_requests") else 1
            if isinstance(value, bool) or not isinstance(value, allowed) or not low <= value < 2**53:
                raise ConfigError(f"{name}={value!r} must be a number of at least {low}")
