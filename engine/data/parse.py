"""Exact conversion of a file's values to the declared types: a value either keeps its meaning or is a violation.

Text is parsed into numbers, instants and so on; Arrow values of another type are cast only if nothing is lost.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.config import schema
from engine.data import date_formats
from engine.data.arrow_types import TIMESTAMP, declarable, is_uuid, type_name
from engine.errors import UserError

TRUE = ("true", "True", "TRUE", "1", "t", "T", "yes", "Yes", "YES", "y", "Y")
FALSE = ("false", "False", "FALSE", "0", "f", "F", "no", "No", "NO", "n", "N")
_INTEGRAL = r"^[+-]?[0-9]+(\.0*)?$"
_DECIMAL = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
_NUMBER = re.compile(_DECIMAL + r"|^[+-]?(nan|inf|infinity)$", re.IGNORECASE)
_TIME = r"^\d{2}:\d{2}(:\d{2}(\.\d{1,6})?)?$"
_ZONED = r"\d{1,2}:\d{2}.*([Zz]|UTC|GMT|[+-]\d{2}(:?\d{2})?)$"
_LEAF = 32


@dataclasses.dataclass(frozen=True)
class Reading:
    """How text is read: the zone of local times, a strptime format, decimal and thousands separators."""

    zone: str = "UTC"
    format: str | None = None
    decimal: str = "."
    thousands: str = ""


@dataclasses.dataclass(frozen=True)
class Parsed:
    """Values of the declared type; `bad` are the positions that could not be read (null in `values`), with the reason.

    `items`: of bad lists and maps, by position, the first item that could not be.
    """

    values: pa.Array
    bad: np.ndarray
    reason: str = ""
    items: Mapping[int, int] = dataclasses.field(default_factory=dict)


class UnrelatedError(UserError):
    """The file's type cannot be converted to the declared one; `found` is the type in the file."""

    def __init__(self, declared: pa.DataType, found: pa.DataType, shown: str | None = None) -> None:
        super().__init__(f"must be {type_name(declared)}, found {shown or type_name(found)}")
        self.found = found

    def advice(self, key: str, path: str | None = None) -> str:
        """A hint what to declare at the column's config key instead, as command-line words; `path` is its place in a file,
        None for the result of a query.
        """
        name = declarable(self.found)
        if name is not None:
            return f": declare the type that it has, {schema.word(f'{key}.type', name)}"
        field = next((item for item in _fields(self.found) if declarable(item.type)), None)
        if field is None:
            return ": no type can be declared for it, leave the column out"
        if path is None:
            return f": select one of its fields, such as {field.name}"
        words = {f"{key}.type": declarable(field.type), f"{key}.path": f"{path}.{field.name}"}
        return f": declare one of its fields, {' '.join(schema.word(*item) for item in words.items())}"


def _fields(kind: pa.DataType) -> list[pa.Field]:
    return [kind.field(place) for place in range(kind.num_fields)] if pa.types.is_struct(kind) else []


def to_type(array: pa.Array, kind: pa.DataType, reading: Reading) -> Parsed:
    """`array` as `kind`, null for null, every value that cannot be kept exactly listed in `bad`.

    Raises UserError if the types are unrelated (an int64 where text is declared).
    """
    return _in_calendar(_converted(array, kind, reading), kind)


