"""Skips lines of a text file that are not part of its table: before the header, right after it, at the end of the file.

Lines are those of an editor: they end at a line end, whatever quotes stand in them.
"""

from __future__ import annotations

import io
from typing import Any, BinaryIO

from engine.data.bounds import SHORTEST_LIMIT, Bounds
from engine.data.readers.split_text import line_stop, read_block, too_long
from engine.errors import UserError

LONGEST_LINE = SHORTEST_LIMIT  # before the rows


def more(stream: BinaryIO, start: bytes) -> bytes:
    """`start` and the next block of the stream. Raises UserError when `start` is longer than a line before the rows may be."""
    if len(start) > LONGEST_LINE:
        raise UserError(
            f"the header, a comment or a line that is left out before the rows must not be longer than {LONGEST_LINE:,} bytes, "
            "found no line end in them: are the line ends and the quote right?"
        )
    return start + read_block(stream)


def at_least(stream: BinaryIO, size: int) -> bytes:
    """The start of the stream: `size` bytes or more, or the whole stream."""
    head = b""
    while len(head) < size and (block := read_block(stream)):
        head += block
    return head


def _without_line(stream: BinaryIO, head: bytes) -> bytes:
    while True:
        stop = line_stop(head, 0)
        if stop < len(head) or head.endswith(b"\n"):  # a \r at the end of a block may be half of \r\n
            return head[stop:]
        longer = more(stream, head)
        if len(longer) == len(head):
            return b""
        head = longer


def without_lines(stream: BinaryIO, head: bytes, count: int) -> bytes:
    """`head` without its first `count` lines; more of the stream is read if needed."""
    for _ in range(count):
        head = _without_line(stream, head)
    return head


def without_comments(stream: BinaryIO, head: bytes, comment: str | None) -> bytes:
    """`head` from the first line that is not blank and not a comment."""
    prefix = (comment or "").encode()
    while True:
        head = head.lstrip(b"\r\n")
        if len(head) < max(len(prefix), 1):
            longer = more(stream, head)
            if len(longer) == len(head):
                return head
            head = longer
        elif prefix and head.startswith(prefix):
            head = _without_line(stream, head)
        else:
            return head


def without_footer(stream: BinaryIO, lines: int, bounds: Bounds) -> BinaryIO:
    """The stream without its last lines; a line end at the very end begins no further line."""
    return io.BufferedReader(_Footless(stream, lines, bounds), 1 << 20) if lines else stream  # type: ignore[arg-type]


class _Footless(io.RawIOBase):
    """Holds back the last lines of what was read so far."""

    def __init__(self, stream: BinaryIO, lines: int, bounds: Bounds) -> None:
        self._stream, self._lines, self._bounds = stream, lines, bounds
        self._held, self._ready, self._place = b"", b"", 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while self._place == len(self._ready):
            block = read_block(self._stream)
            if not block:
                return 0
            if len(self._held) > self._bounds.row:
                raise too_long(self._bounds)
            held = self._held + block
            start = footer_start(held, self._lines)
            self._ready, self._held, self._place = held[:start], held[start:], 0
        count = min(len(buffer), len(self._ready) - self._place)
        buffer[:count] = self._ready[self._place : self._place + count]
        self._place += count
        return count


def footer_start(data: bytes, lines: int) -> int:
    """Where the last `lines` lines of `data` begin; 0 if it has no more lines."""
    size = 1 << 12
    while True:
        tail = data[-size:].splitlines(keepends=True)
        if len(tail) > lines:  # the first may be the end of a longer line
            return len(data) - sum(map(len, tail[-lines:]))
        if size >= len(data):
            return 0
        size *= 4
