"""The scoring gate: training rows with their history, and the features and scores that training computed for them.

Written into the bundle at training; before scoring, `check_gate` sends the rows through the scoring path from raw
columns and stops at the first column that differs: raw feature, encoded feature, score. It always computes and never
reads the store. Parts that no sampled row uses (a rare category, a bound, an age limit) are compared in the fitted state and
the specification, so an altered bundle is stopped even when it was sealed again.

Values of sensitive columns are not written: once the rows have given the features of training, they are replaced by surrogates
(`surrogates`), with the surrogates' features and scores.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
import pyarrow as pa
import torch

from engine.config import schema
from engine.config.nested import Tree
from engine.config.sections.data import DataConfig
from engine.config.sections.features import FeaturesConfig, ViewConfig
from engine.config.tree import Config
from engine.data.arrow_types import same_value
from engine.data.dataset import Dataset, row_ids
from engine.errors import UserError
from engine.features import instants
from engine.features.compute import entity_codes, raw_features
from engine.features.encode import Encoder
from engine.features.partitions import view_length
from engine.features.parts import PARTS
from engine.features.past import past_events
from engine.features.spec import event_inputs, known_moments, past_time, windows_of
from engine.features.table import FeatureTable
from engine.runtime import digest, environment, records, storage
from engine.training import surrogates
from engine.training.bundle import Bundle, ModelRecord
from engine.training.finished import Model
from engine.training.heads import heads_of
from engine.training.target import PLAIN, TargetScale
from kernels.hashing import hash_bytes

ROWS = 256
STATE = "state.json"
# On other hardware, scores of 256-wide layers differed by a few rounding steps of the arithmetic.
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
RESTORE = (
    "The bundle, its specification or the feature code is not what trained the model: restore the bundle, or retrain"
)
LogitsOf = Callable[[np.ndarray, np.ndarray], np.ndarray]


class StateRecord(TypedDict):
    """gate/state.json: digest of each fitted column's state, the specification, and the facts that the bits of a score depend on.

    `columns` is absent in bundles whose `fitted` holds both.
    """

    columns: NotRequired[dict[str, str]]
    fitted: dict[str, str]
    data: Tree
    features: Tree
    hardware: NotRequired[dict[str, str | list[str]]]


def write_gate(
    directory: Path,
    config: Config,
    table: FeatureTable,
    encoder: Encoder,
    model: Model,
    facts: ModelRecord,
    rows: np.ndarray,
) -> None:
    """Store up to 256 of the training `rows` (int64, ascending), chosen by hash of their id, with their history.

    Rows for which a function failed are left out: another call may give a value.
    """
    data, features = config.data, config.features
    rows = np.setdiff1d(rows, table.failed)
    if not len(rows):
        raise UserError("a user function must give values for a row that is trained on, but failed for each of them")
    chosen = choose_rows(table.dataset, data, rows)
    columns = list(dict.fromkeys([*data.ids, data.event_time, *event_inputs(data, features)]))
    span = (int(chosen[0]), int(chosen[-1]) + 1)
    take = pa.array(chosen - span[0])
    probes = table.dataset.read(columns, rows=span).take(take)
    expected = table.read(span).take(take)
    history = needed_history(table.dataset, data, features, probes, columns)
    tables = needed_tables(table.dataset, data, features, probes)
    if surrogates.hidden(data, columns, tables):
        _compare("feature", raw_features(data, features, probes, history, tables), expected, probes, data)
        probes, history, tables, expected = surrogates.stand_in(data, features, probes, history, tables, encoder.salt)
    numeric, codes = encoder.transform(expected)
    logits = model.logits(numeric, codes)
    storage.write_parquet(directory / "rows.parquet", probes)
    storage.write_parquet(directory / "features.parquet", expected)
    storage.write_parquet(directory / "encoded.parquet", encoded_table(encoder, numeric, codes))
    scores = heads_of(facts, data.target or "").scores(model, logits)
    storage.write_parquet(directory / "scores.parquet", scores_table(scores))
    storage.write_json(directory / STATE, {**state_of(encoder, data, features), "hardware": hardware()})
    storage.write_parquet(directory / "history.parquet", history)
    for name, side in tables.items():
        storage.write_parquet(directory / f"table-{name}.parquet", side)


def choose_rows(dataset: Dataset, data: DataConfig, rows: np.ndarray) -> np.ndarray:
    """int64, ascending: the rows whose ids have the smallest hashes, so that the choice depends on the ids only."""
    span = (int(rows[0]), int(rows[-1]) + 1)
    ids = row_ids(dataset.read(data.ids, rows=span), data.ids).take(pa.array(rows - span[0])).cast(pa.large_string())
    offsets = np.frombuffer(ids.buffers()[1], np.int64)[ids.offset : ids.offset + len(ids) + 1]
    hashes = hash_bytes(np.frombuffer(ids.buffers()[2] or b"", np.uint8), offsets)
    return np.sort(rows[np.argsort(hashes, kind="stable")[:ROWS]])


def needed_history(
    dataset: Dataset, data: DataConfig, features: FeaturesConfig, probes: pa.Table, columns: list[str]
) -> pa.Table:
    """Rows of the event table that any window of any probe may read: same entity, not older than the window."""
    views = windows_of(features)
    history = past_events(dataset, data, views, instants.moment_times(probes, features.decision), columns)
    keep = np.zeros(history.num_rows, bool)
    for view in views:
        keep |= _within_windows(view, data, features, probes, history)
    return history.filter(pa.array(keep))


def _within_windows(
    view: ViewConfig, data: DataConfig, features: FeaturesConfig, probes: pa.Table, past: pa.Table
) -> np.ndarray:
    """bool[n]: past rows that a window of some probe may count."""
    decisions = instants.moment_times(probes, features.decision)
    events = instants.instants(past[past_time(view, data)])
    probe_codes, codes = entity_codes(probes, view.entity, past, view.keys)
    latest = events
    for moment in known_moments(view, data):
        latest = np.maximum(latest, instants.moment_times(past, moment))
    order = np.argsort(codes, kind="stable")
    starts = np.searchsorted(codes[order], np.arange(codes.max(initial=-1) + 2))
    keep = np.zeros(len(codes), bool)
    for code, decision in zip(probe_codes, decisions, strict=True):
        if 0 <= code < len(starts) - 1 and decision != instants.NEVER:
            rows = order[starts[code] : starts[code + 1]]
            keep[rows[(latest[rows] >= decision - (view_length(view) or 0)) & (events[rows] < decision)]] = True
    return keep


def needed_tables(
    dataset: Dataset, data: DataConfig, features: FeaturesConfig, probes: pa.Table
) -> dict[str, pa.Table]:
    """Rows of the side tables with the probes' keys, and for windows no older than they reach."""
    kept: dict[str, np.ndarray] = {}
    for view in features.active_views.values():
        if not view.table:
            continue
        side = dataset.table(view.table)
        if view.kind == "windows":
            needed = _within_windows(view, data, features, probes, side)
        else:
            probe_codes, codes = entity_codes(probes, view.entity, side, view.keys)
            needed = np.isin(codes, probe_codes[probe_codes >= 0])
        # Two views may read one table by different keys: keep the rows of both.
        kept[view.table] = kept.get(view.table, False) | needed
    return {name: dataset.table(name).filter(pa.array(mask)) for name, mask in kept.items()}


