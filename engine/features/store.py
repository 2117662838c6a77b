"""The feature store: one folder per view and recipe, a Parquet file per month, one row per event in dataset order.

A recipe covers one column and month: the rule, and the content digests of the data that the rule may read. So experiments
share a view; one more window computes only that window; an append computes the new months, and a late row those that can see
it. Parts found in another recipe of the view are linked, not recomputed.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from engine.config import schema
from engine.config.feature_names import window_name
from engine.config.sections.data import DataConfig
from engine.config.sections.features import ViewConfig
from engine.config.tree import Config
from engine.config.units import Moment
from engine.data.dataset import Dataset, TypeText
from engine.errors import UserError
from engine.features import compute, instants, user_functions
from engine.features.functions import function_version
from engine.features.partitions import Inputs, Part, month_parts, month_span, table_months, view_length
from engine.features.past import Rows, past_events, row_ranges
from engine.features.spec import known_anchor, known_moments, view_columns, view_inputs
from engine.runtime import digest, environment, records, seal, storage
from engine.runtime.on_ray import tasks
from engine.runtime.run import Run
from engine.runtime.seal import Seal

MANIFEST = "manifest.json"
FORMAT = 2  # raise when the values of a view change for the same recipe
ROW_GROUP = 131_072
CELL_BYTES = 24  # of memory per value while a window is computed: input, output, and sorting
Recipes = dict[str, str]  # column -> recipe


class ViewColumn(TypedDict):
    """A column of one month: its recipe and the digest of its values."""

    recipe: records.Digest
    digest: records.Digest


class MonthEntry(TypedDict):
    """A month of a view: dataset rows [start, stop)."""

    name: str
    file: str
    start: records.Count
    stop: records.Count
    columns: dict[str, ViewColumn]


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
    spec: dict[str, Any]
    as_of: str | None
    dataset: DatasetName
    parts: list[MonthEntry]
    parts_computed: records.Count
    parts_linked: records.Count
    failed_rows: NotRequired[records.Count]  # null because a function failed


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
    inputs = Inputs(Path(config.paths.store), dataset, month_parts(dataset))
    columns = [name for view in views.values() for name in view_inputs(view, config.data, as_of.column)]
    known = [moment for view in views.values() for moment in known_moments(view, config.data)]
    inputs.prepare(list(dict.fromkeys(columns)), [as_of, *known])  # one pass for all views
    with tasks.Workers(config) as workers:
        return {
            name: _ensure_view(Job(name, view, config, dataset, inputs, run.path("failed")), run, workers, anew)
            for name, view in views.items()
        }


def _ensure_view(job: Job, run: Run, workers: tasks.Workers, anew: bool) -> StoredView:
    name, parts = job.name, list(job.inputs.parts)
    recipes = part_recipes(job, parts)
    recipe = digest.of_json(
        [FORMAT, name, [[part.name, part.rows[1] - part.rows[0], recipes[part.name]] for part in parts]]
    )
    folder = storage.inside(Path(job.config.paths.store), "features", name)
    directory = folder / recipe[:16]
    if not anew and (stored := open_view(name, directory)):
        user_functions.warn_of_nulls(run, name, stored.manifest.get("failed_rows", 0))
        return stored
    found = Index({}, {}) if anew else _index(folder.absolute())
    batches = list(_batches(job, parts, recipes, found))
    if job.view.kind == "function" and any(_lacking(job, part, recipes, found) for part in parts):
        user_functions.prepare(name, job.view, job.config.data, job.dataset, job.failed)
    rows = job.dataset.rows
    with storage.atomic_directory(directory) as temporary, run.progress(f"features {name}", rows) as progress:
        entries, counts = [], {"computed": 0, "linked": 0}
        for entry, computed in _build_all(job, batches, recipes, found, temporary, workers):
            entries.append(entry)
            counts["computed" if computed else "linked"] += 1
            progress.advance(entry["stop"] - entry["start"])
        entries.sort(key=lambda entry: entry["start"])  # workers finish in any order
        sealed = {entry["file"]: entry.pop("sealed") for entry in entries}
        manifest = _manifest(job, recipe, entries, counts)
        manifest["spec"] = run.masked(manifest["spec"])  # the composed config may hold values of secrets
        if failed := user_functions.told(run, name, job.failed):
            manifest["failed_rows"] = failed
        storage.write_json(temporary / MANIFEST, manifest)
        seal.write(temporary, known=sealed)
        _make_room(name, directory)
    if anew:
        # An equal folder existed before and keeps the name; the values computed now must agree with it.
        _check_same(open_view(name, directory), entries)
    stored = open_view(name, directory)
    assert stored is not None
    return stored


def _make_room(name: str, directory: Path) -> None:
    """Remove a stored folder of this recipe if it is damaged, or lacks rows of a function that failed; another one stays,
    because readers may use it.
    """
    stored = open_view(name, directory)
    if directory.exists() and (
        stored is None or stored.manifest.get("failed_rows") or any(stored.seal.damaged(directory))
    ):
        aside = storage.temporary_name(directory)
        directory.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def _check_same(stored: StoredView | None, entries: list[dict[str, Any]]) -> None:
    assert stored is not None
    for there, here in zip(stored.manifest["parts"], entries, strict=True):
        for name, entry in here["columns"].items():
            if there["columns"][name]["digest"] != entry["digest"]:
                # The recipe has not changed, so the stored file is no longer what was written.
                storage.remove(stored.directory, stored.directory.parents[1])
                raise UserError(
                    f"{stored.directory} held other values of {name!r} in {here['name']} than are computed now; it was "
                    "removed. Run the command again"
                )


def _manifest(job: Job, recipe: str, entries: list[dict[str, Any]], counts: dict[str, int]) -> ViewRecord:
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
        "parts": cast(list[MonthEntry], entries),
        "parts_computed": counts["computed"],
        "parts_linked": counts["linked"],
    }


def _batches(job: Job, parts: list[Part], recipes: dict[str, Recipes], found: Index) -> Iterator[list[Part]]:
    """Batches of adjacent months that lack the same columns, computed in one call within the memory limit."""
    limit = batch_rows(job)
    if job.config.cluster.kind == "ray":
        limit = min(limit, max(-(-job.dataset.rows // job.config.cluster.workers), 1))
    batch: list[Part] = []
    for part in parts:
        together = batch and _lacking(job, part, recipes, found) == _lacking(job, batch[-1], recipes, found)
        if batch and not (together and batch[-1].rows[1] == part.rows[0] and part.rows[1] - batch[0].rows[0] <= limit):
            yield batch
            batch = []
        batch.append(part)
    if batch:
        yield batch


def batch_rows(job: Job) -> int:
    """Rows whose features may be in memory at once: half of `resources.memory`."""
    memory = job.config.resources.memory.bytes // 2
    return max(
        memory // (CELL_BYTES * (len(job.names()) + len(view_inputs(job.view, job.config.data, job.as_of.column)))),
        1000,
    )


def _lacking(job: Job, part: Part, recipes: dict[str, Recipes], found: Index) -> tuple[str, ...]:
    return tuple(name for name in job.names() if (part.name, recipes[part.name][name]) not in found.columns)


def _build_all(
    job: Job,
    batches: list[list[Part]],
    recipes: dict[str, Recipes],
    found: Index,
    directory: Path,
    workers: tasks.Workers,
) -> Iterator[tuple[dict[str, Any], bool]]:
    """Build every batch; the workers of a cluster compute them where there is work for at least two."""
    lacking = [batch for batch in batches if _lacking(job, batch[0], recipes, found)]
    away = lacking if job.config.cluster.kind == "ray" and len(lacking) > 1 else []
    for batch in batches:
        if batch not in away:
            yield from _build(job, batch, recipes, found, directory)
    if away:
        version = function_version(job.view.function) if job.view.kind == "function" else None
        make = functools.partial(_builder, _absolute(job), recipes, found, directory.absolute(), version)
        items = [[dataclasses.asdict(part) for part in batch] for batch in away]
        for built in workers.run(items, make, directory, lambda _: f"view {job.name!r} could not be computed"):
            yield from built


def _absolute(job: Job) -> Job:
    """The job for a worker, which does not share the driver's current folder."""
    dataset = dataclasses.replace(job.dataset, directory=job.dataset.directory.absolute())
    return dataclasses.replace(job, dataset=dataset, failed=job.failed.absolute())


