from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.hashing import combine64, hash_bytes, hash_u64, mix64, splitmix64
from tests import naive
from tests.kernels.cases import examples


@examples(50)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_splitmix_is_the_published_one(x, seed):
    assert int(splitmix64(np.uint64(x))) == naive.splitmix64(x)
    assert int(hash_u64(np.array([x], np.uint64), seed)[0]) == naive.splitmix64(x ^ naive.splitmix64(seed))


def test_published_stream():
    """First outputs of splitmix64.c from seed 1234567."""
    state, found = 1234567, []
    for _ in range(3):
        found.append(int(splitmix64(np.uint64(state))))
        state = (state + 0x9E3779B97F4A7C15) % 2**64
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_pairs_are_ordered_and_bijection_keeps_zero():
    assert int(mix64(np.uint64(0))) == 0
    assert int(combine64(np.uint64(1), np.uint64(2))) != int(combine64(np.uint64(2), np.uint64(1)))


@examples(50)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_pairs_equal_the_slow_twin(a, b):
    assert int(combine64(np.uint64(a), np.uint64(b))) == naive.combine64(a, b)


def test_integers_hash_by_value_not_by_width():
    wide = hash_u64(np.array([-1, 5], np.int64))
    for dtype in (np.int8, np.int16, np.int32):
        np.testing.assert_array_equal(hash_u64(np.array([-1, 5], dtype)), wide)
    np.testing.assert_array_equal(hash_u64(np.array([0, 5, -1, 9])[1:3][::-1]), wide)


def arrow(strings):
    raw = [s.encode() for s in strings]
    return np.frombuffer(b"".join(raw), np.uint8), np.cumsum([0, *map(len, raw)])


@examples(40)
@given(st.lists(st.text(max_size=20), min_size=1, max_size=6))
def test_a_string_hashes_alike_wherever_it_stands(strings):
    together = hash_bytes(*arrow(strings), seed=3)
    alone = [hash_bytes(*arrow([s]), seed=3)[0] for s in strings]
    np.testing.assert_array_equal(together, alone)
    assert len(set(together.tolist())) == len(set(strings))


@examples(60)
@given(st.lists(st.binary(max_size=25), max_size=6), st.integers(0, 2**64 - 1))
def test_bytes_equal_the_slow_twin(strings, seed):
    data, offsets = np.frombuffer(b"".join(strings), np.uint8), np.cumsum([0, *map(len, strings)])
    assert hash_bytes(data, offsets, seed).tolist() == [naive.hash_bytes(text, seed) for text in strings]


def test_hashes_are_fixed_for_ever():
    """Saved vocabularies hold these numbers."""
    found = hash_bytes(*arrow(["", "a", "hello world!", "12345678"]))
    assert found.tolist() == STRINGS
    assert hash_u64([0, 1, -1]).tolist() == [12035550249420947055, 627405149472732430, 3303439293501059696]


STRINGS = [6235967106033911276, 7808632033373457844, 6449071315725580066, 13267270436251387902]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: hash_u64([0.5]), TypeError, "array must hold integers, found dtype float64"),
        (lambda: hash_u64([[1]]), ValueError, "one dimension"),
        (lambda: hash_u64([1], -1), ValueError, "found -1"),
        (lambda: hash_bytes(np.zeros(3, np.uint8), [0, 4]), ValueError, r"within \[0, 3\], found 0 .. 4"),
        (lambda: hash_bytes(np.zeros(3, np.uint8), [2, 1]), ValueError, "offsets must rise"),
        (lambda: hash_bytes(np.zeros(3, np.int8), [0, 1]), TypeError, "data must be uint8"),
        (lambda: hash_bytes(np.zeros(3, np.uint8), []), ValueError, "offsets must be int64"),
    ],
)
def test_bad_arguments_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
