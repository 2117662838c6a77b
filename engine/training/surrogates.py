"""Surrogates: replaces values of sensitive columns. Equal values stay equal and nulls null; nothing else remains of them.

Texts become HMACs, under the vocabularies' salt where there is one: they have the codes of the texts (`vocabulary.concealed`).
Numbers become others of about the same mean and deviation; instants, lists and the like become null.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.config.sections.data import Column, DataConfig
from engine.config.sections.features import FeaturesConfig
from engine.errors import UserError
from engine.features.compute import raw_features
from engine.features.vocabulary import concealed
from engine.runtime import digest

Tables = dict[str, pa.Table]


def hidden(data: DataConfig, columns: list[str], tables: Mapping[str, pa.Table]) -> bool:
    """Whether one of the columns of events, or one of a side table, is sensitive."""
    sides = (data.tables[name].columns[column] for name, side in tables.items() for column in side.column_names)
    return any(column.sensitive for column in (*(data.columns[name] for name in columns), *sides))


def stand_in(
    data: DataConfig, features: FeaturesConfig, probes: pa.Table, history: pa.Table, tables: Tables, salt: str
) -> tuple[pa.Table, pa.Table, Tables, pa.Table]:
    """(probes, history, side tables, raw features of the probes) with surrogates for sensitive values.

    An expression or function that fails on them gets nulls. Raises UserError where it fails on nulls too.
    """
    key = salt or digest.of_table(probes)  # which is never written

    def replaced(table: pa.Table, columns: Mapping[str, Column], nulls: bool) -> pa.Table:
        for at, name in enumerate(table.column_names):
            column = columns[name]
            if column.sensitive and column.role != "event_time":
                others = _nulls(table[name]) if nulls and not column.identifies else _others(table[name], key, column)
                table = table.set_column(at, name, others)
        return table

    def all_of(nulls: bool) -> tuple[pa.Table, pa.Table, Tables, pa.Table]:
        events, past = (replaced(table, data.columns, nulls) for table in (probes, history))
        sides = {name: replaced(side, data.tables[name].columns, nulls) for name, side in tables.items()}
        return events, past, sides, raw_features(data, features, events, past, sides)

    try:
        return all_of(nulls=False)
    except UserError:
        return all_of(nulls=True)


def _is_key(column: Column) -> bool:
    return column.identifies or column.role == "entity"


def _nulls(values: pa.ChunkedArray) -> pa.Array:
    return pa.nulls(len(values), values.type)


def _others(values: pa.ChunkedArray, key: str, column: Column) -> pa.Array:
    kind, array = values.type, values.combine_chunks()
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind):
        return concealed(array, key).cast(kind)
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        return _nulls(values)
    found = array.dictionary_encode()
    drawn = np.array([_draw(key, value) for value in found.dictionary.to_pylist()], np.uint64)
    return pa.array(_numbers(drawn, array, column), kind).take(found.indices)


def _draw(key: str, value: Any) -> int:
    return int.from_bytes(hmac.digest(key.encode(), repr(value).encode(), "sha256")[:8], "big")


def _numbers(drawn: np.ndarray, array: pa.Array, column: Column) -> Any:
    """Numbers of the array's type of uint64[n] drawn evenly: unscaled for a key, else with about its mean and deviation."""
    kind = array.type
    if pa.types.is_boolean(kind):
        return drawn % 2 == 1
    if pa.types.is_integer(kind) and _is_key(column):
        return (drawn >> np.uint64(65 - kind.bit_width)).astype(np.int64)
    real = np.asarray(pc.cast(array.drop_null(), pa.float64()))
    real = real[np.isfinite(real)]
    center, scale = (real.mean(), real.std()) if len(real) else (0.0, 1.0)
    found = center + (drawn / 2.0**64 - 0.5) * np.sqrt(12.0) * scale
    if pa.types.is_integer(kind):
        limits = np.iinfo(kind.to_pandas_dtype())
        return np.clip(np.rint(found), float(limits.min) / 2, float(limits.max) / 2).astype(np.int64)
    return found.astype(kind.to_pandas_dtype())
