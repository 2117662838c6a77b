"""Are the kernels faster than what people use for the same work?

Data are drawn once, seeded. Windows: rows sorted by time, their own probes, known when they happen (the fast path) and, as
`window_7d_late`, up to a day later (the general path, for which peers have no equal). The peer's result is checked against ours
on the same data before anything is timed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks import peers
from benchmarks.harness import Row, Settings, compare
from kernels import asof as asof_kernel
from kernels import gather, metrics, order, profile, windows

SECOND, HOUR, DAY = 1_000_000, 3_600_000_000, 86_400_000_000
SIX = [2 * HOUR, 6 * HOUR, DAY, 3 * DAY, 7 * DAY, 28 * DAY]
FOUR = ["mean", "std", "max", "count"]
FIVE = ["count", "mean", "std", "max", "min"]


def run(settings: Settings, bandwidth: float) -> list[Row]:
    rows: list[Row] = []
    for work, benchmark in WORKS.items():
        if settings.wanted(work):
            rows += benchmark(settings, bandwidth)
    return rows


# --------------------------------------------------------------------------- windows
def events(n: int) -> tuple[Any, Any, Any]:
    """(entity, time, value): a year of n events of 4,044 entities, in time order."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 4044, n), np.sort(rng.integers(0, 365 * 86400, n)) * SECOND, rng.standard_normal(n)


def lateness(n: int) -> Any:
    """How long after it happened each event became known: up to a day."""
    return np.random.default_rng(1).integers(0, 86400, n) * SECOND


def _close(ours: Any, theirs: Any, what: str) -> None:
    if not np.allclose(ours, theirs, rtol=1e-6, atol=1e-9, equal_nan=True):
        raise ValueError(f"{what} must give what ours gives, found a difference of {np.nanmax(np.abs(ours - theirs))}")


def polars_window(data: tuple[Any, Any, Any], widths: list[int], names: list[str]) -> Any:
    import polars as pl  # a peer: the benchmark runs without it

    entity, time, value = data
    frame = pl.DataFrame({"g": entity, "t": time.view("datetime64[us]"), "v": value})
    v = pl.col("v")
    known = {"mean": v.mean(), "std": v.std(), "max": v.max(), "min": v.min(), "count": v.count().cast(pl.Float64)}

    def call() -> Any:
        parts = []
        for width in widths:
            rolled = frame.rolling("t", period=f"{width // HOUR}h", group_by="g", closed="left")
            parts.append(rolled.agg(**{name: known[name] for name in names}))
        return parts

    return call


def duckdb_window(data: tuple[Any, Any, Any], widths: list[int], names: list[str], threads: int) -> Any:
    import duckdb
    import pyarrow as pa

    entity, time, value = data
    connection = duckdb.connect(config={"threads": threads})
    table = pa.table({"g": entity, "t": time, "v": value, "i": np.arange(len(value))})
    connection.register("arrow", table)
    connection.execute("create table events as select * from arrow")
    known = {"mean": "avg(v)", "std": "stddev_samp(v)", "max": "max(v)", "min": "min(v)", "count": "count(v)"}
    columns, frames = ["i"], []
    for k, width in enumerate(widths):
        frames.append(f"w{k} as (partition by g order by t range between {width} preceding and 1 preceding)")
        columns += [f"{known[name]} over w{k} as {name}{k}" for name in names]
    query = f"select {', '.join(columns)} from events window {', '.join(frames)}"
    return lambda: connection.execute(query).fetchnumpy()


def _check_windows(names: list[str]) -> None:
    """Peers and ours agree on a small part; tied rows included."""
    data = entity, time, value = events(20_000)
    ours = windows.trailing(entity, time, entity, time, time, value, [7 * DAY], names)[:, 0]
    try:
        found = duckdb_window(data, [7 * DAY], names, 1)()
        theirs = np.stack([np.ma.filled(found[f"{name}0"].astype(float), np.nan) for name in names], 1)
        _close(ours[found["i"]], theirs, "DuckDB")
    except ImportError:
        pass
    try:
        frame = polars_window(data, [7 * DAY], names)()[0]
    except ImportError:
        return
    order_ = np.lexsort((time, entity))
    frame = frame.sort("g", "t", maintain_order=True)
    _close(ours[order_], np.stack([frame[n].fill_null(np.nan).to_numpy() for n in names], 1), "Polars")


def window_7d(settings: Settings, bandwidth: float) -> list[Row]:
    _check_windows(FOUR)
    n = settings.rows(10_000_000)
    data = entity, time, value = events(n)
    call = lambda: windows.trailing(entity, time, entity, time, time, value, [7 * DAY], FOUR, settings.threads)  # noqa: E731
    rows = compare(
        "kernels",
        "window_7d",
        (n, n, "rows/s"),
        call,
        {
            "polars": (lazily(lambda: polars_window(data, [7 * DAY], FOUR)), 3.0),
            "duckdb": (lazily(lambda: duckdb_window(data, [7 * DAY], FOUR, settings.threads)), 30.0),
        },
        settings,
        (24 + 8 * len(FOUR), bandwidth),
    )
    known = time + lateness(n)
    late = lambda: windows.trailing(entity, time, entity, time, known, value, [7 * DAY], FOUR, settings.threads)  # noqa: E731
    limit = (32 + 8 * len(FOUR), bandwidth)
    return rows + compare("kernels", "window_7d_late", (n, n, "rows/s"), late, {}, settings, limit)


