"""The flags of step.cpp for each instruction set, and the compiler that takes them.

Nothing but the standard library: `hatch_build.py` loads this file alone, where nothing is installed, for wheels that bring the
libraries along. Such a library is named after source and flags, not after its compiler, which its user need not have.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("step.cpp")
PREBUILT = Path(__file__).with_name("prebuilt")  # a folder that only such wheels have
COMPILERS = ("g++", "clang++", "c++")
COMMON_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-shared", "-pthread", "-Wno-psabi")
# Best first; each needs these features of the processor, and the compiler's flags for them.
AVX512_FEATURES = {"avx512f", "avx512bw", "avx512vl", "avx512_vnni"}
AVX512_FLAGS = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni")
AMX_FEATURES = AVX512_FEATURES | {"avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"}
AMX_FLAGS = (*AVX512_FLAGS, "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16")
INSTRUCTION_SETS: dict[str, tuple[set[str], tuple[str, ...]]] = {
    "amx": (AMX_FEATURES, AMX_FLAGS),
    "avx512-bf16": (AVX512_FEATURES | {"avx512_bf16"}, (*AVX512_FLAGS, "-mavx512bf16")),
    "avx512": (AVX512_FEATURES, AVX512_FLAGS),
    "avx2": ({"avx2", "fma", "f16c"}, ("-mavx2", "-mfma", "-mf16c")),
    "portable": (set(), ()),
}
BUILD_SECONDS = 300


def find_compiler() -> str | None:
    names = (os.environ["CXX"],) if os.environ.get("CXX") else COMPILERS
    return next((path for name in names if (path := shutil.which(name))), None)


def all_flags(instruction_set: str, extra_flags: tuple[str, ...] = ()) -> tuple[str, ...]:
    return *COMMON_FLAGS, *INSTRUCTION_SETS[instruction_set][1], *extra_flags


def library_name(instruction_set: str, flags: tuple[str, ...], compiler: str = "") -> str:
    """Another for another source, machine, flag or compiler; without a compiler it is the name of a prebuilt library."""
    identity = "\0".join((compiler, platform.machine(), *flags)).encode() + SOURCE.read_bytes()
    return f"step-{instruction_set}-{hashlib.sha256(identity).hexdigest()[:20]}.so"


def compile_step(compiler: str, flags: tuple[str, ...], library: Path) -> None:
    """Raises OSError or subprocess.SubprocessError."""
    command = [compiler, *flags, str(SOURCE), "-o", str(library)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=BUILD_SECONDS)
