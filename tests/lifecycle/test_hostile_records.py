"""Every JSON file that the engine reads, changed in any place: a sentence or a skip, never a traceback, and bounded memory."""

from __future__ import annotations

import contextlib
import json
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import engine
from engine import __main__ as shell
from engine.data import show, stage
from engine.data.dataset import newest_dataset, open_dataset
from engine.data.profile import ProfileRecord
from engine.errors import UserError
from engine.features import profile as features_profile
from engine.features.encode import Encoder
from engine.features.partitions import InputsRecord
from engine.features.profile import Profile, ProfileSpec
from engine.features.store import open_view
from engine.lifecycle import chain, decide, lineage
from engine.lifecycle import registry as registry_words
from engine.lifecycle.observations import observation
from engine.lifecycle.retrain_rules import Facts
from engine.monitoring import alerts, history
from engine.monitoring.drift_record import DriftRecord
from engine.monitoring.reference import read_reference
from engine.runtime import records, tracking, tracking_wandb
from engine.runtime import seal as seals
from engine.runtime.registry import Registry
from engine.scoring import output, units
from engine.scoring.predictor import load
from engine.training import bundle
from engine.training.checkpoint import newest_whole
from engine.training.gate import check_gate
from engine.training.loop import State
from engine.training.model import from_architecture
from tests import tiny
from tests.lifecycle.test_damaged_runs import places, put
from tests.lifecycle.test_retrain import RETRAIN
from tests.runtime.test_records import json_values

MOST_MEMORY = 3 * 2**30  # of addresses, beyond what the process holds when a test begins


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, store, a champion, its scores, a monitored window and a decision to retrain."""
    folder = tiny.write_tiny(tmp_path_factory.mktemp("world"), rows=3000)

    def run(command: str, *words: str) -> Path:
        found = engine.run(command, *tiny.overrides(folder, *words), config_dir=str(folder / "conf"))
        return found.directory

    model = run("train", "split.train=[2020-01-01,2020-01-06]", "split.valid=[2020-01-06,2020-01-09]", "split.test=[]")
    assert shell.main(["registry", "promote", "tiny", str(model), f"paths.runs={folder / 'runs'}"]) == 0
    run("score", f"score.model={model}", "score.between=[2020-01-26,2020-01-31]")
    run("monitor", f"monitor.model={model}", "monitor.window=[2020-01-26,2020-01-31]")
    run("retrain", *RETRAIN)
    return folder


@dataclass(frozen=True)
class Reader:
    """What reads a record: its file below the folder, and a call that reads it."""

    file: str
    read: Callable[[Path], Any]  # of the file
    seal: Callable[[Path], Any] = lambda _: None  # what an attacker would compute again
    examples: int = 80


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


def reseal_folder(file: Path) -> None:
    """Seal the folder of a store's entry again."""
    seals.write(file.parent)


def check_again(file: Path) -> None:
    """Write the digest of the rest into a record that checks itself."""
    record = json.loads(file.read_text())
    if isinstance(record, dict):
        body = {name: value for name, value in record.items() if name != "check"}
        with contextlib.suppress(ValueError):  # of infinity there is no digest
            file.write_text(json.dumps(seals.checked(body)))


def reads_dataset(file: Path) -> None:
    """All that commands read of a dataset."""
    dataset = open_dataset(file.parent)
    show.page(dataset, records.read(dataset.path("profile.json"), ProfileRecord))
    assert dataset.schema and dataset.parts is not None
    for name in dataset.tables:
        dataset.table(name)
    dataset.row_range(tiny.START, tiny.START + tiny.H)


def reads_beside(file: Path) -> None:
    """The dataset whose profile or seal this is."""
    reads_dataset(file.with_name("manifest.json"))


def reads_view(file: Path) -> None:
    """A stored view: one that is damaged is as if it were not there."""
    stored = open_view("shop", file.parent)
    if stored is not None:
        stored.read(rows=(0, 10))


def reads_registry(file: Path) -> None:
    """Moves and versions."""
    registry = Registry(next(folder for folder in file.parents if folder.name == "registry"), "tiny")
    state = registry.state()
    for version in registry.versions():
        registry.verify(version)
    registry_words._model_row(registry)
    for version in registry.versions():
        registry_words._version_row(registry, version)
    for move in state.moves:
        registry_words._move_row(move)


