"""Masks in the library's threads: the caller goes on, and gets what they did, or what they raised."""

import ctypes
import threading
import time

import numpy as np
import pytest

from nanovllm.structured.mask_threads import MaskThreads


class Library:
    """Takes its time without Python's lock, as the real one does, and writes what it is given."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self.threads = seconds, []

    def unsafe_compute_mask_ptr(self, matchers: list[tuple[int, int]], address: int, stride: int, count: int) -> None:
        self.threads.append(threading.current_thread().name)
        time.sleep(self.seconds)
        for byte, line in matchers:
            assert line < count
            ctypes.memset(address + line * stride, byte, stride)


def test_the_caller_goes_on_while_masks_are_computed():
    threads, masks = MaskThreads(Library(0.2)), np.zeros((3, 2), np.int32)
    started = time.perf_counter()
    wait = threads.begin([(0xFF, 2), (0x00, 0)], masks)
    assert time.perf_counter() - started < 0.1 and not masks.any()
    assert 0.2 <= wait() < 5
    assert masks.tolist() == [[0, 0], [0, 0], [-1, -1]]


def test_one_call_after_the_other():
    library = Library()
    threads, masks = MaskThreads(library), np.zeros((1, 1), np.int32)
    for byte in (0xFF, 0x00) * 50:
        threads.begin([(byte, 0)], masks)()
        assert masks[0, 0] == (-1 if byte else 0)
    assert set(library.threads) == {"masks"}


def test_who_comes_while_another_engine_is_at_it_computes_for_itself():
    """Engines that one thread drives by turns would wait for ever."""
    library = Library()
    threads, first, second = MaskThreads(library), np.zeros((1, 1), np.int32), np.zeros((1, 1), np.int32)
    wait_first = threads.begin([(0xFF, 0)], first)
    wait_second = threads.begin([(0xFF, 0)], second)
    wait_second()
    wait_first()
    assert first.all() and second.all()
    assert library.threads == ["masks", threading.current_thread().name]


def test_what_the_library_raises_comes_to_who_waits_and_the_next_call_works():
    class Panic(BaseException):
        pass

    class Panicking(Library):
        def unsafe_compute_mask_ptr(self, matchers, address, stride, count):
            if not matchers:
                raise Panic("as told")
            super().unsafe_compute_mask_ptr(matchers, address, stride, count)

    threads, masks = MaskThreads(Panicking()), np.zeros((1, 1), np.int32)
    wait = threads.begin([], masks)
    with pytest.raises(Panic, match="as told"):
        wait()
    threads.begin([(0xFF, 0)], masks)()
    assert masks.all()


def test_masks_that_nobody_waits_for_keep_nobody_from_theirs():
    """An engine that is closed between two steps."""
    library = Library()
    threads, masks = MaskThreads(library), np.zeros((1, 1), np.int32)
    threads.begin([(0xFF, 0)], np.zeros((1, 1), np.int32))
    deadline = time.monotonic() + 10
    while not threads._is_free.acquire(blocking=False) and time.monotonic() < deadline:
        time.sleep(0.001)
    threads._is_free.release()
    threads.begin([(0xFF, 0)], masks)()
    assert masks.all() and library.threads == ["masks", "masks"]
