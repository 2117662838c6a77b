"""The encoder: turns raw features into one float32 block and one int32 block; fitted on training rows only.

The fitted state is JSON: a list of numeric columns with their numbers, a list of vocabularies, and how vectors, sets and texts
are taken apart (features.parts): each part is a numeric column, after those of the numeric features. Codes of a category:
0 = null, 1 = unseen in training, 2 = seen there but rare, 3 and up = known. They do not depend on the order of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NotRequired, TypedDict

import numpy as np
import pyarrow as pa

from engine.config.names import free
from engine.config.sections.features import EncodeConfig
from engine.errors import UserError
from engine.features import parts
from engine.features.compute import as_floats
from engine.features.numbers import NumericColumn, fit_number
from engine.features.parts import PARTS, Parts
from engine.features.spec import CATEGORICAL, NUMERIC, SET, TEXT, VECTOR, Feature
from engine.features.vocabulary import Vocabulary, conceal_all, fit_vocabulary
from engine.runtime import digest, records
from engine.runtime.records import Within
from kernels import encode as kernel

FORMAT = (
    3  # 2: vocabularies with concealed texts; 3: vectors, sets and texts; a state without these is written as 1 or 2
)


class EncoderRecord(TypedDict):
    """features.json; `features` are (name, kind, origin)."""

    format: Annotated[int, records.Format(FORMAT)]
    clip: Annotated[float, Within(0)]
    features: list[tuple[str, str, str]]
    numeric: list[dict[str, object]]
    categorical: list[dict[str, object]]
    vector: NotRequired[list[dict[str, object]]]  # from format 3 on
    set: NotRequired[list[dict[str, object]]]
    text: NotRequired[list[dict[str, object]]]


HELD = {VECTOR: "the centre and scale of its numbers", SET: "its members", TEXT: "its words"}  # by a fitted encoder


def check_sensitive(features: Sequence[Feature], sensitive: Collection[str]) -> None:
    """Raise UserError for a sensitive feature that is several numbers."""
    for feature in features:
        if feature.kind in PARTS and feature.name in sensitive:
            raise UserError(
                f"feature {feature.name!r} is a {feature.kind}, which must not be sensitive, because {HELD[feature.kind]} would "
                "be part of the model: leave it out, or compute numbers of it in data.query"
            )


@dataclass(frozen=True)
class Encoder:
    """All fitted columns. `Encoder.fit(...)`, then `transform` on any rows with the same raw features."""

    features: tuple[Feature, ...]
    numeric_: tuple[NumericColumn, ...]
    categorical_: tuple[Vocabulary, ...]
    clip: float
    parts_: tuple[Parts, ...] = ()
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
        features are neither stored nor shown. Raises UserError for a sensitive feature that is several numbers.
        """
        check_sensitive(features, sensitive)
        numeric = [
            fit_number(name, as_floats(column), config, warn, shown=name not in sensitive)
            for name, column in each_column(_of(features, NUMERIC), read, at_once)
        ]
        categorical = [
            fit_vocabulary(name, column, config)
            for name, column in each_column(_of(features, CATEGORICAL), read, at_once)
        ]
        parted: list[Parts] = []
        for feature in features:
            if feature.kind not in PARTS:
                continue
            state, columns = PARTS[feature.kind].fit(feature.name, read([feature.name])[feature.name], config, warn)
            parted.append(state)
            numeric += columns
        vocabularies = conceal_all(categorical, sensitive)
        return cls(tuple(features), tuple(numeric), vocabularies, config.clip, tuple(parted))

    @property
    def salt(self) -> str:
        """The salt that conceals texts of sensitive features; empty where there are none."""
        return next((item.salt_ for item in self.categorical_ if item.salt_), "")

    @property
    def numeric_of(self) -> list[str]:
        """The raw feature of each numeric column."""
        return [*_of(self.features, NUMERIC), *(item.name for item in self.parts_ for _ in item.names)]

    @property
    def numeric_names(self) -> list[str]:
        """Names of the columns of the float32 block. The indicator `x_missing` of x, and a part, are written in parentheses
        where a feature has that name.
        """
        taken = {feature.name for feature in self.features}
        found = []
        for of, column in zip(self.numeric_of, self.numeric_, strict=True):
            for name in column.outputs():
                found.append(name if name == of else free(name, taken))
                taken.add(found[-1])
        return found

    @property
    def counted(self) -> list[tuple[str, Parts, int]]:
        """(name, feature, place of the part) of the parts that the drift profile counts; no name is that of a feature."""
        taken = {feature.name for feature in self.features}
        found = []
        for item in self.parts_:
            for place in item.counted:
                found.append((free(item.names[place], taken), item, place))
                taken.add(found[-1][0])
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
        """float64[n, numeric columns], NaN missing: what the kernel encodes."""
        values = np.empty((raw.num_rows, len(self.numeric_)), np.float64)
        names = _of(self.features, NUMERIC)
        for index, name in enumerate(names):
            values[:, index] = as_floats(raw[name])
        at = len(names)
        for item in self.parts_:
            stop = at + len(item.names)
            values[:, at:stop] = item.numbers(raw[item.name])
            at = stop
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
        state: EncoderRecord = {
            "format": 2 if self.salt else 1,
            "clip": self.clip,
            "features": [(item.name, item.kind, item.origin) for item in self.features],
            "numeric": [dict(vars(column)) for column in self.numeric_],
            "categorical": [
                {name: value for name, value in vars(item).items() if name != "salt_" or value}
                for item in self.categorical_
            ],
        }
        if not self.parts_:
            return state
        vector, set_, text = ([dict(vars(item)) for item in self.parts_ if item.KIND == kind] for kind in PARTS)
        return {**state, "format": FORMAT, "vector": vector, "set": set_, "text": text}

    @classmethod
    def read(cls, path: Path) -> Encoder:
        """The encoder of a features.json. Raises Damaged."""
        state = records.read(path, EncoderRecord)
        features = tuple(Feature(*item) for item in state["features"])
        numeric = records.filled(NumericColumn, state["numeric"], f"{path}: numeric")
        categorical = records.filled(Vocabulary, state["categorical"], f"{path}: categorical")
        known = (NUMERIC, CATEGORICAL, *PARTS)
        if odd := next((item for item in features if item.kind not in known), None):
            raise records.Damaged(f"{path}: feature {odd.name!r} must be {' or '.join(known)}, found {odd.kind!r}")
        parted = _read_parts(state, features, path)
        numbers = [*_of(features, NUMERIC), *(name for item in parted for name in item.names)]
        for kind, names, columns in (
            (NUMERIC, numbers, numeric),
            (CATEGORICAL, _of(features, CATEGORICAL), categorical),
        ):
            if names != [item.name for item in columns]:
                raise records.Damaged(f"{path}: {kind} must hold the {kind} columns of features, in their order")
        encoder = cls(features, numeric, categorical, state["clip"], parted)
        try:
            assert encoder.plan
        except (ValueError, IndexError) as error:
            raise records.Damaged(f"{path}: numeric columns cannot be encoded: {error}") from None
        return encoder


