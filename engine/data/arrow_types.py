"""Type names of the config and their Arrow types, and the comparison of types and values."""

from __future__ import annotations

import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.errors import UserError, did_you_mean, nearest

TIMESTAMP = pa.timestamp("us", tz="UTC")
_TYPES: dict[str, pa.DataType] = {
    "bool": pa.bool_(),
    "int8": pa.int8(),
    "int16": pa.int16(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "uint8": pa.uint8(),
    "uint16": pa.uint16(),
    "uint32": pa.uint32(),
    "uint64": pa.uint64(),
    "float16": pa.float16(),
    "float32": pa.float32(),
    "float64": pa.float64(),
    "string": pa.string(),
    "binary": pa.binary(),
    "date": pa.date32(),
    "time": pa.time64("us"),
    "duration": pa.duration("us"),
    "timestamp": TIMESTAMP,
}
# Names of these types in other systems, for which the nearest spelling would be another type.
_ELSEWHERE = {
    "int": "int64", "integer": "int64", "long": "int64", "bigint": "int64", "smallint": "int16", "tinyint": "int8",
    "float": "float64", "double": "float64", "real": "float32", "number": "float64", "decimal": "decimal(10,2)",
    "numeric": "decimal(10,2)", "str": "string", "text": "string", "varchar": "string", "char": "string", "uuid": "string",
    "object": "string", "category": "string", "json": "string", "boolean": "bool", "bytes": "binary", "blob": "binary",
    "bytea": "binary", "datetime": "timestamp", "timestamptz": "timestamp", "interval": "duration", "timedelta": "duration",
    "list": "list<string>", "array": "list<string>", "map": "map<string,string>", "dict": "map<string,string>",
}  # fmt: skip
_DECIMAL = re.compile(r"^decimal\(\s*(\d+)\s*,\s*(-?\d+)\s*\)$")
_LIST = re.compile(r"^list<(.+)>$")
_MAP = re.compile(r"^map<([^,]+),(.+)>$")


def parse_type(text: str) -> pa.DataType:
    """The Arrow type of `int64`, `decimal(10,2)`, `list<string>`, `map<string,int64>`, `timestamp` (us, UTC), ...

    Raises UserError for an unknown name.
    """
    name = text.strip()
    if name in _TYPES:
        return _TYPES[name]
    if match := _DECIMAL.match(name):
        precision, scale = int(match.group(1)), int(match.group(2))
        if not 1 <= precision <= 76 or not 0 <= scale <= precision:
            raise UserError(f"a decimal must have 1 to 76 digits and a scale within them, found {text!r}")
        return pa.decimal128(precision, scale) if precision <= 38 else pa.decimal256(precision, scale)
    if match := _LIST.match(name):
        return pa.list_(parse_type(match.group(1)))
    if match := _MAP.match(name):
        return pa.map_(parse_type(match.group(1)), parse_type(match.group(2)))
    word = re.split(r"[^a-z]", name.lower())[0]
    if word in _ELSEWHERE and name not in _TYPES:
        raise UserError(f"unknown type {text!r}.{did_you_mean([_ELSEWHERE[word]])}")
    choices = [*_TYPES, "decimal(10,2)", "list<string>", "map<string,int64>"]
    raise UserError(f"unknown type {text!r}.{nearest(name, choices)}")


def type_name(kind: pa.DataType) -> str:
    """The config's name of an Arrow type; Arrow's name if the config has none."""
    for name, known in _TYPES.items():
        if kind.equals(known):
            return name
    if pa.types.is_decimal(kind):
        return f"decimal({kind.precision},{kind.scale})"
    if pa.types.is_map(kind):
        return f"map<{type_name(kind.key_type)},{type_name(kind.item_type)}>"
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return f"list<{type_name(kind.value_type)}>"
    return str(kind)


def declarable(kind: pa.DataType) -> str | None:
    """The config's name of the type that keeps every value of an Arrow type; None if there is none."""
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return declarable(kind.value_type)
    for holds, name in _KEPT_AS.items():
        if holds(kind):
            return name
    if pa.types.is_map(kind):
        inner = declarable(kind.key_type), declarable(kind.item_type)
        return f"map<{inner[0]},{inner[1]}>" if all(inner) else None
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        item = declarable(kind.value_type)
        return f"list<{item}>" if item else None
    name = type_name(kind)
    try:
        return type_name(parse_type(name))
    except UserError:
        return None


def is_uuid(kind: pa.DataType) -> bool:
    """Whether the type is the UUID extension type of Arrow and Parquet."""
    return isinstance(kind, pa.BaseExtensionType) and kind.extension_name == "arrow.uuid"


_KEPT_AS = {
    is_uuid: "string",
    pa.types.is_large_string: "string",
    pa.types.is_string_view: "string",
    pa.types.is_large_binary: "binary",
    pa.types.is_binary_view: "binary",
    pa.types.is_fixed_size_binary: "binary",
    pa.types.is_date: "date",
    pa.types.is_time: "time",
    pa.types.is_timestamp: "timestamp",
    pa.types.is_duration: "duration",
}


def schema_of(types: dict[str, str]) -> pa.Schema:
    """Arrow schema of name -> type text, in order. Raises UserError naming the column."""
    fields = []
    for name, text in types.items():
        try:
            fields.append(pa.field(name, parse_type(text)))
        except UserError as error:
            raise UserError(f"column {name!r}: {error}") from None
    return pa.schema(fields)


def as_lists(column: pa.Array | pa.ChunkedArray) -> pa.ListArray:
    """A column of lists of any kind, fixed-size ones and dictionaries included, as one array of lists."""
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    column = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
    if pa.types.is_null(column.type):
        return pa.nulls(len(column), pa.list_(pa.null()))
    return column if pa.types.is_list(column.type) else column.cast(pa.list_(column.type.value_type))


def list_items(lists: pa.ListArray) -> tuple[np.ndarray, pa.Array]:
    """(int64[m] row of each item, the m items). A null may have items beneath it, as one cast from a fixed size does: they are
    left out.
    """
    some = lists.drop_null()
    rows = np.repeat(np.flatnonzero(np.asarray(lists.is_valid())), np.asarray(pc.list_value_length(some)))
    return rows, some.flatten()


def alike(first: pa.DataType, second: pa.DataType) -> bool:
    """Whether keys of two types may be compared: integers with integers, floats with floats, text with text, equal types.

    The null type can be compared with every type, since it has no keys.
    """
    return pa.types.is_null(first) or pa.types.is_null(second) or _family(first) == _family(second)


def _family(kind: pa.DataType) -> object:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return "text"
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return "binary"
    for name in ("integer", "floating", "date"):
        if getattr(pa.types, f"is_{name}")(kind):
            return name
    return ("timestamp", kind.tz is None) if pa.types.is_timestamp(kind) else kind


def as_keys(values: pa.Array, kind: pa.DataType) -> pa.Array:
    """Values converted to keys of a type that is `alike`; a value outside that type matches no key and becomes null."""
    if values.type.equals(kind):
        # As in SQL, -0.0 and 0.0 are the same key, although their bits differ.
        return pc.add(values, pa.scalar(0.0, kind)) if pa.types.is_floating(kind) else values
    if pa.types.is_dictionary(values.type):
        values = values.dictionary.take(values.indices)
    try:
        return values.cast(kind)
    except pa.ArrowInvalid:
        there = values.cast(kind, safe=False)
        same = pc.equal(there.cast(values.type, safe=False), values)
        if pa.types.is_integer(kind):  # -1 and the largest unsigned integer have the same bits
            negative = (pc.less(part, pa.scalar(0, part.type)) for part in (there, values))
            same = pc.and_(same, pc.equal(*negative))
        return pc.if_else(same, there, pa.scalar(None, kind))


def same_value(first: pa.Scalar, second: pa.Scalar) -> bool:
    """Whether two values of one type are equal; unlike in Arrow, NaN equals NaN."""
    return bool(first.equals(second)) or str(first) == str(second) == "nan"
