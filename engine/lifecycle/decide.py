"""Takes a retraining decision: whether to retrain, and whether to promote the challenger. For `retrain` and `backtest`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict, cast

from engine.config import schema, units
from engine.config.nested import Tree
from engine.config.sections.lifecycle import RetrainConfig
from engine.config.tree import Config
from engine.errors import UserError
from engine.lifecycle import challenger_gate, parts
from engine.lifecycle.challenger import (
    History,
    Periods,
    Workshop,
    challenger_config,
    horizon_of,
    labelled_rows,
    periods_of,
    read_judged,
    score_both,
    write_judged,
)
from engine.lifecycle.looks import Looks, LooksRecord
from engine.lifecycle.retrain_rules import Champion, Facts, Later, Observation, Trigger, ripening, trigger
from engine.lifecycle.trainings import Training
from engine.lifecycle.version_facts import version_facts
from engine.runtime import records, storage
from engine.runtime.registry import DecisionPart, Moved, Registry, State, Version, seal_of
from engine.runtime.run import as_written
from engine.training.losses import LossRecord, loss_of, loss_record, recorded_loss
from engine.training.ripening import days

# 2: slices whose metric cannot be computed are checked; 3: reasons give a time, and the number of waiting rows; 5: intervals come
# from days, and looks are paid for
FORMAT = 5
DRAWN = ("low", "high", "reason")  # figures of a comparison that come from the bootstrap
QUIET, HELD, KEPT, PROMOTED = "quiet", "held", "kept", "promoted"
ATTEMPTS = 5
JUDGED = "judged.parquet"


@dataclass(frozen=True)
class Setting:
    """The registry, policy and folder of a decision."""

    workshop: Workshop
    registry: Registry
    policy: RetrainConfig
    directory: Path  # of the decision: judged rows and decision.json
    identity: str  # names the decision in the registry's history
    train: Callable[[Config], Training]

    @property
    def history(self) -> History:
        """The data."""
        return self.workshop.history

    @property
    def config(self) -> Config:
        """The config."""
        return self.workshop.history.config

    @property
    def metric(self) -> str:
        """Name of the watched and judged metric."""
        return challenger_gate.judged_metric(loss_of(self.config.train), self.policy.gate)


# -------------------------------------------------------------------------------------------------------- facts


def champion_of(registry: Registry, state: State, metric: str) -> tuple[Version, Champion]:
    """The champion as the rules need it; `metric` is from its judgement, or else from its training.

    Raises UserError when there is none.
    """
    version = registry.find(state.champion or "champion")
    promotions = [move for move in state.moves if move["action"] == "promote" and move["to"] == version.digest]
    judged = (promotions[-1]["decision"] or {}) if promotions else {}
    measured = version.facts["metrics"]
    figures = [judged.get("metric") if judged.get("metric_name") == metric else None]
    figures += [measured.get(f"{part}/{metric}") for part in ("test", "valid")]
    value = next((figure for figure in figures if figure is not None), None)
    return version, Champion(version.digest, int(version.facts["seen_until"]), value)


def starts_of(state: State, but: str) -> tuple[int, ...]:
    """Start times of retrains, from the registry's history, without that of the decision `but`."""
    parts = [move["decision"] for move in state.moves if move["decision"]]
    return tuple(part["at"] for part in parts if part.get("kind") == "begin" and part.get("id") != but and "at" in part)


def looks_of(state: State, champion: str, but: str) -> Looks:
    """What the earlier judgements against a champion have shown, from the registry's history, without the decision `but`."""
    for move in reversed(state.moves):
        ended = move["decision"] or {}
        if move["action"] == "promote" and move["to"] == champion:
            break
        record = cast(Judgement, ended.get("record") or {})
        found = record.get("evidence") or {}
        if record.get("champion") == champion and ended.get("id") != but and "looks" in found:
            records.conform(found["looks"], LooksRecord, "the registry's history: looks")
            return Looks.of(found["looks"])
    return Looks()


def gather(setting: Setting, observations: tuple[Observation, ...], now: int, state: State) -> Facts:
    """The facts of a decision: everything in them was known at `now`."""
    version, champion = champion_of(setting.registry, state, setting.metric)
    seen = tuple(item for item in observations if item.stop <= now)
    starts = starts_of(setting.registry.state(), setting.identity)
    if not setting.config.data.timed:
        return Facts(now, champion, seen, starts, parts.new_rows(setting.history, version, now))
    horizon = horizon_of(setting.policy, setting.history.event, setting.history.known, now)
    new = labelled_rows(setting.history, champion.seen_until, max(now - horizon, champion.seen_until), now)
    later = later_rows(setting.history, champion.seen_until, now, horizon)
    return Facts(now, champion, seen, starts, len(new), later)


