"""Shared code of the benchmarks: a fair clock, the machine's limit, peers, rows and tables.

A benchmark is a file here with `run(settings) -> list[Row]`; its name is the file's. Ours and the peer work on the same data in
the same process (or in the peer's environment), with the same number of threads, one after the other, and the machine's
copy bandwidth is measured in the same run. A figure is the median of the warm calls; the first, cold call is reported beside it.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from kernels import jit

REPEATS = 7
PATIENCE = 60.0  # seconds after which no further repeat of one call is started
PACKAGES = ("numpy", "numba", "polars", "duckdb", "scipy", "scikit-learn", "torch", "pandas", "ray", "lightgbm")


@dataclass(frozen=True)
class Settings:
    """How a benchmark is to run. `scale` multiplies its rows: below 1 for a look, 1 for a figure to print."""

    scale: float = 1.0
    threads: int = 2
    repeats: int = REPEATS
    only: str = ""

    def rows(self, full: int) -> int:
        return max(1000, int(full * self.scale))

    def wanted(self, work: str) -> bool:
        return not self.only or self.only in work


@dataclass(frozen=True)
class Timing:
    """Seconds of the first call and of the median warm one, and how many warm ones there were."""

    cold: float
    warm: float
    runs: int


@dataclass(frozen=True)
class Row:
    """One line of a result: `ours` in `unit`, `ratio` times what `peer` (its slug) reached, which is `peer_value`."""

    benchmark: str
    work: str
    rows: int
    ours: float
    peer: str
    ratio: float | None
    limit_fraction: float | None
    unit: str
    peer_value: float | None = None
    must_reach: float | None = None
    cold_seconds: float | None = None
    runs: int = 1
    note: str = ""


def clock(call: Callable[[], Any], repeats: int = REPEATS, patience: float = PATIENCE) -> Timing:
    """Time `call`: once cold, then `repeats` times warm, fewer when they take longer than `patience` seconds together."""
    start = time.perf_counter()
    call()
    cold = time.perf_counter() - start
    warm: list[float] = []
    while len(warm) < repeats and (sum(warm) < patience and cold < patience):
        start = time.perf_counter()
        call()
        warm.append(time.perf_counter() - start)
    return Timing(cold, statistics.median(warm) if warm else cold, max(len(warm), 1))


def copy_bandwidth(threads: int, megabytes: int = 256) -> float:
    """Bytes per second read and written by a plain copy of large arrays on `threads` threads: the machine's limit."""
    source = np.ones(megabytes << 17)
    target = np.empty_like(source)

    def part(a: int, b: int) -> None:
        np.copyto(target[a:b], source[a:b])

    seconds = clock(lambda: jit.run_ranges(part, jit.split(len(source), threads), threads), repeats=5).warm
    return 2 * source.nbytes / seconds


def compare(
    benchmark: str,
    work: str,
    amount: tuple[int, int, str],
    ours: Callable[[], Any],
    peers: dict[str, tuple[Callable[[], Any] | float, float]],
    settings: Settings,
    limit: tuple[float, float],
) -> list[Row]:
    """Time ours once and every peer: peers = slug -> (call or seconds already measured, ratio that must be reached).

    amount = (rows, units of work, unit); limit = (bytes that one unit of work must move, bytes per second of a copy).
    """
    rows, units, unit = amount
    mine = clock(ours, settings.repeats)
    speed = units / mine.warm
    found = []
    for slug, (peer, must_reach) in (peers or {"none": (float("nan"), float("nan"))}).items():
        if callable(peer):
            try:
                seconds, note = clock(peer, settings.repeats).warm, ""
            except ImportError as missing:
                seconds, note = float("nan"), f"not installed: {missing.name}"
        else:
            seconds, note = peer, "" if peer == peer else "no peer"
        measured = seconds == seconds
        row = Row(
            benchmark,
            work,
            rows,
            speed,
            slug,
            seconds / mine.warm if measured else None,
            speed * limit[0] / limit[1] if limit[0] else None,
            unit,
            units / seconds if measured else None,
            must_reach if must_reach == must_reach else None,
            mine.cold,
            mine.runs,
            note,
        )
        show(row)
        found.append(row)
    return found


# --------------------------------------------------------------------------- the record
def machine(threads: int) -> dict[str, Any]:
    """Hardware, versions and load of this run."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = re.findall(r"model name\s*: (.+)", info.read_text())
        cpu = names[0] if names else cpu
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "cpu": cpu,
        "cpus": jit.cpu_count(),
        "threads": threads,
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "system": platform.platform(),
        "commit": _commit(),
        "versions": versions,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _commit() -> str | None:
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return found.stdout.strip() or None


def show(row: Row) -> None:
    """One line on the terminal as soon as it is known."""
    ratio = "" if row.ratio is None else f" {row.ratio:8.2f} x {row.peer}"
    need = "" if row.must_reach is None or row.ratio is None else f" (must reach {row.must_reach:g})"
    behind = " BEHIND" if need and row.ratio is not None and row.ratio < (row.must_reach or 0) else ""
    share = "" if row.limit_fraction is None else f", {row.limit_fraction:.1%} of a copy"
    print(
        f"{row.work:22} {row.ours:12.4g} {row.unit}{ratio}{need}{behind}{share} {row.note}", file=sys.stderr, flush=True
    )


def markdown(rows: Sequence[Row]) -> str:
    """The table that is printed and put into documents; losses stand in it like everything else."""
    lines = [
        "| work | rows | ours | peer | theirs | ratio | must reach | of a copy |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        theirs = "" if r.peer_value is None else f"{r.peer_value:.3g}"
        ratio = r.note if r.ratio is None else f"{r.ratio:.2f}"
        need = "" if r.must_reach is None else f"{r.must_reach:g}"
        share = "" if r.limit_fraction is None else f"{r.limit_fraction:.1%}"
        lines.append(
            f"| `{r.work}` | {r.rows:,} | {r.ours:.3g} {r.unit} | `{r.peer}` | {theirs} | {ratio} | {need} | {share} |"
        )
    return "\n".join(lines)


def write_json(path: Path, name: str, rows: Sequence[Row], card: dict[str, Any]) -> None:
    """Write {"benchmark", "machine", "rows"}; whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    text = json.dumps({"benchmark": name, "machine": card, "rows": [asdict(r) for r in rows]}, indent=1)
    partial.write_text(text + "\n")
    partial.replace(path)


def update_table(path: Path, name: str, table: str) -> None:
    """Replace what stands between <!-- benchmark:NAME --> and <!-- /benchmark:NAME --> in a document."""
    begin, end = f"<!-- benchmark:{name} -->", f"<!-- /benchmark:{name} -->"
    text = path.read_text()
    if begin not in text or end not in text:
        raise ValueError(f"{path} must hold {begin} and {end}, found neither or one")
    head, rest = text.split(begin, 1)
    path.write_text(head + begin + "\n" + table + "\n" + end + rest.split(end, 1)[1])
