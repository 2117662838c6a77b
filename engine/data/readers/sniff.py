"""The dialect of a text file, from its first megabyte: encoding, delimiter, quote, preamble and header."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from engine.config.sections.data import CsvOptions
from engine.data import query
from engine.data.files import SourceFile, likely_encoding, open_bytes
from engine.errors import UserError

HEAD = 1 << 20
_NONE = ("", "\0", "(empty)", None)


def dialect_of(file: SourceFile) -> tuple[CsvOptions, list[str]]:
    """(options that read the file, its column names). Without a header the names are `column_1`, ...

    Raises UserError for a file without a row, and where no delimiter makes columns of it.
    """
    with open_bytes(file.path) as stream:
        head = stream.read(HEAD)
    if not head.strip():
        raise UserError(f"{file.shown} is empty: it must hold at least one row")
    encoding = likely_encoding(head)
    text = head.decode(encoding, "ignore").removeprefix("\ufeff")
    lines = text.splitlines(keepends=True)
    whole = lines[:-1] if len(head) == HEAD and len(lines) > 1 else lines
    found = _sniffed("".join(whole), file)
    options = CsvOptions(
        delimiter=found["Delimiter"],
        quote='"' if found["Quote"] in _NONE else found["Quote"],
        encoding=encoding,
        header=bool(found["HasHeader"]),
        skip=int(found["SkipRows"]),
        comment=None if found["Comment"] in _NONE else found["Comment"],
    )
    names = [column["name"] for column in found["Columns"]]
    if not options.header:
        names = [f"column_{place}" for place in range(1, len(names) + 1)]
    return options, names


def _sniffed(text: str, file: SourceFile) -> dict[str, Any]:
    """What DuckDB's sniffer finds in the text."""
    duckdb = query.library()
    with tempfile.TemporaryDirectory() as folder:
        sample = Path(folder) / "sample.csv"
        sample.write_text(text, encoding="utf-8", newline="")
        with duckdb.connect(":memory:", config={"threads": 1}) as connection:
            try:
                result = connection.execute("SELECT * FROM sniff_csv(?, sample_size = -1)", [str(sample)])
                names = [column[0] for column in result.description]
                row = result.fetchone()
            except duckdb.Error as error:
                reason = str(error).splitlines()[0]
                raise UserError(
                    f"{file.shown} must be text in columns, but no delimiter makes columns of it ({reason}). Write its "
                    "source by hand: docs/configuration.md"
                ) from None
    assert row is not None  # the sniffer answers one row, or raises
    return dict(zip(names, row, strict=True))
