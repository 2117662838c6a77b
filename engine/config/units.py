"""Parsing of durations, instants, sizes, shares and moments as written in a config.

`Span`, `Size`, `Share` and `Moment` are texts, as saved configs and digests hold them, that carry their parsed value.
Instants and periods need a time zone, so functions parse them. Instants are int64 microseconds since 1970-01-01 UTC
everywhere in the engine; spans are microseconds.
"""

from __future__ import annotations

import datetime
import re
import zoneinfo
from collections.abc import Callable
from typing import Any

from engine.errors import UserError

MICROSECONDS = {
    "us": 1,
    "ms": 1_000,
    "s": 1_000_000,
    "min": 60_000_000,
    "h": 3_600_000_000,
    "d": 86_400_000_000,
    "w": 604_800_000_000,
}
BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
CYCLE = 146_097 * MICROSECONDS["d"]  # 400 years of the Gregorian calendar
AUTO = "auto"
EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)

_SPAN = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]+)\s*$")
_FAR = re.compile(r"(-?\d{4,6})(-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}(?:\.\d{6})?\+00:00)")
_MOMENT = re.compile(r"""^\s*(?:"([^"]+)"|([^\W\d][^"+*-]*?))\s*(?:([+-])\s*(\d.*))?$""")


class Span(str):
    """A length of time as it was written (`2h`, `7d`, `90min`, `1.5s`). A `d` is 24 hours, never a calendar day.

    Raises UserError when the text is not a number followed by one of us, ms, s, min, h, d, w.
    """

    def __init__(self, text: str) -> None:
        match = _SPAN.match(text)
        if not match or match.group(2) not in MICROSECONDS:
            raise UserError(
                f"a span must be a number and one of {', '.join(MICROSECONDS)} (as in 90min or 7d), found {text!r}"
            )
        self.microseconds = round(float(match.group(1)) * MICROSECONDS[match.group(2)])

    @property
    def seconds(self) -> float:
        """Its length in seconds."""
        return self.microseconds / 1e6


class Size(str):
    """A number of bytes as it was written: `4GB`, `512MiB` or a plain whole number. Raises UserError for other texts."""

    ALSO = (int,)

    def __init__(self, text: str) -> None:
        match = _SPAN.match(text)
        if not text.isdecimal() and (not match or match.group(2) not in BYTES):
            raise UserError(f"a size must be a number and one of {', '.join(BYTES)} (as in 4GB), found {text!r}")
        self.bytes = round(float(match.group(1)) * BYTES[match.group(2)]) if match else int(text)


class Share(str):
    """A fraction of one as it was written: `1%` or `0.01`. Raises UserError when it is no number from 0 to 1."""

    ALSO = (float,)

    def __init__(self, text: str) -> None:
        try:
            self.fraction = float(text[:-1]) / 100 if text.endswith("%") else float(text)
        except ValueError:
            raise UserError(f"a share must be a number like 0.01 or 1%, found {text!r}") from None
        if not 0 <= self.fraction <= 1:
            raise UserError(f"a share must be between 0 and 1 (0% and 100%), found {text!r}")


class Moment(str):
    """A time column with an offset as it was written: `arrived`, `scheduled - 1h` or `Date paid + 15min`. A name with one of +-*
    in it, or that begins with a digit, is in double quotes: `"paid-on" + 1d`.

    Raises UserError for other texts.
    """

    column: str
    offset: int  # microseconds

    def __init__(self, text: str) -> None:
        match = _MOMENT.match(text)
        if not match:
            raise UserError(
                "a moment must be a time column with an optional span (as in `scheduled - 1h`; a name with signs in double "
                f"quotes), found {text!r}"
            )
        quoted, plain, sign, length = match.groups()
        self.column = quoted or plain
        offset = Span(length).microseconds if length else 0
        self.offset = -offset if sign == "-" else offset


def named(column: str) -> str:
    """The name of a time column as a moment reads it: in double quotes where it has to be."""
    match = _MOMENT.match(column)
    return column if match and match[2] == column else f'"{column}"'


