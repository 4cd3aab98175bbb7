"""The pages in docs/server/ are true: the blocks of the OpenAI and curl pages run against a real server, in order."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from nanovllm.cli import build_parser

FOLDER = Path(__file__).resolve().parents[2] / "docs/server"
ADDRESS = "http://127.0.0.1:8000"
PAIRS = sorted(path.name for path in (FOLDER / "zh-CN").glob("*.md"))


def blocks(path: Path, language: str = r"\w+") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.timeout(300)  # half a minute on a machine that does nothing else
def test_the_blocks_of_the_openai_page_run(live, capsys):
    pytest.importorskip("openai")
    namespace: dict = {}
    for number, source in enumerate(blocks(FOLDER / "openai.md", "python")):
        exec(compile(source.replace(ADDRESS, live.url), f"openai.md, block {number}", "exec"), namespace)
    namespace["client"].close()
    out = capsys.readouterr().out
    assert "get_weather {'city': " in out and "400 temperature" in out and "404 " in out
    assert re.search(r"^(yes|no)$", out, re.MULTILINE) and re.search(r"^2 \d+$", out, re.MULTILINE)


def run_with_bash(path: Path, url: str) -> str:
    outputs = []
    for source in blocks(path, "bash"):
        command = ["bash", "-euo", "pipefail", "-c", source.replace(ADDRESS, url)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=100)
        assert result.returncode == 0, f"{source}\n{result.stdout}\n{result.stderr}"
        outputs.append(result.stdout)
    return "\n".join(outputs)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_blocks_about_reasoning_run(tiny, capsys):
    """With a model that knows `<think>`, though it has no sense."""
    pytest.importorskip("openai")
    namespace: dict = {}
    for source in blocks(FOLDER / "tools-and-reasoning.md", "python"):
        exec(compile(source.replace(ADDRESS, tiny.url), "tools-and-reasoning.md", "exec"), namespace)
    namespace["client"].close()
    assert len(capsys.readouterr().out.splitlines()) >= 2
    assert '"finish_reason":' in run_with_bash(FOLDER / "tools-and-reasoning.md", tiny.url)


@pytest.mark.timeout(300)
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_blocks_of_the_curl_page_run(live):
    everything = run_with_bash(FOLDER / "curl.md", live.url)
    assert "data: [DONE]" in everything and '"tool_calls"' in everything and "did you mean" in everything
    assert re.search(r'"text":"(white|black)"', everything) and "vllm:num_requests_waiting" in everything


def test_commands_and_options_in_the_pages_exist():
    (commands,) = [action for action in build_parser()._actions if hasattr(action, "choices") and action.choices]
    used: list[tuple[str, str]] = []
    for path in FOLDER.rglob("*.md"):
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        for command, options in re.findall(
            r"\bnanovllm (\w+)((?: +[^\s`|;&]+)*)", "\n".join(re.findall(r"`[^`\n]+`|^.*$", text, re.MULTILINE))
        ):
            if command in commands.choices:
                used += [(command, option) for option in re.findall(r"(?<!\S)--[a-z-]+", options)]
    assert ("serve", "--host") in used and ("chat", "--url") in used
    assert not [(command, option) for command, option in used if option not in commands.choices[command]._option_string_actions]


def test_json_blocks_are_json():
    assert all(json.loads(source) for path in FOLDER.rglob("*.md") for source in blocks(path, "json"))


def test_python_blocks_compile():
    for path in FOLDER.rglob("*.md"):
        for source in blocks(path, "python"):
            compile(source, str(path), "exec")


@pytest.mark.parametrize("name", PAIRS)
def test_chinese_pages_have_the_same_code(name):
    assert blocks(FOLDER / "zh-CN" / name) == blocks(FOLDER / name)


def test_the_index_names_every_page():
    for folder in (FOLDER, FOLDER / "zh-CN"):
        index = (folder / "README.md").read_text(encoding="utf-8")
        pages = {path.name for path in FOLDER.glob("*.md")} - {"README.md"}
        assert not [page for page in pages if f"({page})" not in index and f"(../{page})" not in index]


def test_every_test_that_the_security_page_names_exists():
    """And each line of its table names one."""
    text = (FOLDER / "security.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith(("| **", "| ---", "| promise"))]
    assert len(lines) > 30
    for line in lines:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", line)
        assert named, line
        for path, name in named:
            assert re.search(
                rf"^ *(async )?def {name}\(", (FOLDER.parents[1] / path).read_text(encoding="utf-8"), re.MULTILINE
            ), name
