"""Masks of many matchers at once, in llguidance's threads, while the caller goes on.

The library gives Python's lock up for as long as it computes, but only in the thread that called it: so a thread of ours
calls it, and waits. A thread that wants the lock back gets it after 5 ms, unless the others stand still; so whoever begins
stands still until our thread has given the lock up, 20 us, and stands still again when there is nothing left to do.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import cache, partial
from typing import Any

import numpy as np


class MaskThreads:
    def __init__(self, executor: Any) -> None:
        """`executor`: an `LLExecutor`."""
        self._executor = executor
        self._is_free, self._may_begin, self._has_begun = threading.Lock(), threading.Lock(), threading.Lock()
        self._may_begin.acquire()
        self._has_begun.acquire()
        self._work: Callable[[], float]
        self._outcome: Future[float]
        threading.Thread(target=self._run, name="masks", daemon=True).start()

    def begin(
        self, matchers: Sequence[tuple[Any, int]], masks: np.ndarray, clock: Callable[[], float] = time.monotonic
    ) -> Callable[[], float]:
        """Begin to write the masks of the library's `matchers`, each with its line of `masks`, [n, num_mask_words] int32.

        Nobody may touch either before the function that is returned has been called: it waits for the masks, and says how
        many seconds they took. What the library raises, it raises. Where an engine of another thread is at it, it computes.
        """
        work = partial(self._compute, matchers, masks, clock)
        if not self._is_free.acquire(blocking=False):
            return work
        self._work, self._outcome = work, Future()
        wait = self._outcome.result
        self._may_begin.release()
        self._has_begun.acquire()
        return wait

    def _compute(self, matchers: Sequence[tuple[Any, int]], masks: np.ndarray, clock: Callable[[], float]) -> float:
        started = clock()
        self._executor.unsafe_compute_mask_ptr(matchers, masks.ctypes.data, masks.strides[0], len(masks))
        return clock() - started

    def _run(self) -> None:
        while True:
            self._may_begin.acquire()
            work, outcome = self._work, self._outcome
            self._has_begun.release()  # whoever waits for this cannot go on before the library gives the lock up
            try:
                tell = partial(outcome.set_result, work())
            except BaseException as error:  # also a panic, which is no Exception
                tell = partial(outcome.set_exception, error)
            self._is_free.release()
            tell()
            del work, outcome, tell  # and with them the masks


@cache
def mask_threads(num_threads: int) -> MaskThreads:
    """Of this process."""
    import llguidance

    return MaskThreads(llguidance.LLExecutor(num_threads))
