"""Does the gate between models keep its word: equal models, models that are better, and the gain of the rest of the year.

Five models of the flights experiment differ in nothing but their seed: every ordered pair is a champion and a challenger
without a reason to replace it. Each pair is judged from May to December by the gate as it ships, once in two weeks, over four
times eight weeks. `equal_seeds_promoted`: the share of these that end in a promotion. `coverage_90`: how often the interval of
90 % of a judgement holds the mean gain of the later judgements of the year; `coverage_rows`: how often one over rows would.
`better_by_01_weeks`: the champion is mixed, in log odds, with a model of two weeks, so that the challenger's area over all months
is better by .01; weeks until it is promoted, the median of all starts (10: not
within eight).
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Row, Settings, show
from engine import api
from engine.config import compose, schema
from engine.config.units import instant
from engine.lifecycle.challenger import History, Labelled, Periods, Workshop, labelled
from engine.lifecycle.challenger_gate import PROMOTE, Judged, evidence, verdict
from engine.lifecycle.looks import Looks
from engine.runtime.run import Run
from engine.training.losses import LOSSES
from kernels.metrics import roc_auc

SEEDS = (100, 101, 102, 103, 104)
SMALL = ("train.epochs=3", "model.hidden=[128,128]", "split.test=[]", "evaluate.bootstrap=0", "tracking=off")
LATE = 10  # weeks that a challenger counts which is not promoted within eight
LOOK, TOGETHER = 14, 4  # days of a judgement, and judgements from one champion's start: eight weeks
GAIN = 0.01
FROM, TO = "2013-05-01", "2014-01-01"


def run(_settings: Settings, _bandwidth: float) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="engine-gate-") as folder:
        known, scores = scored(Path(folder))
    config = compose.compose(("+experiment=flights",), None).config
    seeds = [str(seed) for seed in SEEDS]
    pairs = list(itertools.permutations(seeds, 2))
    equal = [followed(known, scores[a], scores[b], config.retrain.gate) for a, b in pairs]
    better = []
    for name in seeds:
        worse = mixed(known.target, scores[name], scores["short"])
        better.append(followed(known, worse, scores[name], config.retrain.gate))
    promoted = [weeks is not None for judged in equal for weeks in judged.weeks]
    waits = [weeks if weeks is not None else LATE for judged in better for weeks in judged.weeks]
    held = [hit for judged in equal for hit in judged.held]
    by_rows = [hit for judged in equal for hit in judged.held_by_rows]
    soon = float(np.mean(np.array(waits) <= LOOK * TOGETHER / 7))
    n = len(known.target)
    rows = [
        row("coverage_90", n, float(np.mean(held)), 0.9, f"{len(held)} judgements of {len(pairs)} pairs"),
        row("coverage_rows", n, float(np.mean(by_rows)), 0.9, "the same, if rows were independent"),
        row(
            "equal_seeds_promoted",
            n,
            float(np.mean(promoted)),
            0.05,
            f"{sum(promoted)} of {len(promoted)} times eight weeks",
        ),
        row("better_by_01_weeks", n, float(np.median(waits)), 8.0, f"{soon:.0%} of {len(waits)} within eight weeks"),
    ]
    for item in rows:
        show(item)
    return rows


def row(work: str, rows: int, ours: float, target: float, note: str) -> Row:
    unit = "weeks" if work.endswith("weeks") else "share"
    return Row("gate", work, rows, ours, "target", None, None, unit, peer_value=target, note=note)


def scored(folder: Path) -> tuple[Labelled, dict[str, np.ndarray]]:
    """Labelled rows of May to December, and the scores float64[n] of each model."""
    words = ("+experiment=flights", *SMALL, f"paths.runs={folder / 'runs'}", f"paths.store={folder / 'store'}")
    models = {str(seed): (f"train.seed={seed}",) for seed in SEEDS}
    models["short"] = ("train.seed=1", "split.train=[2013-03-18,2013-04-01]", "train.batch_size=512")
    trained = {name: api.run("train", *words, *more) for name, more in models.items()}
    config = compose.compose(words, None).config
    parent = Run.create("retrain", config, schema.plain(config))
    history = History.read(config, parent)
    workshop = Workshop(history, parent)
    start, stop = (instant(text, config.data.time_zone) for text in (FROM, TO))
    span = Periods(start, start, start, stop, np.iinfo(np.int64).max)
    predictors = {name: workshop.predictor(done.directory / "model") for name, done in trained.items()}
    first = next(iter(predictors.values()))
    known = labelled(history, span, tuple(first.bundle.model["classes"]), first.model.target.kind)
    rows = history.dataset.row_range(start, stop)
    return known, {
        name: workshop.scores(predictor, rows)[known.places].astype(np.float64)
        for name, predictor in predictors.items()
    }


def mixed(target: np.ndarray, good: np.ndarray, bad: np.ndarray) -> np.ndarray:
    """Scores between two models whose area is GAIN below the first's."""
    one, other = (np.log(scores / (1 - scores)) for scores in (good, bad))
    wanted, low, high = roc_auc(target, good) - GAIN, 0.0, 1.0
    for _ in range(20):
        share = (low + high) / 2
        low, high = (share, high) if roc_auc(target, (1 - share) * one + share * other) > wanted else (low, share)
    return np.asarray(1 / (1 + np.exp(-((1 - low) * one + low * other))))


