"""The classes of a target: which values are classes, which class a score is for, and rows of unknown classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.config.references import COUNTABLE
from engine.config.sections.data import DataConfig
from engine.config.tree import Config
from engine.data.arrow_types import parse_type
from engine.data.dataset import Dataset
from engine.errors import UserError, nearest
from engine.features.compute import as_floats
from engine.features.vocabulary import as_texts
from engine.training.bundle import ModelRecord
from engine.training.heads import Heads
from engine.training.loss import Loss
from engine.training.losses import loss_of, recorded_loss

SHOWN = 5  # classes that a message names
KEPT = 20  # most classes unseen in training that evaluation.json lists
NUMBERS = "train.loss=squared, huber or quantile"


def check_target(config: Config) -> None:
    """Raise UserError where the loss needs a numeric target and the target is not numeric."""
    name = config.data.target or ""
    kind, loss = config.data.columns[name].type, loss_of(config.train)
    if loss.number and not kind.startswith(COUNTABLE):
        raise UserError(
            f"train.loss={loss.name} learns a number, found the target data.columns.{name} of type {kind}: use train.loss=binary "
            "or multiclass for classes, or declare the target with a numeric type"
        )


def class_names(config: Config, dataset: Dataset, rows: np.ndarray) -> tuple[str, ...]:
    """The classes among the training rows (int64, ascending), by text in order; of two the last is the positive one
    unless data.positive names it. Empty for a loss of a numeric target.

    Raises UserError where the loss and the values do not fit.
    """
    target, loss = config.data.target or "", loss_of(config.train)
    if loss.number:
        _check_positive_is_idle(config)
        return ()
    span = dataset.read([target], rows=(int(rows[0]), int(rows[-1]) + 1))[0]
    texts = as_texts(span.take(pa.array(rows - rows[0]))).drop_null()
    counted = pc.value_counts(texts)
    counts = dict(zip(counted.field("values").to_pylist(), counted.field("counts").to_pylist(), strict=True))
    found = tuple(sorted(counts))
    where = f"the target {target!r} in split.train"
    if len(found) < 2:
        raise UserError(
            f"{where} must have at least two classes, found {len(found)}: {_some(found)}. Take another period"
        )
    if loss.task == "binary" and len(found) > 2:
        raise UserError(
            f"train.loss={loss.name} needs two values of {where}, found {len(found):,}: {_some(found)}. "
            f"{_other_losses(config, found)}"
        )
    if loss.task == "multiclass":
        _check_cap(config, where, counts)
        _check_positive_is_idle(config)
        return _in_order(config, where, found) if loss.ordered else found
    return _positive_last(config, where, found)


def _in_order(config: Config, where: str, found: tuple[str, ...]) -> tuple[str, ...]:
    """Classes of a loss that needs their order: numbers by value, texts as `values` of the column lists them."""
    column = config.data.columns[config.data.target or ""]
    if column.type == "bool":
        return found
    if column.type.startswith(COUNTABLE):
        return tuple(sorted(found, key=float))
    lacking = [text for text in found if text not in column.values]
    if lacking:
        raise UserError(
            f"train.loss={config.train.loss} needs the order of the classes of {where}: list them all, lowest first, in "
            f"data.columns.{config.data.target}.values, which lacks {_some(lacking)}"
        )
    return tuple(sorted(found, key=column.values.index))


def _check_cap(config: Config, where: str, counts: dict[str, int]) -> None:
    most = config.train.max_classes
    if len(counts) > most:
        once = sum(count == 1 for count in counts.values())
        raise UserError(
            f"train.loss={config.train.loss} takes at most train.max_classes={most} classes, found {len(counts):,} of {where}, "
            f"{once:,} of them once among {sum(counts.values()):,} rows: {_some(sorted(counts))}. {_other_losses(config, counts)}"
        )


def _other_losses(config: Config, classes: Sequence[str] | dict[str, int]) -> str:
    """What to do about a target with too many values."""
    number = config.data.columns[config.data.target or ""].type.startswith(COUNTABLE)
    few = len(classes) <= config.train.max_classes
    ways = [f"{NUMBERS} for a number"] if number else []
    ways += ["train.loss=multiclass for classes"] if few else []
    if not few:
        ways.append(f"fewer classes made in data.query, or train.max_classes={len(classes)}, where they are classes")
    return f"Take {'; or '.join(ways)}"


def _some(found: Sequence[str]) -> str:
    return ", ".join(repr(text) for text in found[:SHOWN]) + (", ..." if len(found) > SHOWN else "")


# ------------------------------------------------------------------------------------------- what a score is for


def _positive_last(config: Config, where: str, found: tuple[str, ...]) -> tuple[str, ...]:
    if config.data.positive is None:
        return found
    wanted = positive_text(config.data.positive, config.data.columns[config.data.target or ""].type)
    if wanted not in found:
        raise UserError(
            f"data.positive must be one of the values of {where}, {_some(found)}, found {config.data.positive!r}."
            f"{nearest(wanted, found, listed=False)}"
        )
    return (*(text for text in found if text != wanted), wanted)


def positive_text(positive: str, kind: str) -> str:
    """The text of a class in the target's type, from a value in a config (`1.0` of an int64 is `1`, `on` is true)."""
    if kind == "bool":
        return {"on": "true", "yes": "true", "1": "true", "off": "false", "no": "false", "0": "false"}.get(
            positive.lower(), positive.lower()
        )
    try:
        value = pa.array([positive]).cast(pa.float64()) if kind.startswith(("int", "uint")) else pa.array([positive])
        return str(as_texts(value.cast(parse_type(kind)))[0].as_py())
    except pa.ArrowException:
        return positive


