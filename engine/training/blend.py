"""A model with members: the scores of a row are the weighted mean of its members' scores.

The mean is of scores, not of raw outputs. It then has a meaning for every loss (a log link and a target's scale are a
member's own), as the mean of a TabM has, and its loss is at most the mean of its members' losses where that is convex in
a score, as the log loss is. The mean of calibrated probabilities is too close to one half (Ranjan & Gneiting, JRSS B, 2010):
`evaluate.calibration=temperature` finds the one temperature of all members' outputs that corrects that.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NotRequired, TypedDict

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray

from engine.config.sections.training import BLEND, MOST_MEMBERS
from engine.errors import UserError
from engine.runtime import records
from engine.training.finished import Model, PartRecord
from engine.training.loss import Loss
from engine.training.losses import Temperature, cooled
from engine.training.model import FORMAT, ArchitectureRecord
from engine.training.target import TargetScale, Values
from engine.training.threads import Team

SHARES = "shares"  # the tensor with the weights of the members, float64[members]
ROUNDING = 1e-9  # of the sum of weights


class MemberRecord(PartRecord):
    """A member without its weights; `temperature`: that of a finished model that became a member."""

    name: str
    temperature: NotRequired[Temperature]


class BlendSettings(TypedDict):
    """The settings of a blend: its members, in the order of their weights."""

    members: list[MemberRecord]


@dataclass(frozen=True)
class Member:
    """A model in a blend, and what model.json says of it."""

    model: Model
    record: MemberRecord

    @property
    def name(self) -> str:
        """Its name in metrics and the report."""
        return self.record["name"]

    def to_scores(self, loss: Loss, logits: NDArray[np.float32], exact: bool = False) -> Values:
        """Its scores by the loss of the blend."""
        return self.model.to_scores(cooled(loss, self.record.get("temperature")), logits, exact)


@dataclass(frozen=True)
class Blend:
    """Members of the same encoded rows, outputs and loss, with weights that are not negative and sum to 1."""

    members: tuple[Member, ...]
    shares: tuple[float, ...]

    @property
    def target(self) -> TargetScale:
        """The scale of the first member, in the wider type of all; members have their own."""
        return max((member.model.target for member in self.members), key=lambda target: target.kind)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """(width,) of all members' raw outputs beside each other."""
        return (self._edges[-1],)

    @property
    def _edges(self) -> list[int]:
        return [0, *itertools.accumulate(int(np.prod(member.model.output_shape)) for member in self.members)]

    def logits(
        self, numeric: NDArray[np.float32], codes: NDArray[np.int32], threads: int = 1, team: Team | None = None
    ) -> NDArray[np.float32]:
        """float32[n, width]: the raw outputs of the members, one after the other."""
        found = [member.model.logits(numeric, codes, threads, team) for member in self.members]
        return np.concatenate([part.reshape(len(numeric), -1) for part in found], axis=1)

    def member_scores(self, loss: Loss, logits: NDArray[np.float32], exact: bool = False) -> list[Values]:
        """The scores of each member, from raw outputs of all."""
        parts = zip(self.members, itertools.pairwise(self._edges), strict=True)
        return [
            member.to_scores(loss, logits[:, low:high].reshape(len(logits), *member.model.output_shape), exact)
            for member, (low, high) in parts
        ]

    def to_scores(self, loss: Loss, logits: NDArray[np.float32], exact: bool = False) -> Values:
        """See engine.training.finished.Model."""
        found = self.member_scores(loss, logits, exact)
        return mean_of(found, self.shares).astype(np.result_type(*found), copy=False)

    @property
    def _weighted(self) -> list[tuple[float, Model]]:
        """Each member's weight in a margin, which is in units of a member's temperature, and the member.

        Raises UserError where the members' targets have other scales, so that their margins cannot be added.
        """
        if any(member.model.target.scale != self.members[0].model.target.scale for member in self.members):
            raise UserError(
                "score.reasons must be 0 for a model whose members have targets of other scales: score a member by itself"
            )
        pairs = zip(self.members, self.shares, strict=True)
        return [(share / member.record.get("temperature", 1.0), member.model) for member, share in pairs]

    def explained(self, logits: NDArray[np.float32]) -> NDArray[np.float64]:
        """See engine.training.finished.Model."""
        parts = zip(self._weighted, itertools.pairwise(self._edges), strict=True)
        found = [
            weight * model.explained(logits[:, low:high].reshape(len(logits), *model.output_shape))
            for (weight, model), (low, high) in parts
        ]
        return np.asarray(sum(found[1:], found[0]))

    def baseline(self) -> NDArray[np.float64]:
        """See engine.training.finished.Model."""
        found = [weight * model.baseline() for weight, model in self._weighted]
        return np.asarray(sum(found[1:], found[0]))

    def contributions(
        self,
        numeric: NDArray[np.float32],
        codes: NDArray[np.int32],
        share: NDArray[np.float64],
        threads: int = 1,
        team: Team | None = None,
    ) -> NDArray[np.float64]:
        """See engine.training.finished.Model. The weighted sum of the members' own, each from its own baseline."""
        total = np.zeros((len(numeric), numeric.shape[1] + codes.shape[1]))
        for weight, model in self._weighted:
            total += weight * model.contributions(numeric, codes, share, threads, team)
        return total

    def weights(self) -> bytes:
        """See engine.training.finished.Model: the tensors of member k are named `k/...`."""
        tensors = {SHARES: torch.tensor(self.shares, dtype=torch.float64)}
        for place, member in enumerate(self.members):
            own = safetensors.torch.load(member.model.weights())
            tensors |= {f"{place}/{name}": tensor for name, tensor in own.items()}
        return bytes(safetensors.torch.save(tensors))

    def describe(self) -> ArchitectureRecord:
        """See engine.training.finished.Model."""
        first, target = self.members[0].model.describe(), self.target
        described: ArchitectureRecord = {
            "format": FORMAT,
            "kind": BLEND,
            "numeric_width": first["numeric_width"],
            "cardinalities": first["cardinalities"],
            "outputs": first["outputs"],
            "settings": {"members": [member.record for member in self.members]},
            "target_center": target.center,
            "target_scale": target.scale,
        }
        if target.kind == "float64":
            described["target_type"] = "float64"
        return described


