"""When kernels are compiled: before the first request, all at once, and never after.

Triton compiles a kernel at its first launch, for every combination of constants, dtypes and kinds of numbers (1,
multiples of 16, others): half a second each, one after another, while somebody waits. So at the start the steps are
rehearsed with the launches of new kernels left out, and what they would have launched is compiled in threads. A list of
what is compiled later stays empty; a name in it is a variant that the rehearsal does not know.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from nanovllm.kernels.triton_language import HAS_TRITON
from nanovllm.log import degraded, logger

COMPILE_THREADS = 8
INDEX_KERNELS = ("nanovllm.kernels.gather_inputs",)  # modules whose results are indices: they run in a rehearsal too


def compile_ahead(rehearse: Callable[[], None]) -> int:
    """Compile, in parallel, every kernel that `rehearse` launches; returns their number.

    Launches of new kernels are skipped, so their results are whatever memory holds; only those of INDEX_KERNELS are not.
    """
    from triton import knobs

    wanted: dict[str, tuple[Any, str]] = {}

    def skip(**facts: Any) -> bool:
        """True: do not compile, do not launch. A version of Triton that tells less compiles as always."""
        kernel, data = getattr(facts.get("fn"), "jit_function", None), facts.get("compile", {}).get("specialization_data")
        if not data or not hasattr(kernel, "preload") or facts["fn"].module in INDEX_KERNELS:
            return False
        wanted[data] = kernel, data
        return True

    previous, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, skip
    try:
        rehearse()
    finally:
        knobs.runtime.jit_cache_hook = previous
    with ThreadPoolExecutor(COMPILE_THREADS) as pool:
        for done in [pool.submit(kernel.preload, data) for kernel, data in wanted.values()]:
            if (error := done.exception()) is not None:  # it is compiled at its first launch instead
                logger.debug("a kernel was not compiled ahead: %r", error)
    return len(wanted)


def watch_compiles() -> list[str]:
    """A list that grows by the name of every kernel that this process compiles, or loads compiled from disk, from now on."""
    names: list[str] = []
    if not HAS_TRITON:
        return names
    from triton import knobs

    previous = knobs.runtime.jit_post_compile_hook

    def note(*arguments: Any, **facts: Any) -> Any:
        names.append(str(facts.get("repr", "kernel")))
        degraded("late_compile", "kernel compiled after start-up, a step waited for it: %s", names[-1])
        return previous(*arguments, **facts) if previous is not None else None

    knobs.runtime.jit_post_compile_hook = note
    return names
