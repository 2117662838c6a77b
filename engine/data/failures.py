"""Errors that libraries raise for users' data, as messages: what could not be read, why, and what to do."""

from __future__ import annotations

import contextlib
import lzma
import re
import struct
import zipfile
import zlib
from collections.abc import Collection, Iterator
from pathlib import PurePath

from engine.errors import UserError

LIBRARIES = {
    "pyarrow", "duckdb", "_duckdb", "deltalake", "_internal", "arro3", "pyiceberg", "pydantic", "pydantic_core", "fsspec",
    "zipfile", "gzip", "bz2", "lzma", "_compression", "encodings", "codecs",
}  # fmt: skip
# Always errors of the data or machine: of disks, archives, encodings, too large numbers or allocations.
RAISED = (
    OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, struct.error, UnicodeError, OverflowError,
    MemoryError, NotImplementedError,
)  # fmt: skip
ADVICE = {  # by the name of DuckDB's exception
    "ConversionException": "TRY_CAST gives null where a value does not convert; or declare the column's type in the source",
    "InvalidInputException": "TRY_CAST gives null where a value does not convert; or declare the column's type in the source",
    "OutOfRangeException": "cast to a wider type first, such as DOUBLE or HUGEINT",
    "NotImplementedException": "declare another type in the source: float32 for a float16, decimal(38,s) or string for a "
    "wider decimal",
    "OutOfMemoryException": "allow more with resources.memory, or let the query select fewer columns",
}
# Errors of DuckDB that quote only the SQL.
QUOTES_NO_DATA = ("BinderException", "ParserException", "CatalogException", "SyntaxException", "PermissionException")


class Unreadable(UserError):
    """A file or table that a library cannot read."""


def from_library(error: BaseException) -> bool:
    """Whether a library or the disk raised the error, and not the engine, whose faults keep their traceback."""
    if isinstance(error, UserError):
        return False
    if isinstance(error, RAISED) or type(error).__module__.split(".")[0] in LIBRARIES:
        return True
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    # Compiled code has its own frames (pyarrow/scalar.pxi); Python code is in a folder with the library's name.
    return frame is not None and not LIBRARIES.isdisjoint(PurePath(frame.tb_frame.f_code.co_filename).parts)


def reason_of(error: BaseException) -> str:
    """The library's message on one line; DuckDB's with the line of SQL that it points at."""
    if isinstance(error, FileNotFoundError):
        return "it must exist, found nothing"
    if isinstance(error, MemoryError) and "malloc" in str(error):
        return f"its lengths ask for more memory than there is ({str(error).splitlines()[0]})"
    kept = 3 if type(error).__module__.endswith("duckdb") else 1
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:kept]) if lines else type(error).__name__


def reason_without_values(error: BaseException, sensitive: Collection[str]) -> str:
    """`reason_of` without quoted data: the text before the first colon (the library's phrase), and DuckDB's line of SQL.
    A message that is only about SQL or the disk is kept unchanged.
    """
    reason = reason_of(error)
    if (
        not sensitive
        or type(error).__name__ in QUOTES_NO_DATA
        or isinstance(error, (FileNotFoundError, PermissionError))
    ):
        return reason
    line = re.search(r" (LINE \d+: .*)", reason)
    phrase = re.sub(r"'[^']*'|\"[^\"]*\"|`[^`]*`|\d[\d.,]*", "...", reason.split(":")[0])
    why = f"the rest is not shown, for it may quote the sensitive {', '.join(sorted(sensitive))}"
    return f"{phrase} ({why}){f' {line[1]}' if line else ''}"


@contextlib.contextmanager
def explained(subject: str, note: str = "", sensitive: Collection[str] = ()) -> Iterator[None]:
    """Turn a library's error in the block into an Unreadable: `subject: reason; note; what to do`.

    `sensitive`: columns whose values the reason must not quote.
    """
    try:
        yield
    except Exception as error:
        if not from_library(error):
            raise
        said = (reason_without_values(error, sensitive), note, ADVICE.get(type(error).__name__, ""))
        cause = None if sensitive else error
        raise Unreadable(f"{subject}: {'; '.join(part for part in said if part)}") from cause
