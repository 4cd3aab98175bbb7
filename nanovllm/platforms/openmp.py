"""OpenMP's waiting policy, which must be in the environment before torch loads its OpenMP library.

GNU OpenMP's threads spin for milliseconds at the end of every parallel region. That is right on a free machine; when
another process takes a core, the spinning threads take turns with the working one, and a step that has thousands of
regions becomes up to a hundred times slower. A short spin keeps nine tenths of the speed and gives the core back soon:
measured in benchmarks/LOG.md.
Imports nothing, so that it can run first.
"""

from __future__ import annotations

import os
import sys

SPIN_COUNT = "2000"  # loop turns, a few microseconds


def set_waiting_policy() -> None:
    """Does nothing when the user has chosen, or when torch is loaded already."""
    if not is_chosen() and "torch" not in sys.modules:
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT


def is_chosen() -> bool:
    return any(name in os.environ for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"))