def _converted(array: pa.Array, kind: pa.DataType, reading: Reading) -> Parsed:
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks() if array.num_chunks != 1 else array.chunk(0)
    if isinstance(array, pa.ExtensionArray):
        if is_uuid(array.type) and not pa.types.is_binary(kind):
            array = _uuid_texts(array, kind)
        else:
            array = array.storage
    if pa.types.is_run_end_encoded(array.type):
        array = pc.run_end_decode(array)
    if pa.types.is_dictionary(array.type):
        array = _decode_dictionary(array)
    if array.type.equals(kind) and kind != pa.string():
        return _within(array, kind)
    if pa.types.is_null(array.type) or array.null_count == len(array):
        return Parsed(pa.nulls(len(array), kind), _NONE)
    if _is_text(array.type):
        return _from_text(array, kind, reading)
    _refuse_unrelated(array.type, kind)
    reason = f"cannot be kept exactly as {type_name(kind)}"
    if pa.types.is_floating(kind):
        values, kept = _as_floats(array, kind)
        return _without(values, ~kept, reason)
    if pa.types.is_nested(kind):
        return _nested(array, kind, reading, reason)
    if pa.types.is_date(kind) and pa.types.is_timestamp(array.type):
        reason = f"has a time of day{f' in {reading.zone}' if array.type.tz else ''}: declare timestamp"
        return _piecewise(array, kind, lambda part: _days(part, reading.zone), reason, _nothing)
    return _piecewise(array, kind, lambda part: _cast(part, kind, reading), reason, lambda part: _changes(part, kind))


def _uuid_texts(array: pa.ExtensionArray, kind: pa.DataType) -> pa.Array:
    if not pa.types.is_string(kind):
        raise UnrelatedError(kind, array.type, "UUIDs")
    return pa.array([None if value is None else str(value) for value in array.to_pylist()], pa.string())


_NONE = np.zeros(0, np.int64)
# Beyond these years Arrow's calendar wraps around silently: the int64 maximum becomes a day in the year 32103. Within
# them the sum of an instant and any realistic duration fits 64 bits.
FIRST_YEAR, LAST_YEAR = -32_000, 32_000


def is_beyond_whole_numbers(values: pa.ChunkedArray) -> bool:
    """Whether floats that another reader parsed must be parsed again from the text: infinities may be overflows, and from
    2**53 on whole numbers may have been rounded.
    """
    if not pa.types.is_floating(values.type) or values.null_count == len(values):
        return False
    found = pc.min_max(values)
    return not (found["min"].as_py() > -(2.0**53) and found["max"].as_py() < 2.0**53)


_TINY = (re.compile(rb"e-0*[1-9][0-9]{2}"), re.compile(rb"E-0*[1-9][0-9]{2}"), re.compile(b"0" * 300))


def may_vanish(text: Any) -> bool:
    """Whether bytes of text may have a number too small for a float64, which another reader turns into 0."""
    return any(pattern.search(memoryview(text)) for pattern in _TINY)


def _in_calendar(parsed: Parsed, kind: pa.DataType) -> Parsed:
    """Mark instants and dates outside the years of the calendar as bad."""
    if not (kind.equals(TIMESTAMP) or kind == pa.date32()) or parsed.values.null_count == len(parsed.values):
        return parsed
    unit = "us" if kind.equals(TIMESTAMP) else "D"
    years = (np.datetime64(year - 1970, "Y") for year in (FIRST_YEAR, LAST_YEAR + 1))
    first, beyond = (int(year.astype(f"datetime64[{unit}]").astype(np.int64)) for year in years)
    found = pc.min_max(parsed.values)
    if first <= found["min"].value and found["max"].value < beyond:
        return parsed
    numbers = parsed.values.cast(pa.int64() if unit == "us" else pa.int32())
    outside = pc.fill_null(pc.or_(pc.less(numbers, first), pc.greater_equal(numbers, beyond)), False)
    bad = np.union1d(parsed.bad, np.flatnonzero(np.asarray(outside)))
    reason = f"lies beyond the years {FIRST_YEAR} to {LAST_YEAR}, which the calendar reaches"
    values = pc.if_else(outside, pa.scalar(None, kind), parsed.values)
    return Parsed(values, bad, f"{parsed.reason} or {reason}" if len(parsed.bad) else reason)


def _decode_dictionary(array: pa.DictionaryArray) -> pa.Array:
    """Values of a dictionary array; a null inside the dictionary is null in every row that points at it."""
    return array.dictionary.take(array.indices)


def _is_text(kind: pa.DataType) -> bool:
    return (
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind) or _is_bytes(kind)
    )


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _refuse_unrelated(found: pa.DataType, declared: pa.DataType) -> None:
    related = {
        "string": pa.types.is_string(declared),
        "nested": _shape(found) != _shape(declared),
        "time": _clock(found) != _clock(declared),
        "bool": pa.types.is_boolean(found) != pa.types.is_boolean(declared),
        "binary": pa.types.is_binary(declared) and not pa.types.is_fixed_size_binary(found),
    }
    if any(related.values()) and not found.equals(declared):
        raise UnrelatedError(declared, found)


