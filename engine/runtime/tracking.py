"""Mirrors of a run in a tracker, fed by a child process from `metrics.jsonl`.

The run starts the child and never writes to it: it holds one end of a pipe, which is closed when the run ends in any way;
the child then sends the rest and stops. So a tracker cannot stop, slow or change a run. `engine track sync RUN` completes
a mirror from the run directory.

A back-end is one file with one class (`Mirror`) and one line in `BACKENDS`. A line of `metrics.jsonl` becomes one row of
the tracker, numbered by its place in the file, so that rows always rise even if steps come late or again. While a run may
still be resumed, only lines that a checkpoint covers are sent, so that a replayed step is not sent twice.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypedDict

from engine.config import schema
from engine.config.sections.runtime import TrackingConfig
from engine.config.tree import Config
from engine.errors import UserError, nearest
from engine.runtime import digest, environment, records, storage, terminal
from engine.runtime.run import Run, RunRecord, as_written, load_metrics, load_record

BACKENDS = {"wandb": "engine.runtime.tracking_wandb:WandbMirror"}
STATE = "tracking.json"
LOG = "tracking.log"
POLL_SECONDS = 1.0
# How long a command waits at its end. Offline only the disk can be slow; online the child continues by itself.
WAIT_SECONDS = {"offline": 5.0, "online": 1.0}
SENT, UNSENT = 0, 3
LAYOUT = 2  # a row of the tracker is a line of metrics.jsonl; before that it was a step


class Mirror(Protocol):
    """One run in one tracker. Every method may block or raise, since it runs in a separate process."""

    def __init__(self, directory: Path, record: RunRecord, options: TrackingConfig) -> None:
        """The run's directory, its run.json, and the section `tracking` of its config."""

    def open(self) -> int:
        """Begin or continue the run of this id; returns the last row that the tracker has, -1 for none."""

    def log(self, row: int, step: int, time: float, values: Mapping[str, float]) -> None:
        """One row: its number, which rises from call to call; the step, which may fall; seconds since 1970; values by metric.

        Raises where the tracker would not keep it.
        """

    def finish(self, record: RunRecord, metrics: Mapping[str, float | None], done: bool) -> str:
        """Send summary, tables and artifacts and close; returns where the mirror is."""

    def upload(self) -> str:
        """Replace the tracker's content of the run by what was sent to this mirror; returns where it is."""


# ------------------------------------------------------------------------------------------------- the run's side


class Tracker:
    """The run's handle on its child process."""

    def __init__(self, run: Run) -> None:
        self._run, self._wait = run, 0.0
        self._child: subprocess.Popen[bytes] | None = None
        self._began, self._starting, self._hashed = time.monotonic(), 0.0, digest.spent[0]

    def started(self, child: subprocess.Popen[bytes], wait: float) -> None:
        """Keep the child process; the time of its start is part of the overhead."""
        self._child, self._wait = child, wait
        self._starting = time.monotonic() - self._began

    def stop(self) -> None:
        """Signal the end of the run to the child and wait for it for a limited time. Never raises."""
        if self._child is None:
            return
        began = time.monotonic()
        self._end()
        now = time.monotonic()
        tracking, hashing = self._starting + now - began, digest.spent[0] - self._hashed
        share = 100 * (tracking + hashing) / max(now - self._began, 1e-9)
        _say(
            f"overhead: tracking {tracking:.2f} s, hashing {hashing:.2f} s, {share:.1f} % of {now - self._began:.1f} s"
        )

    def _end(self) -> None:
        assert self._child is not None
        try:
            assert self._child.stdin is not None
            self._child.stdin.close()
            code = self._child.wait(self._wait)
        except subprocess.TimeoutExpired:
            _say(f"the mirror is still being sent, in the background; see {self._run.directory / LOG}")
            self._child.returncode = 0  # it keeps running on purpose: no warning about it
            return
        except (OSError, KeyboardInterrupt):
            return
        if code != SENT:
            _say(
                f"warning: the mirror of this run is not complete ({self._run.directory / LOG} says why); "
                f"`python -m engine track sync {self._run.directory}` sends it from the run directory"
            )


