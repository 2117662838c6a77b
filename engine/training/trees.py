"""A finished model of boosted trees: one form for every library, which scoring reads without any of them.

The arrays of `kernels.trees.Forest` and the gain of every split are in `model.safetensors`, so equal trees give equal bytes.
What the numbers of a file could ask for (nodes, trees, words of sets) is compared with limits before memory is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated, Any, TypedDict

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from engine.config.sections.training import BOOSTERS
from engine.errors import UserError
from engine.runtime import records
from engine.runtime.records import Within
from engine.training.loss import Loss
from engine.training.losses import to_scores
from engine.training.model import FORMAT, ArchitectureRecord
from engine.training.target import PLAIN, TargetScale, Values
from engine.training.tensors import Tensors
from engine.training.threads import Team
from kernels.contributions import ContributionPlan, contribution_plan, tree_contributions
from kernels.trees import Forest, TreePlan, add_trees, tree_plan

MOST_NODES, MOST_TREES, MOST_WORDS = 2**22, 2**18, 2**24
# Type of each array in the file; of `value` the type that leaves are summed in, which is the library's own.
TYPES = {
    "root": ("I64",), "column": ("I32",), "threshold": ("F32",), "missing_left": ("BOOL",), "set_of": ("I32",),
    "set_at": ("I64",), "words": ("U32",), "value": ("F32", "F64"), "base": ("F64",), "gain": ("F64",), "cover": ("F64",),
}  # fmt: skip
LATER = ("cover",)  # absent in files of earlier versions


class TreeSettings(TypedDict):
    """The settings of boosted trees: how many there are."""

    trees: Annotated[int, Within(0, MOST_TREES)]
    nodes: Annotated[int, Within(0, MOST_NODES)]


@dataclass(frozen=True)
class Trees:
    """Boosted trees over encoded rows. `gain` float64[nodes]: how much the loss fell by a split, 0 for leaves. `cover`
    float64[nodes]: how many training rows (LightGBM), or how much of their hessians (XGBoost), came to a node; None of a model
    of earlier versions.
    """

    kind: str
    numeric_width: int
    cardinalities: list[int]
    forest: Forest
    gain: NDArray[np.float64]
    target: TargetScale = field(default=PLAIN)
    cover: NDArray[np.float64] | None = None

    @property
    def outputs(self) -> int:
        """Raw outputs of a row."""
        return len(self.forest.base)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """See engine.training.finished.Model."""
        return (self.outputs,)

    @cached_property
    def plan(self) -> TreePlan:
        """The trees ready for scoring."""
        return tree_plan(self.forest, self.numeric_width, len(self.cardinalities))

    def logits(
        self, numeric: NDArray[np.float32], codes: NDArray[np.int32], threads: int = 1, team: Team | None = None
    ) -> NDArray[np.float32]:
        """See engine.training.finished.Model."""
        threads = team.threads if team is not None else threads
        total = np.tile(self.plan.base, (len(numeric), 1))
        add_trees(numeric, codes, self.plan, total, threads)
        with np.errstate(over="ignore"):  # a number beyond float32 is infinite
            return total.astype(np.float32, copy=False)

    @cached_property
    def _explained(self) -> ContributionPlan:
        if self.cover is None:
            raise UserError(
                "reasons need to know how many training rows came to each node of the trees, which a model of an earlier version "
                "does not say: train it again"
            )
        try:
            return contribution_plan(self.plan, self.cover)
        except ValueError as error:
            raise UserError(f"the trees cannot give reasons: {error}. Use score.reasons=0") from None

    def explained(self, logits: NDArray[np.float32]) -> NDArray[np.float64]:
        """See engine.training.finished.Model."""
        return logits.astype(np.float64)

    def baseline(self) -> NDArray[np.float64]:
        """See engine.training.finished.Model. The mean over the training rows, as the trees' covers count them."""
        return self._explained.mean

    def contributions(
        self,
        numeric: NDArray[np.float32],
        codes: NDArray[np.int32],
        share: NDArray[np.float64],
        threads: int = 1,
        team: Team | None = None,
    ) -> NDArray[np.float64]:
        """See engine.training.finished.Model. Exact Shapley values of the path-dependent kind (kernels.contributions)."""
        threads = team.threads if team is not None else threads
        return tree_contributions(numeric, codes, self._explained, share, threads)

    def to_scores(self, loss: Loss, logits: NDArray[np.float32], exact: bool = False) -> Values:
        """See engine.training.finished.Model."""
        return to_scores(loss, logits, self.target, exact)

    def weights(self) -> bytes:
        """See engine.training.finished.Model."""
        return bytes(safetensors.numpy.save(self.arrays()))

    def describe(self) -> ArchitectureRecord:
        """See engine.training.finished.Model."""
        described: ArchitectureRecord = {
            "format": FORMAT,
            "kind": self.kind,
            "numeric_width": self.numeric_width,
            "cardinalities": list(self.cardinalities),
            "outputs": self.outputs,
            "settings": {"trees": len(self.forest.root) - 1, "nodes": len(self.forest.column)},
            "target_center": self.target.center,
            "target_scale": self.target.scale,
        }
        if self.target.kind == "float64":
            described["target_type"] = "float64"
        return described

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays of the file, by name."""
        found = {**_fields(self.forest), "gain": self.gain}
        if self.cover is not None:
            found["cover"] = self.cover
        return {name: np.ascontiguousarray(array) for name, array in found.items()}

    def first(self, trees: int) -> Trees:
        """The model of its first trees."""
        nodes = int(self.forest.root[trees])
        cut = {name: getattr(self.forest, name)[:nodes] for name in _OF_NODES if name not in ("gain", "cover")}
        sets = int(cut["set_of"].max(initial=-1)) + 1
        words = int(self.forest.set_at[sets])
        kept = replace(
            self.forest,
            root=self.forest.root[: trees + 1],
            set_at=self.forest.set_at[: sets + 1],
            words=self.forest.words[:words],
            **cut,
        )
        return replace(
            self, forest=kept, gain=self.gain[:nodes], cover=None if self.cover is None else self.cover[:nodes]
        )

    def importance(self) -> NDArray[np.float64]:
        """float64[columns]: share of the gain of all splits that each column of an encoded row has; 0 without splits."""
        inner = self.forest.column >= 0
        width = self.numeric_width + len(self.cardinalities)
        found = np.bincount(self.forest.column[inner], self.gain[inner], width)
        total = found.sum()
        return np.asarray(found / total if total > 0 else found)


_OF_NODES = ("column", "threshold", "missing_left", "set_of", "value", "gain", "cover")


def _fields(forest: Forest) -> dict[str, NDArray[Any]]:
    return {name: getattr(forest, name) for name in Forest.__dataclass_fields__}


def joined(first: Trees, more: Sequence[Trees]) -> Trees:
    """The trees of `first` followed by those of the others, whose base is not used."""
    forests, at = [first.forest, *(item.forest for item in more)], 0
    roots, sets, set_of = [first.forest.root[:1]], [first.forest.set_at[:1]], []
    words = number = 0
    for forest in forests:
        roots.append(forest.root[1:] + at)
        set_of.append(np.where(forest.set_of >= 0, forest.set_of + number, -1).astype(np.int32))
        sets.append(forest.set_at[1:] + words)
        at, words, number = at + len(forest.column), words + len(forest.words), number + len(forest.set_at) - 1
    whole = {
        name: np.concatenate([getattr(forest, name) for forest in forests])
        for name in ("column", "threshold", "missing_left", "value", "words")
    }
    forest = Forest(
        root=np.concatenate(roots),
        set_of=np.concatenate(set_of),
        set_at=np.concatenate(sets),
        base=first.forest.base,
        **whole,
    )
    covers = [item.cover for item in (first, *more) if item.cover is not None]
    return replace(
        first,
        forest=forest,
        gain=np.concatenate([first.gain, *(item.gain for item in more)]),
        cover=np.concatenate(covers) if len(covers) == len(forests) else None,
    )


def no_trees(
    kind: str, numeric_width: int, cardinalities: list[int], base: NDArray[np.float64], target: TargetScale, sums: str
) -> Trees:
    """A model that gives its base; leaves will be summed in the type `sums`."""
    forest = Forest(
        root=np.zeros(1, np.int64),
        column=np.zeros(0, np.int32),
        threshold=np.zeros(0, np.float32),
        missing_left=np.zeros(0, bool),
        set_of=np.zeros(0, np.int32),
        set_at=np.zeros(1, np.int64),
        words=np.zeros(0, np.uint32),
        value=np.zeros(0, sums),
        base=base,
    )
    return Trees(kind, numeric_width, cardinalities, forest, np.zeros(0), target, np.zeros(0))


# ---------------------------------------------------------------------------------------------------------- reading


def is_trees(description: ArchitectureRecord) -> bool:
    """Whether a record describes boosted trees."""
    return description["kind"] in BOOSTERS


def check_description(description: ArchitectureRecord, where: str) -> None:
    """Raise Damaged where a record of boosted trees is of another shape or beyond the limits."""
    records.conform(description, ArchitectureRecord, where)
    records.conform(description["settings"], TreeSettings, f"{where}: settings")


def read_trees(tensors: Tensors, description: ArchitectureRecord, where: str) -> Trees:
    """The trees of a weights file, which must be as its description says. Raises Damaged, before memory is taken."""
    check_description(description, where)
    _check_shapes(tensors.found, description, f"{tensors.path}")
    arrays = {name: tensor.numpy().copy() for name, tensor in tensors.load().items()}  # not the pages of the file
    return from_arrays(arrays, description, str(tensors.path))


def from_arrays(arrays: dict[str, NDArray[Any]], description: ArchitectureRecord, where: str) -> Trees:
    """The trees of arrays that are described by a record, checked. Raises Damaged."""
    shapes = {
        name: (_NAMES.get(array.dtype.name, array.dtype.name), list(array.shape)) for name, array in arrays.items()
    }
    _check_shapes(shapes, description, where)
    for name in ("threshold", "value", "base", "gain", "cover"):
        numbers = arrays.get(name, arrays["gain"])
        if (not np.isfinite(numbers).all() and name != "threshold") or np.isnan(numbers).any():
            raise records.Damaged(f"{where}: {name} must be finite numbers")
    settings = dict(arrays)
    gain, cover = settings.pop("gain"), settings.pop("cover", None)
    if cover is not None and (cover < 0).any():
        raise records.Damaged(f"{where}: cover must be numbers of at least 0")
    kind = description.get("target_type", "float32")
    target = TargetScale(description["target_center"], description["target_scale"], kind)
    cardinalities = list(description["cardinalities"])
    model = Trees(
        description["kind"], description["numeric_width"], cardinalities, Forest(**settings), gain, target, cover
    )
    try:
        assert model.plan is not None  # made here, so that a damaged file is found where it is read
    except ValueError as error:
        raise records.Damaged(f"{where}: {error}. Restore the bundle, or train again") from None
    return model


_NAMES = {
    "int64": "I64", "int32": "I32", "float32": "F32", "float64": "F64", "bool": "BOOL", "uint32": "U32",
}  # fmt: skip


def _check_shapes(found: dict[str, tuple[str, list[int]]], description: ArchitectureRecord, where: str) -> None:
    settings = description["settings"]
    nodes, trees = settings["nodes"], settings["trees"]
    wanted = {name: [nodes] for name in _OF_NODES} | {"root": [trees + 1], "base": [description["outputs"]]}
    if {*found, *LATER} != set(TYPES):
        raise records.Damaged(f"{where} must hold {', '.join(TYPES)}, found {', '.join(sorted(found)) or 'nothing'}")
    for name, (kind, shape) in found.items():
        if kind not in TYPES[name]:
            raise records.Damaged(f"{where}: {name} must be {' or '.join(TYPES[name])}, found {kind}")
        if len(shape) != 1 or (name in wanted and shape != wanted[name]) or shape[0] > MOST_WORDS:
            said = wanted.get(name, f"a list of at most {MOST_WORDS:,}")
            raise records.Damaged(f"{where}: {name} must have shape {said}, found {shape}")
    if trees % description["outputs"]:
        raise records.Damaged(
            f"{where} must hold as many trees for each of {description['outputs']} outputs, found {trees:,} trees"
        )