def count(least: int) -> Callable[[Any], None]:
    """A check for `parse`: a whole number of at least `least`, or `auto`."""

    def check(value: Any) -> None:
        if value != AUTO and (not isinstance(value, int) or value < least):
            raise UserError(f"must be a whole number of at least {least}, or {AUTO}, found {value!r}")

    return check


def zone(name: str) -> zoneinfo.ZoneInfo:
    """The IANA time zone. Raises UserError for an unknown name."""
    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        raise UserError(f"a time zone must be an IANA name like Europe/Berlin or UTC, found {name!r}") from None


def instant(text: str, time_zone: str) -> int:
    """Microseconds UTC of `2013-06-01`, `2013-06-01T05:30`, `2013-06` (its first day) or a text with its own offset.

    A text without an offset is read in `time_zone`; a local time that occurs twice means its first occurrence.
    """
    text = str(text).strip()
    cycles = 0
    if (far := _FAR.fullmatch(text)) and not 0 < int(far[1]) < 10_000:  # as `format_instant` writes such years
        cycles = int(far[1]) // 400 - 5
        text = f"{int(far[1]) - 400 * cycles}{far[2]}"
    try:
        parsed = datetime.datetime.fromisoformat(f"{text}-01" if re.fullmatch(r"\d{4}-\d{2}", text) else text)
    except ValueError:
        raise UserError(
            f"an instant must be an ISO date or time like 2013-06-01 or 2013-06-01T05:30, found {text!r}"
        ) from None
    if parsed.tzinfo is None:
        parsed = parsed.replace(tzinfo=zone(time_zone))
    return (parsed - EPOCH) // datetime.timedelta(microseconds=1) + cycles * CYCLE


def between(bounds: tuple[str, ...] | list[str], time_zone: str) -> tuple[int, int]:
    """(from included, to excluded) in microseconds UTC."""
    if len(bounds) != 2:
        raise UserError(f"a period must be [from, to], from included and to excluded, found {list(bounds)}")
    start, stop = instant(bounds[0], time_zone), instant(bounds[1], time_zone)
    if start >= stop:
        raise UserError(f"a period must end after it starts, found {list(bounds)}")
    return start, stop


def window(text: str | tuple[str, ...] | list[str], time_zone: str) -> tuple[int, int]:
    """(from, to) in microseconds UTC of a month `2020-04`, a day `2020-04-07`, or `[from, to]`."""
    if isinstance(text, (tuple, list)):
        return between(text, time_zone)
    month = re.fullmatch(r"\d{4}-\d{2}", text)
    try:
        start = datetime.datetime.strptime(text, "%Y-%m" if month else "%Y-%m-%d")
    except ValueError:
        wanted = "a month (2020-04), a day (2020-04-07) or [from, to]"
        raise UserError(f"a window must be {wanted}, found {text!r}") from None
    try:
        stop = (start + datetime.timedelta(days=32)).replace(day=1) if month else start + datetime.timedelta(days=1)
    except OverflowError:
        raise UserError(f"a window must end before the year 10000, found {text!r}") from None
    return instant(start.isoformat(), time_zone), instant(stop.isoformat(), time_zone)


def format_instant(microseconds: int, time_zone: str = "UTC") -> str:
    """ISO text of an instant in a zone, in whole seconds if exact; in UTC outside the years 1 to 9999."""
    try:
        moment_ = (EPOCH + datetime.timedelta(microseconds=int(microseconds))).astimezone(zone(time_zone))
    except OverflowError:  # beyond Python's calendar, which repeats every 400 years
        cycles, rest = divmod(int(microseconds), CYCLE)
        moment_ = EPOCH + datetime.timedelta(microseconds=rest)
        year = moment_.year + 400 * cycles
        return f"{year:0{4 + (year < 0)}d}{_iso(moment_)[4:]}"
    return _iso(moment_)


def _iso(moment_: datetime.datetime) -> str:
    return moment_.isoformat(timespec="seconds" if moment_.microsecond == 0 else "microseconds")
