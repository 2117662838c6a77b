"""The rows that training reads: no label from the future, and not the fast labels alone, on streams whose ripening is known.

In the streams positives ripen slowly and negatives fast, or the other way round; the bookings are those of
tests/lifecycle/test_retrain_maturity.py, whose outcome is known weeks after the booking, the later the longer the lead.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import engine
from engine.config import compose, schema, units
from engine.config.tree import Config
from engine.data.make_dataset import ensure_dataset
from engine.errors import UserError
from engine.lifecycle.reproduce import Options, reproduce_run
from engine.runtime.run import Run
from engine.training.splits import END, Cut, _used, cut_instant, find_splits
from engine.training.train import _as_split

D = units.MICROSECONDS["d"]
START = 1_577_836_800_000_000  # 2020-01-01 UTC
TRAIN, VALID, TEST, STOP = (START + day * D for day in (0, 150, 180, 240))
EXPERIMENT = """# @package _global_
name: stream
data:
  name: stream
  sources:
    stream:
      path: stream.parquet
      columns: {row: int64, at: timestamp, known: timestamp, x: float64, z: float64, hit: bool}
  columns:
    row: {type: int64, role: id}
    at: {type: timestamp, role: event_time, known_at: prior, nullable: false}
    known: {type: timestamp, role: time}
    x: {type: float64, role: numeric, known_at: prior}
    z: {type: float64, role: numeric, known_at: prior}
    hit: {type: bool, role: target, known_at: known}
features:
  as_of: at
  direct: {x: true, z: true}
split: {train: ["2020-01-01", "2020-05-30"], valid: ["2020-05-30", "2020-06-29"], test: ["2020-06-29", "2020-08-28"]}
model: {hidden: [8], dropout: 0.1}
train: {epochs: 3, batch_size: 256, precision: fp32, lr: 0.01}
evaluate: {bootstrap: 0}
"""

Stream = dict[str, np.ndarray]


def stream(kind: str, rows: int = 8000, seed: int = 0) -> Stream:
    """Rows over 300 days. A slow label takes 25 days on average, a fast one 2; every 50th never comes; `bookings`: the
    delay is the lead (x) of a stay, and a part of it of a cancellation.
    """
    rng = np.random.default_rng(seed)
    at = START + np.sort(rng.integers(0, 300 * 24 * 60, rows)) * 60_000_000
    x, z = rng.normal(size=(2, rows))
    hit = rng.random(rows) < 1 / (1 + np.exp(1.2 - x + 0.7 * z))
    slow, fast = rng.gamma(2.0, 12.5, rows), rng.gamma(2.0, 1.0, rows)
    days = {
        "fast negatives": np.where(hit, slow, fast),
        "fast positives": np.where(hit, fast, slow),
        "bookings": 20 * np.exp(0.9 * x) * np.where(hit, rng.uniform(0.1, 0.8, rows), 1.0),
        "no delay": np.zeros(rows),
    }[kind]
    known = at + np.round(days * D).astype(np.int64)
    return {"at": at, "known": known, "x": x, "z": z, "hit": hit, "has": np.arange(rows) % 50 != 7}


def write(folder: Path, rows: Stream, keep: np.ndarray | None = None) -> Path:
    """The stream's file and experiment; `keep` are the rows of which the label and its time are written (all)."""
    time, known = pa.timestamp("us", tz="UTC"), rows["has"] if keep is None else rows["has"] & keep
    table = pa.table(
        {
            "row": pa.array(np.arange(len(rows["at"]))),
            "at": pa.array(rows["at"], time),
            "known": pa.array(rows["known"], time, mask=~known),
            "x": rows["x"],
            "z": rows["z"],
            "hit": pa.array(rows["hit"], mask=~known),
        }
    )
    (folder / "conf" / "experiment").mkdir(parents=True)
    (folder / "conf" / "experiment" / "stream.yaml").write_text(EXPERIMENT)
    pq.write_table(table, folder / "stream.parquet")
    return folder


def truncated(rows: Stream, instant: int) -> tuple[Stream, np.ndarray]:
    """The rows before an instant, and which of their labels were known by then."""
    past = {name: values[rows["at"] < instant] for name, values in rows.items()}
    return past, past["known"] <= instant


