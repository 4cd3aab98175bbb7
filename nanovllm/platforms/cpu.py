"""The CPU platform: threads, allocator, memory."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from nanovllm.engine.roofline import Peak
from nanovllm.errors import ConfigError
from nanovllm.log import logger
from nanovllm.platforms.base import DeviceMemory
from nanovllm.platforms.openmp import is_chosen

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's mallopt(3)
KEEP_BYTES = 1 << 30
PROBE_BYTES, PROBE_SIZE, PROBE_S = 128 << 20, 1024, 0.05


class CpuPlatform:
    default_memory_share = 0.5
    default_block_size = 16  # tokens
    default_token_budget = 2048
    default_max_num_seqs = 256
    default_steps_ahead = 0  # the forward pass runs in the caller's thread: there is nothing to overlap with

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def prepare(self, num_threads: int | None) -> None:
        if num_threads is not None or "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(num_threads or usable_cores())
        keep_freed_memory()
        if not is_chosen() and torch.get_num_threads() > 1:
            logger.info("torch was imported before nanovllm: its threads wait by OpenMP's default, slow beside busy processes")

    def default_dtype(self) -> torch.dtype:
        """bfloat16 where the processor multiplies in it; elsewhere it is emulated, and slower than float32."""
        has_bf16 = any(name in cpu_flags() for name in ("avx512_bf16", "amx_bf16", "bf16"))
        return torch.bfloat16 if has_bf16 else torch.float32

    def memory(self) -> DeviceMemory:
        total, free = _system_memory()
        limit, used = _cgroup_memory()
        if limit is not None and limit < total:
            return DeviceMemory(limit, min(free, limit - used))
        return DeviceMemory(total, free)

    def max_default_kv_bytes(self) -> int | None:
        return 4 << 30  # a prefix cache that fills the machine's memory unasked would surprise

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Anonymous pages: zero, and not there before they are touched."""
        num_bytes = math.prod(shape) * dtype.itemsize
        return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=dtype).view(shape)

    def describe(self) -> str:
        return f"CPU, {torch.get_num_threads()} threads"

    def peak(self, dtype: str) -> Peak | None:
        """Measured in a quarter of a second, with the threads that the engine has."""
        values = self.zeros((PROBE_BYTES // 4,), torch.float32).fill_(1.0)  # more than a cache holds
        is_emulated = dtype == "bfloat16" and self.default_dtype() is not torch.bfloat16  # by torch: 2 s for one product
        matrix = torch.ones(PROBE_SIZE, PROBE_SIZE, dtype=torch.float32 if is_emulated else getattr(torch, dtype))
        bytes_per_s = PROBE_BYTES / _least_seconds(lambda: torch.dot(values, values))
        return Peak(bytes_per_s, 2 * PROBE_SIZE**3 / _least_seconds(lambda: matrix @ matrix), "measured")


def _least_seconds(work: Callable[[], object]) -> float:
    """Of the runs that fit into `PROBE_S`, five at least: others' work on the machine only adds."""
    times: list[float] = []
    while len(times) < 5 or sum(times) < PROBE_S:
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def usable_cores() -> int:
    """Cores that this process may use: its affinity, cut by a container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        cores = min(cores, max(1, int(quota[0]) // int(quota[1])))
    return cores


def own_cores(num_threads: int) -> list[int]:
    """A core for each of `num_threads`, of those that this process may use: the first thread of each processor core first."""
    if not hasattr(os, "sched_setaffinity"):
        raise ConfigError("cpu_pin_threads=True needs Linux: this system does not let a thread stay on a core")
    cores = sorted(os.sched_getaffinity(0))
    if num_threads > len(cores):
        raise ConfigError(f"cpu_pin_threads=True: {num_threads} threads, but this process may use {len(cores)} cores only")
    seen: Counter[str] = Counter()
    places = []  # (how many threads of the same processor core come before, core)
    for core in cores:
        siblings = _read(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list") or str(core)
        places.append((seen[siblings], core))
        seen[siblings] += 1
    return [core for _, core in sorted(places)[:num_threads]]


def keep_freed_memory() -> None:
    """Let malloc keep large freed blocks. By default glibc returns them to the kernel and pays page faults again for
    every large temporary: measured 4 times on prompt attention."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, KEEP_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, KEEP_BYTES)
    except (OSError, AttributeError):
        return  # not glibc: its allocator is what it is


def cpu_flags() -> set[str]:
    """Feature names of the processor (x86: flags, ARM: Features); empty where /proc does not tell."""
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith(("flags", "Features")):
            return set(line.partition(":")[2].split())
    return set()


def _system_memory() -> tuple[int, int]:
    """(total, available) bytes."""
    values = {}
    for line in _read("/proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        values[name] = int(rest.split()[0]) * 1024
    if "MemAvailable" in values:
        return values["MemTotal"], values["MemAvailable"]
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total, total // 2


def _cgroup_memory() -> tuple[int | None, int]:
    """(limit or None, used) bytes of this container."""
    limit, used = _read("/sys/fs/cgroup/memory.max").strip(), _read("/sys/fs/cgroup/memory.current").strip()
    return (int(limit), int(used)) if limit.isdigit() and used.isdigit() else (None, 0)


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
