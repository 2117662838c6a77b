"""Reader of JSON Lines: by Arrow's reader where it keeps every value, else line by line with numbers as written."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json

from engine.config.sections.data import SourceConfig
from engine.data.arrow_types import parse_type, type_name
from engine.data.bounds import Bounds
from engine.data.columns import TEXT_LIMIT, Chunk, Finding, Lost, Notes, item_text, match, policy_key, typed
from engine.data.files import SourceFile, open_bytes, recode, refuse_utf16, skip_advice
from engine.data.parse import is_beyond_whole_numbers, may_vanish
from engine.data.readers.split_text import pieces
from engine.errors import UserError
from engine.runtime import records as json_records

LONG_LINE = 1 << 24  # bytes of a line beyond which its values are counted
KEYS = 500  # undeclared keys up to which the fast reader is faster
_KEY = re.compile(rb'"([^"\\]{1,200})"\s*:')
_ABSENT = object()
_MISMATCH: Any = object()


class _Number(str):
    """The text of a number."""


_KINDS = {_Number: "a number", str: "a text", bool: "a truth value", type(None): "null"}


class _Twice(ValueError):
    pass


class _Stray(str):
    """A value on the path to a nested field that is not an object."""


def read(
    file: SourceFile, source: SourceConfig, zone: str, _threads: int, notes: Notes, bounds: Bounds
) -> Iterator[Chunk]:
    """Chunks of one file in file order; a key that no line has is a missing column."""
    opened = stream = open_bytes(file.path)
    first, seen, listed = 1, set[str](), False
    try:
        if source.csv.encoding.lower() not in ("utf-8", "utf8"):
            stream = recode(stream, source.csv.encoding, file)
        for cut in pieces(stream, b"", bounds=bounds):
            piece = cut.data.removeprefix(b"\xef\xbb\xbf") if first == 1 else cut.data
            if first == 1:
                refuse_utf16(piece, file)
                listed = piece[:1] == b"["
            chunk, rows = _fast(piece, file, source, zone, seen, notes) or _careful(
                piece, file, source, zone, seen, notes
            )
            chunk.numbers += first - 1
            for lost in chunk.lost:
                lost.number += first - 1
            first += rows
            yield chunk
    finally:
        opened.close()
    if first == 1:
        raise UserError(f"{file.shown} is empty: it must hold at least one line{skip_advice(file)}")
    if not seen:
        hint = (
            f". It begins with [: write the items one a line, as `jq -c '.[]'` does{skip_advice(file)}"
            if listed
            else ""
        )
        raise UserError(f"{file.shown} must hold one JSON object a line, found none in {first - 1:,} lines{hint}")
    notes.update(match(sorted(seen), source, file).notes)
    notes.pop("reordered", None)


def _paths(source: SourceConfig) -> dict[str, list[str]]:
    return {
        name: list(dict.fromkeys((column.path or name, *column.aliases))) for name, column in source.columns.items()
    }


def _fast(
    piece: bytes, file: SourceFile, source: SourceConfig, zone: str, seen: set[str], notes: Notes
) -> tuple[Chunk, int] | None:
    """Arrow's own reader, which refuses what it cannot keep; None where the piece has to be looked at line by line."""
    schema = _fast_schema(source)
    if schema is None or _keys(piece) > len(schema) + KEYS or _has_long_line(piece):
        return None
    try:
        table = pyarrow.json.read_json(
            pa.BufferReader(piece),
            pyarrow.json.ReadOptions(use_threads=False, block_size=len(piece) + 1),
            pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="infer"),
        )
        if table.num_rows != piece.count(b"\n") + (not piece.endswith(b"\n")):
            return None
        present = {
            name
            for name in table.column_names
            if table[name].null_count < table.num_rows or f'"{name}"'.encode() in piece
        }
        paths = _paths(source)
        raw = {
            name: table[next((path for path in paths[name] if path in present), paths[name][0])]
            for name in source.columns
            if paths[name][0] in table.column_names
        }
        if any(len(present.intersection(names)) > 1 for names in paths.values()):
            return None
        floats = any(pa.types.is_floating(column.type) for column in raw.values())
        if any(is_beyond_whole_numbers(column) for column in raw.values()) or (floats and may_vanish(piece)):
            return None
        numbers = np.arange(1, table.num_rows + 1)
        values, findings = typed(raw, numbers, source, file, zone, notes)
    except (pa.ArrowException, UnicodeDecodeError):
        return None
    seen |= present
    evidence = functools.partial(_as_written, piece, numbers.copy(), _paths(source))
    return Chunk(numbers, values, findings, evidence=evidence), table.num_rows


