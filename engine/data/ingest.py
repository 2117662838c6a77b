"""Raw files to a dataset in the store: declared columns, the query over them, the schema of the result, dataset order.

`<paths.store>/datasets/<name>/<recipe>/` appears as a whole or not at all; equal recipes have equal content.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.dataset

from engine.config import schema as config_schema
from engine.config import units
from engine.config.sections.data import Column, DataConfig, SourceConfig, TableConfig
from engine.config.tree import Config
from engine.data import (
    checks,
    contract,
    order,
    profile,
    quarantine_limit,
    query,
    repeatable,
    rules,
    stage,
    stage_on_workers,
)
from engine.data.bounds import BATCH_ROWS, SMALLEST_BATCH, Bounds
from engine.data.columns import Finding, as_text
from engine.data.dataset import (
    FORMAT,
    MANIFEST,
    PART_ROWS,
    Accounting,
    ColumnEntry,
    Dataset,
    DatasetRecord,
    TableEntry,
    digest_of,
    find_dataset,
    open_dataset,
    row_ids,
)
from engine.data.expressions import expression_columns
from engine.data.files import COMPRESSIONS, SourceFile, event_source, resolve, source_files
from engine.data.readers import lake_tables
from engine.data.row_origins import Origin, compare
from engine.data.stage import Staged
from engine.data.violations import EQUAL, Tally, apply, place_of, quarantine
from engine.data.write import Written, canonical, write_parts
from engine.errors import UserError, nearest
from engine.runtime import digest, environment, records, remote, seal, storage
from engine.runtime.remote import address
from engine.runtime.run import Run

RECIPE_FORMAT = 1
LATEST = "latest.json"


class RepeatedIdsError(UserError):
    """Rows that share their ids: what is so (`fact`), and what to do about it where `data.duplicates` may be set."""

    def __init__(self, fact: str, advice: str) -> None:
        super().__init__(fact + advice)
        self.fact = fact


class Latest(TypedDict):
    """latest.json: the dataset that was ingested last under a name."""

    recipe: str
    entry: str
    digest: records.Digest


def newest_dataset(folder: Path) -> Dataset | None:
    """The dataset of a name's folder that was ingested last; None without any. Raises UserError for a damaged one."""
    path = folder / LATEST
    return open_dataset(storage.inside(folder, seal.read_checked(path, Latest)["entry"])) if path.exists() else None


@dataclasses.dataclass(frozen=True)
class IngestPlan:
    """What is to be made: the files of every source, the recipe, and where things go."""

    config: Config
    files: list[SourceFile]
    recipe: str
    folder: Path
    memory: int
    threads: int

    @property
    def data(self) -> DataConfig:
        """The data section of the config."""
        return self.config.data

    @property
    def entry(self) -> Path:
        """Folder of the dataset."""
        return self.folder / self.recipe[:16]

    @property
    def staged(self) -> Path:
        """Folder of staged source files."""
        return self.folder / ".staged"


def ingest(config: Config, run: Run) -> dict[str, float]:
    """Make the dataset of `config.data`, whether or not the store has it. Returns what was counted and measured."""
    began = time.monotonic()
    plan = make_plan(config, run)
    with _alone(plan, run), _plain_allocator():
        built = _build(plan, run)
    dataset = open_dataset(plan.entry)
    _record(dataset, run)
    seconds = time.monotonic() - began
    totals = dataset.manifest["accounting"]
    return {
        "ingest/rows": float(dataset.rows),
        "ingest/rows_in": float(totals["rows_in"]),
        "ingest/quarantined": float(totals["quarantined"]),
        "ingest/refused_files": float(totals["refused_files"]),
        "ingest/files": float(len(plan.files)),
        "ingest/files_reused": float(sum(item.reused for item in built)),
        "ingest/seconds": seconds,
        "ingest/rows_per_second": dataset.rows / max(seconds, 1e-9),
    }


