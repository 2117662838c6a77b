"""`engine skew RUN`: served rows computed again as batch scoring computes them, and why features differ, if they do."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.config import schema
from engine.config.tree import Config
from engine.data.dataset import Dataset, row_ids
from engine.errors import UserError
from engine.features import instants
from engine.features.compute import raw_features
from engine.features.past import past_events
from engine.features.spec import Feature, history_inputs, row_inputs, view_inputs, windows_of
from engine.runtime import environment, recorded_paths, storage, terminal
from engine.runtime.registry import Registry, names, root_of
from engine.runtime.run import load_record
from engine.scoring.inputs import stored_dataset
from engine.serving.served import FEATURE, GIVEN
from engine.training.bundle import Bundle, find_model, read_bundle
from engine.training.bundle_spec import admit

GIVEN_OTHER, STALE, PAST_OTHER, CODE = (
    "the request gave another value of {}",
    "the past in the server ended before events that the lake has known at the decision",
    "past events have other values in the lake than in the server, or became known at another time",
    "the same inputs give another value: other code computed it",
)


class Found(TypedDict):
    """One feature that differs: rows by cause."""

    feature: str
    rows: int
    causes: dict[str, int]


class Skew(TypedDict):
    """What the comparison came to."""

    rows: int
    absent: int  # rows that the lake does not have
    differences: list[Found]


def skew(config: Config, words: list[str], options: Mapping[str, str]) -> int:
    """The command; exit code 2 with differences."""
    if len(words) != 1:
        raise UserError(f"skew takes one serving run, found {len(words)}")
    found = skew_of(Path(words[0]), config)
    if "--json" in options:
        terminal.out(json.dumps(found, indent=1) + "\n")
    else:
        rows = [{"feature": f["feature"], "rows": f["rows"], "why": "; ".join(f"{w} ({n:,})" for w, n in f["causes"].items())}
                for f in found["differences"]]  # fmt: skip
        absent = f", {found['absent']:,} of them not in the lake" if found["absent"] else ""
        terminal.out(f"{found['rows']:,} served rows{absent}\n")
        terminal.rows(rows, False, "no feature differs by a bit")
    return 2 if found["differences"] else 0


def skew_of(directory: Path, config: Config) -> Skew:
    """The differences between the features that a serving run logged and those of the newest dataset. Raises UserError."""
    record = load_record(directory)
    if record["command"] != "serve":
        raise UserError(f"{directory} must be a serving run, found one of `{record['command']}`")
    served = schema.build(Config, record["config"])
    files = sorted(storage.inside(directory, "served").glob("part-*.parquet"))
    totals: dict[str, dict[str, int]] = {}
    rows = absent = 0
    for path in files:
        log = storage.read_parquet(path)
        for digest in pc.unique(log["model"]).to_pylist():
            bundle = _bundle(digest, served)
            admit(bundle, config)
            store = recorded_paths.store_of(record)
            paths = dataclasses.replace(served.paths, store=str(store))
            dataset = stored_dataset(dataclasses.replace(served, paths=paths), bundle)
            mine = log.filter(pc.equal(log["model"], digest))
            same_code = record["code"]["engine_digest"] == environment.code()["engine_digest"]
            lacking = _compare(mine, bundle, dataset, same_code, totals)
            rows, absent = rows + mine.num_rows, absent + lacking
    differences: list[Found] = [
        {"feature": name, "rows": sum(causes.values()), "causes": causes} for name, causes in sorted(totals.items())
    ]
    return {"rows": rows, "absent": absent, "differences": differences}


def _bundle(digest: str, config: Config) -> Bundle:
    """The model with a digest: the one that the config names, or a version in the registry. Raises UserError."""
    runs = Path(config.paths.runs)
    named = read_bundle(find_model(config.score.model, runs))
    if named.digest == digest:
        return named
    name = config.score.model.partition("@")[0]
    if name in names(root_of(runs)):
        registry = Registry(root_of(runs), name)
        return read_bundle(registry.verify(registry.find(digest)))
    raise UserError(
        f"model {digest[:12]} of the log must be in the registry or be score.model, which is {named.digest[:12]} now"
    )


def _compare(
    log: pa.Table, bundle: Bundle, dataset: Dataset, same_code: bool, totals: dict[str, dict[str, int]]
) -> int:
    """Add the differing rows by feature and cause to `totals`; returns the number of rows that the dataset lacks."""
    data, features = bundle.data, bundle.features
    rows = pc.index_in(log["row_id"], row_ids(dataset.read(data.ids), data.ids)).combine_chunks()
    log, lacking = log.filter(rows.is_valid()), rows.null_count
    places = np.asarray(rows.drop_null(), np.int64)
    order = np.argsort(places, kind="stable")
    log, places = log.take(pa.array(order)), places[order]
    columns = list(dict.fromkeys([data.event_time, *data.ids, *row_inputs(data, features)]))
    facts = _taken(dataset, columns, places)
    decisions = instants.moment_times(facts, features.decision)
    past = list(dict.fromkeys([data.event_time, *data.ids, *history_inputs(data, features)]))
    history = past_events(dataset, data, windows_of(features), decisions, past)
    tables = {view.table for view in features.active_views.values() if view.table}
    raw = raw_features(data, features, facts, history, {name: dataset.table(name) for name in tables})
    given = {name: differs(log[GIVEN + name], facts[name]) for name in columns if GIVEN + name in log.column_names}
    stale = _is_stale(log, dataset, decisions)
    for feature in bundle.encoder.features:
        if FEATURE + feature.name not in log.column_names:
            continue
        left = differs(log[FEATURE + feature.name], raw[feature.name])
        for cause, mask in _causes(feature, bundle, given, stale, same_code):
            mine = left & mask
            if mine.any():
                causes = totals.setdefault(feature.name, {})
                causes[cause] = causes.get(cause, 0) + int(mine.sum())
            left &= ~mine
    return int(lacking)


def _causes(
    feature: Feature, bundle: Bundle, given: Mapping[str, np.ndarray], stale: np.ndarray, same_code: bool
) -> Iterator[tuple[str, np.ndarray]]:
    """(cause, bool[n] rows for which it is the cause), the first one that holds counts."""
    data, features = bundle.data, bundle.features
    view = features.active_views.get(feature.origin)
    if view is not None:
        columns = [*view_inputs(view, data, features.decision.column), *view.entity, features.decision.column]
    elif feature.origin in features.calendar:
        columns = [features.calendar[feature.origin].column]
    else:
        columns = [feature.name]
    for name in dict.fromkeys(columns):
        if name in given:
            yield GIVEN_OTHER.format(name), given[name]
    every = np.ones(len(stale), bool)
    if view is not None and view.kind in ("windows", "asof"):
        yield STALE, stale
        if same_code:
            yield PAST_OTHER, every
    yield CODE, every


def _is_stale(log: pa.Table, dataset: Dataset, decisions: np.ndarray) -> np.ndarray:
    """bool[n]: the dataset has an event between the newest one that the server had and the decision."""
    until = instants.instants(log["past_until"])
    times = instants.instants(dataset.read([dataset.event_time])[dataset.event_time])
    before = np.searchsorted(times, decisions)  # events before the decision
    newest = np.where(before > 0, times[np.maximum(before - 1, 0)], until)
    return np.asarray(newest > until)


def _taken(dataset: Dataset, columns: list[str], places: np.ndarray) -> pa.Table:
    """Rows at int64[n] places, ascending, each as often as it is named."""
    single, back = np.unique(places, return_inverse=True)
    return dataset.take(columns, single).take(pa.array(back))


def differs(left: Any, right: Any) -> np.ndarray:
    """bool[n]: values whose bits are not the same; a null is equal to a null, and NaN to NaN."""
    one, other = (
        column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column for column in (left, right)
    )
    if pa.types.is_dictionary(one.type):
        one = one.dictionary_decode()
    other = other.dictionary_decode() if pa.types.is_dictionary(other.type) else other
    other = other.cast(one.type)
    if pa.types.is_nested(one.type):
        return np.array([a != b for a, b in zip(one.to_pylist(), other.to_pylist(), strict=True)], bool)
    if pa.types.is_floating(one.type):
        bits = [np.asarray(column.fill_null(0.0)).view(f"u{one.type.bit_width // 8}") for column in (one, other)]
        unequal = bits[0] != bits[1]
    else:
        unequal = np.asarray(pc.fill_null(pc.not_equal(one, other), False))
    valid = [np.asarray(column.is_valid()) for column in (one, other)]
    return np.asarray((valid[0] != valid[1]) | (valid[0] & valid[1] & unequal))
