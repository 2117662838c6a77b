"""Findings of a column: its statistics with bounds and reasons, what moved in it, and its rank as a likely cause."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NotRequired, TypedDict, cast

import numpy as np

from engine.features.profile import Profile
from engine.features.vocabulary import FIRST_KNOWN
from engine.monitoring.alarm_lines import VOLUME
from engine.monitoring.reference import Reference
from engine.monitoring.statistics import CATEGORICAL, PREDICTION, ColumnSpec, Counts, psi_bins, ranked
from engine.runtime.records import Number
from kernels import statistics as kernels

LISTED = 10  # categories or bins listed as new, vanished or moved
LEFT_OUT = "left out"
NEAR = 0.8  # of its line: a column with all statistics below this moved too little to be named as a cause
IDLE = 0.01  # smallest importance of a feature, so that one the model ignores still ranks by its move


@dataclass(frozen=True)
class Pair:
    """One column of the reference and of the current window, each as one window of counts."""

    column: ColumnSpec
    reference: Counts
    current: Counts

    def bins(self, side: Counts) -> np.ndarray:
        """int64[bins]: rows of each bin, infinities in the outer ones."""
        row = np.rint(side.values[0]).astype(np.int64)
        if self.column.edges is not None:
            row[[0, -1]] += np.rint(side.infinite[0]).astype(np.int64)
        return row

    def levels(self, side: Counts) -> dict[int, int]:
        """Rows by place of the bin: two bins may have one label (edges that agree in four digits)."""
        return {place: int(rows) for place, rows in enumerate(self.bins(side)) if rows}


class StatisticRecord(TypedDict, total=False):
    """A statistic: value or reason, bounds and p-value; with its line, score and alarm where it is judged."""

    value: Number
    reason: str
    p: Number
    low: Number
    high: Number
    approximate: Number
    dof: Number
    low_expected: Number
    typical: Number
    line: Number
    score: Number
    beyond: bool
    effect: bool
    alarm: bool


class Moved(TypedDict):
    """A bin or category, and its shares."""

    label: str
    reference: Number
    current: Number


class New(TypedDict):
    """Rows of categories that the reference lacks, and the most frequent ones."""

    rows: int
    named: dict[str, int]


class Vanished(TypedDict):
    """Categories that only the reference has, and the share of it that the most frequent ones had."""

    categories: int
    share_of_reference: Number
    named: dict[str, Number]


class ColumnRecord(TypedDict):
    """One column of drift.json."""

    name: str
    kind: str
    status: str
    reason: NotRequired[str]
    score: NotRequired[Number]
    rows: NotRequired[dict[str, int]]
    missing: NotRequired[dict[str, Number]]
    importance: NotRequired[Number]
    shift: NotRequired[Number]
    shift_beyond_typical: NotRequired[Number]
    statistics: NotRequired[dict[str, StatisticRecord]]
    moved: NotRequired[list[Moved]]
    new: NotRequired[New]
    vanished: NotRequired[Vanished]


class Cause(TypedDict):
    """A column, by how much it may explain."""

    column: str
    alarm: bool
    notable: bool
    weight: Number
    text: str
    missing_together_with: NotRequired[list[str]]


def describe(
    pair: Pair, facts: Mapping[str, StatisticRecord], reference: Reference, current: Profile, floor: float
) -> ColumnRecord:
    """The record of one column. `facts`: line, score and alarm of each computable statistic."""
    column = pair.column
    reported = pair_statistics(pair, floor)
    for name, item in facts.items():
        reported[name] = {**reported.get(name, {}), **item}
    shapes = [name for name in facts if name != "missing"]
    alarmed = any(item["alarm"] for item in facts.values())
    record: ColumnRecord = {
        "name": column.name,
        "kind": column.kind,
        "status": "alarm" if alarmed else "quiet" if shapes else "not computable",
        "score": max((item["score"] for item in facts.values()), default=None),
        "rows": {"reference": int(pair.reference.rows[0]), "current": int(pair.current.rows[0])},
        "missing": {"reference": missing_share(pair.reference), "current": missing_share(pair.current)},
        "importance": reference.importance.get(column.name),
        "shift": shift_of(pair),
        "shift_beyond_typical": _beyond(shift_of(pair), facts),
        "statistics": dict(sorted(reported.items())),
        "moved": moved(pair),
    }
    if column.name in reference.rising:
        record |= {"status": "alarm" if alarmed else LEFT_OUT, "reason": f"left out: {reference.rising[column.name]}"}
    elif not shapes:
        record["reason"] = next((item["reason"] for item in reported.values() if "reason" in item), "there are no rows")
    if column.kind == CATEGORICAL:
        record["new"], record["vanished"] = categories(pair, current)
    return record


def describe_volume(name: str, facts: Mapping[str, StatisticRecord], rows: int, dated: bool) -> ColumnRecord:
    """The record of the number of rows, called `name`; `dated`: the window's days are known."""
    status = "not computable" if VOLUME not in facts else "alarm" if facts[VOLUME]["alarm"] else "quiet"
    record: ColumnRecord = {
        "name": name,
        "kind": "volume",
        "status": status,
        "score": facts[VOLUME]["score"] if facts else None,
        "rows": {"current": rows},
        "importance": None,
        "shift": None,
        "shift_beyond_typical": None,
        "statistics": {VOLUME: {**facts[VOLUME]}} if facts else {},
    }
    if not facts:
        known = "the reference has no such days" if dated else "the period of the stored profile is not known"
        record["reason"] = f"not computable, because {known}"
    return record


