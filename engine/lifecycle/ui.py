"""`engine ui`: one page over models, monitoring, backtests, sweeps, views and runs, which any browser opens without a server.

It reads the files that the commands have left and writes one of its own. What is damaged is left out with a warning.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from markupsafe import Markup, escape

from engine.config.tree import Config
from engine.errors import UserError
from engine.features.catalog import view_rows
from engine.lifecycle import backtest_report
from engine.lifecycle.backtest_report import BacktestRecord
from engine.lifecycle.compare import Side
from engine.lifecycle.runs import HEADLINES, directories, status
from engine.lifecycle.sweep_record import SweepRecord
from engine.monitoring.drift_record import VerdictRecord
from engine.runtime import records, storage, terminal
from engine.runtime.registry import MoveRecord, Registry, State, Version, VersionFacts, names, root_of, short
from engine.runtime.reports import html
from engine.runtime.run import as_written, load_metrics, records_below

T = TypeVar("T")
FILE = "ui.html"
# How many of the newest are shown; `engine runs`, `engine registry show` and the reports have the rest.
RUNS, WINDOWS, BACKTESTS, SWEEPS, MOVES, POINTS = 200, 30, 5, 20, 20, 100
LETTERS = 240  # of a message
TONES = {"done": "good", "failed": "bad", "killed": "bad", "alarm": "bad", "quiet": "good"}
COMMANDS = ("train", "evaluate", "score", "monitor", "retrain")  # which come first; the others follow by name
DAY = 86_400.0


@dataclass(frozen=True)
class Model:
    """A name of the registry: its moves, and its versions by digest."""

    name: str
    state: State
    versions: dict[str, Version]


@dataclass
class Found:
    """What the files hold, newest first."""

    page: Path  # the folder of the page, from which links lead
    runs: list[Side] = field(default_factory=list)
    models: list[Model] = field(default_factory=list)
    windows: list[tuple[Side, VerdictRecord]] = field(default_factory=list)
    backtests: list[tuple[Side, BacktestRecord]] = field(default_factory=list)
    sweeps: list[tuple[Side, SweepRecord]] = field(default_factory=list)
    views: list[dict[str, Any]] = field(default_factory=list)
    left_out: int = 0


def ui(config: Config, words: list[str], options: Mapping[str, str]) -> int:
    """`engine ui [--out FILE]`: write the page, and print its path last."""
    if words:
        raise UserError(f"ui takes options only, found {words[0]!r}: write --out FILE for the place of the page")
    page = Path(options.get("--out") or Path(config.paths.runs) / FILE)
    if page.suffix != ".html":
        raise UserError(f"--out must end in .html, found {str(page)!r}")
    found = read(config, page.parent)
    if any(storage.is_closed(side.directory) for side in found.runs):
        storage.keep_from_others("private", ())  # what private runs say is no more open here
    storage.write_text(page, as_html(found, datetime.datetime.now(datetime.UTC)))
    terminal.out(f"{page}\n")
    return 0


# ---------------------------------------------------------------------------------------------------------- reading


def read(config: Config, page: Path) -> Found:
    """Everything that the page shows; `page` is the folder that it will be in."""
    found, runs = Found(page), Path(config.paths.runs)
    everywhere = list(directories(runs))
    for directory, record in records_below(everywhere):
        metrics = _whole(found, load_metrics, directory)
        if metrics is not None:
            found.runs.append(Side(directory, record, metrics))
    found.left_out += len(everywhere) - len(found.runs) - found.left_out  # of which records_below has warned
    found.runs.sort(key=lambda side: side.label, reverse=True)
    root = root_of(runs)
    found.models = [model for name in names(root) if (model := _whole(found, _model, root, name))]
    found.windows = list(_results(found, "monitor", "drift.json", VerdictRecord, WINDOWS))
    found.backtests = list(_results(found, "backtest", "backtest.json", BacktestRecord, BACKTESTS))
    found.sweeps = list(_results(found, "sweep", "sweep.json", SweepRecord, SWEEPS))
    found.views = view_rows(config)
    return found


def _whole(found: Found, reader: Callable[..., T], *arguments: Any) -> T | None:
    """What a reader returns; None with a warning where a file is damaged."""
    try:
        return reader(*arguments)
    except UserError as error:
        terminal.err(f"warning: left out: {error}\n")
        found.left_out += 1
        return None


def _model(root: Path, name: str) -> Model:
    registry = Registry(root, name)
    return Model(name, registry.state(), {version.digest: version for version in registry.versions()})


def _results(found: Found, command: str, file: str, shape: type[T], most: int) -> Iterator[tuple[Side, T]]:
    """(run, what it found) of the newest finished runs of a command."""
    done = [side for side in found.runs if side.record["command"] == command and (side.directory / "DONE").exists()]
    for side in done[:most]:
        record = _whole(found, lambda side=side: records.read(as_written(side.directory, file), shape))
        if record is not None:
            yield side, record


# ------------------------------------------------------------------------------------------------------------- page


def as_html(found: Found, now: datetime.datetime) -> str:
    """The page, self-contained; its links are relative to `found.page`."""
    body = [
        html.tiles(_tiles(found)),
        html.section("Models", *_models(found), note="Champions and challengers of the registry, and who moved them."),
        html.section("Monitoring", _windows(found), note=f"The newest {WINDOWS} windows."),
        html.section("Quality of trainings", _quality(found)),
        html.section("Backtests", *_backtests(found)),
        html.section("Sweeps", _sweeps(found)),
        html.section(
            "Feature views", _views(found), note="Drift is that of the newest month against the month before."
        ),
        html.section("Runs", *_runs(found), note=f"The newest {RUNS} of each command."),
    ]
    if found.left_out:
        words = f"Left out, because damaged or of another version: {found.left_out}. The command has named each."
        body.insert(1, html.paragraph(words))
    return str(html.page("Engine", f"as of {now:%Y-%m-%d %H:%M} UTC", body))


def _tiles(found: Found) -> Iterator[html.Tile]:
    states = [status(side.directory, side.record) for side in found.runs]
    bad = {state: states.count(state) for state in ("failed", "killed") if state in states}
    said = ", ".join(f"{count} {state}" for state, count in bad.items())
    champions = [model.name for model in found.models if model.state.champion]
    yield html.Tile("Champions", str(len(champions)), _names(champions))
    newest = {_text(side.record["name"]): record for side, record in reversed(found.windows)}
    loud = [name for name, record in newest.items() if record["alarm"]]
    if newest:
        tone = "bad" if loud else "good"
        yield html.Tile("Alarms", str(len(loud)), _names(loud) or f"newest windows of {_names(newest)}", tone)
    yield html.Tile("Feature views", str(len(found.views)), _size(sum(view["bytes"] for view in found.views)))
    yield html.Tile("Runs", f"{len(states):,}", said, "warn" if bad else "plain")


def _names(names_: Iterable[str], most: int = 4) -> str:
    listed = list(names_)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")


def _models(found: Found) -> Iterator[Markup]:
    by_id = {side.label: side for side in found.runs}
    rows = []
    for model in found.models:
        champion = model.versions.get(model.state.champion or "")
        facts: VersionFacts = champion.facts if champion else {}
        metric = facts.get("metric") or {"name": "", "value": None}
        source = by_id.get(Path(facts.get("source", "")).name)
        digest = short(model.state.champion)
        made = _report(found, source, digest) if source else digest
        since = model.state.moves[-1]["time"] if model.state.moves else ""
        figure = f"{_text(metric['name'])} {html.format_number(metric['value'])}" if metric["name"] else ""
        rows.append([_text(model.name), made, figure, short(model.state.challenger), len(model.versions), _when(since)])
    columns = ("model", "champion", "its metric", "challenger", "versions", "moved")
    yield html.table(columns, rows, empty="no model is registered: `engine registry promote NAME RUN`")
    moves = [(model.name, move) for model in found.models for move in model.state.moves]
    moves.sort(key=lambda item: item[1]["time"], reverse=True)
    if moves:
        lines = [_move(name, move) for name, move in moves[:MOVES]]
        yield html.folded("Moves", html.table(("time", "model", "action", "from", "to", "who", "why"), lines))


def _move(name: str, move: MoveRecord) -> list[str]:
    texts = [
        _text(name),
        move["action"],
        short(move["from"]),
        short(move["to"]),
        _text(move["who"]),
        _text(move["why"]),
    ]
    return [_when(move["time"]), *texts]


def _windows(found: Found) -> Markup:
    rows = [
        [
            _opened(found, side),
            _text(side.record["name"]),
            html.badge(_text(record["verdict"]), TONES.get(record["verdict"], "warn")),
            " to ".join(_text(edge)[:10] for edge in record["window"]),
            record["rows"],
            _text(record["headline"]),
        ]
        for side, record in found.windows
    ]
    columns = ("at", "name", "verdict", "window", "rows", "found")
    return html.table(columns, rows, empty="nothing has been monitored: `engine monitor`")


def _quality(found: Found) -> Markup:
    """A chart per metric: the figure of each training over time, a line per name."""
    points: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for side in reversed([side for side in found.runs if side.record["command"] == "train"][:POINTS]):
        metric, value = headline(side.metrics)
        at = _instant(side.record["started"])
        if value is not None and at is not None:
            points.setdefault(metric, {}).setdefault(_text(side.record["name"]), []).append((at.timestamp(), value))
    cards = []
    for metric, named in points.items():
        kept = dict(sorted(named.items(), key=lambda item: -len(item[1]))[: html.PALETTE])
        lines = [html.Series(name, [x for x, _ in line], [y for _, y in line]) for name, line in kept.items()]
        chart = html.line_chart(lines, y_label=_text(metric), x_ticks=_dates([x for line in lines for x in line.x]))
        cards.append(html.card(_text(metric), chart))
    beside = [Markup("<i></i>")] if len(cards) == 1 else []  # so that a chart never fills the page
    return (
        html.row(*cards, *beside) if cards else html.paragraph("no training has finished: `engine train`", quiet=True)
    )


def _dates(times: list[float]) -> dict[float, str]:
    """Names of up to four instants between the first and the last."""
    first, last = min(times), max(times)
    form = "%H:%M" if last - first < DAY else "%Y-%m-%d"
    places = [first + (last - first) * share for share in (7 / 8, 5 / 8, 3 / 8, 1 / 8)]
    named = {f"{datetime.datetime.fromtimestamp(place, datetime.UTC):{form}}": place for place in places}
    return {place: name for name, place in named.items()}


def _backtests(found: Found) -> Iterator[Markup]:
    for side, record in found.backtests:
        rows = [[_text(row[0]), *row[1:]] for row in backtest_report.policy_rows(record)]
        title = f"{_text(record['name'])}: {_text(record['metric'])}"
        yield html.card(title, _opened(found, side), html.table(backtest_report.COLUMNS, rows))
    if not found.backtests:
        yield html.paragraph("no backtest has finished: `engine backtest`", quiet=True)


def _sweeps(found: Found) -> Markup:
    rows = [
        [
            _opened(found, side),
            _text(record["name"]),
            _text(record["metric"]),
            len(record["trials"]),
            *(record["best"].get(key) for key in ("test", "test_without_search", "too_good_by")),
        ]
        for side, record in found.sweeps
    ]
    columns = ("at", "name", "metric", "trials", "best, test rows", "without the search", "too good by")
    return html.table(columns, rows, empty="no sweep has finished: `engine sweep`")


def _views(found: Found) -> Markup:
    rows = [
        [
            _text(view["view"]),
            _text(view["description"]),
            _text(view["kind"]),
            _text(view["owner"]),
            _names(map(_text, view["entity"])),
            view["features"],
            view["versions"],
            _size(view["bytes"]),
            view["models"],
            _text(view["newest_event"])[:10],
            view["drift"],
            _text(view["drift_of"]),
        ]
        for view in found.views
    ]
    columns = (
        *("view", "what it is", "kind", "owner", "entity", "features", "versions", "size", "models"),
        *("newest event", "drift", "of"),
    )
    return html.table(columns, rows, empty="the store has no view: `engine features`")


def _runs(found: Found) -> Iterator[Markup]:
    by_command: dict[str, list[Side]] = {}
    for side in found.runs:
        by_command.setdefault(_text(side.record["command"]), []).append(side)
    for command in sorted(by_command, key=lambda name: (name not in COMMANDS, name)):
        sides = by_command[command]
        rows = [_run(found, side) for side in sides[:RUNS]]
        title = f"{command} ({len(sides):,})"
        yield html.folded(title, html.table(("at", "name", "status", "s", "figure", "run"), rows))
    if not by_command:
        yield html.paragraph("no run yet: `engine train +experiment=NAME`", quiet=True)


def _run(found: Found, side: Side) -> list[Any]:
    record, state = side.record, status(side.directory, side.record)
    alarms = record.get("alarms") or record.get("unjudged") or []
    metric, value = headline(side.metrics)
    figure = f"{_text(metric)} {html.format_number(value)}" if value is not None else ""
    return [
        _opened(found, side),
        _text(record["name"]),
        html.badge(_text(state), TONES.get(state, "warn")),
        record.get("seconds"),
        _text(record.get("error") or "; ".join(alarms)) or figure,
        _text(side.label),
    ]


# ----------------------------------------------------------------------------------------------------------- pieces


def headline(metrics: Mapping[str, float | None]) -> tuple[str, float | None]:
    """The metric that a run is known by, and its value: of the test rows where there are some, without slices."""
    judged = [name for name in metrics if name.count("/") == 1 and name.startswith(("test/", "valid/"))]
    name = next((name for name in (*HEADLINES, *judged) if metrics.get(name) is not None), "")
    return name, metrics.get(name)


def _opened(found: Found, side: Side) -> Markup:
    """The time of a run, which opens its report."""
    return _report(found, side, _when(side.record["started"]))


def _report(found: Found, side: Side, text: str) -> Markup:
    """A link to the report of a run; the text alone where there is none, or where it is a link that leads out of the run."""
    with contextlib.suppress(UserError):
        path = storage.inside(side.directory, "report.html")
        if path.is_file():
            return html.link(text, os.path.relpath(path, found.page))
    return escape(text)


def _text(value: object) -> str:
    """A text from a file on one line, shortened; characters that steer are shown as their codes."""
    text = terminal.one_line(str(value))
    return text if len(text) <= LETTERS else text[:LETTERS] + " ..."


def _instant(text: str) -> datetime.datetime | None:
    """A recorded time; UTC where it has no zone, None where it is none."""
    try:
        at = datetime.datetime.fromisoformat(text)
        return (at if at.tzinfo else at.replace(tzinfo=datetime.UTC)).astimezone(datetime.UTC)
    except (ValueError, OverflowError):
        return None


def _when(text: str) -> str:
    at = _instant(text)
    return f"{at:%Y-%m-%d %H:%M}" if at else _text(text)


def _size(count: float) -> str:
    return f"{count / 1e6:,.1f} MB"