def train(folder: Path, *more: str) -> Any:
    paths = [f"data.path={folder}", f"paths.store={folder / 'store'}", f"paths.runs={folder / 'runs'}"]
    return engine.run("train", "+experiment=stream", *paths, *more, config_dir=str(folder / "conf"))


def weights(run: Any) -> str:
    return json.loads((run.directory / "run.json").read_text())["chain"]["weights"]


def labels(run: Any) -> dict[str, Any]:
    return json.loads((run.directory / "run.json").read_text())["labels"]


# -------------------------------------------------------------------------------------------- no label from the future


@pytest.mark.parametrize(
    ("kind", "rules"),
    [("fast negatives", ("wait", "weight", "none")), ("bookings", ("wait",))],
    ids=["stream", "bookings"],
)
def test_a_model_is_the_same_to_the_byte_when_all_that_came_after_the_cut_is_deleted(
    tmp_path: Path, kind: str, rules: tuple[str, ...]
) -> None:
    rows = stream(kind, 3000)
    whole = write(tmp_path / "whole", rows)
    past = write(tmp_path / "past", *truncated(rows, TEST))
    found = {}
    for ripening in rules:
        more = (f"split.ripening={ripening}", "train.epochs=1")
        found[ripening] = weights(train(whole, *more))
        assert weights(train(past, *more)) == found[ripening], ripening
    assert len(set(found.values())) == len(rules)


def test_any_reads_what_came_after_the_cut(tmp_path: Path) -> None:
    rows = stream("fast negatives", 3000)
    more = ("split.known_by=any", "train.epochs=1")
    whole, past = write(tmp_path / "whole", rows), write(tmp_path / "past", *truncated(rows, TEST))
    assert weights(train(whole, *more)) != weights(train(past, *more))


def test_training_rows_need_no_label_that_came_after_validation_began(tmp_path: Path) -> None:
    rows = stream("fast negatives", 3000)
    late = (rows["at"] < VALID) & (rows["known"] > VALID)
    found = [train(write(tmp_path / "a", rows), "split.test=[]", "split.ripening=none", "train.epochs=1")]
    found += [train(write(tmp_path / "b", rows, ~late), "split.test=[]", "split.ripening=none", "train.epochs=1")]
    assert late.sum() > 50 and weights(found[0]) == weights(found[1])


# --------------------------------------------------------------------------------------------------------- calibration


@pytest.mark.parametrize(
    "kind",
    [
        "fast negatives",
        "bookings",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("fast positives", "no delay")),
    ],
)
def test_a_model_without_labels_from_the_future_is_as_well_calibrated_on_ripe_rows(tmp_path: Path, kind: str) -> None:
    folder = write(tmp_path, stream(kind, 20_000))
    late = ["split.train=[2020-02-20,2020-05-30]"]  # 100 days, so that the young rows weigh
    late += ["model.kind=linear", "train.metric=log_loss", "train.epochs=15", "train.batch_size=128", "train.lr=0.03"]
    runs = {
        name: train(folder, *late, *words)
        for name, words in (("any", ["split.known_by=any"]), ("wait", []), ("none", ["split.ripening=none"]))
    }
    ece = {name: run.metrics["test/ece"] for name, run in runs.items()}
    assert abs(ece["wait"] - ece["any"]) <= 0.02, ece
    if kind != "no delay":
        assert ece["none"] - ece["any"] > 0.02, ece  # the cut alone keeps the fast labels
    else:
        assert weights(runs["none"]) == weights(runs["wait"]) == weights(runs["any"])


# ------------------------------------------------------------------------------------------------------- what is said


