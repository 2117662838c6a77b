"""Rows that have no label yet: scored from a file of their own, from new files of the dataset, and from Python."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

import engine
from engine.config.compose import compose
from engine.config.tree import Config
from engine.config.units import Moment
from engine.errors import UserError
from engine.features import required_columns
from engine.runtime import storage
from engine.runtime.run import Run
from engine.scoring import export
from engine.scoring.plan import check_columns
from engine.scoring.predictor import load
from engine.scoring.read import predictions
from tests.conftest import Outcome
from tests.scoring.conftest import ROWS, Shop, rows_of
from tests.tiny import DATA, overrides, visits

Score = Callable[..., Run]
Cli = Callable[..., Outcome]
LATE = ["paid_at", "amount", "bought"]  # known after the decision
SPAN = ("2020-01-27", "2020-01-29")


def instant(day: str) -> pa.Scalar:
    return pa.scalar(datetime.datetime.fromisoformat(day).replace(tzinfo=datetime.UTC), pa.timestamp("us", "UTC"))


def new_visits() -> pa.Table:
    """The visits of two days as they are known when they are decided on."""
    start, stop = map(instant, SPAN)
    table = visits(ROWS)
    table = table.filter(pc.and_(pc.greater_equal(table["at"], start), pc.less(table["at"], stop)))
    return table.drop_columns(LATE)


def write(path: Path, table: pa.Table) -> Path:
    if path.suffix == ".csv":
        pacsv.write_csv(table, path)
    elif path.suffix == ".jsonl":
        rows = [
            {k: v.isoformat() if hasattr(v, "isoformat") else v for k, v in row.items()} for row in table.to_pylist()
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(table, path)
    return path


@pytest.fixture(scope="module")
def by_dataset(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """Scores of the same visits, as rows of the dataset that knows all."""
    runs = tmp_path_factory.mktemp("runs")
    return rows_of(
        engine.run("score", *shop.words(f"score.between=[{','.join(SPAN)}]", runs=runs), config_dir=shop.conf)
    )


def csv_rows(path: Path) -> list[dict[str, Any]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def read_scores(path: Path) -> list[tuple[str, np.float32]]:
    if path.suffix == ".csv":
        rows: list[dict[str, Any]] = csv_rows(path)
    elif path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    else:
        rows = pq.read_table(path).to_pylist()
    return [(row["row_id"], np.float32(row["score"])) for row in rows]


def expected(table: pa.Table) -> list[tuple[str, np.float32]]:
    return list(zip(table["row_id"].to_pylist(), np.asarray(table["score"]), strict=True))


def test_one_csv_without_labels_in_and_one_csv_of_scores_out_by_the_shell(
    shop: Shop, by_dataset: pa.Table, tmp_path: Path, cli: Cli
) -> None:
    write(tmp_path / "new.csv", new_visits())
    done = cli("score", f"score.model={shop.model}", "score.input=new.csv", "score.output=out.csv")
    assert done.code == 0, done.err
    said = done.out + done.err
    assert read_scores(tmp_path / "out.csv") == expected(by_dataset), "the same bits in the order of time and ids"
    lines = csv_rows(tmp_path / "out.csv")
    assert list(lines[0]) == ["row_id", "visit", "at", "decided_at", "score", "decision"]
    assert lines[0]["visit"] == lines[0]["row_id"] and lines[0]["at"].endswith("Z")
    assert "windows look back on score.input and on dataset tiny" in said and f"{ROWS:,} rows, the last event" in said
    assert "score.input has no amount, bought, paid_at: not needed to score" in said.replace(
        "paid_at, amount, bought", "amount, bought, paid_at"
    )
    assert not list(tmp_path.glob("store/datasets/*")), "the store keeps nothing of the input"
    (run,) = (tmp_path / "runs" / "score").glob("*/*")
    assert not (run / "input").exists() and (run / "DONE").exists()
    assert expected(predictions(run)) == expected(by_dataset), "beside the file the run has its predictions"


@pytest.mark.parametrize(("here", "there"), [("csv", "parquet"), ("jsonl", "jsonl"), ("parquet", "csv")])
def test_formats_go_by_the_names_of_the_files(
    shop: Shop, score: Score, by_dataset: pa.Table, tmp_path: Path, here: str, there: str
) -> None:
    out = tmp_path / f"out.{there}"
    run = score(f"score.input={write(tmp_path / f'new.{here}', new_visits())}", f"score.output={out}")
    assert read_scores(out) == expected(by_dataset)
    assert run.metrics["score/rows"] == by_dataset.num_rows
    assert run.record["outputs"]["file"]


def test_labels_that_are_there_change_nothing_and_bad_ones_lose_no_row(
    score: Score, by_dataset: pa.Table, tmp_path: Path
) -> None:
    table = new_visits()
    labels = pa.array(["maybe", "", "true", None] * table.num_rows)[: table.num_rows]
    new = write(tmp_path / "new.csv", table.append_column("bought", labels))
    run = score(f"score.input={new}", f"score.output={tmp_path / 'out.csv'}")
    assert read_scores(tmp_path / "out.csv") == expected(by_dataset)
    assert run.metrics["score/rows_quarantined_at_ingest"] == 0


def test_rows_that_break_the_schema_are_quarantined_and_counted(
    score: Score, by_dataset: pa.Table, tmp_path: Path
) -> None:
    table = new_visits()
    sizes = pa.array(["large", *table["size"].cast(pa.string()).to_pylist()[1:]])
    new = write(tmp_path / "new.csv", table.set_column(table.column_names.index("size"), "size", sizes))
    run = score(f"score.input={new}", f"score.output={tmp_path / 'out.csv'}")
    lost = str(table["visit"][0])
    assert read_scores(tmp_path / "out.csv") == [pair for pair in expected(by_dataset) if pair[0] != lost]
    assert run.metrics["score/rows_quarantined_at_ingest"] == 1
    found = storage.read_parquet(run.directory / "quarantine" / "ingest.parquet").to_pylist()
    assert [(row["file"], row["row"], row["value"]) for row in found] == [(str(new), 1, "large")]


def test_what_describes_a_row_is_demanded_and_the_message_says_so(score: Score, tmp_path: Path) -> None:
    new = write(tmp_path / "new.csv", new_visits().drop_columns(["size"]))
    with pytest.raises(
        UserError, match=r"'size' is missing; .* needs it of every row \(visit, at, shop, size\): give the"
    ):
        score(f"score.input={new}")


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_an_input_without_rows_gives_a_file_with_its_columns_only(score: Score, tmp_path: Path, suffix: str) -> None:
    new = write(tmp_path / f"new.{suffix}", new_visits().slice(0, 0))
    score(f"score.input={new}", f"score.output={tmp_path / 'out.csv'}")
    assert (tmp_path / "out.csv").read_text() == '"row_id","visit","at","decided_at","score","decision"\n'


def test_rows_later_than_the_stored_ones_look_back_on_both(shop: Shop, by_dataset: pa.Table, tmp_path: Path) -> None:
    """The store ends where the input begins: windows see the store's rows and the input's own."""
    whole, start = visits(ROWS), instant(SPAN[0])
    pq.write_table(whole.filter(pc.less(whole["at"], start)), tmp_path / "visits.parquet")
    words = overrides(tmp_path)
    engine.run("ingest", *words, config_dir=shop.conf)
    labelled = whole.filter(pc.is_in(whole["visit"], new_visits()["visit"].combine_chunks()))
    new = write(tmp_path / "new.parquet", labelled)
    run = engine.run(
        "score", f"score.model={shop.model}", f"score.input={new}", f"paths.store={tmp_path / 'store'}",
        f"paths.runs={tmp_path / 'runs'}",
    )  # fmt: skip
    assert expected(rows_of(run)) == expected(by_dataset)
    alone = engine.run(
        "score", f"score.model={shop.model}", f"score.input={new}", "score.history=input",
        f"paths.store={tmp_path / 'store'}", f"paths.runs={tmp_path / 'runs'}",
    )  # fmt: skip
    assert "windows look back on the rows of score.input alone" in (alone.directory / "run.log").read_text()
    assert expected(rows_of(alone)) != expected(by_dataset)


def test_without_a_history_the_run_stops_and_each_way_on_that_it_names_works(shop: Shop, tmp_path: Path) -> None:
    model = tmp_path / "model"  # a bundle that no training run lies beside
    model.mkdir()
    for path in (shop.model / "model").rglob("*"):
        if path.is_file():
            storage.link(path, model / path.relative_to(shop.model / "model"))
    words = [
        f"score.model={model}",
        f"score.input={write(tmp_path / 'new.csv', new_visits())}",
        f"paths.runs={tmp_path}",
    ]
    with pytest.raises(UserError, match=r"found none in .*store/datasets/tiny\..*paths\.store.*score\.history=input"):
        engine.run("score", *words, f"paths.store={tmp_path / 'store'}")
    engine.run("score", *words, f"paths.store={shop.folder / 'store'}")
    engine.run("score", *words, f"paths.store={tmp_path / 'store'}", "score.history=input")


def test_a_history_by_digest_and_one_of_another_specification(shop: Shop, tmp_path: Path) -> None:
    new = write(tmp_path / "new.csv", new_visits())
    words = [f"score.model={shop.model}", f"score.input={new}", f"paths.runs={tmp_path / 'runs'}"]
    store = shop.folder / "store"
    run = engine.run("score", *words, f"paths.store={store}")
    named = engine.run("score", *words, f"paths.store={store}", f"score.history={run.record['used']['history'][:12]}")
    assert named.record["chain"]["scores"] == run.record["chain"]["scores"]
    again = engine.run("score", *shop.words("data.min_rows=1", "data.sources.visits.unexpected=ignore", runs=tmp_path / "runs"),
                       config_dir=shop.conf)  # fmt: skip
    assert len(list((store / "datasets" / "tiny").glob("*/manifest.json"))) > 1, "two recipes of one content"
    assert again.record["chain"]["dataset"] == run.record["used"]["history"]
    engine.run("score", *words, f"paths.store={store}", f"score.history={run.record['used']['history']}")
    with pytest.raises(UserError, match=r"score\.history must name one dataset in .* found 0 for 'beef'"):
        engine.run("score", *words, f"paths.store={store}", "score.history=beef")
    other = tmp_path / "other"
    (other / "data").mkdir(parents=True)
    text = DATA.replace("amount: {type: float64, role: numeric", "amount: {type: float32, role: numeric")
    (other / "data" / "tiny.yaml").write_text(text)
    table = visits(100)
    table = table.set_column(table.column_names.index("amount"), "amount", pa.array([1.5] * 100))
    pq.write_table(table, other / "visits.parquet")
    engine.run("ingest", "+data=tiny", f"data.path={other}", f"paths.store={tmp_path / 'store'}",
               f"paths.runs={tmp_path / 'runs'}", config_dir=str(other))  # fmt: skip
    with pytest.raises(UserError, match=r"must have column 'amount' of type float64 as the model has, found float32"):
        engine.run("score", *words, f"paths.store={tmp_path / 'store'}")


@pytest.mark.parametrize(("words", "message"), [
    (("score.output=out.tsv",), r"score\.output must be a folder or end in \.csv, \.jsonl, \.parquet, found 'out\.tsv'"),
    (("score.output=out.xlsx",), r"score\.output must be a folder or end in \.csv, \.jsonl, \.parquet, found 'out\.xlsx'"),
    (("score.output=out.csv.gz",), r"found 'out\.csv\.gz'"),
    (("score.history=input",), r"history=input needs score\.input"),
    (("score.input=nothing.csv",), r"nothing\.csv must exist, found nothing"),
])  # fmt: skip
def test_words_that_lead_nowhere_are_refused(score: Score, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        score(*words)


@pytest.mark.parametrize("name", ["new.csv", "new.jsonl", "new.parquet"])
def test_an_empty_file_of_rows_is_refused_without_a_way_to_leave_rows_out(
    score: Score, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=rf"{name} is empty: it must hold") as refused:
        score(f"score.input={tmp_path / name}")
    assert "refused" not in str(refused.value)


@pytest.mark.parametrize("kind", ["as it is", "glob", "link"])
def test_scores_never_take_the_place_of_the_rows_that_are_scored(score: Score, tmp_path: Path, kind: str) -> None:
    new = write(tmp_path / "new.csv", new_visits())
    before = new.read_bytes()
    (tmp_path / "link.csv").symlink_to(new)
    words = {
        "as it is": (f"score.input={new}", f"score.output={new}"),
        "glob": (f"score.input={tmp_path}/n*.csv", f"score.output={tmp_path}/sub/../new.csv"),
        "link": (f"score.input={new}", f"score.output={tmp_path / 'link.csv'}"),
    }[kind]
    with pytest.raises(UserError, match=r"score\.output must be another file than those that are read, found .*\.csv"):
        score(*words)
    assert new.read_bytes() == before


def test_ids_that_a_file_holds_twice_stop_the_run_without_a_word_that_scoring_would_refuse(
    score: Score, tmp_path: Path
) -> None:
    table, out = new_visits(), tmp_path / "out.csv"
    new = write(tmp_path / "new.parquet", pa.concat_tables([table, table.slice(0, 3)]))
    with pytest.raises(UserError, match=r"must be unique, found 6 rows .* remove repeated ids") as refused:
        score(f"score.input={new}", f"score.output={out}")
    assert "set data.duplicates" not in str(refused.value) and not out.exists()
    score(f"score.input={write(new, table)}", f"score.output={out}")
    assert len(csv_rows(out)) == table.num_rows


def test_an_id_called_like_a_column_of_the_output_is_named_with_what_can_be_done(shop: Shop) -> None:
    config = config_of(shop)
    columns = {("score" if name == "visit" else name): item for name, item in config.data.columns.items()}
    data = dataclasses.replace(config.data, columns=columns)
    config = dataclasses.replace(config, data=data)
    check_columns(config)  # a folder repeats no ids
    into_file = dataclasses.replace(config, score=dataclasses.replace(config.score, output="out.csv"))
    with pytest.raises(UserError, match=r"repeats data\.columns\.score .* let score\.output be a folder"):
        check_columns(into_file)


def test_a_dataset_goes_into_one_file_too_and_a_folder_that_ends_in_a_suffix_stays_one(
    score: Score, by_dataset: pa.Table, tmp_path: Path
) -> None:
    between = f"score.between=[{','.join(SPAN)}]"
    score(between, f"score.output={tmp_path / 'out.csv'}", "score.columns=[shop,bought]")
    assert read_scores(tmp_path / "out.csv") == expected(by_dataset)
    assert csv_rows(tmp_path / "out.csv")[0].keys() == {
        "row_id", "visit", "at", "decided_at", "shop", "bought", "score", "decision",
    }  # fmt: skip
    (tmp_path / "out.parquet").mkdir()
    score(between, f"score.output={tmp_path / 'out.parquet'}")
    assert pq.read_table(tmp_path / "out.parquet").num_rows == by_dataset.num_rows


def test_a_killed_file_is_absent_and_the_same_command_writes_it(
    score: Score, by_dataset: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (f"score.input={write(tmp_path / 'new.csv', new_visits())}", f"score.output={tmp_path / 'out.csv'}")
    laid_out, calls = export.laid_out, []

    def die(*arguments: Any) -> pa.Table:
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return laid_out(*arguments)

    monkeypatch.setattr(export, "laid_out", die)
    with pytest.raises(KeyboardInterrupt):
        score(*words)
    assert not list(tmp_path.glob("*out.csv*"))
    run = score(*words)
    assert run.resumed and run.metrics["score/units_scored"] == 0
    assert read_scores(tmp_path / "out.csv") == expected(by_dataset)


# --------------------------------------------------------------------------------------- files of the dataset, Python


def test_a_new_file_of_the_dataset_needs_no_target_while_training_still_does(
    shop: Shop, by_dataset: pa.Table, tmp_path: Path, cli: Cli
) -> None:
    whole, new = visits(ROWS), new_visits()
    pq.write_table(
        whole.filter(pc.invert(pc.is_in(whole["visit"], new["visit"].combine_chunks()))), tmp_path / "visits-1.parquet"
    )
    pq.write_table(new, tmp_path / "visits-2.parquet")
    words = overrides(tmp_path, f"score.model={shop.model}", f"score.between=[{','.join(SPAN)}]")
    run = engine.run("score", *words, config_dir=shop.conf)
    assert [row[0] for row in expected(rows_of(run))] == [row[0] for row in expected(by_dataset)]
    assert "column 'paid_at' is missing in" in (run.directory / "run.log").read_text()
    with pytest.raises(UserError, match="column 'paid_at' is missing"):
        engine.run("train", *words, config_dir=shop.conf)
    done = cli("features", "latest", "shop", *overrides(tmp_path), "--config-dir", shop.conf, "--json")
    assert done.code == 0, done.err
    assert len(json.loads(done.out)) == 8


def test_events_without_what_becomes_of_them_are_predicted_with_a_history(shop: Shop, by_dataset: pa.Table) -> None:
    predictor = load(shop.model)
    new = new_visits().sort_by([("at", "ascending"), ("visit", "ascending")])
    found = predictor.predict(new, history=visits(ROWS))
    assert expected(found) == expected(by_dataset)
    with pytest.raises(
        UserError, match="history must be given, because windows look back on 'bought', which the events do not"
    ):
        predictor.predict(new)
    with pytest.raises(UserError, match="history must have column 'bought', which windows look back on"):
        predictor.predict(new, history=visits(ROWS).drop_columns(["bought"]))
    assert predictor.predict(new, history=visits(ROWS).slice(0, 0)).num_rows == new.num_rows


def config_of(shop: Shop, **changes: Any) -> Config:
    config = compose(overrides(shop.folder), shop.conf).config
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))


@pytest.mark.parametrize(("column", "changes", "needed"), [
    ("bought", {}, False),
    ("bought", {"nullable": False}, False),
    ("bought", {"known_at": Moment("prior")}, False),
    ("amount", {}, False),
    ("amount", {"known_at": Moment("at")}, False),  # at the event, an hour after the decision
    ("amount", {"known_at": Moment("at - 2h")}, True),
    ("amount", {"known_at": Moment("prior")}, True),
    ("paid_at", {"known_at": Moment("prior")}, True),
    ("shop", {}, True),
    ("visit", {}, True),
    ("at", {}, True),
    ("size", {}, True),
])  # fmt: skip
def test_demanded_is_what_is_known_of_a_row_at_its_decision(
    shop: Shop, column: str, changes: dict[str, Any], needed: bool
) -> None:
    columns = compose(overrides(shop.folder), shop.conf).config.data.columns
    config = config_of(shop, columns={**columns, column: dataclasses.replace(columns[column], **changes)})
    assert (column in required_columns.demanded(config.data, config.features)) == needed
    assert column in required_columns.demanded(config.data, config.features, [column]), (
        "what goes to the output is demanded"
    )
    relaxed = required_columns.for_scoring(config.data, config.features)
    assert relaxed.sources["visits"].columns[column].missing == ("fail" if needed else "null")
    assert needed or relaxed.columns[column].nullable


SQL = {
    'SELECT visit, "at", paid_at, shop, size, amount, bought FROM visits': LATE,
    "SELECT * REPLACE (amount > 3 AS bought) FROM visits": LATE,
    "SELECT * FROM visits WHERE bought IS NOT NULL": ["amount", "paid_at"],
    "SELECT v.* FROM visits v JOIN visits w ON w.visit = v.visit AND w.amount = v.amount": ["bought", "paid_at"],
    "WITH x AS (SELECT *, size > 1 AS big FROM visits) SELECT * EXCLUDE (big) FROM x": LATE,
    "SELECT DISTINCT * FROM visits": [],
    "SELECT * EXCLUDE (size), CASE WHEN paid_at IS NULL THEN size ELSE size END AS size FROM visits": [
        "amount",
        "bought",
    ],
}


@pytest.mark.parametrize(("sql", "missing"), SQL.items())
def test_of_a_query_is_demanded_what_the_columns_of_a_row_are_made_of(shop: Shop, sql: str, missing: list[str]) -> None:
    config = config_of(shop, query=sql)
    columns = required_columns.for_scoring(config.data, config.features).sources["visits"].columns
    assert [name for name, column in columns.items() if column.missing == "null"] == sorted(
        missing, key=list(columns).index
    )
