"""The compiled step out of a wheel: what is taken, what is passed over, and a real wheel on a machine without a compiler."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from kernels.instruction_sets import EMULATED

from nanovllm.kernels.cpu import build, compiler
from nanovllm.log import logger

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(compiler.find_compiler() is None, reason="no C++ compiler")


@pytest.fixture
def prebuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The portable set is prebuilt in this folder; there is no compiler, and nothing in the cache."""
    monkeypatch.setattr(build, "PREBUILT", tmp_path)
    put_portable(tmp_path, "portable")
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("NANOVLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(logger, "propagate", True)
    build.say_once.cache_clear()
    yield tmp_path
    build.say_once.cache_clear()


def put_portable(folder: Path, instruction_set: str) -> Path:
    """The portable library under the name of another set, which makes it fit for every processor."""
    path = folder / compiler.library_name(instruction_set, compiler.all_flags(instruction_set))
    shutil.copy(portable(), path)
    return path


@cache  # first called where there is a compiler
def portable() -> Path:
    return build.build(str(compiler.find_compiler()), "portable")


def quick_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch, refused: str = "nothing") -> str:
    """There is one again, which "compiles" by copying the portable library, and does not know one option."""
    path = folder / "quick"
    path.write_text(f"""#!/bin/sh
        case "$*" in *" {refused}"*) echo "unknown option" >&2; exit 1;; esac
        for last; do :; done
        cp {portable()} $last""")
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    return str(path)


class TestLoading:
    def test_a_prebuilt_library_needs_no_compiler_and_no_cache(self, prebuilt, caplog):
        library = build.load_step("portable")
        assert library is not None and Path(library._name).parent == prebuilt
        assert not (prebuilt / "cache").exists() and not caplog.records

    def test_a_prebuilt_library_comes_before_the_compiler(self, prebuilt, monkeypatch):
        monkeypatch.delenv("CXX")
        library = build.load_step("portable")
        assert library is not None and Path(library._name).parent == prebuilt

    def test_a_prebuilt_library_of_another_source_is_not_taken(self, prebuilt, monkeypatch):
        changed = prebuilt / "step.cpp"
        changed.write_text(compiler.SOURCE.read_text(encoding="utf-8") + "// changed\n", encoding="utf-8")
        monkeypatch.setattr(compiler, "SOURCE", changed)
        assert build.load_step("portable") is None

    def test_a_prebuilt_library_of_other_flags_is_not_taken(self, prebuilt, monkeypatch):
        assert build.load_step("portable", ("-O0",)) is None
        monkeypatch.setattr(compiler, "COMMON_FLAGS", (*compiler.COMMON_FLAGS, "-g"))
        assert build.load_step("portable") is None

    def test_a_prebuilt_library_that_cannot_be_loaded_is_passed_over(self, prebuilt, monkeypatch, caplog):
        next(prebuilt.glob("*.so")).write_text("for another system")
        with caplog.at_level("INFO"):
            assert build.load_step("portable") is None
        assert "a prebuilt library is passed over: " in caplog.text
        quick_compiler(prebuilt, monkeypatch)
        library = build.load_step("portable")
        assert library is not None and Path(library._name).parent == prebuilt / "cache"

    def test_without_a_compiler_the_best_that_is_prebuilt_runs(self, prebuilt, monkeypatch, caplog):
        monkeypatch.setattr(build, "cpu_flags", lambda: compiler.AMX_FEATURES | {"avx2", "fma", "f16c"})
        monkeypatch.setattr(build, "may_use_tiles", lambda: True)
        assert build.load_step() is None  # torch is faster than the portable set
        assert [record.message for record in caplog.records] == [
            "degraded, compiled_step: no C++ compiler (g++, clang++, c++): the torch path runs"
        ]
        caplog.clear()
        put_portable(prebuilt, "avx2")
        wanted = put_portable(prebuilt, "avx512")
        for _ in range(2):
            library = build.load_step()
            assert library is not None and library._name == str(wanted)
        assert build.load_step("amx") is None  # or nothing
        assert [record.message for record in caplog.records] == [
            "degraded, compiled_step: no C++ compiler (g++, clang++, c++): avx512 runs",
            "degraded, compiled_step: no C++ compiler (g++, clang++, c++): the torch path runs",
        ]

    def test_where_a_library_comes_from_is_told_without_compiling(self, prebuilt, monkeypatch):
        monkeypatch.setenv("NANOVLLM_CPU_ISA", "portable")
        ready = next(prebuilt.glob("*.so"))
        assert build.describe_step() == f"portable, prebuilt: {ready}"
        ready.unlink()
        assert build.describe_step() == "no C++ compiler, and nothing prebuilt: torch runs"
        found = quick_compiler(prebuilt, monkeypatch)
        path = build.cache_path(found, "portable")
        assert build.describe_step() == f"portable, to be compiled by {found}: {path}"
        assert not path.parent.exists()
        assert build.load_step() is not None
        assert build.describe_step() == f"portable, compiled by {found}: {path}"


