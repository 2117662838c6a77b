"""Losses and metrics of a user's own: of a plug-in file (`plugins: [losses.py]`), or of an installed package that offers them in
the entry point group `engine.losses` or `engine.metrics`.

A loss is a class without arguments, or a function, with:
- `row_losses(outputs, target)` (or the function itself): float32[n] from raw outputs float32[n, outputs] and targets float32[n],
  in torch, a row by itself; autograd gives the gradients. Numbers come standardised.
- `task`: binary, multiclass or regression.
- `scores(outputs)`, optional: from float64[n, outputs] in numpy to scores [n] or [n, classes], a row by itself. Without it: the
  logistic function, the softmax, or the first output.
- `metric`, optional: the name of the metric that is watched. `outputs`, optional: raw outputs of a row of a regression.

A metric is a function of (target float64[n], scores float64[n] or [n, classes], weight float64[n]), or a class without
arguments with `columns(target, scores)` float64[n, k] and `value(sums)`: float64[m] of m weighted sums of the columns, [m, k].
Either has an attribute `higher_is_better`, and perhaps a `label`. A function is called once for each resample of an interval; a
class reads its rows once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.config import plugins
from engine.config.sections.training import LOSS_GROUP, METRIC_GROUP
from engine.errors import UserError, nearest
from engine.training.loss import Array, Loss, LossSettings
from engine.training.loss_table import TABLE
from engine.training.metrics import BUILT_IN, OF_USERS, InBlocks, Metric, Rows, ratio_of
from engine.training.resampling import BlockSums

PLAIN_TASKS = {"binary": "binary", "multiclass": "multiclass", "regression": "squared"}  # the loss that each is like
TRIED = 6  # rows
TRIED_ROWS = 64  # about as many of those that a metric is computed of
CLOSE = 1e-5  # relative: vectorised code may round a row beside others differently


@functools.cache
def user_loss(name: str) -> Loss:
    """The loss of a plug-in's or a package's name. Raises UserError for one that is not as above."""
    found, short = _found(name, LOSS_GROUP, "train.loss", TABLE), plugins.split(name)[0]
    where = f"train.loss={short}"
    made = _called(where, found) if isinstance(found, type) else found
    task = getattr(made, "task", None)
    if task not in PLAIN_TASKS:
        raise UserError(f"{where} must have a task, one of {', '.join(PLAIN_TASKS)}, found {task!r}")
    like = TABLE[PLAIN_TASKS[task]](LossSettings())
    rows = getattr(made, "row_losses", made if callable(made) else None)
    outputs = getattr(made, "outputs", 1)
    if not callable(rows):
        raise UserError(f"{where} must have row_losses(outputs, target)")
    if not isinstance(outputs, int) or outputs < 1 or (outputs > 1 and task != "regression"):
        raise UserError(f"{where}: outputs must be a whole number above 0 of a regression, found {outputs!r}")
    scores = getattr(made, "scores", None)
    if scores is None and outputs > 1:
        raise UserError(f"{where} must have scores(outputs), because a row has {outputs} outputs")
    metric, digest = str(getattr(made, "metric", like.metric)), plugins.split(name)[1]
    own = () if metric in BUILT_IN else (user_metric(f"{metric}@{digest}" if digest else metric, task),)
    loss = Loss(
        short,
        like.task,
        metric,
        functools.partial(_row_losses, where, rows),
        like.link if scores is None else functools.partial(_scores, where, scores, task),
        targets=like.targets,
        raw=outputs,
        own=own,
    )
    if metric not in loss.metrics:
        raise UserError(
            f"{where}: metric must be one that {task} has, found {metric!r}.{nearest(metric, loss.metrics)}"
        )
    _try(loss, where)
    return loss


@functools.cache
def user_metric(name: str, task: str) -> Metric:
    """The metric of a plug-in's or a package's name, for a task. Raises UserError for one that is not as above."""
    found, short = _found(name, METRIC_GROUP, "train.metric", BUILT_IN), plugins.split(name)[0]
    where = f"train.metric={short}"
    made = _called(where, found) if isinstance(found, type) else found
    higher = getattr(made, "higher_is_better", None)
    in_sums = callable(getattr(made, "columns", None)) and callable(getattr(made, "value", None))
    if not (in_sums or callable(made)) or not isinstance(higher, bool):
        raise UserError(
            f"{where} must be a function of (target, scores, weight), or a class with columns(target, scores) and "
            "value(sums), with an attribute higher_is_better, true or false, found "
            f"{'neither' if not (in_sums or callable(made)) else repr(higher)}"
        )
    other = OF_USERS.get(short)
    if other is not None and other.higher_is_better != higher:
        raise UserError(
            f"{where} must have one direction, but another version of it is in use whose higher_is_better is "
            f"{other.higher_is_better}: figures of the two cannot be compared, so rename one"
        )
    point, in_blocks = _of_sums(where, made) if in_sums else _of_function(where, made)
    found_metric = Metric(short, str(getattr(made, "label", short)), task, higher, point, in_blocks)
    OF_USERS[short] = found_metric
    return found_metric


def _of_sums(where: str, made: Any) -> tuple[Callable[[Rows], float], InBlocks]:
    """`point` and `in_blocks` of a class with columns and value."""

    def columns(rows: Rows) -> Array:
        found = np.asarray(_called(where, made.columns, rows.target, rows.scores))
        if found.ndim != 2 or len(found) != len(rows.target) or found.dtype.kind not in "biuf":
            raise UserError(
                f"{where}: columns(target, scores) must give numbers of shape [{len(rows.target)}, k], found {found.dtype.name} "
                f"of shape {list(found.shape)}"
            )
        return found.astype(np.float64).T

    def value(sums: Array) -> Array:
        found = np.asarray(_called(where, made.value, sums))
        if found.shape != sums.shape[:1] or found.dtype.kind not in "biuf":
            raise UserError(
                f"{where}: value(sums) must give numbers of shape [{len(sums)}] for sums of shape {list(sums.shape)}, found "
                f"{found.dtype.name} of shape {list(found.shape)}"
            )
        return found.astype(np.float64)

    of_rows, in_blocks = ratio_of(columns, value)

    def point(rows: Rows) -> float:
        few = slice(None, None, max(1, len(rows.target) // TRIED_ROWS))
        weight = None if rows.weight is None else rows.weight[few]
        part = Rows(rows.target[few], rows.scores[few], weight=weight)
        halves, each = in_blocks(part, np.arange(len(part.target)) % 2, 2), np.eye(2)
        apart = np.concatenate([halves.drawn(each[:1]), halves.drawn(each[1:])])
        if not np.allclose(halves.drawn(each), apart, rtol=CLOSE, atol=0, equal_nan=True):
            raise UserError(
                f"{where}: value(sums) must give each row of sums [m, k] the value that it has alone, for a row is one resample; "
                "found another with a second row beside it: sum over axis 1 only"
            )
        return of_rows(rows)

    return point, in_blocks


def _of_function(where: str, made: Callable[..., Any]) -> tuple[Callable[[Rows], float], InBlocks]:
    """`point` and `in_blocks` of a function of (target, scores, weight), of whose sums nothing is known."""

    def value(rows: Rows, weight: Array) -> float:
        answer = _called(where, made, rows.target, rows.scores, weight)
        if not isinstance(answer, (int, float, np.number)):
            raise UserError(f"{where} must give a number, found {type(answer).__name__}")
        return float(answer)

    def point(rows: Rows) -> float:
        return value(rows, np.ones(len(rows.target)) if rows.weight is None else rows.weight)

    def in_blocks(rows: Rows, place: Array, blocks: int) -> BlockSums:
        own = np.ones(len(rows.target)) if rows.weight is None else rows.weight

        def of_some(weight: Array) -> float:
            used = weight > 0
            part = Rows(rows.target[used], rows.scores[used])
            return value(part, weight[used]) if used.any() else math.nan

        return BlockSums(np.eye(blocks), lambda counts: np.array([of_some(own * times[place]) for times in counts]))

    return point, in_blocks


def _found(name: str, group: str, where: str, built_in: Any) -> Any:
    short, digest = plugins.split(name)
    if short in built_in:
        raise UserError(f"{where}={short} must not have the name of one of the engine: rename it")
    if digest is not None:
        return plugins.load(name)
    offered = plugins.installed(group)
    if short not in offered:
        known = [*built_in, *offered]
        raise UserError(
            f"{where} must be one of {', '.join(known)}, or the name of one in a file of `plugins`, found {short!r}."
            f"{nearest(short, known, listed=False)}"
        )
    return offered[short].load()


# -------------------------------------------------------------------------------------------------------------- calls


def _called(where: str, function: Callable[..., Any], *given: Any) -> Any:
    try:
        return function(*given)
    except Exception as error:
        raise UserError(f"{where} raised {type(error).__name__}: {error}") from error


def _row_losses(where: str, function: Callable[..., Any], outputs: Tensor, target: Tensor) -> Tensor:
    found = _called(where, function, outputs, target)
    if not isinstance(found, Tensor) or found.shape != target.shape:
        shape = f"a tensor of shape {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise UserError(f"{where} must give the loss of each row, a tensor of shape [{len(target)}], found {shape}")
    return found


def _scores(where: str, function: Callable[..., Any], task: str, wide: Array) -> Array:
    found = np.asarray(_called(where, function, wide.copy()))
    shape = wide.shape if task == "multiclass" else wide.shape[:1]
    if found.shape != shape or not np.issubdtype(found.dtype, np.floating):
        raise UserError(
            f"{where}: scores(outputs) must give numbers of shape {list(shape)}, found {found.dtype.name} of shape "
            f"{list(found.shape)}"
        )
    return found.astype(np.float64, copy=False)


def _try(loss: Loss, where: str) -> None:
    """Refuse a loss that depends on the rows beside a row, on chance or not on the outputs, before it costs anything."""
    classes = 3 if loss.task == "multiclass" else 2
    generator = np.random.default_rng(0)
    raw = generator.normal(size=(TRIED, loss.outputs(classes)))
    outputs = torch.tensor(raw, dtype=torch.float32, requires_grad=True)
    kinds = generator.normal(size=TRIED) if loss.number else np.arange(TRIED) % classes
    target = torch.tensor(kinds, dtype=torch.float32)
    losses = loss.row_losses(outputs, target)
    if not losses.requires_grad:
        raise UserError(f"{where} must compute the loss from the outputs in torch: it has no gradient")
    (gradient,) = torch.autograd.grad(losses.sum(), outputs)
    if not bool(losses.isfinite().all() and gradient.isfinite().all()):
        raise UserError(f"{where} must be finite, with finite gradients, for outputs between -3 and 3")
    alone = torch.cat([loss.row_losses(outputs[k : k + 1], target[k : k + 1]) for k in range(TRIED)])
    if not torch.allclose(alone, losses, rtol=CLOSE, atol=CLOSE):
        raise UserError(f"{where} must give a row the same loss whichever rows are beside it, and each time")
    if loss.link is not None:
        together = loss.link(raw)
        apart = np.concatenate([loss.link(raw[k : k + 1]) for k in range(TRIED)])
        if not np.allclose(together, apart, rtol=CLOSE, atol=CLOSE):
            raise UserError(f"{where}: scores(outputs) must give a row the same scores whichever rows are beside it")
