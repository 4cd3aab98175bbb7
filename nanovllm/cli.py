"""The command line: `nanovllm generate | chat | serve | bench | replay | simulate | env`. Options come from dataclasses.

    nanovllm generate "The capital of France is" --max-tokens 20
    nanovllm chat --model Qwen/Qwen3-0.6B
    nanovllm serve --port 8000
    nanovllm chat --url http://127.0.0.1:8000
    nanovllm replay flight-record.json
    nanovllm bench serve --url http://127.0.0.1:8000 --precision bfloat16 --workload poisson
    nanovllm simulate --gpu h200 --model qwen3-8b --slo ttft=200ms,tpot=20ms
    nanovllm env

The help text of an option is the comment on its field: one place says what an option means.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import os
import platform
import re
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any, NoReturn

from nanovllm.bench.commands import add_bench_commands
from nanovllm.config import EngineConfig
from nanovllm.engine.progress import deferred_interrupt
from nanovllm.errors import ConfigError, InvalidPrompt, NanoVllmError, did_you_mean
from nanovllm.log import FORMAT_VARIABLE, configure_logging
from nanovllm.observability.options import ObservabilityOptions
from nanovllm.retry import RetryPolicy
from nanovllm.sampling_params import SamplingParams
from nanovllm.server.options import ServerOptions
from nanovllm.simulation.options import SimulateOptions
from nanovllm.version import __version__

CLI_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "max_tokens", "repetition_penalty", "ignore_eos", "n")
SERVER_NAMES = [field.name for field in dataclasses.fields(ServerOptions) if field.name != "tells_requests"]
SERVE_DEFAULTS: dict[str, Any] = {
    "flight_recorder_steps": 1024,
    "watchdog_seconds": 60.0,
}  # of `serve`, where a crash leaves a trace
LIBRARIES = (
    *("torch", "triton", "numpy", "tokenizers", "safetensors", "huggingface_hub", "xxhash", "transformers", "modelscope"),
    *("starlette", "uvicorn", "msgspec", "pyzmq", "llguidance"),
)

Stream = Callable[
    [list[dict[str, Any]]], Generator[tuple[str, int], None, None]
]  # messages -> (text, tokens of the answer so far)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0; 1 after an error that was explained on standard error; 130, 141: Ctrl-C, or nobody reads the output."""
    arguments = build_parser().parse_args(argv)
    if log_format := getattr(arguments, "log_format", None):
        os.environ[FORMAT_VARIABLE] = log_format
    configure_logging(arguments.log_level)
    try:
        status = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # nobody reads on, as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except NanoVllmError as error:
        print(f"nanovllm: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


class Parser(argparse.ArgumentParser):
    """Suggests a name for one that it does not know. Takes no abbreviations: a new option would change their meaning."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        arguments, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [flag for parser in _all_parsers(self) for flag in parser._option_string_actions]
            hint = did_you_mean(unknown[0].partition("=")[0], flags)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return arguments

    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        super().error(message + did_you_mean(wrong[1], re.findall(r"[\w-]+", wrong[2])) if wrong else message)


def _all_parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from _all_parsers(child)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="nanovllm", description="An LLM inference engine that a person reads in an evening.")
    commands = parser.add_subparsers(required=True, metavar="command")
    generate = _add_command(commands, "generate", run_generate, "complete prompts")
    generate.add_argument("prompts", nargs="*", help="texts to complete; none: one per line from standard input")
    generate.add_argument("--stop", action="append", default=[], help="a string that ends the text; may be repeated")
    chat = _add_command(commands, "chat", run_chat, "talk to a model in the terminal")
    chat.add_argument("--system", help="system message")
    chat.add_argument("--url", help="talk to a server at this address instead, such as http://127.0.0.1:8000")
    chat.add_argument("--api-key", help="for --url (default: the environment variable NANOVLLM_API_KEY)")
    chat.add_argument("--retries", type=int, default=3, help="for --url: of a call that was refused or cut off (default: 3)")
    for command in (generate, chat):
        _add_fields(command.add_argument_group("engine"), EngineConfig)
        names = [name for name in CLI_SAMPLING if name != "n" or command is generate]
        _add_fields(command.add_argument_group("sampling"), SamplingParams, names)
    serve = _add_command(commands, "serve", run_serve, "OpenAI-compatible HTTP server")
    _add_fields(serve.add_argument_group("server"), ServerOptions, SERVER_NAMES)
    _add_fields(serve.add_argument_group("observability"), ObservabilityOptions)
    _add_fields(serve.add_argument_group("engine"), EngineConfig)
    replay = _add_command(commands, "replay", run_replay, "run the scheduler again on a flight record, and say where it differs")
    replay.add_argument("file", help="a flight record: of a crash, a stall, SIGUSR2, or POST /admin/flight_record")
    replay.add_argument("--policy", help="another scheduling policy than the recorded one")
    replay.add_argument("--film", help="also write every step to this file, for the page /inspector")
    bench = commands.add_parser("bench", help="workloads, records, comparisons", description="Reproducible benchmarks.")
    add_bench_commands(bench, lambda parser: _add_fields(parser.add_argument_group("engine"), EngineConfig))
    simulate = _add_command(commands, "simulate", run_simulate, "predict latencies and throughput without a GPU")
    _add_fields(simulate.add_argument_group("simulation"), SimulateOptions)
    _add_command(commands, "env", run_env, "print versions, devices and what would be used")
    return parser


def _add_command(commands: Any, name: str, run: Callable[[argparse.Namespace], int], help_text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=help_text, description=help_text)
    command.add_argument("--log-level", default="INFO", choices=["DEBUG", "INFO", "WARNING", "ERROR"])
    command.add_argument("--log-format", choices=["text", "json"], help="of log lines (default: $NANOVLLM_LOG_FORMAT, or text)")
    command.set_defaults(run=run)
    return command


# --- options from dataclass fields


def _add_fields(group: Any, owner: type, names: Sequence[str] | None = None) -> None:
    """One option per field; only those that the user gives end up in the namespace."""
    comments = _comments_of(owner)
    for field in dataclasses.fields(owner):
        if names is not None and field.name not in names:
            continue
        flag = "--" + field.name.replace("_", "-")
        text = f"{comments.get(field.name, '')} (default: {field.default})".strip().replace("%", "%%")
        kind = _kind_of(str(field.type))
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        else:
            group.add_argument(flag, type=kind, default=argparse.SUPPRESS, help=text)


@functools.cache
def _comments_of(owner: type) -> dict[str, str]:
    """Field -> its comment. `inspect.getsource` of a class parses its whole module, 10 ms; of a module it only reads it."""
    source = inspect.getsource(sys.modules[owner.__module__]).partition(f"\nclass {owner.__name__}")[2]
    return dict(re.findall(r"^    (\w+): .*?  # (.*)$", re.split(r"\n(?=\S)", source, maxsplit=1)[0], re.MULTILINE))


def _kind_of(annotation: str) -> type:
    """The first plain type of an annotation such as "int | None"."""
    return {"bool": bool, "int": int, "float": float}.get(annotation.split(" |")[0], str)


def _chosen(arguments: argparse.Namespace, owner: type) -> dict[str, Any]:
    return {field.name: getattr(arguments, field.name) for field in dataclasses.fields(owner) if hasattr(arguments, field.name)}


# --- commands


def run_generate(arguments: argparse.Namespace) -> int:
    from nanovllm.llm import LLM

    chosen = _chosen(arguments, SamplingParams)
    params = SamplingParams(**{**chosen, "stop": arguments.stop})
    prompts = arguments.prompts or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not prompts:
        raise InvalidPrompt("no prompts, neither as arguments nor on standard input")
    with LLM(**_chosen(arguments, EngineConfig)) as llm:
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=len(prompts) > 1)
        seconds = time.perf_counter() - start
    for output in outputs:
        for completion in output.completions:
            print(f"{output.prompt}{completion.text}")
    num_tokens = sum(output.metrics.num_generated_tokens for output in outputs)
    print(f"{num_tokens} tokens in {seconds:.2f} s, {num_tokens / seconds:.0f} tokens/s", file=sys.stderr)
    return 0


def run_chat(arguments: argparse.Namespace) -> int:
    if arguments.url is not None:
        return _chat_with_server(arguments)
    if arguments.api_key is not None:
        raise ConfigError("--api-key goes with --url")
    from nanovllm.llm import LLM

    with LLM(**_chosen(arguments, EngineConfig)) as llm:
        params = SamplingParams(**{"max_tokens": None, **_chosen(arguments, SamplingParams)})

        def stream(messages: list[dict[str, Any]]) -> Generator[tuple[str, int], None, None]:
            num_tokens = 0
            with closing(llm.stream(llm.apply_chat_template(messages), params)) as deltas:
                for delta in deltas:
                    num_tokens += len(delta.token_ids)
                    yield delta.text, num_tokens

        return _converse(stream, arguments.system, deferred_interrupt)


def _chat_with_server(arguments: argparse.Namespace) -> int:
    from nanovllm.remote_chat import RemoteChat

    engine_options = _chosen(arguments, EngineConfig)
    model = engine_options.pop("model", None)
    if engine_options:
        raise ConfigError(f"{', '.join(engine_options)}: options of an engine, which a server at --url has already started")
    params = _chosen(arguments, SamplingParams)
    SamplingParams(**params)  # checks the values
    retries = RetryPolicy(max_retries=arguments.retries)
    remote = RemoteChat(arguments.url, arguments.api_key or os.environ.get("NANOVLLM_API_KEY"), model, retries)
    print(f"{remote.model} at {arguments.url}", file=sys.stderr)

    def stream(messages: list[dict[str, Any]]) -> Generator[tuple[str, int], None, None]:
        with closing(remote.stream(messages, params)) as deltas:
            for delta in deltas:
                if delta.is_reasoning:
                    print(delta.text, end="", file=sys.stderr, flush=True)
                yield "" if delta.is_reasoning else delta.text, delta.num_tokens

    # Nothing here must not be cut in half, and the server may keep us waiting: Ctrl-C works at once.
    return _converse(stream, arguments.system, lambda: nullcontext(threading.Event()))


def _converse(stream: Stream, system: str | None, interruptible: Callable[[], AbstractContextManager[threading.Event]]) -> int:
    print("/reset starts over; /exit, or the end of the input, leaves; Ctrl-C stops an answer.", file=sys.stderr)
    beginning = [{"role": "system", "content": system}] if system else []
    messages = list(beginning)
    has_failed = False
    for line in _lines("you> " if sys.stdin.isatty() else ""):
        if line in ("/exit", "/quit"):
            break
        if line == "/reset":
            messages = list(beginning)
            print("(new conversation)", file=sys.stderr)
        elif line.startswith("/"):
            print(f"unknown command {line.split()[0]}{did_you_mean(line, ('/reset', '/exit', '/quit'))}", file=sys.stderr)
            has_failed = True
        elif line:
            before, messages = messages, _answer(stream, messages, line, interruptible)
            has_failed = messages is before
    return 1 if has_failed and not sys.stdin.isatty() else 0  # a script wants to know; a person has seen it


def _lines(prompt: str) -> Iterator[str]:
    while True:
        try:
            yield input(prompt).strip()
        except KeyboardInterrupt:
            print()  # a new line, not the end: the key may have been meant for an answer that had just ended
        except EOFError:
            return


def _answer(
    stream: Stream,
    messages: list[dict[str, Any]],
    line: str,
    interruptible: Callable[[], AbstractContextManager[threading.Event]],
) -> list[dict[str, Any]]:
    """Stream one answer; returns the conversation with it. A refused turn leaves the conversation as it was."""
    asked = [*messages, {"role": "user", "content": line}]
    pieces: list[str] = []
    start, num_tokens = time.perf_counter(), 0
    try:
        with interruptible() as interrupted, closing(stream(asked)) as deltas:
            for text, count in deltas:
                pieces.append(text)
                num_tokens = count
                print(text, end="", flush=True)
                if interrupted.is_set():
                    break
    except KeyboardInterrupt:
        if not "".join(pieces):
            print(file=sys.stderr)
            return messages
    except NanoVllmError as error:
        print(f"{type(error).__name__}: {error}  (/reset starts over)", file=sys.stderr)
        return messages
    rate = num_tokens / (time.perf_counter() - start)
    print(flush=True)
    print(f"({num_tokens} tokens, {rate:.0f} tokens/s)", file=sys.stderr)
    return [*asked, {"role": "assistant", "content": "".join(pieces)}]


def run_serve(arguments: argparse.Namespace) -> int:
    try:
        from nanovllm.server.serve import serve
    except ModuleNotFoundError as error:
        raise ConfigError(f"the server needs {error.name!r}: pip install 'nanovllm[serve]'") from error
    observability = ObservabilityOptions(**{**SERVE_DEFAULTS, **_chosen(arguments, ObservabilityOptions)})
    return serve(ServerOptions(**_chosen(arguments, ServerOptions)), _chosen(arguments, EngineConfig), observability)


def run_replay(arguments: argparse.Namespace) -> int:
    """Exit status 1 when a decision differs."""
    from nanovllm.observability.film import write_film
    from nanovllm.observability.replay import replay_file

    report = replay_file(arguments.file, arguments.policy)
    print(report)
    if arguments.film is not None:
        write_film(arguments.film, arguments.file, arguments.policy)
    return 0 if report.difference is None else 1


def run_simulate(arguments: argparse.Namespace) -> int:
    from nanovllm.simulation.command import run_simulation

    return run_simulation(SimulateOptions(**_chosen(arguments, SimulateOptions)))


def run_env(arguments: argparse.Namespace) -> int:
    import torch

    from nanovllm.attention.select import explain_backend
    from nanovllm.energy import EnergyMeter
    from nanovllm.errors import ModelNotFound
    from nanovllm.kernels.cpu.build import describe_step
    from nanovllm.loaders.checkpoint import find_demo
    from nanovllm.platforms.base import select_platform

    device = select_platform("auto")
    device.prepare(None)
    memory = device.memory()
    rows = [
        ("nanovllm", f"{__version__} in {Path(__file__).parent}"),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        *((name, _version(name)) for name in LIBRARIES),
        ("device", device.describe()),
        ("memory", f"{memory.free / 2**30:.1f} GiB free of {memory.total / 2**30:.1f} GiB"),
        ("dtype", f"{str(device.default_dtype()).removeprefix('torch.')} (dtype='auto')"),
        ("attention", "{} ({})".format(*explain_backend(device.device))),
        ("energy", EnergyMeter().describe()),
        ("compiled step", describe_step()),
        ("repacked weights", "yes (oneDNN)" if device.device.type == "cpu" and torch.backends.mkldnn.is_available() else "no"),
    ]
    try:
        rows.append(("default model", str(find_demo())))
    except ModelNotFound as error:
        rows.append(("default model", f"missing: {error}"))
    for name, value in rows:
        print(f"{name:<18}{value}")
    return 0


def _version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
