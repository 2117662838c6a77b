"""Tables of many columns: what a command does grows with their number, not with its square."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pandas as pd
import pytest

import engine
from engine.features.encode import Encoder
from engine.features.numbers import NumericColumn
from engine.features.spec import Feature
from engine.training import drift_reference

ROWS = 300
ROOT = Path(engine.__file__).resolve().parents[1]
WINDOW = "[2024-01-11,2024-01-13]"


def write_wide(folder: Path, columns: int) -> Path:
    """A source of `columns` numbers (a tenth of them texts) and a config that makes a feature of each."""
    rng = np.random.default_rng(1)
    numbers = {f"c{number:04d}": rng.normal(size=ROWS).round(4) for number in range(columns)}
    texts = [name for name in numbers if name.endswith("7")]
    frame = pd.DataFrame({"key": range(ROWS), "t": pd.date_range("2024-01-01", periods=ROWS, freq="h"), **numbers})
    frame[texts] = np.where(frame[texts] > 0, "much", "little")
    frame["y"] = (frame["c0000"] > 0).astype(int)
    kinds = {name: "string" if name in texts else "float64" for name in numbers}
    files = {
        "data": ["name: wide", "sources:", "  wide:", f"    path: {folder}/wide.csv", "    columns:", "      key: int64",
            "      t: timestamp",
            *(f"      {name}: {kind}" for name, kind in kinds.items()), "      y: int64", "columns:",
            "  key: {type: int64, role: id, known_at: prior}",
            "  t: {type: timestamp, role: event_time, known_at: prior}",
            *(f"  {name}: {{type: {kind}, known_at: prior}}" for name, kind in kinds.items()),
            "  y: {type: int64, role: target, known_at: prior}"],
        "experiment": ["# @package _global_", "defaults: [{/data: wide}]", "name: wide", "features:", "  as_of: t",
            "  direct:", *(f"    {name}: true" for name in kinds),
            "split: {train: ['2024-01-01', '2024-01-09'], valid: ['2024-01-09', '2024-01-11'], "
            f"test: {WINDOW}}}", "model: {hidden: [8]}", "train: {epochs: 1}"],
    }  # fmt: skip
    for name, lines in files.items():
        (folder / "conf" / name).mkdir(parents=True)
        (folder / "conf" / name / "wide.yaml").write_text("\n".join(lines) + "\n")
    frame.to_csv(folder / "wide.csv", index=False)
    return folder


@contextmanager
def counted_lines() -> Iterator[Counter[str]]:
    """Lines of the engine and its kernels that Python runs meanwhile, by file; a turn of a loop is at least one."""
    lines: Counter[str] = Counter()

    def of_frame(frame: FrameType, _event: str, _value: Any) -> Callable[..., Any] | None:
        name = frame.f_code.co_filename
        if not name.startswith((f"{ROOT}/engine", f"{ROOT}/kernels")):
            return None

        def of_line(_frame: FrameType, event: str, _value: Any) -> Any:
            lines[name] += event == "line"
            return of_line

        return of_line

    before = sys.gettrace()
    threading.settrace(of_frame)
    sys.settrace(of_frame)
    try:
        yield lines
    finally:
        sys.settrace(before)
        threading.settrace(before)  # type: ignore[arg-type]


def work_of_commands(folder: Path, columns: int) -> dict[str, int]:
    """Lines that each command runs on a dataset of so many columns."""
    words = [
        f"paths.store={folder}/store", f"paths.runs={folder}/runs", "resources.threads=1", "cluster=local",
        "tracking=off", f"score.between={WINDOW}", f"monitor.window={WINDOW}", "features.encode.min_count=1",
    ]  # fmt: skip
    write_wide(folder, columns)
    model, work = "", {}
    for command in ("ingest", "validate", "train", "score", "monitor"):
        named = [f"{command}.model={model}"] if command in ("score", "monitor") else []
        with counted_lines() as lines:
            run = engine.run(command, "+experiment=wide", *words, *named, config_dir=str(folder / "conf"))
        model = str(run.directory) if command == "train" else model
        work[command] = lines.total()
    return work


@pytest.mark.slow
def test_the_work_of_a_command_grows_with_the_columns_not_with_their_square(tmp_path: Path) -> None:
    small, middle, large = (work_of_commands(tmp_path / str(columns), columns) for columns in (16, 32, 64))
    growth = {name: (large[name] - middle[name]) / (middle[name] - small[name]) for name in small}
    assert max(growth.values()) < 2.3, growth  # 2 where it is linear, 4 where it is quadratic


def test_the_importance_of_many_features_is_measured_on_fewer_rows() -> None:
    features, scored = 2000, 0

    def score(numeric: np.ndarray, _: np.ndarray) -> np.ndarray:
        nonlocal scored
        scored += len(numeric)
        return numeric[:, 0] + 2 * numeric[:, features - 1]

    rng = np.random.default_rng(0)
    block = rng.normal(size=(2000, features)).astype(np.float32)
    columns = tuple(NumericColumn(f"c{number}", "standardise", 0, 1, 0, 1, False) for number in range(features))
    encoder = Encoder(tuple(Feature(f"c{number}", "numeric", "direct") for number in range(features)), columns, (), 8)
    found = drift_reference.permutation_importance(encoder, score, block, np.empty((2000, 0), np.int32))
    assert [name for name, value in found.items() if value] == ["c0", f"c{features - 1}"]
    assert found[f"c{features - 1}"] > 1.5 * found["c0"]
    assert scored <= (features + 1) * drift_reference.FEWEST_ROWS