# --- wheels

CHILD = """
import json, sys
from nanovllm import LLM, SamplingParams
from nanovllm.kernels.cpu.build import describe_step
llm = LLM(cpu_compute="int4", num_threads=1, num_kv_blocks=64)
(output,) = llm.generate(["The capital of France is"], SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
print(json.dumps([llm.config.cpu_compute, output.token_ids, describe_step()]))
"""


def make_wheel(folder: Path, *command: str, **variables: str) -> Path:
    pytest.importorskip("hatchling", reason="of the extra `dev`")
    environment = {name: value for name, value in os.environ.items() if name != "NANOVLLM_PREBUILT"} | variables
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


def generate(package: Path, path: str, libraries: Path) -> tuple[str, list[int], str]:
    """How the package in this folder computes, its tokens, and where its library came from."""
    environment = {name: value for name, value in os.environ.items() if name not in ("CXX", "NANOVLLM_CPU_ISA")}
    environment |= {"PYTHONPATH": str(package), "PATH": path, "NANOVLLM_CACHE": str(libraries)}
    done = subprocess.run([sys.executable, "-c", CHILD], cwd=libraries.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return tuple(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_wheel_with_libraries_generates_the_same_without_a_compiler(tmp_path):
    installed, nowhere, empty = tmp_path / "installed", tmp_path / "nowhere", tmp_path / "empty"
    nowhere.mkdir()
    pip_wheel = ("pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(tmp_path))
    wheel = make_wheel(tmp_path, *pip_wheel, NANOVLLM_PREBUILT="1")
    assert wheel.stem.endswith(f"-py3-none-linux_{platform.machine()}")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(installed), str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    available = set(build.available_instruction_sets()) - {EMULATED}  # which other tests may have added
    assert available <= {path.name[5:-24] for path in installed.rglob("step-*.so")}

    compute, token_ids, origin = generate(installed, str(nowhere), empty)
    assert compute == "int4" and "prebuilt" in origin and str(installed) in origin
    assert not empty.exists()
    compute, expected, origin = generate(ROOT, os.environ["PATH"], empty)
    assert compute == "int4" and "compiled by" in origin
    assert token_ids == expected

    with (installed / "nanovllm/kernels/cpu/step.cpp").open("a", encoding="utf-8") as source:
        source.write("// changed\n")
    compute, _, origin = generate(installed, str(nowhere), tmp_path / "other-cache")
    assert compute == "torch" and "nothing prebuilt" in origin


def test_a_wheel_without_the_variable_has_no_library(tmp_path):
    wheel = make_wheel(tmp_path, "hatchling", "build", "-t", "wheel", "-d", str(tmp_path))
    assert wheel.stem.endswith("-py3-none-any")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]


def test_a_wheel_has_the_instructions_that_its_compiler_knows(tmp_path, monkeypatch):
    quick_compiler(tmp_path, monkeypatch, refused="-mavx512bf16")
    wheel = make_wheel(tmp_path, "hatchling", "build", "-t", "wheel", "-d", str(tmp_path), NANOVLLM_PREBUILT="1")
    names = {Path(name).name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")}
    assert names == {compiler.library_name(name, compiler.all_flags(name)) for name in ("avx512", "avx2", "portable")}


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"NANOVLLM_PREBUILT": "yes"}, "'yes' is neither 0 nor 1"),
        ({"NANOVLLM_PREBUILT": "1", "CXX": "no-such"}, "a C++ compiler"),
        ({"NANOVLLM_PREBUILT": "1", "CXX": "false"}, "for no instruction set"),
    ],
)
def test_a_wheel_that_cannot_be_made_as_asked_is_refused(tmp_path, variables, message):
    with pytest.raises(AssertionError) as failure:
        make_wheel(tmp_path, "hatchling", "build", "-t", "wheel", "-d", str(tmp_path), **variables)
    assert message in str(failure.value)
    assert not list(tmp_path.iterdir())
