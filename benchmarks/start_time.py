"""From the start of a process to its first token on a CPU: with a compiler and without, by turns, each in a process of its own.

    python benchmarks/start_time.py --record cpu-start

    cold          a compiler, and nothing compiled before: the first start on a machine
    warm          every other start
    no-compiler   no compiler in PATH, so the torch path runs
    torch         cpu_compute="torch", asked for
    prebuilt      only with --prebuilt FOLDER: no compiler, nothing compiled before, but a wheel with libraries installed there,
                  NANOVLLM_PREBUILT=1 pip wheel --no-deps -w FOLDER . && pip install --no-deps --target FOLDER FOLDER/*.whl

The embedded model, what `make demo` does first: one prompt through `LLM()` as it comes. `imports_s` is torch, mostly.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from nanovllm.bench.record import summary, write_record

CHILD = """
import json, sys, time
from nanovllm import LLM, SamplingParams
imported = time.time()
llm = LLM(**json.loads(sys.argv[1]))
ready = time.time()
llm.generate(["Hello"], SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
print(json.dumps([imported, ready, time.time(), llm.config.cpu_compute]))
"""
WAYS = ("cold", "warm", "no-compiler", "torch")


def start(way: str, cache: Path, nowhere: Path, prebuilt: Path | None = None) -> dict[str, float]:
    """Seconds; `cache` holds the library of an earlier start, `nowhere` is an empty folder, `prebuilt` has the wheel."""
    bare = {"PATH": str(nowhere), "NANOVLLM_CACHE": str(nowhere)}
    changes = {"cold": {"NANOVLLM_CACHE": str(nowhere)}, "no-compiler": bare, "prebuilt": bare}
    environment = {**os.environ, "NANOVLLM_CACHE": str(cache), **changes.get(way, {})}
    options = {"cpu_compute": "torch"} if way == "torch" else {}
    started = time.time()
    command = [sys.executable, "-c", CHILD, json.dumps(options)]
    folder = prebuilt if way == "prebuilt" else None  # Python looks for the package there first
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=True)
    imported, ready, first, compute = json.loads(done.stdout.splitlines()[-1])
    if (compute == "torch") != (way in ("no-compiler", "torch")):
        raise SystemExit(f"{way}: computed by {compute}\n{done.stderr}")
    return {"imports_s": imported - started, "engine_s": ready - imported, "first_token_s": first - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prebuilt", type=Path, metavar="FOLDER")
    parser.add_argument("--record", metavar="NAME")
    arguments = parser.parse_args()
    ways = WAYS if arguments.prebuilt is None else (*WAYS, "prebuilt")
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    with TemporaryDirectory() as cache:
        start("warm", Path(cache), Path(cache))  # fills the cache of libraries and the system's of files
        for repeat in range(arguments.repeats):
            for way in ways if repeat % 2 == 0 else ways[::-1]:
                with TemporaryDirectory() as nowhere:
                    runs[way].append(start(way, Path(cache), Path(nowhere), arguments.prebuilt))
                print(way, {name: round(value, 2) for name, value in runs[way][-1].items()}, flush=True)
    results = {way: {name: summary([run[name] for run in rows]) for name in rows[0]} for way, rows in runs.items()}
    for way, row in results.items():
        print(f"{way:<12}" + "".join(f"  {name} {value['median']:.2f}" for name, value in row.items()))
    if arguments.record:
        print(write_record(arguments.record, unit="seconds", workload={"model": "embedded", "tokens": 1}, results=results))


if __name__ == "__main__":
    main()
