"""Finds the library of step.cpp for this processor and loads it: prebuilt, from the cache, or compiled here, in this order.

A wheel may bring libraries along (hatch_build.py); one is taken if its name says that it is of this very source and these
flags, and if this system can load it. Else the machine's own compiler makes one, once, in a cache, under a name made of the
source, the compiler and its flags, so nothing stale is ever loaded. It is written under another name and then renamed: two
processes may build at once. A compiler that is older than the best instructions gives the next; where nothing is prebuilt and
there is no compiler, `load_step` returns None and the torch path runs. Either is one log line. compiler.py has the flags,
library.py the C interface.

    NANOVLLM_CACHE    where built libraries go, else ~/.cache/nanovllm
    NANOVLLM_CPU_ISA  forces one of INSTRUCTION_SETS, for tests and measurements; refused where the machine lacks it
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from nanovllm.errors import ConfigError
from nanovllm.kernels.cpu.compiler import (
    COMPILERS,
    INSTRUCTION_SETS,
    PREBUILT,
    all_flags,
    compile_step,
    find_compiler,
    library_name,
)
from nanovllm.log import degraded, logger
from nanovllm.platforms.cpu import cpu_flags

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
    """The library for this processor, compiled if it has to be; None, and a log line, where that is impossible.

    A set that is named, here or by NANOVLLM_CPU_ISA, is had or nothing; else what is not prebuilt, and the compiler refuses,
    gives way to the next.
    """
    compiler = find_compiler()
    failure = "" if compiler else f"no C++ compiler ({', '.join(COMPILERS)})"
    for position, name in enumerate(wanted_sets(instruction_set)):
        library = load_prebuilt(name, extra_flags)
        if library is None and compiler is not None:
            try:
                library = ctypes.CDLL(str(build(compiler, name, extra_flags)))
            except (OSError, subprocess.SubprocessError) as error:
                reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
                failure = failure or f"{compiler} did not build {name} ({reason[0] if reason else error})"
                if not isinstance(error, subprocess.CalledProcessError):  # no matter of flags
                    compiler = None
        if library is not None:
            if position:
                say_once(failure, f"{name} runs")
            return library
    degraded("compiled_step", "%s: the torch path runs", failure)
    return None


def wanted_sets(instruction_set: str | None) -> list[str]:
    """Best first: those that are faster than torch here, or the one that is named, here or by NANOVLLM_CPU_ISA."""
    is_named = instruction_set is not None or "NANOVLLM_CPU_ISA" in os.environ
    instruction_set = instruction_set or best_instruction_set()
    if reason := why_not(instruction_set):  # its first instruction would end the process
        raise ConfigError(f"{instruction_set} instructions cannot be had here: {reason}")
    if is_named:
        return [instruction_set]
    return [name for name in available_instruction_sets() if INSTRUCTION_SETS[name][0]] or ["portable"]


@cache  # an engine asks twice
def say_once(failure: str, consequence: str) -> None:
    degraded("compiled_step", "%s: %s", failure, consequence)


def load_prebuilt(instruction_set: str, extra_flags: tuple[str, ...] = ()) -> ctypes.CDLL | None:
    """None also for one that this system cannot load, as where its C library is older than that of the wheel's maker."""
    library = PREBUILT / library_name(instruction_set, all_flags(instruction_set, extra_flags))
    try:
        return ctypes.CDLL(str(library)) if library.exists() else None
    except OSError as error:
        logger.info("a prebuilt library is passed over: %s", error)
        return None


def describe_step() -> str:
    """Where the library of this processor comes from; compiles nothing."""
    compiler = find_compiler()
    for name in wanted_sets(None):
        if prebuilt := load_prebuilt(name):
            return f"{name}, prebuilt: {prebuilt._name}"
        if compiler is not None:
            library = cache_path(compiler, name)
            return f"{name}, {'compiled' if library.exists() else 'to be compiled'} by {compiler}: {library}"
    return "no C++ compiler, and nothing prebuilt: torch runs"


def build(compiler: str, instruction_set: str, extra_flags: tuple[str, ...] = ()) -> Path:
    """The path of the library; compiles only what is not in the cache."""
    library = cache_path(compiler, instruction_set, extra_flags)
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)  # for this user alone: what lies there is executed
        handle, unfinished = tempfile.mkstemp(dir=library.parent, suffix=".so")
        os.close(handle)
        try:
            compile_step(compiler, all_flags(instruction_set, extra_flags), Path(unfinished))
            os.replace(unfinished, library)
        finally:
            Path(unfinished).unlink(missing_ok=True)
    return library


def cache_path(compiler: str, instruction_set: str, extra_flags: tuple[str, ...] = ()) -> Path:
    chosen = os.environ.get("NANOVLLM_CACHE")
    folder = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanovllm"
    flags = all_flags(instruction_set, extra_flags)
    return folder / library_name(instruction_set, flags, f"{compiler}\0{compiler_version(compiler)}")


@cache
def compiler_version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60).stdout
