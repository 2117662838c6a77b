"""Features: how much faster than a feature store's retrieval, than Polars and DuckDB, and does an append cost its share?

history_join   weather as of 5,000 flights' decisions (9 columns, at most 6 h old); peer `feast`: get_historical_features
               over the same Parquet with a ttl of 6 h, in a separate environment
windows_spec   the windows of the whole flights specification: 6 entities, 4 windows, 7 aggregates; peers `polars`
               (rolling(group_by)) and `duckdb` (range windows) compute the same numbers of outputs by event time only,
               which is less: they ignore when a value became known
append_day     features of the last day appended to the rest of the year; `share` is the day's share of the full build, by
               rows; the note has a day of March that comes late
partitioned    one view (4 windows) over 100 M rows, 8 GB of memory allowed: rows/s; the note has peak memory and disk
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import peers
from benchmarks.harness import Row, Settings, clock, compare, show
from engine.config.compose import compose
from engine.config.tree import Config
from engine.data.dataset import PART_ROWS, ROW_GROUP, Dataset, open_dataset
from engine.data.make_dataset import ensure_dataset
from engine.features import retrieval
from engine.features.compute import view_features
from engine.features.instants import moment_times
from engine.features.kept_reads import KeptReads
from engine.features.spec import view_inputs
from engine.features.store import KEPT_SHARE
from engine.features.table import ensure_table
from engine.runtime import digest, seal, storage
from engine.runtime.run import Run

PROBES = 5_000
LARGE_ROWS = 100_000_000
LARGE_MEMORY = "8GB"
HOUR = 3_600_000_000
AGGREGATES = {"dep_delay": ("mean", "std", "max"), "arr_delay": ("mean",), "late": ("mean",)}
FEAST = """
import json, sys, time, pathlib, warnings
warnings.simplefilter("ignore")
import pandas as pd
from datetime import timedelta
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig
from feast.types import Float64
a = json.loads(sys.argv[1])
folder = pathlib.Path(a["folder"])
store = FeatureStore(config=RepoConfig(project="bench", provider="local", registry=str(folder / "registry.db"),
    offline_store={"type": "file"}, online_store={"type": "sqlite", "path": str(folder / "online.db")},
    entity_key_serialization_version=3))
origin = Entity(name="origin", join_keys=["origin"])
source = FileSource(path=a["weather"], timestamp_field="observed")
view = FeatureView(name="weather", entities=[origin], ttl=timedelta(hours=6), source=source,
    schema=[Field(name=name, dtype=Float64) for name in a["columns"]])
store.apply([origin, view])
probes = pd.read_parquet(a["probes"])
def once():
    return store.get_historical_features(probes, [f"weather:{name}" for name in a["columns"]]).to_df()
found = once()
print(int(found[a["columns"][0]].notna().sum()), file=sys.stderr)
times = []
for _ in range(a["repeats"]):
    start = time.perf_counter(); once(); times.append(time.perf_counter() - start)
