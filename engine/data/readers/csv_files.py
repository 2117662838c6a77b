"""Delimited text. Plain pieces are parsed in threads straight into the declared types; a piece in which anything is
wrong is read again as bytes, row by row and value by value, so that every bad row and value is named.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import itertools
import re
import string
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from engine.config import schema
from engine.config.sections.data import CsvOptions, SourceConfig
from engine.data.arrow_types import TIMESTAMP, parse_type
from engine.data.bounds import Bounds
from engine.data.columns import OF_FILE, Chunk, Finding, Lost, Matched, Notes, as_text, evidence_of, match, typed
from engine.data.files import SourceFile, encoding_advice, open_bytes, recode, refuse_utf16, skip_advice
from engine.data.parse import FALSE, TRUE, has_offset, is_beyond_whole_numbers, may_vanish
from engine.data.readers import advice
from engine.data.readers.split_text import Piece, dialect, first_line_end, mapped_pieces, pieces, separate_broken_rows
from engine.data.readers.trim import at_least, more, without_comments, without_footer, without_lines
from engine.errors import UserError

_BOM = b"\xef\xbb\xbf"
_MARKS = 16  # bytes that a byte-order mark and Excel's line about the delimiter take
_INSIDE = np.zeros(256, bool)
_INSIDE[np.frombuffer((string.ascii_letters + string.digits).encode(), np.uint8)] = True


def read(
    file: SourceFile, source: SourceConfig, zone: str, threads: int, notes: Notes, bounds: Bounds
) -> Iterator[Chunk]:
    """Chunks of one file in file order. Raises UserError when the file as a whole cannot be read."""
    stream = open_bytes(file.path)
    try:
        yield from _chunks(stream, file, source, zone, threads, notes, bounds)
    finally:
        stream.close()


def _chunks(
    stream: BinaryIO, file: SourceFile, source: SourceConfig, zone: str, threads: int, notes: Notes,
    bounds: Bounds,
) -> Iterator[Chunk]:  # fmt: skip
    options = source.csv
    if options.encoding.lower().replace("_", "-") not in ("utf-8", "utf8", "ascii"):
        stream = recode(stream, options.encoding, file)
    stream = without_footer(stream, options.footer, bounds)
    head, names = _head(stream, file, source)
    matched = match(names, source, file, lambda: advice.advice(file, source, zone))
    notes.update(matched.notes)
    parser = _Parser(file, source, zone, matched, len(names), bounds)
    first = 1
    for chunk, rows in parser.run(stream, head, threads):
        chunk.numbers += first - 1
        for lost in chunk.lost:
            lost.number += first - 1
        first += rows
        yield chunk


def _head(stream: BinaryIO, file: SourceFile, source: SourceConfig) -> tuple[bytes, list[str]]:
    """(bytes after the header that are already read, column names)."""
    options = source.csv
    head = at_least(stream, _MARKS).removeprefix(_BOM)
    refuse_utf16(head, file)
    head = without_lines(stream, head, options.skip) if options.skip else _without_excel_line(head, file, options)
    head = without_comments(stream, head, options.comment)
    if not head:
        raise UserError(_empty(file, options, "a line with the column names" if options.header else "a row"))
    if not options.header:
        return head, [
            column.path or name
            for name, column in source.columns.items()
            if name not in file.partitions and column.path not in OF_FILE
        ]
    while (end := first_line_end(head, options.quote.encode())) < 0:
        longer = more(stream, head)
        if len(longer) == len(head):
            end = len(head)
            break
        head = longer
    try:
        text = head[:end].decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file.shown}: the header must be UTF-8, found byte 0x{head[error.start]:02x} at {error.start}: "
            f"set {encoding_advice(file)}"
        ) from None
    try:
        names = next(csv.reader(io.StringIO(text, newline=""), **dialect(options)))
    except (csv.Error, StopIteration) as error:
        raise UserError(f"{file.shown}: the header cannot be read: {error}") from None
    if options.trailing_delimiter and names[-1] == "":
        names.pop()
    head = head[end:]
    return (without_lines(stream, head, 1 + options.skip_after_header) if options.skip_after_header else head), names


def _empty(file: SourceFile, options: CsvOptions, wanted: str) -> str:
    used = [name for name in ("skip", "footer", "comment") if getattr(options, name)]
    without = " beside what csv." + " and csv.".join(used) + " leave out" if used else ""
    return f"{file.shown} is empty: it must hold at least {wanted}{without}{skip_advice(file)}"


def _without_excel_line(head: bytes, file: SourceFile, options: CsvOptions) -> bytes:
    """Handle Excel's line with the delimiter before the header: `sep=;`."""
    found = re.match(rb"sep=([^\r\n])(\r\n|\n|\r)", head)
    if not found:
        return head
    if found[1] != options.delimiter.encode():
        said = found[1].decode("latin-1")
        word = schema.word(f"data.sources.{file.source}.csv.delimiter", "\\t" if said == "\t" else said)
        raise UserError(
            f"{file.shown}: its first line says that {said!r} separates fields, csv.delimiter is {options.delimiter!r}: "
            f"set {word}"
        )
    return head[found.end() :]