@dataclasses.dataclass
class Followed:
    """What the judgements of a pair gave: weeks until a promotion, of each start (None: not within eight weeks); whether the
    interval of each judgement held the mean gain of the later ones, and whether one over rows would have.
    """

    weeks: list[int | None]
    held: list[bool]
    held_by_rows: list[bool]


def followed(known: Labelled, champion: np.ndarray, challenger: np.ndarray, gate: Any) -> Followed:
    """Judge a pair every two weeks; the champion starts anew after eight."""
    days = known.days - known.days.min()
    parts = [np.flatnonzero(days // LOOK == number) for number in range((int(days.max()) + 1) // LOOK)]
    found, gains, weeks, looks, since = [], [], [], Looks(), None
    for number, part in enumerate(parts):
        if number % TOGETHER == 0:
            looks, since = Looks(), None
        slices = {name: values[part] for name, values in known.slices.items()}
        sides = (known.target[part], champion[part], challenger[part])
        figures = evidence(
            Judged(*sides, slices, known.days[part], known.blocks[part]), LOSSES["binary"], gate, looks=looks
        )
        looks = Looks.of(figures["looks"])
        if since is None and verdict(figures, gate)[0] == PROMOTE:
            since = LOOK // 7 * (number % TOGETHER + 1)
        if number % TOGETHER == TOGETHER - 1:
            weeks.append(since)
        found.append((figures["metric"]["low"], figures["metric"]["high"], rows_spread(*sides)))
        gains.append(figures["metric"]["gain"])
    held, held_by_rows = [], []
    for number, (low, high, spread) in enumerate(found[:-TOGETHER]):
        later = float(np.mean(gains[number + 1 :]))
        held.append(bool(low <= later <= high))
        held_by_rows.append(bool(abs(gains[number] - later) <= 1.645 * spread))
    return Followed(weeks, held, held_by_rows)


def rows_spread(target: np.ndarray, *sides: np.ndarray) -> float:
    """Standard error of the difference of two areas if rows were independent (DeLong et al., Biometrics, 1988)."""
    parts: list[Sequence[np.ndarray]] = []
    for scores in sides:
        positive, negative = scores[target == 1], scores[target == 0]
        above = np.searchsorted(np.sort(negative), positive) / len(negative)
        below = 1 - np.searchsorted(np.sort(positive), negative) / len(positive)
        parts.append((above, below))
    gaps = [parts[1][side] - parts[0][side] for side in (0, 1)]
    return float(np.sqrt(sum(gap.var(ddof=1) / len(gap) for gap in gaps)))