def ensure(config: Config, run: Run, *, empty: bool = False) -> Dataset:
    """The dataset of `config.data`: from the store where its recipe is there, else ingested now; or the snapshot named.

    Raises UserError for one without rows, unless it may be `empty`, as what is scored may.
    """
    if config.split.snapshot:
        return _snapshot(config, run)
    plan = make_plan(config, run)
    if not _is_stored(plan, run):
        with _alone(plan, run), _plain_allocator():
            if not _is_stored(plan, run):
                _build(plan, run, empty=empty)
    dataset = open_dataset(plan.entry)
    if not empty:
        contract.check_rows(dataset.manifest)
    _record(dataset, run)
    return dataset


def _is_stored(plan: IngestPlan, run: Run) -> bool:
    """Whether the store has an entry of the recipe that can be opened; of one that is damaged the run says so."""
    if not plan.entry.exists():
        return False
    try:
        open_dataset(plan.entry)
    except UserError as error:
        run.warn(f"{error}. It is made again")
        return False
    return True


def _snapshot(config: Config, run: Run) -> Dataset:
    """The stored dataset of split.snapshot, whatever the sources hold by now. Raises UserError when there is none."""
    folder = storage.inside(Path(config.paths.store), "datasets", config.data.name or config.name)
    found = find_dataset(folder, config.split.snapshot or "", "split.snapshot")
    run.link("inputs", found.recipe)
    _record(found, run)
    return found


def _record(dataset: Dataset, run: Run) -> None:
    run.link("dataset", dataset.digest)
    run.add_output("dataset", dataset.digest)


def make_plan(config: Config, run: Run) -> IngestPlan:
    """Find and hash the inputs, derive the recipe, and record both in the run. Raises UserError before anything is read."""
    data = config.data
    if not data.columns:
        raise UserError(
            "data.columns must declare the event table: choose a dataset with +experiment=NAME or +data=NAME"
        )
    check_schema(data)
    folder = storage.inside(Path(config.paths.store), "datasets", data.name or config.name)
    remote.record(Path(config.paths.store), *remote.of_data(config_schema.plain(data)).values())
    files = [file for name, source in data.sources.items() for file in _files(name, source, data, folder / ".remote")]
    identities: dict[str, list[Any]] = {name: [] for name in data.sources}
    for file in files:
        identities[file.source].append(file.identity)
    spec = contents_of(data)
    asked: list[Any] = [RECIPE_FORMAT, FORMAT, stage.FORMAT, spec, identities, _named(files, data)]
    if any(_ordered(data, sql, where) for where, sql in _queries(data)):
        asked.append("sources in order")
    recipe = digest.of_json(asked)
    run.add_inputs({file.shown: file.digest for file in files})
    run.link("inputs", digest.of_json(identities))
    memory = units.size(config.resources.memory)
    return IngestPlan(config, files, recipe, folder, memory, environment.threads_of(config))


def contents_of(data: DataConfig) -> dict[str, Any]:
    """The plain specification without what decides no value of the dataset."""
    plain = config_schema.plain(data)
    return {name: item for name, item in plain.items() if name not in ("path", "positive")}


def _files(name: str, source: SourceConfig, data: DataConfig, cache: Path) -> list[SourceFile]:
    if source.format in lake_tables.LIBRARIES:
        return [lake_tables.table_file(name, source, resolve(source.path, data.path))]
    return source_files(name, source, data, cache)


def _named(files: list[SourceFile], data: DataConfig) -> list[list[str]]:
    """Names of files count where a source makes a column of them."""
    named = {
        name
        for name, source in data.sources.items()
        if any(column.path == "$file" for column in source.columns.values())
    }
    return [[file.source, file.path.name] for file in files if file.source in named]


def check_schema(data: DataConfig) -> None:
    """Every type, bound and reference of the schema means something. Raises UserError."""
    for name, source in data.sources.items():
        _check_source(name, source)
    for columns in (data.columns, *(table.columns for table in data.tables.values())):
        _check_bounds(columns, data.time_zone)
    known = data.known_time
    if known is not None and known not in data.columns:
        raise UserError(f"data.known_time names {known!r}, which is no column.{nearest(known, data.columns)}")
    for name, table in data.tables.items():
        if table.query is None and name not in data.sources:
            raise UserError(f"data.tables.{name} must have a query, or data.sources a source of that name")
    for where, sql in _queries(data):
        _ordered(data, sql, where)
    for name, rule in data.rules.items():
        expression_columns(rule.holds, f"data.rules.{name}")
    if data.query is None:
        event_source(data)


