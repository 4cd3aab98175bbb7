"""Wheels that bring the compiled CPU step along (docs/cpu-step.md), for machines without a C++ compiler:

    NANOVLLM_PREBUILT=1 pip wheel --no-deps .

Every instruction set that the compiler knows is compiled into the wheel, some 90 KB each. Nothing in them depends on Python, so
the wheel is for Linux on this architecture, and for any Python. Without the variable nothing happens here.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

VARIABLE = "NANOVLLM_PREBUILT"
STEP = "nanovllm/kernels/cpu"  # its folder, in the clone and in the wheel


class PrebuiltStep(BuildHookInterface):
    PLUGIN_NAME = "custom"
    libraries: TemporaryDirectory[str] | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """`version` is "standard" or "editable"."""
        wanted = os.environ.get(VARIABLE) or "0"
        if wanted not in ("0", "1"):
            raise ValueError(f"{VARIABLE}={wanted!r} is neither 0 nor 1")
        if wanted == "0":
            return
        if version == "editable":
            raise ValueError(f"{VARIABLE}=1 is for wheels; an editable install compiles the step at its first use")
        if sys.platform != "linux":
            raise ValueError(f"{VARIABLE}=1 makes libraries for Linux only, and this is {sys.platform}")
        self.libraries = TemporaryDirectory()
        for library in compile_all(Path(self.root, STEP, "compiler.py"), Path(self.libraries.name)):
            build_data["force_include"][str(library)] = f"{STEP}/prebuilt/{library.name}"
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
        build_data["pure_python"] = False

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if self.libraries is not None:
            self.libraries.cleanup()


def compile_all(module: Path, folder: Path) -> list[Path]:
    """A library for each instruction set that the compiler knows; what it does not know, which is said, is left out."""
    step = load(module)
    compiler = step.find_compiler()
    if compiler is None:
        raise RuntimeError(f"{VARIABLE}=1 needs a C++ compiler: none of {', '.join(step.COMPILERS)} is in PATH")

    def compile_one(instruction_set: str) -> Path | None:
        flags = step.all_flags(instruction_set)
        library = folder / step.library_name(instruction_set, flags)
        try:
            step.compile_step(compiler, flags, library)
        except subprocess.CalledProcessError as error:
            print(f"{VARIABLE}: without {instruction_set}: {error.stderr.strip()}", file=sys.stderr)
            return None
        return library

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        libraries = [library for library in threads.map(compile_one, step.INSTRUCTION_SETS) if library is not None]
    if not libraries:
        raise RuntimeError(f"{VARIABLE}=1: {compiler} compiled the step for no instruction set")
    return libraries


def load(module: Path) -> ModuleType:
    """By path: the package itself is not installed here, and neither is what it imports."""
    spec = importlib.util.spec_from_file_location(module.stem, module)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