def _check_positive_is_idle(config: Config) -> None:
    if config.data.positive is not None:
        raise UserError(
            f"data.positive={config.data.positive} says which of two classes a score is for, and train.loss={config.train.loss} "
            "has no such class: leave it out (data.positive=null)"
        )


def check_positive(config: Config, data: DataConfig, model: ModelRecord) -> None:
    """Raise UserError where data.positive of the config is not the class that the scores of a trained model are for.

    `data` and `model` are the model's own specification and model.json.
    """
    if config.data.positive is None:
        return
    said = f"data.positive={config.data.positive}"
    if recorded_loss(model).task != "binary":
        raise UserError(f"{said}, but the model has no such class (train.loss={model['loss']}): leave it out")
    target = data.target or ""
    if positive_text(config.data.positive, data.columns[target].type) != model["classes"][-1]:
        raise UserError(
            f"{said}, but the model's score is for {target} = {model['classes'][-1]!r}: leave it out, or train a model with it"
        )


class TargetMeaning(TypedDict, total=False):
    """The target, and its class (binary), or classes or levels of quantiles (one score each), in order."""

    target: str
    positive: str
    negative: str
    classes: list[str]
    quantiles: list[float]


class ScoreMeaning(TargetMeaning, total=False):
    """The meaning of the main target's score; of a model of several `targets` that of each, in the order of their columns."""

    targets: dict[str, TargetMeaning]


def heads_meaning(heads: Heads) -> ScoreMeaning:
    """The meaning of all scores of a model."""
    each = {item.name: score_meaning(item.column, item.classes, item.loss) for item in heads.items}
    main: ScoreMeaning = {**each[heads.main.name]}
    return main if len(each) == 1 else {**main, "targets": each}


def score_meaning(target: str, classes: Sequence[str], loss: Loss) -> TargetMeaning:
    """The meaning of a score, as data."""
    if loss.task == "binary":
        return {"target": target, "positive": classes[-1], "negative": classes[0]}
    if loss.task == "quantiles":
        return {"target": target, "quantiles": list(loss.levels)}
    return {"target": target, "classes": list(classes)} if classes else {"target": target}


def describe_score(target: str, classes: Sequence[str], loss: Loss) -> str:
    """The meaning of a score, in words."""
    if loss.task == "binary":
        return f"probability that {target} is {classes[-1]!r} (and not {classes[0]!r})"
    if classes:
        return f"probability of each of the {len(classes)} classes of {target}"
    if loss.task == "quantiles":
        return f"quantiles of {target} at {', '.join(f'{level:g}' for level in loss.levels)}"
    return f"value of {target}"


def is_a_guess(config: Config, classes: Sequence[str], loss: Loss) -> bool:
    """Whether the positive class was chosen by sort order alone, because the values do not suggest one."""
    return (
        loss.task == "binary" and config.data.positive is None and tuple(classes) not in {("false", "true"), ("0", "1")}
    )


# ------------------------------------------------------------------------------------------ rows of no known class


def unknown_targets(
    dataset: Dataset, target: str, rows: np.ndarray, values: np.ndarray, hidden: bool
) -> dict[str, int]:
    """Rows by the text of a target that the model does not know: a class unseen in training, or not a
    finite number. `rows` int64 ascending, `values` their targets as numbers; `hidden`: the texts are not to be shown.
    """
    lost = rows[~np.isfinite(values)]
    if not len(lost):
        return {}
    column = dataset.read([target], rows=(int(lost[0]), int(lost[-1]) + 1))[0].take(pa.array(lost - lost[0]))
    if hidden:
        return {"(sensitive)": len(lost)}
    counted = pc.value_counts(as_texts(column))
    pairs = zip(counted.field("values").to_pylist(), counted.field("counts").to_pylist(), strict=True)
    return dict(sorted(pairs, key=lambda pair: (-pair[1], pair[0])))


def describe_unknown(split: str, target: str, unknown: dict[str, int], rows: int, classes: Sequence[str]) -> str:
    """A sentence about the rows of `unknown_targets`; `rows` is the number of all labelled rows."""
    lost = sum(unknown.values())
    named = ", ".join(f"{text!r}: {count:,}" for text, count in list(unknown.items())[:SHOWN])
    more = f", and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
    what = f"have a {target} that training never saw" if classes else f"have a {target} that is no finite number"
    return f"split.{split}: {lost:,} of {rows:,} labelled rows {what} ({named}{more}): no metric counts them"


def target_values(column: pa.ChunkedArray, classes: Sequence[str]) -> np.ndarray:
    """float64[n]: the number, or the index of the class; NaN where it is missing or not a class of training."""
    if not classes:
        return as_floats(column)
    index = pc.index_in(as_texts(column), value_set=pa.array(list(classes), pa.large_string()))
    return np.asarray(pc.fill_null(index.cast(pa.float64()), float("nan")))
