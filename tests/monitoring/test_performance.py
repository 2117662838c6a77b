"""Quality once labels are known, against what the reference shows."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from engine.config.sections.training import EvaluateConfig
from engine.monitoring.performance import (
    Judge,
    Outcomes,
    measure,
    resampled,
    worse_by,
)
from engine.training.losses import LOSSES
from engine.training.metrics import find_metric


def judge(**options: object) -> Judge:
    settings = {"loss": LOSSES["binary"], "evaluate": EvaluateConfig(bootstrap=50), "alpha": 0.05}
    settings |= {"floor": 0.05, "min_labelled": 0.5, "length": 7, "block": 7, "seed": 0}
    return Judge(**{**settings, **options})  # type: ignore[arg-type]


def outcomes(
    days: int, rows: int, seed: int = 0, skill: float = 1.0, known: float = 1.0, shift: float = 0.0
) -> Outcomes:
    """Calibrated scores; `skill` below 1 mixes labels with noise, `known` is the share of labels."""
    rng = np.random.default_rng(seed)
    n = days * rows
    scores = 1 / (1 + np.exp(-rng.normal(shift, 1.5, n)))
    target = (rng.random(n) < np.where(rng.random(n) < skill, scores, 0.5)).astype(float)
    target[rng.random(n) >= known] = np.nan
    fare = rng.uniform(5, 10, n)
    return Outcomes(np.repeat(np.arange(days), rows), target, scores, {"fare": fare})


def test_the_same_model_on_the_same_population_is_within_the_band() -> None:
    found = measure(outcomes(30, 200), outcomes(7, 200, seed=1), judge())
    item = found["metrics"]["roc_auc"]
    assert not found["alarm"]
    assert item["band"][0] < item["reference"] < item["band"][1]
    current = outcomes(7, 200, seed=1)
    assert item["value"] == pytest.approx(roc_auc_score(current.target, current.scores))
    assert item["interval"][0] < item["value"] < item["interval"][1]


def test_a_model_that_lost_half_its_skill_alarms_on_the_watched_metric() -> None:
    found = measure(outcomes(30, 200), outcomes(7, 200, seed=1, skill=0.5), judge())
    assert found["alarm"]
    assert found["metrics"]["roc_auc"]["worse_by"] > 0.3


def test_a_loss_below_the_floor_is_no_alarm() -> None:
    worse = outcomes(7, 200, seed=1, skill=0.8)
    assert measure(outcomes(30, 200), worse, judge())["alarm"]
    assert not measure(outcomes(30, 200), worse, judge(floor=0.9))["alarm"]


def test_too_few_labels_are_said_and_never_alarm() -> None:
    found = measure(outcomes(30, 200), outcomes(7, 200, seed=1, skill=0.2, known=0.3), judge())
    assert found["share_labelled"] == pytest.approx(0.3, abs=0.05)
    assert not found["enough_labels"] and not found["alarm"]
    nothing = measure(outcomes(30, 200), outcomes(7, 200, seed=1, known=0.0), judge())
    assert "0 labels" in nothing["reason"]
    assert "metrics" not in nothing
    empty = outcomes(0, 200)
    assert "0 labels" in measure(outcomes(30, 200), empty, judge())["reason"]


def test_one_class_only_is_not_computable_and_the_rest_is() -> None:
    current = outcomes(7, 200, seed=1)
    current.target[:] = 0.0
    found = measure(outcomes(30, 200), current, judge())["metrics"]
    assert found["roc_auc"]["value"] is None and "reason" in found["roc_auc"]
    assert found["brier"]["value"] is not None


def all_negative(shift: float = 0.0) -> Outcomes:
    current = outcomes(7, 200, seed=1, shift=shift)
    current.target[:] = 0.0
    return current


def test_a_window_of_one_class_is_judged_by_what_can_still_be_computed() -> None:
    found = measure(outcomes(30, 200), all_negative(), judge())
    assert found["alarm"] and found["status"] == "alarm"
    assert found["judged"] == found["alarming"] == ["log_loss", "ece"]
    assert "roc_auc is not computable, because all 1400 rows have the same target" in found["reason"]
    share = found["labels"]["positive_rate"]
    assert share["value"] == 0 and share["beyond"] and share["band"][0] > 0.4
    assert found["labels_moved"] == ["positive_rate"]
    calm = measure(outcomes(30, 200), all_negative(shift=-9), judge())  # nothing was wrong with those scores
    assert calm["status"] == "quiet" and calm["judged"] == ["log_loss", "ece"] and calm["labels_moved"]


def broken(window: Outcomes) -> Outcomes:
    window.scores[3] = np.nan
    return window


def short(window: Outcomes, rows: int = 20) -> Outcomes:
    return window.take(np.arange(rows))


REFERENCE = outcomes(30, 200)


@pytest.mark.parametrize(
    ("reference", "current", "status", "reason"),
    [
        (REFERENCE, outcomes(7, 200, seed=1), "quiet", None),
        (REFERENCE, outcomes(7, 200, seed=1, skill=0.3), "alarm", None),
        (REFERENCE, outcomes(7, 200, seed=1, known=0.2), "waiting", None),
        (REFERENCE, outcomes(7, 200, seed=1, known=0.0), "waiting", "0 labels"),
        (REFERENCE, outcomes(0, 200), "waiting", "0 labels"),
        (REFERENCE, short(outcomes(7, 200, seed=1)), "cannot be judged", "20 labels are known, fewer than 30"),
        (REFERENCE, broken(outcomes(7, 200, seed=1)), "cannot be judged", "1 scores are not finite"),
        (None, outcomes(7, 200, seed=1), "cannot be judged", "without a labelled validation period"),
    ],
)
@pytest.mark.parametrize("loss", ["binary", "squared"])
def test_quality_is_quiet_only_where_it_was_judged(reference, current, status, reason, loss) -> None:
    found = measure(reference, current, judge(loss=LOSSES[loss]))
    assert found["status"] == status
    assert found["alarm"] == (status == "alarm")
    assert bool(found["judged"]) or status in ("waiting", "cannot be judged")
    if reason:
        assert reason in found["reason"]


def test_a_reference_of_one_class_leaves_what_has_a_band() -> None:
    positives = REFERENCE.take(np.flatnonzero(REFERENCE.target == 1))
    found = measure(positives, outcomes(7, 200, seed=1), judge())
    assert found["judged"] == ["log_loss", "ece"]
    assert "roc_auc is not computable on the reference" in found["reason"]


def test_classes_that_change_their_shares_are_seen() -> None:
    rng = np.random.default_rng(0)

    def drawn(days: int, shares: list[float]) -> Outcomes:
        target = rng.choice(3, days * 200, p=shares).astype(float)
        scores = rng.dirichlet([1, 1, 1], days * 200)
        return Outcomes(np.repeat(np.arange(days), 200), target, scores, {})

    asked = judge(loss=LOSSES["multiclass"], classes=("a", "b", "c"))
    found = measure(drawn(30, [0.5, 0.3, 0.2]), drawn(7, [0.2, 0.3, 0.5]), asked)
    assert found["labels_moved"] == ["share of a", "share of c"]
    assert measure(drawn(30, [0.5, 0.3, 0.2]), drawn(7, [0.5, 0.3, 0.2]), asked)["labels_moved"] == []


def test_fewer_labels_give_a_wider_band() -> None:
    reference = outcomes(60, 200)
    widths = []
    for rows in (200, 20):
        low, high = measure(reference, outcomes(7, rows, seed=2), judge())["metrics"]["roc_auc"]["band"]
        widths.append(high - low)
    assert widths[1] > 2 * widths[0]


def test_resampled_windows_are_blocks_of_days() -> None:
    reference = outcomes(30, 10)
    for rows in resampled(reference, judge(length=5, block=5), 1000):
        assert len(rows) == 50
        assert np.ptp(np.unique(reference.days[rows])) == 4


def test_loss_of_a_rank_metric_counts_from_chance() -> None:
    assert worse_by(0.7, 0.75, find_metric("roc_auc")) == pytest.approx(0.2)
    assert worse_by(0.5, 0.4, find_metric("log_loss")) == pytest.approx(0.25)
    assert worse_by(0.3, 0.4, find_metric("log_loss")) < 0


def test_a_loss_from_nothing_is_no_small_loss() -> None:
    assert worse_by(0.1, 0.0, find_metric("mae")) == np.inf and worse_by(0.0, 0.0, find_metric("mae")) == 0.0
    assert (
        worse_by(0.3, 0.5, find_metric("roc_auc")) == np.inf and worse_by(0.6, 0.5, find_metric("roc_auc")) == -np.inf
    )
