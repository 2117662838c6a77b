"""No byte of the store or of a run changes without a word: `verify` names each file, and what decides something is refused."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from engine import __main__ as shell
from engine.lifecycle.verify import problems
from engine.runtime import registry, seal
from engine.runtime.run import UNSEALED
from engine.training.bundle import MANIFEST
from tests.whole import Place, make_place

OBSERVERS = ("run.log", ".lock", "DONE")  # nothing is decided by what is in them
LOOSE = (".staged", ".inputs", "parts", "code", "places", "tiny")  # folders of records that check themselves
STRIDE = int(
    os.environ.get("ENGINE_FLIP_STRIDE", "0")
)  # 7 flips one byte in seven of every file; 0 flips a seeded sample


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Place:
    return make_place(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def place(whole, tmp_path, capfd) -> Place:
    """A copy of one's own."""
    copied = Place(tmp_path / "copy")
    shutil.copytree(whole.folder, copied.folder)
    return copied


def files(root: Path) -> list[Path]:
    """Every file that something may be decided by."""
    return [
        path for path in sorted([*(root / "store").rglob("*"), *(root / "runs").rglob("*")])
        if path.is_file() and path.name not in OBSERVERS
    ]  # fmt: skip


@contextlib.contextmanager
def flipped(path: Path, at: int) -> Iterator[None]:
    """The file with one bit of one byte turned, each bit in turn."""
    content = path.read_bytes()
    path.write_bytes(content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :])
    try:
        yield
    finally:
        path.write_bytes(content)


def scope(path: Path) -> Path:
    """The folder that verify is given, so that a trial of many bytes does not look at all the others each time."""
    near = [path.parent, *path.parents]
    if "registry" in path.parts:
        return next(folder.parent for folder in near if folder.name == "registry")
    if path.parent.name in LOOSE or path.parent.name.startswith("step-"):
        return path.parent.parent
    return next(
        (folder for folder in near if (folder / seal.NAME).exists() or (folder / MANIFEST).exists()), path.parent
    )


def named(root: Path, path: Path) -> bool:
    """Whether verify names the file."""
    return any(str(path) in f"{found}: {problem}" or path.parent == Path(found) for found, problem in problems(root))


def test_a_whole_place_has_no_problem_and_every_file_is_looked_at(whole, capfd) -> None:
    assert not list(problems(whole.folder))
    assert shell.main(["verify", str(whole.folder)]) == 0
    assert "every file is what was written" in capfd.readouterr().out
    for folder in sorted((whole.folder / "runs").glob("*/*/*/DONE")):
        sealed = set(seal.read(folder.parent).files)
        there = {path.relative_to(folder.parent).as_posix() for path in folder.parent.rglob("*") if path.is_file()}
        left = {name for name in there - sealed if name.split("/")[0] not in UNSEALED}
        assert left <= {"DONE", seal.NAME, ".lock"}


def places_of(path: Path, rng: random.Random) -> list[int]:
    """Which bytes of a file are flipped: all in strides, or the first, the last and two more."""
    size = path.stat().st_size
    if STRIDE or not size:
        return list(range(0, size, STRIDE or 1))
    return sorted({0, size - 1, *(rng.randrange(size) for _ in range(2))})


def test_one_flipped_byte_anywhere_is_named(place) -> None:
    """All of them: ENGINE_FLIP_STRIDE=7, some ten minutes."""
    rng, flips = random.Random(0), 0
    checked = files(place.folder)
    assert len(checked) > 60
    for path in checked:
        for at in places_of(path, rng):
            flips += 1
            with flipped(path, at):
                assert named(scope(path), path), (path, at)
    sys.stdout.write(f"{len(checked)} files, {flips:,} flips, 0 silent, each named\n")


@pytest.mark.slow
def test_one_byte_in_seven_of_every_record_is_named(place) -> None:
    """Files under a plain SHA-256 need no such trial; records that check themselves do."""
    for path in files(place.folder):
        for at in range(0, path.stat().st_size, 7) if path.suffix == ".json" and path.stat().st_size < 20_000 else ():
            with flipped(path, at):
                assert named(scope(path), path), (path, at)


def part_of(place: Place, pattern: str) -> Path:
    return sorted(place.folder.glob(pattern))[0]


def rewrite(path: Path, column: str, change: Callable[[pa.ChunkedArray], pa.ChunkedArray]) -> None:
    """A Parquet file with other values in a column, as a tool would write it."""
    table = pq.read_table(path, partitioning=None)
    pq.write_table(table.set_column(table.column_names.index(column), column, change(table[column])), path)


