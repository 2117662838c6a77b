"""Blocks are aligned, survive a trip through files bit by bit, and refuse what they are not."""

from __future__ import annotations

import numpy as np
import pytest

from engine.errors import UserError
from engine.training.examples import Examples, aligned_empty
from tests.training.conftest import content, packed, weights_of


@pytest.mark.parametrize("shape", [(1,), (7, 3), (0, 4), (5, 0), (1000, 17)])
def test_arrays_start_on_a_cache_line(shape):
    array = aligned_empty(shape, np.float32)
    # An array without elements has no memory, so its address means nothing.
    assert array.size == 0 or array.ctypes.data % 64 == 0
    assert array.shape == shape and array.flags.c_contiguous


def test_any_layout_is_packed_without_changing_a_value(problem):
    data = problem(50)
    again = packed(np.asfortranarray(data.numeric), data.codes[::-1][::-1], data.target.astype(float), data.rows)
    assert content(again._arrays()) == content(data._arrays())


@pytest.mark.parametrize("n", [0, 1, 100])
def test_files_give_back_the_same_bits(problem, tmp_path, n):
    data = problem(n)
    weighted = packed(data.numeric, data.codes, data.target, data.rows, np.linspace(0, 1, n))
    for name, one in (("plain", data), ("weighted", weighted)):
        one.save(tmp_path / name)
        again = Examples.open(tmp_path / name)
        assert content(again._arrays()) == content(one._arrays()) and (again.weight is None) == (one.weight is None)
        assert n == 0 or again.numeric.ctypes.data % 64 == 0


def test_opened_blocks_are_mapped_and_training_on_them_gives_the_same_weights(problem, config, fitted, tmp_path):
    data = problem(200)
    data.save(tmp_path / "data")
    mapped = Examples.open(tmp_path / "data")
    assert not mapped.numeric.flags.owndata
    assert weights_of(fitted(config(), mapped)[0].model) == weights_of(fitted(config(), data)[0].model)


def test_a_cut_off_or_missing_file_is_refused(problem, tmp_path):
    problem(20).save(tmp_path / "data")
    path = tmp_path / "data" / "numeric.npy"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"numeric.npy must have \d+ bytes"):
        Examples.open(tmp_path / "data")
    path.unlink()
    with pytest.raises(UserError, match="found nothing"):
        Examples.open(tmp_path / "data")


def test_arrays_of_another_type_or_length_are_refused(problem):
    data = problem(10)
    with pytest.raises(ValueError, match="codes must be int32"):
        Examples(data.numeric, data.codes.astype(np.int64), data.target, data.rows)
    with pytest.raises(ValueError, match="target must be float32 of 1 or 2 dimensions and 10 rows"):
        Examples(data.numeric, data.codes, data.target[:5], data.rows)
