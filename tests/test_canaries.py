"""Values of sensitive columns and secrets leave the data nowhere: canaries go through every step, and every byte is looked at."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq

from tests.runtime.fake_wandb import serving

DATA = """
name: ward
sources:
  stays:
    path: stays*.csv
    columns:
      stay: {type: string, sensitive: true}
      clinic: {type: string, sensitive: true}
      patient: {type: string, sensitive: true}
      code: {type: int64, sensitive: true}
      at: timestamp
      size: float64
      sick: bool
columns:
  stay: {type: string, role: id, sensitive: true}
  at: {type: timestamp, role: event_time, known_at: prior, nullable: false}
  clinic: {type: string, role: categorical, known_at: prior, sensitive: true}
  patient: {type: string, role: entity, known_at: prior, sensitive: true}
  code: {type: int64, known_at: prior, sensitive: true, max: 9000000}
  size: {type: float64, role: numeric, known_at: prior}
  sick: {type: bool, role: target, known_at: at + 1h}
rules:
  coded: {holds: "code % 90 <> 51", on_violation: quarantine}
duplicates: first
max_quarantine: 0.1
"""
FEATURES = """
as_of: at - 1h
direct: {clinic: true, patient: true, size: true}
views:
  past: {entity: [patient], windows: [2d], aggregates: {rows: [count], sick: [mean]}}
encode: {min_count: 20, max_categories: 4}
"""
EXPERIMENT = """# @package _global_
defaults: [/data: ward, /features: ward, _self_]
name: ward
split:
  train: ["2020-01-01", "2020-01-21"]
  valid: ["2020-01-21", "2020-01-26"]
  test: ["2020-01-26", "2020-01-31"]
model: {hidden: [8]}
train: {epochs: 1, batch_size: 128, precision: fp32, lr: 0.01}
evaluate: {slices: [clinic, patient], bootstrap: 0}
monitor:
  alerts:
    ops: {kind: command, to: '/bin/sh -c "echo ${oc.env:CANARY_TOKEN} >&2; exit 3"'}
"""
TOKEN = "-".join(("c4nary", "token", "of", "ops"))
CANARY = re.compile(rb"c4nary|73190\d\d")
SENSITIVE = ("stay", "clinic", "patient", "code", "row_id")


def write_ward(folder: Path, rows: int = 1500) -> None:
    for name, text in (("data", DATA), ("features", FEATURES), ("experiment", EXPERIMENT)):
        (folder / "conf" / name).mkdir(parents=True, exist_ok=True)
        (folder / "conf" / name / "ward.yaml").write_text(text)
    rng = np.random.default_rng(0)
    minutes = np.sort(rng.integers(0, 30 * 24 * 60, rows))
    lines = ["stay,clinic,patient,code,at,size,sick"]
    for i, minute in enumerate(minutes):
        at = f"2020-01-{1 + minute // 1440:02d}T{minute // 60 % 24:02d}:{minute % 60:02d}:00Z"
        kind = rng.integers(0, 6)
        clinic = f"c4nary-clinic-{kind}" if i % 150 != 3 else f"c4nary-rare-{i}"
        if i > rows * 0.9 and i % 20 == 1:
            clinic = f"c4nary-new-{i}"
        code = {50: "c4nary-code", 60: "99999999999", 70: "7319099999"}.get(i, str(7319000 + i % 90))
        size = rng.normal()
        sick = rng.random() < 1 / (1 + np.exp(-size - kind / 2 + 1))
        stay = f"c4nary-stay-{i}" if i not in (80, 90) else f"c4nary-stay-{i - 1}"
        if i == 100:
            stay = ""
        lines.append(f"{stay},{clinic},c4nary-patient-{rng.integers(0, 40)},{code},{at},{size:.4f},{str(sick).lower()}")
        if i == 110:
            lines.append(f"c4nary-ragged,{clinic},c4nary-patient,1,2,3,4,5,6,7")
        if i == 120:
            lines.append(lines[-1])
    (folder / "stays.csv").write_text("\n".join(lines) + "\n")


def texts(path: Path) -> Iterator[tuple[str, bytes]]:
    """(what, bytes) of a file: of tables each column's values, the names and the metadata; else the bytes, unpacked too."""
    data = path.read_bytes()
    if path.suffix in (".parquet", ".part"):
        with pq.ParquetFile(path) as file:
            table = file.read()
        yield "schema", str(table.schema.to_string(show_schema_metadata=True)).encode()
    elif path.suffix in (".arrow", ".feather"):
        try:
            table = feather.read_table(path, memory_map=False)
        except pa.ArrowInvalid:
            table = pa.ipc.open_stream(data).read_all()
        yield "schema", str(table.schema.to_string(show_schema_metadata=True)).encode()
    else:
        yield "bytes", gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        return
    for name, column in zip(table.column_names, table.columns, strict=True):
        yield name, json.dumps(column.to_pylist(), default=str).encode()


