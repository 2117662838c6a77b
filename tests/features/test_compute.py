"""Raw features against a brute force that reads the rule aloud, and no row sees its future."""

from __future__ import annotations

import datetime
import math
import random

import numpy as np
import pyarrow as pa
import pytest

from engine.config import schema
from engine.config.sections.data import DataConfig
from engine.config.sections.features import FeaturesConfig
from engine.errors import UserError
from engine.features import compute
from engine.features.compute import entity_codes, raw_features
from engine.features.spec import sensitive_features

H = 3_600_000_000
DATA = {
    "name": "events",
    "sources": {"events": {"path": "x.parquet", "columns": {"id": "string"}}},
    "columns": {
        "id": {"type": "int64", "role": "id"},
        "at": {"type": "timestamp", "role": "event_time", "known_at": "prior"},
        "known": {"type": "timestamp", "role": "time"},
        "who": {"type": "string", "role": "entity", "known_at": "prior"},
        "value": {"type": "float64", "role": "numeric", "known_at": "known"},
        "plan": {"type": "float64", "role": "numeric", "known_at": "prior"},
    },
    "tables": {
        "weather": {
            "columns": {
                "place": "string",
                "seen": {"type": "timestamp", "role": "event_time", "known_at": "seen"},
                "published": {"type": "timestamp", "role": "time"},
                "temp": {"type": "float64", "role": "numeric", "known_at": "published"},
            }
        },
        "places": {"static": True, "columns": {"place": "string", "height": {"type": "float64", "role": "numeric"}}},
    },
}
FEATURES = {
    "as_of": "at - 1h",
    "direct": {"plan": True},
    "calendar": {"at": {"column": "at", "parts": ["hour", "weekday"], "zone": "America/New_York"}},
    "views": {
        "who": {
            "entity": ["who"],
            "windows": ["2h", "1d"],
            "aggregates": {"rows": ["count"], "value": ["count", "sum", "mean", "max", "last"], "plan": ["count"]},
        },
        "weather": {
            "kind": "asof",
            "table": "weather",
            "entity": ["who"],
            "on": ["place"],
            "columns": ["temp"],
            "max_age": "6h",
        },
        "places": {"kind": "asof", "table": "places", "entity": ["who"], "on": ["place"], "columns": ["height"]},
    },
}


def configs(**features: object) -> tuple[DataConfig, FeaturesConfig]:
    return schema.build(DataConfig, DATA), schema.build(FeaturesConfig, {**FEATURES, **features})


def instant_column(values: list[int | None]) -> pa.Array:
    return pa.array(values, pa.timestamp("us", tz="UTC"))


