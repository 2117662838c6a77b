"""The report of a sweep: history, parallel coordinates, importance of the keys, and the best configs with other seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from engine.runtime import storage
from engine.runtime.reports import html
from engine.runtime.run import Run


def texts(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, value as text) of a trial."""
    for name, value in values.items():
        yield name, f"{value:.4g}" if isinstance(value, float) else json.dumps(value)


def write_report(run: Run, record: Mapping[str, Any]) -> Path:
    """Write report.html into the run's directory and return its path."""
    best = record["best"]
    body = [html.tiles(_tiles(record))]
    if best["number"] is not None:
        note = (
            "Each config is trained anew with seeds that no trial had. The test rows are not used in the search. "
            + ("The gain is more than two standard deviations of seeds." if best["beyond_seeds"] else
               "The gain is no more than two standard deviations of seeds: the search has not been shown to help.")
        )  # fmt: skip
        body.append(html.section("The best configs with other seeds", _seeds(record), note=note))
    body.append(html.section("Trials in order", _history(record)))
    body.append(
        html.section(
            "Values and what came of them",
            _coordinates(record),
            note="A line is a trial, each column has its own scale, the metric is the last one. The best tenth is drawn solid.",
        )
    )
    if record["importance"]:
        rows = [(name, f"{share:.2f}", html.bar(share)) for name, share in record["importance"].items()]
        body.append(html.section("Importance of the keys", html.table(("key", "share", ""), rows),
                                 note="Share in the variance among the better trials (PED-ANOVA)."))  # fmt: skip
    body.append(
        html.section("All trials", html.table(("trial", "state", record["metric"], "s", "values"), _rows(record)))
    )
    path = run.path("report.html")
    storage.write_bytes(path, html.page(f"Sweep {record['name']}", str(run.directory), body).encode())
    return path


def _tiles(record: Mapping[str, Any]) -> list[html.Tile]:
    best, states = record["best"], [trial["state"] for trial in record["trials"]]
    counted = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    found = [html.Tile("Trials", str(len(states)), counted)]
    if best["number"] is not None:
        found.append(html.Tile(f"Test {record['metric']}", html.format_number(best["test"]),
                               f"{html.format_number(best['test_without_search'])} without the search"))  # fmt: skip
        found.append(
            html.Tile(
                "The search was too good by", html.format_number(best["too_good_by"]), "its figure against new seeds"
            )
        )
    return [*found, html.Tile("Seconds", html.format_number(record["seconds"]), "")]


def _seeds(record: Mapping[str, Any]) -> Markup:
    rows = []
    for entry in record["seeds"]:
        name = "without the search" if entry["number"] is None else f"trial {entry['number']}"
        figures = [_with_spread(entry[part]) for part in ("valid", "test")]
        rows.append((name, *figures, ", ".join(f"{key}={text}" for key, text in texts(entry["values"]))))
    return html.table(("config", f"valid {record['metric']}", f"test {record['metric']}", "values"), rows)


def _with_spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):.4f}{spread}"


def _history(record: Mapping[str, Any]) -> Markup:
    known = [trial for trial in record["trials"] if trial["value"] is not None]
    sign = 1.0 if record["higher_is_better"] else -1.0
    best: Any = sign * np.maximum.accumulate([sign * trial["value"] for trial in known]) if known else []
    numbers = [float(trial["number"]) for trial in known]
    points = [html.Series(state, [float(trial["number"]) for trial in known if trial["state"] == state],
                          [trial["value"] for trial in known if trial["state"] == state], style="dots")
              for state in dict.fromkeys(trial["state"] for trial in known)]  # fmt: skip
    return html.line_chart(
        [html.Series("best so far", numbers, list(best)), *points], x_label="trial", y_label=record["metric"]
    )


def _coordinates(record: Mapping[str, Any]) -> Markup:
    """A line a trial over the keys, each scaled to [0, 1]."""
    done = [trial for trial in record["trials"] if trial["state"] == "done"]
    names = list(dict.fromkeys(name for trial in done for name in trial["values"]))
    if len(done) < 2 or not names:
        return html.paragraph("too few finished trials to draw", quiet=True)
    columns = {name: _scaled([trial["values"].get(name) for trial in done]) for name in names}
    columns[record["metric"]] = _scaled([trial["value"] for trial in done])
    sign = 1.0 if record["higher_is_better"] else -1.0
    line = np.quantile([sign * trial["value"] for trial in done], 0.9)
    series = [
        html.Series(
            f"trial {trial['number']}",
            [float(place) for place in range(len(columns))],
            [columns[name][at] for name in columns],
            style="solid" if sign * trial["value"] >= line else "dashed",
            colour=0 if sign * trial["value"] >= line else 1,
        )
        for at, trial in enumerate(done[:60])
    ]
    return html.line_chart(
        series, x_ticks={float(place): name for place, name in enumerate(columns)}, y_range=(0.0, 1.0)
    )


def _scaled(values: Sequence[Any]) -> list[float | None]:
    """Numbers between their least and greatest, on a logarithmic scale where all are above 0 and span a tenfold; else places."""
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values if value is not None):
        numbers = np.array([math.nan if value is None else float(value) for value in values])
        if np.nanmin(numbers) > 0 and np.nanmax(numbers) >= 10 * np.nanmin(numbers):
            numbers = np.log(numbers)
    else:
        order = sorted({json.dumps(value) for value in values if value is not None})
        numbers = np.array([math.nan if value is None else float(order.index(json.dumps(value))) for value in values])
    low, high = np.nanmin(numbers), np.nanmax(numbers)
    return [None if math.isnan(value) else float((value - low) / ((high - low) or 1.0)) for value in numbers]


def _rows(record: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    for trial in record["trials"]:
        value = "" if trial["value"] is None else f"{trial['value']:.5g}"
        values = ", ".join(f"{key}={text}" for key, text in texts(trial["values"]))
        yield (
            trial["number"],
            trial["state"],
            value,
            f"{trial['seconds']:.1f}",
            values + (f" ({trial['cause']})" if "cause" in trial else ""),
        )