def later_rows(history: History, since: int, now: int, horizon: int) -> Later:
    """Rows of [since, now), and the number of them with a label by now."""
    low, high = history.dataset.row_range(since, max(now, since))
    labelled = len(labelled_rows(history, since, max(now, since), now))
    return Later(horizon, high - low, labelled, int(history.event[low]) if high > low else None)


# ----------------------------------------------------------------------------------------------------- decision


def decide(setting: Setting, observations: tuple[Observation, ...], now: int) -> DecisionRecord:
    """Take and carry out a decision; returns the record for decision.json.

    Raises UserError when there is no champion, and when an artefact was replaced after it was judged.
    """
    claim = _claim(setting, observations, now)
    facts, answer, periods = claim.facts, claim.answer, claim.periods
    decision: BegunDecision = {
        "format": FORMAT,
        "id": setting.identity,
        "name": setting.registry.name,
        "now": units.format_instant(facts.now, setting.config.data.time_zone),
        "policy": schema.plain(setting.policy),
        "facts": dataclasses.asdict(facts),
        "trigger": cast(TriggerRecord, dataclasses.asdict(answer)),
        "label_horizon_us": facts.now - periods.stop if setting.config.data.timed else 0,
        "periods": dataclasses.asdict(periods),
        "champion": facts.champion.digest,
        "challenger": None,
        **loss_record(setting.config.train),
        "evidence": None,
        "judged": None,
    }
    if not answer.start:
        return {**decision, "verdict": HELD if answer.fired else QUIET, "reasons": [answer.reason]}
    if claim.lacking:
        return {**decision, "verdict": HELD, "reasons": [answer.reason, f"but no retrain: {claim.lacking}"]}
    start = setting.registry.find(facts.champion.digest).model if setting.policy.start == "champion" else None
    run = setting.train(challenger_config(setting.config, periods, start))
    version = setting.registry.register(run.bundle, seal_of(run.bundle), **version_facts(run.directory))
    decision |= {
        "challenger": version.digest,
        "challenger_run": str(run.directory),
        "train_rows": version.facts["train_rows"],
    }
    return _contest(setting, decision, version, periods)


@dataclass(frozen=True)
class _Claim:
    """The first part of a decision's record; `lacking` is the reason why the periods cannot be used."""

    facts: Facts
    answer: Trigger
    periods: Periods
    lacking: str | None


def _claim(setting: Setting, observations: tuple[Observation, ...], now: int) -> _Claim:
    """The trigger's answer; a start is written to the history before training, so that a second process that answers the
    same alarm finds it and keeps the cool-down.
    """
    saved = setting.directory / "facts.json"
    for _ in range(ATTEMPTS):
        state = setting.registry.state()
        if any((move["decision"] or {}).get("id") == setting.identity for move in state.moves):
            return _answer(
                setting, Facts.from_plain(records.read(saved, dict), str(saved))
            )  # resumed after a kill, on the same facts
        claim = _answer(setting, gather(setting, observations, now, state))
        storage.write_json(saved, dataclasses.asdict(claim.facts))
        if not claim.answer.start or claim.lacking:
            return claim
        begin: DecisionPart = {"kind": "begin", "id": setting.identity, "at": now}
        try:
            setting.registry.move(
                "note", None, expected=state.champion, why=claim.answer.reason, decision=begin, after=len(state.moves)
            )
            return claim
        except Moved:
            continue
    raise UserError(f"the registry of {setting.registry.name!r} changes too quickly to decide; run the command again")


def _answer(setting: Setting, facts: Facts) -> _Claim:
    answer = trigger(facts, setting.policy)
    if setting.config.data.timed:
        horizon = horizon_of(setting.policy, setting.history.event, setting.history.known, facts.now)
        first = int(setting.history.event[0])
        periods = periods_of(setting.policy, first, facts.now, horizon, facts.champion.seen_until)
    else:
        periods = parts.parts_of(setting.config, facts.now)
    return _Claim(facts, answer, periods, _lacking(setting, periods) if answer.start else None)


def _lacking(setting: Setting, periods: Periods) -> str | None:
    """The reason why these periods cannot be used, or None."""
    policy, shown = setting.policy, units.format_instant
    if not setting.config.data.timed:
        return parts.lacking(setting.history, policy.gate.min_rows, periods)
    aged = f"rows count when they are {days(periods.now - periods.stop)} old, {ripening(policy)}"
    if periods.empty:
        return (
            f"no time that the champion has not seen is left for training and judgement: {aged}, so until "
            f"{shown(periods.stop)}; judgement begins at {shown(periods.judge)}, training is from {shown(periods.start)} to "
            f"{shown(periods.valid)} (retrain.judge_length={policy.judge_length}, valid_length={policy.valid_length})"
        )
    judged = len(labelled_rows(setting.history, periods.judge, periods.stop, periods.now))
    if judged < policy.gate.min_rows:
        return (
            f"only {judged:,} mature rows are new to both models, retrain.gate.min_rows={policy.gate.min_rows:,}: those from "
            f"{shown(periods.judge)} to {shown(periods.stop)}, for {aged}"
        )
    if not len(labelled_rows(setting.history, periods.start, periods.valid, periods.now)):
        return (
            f"no row with a known label is in the training period from {shown(periods.start)} to {shown(periods.valid)}"
        )
    return None


