"""Business metrics: SQL expressions over `score`, `label` and columns that end in one number.

sum(CASE WHEN score > 0.5 AND label = 0 THEN 5 ELSE 0 END) / count(*)      cost of a false alarm, per row
sum(fare_amount) FILTER (WHERE score > 0.5) / count(*)                     revenue at stake, per row
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa

from engine.config.feature_names import RENAME
from engine.config.names import check_distinct
from engine.config.sections.monitoring import BusinessConfig
from engine.data import expressions, repeatable
from engine.errors import UserError
from engine.monitoring.performance import (
    ALARM,
    QUIET,
    UNJUDGED,
    WAITING,
    Judge,
    MetricRecord,
    Outcomes,
    relative,
    resampled,
)

LABEL = "label"
# Forms of earlier versions, by a pattern of the text or of DuckDB's reason: what SQL has instead.
SQL_FORMS = {
    r"\bwhere\s*\(": "CASE WHEN condition THEN a ELSE b END for where(condition, a, b)",
    r"\bis_missing\s*\(": "x IS NULL for is_missing(x)",
    r"\bminimum\s*\(": "least(a, b) for minimum(a, b)",
    r"\bmaximum\s*\(": "greatest(a, b) for maximum(a, b)",
    r"(mean|avg)\(BOOLEAN\)": "avg(CAST(condition AS INTEGER)) for mean(condition)",
    r"&": "AND for &",
    r"\|": "OR for |",
    r"~": "NOT for ~",
    r'"': "'text' for \"text\"",
}
CONDITIONS = ("COMPARISON", "CONJUNCTION", "OPERATOR", "BETWEEN")


def business(
    metrics: Mapping[str, BusinessConfig],
    reference: Outcomes | None,
    current: Outcomes | None,
    judge: Judge,
    labels: np.ndarray | None = None,
) -> dict[str, MetricRecord]:
    """Each business metric of the window, against the band of the reference where it has the columns.

    Before its labels are known it is estimated: the mean over `labels` [draws, n], each a set of labels that is possible.
    """
    return {
        name: _judged(name, config, reference, current, judge, labels)
        | {"expression": config.expression, "better": config.better}
        for name, config in metrics.items()
    }


def _judged(
    name: str,
    config: BusinessConfig,
    reference: Outcomes | None,
    current: Outcomes | None,
    judge: Judge,
    labels: np.ndarray | None,
) -> MetricRecord:
    if current is None:
        return _unjudged(None, "not computable, because the rows of the window are not available")
    where = f"monitor.business.{name}"
    names = expressions.expression_columns(config.expression, where, aggregate=True)
    (value,) = expressions.aggregate(config.expression, [_table(current, names)], where)
    known = int(current.known.sum()) if LABEL in names else len(current.target)
    if known < judge.min_labelled * len(current.target):
        reason = f"not judged yet, because {known} of {len(current.target)} labels are known"
        found: MetricRecord = {"value": value if np.isfinite(value) else None, "status": WAITING, "reason": reason}
        if labels is not None:
            drawn = (_table(dataclasses.replace(current, target=draw), names) for draw in labels)
            expected = float(np.mean(expressions.aggregate(config.expression, drawn, where)))
            found["estimated"] = expected if np.isfinite(expected) else None
        return found
    if not np.isfinite(value):
        return _unjudged(None, "not computable, because its arithmetic has no result on these rows")
    if reference is None:
        return _unjudged(value, "no band, because there is no labelled reference")
    if lacking := sorted(set(names) - set(_values(reference))):
        return _unjudged(value, f"no band, because the reference does not hold {', '.join(lacking)}")
    windows = (_table(reference.take(rows), names) for rows in resampled(reference, judge, known))
    whole, *values = expressions.aggregate(config.expression, [_table(reference, names), *windows], where)
    draws = np.array(values)[np.isfinite(values)]
    if not len(draws) or not np.isfinite(whole):
        return _unjudged(value, "no band, because its arithmetic has no result on the reference")
    low, high = float(np.quantile(draws, judge.alpha)), float(np.quantile(draws, 1 - judge.alpha))
    lower = config.better == "lower"
    worse = relative(value - whole if lower else whole - value, abs(whole))
    beyond = bool(value > high if lower else value < low)
    alarm = beyond and worse >= judge.floor
    record: MetricRecord = {
        "value": value,
        "reference": whole,
        "band": [low, high],
        "worse_by": worse,
        "beyond": beyond,
    }
    return record | {"alarm": alarm, "status": ALARM if alarm else QUIET}


def _unjudged(value: float | None, reason: str) -> MetricRecord:
    return {"value": value, "status": UNJUDGED, "reason": reason}


def value_type(kind: pa.DataType) -> pa.DataType:
    """Type of a column's values in expressions: float64 of numbers and truth values, text of anything else."""
    number = pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)
    return pa.float64() if number or pa.types.is_decimal(kind) else pa.string()


