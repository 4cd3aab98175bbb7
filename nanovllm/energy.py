"""Energy: what processors and GPUs have used, where the hardware tells.

Processors: RAPL, which Linux shows as files, mostly for root alone. GPUs: NVML, the library of NVIDIA's driver. Both count for a
whole device, whoever uses it: a figure means something only on a machine that does nothing else. RAPL's counters begin again
at 0 after some 260 kJ (20 minutes at 200 W), so a meter must be read more often than that.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

POWERCAP = Path("/sys/class/powercap")
NVML = "libnvidia-ml.so.1"


class Source(NamedTuple):
    """One counter."""

    name: str  # such as package-0, package-0-dram, gpu0
    read: Callable[[], int]  # raises OSError
    joules: float  # of one unit
    range: int  # units after which it begins again; 0: never


class EnergyMeter:
    """Joules since it was made, by device."""

    def __init__(self, powercap: Path = POWERCAP, nvml: str = NVML) -> None:
        self.missing: list[str] = []  # reasons, where a kind of device does not tell
        self._sources: list[Source] = []
        for find in (partial(rapl_sources, powercap), partial(nvml_sources, nvml)):
            try:
                self._sources += find()
            except (OSError, ValueError) as error:  # ValueError: a file holds no number
                self.missing.append(str(error))
        self._last = [source.read() for source in self._sources]
        self._joules = {source.name: 0.0 for source in self._sources}

    def joules(self) -> dict[str, float]:
        """Name of the device -> joules. A counter that can no longer be read stays where it was."""
        for place, source in enumerate(self._sources):
            try:
                now = source.read()
            except OSError:
                continue
            used = now - self._last[place]
            self._joules[source.name] += max(used if used >= 0 else used + source.range, 0) * source.joules
            self._last[place] = now
        return dict(self._joules)

    def describe(self) -> str:
        """What it reads, or why nothing."""
        return ", ".join(self._joules) or "; ".join(self.missing)


def rapl_sources(powercap: Path) -> list[Source]:
    """Packages with their memory, when it is counted apart. Raises OSError with the reason when there are none."""
    sources = []
    for zone in sorted(powercap.glob("intel-rapl:*")):
        package, name = zone.name.rpartition(":")[0], (zone / "name").read_text().strip()
        if name.startswith("package"):
            sources.append(_rapl_source(zone, name))
        elif name == "dram":  # cores and graphics are part of their package, memory is not
            sources.append(_rapl_source(zone, f"{(powercap / package / 'name').read_text().strip()}-dram"))
    if not sources:
        raise OSError(f"no package in {powercap}/intel-rapl:*: this processor, or a virtual machine, does not tell")
    return sources


def _rapl_source(zone: Path, name: str) -> Source:
    counter = zone / "energy_uj"
    if not os.access(counter, os.R_OK):
        raise PermissionError(f"{counter} is not readable: it is for root, unless its mode is changed")
    return Source(name, lambda: int(counter.read_text()), 1e-6, int((zone / "max_energy_range_uj").read_text()))


def nvml_sources(library: str) -> list[Source]:
    """The GPUs that CUDA_VISIBLE_DEVICES allows. Raises OSError with the reason when there are none."""
    nvml = ctypes.CDLL(library)  # OSError: there is no driver
    _check(nvml, nvml.nvmlInit_v2())
    count = ctypes.c_uint()
    _check(nvml, nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = [str(number) for number in range(count.value)] if visible is None else visible.split(",")
    sources = []
    for number, device in enumerate(filter(None, map(str.strip, devices))):
        handle = ctypes.c_void_p()
        if device.isdecimal():
            _check(nvml, nvml.nvmlDeviceGetHandleByIndex_v2(int(device), ctypes.byref(handle)))
        else:
            _check(nvml, nvml.nvmlDeviceGetHandleByUUID(device.encode(), ctypes.byref(handle)))
        source = Source(f"gpu{number}", partial(_millijoules, nvml, handle), 1e-3, 0)
        source.read()
        sources.append(source)
    if not sources:
        raise OSError(f"{library}: no GPU is visible")
    return sources


def _millijoules(nvml: ctypes.CDLL, handle: ctypes.c_void_p) -> int:
    energy = ctypes.c_ulonglong()
    _check(nvml, nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(energy)))
    return energy.value


def _check(nvml: ctypes.CDLL, status: int) -> None:
    if status:
        nvml.nvmlErrorString.restype = ctypes.c_char_p
        raise OSError(f"NVML: {nvml.nvmlErrorString(status).decode()}")
