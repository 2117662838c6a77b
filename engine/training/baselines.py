"""Baselines that a model must beat: the best constant, and a linear model of the same encoded rows.

The linear model is ridge regression for numbers and softmax regression for classes, on at most ROWS evenly spaced training
rows: the encoded numbers, and one 0/1 column for each of the most frequent codes of every category. Softmax by the fixed
bound of its curvature (Boehning: Multinomial logistic regression algorithm, 1992), so that one matrix is solved once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.config.sections.training import EvaluateConfig
from engine.training.evaluate import mean, point_metrics
from engine.training.examples import Examples
from engine.training.heads import TargetFacts
from engine.training.loss import Loss
from engine.training.losses import recorded_loss

Array = NDArray[Any]
ROWS = 20_000
WORK = 2_000_000_000  # most multiplications for the matrix of a fit
CODES = 200  # 0/1 columns of all categories together
RIDGE = 1.0  # in rows
STEPS, CLOSE = 200, 1e-5  # of softmax; it stops at this mean absolute gradient


def baselines(
    examples: Mapping[str, Examples], facts: TargetFacts, config: EvaluateConfig
) -> dict[str, dict[str, dict[str, float]]]:
    """{split: {"linear" or "constant": {metric: value}}} on validation and test rows; fitted on the training rows."""
    loss = recorded_loss(facts)
    outputs = max(len(facts["classes"]), 2) if not loss.number else 1
    train = examples["train"]
    wanted = {name: part for name, part in examples.items() if name in ("valid", "test")}
    limits = _limits(train)
    chosen = train.take(np.linspace(0, len(train) - 1, _rows(train, limits, outputs)).round().astype(np.int64))
    weight = np.ones(len(chosen)) if chosen.weight is None else chosen.weight.astype(np.float64)
    block, target = _block(chosen, limits), chosen.target.astype(np.float64)
    fitted = (
        _ridge(block, target, weight) if outputs == 1 else _softmax(block, target.astype(np.int64), weight, outputs)
    )
    constant = _constant(train, loss, outputs)
    # Of several quantiles the linear model has those of its errors.
    apart = _levels(target - (block @ fitted)[:, 0], weight, loss) if loss.task == "quantiles" else np.zeros(1)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, part in wanted.items():
        linear = _block(part, limits) @ fitted
        scores = {
            "linear": linear + apart if outputs == 1 else _shares(linear),
            "constant": np.tile(constant, (len(part), 1)),
        }
        found[name] = {
            kind: point_metrics(
                part.target,
                _as_scores(values, loss),
                loss,
                ece_bins=config.ece_bins,
                weight=part.weight if config.weighted else None,
            )
            for kind, values in scores.items()
        }
    return found


def _as_scores(values: Array, loss: Loss) -> Array:
    """Scores in the shape of the model's, from [n, outputs]: [n] of class 1 or of the value, or [n, classes or levels]."""
    return values if loss.task in ("multiclass", "quantiles") else values[:, -1]


def _limits(train: Examples) -> list[int]:
    """Codes of each category that get a column."""
    columns = train.codes.shape[1]
    each = CODES // max(columns, 1)
    return [min(each, int(train.codes[:, index].max(initial=0)) + 1) for index in range(columns)]


def _rows(train: Examples, limits: list[int], outputs: int) -> int:
    width = train.numeric.shape[1] + sum(limits) + 1
    return max(2, min(len(train), ROWS, WORK // (width * width), WORK // (20 * width * outputs)))


def _block(part: Examples, limits: list[int]) -> Array:
    """float64[n, columns]: encoded numbers, 0/1 of the most frequent codes (codes are in order of frequency), 1."""
    columns = [part.numeric.astype(np.float64)]
    columns += [(part.codes[:, [index]] == np.arange(limit)).astype(np.float64) for index, limit in enumerate(limits)]
    return np.concatenate([*columns, np.ones((len(part), 1))], axis=1)


def _normal(block: Array, weight: Array) -> Array:
    ridge = np.full(block.shape[1], RIDGE)
    ridge[-1] = 1e-6  # the constant is not penalised
    return np.asarray((block * weight[:, None]).T @ block + np.diag(ridge))


def _ridge(block: Array, target: Array, weight: Array) -> Array:
    center = target.mean()  # subtracted: the variation of a target such as seconds since 1970 would be lost beside it
    found = np.linalg.solve(_normal(block, weight), (block * weight[:, None]).T @ (target - center))
    found[-1] += center
    return np.asarray(found[:, None])


def _softmax(block: Array, target: Array, weight: Array, classes: int) -> Array:
    """float64[columns, classes] of the penalised likelihood's maximum."""
    hit = np.zeros((len(target), classes))
    hit[np.arange(len(target)), target] = 1.0
    solve = np.linalg.inv(_normal(block, weight) * 0.5)
    found = np.zeros((block.shape[1], classes))
    free = np.ones((block.shape[1], 1)) * RIDGE * 0.5
    free[-1] = 0.0
    for _ in range(STEPS):
        gradient = block.T @ ((hit - _shares(block @ found)) * weight[:, None]) - free * found
        if np.abs(gradient).mean() < CLOSE * weight.sum():
            break
        found += solve @ gradient
    return found


def _shares(logits: Array) -> Array:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def _constant(train: Examples, loss: Loss, outputs: int) -> Array:
    """The best constant of the loss: shares of the classes, mean, median or quantile(s)."""
    target, weight = train.target.astype(np.float64), train.weight
    if outputs > 1:
        shares = np.bincount(target.astype(np.int64), weight, outputs)
        return shares / shares.sum()
    if loss.task == "quantiles":
        return _levels(target, weight, loss)
    if loss.constant is None:
        return np.array([mean(target, weight)])
    return np.array([_quantile(target, weight, loss.constant)])


def _levels(values: Array, weight: Array | None, loss: Loss) -> Array:
    return np.array([_quantile(values, weight, level) for level in loss.levels])


def _quantile(values: Array, weight: Array | None, level: float) -> float:
    return float(np.quantile(values, level)) if weight is None else _weighted_quantile(values, weight, level)


def _weighted_quantile(values: Array, weight: Array, level: float) -> float:
    """The smallest value at which the weights of the values up to it are at least `level` of all."""
    order = np.argsort(values, kind="stable")
    total = np.cumsum(weight[order], dtype=np.float64)
    return float(values[order][np.searchsorted(total, level * total[-1])])


def flat(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, float]:
    """`baseline/test/linear/roc_auc` and the like."""
    return {
        f"baseline/{split}/{kind}/{name}": value
        for split, kinds in found.items()
        for kind, values in kinds.items()
        for name, value in values.items()
    }


def words(split: str, metric: str, model: float, found: Mapping[str, Mapping[str, float]]) -> str:
    """`test roc_auc: model 0.7742, linear 0.7312, constant 0.5`; an undefined metric is `not computable`."""
    reached = {"model": model, **{kind: values[metric] for kind, values in found.items()}}
    texts = {kind: f"{value:.4g}" if np.isfinite(value) else "not computable" for kind, value in reached.items()}
    if set(texts.values()) == {"not computable"}:
        return f"{split} {metric}: not computable"
    return f"{split} {metric}: {', '.join(f'{kind} {text}' for kind, text in texts.items())}"
