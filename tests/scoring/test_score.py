"""Scoring, end to end on a small model: each row once, the same bytes whatever the split, and what is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import engine
from engine.data.dataset import Dataset
from engine.errors import UserError
from engine.features.profile import Profile
from engine.lifecycle.chain import within_tolerance
from engine.runtime import storage
from engine.runtime.on_ray import pool
from engine.runtime.run import Run
from engine.runtime.seal import Seal
from engine.scoring import output, units
from engine.scoring import score as score_module
from engine.scoring.predictor import Predictor, load
from engine.scoring.publish import write_refused
from engine.scoring.read import predictions
from engine.scoring.worker import UnitScorer, refusals
from tests.scoring.conftest import ROWS, Shop, contents, rows_of
from tests.tiny import overrides, visits

Score = Callable[..., Run]
UNITS = -(-ROWS // 1024)


def as_events(table: pa.Table) -> pa.Table:
    return table.sort_by([("at", "ascending"), ("visit", "ascending")])


def test_every_row_has_the_score_that_the_predictor_gives_it(shop: Shop, unbroken: Run) -> None:
    events = as_events(visits(ROWS))
    expected = load(shop.model).predict(events)
    found = rows_of(unbroken)
    assert found["row_id"].to_pylist() == expected["row_id"].to_pylist()
    assert found["score"].equals(expected["score"])
    assert found["at"].cast(pa.int64()).equals(events["at"].cast(pa.int64()))
    assert found["shop"].equals(events["shop"]) and found["size"].equals(events["size"])
    assert set(found["model"].to_pylist()) == {load(shop.model).digest}
    assert found["row_id"][0].as_py() == str(2**53 + 1), "an id keeps its exact value"


@pytest.mark.parametrize("words", [
    ("score.unit_rows=100000",),
    ("score.unit_rows=1000", "resources.threads=1"),
    ("score.unit_rows=2048", "resources.threads=8"),
    ("score.features=compute", "score.unit_rows=3000"),
])  # fmt: skip
def test_rows_scores_and_profile_do_not_depend_on_units_threads_or_the_store(
    score: Score, unbroken: Run, words: tuple[str, ...]
) -> None:
    run = score("score.columns=[shop,size]", *words)
    assert rows_of(run).equals(rows_of(unbroken))
    assert (run.directory / "profile.json").read_bytes() == (unbroken.directory / "profile.json").read_bytes()
    assert run.record["chain"]["scores"] == unbroken.record["chain"]["scores"]


def test_rows_come_in_dataset_order_though_units_end_in_another(
    score: Score, unbroken: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, ended = UnitScorer._score, []

    def late(self: UnitScorer, unit: Any) -> dict[str, Any]:
        record = original(self, unit)
        time.sleep(0.1 * (UNITS - unit.start // 1024))  # the first takes longest
        ended.append(unit.start)
        return record

    monkeypatch.setattr(UnitScorer, "_score", late)
    run = score("score.columns=[shop,size]", f"resources.threads={UNITS}")
    assert ended != sorted(ended)
    assert rows_of(run).equals(rows_of(unbroken))
    assert (run.directory / "ledger.parquet").read_bytes() == (unbroken.directory / "ledger.parquet").read_bytes()


def test_the_profile_counted_on_the_way_is_that_of_all_rows(shop: Shop, unbroken: Run) -> None:
    predictor = load(shop.model)
    assert predictor.profile_spec is not None
    found = json.loads((unbroken.directory / "profile.json").read_text())
    profile = Profile.from_json(found, predictor.profile_spec)
    scores = np.asarray(rows_of(unbroken)["score"])
    assert profile.rows == ROWS
    assert found["numeric"]["size"]["missing"] == pc.sum(pc.is_null(rows_of(unbroken)["size"])).as_py()
    low, high = found["predictions"]["prediction"]["range"]
    assert (np.float32(low), np.float32(high)) == (scores.min(), scores.max())
    text = (unbroken.directory / "profile.json").read_text()
    assert unbroken.directory.name not in text and "2026" not in text.split('"rows"')[0]


def test_a_period_takes_its_first_instant_and_not_its_last(score: Score, unbroken: Run) -> None:
    run = score("score.between=[2020-01-10,2020-01-12T06:00]", "score.columns=[shop,size]")
    whole = rows_of(unbroken)
    start, stop = (pa.scalar(np.datetime64(text, "us"), pa.timestamp("us")).cast(pa.timestamp("us", "UTC"))
                   for text in ("2020-01-10", "2020-01-12T06:00"))  # fmt: skip
    wanted = whole.filter(pc.and_(pc.greater_equal(whole["at"], start), pc.less(whole["at"], stop)))
    assert wanted.num_rows > 100
    assert rows_of(run).equals(wanted.combine_chunks())


def test_a_period_without_rows_leaves_an_empty_output_with_its_columns(score: Score, unbroken: Run) -> None:
    run = score("score.between=[2030-01-01,2030-01-02]", "score.columns=[shop,size]")
    found = predictions(run.directory)
    assert found.num_rows == 0 and run.metrics["score/rows"] == 0
    assert found.schema.equals(rows_of(unbroken).schema)


def test_an_empty_file_among_others_changes_nothing(shop: Shop, unbroken: Run, tmp_path: Path) -> None:
    (tmp_path / "some").mkdir()
    pq.write_table(visits(10).slice(0, 0), tmp_path / "some" / "visits-0.parquet")
    assert score_table(shop, tmp_path / "some", visits(ROWS)).record["chain"]["scores"] == chain(unbroken)


@pytest.mark.parametrize("features", ["store", "compute"])
def test_files_without_rows_are_a_period_without_rows(shop: Shop, unbroken: Run, tmp_path: Path, features: str) -> None:
    run = score_table(shop, tmp_path, visits(10).slice(0, 0), "score.columns=[shop,size]", f"score.features={features}")
    assert predictions(run).schema.equals(rows_of(unbroken).schema) and run.metrics["score/rows"] == 0
    assert "no row is in dataset tiny: nothing to score" in (run.directory / "run.log").read_text()
    words = overrides(tmp_path, "train.epochs=1")
    for command in ("train", "ingest"):  # also now that scoring has stored a dataset without rows
        with pytest.raises(UserError, match="at least one row, found none"):
            engine.run(command, *words, config_dir=shop.conf)


def chain(run: Run) -> str:
    return str(run.record["chain"]["scores"])


def score_table(shop: Shop, folder: Path, table: pa.Table, *more: str) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / "visits.parquet")
    words = overrides(folder, f"score.model={shop.model}", "score.unit_rows=1024", *more)
    return engine.run("score", *words, config_dir=shop.conf)


def test_columns_in_another_order_and_more_of_them_give_the_same_scores(
    shop: Shop, unbroken: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    table = visits(ROWS)
    shuffled = table.select(table.column_names[::-1]).append_column("extra", pa.array(range(ROWS)))
    run = score_table(shop, tmp_path, shuffled)
    assert run.record["chain"]["scores"] == unbroken.record["chain"]["scores"]
    assert "extra" in capfd.readouterr().err, "a column that is not declared is reported"


def test_a_missing_column_is_an_error_that_names_it(shop: Shop, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="size"):
        score_table(shop, tmp_path, visits(ROWS).drop_columns(["size"]))


def test_a_category_that_the_model_never_saw_has_a_code_of_its_own(shop: Shop, tmp_path: Path) -> None:
    table = visits(50)
    new = table.set_column(table.column_names.index("shop"), "shop", pa.array(["shop-new"] * 25 + [None] * 25))
    run = score_table(shop, tmp_path, new)
    counts = json.loads((run.directory / "profile.json").read_text())["categorical"]["shop"]
    assert counts == {"counts": [[0, 25], [1, 25]], "unseen": {"shop-new": 25}}


def test_rows_of_the_wrong_type_or_null_are_in_quarantine_with_the_reason_and_the_counts_add_up(
    shop: Shop, tmp_path: Path
) -> None:
    table = visits(ROWS)
    at = table.column_names.index("at")
    nulls = pc.if_else(pa.array(np.arange(ROWS) % 200 == 5), pa.scalar(None, table["at"].type), table["at"])
    run = score_table(shop, tmp_path, table.set_column(at, "at", nulls))
    metrics = run.metrics
    assert metrics["score/rows_quarantined_at_ingest"] == ROWS / 200
    assert metrics["score/rows"] + metrics["score/rows_quarantined"] == metrics["score/rows_in"]
    assert metrics["score/rows_in"] + metrics["score/rows_quarantined_at_ingest"] == ROWS
    found = storage.read_parquet(run.directory / "quarantine" / "ingest.parquet")
    assert found.num_rows == ROWS / 200 and "null" in found["reason"][0].as_py()


def test_a_null_where_the_model_allows_none_is_refused_with_the_first_reason(shop: Shop) -> None:
    predictor = load(shop.model)
    columns = {**predictor.bundle.data.columns}
    columns["size"] = dataclasses.replace(columns["size"], nullable=False)
    strict = dataclasses.replace(predictor.bundle, data=dataclasses.replace(predictor.bundle.data, columns=columns))
    rows = visits(100).set_column(0, "visit", pa.array(range(100)))
    late = pc.if_else(pa.array(np.arange(100) == 7), pa.scalar(None, rows["at"].type), rows["at"])
    rows = rows.set_column(rows.column_names.index("at"), "at", late)
    found = refusals(dataclasses.replace(predictor, bundle=strict), rows).table(1000, rows["visit"].combine_chunks())
    null = set(np.flatnonzero(np.asarray(pc.is_null(rows["size"]))))
    assert set(found["row"].to_pylist()) == {1000 + row for row in null | {7}}
    reasons = dict(zip(found["row_id"].to_pylist(), found["reason"].to_pylist(), strict=True))
    assert reasons[7] == "at is null, where none is allowed"
    assert {reasons[row] for row in null - {7}} == {"size is null, where none is allowed"}


# ------------------------------------------------------------------------------------------- resume and append


def stop_after(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """The process dies at the unit after `count` have begun: no cleaning up is seen, as after SIGKILL."""
    begun: list[Any] = []
    original = UnitScorer._score

    def dying(self: UnitScorer, unit: Any) -> dict[str, Any]:
        begun.append(unit)
        if len(begun) > count:
            raise KeyboardInterrupt
        return original(self, unit)

    monkeypatch.setattr(UnitScorer, "_score", dying)


def test_finished_units_are_not_scored_again_even_with_another_unit_size_and_thread_count(
    score: Score, unbroken: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            score("score.columns=[shop,size]", "resources.threads=1")
    run = score("score.columns=[shop,size]", "score.unit_rows=2048", "resources.threads=4")
    assert run.resumed and run.metrics["units_skipped"] == 3
    assert run.metrics["score/units_scored"] == 2, "3,072 to 6,000 in units of 2,048"
    assert rows_of(run).equals(rows_of(unbroken))
    assert (run.directory / "profile.json").read_bytes() == (unbroken.directory / "profile.json").read_bytes()


def test_a_changed_config_starts_anew_and_the_log_says_so(score: Score, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            score("score.columns=[shop]", "resources.threads=1")
    run = score("score.columns=[size]", "resources.threads=1")
    assert not run.resumed and run.metrics["units_skipped"] == 0
    said = "is unfinished but has another plan; these keys differ: score.columns"
    assert said in (run.directory / "run.log").read_text()


def test_a_changed_input_refuses_to_resume_and_says_so(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            score_table(shop, tmp_path, visits(ROWS), "resources.threads=1")
    with pytest.raises(UserError, match=r"the input changed since it began.*score\.resume=never"):
        score_table(shop, tmp_path, visits(ROWS, seed=1))
    assert score_table(shop, tmp_path, visits(ROWS, seed=1), "score.resume=never").metrics["units_skipped"] == 0


def test_a_retrained_model_in_the_same_place_refuses_to_resume_and_says_so(
    shop: Shop, score: Score, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "model"
    shutil.copytree(shop.model / "model", place)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            score(f"score.model={place}", "resources.threads=1")
    words = overrides(shop.folder, "train.epochs=1", "train.seed=1", f"paths.runs={tmp_path / 'other'}")
    other = engine.run("train", *words, config_dir=shop.conf)
    shutil.rmtree(place)
    shutil.copytree(other.directory / "model", place)
    with pytest.raises(UserError, match="the weights changed since it began"):
        score(f"score.model={place}")


def test_append_scores_only_new_units_and_equals_scoring_everything(shop: Shop, tmp_path: Path) -> None:
    table = as_events(visits(ROWS))
    first = score_table(shop, tmp_path, table.slice(0, 4500))
    more = score_table(shop, tmp_path, table, "score.mode=append")
    whole = score_table(shop, tmp_path / "whole", table)
    assert first.metrics["score/rows"] == 4500
    assert more.metrics["score/units_reused"] == 4, "0 to 4,096; the last unit has gained rows"
    assert more.metrics["score/units_scored"] == 2
    assert rows_of(more).equals(rows_of(whole))
    assert more.record["chain"]["scores"] == whole.record["chain"]["scores"]
    assert (more.directory / "profile.json").read_bytes() == (whole.directory / "profile.json").read_bytes()


def test_append_scores_anew_what_late_rows_have_changed(shop: Shop, tmp_path: Path) -> None:
    table = as_events(visits(ROWS))
    late = pa.concat_tables([table.slice(0, 2500), table.slice(2600)])
    score_table(shop, tmp_path, late)
    more = score_table(shop, tmp_path, table, "score.mode=append")
    whole = score_table(shop, tmp_path / "whole", table)
    assert more.metrics["score/units_reused"] == 2
    assert rows_of(more).equals(rows_of(whole))


def test_append_takes_over_what_the_model_does_not_tell_apart(shop: Shop, tmp_path: Path) -> None:
    """An event time that moved within its hour and the new name of an unseen category leave every score as it was."""

    def write(name: str, shift: int) -> pa.Table:
        table = as_events(visits(ROWS))
        at = table["at"].cast(pa.int64()).to_numpy().copy()
        at[0] += shift
        shops = table["shop"].to_pylist()
        shops[3000:3010] = [name] * 10
        table = table.set_column(table.column_names.index("shop"), "shop", pa.array(shops))
        return table.set_column(table.column_names.index("at"), "at", pa.array(at, table["at"].type))

    first = score_table(shop, tmp_path, write("shop-new", 0))
    more = score_table(shop, tmp_path, write("shop-newer", 1), "score.mode=append")
    whole = score_table(shop, tmp_path / "whole", write("shop-newer", 1))
    assert first.record["chain"]["scores"] == whole.record["chain"]["scores"], "no score has changed"
    assert more.metrics["score/units_reused"] == UNITS - 1
    reused = more.metrics["score/rows_reused"]
    assert re.search(
        rf"score\.mode=append: {reused:,.0f} rows in {UNITS - 1} units are reused from \S+{first.directory.name}, "
        rf"{ROWS - reused:,.0f} rows in 1 units are new or changed.*; of {UNITS} files 5 are unchanged and 1 are new",
        (more.directory / "run.log").read_text(),
    )
    assert rows_of(more).equals(rows_of(whole))
    assert (more.directory / "profile.json").read_bytes() == (whole.directory / "profile.json").read_bytes()


def test_append_never_takes_scores_of_another_model(shop: Shop, tmp_path: Path) -> None:
    score_table(shop, tmp_path, visits(ROWS))
    words = overrides(shop.folder, "train.epochs=1", "train.seed=2", f"paths.runs={tmp_path / 'other'}")
    other = dataclasses.replace(shop, model=engine.run("train", *words, config_dir=shop.conf).directory)
    run = score_table(other, tmp_path, visits(ROWS), "score.mode=append")
    assert run.metrics["score/units_reused"] == 0
    assert (
        "the newest, " in (log := (run.directory / "run.log").read_text())
        and "has another weights, another architecture, another model" in log
    )
    assert set(predictions(run.directory)["model"].to_pylist()) == {load(other.model).digest}


# ------------------------------------------------------------------------------------------- what goes wrong


def test_a_part_that_changes_before_it_is_published_is_found_and_scored_again(
    score: Score, unbroken: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = score_module.publish

    def spoil_and_publish(config: Any, run: Run, *arguments: Any) -> Any:
        part = min(run.path("parts").glob("*.part"))
        content = bytearray(part.read_bytes())
        content[100] ^= 1
        part.write_bytes(content)
        return publish(config, run, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(score_module, "publish", spoil_and_publish)
        with pytest.raises(UserError, match=r"000000000000-000000001024-\w+\.part is missing or damaged"):
            score("score.columns=[shop,size]")
    run = score("score.columns=[shop,size]")
    assert run.resumed and run.metrics["score/units_scored"] == 1
    assert rows_of(run).equals(rows_of(unbroken))


def test_a_warm_worker_scores_the_same_and_leaves_no_trace(
    score: Score, unbroken: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    warmed: list[list[Path]] = []
    original = UnitScorer.__init__

    def begin(self: UnitScorer, *arguments: Any) -> None:
        original(self, *arguments)
        self.warm_up()
        warmed.append(list(self.parts.iterdir()))

    monkeypatch.setattr(UnitScorer, "__init__", begin)
    run = score("score.columns=[shop,size]")
    assert warmed == [[]]
    for name in ("profile.json", "ledger.parquet"):
        assert (run.directory / name).read_bytes() == (unbroken.directory / name).read_bytes()
    assert rows_of(run).equals(rows_of(unbroken))


def poisonous(monkeypatch: pytest.MonkeyPatch, start: int, deaths: int) -> list[int]:
    """The unit that begins at `start` raises `deaths` times; returns the starts of all calls."""
    calls: list[int] = []
    original = UnitScorer._score

    def score(self: UnitScorer, unit: Any) -> dict[str, Any]:
        calls.append(unit.start)
        if unit.start == start and calls.count(start) <= deaths:
            raise ValueError("a value\nthat no model takes")
        return original(self, unit)

    monkeypatch.setattr(UnitScorer, "_score", score)
    return calls


def test_a_unit_that_raises_is_tried_again(score: Score, unbroken: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = poisonous(monkeypatch, 2048, 2)
    run = score("score.columns=[shop,size]")
    assert calls.count(2048) == 3 and run.metrics["score/units_retried"] == 2
    assert rows_of(run).equals(rows_of(unbroken))
    assert (run.directory / "profile.json").read_bytes() == (unbroken.directory / "profile.json").read_bytes()


def test_a_poison_unit_is_set_aside_with_its_cause_and_the_others_finish(
    score: Score, unbroken: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:
        poisonous(patch, 2048, 99)
        with pytest.raises(
            UserError, match="rows 2048 to 3072 failed 3 times: ValueError: a value that no model takes"
        ):
            score("score.columns=[shop,size]")
    (directory,) = (tmp_path / "runs" / "score" / "tiny").iterdir()
    assert not (directory / "DONE").exists()
    with pytest.raises(UserError, match="incomplete: 1 units were set aside"):
        predictions(directory)
    whole = rows_of(unbroken)
    rest = predictions(directory, incomplete=True).unify_dictionaries().combine_chunks()
    assert rest.equals(pa.concat_tables([whole.slice(0, 2048), whole.slice(3072)]).combine_chunks())
    ledger = storage.read_parquet(directory / "ledger.parquet").to_pylist()
    assert [row["cause"] for row in ledger if row["state"] == "set aside"] == [
        "ValueError: a value that no model takes"
    ]
    run = score("score.columns=[shop,size]")
    assert run.directory == directory and run.metrics["score/units_scored"] == 1
    assert rows_of(run).equals(whole)


def test_a_unit_whose_worker_fails_after_the_commit_is_done(
    score: Score, unbroken: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = UnitScorer.__call__

    def call(self: UnitScorer, item: dict[str, Any]) -> dict[str, Any]:
        record = original(self, item)
        if item["start"] == 2048:
            raise ConnectionError("the reply is lost")
        return record

    monkeypatch.setattr(UnitScorer, "__call__", call)
    run = score("score.columns=[shop,size]", "score.tries=1")
    assert run.metrics["score/units_failed"] == 0 and run.metrics["score/units_scored"] == UNITS
    assert rows_of(run).equals(rows_of(unbroken))


def without_ray(monkeypatch: pytest.MonkeyPatch) -> list[tuple[pool.Actors, Path]]:
    """Ray is not started and the run stops there; the actors asked for, and the folder of their tries, by attempt."""
    called: list[tuple[pool.Actors, Path]] = []

    def run_actors(_make: Any, _items: Any, actors: pool.Actors, _tries: int, marks: Path) -> Any:
        assert not list(marks.iterdir())
        called.append((actors, marks))
        raise KeyboardInterrupt

    session = SimpleNamespace(local=True, nodes=["one"])
    monkeypatch.setattr(pool, "run_actors", run_actors)
    monkeypatch.setattr(score_module.cluster, "session", lambda _: contextlib.nullcontext(session))
    return called


def test_units_wait_at_busy_actors_only_where_no_actor_goes_without(
    score: Score, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = without_ray(monkeypatch)
    for workers in (2, 3):  # of 6 units
        with pytest.raises(KeyboardInterrupt):
            score("cluster=ray", f"cluster.workers={workers}", "score.resume=never")
    assert [(actors.workers, actors.ahead) for actors, _ in called] == [(2, 1), (3, 0)]


def test_an_actor_that_outlives_its_driver_does_not_count_in_the_next_attempt(
    score: Score, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = without_ray(monkeypatch)
    for _ in "ab":
        with pytest.raises(KeyboardInterrupt):
            score("cluster=ray")
        (called[-1][1] / "late.1").touch()
    (_, first), (_, second) = called
    assert first.parent == second.parent and first != second and not first.exists()


def test_an_incomplete_run_leaves_the_earlier_output_as_it_was(
    score: Score, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = ("score.columns=[shop,size]", f"score.output={tmp_path / 'out'}")
    earlier = score(*words, "score.between=[2020-01-01,2020-01-03]")
    before, rows = contents(tmp_path / "out"), rows_of(earlier)
    with monkeypatch.context() as patch:
        poisonous(patch, 2048, 99)
        with pytest.raises(UserError, match=r"their rows are in .*/predictions as incomplete"):
            score(*words)
    assert contents(tmp_path / "out") == before
    directory = max((tmp_path / "runs" / "score" / "tiny").iterdir())
    assert predictions(directory, incomplete=True).num_rows == ROWS - 1024
    run = score(*words)
    assert run.directory == directory and rows_of(run).num_rows == ROWS > rows.num_rows
    assert not (directory / "predictions").exists()


def test_two_runs_that_publish_in_one_place_at_once_leave_the_output_of_one(
    score: Score, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place = f"score.output={tmp_path / 'out'}"
    publish = output.publish
    others: list[threading.Thread] = []
    done: list[Run] = []

    def publish_late(*arguments: Any) -> None:
        if not others:  # the files of the first run are there, its manifest is not
            others.append(
                threading.Thread(target=lambda: done.append(score(place, "score.between=[2020-01-01,2020-01-03]")))
            )
            others[0].start()
            others[0].join(4)
        publish(*arguments)

    monkeypatch.setattr(output, "publish", publish_late)
    whole = score(place)
    others[0].join(60)
    assert whole.metrics["score/rows"] == ROWS
    assert rows_of(done[0]).num_rows == done[0].metrics["score/rows"] < ROWS


def test_rows_that_no_model_takes_are_gathered_in_the_memory_of_few_units(tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    done = [units.make_unit(start, start + 20_000, "context") for start in range(0, 1_000_000, 20_000)]
    for unit in done:
        rows = pa.array(np.arange(unit.start, unit.stop))
        table = pa.table({"row": rows, "row_id": rows.cast(pa.string()), "reason": pa.repeat("at is null", len(rows))})
        storage.write_parquet(units.refused_path(parts, unit), table)
    run, dataset = SimpleNamespace(path=tmp_path.joinpath), SimpleNamespace(manifest={"accounting": {"quarantined": 0}})
    before, counted = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(counted)
    try:
        write_refused(run, parts, done, dataset)  # type: ignore[arg-type]
    finally:
        pa.set_memory_pool(before)
    found = storage.read_parquet(tmp_path / "quarantine" / "rows.parquet")
    assert found["row"].to_pylist() == list(range(1_000_000))
    assert counted.max_memory() < 8 * table.nbytes, f"{counted.max_memory()} of {found.nbytes} bytes"


def test_a_full_disk_stops_the_run_names_the_place_and_a_rerun_goes_on(
    score: Score, unbroken: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    written: list[pa.OSFile] = []
    original = pq.write_table

    def write(table: pa.Table, file: pa.OSFile, **options: Any) -> None:
        written.append(file)
        if len(written) > 3:
            whole = pa.BufferOutputStream()
            original(table, whole, **options)
            file.write(whole.getvalue()[:100])
            raise OSError(28, "No space left on device")
        original(table, file, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", write)
        with pytest.raises(UserError, match=r"the disk that holds .*parts.* is full"):
            score("score.columns=[shop,size]", "resources.threads=1")
    (directory,) = (tmp_path / "runs" / "score" / "tiny").iterdir()
    assert not (directory / "predictions").exists()
    for part in directory.glob("parts/*.part"):
        pq.read_table(part)  # whole or absent
    run = score("score.columns=[shop,size]")
    assert run.metrics["units_skipped"] == 3
    assert rows_of(run).equals(rows_of(unbroken))


def refuse_every_500th(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Predictor.encoded_scores

    def scores(self: Predictor, numeric: np.ndarray, codes: np.ndarray) -> np.ndarray:
        found = original(self, numeric, codes)
        found[::500] = np.nan
        return found

    monkeypatch.setattr(Predictor, "encoded_scores", scores)


def test_a_score_that_is_no_number_is_set_aside(score: Score, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_every_500th(monkeypatch)
    run = score()
    found = storage.read_parquet(run.directory / "quarantine" / "rows.parquet")
    assert set(found["reason"].to_pylist()) == {"the model gives no finite score"}
    assert run.metrics["score/rows"] + found.num_rows == ROWS
    assert json.loads((run.directory / "profile.json").read_text())["rows"] == run.metrics["score/rows"]


def test_an_append_takes_over_refused_rows_as_they_were(score: Score, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_every_500th(monkeypatch)
    first, more = score(), score("score.mode=append")
    assert more.metrics["score/units_reused"] == UNITS and more.metrics["score/rows_quarantined"] > 0
    assert rows_of(more).equals(rows_of(first))
    for name in ("profile.json", "quarantine/rows.parquet"):
        assert (more.directory / name).read_bytes() == (first.directory / name).read_bytes()


def test_a_column_of_the_output_cannot_be_passed_through_as_well(score: Score) -> None:
    with pytest.raises(UserError, match="already has a column 'at'"):
        score("score.columns=[at]")


def test_a_specification_other_than_the_models_is_refused_by_key(score: Score) -> None:
    with pytest.raises(UserError, match=r"features.direct.size"):
        score("features.direct.size=false")


def test_two_scorings_give_the_same_files_byte_for_byte(score: Score, unbroken: Run, tmp_path: Path) -> None:
    run = score("score.columns=[shop,size]", runs=tmp_path / "again")
    assert contents(run.directory / "predictions") == contents(unbroken.directory / "predictions")
    for name in ("ledger.parquet", "profile.json"):
        assert (run.directory / name).read_bytes() == (unbroken.directory / name).read_bytes()
    assert {path.name for path in (run.directory / "parts").iterdir()} == {
        path.name for path in (unbroken.directory / "parts").iterdir()
    }
    assert json.loads((run.directory / "predictions" / "_manifest.json").read_text())["complete"]


def test_an_altered_output_file_is_not_read(score: Score) -> None:
    run = score()
    part = next((run.directory / "predictions").glob("part-*.parquet"))
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="is not the file that the manifest names"):
        predictions(run.directory)


def test_a_dataset_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        Dataset(tmp_path, {"name": "x", "columns": [], "rows": 0, "parts": [], "tables": {}}, Seal({})).read(["y"])


def test_scores_elsewhere_are_compared_where_they_are(unbroken: Run, score: Score, tmp_path: Path) -> None:
    away = score("score.columns=[shop,size]", f"score.output={tmp_path / 'away'}").directory
    assert within_tolerance("scores", away, unbroken.directory)
    fewer = score("score.columns=[shop,size]", "score.between=[2020-01-01,2020-01-10]").directory
    assert not within_tolerance("scores", fewer, unbroken.directory)
    (tmp_path / "away" / "_manifest.json").unlink()
    assert not within_tolerance("scores", away, unbroken.directory)