def _has_long_line(piece: bytes) -> bool:
    """Whether a line may be longer than LONG_LINE: each such line has half of that between two places that are looked at."""
    half = LONG_LINE // 2
    return any(piece.find(b"\n", at, at + half) < 0 for at in range(0, len(piece) - LONG_LINE, half))


def _keys(piece: bytes) -> int:
    """About how many keys the objects of a piece have together: Arrow makes a column of each, as long as the piece."""
    return len(set(_KEY.findall(bytes(memoryview(piece)[: 1 << 16]))))


def _fast_schema(source: SourceConfig) -> pa.Schema | None:
    fields = []
    for column in source.columns.values():
        kind = parse_type(column.type)
        if (
            pa.types.is_nested(kind)
            or pa.types.is_duration(kind)  # which no text is
            or pa.types.is_decimal(kind)
            or pa.types.is_binary(kind)
            or any("." in path for path in (column.path or "", *column.aliases))
        ):
            return None
        plain = pa.types.is_integer(kind) or kind == pa.float64() or pa.types.is_boolean(kind)
        fields.append(kind if plain else pa.string())
    names = _paths(source)
    flat = [
        (path, kind)
        for (name, kind) in zip(source.columns, fields, strict=True)
        for path in names[name]
        if not path.startswith("$")
    ]
    return pa.schema([pa.field(path, kind) for path, kind in flat])


def _careful(
    piece: bytes, file: SourceFile, source: SourceConfig, zone: str, seen: set[str], notes: Notes
) -> tuple[Chunk, int]:
    """Parse line by line: numbers keep their digits, and a value of another kind is a violation."""
    records, numbers, lost = _objects(piece)
    raw: dict[str, pa.Array] = {}
    mismatched: list[Finding] = []
    for record in records:
        seen.update(map(_printable, record))
    for name, paths in _paths(source).items():
        if paths[0].startswith("$") or name in file.partitions:
            continue
        column = source.columns[name]
        kind = parse_type(column.type)
        values = [_first(record, paths, seen) for record in records]
        written = [_written(value, kind) for value in values]
        bad = np.asarray([i for i, text in enumerate(written) if text is _MISMATCH], np.int64)
        written = [None if text is _MISMATCH else text for text in written]
        raw[name] = pa.array(written, _as_text(kind))
        if len(bad):
            items = [_mismatched_item(values[i], kind) for i in bad]
            shown = [
                None if column.sensitive else item or _printable(str(values[i]))[:TEXT_LIMIT]
                for i, item in zip(bad, items, strict=True)
            ]
            of_items = [item is not None for item in items]
            key = policy_key(file, name)
            mismatched.append(Finding(name, bad, f"is no {type_name(kind)}", column.on_violation, shown, key, of_items))
    values_, findings = typed(raw, numbers, source, file, zone, notes)
    evidence = functools.partial(_as_written, piece, numbers.copy(), _paths(source))
    return Chunk(numbers, values_, [*mismatched, *findings], lost, evidence), len(records) + len(lost)


def _as_written(
    piece: bytes, numbers: np.ndarray, paths: dict[str, list[str]], name: str, positions: np.ndarray
) -> list[str | None] | None:
    """The JSON text of a column at positions of a piece, as in the file."""
    if name not in paths:
        return None
    lines = _lines(piece)
    texts = [lines[numbers[place] - 1].decode("utf-8", "surrogateescape") for place in positions]
    found = [next(filter(None, (_value_text(text, path) for path in paths[name])), None) for text in texts]
    raw = [text and text.encode("utf-8", "surrogateescape") for text in found]
    return [text.decode("utf-8", "backslashreplace")[:TEXT_LIMIT] if text else None for text in raw]


def _value_text(text: str, path: str) -> str | None:
    """The text of the value at a dotted path of an object, or of what stands on the way to it and is no object."""
    members = _members(text)
    if path in members:
        return members[path]
    first, _, rest = path.partition(".")
    if not rest or first not in members:
        return None
    inner = members[first]
    return _value_text(inner, rest) if inner.startswith("{") else inner


_DECODER = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=str)


def _members(text: str) -> dict[str, str]:
    """Key -> text of its value, from the text of one JSON object."""
    found: dict[str, str] = {}
    place = _SPACE.match(text, text.index("{") + 1).end()  # type: ignore[union-attr]
    while text[place] != "}":
        name, place = _DECODER.raw_decode(text, place)
        start = _SPACE.match(text, text.index(":", place) + 1).end()  # type: ignore[union-attr]
        _, stop = _DECODER.raw_decode(text, start)
        found[name] = text[start:stop]
        place = _SEPARATOR.match(text, stop).end()  # type: ignore[union-attr]
    return found