def _clock(kind: pa.DataType) -> str:
    """The kind of a temporal type: day (or instant), time (of day), length (duration); empty for others."""
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return "day"
    return "time" if pa.types.is_time(kind) else "length" if pa.types.is_temporal(kind) else ""


def _shape(kind: pa.DataType) -> str:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return "list"
    return "map" if pa.types.is_map(kind) else "struct" if pa.types.is_nested(kind) else ""


def _without(values: pa.Array, bad: np.ndarray, reason: str) -> Parsed:
    """The values with null where they are bad."""
    if bad.any():
        values = pc.if_else(pa.array(bad), pa.scalar(None, values.type), values)
    return Parsed(values, np.flatnonzero(bad), reason)


def _as_floats(array: pa.Array, kind: pa.DataType) -> tuple[pa.Array, np.ndarray]:
    """(values, whether each is exact). A decimal is exact if the float, rounded to its digits, is that decimal."""
    if pa.types.is_float16(array.type):  # Arrow does not compare them
        array = array.cast(pa.float32())
    found = array.type
    single = pa.float32() if pa.types.is_float16(kind) else kind
    # Arrow's own cast of a decimal is not the nearest float: 0.10 becomes 0.0999999940 of 32 bits.
    values = (array.cast(pa.string()) if pa.types.is_decimal(found) else array).cast(single, safe=False).cast(kind)
    wide = values.cast(pa.float64())
    if pa.types.is_decimal(found):
        back = _piecewise(wide, found, lambda part: part.cast(found), "", _nothing).values
    else:
        back = wide.cast(found, safe=False)
    same = pc.equal(back, array)
    if pa.types.is_floating(found):
        same = pc.or_(same, pc.is_nan(array))
    elif pa.types.is_integer(found):  # the cast back of a value beyond the largest integer is undefined
        bits = found.bit_width - (not pa.types.is_unsigned_integer(found))
        same = pc.and_(same, pc.and_(pc.less(wide, 2.0**bits), pc.is_finite(wide)))
    return values, np.asarray(pc.or_(pc.fill_null(same, False), array.is_null()))


def _nested(array: pa.Array, kind: pa.DataType, reading: Reading, reason: str) -> Parsed:
    """Convert lists and maps item by item; a list with an item that cannot be converted is bad as a whole."""
    if pa.types.is_struct(kind):
        return _piecewise(array, kind, lambda part: _cast(part, kind, reading), reason, _nothing)
    if pa.types.is_fixed_size_list(array.type):
        array = array.cast(pa.list_(array.type.value_type))
    ends = np.asarray(array.offsets).astype(np.int64)
    parts = (array.keys, array.items) if pa.types.is_map(kind) else (array.values,)
    kinds = (kind.key_type, kind.item_type) if pa.types.is_map(kind) else (kind.value_type,)
    first, last = int(ends[0]), int(ends[-1])
    ends = ends - first
    bad = np.zeros(len(array), bool)
    items: dict[int, int] = {}
    columns = []
    for part, inner in zip(parts, kinds, strict=True):
        part = part.slice(first, last - first)
        try:
            parsed = _converted(part, inner, reading)
        except UnrelatedError:
            raise UnrelatedError(kind, array.type) from None
        # Also an empty text, which is a null where it is the whole value.
        lost = np.flatnonzero(np.asarray(pc.and_(part.is_valid(), parsed.values.is_null())))
        rows = np.searchsorted(ends, lost, side="right") - 1
        bad[rows] = True
        for row, place in zip(rows.tolist(), (lost - ends[rows]).tolist(), strict=True):
            items[row] = min(place, items.get(row, place))
        columns.append(parsed.values)
    null = np.asarray(array.is_null())
    if (
        pa.types.is_map(kind) and columns[0].null_count
    ):  # no map may hold a key that is null: such a row loses its items
        bad[np.searchsorted(ends, np.flatnonzero(np.asarray(columns[0].is_null())), side="right") - 1] = True
        lengths = np.diff(ends)
        columns = [column.filter(pa.array(np.repeat(~bad, lengths))) for column in columns]
        ends = np.append(0, np.cumsum(np.where(bad, 0, lengths)))
    offsets = pa.array(ends, pa.int32())
    mask = pa.array(null | bad)
    if pa.types.is_map(kind):
        values = pa.MapArray.from_arrays(offsets, *columns, mask=mask)
    else:
        values = pa.ListArray.from_arrays(offsets, *columns, mask=mask)
    return Parsed(values.cast(kind), np.flatnonzero(bad & ~null), reason, items)


