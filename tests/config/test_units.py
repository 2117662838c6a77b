"""Spans, instants and sizes as people write them, across the changes of the clock."""

from __future__ import annotations

import dataclasses
import datetime
import zoneinfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import schema, units
from engine.config.tree import Config
from engine.errors import UserError

HOUR = 3_600_000_000
NEW_YORK = "America/New_York"


@pytest.mark.parametrize(
    "text, expected",
    [("2h", 2 * HOUR), ("7d", 168 * HOUR), ("90min", 90 * 60_000_000), ("1.5s", 1_500_000), ("3us", 3)],
)
def test_spans(text: str, expected: int) -> None:
    assert units.Span(text).microseconds == expected


@pytest.mark.parametrize("text", ["", "h", "2", "2x", "2 hours", "-1h", "1h30min", "nan h"])
def test_a_span_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="a span must be"):
        units.Span(text)


def test_sizes_and_shares() -> None:
    assert [units.Size(text).bytes for text in ("4GB", "2MiB", "5")] == [4 * 10**9, 2**21, 5]
    assert units.Share("1%").fraction == 0.01 and units.Share("0.5").fraction == 0.5
    for wrong in ("101%", "-0.1", "x", "nan"):
        with pytest.raises(UserError):
            units.Share(wrong)


def test_moments() -> None:
    for text, column, offset in (
        ("arrived", "arrived", 0),
        ("due - 1h", "due", -HOUR),
        ("due + 15min", "due", HOUR // 4),
        ("due-1h", "due", -HOUR),
        ("Date Egg (UTC)", "Date Egg (UTC)", 0),
        ("Date Egg + 1h", "Date Egg", HOUR),
        ('"paid-on" - 1h', "paid-on", -HOUR),
        ('"1st"', "1st", 0),
    ):
        assert (units.Moment(text).column, units.Moment(text).offset) == (column, offset)
    for wrong in ("", "1h", "a - ", "a - b", "a * 1h", '"a" "b"', '""'):
        with pytest.raises(UserError):
            units.Moment(wrong)
    for name in ("due", "Date Egg", "paid-on", "1st", "a + 1h"):
        assert units.Moment(f"{units.named(name)} + 1h").column == name


def test_a_bound_without_an_offset_is_read_in_the_zone() -> None:
    local = units.instant("2013-06-01", NEW_YORK)
    assert local - units.instant("2013-06-01", "UTC") == 4 * HOUR
    assert units.instant("2013-06-01T00:00-04:00", "UTC") == local
    assert units.instant("2013-06", NEW_YORK) == local


def test_the_day_of_the_clock_change_has_25_hours() -> None:
    start, stop = units.window("2013-11-03", NEW_YORK)
    assert stop - start == 25 * HOUR
    # 01:30 occurs twice: its first occurrence is meant.
    assert units.instant("2013-11-03T01:30", NEW_YORK) - start == int(1.5 * HOUR)


@given(st.datetimes(datetime.datetime(1970, 1, 2), datetime.datetime(2100, 1, 1)), st.sampled_from([NEW_YORK, "UTC"]))
def test_an_instant_reads_back_from_its_text(moment: datetime.datetime, zone: str) -> None:
    aware = moment.replace(tzinfo=datetime.UTC).astimezone(zoneinfo.ZoneInfo(zone))
    value = units.instant(aware.isoformat(), zone)
    assert value == (aware - units.EPOCH) // datetime.timedelta(microseconds=1)
    assert units.instant(units.format_instant(value, zone), "UTC") == value


def test_windows() -> None:
    assert units.window("2013-12", "UTC") == (units.instant("2013-12-01", "UTC"), units.instant("2014-01-01", "UTC"))
    assert units.window(["2013-01-01", "2013-01-02"], "UTC")[1] == units.instant("2013-01-02", "UTC")
    for wrong in ("2013", "June", "2013-13", "2013-01-01T00:00"):
        with pytest.raises(UserError):
            units.window(wrong, "UTC")


def test_a_period_must_end_after_it_starts() -> None:
    for wrong in (["2013-01-02", "2013-01-01"], ["2013-01-01", "2013-01-01"], ["2013-01-01"]):
        with pytest.raises(UserError, match="a period must"):
            units.between(wrong, "UTC")


def test_an_unknown_zone_is_named() -> None:
    for wrong in ("America/New_Yrk", "", "../etc/passwd"):
        with pytest.raises(UserError, match="a time zone must be"):
            units.zone(wrong)


def test_the_times_of_a_config_are_parsed_in_its_zone() -> None:
    split = {"train": ["2013-06-01", "2013-07-01"], "known_by": "2013-08"}
    values = {"data": {"time_zone": NEW_YORK}, "split": split, "monitor": {"window": "2013-06"}}
    config = schema.build(Config, values)
    start, stop = units.window("2013-06", NEW_YORK)
    assert config.periods == {"split.train": (start, stop), "monitor.window": (start, stop)}
    assert config.instants == {"split.known_by": units.instant("2013-08-01", NEW_YORK)}
    moved = dataclasses.replace(config, data=dataclasses.replace(config.data, time_zone="UTC"))
    assert moved.periods["split.train"] == (start - 4 * HOUR, stop - 4 * HOUR)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"split": {"train": ["2013", "2014-01"]}}, "split.train: an instant must be .*, found '2013'"),
        ({"split": {"known_by": ""}}, "split.known_by: auto, any, or an instant must be .*, found ''"),
        ({"retrain": {"now": "soon"}}, "retrain.now: an instant must be .*, found 'soon'"),
        ({"score": {"between": ["2013-02", "2013-01"]}}, "score.between: a period must end after it starts"),
        ({"monitor": {"window": "June"}}, "monitor.window: a window must be a month .*, found 'June'"),
        (
            {"split": {"train": ["2013-01", "2013-03"], "test": ["2013-02", "2013-04"]}},
            r"split.test must start after the end of split.train \(2013-03\), found 2013-02",
        ),
        (
            {"backtest": {"start": "2013-02", "stop": "2013-02-01"}},
            r"backtest.stop must be after backtest.start \(2013-02\), found 2013-02-01",
        ),
    ],
)
def test_a_wrong_time_of_a_config_is_refused_by_its_key(values: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        schema.build(Config, values)
