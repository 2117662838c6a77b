"""python -m benchmarks.headline

Writes the table of the front page from benchmarks/results: eight rows that were chosen by their subject, misses among them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.harness import update_table

HERE = Path(__file__).parent
# (what is compared, benchmark, work, peer)
ROWS = (
    ("trailing windows over 7 days, 10 M rows", "kernels", "window_7d", "polars"),
    ("as-of join, 10 M probes", "kernels", "asof", "polars"),
    ("features of the whole flights experiment", "features_windows", "windows_spec", "polars"),
    ("drift profile, 1 M rows x 20 columns", "kernels", "profile", "evidently"),
    ("CSV to a validated dataset", "ingest", "csv_to_parquet", "duckdb"),
    ("one epoch of training, full shuffle, against in order", "train", "epoch", "sequential"),
    ("scoring on two workers, against a Ray Data recipe", "score", "epoch", "ray_recipe"),
    ("days found with a mean that moved by .1 deviations, six columns together", "monitor", "power_mean", "nannyml"),
)


def row(label: str, benchmark: str, work: str, peer: str) -> str:
    """One line of the table. Raises KeyError where the results have no such row."""
    results: list[dict[str, Any]] = json.loads((HERE / "results" / f"{benchmark}.json").read_text())["rows"]
    found = next((r for r in results if (r["work"], r["peer"]) == (work, peer)), None)
    if found is None:
        raise KeyError(f"{benchmark}.json must hold the work {work!r} against {peer!r}")
    goal = found["must_reach"]
    ratio = f"{found['ratio']:.2f}" if found["ratio"] < 10 else f"{found['ratio']:,.0f}"
    behind = goal is not None and found["ratio"] < goal
    goals = "" if goal is None else f"{goal:g}" + (", missed" if behind else "")
    return f"| {label} | {found['ours']:.3g} {found['unit']} | `{peer}` | {ratio} | {goals} |"


def table() -> str:
    """The Markdown table; `ratio` is ours over theirs, above 1 is better."""
    return "\n".join(
        ["| work | ours | peer | ratio | goal |", "|---|---|---|---|---|", *(row(*subject) for subject in ROWS)]
    )


if __name__ == "__main__":
    update_table(HERE.parent / "README.md", "headline", table())