def _read_parts(state: EncoderRecord, features: Sequence[Feature], path: Path) -> tuple[Parts, ...]:
    """How the features that are several numbers are taken apart, in their order. Raises Damaged."""
    found: dict[tuple[str, str], Parts] = {}
    for kind, cls in PARTS.items():
        items = records.filled(cls, state.get(kind, []), f"{path}: {kind}")  # type: ignore[arg-type]
        found |= {(kind, item.name): item for item in items}
    wanted = [(item.kind, item.name) for item in features if item.kind in PARTS]
    if sorted(wanted) != sorted(found):
        raise records.Damaged(f"{path}: {', '.join(PARTS)} must hold the columns of features of these kinds, once each")
    ordered = tuple(found[item] for item in wanted)
    parts.check(ordered, str(path))
    return ordered


def each_column(
    names: Sequence[str], read: Callable[[Sequence[str]], pa.Table], at_once: int
) -> Iterator[tuple[str, pa.ChunkedArray]]:
    """Names and columns, `at_once` read together: opening a file of many columns is slow."""
    for at in range(0, len(names), at_once):
        table = read(names[at : at + at_once])
        yield from zip(table.column_names, table.columns, strict=True)


def _of(features: Sequence[Feature], kind: str) -> list[str]:
    return [feature.name for feature in features if feature.kind == kind]