def _days(array: pa.Array, zone: str) -> pa.Array:
    """Days of timestamps at midnight: of an instant in `zone`, of a local time directly."""
    unit = array.type.unit
    local = array if array.type.tz is None else pc.local_timestamp(array.cast(pa.timestamp(unit, tz=zone)))
    days = local.cast(pa.date32())
    if pc.any(pc.not_equal(days.cast(pa.timestamp(unit)), local)).as_py():
        raise pa.ArrowInvalid("a time of day would be lost")
    return days


Convert = Callable[[pa.Array], pa.Array]


def _piecewise(array: pa.Array, kind: pa.DataType, convert: Convert, reason: str, screen: Convert) -> Parsed:
    """Convert all values at once; if that fails, by halves down to single values, to find the bad ones.

    `screen` marks values that surely cannot be converted at once, since a whole column of them would take minutes.
    """
    try:
        return Parsed(convert(array), _NONE, reason)
    except (pa.ArrowException, UserError, OverflowError, ValueError):
        hopeless = pc.fill_null(screen(array), False)
    bad: list[int] = np.flatnonzero(np.asarray(hopeless)).tolist()
    if bad:
        array = pc.if_else(hopeless, pa.scalar(None, array.type), array)

    def walk(part: pa.Array, start: int) -> list[pa.Array]:
        try:
            return [convert(part)]
        except (pa.ArrowException, UserError, OverflowError, ValueError):
            if len(part) == 1:
                bad.append(start)
                return [pa.nulls(1, kind)]
            half = len(part) // 2
            return walk(part.slice(0, half), start) + walk(part.slice(half), start + half)

    pieces = walk(array, 0)
    values = pieces[0] if len(pieces) == 1 else pa.concat_arrays(pieces)
    return Parsed(values, np.sort(np.asarray(bad, np.int64)), reason)


def _changes(array: pa.Array, kind: pa.DataType) -> pa.Array:
    """Which numbers change in a cast to a number type and back."""
    if not (_is_number(array.type) and _is_number(kind)):
        return _nothing(array)
    other = pc.not_equal(array.cast(kind, safe=False).cast(array.type, safe=False), array)
    return pc.and_(other, pc.invert(pc.is_nan(array))) if pa.types.is_floating(kind) else other


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_float32(kind) or pa.types.is_float64(kind)


def _nothing(array: pa.Array) -> pa.Array:
    return pa.array(np.zeros(len(array), bool))


def _cast(array: pa.Array, kind: pa.DataType, reading: Reading) -> pa.Array:
    """Exact cast between Arrow types that are related."""
    found = array.type
    if kind.equals(TIMESTAMP) and pa.types.is_timestamp(found):
        local = found.tz is None
        array = array.cast(pa.timestamp("us", tz=found.tz))
        return to_instants(array, reading.zone) if local else array.cast(TIMESTAMP)
    if kind.equals(TIMESTAMP) and pa.types.is_date(found):
        return to_instants(array.cast(pa.timestamp("us")), reading.zone)
    if pa.types.is_floating(found) and pa.types.is_floating(kind) and kind.bit_width < found.bit_width:
        narrow = array.cast(kind)
        same = pc.or_kleene(pc.equal(narrow.cast(found), array), pc.is_nan(array))
        if pc.all(pc.fill_null(same, True)).as_py() is False:
            raise pa.ArrowInvalid("precision would be lost")
        return narrow
    if pa.types.is_integer(found) and pa.types.is_decimal(kind):
        array = array.cast(
            pa.decimal256(20 + kind.scale, kind.scale)
        )  # Arrow requires room for any integer of the type
    if pa.types.is_floating(found) and pa.types.is_decimal(kind):
        # The shortest text that reads back as the same float: 9.5, not 9.4999999999999996.
        texts = [None if value is None else repr(value) for value in array.to_pylist()]
        return _decimals(pa.array(texts, pa.string()), kind)
    done = array.cast(kind)
    if _checkable(kind):
        done.validate(full=True)
    return done


