"""Business metrics: the right number from SQL, and a clear answer for anything else."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest

from engine.config.sections.monitoring import BusinessConfig
from engine.errors import UserError
from engine.monitoring.business import business, check_expressions
from engine.monitoring.performance import Outcomes
from tests.monitoring.test_performance import judge, outcomes

VALUES = {
    "score": np.array([0.9, 0.2, 0.7, 0.4]),
    "label": np.array([0.0, 1.0, 1.0, np.nan]),
    "fare": np.array([10.0, 20.0, np.nan, 40.0]),
    "kind": np.array(["a", "b", "a", None], object),
}
COLUMNS = pa.schema({"fare": pa.decimal128(10, 2), "kind": pa.dictionary(pa.int32(), pa.string())})


def value(expression: str, values: dict[str, np.ndarray] = VALUES) -> float:
    """The metric over rows without a reference; NaN where it cannot be computed."""
    rest = {name: item for name, item in values.items() if name not in ("score", "label")}
    n = len(values["score"])
    rows = Outcomes(np.zeros(n, int), values.get("label", np.full(n, np.nan)), values["score"], rest)
    found = business({"x": BusinessConfig(expression=expression)}, None, rows, judge(min_labelled=0.0))["x"]["value"]
    return math.nan if found is None else found


def check(expression: str, columns: pa.Schema = COLUMNS) -> list[str]:
    return check_expressions({"x": BusinessConfig(expression=expression)}, columns, 0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mean(score)", 0.55),
        ("sum(CASE WHEN score > 0.5 AND label = 0 THEN 5 ELSE 0 END)", 5.0),
        ("sum(if(score > 0.5, fare, 0)) / count()", 2.5),
        ("sum(fare) FILTER (WHERE score > 0.5) / count(*)", 2.5),
        ("count_if(score > 0.5)", 2.0),
        ("mean(if(kind == 'a', score, 0))", 0.4),
        ("mean(fare)", 70 / 3),
        ("-(max(score) ** 2) + floor(3 / 2)", -0.81 + 1),
        ("avg(CAST(score > 0.3 AND score < 0.8 AS INTEGER))", 0.5),
        ("count_if(NOT score > 0.5) / count(*)", 0.5),
        ("count_if(fare IS NULL)", 1.0),
        ("count(fare)", 3.0),
        ("count(DISTINCT kind)", 2.0),
        ("mean(abs(label - score))", (0.9 + 0.8 + 0.3) / 3),
        ("max(score) > 0.8", 1.0),
    ],
)
def test_a_metric_gives_what_numpy_gives(text: str, expected: float) -> None:
    check(text)
    assert value(text) == pytest.approx(expected)


def test_rows_without_label_count_only_where_the_label_is_not_read() -> None:
    assert value("count(*)") == 4
    assert value("sum(if(label >= 0, 1, 0))") == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mean(where(score > 0.5, 1, 0))", "CASE WHEN condition THEN a ELSE b END for where"),
        ("sum((score > 0.5) & (label == 0))", "Write AND for &$"),
        ("sum((score > 0.5) | (label == 0))", r"Write OR for \|$"),
        ("sum(~(score > 0.5))", "Write NOT for ~$"),
        ("mean(score > 0.5)", r"Write avg\(CAST\(condition AS INTEGER\)\) for mean\(condition\)$"),
        ("sum(is_missing(fare))", r"Write x IS NULL for is_missing\(x\)$"),
        ("mean(minimum(score, 1))", r"Write least\(a, b\)"),
        ("mean(maximum(score, 1))", r"Write greatest\(a, b\)"),
        ('sum(kind == "a")', "'a', which must be one of .*Write 'text' for \"text\""),
        ("mean(0.3 < score < 0.8)", "use AND"),
        ("mean(log(score))", r"log\(x\) is to base 10. Write ln\(x\) or log10\(x\)"),
        ("sum(fare // 10)", r"floor\(a / b\)"),
        ("-max(score) ** 2", r"Write -\(x \*\* y\) or pow"),
        ("count(score > 0.5)", r"Write count_if\(condition\)"),
        ("count(NOT score > 0.5)", r"Write count_if\(condition\)"),
    ],
)
def test_what_earlier_versions_took_is_refused_with_the_form_in_sql(text: str, message: str) -> None:
    with pytest.raises(UserError, match=r"monitor\.business\.x.*" + message):
        check(text)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('touch /tmp/x')",
        "count(*) FROM read_text('/etc/passwd')",
        "(SELECT count(*) FROM read_text('/etc/passwd'))",
        "sum(score) OVER ()",
        "avg(random())",
        "sum(score); DROP TABLE rows",
        "mean(",
        "mean(*)",
        "max(kind)",
        "list(fare)",
        "sum(a.b)",
        "count(*), 1",
        "1",
        "",
        "(" * 100,
    ],
)
def test_nothing_but_one_number_of_the_rows_is_accepted(text: str) -> None:
    with pytest.raises(UserError):
        check(text)


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match=r"reads 'scor', which must be one of fare, kind, label, score"):
        check("mean(scor)")
    with pytest.raises(UserError, match=r"'maen'.*'mean'"):
        check("maen(score)")
    with pytest.raises(UserError, match="one per row"):
        check("score * 2")
    with pytest.raises(UserError, match="found VARCHAR"):
        check("max(kind)")
    with pytest.raises(UserError, match="must appear in the GROUP BY clause"):
        check("score + sum(score)")
    with pytest.raises(UserError, match="'Fare' and 'fare', which differ in case only"):
        check("sum(Fare) + sum(fare)", pa.schema({"Fare": pa.int64(), "fare": pa.int64()}))


def test_no_answer_is_nan_not_an_error() -> None:
    assert np.isnan(value("mean(fare) / 0 * 0"))
    assert np.isnan(value("sum(CAST(kind AS INTEGER))"))
    for function in ("mean", "sum"):
        assert np.isnan(value(f"{function}(score)", {"score": np.empty(0)}))


@pytest.mark.parametrize("function", ["sum", "mean", "min", "max"])
@pytest.mark.parametrize(
    "argument",
    [
        "ln(score - 0.5)",
        "1 / (score - score)",
        "0 / (score - score)",
        "exp(score * 1000)",
        "sqrt(0.5 - score)",
        "ln(fare * 0)",
    ],
)
def test_a_row_with_its_values_and_no_answer_is_not_a_missing_one(function: str, argument: str) -> None:
    values = {"score": np.array([0.25, 0.75, 0.25]), "fare": np.array([1.0, np.nan, 2.0])}
    assert np.isnan(value(f"{function}({argument})", values))


def test_what_is_missing_is_left_out_and_of_nothing_else_there_is_no_sum() -> None:
    values = {"score": np.array([0.25, 0.75]), "fare": np.array([np.nan, 8.0]), "tip": np.array([np.nan, np.nan])}
    assert value("sum(ln(fare) / ln(2))", values) == 3
    assert value("sum(CASE WHEN fare IS NULL THEN score ELSE ln(fare / 8) END)", values) == 0.25
    assert value("sum(ln(score - 0.5)) FILTER (WHERE score > 0.5)", values) == pytest.approx(np.log(0.25))
    assert np.isnan(value("sum(tip)", values))


def test_the_columns_of_a_metric_are_those_that_it_reads() -> None:
    assert check("mean(if(score > fare, label, 0))") == ["fare"]
    assert check("count(*)") == []


def test_a_loss_from_nothing_alarms() -> None:
    free = {"cost": BusinessConfig(expression="mean(fare)")}
    reference, now = outcomes(30, 200), outcomes(7, 200, seed=1)
    reference.columns["fare"][:] = 0.0
    assert business(free, reference, now, judge())["cost"]["alarm"]


@pytest.mark.parametrize(
    ("expression", "known", "status"),
    [
        ("mean(fare)", 0.0, "quiet"),
        ("mean(fare * label)", 1.0, "quiet"),
        ("mean(fare * label)", 0.3, "waiting"),
        ("mean(fare * label)", 0.0, "waiting"),
        ("mean(tip)", 1.0, "cannot be judged"),
        ("mean(fare) / (count(fare) - count(fare))", 1.0, "cannot be judged"),
    ],
)
def test_a_business_metric_is_quiet_only_where_it_was_judged(expression: str, known: float, status: str) -> None:
    current = outcomes(7, 200, seed=1, known=known)
    current = Outcomes(current.days, current.target, current.scores, {**current.columns, "tip": current.scores})
    found = business({"x": BusinessConfig(expression=expression)}, outcomes(30, 200), current, judge(floor=0.5))["x"]
    assert found["status"] == status
    assert status == "quiet" or found["reason"]


def test_business_metrics_have_a_value_a_band_and_an_alarm() -> None:
    metrics = {
        "cost": BusinessConfig(expression="mean(CASE WHEN score > 0.5 AND label == 0 THEN fare ELSE 0 END)"),
        "odd": BusinessConfig(expression="mean(fare) / 0 - mean(fare) / 0"),
    }
    quiet = business(metrics, outcomes(30, 200), outcomes(7, 200, seed=1), judge(floor=0.1))
    assert not quiet["cost"]["alarm"]
    assert quiet["odd"]["value"] is None and "arithmetic" in quiet["odd"]["reason"]
    loud = business(metrics, outcomes(30, 200), outcomes(7, 200, seed=1, skill=0.3), judge(floor=0.1))
    assert loud["cost"]["alarm"]
    current = outcomes(7, 200, seed=1)
    expected = np.where((current.scores > 0.5) & (current.target == 0), current.columns["fare"], 0).mean()
    assert quiet["cost"]["value"] == pytest.approx(expected)
    assert "not available" in business(metrics, outcomes(30, 200), None, judge())["cost"]["reason"]


def test_expressions_are_checked_before_any_data_is_read() -> None:
    good = {"a": BusinessConfig(expression="mean(if(label == 1, fare, score))")}
    assert check_expressions(good, COLUMNS, 0) == ["fare"]
    with pytest.raises(UserError, match=r"monitor\.business\.a reads .fare."):
        check_expressions(good, pa.schema([]), 0)
