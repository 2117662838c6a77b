"""The feature store: one folder per view and recipe, a Parquet file per part (`partitions`), one row per event in dataset order.

A recipe covers one column and part: the rule, and the content digests of the data that the rule may read. So experiments share
a view; one more window computes only that window. Parts found in another recipe of the view are linked; of a part that has
changed since, only the days are computed that can see the change: an append computes the new days, a late row those from its
own on, as far as the windows reach.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from engine.config import schema
from engine.config.feature_names import window_name
from engine.config.nested import Tree
from engine.config.sections.data import DataConfig
from engine.config.sections.features import AggregateConfig, ViewConfig
from engine.config.tree import Config
from engine.config.units import Moment
from engine.data.dataset import Dataset, TypeText
from engine.errors import UserError
from engine.features import aggregates, compute, instants, partitions, user_functions
from engine.features.functions import function_version
from engine.features.kept_reads import KeptReads
from engine.features.partitions import Dependence, Inputs, Part, view_length
from engine.features.past import Rows, read_ranges, row_ranges
from engine.features.spec import (
    derived_from,
    knowing,
    known_anchor,
    known_moments,
    late_keys,
    past_columns,
    past_time,
    value_of,
    view_columns,
    view_inputs,
)
from engine.runtime import digest, environment, records, seal, storage
from engine.runtime.on_ray import tasks
from engine.runtime.run import Run
from engine.runtime.seal import Seal

MANIFEST = "manifest.json"
FAILED = "failed.parquet"
FORMAT = 2  # raise when the values of a view change for the same recipe
VERSIONS = 8  # of a view, newest first, in which parts to reuse are looked for
ROW_GROUP = 131_072
KEPT_SHARE = 32  # of the memory: columns of the events that are kept from view to view
CELL_BYTES = 24  # of memory per value while a window is computed: input, output, and sorting
Recipes = dict[str, str]  # column -> recipe
Earlier = Callable[[str, str], Inputs | None]  # (name, digest) of a dataset that was used before -> its inputs


class ViewColumn(TypedDict):
    """A column of one part: its recipe and the digest of its values."""

    recipe: records.Digest
    digest: records.Digest


class PartEntry(TypedDict):
    """A part of a view: dataset rows [start, stop)."""

    name: str
    file: str
    start: records.Count
    stop: records.Count
    columns: dict[str, ViewColumn]


class BuiltPart(PartEntry):
    """A part while a view is built: Arrow types of its columns, size and digest of its file."""

    types: NotRequired[dict[str, str]]
    sealed: NotRequired[seal.FileRecord]


class DatasetName(TypedDict):
    """The dataset that a view was computed from."""

    name: str
    recipe: records.Digest
    digest: records.Digest


class ViewRecord(TypedDict):
    """manifest.json of a view; `columns` are Arrow types by name, `spec` is the view's config."""

    format: Annotated[int, records.Format(FORMAT, FORMAT, "run `features` again")]
    view: str
    recipe: records.Digest
    digest: records.Digest
    rows: records.Count
    columns: dict[str, TypeText]
    spec: Tree
    as_of: str | None
    dataset: DatasetName
    parts: list[PartEntry]
    parts_computed: records.Count
    parts_linked: records.Count
    failed_rows: NotRequired[records.Count]  # null because a function failed
    days_computed: NotRequired[records.Count]


