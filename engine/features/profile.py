"""Drift profiles: counts of rows per bin or category on a fixed specification; profiles merge by addition.

`ProfileSpec` is fitted once with the model: edges of numeric features, of parts of vectors, sets and texts, and of predictions,
and the encoder's vocabularies.
`Profile` counts rows on it. Any split of the rows, in any order, merges to the same bytes of JSON; it records
neither time nor place nor run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NotRequired, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.config.names import distinct
from engine.errors import UserError
from engine.features import conditional
from engine.features.compute import as_floats
from engine.features.conditional import Conditional, ConditionalRecord
from engine.features.encode import Encoder, each_column
from engine.features.numeric_spec import FIT_ROWS, NumericSpec, NumericSpecRecord, fit_numeric
from engine.features.parts import Parts
from engine.features.spec import NUMERIC
from engine.features.vocabulary import FIRST_KNOWN, NO_TEXT, UNSEEN, Vocabulary, as_texts
from engine.runtime import digest, records
from engine.runtime.records import Count
from kernels import profile as kernel
from kernels.conditional import ConditionalPlan, conditional_codes
from kernels.exact import WIDE_UNIT
from kernels.hashing import hash_bytes

FORMAT = 3  # 1: edges on data values, and no points; 2: no conditional columns
BINS = 20
MOST_CELLS = 2**27  # columns times bins or categories of the widest: int64, a gigabyte
# Unseen categories named per column: those with the smallest hashes, so that any split of the rows keeps the same.
UNSEEN_KEPT = 200
PART_ROWS = 16_384  # rows of a vector, set or text that are taken apart at once
PREDICTION = "prediction"
Hex = Annotated[str, records.Matching(r"-?0x[0-9a-f]{1,1024}", "a whole number in hexadecimal")]
NO_VALUE = (NO_TEXT, "(unseen)", "(rare)")  # labels of the codes that stand for no known category


class ProfileSpecRecord(TypedDict):
    """profile_spec.json."""

    format: Annotated[int, records.Format(FORMAT)]
    numeric: list[NumericSpecRecord]
    categorical: list[str]
    predictions: list[NumericSpecRecord]
    unnamed: list[str]
    conditional: NotRequired[list[ConditionalRecord]]  # from format 3 on


class NumericCounts(TypedDict):
    """Counts of one numeric column: per bin; below and above infinity; `sums` are whole numbers in hexadecimal text."""

    counts: list[Count]
    missing: Count
    infinite: tuple[Count, Count]
    range: tuple[float | None, float | None]
    sums: tuple[Hex, Hex, Hex, Hex]


class CategoryCounts(TypedDict):
    """Counts of one categorical column: (code, rows) of the codes with rows, and unseen texts."""

    counts: list[tuple[Count, Count]]
    unseen: dict[str, Count]


class ProfileRecord(TypedDict):
    """profile.json, and a unit's part of it."""

    format: Annotated[int, records.Format(FORMAT)]
    spec: records.Digest
    rows: Count
    numeric: dict[str, NumericCounts]
    categorical: dict[str, CategoryCounts]
    predictions: dict[str, NumericCounts]
    conditional: NotRequired[dict[str, list[Count]]]


