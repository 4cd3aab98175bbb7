"""The verbs of `nanovllm bench`: options in, one function call, figures and records out.

nanovllm bench offline --workload nano-vllm --set num_requests=16 --record mine
nanovllm bench serve --url http://127.0.0.1:8000 --precision bfloat16 --workload poisson --set rate=10
nanovllm bench check FILE | compare A B | report FILES | export FILE | kernels | workload --workload NAME
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanovllm import workloads
from nanovllm.bench.record import RECORDS, read_record
from nanovllm.config import EngineConfig
from nanovllm.errors import ConfigError
from nanovllm.retry import RetryPolicy

if TYPE_CHECKING:
    from nanovllm.bench.compare import Verdict
    from nanovllm.bench.serve import Plan, Run


def add_bench_commands(bench: argparse.ArgumentParser, add_engine_options: Callable[[argparse.ArgumentParser], None]) -> None:
    """`add_engine_options` gives a parser the options of `EngineConfig`: those that are given end up in the namespace."""
    verbs = bench.add_subparsers(required=True, metavar="verb")
    serve = _add(verbs, "serve", run_serve, "a workload on an OpenAI-compatible server")
    _add_server_options(serve)
    offline = _add(verbs, "offline", run_offline, "a workload on the engine in this process")
    add_engine_options(offline)
    for verb in (serve, offline):
        _add_plan_options(verb)
    kernels = _add(verbs, "kernels", run_kernels, "each GPU kernel's time and its share of the card's ceiling")
    kernels.add_argument("--record", metavar="NAME")
    check = _add(verbs, "check", run_check, "names what is missing or wrong in records")
    check.add_argument("files", nargs="+", type=Path)
    _add_compare_options(_add(verbs, "compare", run_compare, "is B faster than A? Refuses records with different boundaries"))
    report = _add(verbs, "report", run_report, "Markdown and HTML with plots")
    report.add_argument("files", nargs="+", type=Path)
    report.add_argument("--out", type=Path, default=Path("build/bench-report"), help="folder (default: %(default)s)")
    export = _add(verbs, "export", run_export, "other tools' formats")
    export.add_argument("file", type=Path)
    export.add_argument("--format", required=True, choices=["vllm", "leaderboard", "manifest"])
    export.add_argument("--submitter", default="unknown", help="of a leaderboard entry")
    export.add_argument("--peak-mem-mb", type=float, help="of a leaderboard entry, where the record does not know it")
    workload = _add(verbs, "workload", run_workload, "describe a workload, or write it as a trace")
    _add_workload_options(workload)
    workload.add_argument("--out", type=Path, help="a file of JSON lines, for the workload 'trace'")


def _add(verbs: Any, name: str, run: Callable[[argparse.Namespace], int], help_text: str) -> argparse.ArgumentParser:
    verb = verbs.add_parser(name, help=help_text, description=help_text)
    verb.add_argument("--log-level", default="INFO", choices=["DEBUG", "INFO", "WARNING", "ERROR"])
    verb.set_defaults(run=run)
    return verb


def _add_workload_options(verb: argparse.ArgumentParser) -> None:
    names = f"one of {', '.join(workloads.NAMES)}; or NAME:PARAMETER=VALUE,... (default: poisson)"
    verb.add_argument("--workload", default="poisson", help=names)
    verb.add_argument(
        "--set", action="append", default=[], metavar="PARAMETER=VALUE", help="a parameter of the workload; repeatable"
    )
    verb.add_argument("--seed-of-workload", type=int, default=0, metavar="SEED", help="(default: 0)")


def _add_plan_options(verb: argparse.ArgumentParser) -> None:
    _add_workload_options(verb)
    verb.add_argument("--repeats", type=int, default=3, help="measured runs of the workload (default: 3)")
    verb.add_argument("--warmup-repeats", type=int, default=1, help="uncounted runs before (default: 1)")
    verb.add_argument("--warmup-requests", type=int, help="only the first so many requests of a warm-up (default: all)")
    verb.add_argument("--keep-prompts", action="store_true", help="repeats send the same prompts: a prefix cache finds them")
    verb.add_argument("--slo", default="", metavar="ttft=200ms,tpot=20ms", help="goodput counts requests within these bounds")
    verb.add_argument("--price-per-hour", type=float, help="of all that serves, for the cost of a million output tokens")
    verb.add_argument("--record", metavar="NAME", help="write <folder>/<date>-NAME.json and its rows")
    verb.add_argument("--folder", type=Path, default=RECORDS, help="of records (default: %(default)s)")
    verb.add_argument("--print-effective-config", action="store_true", help="first print all that is fixed, defaults included")
    verb.add_argument("--note", default="", help="goes into the record: what else a reader must know")


def _add_server_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--url", default="http://127.0.0.1:8000")
    verb.add_argument(
        "--abba", metavar="URL", help="a second server: the repeats take turns A B B A ..., then the two are compared"
    )
    verb.add_argument("--model", default="", help="(default: the first that the server names)")
    verb.add_argument("--precision", required=True, help="what the server computes in; no server tells")
    verb.add_argument("--max-model-len", type=int, help="the server's longest context, where /v1/models does not tell it")
    verb.add_argument(
        "--form",
        default="ids",
        help="prompts as token ids (ids), as words t1 t2 ... (words), or as a chat message of words (chat)",
    )
    verb.add_argument("--max-concurrency", type=int, help="requests in flight (default: no limit)")
    verb.add_argument("--client-processes", type=int, default=1, metavar="N", help="that send the requests (default: 1)")
    verb.add_argument("--timeout", type=float, default=600.0, help="seconds of one request (default: 600)")
    verb.add_argument("--retries", type=int, default=0, help="of a request that was refused or cut off (default: 0)")
    verb.add_argument("--retry-budget", type=float, default=0.2, help="retries per request, over all requests (default: 0.2)")
    verb.add_argument("--extra-body", type=json.loads, default={}, metavar="JSON", help="more fields of every request")
    verb.add_argument("--api-key", help="(default: the environment variable NANOVLLM_API_KEY)")


def _add_compare_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("a", type=Path)
    verb.add_argument("b", type=Path)
    verb.add_argument(
        "--vary", action="append", default=[], metavar="FIELD", help="what the experiment changed on purpose; repeatable"
    )
    verb.add_argument("--margin", type=float, help="difference that is not worth a verdict (default: 0.01)")
    verb.add_argument(
        "--noise", nargs=2, type=Path, metavar=("A1", "A2"), help="two records of the same thing: their difference is the margin"
    )


# --- verbs


def _plan(arguments: argparse.Namespace) -> Plan:
    from nanovllm.bench.results import Slo
    from nanovllm.bench.serve import Plan

    return Plan(
        workload=_workload(arguments),
        repeats=arguments.repeats,
        warmup_repeats=arguments.warmup_repeats,
        warmup_requests=arguments.warmup_requests,
        slo=Slo.parse(arguments.slo),
        price_per_hour=arguments.price_per_hour,
        keep_prompts=arguments.keep_prompts,
    )


def _print_config(arguments: argparse.Namespace, plan: Plan, **more: Any) -> None:
    """What the figures will depend on, whether it was chosen or is a default."""
    if arguments.print_effective_config:
        fixed = {"workload": plan.workload.describe(), "settings": plan.settings, "repeats": plan.repeats}
        warmup = {"repeats": plan.warmup_repeats, "requests": len(plan.part(-1).requests)}
        print(json.dumps({**fixed, "warmup": warmup, **more}, indent=1))


def _workload(arguments: argparse.Namespace) -> workloads.Workload:
    return workloads.parse_workload(arguments.workload, arguments.seed_of_workload, arguments.set)


def run_serve(arguments: argparse.Namespace) -> int:
    from nanovllm.bench import compare
    from nanovllm.bench.load import Target
    from nanovllm.bench.serve import run_serve_bench, write_serve_record

    plan = _plan(arguments)
    if not isinstance(arguments.extra_body, dict):
        raise ConfigError("--extra-body must be a JSON object")
    target = Target(
        arguments.url,
        arguments.model,
        arguments.form,
        arguments.api_key or os.environ.get("NANOVLLM_API_KEY"),
        arguments.max_concurrency,
        arguments.timeout,
        arguments.extra_body,
        RetryPolicy(max_retries=arguments.retries, budget=arguments.retry_budget),
        arguments.client_processes,
    )
    name = arguments.record or "run"
    sides = [(name, target)]
    if arguments.abba:
        sides = [(f"{name}-a", target), (f"{name}-b", dataclasses.replace(target, url=arguments.abba))]
    _print_config(arguments, plan, target=dataclasses.asdict(dataclasses.replace(target, api_key=None)))
    opened, runs = run_serve_bench(plan, sides, arguments.precision, arguments.max_model_len)
    if arguments.record:
        paths = [write_serve_record(side, run, arguments.note, arguments.folder) for side, run in zip(opened, runs)]
        print(*paths, sep="\n")
    if len(runs) == 2 and plan.repeats >= compare.MIN_REPEATS:
        _print_verdicts(compare.compare_tables(*(run.content()["result_table"] for run in runs)))
    return _status(runs)


def _status(runs: Sequence[Run]) -> int:
    """1 when a request failed: said once more, because it is the first thing to know."""
    failed = [row for run in runs for row in run.rows if row.error]
    if failed:
        print(f"{len(failed)} requests failed, the first: {failed[0].error}", file=sys.stderr)
    return 1 if failed else 0


def run_offline(arguments: argparse.Namespace) -> int:
    plan = _plan(arguments)
    from nanovllm.bench import offline
    from nanovllm.llm import LLM

    with LLM(**_engine_options(arguments)) as llm:
        _print_config(arguments, plan, max_model_len=llm.engine.max_model_len, engine=dataclasses.asdict(llm.config))
        run = offline.run_offline(llm, plan)
        if arguments.record:
            print(offline.write_offline_record(llm, run, arguments.record, arguments.note, arguments.folder))
    return _status([run])


def run_kernels(arguments: argparse.Namespace) -> int:
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_kernels.py"
    from nanovllm.platforms.base import select_platform

    if select_platform("auto").device.type != "cuda":
        print("nanovllm bench kernels: no CUDA device here; the kernels are measured on one", file=sys.stderr)
        return 1
    if not script.exists():
        raise ConfigError(f"{script} is not here: `bench kernels` runs from a clone of the repository")
    sys.argv = [str(script), *(["--record", arguments.record] if arguments.record else [])]
    runpy.run_path(str(script), run_name="__main__")
    return 0


def run_check(arguments: argparse.Namespace) -> int:
    from nanovllm.bench.check import check_record

    is_good = True
    for path in arguments.files:
        problems = check_record(path)
        is_good = is_good and not problems
        print(f"{path}: {'complete' if not problems else ''}")
        for problem in problems:
            print(f"  {problem}")
    return 0 if is_good else 1


def run_compare(arguments: argparse.Namespace) -> int:
    from nanovllm.bench import compare

    records = [_checked(path) for path in (arguments.a, arguments.b)]
    margins: dict[str, float] = {}
    if arguments.noise:
        same = [_checked(path) for path in arguments.noise]
        if differing := compare.differing_boundaries(records[0], same[0], arguments.vary):
            raise ConfigError("--noise is of another boundary than A: " + "; ".join(differing))
        margins = compare.noise_margin(*same)
    verdicts = compare.compare_records(*records, varied=arguments.vary, margin=arguments.margin, margins=margins)
    _print_verdicts(verdicts)
    return 0


def _print_verdicts(verdicts: Sequence[Verdict]) -> None:
    print(f"{'figure':<16}{'A':>12}{'B':>12}  rank test on the repeats; what B is against A")
    print(*verdicts, sep="\n")


def _checked(path: Path) -> dict[str, Any]:
    from nanovllm.bench.check import check_record

    if problems := check_record(path):
        raise ConfigError(f"{path} is not a good record: " + "; ".join(problems))
    return read_record(path)


def run_report(arguments: argparse.Namespace) -> int:
    from nanovllm.bench.check import rows_of
    from nanovllm.bench.report import write_report

    records = [(path.stem, record, rows_of(path, record)) for path in arguments.files for record in [_checked(path)]]
    print(*write_report(records, arguments.out), sep="\n")
    return 0


def run_export(arguments: argparse.Namespace) -> int:
    from nanovllm.bench.check import rows_of
    from nanovllm.bench.exports import leaderboard_entry, leaderboard_manifest, vllm_result

    record = _checked(arguments.file)
    rows = rows_of(arguments.file, record)
    if arguments.format == "vllm":
        answer = vllm_result(record, rows)
    else:
        answer = leaderboard_entry(record, arguments.submitter, arguments.peak_mem_mb)
        if arguments.format == "manifest":
            answer = leaderboard_manifest(answer, "run_leaderboard.json")
    print(json.dumps(answer, indent=1))
    return 0


def run_workload(arguments: argparse.Namespace) -> int:
    workload = _workload(arguments)
    print(json.dumps(workload.describe(), indent=1))
    if arguments.out is not None:
        workloads.write_trace(workload, arguments.out)
    return 0


def _engine_options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        field.name: getattr(arguments, field.name) for field in dataclasses.fields(EngineConfig) if hasattr(arguments, field.name)
    }
