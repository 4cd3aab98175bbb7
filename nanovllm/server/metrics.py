"""Metrics (minimal; to be replaced)."""

from __future__ import annotations

from typing import Any


class Record:
    def admitted(self) -> None: ...
    def grew(self, output: Any) -> None: ...
    def ended(self, output: Any) -> int:
        return output.metrics.num_prompt_tokens + sum(len(c.token_ids) for c in output.completions)


class Metrics:
    def __init__(self, model_name: str, max_model_len: int) -> None: ...
    def begin(self, params: Any) -> Record:
        return Record()

    def refused(self, reason: str) -> None: ...