def mean_of(scores: Sequence[Values], shares: Iterable[float]) -> NDArray[np.float64]:
    """The weighted mean of scores [n] or [n, k]; a row's bits do not depend on the others."""
    total = np.zeros(scores[0].shape)
    for part, share in zip(scores, shares, strict=True):
        total += share * part.astype(np.float64)
    return total


def check_blend(description: ArchitectureRecord, where: str) -> list[MemberRecord]:
    """The members of a record. Raises Damaged where it is of another shape, or a member does not fit it."""
    records.conform(description, ArchitectureRecord, where)
    records.conform(description["settings"], BlendSettings, f"{where}: settings")
    members: list[MemberRecord] = description["settings"]["members"]
    if not 1 <= len(members) <= MOST_MEMBERS:
        raise records.Damaged(f"{where}: settings: members must be 1 to {MOST_MEMBERS}, found {len(members):,}")
    for place, member in enumerate(members):
        for name in ("numeric_width", "cardinalities", "outputs"):
            if member["architecture"][name] != description[name]:  # type: ignore[literal-required]
                raise records.Damaged(f"{where}: settings: members[{place}]: {name} must be that of the blend")
        if member["architecture"]["kind"] == BLEND:
            raise records.Damaged(f"{where}: settings: members[{place}] must not be a blend itself")
    return members


def check_shares(shares: Sequence[float], members: int, where: str) -> tuple[float, ...]:
    """The weights of a file. Raises Damaged where they are no weights of so many members."""
    found = np.asarray(shares, np.float64)
    if found.shape != (members,) or not (found >= 0).all() or abs(float(found.sum()) - 1.0) > ROUNDING:
        raise records.Damaged(f"{where}: {SHARES} must be {members} numbers of at least 0 with sum 1")
    return tuple(found.tolist())


def equal_shares(count: int) -> tuple[float, ...]:
    """The same weight for each."""
    return (1.0 / count,) * count
