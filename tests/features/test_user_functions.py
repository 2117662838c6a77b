"""Functions of a file beside the experiment: found by name, one row at a time, kept batch by batch, tried again."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import engine
from engine.config import schema
from engine.config.sections.features import ViewConfig
from engine.config.tree import Config
from engine.data.make_dataset import ensure_dataset
from engine.errors import UserError
from engine.features import calls, functions
from engine.features.table import FeatureTable, ensure_table
from engine.runtime.run import Run
from tests.features.test_store import built, config_of, everything
from tests.tiny import overrides, visits, write_tiny

VIEW = "features.views.mine={kind: function, function: double, inputs: [size], outputs: {twice: float64}}"
SLOW = ("features.views.mine.batch_rows=64", "features.views.mine.retry_pause=1ms")
DOUBLE = """
import pyarrow as pa
import pyarrow.compute as pc

def double(rows):
    return pa.table({"twice": pc.multiply(rows["size"], 2)})
"""
# Counts its calls in a file; fails for batches that hold a size above the number in the file `limit`, and dies at the call
# whose number is in the file `kill`.
COUNTED = """
import os, pathlib
import pyarrow as pa
import pyarrow.compute as pc

HERE = pathlib.Path({folder!r})

def double(rows):
    with open(HERE / "calls", "a") as file:
        file.write(f"{{rows.num_rows}}\\n")
    limit = float((HERE / "limit").read_text())
    if (HERE / "kill").exists() and len((HERE / "calls").read_text().split()) == int((HERE / "kill").read_text()):
        os.kill(os.getpid(), 9)
    if pc.any(pc.greater(rows["size"], limit)).as_py():
        raise ConnectionError("the service is busy")
    return pa.table({{"twice": pc.multiply(rows["size"], 2)}})
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = write_tiny(tmp_path, 400)
    (folder / "conf" / "features.py").write_text(DOUBLE)
    return folder


@pytest.fixture
def counted(folder: Path) -> Path:
    (folder / "conf" / "features.py").write_text(COUNTED.format(folder=str(folder)))
    limit(folder, 1e300)
    return folder


def limit(folder: Path, value: float) -> None:
    (folder / "limit").write_text(str(value))


def rows_called(folder: Path) -> int:
    """Rows that the function was called with since the last time, the probe's left out."""
    counts = [int(line) for line in (folder / "calls").read_text().split()]
    (folder / "calls").unlink()
    return sum(counts[4:])


def mine(folder: Path, *more: str) -> Config:
    return config_of(folder, "plugins=[features.py]", VIEW, *more)


def is_double(table: FeatureTable) -> bool:
    found = everything(table)
    return bool(found["mine_twice"].equals(pc.multiply(found["size"], 2)))


# ------------------------------------------------------------------------------------------------------- the file


def test_a_function_of_a_file_is_a_view_and_an_edit_is_another_one(folder: Path) -> None:
    first = built(mine(folder))
    assert is_double(first)
    assert built(mine(folder)).views["mine"].directory == first.views["mine"].directory
    (folder / "conf" / "features.py").write_text(DOUBLE.replace("2)", "3)"))
    edited = built(mine(folder))
    assert everything(edited)["mine_twice"].equals(pc.multiply(everything(first)["size"], 3))
    assert edited.views["shop"].directory == first.views["shop"].directory


# --------------------------------------------------------------------------------------------------------- the probe


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("pc.subtract(rows['size'], pc.mean(rows['size']))", "with 7 others"),
        ("pc.cumulative_sum(pc.fill_null(rows['size'], 0.0))", "in reverse order"),
        ("pa.array(__import__('numpy').random.default_rng().random(rows.num_rows))", "in reverse order"),
        ("pa.array([float(rows.num_rows == 1)] * rows.num_rows)", "alone"),
    ],
)
def test_a_function_that_does_not_compute_each_row_from_itself_is_refused(folder: Path, body: str, found: str) -> None:
    (folder / "conf" / "features.py").write_text(DOUBLE.replace('pc.multiply(rows["size"], 2)', body))
    with pytest.raises(UserError, match=f"'double' must give a row the same values .*{found}"):
        built(mine(folder))


def test_the_probe_shows_no_value_of_a_sensitive_column(folder: Path) -> None:
    (folder / "conf" / "features.py").write_text(DOUBLE.replace("2)", "float(rows.num_rows))"))
    with pytest.raises(UserError, match=r"found another 'twice' alone\. Compute"):
        built(mine(folder, "data.columns.size.sensitive=true"))


