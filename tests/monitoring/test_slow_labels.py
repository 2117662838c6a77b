"""Quality before labels where positives are known later than negatives: the rows that it is estimated from are old enough."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import engine
from engine import __main__ as shell
from tests.tiny import H, overrides, visits, write_tiny


def test_slow_positives_do_not_make_the_estimated_share_of_positives_small(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, 3000)
    table = visits(3000)
    at, bought = (table[name].combine_chunks() for name in ("at", "bought"))
    late = np.where(np.asarray(bought.fill_null(False)), 12 * 24 * H, H)
    paid = pa.array(np.asarray(at.cast(pa.int64())) + late, at.type, mask=np.asarray(bought.is_null()))
    pq.write_table(table.set_column(table.column_names.index("paid_at"), "paid_at", paid), folder / "visits.parquet")
    words = overrides(folder, "split.train=[2020-01-01,2020-01-11]", "split.valid=[2020-01-11,2020-01-18]", "split.test=[]",
                      "split.known_by=any", "features.views.shop.aggregates={rows: [count]}", "monitor.resamples=60")  # fmt: skip
    trained = engine.run("train", *words, config_dir=str(folder / "conf"))
    asked = ["monitor.window=[2020-01-28,2020-01-31]", "monitor.recent=7d", f"monitor.model={trained.directory}"]
    assert shell.main(["monitor", "--config-dir", str(folder / "conf"), *words, *asked]) in (0, 2)
    record = json.loads((next((folder / "runs/monitor/tiny").iterdir()) / "drift.json").read_text())
    true = np.mean(np.asarray(bought.drop_null()))
    assert abs(record["estimated"]["labels"]["positive_rate"]["value"] - true) < 0.1
