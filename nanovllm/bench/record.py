"""Benchmark records: one JSON file that says what ran, on what, from which commit, and every repeat.

A figure in README or docs comes from a record, by link. Records are written here and nowhere else, and never over one
another. Rows of single requests lie beside the record, compressed, with their checksum in it. What a record of
`nanovllm bench` must have, and whether it agrees with itself, is `check.py`'s.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from nanovllm.errors import ConfigError

RECORDS = Path("benchmarks/records")
SECRET_OPTIONS = ("--api-key",)
LIBRARIES = ("torch", "triton", "numpy", "tokenizers", "transformers")


def environment() -> dict[str, Any]:
    """Commit, machine and versions."""
    told = os.environ.get("NANOVLLM_COMMIT", "")  # by whoever copied the tree to a machine without its history
    return {
        "commit": told or _git("rev-parse", "HEAD"),
        "dirty": None if told else bool(_git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/records")),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command_line(),
        "processor": _processor(),
        "gpus": _gpus(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in LIBRARIES},
        "openmp": {name: value for name, value in os.environ.items() if name.startswith(("OMP_", "GOMP_", "KMP_"))},
    }


def summary(repeats: list[float]) -> dict[str, Any]:
    """Median and spread of repeated measurements, with the measurements."""
    return {"median": statistics.median(repeats), "min": min(repeats), "max": max(repeats), "repeats": repeats}


def write_record(name: str, *, rows: Sequence[Mapping[str, Any]] = (), folder: Path = RECORDS, **content: Any) -> Path:
    """`<folder>/<date>-<name>.json`, with `-2` and so on after a name that is taken; returns its path.

    `rows` go to a file of compressed JSON lines beside it, which the record's field `logs` names.
    """
    facts = environment()
    folder.mkdir(parents=True, exist_ok=True)
    stem = first = f"{facts['time'][:10]}-{name}"
    number = 1
    while (folder / f"{stem}.json").exists():
        number += 1
        stem = f"{first}-{number}"
    if rows:
        data = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), mtime=0)
        (folder / f"{stem}.rows.jsonl.gz").write_bytes(data)
        logs = {"rows": f"{stem}.rows.jsonl.gz", "num_rows": len(rows), "sha256": hashlib.sha256(data).hexdigest()}
        content = {"logs": logs, **content}
    path = folder / f"{stem}.json"
    path.write_text(json.dumps({"name": name, "environment": facts, **content}, indent=1) + "\n", encoding="utf-8")
    return path


def read_record(path: Path) -> dict[str, Any]:
    """Raises `ConfigError` for what is not a record."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not a record: {error}") from error
    if not isinstance(record, dict):
        raise ConfigError(f"{path} is not a record: it holds a {type(record).__name__}")
    return record


def read_rows(path: Path, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of the record at `path`. Raises `ConfigError` when they are missing or not those that were written."""
    logs = record.get("logs")
    if not isinstance(logs, dict) or not isinstance(logs.get("rows"), str) or Path(logs["rows"]).name != logs["rows"]:
        raise ConfigError(f"{path}: its field logs names no file of rows")
    try:
        data = (path.parent / logs["rows"]).read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: its rows are missing: {error}") from error
    if hashlib.sha256(data).hexdigest() != logs.get("sha256"):
        raise ConfigError(f"{path.parent / logs['rows']} is not what was recorded: its checksum differs")
    return [json.loads(line) for line in gzip.decompress(data).splitlines()]


def command_line() -> str:
    """Of this process, without secrets."""
    words = [Path(sys.executable).name, *sys.argv]
    for place, word in enumerate(words):
        name, equals, _ = word.partition("=")
        if name in SECRET_OPTIONS and equals:
            words[place] = f"{name}=..."
        elif name in SECRET_OPTIONS and place + 1 < len(words):
            words[place + 1] = "..."
    return " ".join(words)


def _gpus() -> list[str]:
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    return f"{facts.get('model name', 'unknown')} (family {facts.get('cpu family')}, model {facts.get('model')})"


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
