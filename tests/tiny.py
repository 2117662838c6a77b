"""A small experiment for end-to-end tests: shop visits with a learnable, time-dependent outcome.

`write_tiny(folder)` writes the source file and a config folder; `overrides(folder)` are the words of a command line.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

H = 3_600_000_000
START = 1_577_836_800_000_000  # 2020-01-01 UTC
DATA = """
name: tiny
description: one visit of a shop
sources:
  visits:
    path: visits*.parquet
    columns:
      visit: int64
      shop: string
      at: timestamp
      paid_at: timestamp
      size: float64
      amount: float64
      bought: bool
columns:
  visit: {type: int64, role: id}
  at: {type: timestamp, role: event_time, known_at: prior, nullable: false}
  paid_at: {type: timestamp, role: time}
  shop: {type: string, role: entity, known_at: prior}
  size: {type: float64, role: numeric, known_at: prior}
  amount: {type: float64, role: numeric, known_at: paid_at}
  bought: {type: bool, role: target, known_at: paid_at}
"""
FEATURES = """
as_of: at - 1h
direct: {shop: true, size: true}
calendar:
  at: {column: at, parts: [hour]}
views:
  shop:
    description: how the shop has been doing
    owner: tests
    entity: [shop]
    windows: [6h, 2d]
    aggregates: {rows: [count], bought: [mean], amount: [mean, max]}
"""
EXPERIMENT = """# @package _global_
defaults:
  - /data: tiny
  - /features: tiny
  - _self_
name: tiny
split:
  train: ["2020-01-01", "2020-01-21"]
  valid: ["2020-01-21", "2020-01-26"]
  test: ["2020-01-26", "2020-01-31"]
model: {hidden: [16, 16], dropout: 0.1}
train: {epochs: 2, batch_size: 128, shards: 8, precision: fp32, lr: 0.01}
evaluate: {slices: [shop], bootstrap: 20}
"""


def visits(rows: int = 2000, seed: int = 0) -> pa.Table:
    """`rows` visits over 30 days in random order; every 50th has no outcome yet."""
    rng = np.random.default_rng(seed)
    at = START + np.sort(rng.integers(0, 30 * 24 * 60, rows)) * 60_000_000
    shop = rng.integers(0, 8, rows)
    size = rng.normal(0, 1, rows)
    mood = np.sin(at / (3 * 24 * H) + shop)
    bought = rng.random(rows) < 1 / (1 + np.exp(-(1.5 * mood + size + 0.5 * (shop % 3) - 0.5)))
    unknown = np.arange(rows) % 50 == 7
    table = pa.table(
        {
            "visit": pa.array(2**53 + 1 + np.arange(rows)),
            "shop": pa.array([None if i % 97 == 0 else f"shop-{s}" for i, s in enumerate(shop)]),
            "at": pa.array(at, pa.timestamp("us", tz="UTC")),
            "paid_at": pa.array(
                at + rng.integers(1, 6 * 60, rows) * 60_000_000, pa.timestamp("us", tz="UTC"), mask=unknown
            ),
            "size": pa.array(size, mask=np.arange(rows) % 31 == 3),
            "amount": pa.array(np.round(np.exp(size) * 10, 2), mask=unknown),
            "bought": pa.array(bought, mask=unknown),
        }
    )
    return table.take(pa.array(rng.permutation(rows)))


def write_tiny(folder: Path, rows: int = 2000, seed: int = 0) -> Path:
    """Write `visits.parquet` and `conf/` below `folder`; returns `folder`."""
    for name, text in (("data", DATA), ("features", FEATURES), ("experiment", EXPERIMENT)):
        (folder / "conf" / name).mkdir(parents=True, exist_ok=True)
        (folder / "conf" / name / "tiny.yaml").write_text(text)
    pq.write_table(visits(rows, seed), folder / "visits.parquet")
    return folder


def overrides(folder: Path, *more: str) -> list[str]:
    """Words after the command; pass `--config-dir` yourself: `str(folder / "conf")`."""
    return [
        "+experiment=tiny",
        f"data.path={folder}",
        f"paths.store={folder / 'store'}",
        f"paths.runs={folder / 'runs'}",
        "resources.threads=2",
        *more,
    ]


def alter_delta_log(table: Path, alter: Callable[[dict[str, Any]], Any]) -> None:
    """Change the actions of the first entry of a Delta table's log; `alter` changes each in place."""
    log = table / "_delta_log" / f"{0:020d}.json"
    actions = [json.loads(line) for line in log.read_text().splitlines()]
    for action in actions:
        alter(action)
    log.write_text("\n".join(json.dumps(action) for action in actions))