def test_inverted_labels_in_a_part_do_not_train_and_the_advice_mends_it(place, capfd) -> None:
    part = part_of(place, "store/datasets/tiny/*/part-*.parquet")
    rewrite(part, "bought", pc.invert)
    shutil.rmtree(place.folder / "store" / "features")  # so that labels and columns are read again
    assert place.engine("train") == 1
    found = capfd.readouterr().err
    assert str(part) in found and "Run `ingest` again" in found
    assert place.engine("ingest") == 0 and place.engine("train") == 0
    assert not list(problems(place.folder / "store"))


def test_other_values_in_a_view_do_not_train_and_the_advice_mends_it(place, capfd) -> None:
    part = part_of(place, "store/features/shop/*/part-*.parquet")
    rewrite(part, "shop_count_6h", lambda column: pc.multiply(column, 3))
    assert place.engine("train") == 1
    found = capfd.readouterr().err
    assert str(part) in found and "run `features` again" in found
    assert place.engine("features") == 0 and place.engine("train") == 0
    assert not list(problems(place.folder / "store"))


def test_a_flipped_byte_in_a_staged_file_is_read_again_from_the_source(place) -> None:
    before = json.loads(part_of(place, "store/datasets/tiny/*/manifest.json").read_text())["digest"]
    rng = random.Random(1)
    for path in sorted(place.folder.glob("store/datasets/tiny/.staged/*")):
        for _ in range(4):
            content = bytearray(path.read_bytes())
            content[rng.randrange(len(content))] ^= 1
            path.write_bytes(content)
            assert place.engine("ingest") == 0
            assert json.loads(part_of(place, "store/datasets/tiny/*/manifest.json").read_text())["digest"] == before


@pytest.mark.parametrize("name", ["profile.json", "predictions/_manifest.json", "predictions/*.parquet"])
def test_monitoring_refuses_a_scoring_run_that_was_changed(place, capfd, name) -> None:
    path = part_of(place, f"runs/score/tiny/*/{name}")
    with flipped(path, path.stat().st_size // 2):
        words = (f"monitor.model={place.newest('train')}", f"monitor.run={place.newest('score')}")
        code = place.engine("monitor", *words)
    found = capfd.readouterr().err
    assert code == 1 and path.name in found and "Traceback" not in found


def test_a_bundle_with_other_weights_and_a_manifest_to_match_is_not_the_model(place, capfd) -> None:
    """Weights of zero, every file digest made good, `check` made good: the model's own digest gives it away."""
    model = place.newest("train") / "model"
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-64:] = bytes(64)
    (model / "model.safetensors").write_bytes(weights)
    manifest = json.loads((model / "bundle.json").read_text())
    manifest["files"]["model.safetensors"] = seal.record_of(model / "model.safetensors")
    body = {name: value for name, value in manifest.items() if name != "check"}
    (model / "bundle.json").write_text(json.dumps(seal.checked(body)))
    assert place.engine("score", f"score.model={model}") == 1
    assert "its digest is not that of its files" in capfd.readouterr().err
    assert shell.main(["registry", "promote", "tiny", str(model.parent), *place.paths]) == 1
    assert "its digest is not that of its files" in capfd.readouterr().err


def test_an_alias_scores_the_registered_files_or_nothing(place, capfd) -> None:
    name = registry.Registry(place.folder / "runs" / "registry", "tiny").versions()[0]
    content = (name.model / "model.safetensors").read_bytes()
    (name.model / "model.safetensors").write_bytes(content[:-4] + b"\0\0\0\1")
    assert place.engine("score", "score.model=tiny@champion") == 1
    assert "model.safetensors is damaged" in capfd.readouterr().err


def test_a_changed_record_of_a_finished_run_is_shown_with_a_warning(place, capfd) -> None:
    run = place.newest("train")
    record = json.loads((run / "run.json").read_text())
    record["chain"]["weights"] = "0" * 64
    (run / "run.json").write_text(json.dumps(record))
    assert shell.main(["lineage", str(run), f"paths.runs={place.folder / 'runs'}"]) == 0
    assert f"{run / 'run.json'} is damaged" in capfd.readouterr().err


def test_what_older_engines_wrote_is_said_to_be_unsealed_and_is_made_again(place, capfd) -> None:
    for path in (place.folder / "store").rglob(seal.NAME):
        path.unlink()
    code = shell.main(["verify", str(place.folder / "store"), "--json"])
    found = json.loads(capfd.readouterr().out)
    assert code == 2 and all("older engine" in item["problem"] for item in found) and len(found) == 2
    assert place.engine("train") == 0
    assert not list(problems(place.folder / "store"))
