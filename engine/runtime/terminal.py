"""Output to a terminal: text without control sequences, and tables.

Names of files, columns and categories come from data. An escape sequence in them could move the cursor, change the
window's title or hide a line, so control characters are shown as their codes.
"""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

DIGEST = re.compile(r"[0-9a-f]{64}")
# Control and format characters (bidirectional overrides, zero width), except \n and \t.
_STEERING = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_ALLOWED = "\n\t"


def printable(text: str) -> str:
    """The text with control and format characters as their codes; line ends and tabs stay."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escaped(letter) if _steers(letter) else letter for letter in text)


def one_line(text: str) -> str:
    """The same with line ends and tabs escaped too, for a name within a line."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def _steers(letter: str) -> bool:
    return letter not in _ALLOWED and unicodedata.category(letter) in _STEERING


def _escaped(letter: str) -> str:
    code = ord(letter)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def out(text: str) -> None:
    """Write to stdout."""
    sys.stdout.write(printable(text))


def err(text: str) -> None:
    """Write to stderr at once."""
    sys.stderr.write(printable(text))
    sys.stderr.flush()


def rows(found: Sequence[Mapping[str, object]], as_json: bool, nothing: str = "") -> None:
    """Write records to stdout as JSON or as a table with short digests; `nothing` if there are none."""
    if as_json:
        out(json.dumps(list(found), indent=1, default=str) + "\n")
    elif found:
        out(table(list(found[0]), [list(row.values()) for row in found]))
    elif nothing:
        out(nothing + "\n")


def collected(found: Sequence[Mapping[str, Any]], what: str, delete: bool, as_json: bool, nothing: str = "") -> None:
    """What a clean-up has found, on stdout, what goes first: `kept` of a record says why it stays, None that it goes."""
    found = sorted(found, key=lambda row: row["kept"] is not None)
    if as_json:
        rows([{**row, "removed": delete and row["kept"] is None} for row in found], True)
        return
    rows([{**row, "kept": row["kept"] or ("removed" if delete else "may go")} for row in found], False, nothing)
    going = [row for row in found if row["kept"] is None]
    told = f"{len(going)} of {len(found)} {what}, {sum(row['bytes'] for row in going) / 1e6:,.1f} MB"
    out(f"{told} removed\n" if delete else f"{told} may go{': add --delete to remove them' if going else ''}\n")


def table(columns: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """A table as aligned text, numbers right-aligned."""
    texts = [[one_line(cell(value)) for value in line] for line in lines]
    widths = [
        max(len(name), *(len(text[place]) for text in texts)) if texts else len(name)
        for place, name in enumerate(columns)
    ]
    right = [any(isinstance(line[place], (int, float)) for line in lines) for place in range(len(columns))]
    return "\n".join([_line(columns, widths, right), *(_line(text, widths, right) for text in texts)]) + "\n"


def _line(row: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> str:
    return "  ".join(
        text.rjust(width) if at_right else text.ljust(width)
        for text, width, at_right in zip(row, widths, right, strict=True)
    ).rstrip()


def cell(value: Any) -> str:
    """Short text of a value: six digits of a float, twelve of a digest, seconds of an instant."""
    if value is None or value == "":
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ", ".join(value) or "-"
    text = json.dumps(value, default=str) if isinstance(value, (dict, list, bool)) else str(value)
    if DIGEST.fullmatch(text):
        return text[:12]
    return text[:19] if re.match(r"\d{4}-\d\d-\d\dT\d\d:", text) else text
