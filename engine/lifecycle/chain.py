"""Compares the digest chains of two runs link by link; the first link that differs points to the cause."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa

from engine.config import nested
from engine.data.dataset import MANIFEST, DatasetRecord
from engine.errors import UserError, nearest
from engine.features.encode import EncoderRecord
from engine.features.store import ViewRecord
from engine.monitoring.drift_record import ColumnRecord, DriftRecord
from engine.runtime import recorded_paths, records
from engine.runtime.run import LINKS, RunRecord, as_written, link_order, load_metrics, load_record
from engine.runtime.tracking import read_points
from engine.scoring.read import predictions
from engine.training.reasons import CONTRIBUTION

EQUAL, CLOSE, DIFFERS, MISSING, SKIPPED = "equal", "within tolerance", "differs", "missing", "not compared"
# Tolerances for other hardware or libraries: the last bits of sums may differ, and training amplifies them.
FITTED_TOLERANCE = 1e-9  # relative, of centres, scales and knots
LOSS_TOLERANCE = 0.02  # relative
METRIC_TOLERANCE = 0.01  # absolute for a share, relative for what exceeds 1
SCORE_TOLERANCE = 0.05  # largest absolute difference of a score
TOLERANCE = (
    f"data links equal; fitted state within {FITTED_TOLERANCE:g} relative; loss within {LOSS_TOLERANCE:g} relative; "
    f"metrics within {METRIC_TOLERANCE:g}; scores within {SCORE_TOLERANCE:g}; reasons as scores; drift: the status of each column"
)


def check_link(name: str) -> str:
    """A valid link name for `--from`. Raises UserError."""
    known = [link.removesuffix("@") for link in LINKS]
    if name not in known and not (name.startswith("loss@") and name.removeprefix("loss@").isdigit()):
        raise UserError(f"--from must name a link, found {name!r}.{nearest(name, known)}")
    return name


class Link(TypedDict):
    """A link of two chains, with its verdict and a description of what differs."""

    link: str
    recorded: str | None
    now: str | None
    detail: str
    verdict: str


def compare_chains(recorded: Path, rerun: Path | None, start: str, exact: bool) -> list[Link]:
    """One entry per link: name, both digests, verdict, and details of a difference.

    With `exact` bits must be equal; else a link whose bits differ is judged by the tolerance.
    """
    was = load_record(recorded)["chain"]
    now = load_record(rerun)["chain"] if rerun is not None else {}
    found = []
    for link in sorted({*was, *now}, key=link_order):
        digests = was.get(link), now.get(link)
        entry: Link = {"link": link, "recorded": digests[0], "now": digests[1], "detail": "", "verdict": EQUAL}
        if link_order(link) < link_order(start):
            entry["verdict"] = SKIPPED
        elif link == "plugins" and link not in was:  # of an engine that did not have this link
            entry["verdict"] = SKIPPED
        elif rerun is None or link not in now or link not in was:
            entry["verdict"] = MISSING
            entry["detail"] = "the rerun did not reach it" if link not in now else "the recorded run does not have it"
        elif digests[0] != digests[1]:
            entry["verdict"] = CLOSE if not exact and within_tolerance(link, recorded, rerun) else DIFFERS
            entry["detail"] = detail(link, recorded, rerun)
        found.append(entry)
    return found


def first_difference(links: list[Link]) -> str | None:
    """The first link that differs or was not reached."""
    return next((entry["link"] for entry in links if entry["verdict"] in (DIFFERS, MISSING)), None)


# ------------------------------------------------------------------------------------------------ what is known of it


def detail(link: str, recorded: Path, rerun: Path) -> str:
    """A description of what differs in a link, from the run directories."""
    if link == "inputs":
        there = load_record(rerun)["inputs"].values()
        return _list([Path(name).name for name, value in load_record(recorded)["inputs"].items() if value not in there])
    if link == "plugins":
        return _list(_differing(*(_code(load_record(directory)) for directory in (recorded, rerun))))
    if link.startswith("loss@"):
        step = int(link.removeprefix("loss@"))
        pair = [_loss_at(directory, step) for directory in (recorded, rerun)]
        return f"{_text(pair[0])} before, {_text(pair[1])} now" if None not in pair else ""
    if link == "metrics":
        was, now = judged_metrics(recorded), judged_metrics(rerun)
        names = _differing(was, now)
        return _list([f"{name} {_text(was.get(name))} before, {_text(now.get(name))} now" for name in names])
    if link == "drift":
        return _list(_differing(_drift_by_column(recorded), _drift_by_column(rerun)))
    if link == "fitted":
        return _list([name for name, _, _ in _fitted_differences(recorded, rerun)])
    if link in ("dataset", "features"):
        first, other = (_columns(link, load_record(directory)) for directory in (recorded, rerun))
        return _list([name for name in first if first[name] != other.get(name)]) if first and other else ""
    return ""


def _code(record: RunRecord) -> dict[str, str]:
    """File of `plugins`, or key that names installed code -> digest or version."""
    files = dict(reference.split("@") for reference in record["config"].get("plugins", ()))
    return files | {f"{key}={version}": version for key, version in record.get("installed_code", {}).items()}


def _columns(link: str, record: RunRecord) -> dict[str, str]:
    """Column -> digest of the run's dataset or views that its store still has."""
    if link == "dataset":
        folder = recorded_paths.dataset_folder(record)
        columns = records.read(folder / MANIFEST, DatasetRecord)["columns"] if folder is not None else []
        return {entry["name"]: entry.get("digest", "") for entry in columns}
    store, found = recorded_paths.store_of(record) / "features", dict[str, str]()
    for view, name in (record.get("views") or {}).items():
        path = store / view / name / MANIFEST
        for part in records.read(path, ViewRecord)["parts"] if path.exists() else ():
            for column, entry in part["columns"].items():
                found[column] = found.get(column, "") + entry["digest"]
    return found