# ------------------------------------------------------------------------------------------------------- statistics


def pair_statistics(pair: Pair, floor: float) -> dict[str, StatisticRecord]:
    """Every statistic by the kernels: value or reason, bounds and p-value."""
    a, b = pair.bins(pair.reference), pair.bins(pair.current)
    found = [
        kernels.psi(psi_bins(pair.column, a), psi_bins(pair.column, b), floor),
        kernels.js_distance(a, b),
        kernels.chi_square(pair.levels(pair.reference), pair.levels(pair.current)),
    ]
    if pair.column.edges is not None:
        ranks = [np.rint(ranked(side)[0]).astype(np.int64) for side in (pair.reference, pair.current)]
        found += [kernels.ks_profiles(*ranks), _wasserstein(pair)]
    return {item.name: _plain(item) for item in found}


def _wasserstein(pair: Pair) -> kernels.Statistic:
    infinite = int(pair.reference.infinite.sum() + pair.current.infinite.sum())
    if infinite:
        reason = f"not computable, because {infinite} values are infinite"
        return kernels.Statistic("wasserstein", None, reason)
    sides = [
        (np.rint(side.values[0]).astype(np.int64), float(side.far[0, 0]), float(side.far[0, 1]))
        for side in (pair.reference, pair.current)
    ]
    column = pair.column
    assert column.edges is not None
    return kernels.wasserstein_profiles(sides[0], sides[1], column.edges, column.scale, column.points)


def _plain(item: kernels.Statistic) -> StatisticRecord:
    names = ("reason", "p", "low", "high", "approximate")
    found = {name: value for name in names if (value := getattr(item, name)) is not None}
    found |= {name: item.details[name] for name in ("dof", "low_expected") if name in item.details}
    return {"value": item.value, **cast(StatisticRecord, found)}


def missing_share(counts: Counts) -> float | None:
    """Share of missing rows; None without rows."""
    return float(counts.missing[0] / counts.rows[0]) if counts.rows[0] else None


def shift_of(pair: Pair) -> float | None:
    """Jensen-Shannon distance of the column with `missing` as a value of its own: in [0, 1] for any kind of change."""
    sides = []
    for counts in (pair.reference, pair.current):
        row = np.concatenate([counts.values[0], counts.infinite[0], counts.missing])
        if not row.sum():
            return None
        sides.append(row / row.sum())
    return float(kernels.js_of(*sides))


def _beyond(shift: float | None, facts: Mapping[str, StatisticRecord]) -> float | None:
    """The shift beyond sampling noise and ordinary weeks: for small moves PSI is 8 ln 2 times the divergence."""
    if shift is None:
        return None
    typical = facts["psi"]["typical"] if "psi" in facts else 0.0
    return math.sqrt(max(shift * shift - typical / (8 * math.log(2)), 0.0))


def moved(pair: Pair) -> list[Moved]:
    """Bins or categories whose share changed most, in falling order of the change."""
    a, b = pair.bins(pair.reference), pair.bins(pair.current)
    if not a.sum() or not b.sum():
        return []
    p, q = a / a.sum(), b / b.sum()
    order = np.lexsort((np.arange(len(p)), -np.abs(q - p)))[:LISTED]
    return [
        {"label": pair.column.labels[k], "reference": float(p[k]), "current": float(q[k])}
        for k in order
        if p[k] != q[k]
    ]


