"""Splits delimited text into pieces that end at row ends, and separates rows with broken quoting."""

from __future__ import annotations

import csv
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from engine.config.sections.data import CsvOptions
from engine.data.bounds import LONGEST_ROW, USUAL, Bounds
from engine.data.columns import Lost
from engine.data.files import unpacking
from engine.errors import UserError

PIECE = 1 << 24
_LOOK = 1 << 18


@dataclasses.dataclass
class Piece:
    """Complete rows. `messy`: quotes are misplaced, so that only a strict reader can find the ends of rows."""

    data: Any  # bytes, or an Arrow buffer over a mapped file
    messy: bool = False
    quoted: bool = False


def read_block(stream: BinaryIO, size: int | None = None) -> bytes:
    """The next bytes of a stream; a broken archive is a UserError."""
    with unpacking("the file"):
        return bytes(stream.read(size or PIECE))


def piece_bytes(bounds: Bounds) -> int:
    """Bytes of text that are parsed at once; as rows they take several times as many."""
    return min(PIECE, bounds.batch // 4)


def pieces(stream: BinaryIO, head: bytes, options: CsvOptions | None = None, bounds: Bounds = USUAL) -> Iterator[Piece]:
    """Pieces of `head` followed by the stream, without comment lines. From the first misplaced quote on, the rest is one
    messy piece a block, comments included: only the strict reader of `sift` knows there where a row begins.
    """
    quote = options.quote.encode() if options else b""
    delimiter = options.delimiter.encode() if options else b","
    comment = (options.comment or "").encode() if options else b""
    rest, messy = head, bool(options and options.escape)
    while True:
        block = read_block(stream, piece_bytes(bounds))
        last = not block
        rest += block
        if block and not messy and b"\n" not in block and b"\r" not in block:  # no row ends here
            if len(rest) > bounds.row:
                raise too_long(bounds)
        elif messy:
            # The strict reader finds the ends of rows itself: pass on the bytes.
            if rest:
                yield Piece(rest, True)
            rest = b""
        else:
            end, rows = _whole_rows(rest, last, quote, comment)
            if quote and quote in rows and not well_quoted(rows, quote, delimiter):
                messy = True
                yield Piece(rest, True)
                rest = b""
            elif end:
                if rows:
                    yield Piece(rows, quoted=bool(quote) and quote in rows)
                rest = rest[end:]
            elif len(rest) > bounds.row:
                raise too_long(bounds)
        if last:
            return


def too_long(bounds: Bounds) -> UserError:
    """The error for text without a line end for longer than a row may be."""
    return UserError(
        f"a row must not be longer than {bounds.row:,} bytes (an eighth of resources.memory, at most {LONGEST_ROW:,}), found "
        "no line end in them: are the line ends, the delimiter and the quote right? A row that is right needs more "
        "resources.memory, or another format"
    )


def mapped_pieces(path: Path, start: int, options: CsvOptions, bounds: Bounds) -> Iterator[Piece]:
    """Pieces of a plain file from byte `start` on, as views of it: nothing is copied until the first quote or comment."""
    special = [text.encode()[0] for text in (options.quote, options.comment) if text]
    with pa.memory_map(str(path)) as mapped:
        size = mapped.size()
        while start < size and not options.escape:
            mapped.seek(start)
            view = mapped.read_buffer(piece_bytes(bounds))
            if any(_holds(view, byte) for byte in special):
                break
            end = view.size if start + view.size == size else _last_line_end(view)
            if not end:
                break
            yield Piece(view.slice(0, end))
            start += end
    if start < size:
        with open(path, "rb") as file:
            file.seek(start)
            yield from pieces(file, b"", options, bounds)


def _holds(view: pa.Buffer, byte: int) -> bool:
    raw = np.frombuffer(view, np.uint8)
    return any(bool((raw[at : at + _LOOK] == byte).any()) for at in range(0, len(raw), _LOOK))


def _last_line_end(view: pa.Buffer) -> int:
    for at in range(view.size, 0, -_LOOK):
        low = max(0, at - _LOOK)
        found = view.slice(low, at - low).to_pybytes().rfind(b"\n")
        if found >= 0:
            return low + found + 1
    return 0


def _whole_rows(data: bytes, last: bool, quote: bytes, comment: bytes) -> tuple[int, bytes]:
    """(length of the whole rows at the start of `data`, these rows without comment lines)."""
    lines = _comment_lines(data, quote, comment) if comment else []
    if not lines:
        end = len(data) if last else _end(data, quote)
        return end, data[:end]
    open_ended = not last and lines[-1][1] == len(data)  # the rest of the comment may be in the next block
    starts = [0, *(stop for _, stop in lines)]
    stops = [*(start for start, _ in lines), lines[-1][1] if open_ended else len(data)]
    rows = b"".join(data[start:stop] for start, stop in zip(starts, stops, strict=True))
    end = len(rows) if last else _end(rows, quote)
    behind = end  # the same place in `data`
    for start, stop in lines[: len(lines) - open_ended]:
        if start > behind:
            break
        behind += stop - start
    return behind, rows[:end]


def _comment_lines(data: bytes, quote: bytes, comment: bytes) -> list[tuple[int, int]]:
    """[start, stop) of the lines that begin with `comment` outside quotes; `data` begins where a row does."""
    places = [0] if data.startswith(comment) else []
    for sign in (b"\n", b"\r"):
        place = data.find(sign + comment)
        while place >= 0:
            places.append(place + 1)
            place = data.find(sign + comment, place + 1)
    found, seen, inside = [], 0, False
    for place in sorted(places):
        inside ^= bool(quote) and data.count(quote, seen, place) % 2 == 1
        seen = place
        if not inside:
            seen = line_stop(data, place)
            found.append((place, seen))
    return found


_LINE_END = re.compile(rb"\r\n|\n|\r")


def first_line_end(data: bytes, quote: bytes) -> int:
    """Where the first line ends (a line end outside quotes); -1 if there is no end."""
    raw = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero((raw == 10) | (raw == 13))
    if quote and quote in data:
        ends = ends[np.searchsorted(np.flatnonzero(raw == quote[0]), ends) % 2 == 0]
    return int(ends[0]) if len(ends) else -1


def line_stop(data: bytes, start: int) -> int:
    """Where the line that begins at `start` ends, its line end included; the length of `data` if it has none."""
    found = _LINE_END.search(data, start)
    return found.end() if found else len(data)


def _end(data: bytes, quote: bytes) -> int:
    """Length of the whole rows at the start of `data`: up to the last line end outside quotes."""
    if quote and quote in data:
        return _end_outside_quotes(data, quote)
    end = data.rfind(b"\n") + 1
    if not end:
        # Old Macintosh text ends its lines with \r; one at the very end might be the first half of \r\n.
        end = data.rfind(b"\r", 0, len(data) - 1) + 1
    return end


def _end_outside_quotes(data: bytes, quote: bytes) -> int:
    raw = np.frombuffer(data, np.uint8)
    quotes = np.flatnonzero(raw == quote[0])
    for sign in (b"\n", b"\r"):
        ends = np.flatnonzero(raw[: len(raw) - (sign == b"\r")] == sign[0])
        outside = ends[np.searchsorted(quotes, ends) % 2 == 0]
        if len(outside):
            return int(outside[-1]) + 1
    return 0


def well_quoted(data: bytes, quote: bytes, delimiter: bytes) -> bool:
    """Whether every quote opens a field at its start, closes one at its end, or is doubled inside one (RFC 4180)."""
    raw = np.frombuffer(data, np.uint8)
    places = np.flatnonzero(raw == quote[0])
    if len(places) % 2:
        return False
    borders = np.zeros(256, bool)
    borders[[delimiter[0], 10, 13]] = True
    opening, closing = places[0::2], places[1::2]
    before = np.where(opening > 0, raw[np.maximum(opening - 1, 0)], 10)
    after = np.where(closing < len(raw) - 1, raw[np.minimum(closing + 1, len(raw) - 1)], 10)
    doubled = np.zeros(len(opening), bool)
    doubled[1:] = opening[1:] == closing[:-1] + 1
    follows = np.zeros(len(closing), bool)
    follows[:-1] = doubled[1:]
    return bool(np.all(borders[before] | doubled) and np.all(borders[after] | follows))


def dialect(options: CsvOptions) -> dict[str, Any]:
    """The options for Python's csv module."""
    return {
        "delimiter": options.delimiter, "quotechar": options.quote or None, "escapechar": options.escape,
        "doublequote": options.escape is None, "quoting": csv.QUOTE_MINIMAL if options.quote else csv.QUOTE_NONE,
    }  # fmt: skip


def separate_broken_rows(
    stream: Iterator[Piece], options: CsvOptions, bounds: Bounds = USUAL
) -> Iterator[tuple[bytes, list[Lost], int]]:
    """(text of the good rows, rows that break the quoting, number of rows) of messy pieces, some MiB at a time.

    A quote inside an unquoted field is a character like any other; text after a closing quote loses the row.
    """
    csv.field_size_limit(bounds.row)
    lines = _Lines(stream, (options.comment or "").encode(), bounds)
    reader = csv.reader(lines, strict=True, **dialect(options))
    good, lost, number = [], [], 0
    size = 0
    while True:
        reason = ""
        try:
            fields = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            fields, reason = [], f"breaks the quoting: {error}"
        raw = lines.taken()
        if not fields and not reason:
            continue
        number += 1
        if reason:
            lost.append(Lost(number, raw.decode("utf-8", "backslashreplace").rstrip("\r\n"), reason))
        else:
            good.append(raw)
            size += len(raw)
        if size > piece_bytes(bounds):
            yield b"".join(good), lost, number
            good, lost, number, size = [], [], 0, 0
    if number:
        yield b"".join(good), lost, number


class _Lines:
    """Lines of pieces as latin-1 text, a letter a byte; remembers the bytes that were handed out."""

    def __init__(self, stream: Iterator[Piece], comment: bytes, bounds: Bounds) -> None:
        self._lines = self._cut(stream, bounds)
        self._comment = comment
        self._taken: list[bytes] = []

    @staticmethod
    def _cut(stream: Iterator[Piece], bounds: Bounds) -> Iterator[bytes]:
        rest = b""
        for piece in stream:
            lines = (rest + piece.data).splitlines(keepends=True)
            rest = lines.pop() if lines and (not lines[-1].endswith(b"\n")) else b""
            if len(rest) > bounds.row:
                raise too_long(bounds)
            yield from lines
        if rest:
            yield rest

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        while self._comment and not self._taken and line.startswith(self._comment):  # not inside a row
            line = next(self._lines)
        self._taken.append(line)
        return line.decode("latin-1")

    def taken(self) -> bytes:
        """The bytes returned since the last call."""
        raw, self._taken = b"".join(self._taken), []
        return raw
