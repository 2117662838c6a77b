"""Label maturity: a twin of hotel bookings, whose outcome is known 74 days after the booking on average.

A cancellation is known sooner than a stay, so the rows of last month whose label is known are mostly cancelled ones: to
train on them is to learn a rate that does not exist.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import engine
from engine import __main__ as shell
from engine.config import units

D = units.MICROSECONDS["d"]
START = 1_420_070_400_000_000  # 2015-01-01 UTC
ROWS = 6000
NOW = START + 300 * D
EXPERIMENT = """# @package _global_
name: bookings
data:
  name: bookings
  sources:
    bookings:
      path: bookings.parquet
      columns: {booking: int64, booked: timestamp, settled: timestamp, lead: float64, agent: string, cancelled: bool}
  columns:
    booking: {type: int64, role: id}
    booked: {type: timestamp, role: event_time, known_at: prior, nullable: false}
    settled: {type: timestamp, role: time}
    lead: {type: float64, role: numeric, known_at: prior}
    agent: {type: string, role: entity, known_at: prior}
    cancelled: {type: bool, role: target, known_at: settled}
features:
  as_of: booked
  direct: {lead: true, agent: true}
model: {hidden: [8], dropout: 0}
train: {epochs: 1, batch_size: 256, precision: fp32}
"""


def bookings() -> dict[str, np.ndarray]:
    """Booking time, lead, outcome and when it is settled; every 40th booking is never settled."""
    rng = np.random.default_rng(5)
    booked = START + np.sort(rng.integers(0, 360 * 24 * 60, ROWS)) * 60_000_000
    lead = np.round(rng.gamma(1.6, 64, ROWS), 3)
    cancelled = rng.random(ROWS) < 1 / (1 + np.exp(1.0 - lead / 150))
    share = np.where(cancelled, rng.uniform(0.1, 0.8, ROWS), 1.0)  # a stay is known at its end
    settled = booked + np.round(lead * share * D).astype(np.int64)
    return {
        "booked": booked,
        "lead": lead,
        "cancelled": cancelled,
        "settled": settled,
        "never": np.arange(ROWS) % 40 == 3,
    }


@pytest.fixture(scope="module")
def hotel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hotel")
    made = bookings()
    time = pa.timestamp("us", tz="UTC")
    rng = np.random.default_rng(6)
    table = pa.table(
        {
            "booking": pa.array(np.arange(ROWS)),
            "booked": pa.array(made["booked"], time),
            "settled": pa.array(made["settled"], time, mask=made["never"]),
            "lead": made["lead"],
            "agent": pa.array(np.where(rng.random(ROWS) < 0.5, "direct", "travel")),
            "cancelled": pa.array(made["cancelled"], mask=made["never"]),
        }
    )
    pq.write_table(table.take(rng.permutation(ROWS)), folder / "bookings.parquet")
    (folder / "conf" / "experiment").mkdir(parents=True)
    (folder / "conf" / "experiment" / "bookings.yaml").write_text(EXPERIMENT)
    return folder


def run(command: str, folder: Path, *more: str) -> Any:
    paths = [f"data.path={folder}", f"paths.store={folder / 'store'}", f"paths.runs={folder / 'runs'}"]
    return engine.run(command, "+experiment=bookings", *paths, *more, config_dir=str(folder / "conf"))


def test_the_twin_is_what_it_says() -> None:
    made = bookings()
    delay = (made["settled"] - made["booked"])[~made["never"]] / D
    assert 70 < delay.mean() < 78
    late = (made["booked"] > NOW - 30 * D) & (made["settled"] <= NOW) & (made["booked"] < NOW)
    assert made["cancelled"][late].mean() > made["cancelled"].mean() + 0.15  # the bias that maturity is for


def test_a_training_reads_exactly_the_rows_known_then(hotel: Path) -> None:
    made = bookings()
    split = ["split.train=[2015-01-01,2015-08-01]", "split.valid=[2015-08-01,2015-09-01]"]
    counts = {}
    for part, start, stop in (("train", "2015-01-01", "2015-08-01"), ("valid", "2015-08-01", "2015-09-01")):
        inside = (made["booked"] >= units.instant(start, "UTC")) & (made["booked"] < units.instant(stop, "UTC"))
        counts[part] = int((inside & ~made["never"] & (made["settled"] <= NOW)).sum())
        assert counts[part] < int((inside & ~made["never"]).sum())  # some labels came later
    rule = [f"split.known_by={units.format_instant(NOW)}", "split.ripening=none"]
    done = run("train", hotel, *split, *rule, "train.resume=never")
    assert done.metrics["train/rows"] == counts["train"]
    assert done.metrics["valid/rows"] == counts["valid"]


def test_a_label_known_at_the_very_instant_counts(hotel: Path) -> None:
    made = bookings()
    settled = np.sort(made["settled"][~made["never"] & (made["booked"] < units.instant("2015-04-01", "UTC"))])
    instant = int(settled[len(settled) // 2])
    for shift, expected in ((0, len(settled) // 2 + 1), (-1, len(settled) // 2)):
        rule = [f"split.known_by={units.format_instant(instant + shift)}", "split.ripening=none"]
        done = run("train", hotel, "split.train=[2015-01-01,2015-04-01]", *rule)
        assert done.metrics["train/rows"] == expected


def test_retrain_leaves_out_the_time_whose_labels_are_not_ripe(hotel: Path) -> None:
    made = bookings()
    early = ["split.train=[2015-01-01,2015-02-01]", "split.known_by=2015-05-01", "split.ripening=none"]
    first = run("train", hotel, *early)
    paths = f"paths.runs={hotel / 'runs'}"
    assert shell.main(["registry", "promote", "bookings", str(first.directory), paths]) == 0
    done = run(
        "retrain", hotel, f"retrain.now={units.format_instant(NOW)}", "retrain.triggers=[volume]",
        "retrain.min_new_rows=500", "retrain.judge_length=20d", "retrain.gate.min_rows=100", "retrain.valid_length=10d",
    )  # fmt: skip
    decision = json.loads((done.directory / "decision.json").read_text())
    periods = {name: value for name, value in decision["periods"].items()}
    delay = made["settled"] - made["booked"]
    ripe = np.quantile(delay[~made["never"]], 0.95)
    assert decision["label_horizon_us"] == pytest.approx(ripe, rel=0.15)
    assert periods["stop"] == NOW - decision["label_horizon_us"]
    usable = ~made["never"] & (made["settled"] <= NOW)
    trained = usable & (made["booked"] >= periods["start"]) & (made["booked"] < periods["valid"])
    judged = usable & (made["booked"] >= periods["judge"]) & (made["booked"] < periods["stop"])
    new = usable & (made["booked"] >= units.instant("2015-02-01", "UTC")) & (made["booked"] < periods["stop"])
    assert decision["train_rows"] == int(trained.sum())
    assert decision["judged"]["rows"] == int(judged.sum())
    assert decision["facts"]["new_rows"] == int(new.sum())
    rate, truth = made["cancelled"][trained].mean(), made["cancelled"].mean()
    assert abs(rate - truth) < 0.03  # no bias of quick labels
