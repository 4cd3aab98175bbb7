"""Benchmark records: one JSON file that says what ran, on what, from which commit, and every repeat.

A figure in README or docs comes from a record, by link. Records are written here and nowhere else.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

RECORDS = Path("benchmarks/records")
LIBRARIES = ("torch", "triton", "numpy", "tokenizers", "transformers")


def environment() -> dict[str, Any]:
    """Commit, machine and versions."""
    told = os.environ.get("NANOVLLM_COMMIT", "")  # by whoever copied the tree to a machine without its history
    return {
        "commit": told or _git("rev-parse", "HEAD"),
        "dirty": None if told else bool(_git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/records")),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "processor": _processor(),
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


def write_record(name: str, **content: Any) -> Path:
    """`benchmarks/records/<date>-<name>.json`; returns its path."""
    facts = environment()
    path = RECORDS / f"{facts['time'][:10]}-{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"name": name, "environment": facts, **content}, indent=1) + "\n")
    return path


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
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
