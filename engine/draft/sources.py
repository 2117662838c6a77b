"""Sources of the files that a user names: which files belong together, their format, dialect and columns."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from engine.config.sections.data import CsvOptions, DataConfig, SourceColumn, SourceConfig
from engine.data.arrow_types import declarable
from engine.data.bounds import USUAL
from engine.data.files import COMPRESSIONS, SUFFIXES, SourceFile, likely_format, open_bytes, source_files
from engine.data.readers.formats import READERS
from engine.data.readers.sniff import dialect_of
from engine.errors import UserError

ALIKE = 0.5  # files that share this part of their columns are one source
LINES = 5_000  # of a JSON Lines file, from which its types are known
TEXT = "string"
LIST = re.compile(r"list<(string|(float|u?int)\d+)>")  # of which features are made


@dataclasses.dataclass
class Source:
    """A source as drafted: its name, its config (every text column a string), its files and what was seen."""

    name: str
    config: SourceConfig
    files: list[SourceFile]
    notes: list[str] = dataclasses.field(default_factory=list)  # for the head of the source
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)  # column -> reason

    def tables(self, zone: str) -> Iterator[pa.Table]:
        """The rows of the files, as ingest reads them; `zone` of times without an offset."""
        for file in self.files:
            for chunk in READERS[file.format](file, self.config, zone, 1, {}, USUAL):
                yield chunk.table


@dataclasses.dataclass
class _Described:
    file: SourceFile
    path: str
    columns: dict[str, str]  # name -> declared type
    left_out: dict[str, str]
    csv: CsvOptions


def find_sources(paths: Sequence[str]) -> list[Source]:
    """The sources of files, folders and globs: those with mostly the same columns are one. Raises UserError."""
    groups: list[list[_Described]] = []
    for path in paths:
        described = [_describe(file, path) for file in _files(path)]
        home = next((group for group in groups if _belong(group[0], described[0])), None)
        if home is None:
            groups.append(described)
        else:
            home += described
    found: list[Source] = []
    for group in groups:
        found.append(_source(group, {source.name for source in found}))
    return found


def _files(path: str) -> list[SourceFile]:
    if "://" in path and not path.startswith("pkg://"):
        raise UserError(
            f"init reads files of this machine, found {path}: copy a file of it here, or write its source by hand"
        )
    if (Path(path) / "_delta_log").is_dir() or (Path(path) / "metadata").is_dir():
        raise UserError(f"init reads files, found the table {path}: write its source by hand (docs/configuration.md)")
    name = _name(path)
    place = path if "://" in path else os.path.abspath(path)
    form = likely_format(Path(path)) if _suffix(path) not in SUFFIXES and Path(path).is_file() else "auto"
    source = SourceConfig(path=place, format=form, columns={"x": SourceColumn(type=TEXT)}, hive=True)
    try:
        return source_files(name, source, DataConfig(), Path())
    except UserError as error:
        raise UserError(str(error).removeprefix(f"data.sources.{name}: ")) from None


def _name(path: str) -> str:
    """A name from a path: of its file without endings and numbers, or of its folder."""
    stem = Path(re.split(r"[*?\[]", path)[0].rstrip("/") or "data").name
    stem = re.sub(r"[^0-9A-Za-z_]+", "_", stem.split(".")[0])
    return re.sub(r"(_?\d+)+$", "", stem.strip("_")).strip("_").lower() or "data"


def _belong(first: _Described, other: _Described) -> bool:
    mine, theirs = set(first.columns), set(other.columns)
    return first.file.format == other.file.format and len(mine & theirs) >= ALIKE * max(len(mine), len(theirs))


def _describe(file: SourceFile, path: str) -> _Described:
    options = CsvOptions()
    left_out: dict[str, str] = {}
    if file.format == "csv":
        options, names = dialect_of(file)
        columns = dict.fromkeys(names, TEXT)
        if len(columns) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise UserError(
                f"{file.shown}: each column must have a name of its own, found {twice[0]!r} twice: rename one"
            )
    elif file.format == "jsonl":
        columns, left_out = _json_columns(file)
    else:
        columns, left_out = _arrow_columns(file)
    columns = {name: kind for name, kind in columns.items() if name not in file.partitions}
    if not columns:
        raise UserError(f"{file.shown} must have a column of numbers, text or times, found none")
    return _Described(file, path, columns, left_out, options)


def _arrow_columns(file: SourceFile) -> tuple[dict[str, str], dict[str, str]]:
    try:
        if file.format == "parquet":
            schema = pyarrow.parquet.read_schema(file.path)
        else:
            with pa.memory_map(str(file.path)) as mapped:
                schema = pyarrow.ipc.open_file(mapped).schema
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file.shown} cannot be read as {file.format}: {error}") from None
    columns: dict[str, str] = {}
    left_out: dict[str, str] = {}
    for field in schema:
        kind = declarable(field.type.value_type if pa.types.is_dictionary(field.type) else field.type)
        if kind is None or (pa.types.is_nested(field.type) and not LIST.fullmatch(kind)):
            left_out[field.name] = f"is of type {field.type}, of which no feature is made"
        else:
            columns[field.name] = kind
    return columns, left_out


_JSON = {bool: "bool", int: "int64", float: "float64", str: TEXT}


def _json_columns(file: SourceFile) -> tuple[dict[str, str], dict[str, str]]:
    seen: dict[str, set[type]] = {}
    items: dict[str, set[type]] = {}
    with open_bytes(file.path) as stream:
        for number, line in enumerate(stream, 1):
            if number > LINES:
                break
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                array = line.lstrip().startswith(b"[")
                way = "write one object a line, as `jq -c '.[]'` does" if array and number == 1 else str(error)
                raise UserError(f"{file.shown}: line {number} must be a JSON object: {way}") from None
            if not isinstance(row, dict):
                raise UserError(f"{file.shown}: line {number} must be a JSON object, found {type(row).__name__}")
            for name, value in row.items():
                seen.setdefault(name, set()).add(type(value))
                if isinstance(value, list):
                    items.setdefault(name, set()).update(map(type, value))
    columns: dict[str, str] = {}
    left_out: dict[str, str] = {}
    for name, kinds in seen.items():
        kinds.discard(type(None))
        held = items.get(name, set()) - {type(None)}
        if kinds == {list} and held and (held <= {int, float} or held == {str}):
            columns[name] = f"list<{TEXT if held == {str} else 'int64' if held == {int} else 'float64'}>"
        elif kinds & {dict, list}:
            left_out[name] = "is nested: declare one of its fields with `path`"
        elif kinds == {int, float}:
            columns[name] = "float64"
        else:
            columns[name] = _JSON[kinds.pop()] if len(kinds) == 1 else TEXT
    return columns, left_out


def _source(group: list[_Described], taken: set[str]) -> Source:
    """One source of described files: the union of their columns."""
    first = group[0]
    for other in group[1:]:
        if first.csv != other.csv:
            raise UserError(
                f"{other.file.shown} must be written as {first.file.shown} is (delimiter, encoding, header), since they have "
                "the same columns and are one source: name them in two calls"
            )
    columns: dict[str, SourceColumn] = {}
    left_out: dict[str, str] = {}
    for described in group:
        left_out |= described.left_out
        for name, kind in described.columns.items():
            known = columns.get(name)
            columns[name] = SourceColumn(type=kind if known is None else _wider(known.type, kind))
    columns = {name: column for name, column in columns.items() if name not in left_out}
    missing = [name for name in columns if any(name not in described.columns for described in group)]
    columns |= {name: dataclasses.replace(columns[name], missing="null") for name in missing}
    partitions = sorted({name for described in group for name in described.file.partitions})
    columns |= {name: SourceColumn(type=TEXT) for name in partitions}
    path = _pattern([described.path for described in group], [described.file for described in group])
    name = _name(path)
    while name in taken:
        name += "_2"
    notes = [f"{len(group)} files" if len(group) > 1 else first.file.shown]
    notes += [f"{name} is not in every file" for name in missing]
    config = SourceConfig(
        path=path,
        format="auto"
        if all(_suffix(described.file.path.name) in SUFFIXES for described in group)
        else first.file.format,
        columns=columns,
        csv=first.csv,
        hive=bool(partitions),
    )
    files = [dataclasses.replace(described.file, source=name) for described in group]
    return Source(name, config, files, notes, left_out)


def _suffix(path: str) -> str:
    suffixes = [suffix.lower() for suffix in Path(path).suffixes if suffix.lower() not in COMPRESSIONS]
    return suffixes[-1] if suffixes else ""


def _wider(first: str, other: str) -> str:
    """The type that holds values of both."""
    if first == other:
        return first
    if {first, other} == {"list<int64>", "list<float64>"}:
        return "list<float64>"
    return "float64" if {first, other} <= {"int64", "int32", "int16", "int8", "float64", "float32"} else TEXT


def _pattern(paths: list[str], files: list[SourceFile]) -> str:
    """One path for all files: the one that was given, or a glob that matches these and no others."""
    given = list(dict.fromkeys(paths))
    if len(given) == 1:
        return given[0] if "://" in given[0] else os.path.abspath(given[0])
    named = [str(file.path.resolve()) for file in files]
    folder = os.path.dirname(named[0])
    stems = [os.path.basename(path) for path in named]
    pattern = _shared(stems) + "*" + _shared([stem[::-1] for stem in stems])[::-1]
    whole = os.path.join(folder, pattern)
    matched = {str(path.resolve()) for path in Path(folder).glob(pattern)}
    if any(os.path.dirname(path) != folder for path in named) or matched != set(named):
        raise UserError(
            f"files of one source must be those of a folder or of a pattern, found {len(named)} of {len(matched)} that "
            f"match {whole}: put them into a folder of their own and name that"
        )
    return whole


def _shared(names: list[str]) -> str:
    """The letters that all names begin with."""
    letters = itertools.takewhile(lambda several: len(set(several)) == 1, zip(*names, strict=False))
    return "".join(several[0] for several in letters)