def test_rows_used_and_not_ripe_are_recorded_with_the_share_of_positives(tmp_path: Path) -> None:
    rows = stream("fast negatives", 3000)
    run = train(write(tmp_path, rows), "train.epochs=1")
    said = labels(run)
    record = json.loads((run.directory / "run.json").read_text())
    assert record["config"]["split"]["known_by"] == "auto" and record["config"]["split"]["ripening"] == "wait"
    for period, cut in (("train", VALID), ("valid", TEST)):
        part = said[period]
        assert units.instant(part["known_by"], "UTC") == cut
        start, stop = (units.instant(text, "UTC") for text in part["used"])
        assert stop == pytest.approx(cut - part["maturity_days"] * D, abs=1)
        used = rows["has"] & (rows["at"] >= start) & (rows["at"] < stop) & (rows["known"] <= cut)
        begin, end = (TRAIN, VALID) if period == "train" else (VALID, TEST)
        unripe = rows["has"] & (rows["at"] >= begin) & (rows["at"] < end) & ~used
        assert (part["rows"], part["not_ripe"]) == (used.sum(), unripe.sum())
        assert part["target_mean"] == pytest.approx(rows["hit"][used].mean())
        assert part["target_mean_with_not_ripe"] == pytest.approx(rows["hit"][used | unripe].mean())
        assert run.metrics[f"labels/{period}/not_ripe"] == part["not_ripe"]
        assert run.metrics[f"labels/{period}/target_mean"] == part["target_mean"]
    assert said["valid"]["used"][0] == said["train"]["used"][1] or said["valid"]["rows"] > 200
    assert "known_by" in said["test"] and said["test"]["known_by"] is None and said["test"]["not_ripe"] == 0
    report = (run.directory / "report.html").read_text()
    assert "Label known by" in report and f"{said['train']['not_ripe']:,}" in report and "future" not in report


def test_any_is_called_what_it_is(tmp_path: Path) -> None:
    folder = write(tmp_path, stream("fast negatives", 1000))
    runs = [train(folder, f"split.known_by={text}", "train.epochs=1") for text in ("any", "null")]
    assert weights(runs[0]) == weights(runs[1])
    for run in runs:
        assert "labels from the future may be in it" in (run.directory / "run.log").read_text()
        assert "labels from the future may be in it" in (run.directory / "report.html").read_text()
        assert labels(run)["train"]["not_ripe"] == 0


def test_a_target_without_a_time_is_taken_with_a_warning_and_one_known_before_has_nothing_to_wait_for(
    tmp_path: Path,
) -> None:
    folder = write(tmp_path, stream("fast negatives", 1000))
    silent = train(folder, "data.columns.hit.known_at=null", "train.epochs=1")
    log = (silent.directory / "run.log").read_text()
    assert "data.columns.hit.known_at does not say when a label becomes known: labels from the future" in log
    before = train(folder, "data.columns.hit.known_at=prior", "train.epochs=1")
    assert weights(before) == weights(silent)
    assert labels(before)["train"]["not_ripe"] == 0 and labels(before)["train"]["maturity_days"] == 0


def test_a_period_shorter_than_its_labels_take_is_refused_with_the_ways_out(tmp_path: Path) -> None:
    folder = write(tmp_path, stream("fast positives", 2000))
    short = ["split.train=[2020-05-20,2020-05-30]", "train.epochs=1"]
    with pytest.raises(UserError, match=r"at least \d\d\.\d days old, by when 95 % of labels arrive, found none among"):
        train(folder, *short)
    weighted = train(folder, *short, "split.ripening=weight")
    assert labels(weighted)["train"]["rows"] > 10
    with pytest.raises(
        UserError, match=r"Begin it earlier; or split\.known_by=any"
    ):  # no rule helps where none is known
        train(folder, *short, "split.known_by=2019-12-01")


def test_the_reference_for_performance_holds_the_rows_that_were_watched(tmp_path: Path) -> None:
    run = train(write(tmp_path, stream("fast negatives", 3000)), "train.epochs=1")
    outcomes = pq.read_table(run.directory / "model" / "reference_outcomes.parquet")
    assert outcomes.num_rows == labels(run)["valid"]["rows"]
    assert np.mean(outcomes["target"]) == pytest.approx(labels(run)["valid"]["target_mean"])


# --------------------------------------------------------------------------------------------------------------- cuts


def config_of(**split: Any) -> Config:
    columns = {"row": {"type": "int64", "role": "id"}, "at": {"type": "timestamp", "role": "event_time"}}
    columns["y"] = {"type": "bool", "role": "target", "known_at": "at"}
    data = {"columns": columns, "sources": {"rows": {"path": "rows.csv", "columns": {"row": "int64"}}}}
    return schema.build(Config, {"split": split, "data": data})