@dataclass(frozen=True)
class ProfileSpec:
    """How rows are counted. `categorical` are the encoder's vocabularies, in its order."""

    numeric: tuple[NumericSpec, ...]
    categorical: tuple[Vocabulary, ...]
    predictions: tuple[NumericSpec, ...]
    unnamed: frozenset[str] = frozenset()  # categorical columns whose values must not be written down
    format: int = FORMAT  # of the fit: profiles of an older model are counted and named by its format
    conditional: tuple[Conditional, ...] = ()
    parts: tuple[tuple[str, Parts, int], ...] = ()  # the encoder's parts that are counted, after the numeric features
    _plans: dict[str, kernel.ProfilePlan] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def fit(
        cls,
        encoder: Encoder,
        read: Callable[[Sequence[str]], pa.Table],
        scores: np.ndarray | None,
        classes: Sequence[str] = (),
        sensitive: Sequence[str] = (),
        bins: int = BINS,
        at_once: int = 1,
        related: Collection[str] = (),
    ) -> ProfileSpec:
        """Edges from training rows (`read(names)` gives those columns, `at_once` of them at a time) and
        validation scores [n] or [n, classes]. `related`: numeric columns of which conditional ones are made.
        """
        names = [feature.name for feature in encoder.features if feature.kind == NUMERIC]
        numeric: list[NumericSpec] = []
        values: dict[str, np.ndarray] = {}
        for name, column in each_column(names, read, at_once):
            found = as_floats(column)
            numeric.append(fit_numeric(name, found, bins))
            if name in related and len(values) < conditional.CANDIDATES:
                values[name] = found[:: max(1, -(-len(found) // conditional.FIT_ROWS))].copy()
        sampled: dict[str, np.ndarray] = {}
        for name, item, place in encoder.counted:
            if item.name not in sampled:
                column = read([item.name])[item.name]
                taken = pa.array(np.arange(0, len(column), max(1, -(-len(column) // FIT_ROWS))))
                sampled = {item.name: item.numbers(column.take(taken))}
            numeric.append(fit_numeric(name, sampled[item.name][:, place], bins))
        predictions = [
            fit_numeric(name, values, bins)
            for name, values in zip(prediction_names(classes), _score_columns(scores, classes), strict=True)
        ]
        unnamed = frozenset(sensitive) & {vocabulary.name for vocabulary in encoder.categorical_}
        spec = cls(tuple(numeric), encoder.categorical_, tuple(predictions), unnamed, parts=tuple(encoder.counted))
        return dataclasses.replace(spec, conditional=conditional.fit_conditional(values, spec.columns))

    @property
    def inputs(self) -> list[str]:
        """Names of the columns of the input that are counted: numeric features, parts, then categorical features."""
        return [item.name for item in self.numeric] + [item.name for item in self.categorical]

    @property
    def features(self) -> list[str]:
        """Names of the raw features that are read."""
        parts = {name: item.name for name, item, _ in self.parts}
        return list(dict.fromkeys(parts.get(name, name) for name in self.inputs))

    @property
    def columns(self) -> list[str]:
        """Names of every column that is counted: inputs, then predictions (in parentheses where an input has the name)."""
        return distinct([*self.inputs, *(item.name for item in self.predictions)])

    @property
    def conditional_plan(self) -> tuple[list[str], ConditionalPlan]:
        """(raw features, the kernel's form) of the conditional columns."""
        return conditional.plan_of(self.conditional)

    @property
    def plan(self) -> kernel.ProfilePlan:
        """The kernel's form of the numeric features."""
        return self._plan("numeric", self.numeric)

    @property
    def prediction_plan(self) -> kernel.ProfilePlan:
        """The kernel's form of the predictions."""
        return self._plan("predictions", self.predictions)

    def _plan(self, name: str, columns: tuple[NumericSpec, ...]) -> kernel.ProfilePlan:
        if name not in self._plans:
            self._plans[name] = kernel.profile_plan([column.edges for column in columns])
        return self._plans[name]

    @property
    def digest(self) -> str:
        """Content digest: profiles of different specifications are never merged or compared."""
        state = [self.to_json(), [[item.name, item.known_, item.rare_] for item in self.categorical]]
        of_parts = {item.name: vars(item) for _, item, _ in self.parts}
        return digest.of_json([*state, of_parts] if of_parts else state)

    def to_json(self) -> ProfileSpecRecord:
        """The specification without the vocabularies, which the encoder stores."""
        state: ProfileSpecRecord = {
            "format": self.format,
            "numeric": [item.to_json(self.format) for item in self.numeric],
            "categorical": [item.name for item in self.categorical],
            "predictions": [item.to_json(self.format) for item in self.predictions],
            "unnamed": sorted(self.unnamed),
        }
        return {**state, "conditional": [item.to_json() for item in self.conditional]} if self.format > 2 else state

    @classmethod
    def read(cls, path: Path, encoder: Encoder) -> ProfileSpec:
        """The specification stored beside the encoder. Raises Damaged."""
        state = records.read(path, ProfileSpecRecord)
        vocabularies = {item.name: item for item in encoder.categorical_}
        raw = {item.name for item in encoder.features if item.kind == NUMERIC}
        there = {item["name"] for item in state["numeric"]}
        parts = tuple(item for item in encoder.counted if item[0] in there)
        lacking = [name for name in state["categorical"] if name not in vocabularies]
        lacking += sorted(there - raw - {name for name, _, _ in parts})
        if lacking:
            raise records.Damaged(f"{path} names the column {lacking[0]!r}, which the encoder has not fitted")
        widest = max((vocabularies[name].size for name in state["categorical"]), default=0)
        longest = max((len(item["edges"]) for item in state["numeric"] + state["predictions"]), default=0)
        cells = max(widest * len(state["categorical"]), longest * len(state["numeric"] + state["predictions"]))
        if cells > MOST_CELLS:
            raise records.Damaged(f"{path} must have at most {MOST_CELLS:,} counts, found {cells:,}")
        spec = cls(
            tuple(NumericSpec.of(item) for item in state["numeric"]),
            tuple(vocabularies[name] for name in state["categorical"]),
            tuple(NumericSpec.of(item) for item in state["predictions"]),
            frozenset(state["unnamed"]),
            state["format"],
            tuple(Conditional.of(item, sorted(raw)) for item in state.get("conditional", ())),
            parts,
        )
        try:
            assert spec.plan and spec.prediction_plan
        except ValueError as error:
            raise records.Damaged(f"{path}: {error}") from None
        if odd := [item.name for item in spec.numeric + spec.predictions if len(item.points) != item.bins]:
            raise records.Damaged(f"{path}: {odd[0]!r} must have one point for each bin")
        names = [*spec.columns, *(item.name for item in spec.conditional)]
        if len(spec.conditional) > conditional.MOST or distinct(names) != names:
            raise records.Damaged(
                f"{path} must have at most {conditional.MOST} conditional columns, each with a name of its own"
            )
        return spec


@dataclass(frozen=True)
class Profile:
    """Counts of rows on a specification.

    numeric, predictions: kernels.profile.Profile; categories int64[columns, widest vocabulary]: rows of each code
    (0 null, 1 unseen, 2 rare, then known); unseen: per categorical column, text -> rows; conditional int64[columns, BINS + 1]:
    rows of each code of kernels.conditional.
    """

    spec: ProfileSpec
    rows: int
    numeric: kernel.Profile
    categories: np.ndarray
    predictions: kernel.Profile
    unseen: tuple[dict[str, int], ...]
    conditional: np.ndarray

    @classmethod
    def empty(cls, spec: ProfileSpec) -> Profile:
        """The profile of no rows."""
        widest = max((item.size for item in spec.categorical), default=0)
        return cls(
            spec,
            0,
            kernel.empty_profile(spec.plan),
            np.zeros((len(spec.categorical), widest), np.int64),
            kernel.empty_profile(spec.prediction_plan),
            tuple({} for _ in spec.categorical),
            np.zeros((len(spec.conditional), conditional.BINS + 1), np.int64),
        )

    @classmethod
    def count(
        cls,
        spec: ProfileSpec,
        raw: pa.Table,
        scores: np.ndarray | None = None,
        codes: np.ndarray | None = None,
        threads: int = 1,
        numeric: kernel.Profile | None = None,
    ) -> Profile:
        """The profile of raw features and their scores ([n] or [n, classes]; none: predictions are not counted).

        `codes`: int32[n, categories] where the encoder has made them already; `numeric`: the counts of the numeric
        features where they exist already. Raises UserError for a missing column.
        """
        there = set(raw.column_names)
        for name in spec.features:
            if name not in there:
                raise UserError(f"raw features must have column {name!r}, found {raw.num_columns} other columns")
        if numeric is None:
            return cls.count_ranges(spec, raw, [(0, raw.num_rows)], scores, codes, threads)[0]
        others = dataclasses.replace(spec, numeric=(), _plans={"predictions": spec.prediction_plan})
        found = cls.count_ranges(others, raw, [(0, raw.num_rows)], scores, codes, threads)[0]
        return dataclasses.replace(found, spec=spec, numeric=numeric)

    @classmethod
    def count_ranges(
        cls,
        spec: ProfileSpec,
        raw: pa.Table,
        ranges: Sequence[tuple[int, int]],
        scores: np.ndarray | None = None,
        codes: np.ndarray | None = None,
        threads: int = 1,
    ) -> list[Profile]:
        """A profile of each range of rows; the columns are unpacked once for all of them."""
        blank, values = cls.empty(spec), _block(raw, spec)
        if codes is None:
            parts = [item.codes(raw[item.name]) for item in spec.categorical]
            codes = np.stack(parts, axis=1) if parts else np.zeros((raw.num_rows, 0), np.int32)
        sizes = np.array([item.size for item in spec.categorical], np.int64)
        related, bins = _conditional_codes(raw, spec, threads), np.full(len(spec.conditional), conditional.BINS + 1)
        found = []
        for low, high in ranges:
            part = codes[low:high]
            scored = None if scores is None or not spec.predictions else scores[low:high]
            found.append(
                cls(
                    spec,
                    high - low,
                    kernel.profile(values[low:high], spec.plan, threads) if spec.numeric else blank.numeric,
                    kernel.category_counts(part, sizes, threads) if len(sizes) else blank.categories,
                    blank.predictions if scored is None else _count_scores(spec, scored, threads),
                    tuple(_unseen(item, raw, part[:, k], spec, low) for k, item in enumerate(spec.categorical)),
                    kernel.category_counts(related[low:high], bins, threads) if len(bins) else blank.conditional,
                )
            )
        return found

    def merge(self, other: Profile) -> Profile:
        """The sum of two profiles. Raises UserError when they were counted on different specifications."""
        if self.spec is not other.spec and self.spec.digest != other.spec.digest:
            raise UserError("profiles that are merged must have one specification, found those of two models")
        return Profile(
            self.spec,
            self.rows + other.rows,
            kernel.merge(self.numeric, other.numeric),
            self.categories + other.categories,
            kernel.merge(self.predictions, other.predictions),
            tuple(_merge_unseen(a, b) for a, b in zip(self.unseen, other.unseen, strict=True)),
            self.conditional + other.conditional,
        )

    @property
    def digest(self) -> str:
        """Content digest."""
        return digest.of_json(self.to_json())

    def to_json(self) -> ProfileRecord:
        """JSON values; equal rows give equal text in any split and order."""
        spec = self.spec
        categorical: dict[str, CategoryCounts] = {}
        for index, item in enumerate(spec.categorical):
            used = np.flatnonzero(self.categories[index])
            categorical[item.name] = {
                "counts": [(int(code), int(self.categories[index, code])) for code in used],
                "unseen": dict(sorted(self.unseen[index].items())),
            }
        state: ProfileRecord = {
            "format": spec.format,
            "spec": spec.digest,
            "rows": self.rows,
            "numeric": _kernel_json(self.numeric, spec.plan, spec.numeric),
            "categorical": categorical,
            "predictions": _kernel_json(self.predictions, spec.prediction_plan, spec.predictions),
        }
        named = zip(spec.conditional, self.conditional.tolist(), strict=True)
        return {**state, "conditional": {item.name: counts for item, counts in named}} if spec.format > 2 else state

    @classmethod
    def from_json(cls, state: ProfileRecord, spec: ProfileSpec) -> Profile:
        """A saved profile. Raises UserError when it was counted on another specification."""
        if state["spec"] != spec.digest:
            raise UserError(
                "profile.json must be counted on the model's specification, found another: it was made by scoring with "
                "another model. Name the model that was used for scoring"
            )
        _check_counts(state, spec)
        categories = cls.empty(spec).categories
        for index, item in enumerate(spec.categorical):
            for code, rows in state["categorical"][item.name]["counts"]:
                categories[index, code] = rows
        unseen = tuple(dict(state["categorical"][item.name]["unseen"]) for item in spec.categorical)
        related = [state.get("conditional", {})[item.name] for item in spec.conditional]
        return cls(
            spec,
            state["rows"],
            _kernel_profile(state["numeric"], spec.plan, spec.numeric),
            categories,
            _kernel_profile(state["predictions"], spec.prediction_plan, spec.predictions),
            unseen,
            np.array(related, np.int64).reshape(-1, conditional.BINS + 1),
        )


def prediction_names(classes: Sequence[str] = ()) -> list[str]:
    """Names of the prediction columns: one, or one a class of a multiclass model."""
    return [f"{PREDICTION}_{name}" for name in classes] if classes else [PREDICTION]


def category_label(vocabulary: Vocabulary, code: int, named: bool = True) -> str:
    """The label of a code; a sensitive value (`named` false) is shown as a number."""
    if code < FIRST_KNOWN:
        return NO_VALUE[code]
    place = code - FIRST_KNOWN
    if not named:
        return f"(value {place + 1})"
    text = vocabulary.known_[place]
    return repr(text) if text in NO_VALUE else text


# ---------------------------------------------------------------------------------------------------------- fitting


def _score_columns(scores: np.ndarray | None, classes: Sequence[str]) -> list[np.ndarray]:
    if scores is None:
        return [np.empty(0)] * max(len(classes), 1)
    return [scores] if scores.ndim == 1 else [scores[:, index] for index in range(scores.shape[1])]


def _check_counts(state: ProfileRecord, spec: ProfileSpec) -> None:
    """Raise Damaged where the columns or counts of a profile do not fit its specification."""
    for part, columns in (("numeric", spec.numeric), ("predictions", spec.predictions)):
        for item in columns:
            counts = state[part].get(item.name, {}).get("counts", ())  # type: ignore[literal-required]
            if len(counts) != item.bins + 2:
                raise records.Damaged(
                    f"a profile must have {item.bins + 2} counts of {item.name!r}, found {len(counts)}"
                )
    for related in spec.conditional:
        if len(state.get("conditional", {}).get(related.name, ())) != conditional.BINS + 1:
            raise records.Damaged(f"a profile must have {conditional.BINS + 1} counts of {related.name!r}")
    for vocabulary in spec.categorical:
        counts = state["categorical"].get(vocabulary.name, {"counts": [(vocabulary.size, 0)]})["counts"]
        if any(code >= vocabulary.size for code, _ in counts):
            raise records.Damaged(
                f"a profile must count the {vocabulary.size} codes of {vocabulary.name!r}, found others"
            )


# --------------------------------------------------------------------------------------------------------- counting


def _block(raw: pa.Table, spec: ProfileSpec) -> np.ndarray:
    block = np.empty((raw.num_rows, len(spec.numeric)))
    of_parts: dict[str, list[tuple[int, int]]] = {}
    parts = {name: (item, place) for name, item, place in spec.parts}
    for index, item in enumerate(spec.numeric):
        if item.name not in parts:
            block[:, index] = as_floats(raw[item.name])
        else:
            feature, place = parts[item.name]
            of_parts.setdefault(feature.name, []).append((index, place))
    for feature in dict.fromkeys(item for _, item, _ in spec.parts):
        columns, places = zip(*of_parts[feature.name], strict=True)
        for at in range(0, raw.num_rows, PART_ROWS):
            block[at : at + PART_ROWS, columns] = feature.numbers(raw[feature.name].slice(at, PART_ROWS))[:, places]
    return block


def _conditional_codes(raw: pa.Table, spec: ProfileSpec, threads: int) -> np.ndarray:
    names, plan = spec.conditional_plan
    block = np.empty((raw.num_rows, len(names)))
    for index, name in enumerate(names):
        block[:, index] = as_floats(raw[name])
    return conditional_codes(block, plan, threads)


def _count_scores(spec: ProfileSpec, scores: np.ndarray, threads: int) -> kernel.Profile:
    return kernel.profile(scores.reshape(len(scores), len(spec.predictions)), spec.prediction_plan, threads)


def _unseen(vocabulary: Vocabulary, raw: pa.Table, codes: np.ndarray, spec: ProfileSpec, low: int) -> dict[str, int]:
    """Rows of each category unseen in training, by its text, among the rows from `low`; none for sensitive columns."""
    rows = low + np.flatnonzero(codes == UNSEEN)
    if not len(rows) or vocabulary.name in spec.unnamed:
        return {}
    counts = pc.value_counts(as_texts(raw[vocabulary.name].take(pa.array(rows))))
    return _kept(dict(zip(counts.field("values").to_pylist(), counts.field("counts").to_pylist(), strict=True)))


def _merge_unseen(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
    if not a or not b:
        return a or b
    return _kept({text: a.get(text, 0) + b.get(text, 0) for text in {**a, **b}})


def _kept(counts: dict[str, int]) -> dict[str, int]:
    # The smallest hashes of a union are among the smallest of every part, so no count of a kept text is lost.
    if len(counts) <= UNSEEN_KEPT:
        return counts
    texts = pa.array(sorted(counts), pa.large_string())
    offsets = np.frombuffer(texts.buffers()[1], np.int64)[: len(texts) + 1]
    hashes = hash_bytes(np.frombuffer(texts.buffers()[2] or b"", np.uint8), offsets)
    chosen = np.argsort(hashes, kind="stable")[:UNSEEN_KEPT]
    return {text: counts[text] for text in sorted(texts[int(index)].as_py() for index in chosen)}


# ------------------------------------------------------------------------------------------------------------- JSON


def _kernel_json(
    found: kernel.Profile, plan: kernel.ProfilePlan, columns: Sequence[NumericSpec]
) -> dict[str, NumericCounts]:
    state: dict[str, NumericCounts] = {}
    for index, item in enumerate(columns):
        tail, (below, squares, under, over) = found.counts[index, kernel.MISSING :], found.sums[index]
        state[item.name] = {
            "counts": [int(count) for count in kernel.column_counts(found, plan, index)],
            "missing": int(tail[0]),
            "infinite": (int(tail[1]), int(tail[2])),
            "range": (_finite(found.low[index]), _finite(found.high[index])),
            # Whole numbers beyond 64 bits: text, so that no reader rounds them.
            "sums": (hex(below), hex(squares), hex(under), hex(over)),
        }
    return state


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _kernel_profile(
    state: dict[str, NumericCounts], plan: kernel.ProfilePlan, columns: Sequence[NumericSpec]
) -> kernel.Profile:
    found = kernel.empty_profile(plan)
    sums = []
    for index, item in enumerate(columns):
        column = state[item.name]
        found.counts[index, : item.bins + 2] = column["counts"]
        found.counts[index, kernel.MISSING :] = [column["missing"], *column["infinite"]]
        low, high = column["range"]
        found.low[index] = np.inf if low is None else low
        found.high[index] = -np.inf if high is None else high
        below, squares, *outside = (int(text, 16) for text in column["sums"])
        sums.append((below, squares, outside[0], outside[1]))
    return kernel.Profile(found.counts, found.low, found.high, sums)


def outside_sum(total: int) -> float | None:
    """An exact sum in units of 2**-1084 as a float; None beyond the range of a double."""
    try:
        return total / (1 << WIDE_UNIT)
    except OverflowError:
        return None
