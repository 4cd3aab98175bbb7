"""Kernels that were compiled after start-up: each makes somebody wait, so all variants are warmed, and this list stays empty.

Triton compiles a kernel for every combination of constants, dtypes, and kinds of numbers (1, multiples of 16, others).
"""

from __future__ import annotations

from typing import Any

from nanovllm.kernels.triton_language import HAS_TRITON
from nanovllm.log import logger


def watch_compiles() -> list[str]:
    """A list that grows by the name of every kernel that this process compiles, or loads compiled from disk, from now on."""
    names: list[str] = []
    if not HAS_TRITON:
        return names
    from triton import knobs

    previous = knobs.runtime.jit_post_compile_hook

    def note(*arguments: Any, **facts: Any) -> Any:
        names.append(str(facts.get("repr", "kernel")))
        logger.warning("kernel compiled after start-up, a step waited for it: %s", names[-1])
        return previous(*arguments, **facts) if previous is not None else None

    knobs.runtime.jit_post_compile_hook = note
    return names