def test_the_cut_of_a_period_is_the_beginning_of_the_next_one() -> None:
    periods = {"train": ["2020-01-01", "2020-02-01"], "valid": ["2020-02-03", "2020-03-01"]}
    test = {"test": ["2020-03-05", "2020-04-01"]}

    def cuts(**split: Any) -> list[int | None]:
        config = config_of(**split)
        return [cut_instant(config, name) for name in ("train", "valid", "test") if split.get(name)]

    third, fifth, february = (units.instant(text, "UTC") for text in ("2020-02-03", "2020-03-05", "2020-02-10"))
    assert cuts(**periods, **test) == [third, fifth, None]
    assert cuts(**periods) == [third, END]
    assert cuts(train=periods["train"], **test) == [fifth, None]
    assert cuts(train=periods["train"]) == [END]
    assert cuts(**periods, **test, known_by="2020-02-10") == [february, february, None]
    assert cuts(**periods, known_by="any") == cuts(**periods, known_by=None) == [None, None]


def test_a_word_that_is_no_instant_is_refused() -> None:
    with pytest.raises(UserError, match=r"split\.known_by: auto, any, or an instant must be .*, found 'atuo'"):
        config_of(known_by="atuo")


@given(
    start=st.integers(0, 50), length=st.integers(1, 50), gap=st.integers(0, 20), maturity=st.integers(0, 120),
    earlier=st.none() | st.integers(-50, 50),
)  # fmt: skip
def test_a_period_moves_back_until_its_last_row_is_ripe(
    start: int, length: int, gap: int, maturity: int, earlier: int | None
) -> None:
    stop = start + length
    earliest = None if earlier is None else min(start, start + earlier)
    begin, end = _used(start, stop, Cut(stop + gap, maturity), earliest)
    assert end == min(stop, stop + gap - maturity)
    if earliest is None:
        assert begin == start  # training rows
    else:
        assert earliest <= begin <= start
        assert end - begin == length or begin == earliest  # it keeps its length where there is room


# ----------------------------------------------------------------------------------------------------- earlier records


@pytest.mark.slow
def test_a_run_of_an_engine_without_ripening_is_repeated_as_it_was(tmp_path: Path) -> None:
    folder = write(tmp_path, stream("fast negatives", 1500))
    cut = f"split.known_by={units.format_instant(VALID)}"
    run = train(folder, cut, "split.ripening=none", "train.epochs=1")
    record = json.loads((run.directory / "run.json").read_text())
    del record["config"]["split"]["ripening"]
    (run.directory / "run.json").write_text(json.dumps(record))
    found = reproduce_run(run.directory, Options(code="current", store=folder / "store"))
    assert found["first_difference"] is None


def test_each_of_two_targets_ripens_by_itself_and_is_not_judged_on_rows_that_the_other_has_learnt(
    tmp_path: Path,
) -> None:
    rows = stream("fast negatives", 3000)
    folder = write(tmp_path, rows)
    table = pq.read_table(folder / "stream.parquet")
    seen = pa.array(rows["at"] + D, pa.timestamp("us", tz="UTC"))
    pq.write_table(table.append_column("seen", seen).append_column("y", table["x"]), folder / "stream.parquet")
    more = {"seen": "timestamp", "y": "float64"}
    own = {"seen": {"type": "timestamp", "role": "time"}, "y": {"type": "float64", "known_at": "seen"}}
    words = [f"+data.sources.stream.columns.{name}={kind}" for name, kind in more.items()]
    words += [f"+data.columns.{name}.{key}={value}" for name, column in own.items() for key, value in column.items()]
    words += ["train.targets.later.column=y", "train.targets.later.loss=squared", f"data.path={folder}"]
    words += [f"paths.store={folder / 'store'}", f"paths.runs={folder / 'runs'}"]
    config = compose.compose(["+experiment=stream", *words], str(folder / "conf")).config
    run = Run.create("train", config, schema.plain(config))
    splits = find_splits(config, ensure_dataset(config, run), ("train", "valid", "test"), run)
    run.finish({})
    slow, fast = splits["train"].by_target
    assert slow.used[1] < TRAIN + 120 * D < fast.used[1] and fast.used[1] == pytest.approx(VALID - D, abs=D)
    assert splits["train"].rows.tolist() == sorted({*slow.rows.tolist(), *fast.rows.tolist()})
    learnt = max(slow.rows[-1], fast.rows[-1])
    assert all(part.rows[0] > learnt for part in splits["valid"].by_target if len(part.rows))
    n = len(splits["train"].rows)
    target, _ = _as_split(splits["train"], np.ones((n, 2)), None)
    assert np.isnan(target).sum(axis=0).tolist() == [n - len(slow.rows), n - len(fast.rows)]
    assert not np.isnan(target).all(axis=1).any()