@dataclass(frozen=True)
class StoredView:
    """A computed view in the store."""

    name: str
    directory: Path
    manifest: ViewRecord
    seal: Seal

    @property
    def digest(self) -> str:
        """Content digest of all columns."""
        return str(self.manifest["digest"])

    @property
    def failed(self) -> np.ndarray:
        """int64: the dataset rows that are null because a function failed."""
        if not self.manifest.get("failed_rows"):
            return np.empty(0, np.int64)
        return np.asarray(storage.read_parquet(self.path(FAILED))["row"])

    @property
    def columns(self) -> list[str]:
        """Names of the features."""
        return list(self.manifest["columns"])

    def path(self, file: str) -> Path:
        """The path of a part, checked against the manifest. Raises records.Damaged."""
        return self.seal.check(self.directory, file, _remedy(self.directory))

    def read(self, columns: Sequence[str] | None = None, rows: tuple[int, int] | None = None) -> pa.Table:
        """Columns in dataset order, of all rows or of a range [start, stop); only the row groups needed are read."""
        names = list(columns) if columns is not None else self.columns
        start, stop = rows or (0, self.manifest["rows"])
        found = [
            _read_part(
                self.path(part["file"]),
                names,
                max(start - part["start"], 0),
                min(stop, part["stop"]) - part["start"],
            )
            for part in self.manifest["parts"]
            if part["start"] < stop and start < part["stop"]
        ]
        if found:
            return pa.concat_tables(found)
        kinds = {name: pa.type_for_alias(kind) for name, kind in self.manifest["columns"].items()}
        return pa.schema([(name, kinds[name]) for name in names]).empty_table()


def _remedy(directory: Path) -> str:
    return f"Remove {directory} and run `features` again"


