"""Values of sensitive columns and secrets leave the data nowhere: canaries go through every step, and every byte is looked at."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

import engine
from engine.data.dataset import open_dataset
from tests.conftest import Outcome
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


class Ward:
    """A folder in which commands are run, and all that they say."""

    def __init__(self, cli: Callable[..., Outcome], folder: Path) -> None:
        self.cli, self.folder, self.said = cli, folder, ""
        folders = (f"data.path={folder}", "paths.store=store", "paths.runs=runs", "resources.threads=2")
        self.words = ("--config-dir", "conf", "+experiment=ward", *folders)
        write_ward(folder)

    def do(self, *line: str, codes: tuple[int, ...] = (0,)) -> Path:
        """Run one command; its run directory, where it has one."""
        outcome = self.cli(*line)
        self.said += f"$ {' '.join(line[:2])}\n{outcome.out}\n{outcome.err}\n"
        assert outcome.code in codes, outcome.err
        return outcome.directory if outcome.code in (0, 2, 3) and outcome.out.strip() else Path()

    def check(self, sent: bytes = b"") -> None:
        """No canary was said or sent or lies outside of the data, and nobody else may read a file."""
        leaks = [f"wandb: {sent[max(0, m.start() - 60) : m.end() + 20]!r}" for m in CANARY.finditer(sent)]
        leaks += [line for line in self.said.splitlines() if CANARY.search(line.encode())]
        leaks += [leak for leak in found_in(self.folder, ITSELF) if not leak.startswith("stays.csv ")]
        assert not leaks, "\n".join(leaks)
        assert open_to_others(self.folder / "runs", self.folder / "store") == []


def assert_same_scores(model: Path, scored: Path) -> None:
    """The bundle gives the same scores from Python, from the texts themselves."""
    dataset = open_dataset(next(Path("store/datasets/ward").glob("*/manifest.json")).parent)
    found = engine.load(model).predict(dataset.read(dataset.schema.names)).select(["row_id", "score"])
    kept = pa.concat_tables(pq.read_table(path, columns=["row_id", "score"]) for path in scored.rglob("part-*.parquet"))
    assert kept.sort_by("row_id").equals(found.sort_by("row_id").cast(kept.schema))


def test_no_canary_leaves_the_data(cli, workplace, monkeypatch) -> None:
    monkeypatch.setenv("CANARY_TOKEN", TOKEN)
    ward = Ward(cli, workplace)
    do, words = ward.do, ward.words
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
    assert b"wandb-history" in sent
    for line in (
        ("data", "show", "ward"), ("compare", str(model), str(scored)), ("features", "list"), ("features", "show", "past"),
        ("lineage", str(scored)), ("runs",),
    ):  # fmt: skip
        do(*line, *words, codes=(0, 1))
    do("ingest", *words, "+data.rules.broken.holds='CAST(clinic AS INT) > 0'", codes=(1,))
    do("score", *words, f"score.model={model}", "features.encode.min_count=${oc.env:CANARY_TOKEN}", codes=(1,))
    do("submit", "train", *words, "registry.why='https://h.example/?sig=c4nary-signed'", codes=(1,))
    assert_same_scores(model, scored)
    ward.check(sent)


@pytest.mark.slow
def test_no_canary_leaves_the_data_by_a_challenger(cli, workplace, monkeypatch) -> None:
    monkeypatch.setenv("CANARY_TOKEN", TOKEN)
    ward = Ward(cli, workplace)
    model = ward.do("train", *ward.words, "split.train=[2020-01-01,2020-01-08]", "split.valid=[2020-01-08,2020-01-12]")
    ward.do("registry", "promote", "ward", str(model), *ward.words)
    settings = (
        "now=2020-01-29", "triggers=[always]", "cool_down=0s", "judge_length=8d", "valid_length=2d", "gate.min_rows=100",
        "gate.min_slice_rows=20", "gate.bootstrap=20",
    )  # fmt: skip
    emptied = [f"split.{name}=[]" for name in ("train", "valid", "test")]
    ward.do("retrain", *ward.words, *(f"retrain.{word}" for word in settings), *emptied, codes=(0, 2, 3))
    ward.check()


def open_to_others(*folders: Path) -> list[str]:
    """Files and folders that somebody else could read."""
    paths = (path for folder in folders for path in (folder, *folder.rglob("*")))
    return [f"{path} {path.stat().st_mode:o}" for path in paths if path.stat().st_mode & 0o077]


def test_a_model_that_says_what_is_sensitive_is_enough_and_a_mode_is_a_choice(cli, workplace, monkeypatch) -> None:
    monkeypatch.setenv("CANARY_TOKEN", TOKEN)
    words = Ward(cli, workplace).words
    before = os.umask(0o022)
    try:
        trained = cli("train", *words)
        assert trained.code == 0, trained.err
        model = trained.directory
        scored = cli("score", *words[3:], f"score.model={model}", "score.between=[2020-01-26,2020-01-28]")
        assert scored.code == 0, scored.err
        assert open_to_others(model, scored.directory, workplace / "store") == []
        shown = cli("ingest", *words, "paths.mode=umask")
        assert shown.code == 0, shown.err
        assert shown.directory.stat().st_mode & 0o777 == 0o755
        assert (shown.directory / "run.json").stat().st_mode & 0o777 == 0o644
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)
