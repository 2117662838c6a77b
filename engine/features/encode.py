"""The encoder: turns raw features into one float32 block and one int32 block; fitted on training rows only.

The fitted state is JSON: a list of numeric columns with their numbers and a list of vocabularies. Codes of a category:
0 = null, 1 = unseen in training, 2 = seen there but rare, 3 and up = known. They do not depend on the order of rows.
"""

from __future__ import annotations

import hmac
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.config.names import free
from engine.config.sections.features import EncodeConfig
from engine.errors import UserError
from engine.features.compute import as_floats
from engine.features.spec import CATEGORICAL, NUMERIC, Feature
from engine.runtime import digest, records
from engine.runtime.records import Within
from kernels import encode as kernel

FORMAT = 2  # 2: vocabularies with concealed texts; a state without one is written as 1
NULL, UNSEEN, RARE, FIRST_KNOWN = 0, 1, 2, 3
RARE_KEPT = 100_000  # rare categories beyond this many count as unseen
KNOTS = 257
NO_TEXT = "(null)"
CONCEALED = "hmac:"  # prefix of 32 hex digits that replace a text of a sensitive column
_IS_CONCEALED = re.compile(CONCEALED + "[0-9a-f]{32}")
LARGEST = float(np.finfo(np.float64).max)
WIDEST = 0.99 * LARGEST
CRUSHED = 1e-6  # with half of the rows within so few deviations, their differences are noise to a model


@dataclass(frozen=True)
class NumericColumn:
    """State of one numeric feature: `center_` and `scale_` of finite training values, knots of quantile and PLE bins."""

    name: str
    kind: Literal["standardise", "quantile", "ple"]
    center_: float
    scale_: Annotated[float, Within(0)]
    low_: float
    high_: float
    missing_: bool
    knots_: tuple[float, ...] = ()

    def for_kernel(self, clip: float) -> kernel.NumericColumn:
        """The kernel's form; a value beyond `clip` deviations, or beyond the knots, counts as that bound."""
        if self.kind == "standardise":
            reach = min(clip * self.scale_, WIDEST)  # both ends and the distances between them are finite too
            return kernel.NumericColumn(
                center=self.center_,
                scale=self.scale_,
                low=max(self.center_ - reach, -LARGEST),
                high=min(self.center_ + reach, LARGEST),
                indicator=self.missing_,
            )
        kind = "normal" if self.kind == "quantile" else "ple"
        return kernel.NumericColumn(
            kind, edges=self.knots_, low=self.knots_[0], high=self.knots_[-1], indicator=self.missing_
        )

    def outputs(self) -> list[str]:
        """Names of the columns it writes."""
        bins = (
            [f"{self.name}_bin{index}" for index in range(len(self.knots_) - 1)] if self.kind == "ple" else [self.name]
        )
        return [*bins, f"{self.name}_missing"] if self.missing_ else bins


@dataclass(frozen=True)
class Vocabulary:
    """State of one categorical feature: known categories, most frequent first, then by text.

    The texts of a sensitive feature (`salt_`) are concealed; the codes do not change.
    """

    name: str
    known_: tuple[str, ...]
    rare_: tuple[str, ...]
    salt_: str = ""

    @property
    def size(self) -> int:
        """Number of codes."""
        return FIRST_KNOWN + len(self.known_)

    def codes(self, column: pa.ChunkedArray | pa.Array) -> np.ndarray:
        """int32[n] codes of a column of any type; values are compared as text."""
        texts = concealed(column, self.salt_) if self.salt_ else as_texts(column)
        index = pc.index_in(texts, value_set=pa.array(self.known_, pa.large_string()), skip_nulls=True)
        codes = np.asarray(pc.fill_null(index, -1)).astype(np.int32)
        codes[codes >= 0] += FIRST_KNOWN
        unknown = codes < 0
        if unknown.any():
            rare = pc.is_in(texts, value_set=pa.array(self.rare_, pa.large_string()), skip_nulls=True)
            codes[unknown] = np.where(np.asarray(rare)[unknown], RARE, UNSEEN)
            codes[np.asarray(pc.is_null(texts))] = NULL
        return codes


