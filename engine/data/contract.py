"""The contract of a dataset: limits on rows, nulls, freshness, and changes from the previous dataset."""

from __future__ import annotations

import time

from engine.config import units
from engine.config.sections.data import DataConfig
from engine.data.dataset import Accounting, DatasetRecord
from engine.data.profile import Counts
from engine.errors import UserError


def check(
    data: DataConfig,
    manifest: DatasetRecord,
    counts: dict[str, Counts],
    previous: DatasetRecord | None,
    *,
    empty: bool = False,
) -> None:
    """Raises UserError with all violated clauses; a dataset without rows is a violation unless it may be `empty`."""
    if not empty:
        check_rows(manifest)
    broken = [
        *_rows(data, manifest, previous),
        *_nulls(data, manifest["rows"], counts, previous),
        *_fresh(data, manifest),
    ]
    if broken:
        raise UserError(f"dataset {manifest['name']} breaks its contract: " + "; ".join(broken))


def check_rows(manifest: DatasetRecord) -> None:
    """Raises UserError for a dataset without rows."""
    if not manifest["rows"]:
        raise UserError(
            f"dataset {manifest['name']} breaks its contract: it must hold at least one row, found "
            f"none{_whence(manifest['accounting'])}"
        )


def _rows(data: DataConfig, manifest: DatasetRecord, previous: DatasetRecord | None) -> list[str]:
    rows, found = manifest["rows"], []
    if rows < data.min_rows:
        found.append(f"it must hold at least {data.min_rows:,} rows (min_rows), found {rows:,}")
    if data.max_rows is not None and rows > data.max_rows:
        found.append(f"it must hold at most {data.max_rows:,} rows (max_rows), found {rows:,}")
    if data.max_row_change is not None and previous and previous["rows"]:
        change = abs(rows - previous["rows"]) / previous["rows"]
        if change > data.max_row_change.fraction:
            found.append(
                f"its rows may change by {data.max_row_change} (max_row_change), found {previous['rows']:,} -> {rows:,}"
            )
    return found


def _whence(accounting: Accounting) -> str:
    """Why a dataset has no rows, from the accounting of its files."""
    files = accounting["files"]
    if accounting["rows_in"]:
        return f": of {accounting['rows_in']:,} rows in {len(files)} files {accounting['quarantined']:,} were set aside"
    refused = f", {accounting['refused_files']} of them refused" if accounting["refused_files"] else ""
    shown = f"{files[0]['file']}{f' and {len(files) - 1} more' if len(files) > 1 else ''}"
    return f", because the files hold no rows ({shown}{refused})"


def _nulls(data: DataConfig, rows: int, counts: dict[str, Counts], previous: DatasetRecord | None) -> list[str]:
    found = []
    for name, column in data.columns.items():
        rate = counts[name]["nulls"] / rows if rows and name in counts else 0.0
        if column.max_null_rate is not None and rate > column.max_null_rate.fraction:
            found.append(
                f"column {name!r} may be null in {column.max_null_rate} of the rows (max_null_rate), found {rate:.2%}"
            )
        before = previous["null_counts"].get(name) if previous else None
        if column.max_null_change is not None and before is not None and previous and previous["rows"]:
            old = before / previous["rows"]
            if abs(rate - old) > column.max_null_change.fraction:
                found.append(
                    f"the share of nulls of {name!r} may change by {column.max_null_change} (max_null_change), "
                    f"found {old:.2%} -> {rate:.2%}"
                )
    return found


def _fresh(data: DataConfig, manifest: DatasetRecord) -> list[str]:
    if data.freshness is None or not manifest["parts"]:
        return []
    newest = manifest["parts"][-1]["last_time"]
    age = time.time_ns() // 1000 - newest
    if age <= data.freshness.microseconds:
        return []
    return [f"its newest event may be {data.freshness} old (freshness), found {units.format_instant(newest)}"]