def scores_table(scores: np.ndarray) -> pa.Table:
    """Scores as a table: `score`, or `score_0`, `score_1`, ... for several outputs."""
    if scores.ndim == 1:
        return pa.table({"score": scores})
    return pa.table({f"score_{index}": np.ascontiguousarray(scores[:, index]) for index in range(scores.shape[1])})


def encoded_table(encoder: Encoder, numeric: np.ndarray, codes: np.ndarray) -> pa.Table:
    """The inputs of the model, by the name of the raw feature: encoded numbers and codes."""
    columns = {name: np.ascontiguousarray(numeric[:, at]) for at, name in enumerate(encoder.numeric_names)}
    columns |= {item.name: np.ascontiguousarray(codes[:, at]) for at, item in enumerate(encoder.categorical_)}
    return pa.table(columns)


def _merged(encoder: Encoder, encoded: pa.Table) -> pa.Table:
    """An encoded table in the form of older bundles: of an indicator and a feature of one name only the later column."""
    plain = [name for column in encoder.numeric_ for name in column.outputs()]
    plain += [item.name for item in encoder.categorical_]
    return pa.table(dict(zip(plain, encoded.columns, strict=True)))


def state_of(encoder: Encoder, data: DataConfig, features: FeaturesConfig) -> StateRecord:
    """Digest of each fitted column's state, and the specification of the features."""
    fitted = encoder.to_json()
    columns = {str(item["name"]): digest.of_json(item) for item in [*fitted["numeric"], *fitted["categorical"]]}
    columns |= {str(item["name"]): digest.of_json(item) for kind in PARTS for item in fitted.get(kind, [])}  # type: ignore[attr-defined]
    plain = schema.plain(data)
    return {
        "columns": columns,
        "fitted": {"clip": digest.of_json(fitted["clip"]), "order": digest.of_json(fitted["features"])},
        "data": {name: plain[name] for name in ("time_zone", "columns", "tables")},
        "features": schema.plain(features),
    }


