"""Stopwatch: where the seconds of a start went."""

from __future__ import annotations

import os
import time


class Stopwatch:
    """The first one of a process also knows how long Python and the imports took."""

    def __init__(self) -> None:
        self.laps = {"python and imports": _before.pop()} if _before else {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """The time since the last lap belongs to `name`."""
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self._last = now

    def describe(self) -> str:
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.laps.items())
        return f"{sum(self.laps.values()):.1f} s ({parts})"


def seconds_since_start() -> float:
    """Age of this process, seconds; 0 where /proc does not tell."""
    try:
        with open("/proc/self/stat") as stat, open("/proc/uptime") as uptime:
            started = int(stat.read().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
            return max(0.0, float(uptime.read().split()[0]) - started)
    except (OSError, ValueError, IndexError):
        return 0.0


_before = [seconds_since_start()]  # when this module, and so torch, has been imported; taken by the first stopwatch
