"""Every kind of view in one experiment: the leak trial, retrieval, and a store that grows in any order."""

from __future__ import annotations

import datetime
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import engine.features
from engine.config.tree import Config
from engine.data.dataset import Dataset
from engine.data.make_dataset import ensure_dataset
from engine.errors import UserError
from engine.features import audit, functions
from engine.features.instants import instants
from engine.runtime.run import Run
from tests.features.test_store import built, config_of, everything, features_computed, months_of_visits, parts_of
from tests.tiny import START, H, visits, write_tiny

UTC = pa.timestamp("us", tz="UTC")
DAY = 24 * H
TABLE = (
    "data.query='SELECT * FROM visits'",
    "data.sources.weather={path: 'weather*.parquet', "
    "columns: {shop: string, seen: timestamp, published: timestamp, temp: float64}}",
    "data.tables.weather={columns: {shop: string, seen: {type: timestamp, role: event_time, known_at: seen}, "
    "published: {type: timestamp, role: time}, temp: {type: float64, role: numeric, known_at: published}}}",
    "features.views.weather={kind: asof, table: weather, entity: [shop], columns: [temp], max_age: 3d}",
)
KINDS = (
    *TABLE,
    "features.views.deal={kind: expression, expressions: {wide: 'abs(size) * 2'}}",
    "features.views.mine={kind: function, function: mine, inputs: [size], outputs: {twice: float64}}",
)