class _Parser:
    """Cuts the stream into pieces at line ends, parses them in threads and returns them in order."""

    def __init__(
        self, file: SourceFile, source: SourceConfig, zone: str, matched: Matched, width: int, bounds: Bounds
    ) -> None:
        self.bounds = bounds
        self.file, self.source, self.zone = file, source, zone
        self.ragged = f"data.sources.{file.source}.csv.ragged"
        self.extra = f"f{width}" if source.csv.trailing_delimiter else None
        self.names = [f"f{place}" for place in range(width)] + ([self.extra] if self.extra else [])
        self.places = {name: f"f{place}" for name, place in matched.places.items() if place is not None}
        self.fast = {self.places[name]: kind for name, kind in _fast_types(source).items() if name in self.places}
        self.integers = any(pa.types.is_integer(kind) for kind in self.fast.values())
        self.floats = any(pa.types.is_floating(kind) for kind in self.fast.values())
        self.zoned: dict[str, bool] = {}

    def run(self, stream: BinaryIO, head: bytes, threads: int) -> Iterator[tuple[Chunk, int]]:
        waiting: deque[Future[tuple[Chunk, int]]] = deque()
        cut = self._pieces(stream, head)
        with ThreadPoolExecutor(threads) if threads > 1 else contextlib.nullcontext() as pool:
            for piece in cut:
                if piece.messy:
                    while waiting:
                        yield waiting.popleft().result()
                    yield from self._messy(itertools.chain([piece], cut))
                    return
                if not self.zoned:
                    self._look_at(piece.data)
                if pool is None:  # starting a thread takes longer than reading a small file
                    yield self._plain(piece.data, piece.quoted)
                    continue
                waiting.append(pool.submit(self._plain, piece.data, piece.quoted))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def _pieces(self, stream: BinaryIO, head: bytes) -> Iterator[Piece]:
        if isinstance(stream, io.BufferedReader) and isinstance(stream.raw, io.FileIO):
            return mapped_pieces(self.file.path, stream.tell() - len(head), self.source.csv, self.bounds)
        return pieces(stream, head, self.source.csv, self.bounds)

    def _look_at(self, piece: bytes) -> None:
        """Whether the first value of each time column has an offset: decides how the fast path asks Arrow to read it."""
        start = bytes(memoryview(piece)[: 1 << 16])
        sample = self._read_bytes(start.rpartition(b"\n")[0] or start)[0]
        for name, kind in self.fast.items():
            if kind.equals(TIMESTAMP):
                values = [value for value in sample.column(name).to_pylist() if value]
                self.zoned[name] = bool(values) and has_offset(values[0].decode("utf-8", "replace"))
        self.zoned.setdefault("", False)

    def _plain(self, piece: bytes, quoted: bool) -> tuple[Chunk, int]:
        """Parse a well-formed piece by the fast path, and by the careful one if that fails."""
        if (self.integers and _holds_hexadecimal(piece)) or (self.floats and may_vanish(piece)):
            return self._careful(piece)
        try:
            table = self._read_typed(piece, quoted)
            chunk = self._chunk(table, np.arange(1, table.num_rows + 1), [])
            if chunk is not None:
                chunk.evidence = functools.partial(self._texts, piece)
                return chunk, table.num_rows
        except pa.ArrowException:
            pass
        return self._careful(piece)

    def _careful(self, piece: bytes) -> tuple[Chunk, int]:
        table, lost = self._read_bytes(piece)
        rows = table.num_rows + len(lost)
        numbers = np.delete(np.arange(1, rows + 1), [item.number - 1 for item in lost])
        chunk = self._chunk(table, numbers, lost, careful=True)
        assert chunk is not None
        return chunk, rows

    def _texts(self, piece: bytes, name: str, positions: np.ndarray) -> list[str | None] | None:
        return evidence_of(self._raw(self._read_bytes(piece)[0]))(name, positions)

    def _raw(self, table: pa.Table) -> dict[str, pa.Array]:
        return {name: table.column(place) for name, place in self.places.items()}

    def _chunk(self, table: pa.Table, numbers: np.ndarray, lost: list[Lost], careful: bool = False) -> Chunk | None:
        raw = self._raw(table)
        if not careful and any(is_beyond_whole_numbers(column) for column in raw.values()):
            return None
        values, findings = typed(raw, numbers, self.source, self.file, self.zone, {})
        evidence = evidence_of(raw) if careful else None
        return Chunk(numbers, values, [*self._beyond(table), *findings], lost, evidence)

    def _beyond(self, table: pa.Table) -> list[Finding]:
        """Rows with text after their last delimiter."""
        if self.extra is None:
            return []
        column = table.column(self.extra)
        places = np.flatnonzero(np.asarray(pc.fill_null(pc.greater(pc.binary_length(column), 0), False)))
        if not len(places):
            return []
        hidden = any(column.sensitive for column in self.source.columns.values())
        shown = [None if hidden else as_text(column[int(place)]) for place in places]
        reason = f"has {len(self.names)} fields, must have {len(self.names) - 1} and a delimiter"
        return [Finding("", places, reason, self.source.csv.ragged, shown, self.ragged)]

    def _read_typed(self, piece: bytes, quoted: bool) -> pa.Table:
        kinds = {
            name: pa.timestamp("us", tz="UTC" if self.zoned.get(name) else None) if kind.equals(TIMESTAMP) else kind
            for name, kind in self.fast.items()
        }
        kinds |= {place: pa.string() for place in self._wanted() if place not in kinds}
        return pyarrow.csv.read_csv(
            pa.BufferReader(piece),
            pyarrow.csv.ReadOptions(use_threads=False, column_names=self.names, block_size=len(piece) + 1),
            self._parse_options(None, quoted),
            self._convert_options(kinds),
        )

    def _wanted(self) -> list[str]:
        return [*self.places.values(), *([self.extra] if self.extra else [])]

    def _read_bytes(self, piece: bytes) -> tuple[pa.Table, list[Lost]]:
        kinds = {place: pa.binary() for place in self._wanted()}
        if not bytes(memoryview(piece)[:4096]).strip(b"\r\n") and not bytes(piece).strip(b"\r\n"):
            return pa.table({place: pa.array([], pa.binary()) for place in kinds}), []  # blank lines only
        if _is_utf8(piece):
            return self._read_rows(piece, kinds, [])
        try:
            return self._read_rows(piece, kinds, None)
        except pa.ArrowInvalid:  # rows of another length: Arrow hands them out as text only, so a letter a byte
            table, lost = self._read_rows(bytes(piece).decode("latin-1").encode("utf-8"), kinds, [])
        columns = [
            [value and value.decode("utf-8").encode("latin-1") for value in column.to_pylist()] for column in table
        ]
        for item in lost:
            item.text = item.text.encode("latin-1").decode("utf-8", "backslashreplace")
        return pa.table([pa.array(column, pa.binary()) for column in columns], table.column_names), lost

    def _read_rows(
        self, piece: bytes, kinds: dict[str, pa.DataType], lost: list[Lost] | None
    ) -> tuple[pa.Table, list[Lost]]:
        """(columns of the types, rows of another length; where `lost` is None these are an error)."""
        table = pyarrow.csv.read_csv(
            pa.BufferReader(piece),
            pyarrow.csv.ReadOptions(use_threads=False, column_names=self.names, block_size=len(piece) + 1),
            self._parse_options(lost),
            self._convert_options(kinds),
        )
        return table, lost or []

    def _messy(self, stream: Iterator[Piece]) -> Iterator[tuple[Chunk, int]]:
        """The rest of a file from the first misplaced quote on: rows that break the quoting are lost, the others read."""
        for good, broken, rows in separate_broken_rows(stream, self.source.csv, self.bounds):
            chunk, kept = self._careful(good)
            places = np.delete(np.arange(1, rows + 1), [item.number - 1 for item in broken])
            assert kept == len(places), (self.file.shown, kept, len(places))
            for item in chunk.lost:
                item.number = int(places[item.number - 1])
            chunk.numbers = places[chunk.numbers - 1] if kept else chunk.numbers
            chunk.lost = sorted([*chunk.lost, *broken], key=lambda item: item.number)
            yield chunk, rows

    def _parse_options(self, lost: list[Lost] | None, quoted: bool = True) -> Any:
        options: CsvOptions = self.source.csv

        def note(row: Any) -> str:
            reason = f"has {row.actual_columns} fields, must have {row.expected_columns}"
            assert lost is not None
            lost.append(Lost(row.number, row.text, reason))
            return "skip"

        return pyarrow.csv.ParseOptions(
            delimiter=options.delimiter,
            quote_char=options.quote or False,
            double_quote=options.escape is None,
            escape_char=options.escape or False,
            newlines_in_values=bool(options.quote) and quoted,
            invalid_row_handler=note if lost is not None else None,
        )

    def _convert_options(self, kinds: dict[str, pa.DataType]) -> Any:
        return pyarrow.csv.ConvertOptions(
            column_types=kinds,
            include_columns=list(kinds),
            null_values=list(self.source.csv.nulls),
            strings_can_be_null=True,
            quoted_strings_can_be_null=self.source.csv.quoted_nulls,
            true_values=list(TRUE),
            false_values=list(FALSE),
            decimal_point=self.source.csv.decimal,
        )


