"""What watched code reads is found; what other code does meanwhile is not its own."""

from __future__ import annotations

import gc
import time

import numba
import pytest

from engine.runtime.purity import watched


def test_the_clock_is_found() -> None:
    assert watched(lambda: time.time() and 1) == (1, ["time.time"])


def test_what_a_garbage_collection_calls_is_not_found() -> None:
    def told(*_: object) -> None:
        time.perf_counter()

    def much() -> int:
        return sum(len([[] for _ in range(500)]) for _ in range(500))

    gc.callbacks.append(told)
    before = gc.get_threshold()
    gc.set_threshold(10)
    try:
        assert watched(much)[1] == []
        assert gc.isenabled()
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(told)


def test_what_the_compiler_of_a_kernel_reads_is_not_found() -> None:
    @numba.njit  # type: ignore[misc]
    def double(value: float) -> float:
        return value * 2

    assert watched(lambda: double(2.0)) == (4.0, [])


def test_collections_go_on_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError):
        watched(lambda: 1 // 0)
    assert gc.isenabled()