def _read_part(path: Path, names: list[str], start: int, stop: int) -> pa.Table:
    try:
        with pq.ParquetFile(path, page_checksum_verification=True, memory_map=True) as file:
            groups = range(start // ROW_GROUP, min(-(-stop // ROW_GROUP), file.num_row_groups))
            table = file.read_row_groups(list(groups), columns=names).select(names)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} is damaged ({str(error).splitlines()[0]}). {_remedy(path.parent)}") from None
    return table.slice(start - (start // ROW_GROUP) * ROW_GROUP, stop - start)


# ------------------------------------------------------------------------------------------------------- building


@dataclass(frozen=True)
class Job:
    """State shared by all parts of one view while it is built."""

    name: str
    view: ViewConfig
    config: Config
    dataset: Dataset
    inputs: Inputs
    failed: Path  # folder for the rows of slow functions that failed

    @property
    def as_of(self) -> Moment:
        """The decision time."""
        return self.config.features.decision

    def names(self) -> list[str]:
        """The features of the view."""
        return [feature.name for feature in view_columns(self.name, self.view, self.config.data)]


def ensure_views(config: Config, dataset: Dataset, run: Run, *, anew: bool = False) -> dict[str, StoredView]:
    """Every view of the config: from the store where its recipe exists, else built, with the stored parts reused."""
    views = config.features.active_views
    if not views:
        return {}
    as_of = config.features.decision
    columns = [name for view in views.values() for name in view_inputs(view, config.data, as_of.column)]
    known = [(view.table, moment) for view in views.values() for moment in known_moments(view, config.data)]
    moments = [as_of, *(moment for table, moment in known if table is None)]
    times = {view.table: _table_time(config.data, view) for view in views.values() if view.table}
    timed = [
        (name, time, [moment for table, moment in known if table == name])
        for name, time in times.items()
        if time is not None
    ]
    store = Path(config.paths.store)
    dataset = KeptReads(dataset.directory, dataset.manifest, dataset.seal, config.resources.memory.bytes // KEPT_SHARE)
    inputs = partitions.prepare(store, dataset, columns, moments, timed)  # one pass for all views
    earlier = functools.cache(functools.partial(partitions.load, store))
    with tasks.Workers(config) as workers:
        return {
            name: _ensure_view(
                Job(name, view, config, dataset, inputs, run.path("failed")), run, workers, None if anew else earlier
            )
            for name, view in views.items()
        }


def _ensure_view(job: Job, run: Run, workers: tasks.Workers, earlier: Earlier | None) -> StoredView:
    """The view from the store, or built with what earlier versions hold; without `earlier` it is computed anew."""
    anew = earlier is None
    name, parts = job.name, job.inputs.parts
    needs = dependences(job)
    recipes = {part.name: {column: need.recipe(part) for column, need in needs.items()} for part in parts}
    recipe = digest.of_json(
        [FORMAT, name, [[part.name, part.rows[1] - part.rows[0], recipes[part.name]] for part in parts]]
    )
    folder = storage.inside(Path(job.config.paths.store), "features", name)
    directory = folder / recipe[:16]
    if not anew and (stored := open_view(name, directory)):
        failed_rows = stored.manifest.get("failed_rows", 0)
        if not failed_rows or job.view.on_error == "null":
            user_functions.warn_of_nulls(run, name, failed_rows)
            return stored
    works = [Work(part, recipes[part.name], days=part.days[1] - part.days[0]) for part in parts]
    if earlier is not None:
        works = _reusing(job, works, needs, folder.absolute(), earlier)
    if any(work.lacking for work in works):
        aggregates.check(name, job.view)
        if job.view.kind == "function":
            user_functions.prepare(name, job.view, job.config.data, job.dataset, job.failed)
    with (
        storage.atomic_directory(directory) as temporary,
        run.progress(f"features {name}", job.dataset.rows) as progress,
    ):
        entries: list[BuiltPart] = []
        for entry in _build_all(job, works, temporary, workers):
            entries.append(entry)
            progress.advance(entry["stop"] - entry["start"])
        entries.sort(key=lambda entry: entry["start"])  # workers finish in any order
        sealed = {entry["file"]: entry.pop("sealed") for entry in entries}
        manifest = _manifest(job, recipe, entries, works)
        manifest["spec"] = run.masked(manifest["spec"])  # the composed config may hold values of secrets
        if len(failed := user_functions.told(run, name, job.failed)):
            manifest["failed_rows"] = len(failed)
            storage.write_parquet(temporary / FAILED, pa.table({"row": failed}))
        storage.write_json(temporary / MANIFEST, manifest, synced=False)
        written = seal.write(temporary, known=sealed, synced=False)
        is_new = not directory.exists()
        if not is_new:
            _make_room(name, directory)
    if is_new:
        return StoredView(name, directory, manifest, written)
    stored = open_view(name, directory)
    assert stored is not None
    if anew:
        # An equal folder existed before and keeps the name; the values computed now must agree with it.
        _check_same(stored, entries)
    return stored


def _make_room(name: str, directory: Path) -> None:
    """Remove a stored folder of this recipe if it is damaged, or lacks rows of a function that failed; another one stays,
    because readers may use it.
    """
    stored = open_view(name, directory)
    if stored is None or stored.manifest.get("failed_rows") or any(stored.seal.damaged(directory)):
        storage.remove(directory, directory.parents[1])


def _check_same(stored: StoredView, entries: list[BuiltPart]) -> None:
    for there, here in zip(stored.manifest["parts"], entries, strict=True):
        for name, entry in here["columns"].items():
            if there["columns"][name]["digest"] != entry["digest"]:
                # The recipe has not changed, so the stored file is no longer what was written.
                storage.remove(stored.directory, stored.directory.parents[1])
                raise UserError(
                    f"{stored.directory} held other values of {name!r} in {here['name']} than are computed now; it was "
                    "removed. Run the command again"
                )


def _manifest(job: Job, recipe: str, entries: list[BuiltPart], works: list[Work]) -> ViewRecord:
    kinds = entries[0].pop("types") if entries else {}
    for entry in entries[1:]:
        entry.pop("types")
    values = {name: [entry["columns"][name]["digest"] for entry in entries] for name in kinds}
    return {
        "format": FORMAT,
        "view": job.name,
        "recipe": recipe,
        "digest": digest.of_json([job.dataset.rows, list(values.items())]),
        "rows": job.dataset.rows,
        "columns": kinds,
        "spec": schema.plain(job.view),
        "as_of": job.as_of,
        "dataset": {"name": job.dataset.name, "recipe": job.dataset.recipe, "digest": job.dataset.digest},
        "parts": [*entries],
        "parts_computed": sum(work.days > 0 for work in works),
        "parts_linked": sum(work.days == 0 for work in works),
        "days_computed": sum(work.days for work in works),
    }


@dataclass(frozen=True)
class Work:
    """What a part needs. Columns in `stored` are read from that version by that name; of the others, `before` (a version and
    its rows in the part) holds the first `head` and the last `tail` rows. `linked` holds the whole part under equal recipes.
    """

    part: Part
    recipes: Recipes
    stored: dict[str, tuple[StoredView, str]] = field(default_factory=dict)
    linked: StoredView | None = None
    before: tuple[StoredView, int] | None = None
    head: int = 0
    tail: int = 0
    days: int = 0  # that are computed

    @property
    def lacking(self) -> tuple[str, ...]:
        """The columns to compute."""
        return tuple(name for name in self.recipes if name not in self.stored)

    @property
    def rows(self) -> tuple[int, int]:
        """The dataset rows to compute."""
        return self.part.rows[0] + self.head, self.part.rows[1] - self.tail


def _batches(job: Job, works: list[Work]) -> Iterator[list[Work]]:
    """Batches of works on adjacent rows that lack the same columns, computed in one call within the memory limit."""
    limit = batch_rows(job)
    if job.config.cluster.kind == "ray":
        limit = min(limit, max(-(-job.dataset.rows // job.config.cluster.workers), 1))
    batch: list[Work] = []
    for work in works:
        together = batch and work.lacking == batch[-1].lacking and batch[-1].rows[1] == work.rows[0]
        if batch and not (together and work.rows[1] - batch[0].rows[0] <= limit):
            yield batch
            batch = []
        batch.append(work)
    if batch:
        yield batch


def batch_rows(job: Job) -> int:
    """Rows whose features may be in memory at once: half of `resources.memory`."""
    memory = job.config.resources.memory.bytes // 2
    return max(
        memory // (CELL_BYTES * (len(job.names()) + len(view_inputs(job.view, job.config.data, job.as_of.column)))),
        1000,
    )


def _build_all(job: Job, works: list[Work], directory: Path, workers: tasks.Workers) -> Iterator[BuiltPart]:
    """Build every part; the workers of a cluster compute them where there is work for at least two."""
    batches = list(_batches(job, works))
    lacking = [batch for batch in batches if batch[0].lacking]
    away = lacking if job.config.cluster.kind == "ray" and len(lacking) > 1 else []
    for batch in batches:
        if batch not in away:
            yield from _build(job, batch, directory)
    if away:
        make = functools.partial(_builder, _absolute(job), away, directory.absolute(), code_versions(job.view))
        for built in workers.run(
            list(range(len(away))), make, directory, lambda _: f"view {job.name!r} could not be computed"
        ):
            yield from built


def _absolute(job: Job) -> Job:
    """The job for a worker, which does not share the driver's current folder."""
    dataset = dataclasses.replace(job.dataset, directory=job.dataset.directory.absolute())
    return dataclasses.replace(job, dataset=dataset, failed=job.failed.absolute())


def code_versions(view: ViewConfig) -> list[str]:
    """Versions of the code of a user's own that a view names."""
    return [function_version(view.function)] if view.kind == "function" else aggregates.versions_of(view)


def _builder(job: Job, batches: list[list[Work]], directory: Path, versions: list[str], config: Config) -> tasks.Share:
    """The function that computes a batch of a view in a worker."""
    mine = dataclasses.replace(job, config=config)

    def build(place: int) -> list[Any]:
        if (here := code_versions(job.view)) != versions:
            raise UserError(
                f"every node must have the same code of features.views.{job.name}, found {', '.join(versions)} and "
                f"{', '.join(here)}"
            )
        return list(_build(mine, batches[place], directory))

    return build


def _build(job: Job, batch: list[Work], directory: Path) -> Iterator[BuiltPart]:
    """Write the parts of a batch; yield their manifest entries."""
    lacking = batch[0].lacking
    first = batch[0].rows[0]
    fresh = compute_rows(job, set(job.names()) - set(lacking), (first, batch[-1].rows[1])) if lacking else {}

    def put(work: Work) -> BuiltPart:
        part, file = work.part, f"part-{work.part.name}.parquet"
        count = part.rows[1] - part.rows[0]
        if work.linked is not None:
            entry = next(entry for entry in work.linked.manifest["parts"] if entry["name"] == part.name)
            storage.link(work.linked.directory / file, directory / file, synced=False)
            entry = {**entry, "file": file, "start": part.rows[0], "stop": part.rows[1]}
            return {**entry, "sealed": work.linked.seal.files[file], "types": work.linked.manifest["columns"]}
        start, stop = work.rows
        columns: dict[str, pa.ChunkedArray] = {
            name: column.slice(start - first, stop - start) for name, column in fresh.items()
        }
        if work.before is not None:
            old = _read_part(work.before[0].path(file), list(work.lacking), 0, work.before[1])
            columns = {name: _between(columns.get(name), old[name], work.head, work.tail) for name in work.lacking}
        for name, (stored, there) in work.stored.items():
            columns[name] = _read_part(stored.path(file), [there], 0, count)[there]
        table = pa.table({name: columns[name] for name in work.recipes})
        _write(directory / file, table)
        return {**_entry(part, file, table, work.recipes), "sealed": seal.record_of(directory / file)}

    # Encoding and hashing take as long as the windows, and release the GIL.
    with ThreadPoolExecutor(environment.threads_of(job.config), thread_name_prefix="parts") as pool:
        yield from pool.map(put, batch)


def _between(new: pa.Array | pa.ChunkedArray | None, old: pa.ChunkedArray, head: int, tail: int) -> pa.Array:
    """The first `head` old values, the new ones, and the last `tail` old ones."""
    middle = new.chunks if isinstance(new, pa.ChunkedArray) else [new] if new is not None else []
    chunks = [*old.slice(0, head).chunks, *middle, *old.slice(len(old) - tail).chunks]
    return pa.chunked_array(chunks, old.type).combine_chunks()


def _entry(part: Part, file: str, table: pa.Table, recipes: Recipes) -> BuiltPart:
    return {
        "name": part.name,
        "file": file,
        "start": part.rows[0],
        "stop": part.rows[1],
        "columns": {
            name: {"recipe": recipes[name], "digest": value} for name, value in digest.of_columns(table).items()
        },
        "types": {field.name: str(field.type) for field in table.schema},
    }


def _write(path: Path, table: pa.Table) -> None:
    # Window statistics rarely repeat: plain pages with a fast codec are written three times as fast as dictionaries.
    texts = [field.name for field in table.schema if not pa.types.is_floating(field.type)]
    storage.write_parquet(path, table, synced=False, row_group_size=ROW_GROUP, use_dictionary=texts, compression="lz4")


# ---------------------------------------------------------------------------------------------------- computing


def compute_rows(job: Job, have: set[str], rows: tuple[int, int]) -> dict[str, pa.Array]:
    """The columns that are not in `have`, of dataset rows [start, stop), with the history they need."""
    lacking = lacking_view(job.name, job.view, job.config.data, have)
    if lacking is None or rows[0] == rows[1]:
        return {}
    pieces: list[dict[str, pa.Array]] = []
    limit = batch_rows(job)
    for start in range(rows[0], rows[1], limit):
        pieces.append(_compute_piece(job, lacking, (start, min(start + limit, rows[1]))))
    if len(pieces) == 1:
        return pieces[0]
    return {name: pa.chunked_array([piece[name] for piece in pieces]) for name in pieces[0]}


def _compute_piece(job: Job, view: ViewConfig, rows: tuple[int, int]) -> dict[str, pa.Array]:
    data, features, dataset = job.config.data, job.config.features, job.dataset
    columns = view_inputs(view, data, job.as_of.column)
    threads = environment.threads_of(job.config)
    if view.batch_rows is not None:
        return user_functions.kept_features(job.name, view, job.config, dataset, rows, job.failed)
    if view.kind != "windows" or view.table:
        probes = dataset.read(columns, rows=rows)
        tables = {view.table: dataset.table(view.table)} if view.table else {}
        return compute.view_features(job.name, view, data, features, probes, probes, tables, threads)
    decisions = instants.moment_times(dataset.read([job.as_of.column], rows=rows), job.as_of)
    ranges = row_ranges(dataset, data, [view], decisions)
    passes = -(-sum(stop - start for start, stop in ranges) // batch_rows(job))
    if passes > 1:
        return _in_passes(job, view, dataset.read(columns, rows=rows), ranges, passes)
    if ranges and ranges[-1][0] <= rows[0] <= ranges[-1][1]:  # one read for both: later rows do not count
        ranges[-1] = ranges[-1][0], max(ranges[-1][1], rows[1])
        history = read_ranges(dataset, columns, ranges)
        # The same table, where it is, has its entities encoded and sorted once.
        probes = (
            history
            if ranges == [rows]
            else history.slice(history.num_rows - ranges[-1][1] + rows[0], rows[1] - rows[0])
        )
    else:
        probes, history = dataset.read(columns, rows=rows), read_ranges(dataset, columns, ranges)
    return compute.view_features(job.name, view, data, features, probes, history, {}, threads)


def _in_passes(job: Job, view: ViewConfig, probes: pa.Table, ranges: list[Rows], passes: int) -> dict[str, pa.Array]:
    """Features of history too large for memory: it is read once per group of entities (by hash), keeping only their rows."""
    data, features = job.config.data, job.config.features
    columns = probes.column_names
    owner = compute.entity_hash(probes, view.entity) % np.uint64(passes)
    places, results = [], []
    for turn in range(passes):
        kept = [
            table.filter(pa.array(compute.entity_hash(table, view.keys) % np.uint64(passes) == turn))
            for rows in ranges
            for table in map(lambda batch: pa.Table.from_batches([batch]), job.dataset.batches(columns, rows=rows))
        ]
        mine = np.flatnonzero(owner == turn)
        found = compute.view_features(
            job.name,
            view,
            data,
            features,
            probes.take(pa.array(mine)),
            pa.concat_tables(kept),
            {},
            environment.threads_of(job.config),
        )
        places.append(mine)
        results.append(pa.table(found))
    back = pa.array(np.argsort(np.concatenate(places), kind="stable"))
    table = pa.concat_tables(results).combine_chunks().take(back)
    return {name: table[name].combine_chunks() for name in table.column_names}


def lacking_view(name: str, view: ViewConfig, data: DataConfig, have: set[str]) -> ViewConfig | None:
    """The smallest view that computes the columns not in `have`; None when none is missing."""
    names = [feature.name for feature in view_columns(name, view, data)]
    if have.issuperset(names):
        return None
    if not have or view.kind in ("asof", "function"):
        return view
    if view.kind == "expression":
        rest = {key: item for key, item in view.expressions.items() if f"{name}_{key}" not in have}
        return schema.build(ViewConfig, {**schema.plain(view), "expressions": schema.plain(rest)})  # type: ignore[no-any-return]
    derive = {key: item for key, item in view.derive.items() if f"{name}_{key}" not in have}
    have = have - {f"{name}_{item}" for key in derive for item in derived_from(view, key)}  # computed again
    windows = [
        window
        for window in view.windows
        if any(
            window_name(name, entry, item, window) not in have
            for entry, asked in view.asked.items()
            for item in asked.aggregates
        )
    ]
    asked = {
        entry: [
            item
            for item in asked.aggregates
            if any(window_name(name, entry, item, window) not in have for window in windows)
        ]
        for entry, asked in view.asked.items()
    }
    aggregates = {
        entry: {**schema.plain(item), "aggregates": asked[entry]} if isinstance(item, AggregateConfig) else asked[entry]
        for entry, item in view.aggregates.items()
        if asked[entry]
    }
    values = {**schema.plain(view), "windows": windows, "aggregates": aggregates, "derive": schema.plain(derive)}
    return schema.build(ViewConfig, values)  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------------------- recipes


def dependences(job: Job) -> dict[str, Dependence]:
    """Column -> what its values depend on. The view's name, owner and description are not part of it."""
    make = {"windows": _windows_dependences, "asof": _asof_dependences}.get(job.view.kind, _row_dependences)
    return dict(make(job))


def _windows_dependences(job: Job) -> Iterator[tuple[str, Dependence]]:
    data, view, inputs = job.config.data, job.view, job.inputs
    columns, moments = past_columns(view, data), known_moments(view, data)
    keys = [past_time(view, data), *view.keys]
    own = inputs.by_day([*view.entity, job.as_of.column, *view.exclude])
    rules: dict[str, tuple[Any, list[str], int]] = {}
    for entry, asked in view.asked.items():
        value, needed = value_of(asked), knowing(view, asked, data)
        read = list(dict.fromkeys([*needed, *(anchor for name in needed for anchor in known_anchor(columns[name]))]))
        known = columns[asked.of].known_at if value else None
        newer = _newer_rules(view, asked, keys, data)
        seen = inputs.table_by_day(view.table, moments) if view.table else inputs.by_day([*keys, *read], moments)
        for window in view.windows:
            for aggregate in asked.aggregates:
                computed = aggregates.version_of(aggregate)
                rule = [FORMAT, "windows", job.as_of, list(view.entity), value, known, computed, window, *newer]
                name = window_name(job.name, entry, aggregate, window)
                rules[name.removeprefix(f"{job.name}_")] = rule, read, view_length(view, window) or 0
                yield name, Dependence(inputs, job.as_of, rule, own, seen, view_length(view, window))
    for feature, item in view.derive.items():
        made_of, reads, lengths = zip(*(rules[name] for name in derived_from(view, feature)), strict=True)
        read = list(dict.fromkeys(itertools.chain(*reads)))
        seen = inputs.table_by_day(view.table, moments) if view.table else inputs.by_day([*keys, *read], moments)
        rule = [FORMAT, "derive", item.sql, item.type, made_of]
        yield f"{job.name}_{feature}", Dependence(inputs, job.as_of, rule, own, seen, max(lengths))


def _newer_rules(view: ViewConfig, asked: AggregateConfig, keys: list[str], data: DataConfig) -> list[Any]:
    """What a windows rule has beyond those of earlier versions; empty without any, which keeps their recipes."""
    found = {
        "by": view.by if view.by != "event" else None,
        "keys": keys if view.table or view.on else None,
        "where": asked.where,
        "exclude": view.exclude,
        "late": late_keys(view, data),
    }
    rules, columns = {name: rule for name, rule in found.items() if rule}, past_columns(view, data)
    return [rules, {column: columns[column].known_at for column in knowing(view, asked, data)}] if rules else []


def _table_time(data: DataConfig, view: ViewConfig) -> str | None:
    """The time column of a view's side table; None for a static one."""
    return None if data.tables[view.table or ""].static else past_time(view, data)


def _asof_dependences(job: Job) -> Iterator[tuple[str, Dependence]]:
    data, view, inputs = job.config.data, job.view, job.inputs
    spec, time = data.tables[view.table or ""], _table_time(data, view)
    rule = [FORMAT, "asof", job.as_of, list(view.entity), list(view.on), view.max_age, view.inclusive, time]
    if time and (late := late_keys(view, data)):
        rule.append({key: spec.columns[key].known_at for key in late})
    own = inputs.by_day([*view.entity, job.as_of.column])
    seen = inputs.table_by_day(view.table or "") if time else None
    whole = None if time else job.dataset.table_digest(view.table or "")
    for column in view.columns:
        mine = [rule, column, spec.columns[column].known_at, whole]
        yield f"{job.name}_{column}", Dependence(inputs, job.as_of, mine, own, seen, view_length(view))


def _row_dependences(job: Job) -> Iterator[tuple[str, Dependence]]:
    view, columns = job.view, view_inputs(job.view, job.config.data, job.as_of.column)
    version = function_version(view.function) if view.kind == "function" else None
    rules: Mapping[str, object] = {key: [item.sql, item.type] for key, item in view.expressions.items()} or view.outputs
    own = job.inputs.by_day(columns)
    for key, rule in rules.items():
        mine = [FORMAT, view.kind, version, rule, columns]
        yield f"{job.name}_{key}", Dependence(job.inputs, job.as_of, mine, own)


# --------------------------------------------------------------------------------------------------- what is there


def _reusing(job: Job, works: list[Work], now: dict[str, Dependence], folder: Path, earlier: Earlier) -> list[Work]:
    """The works, with what the newest versions of the view in `folder` hold of them; `now`: what columns depend on."""
    found = list(works)
    for stored in itertools.islice(_newest_versions(folder), VERSIONS):
        entries = {entry["name"]: entry for entry in stored.manifest["parts"]}
        before = _dependences_of(job, stored, earlier)
        for place, work in enumerate(found):
            if work.lacking and (entry := entries.get(work.part.name)) is not None:
                found[place] = _with_columns(work, stored, entry)
                if found[place].lacking and work.before is None and before is not None:
                    found[place] = _amending(found[place], stored, entry, now, before)
        if all(work.before is not None or not work.lacking for work in found):
            break
    return found


def _newest_versions(folder: Path) -> Iterator[StoredView]:
    paths = [path for path in folder.iterdir() if not path.name.startswith(".")] if folder.is_dir() else []
    for path in storage.newest_first(paths):
        stored = open_view(folder.name, path)
        if stored is not None and not stored.manifest.get("failed_rows"):
            yield stored


def _with_columns(work: Work, stored: StoredView, entry: PartEntry) -> Work:
    """The work with the columns that a version's part holds under the same recipe."""
    names = {item["recipe"]: name for name, item in entry["columns"].items()}
    columns = {
        name: (stored, names[recipe])
        for name, recipe in work.recipes.items()
        if name not in work.stored and recipe in names
    }
    same = list(work.recipes.items()) == [(name, item["recipe"]) for name, item in entry["columns"].items()]
    days = work.days if len(columns) + len(work.stored) < len(work.recipes) else 0
    return dataclasses.replace(work, stored=work.stored | columns, linked=stored if same else None, days=days)


def _dependences_of(job: Job, stored: StoredView, earlier: Earlier) -> dict[str, Dependence] | None:
    """What the columns of this view would depend on in the dataset of a stored version; None if its inputs are unknown."""
    dataset = stored.manifest["dataset"]
    inputs = earlier(dataset["name"], dataset["digest"])
    if inputs is None:
        return None
    columns = {job.dataset.event_time, *view_inputs(job.view, job.config.data, job.as_of.column)}
    known, table = set(known_moments(job.view, job.config.data)), job.view.table
    moments = {job.as_of} if table else {job.as_of, *known}
    if table and _table_time(job.config.data, job.view):
        there = inputs.tables.get(table)
        if there is None or not known <= there.get("latest", {}).keys():
            return None
    if not (columns <= inputs.columns.keys() and moments <= inputs.spans.keys()):
        return None
    return dependences(dataclasses.replace(job, inputs=inputs))


def _amending(
    work: Work, stored: StoredView, entry: PartEntry, now: dict[str, Dependence], before: dict[str, Dependence]
) -> Work:
    """The work with the first and last days that the version has computed, from the same data, for all lacking columns."""
    names = work.lacking
    inputs = before[names[0]].inputs
    old = next((part for part in inputs.parts if part.name == work.part.name), None)
    columns = entry["columns"]
    if old is None or any(name not in columns or columns[name]["recipe"] != before[name].recipe(old) for name in names):
        return work  # computed by another rule
    same = {(id(now[name].seen), now[name].length): name for name in names}  # columns that depend on the same days
    spans = [now[name].unchanged(work.part, before[name], old) for name in same.values()]
    head, tail = (min(span[end] for span in spans) for end in (0, 1))
    first, stop = work.part.days
    if not head + tail:
        return work
    mine = now[names[0]].inputs
    return dataclasses.replace(
        work,
        before=(stored, entry["stop"] - entry["start"]),
        head=mine.rows_of(first, first + head),
        tail=mine.rows_of(stop - tail, stop),
        days=stop - first - head - tail,
    )


def stored_views(folder: Path) -> list[StoredView]:
    """Every complete recipe of a view, by name of its folder."""
    found = (
        [open_view(folder.name, path) for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
        if folder.is_dir()
        else []
    )
    return [stored for stored in found if stored is not None]


def open_view(name: str, directory: Path) -> StoredView | None:
    """The view in a folder of the store; None when there is none, one of another format, or its manifest is damaged."""
    try:
        found = seal.read(directory)
        manifest = records.read(found.check(directory, MANIFEST, _remedy(directory)), ViewRecord)
    except UserError:
        return None
    return StoredView(name, directory, manifest, found)