print(sorted(times)[len(times) // 2])
"""


def run(settings: Settings, limit: float) -> list[Row]:
    folder = Path(tempfile.mkdtemp(prefix="bench-features-"))
    try:
        place = Place(folder, settings)
        works = {
            "history_join": _history,
            "windows_spec": _windows,
            "append_day": _append_day,
            "partitioned": _partitioned,
        }
        return [row for name, work in works.items() if settings.wanted(name) for row in work(place, settings, limit)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Place:
    """A folder with a store, and the flights in it."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self.settings = folder, settings

    def config(self, *words: str) -> Config:
        paths = [f"paths.store={self.folder / 'store'}", f"paths.runs={self.folder / 'runs'}"]
        return compose(["+experiment=flights", *paths, f"resources.threads={self.settings.threads}", *words]).config

    def with_run(self, config: Config, work: Callable[[Run], Any]) -> Any:
        opened = Run.create("features", config, {})
        try:
            return work(opened)
        finally:
            opened.finish({})

    def dataset(self, config: Config) -> Dataset:
        found: Dataset = self.with_run(config, lambda opened: ensure_dataset(config, opened))
        return found


# ---------------------------------------------------------------------------------------------------- history_join


def _history(place: Place, settings: Settings, limit: float) -> list[Row]:
    config = place.config()
    dataset = place.dataset(config)
    rows = np.sort(np.random.default_rng(0).choice(dataset.rows, settings.rows(PROBES), replace=False))
    events = dataset.read(["origin", "scheduled"])
    events = events.take(pa.array(rows))
    times = pa.array(moment_times(events, "scheduled - 1h"), pa.timestamp("us", tz="UTC"))
    probes = pa.table({"origin": events["origin"], "event_timestamp": times})
    columns = list(config.features.views["weather"].columns)
    pq.write_table(probes, place.folder / "probes.parquet")
    pq.write_table(dataset.table("weather"), place.folder / "weather.parquet")
    theirs = peers.timed(
        "feast",
        FEAST,
        {
            "folder": str(place.folder),
            "weather": str(place.folder / "weather.parquet"),
            "probes": str(place.folder / "probes.parquet"),
            "columns": columns,
            "repeats": min(settings.repeats, 3),
        },
    )

    def ours() -> pa.Table:
        return retrieval.history(probes, ["weather"], config=config, dataset=dataset, time="event_timestamp")

    amount = (probes.num_rows, probes.num_rows, "rows/s")
    return compare(
        "features", "history_join", amount, ours, {"feast": (theirs, 50.0)}, settings, (8.0 * len(columns), limit)
    )


# ----------------------------------------------------------------------------------------------------- windows_spec


def _windows(place: Place, settings: Settings, limit: float) -> list[Row]:
    config = place.config("features.direct={}")
    config = _only(config, lambda view: view.kind == "windows")
    dataset = place.dataset(config)
    views = config.features.views
    outputs = sum(
        len(view.windows) * sum(len(asked.aggregates) for asked in view.asked.values()) for view in views.values()
    )
    events = dataset.read(list(dict.fromkeys(["scheduled", "carrier", "origin", "dest", "flight", *AGGREGATES])))

    def ours() -> None:
        kept = KeptReads(dataset.directory, dataset.manifest, dataset.seal, config.resources.memory.bytes // KEPT_SHARE)
        for name, view in views.items():
            rows = kept.read(view_inputs(view, config.data, config.features.decision.column))
            view_features(name, view, config.data, config.features, rows, rows, {}, settings.threads)

    found = {
        "polars": (lambda: _polars(events, views), 3.0),
        "duckdb": (lambda: _duckdb(events, views, settings.threads), 3.0),
    }
    amount = (dataset.rows, dataset.rows, "rows/s")
    return compare("features", "windows_spec", amount, ours, found, settings, (8.0 * outputs, limit))


def _only(config: Config, keep: Callable[[Any], bool]) -> Config:
    views = {name: view for name, view in config.features.views.items() if keep(view)}
    return dataclasses.replace(
        config, features=dataclasses.replace(config.features, views=views, direct={}, calendar={})
    )


def _polars(events: pa.Table, views: dict[str, Any]) -> None:
    import polars

    frame = polars.from_arrow(events).with_columns(polars.col("late").cast(polars.Float64)).sort("scheduled")
    asked = {
        "mean": lambda column: polars.col(column).mean(),
        "std": lambda column: polars.col(column).std(),
        "max": lambda column: polars.col(column).max(),
    }
    for view in views.values():
        for window in view.windows:
            outputs = [polars.len().alias("rows"), polars.col("scheduled").last().alias("last")]
            outputs += [asked[name](c).alias(f"{c}_{name}") for c, names in AGGREGATES.items() for name in names]
            frame.rolling("scheduled", period=window, group_by=list(view.entity), closed="left").agg(*outputs)


def _duckdb(events: pa.Table, views: dict[str, Any], threads: int) -> None:
    import duckdb

    functions = {"mean": "avg", "std": "stddev_samp", "max": "max"}
    with duckdb.connect(config={"threads": threads}) as connection:
        connection.register("arrow_events", events)
        connection.execute("CREATE TABLE events AS SELECT * REPLACE (late::DOUBLE AS late) FROM arrow_events")
        for view in views.values():
            for window in view.windows:
                length = f"{window[:-1]} {'hours' if window[-1] == 'h' else 'days'}"
                frame = f"PARTITION BY {', '.join(view.entity)} ORDER BY scheduled RANGE BETWEEN INTERVAL {length} PRECEDING "
                frame += "AND INTERVAL 1 microsecond PRECEDING"
                outputs = ["count(*) OVER w", "max(scheduled) OVER w"]
                outputs += [f"{functions[name]}({c}) OVER w" for c, names in AGGREGATES.items() for name in names]
                named = ", ".join(f"{sql} AS c{index}" for index, sql in enumerate(outputs))
                connection.execute(
                    f"CREATE OR REPLACE TEMP TABLE found AS SELECT {named} FROM events WINDOW w AS ({frame})"
                )


# ------------------------------------------------------------------------------------------------------ append_day


def _append_day(place: Place, settings: Settings, _limit: float) -> list[Row]:
    """The last day appended to a store that holds the others, and a day of March that comes late; views of all kinds."""
    config = place.config()
    dataset = place.dataset(config)
    last, march = (_rows_of_day(dataset, *day) for day in ((12, 31), (3, 15)))
    seconds: dict[str, list[float]] = {"full": [], "day": [], "late": []}
    days, cpu = {}, {}
    for turn in range(min(settings.repeats, 3)):
        for work, gone in (("full", None), ("day", (last[0], dataset.rows)), ("late", march)):
            store = place.folder / f"{work}-{turn}"
            there = dataclasses.replace(config, paths=dataclasses.replace(config.paths, store=str(store)))
            if gone is not None:
                before = _without(dataset, gone, place.folder / "before")
                place.with_run(there, lambda opened, c=there, d=before: ensure_table(c, opened, d))

            def build(opened: Run, c: Config = there) -> float:
                start, worked = time.perf_counter(), time.process_time()
                table = ensure_table(c, opened, dataset)
                cpu[work] = min(cpu.get(work, float("inf")), time.process_time() - worked)  # noqa: B023
                days[work] = max(view.manifest["days_computed"] for view in table.views.values())  # noqa: B023
                return time.perf_counter() - start

            seconds[work].append(place.with_run(there, build))
            shutil.rmtree(store)
    full, day, late = (float(np.median(seconds[work])) for work in ("full", "day", "late"))
    added = dataset.rows - last[0]
    share = full * added / dataset.rows
    row = Row(
        "features", "append_day", added, added / day, "share", share / day, None, "rows/s", added / share,
        share / (full / 250 + 0.3),
        note=f"{day:.2f} s ({cpu['day']:.2f} of CPU) for the day ({days['day']} UTC days), {full:.2f} ({cpu['full']:.2f}) for "
        f"the year, {late:.2f} ({cpu['late']:.2f}) for a late March 15 ({days['late']} of {days['full']} days)",
    )  # fmt: skip
    show(row)
    return [row]


def _rows_of_day(dataset: Dataset, month: int, day: int) -> tuple[int, int]:
    start = round(datetime.datetime(2013, month, day, tzinfo=datetime.UTC).timestamp() * 1e6)
    return dataset.row_range(start, start + 24 * HOUR)


def _without(dataset: Dataset, gone: tuple[int, int], folder: Path) -> Dataset:
    """The dataset as it was before some of its rows came, in a folder of its own."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(dataset.directory, folder)
    rows = pa.concat_tables([dataset.read(rows=(0, gone[0])), dataset.read(rows=(gone[1], dataset.rows))])
    parts, start = [], 0
    for place, at in enumerate(range(0, rows.num_rows, PART_ROWS)):
        part, file = rows.slice(at, PART_ROWS), f"part-{place:05d}.parquet"
        pq.write_table(part, folder / file, row_group_size=ROW_GROUP)
        times = part[dataset.event_time].cast(pa.int64())
        columns = digest.of_columns(part)
        bounds = {"first_time": times[0].as_py(), "last_time": times[-1].as_py()}
        sizes = {"file": file, "start": start, "rows": part.num_rows, "digest": digest.of_json(columns)}
        parts.append({**sizes, **bounds, "columns": columns})
        start += part.num_rows
    manifest = {**dataset.manifest, "rows": start, "parts": parts, "digest": digest.of_json([gone, dataset.digest])}
    storage.write_json(folder / "manifest.json", manifest)
    seal.write(folder)
    return open_dataset(folder)


# ----------------------------------------------------------------------------------------------------- partitioned


def _partitioned(place: Place, settings: Settings, limit: float) -> list[Row]:
    """Rows made on the spot: visits of 50,000 entities, one of which owns a tenth, over four years."""
    rows = settings.rows(LARGE_ROWS)
    source = place.folder / "large"
    _write_large(source, rows)
    conf = place.folder / "conf"
    _write_conf(conf, source)
    words = ["+experiment=large", f"paths.store={place.folder / 'store'}", f"paths.runs={place.folder / 'runs'}"]
    config = compose(
        [*words, f"resources.memory={LARGE_MEMORY}", f"resources.threads={settings.threads}"], str(conf)
    ).config
    dataset = place.dataset(config)
    timing = clock(
        lambda: place.with_run(config, lambda opened: ensure_table(config, opened, dataset, anew=True)), repeats=0
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    disk = sum(path.stat().st_size for path in (place.folder / "store" / "features").rglob("*") if path.is_file())
    row = Row(
        "features", "partitioned", rows, rows / timing.cold, "none", None, rows * 8.0 * 16 / timing.cold / limit, "rows/s",
        note=f"peak memory {peak / 1e9:.1f} GB of {LARGE_MEMORY} (ingest counted in), features on disk {disk / 1e9:.1f} GB",
    )  # fmt: skip
    show(row)
    return [row]


def _write_large(folder: Path, rows: int) -> None:
    folder.mkdir()
    draw = np.random.default_rng(0)
    start, span = 1_500_000_000_000_000, 4 * 365 * 24 * HOUR
    pieces = max(1, rows // 5_000_000)
    for piece in range(pieces):
        count = rows // pieces
        at = np.sort(start + span // pieces * piece + draw.integers(0, span // pieces, count))
        who = np.where(draw.random(count) < 0.1, 0, draw.integers(0, 50_000, count))
        table = pa.table({
            "id": np.arange(piece * count, (piece + 1) * count),
            "at": pa.array(at, pa.timestamp("us", tz="UTC")),
            "who": who,
            "value": draw.normal(0, 1, count).round(3),
        })  # fmt: skip
        pq.write_table(table, folder / f"part-{piece:04d}.parquet", compression="zstd")


def _write_conf(folder: Path, source: Path) -> None:
    columns = {"id": "int64", "at": "timestamp", "who": "int64", "value": "float64"}
    data = {
        "name": "large",
        "sources": {"large": {"path": str(source / "part-*.parquet"), "columns": columns}},
        "columns": {
            "id": {"type": "int64", "role": "id"},
            "at": {"type": "timestamp", "role": "event_time", "known_at": "prior"},
            "who": {"type": "int64", "role": "entity", "known_at": "prior"},
            "value": {"type": "float64", "role": "numeric", "known_at": "at"},
        },
    }
    view = {
        "entity": ["who"],
        "windows": ["1d", "7d", "14d", "28d"],
        "aggregates": {"value": ["count", "mean", "std", "max"]},
    }
    texts = {
        "data/large.yaml": json.dumps(data),
        "features/large.yaml": json.dumps({"as_of": "at", "views": {"who": view}}),
        "experiment/large.yaml": '# @package _global_\ndefaults: [{"/data": large}, {"/features": large}, _self_]\nname: large\n',
    }
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
