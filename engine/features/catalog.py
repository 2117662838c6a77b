"""The catalog of views: versions, owners, input columns, the models that use them, and versions that may be removed.

It holds the commands `engine features list|show|diff|gc|latest|audit`. Each takes (config, words, options) and returns an
exit code.
"""

from __future__ import annotations

import dataclasses
import json
import sqlite3
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import pyarrow as pa

from engine.config import schema, units
from engine.config.sections.features import ViewConfig, is_built_in
from engine.config.tree import Config
from engine.errors import UserError, nearest
from engine.features import aggregates, functions, retrieval, store, view_statistics
from engine.features import audit as leak_trial
from engine.features.calls import FOLDER as KEPT
from engine.features.spec import past_inputs, view_columns, view_inputs
from engine.features.store import StoredView
from engine.runtime import environment, records, storage, terminal
from engine.runtime.run import facts_of_runs

KEEP_RECENT = 24 * 3600  # seconds: gc keeps younger files, which a run may be using


# ------------------------------------------------------------------------------------------------------- commands


def list_views(config: Config, _words: list[str], options: Mapping[str, str]) -> int:
    """`features list [--json]`: views of the config and of the store."""
    nothing = "no views: choose an experiment, as in `engine features list +experiment=flights`"
    terminal.rows(view_rows(config), "--json" in options, nothing)
    return 0


def show(config: Config, words: list[str], options: Mapping[str, str]) -> int:
    """`features show VIEW [--json]`: spec, lineage, statistics per feature, versions, and the models that use it."""
    name = _one(words, "view", {*_folders(config), *config.features.views})
    versions = sorted(store.stored_views(_folder(config, name)), key=lambda item: item.directory.stat().st_mtime)
    view = config.features.views.get(name)
    spec = schema.plain(view) if view else versions[-1].manifest["spec"] if versions else {}
    listed, newest = [_version(item) for item in versions], versions[-1] if versions else None
    age = _age(config, newest) if newest else None
    figures = view_statistics.statistics(newest, age) if newest else []
    models = models_by_view(config).get(name, [])
    made_of = sources_of(view, config) if view else []
    facts: dict[str, Any] = {
        "view": name,
        "spec": spec,
        "made_of": made_of,
        "versions": listed,
        "models": models,
        "freshness": dataclasses.asdict(age) if age else None,
        "statistics": figures,
    }
    if view is not None and view.kind == "function":
        kinds = {name: config.data.columns[name].type for name in view.inputs}
        facts["function"] = functions.signature(view.function, kinds, view.outputs)
    asked = view.asked.values() if view is not None else ()
    own = dict.fromkeys(item for entry in asked for item in entry.aggregates if not is_built_in(item))
    if own:
        facts["aggregates"] = [line for item in own for line in aggregates.signature(item)]
    if "--json" in options:
        terminal.out(json.dumps(facts, indent=1, default=str) + "\n")
        return 0
    terminal.out(f"{name}  {spec.get('description', '')}\n")
    terminal.out(
        f"kind {spec.get('kind')}, owner {spec.get('owner') or '-'}, entity {', '.join(spec.get('entity', []))}\n"
    )
    if made_of:
        terminal.out(f"made of {', '.join(made_of)}\n")
    terminal.out("".join(f"{line}\n" for line in facts.get("function", facts.get("aggregates", ()))))
    terminal.rows(listed, False, "not computed yet")
    if age:
        terminal.out(f"newest event {age.newest_event}, computed {age.computed}\n")
        counts = [f"{stop - start:,} rows" for start, stop in (age.month_rows, age.before_rows)]
        terminal.out(f"month_nulls: of {age.month} ({counts[0]}); drift: its PSI against {age.before} ({counts[1]})\n")
    terminal.rows(figures, False, "")
    terminal.out(f"used by {len(models)} models\n" + "".join(f"  {item}\n" for item in models))
    return 0


def diff(config: Config, words: list[str], options: Mapping[str, str]) -> int:
    """`features diff VIEW VERSION VERSION [--json]`: which parts and features of two stored versions differ."""
    if len(words) != 3:
        raise UserError("features diff takes a view and two of its versions (see `features show VIEW`)")
    name, *wanted = words
    first, second = (_find_version(config, name, version) for version in wanted)
    rows = []
    sides = [{part["name"]: part for part in item.manifest["parts"]} for item in (first, second)]
    for place in sorted({*sides[0], *sides[1]}):
        parts = [side.get(place) for side in sides]
        names = sorted({key for part in parts if part for key in part["columns"]})
        for key in names:
            digests = [part["columns"][key]["digest"] if part and key in part["columns"] else "" for part in parts]
            if digests[0] != digests[1]:
                what = "values" if all(digests) else "only in the first" if digests[0] else "only in the second"
                rows.append({"part": place, "feature": key, "differs": what})
    terminal.rows(rows, "--json" in options, "the two versions hold the same values")
    return 0


