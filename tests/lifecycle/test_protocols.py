"""`evaluate --protocol`: periods one after the other, folds of groups, and folds by chance beside them."""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import engine
from engine import commands
from engine.config import schema, units
from engine.config.sections.training import SplitConfig
from engine.config.tree import Config
from engine.errors import UserError
from engine.lifecycle import evaluate
from engine.lifecycle.protocols import Trial, cuts_of, folds, promised, summary
from tests import loans, tiny

D = units.MICROSECONDS["d"]
VISITS = {
    "name": "visits",
    "sources": {"visits": {"path": "visits.csv", "columns": {"visit": "int64", "at": "timestamp", "bought": "bool"}}},
    "columns": {
        "visit": {"type": "int64", "role": "id"},
        "at": {"type": "timestamp", "role": "event_time", "known_at": "prior"},
        "bought": {"type": "bool", "role": "target"},
    },
}


def config_of(split: dict[str, Any], **protocol: Any) -> Config:
    """A config of visits."""
    found: Config = schema.build(Config, {"data": VISITS, "split": split, "protocol": {"kind": "forward", **protocol}})
    return found


def day(number: int) -> str:
    return str(np.datetime64("2020-01-01") + number)


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 20), st.integers(0, 5), st.integers(2, 6))
@settings(deadline=None, max_examples=60)
def test_forward_never_tests_before_it_trains_and_keeps_the_gap(
    train: int, valid: int, test: int, gap: int, count: int
) -> None:
    split = {
        "train": [day(0), day(train)],
        "valid": [day(train), day(train + valid)],
        "test": [day(train + valid), day(train + valid + test)],
    }
    config = config_of(split, folds=count, gap=f"{gap}d")
    if train - gap < 2 * test:
        with pytest.raises(UserError, match=r"needs split\.train to last at least two lengths of split\.test"):
            cuts_of(config)
        return
    cuts = [cut for cut in cuts_of(config) if cut.protocol == "forward"]
    assert 2 <= len(cuts) <= count
    ends = []
    for cut in cuts:
        found = dataclasses.replace(config, split=cut.split).periods
        assert found["split.train"][0] == config.periods["split.train"][0]
        assert found["split.train"][1] + gap * D <= found["split.test"][0]
        if cut.split.valid:
            assert found["split.train"][1] + gap * D <= found["split.valid"][0]
            assert found["split.valid"][1] + gap * D <= found["split.test"][0]
        ends.append(found["split.test"])
    assert [one[1] for one in ends[:-1]] == [one[0] for one in ends[1:]]  # the test periods follow each other
    assert ends[-1] == config.periods["split.test"]


@pytest.mark.parametrize("count", [2, 3, 5, 7])
def test_folds_use_every_share_once_as_test(count: int) -> None:
    found = [split for _, split in folds(count)]
    turns = [split.turn.fraction for split in found]
    assert turns == pytest.approx([place / count for place in range(count)])
    for split in found:
        edges = [units.Share(edge).fraction for part in (split.train, split.valid, split.test) for edge in part]
        assert edges[0] == 0 and edges[-1] == 1 and edges[1] == edges[2] and edges[3] == edges[4]
        assert edges[5] - edges[4] == pytest.approx(1 / count, abs=1e-9)


def trials(values: dict[str, list[float | None]]) -> list[Trial]:
    return [
        {"fold": fold, "seed": seed, "run": "", "train_rows": 1, "test_rows": 1, "valid": None, "test": value}
        for fold, mine in values.items()
        for seed, value in enumerate(mine)
    ]


def test_spreads_over_folds_and_seeds_are_told_apart() -> None:
    found = summary("random", trials({"a": [0.6, 0.8], "b": [0.9, 0.9], "c": [None, 0.5]}))
    assert found["mean"] == pytest.approx(statistics.mean([0.7, 0.9, 0.5]))
    assert found["over_folds"] == pytest.approx(statistics.stdev([0.7, 0.9, 0.5]))
    assert found["over_seeds"] == pytest.approx(statistics.mean([statistics.variance([0.6, 0.8]), 0.0]) ** 0.5)
    none = summary("random", trials({"a": [None]}))
    assert (none["mean"], none["over_folds"], none["over_seeds"]) == (None, None, None)


