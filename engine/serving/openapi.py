"""What a request must have, for clients: from the columns of the model's specification."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

import engine
from engine.config.sections.data import Column
from engine.data.arrow_types import parse_type
from engine.serving.request import ARROW, JSON, Fields


def fields_of(fields: Fields) -> list[dict[str, Any]]:
    """Name, type, whether null is allowed, and when it is known, of each field that a row must have."""
    return [
        {
            "name": name,
            "type": column.type,
            "nullable": may_be_null(column),
            "known_at": None if column.known_at is None else str(column.known_at),
            "description": column.description,
        }
        for name, column in fields.wanted.items()
    ]


def may_be_null(column: Column) -> bool:
    """Whether a row may have no value there."""
    return column.nullable and not column.identifies and column.role != "event_time"


def described(fields: Fields, events: Fields, reference: str) -> dict[str, Any]:
    """The OpenAPI 3.1 description."""
    return {
        "openapi": "3.1.0",
        "info": {"title": f"scores of {reference}", "version": engine.__version__},
        "paths": {
            "/v1/score": {"post": _posted("Score rows", _row(fields, set(fields.wanted)))},
            "/v1/events": {"post": _posted("Add past events", _row(events, set(events.wanted)))},
            "/v1/model": {"get": _got("Which model answers, and its fields", JSON)},
            "/healthz": {"get": _got("The process answers", "text/plain")},
            "/readyz": {"get": _got("A model is loaded", "text/plain")},
            "/metrics": {"get": _got("Figures for Prometheus", "text/plain")},
        },
    }


def _posted(summary: str, row: dict[str, Any]) -> dict[str, Any]:
    rows = {"type": "object", "required": ["rows"], "properties": {"rows": {"type": "array", "items": row}}}
    content = {JSON: {"schema": {"anyOf": [row, rows]}}, ARROW: {"schema": {"type": "string", "format": "binary"}}}
    errors = {401: "no token", 413: "too large", 422: "a field is wrong", 429: "too many rows wait"}
    responses = {
        "200": {"description": "the answer, row by row"},
        **{str(k): {"description": v} for k, v in errors.items()},
    }
    return {"summary": summary, "requestBody": {"required": True, "content": content}, "responses": responses}


def _got(summary: str, kind: str) -> dict[str, Any]:
    return {"summary": summary, "responses": {"200": {"description": summary, "content": {kind: {}}}}}


def _row(fields: Fields, required: set[str]) -> dict[str, Any]:
    columns = {name: column for name, column in fields.known.items() if name in fields.wanted}
    return {
        "type": "object",
        "required": sorted(required),
        "properties": {name: _schema(column) for name, column in columns.items()},
    }


def _schema(column: Column) -> dict[str, Any]:
    kind, found = parse_type(column.type), dict[str, Any]()
    if pa.types.is_list(kind):
        item = "string" if pa.types.is_string(kind.value_type) else "number"
        found |= {"type": "array", "items": {"type": item}}
        if column.width:
            found |= {"minItems": column.width, "maxItems": column.width}
        return {**found, "type": ["array", "null"]} if may_be_null(column) else found
    if pa.types.is_boolean(kind):
        found["type"] = "boolean"
    elif pa.types.is_integer(kind):
        found["type"] = "integer"
    elif pa.types.is_floating(kind):
        found["type"] = "number"
    else:
        found["type"] = "string"
        if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
            found["format"] = "date-time" if pa.types.is_timestamp(kind) else "date"
    if may_be_null(column):
        found["type"] = [found["type"], "null"]
    if column.values and found["type"] in ("string", ["string", "null"]):
        found["enum"] = [*column.values, *([None] if may_be_null(column) else [])]
    if column.min is not None and not isinstance(column.min, str):
        found["minimum"] = column.min
    if column.max is not None and not isinstance(column.max, str):
        found["maximum"] = column.max
    if column.description:
        found["description"] = column.description
    return found
