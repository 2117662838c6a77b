"""Writes the drift reference of a model, with which monitoring compares later data without the raw training rows.

It is part of the bundle and covers the time of the training and validation rows (labelled or not, like the rows that are scored;
without the first days, whose trailing windows reach back to before the data):
`profile_spec.json`; `reference.parquet` (rows per local day x column x bin, of inputs and of predictions);
`reference.json` (the profile of the whole period, the days with predictions, the importance of each feature);
`reference_sample.parquet` (about 20,000 encoded rows, chosen by hash of their id); `reference_outcomes.parquet`
(day, score, target and weight of up to 50,000 validation rows, chosen likewise: those that validation read, whose label is ripe).
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, NotRequired, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.config.names import free
from engine.config.tree import Config
from engine.data.calendar import local_days
from engine.data.dataset import Dataset
from engine.features.encode import Encoder
from engine.features.instants import instants
from engine.features.numeric_spec import FIT_ROWS
from engine.features.profile import Profile, ProfileRecord, ProfileSpec, outside_sum
from engine.features.spec import sensitive_features, trailing_features
from engine.features.table import FeatureTable
from engine.runtime import records, storage
from engine.training.classes import target_values
from engine.training.heads import Heads
from engine.training.row_sample import chosen_rows, encode_sample, pieces, sample_table
from engine.training.splits import Split
from engine.training.weights import row_weights
from kernels import profile as kernel

FORMAT = 1
PERIODS = ("train", "valid")
DAY = 86_400_000_000
OUTCOME_ROWS, IMPORTANCE_ROWS = 50_000, 512
FEWEST_ROWS, IMPORTANCE_CELLS = 64, 1 << 25  # 512 rows of up to 256 encoded columns
MISSING_BIN, NEGATIVE_BIN, POSITIVE_BIN = kernel.MISSING, kernel.NEGATIVE_INFINITE, kernel.POSITIVE_INFINITE
ROWS = ""  # the column of reference.parquet that counts rows, in parentheses where a feature has that name

Days = Annotated[int, records.Within(0, 10**6)]


class ReferenceRecord(TypedDict):
    """reference.json: the profile of the whole period, the importance of each feature, and days of history."""

    format: Annotated[int, records.Format(FORMAT)]
    memory_days: NotRequired[Days]
    history_days: NotRequired[Days]
    predictions_in_sample: bool
    importance: dict[str, float]
    profile: ProfileRecord


Scorer = Callable[[np.ndarray, np.ndarray], np.ndarray]


def write_reference(
    directory: Path,
    config: Config,
    table: FeatureTable,
    encoder: Encoder,
    scorer: Scorer,
    heads: Heads,
    splits: Mapping[str, Split],
) -> None:
    """Write the reference into a bundle's folder.

    `scorer` gives scores [n] or [n, k] of all `heads` of encoded blocks;
    `splits` hold the rows that the encoder was fitted on, and those that were watched.
    """
    periods = {name: period_rows(config, table.dataset, splits[name]) for name in PERIODS if name in splits}
    in_sample = not len(periods.get("valid", ()))
    scored = periods["train" if in_sample else "valid"]
    scores = score_rows(table, encoder, scorer, scored)
    hidden = sensitive_features(config.data, config.features)
    read, at_once = _reader(table, splits["train"].rows)
    trailing = trailing_features(config.features, encoder.features)
    related = {feature.name for feature in encoder.features} - trailing
    spec = ProfileSpec.fit(encoder, read, scores, heads.names, hidden, at_once=at_once, related=related)
    storage.write_json(directory / "profile_spec.json", spec.to_json())
    days = profile_days(config, table, spec, periods, scored, scores)
    storage.write_parquet(directory / "reference.parquet", days_table(spec, days))
    whole = Profile.empty(spec)
    for part in days.values():
        whole = whole.merge(part)
    sample = encoded_sample(config, table, encoder, periods)
    storage.write_parquet(directory / "reference_sample.parquet", sample_table(config, encoder, *sample))
    ripe = splits["train" if in_sample else "valid"].by_target
    for k, view in enumerate(config.by_target):
        mine, classes = heads.of(scores, k), heads.items[k].classes
        outcomes = outcomes_of(view, table.dataset, ripe[k].rows, scored, mine, classes)
        if outcomes is not None:
            storage.write_parquet(directory / outcomes_file(k), outcomes)

    def main(numeric: np.ndarray, codes: np.ndarray) -> np.ndarray:
        return heads.of(scorer(numeric, codes))

    importance = permutation_importance(encoder, main, sample[1], sample[2])
    state: ReferenceRecord = {
        "format": FORMAT,
        "memory_days": -(-memory_of(config) // DAY),
        "history_days": history_days(config, table.dataset, periods),
        "predictions_in_sample": in_sample,
        "importance": importance
        | {name: importance[item.name] for name, item, _ in spec.parts if item.name in importance},
        "profile": whole.to_json(),
    }
    storage.write_json(directory / "reference.json", state)


# ---------------------------------------------------------------------------------------------------- rows and days


def period_rows(config: Config, dataset: Dataset, split: Split) -> np.ndarray:
    """int64[n], ascending: the dataset rows of a split's time, or of a part that is no period, that the reference covers.

    Rows within the longest trailing window of the first event have windows that no later row will have: they are left
    out of a period, unless that would take more than half of the period, or all of its rows.
    """
    if split.part is not None:
        return split.part
    start, stop = split.used
    if start >= stop:
        return np.empty(0, np.int64)
    first = dataset.read([config.data.event_time], rows=(0, min(dataset.rows, 1)))[config.data.event_time]
    warm = int(instants(first)[0]) + memory_of(config) if len(first) else start
    low, high = dataset.row_range(start, stop)
    settled = dataset.row_range(warm, stop)[0] if start < warm <= (start + stop) // 2 else low
    return np.arange(settled if settled < high else low, high)


def history_days(config: Config, dataset: Dataset, periods: Mapping[str, np.ndarray]) -> int:
    """Whole days of data before the first row of the reference."""
    first = min((int(rows[0]) for rows in periods.values() if len(rows)), default=0)
    times = [
        instants(dataset.read([config.data.event_time], rows=(at, at + 1))[config.data.event_time]) for at in (0, first)
    ]
    return int((times[1][0] - times[0][0]) // DAY)


def memory_of(config: Config) -> int:
    """Microseconds that the longest trailing window looks back."""
    views = [view for view in config.features.active_views.values() if view.kind == "windows"]
    return max((window.microseconds for view in views for window in view.windows), default=0)


def score_rows(table: FeatureTable, encoder: Encoder, scorer: Scorer, rows: np.ndarray) -> np.ndarray:
    """Scores of dataset rows."""
    return np.concatenate([scorer(*encoder.transform(table.take(part))) for part in pieces(rows)])


def profile_days(
    config: Config,
    table: FeatureTable,
    spec: ProfileSpec,
    periods: Mapping[str, np.ndarray],
    scored: np.ndarray,
    scores: np.ndarray,
) -> dict[int, Profile]:
    """Profile of each local day of the training and validation periods; predictions of `scored`, one of these, only."""
    days: dict[int, Profile] = {}
    for rows in periods.values():
        at = 0
        for part in pieces(rows):
            known = scores[at : at + len(part)] if rows is scored else None
            at += len(part)
            for day, profile in profiles_by_day(config, table.dataset, spec, part, table.take(part), known):
                days[day] = days[day].merge(profile) if day in days else profile
    return dict(sorted(days.items()))


def profiles_by_day(
    config: Config,
    dataset: Dataset,
    spec: ProfileSpec,
    rows: np.ndarray,
    raw: pa.Table,
    scores: np.ndarray | None,
    codes: np.ndarray | None = None,
) -> Iterator[tuple[int, Profile]]:
    """(local day, profile) of rows (int64[n] ascending) of a dataset with their raw features; a day may come twice."""
    event_time = config.data.event_time
    days = local_days(dataset.take([event_time], rows)[event_time], config.data.day_zone)
    # Rows are in order of event time, so a day is a range; a clock change may split it in two.
    starts = np.flatnonzero(np.diff(days, prepend=days[:1] - 1)).tolist()
    ranges = list(itertools.pairwise([*starts, len(days)])) if len(days) else []
    for (low, _), profile in zip(ranges, Profile.count_ranges(spec, raw, ranges, scores, codes), strict=True):
        yield int(days[low]), profile


def days_table(spec: ProfileSpec, days: dict[int, Profile]) -> pa.Table:
    """reference.parquet: day, column, bin, count, and `sum` of the values below and above the edges.

    Bins of a number: 0 below, 1..B, B + 1 above, -3 missing, -2 and -1 infinite; of a category, and of a conditional column: its
    code.
    """
    names = [free(ROWS, spec.columns), *spec.columns, *(item.name for item in spec.conditional)]
    blocks = [_day_block(spec, day, profile) for day, profile in days.items()]
    day, column, bin_, count, total = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    columns = pa.DictionaryArray.from_arrays(pa.array(column, pa.int32()), pa.array(names, pa.string()))
    return pa.table(
        {
            "day": pa.array(day, pa.int32()).cast(pa.date32()),
            "column": columns.cast(pa.string()),
            "bin": pa.array(bin_, pa.int32()),
            "count": pa.array(count, pa.int64()),
            "sum": pa.array(total, pa.float64(), from_pandas=True),
        }
    )


def _day_block(spec: ProfileSpec, day: int, profile: Profile) -> tuple[np.ndarray, ...]:
    """(day, place of the column, bin, count, sum or NaN) of every count of one day that is not zero."""
    parts = [(np.zeros(1, np.int64), np.zeros(1, np.int64), np.array([profile.rows]), np.full(1, np.nan))]
    at = 1
    for block, columns in (
        (profile.numeric.counts, spec.numeric),
        (profile.categories, ()),
        (profile.predictions.counts, spec.predictions),
        (profile.conditional, ()),
    ):
        place, bins = np.nonzero(block)
        total = np.full(len(place), np.nan)
        count = block[place, bins]
        if columns:  # the last three places are missing and the infinities, counted from the end
            bins = np.where(bins >= block.shape[1] + MISSING_BIN, bins - block.shape[1], bins)
            source = profile.numeric if columns is spec.numeric else profile.predictions
            last = np.array([item.bins + 1 for item in columns])[place]
            for row in np.flatnonzero((bins == 0) | (bins == last)):
                side = 2 if bins[row] == 0 else 3
                exact = outside_sum(source.sums[place[row]][side])
                total[row] = np.nan if exact is None else exact
        parts.append((place + at, bins, count, total))
        at += len(block)
    column, bin_, count, total = (np.concatenate(items) for items in zip(*parts, strict=True))
    return np.full(len(column), day), column, bin_, count, total


# ----------------------------------------------------------------------------------------------- sample and outcomes


def encoded_sample(
    config: Config, table: FeatureTable, encoder: Encoder, periods: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(days int32[n], numeric float32[n, F], codes int32[n, K]) of about SAMPLE_ROWS rows of both periods."""
    total = sum(map(len, periods.values()))
    return encode_sample(config, table, encoder, [part for rows in periods.values() for part in pieces(rows)], total)