def test_an_error_of_a_function_names_its_line(folder: Path) -> None:
    (folder / "conf" / "features.py").write_text(DOUBLE.replace('rows["size"]', 'rows["length"]'))
    with pytest.raises(UserError, match=r"function 'double' raised KeyError in <features.py \w{12}>, line 6"):
        built(mine(folder))


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import sys\n\nsys.exit(3)\n" + DOUBLE, r"features\.py must run when it is imported: SystemExit: 3"),
        (DOUBLE + "\n\ndel double\n", r"features\.py must define 'double' when it has run, but has deleted it"),
        ("def double(rows):\n    raise SystemExit(3)\n", r"function 'double' raised SystemExit"),
    ],
)
def test_a_file_that_ends_the_process_or_deletes_the_function_is_named(folder: Path, code: str, found: str) -> None:
    (folder / "conf" / "features.py").write_text(code)
    with pytest.raises(UserError, match=found):
        built(mine(folder))


# ------------------------------------------------------------------------------------------------------ slow functions


def test_rows_that_are_done_are_kept_whatever_the_batches(counted: Path) -> None:
    table = built(mine(counted, *SLOW))
    distinct = len(set(everything(table)["size"].to_pylist()))
    assert is_double(table) and rows_called(counted) == distinct < 400
    again = built(
        mine(counted, *SLOW, f"paths.runs={counted / 'other'}", "features.views.mine.batch_rows=7", "name=other")
    )
    assert again.views["mine"].directory == table.views["mine"].directory and not (counted / "calls").exists()
    late = visits(100, seed=1)
    late = late.set_column(0, "visit", pc.add(late["visit"], 10_000))
    pq.write_table(late, counted / "visits-1.parquet")  # among the others in time: their month is computed anew
    grown = built(mine(counted, *SLOW, "features.views.mine.batch_rows=7"))
    new = set(late["size"].to_pylist()) - set(everything(table)["size"].to_pylist())
    assert grown.dataset.rows == 500 and is_double(grown) and rows_called(counted) == len(new)


def test_a_call_that_fails_is_tried_again_and_the_rest_is_kept(counted: Path) -> None:
    limit(counted, 1.5)
    with pytest.raises(
        UserError, match=r"rows failed in 3 tries; .*failed/mine-0+\.parquet lists them\. .*busy.*kept"
    ) as caught:
        built(mine(counted, *SLOW))
    path = Path(str(caught.value).split("tries; ")[1].split(" lists")[0])
    lost = pq.read_table(path)
    assert pc.max(lost["inputs.size"]).as_py() > 1.5 and set(lost["error"].to_pylist()) == {lost["error"][0].as_py()}
    tries = (path.parent / "mine.jsonl").read_text()
    assert tries.count('"try": 1') == tries.count('"try": 3') > 0
    (counted / "calls").unlink()
    limit(counted, 1e300)
    assert is_double(built(mine(counted, *SLOW))) and rows_called(counted) <= lost.num_rows


def test_rows_that_failed_are_null_where_told_and_computed_by_the_next_features(counted: Path) -> None:
    limit(counted, sorted(visits(400)["size"].drop_null().to_pylist())[-2])  # one row is above it, and its batch fails
    table = built(mine(counted, *SLOW, "features.views.mine.on_error=null"))
    found, size = everything(table)["mine_twice"], everything(table)["size"]
    failed = table.views["mine"].manifest["failed_rows"]
    with pytest.raises(UserError, match=r"rows failed in 3 tries"):
        built(mine(counted, *SLOW))  # the nulls are not taken where an error is asked for
    assert 64 <= failed < 80 and size.null_count < found.null_count <= size.null_count + failed
    limit(counted, 1e300)
    same = built(mine(counted, *SLOW, "features.views.mine.on_error=null"))
    assert same.views["mine"].manifest["failed_rows"] == failed
    config = mine(counted, *SLOW, "features.views.mine.on_error=null")
    run = Run.create("features", config, {})
    whole = ensure_table(config, run, ensure_dataset(config, run), anew=True)
    run.finish({})
    assert is_double(whole) and "failed_rows" not in whole.views["mine"].manifest


