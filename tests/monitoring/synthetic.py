"""References and windows made of synthetic rows: a few columns, a day of rows at a time, nothing trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection

import numpy as np
import pyarrow as pa

from engine.config.sections.features import EncodeConfig
from engine.features.encode import Encoder
from engine.features.profile import Profile, ProfileSpec
from engine.features.spec import Feature
from engine.monitoring.alarm_lines import CalibrationPlan
from engine.monitoring.drift import Current, Drift, compare
from engine.monitoring.reference import Reference, day_counts
from engine.monitoring.statistics import column_specs, conditional_specs
from engine.training.drift_reference import days_table

FIRST = 18_000  # 2019-04-14, a Sunday
Draw = Callable[[np.random.Generator, int, int], dict[str, object]]


def features_of(table: pa.Table) -> list[Feature]:
    """Texts are categories, numbers are numbers."""
    return [
        Feature(field.name, "categorical" if pa.types.is_string(field.type) else "numeric", "direct")
        for field in table.schema
    ]


def draw_table(draw: Draw, rng: np.random.Generator, day: int, rows: int) -> pa.Table:
    """The rows of one day."""
    columns = draw(rng, day, rows)
    return pa.table({name: pa.array(values, from_pandas=True) for name, values in columns.items()})


def score_of(table: pa.Table) -> np.ndarray:
    """A stand-in for a model: rises with x."""
    x = np.asarray(table["x"].fill_null(0.0)) if "x" in table.column_names else np.linspace(0, 1, table.num_rows)
    return np.asarray(1 / (1 + np.exp(-x)), np.float32)


def make_reference(
    draw: Draw,
    days: int,
    rows: int,
    seed: int = 0,
    scored: int | None = None,
    min_count: int = 1,
    related: Collection[str] = (),
) -> Reference:
    """A reference of `days` days of `rows` rows; the last `scored` days (default: all) have predictions. Conditional columns
    are made of the `related` ones.
    """
    rng = np.random.default_rng(seed)
    tables = [draw_table(draw, rng, FIRST + day, rows) for day in range(days)]
    whole = pa.concat_tables(tables)
    encoder = Encoder.fit(features_of(whole), whole.select, EncodeConfig(min_count=min_count))
    spec = ProfileSpec.fit(encoder, whole.select, score_of(whole), related=related)
    scored = days if scored is None else scored
    profiles = {
        FIRST + day: Profile.count(spec, table, score_of(table) if day >= days - scored else None)
        for day, table in enumerate(tables)
    }
    columns, conditional = column_specs(spec), conditional_specs(spec)
    found = day_counts([*columns, *conditional], days_table(spec, profiles))
    total = Profile.empty(spec)
    for profile in profiles.values():
        total = total.merge(profile)
    importance = {item.name: 1.0 for item in columns if item.kind != "prediction"}
    return Reference(columns, *found, total, importance, False, conditional=conditional)


def make_window(reference: Reference, draw: Draw, days: int, rows: int, seed: int = 1) -> Current:
    """`days` days of `rows` rows after the reference."""
    rng = np.random.default_rng(seed)
    spec, first = reference.profile.spec, int(reference.days[-1]) + 1
    profile = Profile.empty(spec)
    for day in range(first, first + days):
        table = draw_table(draw, rng, day, rows)
        profile = profile.merge(Profile.count(spec, table, score_of(table)))
    return Current(profile, np.arange(first, first + days), float(days))


def run_drift(reference: Reference, current: Current, alpha: float = 0.05, **options: object) -> Drift:
    """The comparison with few resamples."""
    floors, thresholds = options.pop("floors", {}), options.pop("thresholds", {})
    plan = CalibrationPlan(max(1, round(current.length)), alpha, 1e-4, resamples=100)
    return compare(reference, current, dataclasses.replace(plan, **options), floors, thresholds)  # type: ignore[arg-type]


def status(drift: Drift) -> dict[str, str]:
    """Status by column."""
    return {item["name"]: item["status"] for item in drift.columns}


def record(drift: Drift, name: str) -> dict:
    """The record of one column."""
    return next(item for item in drift.columns if item["name"] == name)
