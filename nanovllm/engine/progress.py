"""Around a loop of steps: what a person sees of a long `generate`, how they stop it, and what must not stop it.

Ctrl-C takes effect between two steps instead of within one: a step that is cut in half cannot be resumed.
"""

from __future__ import annotations

import gc
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from nanovllm.outputs import GenerationOutput


@contextmanager
def few_full_collections() -> Iterator[None]:
    """A full one looks at every token and log-probability of every sequence, between two steps; hardly any is garbage."""
    before = gc.get_threshold()
    gc.set_threshold(before[0], before[1], 1000)
    try:
        yield
    finally:
        gc.set_threshold(*before)


@contextmanager
def no_collections() -> Iterator[None]:
    """The garbage collector stays away meanwhile."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """SIGINT sets the event; the loop looks at it. A second one interrupts at once. Outside the main thread: never set."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    previous = signal.getsignal(signal.SIGINT)

    def on_interrupt(*_: object) -> None:
        if flag.is_set():
            raise KeyboardInterrupt
        flag.set()

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, previous)


class Progress:
    """A bar over finished requests, with the rate of generated tokens."""

    def __init__(self, total: int, enabled: bool) -> None:
        from tqdm import tqdm  # no server shows a bar

        self._bar = tqdm(total=total, desc="Generating", unit="req", disable=not enabled, dynamic_ncols=True)
        self._num_tokens = 0
        self._start = time.monotonic()

    def advance(self, output: GenerationOutput) -> None:
        self._num_tokens += output.metrics.num_generated_tokens
        self._bar.set_postfix_str(f"{self._num_tokens / (time.monotonic() - self._start + 1e-9):.0f} tok/s", refresh=False)
        self._bar.update()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
