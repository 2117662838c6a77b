"""Type names of the config and the Arrow types they stand for, nothing guessed from data; when two values are the same."""

from __future__ import annotations

import re

import pyarrow as pa

from engine.errors import UserError, nearest

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
_DECIMAL = re.compile(r"^decimal\(\s*(\d+)\s*,\s*(-?\d+)\s*\)$")
_LIST = re.compile(r"^list<(.+)>$")
_MAP = re.compile(r"^map<([^,]+),(.+)>$")


def parse_type(text: str) -> pa.DataType:
    """The Arrow type of `int64`, `decimal(10,2)`, `list<string>`, `map<string,int64>`, `timestamp` (us, UTC), ...

    Raises UserError for a name that is not known.
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
    choices = [*_TYPES, "decimal(p,s)", "list<type>", "map<type,type>"]
    raise UserError(f"unknown type {text!r}.{nearest(name, choices)}")


def type_name(kind: pa.DataType) -> str:
    """The config's name of an Arrow type; Arrow's own name where the config has none."""
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


def schema_of(types: dict[str, str]) -> pa.Schema:
    """Arrow schema of name -> type text, in order. Raises UserError naming the column."""
    fields = []
    for name, text in types.items():
        try:
            fields.append(pa.field(name, parse_type(text)))
        except UserError as error:
            raise UserError(f"column {name!r}: {error}") from None
    return pa.schema(fields)


def same_value(first: pa.Scalar, second: pa.Scalar) -> bool:
    """Equal values of one type; NaN, which to Arrow differs from NaN, is the same as NaN."""
    return bool(first.equals(second)) or str(first) == str(second) == "nan"