def reads_drift(file: Path) -> None:
    """What retraining, reproduction, lineage and tracking read of a monitoring run."""
    observation(records.read(file, DriftRecord), "roc_auc", "UTC")
    chain._drift_by_column(file.parent)
    lineage._thresholds(file.parent)
    list(tracking_wandb._rows_of("drift", records.read(file, tracking_wandb.Drifted)))


def reads_evaluation(file: Path) -> None:
    """What tracking reads of an evaluation."""
    list(tracking_wandb._rows_of("evaluation", records.read(file, dict[str, tracking_wandb.Sliced])))


def reads_scores(file: Path) -> None:
    """The profile of a scoring run, as monitoring reads it."""
    model = next(iter(sorted(file.parents[3].glob("train/tiny/*/model"))))
    spec = ProfileSpec.read(model / "profile_spec.json", Encoder.read(model / "features.json"))
    Profile.from_json(records.read(file, features_profile.ProfileRecord), spec)


def reads_unit(file: Path) -> None:
    """A unit's record, as publishing merges it."""
    record, _ = units.read_whole(file)
    model = next(iter(sorted(file.parents[4].glob("train/tiny/*/model"))))
    spec = ProfileSpec.read(model / "profile_spec.json", Encoder.read(model / "features.json"))
    if record is not None and record["profile"] is not None:
        Profile.from_json(record["profile"], spec)


def reads_predictions(file: Path) -> None:
    """The rows that a manifest names."""
    output.read_predictions(output.place_of(None, file.parent.parent))


def reads_checkpoint(file: Path) -> None:
    """A checkpoint, as a resumed run reads it."""
    found, _ = newest_whole(file.parent.parent)
    if found is not None:
        records.filled(State, [found.manifest.get("state", {})], "state")
        if "architecture" in found.manifest:
            from_architecture(found.manifest["architecture"], found.tensors["weights"].numel())


BUNDLE = "runs/train/tiny/*/model"
READERS: dict[str, Reader] = {
    **{
        name: Reader(f"{BUNDLE}/{name}", reads_bundle, reseal, 25)
        for name in (
            "model.json",
            "spec.json",
            "features.json",
            "schema.json",
            "profile_spec.json",
            "reference.json",
            "gate/state.json",
        )
    },
    "bundle.json": Reader(f"{BUNDLE}/bundle.json", reads_bundle, examples=25),
}
READERS |= {
    "dataset": Reader("store/datasets/tiny/*/manifest.json", reads_dataset, reseal_folder),
    "dataset profile": Reader("store/datasets/tiny/*/profile.json", reads_beside, reseal_folder),
    "latest": Reader("store/datasets/tiny/latest.json", lambda file: newest_dataset(file.parent), check_again),
    "staged": Reader("store/datasets/tiny/.staged/*.json", stage.damaged, check_again),
    "view": Reader("store/features/shop/*/manifest.json", reads_view, reseal_folder),
    "inputs": Reader("store/features/.inputs/*.json", lambda file: seals.read_checked(file, InputsRecord), check_again),
    "seal": Reader("store/datasets/tiny/*/seal.json", reads_beside, check_again),
    "version": Reader("runs/registry/tiny/versions/*/version.json", reads_registry, check_again),
    "move": Reader("runs/registry/tiny/moves/000002.json", reads_registry, check_again),
    "drift": Reader("runs/monitor/tiny/*/drift.json", reads_drift),
    "evaluation": Reader("runs/train/tiny/*/evaluation.json", reads_evaluation),
    "decision": Reader("runs/retrain/tiny/*/decision.json", decide.replay, reseal_folder, 25),
    "facts": Reader("runs/retrain/tiny/*/facts.json", lambda file: Facts.from_plain(records.read(file, dict), "facts")),
    "profile of scores": Reader("runs/score/tiny/*/profile.json", reads_scores),
    "unit": Reader("runs/score/tiny/*/parts/*.json", reads_unit, check_again),
    "context": Reader("runs/score/tiny/*/context.json", lambda file: units.check_context(file.parent, {})),
    "predictions": Reader("runs/score/tiny/*/predictions/_manifest.json", reads_predictions, check_again),
    "checkpoint": Reader("runs/train/tiny/*/checkpoints/*/manifest.json", reads_checkpoint, check_again),
    "reached step": Reader(
        "runs/train/tiny/*/checkpoints/*/manifest.json", lambda file: tracking.covered_step(file.parents[2])
    ),
}


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
    with contextlib.suppress(UserError):  # a context is refused: it is that of another command
        reader.read(file)


