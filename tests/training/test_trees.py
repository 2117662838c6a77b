"""Trees in a file: the same bytes for the same trees, and nothing is read from a file that lies."""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from engine.errors import UserError
from engine.runtime.records import Damaged
from engine.training.boosting.grower import Rows
from engine.training.boosting.on_lightgbm import trees_of
from engine.training.target import TargetScale
from engine.training.tensors import Tensors
from engine.training.trees import MOST_NODES, Trees, from_arrays, joined, no_trees, read_trees
from tests.kernels.test_trees import CARDINALITIES, WIDTH, grown, rows_of


@pytest.fixture
def model() -> Trees:
    rng = np.random.default_rng(0)
    forest = grown(rng, [9, 5, 1, 4])
    gain = np.where(forest.column >= 0, rng.random(len(forest.column)), 0.0)
    cover = rng.integers(1, 9, len(gain)).astype(np.float64)
    return Trees("lightgbm", WIDTH, list(CARDINALITIES), forest, gain, TargetScale(3.0, 2.0), cover)


@pytest.fixture
def file(model: Trees, tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(model.weights())
    return path


def test_what_was_written_is_read(model: Trees, file: Path) -> None:
    found = read_trees(Tensors.of(file), model.describe(), "here")
    rows = rows_of(np.random.default_rng(1), 200)
    assert found.weights() == model.weights() and found.describe() == model.describe() and found.target == model.target
    assert found.logits(*rows).tobytes() == model.logits(*rows).tobytes()


def test_the_first_trees_and_the_rest_are_the_whole(model: Trees) -> None:
    rows = rows_of(np.random.default_rng(1), 100)
    forest, nodes = grown(np.random.default_rng(7), [6, 3]), np.zeros(16)
    other = Trees("lightgbm", WIDTH, list(CARDINALITIES), forest, nodes, TargetScale(), nodes)
    whole = joined(model, [other])
    assert whole.first(4).weights() == model.weights()
    assert whole.describe()["settings"]["trees"] == 6
    added = other.logits(*rows) - np.float32(other.forest.base[0])
    np.testing.assert_allclose(whole.logits(*rows), model.logits(*rows) + added, rtol=1e-5, atol=1e-5)
    assert model.first(0).forest.base == model.forest.base and len(model.first(0).forest.column) == 0


def test_trees_of_an_earlier_version_are_read_and_added_to_but_give_no_reasons(model: Trees, tmp_path: Path) -> None:
    earlier = dataclasses.replace(model, cover=None)
    path, rows = tmp_path / "model.safetensors", rows_of(np.random.default_rng(1), 5)
    path.write_bytes(earlier.weights())
    found = read_trees(Tensors.of(path), model.describe(), "here")
    assert found.weights() == earlier.weights() != model.weights()
    assert found.logits(*rows).tobytes() == model.logits(*rows).tobytes()
    for trees in (found, joined(found, [model]), joined(model, [found]), found.first(2)):
        with pytest.raises(UserError, match="train it again"):
            trees.contributions(*rows, np.ones((5, 1)))


def test_importance_is_the_share_of_gain(model: Trees) -> None:
    shares = model.importance()
    assert shares.shape == (WIDTH + 3,) and shares.sum() == pytest.approx(1.0)
    of_first = model.gain[model.forest.column == 0].sum() / model.gain.sum()
    assert shares[0] == pytest.approx(of_first)
    nothing = no_trees("xgboost", 2, [3], np.zeros(1), TargetScale(), "float32")
    assert nothing.importance().tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("trees", 10**7, "trees must be a number from 0 to"),
        ("nodes", 10**7, "nodes must be a number from 0 to 4,194,304, found 10000000"),
        ("nodes", MOST_NODES, r"column must have shape \[4194304\], found"),
        ("trees", 3, r"root must have shape \[4\], found \[5\]"),
        ("nodes", "many", "nodes must be a whole number"),
    ],
)
def test_a_description_that_its_file_does_not_bear_out_is_refused(
    model: Trees, file: Path, place: str, value: Any, said: str
) -> None:
    described = model.describe()
    described["settings"] = {**described["settings"], place: value}
    with pytest.raises(Damaged, match=said):
        read_trees(Tensors.of(file), described, "here")