class EncoderRecord(TypedDict):
    """features.json; `features` are (name, kind, origin)."""

    format: Annotated[int, records.Format(FORMAT)]
    clip: Annotated[float, Within(0)]
    features: list[tuple[str, str, str]]
    numeric: list[dict[str, object]]
    categorical: list[dict[str, object]]


@dataclass(frozen=True)
class Encoder:
    """All fitted columns. `Encoder.fit(...)`, then `transform` on any rows with the same raw features."""

    features: tuple[Feature, ...]
    numeric_: tuple[NumericColumn, ...]
    categorical_: tuple[Vocabulary, ...]
    clip: float
    _plan: list[kernel.NumericPlan] = field(default_factory=list, compare=False, repr=False)

    @classmethod
    def fit(
        cls,
        features: Sequence[Feature],
        read: Callable[[Sequence[str]], pa.Table],
        config: EncodeConfig,
        warn: Callable[[str], None] = lambda _: None,
        sensitive: Collection[str] = (),
        at_once: int = 1,
    ) -> Encoder:
        """Fit on training rows; `read(names)` gives those columns, `at_once` of them at a time to bound memory.

        `warn` is called with a sentence for each column whose scale is set by a few outliers. Values of the `sensitive`
        features are neither stored nor shown.
        """
        numeric = [
            _fit_numeric(name, as_floats(column), config, warn, shown=name not in sensitive)
            for name, column in each_column(_of(features, NUMERIC), read, at_once)
        ]
        categorical = [
            _fit_vocabulary(name, column, config)
            for name, column in each_column(_of(features, CATEGORICAL), read, at_once)
        ]
        return cls(tuple(features), tuple(numeric), _concealed(categorical, sensitive), config.clip)

    @property
    def salt(self) -> str:
        """The salt that conceals texts of sensitive features; empty where there are none."""
        return next((item.salt_ for item in self.categorical_ if item.salt_), "")

    @property
    def numeric_names(self) -> list[str]:
        """Names of the columns of the float32 block. The indicator `x_missing` of x is written in parentheses where a feature
        has that name.
        """
        taken = {feature.name for feature in self.features}
        found = []
        for column in self.numeric_:
            for name in column.outputs():
                found.append(name if name == column.name else free(name, taken))
                taken.add(found[-1])
        return found

    @property
    def width(self) -> int:
        """Number of columns of the float32 block."""
        return sum(len(column.outputs()) for column in self.numeric_)

    @property
    def cardinalities(self) -> list[int]:
        """Number of codes of each column of the int32 block."""
        return [vocabulary.size for vocabulary in self.categorical_]

    @property
    def digest(self) -> str:
        """Content digest of the fitted state."""
        return digest.of_json(self.to_json())

    def check_columns(self, names: Iterable[str]) -> list[str]:
        """Raise UserError with the first missing feature; return the names that are not needed."""
        have = set(names)
        for feature in self.features:
            if feature.name not in have:
                raise UserError(f"raw features must have column {feature.name!r}, found {len(have)} other columns")
        return sorted(have - {feature.name for feature in self.features})

    def transform(self, raw: pa.Table, threads: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """(float32[n, width], int32[n, categorical]) of raw features, found by name; the input is not modified."""
        self.check_columns(raw.column_names)
        numeric = np.empty((raw.num_rows, self.width), np.float32)
        if self.width:
            kernel.encode_numeric(self.values(raw), self.plan, numeric, threads=threads)
        return numeric, self.codes(raw)

    def values(self, raw: pa.Table) -> np.ndarray:
        """float64[n, numeric features], NaN missing: what the kernel encodes."""
        values = np.empty((raw.num_rows, len(self.numeric_)), np.float64)
        for index, column in enumerate(self.numeric_):
            values[:, index] = as_floats(raw[column.name])
        return values

    def codes(self, raw: pa.Table) -> np.ndarray:
        """int32[n, categorical features]: the code of each text."""
        codes = np.empty((raw.num_rows, len(self.categorical_)), np.int32)
        for index, vocabulary in enumerate(self.categorical_):
            codes[:, index] = vocabulary.codes(raw[vocabulary.name])
        return codes

    @property
    def plan(self) -> kernel.NumericPlan:
        """The kernel's form of the numeric columns."""
        if not self._plan:
            self._plan.append(kernel.numeric_plan([column.for_kernel(self.clip) for column in self.numeric_]))
        return self._plan[0]

    def to_json(self) -> EncoderRecord:
        """The fitted state."""
        return {
            "format": FORMAT if self.salt else 1,
            "clip": self.clip,
            "features": [(item.name, item.kind, item.origin) for item in self.features],
            "numeric": [dict(vars(column)) for column in self.numeric_],
            "categorical": [
                {name: value for name, value in vars(item).items() if name != "salt_" or value}
                for item in self.categorical_
            ],
        }

    @classmethod
    def read(cls, path: Path) -> Encoder:
        """The encoder of a features.json. Raises Damaged."""
        state = records.read(path, EncoderRecord)
        features = tuple(Feature(*item) for item in state["features"])
        numeric = records.filled(NumericColumn, state["numeric"], f"{path}: numeric")
        categorical = records.filled(Vocabulary, state["categorical"], f"{path}: categorical")
        for kind, columns in ((NUMERIC, numeric), (CATEGORICAL, categorical)):
            if [item.name for item in features if item.kind == kind] != [item.name for item in columns]:
                raise records.Damaged(f"{path}: {kind} must hold the {kind} columns of features, in their order")
        if odd := next((item for item in features if item.kind not in (NUMERIC, CATEGORICAL)), None):
            raise records.Damaged(f"{path}: feature {odd.name!r} must be numeric or categorical, found {odd.kind!r}")
        encoder = cls(features, numeric, categorical, state["clip"])
        try:
            assert encoder.plan
        except (ValueError, IndexError) as error:
            raise records.Damaged(f"{path}: numeric columns cannot be encoded: {error}") from None
        return encoder


def as_texts(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """large_string[n] of any column: categories are compared as text."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pa.large_string())


def concealed(column: pa.ChunkedArray | pa.Array, salt: str) -> pa.Array:
    """large_string[n]: `hmac:` and 128 bits of HMAC-SHA256 (RFC 2104) of each text under the salt; nulls stay.

    A concealed text stays as it is, so that the gate's rows, which are stored without their texts, get the same codes.
    """
    found = as_texts(column).dictionary_encode()
    standing = [text if _IS_CONCEALED.fullmatch(text) else _hmac(salt, text) for text in found.dictionary.to_pylist()]
    return pa.array(standing, pa.large_string()).take(found.indices)


def _hmac(salt: str, text: str) -> str:
    return CONCEALED + hmac.digest(salt.encode(), text.encode(), "sha256").hex()[:32]


def _concealed(vocabularies: Sequence[Vocabulary], sensitive: Collection[str]) -> tuple[Vocabulary, ...]:
    """The vocabularies, with the texts of sensitive features concealed.

    Scoring must compute the codes, so the salt is stored in the bundle: it defeats precomputed tables, but not somebody who
    tries likely texts one by one. It is derived from the texts themselves: the same rows give the same bundle.
    """
    state = [[item.name, item.known_, item.rare_] for item in vocabularies if item.name in sensitive]
    salt = digest.of_json(["salt", state])[:32]

    def conceal(texts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_hmac(salt, text) for text in texts)

    return tuple(
        Vocabulary(item.name, conceal(item.known_), tuple(sorted(conceal(item.rare_))), salt)
        if item.name in sensitive
        else item
        for item in vocabularies
    )


def numbered_labels(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """str[n]: `(value 1)`, `(value 2)`, ... by falling frequency instead of the values of a sensitive column; a null is
    `(null)`.
    """
    found = as_texts(column).dictionary_encode()
    texts = np.asarray(found.dictionary.to_pylist(), object).astype(str)
    index = np.asarray(pc.fill_null(found.indices, len(texts)))
    order = np.lexsort((texts, -np.bincount(index, minlength=len(texts) + 1)[: len(texts)]))
    labels = np.empty(len(texts) + 1, object)
    labels[order] = [f"(value {place + 1})" for place in range(len(texts))]
    labels[-1] = NO_TEXT
    return np.asarray(labels[index]).astype(str)


def group_labels(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """str[n]: the text of each value; a null is `(null)`; a text that reads so is put in quotes."""
    texts = as_texts(column)
    texts = pc.if_else(pc.equal(texts, NO_TEXT), repr(NO_TEXT), texts)
    return np.asarray(pc.fill_null(texts, NO_TEXT).to_pylist(), object).astype(str)


def each_column(
    names: Sequence[str], read: Callable[[Sequence[str]], pa.Table], at_once: int
) -> Iterator[tuple[str, pa.ChunkedArray]]:
    """Names and columns, `at_once` read together: opening a file of many columns is slow."""
    for at in range(0, len(names), at_once):
        table = read(names[at : at + at_once])
        yield from zip(table.column_names, table.columns, strict=True)


def _of(features: Sequence[Feature], kind: str) -> list[str]:
    return [feature.name for feature in features if feature.kind == kind]


def _fit_numeric(
    name: str, values: np.ndarray, config: EncodeConfig, warn: Callable[[str], None], shown: bool
) -> NumericColumn:
    finite = np.sort(values[np.isfinite(values)])
    missing = bool(np.isnan(values).any()) and config.missing_indicator
    if not len(finite):
        return NumericColumn(name, "standardise", 0.0, 0.0, 0.0, 0.0, missing)
    # Scaled before squaring, so that values near the largest float do not overflow.
    largest = max(abs(float(finite[0])), abs(float(finite[-1])), 1e-300)
    # Sorted first, so that the sums do not depend on the order of rows.
    center = float(np.sum(finite / largest)) / len(finite) * largest
    # Where a difference may exceed the largest float, values are divided before they are subtracted.
    away = (finite - center) / largest if largest < WIDEST / 2 else finite / largest - center / largest
    scale = largest * math.sqrt(float(np.sum(away**2)) / len(finite))
    constant = finite[0] == finite[-1]
    knots: tuple[float, ...] = ()
    if config.numeric != "standardise" and not constant:
        inner = np.clip(finite, -WIDEST / 2, WIDEST / 2) if largest > WIDEST / 2 else finite
        quantiles = kernel.quantiles_of(inner, KNOTS - 1 if config.numeric == "quantile" else config.bins)
        # Equal edges make empty bins and are dropped; equal quantiles are the weight of a repeated value and stay.
        knots = tuple(float(x) for x in (quantiles if config.numeric == "quantile" else np.unique(quantiles)))
    kind = config.numeric if len(knots) > 1 else "standardise"
    if kind == "standardise" and not constant:
        _warn_of_crushed(name, finite, min(scale, LARGEST), warn, shown)
    return NumericColumn(
        name,
        kind,  # type: ignore[arg-type]  # the config has checked it
        center,
        0.0 if constant else min(scale, LARGEST),
        float(finite[0]),
        float(finite[-1]),
        missing,
        knots,
    )


def _warn_of_crushed(name: str, finite: np.ndarray, scale: float, warn: Callable[[str], None], shown: bool) -> None:
    """Warn where outliers set the scale; `finite` is sorted."""
    low, high = (float(finite[len(finite) * quarter // 4]) for quarter in (1, 3))
    if low < high and high / scale - low / scale < CRUSHED:
        far = max(float(finite[0]), float(finite[-1]), key=abs)
        said = f"outliers as far as {far:g}" if shown else "outliers"
        warn(
            f"feature {name!r}: {said} set its scale, so that half of the training rows are within "
            f"{high / scale - low / scale:.1g} deviations and look alike to the model. "
            "Give the column a min or max in data.columns, or set features.encode.numeric=quantile"
        )


def _fit_vocabulary(name: str, column: pa.ChunkedArray, config: EncodeConfig) -> Vocabulary:
    counts = pc.value_counts(as_texts(column).drop_null())
    pairs = sorted(
        zip(counts.field("counts").to_pylist(), counts.field("values").to_pylist(), strict=True),
        key=lambda x: (-x[0], x[1]),
    )
    known = [text for count, text in pairs if count >= config.min_count][: config.max_categories]
    rare = sorted(text for _, text in pairs[len(known) :])[:RARE_KEPT]
    return Vocabulary(name, tuple(known), tuple(rare))