def test_what_chance_promises_is_a_gain_for_losses_too() -> None:
    means = [summary(kind, trials({"a": [value]})) for kind, value in (("grouped", 2.0), ("random", 1.5))]
    assert promised(means, -1.0) == 0.5 and promised(means, 1.0) == -0.5
    assert promised(means[1:], 1.0) is None


@pytest.mark.parametrize(
    ("split", "protocol", "said"),
    [
        ({}, {"kind": "grouped"}, r"--protocol grouped needs data\.group"),
        ({}, {}, r"--protocol forward needs periods of the event time in split\.train and split\.test"),
        ({"by": "hash"}, {}, r"--protocol forward needs periods.*found split\.by=hash"),
        (
            {"train": [day(0), day(90)], "test": [day(90), day(99)], "known_by": day(99)},
            {},
            r"--protocol forward needs split\.known_by=auto",
        ),
    ],
)
def test_a_protocol_without_what_it_needs_is_refused(
    split: dict[str, Any], protocol: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        cuts_of(config_of(split, **protocol))


def test_a_model_beside_a_protocol_is_refused() -> None:
    config = config_of({"by": "hash"}, kind="random")
    asked = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, model="runs/train/x"))
    with pytest.raises(UserError, match=r"evaluate\.model must be left out with --protocol random.*'runs/train/x'"):
        evaluate.check(asked)


def test_the_option_is_a_key_of_the_config() -> None:
    name, rest = commands.find(["evaluate", "--protocol", "forward", "+experiment=x"])
    assert commands.keyed(commands.COMMANDS[name], rest) == ["protocol.kind=forward", "+experiment=x"]


# ------------------------------------------------------------------------------------------------------------- whole

QUICK = ("protocol.folds=3", "train.epochs=2", "evaluate.bootstrap=0", "model=linear")


@pytest.mark.slow
def test_folds_by_chance_promise_what_a_new_group_does_not_keep(tmp_path: Path) -> None:
    loans.write_loans(tmp_path)
    rng = np.random.default_rng(1)
    table = loans.loans(3000)
    customer = rng.integers(0, 60, 3000)
    bad = rng.random(60)[customer] > 0.5  # a customer is good or bad, and nothing else says which
    table = table.set_column(1, "customer", pa.array([f"c{one}" for one in customer]))
    loans.write(tmp_path, "loans.csv", table.set_column(6, "bad", pa.array(bad)))
    words = loans.overrides(tmp_path, *QUICK, "+features.direct.customer=true", "protocol.kind=grouped", "train.lr=0.1")
    run = engine.run("evaluate", *words, config_dir=str(tmp_path / "conf"))
    assert run.metrics["random/roc_auc"] > 0.9
    assert abs(run.metrics["test/roc_auc"] - 0.5) < 0.1
    assert run.metrics["random/roc_auc_promised"] > 0.3
    record = json.loads((run.directory / "protocol.json").read_text())
    assert [(item["kind"], len(item["trials"])) for item in record["protocols"]] == [("grouped", 6), ("random", 6)]
    page = (run.directory / "report.html").read_text()
    assert "Promised by chance" in page and "fold 3, seed 1" in page
    again = engine.run("evaluate", *words, config_dir=str(tmp_path / "conf"))
    assert again.record["outputs"]["protocol"] == run.record["outputs"]["protocol"]
    assert (
        len(list((tmp_path / "store" / "evaluate" / "train" / "loans").glob("*/DONE"))) == 12
    )  # found, not trained again


@pytest.mark.slow
def test_forward_trains_on_what_is_before(tmp_path: Path) -> None:
    tiny.write_tiny(tmp_path)
    words = tiny.overrides(tmp_path, *QUICK, "protocol.kind=forward", "protocol.seeds=1", "protocol.gap=1d")
    run = engine.run("evaluate", *words, config_dir=str(tmp_path / "conf"))
    record = json.loads((run.directory / "protocol.json").read_text())
    forward = record["protocols"][0]["trials"]
    assert [one["fold"] for one in forward] == [
        "2020-01-16 to 2020-01-21",
        "2020-01-21 to 2020-01-26",
        "2020-01-26 to 2020-01-31",
    ]
    rows = [one["train_rows"] for one in forward]
    assert rows == sorted(rows) and rows[0] > 300
    assert (
        schema.build(SplitConfig, json.loads((Path(forward[0]["run"]) / "run.json").read_text())["config"]["split"]).by
        == "time"
    )