def gc(config: Config, _words: list[str], options: Mapping[str, str]) -> int:
    """`features gc [--delete] [--json]`: lists or deletes versions that no run names and that are older than a day, kept results
    of earlier versions of slow functions, and leftovers of killed commands.
    """
    used = used_directories(config)
    rows = []
    if "--delete" in options:
        storage.purge(Path(config.paths.store) / "features")
    for name, folder in _folders(config).items():
        # Folders, not views: leftovers of another format or of a killed build would stay for ever.
        for directory in sorted(path for path in folder.iterdir() if path.is_dir()):
            old = time.time() - directory.stat().st_mtime > KEEP_RECENT or storage.is_abandoned(directory)
            if directory.name not in used.get(name, set()) and old:
                rows.append({"view": name, "version": directory.name, "bytes": storage.bytes_of([directory])})
                if "--delete" in options:
                    storage.remove(directory, directory.parents[1])
    for directory in superseded(Path(config.paths.store) / "features"):
        rows.append(
            {
                "view": directory.parent.name,
                "version": f"{KEPT}/{directory.name}",
                "bytes": storage.bytes_of([directory]),
            }
        )
        if "--delete" in options:
            storage.remove(directory, directory.parents[2])
    terminal.rows(rows, "--json" in options, "nothing to collect: every version is used or recent")
    if rows and not options:
        terminal.out("add --delete to remove them\n")
    return 0


def latest(config: Config, words: list[str], options: Mapping[str, Any]) -> int:
    """`features latest VIEW [--entity COLUMN=VALUE ...] [--at INSTANT] [--out FILE.parquet|FILE.sqlite]`."""
    name = _one(words, "view", config.features.views)
    entity = dict(_pair(item) for item in options.get("--entity", ()))
    at = units.instant(options["--at"], config.data.time_zone) if "--at" in options else None
    table = retrieval.latest(name, config, retrieval.dataset_of(config, scoring=True), at, entity)
    if "--out" in options:
        export(table, config.features.views[name].entity, Path(options["--out"]))
        terminal.out(f"{table.num_rows} entities of view {name} in {options['--out']}\n")
    else:
        terminal.rows(table.to_pylist(), "--json" in options, "no such entity before that instant")
    return 0


def audit(config: Config, _words: list[str], options: Mapping[str, str]) -> int:
    """`features audit [--rows N] [--seed N] [--json]`: the leak audit of the config's views; exit code 2 with leaks."""
    dataset = retrieval.dataset_of(config)
    leaks = leak_trial.audit(
        config.data,
        config.features,
        dataset,
        _number(options, "--rows", "60"),
        _number(options, "--seed", "0"),
        environment.threads_of(config),
    )
    rows = [vars(leak) for leak in leaks]
    terminal.rows(
        rows,
        "--json" in options,
        f"no leak: {options.get('--rows', '60')} rows kept every feature when values that they must not use were changed",
    )
    return 2 if leaks else 0


# --------------------------------------------------------------------------------------------------------- facts


def view_rows(config: Config) -> list[dict[str, Any]]:
    """A line per view of the config and of the store: what it is, whose, its versions, users, newest event and drift."""
    stored = {name: store.stored_views(folder) for name, folder in _folders(config).items()}
    users = models_by_view(config)
    rows = []
    for name in sorted({*stored, *config.features.views}):
        view = config.features.views.get(name)
        newest = max(stored.get(name, []), key=lambda item: item.directory.stat().st_mtime, default=None)
        spec = schema.plain(view) if view else newest.manifest["spec"] if newest else {}
        rows.append(
            {
                "view": name,
                "kind": spec.get("kind", ""),
                "owner": spec.get("owner", ""),
                "description": spec.get("description", ""),
                "entity": list(spec.get("entity", [])),
                "features": len(view_columns(name, view, config.data))
                if view
                else len(newest.columns)
                if newest
                else 0,
                "versions": len(stored.get(name, [])),
                "bytes": storage.bytes_of([item.directory for item in stored.get(name, [])]),
                "models": len(users.get(name, [])),
                **view_statistics.summary(newest, _age(config, newest) if newest else None),
            }
        )
    return rows


def superseded(root: Path) -> list[Path]:
    """Folders of kept results that are older than a day, and older than those of another version of the view's function."""
    found = []
    for view in sorted((root / KEPT).glob("*")):
        by_age = sorted(view.iterdir(), key=lambda path: path.stat().st_mtime)
        found += [path for path in by_age[:-1] if time.time() - path.stat().st_mtime > KEEP_RECENT]
    return found


def sources_of(view: ViewConfig, config: Config) -> list[str]:
    """The columns that the view reads: of the events, and `table.column` of a side table."""
    as_of = config.features.as_of
    columns = view_inputs(view, config.data, as_of.column if as_of else config.data.event_time)
    beside = past_inputs(view, config.data) if view.kind == "windows" else view.columns
    return [*columns, *(f"{view.table}.{column}" for column in beside if view.table)]


class AskedView(TypedDict):
    """A view in a bundle's specification."""

    kind: NotRequired[str]