def hardware() -> dict[str, str | list[str]]:
    """Facts that the bits of a score depend on: instruction sets and the version of torch."""
    flags = sorted(flag for flag in environment.cpu_flags() if flag.startswith(("avx", "amx", "fma")))
    return {"machine": platform.machine(), "flags": flags, "torch": torch.__version__}


def check_gate(bundle: Bundle, model: Model, threads: int = 1, logits_of: LogitsOf | None = None) -> int:
    """Recompute the gate's features and scores from raw columns; returns how many rows agreed.

    `logits_of(numeric, codes)` replaces the model where it does not run on this CPU. Features must be equal bit by bit;
    so must scores on the hardware that trained the model, elsewhere within TOLERANCE (absolute and relative).
    Raises UserError with the first column that differs, the row, the value of training and the value of scoring.
    """
    directory, facts = bundle.directory / "gate", bundle.model
    probes = storage.read_parquet(directory / "rows.parquet")
    history = storage.read_parquet(directory / "history.parquet")
    tables = {
        path.stem.removeprefix("table-"): storage.read_parquet(path)
        for path in sorted(directory.glob("table-*.parquet"))
    }
    state = records.read(directory / STATE, StateRecord)
    raw = raw_features(bundle.data, bundle.features, probes, history, tables, threads)
    _compare("feature", raw, storage.read_parquet(directory / "features.parquet"), probes, bundle.data)
    numeric, codes = bundle.encoder.transform(raw)
    encoded, kept = encoded_table(bundle.encoder, numeric, codes), storage.read_parquet(directory / "encoded.parquet")
    if encoded.num_columns > kept.num_columns:
        encoded = _merged(bundle.encoder, encoded)
    _compare("encoded", encoded, kept, probes, bundle.data)
    logits = model.logits(numeric, codes, threads) if logits_of is None else logits_of(numeric, codes)
    exact = logits_of is None and state.get("hardware") == hardware()
    heads = bundle.heads
    scores = scores_table(heads.scores(model, logits))
    expected = storage.read_parquet(directory / "scores.parquet")
    tolerance = 0.0 if exact else TOLERANCE[facts["precision"]]
    _compare_names("score", scores, expected)
    for item in heads.items:
        names = scores.column_names[item.columns]
        _compare("score", scores.select(names), expected.select(names), probes, bundle.data, tolerance, item.scale)
    now = state_of(bundle.encoder, bundle.data, bundle.features)
    _compare_state(_filled(state, bundle.data, now), now)
    return int(probes.num_rows)


