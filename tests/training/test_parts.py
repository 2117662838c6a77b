"""Splits by hash and by a column, with and without an event time; what a table without time cannot have."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import engine
from engine.config import schema, timeless
from engine.config.compose import compose
from engine.config.sections.data import PLACE
from engine.config.sections.training import SplitConfig
from engine.config.tree import Config
from engine.data.dataset import Dataset, newest_dataset
from engine.data.places import places
from engine.errors import UserError
from engine.training.parts import part_rows, warn_of_parts
from engine.training.train import check_trainable
from tests import loans

PARTS = {"train": (0, 0.8), "valid": (0.8, 0.9), "test": (0.9, 1)}


def ingested(folder: Path, *words: str) -> Dataset:
    """The dataset of the loans in a folder, ingested now."""
    engine.run("ingest", *loans.overrides(folder, *words), config_dir=str(folder / "conf"))
    found = newest_dataset(folder / "store" / "datasets" / "loans")
    assert found is not None
    return found


def config_of(folder: Path, split: dict[str, Any]) -> Config:
    """The config of the loans with a split."""
    config = compose(loans.overrides(folder), str(folder / "conf")).config
    return dataclasses.replace(config, split=schema.build(SplitConfig, split))


def numbers(config: Config, dataset: Dataset) -> dict[str, list[int]]:
    """The loans of each part."""
    return {name: dataset.take(["loan"], part_rows(config, dataset, name))["loan"].to_pylist() for name in PARTS}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return loans.write_loans(tmp_path_factory.mktemp("loans"))


@pytest.fixture(scope="module")
def dataset(place: Path) -> Dataset:
    return ingested(place)


# ------------------------------------------------------------------------------------------------------------ places


def rows_of(pairs: list[tuple[int, str | None]]) -> pa.Table:
    ids, groups = ([pair[at] for pair in pairs] for at in (0, 1))
    return pa.table({"row": pa.array(ids, pa.int64()), "customer": pa.array(groups, pa.string())})


PAIRS = st.lists(
    st.tuples(st.integers(-(2**63), 2**63 - 1), st.one_of(st.none(), st.text(max_size=6))), min_size=1, max_size=40
)


@given(PAIRS)
@settings(deadline=None, max_examples=30)
def test_rows_of_a_group_have_one_place_and_other_rows_their_own(pairs: list[tuple[int, str | None]]) -> None:
    found = places(rows_of(pairs), ["row"], "customer")
    alone = places(rows_of(pairs), ["row"], None)
    assert ((found >= 0) & (found < timeless.SPACE)).all()
    by_group: dict[str, set[int]] = {}
    for (_, group), spot, own in zip(pairs, found.tolist(), alone.tolist(), strict=True):
        if group is None:
            assert spot == own
        else:
            by_group.setdefault(group, set()).add(spot)
    assert all(len(spots) == 1 for spots in by_group.values())


@given(PAIRS, PAIRS, st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=30)
def test_a_place_does_not_change_when_rows_are_added_or_shuffled(
    pairs: list[tuple[int, str | None]], more: list[tuple[int, str | None]], random: Any
) -> None:
    before = dict(zip(pairs, places(rows_of(pairs), ["row"], "customer").tolist(), strict=True))
    together = pairs + more
    random.shuffle(together)
    after = dict(zip(together, places(rows_of(together), ["row"], "customer").tolist(), strict=True))
    assert before == {pair: after[pair] for pair in pairs}


def test_places_are_spread_evenly() -> None:
    found = places(pa.table({"row": np.arange(100_000)}), ["row"], None)
    counts = np.bincount(found // (timeless.SPACE // 100), minlength=100)
    assert abs(counts - 1000).max() < 5 * 1000**0.5  # five standard deviations of a share of a hundredth


# ------------------------------------------------------------------------------------------------------------ splits


def test_a_table_without_time_is_in_order_of_places(place: Path, dataset: Dataset) -> None:
    table = dataset.read(["loan", "customer", PLACE])
    found = np.asarray(table[PLACE].cast(pa.int64()))
    assert (np.diff(found) >= 0).all()
    assert found.tolist() == places(table, ["loan"], "customer").tolist()


def test_a_split_by_hash_divides_no_group_and_takes_every_row_once(place: Path, dataset: Dataset) -> None:
    found = numbers(config_of(place, {"by": "hash"}), dataset)
    assert sorted(loan for mine in found.values() for loan in mine) == sorted(
        dataset.read(["loan"])["loan"].to_pylist()
    )
    customer = dict(zip(*(dataset.read([name])[0].to_pylist() for name in ("loan", "customer")), strict=True))
    groups = {name: {customer[loan] for loan in mine} - {None} for name, mine in found.items()}
    assert not groups["train"] & (groups["valid"] | groups["test"]) and not groups["valid"] & groups["test"]
    assert abs(len(found["train"]) / 1200 - 0.8) < 0.05


def test_a_part_by_hash_of_a_table_without_time_is_a_range_of_rows(place: Path, dataset: Dataset) -> None:
    config = config_of(place, {"by": "hash"})
    for name in PARTS:
        rows = part_rows(config, dataset, name)
        assert rows.tolist() == list(range(*dataset.row_range(*config.periods[f"split.{name}"])))


def test_turned_parts_test_every_row_once_and_are_ranges_of_the_circle(place: Path, dataset: Dataset) -> None:
    split = {"by": "hash", "train": ["0%", "50%"], "valid": ["50%", "75%"], "test": ["75%", "100%"]}
    found = [numbers(config_of(place, split | {"turn": f"{turn}%"}), dataset) for turn in (0, 25, 50, 75)]
    everyone = sorted(dataset.read(["loan"])[0].to_pylist())
    assert sorted(loan for parts in found for loan in parts["test"]) == everyone
    assert all(sorted(loan for mine in parts.values() for loan in mine) == everyone for parts in found)
    assert sorted(found[1]["valid"]) == sorted(found[0]["test"])


def test_a_split_by_a_column_takes_the_rows_that_it_names(place: Path, dataset: Dataset) -> None:
    split = {"by": "column", "column": "part", "train": ["train", "valid"], "valid": ["test"]}
    config = config_of(place, split)
    part = dataset.read(["part"])[0].to_pylist()
    assert part_rows(config, dataset, "train").tolist() == [at for at, name in enumerate(part) if name != "test"]
    assert part_rows(config, dataset, "valid").tolist() == [at for at, name in enumerate(part) if name == "test"]
    assert config_of(place, {"by": "column", "column": "part"}).split.test == ("test",)


def test_a_dataset_and_its_parts_are_the_same_in_any_layout_of_files(
    place: Path, dataset: Dataset, tmp_path: Path
) -> None:
    other = loans.write_loans(tmp_path)
    (other / "loans.csv").unlink()
    rows = loans.loans()
    for at, start in enumerate(range(0, 1200, 400)):
        loans.write(other, f"loans-{9 - at}.csv", rows.slice(start, 400))
    assert ingested(other).digest == dataset.digest


def test_rows_keep_their_part_when_a_file_is_added(place: Path, dataset: Dataset, tmp_path: Path) -> None:
    other = loans.write_loans(tmp_path)
    loans.write(other, "loans-2.csv", loans.loans(300, seed=1, first=10_000))
    config = config_of(other, {"by": "hash"})
    before, after = numbers(config, dataset), numbers(config, ingested(other))
    for name in PARTS:
        assert set(before[name]) == {loan for loan in after[name] if loan < 10_000}
        assert len(after[name]) > len(before[name])


# ----------------------------------------------------------------------------------------------------------- refused

WINDOWS = "+features.views.past={entity: [customer], windows: [7d], aggregates: {rows: [count]}}"


@pytest.mark.parametrize(
    ("word", "said"),
    [
        (WINDOWS, "features.views.past cannot be computed: windows look back on the time before a row, and no column"),
        ("features.as_of=part", "features.as_of must be left out, for no column of the data has role event_time"),
        ("split={by: time, train: [2020-01-01, 2020-02-01]}", "split.by must be hash or column, for no column"),
        ("score.between=[2020-01-01,2020-02-01]", "score.between must be left out.*all rows are scored"),
        ("monitor.window=2020-01", "monitor.window must be left out.*monitor.run names a scoring run"),
        ("data.freshness=1d", "freshness=1d needs a column with role event_time"),
        ("data.duplicates=last", "duplicates=last needs known_time"),
        ("data.columns.bad.known_at=part", "columns.bad.known_at must be `prior`"),
        ("data.group=custmer", "group names 'custmer', which is not a column. Did you mean 'customer'"),
        ("split.by=column", "column must be given for by=column, and only then"),
        ("split.column=part", "column must be given for by=column, and only then"),
        (
            "split.train=[2020-01-01,2020-02-01]",
            "split.train: a part of split.by=hash must be .from, to., shares of all rows",
        ),
        ("split.train=[20%]", "split.train: a part of split.by=hash must be .from, to., shares of all rows"),
        ("split.train=[20%,10%]", "split.train: a part must end after it starts"),
        ("split={by: hash, train: [0%, 80%], test: [70%, 100%]}", "split.test must start after the end of split.train"),
        ("split={by: column, column: part, turn: 20%}", "turn=20% is for by=hash, found by=column"),
        ("split.known_by=2020-01-01", "known_by=2020-01-01 is for by=time"),
        ("+data.columns._place={type: string}", "_place is reserved by the engine"),
    ],
)
def test_what_needs_a_time_is_refused_with_the_reason(place: Path, word: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        compose(loans.overrides(place, word), str(place / "conf"))


@pytest.mark.parametrize(
    ("split", "said"),
    [
        (
            {"column": "part", "train": ["train"], "test": ["valid", "train"]},
            r"split\.test and split\.train.*'train' in both",
        ),
        ({"column": "loan", "valid": ["01"], "train": ["1"]}, r"split\.valid and split\.train.*'01' in both"),
        ({"column": "loan", "train": ["1", "2", "x"]}, r"split\.train: values of a int64 column.*found 'x'"),
    ],
)
def test_values_of_parts_are_checked_before_training(place: Path, split: dict[str, Any], said: str) -> None:
    config = config_of(place, {"by": "column", **split})
    with pytest.raises(UserError, match=said):
        check_trainable(config)


@pytest.mark.parametrize(("by", "test"), [("hash", ["99%", "100%"]), ("column", ["test"])])
def test_a_part_to_test_on_needs_one_to_train_on(place: Path, by: str, test: list[str]) -> None:
    column = {"column": "part"} if by == "column" else {}
    with pytest.raises(UserError, match=r"split\.train must say.*give it too") as error:
        check_trainable(config_of(place, {"by": by, "test": test, **column}))
    assert "set split.by" not in str(error.value)


def warnings_of(config: Config, dataset: Dataset) -> list[str]:
    """What is said of the parts of a column."""
    run = mock.Mock()
    warn_of_parts(config, dataset, run)
    return [call.args[0] for call in run.warn.call_args_list]


def test_groups_that_a_column_divides_are_counted(place: Path, dataset: Dataset) -> None:
    whole = {"by": "column", "column": "part"}
    assert warnings_of(config_of(place, whole), dataset) == []
    found = config_of(place, {**whole, "column": "country", "train": ["DE", "FR"], "valid": [], "test": ["US"]})
    customers: dict[str, set[bool]] = {}
    for customer, country in zip(
        *(dataset.read([name])[0].to_pylist() for name in ("customer", "country")), strict=True
    ):
        if customer is not None:
            customers.setdefault(customer, set()).add(country == "US")
    (said,) = warnings_of(found, dataset)
    divided = sum(len(parts) == 2 for parts in customers.values())
    assert divided and f"divides {divided:,} of {len(customers):,} groups (data.group=customer)" in said


def test_a_value_that_no_row_has_is_named_beside_one_that_is_there(place: Path, dataset: Dataset) -> None:
    split = {"by": "column", "column": "part", "train": ["train", "tarin"], "valid": ["nowhere"], "test": ["test"]}
    assert warnings_of(config_of(place, split), dataset) == ["split.train names 'tarin', which no row has in 'part'"]


@pytest.mark.parametrize(
    ("word", "where"),
    [
        ("evaluate.slices=[part]", "evaluate.slices"),
        ("evaluate.block=part", "evaluate.block"),
        ("score.partition=part", "score.partition"),
        ("split={by: column, column: part}", "split.column"),
        ("data.group=part", "group"),
        ("data.columns.part.role=entity", "role entity"),
        ("+data.columns.part.id=true", "role id"),
        ("+train.targets={more: {column: part, loss: binary}}", r"train\.targets\.more\.column"),
    ],
)
def test_a_list_is_refused_where_rows_need_one_value(place: Path, word: str, where: str) -> None:
    words = loans.overrides(place, "data.columns.part.type='list<string>'", word)
    with pytest.raises(UserError, match=f"{where} must name a column with one value a row, found 'part'"):
        compose(words, str(place / "conf"))


def test_a_backtest_needs_a_time(place: Path) -> None:
    with pytest.raises(UserError, match="backtest replays the past period by period, which needs an event time"):
        engine.run("backtest", *loans.overrides(place), config_dir=str(place / "conf"))