def _score_names(classes: int) -> list[str]:
    return [f"score_{index}" for index in range(classes)] or ["score"]


def _values(rows: Outcomes) -> dict[str, np.ndarray]:
    scores = rows.scores.astype(np.float64)
    columns = [scores] if scores.ndim == 1 else list(scores.T)
    names = _score_names(0 if scores.ndim == 1 else len(columns))
    return {**rows.columns, **dict(zip(names, columns, strict=True)), LABEL: rows.target}


def _table(rows: Outcomes, names: Collection[str]) -> pa.Table:
    """The columns `names`; without the rows that have no label, if the label is one of them."""
    if LABEL in names:
        rows = rows.take(np.flatnonzero(rows.known))
    values = _values(rows)
    arrays = {
        name: pa.array(values[name], pa.string() if values[name].dtype == object else pa.float64(), from_pandas=True)
        for name in names or [LABEL]
    }
    return pa.table(arrays)


def check_expressions(
    metrics: Mapping[str, BusinessConfig], columns: pa.Schema, classes: int, target: str | None = None
) -> list[str]:
    """Columns of the dataset that the expressions read. Only the target may be called `label`.

    Raises UserError for anything else, and for SQL that does not end in one number, before data is read.
    """
    own = {LABEL, *_score_names(classes)}
    needed: dict[str, None] = {}
    for name, config in metrics.items():
        where = f"monitor.business.{name}"
        with _sql_forms(config.expression):
            used = expressions.expression_columns(config.expression, where, aggregate=True)
            _check_names(used, where, columns, own, target)
            types = {
                column: pa.float64() if column in own else value_type(columns.field(column).type) for column in used
            }
            expressions.aggregate(config.expression, [pa.schema(types or {LABEL: pa.float64()}).empty_table()], where)
        _check_meaning(config.expression, where)
        needed |= dict.fromkeys(column for column in used if column not in own)
    return list(needed)


def _check_names(used: Sequence[str], where: str, columns: pa.Schema, own: Collection[str], target: str | None) -> None:
    for name in used:
        if name in own and name in columns.names and (name, target) != (LABEL, LABEL):
            raise UserError(
                f"{where} reads {name!r}, which is both an output of the model and a column of the data. "
                + RENAME.format(name)
            )
        if name not in own and name not in columns.names:
            known = ", ".join(sorted({*own, *columns.names}))
            raise UserError(f"{where} reads {name!r}, which must be one of {known}")
    check_distinct(((name, where) for name in used), RENAME, fold=True)


@contextlib.contextmanager
def _sql_forms(expression: str) -> Iterator[None]:
    """Add to an error what to write instead of forms that earlier versions took."""
    try:
        yield
    except UserError as error:
        text = " ".join([expression, *re.findall(r"\w+\(BOOLEAN\)", str(error))])
        forms = [form for pattern, form in SQL_FORMS.items() if re.search(pattern, text)]
        raise UserError(f"{error}{'. Write ' + '; '.join(forms) if forms else ''}") from None


def _check_meaning(expression: str, where: str) -> None:
    """Raise UserError for what SQL takes too, but with another value than earlier versions gave it."""
    for node in expressions.nodes(expression, where):
        name, arguments = str(node.get("function_name")), repeatable.arguments_of(node)
        negative = any(
            item.get("function_name") == "-" and len(repeatable.arguments_of(item)) == 1 for item in arguments[:1]
        )
        found = {
            "log": ("log(x) is to base 10", "ln(x) or log10(x)"),
            "//": ("a // b does not round numbers with a fraction", "floor(a / b)"),
            "**": ("-x ** y is (-x) ** y", "-(x ** y) or pow(-x, y)") if negative else None,
            "count": ("count(condition) also counts rows where it is false", "count_if(condition)")
            if any(item["class"] in CONDITIONS for item in arguments)
            else None,
        }.get(name)
        if found:
            raise UserError(
                f"{where} must say what it means, found {expression!r}: in SQL {found[0]}. Write {found[1]}"
            )