def _filled(state: StateRecord, data: DataConfig, now: StateRecord) -> StateRecord:
    """The recorded state with the defaults of newer keys, and columns separate from the encoder's other settings."""
    known = {name: value for name, value in state["data"].items() if name in now["data"]}
    then = schema.plain(schema.build(DataConfig, {**schema.plain(data), **known}, "data"))
    features = schema.plain(schema.build(FeaturesConfig, state["features"], "features"))
    state = {**state, "data": {name: then[name] for name in known}, "features": features}
    if "columns" in state:
        return state
    words = now["fitted"]  # older bundles hold both in one dict, where a column called `order` had no entry
    hidden = {name: value for name, value in now["columns"].items() if name in words}
    columns = {name: value for name, value in state["fitted"].items() if name not in words}
    return {
        **state,
        "columns": {**hidden, **columns},
        "fitted": {name: state["fitted"].get(name, "") for name in words},
    }


def _compare_state(then: Any, now: Any, path: str = "") -> None:
    """Raise at the first entry of the fitted state or the specification that differs from the record of training."""
    for name in then:
        where = f"{path}.{name}" if path else name
        if where == "hardware" or (now or {}).get(name) == then[name]:
            continue
        if isinstance(then[name], dict) and isinstance((now or {}).get(name), dict):
            _compare_state({key: then[name].get(key) for key in {**then[name], **now[name]}}, now[name], where)
            continue
        fitted = path in ("columns", "fitted")
        what = f"the fitted state of {'column ' if path == 'columns' else ''}{name!r}" if fitted else where
        values = "" if fitted else f": training saw {then[name]!r}, the bundle says {(now or {}).get(name)!r}"
        raise UserError(f"the gate stopped scoring: {what} is not what the model was trained with{values}. {RESTORE}")


def _compare(
    what: str,
    found: pa.Table,
    expected: pa.Table,
    probes: pa.Table,
    data: DataConfig,
    tolerance: float = 0.0,
    target: TargetScale = PLAIN,
) -> None:
    """Raise at the first value that differs: at all, or by more than the tolerance in units of the target's scale."""
    _compare_names(what, found, expected)
    for name in expected.column_names:
        there, here = expected[name].combine_chunks(), found[name].combine_chunks().cast(expected[name].type)
        row = _first_difference(here, there, tolerance, target)
        if row is not None:
            values = f"training saw {there[row].as_py()!r}, scoring gives {here[row].as_py()!r}"
            key = row_ids(probes.select(data.ids).slice(row, 1), data.ids)[0].as_py()
            if data.sensitive:
                key, values = (
                    f"{row} of the gate",
                    "the values are not shown, because columns of the data are sensitive",
                )
            raise UserError(
                f"the gate stopped scoring: {what} column {name!r} differs for row {key}: {values}. {RESTORE}"
            )


def _compare_names(what: str, found: pa.Table, expected: pa.Table) -> None:
    if found.column_names != expected.column_names:
        lacking = next((name for name in expected.column_names if name not in found.column_names), None)
        extra = next((name for name in found.column_names if name not in expected.column_names), None)
        raise UserError(
            f"the gate stopped scoring: training wrote {what} column {lacking!r}, the bundle gives {extra!r}. {RESTORE}"
        )


def _first_difference(here: pa.Array, there: pa.Array, tolerance: float, target: TargetScale = PLAIN) -> int | None:
    if here.equals(there):
        return None
    if tolerance:
        wide = [array.to_numpy(zero_copy_only=False).astype(np.float64) for array in (here, there)]
        a, b = ((values - target.center) / target.scale for values in wide)
        close = np.isclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
        return None if close.all() else int(np.argmin(close))
    # Raw features may hold NaN.
    return next((index for index in range(len(there)) if not same_value(here[index], there[index])), None)