def some_events(n: int, seed: int) -> pa.Table:
    draw = random.Random(seed)
    at = [draw.randrange(0, 40) * H // 2 for _ in range(n)]
    known = [None if draw.random() < 0.1 else t + draw.randrange(-2, 8) * H // 2 for t in at]
    return pa.table(
        {
            "id": pa.array(range(n), pa.int64()),
            "at": instant_column(at),
            "known": instant_column(known),
            "who": pa.array([draw.choice(["a", "b", "c", None]) for _ in range(n)]),
            "value": pa.array([draw.choice([None, 1.5, -2.0, 7.0, 1e9]) for _ in range(n)], pa.float64()),
            "plan": pa.array([float(draw.randrange(5)) for _ in range(n)]),
        }
    )


def some_tables(seed: int) -> dict[str, pa.Table]:
    draw = random.Random(seed)
    seen = [draw.randrange(0, 40) * H // 2 for _ in range(60)]
    weather = pa.table(
        {
            "place": pa.array([draw.choice(["a", "b"]) for _ in seen]),
            "seen": instant_column(seen),
            "published": instant_column([None if draw.random() < 0.1 else t + draw.randrange(0, 4) * H for t in seen]),
            "temp": pa.array([draw.choice([None, float(draw.randrange(100))]) for _ in seen], pa.float64()),
        }
    )
    return {"weather": weather, "places": pa.table({"place": ["a", "b"], "height": [10.0, 20.0]})}


def micros(value: datetime.datetime | None) -> int | None:
    if value is None:
        return None
    return round((value - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)) / datetime.timedelta(microseconds=1))


def brute_force(events: pa.Table, tables: dict[str, pa.Table]) -> list[dict[str, float | None]]:
    """Every feature of FEATURES, row by row, from the sentences of the specification."""
    rows = [{**row, "at": micros(row["at"]), "known": micros(row["known"])} for row in events.to_pylist()]
    weather = [
        {**row, "seen": micros(row["seen"]), "published": micros(row["published"])}
        for row in tables["weather"].to_pylist()
    ]
    heights = dict(zip(*(column.to_pylist() for column in tables["places"].columns), strict=True))
    found = []
    for row in rows:
        decision = row["at"] - H
        result: dict[str, float | None] = {}
        for window, length in (("2h", 2 * H), ("1d", 24 * H)):
            past = [
                e
                for e in rows
                if e["who"] is not None and e["who"] == row["who"] and decision - length <= e["at"] < decision
            ]
            known = [e for e in past if e["known"] is not None and e["known"] < decision and e["value"] is not None]
            values = [e["value"] for e in known]
            result[f"who_count_{window}"] = float(len(past))
            result[f"who_plan_count_{window}"] = float(len(past))
            result[f"who_value_count_{window}"] = float(len(values))
            result[f"who_value_sum_{window}"] = math.fsum(values) if values else None
            result[f"who_value_mean_{window}"] = math.fsum(values) / len(values) if values else None
            result[f"who_value_max_{window}"] = max(values, default=None)
            last = max(known, key=lambda e: (e["at"], max(e["at"], e["known"]), e["id"]), default=None)
            result[f"who_value_last_{window}"] = last["value"] if last else None
        reports = [
            (w["seen"], max(w["seen"], w["published"]), index)
            for index, w in enumerate(weather)
            if w["place"] == row["who"]
            and w["published"] is not None
            and w["published"] < decision
            and w["seen"] < decision
        ]
        newest = max(reports, default=None)
        fresh = newest is not None and newest[0] >= decision - 6 * H
        result["weather_temp"] = weather[newest[2]]["temp"] if fresh and newest else None
        result["places_height"] = heights.get(row["who"])
        found.append(result)
    return found


@pytest.mark.parametrize("seed", range(6))
def test_features_equal_the_brute_force(seed: int) -> None:
    data, features = configs()
    events, tables = some_events(120, seed), some_tables(seed)
    raw = raw_features(data, features, events, events, tables, threads=2)
    for index, (found, expected) in enumerate(zip(raw.to_pylist(), brute_force(events, tables), strict=True)):
        for name, value in expected.items():
            expected_value = value if value is None else pytest.approx(value, rel=1e-12)
            assert found[name] == expected_value, (seed, index, name)


@pytest.mark.parametrize("seed", range(6))
def test_no_row_sees_its_future(seed: int) -> None:
    """Alter, duplicate or delete everything known at or after a row's decision: its features stay byte-equal."""
    data, features = configs()
    events, tables = some_events(120, seed), some_tables(seed)
    full = raw_features(data, features, events, events, tables)
    draw = random.Random(seed)
    for index in draw.sample(range(events.num_rows), 15):
        probe = events.slice(index, 1)
        decision = micros(probe["at"][0].as_py()) - H
        for change in (delete_future, alter_future, duplicate_future):
            changed = change(events, decision)
            later = {"weather": change_weather(tables["weather"], decision), "places": tables["places"]}
            again = raw_features(data, features, probe, changed, later)
            assert again.equals(full.slice(index, 1).combine_chunks()), (seed, index, change.__name__)


def future_parts(events: pa.Table, decision: int) -> tuple[np.ndarray, np.ndarray]:
    at = np.array([micros(t) for t in events["at"].to_pylist()])
    known = np.array([micros(t) if t is not None else decision for t in events["known"].to_pylist()])
    return at >= decision, known >= decision


def alter_future(events: pa.Table, decision: int) -> pa.Table:
    _, unknown = future_parts(events, decision)
    value = [99.0 if hidden else v for hidden, v in zip(unknown, events["value"].to_pylist(), strict=True)]
    return events.set_column(events.schema.get_field_index("value"), "value", pa.array(value, pa.float64()))


def delete_future(events: pa.Table, decision: int) -> pa.Table:
    later, _ = future_parts(events, decision)
    return alter_future(events, decision).filter(pa.array(~later))


def duplicate_future(events: pa.Table, decision: int) -> pa.Table:
    later, _ = future_parts(events, decision)
    return pa.concat_tables([events.filter(pa.array(later)), events])


def change_weather(weather: pa.Table, decision: int) -> pa.Table:
    published = [micros(t) for t in weather["published"].to_pylist()]
    return weather.filter(pa.array([p is not None and p < decision for p in published]))


def test_features_do_not_depend_on_the_order_of_history() -> None:
    data, features = configs(
        views={"who": {**FEATURES["views"]["who"], "aggregates": {"value": ["sum", "mean", "std", "max"]}}}
    )  # type: ignore[index]
    events = some_events(150, 11)
    shuffled = events.take(pa.array(np.random.default_rng(0).permutation(150)))
    assert raw_features(data, features, events, shuffled, {}).equals(raw_features(data, features, events, events, {}))


def test_what_the_calendar_says_of_a_sensitive_column_is_sensitive() -> None:
    columns = {**DATA["columns"], "born": {"type": "timestamp", "role": "time", "known_at": "prior", "sensitive": True}}
    calendar = {name: {"column": name, "parts": ["month"]} for name in ("at", "born")}
    data = schema.build(DataConfig, {**DATA, "columns": columns})
    _, features = configs(calendar=calendar)
    found = sensitive_features(data, features)
    assert found and {name.split("_")[0] for name in found} == {"born"}


def test_calendar_parts_are_local() -> None:
    data, features = configs(views={})
    # 2013-11-03 is the end of daylight saving in New York: 05:30 and 06:30 UTC are both 01:30 there.
    instants = [datetime.datetime(2013, 11, 3, hour, 30, tzinfo=datetime.UTC) for hour in (4, 5, 6, 7)]
    events = pa.table({"at": pa.array(instants, pa.timestamp("us", tz="UTC")), "plan": [0.0] * 4})
    raw = raw_features(data, features, events, events, {})
    assert raw["at_hour"].to_pylist() == [0, 1, 1, 2]
    assert raw["at_weekday"].to_pylist() == [6] * 4


def test_a_null_key_part_never_matches() -> None:
    left = pa.table({"a": ["x", None, "x"], "b": [1, 1, 2]})
    for right in (left, left.slice(0)):  # the table itself, and another with the same rows
        codes, other = entity_codes(left, ("a", "b"), right, ("a", "b"))
        assert codes[1] == -1 and codes[0] != codes[2] and (codes == other).all()


DAY = datetime.date(2022, 1, 1)


@pytest.mark.parametrize(
    ("left", "right", "message"),
    [
        (pa.array([1]), pa.array(["x"]), "'a' int64 and 'b' string"),
        (pa.array([5]), pa.array(["5"]), "'a' int64 and 'b' string"),
        (pa.array(["005"]), pa.array([5]), "'a' string and 'b' int64"),
        (pa.array([True]), pa.array([1]), "'a' bool and 'b' int64"),
        (pa.array([1.0]), pa.array([1]), "'a' float64 and 'b' int64"),
        (pa.array([DAY]), pa.array([DAY]).cast(pa.timestamp("us", "UTC")), "'a' date and 'b' timestamp"),
    ],
)
def test_keys_of_types_that_cannot_be_compared_are_refused(left: pa.Array, right: pa.Array, message: str) -> None:
    """By the types alone, whatever the values are."""
    for rows in (1, 0):
        with pytest.raises(UserError, match=f"must be of one type, found {message}"):
            entity_codes(pa.table({"a": left[:rows]}), ("a",), pa.table({"b": right[:rows]}), ("b",))


def test_keys_of_integers_of_two_widths_are_compared_as_numbers() -> None:
    left, right = pa.array([5, 255, -1, None], pa.int16()), pa.array([2**40, 5, 2**64 - 1, None, 255], pa.uint64())
    codes, others = entity_codes(pa.table({"a": left}), ("a",), pa.table({"b": right}), ("b",))
    assert codes[0] == others[1] and codes[1] == others[4] and (others[[0, 2, 3]] == -1).all() and codes[3] == -1
    assert codes[2] not in others
    back, forth = entity_codes(pa.table({"b": right}), ("b",), pa.table({"a": left}), ("a",))
    assert back[1] == forth[0] and back[4] == forth[1] and (forth[[2, 3]] == -1).all()


def test_keys_of_many_columns_do_not_collide() -> None:
    rng = np.random.default_rng(5)
    columns = {name: rng.integers(0, 50_000, 20_000) for name in "abcd"}
    table = pa.table(columns)
    codes, others = entity_codes(table, tuple("abcd"), table.slice(10_000), tuple("abcd"))
    assert (codes[10_000:] == others).all()
    keys = list(zip(*(columns[name].tolist() for name in "abcd"), strict=True))
    assert len(set(codes.tolist())) == len(set(keys))
    assert len(set(zip(codes.tolist(), keys, strict=True))) == len(set(keys))


def test_a_static_table_with_a_repeated_key_is_refused() -> None:
    data, features = configs()
    events, tables = some_events(5, 0), some_tables(0)
    tables["places"] = pa.table({"place": ["a", "a"], "height": [1.0, 2.0]})
    with pytest.raises(UserError, match=r"one row per key.*'a'"):
        raw_features(data, features, events, events, tables)


def test_zero_is_one_key_whatever_its_sign() -> None:
    keys = pa.table({"k": pa.array([0.0, -0.0, 1.0, None])})
    codes, _ = compute._codes_of(keys["k"], pa.chunked_array([pa.array([-0.0, 1.0])]))
    assert codes[0] == codes[1] == codes[4] and codes[2] == codes[5] != codes[0] and codes[3] == -1
    hashes = compute.entity_hash(keys, ["k"])
    assert hashes[0] == hashes[1] != hashes[2]