def _checkable(kind: pa.DataType) -> bool:
    return pa.types.is_time(kind) or pa.types.is_decimal(kind)


def _within(array: pa.Array, kind: pa.DataType) -> Parsed:
    """Mark times outside of a day and decimals with too many digits as bad; Arrow's types do not rule them out."""
    if not _checkable(kind):
        return Parsed(array, _NONE)

    def check(part: pa.Array) -> pa.Array:
        part.validate(full=True)
        return part

    return _piecewise(array, kind, check, f"lies outside of {type_name(kind)}", _nothing)


def to_instants(array: pa.Array, zone: str) -> pa.Array:
    """Local timestamps as instants: a time that occurs twice means its first occurrence, one that never occurs fails."""
    if zone in ("UTC", "Etc/UTC"):
        return array.cast(TIMESTAMP)
    return pc.assume_timezone(array, zone, ambiguous="earliest", nonexistent="raise").cast(TIMESTAMP)


def has_offset(text: str) -> bool:
    """Whether the text of a timestamp carries its own offset."""
    return bool(re.search(_ZONED, text))


# ----------------------------------------------------------------------------------------------------------- text


def _from_text(array: pa.Array, kind: pa.DataType, reading: Reading) -> Parsed:
    if pa.types.is_binary(kind):
        return Parsed(array.cast(kind), _NONE)
    decoded = _decode(array)
    if pa.types.is_string(kind):
        return Parsed(decoded.values.cast(kind), decoded.bad, decoded.reason)
    if pa.types.is_nested(kind):
        raise UnrelatedError(kind, pa.string(), "text")
    text = pc.utf8_trim_whitespace(decoded.values.cast(pa.string()))
    text = pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text)
    text = _plain_number(text, kind, reading)
    if reading.format and (kind.equals(TIMESTAMP) or pa.types.is_date(kind)):
        parsed = _formatted(text, kind, reading, reading.format)
    else:
        convert = _text_reader(kind, reading)
        parsed = _piecewise(text, kind, convert, f"is no {type_name(kind)}", lambda part: _unlike(part, kind))
        if pa.types.is_floating(kind):
            parsed = _whole_numbers(text, parsed)
    if len(decoded.bad):
        bad = np.union1d(decoded.bad, parsed.bad)
        return Parsed(parsed.values, bad, decoded.reason)
    return parsed


def _formatted(text: pa.Array, kind: pa.DataType, reading: Reading, form: str) -> Parsed:
    """Dates and instants of text in a strptime format; a text without an offset is local to the zone."""
    stamps = date_formats.read(text, form)
    unread = np.flatnonzero(np.asarray(pc.and_(stamps.is_null(), text.is_valid())))
    parsed = to_type(stamps, kind, reading)
    bad = np.union1d(unread, parsed.bad)
    # If all texts were parsed, the error is a local time that does not exist, or a time of day in a date.
    reason = parsed.reason if len(parsed.bad) and not len(unread) else f"is no {type_name(kind)} of the form {form}"
    return Parsed(parsed.values, bad, reason)


