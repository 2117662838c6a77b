"""Text of a date or time in a strptime format, read strictly: the whole text, every field within its range, a day that exists.

Arrow leaves this to the C library, which takes 31 February for 3 March, a year of two digits for one of the first century
and a 61st second for the next minute.
"""

from __future__ import annotations

import functools
import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.errors import UserError

_SHORT = {"F": "%Y-%m-%d", "T": "%H:%M:%S", "R": "%H:%M", "D": "%m/%d/%y", "h": "%b"}
_MONTHS = (
    "january", "february", "march", "april", "may", "june", "july", "august", "september", "october", "november", "december",
)  # fmt: skip
_DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
_FIELDS = {
    "Y": "[0-9]{4}", "y": "[0-9]{2}", "m": "0[1-9]|1[0-2]", "d": "0[1-9]|[12][0-9]|3[01]", "j": "[0-3][0-9]{2}",
    "H": "[01][0-9]|2[0-3]", "I": "0[1-9]|1[0-2]", "M": "[0-5][0-9]", "S": "[0-5][0-9]", "f": "[0-9]{1,6}",
    "z": "[+-](?:[01][0-9]|2[0-3]):?[0-5][0-9]|Z", "p": "(?i:am|pm)",
    "b": f"(?i:{'|'.join(name[:3] for name in _MONTHS)})", "B": f"(?i:{'|'.join(_MONTHS)})",
    "a": f"(?i:{'|'.join(name[:3] for name in _DAYS)})", "A": f"(?i:{'|'.join(_DAYS)})",
}  # fmt: skip
_SINGLE = {"m": "[1-9]", "d": "[1-9]", "H": "[0-9]", "I": "[1-9]", "M": "[0-9]", "S": "[0-9]"}
_ONCE = ("Yy", "mbBj", "dj", "HI", "aA")  # fields that say the same thing


@functools.lru_cache(maxsize=256)
def _compiled(form: str) -> tuple[str, frozenset[str]]:
    """The regular expression of a format, a named group for every field, and the names of the fields.

    Raises UserError for a format that does not say which day is meant, says it twice, or has other fields than these.
    """
    parts = [
        part for short in _parts(form) for part in _parts(_SHORT.get(short[1:], short) if short[0] == "%" else short)
    ]
    fields = [part[1:] for part in parts if part[0] == "%" and part != "%%"]
    for field in fields:
        if field not in _FIELDS:
            known = ", ".join(f"%{name}" for name in (*_FIELDS, *_SHORT, "%"))
            raise UserError(f"a format must be made of text and {known}, found {'%' + field!r} in {form!r}")
    for same in (*_ONCE, *fields):
        if len(found := [field for field in fields if field in same]) > 1:
            raise UserError(f"a format must say everything once, found %{' and %'.join(found)} in {form!r}")
    if not {"Y", "y"} & set(fields):
        raise UserError(f"a format must have a year, %Y or %y, found {form!r}")
    if ("I" in fields) != ("p" in fields):
        raise UserError(f"a format must have %I and %p together, or %H without them, found {form!r}")
    return "^" + "".join(_pattern(parts, place) for place in range(len(parts))) + "$", frozenset(fields)


def _parts(form: str) -> list[str]:
    return re.findall(r"%.|[^%]+|%$", form, re.DOTALL)


def _pattern(parts: list[str], place: int) -> str:
    part = parts[place]
    if part[0] != "%" or part == "%%":
        return re.escape(part.replace("%%", "%"))
    field = part[1:]
    # A number next to another one must have all of its digits: 2022111 is ambiguous.
    before = parts[place - 1] if place else " "
    after = parts[place + 1] if place + 1 < len(parts) else " "
    apart = not (_is_number(before, -1) or _is_number(after, 0))
    return f"(?P<{field}>{_FIELDS[field]}{f'|{_SINGLE[field]}' if apart and field in _SINGLE else ''})"


def _is_number(part: str, end: int) -> bool:
    return part[1:] in ("Y", "y", "f", "j", *_SINGLE) if part[0] == "%" and part != "%%" else part[end].isdecimal()


def read(text: pa.Array, form: str) -> pa.Array:
    """Timestamps (us; UTC if the format has an offset, else local) of text; null where the text does not match exactly.

    A month, day or time that is not in the format is the first one. Raises UserError for a format that `check` rejects.
    """
    pattern, names = _compiled(form)
    found = pc.extract_regex(text, pattern)
    matched = np.asarray(pc.fill_null(pc.and_(text.is_valid(), found.is_valid()), False))
    fields = {name: pc.if_else(pa.array(matched), pc.struct_field(found, name), None) for name in names}
    day, exists = _days(fields)
    clock = _number(fields, "M") * 60 + _number(fields, "S") + _number(fields, "H") * 3600
    if "I" in fields:
        clock += (_number(fields, "I") % 12 + 12 * _place(fields["p"], ("am", "pm"))) * 3600
    micros = (day * 86_400 + clock) * 1_000_000
    if "f" in fields:
        micros += _integers(pc.utf8_rpad(fields["f"], 6, "0"))
    if "z" in fields:
        micros -= _offset(fields["z"]) * 1_000_000
    kind = pa.timestamp("us", tz="UTC" if "z" in fields else None)
    return pa.array(micros, mask=~(matched & exists)).cast(kind)


def _days(fields: dict[str, pa.Array]) -> tuple[np.ndarray, np.ndarray]:
    """(days since 1970, whether there is such a day) of every text."""
    year = _number(fields, "Y")
    if "y" in fields:  # as in POSIX, 69 to 99 are 1969 to 1999
        year = _number(fields, "y")
        year = year + np.where(year < 69, 2000, 1900)
    months = (year - 1970) * 12
    last = months + 12
    if "j" not in fields:
        names = {"b": tuple(name[:3] for name in _MONTHS), "B": _MONTHS}
        named = [_place(fields[field], words) for field, words in names.items() if field in fields]
        months = months + (named[0] if named else _number(fields, "m", 1) - 1)
        last = months + 1
    first, stop = (month.astype("datetime64[M]").astype("datetime64[D]").astype(np.int64) for month in (months, last))
    days = first + _number(fields, "j" if "j" in fields else "d", 1) - 1
    exists = (days >= first) & (days < stop) & (year > 0)
    for field, words in (("a", tuple(name[:3] for name in _DAYS)), ("A", _DAYS)):
        if field in fields:
            exists &= (days + 3) % 7 == _place(fields[field], words)  # 1970 began on a Thursday
    return days, exists


def _number(fields: dict[str, pa.Array], name: str, otherwise: int = 0) -> np.ndarray:
    return _integers(fields[name]) if name in fields else np.int64(otherwise)  # type: ignore[return-value]


def _integers(text: pa.Array) -> np.ndarray:
    return np.asarray(pc.fill_null(text, "0").cast(pa.int64()))


def _place(text: pa.Array, words: tuple[str, ...]) -> np.ndarray:
    return np.asarray(pc.fill_null(pc.index_in(pc.utf8_lower(text), pa.array(words)), 0)).astype(np.int64)


def _offset(text: pa.Array) -> np.ndarray:
    """Seconds of `+05:30`, `-0130` and `Z`."""
    digits = pc.replace_substring(pc.if_else(pc.equal(text, "Z"), "+0000", text), ":", "")
    seconds = (
        _integers(pc.utf8_slice_codeunits(digits, 1, 3)) * 3600 + _integers(pc.utf8_slice_codeunits(digits, 3)) * 60
    )
    return np.where(np.asarray(pc.fill_null(pc.starts_with(digits, "-"), False)), -seconds, seconds)