def test_a_model_trained_with_rows_that_failed_passes_its_gate(counted: Path) -> None:
    early = visits(400).sort_by("at").slice(0, 64)["size"]  # the first batch, which is trained on
    limit(counted, pc.max(early).as_py() - 1e-9)
    words = overrides(counted, "plugins=[features.py]", VIEW, *SLOW, "train.epochs=1", "evaluate.bootstrap=0")
    conf = str(counted / "conf")
    trained = engine.run("train", *words, "features.views.mine.on_error=null", config_dir=conf)
    limit(counted, 1e300)
    failed = pq.read_table(next((trained.directory / "failed").glob("mine-*.parquet")))["row_id"].to_pylist()
    gate = [
        str(visit)
        for visit in pq.read_table(trained.directory / "model" / "gate" / "rows.parquet")["visit"].to_pylist()
    ]
    assert len(failed) >= 64 and len(gate) > 50 and not set(failed) & set(gate)
    period = "score.between=[2020-01-26,2020-01-31]"
    assert engine.run("score", f"score.model={trained.directory}", period, *words[1:4]).metrics[
        "score/gate_rows"
    ] == len(gate)


def test_a_kept_file_that_is_damaged_is_as_good_as_none_and_gc_removes_earlier_versions(
    counted: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = built(mine(counted, *SLOW))
    rows_called(counted)
    kept = sorted((counted / "store" / "features" / ".kept" / "mine").glob("*/*.parquet"))
    damaged = bytearray(kept[0].read_bytes())
    damaged[len(damaged) // 3] ^= 1
    kept[0].write_bytes(damaged)
    kept[1].write_bytes(b"PAR1")
    shutil.rmtree(first.views["mine"].directory)
    again = built(mine(counted, *SLOW))
    assert again.views["mine"].digest == first.views["mine"].digest and rows_called(counted) == 2 * 64
    (counted / "conf" / "features.py").write_text(COUNTED.format(folder=str(counted)) + "\n# edited\n")
    built(mine(counted, *SLOW))
    monkeypatch.setattr("engine.features.catalog.KEEP_RECENT", -1)
    words = [*overrides(counted)[2:4], "--json"]
    found = [row["version"] for row in json.loads(cli("features", "gc", *words).out) if row["view"] == "mine"]
    assert f".kept/{kept[0].parent.name}" in found and sum(name.startswith(".kept") for name in found) == 1
    assert cli("features", "gc", "--delete", *words).code == 0 and not kept[0].parent.exists()


def test_a_killed_run_goes_on_where_it_was_with_the_bytes_of_a_whole_one(counted: Path) -> None:
    words = [
        "features", "+experiment=tiny", f"data.path={counted}", f"paths.store={counted / 'store'}",
        f"paths.runs={counted / 'runs'}", "resources.threads=1", "plugins=[features.py]", VIEW, *SLOW,
        "--config-dir", str(counted / "conf"),
    ]  # fmt: skip
    (counted / "kill").write_text("8")  # in the fourth batch
    done = subprocess.run([sys.executable, "-m", "engine", *words], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (counted / "kill").unlink()
    assert rows_called(counted) == 4 * 64
    table = built(mine(counted, *SLOW))
    distinct = len(set(everything(table)["size"].to_pylist()))
    assert is_double(table) and rows_called(counted) == distinct - 3 * 64
    whole = built(mine(counted, f"paths.store={counted / 'fresh'}"))
    assert whole.views["mine"].digest == table.views["mine"].digest


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.one_of(st.none(), st.floats(), st.sampled_from([0.0, -0.0, 1.5])), max_size=30),
    size=st.integers(1, 7),
    order=st.randoms(use_true_random=False),
)
def test_batches_give_the_bytes_of_one_call(
    values: list[float | None], size: int, order: object, tmp_path_factory: pytest.TempPathFactory
) -> None:
    spec = {"kind": "function", "function": "f", "inputs": ["x"], "outputs": {"y": "float64", "z": "string"}}
    view = schema.build(ViewConfig, {**spec, "batch_rows": size})
    rows = pa.table({"x": pa.array(values, pa.float64())})
    order.shuffle(values)  # type: ignore[attr-defined]
    turned = pa.table({"x": pa.array(values, pa.float64())})
    keep = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functions, "_function", lambda _: _signed)
        expected = functions.call("f", rows, view.outputs, "v")
        calls.in_batches(view, turned, "v", (), keep)
        patch.setattr(functions, "_function", lambda _: pytest.fail("every row was kept"))
        found, failures = calls.in_batches(view, rows, "v", (), keep)
    assert not failures and found.to_pydict().keys() == expected.to_pydict().keys()
    for name in found.column_names:
        assert repr(found[name].to_pylist()) == repr(expected[name].to_pylist())


def _signed(rows: pa.Table) -> pa.Table:
    values = rows["x"].to_pylist()
    return pa.table({
        "y": pa.array([None if value is None else -value for value in values], pa.float64()),
        "z": pa.array([str(value) for value in values]),
    })  # fmt: skip