@pytest.mark.parametrize("name", READERS)
def test_a_record_changed_in_any_place_is_read_or_named(world: Path, name: str) -> None:
    survives(world, READERS[name], READERS[name].examples)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_a_record_changed_a_thousand_times_is_read_or_named(world: Path, name: str) -> None:
    survives(world, READERS[name], 1000)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("architecture", "settings", "hidden"), [2**20, 2**20, 10], "must describe the tensors of model.safetensors"),
        (("architecture", "settings", "hidden"), [10**13], r"hidden\[0\] must be a number from 1 to 1,048,576"),
        (("architecture", "settings", "hidden"), [1] * 10**5, "at most 65,536 tensors, found 200,0"),
        (("architecture", "cardinalities"), [2**31, 27], "cardinalities must be that of features.json"),
        (("architecture", "kind"), "forest", "model.kind must be one of mlp, linear, .*a class of a file.*found 'forest'"),
        (("architecture", "settings"), {}, "settings must have 'hidden', found nothing"),
        (("tile_rows",), 10**10, "tile_rows must be a number from 1 to 1,048,576, found 10000000000"),
        (("tile_rows",), 0, "tile_rows must be a number from 1"),
        (("classes",), ["a", "b", "c"], "classes must be two for loss binary, found 3"),
        (("loss",), "quantum", "loss must be one of binary"),
        (("format",), 9, "format must be 1, which is what this engine reads, found 9: use a newer engine"),
    ],
)  # fmt: skip
def test_a_model_beyond_its_weights_or_memory_is_refused_before_memory_is_taken(
    world: Path, place: tuple[str, ...], value: Any, said: str
) -> None:
    refused(next(iter(sorted(world.glob(f"{BUNDLE}/model.json")))), place, value, said)


def refused(file: Path, place: tuple[str, ...], value: Any, said: str) -> None:
    """A bundle whose file has another value at one place, sealed again, is refused in these words."""
    kept = file.read_bytes(), (file.parent / bundle.MANIFEST).read_bytes()
    file.write_text(json.dumps(put(json.loads(file.read_text()), place, value)))
    try:
        with bounded(), pytest.raises(UserError, match=said):
            reseal(file)
            reads_bundle(file)
    finally:
        file.write_bytes(kept[0])
        (file.parent / bundle.MANIFEST).write_bytes(kept[1])


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("data", "columns"), {}, "data.columns must have the columns of the model, found none"),
        (("data", "columns", "amount", "known_at"), None, "'amount' must say when it becomes known"),
        (("features", "views", "shop", "entity"), ["till"], "spec.json: features.views.shop.entity names 'till'"),
        (("features", "views", "shop", "aggregates", "rows"), [], "aggregates.rows must name at least one aggregate"),
        (("features", "as_of"), "noon - 1h", "spec.json: features.as_of names 'noon'"),
    ],
)
def test_a_specification_that_no_experiment_could_have_is_refused_where_a_bundle_is_opened(
    world: Path, place: tuple[str, ...], value: Any, said: str
) -> None:
    refused(next(iter(sorted(world.glob(f"{BUNDLE}/spec.json")))), place, value, said)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"[]"])
def test_a_torn_history_of_monitoring_is_left_out_with_a_warning(world: Path, content: bytes) -> None:
    done = next(iter(sorted(world.glob("runs/monitor/tiny/*/DONE"))))
    file = done.parent.joinpath(*history.FILE)
    kept, warned = file.read_bytes(), list[str]()
    file.write_bytes(content)
    later = SimpleNamespace(directory=done.parent.with_name("29990101T000000-zzzzzzz"), warn=warned.append)
    try:
        assert history.earlier_rows(later, "m") == []
    finally:
        file.write_bytes(kept)
    assert len(warned) == 1 and "left out" in warned[0] and str(file) in warned[0]


@pytest.mark.parametrize("text", ["[]", "{", "null", '{"x": "soon"}', "[" * 100_000])
def test_a_torn_memory_of_alerts_is_an_empty_one(tmp_path: Path, text: str) -> None:
    (tmp_path / "alerts.json").write_text(text)
    assert alerts._read(tmp_path / "alerts.json") == {}
