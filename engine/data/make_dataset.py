"""Raw files to a dataset in the store: declared columns, the query over them, the schema of the result, dataset order.

`<paths.store>/datasets/<name>/<recipe>/` appears as a whole or not at all; equal recipes have equal content.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset

from engine.config.sections.data import PLACE, DataConfig
from engine.config.tree import Config
from engine.data import column_checks, contract, order, profile, quarantine_limit, query, rules, stage
from engine.data.bounds import BATCH_ROWS, SMALLEST_BATCH, Bounds
from engine.data.columns import Finding
from engine.data.dataset import (
    FORMAT,
    LATEST,
    MANIFEST,
    PART_ROWS,
    Accounting,
    ColumnEntry,
    Dataset,
    DatasetRecord,
    Latest,
    digest_of,
    find_dataset,
    open_dataset,
)
from engine.data.duplicates import drop_duplicates
from engine.data.files import event_source
from engine.data.ingest_plan import IngestPlan, contents_of, make_plan, ordered
from engine.data.places import with_places
from engine.data.quarantine import Tally, apply, quarantine
from engine.data.row_origins import Origin, locate
from engine.data.side_tables import check_unique, key_columns, table_entry
from engine.data.stage import Staged
from engine.data.stage_sources import stage_files
from engine.data.write import Written, canonical, write_parts
from engine.errors import UserError
from engine.runtime import seal, storage
from engine.runtime.run import Run


def ensure_dataset(config: Config, run: Run, *, empty: bool = False) -> Dataset:
    """The dataset of `config.data`: from the store if its recipe is there, else ingested now; or the dataset of
    split.snapshot.

    Raises UserError for a dataset without rows unless it may be `empty`, as rows to score may.
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


def make_anew(plan: IngestPlan, run: Run) -> tuple[Dataset, list[Staged]]:
    """The dataset of a plan, made even if the store has it, and the staged files that it was made from."""
    with _alone(plan, run), _plain_allocator():
        staged = _build(plan, run)
    dataset = open_dataset(plan.entry)
    _record(dataset, run)
    return dataset, staged


def _is_stored(plan: IngestPlan, run: Run) -> bool:
    """Whether the store has an entry of the recipe that can be opened; warns of a damaged one."""
    if not plan.entry.exists():
        return False
    try:
        open_dataset(plan.entry)
    except UserError as error:
        run.warn(f"{error}. It is made again")
        return False
    return True


def _snapshot(config: Config, run: Run) -> Dataset:
    """The stored dataset of split.snapshot, even if the sources have changed since. Raises UserError if there is none."""
    folder = storage.inside(Path(config.paths.store), "datasets", config.data.name or config.name)
    found = find_dataset(folder, config.split.snapshot or "", "split.snapshot")
    run.link("inputs", found.recipe)
    _record(found, run)
    return found


def _record(dataset: Dataset, run: Run) -> None:
    run.link("dataset", dataset.digest)
    run.add_output("dataset", dataset.digest)


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
    """One ingest of a dataset at a time; half-written files of a killed one are removed."""
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
    """Write the events in order. Ids that include the event time are checked for uniqueness in that pass, others before it."""
    data = plan.data
    early = data.duplicates != "fail" or data.event_time not in data.ids
    drop = drop_duplicates(data, spool, origin, tallies[-1]) if early else np.zeros(0, np.int64)
    _check_budget(plan, tallies)
    rows = spool.rows - len(drop)
    with run.progress(f"{data.name}: write", total=rows) as progress:
        try:
            segments = spool.segments(PART_ROWS, drop)
            return write_parts(
                segments,
                rows,
                column_checks.schema(data.columns),
                data.event_time,
                folder,
                plan.threads,
                plan.memory,
                progress.advance,
            )
        except order.DuplicateIdsError:
            drop_duplicates(data, spool, origin, tallies[-1])
            raise AssertionError("ids that are equal in order must be found equal by hash") from None


def _check_budget(plan: IngestPlan, tallies: list[Tally]) -> None:
    """Stop when more rows of a part were quarantined than allowed."""
    for part in sorted({tally.part for tally in tallies}):
        excess = quarantine_limit.excess(plan.data, [tally for tally in tallies if tally.part == part], plan.files)
        if excess:
            raise UserError(f"{part}: {excess}")