def _builder(
    job: Job, recipes: dict[str, Recipes], found: Index, directory: Path, version: str | None, config: Config
) -> tasks.Share:
    """The function that computes months of a view in a worker."""
    mine = dataclasses.replace(job, config=config)

    def build(share: list[dict[str, Any]]) -> list[Any]:
        if version is not None and (here := function_version(job.view.function)) != version:
            raise UserError(
                f"every node must have the same {job.view.function!r} of features.views.{job.name}, found {version} and {here}"
            )
        batch = [Part(item["name"], item["start"], item["stop"], tuple(item["rows"])) for item in share]
        return list(_build(mine, batch, recipes, found, directory))

    return build


def _build(
    job: Job, batch: list[Part], recipes: dict[str, Recipes], found: Index, directory: Path
) -> Iterator[tuple[dict[str, Any], bool]]:
    """Write the months of a batch; yield each month's manifest entry and whether it had to be computed."""
    lacking = _lacking(job, batch[0], recipes, found)
    first, last = batch[0].rows[0], batch[-1].rows[1]
    fresh = compute_rows(job, set(job.names()) - set(lacking), (first, last)) if lacking else {}

    def put(part: Part) -> tuple[dict[str, Any], bool]:
        file = f"part-{part.name}.parquet"
        wanted = recipes[part.name]
        whole = found.files.get((part.name, tuple(wanted.items())))
        if whole is not None:
            stored, entry = whole
            storage.link(stored.directory / file, directory / file, synced=False)
            known = {"file": file, "start": part.rows[0], "stop": part.rows[1], "sealed": stored.seal.files[file]}
            return {**entry, **known}, False
        columns: dict[str, Any] = {
            name: column.slice(part.rows[0] - first, part.rows[1] - part.rows[0]) for name, column in fresh.items()
        }
        for name in wanted:
            if name not in columns:
                stored, there = found.columns[part.name, wanted[name]]
                columns[name] = _read_part(stored.path(file), [there], 0, part.rows[1] - part.rows[0])[there]
        table = pa.table({name: columns[name] for name in wanted})
        _write(directory / file, table)
        return {**_entry(part, file, table, wanted), "sealed": seal.record_of(directory / file)}, bool(lacking)

    # Encoding and hashing take as long as the windows, and release the GIL.
    with ThreadPoolExecutor(environment.threads_of(job.config), thread_name_prefix="months") as pool:
        yield from pool.map(put, batch)