def _queries(data: DataConfig) -> Iterator[tuple[str, str]]:
    """(config key, SQL) of the events and of each side table that has a query."""
    found = {
        "data.query": data.query,
        **{f"data.tables.{name}.query": item.query for name, item in data.tables.items()},
    }
    yield from ((where, sql) for where, sql in found.items() if sql is not None)


def _ordered(data: DataConfig, sql: str, where: str) -> frozenset[str]:
    """Sources that a query must see in order. Raises UserError where its rows may differ from run to run."""
    return repeatable.check(sql, {name: tuple(source.columns) for name, source in data.sources.items()}, where)


def _check_source(name: str, source: SourceConfig) -> None:
    stage.schema_of({column: item.type for column, item in source.columns.items()})
    for column, item in source.columns.items():
        if item.path in ("$file", "$row") and item.type not in ("string", "int64"):
            raise UserError(f"data.sources.{name}.columns.{column}: {item.path} must be string or int64")
    for option in (source.csv.delimiter, source.csv.quote or "x", source.csv.decimal):
        if len(option) != 1 or not option.isascii():
            where = f"data.sources.{name}.csv"
            raise UserError(f"{where}: delimiter, quote and decimal must be one ASCII character, found {option!r}")


def _check_bounds(columns: dict[str, Column], zone: str) -> None:
    kinds = checks.schema(columns)
    for name, column in columns.items():
        for value in (column.min, column.max):
            if value is not None:
                checks.bound(value, kinds.field(name).type, zone)


# ---------------------------------------------------------------------------------------------------------- build


@contextlib.contextmanager
def _plain_allocator() -> Iterator[None]:
    """Arrow memory from malloc while rows stream through: Arrow's default gives pages back and faults them in again,
    which took a quarter of the CPU time of an ingest of 10 M rows.
    """
    usual = pa.default_memory_pool()
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        yield
    finally:
        pa.set_memory_pool(usual)


