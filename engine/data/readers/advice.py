"""Advice on csv options for a text file that does not match its source's description."""

from __future__ import annotations

import csv
import dataclasses
import io
import os
import re
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from engine.config import schema
from engine.config.sections.data import CsvOptions, SourceConfig
from engine.data.arrow_types import parse_type
from engine.data.columns import OF_FILE, reading
from engine.data.files import SourceFile, is_compressed, likely_encoding, open_bytes, recode
from engine.data.parse import to_type
from engine.data.readers.split_text import dialect
from engine.errors import UserError

Change = tuple[dict[str, Any], str]  # options with other values, and what they say of the file

HEAD, TAIL = 1 << 18, 1 << 16
LONGEST_PREAMBLE, LONGEST_FOOTER, LONGEST_QUOTED = 200, 20, 20
DELIMITERS = (",", ";", "\t", "|")
_MARK = re.compile(r"[#%!;*]+|//+|--+")  # what comments begin with; one - or / may begin a value


@dataclasses.dataclass
class _Row:
    """Lines [start, stop) of a file as fields; `fits`: their number and each value are as declared, `foreign`: hardly any."""

    start: int
    stop: int
    fields: list[str]
    fits: bool = False
    foreign: bool = False


def advice(file: SourceFile, source: SourceConfig, zone: str) -> str:
    """` It looks as if ...: set KEY=VALUE ...`; empty if no csv option would read more of the file's first lines."""
    if file.format not in ("csv", "jsonl"):
        return ""
    try:
        options, encoded = _encoded(file, source.csv)
        if file.format == "jsonl":  # of the csv options it has this one only
            word = schema.word(f"data.sources.{file.source}.csv.encoding", options.encoding)
            return f" It looks as if {encoded[0]}: set {word}" if encoded else ""
        found, reasons = better_options(file, dataclasses.replace(source, csv=options), zone)
    except (UserError, OSError, ValueError, pa.ArrowException):  # it has its own message already
        return ""
    words = [
        schema.word(f"data.sources.{file.source}.csv.{field.name}", _typed(getattr(found, field.name)))
        for field in dataclasses.fields(CsvOptions)
        if getattr(found, field.name) != getattr(source.csv, field.name)
    ]
    return f" It looks as if {' and '.join([*encoded, *reasons])}: set {' '.join(words)}" if words else ""


def better_options(file: SourceFile, source: SourceConfig, zone: str) -> tuple[CsvOptions, list[str]]:
    """(csv options that read more of the file's first and last lines as declared, or the source's own; the reason for each)."""
    head, tail = _lines(file, source.csv)
    return _Look(file, source, zone, head, tail).options()


def _typed(value: Any) -> Any:
    return "\\t" if value == "\t" else value  # a tab cannot be typed in a shell


def _encoded(file: SourceFile, options: CsvOptions) -> tuple[CsvOptions, list[str]]:
    """Options with an encoding under which the file's first bytes are text."""
    with open_bytes(file.path) as stream:
        name = likely_encoding(stream.read(HEAD))
    if not _utf8(options) or name == "utf-8":
        return options, []
    return dataclasses.replace(options, encoding=name), [f"its text is {name}"]


def _lines(file: SourceFile, options: CsvOptions) -> tuple[list[str], list[str]]:
    """The first and the last whole lines of the file, where these are cheap to reach."""
    with open_bytes(file.path) as stream:
        text: Any = stream if _utf8(options) else recode(stream, options.encoding, file)
        head = text.read(HEAD).removeprefix(b"\xef\xbb\xbf")
        if len(head) < HEAD:
            lines = _decoded(head)
            return lines, lines
        tail: list[str] = []
        if _utf8(options) and not is_compressed(file.path):
            stream.seek(-min(TAIL, file.size), os.SEEK_END)
            tail = _decoded(stream.read())[1:]
    return _decoded(head)[:-1], tail


def _utf8(options: CsvOptions) -> bool:
    return options.encoding.lower().replace("_", "-") in ("utf-8", "utf8", "ascii")


def _decoded(data: bytes) -> list[str]:
    return [line.decode("utf-8", "replace") for line in data.splitlines()]