def wrapping(offsets: np.ndarray) -> np.ndarray:
    """Offsets far outside whose int64 differences overflow, so that each of them is above 0."""
    found = offsets.copy()
    found[1], found[2] = 2**63 - 1, -(2**63) + found[-1] + 1
    assert len(found) > 3 and (np.diff(found)[:3] > 0).all()
    return found


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("column", lambda a: np.where(np.arange(len(a)) == 0, 10**6, a).astype(a.dtype), "must be of one of"),
        ("root", lambda a: a[::-1].copy(), "root must rise"),
        ("root", lambda a: np.array([0, 1, *a[2:]]), "level order"),
        ("root", wrapping, "root must rise"),
        ("column", lambda a: np.zeros_like(a), "level order"),
        ("set_of", lambda a: np.where(a >= 0, 10**6, a).astype(a.dtype), "must name one of"),
        ("set_at", lambda a: a * 1000, "set_at must rise"),
        ("set_at", wrapping, "set_at must rise"),
        ("value", lambda a: a * np.nan, "value must be finite"),
        ("base", lambda a: a * np.inf, "base must be finite"),
        ("threshold", lambda a: a.astype(np.float64), "threshold must be F32, found F64"),
        ("gain", lambda a: a[:-1], r"gain must have shape"),
        ("cover", lambda a: a[:-1], r"cover must have shape"),
        ("cover", lambda a: a * np.nan, r"cover must be finite"),
        ("cover", lambda a: -a, r"cover must be numbers of at least 0"),
        ("words", None, "must hold root, column"),
    ],
)  # fmt: skip
def test_arrays_that_are_no_trees_are_refused(model: Trees, tmp_path: Path, name: str, change: Any, said: str) -> None:
    arrays = model.arrays()
    if change is None:
        del arrays[name]
    else:
        arrays[name] = change(arrays[name])
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(arrays, path)
    with pytest.raises(Damaged, match=said):
        read_trees(Tensors.of(path), model.describe(), "here")
    with pytest.raises(Damaged, match=said):
        from_arrays(arrays, model.describe(), "here")


def test_a_header_that_promises_more_than_the_file_holds_is_refused_before_memory_is_taken(
    model: Trees, tmp_path: Path
) -> None:
    header = {"column": {"dtype": "I32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 64)
    with pytest.raises(Damaged, match="must be safetensors"):
        read_trees(Tensors.of(path), model.describe(), "here")


def test_no_byte_of_a_file_changes_into_a_traceback(model: Trees, tmp_path: Path) -> None:
    content, rng, path = model.weights(), np.random.default_rng(2), tmp_path / "model.safetensors"
    rows = rows_of(rng, 10)
    for at in rng.integers(0, len(content), 300):
        path.write_bytes(content[:at] + bytes([content[at] ^ int(rng.integers(1, 256))]) + content[at + 1 :])
        try:
            assert read_trees(Tensors.of(path), model.describe(), "here").logits(*rows).shape == (10, 1)
        except Damaged:
            continue


def test_a_threshold_of_double_precision_decides_as_the_double_did() -> None:
    text = (
        "tree\n\nTree=0\nnum_leaves=2\nsplit_feature=0\nsplit_gain=1\nthreshold={}\ndecision_type=2\nleft_child=-1\n"
        "right_child=-2\nleaf_value=-1 1\nleaf_count=3 4\ninternal_count=7\n\nend of trees\n"
    )
    for value in (0.1, -0.1, 1e-40, 16777217.0, 0.30000001192092896, -7.0000000000000001e-46):
        rows = Rows(np.zeros((1, 1), np.float32), np.zeros((1, 0), np.int32), [], 1)
        trees = trees_of(text.format(repr(value)), rows)
        near = np.float32(value)
        x = np.array([near, np.nextafter(near, np.float32(9e9)), np.nextafter(near, np.float32(-9e9))])[:, None]
        found = trees.logits(x.astype(np.float32), np.zeros((3, 0), np.int32))[:, 0]
        assert found.tolist() == np.where(x[:, 0].astype(np.float64) <= value, -1.0, 1.0).tolist()
