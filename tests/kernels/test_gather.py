from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from kernels.gather import GATHERED, columns_of, gather_rows
from tests.kernels.cases import layouts


@pytest.mark.parametrize("dtype", GATHERED)
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_rows_are_those_of_numpy(dtype, threads):
    rng = np.random.default_rng(0)
    block = (rng.standard_normal((50, 7)) * 100).astype(dtype)
    index = rng.integers(0, 50, 33)
    for laid_out, rows in zip(layouts(block), layouts(index), strict=True):
        out = np.empty((33, 7), dtype)
        assert gather_rows(laid_out, rows, out, threads=threads) is out
        np.testing.assert_array_equal(out, block[index])


def test_empty_shapes():
    assert gather_rows(np.empty((0, 3), np.float32), [], np.empty((0, 3), np.float32)).shape == (0, 3)
    assert gather_rows(np.empty((2, 0), np.float32), [1], np.empty((1, 0), np.float32)).shape == (1, 0)


@pytest.mark.parametrize(
    ("index", "out", "error", "words"),
    [
        ([0, 5], np.empty((2, 2), np.float32), IndexError, r"\[0, 5\), found 5 at position 1"),
        ([-1], np.empty((1, 2), np.float32), IndexError, "found -1 at position 0"),
        ([0], np.empty((1, 2), np.float64), TypeError, "out must be an array of float32, found float64"),
        ([0], np.empty((1, 3), np.float32), ValueError, r"shape \(1, 2\), found \(1, 3\)"),
        ([0], np.empty((1, 4), np.float32)[:, ::2], ValueError, "C-contiguous"),
        ([0.0], np.empty((1, 2), np.float32), TypeError, "index must hold integers"),
    ],
)
def test_nothing_is_written_when_an_argument_is_wrong(index, out, error, words):
    out[:] = 7
    with pytest.raises(error, match=words):
        gather_rows(np.zeros((5, 2), np.float32), index, out)
    assert np.all(out == 7)


def test_other_types_are_refused():
    with pytest.raises(TypeError, match="found float16"):
        gather_rows(np.zeros((2, 2), np.float16), [0], np.empty((1, 2), np.float16))
    with pytest.raises(ValueError, match=r"block must be \[n, w\]"):
        gather_rows(np.zeros(2, np.float32), [0], np.empty((1, 2), np.float32))


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 64, 65, 200])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_columns_and_their_bitmaps_are_those_of_arrow(n, threads):
    rng = np.random.default_rng(n)
    block = rng.standard_normal((n, 5))
    block[rng.random((n, 5)) < 0.3] = np.nan
    block[:, 4] = -0.0
    values, valid, nulls = columns_of(block, threads)
    np.testing.assert_array_equal(values, block.T)
    for k in range(5):
        expected = pa.array(np.ascontiguousarray(block[:, k]), from_pandas=True)
        found = pa.Array.from_buffers(pa.float64(), n, [pa.py_buffer(valid[k]), pa.py_buffer(values[k])])
        assert found.equals(expected) and nulls[k] == expected.null_count


@pytest.mark.parametrize(
    ("block", "error"),
    [
        ([[1.0]], TypeError),
        (np.zeros((2, 2), np.float32), TypeError),
        (np.zeros(3), ValueError),
        (np.zeros((4, 4))[:, ::2], ValueError),
    ],
)
def test_blocks_that_cannot_be_turned_are_refused(block, error):
    with pytest.raises(error, match="found"):
        columns_of(block)
