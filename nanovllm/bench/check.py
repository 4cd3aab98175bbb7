"""Is a record complete, and does it agree with itself? Each problem is named.

The nine fields that the course demands, and those that make a figure refutable: the environment, and the rows, from which
the table is computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nanovllm.bench.load import Row
from nanovllm.bench.record import read_record, read_rows
from nanovllm.bench.results import Slo, joules_of, result_table, summarize_repeat
from nanovllm.errors import ConfigError

SCHEMA = "nanovllm.bench/1"


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _has(*names: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(value.get(name) not in (None, "") for name in names)


REQUIRED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model": (_is_text, "the name or path of the model"),
    "precision": (_is_text, "the dtype that was computed in, such as bfloat16"),
    "max_model_len": (_is_count, "the longest context, tokens"),
    "workload": (_has("name", "seed", "parameters", "checksum"), "an object with name, seed, parameters and checksum"),
    "warmup": (_has("repeats", "requests"), "an object with repeats and requests: what ran before, uncounted (may be 0)"),
    "num_requests": (_is_count, "requests of one repeat"),
    "command": (_is_text, "the command line"),
    "logs": (_has("rows", "sha256"), "an object with rows, a file beside the record, and its sha256"),
    "result_table": (lambda value: isinstance(value, dict) and bool(value), "figures, each with median and repeats"),
}
ALSO: dict[str, tuple[Callable[[Any], bool], str]] = {
    "schema": (lambda value: value == SCHEMA, f"{SCHEMA!r}"),
    "status": (_is_text, '"ok", or "failed: ..." with the reason'),
    "seconds": (lambda value: isinstance(value, list) and bool(value), "the duration of each repeat"),
    "environment": (_has("commit", "time", "processor", "cores", "python", "libraries"), "commit, time, machine and versions"),
    "settings": (lambda value: isinstance(value, dict), "how the load was sent, or the resolved engine options"),
}


def check_record(path: Path) -> list[str]:
    """Problems, worst first; none: the record is complete and its table follows from its rows."""
    try:
        record = read_record(path)
    except ConfigError as error:
        return [str(error)]
    problems = check_fields(record)
    return problems or _check_rows(path, record)


def check_fields(record: Mapping[str, Any]) -> list[str]:
    problems = []
    for name, (is_good, meaning) in {**REQUIRED, **ALSO}.items():
        if record.get(name) is None:
            problems.append(f"missing field {name!r}: {meaning}")
        elif not is_good(record[name]):
            problems.append(f"wrong field {name!r}: {_short(record[name])} is not {meaning}")
    for name, line in record["result_table"].items() if isinstance(record.get("result_table"), dict) else ():
        if not _has("median", "repeats")(line) or not isinstance(line["repeats"], list):
            problems.append(f"wrong field 'result_table': {name} has no median with repeats")
    return problems


def rows_of(path: Path, record: Mapping[str, Any]) -> list[Row]:
    """Raises `ConfigError`."""
    try:
        return [Row(**row) for row in read_rows(path, record)]
    except TypeError as error:
        raise ConfigError(f"{path}: its rows are of another form: {error}") from error


def _check_rows(path: Path, record: Mapping[str, Any]) -> list[str]:
    if record.get("kind") == "kernels":
        return []
    try:
        rows = rows_of(path, record)
        slo = Slo(**record["settings"].get("slo", {}))
        repeats = []
        for repeat, seconds in enumerate(record["seconds"]):
            own = [row for row in rows if row.repeat == repeat]
            if len(own) != record["num_requests"]:
                return [f"wrong field 'num_requests': {record['num_requests']}, but repeat {repeat} has {len(own)} rows"]
            joules = joules_of(record.get("energy", {}), repeat)
            repeats.append(summarize_repeat(own, seconds, slo, record["settings"].get("price_per_hour"), joules))
    except (ConfigError, TypeError, ValueError, LookupError) as error:
        return [str(error)]
    computed = result_table(repeats)
    differing = sorted(
        name for name in {*computed, *record["result_table"]} if computed.get(name) != record["result_table"].get(name)
    )
    problems = [f"wrong field 'result_table': {', '.join(differing)} do not follow from the rows"] if differing else []
    num_failed = sum(bool(row.error) for row in rows)
    if (record["status"] == "ok") != (num_failed == 0):
        problems.append(f"wrong field 'status': {record['status']!r} with {num_failed} failed requests")
    return problems


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."