@contextlib.contextmanager
def _evidence(tallies: list[Tally], run: Run) -> Iterator[None]:
    """If the ingest fails, keep the records of rows set aside so far in the run directory, and name the file in the error."""
    try:
        yield
    except UserError as error:
        records = quarantine(tallies)
        if records.num_rows:
            path = run.path("quarantine.parquet")
            storage.write_parquet(path, records)
            error.args = (f"{error}. The {records.num_rows:,} records of violations are stored in {path}",)
        raise


# --------------------------------------------------------------------------------------------- tables and events


def _sources(plan: IngestPlan, staged: list[Staged]) -> dict[str, pa.Table | pyarrow.dataset.Dataset]:
    """Each source for DuckDB: a table in memory, or a dataset over staged files if it would not fit."""
    found: dict[str, pa.Table | pyarrow.dataset.Dataset] = {}
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
    """Side tables by name, checked and in canonical order; their tallies are added to `tallies`."""
    tables = {}
    for name, table in plan.data.tables.items():
        where = f"data.tables.{name}"
        columns = table.columns
        tally = Tally(f"table {name}")
        tallies.append(tally)
        pieces = [column_checks.schema(columns).empty_table()]
        for batch in _rows(plan, staged, folder, table.query, name, where):
            typed, findings = column_checks.conform(batch, columns, plan.data.time_zone, where, f"{where}.columns")
            findings += column_checks.find(typed, columns, plan.data.time_zone, findings, f"{where}.columns")
            pieces.append(apply(typed, findings, tally, locate(typed, columns))[0])
        tally.check()
        tables[name] = canonical(pa.concat_tables(pieces), key_columns(columns))
        check_unique(name, table, tables[name])
    return tables


def _batch_rows(plan: IngestPlan, staged: list[Staged]) -> int:
    """Rows per batch of a query's result: as many as fill a batch if they are as long as those of the longest source."""
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
        query.register(connection, _sources(plan, staged), ordered(plan.data, sql, where))
        limit = plan.config.resources.query.seconds
        yield from query.run(connection, sql, where, _batch_rows(plan, staged), plan.data.sensitive, limit)
    shutil.rmtree(spill, ignore_errors=True)


def _together(staged: list[Staged], plan: IngestPlan) -> Iterator[pa.Table]:
    """The kept rows of files in order; small files share a table, because a table costs more than a few rows."""
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
    """The spool of the typed and checked event table, and the origin of its rows; the tally is added to `tallies`."""
    data = plan.data
    tally = Tally("events")
    tallies.append(tally)
    spool = order.Spool(column_checks.schema(data.columns), data.event_time, data.ids, folder, plan.memory // 4)
    source = "" if data.query is not None else event_source(data)
    given = {name: column for name, column in data.columns.items() if name != PLACE}
    origin = Origin([item for item in staged if item.file.source == source and item.refused is None])
    for batch in _rows(plan, staged, folder, data.query, source, "data"):
        typed, findings = column_checks.conform(
            batch, given, data.time_zone, "data.query" if data.query else f"source {source}"
        )
        typed = with_places(typed, data).select(list(data.columns))
        if data.query is not None:
            findings += _checked(typed, data, findings)
        findings += column_checks.find_orphans(typed, data.columns, tables)
        kept, mask = apply(typed, findings, tally, locate(typed, data.columns))
        origin.passed(typed.num_rows, mask)
        spool.add(kept)
    tally.check()
    return spool, origin


def _checked(typed: pa.Table, data: DataConfig, findings: list[Finding]) -> list[Finding]:
    found = column_checks.find(typed, data.columns, data.time_zone, findings)
    return found + rules.find(typed, data.rules, [*findings, *found], data.sensitive)


# -------------------------------------------------------------------------------------------------------- publish


def _manifest(
    plan: IngestPlan, staged: list[Staged], tallies: list[Tally], tables: dict[str, pa.Table], written: Written
) -> DatasetRecord:
    data = plan.data
    side = {name: table_entry(name, table, data.tables[name]) for name, table in tables.items()}
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
    """Manifest of the dataset that was ingested last under this name, unless it has this recipe."""
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
    """Remove a stored entry of this recipe if it is damaged; a whole one stays, because readers may use it."""
    if not plan.entry.exists():
        return
    with contextlib.suppress(UserError):
        standing = open_dataset(plan.entry)
        if standing.digest == manifest["digest"] and not any(standing.seal.damaged(plan.entry)):
            return
    storage.remove(plan.entry, plan.folder.parent)


def _forget_stale(plan: IngestPlan) -> None:
    """Delete staged files that the newest ingest did not use."""
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