def _is_utf8(piece: Any) -> bool:
    try:
        str(memoryview(piece), "utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _holds_hexadecimal(piece: Any) -> bool:
    """Whether a value may begin with `0x`: Arrow reads it as an integer, and 0xFFFFFFFFFFFFFFFF as -1.

    After a letter or a digit it stands inside a value, such as the tail number N920XJ.
    """
    raw = np.frombuffer(piece, np.uint8)
    places = np.flatnonzero((raw | 0x20) == ord("x"))
    places = places[(places > 0) & (raw[places - 1] == ord("0"))]
    before = raw[places[places > 1] - 2]
    return bool(np.any(places == 1) or not np.all(_INSIDE[before]))


def _fast_types(source: SourceConfig) -> dict[str, pa.DataType]:
    """Declared columns that Arrow's reader converts exactly as `parse` does; it lets decimals overflow, so not those."""
    found = {}
    for name, column in source.columns.items():
        kind = parse_type(column.type)
        numeric = pa.types.is_integer(kind) or kind == pa.float64()
        plain = pa.types.is_boolean(kind) or kind == pa.string() or kind == pa.binary()
        timed = (kind.equals(TIMESTAMP) or kind == pa.date32()) and column.format is None
        if plain or timed or (numeric and not source.csv.thousands):
            found[name] = kind
    return found