def _entry(part: Part, file: str, table: pa.Table, recipes: Recipes) -> dict[str, Any]:
    digests = digest.TableDigest(table.schema)
    digests.update(table)
    return {
        "name": part.name,
        "file": file,
        "start": part.rows[0],
        "stop": part.rows[1],
        "columns": {name: {"recipe": recipes[name], "digest": value} for name, value in digests.columns().items()},
        "types": {field.name: str(field.type) for field in table.schema},
    }


def _write(path: Path, table: pa.Table) -> None:
    # Window statistics rarely repeat: plain pages with a fast codec are written three times as fast as dictionaries.
    texts = [field.name for field in table.schema if not pa.types.is_floating(field.type)]
    storage.write_parquet(path, table, row_group_size=ROW_GROUP, use_dictionary=texts, compression="lz4")


# ---------------------------------------------------------------------------------------------------- computing


def compute_rows(job: Job, have: set[str], rows: tuple[int, int]) -> dict[str, pa.Array]:
    """The columns that are not in `have`, of dataset rows [start, stop), with the history they need."""
    lacking = lacking_view(job.name, job.view, job.config.data, have)
    if lacking is None:
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
    probes = dataset.read(columns, rows=rows)
    threads = environment.threads_of(job.config)
    if view.batch_rows is not None:
        return user_functions.kept_features(job.name, view, job.config, dataset, rows, job.failed)
    if view.kind != "windows":
        tables = {view.table: dataset.table(view.table)} if view.table else {}
        return compute.view_features(job.name, view, data, features, probes, probes, tables, threads)
    decisions = instants.moment_times(probes, job.as_of)
    ranges = row_ranges(dataset, data, [view], decisions)
    passes = -(-sum(stop - start for start, stop in ranges) // batch_rows(job))
    if passes <= 1:
        history = past_events(dataset, data, [view], decisions, columns)
        return compute.view_features(job.name, view, data, features, probes, history, {}, threads)
    return _in_passes(job, view, probes, ranges, passes)


def _in_passes(job: Job, view: ViewConfig, probes: pa.Table, ranges: list[Rows], passes: int) -> dict[str, pa.Array]:
    """Features of history too large for memory: it is read once per group of entities (by hash), keeping only their rows."""
    data, features = job.config.data, job.config.features
    columns = probes.column_names
    owner = compute.entity_hash(probes, view.entity) % np.uint64(passes)
    places, results = [], []
    for turn in range(passes):
        kept = [
            table.filter(pa.array(compute.entity_hash(table, view.entity) % np.uint64(passes) == turn))
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
    windows = [
        window
        for window in view.windows
        if any(
            window_name(name, column, item, window) not in have
            for column, items in view.aggregates.items()
            for item in items
        )
    ]
    aggregates = {
        column: [
            item for item in items if any(window_name(name, column, item, window) not in have for window in windows)
        ]
        for column, items in view.aggregates.items()
    }
    values = {**schema.plain(view), "windows": windows, "aggregates": {k: v for k, v in aggregates.items() if v}}
    return schema.build(ViewConfig, values)  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------------------- recipes


def part_recipes(job: Job, parts: list[Part]) -> dict[str, Recipes]:
    """Month -> column -> recipe: the rule, and the digests of the data that the rule may read from that month.

    The view's name, owner and description are not part of it.
    """
    make = {"windows": _windows_recipes, "asof": _asof_recipes}.get(job.view.kind, _row_recipes)
    return {part.name: found for part, found in zip(parts, make(job, parts), strict=True)}


def _own(job: Job, part: Part, columns: Sequence[str]) -> list[str]:
    return [job.inputs.column(column, part) for column in columns]


def _windows_recipes(job: Job, parts: list[Part]) -> Iterator[Recipes]:
    data, view = job.config.data, job.view
    keys, moments = [data.event_time, *view.entity], known_moments(view, data)
    for part in parts:
        own = _own(job, part, [*view.entity, job.as_of.column])
        recipes = {}
        for column, aggregates in view.aggregates.items():
            values = [] if column == "rows" else [column, *known_anchor(data.columns[column])]
            more = (
                ["known"] if view.by == "known" else []
            )  # nothing for what earlier versions had, which keeps its recipe
            known = None if column == "rows" else data.columns[column].known_at
            for window in view.windows:
                reach = job.inputs.within(*job.inputs.reach(part, job.as_of, view_length(view, window)), moments)
                seen = [[month.name, *_own(job, month, [*keys, *values])] for month in reach]
                for aggregate in aggregates:
                    rule = [
                        FORMAT,
                        "windows",
                        job.as_of,
                        list(view.entity),
                        values[:1],
                        known,
                        aggregate,
                        window,
                        *more,
                    ]
                    recipes[window_name(job.name, column, aggregate, window)] = digest.of_json([rule, own, seen])
        yield recipes


def _asof_recipes(job: Job, parts: list[Part]) -> Iterator[Recipes]:
    data, view = job.config.data, job.view
    spec = data.tables[view.table or ""]
    time = None if spec.static else compute.table_event_time(spec, view)
    months = table_months(job.dataset.table(view.table or ""), time) if time else {}
    spans = {month: month_span(month) for month in months}
    for part in parts:
        own = _own(job, part, [*view.entity, job.as_of.column])
        start, stop = job.inputs.reach(part, job.as_of, view_length(view))
        # The last instant counts: an inclusive view sees the row of exactly that time, even the first of its month.
        seen: Any = [
            [month, value] for month, value in months.items() if spans[month][0] <= stop and start < spans[month][1]
        ]
        if spec.static:
            seen = job.dataset.table_digest(view.table or "")
        rule = [FORMAT, "asof", job.as_of, list(view.entity), list(view.on), view.max_age, view.inclusive, time]
        yield {
            f"{job.name}_{column}": digest.of_json([rule, column, spec.columns[column].known_at, own, seen])
            for column in view.columns
        }


def _row_recipes(job: Job, parts: list[Part]) -> Iterator[Recipes]:
    view, inputs = job.view, view_inputs(job.view, job.config.data, job.as_of.column)
    version = function_version(view.function) if view.kind == "function" else None
    rules: dict[str, Any] = {key: [item.sql, item.type] for key, item in view.expressions.items()} or view.outputs
    for part in parts:
        own = _own(job, part, inputs)
        yield {
            f"{job.name}_{key}": digest.of_json([FORMAT, view.kind, version, rule, inputs, own])
            for key, rule in rules.items()
        }


# --------------------------------------------------------------------------------------------------- what is there


@dataclass(frozen=True)
class Index:
    """Contents of other recipes of a view: whole parts by (month, recipes), and columns by (month, recipe)."""

    files: dict[tuple[str, tuple[tuple[str, str], ...]], tuple[StoredView, dict[str, Any]]]
    columns: dict[tuple[str, str], tuple[StoredView, str]]


def _index(folder: Path) -> Index:
    index = Index({}, {})
    for stored in stored_views(folder):
        if stored.manifest.get("failed_rows"):
            continue
        for entry in stored.manifest["parts"]:
            recipes = tuple((name, item["recipe"]) for name, item in entry["columns"].items())
            index.files.setdefault((entry["name"], recipes), (stored, {**entry, "types": stored.manifest["columns"]}))
            for name, recipe in recipes:
                index.columns.setdefault((entry["name"], recipe), (stored, name))
    return index


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
