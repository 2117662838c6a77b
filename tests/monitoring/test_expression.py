"""Business metrics: the right number, and nothing but arithmetic."""

from __future__ import annotations

import numpy as np
import pytest

from engine.errors import UserError
from engine.monitoring.expression import evaluate, names_in

VALUES = {
    "score": np.array([0.9, 0.2, 0.7, 0.4]),
    "label": np.array([0.0, 1.0, 1.0, np.nan]),
    "fare": np.array([10.0, 20.0, np.nan, 40.0]),
    "kind": np.array(["a", "b", "a", "b"], object),
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mean(score)", 0.55),
        ("sum(where((score > 0.5) & (label == 0), 5, 0))", 5.0),
        ("sum(where(score > 0.5, fare, 0)) / count()", 2.5),
        ("count(score > 0.5)", 2.0),
        ("mean(where(kind == 'a', score, 0))", 0.4),
        ("mean(fare)", 70 / 3),
        ("-max(score) ** 2 + 1 // 1", -0.81 + 1),
        ("mean(0.3 < score < 0.8)", 0.5),
        ("mean(~(score > 0.5))", 0.5),
        ("count(is_missing(fare))", 1.0),
        ("mean(abs(label - score))", (0.9 + 0.8 + 0.3) / 3),
    ],
)
def test_expression_gives_what_numpy_gives(text: str, expected: float) -> None:
    assert evaluate(text, VALUES) == pytest.approx(expected)


def test_rows_without_label_count_only_where_the_label_is_not_read() -> None:
    assert evaluate("count()", VALUES) == 4
    assert evaluate("sum(where(label >= 0, 1, 0))", VALUES) == 3


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('touch /tmp/x')",
        "score.__class__",
        "[x for x in score]",
        "(lambda: 1)()",
        "open('x')",
        "score[0]",
        "f'{score}'",
        "mean(score, axis=0)",
        "None",
        "1 if score else 2",
        "mean(",
        "x := 1",
        "mean(*score)",
        "(" * 3000,
        "sum('a' * 1000000000000)",
    ],
)
def test_nothing_but_arithmetic_is_accepted(text: str) -> None:
    with pytest.raises(UserError):
        evaluate(text, VALUES)


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match=r"'scor'.*'score'"):
        evaluate("mean(scor)", VALUES)
    with pytest.raises(UserError, match=r"'maen'.*'mean'"):
        evaluate("maen(score)", VALUES)
    with pytest.raises(UserError, match="one per row"):
        evaluate("score * 2", VALUES)
    with pytest.raises(UserError, match="3 arguments, found 1"):
        evaluate("mean(where(score))", VALUES)


def test_no_answer_is_nan_not_an_error() -> None:
    assert np.isnan(evaluate("mean(fare) / 0 * 0", VALUES))
    assert np.isnan(evaluate("mean(score)", {"score": np.empty(0)}))


@pytest.mark.parametrize("function", ["sum", "mean", "min", "max"])
@pytest.mark.parametrize(
    "argument",
    [
        "log(score - 0.5)",
        "1 / (score - score)",
        "0 / (score - score)",
        "exp(score * 5000)",
        "sqrt(-score)",
        "log(fare * 0)",
    ],
)
def test_a_row_with_its_values_and_no_answer_is_not_a_missing_one(function: str, argument: str) -> None:
    values = {"score": np.array([0.25, 0.75, 0.25]), "fare": np.array([1.0, np.nan, 2.0])}
    assert np.isnan(evaluate(f"{function}({argument})", values))


def test_what_is_missing_is_left_out_and_of_nothing_else_there_is_no_sum() -> None:
    values = {"score": np.array([0.25, 0.75]), "fare": np.array([np.nan, 8.0]), "tip": np.array([np.nan, np.nan])}
    assert evaluate("sum(log(fare) / log(2))", values) == 3
    assert evaluate("sum(where(is_missing(fare), score, log(fare / 8)))", values) == 0.25
    assert np.isnan(evaluate("sum(tip)", values))
    assert evaluate("sum(score)", {"score": np.empty(0)}) == 0


def test_names_are_values_not_functions() -> None:
    assert names_in("mean(where(score > fare, label, 0))") == {"score", "fare", "label"}