def window_6x5(settings: Settings, bandwidth: float) -> list[Row]:
    n = settings.rows(10_000_000)
    data = entity, time, value = events(n)
    return compare(
        "kernels",
        "window_6x5",
        (n, n, "rows/s"),
        lambda: windows.trailing(entity, time, entity, time, time, value, SIX, FIVE, settings.threads),
        {
            "polars": (lazily(lambda: polars_window(data, SIX, FIVE)), 5.0),
            "duckdb": (lazily(lambda: duckdb_window(data, SIX, FIVE, settings.threads)), float("nan")),
        },
        settings,
        (24 + 8 * 30, bandwidth),
    )


def lazily(make: Any) -> Any:
    """A call that prepares the peer at its first, cold run, and only calls it afterwards."""
    made: list[Any] = []

    def call() -> Any:
        if not made:
            made.append(make())
        return made[0]()

    return call


# --------------------------------------------------------------------------- as-of
def asof(settings: Settings, bandwidth: float) -> list[Row]:
    n, m = settings.rows(10_000_000), settings.rows(2_000_000)
    rng = np.random.default_rng(0)
    probe, entity = rng.integers(0, 1000, n), rng.integers(0, 1000, m)
    time, event = np.sort(rng.integers(0, 365 * 86400, n)) * SECOND, np.sort(rng.integers(0, 365 * 86400, m)) * SECOND

    def polars() -> Any:
        import polars as pl

        left = pl.DataFrame({"g": probe, "t": time}).set_sorted("t")
        right = pl.DataFrame({"g": entity, "t": event, "row": np.arange(m)}).set_sorted("t")
        options: dict[str, Any] = {"on": "t", "by": "g", "allow_exact_matches": False, "check_sortedness": False}
        return lambda: left.join_asof(right, **options)

    def duckdb() -> Any:
        import duckdb as db
        import pyarrow as pa

        connection = db.connect(config={"threads": settings.threads})
        for name, columns in (("l", {"g": probe, "t": time}), ("r", {"g": entity, "t": event, "row": np.arange(m)})):
            connection.register("arrow", pa.table(columns))
            connection.execute(f"create table {name} as select * from arrow")
        query = "select l.g, l.t, r.row from l asof left join r on l.g = r.g and l.t > r.t"
        return lambda: connection.execute(query).fetchnumpy()

    return compare(
        "kernels",
        "asof",
        (n, n, "probes/s"),
        lambda: asof_kernel.asof(probe, time, entity, event, event, None, threads=settings.threads),
        {"polars": (lazily(polars), 2.0), "duckdb": (lazily(duckdb), 10.0)},
        settings,
        (24, bandwidth),
    )


# --------------------------------------------------------------------------- profile
EVIDENTLY = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
import numpy as np, pandas as pd
from evidently import Report
from evidently.presets import DataDriftPreset
given = json.loads(sys.argv[1])
rng = np.random.default_rng(0)
frames = [pd.DataFrame(rng.standard_normal((given["rows"], given["columns"])).astype("float32")) for _ in range(2)]
for frame in frames:
    frame.columns = [f"c{k}" for k in range(given["columns"])]
start = time.perf_counter()
Report([DataDriftPreset()]).run(frames[1], frames[0]).dict()
print(time.perf_counter() - start)
"""


def profile_(settings: Settings, bandwidth: float) -> list[Row]:
    n, k = settings.rows(1_000_000), 20
    rng = np.random.default_rng(0)
    block, reference = rng.standard_normal((n, k)).astype(np.float32), rng.standard_normal((n, k)).astype(np.float32)
    plan = profile.profile_plan([profile.bins_of(reference[:, c], 255).edges for c in range(k)])

    def scipy() -> Any:
        from scipy.stats import ks_2samp

        return lambda: [ks_2samp(reference[:, c], block[:, c], method="asymp") for c in range(k)]

    evidently = peers.timed("evidently", EVIDENTLY, {"rows": n, "columns": k})
    return compare(
        "kernels",
        "profile",
        (n, n * k, "cells/s"),
        lambda: profile.profile(block, plan, settings.threads),
        {"scipy": (lazily(scipy), 30.0), "evidently": (evidently, 300.0)},
        settings,
        (4, bandwidth),
    )


# --------------------------------------------------------------------------- metrics and order
def roc_auc(settings: Settings, bandwidth: float) -> list[Row]:
    n = settings.rows(10_000_000)
    rng = np.random.default_rng(0)
    score = rng.random(n)
    y = (rng.random(n) < score * 0.4).astype(np.int8)

    def sklearn() -> Any:
        from sklearn.metrics import roc_auc_score

        return lambda: roc_auc_score(y, score)

    return compare(
        "kernels",
        "roc_auc",
        (n, n, "rows/s"),
        lambda: metrics.roc_auc(y, score, threads=settings.threads),
        {"sklearn": (lazily(sklearn), 5.0)},
        settings,
        (9, bandwidth),
    )


def order_gather(settings: Settings, bandwidth: float) -> list[Row]:
    n, width, step = settings.rows(10_000_000), 64, 1 << 16
    out = np.empty((step, width), np.float32)
    block = np.ones((n, width), np.float32)  # written, so that each page is memory of its own

    def ours() -> None:
        for start in range(0, n, step):
            index = order.permutation(start, min(start + step, n), n, 1, 0, settings.threads)
            gather.gather_rows(block, index, out[: len(index)], settings.threads)

    def torch() -> Any:
        import torch as t

        t.set_num_threads(settings.threads)
        tensor = t.from_numpy(block)

        def call() -> None:
            index = t.randperm(n)
            for start in range(0, n, step):
                tensor[index[start : start + step]]

        return call

    peer = {"torch": (lazily(torch), 1.0)}
    return compare("kernels", "order_gather", (n, n, "rows/s"), ours, peer, settings, (8 * width, bandwidth))


WORKS = {
    "window_7d": window_7d,
    "window_6x5": window_6x5,
    "asof": asof,
    "profile": profile_,
    "roc_auc": roc_auc,
    "order_gather": order_gather,
}