def weather(rows: int = 300, seed: int = 0) -> pa.Table:
    """Reports of eight places over the days of the visits, some published late, some never."""
    rng = np.random.default_rng(seed)
    seen = START + rng.integers(0, 30 * 24 * 2, rows) * (H // 2)
    return pa.table(
        {
            "shop": pa.array([f"shop-{k}" for k in rng.integers(0, 8, rows)]),
            "seen": pa.array(seen, UTC),
            "published": pa.array(seen + rng.integers(0, 12, rows) * H, UTC, mask=rng.random(rows) < 0.1),
            "temp": pa.array(rng.normal(10, 5, rows), mask=rng.random(rows) < 0.1),
        }
    )


def offer(
    monkeypatch: pytest.MonkeyPatch, function: Callable[[pa.Table], pa.Array], package: str = "package==1"
) -> None:
    """Let an installed package offer `mine`."""
    name_, _, version_ = package.partition("==")

    class Entry:
        name, value, dist = "mine", "package:mine", SimpleNamespace(name=name_, version=version_)

        @staticmethod
        def load() -> Callable[[pa.Table], pa.Table]:
            return lambda rows: pa.table({"twice": function(rows)})

    monkeypatch.setattr(functions, "_found", lambda: {"mine": Entry})


def twice(rows: pa.Table) -> pa.Array:
    return pc.multiply(rows["size"], 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny(tmp_path_factory.mktemp("kinds"), 600)
    pq.write_table(weather(), folder / "weather.parquet")
    # Of every third visit, a report that is published at the very instant of the decision.
    decided = visits(600).take(pa.array(range(0, 600, 3)))
    times = instants(decided["at"]) - H
    report = {"shop": decided["shop"], "seen": pa.array(times - 60, UTC), "published": pa.array(times, UTC)}
    pq.write_table(pa.table({**report, "temp": np.arange(200.0)}), folder / "weather-late.parquet")
    return folder


def dataset_of(config: Config) -> Dataset:
    run = Run.create("features", config, {})
    found = ensure_dataset(config, run)
    run.finish({})
    return found


# ----------------------------------------------------------------------------------------------------- leak trial


def leaking(config: Config, rows: int = 30) -> set[str]:
    return {leak.feature for leak in audit.audit(config.data, config.features, dataset_of(config), rows)}


@pytest.mark.parametrize("inclusive", [False, True])
def test_no_kind_of_view_sees_its_future(folder: Path, monkeypatch: pytest.MonkeyPatch, inclusive: bool) -> None:
    offer(monkeypatch, twice)
    assert leaking(config_of(folder, *KINDS, f"features.views.weather.inclusive={str(inclusive).lower()}")) == set()


def test_the_trial_finds_a_function_that_reads_other_rows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, lambda rows: pa.array(np.full(rows.num_rows, pc.mean(rows["size"]).as_py())))
    assert leaking(config_of(folder, *KINDS)) == {"mine_twice"}


def test_the_trial_finds_an_expression_of_a_column_known_later(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, twice)
    assert leaking(config_of(folder, *KINDS, "features.views.deal.expressions.wide='amount * 2'")) == {"deal_wide"}


def test_the_trial_finds_an_as_of_join_by_event_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Believe that a report is known when it is seen, not when it is published."""
    offer(monkeypatch, twice)
    plain = audit.compute._asof_features

    def leaky(*arguments: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(audit.compute.instants, "known_times", lambda table, _: instants(table["seen"]))
            return plain(*arguments)

    monkeypatch.setattr(audit.compute, "_asof_features", leaky)
    assert leaking(config_of(folder, *KINDS), 60) == {"weather_temp"}


def test_the_trial_finds_an_as_of_join_that_takes_what_becomes_known_at_the_decision(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(monkeypatch, twice)
    plain = audit.compute.asof
    monkeypatch.setattr(audit.compute, "asof", lambda *given, **named: plain(*given, **{**named, "inclusive": True}))
    assert leaking(config_of(folder, *KINDS)) == {"weather_temp"}


def test_the_trial_knows_the_decision_time_without_windows(folder: Path) -> None:
    words = ("features.as_of='paid_at - 1h'", "features.windows=false", "features.calendar={}")
    assert leaking(config_of(folder, *words)) == set()


def test_what_is_known_at_the_decision_is_no_leak_of_the_row_itself_and_one_of_all_others(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(monkeypatch, twice)
    at_once = [f"data.columns.{name}.known_at=at" for name in ("shop", "size")]
    words = (*KINDS, *at_once, "features.as_of=at", "features.views.shop.aggregates.size=[sum]")
    assert leaking(config_of(folder, *words)) == set()
    plain = audit.compute.Sorted
    monkeypatch.setattr(
        audit.compute, "Sorted", lambda probe, times, *rest, **named: plain(probe, times + 1, *rest, **named)
    )
    assert leaking(config_of(folder, *words)) >= {"shop_count_6h", "shop_size_sum_6h"}


# ------------------------------------------------------------------------------------------------------ retrieval


def test_latest_of_a_side_table_is_the_offline_value(folder: Path) -> None:
    config = config_of(folder, *TABLE)
    table = built(config)
    for row in (100, 400, 555):
        probe = table.dataset.read(["shop", "at"], rows=(row, row + 1))
        at = int(instants(probe["at"])[0]) - H
        stored = table.read((row, row + 1))
        for name, view in table.views.items():
            found = engine.features.latest(name, config, table.dataset, at, {"shop": probe["shop"][0].as_py()})
            for feature in view.columns:
                assert found[feature].combine_chunks().equals(stored[feature].combine_chunks()), (row, feature)


@pytest.mark.parametrize(
    ("view", "message"),
    [
        ({"entity": ["shop"], "windows": ["1d"], "aggregates": {"amuont": ["mean"]}}, r"views.mine.*'amount'"),
        ({"entity": ["shp"], "windows": ["1d"], "aggregates": {"rows": ["count"]}}, r"views.mine.*'shop'"),
        ({"kind": "asof", "table": "wether", "entity": ["shop"], "columns": ["temp"]}, r"views.mine.*'weather'"),
    ],
)
def test_history_names_what_a_view_misspells(folder: Path, view: dict[str, Any], message: str) -> None:
    config = config_of(folder, *TABLE)
    asked = pa.table({"shop": ["shop-1"], "time": pa.array([START], UTC)})
    with pytest.raises(UserError, match=message):
        engine.features.history(asked, {"mine": view}, config=config, dataset=dataset_of(config))


def test_history_of_a_null_time_knows_nothing(folder: Path) -> None:
    config = config_of(folder, *TABLE)
    asked = pa.table({"shop": ["shop-1"] * 2, "time": pa.array([None, START + 20 * DAY], UTC)})
    found = engine.features.history(asked, ["shop", "weather"], config=config, dataset=dataset_of(config)).to_pylist()
    assert found[0]["weather_temp"] is None and found[0]["shop_amount_mean_2d"] is None
    assert not found[0]["shop_count_2d"] and found[1]["shop_count_2d"] > 0


# ------------------------------------------------------------------------------------------------ a growing store


def test_an_inclusive_view_sees_a_late_row_at_the_first_instant_of_a_month(tmp_path: Path) -> None:
    """The last decision of January is 2020-02-01 00:00, and so is the report that comes late."""
    folder = write_tiny(tmp_path, 10)
    (folder / "visits.parquet").unlink()
    february = START + 31 * DAY
    base = visits(2)
    late = base.set_column(base.schema.get_field_index("at"), "at", pa.array([february - H, february - 3 * H], UTC))
    late = late.set_column(base.schema.get_field_index("shop"), "shop", pa.array(["a", "a"]))
    pq.write_table(late, folder / "visits-0.parquet")
    words = (*TABLE, "features.as_of='at + 1h'", "features.views.weather.inclusive=true")
    for turn, (time, expected) in enumerate([(february - DAY, 0.0), (february, 1.0)]):
        report = {
            "shop": ["a"],
            "seen": pa.array([time], UTC),
            "published": pa.array([time], UTC),
            "temp": [float(turn)],
        }
        pq.write_table(pa.table(report), folder / f"weather-{turn}.parquet")
        assert everything(built(config_of(folder, *words)))["weather_temp"].to_pylist() == [0.0, expected]


def test_another_event_time_of_a_table_is_another_view(tmp_path: Path) -> None:
    """Same rows, same order, same month: a report seen five days before it is published is too old by one time only."""
    folder = write_tiny(tmp_path, 600)
    report = {"shop": ["shop-1"], "seen": pa.array([START + 5 * DAY], UTC), "temp": [1.0]}
    pq.write_table(pa.table({**report, "published": pa.array([START + 10 * DAY], UTC)}), folder / "weather.parquet")
    other = (
        "data.tables.weather.columns.seen={type: timestamp, role: time}",
        "data.tables.weather.columns.published={type: timestamp, role: event_time, known_at: published}",
    )
    first, second = built(config_of(folder, *TABLE)), built(config_of(folder, *TABLE, *other))
    assert first.dataset.table_digest("weather") == second.dataset.table_digest("weather")
    assert first.views["weather"].directory != second.views["weather"].directory
    assert [set(everything(table)["weather_temp"].to_pylist()) for table in (first, second)] == [{None}, {None, 1.0}]


@pytest.mark.parametrize(
    "change",
    [
        "features.as_of='at - 5h'",
        "features.views.weather.max_age=2h",
        "features.views.weather.inclusive=true",
        "data.columns.amount.known_at='paid_at + 20h'",
    ],
)
def test_another_rule_over_the_same_rows_is_another_view(folder: Path, tmp_path: Path, change: str) -> None:
    before, after = built(config_of(folder, *TABLE)), built(config_of(folder, *TABLE, change))
    fresh = built(config_of(folder, *TABLE, change, f"paths.store={tmp_path}"))
    assert everything(after).equals(everything(fresh)) and not everything(after).equals(everything(before))


def test_another_version_of_a_function_is_another_view(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, twice)
    size = everything(built(config_of(folder, *KINDS)))["size"]
    offer(monkeypatch, lambda rows: pc.multiply(rows["size"], 3), "package==2")
    assert everything(built(config_of(folder, *KINDS)))["mine_twice"].equals(pc.multiply(size, 3))


def test_a_label_that_arrives_later_computes_its_own_windows(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, 10)
    (folder / "visits.parquet").unlink()
    table = months_of_visits()
    unknown = pa.array(np.arange(table.num_rows) >= 850)  # the labels of the last days
    place = table.schema.get_field_index("bought")
    pq.write_table(
        table.set_column(place, "bought", pc.if_else(unknown, pa.scalar(None, pa.bool_()), table["bought"])),
        folder / "visits-0.parquet",
    )
    before = built(config_of(folder))
    pq.write_table(table, folder / "visits-0.parquet")
    with features_computed() as asked:
        after = built(config_of(folder))
    assert asked == {"shop_bought_mean_6h", "shop_bought_mean_2d"} and parts_of(after) == {"computed": 1, "linked": 3}
    same = [name for name in before.views["shop"].columns if "bought" not in name]
    assert everything(after).select(same).equals(everything(before).select(same))
    assert not everything(after).equals(everything(before))


EVENTS = st.lists(
    st.tuples(
        st.integers(0, 6 * 48),  # half hours: ties, and both sides of a month's end
        st.one_of(st.none(), st.integers(-2, 100)),  # paid so many half hours later; never
        st.sampled_from(["a", "b", None]),
        st.one_of(st.none(), st.sampled_from([0.1, -2.5, 1e9, 7.0])),
        st.one_of(st.none(), st.booleans()),
    ),
    min_size=6,
    max_size=40,
)
REPORTS = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", None]),
        st.integers(0, 6 * 48),
        st.one_of(st.none(), st.integers(0, 60)),
        st.one_of(st.none(), st.integers(0, 9)),
    ),
    min_size=3,
    max_size=20,
)
ORIGIN = START + 28 * DAY


def events_table(rows: Sequence[Any]) -> pa.Table:
    at = [ORIGIN + row[0] * H // 2 for row in rows]
    paid = [None if row[1] is None else t + row[1] * H // 2 for t, row in zip(at, rows, strict=True)]
    return pa.table(
        {
            "visit": pa.array(range(len(rows)), pa.int64()),
            "shop": pa.array([row[2] for row in rows], pa.string()),
            "at": pa.array(at, UTC),
            "paid_at": pa.array(paid, UTC),
            "size": pa.array([0.0] * len(rows)),
            "amount": pa.array([row[3] for row in rows], pa.float64()),
            "bought": pa.array([row[4] for row in rows], pa.bool_()),
        }
    )


def reports_table(rows: Sequence[Any]) -> pa.Table:
    seen = [ORIGIN + row[1] * H // 2 for row in rows]
    known = [None if row[2] is None else t + row[2] * H // 2 for t, row in zip(seen, rows, strict=True)]
    return pa.table(
        {
            "shop": pa.array([row[0] for row in rows], pa.string()),
            "seen": pa.array(seen, UTC),
            "published": pa.array(known, UTC),
            "temp": pa.array([row[3] for row in rows], pa.float64()),
        }
    )


def brute_force(events: pa.Table, reports: pa.Table) -> list[dict[str, float | None]]:
    """The views read aloud, event by event in dataset order; of reports the (event time, known) pair is the tie-breaker."""
    rows = sorted(plain_rows(events), key=lambda row: (row["at"], row["visit"]))
    table = plain_rows(reports)
    found = []
    for row in rows:
        decision = row["at"] - H
        values: dict[str, Any] = {}
        for window, length in (("6h", 6 * H), ("2d", 2 * DAY)):
            past = [e for e in rows if e["shop"] == row["shop"] != None and decision - length <= e["at"] < decision]  # noqa: E711
            known = [e for e in past if e["paid_at"] is not None and e["paid_at"] < decision]
            amounts = [e["amount"] for e in known if e["amount"] is not None]
            labels = [float(e["bought"]) for e in known if e["bought"] is not None]
            values[f"shop_count_{window}"] = float(len(past))  # of no shop: none
            values[f"shop_bought_mean_{window}"] = math.fsum(labels) / len(labels) if labels else None
            values[f"shop_amount_mean_{window}"] = math.fsum(amounts) / len(amounts) if amounts else None
            values[f"shop_amount_max_{window}"] = max(amounts, default=None)
        seen = [
            r
            for r in table
            if r["shop"] == row["shop"] != None and r["published"] is not None and r["published"] < decision  # noqa: E711
        ]
        newest = max(((r["seen"], r["published"]) for r in seen), default=None)
        if newest is None or newest[0] < decision - 3 * DAY:
            values["weather_temp"] = {None}
        else:
            values["weather_temp"] = {r["temp"] for r in seen if (r["seen"], r["published"]) == newest}
        found.append(values)
    return found


def plain_rows(table: pa.Table) -> list[dict[str, Any]]:
    epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    micro = datetime.timedelta(microseconds=1)
    return [
        {k: (v - epoch) // micro if isinstance(v, datetime.datetime) else v for k, v in row.items()}
        for row in table.to_pylist()
    ]


@settings(max_examples=6, phases=[Phase.generate])  # shrinking would take minutes
@given(EVENTS, REPORTS, st.data())
def test_appends_in_any_order_end_at_the_full_build_and_the_brute_force(
    events: list[Any], reports: list[Any], data: st.DataObject
) -> None:
    table, side = events_table(events), reports_table(reports)
    order = data.draw(st.permutations(range(len(events))))
    cuts = sorted(data.draw(st.lists(st.integers(1, len(events) - 1), min_size=1, max_size=2)))
    cut = data.draw(st.integers(1, len(reports) - 1))
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_tiny(Path(scratch), 10)
        (folder / "visits.parquet").unlink()
        for turn, (start, stop) in enumerate(zip([0, *cuts], [*cuts, len(order)], strict=True)):
            pq.write_table(table.take(pa.array(order[start:stop], pa.int64())), folder / f"visits-{turn}.parquet")
            if turn < 2:
                pq.write_table(side.slice(*((0, cut), (cut,))[turn]), folder / f"weather-{turn}.parquet")
            found = built(config_of(folder, *TABLE))
        fresh = built(config_of(folder, *TABLE, f"paths.store={folder / 'fresh'}"))
        assert everything(found).equals(everything(fresh)) and found.digest == fresh.digest
        for row, expected in zip(everything(found).to_pylist(), brute_force(table, side), strict=True):
            assert row["weather_temp"] in expected.pop("weather_temp")
            for name, value in expected.items():
                assert row[name] == (value if value is None else pytest.approx(value, rel=1e-12)), name
