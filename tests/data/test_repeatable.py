"""A query gives the same rows each time, or it is refused by name: over orders of the rows, files, threads and memory."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data import query, repeatable
from engine.data.expressions import expression_columns
from engine.data.ingest_plan import check_schema
from engine.errors import UserError
from tests.data.helpers import build, config

TYPES = {"id": "int64", "k": "int64", "t": "timestamp", "x": "float64", "y": "float64", "name": "string"}
SOURCES = {"s": ["id", "k", "t", "x", "name"], "u": ["k", "t", "y"]}

# Each gives `key` and `value`; many rows share k and t, and the floats do not add up exactly.
ALLOWED = [
    "SELECT k AS key, x AS value FROM s",
    "SELECT DISTINCT k AS key, name AS value FROM s",
    "SELECT s.k AS key, x + y AS value FROM s JOIN u USING (k)",
    "SELECT k AS key, count(*) AS value FROM s GROUP BY k",
    "SELECT k AS key, max(x) - min(x) AS value FROM s GROUP BY k",
    "SELECT k AS key, median(x) AS value FROM s GROUP BY k",
    "SELECT k AS key, nullif(name, 'a') AS value FROM s",
    "SELECT k AS key, if(x > 1, 'high', 'low') AS value FROM s",
    "SELECT k AS key, make_timestamptz(2020, 1, 1 + k, 0, 0, 0.0) AS value FROM s",
    "SELECT k AS key, date_trunc('day', t) AS value FROM s",
    "SELECT k AS key, age(t, TIMESTAMP '2020-01-01') AS value FROM s",
    "SELECT k AS key, unnest(range(k)) AS value FROM s",
    "SELECT k AS key, value FROM s, range(3) r(value)",
    "WITH big AS (SELECT * FROM s WHERE x > 1) SELECT k AS key, name AS value FROM big",
    # Decided by the order of the rows only in the last bits, or among ties.
    "SELECT k AS key, sum(x) AS value FROM s GROUP BY k",
    "SELECT k AS key, avg(x) AS value FROM s GROUP BY k",
    "SELECT k AS key, stddev_samp(x) AS value FROM s GROUP BY k",
    "SELECT s.k AS key, corr(x, y) AS value FROM s JOIN u USING (k) GROUP BY s.k",
    "SELECT k AS key, geomean(abs(x) + 1) AS value FROM s GROUP BY k",
    "SELECT k AS key, mode(name) AS value FROM s GROUP BY k",
    "SELECT k AS key, arg_max(name, t) AS value FROM s GROUP BY k",
    "SELECT k AS key, first(name ORDER BY t) AS value FROM s GROUP BY k",
    "SELECT k AS key, string_agg(name, ',' ORDER BY t) AS value FROM s GROUP BY k",
    "SELECT k AS key, list(x ORDER BY t)::VARCHAR AS value FROM s GROUP BY k",
    "SELECT k AS key, approx_quantile(x, 0.3) AS value FROM s GROUP BY k",
    "SELECT k AS key, name || row_number() OVER (PARTITION BY k ORDER BY t) AS value FROM s",
    "SELECT k AS key, lag(x) OVER (PARTITION BY k ORDER BY t) AS value FROM s",
    "SELECT k AS key, sum(x) OVER (PARTITION BY k) AS value FROM s",
    "SELECT k AS key, sum(x) OVER (ORDER BY t ROWS BETWEEN 2 PRECEDING AND CURRENT ROW) AS value FROM s",
    "SELECT k AS key, name AS value FROM s QUALIFY row_number() OVER (PARTITION BY k ORDER BY t) = 1",
    "SELECT DISTINCT ON (k) k AS key, name AS value FROM s ORDER BY k, t",
    "SELECT k AS key, name AS value FROM s ORDER BY t LIMIT 7",
    "SELECT k AS key, name AS value FROM s WHERE id IN (SELECT id FROM s ORDER BY t LIMIT 5)",
    "SELECT k AS key, name AS value FROM s USING SAMPLE reservoir(10 ROWS) REPEATABLE (3)",
    "SELECT k AS key, name AS value FROM s TABLESAMPLE bernoulli(40%) REPEATABLE (3)",
    "SELECT s.k AS key, y AS value FROM s ASOF JOIN u ON s.k = u.k AND s.t >= u.t",
    "SELECT key, value FROM (PIVOT s ON name IN ('a', 'b') USING sum(x) GROUP BY k) AS p(key, value, other)",
]
USING_KEY = """WITH RECURSIVE last(key, value) USING KEY (key) AS (
    SELECT k, name FROM s UNION SELECT key, value FROM last WHERE false) SELECT * FROM last"""
ALLOWED.append(USING_KEY)
BY_ORDER = [sql for sql in ALLOWED[14:]]

REFUSED = [
    ("SELECT random() FROM s", r"random\(\)"),
    ("SELECT * FROM s ORDER BY random()", r"random\(\)"),
    ("SELECT s.* REPLACE (uuid() AS name) FROM s", r"uuid\(\)"),
    ("SELECT * FROM s WHERE x > (SELECT random())", r"random\(\)"),
    ("WITH a AS (SELECT gen_random_uuid() AS g FROM s) SELECT * FROM a", r"gen_random_uuid\(\)"),
    ("SELECT setseed(0.5) FROM s", r"setseed\(\)"),
    ("SELECT nextval('n') FROM s", r"nextval\(\)"),
    ("SELECT * FROM s WHERE t < now()", r"now\(\)"),
    ("SELECT today() FROM s", r"today\(\)"),
    ("SELECT current_date FROM s", "current_date: it reads the clock"),
    ("SELECT CURRENT_TIMESTAMP FROM s", "current_timestamp: it reads the clock"),
    ("SELECT localtime FROM s", "localtime: it reads the clock"),
    ("SELECT get_current_timestamp() FROM s", r"get_current_timestamp\(\)"),
    ("SELECT age(t) FROM s", r"age\(\): it reads the clock"),
    ("SELECT ago(INTERVAL 1 DAY) FROM s", r"ago\(\): it reads the clock"),
    ("SELECT txid_current() FROM s", r"txid_current\(\)"),
    ("SELECT current_setting('threads') FROM s", r"current_setting\(\)"),
    ("SELECT version() FROM s", r"version\(\)"),
    ("SELECT reservoir_quantile(x, 0.5) FROM s", r"reservoir_quantile\(\): it draws a sample"),
    ("SELECT * FROM s USING SAMPLE 10%", "a sample without a seed"),
    ("SELECT * FROM s TABLESAMPLE reservoir(3 ROWS)", "a sample without a seed"),
    ("SELECT * FROM (SELECT * FROM s USING SAMPLE 3)", "a sample without a seed"),
    ("SELECT * FROM s LIMIT 3", "LIMIT or OFFSET: without ORDER BY"),
    ("SELECT * FROM s LIMIT 10%", "LIMIT or OFFSET: without ORDER BY"),
    ("SELECT * FROM s OFFSET 3", "LIMIT or OFFSET: without ORDER BY"),
    ("SELECT * FROM (SELECT * FROM s ORDER BY t) LIMIT 3", "LIMIT or OFFSET: without ORDER BY"),
    ("SELECT * FROM s WHERE k IN (SELECT k FROM u LIMIT 1)", "LIMIT or OFFSET: without ORDER BY"),
    ("SELECT k FROM s UNION SELECT k FROM u LIMIT 1", "LIMIT or OFFSET: without ORDER BY"),
    ("SELECT * FROM s FETCH FIRST 3 ROWS ONLY", "LIMIT or OFFSET: without ORDER BY"),
    ("SELECT * FROM s, LATERAL (SELECT y FROM u WHERE u.k = s.k LIMIT 1)", "LIMIT or OFFSET: without ORDER BY"),
    ("SELECT ARRAY(SELECT y FROM u WHERE u.k = s.k) FROM s", r"array_agg\(\): it takes rows in the order"),
    ("SELECT count(*) FILTER (WHERE random() < 0.5) FROM s", r"random\(\)"),
    ("SELECT COLUMNS(c -> random() > 0.5) FROM s", r"random\(\)"),
    ("SELECT DISTINCT ON (k) * FROM s", "DISTINCT ON: without ORDER BY"),
    ("SELECT first(x) FROM s", r"first\(\): it takes rows in the order"),
    ("SELECT last(x) FILTER (x > 1) FROM s", r"last\(\): it takes rows in the order"),
    ("SELECT any_value(x) FROM s GROUP BY k", r"any_value\(\): it takes rows in the order"),
    ("SELECT array_agg(x) FROM s", r"array_agg\(\): it takes rows in the order"),
    ("SELECT string_agg(DISTINCT name, ',') FROM s", r"string_agg\(\): it takes rows in the order"),
    ("SELECT json_group_array(x) FROM s", r"json_group_array\(\): DuckDB defines it by string_agg\(\)"),
    ("FROM (PIVOT s ON k IN (1, 2) USING first(x))", r"first\(\): it takes rows in the order"),
    ("SELECT row_number() OVER () FROM s", r"row_number\(\) OVER: without ORDER BY"),
    ("SELECT lag(x) OVER (PARTITION BY k) FROM s", r"lag\(\) OVER: without ORDER BY"),
    ("SELECT ntile(4) OVER w FROM s WINDOW w AS (PARTITION BY k)", r"ntile\(\) OVER: without ORDER BY"),
    ("SELECT sum(x) OVER (ROWS BETWEEN 1 PRECEDING AND CURRENT ROW) FROM s", r"sum\(\) OVER: without ORDER BY"),
    ("SELECT * FROM s POSITIONAL JOIN u", "POSITIONAL JOIN"),
    ("SELECT * FROM read_csv('a.csv')", r"read_csv\(\): it reads something else"),
    ("SELECT * FROM 'a.parquet'", "'a.parquet': it is none of data.sources"),
    ("SELECT * FROM glob('*')", r"glob\(\): it reads something else"),
    ("SELECT * FROM duckdb_memory()", r"duckdb_memory\(\): it reads something else"),
    ("SELECT * FROM query('SELECT random()')", r"query\(\): it reads something else"),
    ("SELECT * FROM information_schema.tables", "'tables': it is none of data.sources"),
    ("SELECT * FROM pg_catalog.pg_class", "'pg_class': it is none of data.sources"),
    ("SELECT * FROM (SUMMARIZE s)", "SUMMARIZE"),
    ("SELECT * FROM table_of_python", "'table_of_python': it is none of data.sources"),
    ("SELECT 1; SELECT 2", "one SELECT"),
    ("CREATE TABLE a AS SELECT 1", "one SELECT"),
]


def rows_of_both(count: int, seed: int) -> dict[str, pa.Table]:
    """Rows in an order of their own; equal content for every seed."""
    values = random.Random(7)
    s = [
        {"id": i, "k": i % 5, "t": i % 3 * 10**6, "x": values.uniform(-1, 1) * 10 ** values.randint(-9, 9),
         "name": values.choice("abcd")}
        for i in range(count)
    ]  # fmt: skip
    u = [{"k": i % 5, "t": i % 3 * 10**6, "y": values.uniform(-1, 1) * 1e6} for i in range(30)]
    for rows in (s, u):
        random.Random(seed).shuffle(rows)
    return {name: typed(rows) for name, rows in (("s", s), ("u", u))}


def typed(rows: list[dict[str, Any]]) -> pa.Table:
    table = pa.Table.from_pylist(rows)
    return table.set_column(table.column_names.index("t"), "t", table["t"].cast(pa.timestamp("us")))


def answer(sql: str, tables: dict[str, pa.Table], ordered: bool = True) -> list[str]:
    """The rows as texts of all their digits, in an order of their own."""
    needed = repeatable.check(sql, SOURCES, "data.query") if ordered else ()
    with query.connect() as connection:
        query.register(connection, tables, needed)
        return sorted(repr(row) for batch in query.run(connection, sql, "data.query") for row in batch.to_pylist())


@pytest.mark.parametrize("sql", ALLOWED)
def test_an_allowed_query_gives_the_same_rows_for_every_order_of_its_sources(sql: str) -> None:
    answers = [answer(sql, rows_of_both(400, seed)) for seed in range(4)]
    assert answers[0] and all(other == answers[0] for other in answers)


def test_most_of_them_would_differ_without_an_order() -> None:
    differing = [
        sql
        for sql in BY_ORDER
        if len({tuple(answer(sql, rows_of_both(400, seed), ordered=False)) for seed in range(4)}) > 1
    ]
    assert len(differing) > len(BY_ORDER) - 3  # a sum or two may come out alike by luck


def test_what_order_decides_nothing_of_is_read_as_it_lies() -> None:
    for sql in ALLOWED[:14]:
        assert repeatable.check(sql, SOURCES, "data.query") == frozenset()
    assert repeatable.check("SELECT sum(x) FROM S", SOURCES, "data.query") == {"s"}


@pytest.mark.parametrize(("sql", "message"), REFUSED)
def test_a_query_that_may_differ_from_run_to_run_is_refused_by_name(sql: str, message: str) -> None:
    with pytest.raises(UserError, match=f"data.query must .*{message}"):
        repeatable.check(sql, SOURCES, "data.query")


def test_what_a_refusal_advises_is_accepted() -> None:
    for sql in (
        "SELECT * FROM s USING SAMPLE reservoir(100 ROWS) REPEATABLE (1)",
        "SELECT first(x ORDER BY t) FROM s",
        "SELECT row_number() OVER (PARTITION BY k ORDER BY t) FROM s",
        "SELECT * FROM s ORDER BY t LIMIT 3",
        "SELECT string_agg(to_json(x), ',' ORDER BY t) FROM s",
    ):
        assert answer(sql, rows_of_both(50, 1)) == answer(sql, rows_of_both(50, 2))


def test_a_column_may_be_called_as_the_clock_is() -> None:
    assert repeatable.check("SELECT current_date FROM s", {"s": ["current_date"]}, "q") == frozenset()


# ----------------------------------------------------------------------- the catalogue itself as the oracle


def run_all(texts: list[str], tables: dict[str, pa.Table]) -> list[str | None]:
    """What each text gives in one session, None where DuckDB refuses it."""
    found: list[str | None] = []
    with query.connect() as connection:
        query.register(connection, tables)
        for sql in texts:
            try:
                found.append(repr([batch.to_pylist() for batch in query.run(connection, sql, "q")]))
            except UserError:
                found.append(None)
    return found


def test_every_function_without_arguments_that_changes_is_refused() -> None:
    names = sorted(
        name
        for name, found in repeatable.catalogue().items()
        if name.isidentifier() and any(item.kind in ("scalar", "macro") and item.arguments == 0 for item in found)
    )
    assert len(names) > 20
    texts = [f"SELECT {name}() AS v FROM s" for name in names]
    before = run_all(texts, {"s": pa.table({"x": [1, 2]})})
    time.sleep(0.002)
    after = run_all(texts, {"s": pa.table({"x": [1, 2]})})
    changed = [name for name, one, other in zip(names, before, after, strict=True) if one != other]
    assert {"random", "now", "uuid"} <= set(changed)
    for name in changed:
        with pytest.raises(UserError, match=name):
            repeatable.check(f"SELECT {name}() AS v FROM s", {"s": ["x"]}, "q")


def test_every_aggregate_that_the_order_of_rows_decides_is_refused_or_ordered() -> None:
    names = sorted(
        name for name, found in repeatable.catalogue().items()
        if name.isidentifier() and any(item.kind == "aggregate" for item in found)
    )  # fmt: skip
    assert len(names) > 60
    many = ("x", "name", "k", "x, k", "name, k", "x, 0.3", "name, ','", "x, 3")
    texts = [f"SELECT k, {name}({words}) AS v FROM s GROUP BY k ORDER BY k" for name in names for words in many]
    found = [run_all(texts, rows_of_both(200, seed)) for seed in range(3)]
    passed = []
    for sql, *answers in zip(texts, *found, strict=True):
        if len(set(answers)) == 1:
            continue
        try:
            assert repeatable.check(sql, SOURCES, "q"), f"{sql} depends on the order of the rows"
        except UserError:
            continue
        passed.append(sql)
    assert {"sum", "avg", "mode"} <= {sql.split()[2].split("(")[0] for sql in passed}


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 2), st.floats(-1e9, 1e9), st.sampled_from("ab")),
        min_size=1,
        max_size=30,
    ),
    shuffle=st.randoms(use_true_random=False),
    sql=st.sampled_from([sql for sql in BY_ORDER if " u " not in sql]),
)
def test_any_rows_in_any_order(rows: list[tuple[Any, ...]], shuffle: random.Random, sql: str) -> None:
    plain = [{"id": 0, "k": k, "t": t, "x": x, "name": name} for k, t, x, name in rows]
    mixed = list(plain)
    shuffle.shuffle(mixed)
    assert answer(sql, {"s": typed(plain)}) == answer(sql, {"s": typed(mixed)})


# ---------------------------------------------------------------------------------- where SQL is taken from a user


def data_of(folder: Path, files: int, seed: int, queries: list[str]) -> dict[str, Any]:
    """A data section over files that hold the same rows, however they are cut and ordered; a side table a query."""
    import pyarrow.parquet

    tables = rows_of_both(400, seed)
    for name, table in tables.items():
        (folder / name).mkdir(parents=True)
        for place in range(files):
            part = table.slice(
                place * len(table) // files, (place + 1) * len(table) // files - place * len(table) // files
            )
            pyarrow.parquet.write_table(part, folder / name / f"{place}.parquet", row_group_size=37)
    return {
        "sources": {
            name: {"path": str(folder / name), "format": "parquet", "columns": {column: TYPES[column] for column in columns}}
            for name, columns in SOURCES.items()
        },
        "query": "SELECT id, t, sum(x) OVER (PARTITION BY k ORDER BY t) AS total FROM s",
        "columns": {
            "id": {"type": "int64", "role": "id"},
            "t": {"type": "timestamp", "role": "event_time", "known_at": "prior"},
            "total": {"type": "float64", "known_at": "prior"},
        },
        "tables": {
            f"q{place}": {
                "query": f"SELECT key, value::VARCHAR AS value FROM ({sql})",
                "static": True,
                "columns": {"key": "int64", "value": {"type": "string", "nullable": True}},
            }
            for place, sql in enumerate(queries)
        },
    }  # fmt: skip


def test_a_dataset_does_not_depend_on_files_threads_or_memory_whatever_its_queries(tmp_path: Path) -> None:
    digests, recipes = [], []
    for files, seed, threads, memory in ((1, 0, 1, "1GB"), (3, 1, 2, "1GB"), (7, 2, 2, "300MB")):
        folder = tmp_path / str(files)
        given = config(folder, data_of(folder / "in", files, seed, ALLOWED[::4]), threads=threads, memory=memory)
        found, _ = build(given)
        digests.append({name: entry["digest"] for name, entry in found.manifest["tables"].items()} | {"": found.digest})
        recipes.append(found.recipe)
    assert digests[0] == digests[1] == digests[2] and len(digests[0]) == len(ALLOWED[::4]) + 1


def test_queries_and_rules_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    data = data_of(tmp_path, 1, 0, ALLOWED[:1])
    for change, message in (
        ({"query": "SELECT id, t, random() AS total FROM s"}, r"data\.query must .*random"),
        ({"tables": {"q0": {**data["tables"]["q0"], "query": "SELECT now() AS value"}}}, r"data\.tables\.q0\.query must"),
        ({"rules": {"past": "t < now()"}}, r"data\.rules\.past must give the same value every time, which 'now'"),
        ({"rules": {"most": "total < max(total)"}}, r"data\.rules\.most must read one row at a time"),
        ({"rules": {"other": "id IN (SELECT id FROM events LIMIT 1)"}}, r"data\.rules\.other must read one row"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            check_schema(config(tmp_path, {**data, **change}).data)


def test_expressions_and_queries_judge_functions_alike() -> None:
    assert expression_columns("nullif(a, 0) + if(b > 1, 1, 2)") == ("a", "b")
    for sql in ("random()", "age(t)", "ago(INTERVAL 1 DAY)", "current_setting('threads')"):
        with pytest.raises(UserError, match="must give the same value every time"):
            expression_columns(sql)
    with pytest.raises(UserError, match="the aggregate 'geomean'"):
        expression_columns("geomean(x)")