def _whole_numbers(text: pa.Array, parsed: Parsed) -> Parsed:
    """Mark whole numbers that the float type cannot represent as bad (a fraction is rounded to the nearest float)."""
    values, kind = parsed.values, parsed.values.type
    limit = {16: 2.0**11, 32: 2.0**24}.get(kind.bit_width, 2.0**53)
    large = pc.greater_equal(pc.abs(values.cast(pa.float64())), limit)
    large = np.flatnonzero(np.asarray(pc.fill_null(pc.and_(large, pc.match_substring_regex(text, _INTEGRAL)), False)))
    if not len(large):
        return parsed
    written = (int(value.split(".")[0]) for value in text.take(pa.array(large)).to_pylist())
    held = values.take(pa.array(large)).cast(pa.float64()).to_pylist()
    lost = np.zeros(len(values), bool)
    lost[[place for place, whole, value in zip(large, written, held, strict=True) if whole != value]] = True
    again = _without(values, lost, f"cannot be kept exactly as {type_name(kind)}")
    reason = " or ".join(reason for reason, bad in ((parsed.reason, parsed.bad), (again.reason, again.bad)) if len(bad))
    return Parsed(again.values, np.union1d(parsed.bad, again.bad), reason)


def _decode(array: pa.Array) -> Parsed:
    """Text whose bytes are UTF-8; others are bad."""
    if _is_bytes(array.type) or pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        try:
            text = array.cast(pa.binary()).cast(pa.string())
            return Parsed(text, _NONE)
        except pa.ArrowException:
            bad = [i for i, value in enumerate(array.cast(pa.binary()).to_pylist()) if not _is_utf8(value)]
            keep = np.ones(len(array), bool)
            keep[bad] = False
            clean = pc.if_else(pa.array(keep), array.cast(pa.binary()), pa.scalar(None, pa.binary()))
            return Parsed(clean.cast(pa.string()), np.asarray(bad, np.int64), "is not valid UTF-8")
    return Parsed(array.cast(pa.string()), _NONE)


def _is_utf8(value: bytes | None) -> bool:
    try:
        return value is None or value.decode("utf-8") is not None
    except UnicodeDecodeError:
        return False


def _plain_number(text: pa.Array, kind: pa.DataType, reading: Reading) -> pa.Array:
    numeric = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    if numeric and reading.thousands:
        grouped = rf"^[+-]?\d{{1,3}}({re.escape(reading.thousands)}\d{{3}})+({re.escape(reading.decimal)}\d*)?$"
        plain = pc.replace_substring(text, reading.thousands, "")
        text = pc.if_else(pc.match_substring_regex(text, grouped), plain, text)
    if numeric and reading.decimal != ".":
        # With a comma as separator a text with a dot is not a number.
        text = pc.if_else(pc.match_substring(text, "."), pc.binary_join_element_wise(text, "?", ""), text)
        text = pc.replace_substring(text, reading.decimal, ".")
    return text


def _text_reader(kind: pa.DataType, reading: Reading) -> Callable[[pa.Array], pa.Array]:
    if kind.equals(TIMESTAMP):
        return lambda text: _instants(text, reading)
    if pa.types.is_date(kind):
        return lambda text: text.cast(kind)
    if pa.types.is_time(kind):
        return lambda text: _times(text, kind)
    if pa.types.is_integer(kind):
        return lambda text: _integers(text, kind)
    if pa.types.is_boolean(kind):
        return _booleans
    if pa.types.is_floating(kind):
        return lambda text: _floats(text, kind)
    if pa.types.is_decimal(kind):
        return lambda text: _decimals(text, kind)
    if pa.types.is_duration(kind):
        raise UnrelatedError(kind, pa.string(), "text")
    return lambda text: text.cast(kind)


def _unlike(text: pa.Array, kind: pa.DataType) -> pa.Array:
    """Which texts do not have the form of the type."""
    if pa.types.is_boolean(kind):
        return pc.and_(pc.invert(pc.is_in(text, pa.array([*TRUE, *FALSE]))), pc.is_valid(text))
    if kind.equals(TIMESTAMP) or pa.types.is_date(kind):
        form = r"^\d{4}-\d{2}-\d{2}"
    elif pa.types.is_time(kind):
        form = _TIME
    elif pa.types.is_integer(kind):
        form = _INTEGRAL
    else:
        form = _NUMBER.pattern if pa.types.is_floating(kind) else _DECIMAL
    return pc.invert(pc.match_substring_regex(text, form, ignore_case=True))