def start(config: TrackingConfig, run: Run) -> Tracker:
    """Start the mirror of a run, if the config has one. A failure is a warning; the run continues."""
    tracker = Tracker(run)
    if config.kind == "off":
        return tracker
    if importlib.util.find_spec(config.kind) is None:
        run.warn(f"tracking={config.kind} needs the package {config.kind!r}, which is not installed: no mirror is kept")
        return tracker
    mode = resolve_mode(config.mode)
    known = run.record.get("tracking") or {}
    # A sweep's agent has named the run already.
    given = os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None
    name = known.get("id") or given or run.directory.name
    layout = known.get("layout") if known else LAYOUT
    run.note(tracking={**schema.plain(config), "mode": mode, "id": name, "layout": layout})
    try:
        tracker.started(_spawn(run.directory), WAIT_SECONDS[mode])
    except OSError as error:
        run.warn(f"the mirror could not be started ({error}); the run continues without it")
    return tracker


def resolve_mode(mode: str) -> str:
    """The mode; `auto` is online if there is an API key and WANDB_MODE permits it, else offline."""
    if mode != "auto":
        return mode
    online = os.environ.get("WANDB_API_KEY") and os.environ.get("WANDB_MODE", "online") in ("online", "run")
    return "online" if online else "offline"


def _spawn(directory: Path) -> subprocess.Popen[bytes]:
    """Start the child in a new session: Ctrl-C in a terminal does not reach it, and it may outlive the run."""
    path = os.pathsep.join([str(environment.engine_root()), *filter(None, [os.environ.get("PYTHONPATH")])])
    with open(directory / LOG, "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, str(directory.resolve())],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            cwd=directory,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )


def _say(text: str) -> None:
    terminal.err(f"{text}\n")
    sys.stderr.flush()


# ----------------------------------------------------------------------------------------------- the local log


@dataclass(frozen=True)
class Point:
    """The values of one step."""

    step: int
    time: float
    values: dict[str, float]


@dataclass(frozen=True)
class Row(Point):
    """A line of metrics.jsonl."""

    row: int


def read_rows(directory: Path) -> list[Row]:
    """The lines of metrics.jsonl in the order of the file, numbered by their place in it.

    A value that was not finite is NaN. A line that was truncated by a kill is left out.
    """
    rows = []
    for place, line in _lines(as_written(directory, "metrics.jsonl")):
        step, at = int(line.pop("step") or 0), float(line.pop("time") or 0)
        values = {name: math.nan if value is None else float(value) for name, value in line.items()}
        rows.append(Row(step, at, values, place))
    return rows


def read_points(directory: Path) -> list[Point]:
    """All points of metrics.jsonl by ascending step, one value per (step, metric): the last attempt's."""
    points: dict[int, Point] = {}
    for row in read_rows(directory):
        earlier = points[row.step].values if row.step in points else {}
        points[row.step] = Point(row.step, row.time, {**earlier, **row.values})
    return [points[step] for step in sorted(points)]


def _lines(path: Path) -> Iterator[tuple[int, dict[str, float | None]]]:
    if not path.exists():
        return
    for place, text in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n")):
        # A line that was truncated by a kill is followed, without a line end, by the next attempt's first line.
        start = text.rfind('{"step"')
        if start >= 0:
            with contextlib.suppress(records.Damaged):
                yield place, records.parse(text[start:], dict[str, float | None], str(path))


class Reached(TypedDict):
    """The keys of a checkpoint's manifest that are read here."""

    step: records.Count


def covered_step(directory: Path) -> float:
    """The last step that a resume would not replay: all of a finished run, else that of its newest checkpoint."""
    if (directory / "DONE").exists():
        return math.inf
    manifests = sorted(directory.glob("checkpoints/step-*/manifest.json"), reverse=True)
    for manifest in manifests:
        with contextlib.suppress(UserError):
            return float(records.read(manifest, Reached)["step"])
    return -1.0


# ------------------------------------------------------------------------------------------------ the child's side


class Feed:
    """Sends each value of the local log to a mirror once, in the order of the file."""

    def __init__(self, directory: Path, mirror: Mirror, last_row: int) -> None:
        self.directory, self.mirror, self.last_row = directory, mirror, last_row
        # An earlier child has sent the values of the rows up to `last_row`, but not those that a later row repeats: only steps
        # beyond a checkpoint are repeated, and these wait for the row that a checkpoint covers.
        rows = read_rows(directory)
        final = _last_rows(rows)
        self._sent = {
            (row.step, name): value
            for row in rows
            for name, value in row.values.items()
            if row.row == final[row.step, name] <= last_row
        }
        self._size = -1

    def send(self, upto: float) -> None:
        """Send the new rows before the first one beyond step `upto`; that row and later ones may be replayed."""
        rows = read_rows(self.directory)
        final = _last_rows(rows)
        stop = min((row.row for row in rows if row.step > upto), default=math.inf)
        for row in rows:
            last = {name: final[row.step, name] for name in row.values}
            if max(row.row, *last.values()) >= stop:
                break
            new = [name for name in row.values if last[name] == row.row and (row.step, name) not in self._sent]
            if row.row > self.last_row and new:
                values = {name: row.values[name] for name in new}
                self.mirror.log(row.row, row.step, row.time, values)
                self._sent.update({(row.step, name): value for name, value in values.items()})
                self.last_row = row.row

    def missing(self) -> list[str]:
        """Values of the local log that the mirror does not have: not sent, or sent with another value before."""
        return [
            f"{name} of step {point.step}"
            for point in read_points(self.directory)
            for name, value in point.values.items()
            if not _same(self._sent.get((point.step, name)), value)
        ]

    def send_covered(self) -> None:
        """Send what a checkpoint covers, if anything has changed since the last call."""
        covered = covered_step(self.directory)
        path = self.directory / "metrics.jsonl"
        size = hash((path.stat().st_size if path.exists() else 0, covered))
        if size != self._size:
            self._size = size
            self.send(covered)


def _last_rows(rows: Iterable[Row]) -> dict[tuple[int, str], int]:
    """The last row of each step and metric."""
    return {(row.step, name): row.row for row in rows for name in row.values}


def _same(one: float | None, other: float) -> bool:
    return one is not None and (one == other or (math.isnan(one) and math.isnan(other)))


def options_of(record: RunRecord) -> TrackingConfig:
    """The section `tracking` of the run's config."""
    known = {field: value for field, value in (record.get("tracking") or {}).items() if field not in ("id", "layout")}
    return schema.build(TrackingConfig, known, "tracking")  # type: ignore[no-any-return]


def mirror_of(directory: Path, record: RunRecord, options: TrackingConfig) -> Mirror:
    """The back-end of a run; raises UserError when it was not tracked."""
    if options.kind not in BACKENDS:
        raise UserError(f"tracking must be one of {', '.join(BACKENDS)}, found {options.kind!r}")
    module, _, name = BACKENDS[options.kind].partition(":")
    backend = getattr(importlib.import_module(module), name)
    return backend(directory, record, options)  # type: ignore[no-any-return]


def follow(directory: Path) -> int:
    """The child: mirror a run until it has ended; returns the exit code."""
    record = load_record(directory)
    options = options_of(record)
    ended = threading.Event()
    seconds = options.timeout.seconds
    threading.Thread(target=_wait_for_end, args=(ended, seconds, directory), daemon=True).start()
    mirror = mirror_of(directory, record, options)
    feed = Feed(directory, mirror, mirror.open())
    while not ended.wait(POLL_SECONDS):
        feed.send_covered()
    return _finish(directory, feed)


def _finish(directory: Path, feed: Feed) -> int:
    done = (directory / "DONE").exists()
    feed.send(covered_step(directory))
    metrics = load_metrics(directory) if done else {}
    where = feed.mirror.finish(load_record(directory), metrics, done)
    check_whole(feed, done)
    write_state(directory, "complete" if done else "unfinished", where)
    return SENT


def check_whole(feed: Feed, done: bool) -> None:
    """Raise RuntimeError if a point of the local log is missing in the mirror of a finished run."""
    missing = feed.missing() if done else []
    if missing:
        shown = f"{', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}"
        raise RuntimeError(f"{len(missing)} values of metrics.jsonl are not what the tracker holds: {shown}")


def _wait_for_end(ended: threading.Event, seconds: float, directory: Path) -> None:
    """Wait for the run's end of the pipe to close, then end this process after a limited time."""
    while os.read(0, 4096):
        pass
    ended.set()
    time.sleep(seconds)
    _say(f"the mirror was not complete {seconds:g} s after the end of the run: given up")
    write_state(directory, "incomplete", f"given up after {seconds:g} s")
    os._exit(UNSENT)


def write_state(directory: Path, state: str, where: str) -> None:
    """`tracking.json`: whether the mirror is complete, and where it is."""
    storage.write_json(directory / STATE, {"format": 1, "state": state, "where": where})


def main(directory: Path) -> int:
    """Entry of the child process."""
    os.nice(10)  # the run comes first
    try:
        return follow(directory)
    except Exception as error:
        _say(f"the mirror stopped: {type(error).__name__}: {error}")
        write_state(directory, "incomplete", f"{type(error).__name__}: {error}")
        return UNSENT


# ----------------------------------------------------------------------------------------------------- track sync


def sync(directory: Path, config: TrackingConfig) -> str:
    """Rebuild the mirror of a run from its directory alone and, unless offline, upload it.

    Idempotent. Raises UserError; returns where the mirror is.
    """
    record = load_record(directory)
    was = record.get("tracking") or {}
    kind = was.get("kind") or (config.kind if config.kind != "off" else "wandb")
    wanted = {**schema.plain(config), "kind": kind, "mode": resolve_mode(config.mode)}
    for name in ("project", "entity", "group"):
        if wanted[name] == getattr(TrackingConfig(), name):
            wanted[name] = was.get(name, wanted[name])
    record["tracking"] = {**wanted, "id": was.get("id", directory.name)}
    options: TrackingConfig = schema.build(TrackingConfig, {**wanted, "mode": "offline"}, "tracking")
    mirror = mirror_of(directory, record, options)
    feed = Feed(directory, mirror, mirror.open())
    feed.send(math.inf)
    done = (directory / "DONE").exists()
    metrics = load_metrics(directory)
    where = mirror.finish(record, metrics, done)
    check_whole(feed, True)
    if wanted["mode"] == "online":
        where = mirror.upload()
    write_state(directory, "complete" if done else "unfinished", where)
    return where


def track_sync(config: Config, words: list[str]) -> int:
    """`engine track sync RUN ...`: repair the mirror of runs from their directories."""
    if not words:
        raise UserError("track sync must name at least one run directory, found nothing")
    for word in words:
        if word.startswith("-"):
            raise UserError(f"unknown option {word!r}.{nearest(word, [])}")
        directory = Path(word).resolve()
        with storage.kept_from_others("private" if storage.is_closed(directory) else "umask", ()):
            try:
                sys.stdout.write(f"{sync(directory, config.tracking)}\n")
            except RuntimeError as error:  # of the mirror: values that it does not have, and why
                raise UserError(f"{word}: {error}") from None
            if storage.is_private():  # the tracker's cache is readable by all
                storage.take_from_others(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
