"""What several front-end processes know of each other: small files in the private folder of the server.

Each writes its counts once a second; whoever is asked for /metrics adds up the files of the others. Limits that an admin
changed lie beside them, and everybody reads them. A process that is replaced goes on from its predecessor's counts, so
that no counter runs backwards. One front end needs none of this.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from nanovllm.server.metrics import Snapshot

PERIOD_S = 1.0


class SharedFolder:
    """`folder` belongs to one server and is readable by its user alone."""

    def __init__(self, folder: Path, index: int) -> None:
        self._folder, self._index = folder, index
        self._limits_written = 0

    def write_counts(self, counts: Snapshot) -> None:
        self._write(f"counts-{self._index}.json", msgspec.json.encode(counts))

    def predecessor(self) -> Snapshot | None:
        """What a process with this index had counted before."""
        counts = self._read(self._folder / f"counts-{self._index}.json")
        if counts is not None:
            counts.gauges.clear()
        return counts

    def others(self) -> list[Snapshot]:
        own = f"counts-{self._index}.json"
        found = [self._read(path) for path in sorted(self._folder.glob("counts-*.json")) if path.name != own]
        return [counts for counts in found if counts is not None]

    def write_limits(self, limits: dict[str, int | float]) -> None:
        self._write("limits.json", msgspec.json.encode(limits))

    def changed_limits(self) -> dict[str, int | float] | None:
        """Limits that were written since the last call."""
        path = self._folder / "limits.json"
        try:
            written = path.stat().st_mtime_ns
        except FileNotFoundError:
            return None
        if written == self._limits_written:
            return None
        self._limits_written = written
        return msgspec.json.decode(path.read_bytes(), type=dict[str, int | float])

    def _write(self, name: str, content: bytes) -> None:
        """At once, so that no reader sees half of it."""
        temporary = self._folder / f".{name}-{self._index}"
        temporary.write_bytes(content)
        os.replace(temporary, self._folder / name)

    def _read(self, path: Path) -> Snapshot | None:
        try:
            return msgspec.json.decode(path.read_bytes(), type=Snapshot)
        except (FileNotFoundError, msgspec.DecodeError):
            return None