_SPACE = re.compile(r"\s*")
_SEPARATOR = re.compile(r"\s*,?\s*")


def _lines(piece: bytes) -> list[bytes]:
    return [line for line in piece.split(b"\n") if line.strip()]


def _objects(piece: bytes) -> tuple[list[dict[str, Any]], np.ndarray, list[Lost]]:
    records, numbers, lost = [], [], []
    for number, line in enumerate(_lines(piece), 1):
        try:
            if line.lstrip().startswith(
                b"["
            ):  # perhaps the whole file is one list, which would need many times its bytes
                raise ValueError("it is a list")
            if len(line) > LONG_LINE:
                json_records.check_values(line.decode("latin-1"))
            record = json.loads(
                line, parse_int=_Number, parse_float=_Number, parse_constant=_Number, object_pairs_hook=_once
            )
            if not isinstance(record, dict):
                raise ValueError(f"it is {_KINDS[type(record)]}")
            records.append(record)
            numbers.append(number)
        except (ValueError, RecursionError) as error:
            lost.append(Lost(number, line.decode("utf-8", "backslashreplace"), f"is no JSON object: {error}"))
    return records, np.asarray(numbers, np.int64), lost


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise _Twice("a key stands twice")
    return record


def _first(record: dict[str, Any], paths: list[str], seen: set[str]) -> Any:
    """The value at the first path that the record has; None if it has none."""
    for path in paths:
        if path in record:
            return record[path]
        value: Any = record
        for part in path.split("."):
            if isinstance(value, dict):
                value = value.get(part, _ABSENT)
            elif value is not _ABSENT and value is not None:
                value = _Stray(value)
        if value is not _ABSENT:
            seen.add(path)
            return value
    return None


def _written(value: Any, kind: pa.DataType) -> Any:
    """The text of a value that may become `kind`, or the mark of one that may not."""
    if value is None:
        return None
    if pa.types.is_nested(kind):
        return _written_items(value, kind)
    if isinstance(value, _Stray):
        return _MISMATCH
    if isinstance(value, bool):
        return str(value).lower() if pa.types.is_boolean(kind) else _MISMATCH
    text_like = pa.types.is_string(kind) or pa.types.is_binary(kind)
    if isinstance(value, _Number):
        return _MISMATCH if text_like or pa.types.is_boolean(kind) or pa.types.is_temporal(kind) else str(value)
    if isinstance(value, str):
        of_text = pa.types.is_temporal(kind) and not pa.types.is_duration(kind)
        fits = text_like or of_text or pa.types.is_decimal(kind)
        return value if fits and _printable(value) == value else _MISMATCH
    return _MISMATCH


def _printable(text: str) -> str:
    """The text, with half of a surrogate pair, which JSON can escape and no text may hold, as its escape."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _written_items(value: Any, kind: pa.DataType) -> Any:
    """A list, or a map as its pairs, of the texts of its items; the mark where one may not become what is declared."""
    if pa.types.is_map(kind) and isinstance(value, dict):
        names = [_written(name, kind.key_type) for name in value]
        items = [_written(item, kind.item_type) for item in value.values()]
        mismatched = any(item is _MISMATCH for item in (*names, *items))
        return _MISMATCH if mismatched else list(zip(names, items, strict=True))
    if pa.types.is_map(kind) or not isinstance(value, list):
        return _MISMATCH
    items = [_written(item, kind.value_type) for item in value]
    return _MISMATCH if any(item is _MISMATCH for item in items) else items


def _mismatched_item(value: Any, kind: pa.DataType) -> str | None:
    """The first item of a list or map that may not become what is declared; None where it is the value itself."""
    pairs: Iterable[tuple[Any, pa.DataType]] = ()
    if pa.types.is_list(kind) and isinstance(value, list):
        pairs = ((item, kind.value_type) for item in value)
    elif pa.types.is_map(kind) and isinstance(value, dict):
        pairs = ((item, kind.item_type) for item in value.values())
    for place, (item, inner) in enumerate(pairs):
        if _written(item, inner) is _MISMATCH:
            return item_text(place, _printable(str(item)))
    return None


def _as_text(kind: pa.DataType) -> pa.DataType:
    """The type of what `_written` gives: text in the places of scalars."""
    if pa.types.is_map(kind):
        return pa.map_(_as_text(kind.key_type), _as_text(kind.item_type))
    return pa.list_(_as_text(kind.value_type)) if pa.types.is_list(kind) else pa.string()