@contextlib.contextmanager
def _alone(plan: IngestPlan, run: Run) -> Iterator[None]:
    """One ingest of a dataset at a time; what a killed one left half-written is removed."""
    with storage.disk_errors(plan.folder):
        storage.make_folder(plan.folder)
        lock = open(plan.folder / ".lock", "w", encoding="utf-8")
    with lock:
        if not storage.lock(lock, plan.folder, wait=False):
            run.log(f"another ingest of {plan.data.name} is running: waiting for it")
            storage.lock(lock, plan.folder)
        for leftover in plan.folder.glob(".*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        for leftover in plan.staged.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        yield


def _build(plan: IngestPlan, run: Run, *, empty: bool = False) -> list[Staged]:
    """Stage, query, check, order, write, publish."""
    staged = stage_files(plan, run)
    tallies = [item.tally for item in staged]
    with storage.atomic_directory(plan.entry) as folder, storage.disk_errors(plan.entry), _evidence(tallies, run):
        _check_budget(plan, tallies)
        tables = _side_tables(plan, staged, folder, tallies)
        spool, origin = _events(plan, staged, tables, folder, tallies)
        try:
            written = _write(plan, spool, origin, tallies, folder, run)
        finally:
            spool.close()
        manifest = _manifest(plan, staged, tallies, tables, written)
        manifest["spec"] = run.masked(manifest["spec"])  # as composed, it may hold what the config only refers to
        contract.check(plan.data, manifest, written.counts, _previous(plan), empty=empty)
        _write_beside(plan, folder, manifest, tallies, tables, written)
        _make_room(plan, manifest)
    storage.write_json(
        plan.folder / LATEST,
        seal.checked({"recipe": plan.recipe, "entry": plan.entry.name, "digest": manifest["digest"]}),
    )
    _forget_stale(plan)
    _report(manifest, run)
    return staged


def _write(
    plan: IngestPlan, spool: order.Spool, origin: Origin, tallies: list[Tally], folder: Path, run: Run
) -> Written:
    """The events in order. Ids that hold the event time are seen to be unique while they are ordered, others before."""
    data = plan.data
    early = data.duplicates != "fail" or data.event_time not in data.ids
    drop = _drop_duplicates(data, spool, origin, tallies[-1]) if early else np.zeros(0, np.int64)
    _check_budget(plan, tallies)
    rows = spool.rows - len(drop)
    with run.progress(f"{data.name}: write", total=rows) as progress:
        try:
            segments = spool.segments(PART_ROWS, drop)
            return write_parts(
                segments,
                rows,
                checks.schema(data.columns),
                data.event_time,
                folder,
                plan.threads,
                plan.memory,
                progress.advance,
            )
        except order.DuplicateIdsError:
            _drop_duplicates(data, spool, origin, tallies[-1])
            raise AssertionError("ids that are equal in order must be found equal by hash") from None


def stage_files(plan: IngestPlan, run: Run) -> list[Staged]:
    """Every source file read, typed and checked; files in parallel, or the pieces of the only one."""
    many = len(plan.files) > len(plan.data.sources)
    with run.progress(f"{plan.data.name}: read") as progress:
        ready = _spread(plan, progress.advance)

        def one(place: int) -> Staged:
            if place in ready:
                return ready[place]
            file = plan.files[place]
            # On disk where other files may join it later: an append then reads the new ones only.
            room = 0 if _may_have_siblings(file, plan.data) else plan.memory // 4
            threads = 1 if many else plan.threads
            bounds = Bounds.of(plan.memory, plan.threads if many else 1)
            return stage.stage(file, plan.data, threads, plan.staged, progress.advance, room=room, bounds=bounds)

        if not many:
            return [one(place) for place in range(len(plan.files))]
        with ThreadPoolExecutor(plan.threads) as pool:
            futures = [pool.submit(one, place) for place in range(len(plan.files))]
            try:
                return [future.result() for future in futures]
            except BaseException:
                for future in futures:
                    future.cancel()
                raise


def _spread(plan: IngestPlan, advance: Callable[[int], None]) -> dict[int, Staged]:
    """Place of a file -> its staged form, found in the store or made by the workers of the cluster; empty without a
    cluster. A single file that is not there yet is left to this process.
    """
    if plan.config.cluster.kind != "ray":
        return {}
    places = [
        place
        for place, file in enumerate(plan.files)
        if file.format not in lake_tables.LIBRARIES and _on_disk(file, plan)
    ]
    with ThreadPoolExecutor(plan.threads) as threads:
        loaded = list(threads.map(lambda place: stage.load(plan.files[place], plan.data, plan.staged), places))
    ready = {place: found for place, found in zip(places, loaded, strict=True) if found is not None}
    advance(sum(found.tally.rows for found in ready.values()))
    lacking = [place for place in places if place not in ready]
    if len(lacking) > 1:
        made = stage_on_workers.stage_files(plan.config, [plan.files[place] for place in lacking], plan.staged, advance)
        ready |= zip(lacking, made, strict=True)
    return ready


def _on_disk(file: SourceFile, plan: IngestPlan) -> bool:
    """Whether the file's rows will be kept in the store: where other files may join it later, or memory may be short."""
    return _may_have_siblings(file, plan.data) or file.size * _growth(file) > plan.memory // 4


def _may_have_siblings(file: SourceFile, data: DataConfig) -> bool:
    path = address(data.sources[file.source].path, data.path)
    if file.format in lake_tables.LIBRARIES:
        return False
    return file.shown != (path.rstrip("/") if path.startswith("s3://") else str(resolve(path, data.path)))


def _growth(file: SourceFile) -> int:
    """Memory that a byte of the file may need."""
    dense = file.format in ("parquet", *lake_tables.LIBRARIES) or file.path.suffix in COMPRESSIONS
    return 12 if dense else 2


def _check_budget(plan: IngestPlan, tallies: list[Tally]) -> None:
    """Stop when more rows of a part were quarantined than allowed."""
    for part in sorted({tally.part for tally in tallies}):
        excess = quarantine_limit.excess(plan.data, [tally for tally in tallies if tally.part == part], plan.files)
        if excess:
            raise UserError(f"{part}: {excess}")


@contextlib.contextmanager
def _evidence(tallies: list[Tally], run: Run) -> Iterator[None]:
    """An ingest that stops leaves the rows that it had set aside in the run directory, and says where."""
    try:
        yield
    except UserError as error:
        records = quarantine(tallies)
        if records.num_rows:
            path = run.path("quarantine.parquet")
            storage.write_parquet(path, records)
            error.args = (f"{error}. The {records.num_rows:,} records of what is wrong stand in {path}",)
        raise


# --------------------------------------------------------------------------------------------- tables and events


def _sources(plan: IngestPlan, staged: list[Staged]) -> dict[str, Any]:
    """Each source as DuckDB is to see it: a table in memory, or a dataset over staged files where it would not fit."""
    found: dict[str, Any] = {}
    for name, source in plan.data.sources.items():
        mine = [item for item in staged if item.file.source == name and item.refused is None]
        schema = stage.schema_of({column: item.type for column, item in source.columns.items()})
        size = sum(item.bytes for item in mine if item.path)
        if size > plan.memory // 4 and all(item.path for item in mine):
            found[name] = pyarrow.dataset.dataset([str(item.path) for item in mine], schema=schema, format="ipc")
        else:
            found[name] = pa.concat_tables(
                [schema.empty_table(), *(table.cast(schema) for table in _together(mine, plan))]
            )
    return found


def _side_tables(plan: IngestPlan, staged: list[Staged], folder: Path, tallies: list[Tally]) -> dict[str, pa.Table]:
    """Side tables by name, checked and in canonical order; how their rows are accounted for is added to `tallies`."""
    tables = {}
    for name, table in plan.data.tables.items():
        where = f"data.tables.{name}"
        columns = table.columns
        tally = Tally(f"table {name}")
        tallies.append(tally)
        pieces = [checks.schema(columns).empty_table()]
        for batch in _rows(plan, staged, folder, table.query, name, where):
            typed, findings = checks.conform(batch, columns, plan.data.time_zone, where, f"{where}.columns")
            findings += checks.find(typed, columns, plan.data.time_zone, findings, f"{where}.columns")
            pieces.append(apply(typed, findings, tally, _locate(typed, columns))[0])
        tally.check()
        tables[name] = canonical(pa.concat_tables(pieces), _keys(columns))
        _check_unique(name, table, tables[name])
    return tables


def _keys(columns: dict[str, Column]) -> list[str]:
    times = [name for name, column in columns.items() if column.role == "event_time"]
    return [*times, *(name for name, column in columns.items() if column.identifies and column.role != "event_time")]


def _check_unique(name: str, table: TableConfig, rows: pa.Table) -> None:
    """The ids of a side table occur once each. `rows` are in order of them."""
    ids = _keys(table.columns)
    # An event time alone is no key: without declared ids a table may hold many rows of one instant.
    if not any(column.identifies for column in table.columns.values()):
        return
    again = np.flatnonzero(order.equal_neighbours(rows.select(ids), ids))
    if not len(again):
        return
    sensitive = {column for column, item in table.columns.items() if item.sensitive}
    rest = [column for column in table.columns if column not in ids]
    found = compare(rows.take(pa.array(again)), rows.take(pa.array(again + 1)), rest, sensitive)
    differing = [place for place, (reason, _) in enumerate(found) if reason != EQUAL]
    first = (differing or [0])[0]
    example = ", ".join(
        f"{column} {'(sensitive)' if column in sensitive else as_text(rows.column(column)[int(again[first])])}"
        for column in ids
    )
    if differing:
        which = f"which differ in {found[first][1]}; name more id columns, or let a query choose one row"
    else:
        sql = f"SELECT DISTINCT * FROM ({table.query})" if table.query else f'SELECT DISTINCT * FROM "{name}"'
        which = f"all of them equal in every column: set {config_schema.word(f'data.tables.{name}.query', sql)}"
    raise UserError(
        f"data.tables.{name}: {', '.join(ids)} must be unique, found {len(again):,} rows too many, as for {example}, {which}"
    )


def _locate(table: pa.Table, columns: dict[str, Column]) -> Callable[[np.ndarray], list[dict[str, Any]]]:
    ids = [name for name, column in columns.items() if column.identifies and not column.sensitive]
    ids = (
        ids
        or [
            name
            for name, column in columns.items()
            if not column.sensitive and not column.type.startswith(("list", "map"))
        ][:3]
    )

    def locate(positions: np.ndarray) -> list[dict[str, Any]]:
        if not ids:
            return [{"row_id": None} for _ in positions]
        return [{"row_id": text} for text in row_ids(table.select(ids).take(pa.array(positions)), ids).to_pylist()]

    return locate


def _batch_rows(plan: IngestPlan, staged: list[Staged]) -> int:
    """Rows of a query's result that are taken at once: those of the longest source fill a batch."""
    longest = max((item.bytes / item.tally.kept for item in staged if item.tally.kept), default=0.0)
    return max(int(min(Bounds.of(plan.memory).batch / max(longest, 1.0), BATCH_ROWS)), 1)


def _rows(
    plan: IngestPlan, staged: list[Staged], folder: Path, sql: str | None, source: str, where: str
) -> Iterator[pa.Table]:
    """Rows of a query over the sources, or of one source as it is."""
    if sql is None:
        yield from _together([item for item in staged if item.file.source == source and item.refused is None], plan)
        return
    spill, where = folder / ".duckdb", f"{where}.query"
    with query.connect(memory=plan.memory // 2, spill=spill) as connection:
        query.register(connection, _sources(plan, staged), _ordered(plan.data, sql, where))
        limit = units.span(plan.config.resources.query) / 1e6
        yield from query.run(connection, sql, where, _batch_rows(plan, staged), plan.data.sensitive, limit)
    shutil.rmtree(spill, ignore_errors=True)


def _together(staged: list[Staged], plan: IngestPlan) -> Iterator[pa.Table]:
    """The kept rows of files in order; those of small files in one table, for a table costs more than its rows do."""
    held: list[pa.Table] = []
    size, enough = 0, min(SMALLEST_BATCH, plan.memory // 32)
    for item in staged:
        for table in item.read():
            held.append(table)
            size += table.nbytes
            if size > enough:
                yield pa.concat_tables(held).combine_chunks() if len(held) > 1 else held[0]
                held, size = [], 0
    if held:
        yield pa.concat_tables(held).combine_chunks()


def _events(
    plan: IngestPlan, staged: list[Staged], tables: dict[str, pa.Table], folder: Path, tallies: list[Tally]
) -> tuple[order.Spool, Origin]:
    """The event table, typed and checked, on its way into order, and where its rows come from; its tally is added to
    `tallies`.
    """
    data = plan.data
    tally = Tally("events")
    tallies.append(tally)
    spool = order.Spool(checks.schema(data.columns), data.event_time, data.ids, folder, plan.memory // 4)
    source = "" if data.query is not None else event_source(data)
    origin = Origin([item for item in staged if item.file.source == source and item.refused is None])
    for batch in _rows(plan, staged, folder, data.query, source, "data"):
        typed, findings = checks.conform(
            batch, data.columns, data.time_zone, "data.query" if data.query else f"source {source}"
        )
        if data.query is not None:
            findings += _checked(typed, data, findings)
        findings += checks.find_orphans(typed, data.columns, tables)
        kept, mask = apply(typed, findings, tally, _locate(typed, data.columns))
        origin.passed(typed.num_rows, mask)
        spool.add(kept)
    tally.check()
    return spool, origin


def _checked(typed: pa.Table, data: DataConfig, findings: list[Finding]) -> list[Finding]:
    found = checks.find(typed, data.columns, data.time_zone, findings)
    return found + rules.find(typed, data.rules, [*findings, *found], data.sensitive)


def _drop_duplicates(data: DataConfig, spool: order.Spool, origin: Origin, tally: Tally) -> np.ndarray:
    """Row numbers to leave out so that every id occurs once, by policy. Raises UserError where that is `fail`."""
    duplicates = spool.duplicates()
    if duplicates is None:
        return np.zeros(0, np.int64)
    keep = "first" if data.duplicates == "fail" else data.duplicates
    lost, kept = order.losers(duplicates, data.ids, data.known_time or data.event_time, keep)
    sensitive = {name for name, column in data.columns.items() if column.sensitive}
    numbers = np.asarray(lost.column("$number"))
    compared = compare(lost, kept, [name for name in data.columns if name not in data.ids], sensitive)
    places = zip(
        origin.places(numbers), origin.places(np.asarray(kept.column("$number"))),
        _locate(lost, data.columns)(np.arange(lost.num_rows)), compared, strict=True,
    )  # fmt: skip
    records = [
        {
            **place, **ids, "kept_file": kept_place.get("file"), "kept_row": kept_place.get("row"), "value": differing,
            "part": tally.part, "column": ", ".join(data.ids), "reason": reason, "policy": "quarantine",
        }
        for place, kept_place, ids, (reason, differing) in places
    ]  # fmt: skip
    if data.duplicates == "fail":
        _refuse_duplicates(data, records, duplicates.num_rows)
    tally.kept -= len(numbers)
    tally.quarantined += len(numbers)
    tally.counts.update((record["column"], record["reason"], "quarantine") for record in records)
    tally.note(records)
    tally.check()
    return np.sort(numbers)


def _refuse_duplicates(data: DataConfig, records: list[dict[str, Any]], rows: int) -> None:
    """Raises UserError with the first pair of rows of one id, one that differs where there is one."""
    differing = [record for record in records if record["reason"] != EQUAL]
    first = (differing or records)[0]
    hidden = any(data.columns[name].sensitive for name in data.ids)
    shown = "" if hidden else f", as {first['row_id']!r}"
    where = f" in {first['kept_file']}, row {first['kept_row']}, and {place_of(first, '')}" if first.get("file") else ""
    which = f"which differ in {first['value']}" if first in differing else "which are equal in every column"
    ways = ["name more id columns"] if len(differing) == len(records) else []
    raise RepeatedIdsError(
        f"the id columns {', '.join(data.ids)} must be unique, found {rows:,} rows that share one{shown}{where}, {which}",
        f"; {', or '.join([*ways, 'set data.duplicates=first or data.duplicates=last'])}",
    )


# -------------------------------------------------------------------------------------------------------- publish


def _manifest(
    plan: IngestPlan, staged: list[Staged], tallies: list[Tally], tables: dict[str, pa.Table], written: Written
) -> DatasetRecord:
    data = plan.data
    side = {name: _table_entry(name, table, data.tables[name]) for name, table in tables.items()}
    digests = list(written.column_digests.items())
    columns: list[ColumnEntry] = [
        {
            "name": name,
            "type": column.type,
            "role": column.role,
            "known_at": column.known_at,
            "digest": written.column_digests[name],
        }
        for name, column in data.columns.items()
    ]
    spec = contents_of(data)
    return {
        "format": FORMAT,
        "name": plan.folder.name,
        "recipe": plan.recipe,
        "digest": digest_of(written.rows, digests, {name: entry["digest"] for name, entry in side.items()}),
        "rows": written.rows,
        "event_time": data.event_time,
        "ids": data.ids,
        "time_zone": data.time_zone,
        "columns": columns,
        "parts": written.parts,
        "tables": side,
        "accounting": _accounting(staged, tallies),
        "null_counts": {name: entry["nulls"] for name, entry in written.counts.items()},
        "spec": spec,
    }


def _table_entry(name: str, table: pa.Table, config: TableConfig) -> TableEntry:
    values = digest.TableDigest(table.schema)
    values.update(table)
    columns: list[ColumnEntry] = [
        {"name": column, "type": item.type, "role": item.role, "known_at": item.known_at}
        for column, item in config.columns.items()
    ]
    return {
        "file": f"tables/{name}.parquet", "rows": table.num_rows, "digest": values.hexdigest(), "static": config.static,
        "columns": columns,
    }  # fmt: skip


def _accounting(staged: list[Staged], tallies: list[Tally]) -> Accounting:
    sources = [item.tally for item in staged]
    results = tallies[len(sources) :]
    for tally in tallies:
        tally.check()
    return {
        "rows_in": sum(tally.rows for tally in sources),
        "kept": sum(tally.kept for tally in sources),
        "quarantined": sum(tally.quarantined for tally in tallies),
        "refused_files": sum(item.refused is not None for item in staged),
        "files": [item.report() for item in staged],
        "results": {tally.part: tally.as_json() for tally in results},
    }


def _previous(plan: IngestPlan) -> DatasetRecord | None:
    """Manifest of the dataset that was ingested last under this name, unless it is this very recipe."""
    with contextlib.suppress(UserError):
        latest = seal.read_checked(plan.folder / LATEST, Latest)
        if latest["recipe"] != plan.recipe:
            return open_dataset(plan.folder / latest["entry"]).manifest
    return None


def _write_beside(
    plan: IngestPlan,
    folder: Path,
    manifest: DatasetRecord,
    tallies: list[Tally],
    tables: dict[str, pa.Table],
    written: Written,
) -> None:
    """Side tables, quarantine, profile, and the manifest last."""
    for name, table in tables.items():
        storage.write_parquet(folder / "tables" / f"{name}.parquet", table)
    storage.write_parquet(folder / "quarantine" / "quarantine.parquet", quarantine(tallies))
    sensitive = {name for name, column in plan.data.columns.items() if column.sensitive}
    storage.write_json(
        folder / "profile.json", profile.profile(written.rows, written.counts, written.sample, sensitive)
    )
    storage.write_json(folder / MANIFEST, manifest)
    seal.write(folder)


def _make_room(plan: IngestPlan, manifest: DatasetRecord) -> None:
    """An entry of this recipe that is whole stays (readers may hold it); one that is damaged goes."""
    if not plan.entry.exists():
        return
    with contextlib.suppress(UserError):
        standing = open_dataset(plan.entry)
        if standing.digest == manifest["digest"] and not any(standing.seal.damaged(plan.entry)):
            return
    aside = plan.entry.with_name(f".{plan.entry.name}.{os.getpid()}.tmp")
    plan.entry.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _forget_stale(plan: IngestPlan) -> None:
    """Staged files that the newest ingest did not use."""
    wanted = stage.names(plan.files, plan.data)
    for path in plan.staged.glob("*") if plan.staged.is_dir() else ():
        if path.name.split(".")[0] not in wanted:
            path.unlink(missing_ok=True)


def _report(manifest: DatasetRecord, run: Run) -> None:
    totals = manifest["accounting"]
    run.log(
        f"{manifest['name']}: {manifest['rows']:,} rows from {len(totals['files'])} files, "
        f"{totals['quarantined']:,} quarantined, {totals['refused_files']} files refused, digest {manifest['digest'][:12]}"
    )
    for item in totals["files"]:
        if item["refused"]:
            run.warn(f"refused: {item['refused']}")
        for kind in ("missing", "unexpected", "renamed"):
            if item.get(kind):
                run.warn(f"{item['file']}: {kind} columns {', '.join(map(repr, item[kind]))}")
    for part, tally in [(item["file"], item) for item in totals["files"]] + list(totals["results"].items()):
        for found in tally["violations"]:
            where = f"column {found['column']}" if found["column"] else "the row"
            run.warn(f"{part}: {where} {found['reason']}: {found['count']:,} rows, policy {found['policy']}")