def outcomes_file(k: int) -> str:
    """The file of the k-th target's labelled rows."""
    return f"reference_outcomes_{k}.parquet" if k else "reference_outcomes.parquet"


def outcomes_of(
    config: Config,
    dataset: Dataset,
    ripe: np.ndarray,
    rows: np.ndarray,
    scores: np.ndarray,
    classes: Sequence[str],
) -> pa.Table | None:
    """reference_outcomes.parquet: day, target and score(s) of those of the `rows` that are `ripe` (both dataset row numbers,
    ascending); None without any.
    """
    if not config.data.target:
        return None
    take = chosen_rows(dataset, config.data.ids, rows, OUTCOME_ROWS, len(rows))
    take = take[np.isin(rows[take], ripe)]
    if not len(take):
        return None
    names, column = [config.data.event_time, config.data.target], config.data.weight
    facts = dataset.take([*names, *([column] if column else [])], rows[take])
    target = target_values(facts[config.data.target], classes)
    weight = row_weights(facts[column], rows[take], column, np.isfinite(target)) if column else None
    days = local_days(facts[config.data.event_time], config.data.day_zone)
    found = outcome_table(days, target, scores[take], weight)
    found = found.filter(pc.is_valid(found["target"]))
    return found if found.num_rows else None


def outcome_table(
    days: np.ndarray, target: np.ndarray, scores: np.ndarray, weight: np.ndarray | None = None
) -> pa.Table:
    """day, target (null: not known yet), `score` or `score_<index>`, and `weight` where rows have one."""
    columns = scores.reshape(len(scores), -1)
    names = ["score"] if scores.ndim == 1 else [f"score_{index}" for index in range(columns.shape[1])]
    named = {name: pa.array(np.ascontiguousarray(columns[:, index])) for index, name in enumerate(names)}
    day = pa.array(days, pa.int32()).cast(pa.date32())
    if weight is not None:
        named["weight"] = pa.array(weight)
    return pa.table({"day": day, "target": pa.array(target, from_pandas=True), **named})