def _matching(text: pa.Array, pattern: str) -> None:
    if not pc.all(pc.fill_null(pc.match_substring_regex(text, pattern), True)).as_py():
        raise pa.ArrowInvalid("text of another form")


def _integers(text: pa.Array, kind: pa.DataType) -> pa.Array:
    _matching(text, _INTEGRAL)
    digits = pc.replace_substring_regex(pc.replace_substring_regex(text, r"\.0*$", ""), r"^\+", "")
    return digits.cast(kind)


def _floats(text: pa.Array, kind: pa.DataType) -> pa.Array:
    for value in text.to_pylist() if len(text) <= _LEAF else ():
        if value is not None and not _NUMBER.match(value):
            raise pa.ArrowInvalid("no number")
    # Arrow cannot parse half floats.
    plain = pc.replace_substring_regex(text, r"^\+", "")
    values = plain.cast(pa.float32()).cast(kind) if pa.types.is_float16(kind) else plain.cast(kind)
    overflow = pc.and_(pc.is_inf(values), pc.invert(pc.match_substring_regex(text, "(?i)inf")))
    if pc.any(overflow).as_py():
        raise pa.ArrowInvalid("beyond the largest number")
    # 1e-400 is not zero: it has a digit other than 0 before the exponent.
    zeros = text.filter(pc.equal(values.cast(pa.float64()), 0.0))
    if pc.any(pc.match_substring_regex(zeros, "^[^eE]*[1-9]")).as_py():
        raise pa.ArrowInvalid("below the smallest number")
    return values


def _decimals(text: pa.Array, kind: pa.DataType) -> pa.Array:
    done = text.cast(kind)
    # Exponents wrap around in Arrow: 3e38 becomes another number of 38 digits. No such text is valid.
    sizes = pc.abs(text.cast(pa.float64()))
    if pc.any(pc.greater(sizes, 1.5 * 10.0 ** (kind.precision - kind.scale))).as_py():
        raise pa.ArrowInvalid("more digits than the type has")
    done.validate(full=True)
    return done


def _booleans(text: pa.Array) -> pa.Array:
    known = pc.is_in(text, pa.array([*TRUE, *FALSE]))
    if not pc.all(pc.or_(known, pc.is_null(text))).as_py():
        raise pa.ArrowInvalid("no boolean")
    return pc.if_else(pc.is_null(text), pa.scalar(None, pa.bool_()), pc.is_in(text, pa.array(TRUE)))


def _times(text: pa.Array, kind: pa.DataType) -> pa.Array:
    _matching(text, _TIME)
    whole = pc.binary_join_element_wise("1970-01-01", text, "T")
    return whole.cast(pa.timestamp("us")).cast(pa.int64()).cast(kind)


def _instants(text: pa.Array, reading: Reading) -> pa.Array:
    """ISO 8601 text to instants; a text without an offset is local to `reading.zone`."""
    zoned = pc.fill_null(pc.match_substring_regex(text, _ZONED), False)
    if pc.all(zoned).as_py():
        return _offsets(text)
    if not pc.any(zoned).as_py():
        return to_instants(text.cast(pa.timestamp("us")), reading.zone)
    missing = pa.scalar(None, pa.string())
    return pc.coalesce(
        _offsets(pc.if_else(zoned, text, missing)),
        to_instants(pc.if_else(zoned, missing, text).cast(pa.timestamp("us")), reading.zone),
    )


def _offsets(text: pa.Array) -> pa.Array:
    # `12:00:00 +05:30` and `+0530` as `12:00:00+05:30`, which Arrow reads
    tidy = pc.replace_substring_regex(text, r"\s*(UTC|GMT)$", "Z")
    tidy = pc.replace_substring_regex(tidy, r"\s+([+-]\d{2}(:?\d{2})?|[Zz])$", r"\1")
    tidy = pc.replace_substring_regex(tidy, r"[z]$", "Z")
    return tidy.cast(TIMESTAMP)
