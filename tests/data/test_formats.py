"""Dates and times in a strptime format are read strictly: a day that does not exist is a finding, never another day."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import schema
from engine.config.sections.data import SourceColumn
from engine.data import date_formats
from engine.data.arrow_types import parse_type
from engine.data.parse import Reading, to_type
from engine.errors import UserError
from tests.data.helpers import read

DATE, TIME = "%d/%m/%Y", "%Y-%m-%d %H:%M:%S"
IMPOSSIBLE = [
    (DATE, "31/02/2022"), (DATE, "29/02/2023"), (DATE, "29/02/1900"), (DATE, "31/04/2022"), (DATE, "00/01/2022"),
    (DATE, "01/13/2022"), (DATE, "01/00/2022"), (DATE, "01/01/22"), (DATE, "01/01/202"), (DATE, "01/01/20222"),
    (DATE, "01/01/2022x"), (DATE, "01/01/2022 10:00"), (DATE, "01/ 1/2022"), (DATE, "1 /1/2022"), (DATE, "01-01-2022"),
    (DATE, "01/01/0000"), (DATE, "+1/01/2022"), (DATE, "01/01"), (DATE, "١/٠١/2022"),
    ("%Y%m%d", "2022111"), ("%Y%m%d", "20220229"), ("%Y%m%d", "202201011"), ("%Y%m%d", "2022 101"), ("%y%m%d", "22111"),
    (TIME, "2022-01-01 24:00:00"), (TIME, "2022-01-01 23:60:00"), (TIME, "2022-01-01 23:59:60"), (TIME, "2022-01-01 23:59:61"),
    (TIME, "2022-01-01T10:00:00"), (TIME, "2022-01-01  10:00:00"), (TIME, "2022-02-30 10:00:00"), (TIME, "22-01-01 10:00:00"),
    ("%Y-%j", "2022-366"), ("%Y-%j", "2022-000"), ("%Y-%j", "2022-12"), ("%d %b %Y", "30 Feb 2022"), ("%d %b %Y", "1 Foo 2022"),
    ("%a %d/%m/%Y", "Mon 02/01/2022"), ("%I:%M %p %F", "13:00 PM 2022-01-01"), ("%I:%M %p %F", "00:00 AM 2022-01-01"),
    ("%F %T%z", "2022-01-01 10:00:00+25:00"), ("%F %T%z", "2022-01-01 10:00:00"), ("%F %T.%f", "2022-01-01 10:00:00.1234567"),
]  # fmt: skip
POSSIBLE = [
    (DATE, "3/3/2022", "2022-03-03"), (DATE, "29/02/2024", "2024-02-29"), (DATE, " 01/02/2022 ", "2022-02-01"),
    ("%m/%d/%y", "12/31/68", "2068-12-31"), ("%m/%d/%y", "12/31/69", "1969-12-31"), ("%Y%m%d", "20240229", "2024-02-29"),
    ("%Y-%j", "2024-366", "2024-12-31"), ("%d %b %Y", "3 JAN 2022", "2022-01-03"), ("%d. %B %Y", "3. march 2022", "2022-03-03"),
    ("%A, %D", "Sunday, 01/02/22", "2022-01-02"), ("%Y-%m", "2022-03", "2022-03-01"), ("%Y", "1999", "1999-01-01"),
    (TIME, "2022-01-01 1:2:3", "2022-01-01T01:02:03"), ("%I:%M %p %F", "12:05 am 2022-01-01", "2022-01-01T00:05:00"),
    ("%I:%M %p %F", "12:05 PM 2022-01-01", "2022-01-01T12:05:00"), ("%F %T.%f", "2022-01-01 10:00:00.5", "2022-01-01T10:00:00.5"),
    ("%F %T%z", "2022-01-01 10:00:00+05:30", "2022-01-01T04:30:00"),
    ("%F %T%z", "2022-01-01 10:00:00-0130", "2022-01-01T11:30:00"),
    ("%F %R%z", "2022-01-01 10:00Z", "2022-01-01T10:00:00"), ("100%% %F", "100% 2022-01-01", "2022-01-01"),
    (DATE, "31/12/9999", "9999-12-31"),
]  # fmt: skip


def instant(text: str, form: str, zone: str = "UTC") -> Any:
    parsed = to_type(pa.array([text]), parse_type("timestamp"), Reading(zone, form))
    assert parsed.values.null_count == len(parsed.bad)
    return None if len(parsed.bad) else parsed.values[0].as_py().replace(tzinfo=None)


@pytest.mark.parametrize(("form", "text"), IMPOSSIBLE)
def test_an_impossible_date_is_no_date(form: str, text: str) -> None:
    assert instant(text, form) is None
    assert to_type(pa.array([text]), parse_type("date"), Reading("UTC", form)).bad.tolist() == [0]


@pytest.mark.parametrize(("form", "text", "iso"), POSSIBLE)
def test_a_possible_date_is_that_date(form: str, text: str, iso: str) -> None:
    assert instant(text, form) == datetime.datetime.fromisoformat(iso)
    if "T" not in iso:
        assert to_type(pa.array([text]), parse_type("date"), Reading("UTC", form)).values[0].as_py().isoformat() == iso


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_the_bad_value_stands_in_quarantine_with_file_and_row(kind: str, tmp_path: Path) -> None:
    values = ["28/02/2022", "31/02/2022", "1/3/2022", "01/01/22", None]
    path = tmp_path / f"a.{kind}"
    if kind == "csv":
        path.write_text("day,n\n" + "".join(f"{value or ''},1\n" for value in values))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"day": value, "n": 1}) + "\n" for value in values))
    else:
        pq.write_table(pa.table({"day": values, "n": [1] * 5}), path)
    table, staged = read(path, {"day": {"type": "date", "format": DATE}, "n": "int64"})
    assert table["day"].to_pylist() == [datetime.date(2022, 2, 28), datetime.date(2022, 3, 1), None]
    records = staged.tally.table().to_pylist()
    shown = '"{}"' if kind == "jsonl" else "{}"  # as the file has it
    assert [(record["row"], record["column"], record["value"]) for record in records] == [
        (2, "day", shown.format("31/02/2022")), (4, "day", shown.format("01/01/22")),
    ]  # fmt: skip
    assert all(record["file"].endswith(path.name) and DATE in record["reason"] for record in records)


def test_a_local_time_that_never_was_is_a_finding_and_one_that_was_twice_is_the_first() -> None:
    texts = pa.array(["2022-03-27 02:30:00", "2022-10-30 02:30:00"])
    parsed = to_type(texts, parse_type("timestamp"), Reading("Europe/Berlin", TIME))
    assert parsed.bad.tolist() == [0] and parsed.values[1].as_py().hour == 0


def test_an_instant_with_an_offset_declared_as_date_must_be_midnight_in_the_zone() -> None:
    texts = pa.array(["2022-01-01 23:00:00+0000", "2022-01-01 00:00:00+0000"])
    parsed = to_type(texts, parse_type("date"), Reading("Europe/Berlin", "%F %T%z"))
    assert parsed.bad.tolist() == [1] and parsed.values[0].as_py() == datetime.date(2022, 1, 2)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("%d/%m", "must have a year"), ("%c", "found '%c'"), ("%s", "found '%s'"), ("%Y %", "found '%'"),
        ("%Y %y", "everything once"),
        ("%Y-%m-%d %d", "everything once"), ("%m %b %Y", "everything once"), ("%I:%M %F", "%I and %p"),
        ("%D %Y", "everything once"),
    ],
)  # fmt: skip
def test_a_format_that_names_no_day_or_names_it_twice_is_refused(form: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        date_formats.read(pa.array(["1"]), form)


def test_a_format_of_another_type_is_refused_and_without_it_the_column_is_read() -> None:
    with pytest.raises(
        UserError, match="format is for columns of type timestamp or date, found type 'time': leave it out"
    ):
        schema.build(SourceColumn, {"type": "time", "format": "%H:%M"})
    assert schema.build(SourceColumn, {"type": "time"}).format is None


FORMS = (
    DATE, TIME, "%Y%m%d", "%Y%m%d%H%M%S", "%m/%d/%y", "%d-%b-%Y", "%B %d, %Y", "%a %d %b %Y %H:%M", "%Y-%j", "%F %T.%f",
    "%d.%m.%Y %I:%M %p", "%Y-%m-%dT%H:%M:%S%z", "%y%m%d", "%Y-%m", "%Hh%M %d%m%Y",
)  # fmt: skip
MOMENTS = st.datetimes(datetime.datetime(1000, 1, 1), datetime.datetime(9999, 12, 31))
CHARACTERS = "0123456789/-:. TZ+apmJ"


@st.composite
def texts(draw: Any, forms: tuple[str, ...] = FORMS) -> tuple[str, str]:
    """(format, text of that format with a few characters changed, removed or added)."""
    form = draw(st.sampled_from(forms))
    offset = datetime.timezone(datetime.timedelta(minutes=draw(st.integers(-720, 840))))
    text = draw(MOMENTS).replace(tzinfo=offset).strftime(form)
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(text)))
        text = text[:place] + draw(st.sampled_from(["", *CHARACTERS])) + text[place + draw(st.integers(0, 1)) :]
    return form, text.strip()


@given(texts())
def test_whatever_is_read_is_what_python_reads_and_what_python_writes_back_is_read(case: tuple[str, str]) -> None:
    form, text = case
    try:
        python = datetime.datetime.strptime(text, form.replace("%F", "%Y-%m-%d").replace("%T", "%H:%M:%S"))
        written = python.strftime(form)
    except (ValueError, OverflowError):
        python, written = None, ""
    found = instant(text, form) if text else None
    if python is not None and python.tzinfo:
        python = (python - python.utcoffset()).replace(tzinfo=None)  # type: ignore[operator]
    if found is not None:
        assert found == python
    elif python is not None and text:
        assert written != text or python.year < 1000


@given(st.lists(texts((DATE,)), min_size=1, max_size=20))
def test_texts_together_are_read_as_each_alone(cases: list[tuple[str, str]]) -> None:
    together = date_formats.read(pa.array([text for _, text in cases] + [None]), DATE).to_pylist()
    assert together == [date_formats.read(pa.array([text]), DATE)[0].as_py() for _, text in cases] + [None]