def _drift_by_column(directory: Path) -> dict[str, ColumnRecord]:
    """Column -> its status in drift.json."""
    if not (directory / "drift.json").exists():
        return {}
    return {entry["name"]: entry for entry in records.read(as_written(directory, "drift.json"), DriftRecord)["columns"]}


def _differing(was: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    return [name for name in dict.fromkeys([*was, *now]) if was.get(name) != now.get(name)]


def _list(items: list[str], most: int = 3) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def _text(value: float | None) -> str:
    return "none" if value is None else f"{value:.9g}"


def _loss_at(directory: Path, step: int) -> float | None:
    return next((point.values.get("train/loss") for point in read_points(directory) if point.step == step), None)


def judged_metrics(directory: Path) -> dict[str, float | None]:
    """The metrics that the link covers: `valid/...` and `test/...`."""
    return {name: value for name, value in load_metrics(directory).items() if name.startswith(("valid/", "test/"))}


# -------------------------------------------------------------------------------------------------------- tolerance


def within_tolerance(link: str, recorded: Path, rerun: Path) -> bool:
    """Whether a link whose bits differ is within the tolerance for other hardware or libraries."""
    if link in ("features", "fitted"):
        return _fitted_is_close(recorded, rerun)
    if link.startswith("loss@"):
        return _loss_is_close(recorded, rerun)
    if link in ("weights", "metrics"):
        # Weights have no natural scale: their scores are judged, or else the loss.
        was, now = judged_metrics(recorded), judged_metrics(rerun)
        return _metrics_are_close(was, now) if was or now else _loss_is_close(recorded, rerun)
    if link == "drift":
        first, second = (_drift_by_column(directory) for directory in (recorded, rerun))
        return {name: entry["status"] for name, entry in first.items()} == {
            name: entry["status"] for name, entry in second.items()
        }
    return link in ("scores", "reasons") and _scores_are_close(recorded, rerun)


def _loss_is_close(recorded: Path, rerun: Path) -> bool:
    was, now = _losses(recorded), _losses(rerun)
    return bool(was) and all(
        step in now and math.isclose(was[step], now[step], rel_tol=LOSS_TOLERANCE, abs_tol=1e-6) for step in was
    )


def _losses(directory: Path) -> dict[int, float]:
    """Step -> loss, of the members of a model one after the other."""
    return {
        point.step: value
        for point in read_points(directory)
        for name, value in point.values.items()
        if name == "train/loss" or name.endswith("/train/loss")
    }


def _metrics_are_close(was: Mapping[str, float | None], now: Mapping[str, float | None]) -> bool:
    if set(was) != set(now):
        return False
    return all(
        math.isclose(value, other, rel_tol=METRIC_TOLERANCE, abs_tol=METRIC_TOLERANCE)
        if value is not None and other is not None
        else value is other
        for value, other in ((was[name], now[name]) for name in was)
    )


def _fitted_is_close(recorded: Path, rerun: Path) -> bool:
    if not (recorded / "model" / "features.json").exists():
        return False
    return all(
        isinstance(a, (int, float)) and isinstance(b, (int, float)) and math.isclose(a, b, rel_tol=FITTED_TOLERANCE)
        for _, a, b in _fitted_differences(recorded, rerun)
    )


def _fitted_differences(recorded: Path, rerun: Path) -> Iterator[tuple[str, Any, Any]]:
    paths = [directory / "model" / "features.json" for directory in (recorded, rerun)]
    if all(path.exists() for path in paths):
        was, now = (records.read(path, EncoderRecord) for path in paths)
        yield from nested.differences(was, now, lists=True)


def _scores_are_close(recorded: Path, rerun: Path) -> bool:
    try:
        was, now = (predictions(directory, incomplete=True) for directory in (recorded, rerun))
    except UserError:  # the recorded rows are elsewhere, and have been replaced since or may not be read
        return False
    if was.num_rows != now.num_rows or was.column_names != now.column_names or not was["row_id"].equals(now["row_id"]):
        return False
    names = [
        field.name
        for field in was.schema
        if pa.types.is_floating(field.type) and not field.name.startswith(CONTRIBUTION)
    ]
    gaps = [np.abs(np.asarray(was[name], np.float64) - np.asarray(now[name], np.float64)) for name in names]
    return all(float(np.nanmax(gap, initial=0.0)) <= SCORE_TOLERANCE for gap in gaps)