# ------------------------------------------------------------------------------------------------ what matters


def permutation_importance(
    encoder: Encoder, scorer: Scorer, numeric: np.ndarray, codes: np.ndarray
) -> dict[str, float]:
    """Mean absolute change of the score when one raw feature is shuffled among the sample's rows, by feature.

    It needs no labels: it measures influence on the score, not accuracy (Breiman, Random Forests, 2001, for predictions).
    With many features fewer rows are used, so that the work does not grow with the square of their number.
    """
    wanted = max(FEWEST_ROWS, IMPORTANCE_CELLS // max(numeric.shape[1] + codes.shape[1], 1) ** 2)
    rows = np.linspace(0, len(numeric) - 1, min(IMPORTANCE_ROWS, wanted, len(numeric)), dtype=np.int64)
    if len(rows) < 2:
        return {}
    numeric, codes = np.ascontiguousarray(numeric[rows]), np.ascontiguousarray(codes[rows])
    order = np.random.Generator(np.random.Philox(0)).permutation(len(rows))
    base = scorer(numeric, codes).astype(np.float64)
    found: dict[str, float] = {}
    places = list(encoded_columns(encoder))
    together = max(1, IMPORTANCE_ROWS // len(rows))
    for at in range(0, len(places), together):
        group = places[at : at + together]
        blocks = np.tile(numeric, (len(group), 1)), np.tile(codes, (len(group), 1))
        for number, (_, columns, categorical) in enumerate(group):
            block = blocks[categorical][number * len(rows) : (number + 1) * len(rows)]
            block[:, columns] = block[order, columns]
        scores = scorer(*blocks).reshape(len(group), *base.shape)
        found.update((place[0], float(np.mean(np.abs(part - base)))) for place, part in zip(group, scores, strict=True))
    return found


def encoded_columns(encoder: Encoder) -> Iterator[tuple[str, slice, bool]]:
    """(raw feature, its columns of the float block or of the code block, whether it is the code block)."""
    at = 0
    pairs = zip(encoder.numeric_of, encoder.numeric_, strict=True)
    for name, group in itertools.groupby(pairs, operator.itemgetter(0)):
        width = sum(len(item.outputs()) for _, item in group)
        yield name, slice(at, at + width), False
        at += width
    for index, vocabulary in enumerate(encoder.categorical_):
        yield vocabulary.name, slice(index, index + 1), True


def _reader(table: FeatureTable, rows: np.ndarray) -> tuple[Callable[[Sequence[str]], pa.Table], int]:
    """Raw features of (at most FIT_ROWS, evenly spaced) training rows by name, and the number of columns to read together."""
    rows = rows[:: -(-len(rows) // FIT_ROWS)]
    return lambda names: table.take(rows, names), table.columns_at_once((int(rows[0]), int(rows[-1]) + 1))
