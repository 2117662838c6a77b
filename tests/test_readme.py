"""What the README shows works as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from engine import commands

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
DAY = 86_400_000_000
START = 1_767_225_600_000_000  # 2026-01-01 UTC


def write_orders(folder: Path) -> None:
    """Seven months of orders, one of which breaks a bound."""
    draw, rows = np.random.default_rng(0), 2_000
    placed = np.sort(START + draw.integers(0, 212 * DAY, rows))
    amount = draw.lognormal(3, 1, rows).round(2)
    fraud = draw.random(rows) < np.clip(amount / 100, 0, 0.9)
    amount[7] = -1
    table = pa.table({
        "order": [f"order-{row}" for row in range(rows)],
        "placed": pa.array(placed, pa.timestamp("us", tz="UTC")),
        "customer": draw.integers(0, 50, rows),
        "country": draw.choice(["DE", "FR", "US", "BR"], rows),
        "amount": amount,
        "settled": pa.array(placed + 5 * DAY, pa.timestamp("us", tz="UTC")),
        "fraud": fraud,
    })  # fmt: skip
    folder.mkdir()
    pq.write_table(table.slice(0, 900), folder / "first.parquet")
    pq.write_table(table.slice(900), folder / "second.parquet")


def test_the_experiment_of_your_own_data_trains(cli) -> None:
    (text,) = re.findall(r"```yaml\n# (mine/experiment/shop\.yaml)\n(.*?)```", README, re.DOTALL)
    (command,) = re.findall(r"python -m engine (train --config-dir mine .*)", README)
    path = Path(text[0])
    path.parent.mkdir(parents=True)
    path.write_text(text[1])
    write_orders(Path("lake"))
    outcome = cli(*command.split(), "train.epochs=2", "evaluate.bootstrap=0")
    assert outcome.code == 0
    assert "1,999 rows from 2 files, 1 quarantined" in outcome.err
    assert "test/roc_auc" in outcome.out
    assert cli("features", "audit", "--rows", "20", *command.split()[1:]).code == 0
    (code,) = re.findall(r"```python\n(import engine\.features\n.*?)```", README, re.DOTALL)
    times = pa.array([START, START + 100 * DAY], pa.timestamp("us", tz="UTC"))
    found: dict[str, Any] = {"customers": pa.table({"customer": [7, 7], "time": times})}
    exec(code, found)
    assert (
        found["table"]["customer_count_30d"].to_pylist()[0] == 0 and found["table"]["customer_count_30d"][1].as_py() > 0
    )


def test_the_table_of_steps_names_commands_that_exist() -> None:
    table = README[README.index("| step | command |") : README.index("Examples for cron")]
    named = re.findall(r"`engine ([a-z ]+?)(?: [A-Z]+)?`", table)
    assert len(named) > 8
    assert set(named) <= set(commands.COMMANDS)