class _Look:
    """The lines of one file, checked against the declared columns."""

    def __init__(self, file: SourceFile, source: SourceConfig, zone: str, head: list[str], tail: list[str]) -> None:
        self.source, self.zone, self.head, self.tail = source, zone, head, tail
        self.names = {
            name: (column.path or name, *column.aliases)
            for name, column in source.columns.items()
            if column.path not in OF_FILE and name not in file.partitions
        }

    def options(self) -> tuple[CsvOptions, list[str]]:
        """(options that read more of the lines than the given ones, the reason for each)."""
        given = self.source.csv
        options, reasons = self._headed(given)
        for step in (self._trailing, self._comments, self._after_header, self._footer):
            changes, reason = step(options)
            if changes:
                options = dataclasses.replace(options, **changes)
                reasons.append(reason)
        return (options, reasons) if self._misread(options) < self._misread(given) else (given, [])

    # -------------------------------------------------------------------------------------------------- lines

    def _is_comment(self, line: str, options: CsvOptions) -> bool:
        return not line or bool(options.comment and line.startswith(options.comment))

    def _first(self, options: CsvOptions) -> int:
        """The line that is read as header, or as the first row."""
        place = options.skip
        while place < len(self.head) and self._is_comment(self.head[place], options):
            place += 1
        return place

    def _columns(self, options: CsvOptions) -> list[str]:
        if not options.header:
            return [paths[0] for paths in self.names.values()]
        place = self._first(options)
        found = _fields(self.head[place], options) if place < len(self.head) else []
        return found[:-1] if options.trailing_delimiter and found[-1:] == [""] else found

    def _named(self, found: list[str]) -> bool:
        """Whether a line names every column that must be there."""
        return all(
            any(path in found for path in paths) or self.source.columns[name].missing != "fail"
            for name, paths in self.names.items()
        )

    def _rows(self, options: CsvOptions) -> list[_Row]:
        start = self._first(options) + (1 + options.skip_after_header if options.header else 0)
        lines = self.head
        if self.tail is self.head and options.footer:
            lines = lines[: -options.footer]
        return self._judged(list(_cut(lines, start, options, self._is_comment)), options)

    def _judged(self, rows: list[_Row], options: CsvOptions) -> list[_Row]:
        columns = self._columns(options)
        width = len(columns) + options.trailing_delimiter
        bad, typed = [0] * len(rows), [0] * len(rows)
        for name, paths in self.names.items():
            place = next((columns.index(path) for path in paths if path in columns), None)
            column = self.source.columns[name]
            kind = parse_type(column.type)
            if place is None or pa.types.is_string(kind) or pa.types.is_nested(kind):
                continue
            values = [row.fields[place] if place < len(row.fields) else None for row in rows]
            values = [None if value in options.nulls or not (value or "").strip() else value for value in values]
            wrong = set(
                to_type(pa.array(values, pa.string()), kind, reading(self.source, name, self.zone)).bad.tolist()
            )
            for number, value in enumerate(values):
                bad[number] += number in wrong
                typed[number] += value is not None
        for number, row in enumerate(rows):
            whole = len(row.fields) == width and not (options.trailing_delimiter and row.fields[-1])
            row.fits = whole and not bad[number]
            row.foreign = not whole or (bad[number] > 0 and 2 * bad[number] > typed[number])
        return rows

    def _misread(self, options: CsvOptions) -> float:
        """Share of the lines that cannot be read as rows; 2 if the columns are not found."""
        columns = self._columns(options)
        if not self._named(columns) or len(set(columns)) < len(columns):
            return 2.0
        rows = self._rows(options)
        found = sum(not row.fits for row in rows) / len(rows) if rows else 1.0
        return found + sum(not row.fits for row in self._last_rows(options)) / (len(self.tail) + 1)

    def _last_rows(self, options: CsvOptions) -> list[_Row]:
        if self.tail is self.head:
            return []
        lines = self.tail[: len(self.tail) - options.footer]
        return self._judged(list(_cut(lines, 0, options, self._is_comment)), options)

    # -------------------------------------------------------------------------------------------------- steps

    def _headed(self, options: CsvOptions) -> tuple[CsvOptions, list[str]]:
        """Options with which the columns are found."""
        found = self._columns(options)
        if self._named(found) and len(set(found)) == len(found):
            return options, []
        if len(set(found)) < len(found) == len(self.names) and options.header:
            said = dataclasses.replace(options, header=False, skip=self._first(options) + 1, skip_after_header=0)
            return said, ["its header has a name twice, and as many names as are declared"]
        for delimiter in dict.fromkeys((options.delimiter, *DELIMITERS)) if options.header else ():
            said = dataclasses.replace(options, delimiter=delimiter)
            for place, line in enumerate(self.head[:LONGEST_PREAMBLE]):
                fields = _fields(line, said)
                if self._named(fields) and len(set(fields)) == len(fields):
                    return self._skipped(said, place, options)
        for delimiter in dict.fromkeys((options.delimiter, *DELIMITERS)):
            said = dataclasses.replace(options, delimiter=delimiter, header=False, skip_after_header=0)
            rows = self._rows(said)
            if rows and rows[0].fits and len(rows[0].fields) == len(self.names):
                reason = [f"{delimiter!r} separates its fields"] if delimiter != options.delimiter else []
                return said, [*reason, "its first line is a row and names no columns"] if options.header else reason
        return options, []

    def _skipped(self, said: CsvOptions, place: int, given: CsvOptions) -> tuple[CsvOptions, list[str]]:
        reasons = [f"{said.delimiter!r} separates its fields"] if said.delimiter != given.delimiter else []
        if place == self._first(dataclasses.replace(said, skip=given.skip)):
            return said, reasons
        mark = _common_mark(self.head[:place], self.head[place:], said.delimiter)
        if mark:
            reasons.append(f"lines that begin with {mark!r} are comments")
            return dataclasses.replace(said, comment=mark, skip=0), reasons
        reasons.append(f"line {place + 1} names the columns")
        return dataclasses.replace(said, skip=place), reasons

    def _trailing(self, options: CsvOptions) -> Change:
        width = len(self._columns(options))
        rows = self._rows(options)
        longer = sum(len(row.fields) == width + 1 and not row.fields[-1] for row in rows)
        exact = sum(len(row.fields) == width for row in rows)
        if not options.trailing_delimiter and longer > exact:
            return {"trailing_delimiter": True}, "its rows end with a delimiter"
        if options.trailing_delimiter and exact > longer:
            return {"trailing_delimiter": False}, "its rows end without a delimiter"
        return {}, ""

    def _comments(self, options: CsvOptions) -> Change:
        if options.comment:
            return {}, ""
        rows = self._rows(options)
        bad = [self.head[row.start] for row in rows if row.foreign]
        good = [self.head[row.start] for row in rows if not row.foreign]
        marks = [found.group() for found in map(_MARK.match, bad) if found]
        mark = min(marks, key=len) if marks else ""
        if not mark or mark == options.delimiter or any(line.startswith(mark) for line in good):
            return {}, ""
        return {"comment": mark}, f"lines that begin with {mark!r} are comments"

    def _after_header(self, options: CsvOptions) -> Change:
        rows = self._rows(options)
        first = next((number for number, row in enumerate(rows) if row.fits), 0)
        if not options.header or not first or not all(row.foreign for row in rows[:first]):
            return {}, ""
        header = self._first(options)
        start, stop = rows[0].start + 1, rows[first].start
        shown = f"line {start} is" if start == stop else f"lines {start} to {stop} are"
        return {"skip_after_header": rows[first].start - header - 1}, f"{shown} no row"

    def _footer(self, options: CsvOptions) -> Change:
        if not self.tail:
            return {}, ""
        whole = self.tail is self.head
        rows = self._rows(options) if whole else self._last_rows(options)
        last = next((number for number, row in enumerate(reversed(rows)) if row.fits), 0)
        if not last or not all(row.foreign for row in rows[-last:]):
            return {}, ""
        lines = len(self.tail) - rows[-last - 1].stop
        if not 0 < lines <= LONGEST_FOOTER:
            return {}, ""
        return {"footer": lines}, "its last line is no row" if lines == 1 else f"its last {lines} lines are no rows"


def _cut(lines: list[str], start: int, options: CsvOptions, left_out: Any) -> Iterator[_Row]:
    """Rows from line `start` on; a quoted field may span several lines."""
    while start < len(lines):
        if left_out(lines[start], options):
            start += 1
            continue
        stop = start + 1
        while options.quote and "\n".join(lines[start:stop]).count(options.quote) % 2 and stop < len(lines):
            stop += 1
            if stop - start > LONGEST_QUOTED:
                stop = start + 1
                break
        yield _Row(start, stop, _fields("\n".join(lines[start:stop]), options))
        start = stop


def _fields(text: str, options: CsvOptions) -> list[str]:
    try:
        return next(csv.reader(io.StringIO(text, newline=""), **dialect(options)), [])
    except csv.Error:
        return []


def _common_mark(before: list[str], after: list[str], delimiter: str) -> str:
    """What every line before the header begins with and none behind it, where that looks like the mark of a comment."""
    marks = [_MARK.match(line) for line in before if line]
    if not marks or not all(marks):
        return ""
    mark = min((found.group() for found in marks if found), key=len)
    usable = mark != delimiter and all(line.startswith(mark) for line in before if line)
    return mark if usable and not any(line.startswith(mark) for line in after) else ""
