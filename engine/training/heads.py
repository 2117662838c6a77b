"""The targets of a finished model: of each, its loss, its place among the raw outputs and among the scores. One target is one
head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, NotRequired, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.runtime.records import Within
from engine.training.decision import Decision
from engine.training.loss import Loss
from engine.training.losses import LossRecord, recorded_loss, to_scores
from engine.training.model import ArchitectureRecord, scales_in
from engine.training.objectives import places
from engine.training.target import TargetScale, Values
from engine.training.threads import Team


class TargetFacts(LossRecord):
    """What model.json says of a target: its loss, classes and decision."""

    classes: list[str]
    decision: NotRequired[Decision]


class OtherTarget(TargetFacts):
    """A target beside the main one in model.json: its name, its column and its weight in the loss."""

    name: str
    column: str
    weight: Annotated[float, Within(0, 1e30)]


class HeadsRecord(TargetFacts):
    """The part of model.json that `heads_of` reads: the main target, and others."""

    architecture: ArchitectureRecord
    targets: NotRequired[list[OtherTarget]]


@dataclass(frozen=True)
class Head:
    """One target of a model: `at` its raw outputs, `columns` its columns among the scores of a row."""

    name: str
    column: str
    loss: Loss
    classes: tuple[str, ...]
    scale: TargetScale
    at: slice
    columns: slice
    decision: Decision | None = None


@dataclass(frozen=True)
class Heads:
    """All targets of a model, the main one first."""

    items: tuple[Head, ...]

    @property
    def main(self) -> Head:
        """The target that is watched, judged and monitored for alarms."""
        return self.items[0]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """What the scores of a row are for where it has several: classes, levels of quantiles, targets; empty for one score."""
        return score_columns([(item.name, item.loss, item.classes) for item in self.items])

    def suffix(self, k: int) -> str:
        """What follows the names of columns such as `decision` for the target k; nothing where there is one."""
        return "" if len(self.items) == 1 else f"_{self.items[k].name}"

    def scores(self, model: Scoring, logits: NDArray[np.float32]) -> Values:
        """Scores [n] or [n, k] of all targets side by side from raw outputs of a model; float64 where one of them is."""
        if len(self.items) == 1:
            return model.to_scores(self.main.loss, logits)
        found = [to_scores(item.loss, logits[..., item.at], item.scale) for item in self.items]
        return np.concatenate([part.reshape(len(part), -1) for part in found], axis=1)

    def of(self, scores: Values, k: int = 0) -> Values:
        """The scores of one target, [n] or [n, classes or levels], in its type; the main one's without `k`."""
        if len(self.items) == 1:
            return scores
        item = self.items[k]
        mine = scores[:, item.columns].astype(item.scale.kind if item.loss.number else np.float32, copy=False)
        return np.ascontiguousarray(mine if item.loss.columns(item.classes) else mine[:, 0])


def score_columns(targets: Sequence[tuple[str, Loss, Sequence[str]]]) -> tuple[str, ...]:
    """What the scores of a row are for, of targets (name, loss, classes): of one its classes or levels, of several with their
    names before them.
    """
    each = [loss.columns(classes) for _, loss, classes in targets]
    if len(targets) == 1:
        return each[0]
    pairs = zip(targets, each, strict=True)
    return tuple(f"{name}_{text}" if text else name for (name, _, _), texts in pairs for text in texts or ("",))


def facts_of(model: HeadsRecord) -> tuple[TargetFacts, ...]:
    """The facts of each target, the main one first."""
    return (model, *model.get("targets", []))


def heads_of(model: HeadsRecord, column: str) -> Heads:
    """The heads of a model.json whose main target is in a column."""
    records = facts_of(model)
    losses = [recorded_loss(record) for record in records]
    pairs = list(zip(losses, records, strict=True))
    raw = places([loss.outputs(len(record["classes"])) for loss, record in pairs])
    columns = places([max(len(loss.columns(record["classes"])), 1) for loss, record in pairs])
    others: Sequence[Mapping[str, Any]] = model.get("targets", [])
    names = [(column, column), *((item["name"], item["column"]) for item in others)]
    scales = scales_in(model["architecture"])
    return Heads(
        tuple(
            Head(*names[k], loss, tuple(record["classes"]), scales[k], raw[k], columns[k], record.get("decision"))
            for k, (loss, record) in enumerate(pairs)
        )
    )


class Scoring(Protocol):
    """A model of one target, or the part of a model that is one target's."""

    @property
    def target(self) -> TargetScale:
        """The scale that turns raw outputs into values of the target."""

    def logits(
        self, numeric: NDArray[np.float32], codes: NDArray[np.int32], threads: int = 1, team: Team | None = None
    ) -> NDArray[np.float32]:
        """float32[n, outputs] from numeric float32[n, F] and codes int32[n, K]."""

    def to_scores(self, loss: Loss, logits: NDArray[np.float32], exact: bool = False) -> Values:
        """Scores [n], [n, classes] or [n, levels] of raw outputs, in the unit and type of the target (`losses.to_scores`)."""


@dataclass(frozen=True)
class OfTarget:
    """The part of a model that is one target's."""

    model: Scoring
    target: TargetScale
    at: slice

    def logits(
        self, numeric: NDArray[np.float32], codes: NDArray[np.int32], threads: int = 1, team: Team | None = None
    ) -> NDArray[np.float32]:
        """See Scoring."""
        return np.ascontiguousarray(self.model.logits(numeric, codes, threads, team)[..., self.at])

    def to_scores(self, loss: Loss, logits: NDArray[np.float32], exact: bool = False) -> Values:
        """See Scoring."""
        return to_scores(loss, logits, self.target, exact)


def alone(model: Scoring, heads: Heads) -> tuple[Scoring, ...]:
    """The part of each target: of the only one the model."""
    if len(heads.items) == 1:
        return (model,)
    return tuple(OfTarget(model, item.scale, item.at) for item in heads.items)
