from __future__ import annotations

import importlib.metadata
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import greedy, make_engine, make_scheduler

import nanovllm
from nanovllm.cli import build_parser, main
from nanovllm.observability.flight_recorder import FlightRecorder

ROOT = Path(__file__).parents[1]


def test_generate_prints_prompt_and_completion(capsys):
    assert main(["generate", "The capital of France is", "--max-tokens", "2", "--temperature", "0", "--num-threads", "1"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("The capital of France is Paris")
    assert "KV cache" in captured.err and "tokens/s" in captured.err


def test_generate_without_a_prompt_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(["generate"]) == 1
    assert "no prompts" in capsys.readouterr().err


def test_chat_answers_and_starts_over(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n/reset\nWhat is 2+2?\n/exit\n"))
    assert main(["chat", "--max-tokens", "5", "--temperature", "0", "--num-threads", "1"]) == 0
    captured = capsys.readouterr()
    assert len(captured.out.strip().splitlines()) == 2
    assert "(new conversation)" in captured.err


def test_replay_says_whether_decisions_differ(tmp_path, capsys):
    scheduler = make_scheduler(policy="prefill_first", budget=8)
    engine = make_engine(scheduler)
    recorder = FlightRecorder(scheduler, 1000, str(tmp_path))
    engine.events.listeners.append(recorder)
    engine.generate([[number] * 9 for number in range(6)], greedy(6))
    path = recorder.dump("test")
    assert main(["replay", path]) == 0
    assert "6 arrivals replayed; every decision is the same" in capsys.readouterr().out
    assert main(["replay", path, "--policy", "fcfs"]) == 1
    assert "recorded" in capsys.readouterr().out
    assert main(["replay", str(tmp_path / "none.json")]) == 1
    assert "ConfigError" in capsys.readouterr().err


def test_env_names_device_backend_and_default_model(capsys):
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert "attention" in out and "default model" in out and "torch" in out and "energy" in out


def test_a_clone_that_is_not_installed_knows_its_version(monkeypatch, capsys):
    installed = importlib.metadata.version

    def version(package: str) -> str:
        if package == "nanovllm":
            raise importlib.metadata.PackageNotFoundError(package)
        return installed(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert main(["env"]) == 0
    assert f"nanovllm          {nanovllm.__version__} in {ROOT / 'nanovllm'}\n" in capsys.readouterr().out
    asked = [path for path in (ROOT / "nanovllm").rglob("*.py") if 'version("nanovllm")' in path.read_text(encoding="utf-8")]
    assert asked == []  # bench's exports, spans and the server take the same


def test_the_version_is_one():
    (version,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    chart = (ROOT / "deploy/helm/nanovllm/Chart.yaml").read_text(encoding="utf-8")
    assert version == nanovllm.__version__ and f'appVersion: "{version}"' in chart


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--block-size", "0"], "ConfigError: block_size=0"),
        (["--temperature", "-1"], "InvalidSamplingParams: temperature=-1.0"),
        (["--model", "/no/such/folder"], "ModelNotFound"),
    ],
)
def test_errors_are_one_line_without_a_traceback(arguments, message, capsys):
    assert main(["generate", "x", *arguments]) == 1
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


def test_a_reader_that_has_seen_enough_ends_the_command_without_a_traceback():
    command = [sys.executable, "-m", "nanovllm", "bench", "workload", "--workload", "fixed"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    )
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(60) == 141
    process.stderr.close()


def test_every_engine_option_has_a_help_text(capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["generate", "--help"])
    assert "tokens per KV block" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["serv"], "did you mean 'serve'?"),
        (["serve", "--prot", "3"], "did you mean '--port'?"),
        (["serve", "--max-model-length=3"], "did you mean '--max-model-len'?"),
        (["bench", "srve"], "did you mean 'serve'?"),
        (["serve", "--max-mod", "3"], "unrecognized arguments"),  # no abbreviations
    ],
)
def test_a_misspelt_option_or_command_gets_a_suggestion(arguments, hint, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2 and hint in capsys.readouterr().err