def categories(pair: Pair, current: Profile) -> tuple[New, Vanished]:
    """New categories by name with their rows, and vanished ones with their share of the reference."""
    index = [item.name for item in current.spec.categorical].index(pair.column.name)
    unseen = sorted(current.unseen[index].items(), key=lambda item: (-item[1], item[0]))
    a, b = pair.bins(pair.reference), pair.bins(pair.current)
    gone = [int(k) for k in np.flatnonzero((a > 0) & (b == 0)) if k >= FIRST_KNOWN - 1]
    gone.sort(key=lambda k: (-a[k], k))
    return {"rows": int(b[0]), "named": dict(unseen[:LISTED])}, {
        "categories": len(gone),
        "share_of_reference": float(a[gone].sum() / max(a.sum(), 1)),
        "named": {pair.column.labels[k]: float(a[k] / a.sum()) for k in gone[:LISTED]},
    }


# ----------------------------------------------------------------------------------------------------------- causes


def causes_of(columns: Sequence[ColumnRecord]) -> list[Cause]:
    """Columns ranked by their importance to the model times how far they moved beyond what is typical.

    First those that alarm, then those whose move is above an effect floor and near their line; the others are not
    `notable` and not listed as causes. Nor are predictions, which are consequences.
    Columns that go missing in the same number of rows are named together: they probably come from one feed.
    """
    inputs = [item for item in columns if item["kind"] != PREDICTION]
    total = sum(item["importance"] or 0.0 for item in inputs)
    feeds = missing_together(columns)
    ranked: list[Cause] = []
    for item in inputs:
        share = max((item["importance"] or 0.0) / total if total else 0.0, IDLE)
        notable = any(_notable(part) for part in item["statistics"].values())
        others = [name for name in feeds.get(item["name"], []) if name != item["name"]]
        cause: Cause = {
            "column": item["name"],
            "alarm": item["status"] == "alarm",
            "notable": notable,
            "weight": share * (item["shift_beyond_typical"] or 0.0),
            "text": cause_text(item, others),
        }
        ranked.append({**cause, "missing_together_with": others} if others else cause)
    return sorted(ranked, key=lambda item: (not item["alarm"], not item["notable"], -item["weight"], item["column"]))


def _notable(part: StatisticRecord) -> bool:
    return bool(part.get("alarm") or (part.get("effect") and part["value"] >= NEAR * part["line"]))


def missing_together(columns: Sequence[ColumnRecord]) -> dict[str, list[str]]:
    """For each column that alarms by its missing rate: those missing in exactly as many rows."""
    groups: dict[tuple[int, int], list[str]] = {}
    for item in columns:
        if item["statistics"].get("missing", {}).get("alarm") and item["missing"]["current"]:
            rows = item["rows"]["current"]
            groups.setdefault((rows, round(item["missing"]["current"] * rows)), []).append(item["name"])
    return {name: names for names in groups.values() if len(names) > 1 for name in names}


def cause_text(item: ColumnRecord, together: Sequence[str]) -> str:
    """One line for a person: what moved, by which statistic, from where to where."""
    if item["kind"] == "volume":
        rows, value = item["rows"]["current"], item["statistics"].get(VOLUME)
        if not rows or value is None:
            return item.get("reason", "there are no rows")
        factor, line = math.exp(value["value"]), math.exp(value["line"])
        return f"the number of rows: {rows:,}, a factor {factor:.3g} from usual, line {line:.3g}"
    alarmed = [(part["score"], name) for name, part in item["statistics"].items() if part.get("alarm")]
    alarmed = alarmed or [(part["score"], name) for name, part in item["statistics"].items() if _notable(part)]
    scored = [(part["score"], name) for name, part in item["statistics"].items() if "score" in part]
    name = max(alarmed or scored, default=(0.0, ""))[1]
    text = f"{item['name']}: "
    if name == "missing":
        text += f"missing {item['missing']['reference']:.1%} -> {item['missing']['current']:.1%}"
        return text + (f", together with {', '.join(together)}" if together else "")
    if name:
        part = item["statistics"][name]
        text += f"{name} {part['value']:.3g}, line {part['line']:.3g}"
    moves = [f"{p['label']}: {p['reference']:.1%} -> {p['current']:.1%}" for p in (item.get("moved") or [])[:3]]
    return text + (f" ({', '.join(moves)})" if moves else "")
