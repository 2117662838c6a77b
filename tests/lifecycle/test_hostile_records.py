"""Every JSON file that the engine reads, changed in any place: a sentence or a skip, never a traceback, and bounded memory."""

from __future__ import annotations

import contextlib
import json
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import engine
from engine.errors import UserError
from engine.monitoring.reference import read_reference
from engine.scoring.predictor import load
from engine.training import bundle
from engine.training.gate import check_gate
from tests import tiny
from tests.lifecycle.test_damaged_runs import places, put
from tests.runtime.test_records import json_values

MOST_MEMORY = 3 * 2**30  # of addresses, beyond what the process holds when a test begins


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, store and a trained model."""
    folder = tiny.write_tiny(tmp_path_factory.mktemp("world"), rows=1500)
    engine.run("train", *tiny.overrides(folder, "train.epochs=1"), config_dir=str(folder / "conf"))
    return folder


@dataclass(frozen=True)
class Reader:
    """What reads a record: its file below the folder, and a call that reads it."""

    file: str
    read: Callable[[Path], Any]  # of the file
    seal: Callable[[Path], Any] = lambda _: None  # what an attacker would compute again


def model_of(file: Path) -> Path:
    """The bundle's folder above a file."""
    return next(folder for folder in file.parents if folder.name == "model")


def reads_bundle(file: Path) -> None:
    """All that scoring and monitoring read of a bundle."""
    predictor = load(model_of(file))
    check_gate(predictor.bundle, predictor.model)
    read_reference(model_of(file), predictor.bundle.encoder)


def reseal(file: Path) -> None:
    """Seal the bundle again."""
    bundle.seal(model_of(file))


BUNDLE = "runs/train/tiny/*/model"
READERS = {
    **{
        name: Reader(f"{BUNDLE}/{name}", reads_bundle, reseal)
        for name in (
            "model.json", "spec.json", "features.json", "schema.json", "profile_spec.json", "reference.json", "gate/state.json",
        )
    },
    "bundle.json": Reader(f"{BUNDLE}/bundle.json", reads_bundle),
}  # fmt: skip


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """At most MOST_MEMORY more addresses than now: what asks for more gets a MemoryError, which no reader catches."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + MOST_MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


odd = st.sampled_from(
    [0, -1, 1, 2, 2**31, 10**10, 2**62, 10**30, 1e308, 0.5, "", "../x", [], {}, None, [[]], {"format": 9}, [0] * 3]
)


@st.composite
def changes(draw: st.DrawFn, record: Any) -> Any:
    """The record with another value at one place, or one key or item less, or one item twice."""
    path = draw(st.sampled_from(places(record)))
    inner = record
    for key in path:
        inner = inner[key]
    kind = draw(st.sampled_from(["value", "odd", "less", "twice"]))
    if kind == "less" and isinstance(inner, (dict, list)) and inner:
        key = draw(st.sampled_from(list(inner) if isinstance(inner, dict) else range(len(inner))))
        items = (
            {k: v for k, v in inner.items() if k != key} if isinstance(inner, dict) else inner[:key] + inner[key + 1 :]
        )
        return put(record, path, items)
    if kind == "twice" and isinstance(inner, list) and inner:
        return put(record, path, [*inner, inner[0]])
    return put(record, path, draw(odd if kind == "odd" else json_values))


def survives(world: Path, reader: Reader, examples: int) -> None:
    """`examples` changes of the record: each is read, or is a UserError that names it."""
    file = next(iter(sorted(world.glob(reader.file))))
    text = file.read_text()
    record = json.loads(text)

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck), database=None)
    @given(changed=changes(record))
    def each(changed: Any) -> None:
        file.write_text(json.dumps(changed))
        with contextlib.suppress(UserError):
            reader.seal(file)
            reader.read(file)

    kept = {path: path.read_bytes() for path in file.parent.iterdir() if path.is_file()}
    kept |= {path: path.read_bytes() for path in file.parent.parent.glob(bundle.MANIFEST)}
    try:
        with bounded():
            each()
    finally:
        for path, content in kept.items():
            path.write_bytes(content)
    reader.read(file)


@pytest.mark.parametrize("name", READERS)
def test_a_record_changed_in_any_place_is_read_or_named(world: Path, name: str) -> None:
    survives(world, READERS[name], 40)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_a_record_changed_a_thousand_times_is_read_or_named(world: Path, name: str) -> None:
    survives(world, READERS[name], 1000)