def _contest(setting: Setting, decision: BegunDecision, version: Version, periods: Periods) -> DecisionRecord:
    """Judge against the present champion and promote by compare-and-swap; judge again if another was promoted meanwhile."""
    for _ in range(ATTEMPTS):
        state = setting.registry.state()
        done = _finished(state, decision)
        if done is not None:
            return done
        champion, facts = champion_of(setting.registry, state, setting.metric)
        looks = looks_of(state, champion.digest, setting.identity)
        if setting.config.data.timed:
            rest = dataclasses.replace(periods, judge=max(periods.judge, facts.seen_until))
        else:  # each look judges the same rows, so that each has a stake of its own
            rest, looks = periods, Looks(looks.number)
        found = judge_pair(setting, champion, version, rest, looks)
        judged: DecisionRecord = {**decision, "champion": champion.digest, **found}
        if state.challenger != version.digest:
            setting.registry.move(
                "challenge", version.digest, expected=state.champion, why=decision["trigger"]["reason"]
            )
        storage.write_json(setting.directory / "evidence.json", judged)
        try:
            return _carry_out(setting, judged, champion, version)
        except Moved:
            continue
    raise UserError(
        f"the champion of {setting.registry.name!r} changed {ATTEMPTS} times while this challenger was judged"
    )


def _finished(state: State, decision: BegunDecision) -> DecisionRecord | None:
    """The outcome of a decision that was killed after its last move, which the history holds; else None."""
    for move in reversed(state.moves):
        ended = move["decision"] or {}
        if ended.get("id") == decision["id"] and ended.get("kind") == "end":
            return {**decision, **cast(Judgement, ended["record"]), "move": move["number"]}
    return None


def judge_pair(setting: Setting, champion: Version, challenger: Version, periods: Periods, looks: Looks) -> Judgement:
    """Evidence, verdict and the file of judged rows, for the registry's copies of both models."""
    workshop, gate = setting.workshop, setting.policy.gate
    old, new = (workshop.predictor(setting.registry.verify(version)) for version in (champion, challenger))
    if champion.digest == challenger.digest:
        return {
            "verdict": KEPT,
            "reasons": ["the challenger is the champion: training gave the same model"],
            "evidence": None,
        }
    if periods.empty:
        return {"verdict": KEPT, "reasons": ["no rows are left that neither model saw"], "evidence": None}
    judged = score_both(workshop, old, new, periods)
    path = setting.directory / JUDGED
    content = write_judged(path, judged)
    evidence = challenger_gate.evidence(judged, loss_of(setting.config.train), gate, looks=looks)
    answer, reasons = challenger_gate.verdict(evidence, gate)
    return {
        "verdict": PROMOTED if answer == challenger_gate.PROMOTE else KEPT,
        "reasons": reasons,
        "evidence": evidence,
        "looks": looks.plain(),
        "judged": {"file": JUDGED, "digest": content, "from": periods.judge, "to": periods.stop, "rows": judged.rows},
        "seals": {"champion": champion.seal, "challenger": challenger.seal},
    }


def _carry_out(setting: Setting, decision: DecisionRecord, champion: Version, challenger: Version) -> DecisionRecord:
    """Write the last move of the decision: a promotion, or that the champion stays. The history records both scores."""
    metric = decision["evidence"]["metric"] if decision["evidence"] else None
    scores = {
        "champion": metric["champion"] if metric else None,
        "challenger": metric["challenger"] if metric else None,
    }
    record: dict[str, object] = {
        "champion": decision["champion"],
        "challenger": decision["challenger"],
        "verdict": decision["verdict"],
        "reasons": decision["reasons"],
        "evidence": decision["evidence"],
        "judged": decision.get("judged"),
    }
    promoted = decision["verdict"] == PROMOTED
    ending: DecisionPart = {
        "kind": "end",
        "id": setting.identity,
        "path": str(setting.directory / "decision.json"),
        "metric_name": metric["name"] if metric else None,
        "metric": scores["challenger" if promoted else "champion"],
        "scores": scores,
        "record": record,
    }
    move = setting.registry.move(
        "promote" if promoted else "note",
        challenger.digest if promoted else None,
        expected=champion.digest,
        why="; ".join(decision["reasons"]),
        decision=ending,
    )
    return {**decision, "move": move["number"]}


# ------------------------------------------------------------------------------------------------------- replay


JudgedFile = TypedDict(
    "JudgedFile",
    {  # the judged rows in decision.json; instants are [from, to)
        "file": str,
        "digest": records.Digest,
        "from": NotRequired[records.Instant],
        "to": NotRequired[records.Instant],
        "rows": records.Count,
    },
)


class TriggerRecord(TypedDict):
    """A trigger's answer."""

    start: bool
    fired: list[str]
    reason: str


class BegunDecision(LossRecord):
    """What is known before the models are judged; `policy` is that of the config, `facts` are those of the rules."""

    format: Annotated[int, records.Format(FORMAT)]
    id: NotRequired[str]
    name: NotRequired[str]
    now: NotRequired[str]
    policy: Tree
    facts: Tree
    trigger: TriggerRecord
    label_horizon_us: NotRequired[int]
    periods: NotRequired[dict[str, int]]
    champion: str
    challenger: str | None
    challenger_run: NotRequired[str]
    train_rows: NotRequired[float | None]
    evidence: dict[str, Any] | None
    looks: NotRequired[LooksRecord]
    judged: NotRequired[JudgedFile | None]


class Judgement(TypedDict):
    """What judging adds; `seals` are those of the judged models."""

    verdict: str
    reasons: list[str]
    evidence: dict[str, Any] | None
    looks: NotRequired[LooksRecord]
    judged: NotRequired[JudgedFile | None]
    seals: NotRequired[dict[str, str]]


class DecisionRecord(BegunDecision):
    """decision.json; `move` is its last one in the registry, `monitor` the record that it was taken on."""

    verdict: str
    reasons: list[str]
    seals: NotRequired[dict[str, str]]
    move: NotRequired[int]
    monitor: NotRequired[str]


def replay(path: Path) -> tuple[DecisionRecord, list[str]]:
    """(the saved decision, its differences from a repeat on its own evidence; empty = the same verdict).

    Trigger from the saved facts, figures from the saved rows, verdict from the figures. Raises UserError.
    """
    saved = records.read(as_written(path.parent, path.name, refuse=True), DecisionRecord)
    policy = schema.build(RetrainConfig, saved["policy"], "policy")
    differences: list[str] = []

    def same(name: str, then: Any, now: Any) -> None:
        if then != now:
            differences.append(f"{name} was {then!r}, is now {now!r}")

    answer = trigger(Facts.from_plain(saved["facts"], f"{path}: facts"), policy)
    now = {**dataclasses.asdict(answer), "fired": list(answer.fired)}
    if saved["format"] < 3:  # its reasons were shorter
        now["reason"] = saved["trigger"]["reason"]
    same("trigger", saved["trigger"], now)
    if saved["evidence"] is not None:
        if (rows := saved.get("judged")) is None:
            raise records.Damaged(f"{path} must name the rows of its evidence, found none")
        judged = read_judged(storage.inside(path.parent, rows["file"]), rows["digest"])
        stand_ins = saved["format"] > 1
        evidence = challenger_gate.evidence(
            judged,
            recorded_loss(saved),
            policy.gate,
            stand_ins=stand_ins,
            looks=Looks.of(saved.get("looks")),
        )
        if saved["format"] < FORMAT:  # its intervals came from rows: they are kept, and only the figures are compared
            same("evidence", *_undrawn(saved["evidence"], evidence))
            evidence = saved["evidence"]
        same("evidence", saved["evidence"], evidence)
        verdict, reasons = challenger_gate.verdict(evidence, policy.gate)
        same("verdict", saved["verdict"], PROMOTED if verdict == challenger_gate.PROMOTE else KEPT)
        same("reasons", saved["reasons"], reasons)
    else:  # no challenger was trained, or no rows could be judged
        untrained = HELD if answer.fired else QUIET
        same("verdict", saved["verdict"], untrained if saved["challenger"] is None else KEPT)
    return saved, differences


def _undrawn(saved: Any, now: Any) -> tuple[Any, Any]:
    """Saved and present evidence without the figures of the bootstrap, and without what was not saved then."""
    if isinstance(saved, list) and isinstance(now, list) and len(saved) == len(now):
        pairs = [_undrawn(*pair) for pair in zip(saved, now, strict=True)]
        return [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    if isinstance(saved, dict) and isinstance(now, dict):
        found = {name: _undrawn(saved[name], now.get(name)) for name in saved if name not in DRAWN}
        return {name: pair[0] for name, pair in found.items()}, {name: pair[1] for name, pair in found.items()}
    return saved, now