def found_in(folder: Path, but: tuple[str, ...]) -> list[str]:
    """Each place of a canary below the folder; sensitive columns of the files that are the data itself are passed over."""
    hits = []
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        itself = any(re.search(pattern, str(path.relative_to(folder))) for pattern in but)
        for what, data in texts(path):
            if (match := CANARY.search(data)) and not (itself and what in SENSITIVE):
                near = data[max(0, match.start() - 60) : match.end() + 30]
                hits.append(f"{path.relative_to(folder)} [{what}]: {near!r}")
    return hits


ITSELF = (r"^store/datasets/", r"^store/features/", r"/predictions/", r"/parts/")


def test_no_canary_leaves_the_data(cli, workplace, monkeypatch) -> None:
    monkeypatch.setenv("CANARY_TOKEN", TOKEN)
    write_ward(workplace)
    folders = [f"data.path={workplace}", "paths.store=store", "paths.runs=runs", "resources.threads=2"]
    words = ["--config-dir", "conf", "+experiment=ward", *folders]
    said = []

    def do(*line: str, codes: tuple[int, ...] = (0,)) -> Path:
        outcome = cli(*line)
        said.append(f"$ {' '.join(line[:2])}\n{outcome.out}\n{outcome.err}")
        assert outcome.code in codes, outcome.err
        return outcome.directory if outcome.code in (0, 2, 3) and outcome.out.strip() else Path()

    with serving() as fake:
        for name, value in (("API_KEY", "0" * 40), ("BASE_URL", fake.url)):
            monkeypatch.setenv(f"WANDB_{name}", value)
        do("validate", *words, codes=(0, 1, 2))
        do("ingest", *words)
        do("features", *words)
        model = do("train", *words, "tracking=wandb", "tracking.mode=offline")
        do("evaluate", *words, f"evaluate.model={model}")
        scored = do("score", *words, f"score.model={model}")
        do("monitor", *words, f"monitor.model={model}", f"monitor.run={scored}", codes=(0, 2, 3))
        do("track", "sync", str(model), "tracking.mode=online")
        sent = fake.everything()
    do("data", "show", "ward", *words)
    do("compare", str(model), str(scored), codes=(0, 1))
    assert b"wandb-history" in sent
    leaks = [f"wandb: {sent[max(0, m.start() - 60) : m.end() + 20]!r}" for m in CANARY.finditer(sent)]
    leaks += [line for text in said for line in text.splitlines() if CANARY.search(line.encode())]
    leaks += [leak for leak in found_in(workplace, ITSELF) if not leak.startswith("stays.csv ")]
    assert not leaks, "\n".join(leaks)
    assert open_to_others(workplace / "runs", workplace / "store") == []


def open_to_others(*folders: Path) -> list[str]:
    """Files and folders that somebody else could read."""
    paths = (path for folder in folders for path in (folder, *folder.rglob("*")))
    return [f"{path} {path.stat().st_mode:o}" for path in paths if path.stat().st_mode & 0o077]


def test_a_model_that_says_what_is_sensitive_is_enough_and_a_mode_is_a_choice(cli, workplace, monkeypatch) -> None:
    monkeypatch.setenv("CANARY_TOKEN", TOKEN)
    write_ward(workplace)
    folders = [f"data.path={workplace}", "paths.store=store", "paths.runs=runs", "resources.threads=2"]
    before = os.umask(0o022)
    try:
        trained = cli("train", "--config-dir", "conf", "+experiment=ward", *folders)
        assert trained.code == 0, trained.err
        model = trained.directory
        scored = cli("score", *folders, f"score.model={model}", "score.between=[2020-01-26,2020-01-28]")
        assert scored.code == 0, scored.err
        assert open_to_others(model, scored.directory, workplace / "store") == []
        shown = cli("ingest", "--config-dir", "conf", "+experiment=ward", *folders, "paths.mode=umask")
        assert shown.code == 0, shown.err
        assert shown.directory.stat().st_mode & 0o777 == 0o755
        assert (shown.directory / "run.json").stat().st_mode & 0o777 == 0o644
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)
