"""Builds step.cpp with the machine's own compiler, once, and loads it.

The library lies in a cache under a name made of the source, the compiler and its flags, so nothing stale is ever loaded.
It is written under another name and then renamed: two processes may build at once. A compiler that is older than the best
instructions gives the next; where there is no compiler, `load_step` returns None and the torch path runs. Either is one log
line. The C interface is described in library.py.

    NANOVLLM_CACHE    where built libraries go, else ~/.cache/nanovllm
    NANOVLLM_CPU_ISA  forces one of INSTRUCTION_SETS, for tests and measurements; refused where the machine lacks it
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from nanovllm.errors import ConfigError
from nanovllm.log import degraded
from nanovllm.platforms.cpu import cpu_flags

SOURCE = Path(__file__).with_name("step.cpp")
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
# Linux on x86-64: arch_prctl(2), which glibc does not wrap.
SYS_ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA = 158, 0x1023, 18


def best_instruction_set() -> str:
    """What this machine has, unless NANOVLLM_CPU_ISA says otherwise."""
    forced = os.environ.get("NANOVLLM_CPU_ISA")
    if forced is None:
        return next(name for name in INSTRUCTION_SETS if not why_not(name))
    if forced not in INSTRUCTION_SETS:
        raise ConfigError(f"NANOVLLM_CPU_ISA={forced!r} is not one of {', '.join(INSTRUCTION_SETS)}")
    if reason := why_not(forced):
        raise ConfigError(f"NANOVLLM_CPU_ISA={forced!r} cannot be had here: {reason}")
    return forced


def available_instruction_sets() -> list[str]:
    """Best first; "portable" is always among them."""
    return [name for name in INSTRUCTION_SETS if not why_not(name)]


def why_not(instruction_set: str) -> str:
    """What stands against it on this machine; empty if nothing does."""
    lacking = INSTRUCTION_SETS[instruction_set][0] - cpu_flags()
    if lacking:
        return f"the processor lacks {', '.join(sorted(lacking))}"
    return "the kernel does not permit tiles" if instruction_set == "amx" and not may_use_tiles() else ""


@cache
def may_use_tiles() -> bool:
    """Linux gives the large registers of AMX to a process that asks for them, to all its threads, once and for good."""
    try:
        arguments = map(ctypes.c_long, (SYS_ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA))
        return ctypes.CDLL(None).syscall(*arguments) == 0
    except (OSError, AttributeError):
        return False


def load_step(instruction_set: str | None = None, extra_flags: tuple[str, ...] = ()) -> ctypes.CDLL | None:
    """The library for this processor, built if it has to be; None, and a log line, where that is impossible.

    A set that is named, here or by NANOVLLM_CPU_ISA, is built or nothing; else what the compiler refuses gives way to the next.
    """
    is_named = instruction_set is not None or "NANOVLLM_CPU_ISA" in os.environ
    instruction_set = instruction_set or best_instruction_set()
    if reason := why_not(instruction_set):  # its first instruction would end the process
        raise ConfigError(f"{instruction_set} instructions cannot be had here: {reason}")
    compiler = find_compiler()
    if compiler is None:
        degraded("compiled_step", "no C++ compiler (%s): the torch path runs", ", ".join(COMPILERS))
        return None
    better_than_torch = [name for name, (features, _) in INSTRUCTION_SETS.items() if features and not why_not(name)]
    names, failure = [instruction_set] if is_named else better_than_torch, ""
    for name in names or ["portable"]:
        try:
            library = ctypes.CDLL(str(build(compiler, name, extra_flags)))
        except (OSError, subprocess.SubprocessError) as error:
            reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            failure = failure or f"{compiler} did not build {name} ({reason[0] if reason else error})"
            if not isinstance(error, subprocess.CalledProcessError):  # no matter of flags
                break
        else:
            if failure:
                say_once(failure, f"{name} runs")
            return library
    say_once(failure, "the torch path runs")
    return None


@cache  # an engine asks twice
def say_once(failure: str, consequence: str) -> None:
    degraded("compiled_step", "%s: %s", failure, consequence)


def find_compiler() -> str | None:
    names = (os.environ["CXX"],) if os.environ.get("CXX") else COMPILERS
    return next((path for name in names if (path := shutil.which(name))), None)


def build(compiler: str, instruction_set: str, extra_flags: tuple[str, ...] = ()) -> Path:
    """The path of the library; compiles only what is not in the cache."""
    flags = (*COMMON_FLAGS, *INSTRUCTION_SETS[instruction_set][1], *extra_flags)
    identity = "\0".join((compiler, compiler_version(compiler), platform.machine(), *flags)).encode() + SOURCE.read_bytes()
    library = cache_folder() / f"step-{instruction_set}-{hashlib.sha256(identity).hexdigest()[:20]}.so"
    if not library.exists():
        handle, unfinished = tempfile.mkstemp(dir=library.parent, suffix=".so")
        os.close(handle)
        command = [compiler, *flags, str(SOURCE), "-o", unfinished]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=BUILD_SECONDS)
            os.replace(unfinished, library)
        finally:
            Path(unfinished).unlink(missing_ok=True)
    return library


@cache
def compiler_version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60).stdout


def cache_folder() -> Path:
    """Made if it has to be, for this user alone: what lies there is executed."""
    chosen = os.environ.get("NANOVLLM_CACHE")
    folder = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanovllm"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder
