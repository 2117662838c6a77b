"""The rounds of boosting: gradients, a tree, margins, the validation metric, checkpoints.

Every worker has all rows, their margins and gradients; only what a library does with them is divided. So all workers know
the same, and nothing but trees' histograms travels.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engine.config.tree import Config
from engine.errors import UserError, nearest
from engine.features.encode import Encoder
from engine.runtime import digest, records, storage
from engine.runtime.run import Run
from engine.training.boosting.gradients import (
    Labels,
    check_loss,
    drawn,
    gradients,
    row_losses,
    start,
    weighted_quantile,
)
from engine.training.boosting.grower import Grower, Rows, library_errors
from engine.training.boosting.memory import check_memory
from engine.training.boosting.on_lightgbm import LightgbmGrower
from engine.training.boosting.on_xgboost import XgboostGrower
from engine.training.bundle import load_model
from engine.training.checkpoint import check_identity, newest_checkpoint, save_checkpoint
from engine.training.evaluate import counted, watched_metric
from engine.training.examples import Examples
from engine.training.exchange import Alone, Exchange
from engine.training.interrupt import StopFlag
from engine.training.loop import Epoch, FitResult
from engine.training.losses import check_targets, class_weights, loss_of, target_scale, to_scores
from engine.training.metrics import decimals
from engine.training.threads import compute_threads
from engine.training.trees import Trees, from_arrays, joined, no_trees
from engine.training.warm_start import start_bundle
from kernels.trees import add_trees, tree_leaves

CHECKPOINT_ROUNDS = 100  # where train.checkpoint_every is 0


@dataclass
class State:
    """The state of a run that a checkpoint stores in addition to trees, as JSON."""

    round: int = 0
    best_metric: float | None = None
    best_round: int = -1
    finished: bool = False
    history: list[Epoch] = field(default_factory=list)
    links: dict[str, str] = field(default_factory=dict)


def fit_trees(  # noqa: PLR0913
    train: Examples,
    valid: Examples | None,
    config: Config,
    run: Run,
    *,
    cardinalities: Sequence[int],
    outputs: Sequence[int],
    dataset_digest: str,
    precision: str = "fp32",  # noqa: ARG001 - of networks; what fits a model is called the same way
    monotone: Sequence[int] = (),
    exchange: Exchange | None = None,
    local_workers: int = 1,
) -> FitResult:
    """Grow trees on `train`, watch `valid`, and return those of the best round (the last without `valid`).

    Continues from the newest whole checkpoint in the run's directory, if there is one. `monotone`: -1, 0 or 1 for each number.
    Several workers call it together, each with all rows and its `exchange`, under `on_xgboost.collective`. Raises UserError for
    targets that the loss cannot take, for a checkpoint of another plan, for more memory than there is, and for what the library
    refuses.
    """
    loss = loss_of(config.train)
    check_loss(loss, config.model.kind)
    if config.train.sampling == "balanced":
        raise UserError(
            f"train.sampling must be each for model={config.model.kind}, found balanced, which draws the rows of a network's "
            "steps: train.class_weight=balanced weights them instead"
        )
    (outputs_of_row,) = outputs
    check_targets(train.target, train.rows, loss, outputs_of_row)
    if train.numeric.shape[1] == 0 and not cardinalities:
        raise UserError("a model must have at least one feature, found none: set features")
    exchange = exchange or Alone()
    threads = compute_threads(config) if local_workers == 1 else max(1, compute_threads(config) // local_workers)
    rows = Rows(train.numeric, train.codes, list(cardinalities), outputs_of_row, tuple(monotone))
    settings, seed = config.model.trees, config.train.seed
    check_memory(config.model, train, rows, exchange.world, local_workers)
    grower: Grower
    began = time.perf_counter()
    with library_errors(config.model.kind, settings):
        if config.model.kind == "lightgbm":
            grower = LightgbmGrower(rows, settings, seed, threads)
        else:
            grower = XgboostGrower(rows, settings, seed, threads, exchange.rank, exchange.world)
    binned = time.perf_counter() - began
    with StopFlag(run.stops) as stop:
        rounds = Rounds(train, valid, config, run, grower, rows, exchange, threads, stop, dataset_digest)
        rounds.spent["bins"] = binned
        return rounds.fit()


class Rounds:
    """Grows trees round by round: margins, metrics, checkpoints."""

    def __init__(  # noqa: PLR0913
        self,
        train: Examples,
        valid: Examples | None,
        config: Config,
        run: Run,
        grower: Grower,
        rows: Rows,
        exchange: Exchange,
        threads: int,
        stop: StopFlag,
        dataset_digest: str,
    ) -> None:
        self.train, self.valid = train, valid if valid is not None and len(valid) else None
        self.config, self.run, self.grower, self.rows = config, run, grower, rows
        self.exchange, self.threads, self.stop, self.dataset_digest = exchange, threads, stop, dataset_digest
        self.settings, self.loss = config.model.trees, loss_of(config.train)
        self.metric = self.loss.metrics[watched_metric(self.loss, config.train.metric)]
        self.trees = self._first()
        self.target = self.trees.target
        self.labels = self._labels()
        if not len(self.trees.forest.root) > 1:
            base = start(self.labels)
            self.trees = replace(self.trees, forest=replace(self.trees.forest, base=base))
        self.before = len(self.trees.forest.root) - 1  # trees of train.start_from
        self.grown: list[Trees] = []
        self.state, self.saved = State(), -1
        self.resumed_from: int | None = None
        self.spent = {"grow": 0.0, "gradients": 0.0, "margins": 0.0, "evaluate": 0.0, "checkpoint": 0.0}
        self.began = time.perf_counter()
        self.checkpoints = run.directory / "checkpoints"

    def _first(self) -> Trees:
        """The trees that training continues from, or none."""
        target = target_scale(self.train.target, self.loss, self.train.weight)
        kind, rows = self.config.model.kind, self.rows
        width, cardinalities = rows.numeric.shape[1], list(rows.cardinalities)
        bundle = start_bundle(self.config)
        if bundle is None:
            return no_trees(kind, width, cardinalities, np.zeros(rows.outputs), target, self.grower.sums)
        found = load_model(bundle)
        if not isinstance(found, Trees) or found.kind != kind or found.outputs != rows.outputs:
            described = found.describe()
            raise UserError(
                f"train.start_from needs a model of the same kind: model={kind} with {rows.outputs} outputs here, "
                f"{described['kind']} with {described['outputs']} there; use its model section, or start from scratch"
            )
        return replace(found, target=replace(found.target, kind=max(target.kind, found.target.kind)))

    def _labels(self) -> Labels:
        train, settings = self.train, self.config.train
        weight = np.ones(len(train)) if train.weight is None else train.weight.astype(np.float64)
        balance = class_weights(train.target, settings, self.rows.outputs, train.weight)
        if balance is not None:
            weight = weight * balance.astype(np.float64)[train.target.astype(np.int64)]
        y = train.target
        if self.loss.number:
            y = self.target.standardised(y)
        return Labels(y.astype(np.float64), weight, self.loss, settings, self.rows.outputs)

    # ------------------------------------------------------------------------------------------------- rounds

    def fit(self) -> FitResult:
        """Resume, and grow what is left."""
        self._resume()
        self.margin = self._margins(self.train)
        self.valid_margin = self._margins(self.valid) if self.valid is not None else None
        self.began = time.perf_counter()
        every = self.config.train.checkpoint_every or CHECKPOINT_ROUNDS
        state, total = self.state, self.settings.rounds
        with self.run.progress("train", total, "rounds", state.round) as progress:
            while not state.finished:
                grown = self._grow()
                if grown is None:
                    self.run.log(f"round {state.round + 1}: no split is worth it, training ends")
                    state.finished = True
                else:
                    self._add(grown)
                    progress.advance(1, self._judge())
                stopped = bool(self.exchange.first([float(self.stop.requested())])[0])  # of rank 0, so that all agree
                if state.finished or state.round % every == 0 or stopped:
                    self._save()
                if stopped and not state.finished:
                    self.stop.clear()
                    raise KeyboardInterrupt(f"stopped at round {state.round} of {total}; resume to continue")
        return self._result()

    def _margins(self, data: Examples) -> NDArray[Any]:
        """[n, outputs] of the trees so far, in the type that leaves are summed in."""
        plan = self._whole().plan
        total = np.tile(plan.base, (len(data), 1))
        add_trees(data.numeric, data.codes, plan, total, self.threads)
        return total

    def _whole(self) -> Trees:
        return joined(self.trees, self.grown)

    def _grow(self) -> Trees | None:
        began = time.perf_counter()
        number, settings = self.before // self.rows.outputs + self.state.round, self.config.train
        used = drawn(self.train.rows, self.settings.row_fraction, settings.seed, number)
        g, h = gradients(self.margin, self.labels, used)
        self.spent["gradients"] += time.perf_counter() - began
        began = time.perf_counter()
        with library_errors(self.config.model.kind, self.settings):
            grown = self.grower.grow(number, g, h)
        if grown is not None and self.loss.name == "quantile":
            grown = self._renewed(grown, used)
        self.spent["grow"] += time.perf_counter() - began
        return grown

    def _renewed(self, grown: Trees, used: NDArray[np.bool_] | None) -> Trees:
        """The tree with the quantile of what is left in each leaf: the mean of a gradient that is a sign moves too little."""
        plan = grown.plan
        leaf = tree_leaves(self.train.numeric, self.train.codes, plan)
        left = self.labels.y - self.margin[:, 0]
        weight = self.labels.weight if used is None else self.labels.weight * used
        order = np.argsort(leaf, kind="stable")
        edges = np.searchsorted(leaf[order], np.arange(len(plan.leaves) + 1))
        level, rate = self.config.train.quantile, self.settings.learning_rate
        value = grown.forest.value.copy()
        places = np.flatnonzero(grown.forest.column < 0)
        for number, place in enumerate(places):
            rows = order[edges[number] : edges[number + 1]]
            value[place] = rate * weighted_quantile(left[rows], weight[rows], level)
        return replace(grown, forest=replace(grown.forest, value=value))

    def _add(self, grown: Trees) -> None:
        began = time.perf_counter()
        add_trees(self.train.numeric, self.train.codes, grown.plan, self.margin, self.threads)
        if self.valid is not None and self.valid_margin is not None:
            add_trees(self.valid.numeric, self.valid.codes, grown.plan, self.valid_margin, self.threads)
        self.grown.append(grown)
        self.state.round += 1
        self.spent["margins"] += time.perf_counter() - began

    def _judge(self) -> str:
        """Keep the best round; returns a note for the display."""
        began, state = time.perf_counter(), self.state
        each = row_losses(self.margin, self.labels)
        loss = float((each * self.labels.weight).sum() / max(float(self.labels.weight.sum()), 1e-300))
        measured = self._measured()
        entry: Epoch = {"epoch": state.round - 1, "step": state.round, "train_loss": storage.finite(loss)}
        entry |= {f"valid_{name}": storage.finite(value) for name, value in measured.items()}
        state.history.append(entry)
        if 10 ** round(math.log10(state.round)) == state.round:
            state.links[f"loss@{state.round}"] = digest.of_bytes(np.array([loss], "<f8"))
            self.run.link(f"loss@{state.round}", state.links[f"loss@{state.round}"])
        value = measured.get(self.metric.name, math.nan)
        gain = None if state.best_metric is None else self.metric.sign * (value - state.best_metric)
        if self.valid is None or (math.isfinite(value) and (gain is None or gain > 0)):
            state.best_metric, state.best_round = (value if math.isfinite(value) else None), state.round - 1
        stale = state.round - 1 - state.best_round
        patience = self.settings.patience
        state.finished = state.round >= self.settings.rounds or bool(
            patience and self.valid is not None and state.best_round >= 0 and stale >= patience
        )
        self.spent["evaluate"] += time.perf_counter() - began
        if state.round % self.config.train.log_every == 0 or state.round == 1 or state.finished:
            logged = {"train/loss": loss, **{f"valid/{name}": number for name, number in measured.items()}}
            self.run.log_metrics(state.round, logged)
        shown = f", {self.metric.name} {decimals(value)}" if math.isfinite(value) else ""
        return f"round {state.round}, loss {loss:.4f}{shown}"

    def _measured(self) -> dict[str, float]:
        """The watched metric of the validation rows, and their log loss where there is one."""
        if self.valid is None or self.valid_margin is None:
            return {}
        scores = to_scores(self.loss, self.valid_margin.astype(np.float32), self.target)
        weight = self.valid.weight if self.config.evaluate.weighted else None
        rows = counted(self.valid.target, scores, weight, self.loss)
        known = self.loss.metrics
        wanted = dict.fromkeys([self.metric.name, *(name for name in ("log_loss",) if name in known)])
        if not len(rows.target) or not np.isfinite(rows.scores).all():
            return dict.fromkeys(wanted, math.nan)
        return {name: known[name].point(rows) for name in wanted}

    # ------------------------------------------------------------------------------------------------- checkpoints

    def _identity(self) -> dict[str, object]:
        return {
            "plan": self.run.record["plan"],
            "dataset": self.dataset_digest,
            "seeds": {"train": self.config.train.seed},
        }

    def _resume(self) -> None:
        checkpoint = newest_checkpoint(self.checkpoints, self.run, self.exchange)
        if checkpoint is None:
            return
        check_identity(checkpoint, self._identity())
        where = str(checkpoint.folder)
        arrays = {name: tensor.numpy() for name, tensor in checkpoint.tensors.items()}
        self.trees = from_arrays(arrays, checkpoint.manifest["architecture"], where)
        self.state = records.filled(State, [checkpoint.manifest.get("state", {})], f"{where}: state")[0]
        self.saved = self.resumed_from = self.state.round
        for name, value in self.state.links.items():
            self.run.link(name, value)
        self.run.log(f"resumed from round {self.state.round} of {self.settings.rounds}")

    def _save(self) -> None:
        if self.exchange.rank or self.state.round == self.saved:
            return
        began = time.perf_counter()
        whole = self._whole()
        tensors = {name: torch.from_numpy(array) for name, array in whole.arrays().items()}
        facts = {**self._identity(), "architecture": whole.describe(), "state": asdict(self.state)}
        save_checkpoint(self.checkpoints, self.state.round, tensors, facts, self.config.train.keep_checkpoints)
        self.trees, self.grown, self.saved = whole, [], self.state.round
        self.spent["checkpoint"] += time.perf_counter() - began

    def _result(self) -> FitResult:
        best = self.state.best_round if self.state.best_round >= 0 else self.state.round - 1
        model = self._whole().first(self.before + (best + 1) * self.rows.outputs)
        seconds = time.perf_counter() - self.began
        rounds = self.state.round - (self.resumed_from or 0)
        history = self.state.history
        metrics = {
            "train/loss": history[-1]["train_loss"] if history else math.nan,
            "train/seconds": seconds,
            "train/steps": float(self.state.round),
            "train/steps_per_second": rounds / seconds if seconds else 0.0,
            "train/best_epoch": float(best),
            "train/trees": float(len(model.forest.root) - 1),
            "train/parameters": float((model.forest.column < 0).sum()),
            "train/rows_per_second": rounds * len(self.train) / seconds if seconds else 0.0,
            "train/peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0,
            **{f"train/{part}_seconds": value for part, value in self.spent.items()},
        }
        if self.resumed_from is not None:
            metrics["resumed_from_step"] = float(self.resumed_from)
        return FitResult(model, metrics, best, self.state.round, history, "fp32", time.time())


def monotone_columns(encoder: Encoder, wanted: dict[str, int]) -> list[int]:
    """-1, 0 or 1 for each encoded number: all numbers of a feature rise with it, but not the mark of a missing one.

    Raises UserError for a name that is no numeric feature.
    """
    known = [column.name for column in encoder.numeric_]
    for name in wanted:
        if name not in known:
            raise UserError(f"model.trees.monotone must name numeric features, found {name!r}.{nearest(name, known)}")
    found = []
    for column in encoder.numeric_:
        count = len(column.outputs())
        found += [wanted.get(column.name, 0)] * (count - column.missing_) + [0] * column.missing_
    return found