class AskedFeatures(TypedDict):
    """Features in a bundle's specification."""

    views: dict[str, AskedView]
    windows: NotRequired[bool]


class Asking(TypedDict):
    """The part of a bundle's spec.json that the catalog reads."""

    features: AskedFeatures


def models_by_view(config: Config) -> dict[str, list[str]]:
    """View -> training runs whose bundle uses it."""
    found: dict[str, list[str]] = {}
    for path in sorted(Path(config.paths.runs).glob("train/*/*/model/spec.json")):
        try:
            features = records.read(storage.inside(path.parents[1], "model", path.name), Asking)["features"]
        except UserError as error:
            terminal.err(f"warning: left out: {error}\n")
            continue
        for name, view in features["views"].items():
            if not features.get("windows", True) and view.get("kind", "windows") == "windows":
                continue
            found.setdefault(name, []).append(str(path.parent.parent))
    return found


class Used(TypedDict):
    """The part of a run.json that the catalog reads. A damaged one stops a clean-up: it may name a version in use."""

    views: NotRequired[dict[str, str]]


def used_directories(config: Config) -> dict[str, set[str]]:
    """View -> versions that a run has recorded as read; runs of backtests, which are in the store, count too."""
    found: dict[str, set[str]] = {}
    for _, record in facts_of_runs(config, Used):
        for name, version in record.get("views", {}).items():
            found.setdefault(name, set()).add(version)
    return found


def export(table: pa.Table, entity: Iterable[str], path: Path) -> None:
    """The table as Parquet, or as SQLite: a table `latest` with the entity as its key.

    SQLite has numbers and text: an instant becomes its microseconds; a decimal, date or time of day becomes its text.
    """
    if path.suffix == ".parquet":
        storage.write_parquet(path, table)
    elif path.suffix in (".sqlite", ".db"):
        with storage.atomic_path(path) as temporary:
            _write_sqlite(table, list(entity), temporary)
    else:
        raise UserError(f"--out must end in .parquet, .sqlite or .db, found {str(path)!r}")


def _write_sqlite(table: pa.Table, entity: list[str], path: Path) -> None:
    quoted = [f'"{name}"' for name in table.column_names]
    plain = table.cast(pa.schema([(field.name, _sqlite_type(field.type)) for field in table.schema]))
    connection = sqlite3.connect(path)
    try:
        keys = ", ".join(f'"{name}"' for name in entity)
        connection.execute(f"CREATE TABLE latest ({', '.join(quoted)}, PRIMARY KEY ({keys})) WITHOUT ROWID")
        marks = ", ".join("?" for _ in quoted)
        columns = [column.to_pylist() for column in plain.columns]
        connection.executemany(f"INSERT INTO latest VALUES ({marks})", zip(*columns, strict=True))
        connection.commit()
    finally:
        connection.close()


def _sqlite_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_timestamp(kind):
        return pa.int64()
    as_text = pa.types.is_decimal(kind) or pa.types.is_date(kind) or pa.types.is_time(kind)
    return pa.string() if as_text else kind


# ------------------------------------------------------------------------------------------------------- helpers


def _number(options: Mapping[str, str], name: str, default: str) -> int:
    text = options.get(name, default)
    if not text.isdecimal():
        raise UserError(f"{name} must be a whole number, 0 or more, found {text!r}")
    return int(text)


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--entity must be COLUMN=VALUE, found {text!r}")
    return name, value


def _one(words: list[str], what: str, known: Iterable[str]) -> str:
    if len(words) != 1:
        raise UserError(f"name one {what}, found {len(words)}.{nearest('', known)}")
    if words[0] not in set(known):
        raise UserError(f"no {what} {words[0]!r}.{nearest(words[0], known)}")
    return words[0]


def _folder(config: Config, name: str) -> Path:
    return storage.inside(Path(config.paths.store), "features", name)


def _folders(config: Config) -> dict[str, Path]:
    root = Path(config.paths.store) / "features"
    return (
        {path.name: path for path in sorted(root.iterdir()) if path.is_dir() and path.name[0] != "."}
        if root.is_dir()
        else {}
    )


def _find_version(config: Config, name: str, version: str) -> StoredView:
    for stored in store.stored_views(_folder(config, name)):
        if stored.directory.name.startswith(version):
            return stored
    known = [item.directory.name for item in store.stored_views(_folder(config, name))]
    raise UserError(f"view {name!r} has no version {version!r}.{nearest(version, known)}")


def _age(config: Config, stored: StoredView) -> view_statistics.Age | None:
    return view_statistics.age_of(stored, Path(config.paths.store))


def _version(stored: StoredView) -> dict[str, object]:
    return {
        "version": stored.directory.name,
        "digest": stored.digest[:16],
        "rows": stored.manifest["rows"],
        "dataset": f"{stored.manifest['dataset']['name']} {stored.manifest['dataset']['digest'][:16]}",
        "as_of": stored.manifest["as_of"],
        "parts": len(stored.manifest["parts"]),
        "bytes": storage.bytes_of([stored.directory]),
    }
