"""A run: its own directory with its record, chain of digests, metrics and log."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import secrets as random_names
import shutil
import sys
import time
import traceback
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict, Unpack, cast

from engine.config import code_names, plugins, schema, secrecy
from engine.config.nested import Tree
from engine.config.tree import IMMATERIAL, Config, without
from engine.errors import UserError
from engine.runtime import digest, environment, git, records, seal, storage, terminal, trust
from engine.runtime.environment import CodeRecord, EnvironmentRecord
from engine.runtime.on_ray import versions
from engine.runtime.progress import Progress

FORMAT = 1
Precision = Literal["fp32", "bf16"]
LINKS = (
    "inputs",
    "plugins",
    "dataset",
    "features",
    "fitted",
    "order",
    "loss@",
    "weights",
    "metrics",
    "scores",
    "reasons",
    "drift",
)
LOCK = ".lock"
# Files that change after the end (the mirror), have their own seal (the bundle) or are temporary (working files).
UNSEALED = ("run.log", "tracking.json", "tracking.log", "wandb", "model", "checkpoints", "parts")


class PathsRecord(TypedDict):
    """Paths of the run's files, relative to its `folder`."""

    store: str
    runs: str


class ConfigRecord(TypedDict):
    """The resolved config, secrets masked; the content of other sections is not checked here."""

    paths: PathsRecord
    name: NotRequired[str]
    data: NotRequired[Tree]
    split: NotRequired[Tree]
    features: NotRequired[Tree]
    train: NotRequired[Tree]
    score: NotRequired[Tree]
    evaluate: NotRequired[Tree]
    monitor: NotRequired[Tree]
    cluster: NotRequired[Tree]
    tracking: NotRequired[Tree]
    plugins: NotRequired[list[str]]


class AttemptRecord(TypedDict):
    """One resumption."""

    engine_digest: records.Digest
    started: str
    command_line: NotRequired[list[str]]
    environment: NotRequired[EnvironmentRecord]
    cluster: NotRequired[versions.ClusterRecord]


class SourceRecord(TypedDict):
    """source.json of a submitted job: the working folder from which it was submitted."""

    git: environment.GitRecord | None
    folder: NotRequired[str]
    engine: NotRequired[str]
    patch: bool
    not_in_patch: NotRequired[list[str]]
    versions: NotRequired[versions.Comparison | None]


class PredictionsRecord(TypedDict):
    """Where the predictions are if not in the run directory."""

    output: str
    endpoint: str | None
    region: str | None


class LabelsRecord(TypedDict):
    """The rows of a period that were read, and those whose label was not ripe; times are texts, [from, to)."""

    period: list[str]
    used: list[str]
    known_by: str | None
    maturity_days: float | None
    rows: int
    not_ripe: int
    unlabelled: int
    target_mean: NotRequired[float | None]
    target_mean_with_not_ripe: NotRequired[float | None]


class ChosenModel(TypedDict):
    """What model=auto meant: keys of `model`."""

    kind: str
    hidden: NotRequired[list[int]]
    embeddings: NotRequired[str]


class Facts(TypedDict, total=False):
    """What commands add to run.json (`Run.note`)."""

    parent: str | None
    model: str
    shadow: str
    started_from: str | None
    precision: Precision
    device: str
    device_facts: dict[str, str | int | bool | None]
    sizes: dict[str, int]
    chosen_model: ChosenModel
    installed_code: dict[str, str]  # key of the config -> version of the installed code that it names
    labels: dict[str, LabelsRecord]
    labels_of_targets: dict[str, dict[str, LabelsRecord]]
    tracking: Tree
    submitted: SourceRecord
    views: dict[str, str]
    history: str
    appended_to: str | None
    predictions: PredictionsRecord
    alerts: dict[str, str]
    replayed: str
    verdict: str
    champion: str
    challenger: str | None
    challenger_run: str


class _Started(TypedDict):
    format: Annotated[int, records.Within(1, FORMAT)]
    command: str
    name: str
    config: ConfigRecord
    code: CodeRecord
    environment: EnvironmentRecord
    inputs: dict[str, str]
    outputs: dict[str, str]
    chain: dict[str, str]
    status: str
    started: str
    pid: Annotated[int, records.Within(1, 2**31 - 1)]


class RunRecord(_Started, Facts, total=False):
    """run.json."""

    command_line: list[str]
    seeds: dict[str, int]
    folder: str
    plan: str
    seconds: float
    ended: str
    error: str
    used: dict[str, str]
    cluster: versions.ClusterRecord
    alarms: list[str]
    unjudged: list[str]
    not_in_patch: dict[str, list[str]]
    resumes: list[AttemptRecord]


Metrics = dict[str, float | None]  # metrics.json


@dataclass(frozen=True)
class Series:
    """Where lines of metrics.jsonl are written: the folder, what their names begin with, and the step that theirs follow."""

    folder: Path
    prefix: str = ""
    after: int = 0


class RunBusy(UserError):
    """Another process works in this run directory."""


def plan_digest(command: str, config: Config, *, code: Mapping[str, str] | None = None) -> str:
    """Digest of the plan of a run: the config without keys that do not affect results, and the versions of installed code that
    it names.
    """
    code_used = code_names.installed_versions(config)
    plan = [command, without(schema.plain(config), IMMATERIAL), code or {}]
    return digest.of_json([*plan, code_used] if code_used else plan)


class Run:
    """One run directory, `runs/<command>/<name>/<UTC time>-<id>/`.

    Open with `Run.create` or `Run.resume`; the shell calls `finish` (writes DONE last) or `fail`. A run holds a lock on
    its directory while it is open; the lock always ends with the process.
    """

    def __init__(
        self,
        directory: Path,
        record: RunRecord,
        hidden: tuple[str, ...] = (),
        resumed: bool = False,
        lock: int | None = None,
    ) -> None:
        self.directory = directory
        self.record = record
        self.resumed = resumed
        self.alarms: list[str] = []
        self.unjudged: list[str] = []
        self.hidden = hidden
        self.series = Series(directory)
        self.stops = directory  # a file `stop` in it stops training
        # Closing the descriptor releases the lock, at the latest when the object is collected.
        self._release = weakref.finalize(self, os.close, lock) if lock is not None else lambda: None
        self._began = time.monotonic()
        self._logger = self._open_log()

    def __repr__(self) -> str:
        return f"<Run of {self.record['command']} {self.record['name']!r}, {self.record['status']}: {self.directory}>"

    # ---------------------------------------------------------------------------------------------- opening

    @classmethod
    def create(
        cls,
        command: str,
        config: Config,
        saved_config: Tree,
        *,
        command_line: list[str] | None = None,
        hidden: tuple[str, ...] = (),
    ) -> Run:
        """Open a new run in a new directory, also if another run starts at the same instant."""
        now = _now()
        directory = _new_directory(runs_folder(config, command), now)
        record: RunRecord = {
            "format": FORMAT,
            "command": command,
            "name": config.name,
            "command_line": command_line or [],
            "folder": str(Path.cwd()),
            "config": cast(ConfigRecord, saved_config),
            "plan": plan_digest(command, config),
            "code": environment.code(),
            "environment": environment.environment(),
            "inputs": {},
            "outputs": {},
            "seeds": {"train": config.train.seed},
            "status": "running",
            "started": now.isoformat(timespec="microseconds"),
            "pid": os.getpid(),
            "chain": {},
        }
        if (installed := code_names.installed_versions(config)) or config.plugins:
            record["installed_code"] = installed
            record["chain"]["plugins"] = digest.of_json([list(config.plugins), installed])
        run = None
        try:
            # The lock is taken before run.json is written: a directory with a record but no lock has no living process.
            run = cls(directory, record, hidden, lock=_try_lock(directory))
            for name, root in _dirty_trees(record["code"]):
                run.write_patch(name, git.patch(root))
            run.save()
            trust.record(Path(config.paths.store), record["code"])
            for plugin in plugins.named(config.plugins):
                storage.write_bytes(run.path(plugins.FOLDER, plugin.file), plugin.code)
                trust.record_plugin(Path(config.paths.store), plugin)
            for doubt in environment.doubts(record["code"]):
                run._log_file(f"warning: {doubt}")
        except BaseException:  # a full disk, Ctrl-C: a directory without a record is useless
            if run is not None:
                run._close()
            shutil.rmtree(directory, ignore_errors=True)
            raise
        return run

    @classmethod
    def resume(cls, directory: Path, hidden: tuple[str, ...] = (), *, command_line: list[str] | None = None) -> Run:
        """Reopen the unfinished run in `directory` to continue it.

        Raises RunBusy if another process has it open, UserError if it is finished.
        """
        load_record(directory)
        lock = _try_lock(directory)
        if lock is None:
            raise RunBusy(f"{directory} is in use by another process; wait for it, or start anew with resume=never")
        record = load_record(directory)  # as the last holder of the lock left it
        if (directory / "DONE").exists():
            os.close(lock)
            raise UserError(f"{directory} is finished: there is nothing to resume. Start anew with resume=never")
        now, code = environment.code(), record["code"]
        attempt: AttemptRecord = {
            "started": _now().isoformat(timespec="microseconds"),
            "command_line": command_line or [],
            "engine_digest": now["engine_digest"],
            "environment": environment.environment(),
        }
        record |= {"resumes": [*record.get("resumes", []), attempt], "status": "running", "pid": os.getpid()}
        record.pop("error", None)
        record.pop("ended", None)
        run = cls(directory, record, hidden, resumed=True, lock=lock)
        run.save()
        if now["engine_digest"] != code["engine_digest"]:
            run.warn("the engine has changed since this run began; resume=never starts anew")
        return run

    @staticmethod
    def read(directory: str | Path) -> RunRecord:
        """run.json of a run directory."""
        return load_record(directory)

    @property
    def metrics(self) -> dict[str, float | None]:
        """metrics.json of the finished run."""
        return load_metrics(self.directory)

    def _open_log(self) -> logging.Logger:
        logger = logging.getLogger(f"engine.run.{self.directory.name}")
        logger.setLevel(logging.INFO)
        logger.propagate = False
        if not logger.handlers:
            formatter = _Printable("%(asctime)s %(levelname)s %(message)s")
            formatter.converter = time.gmtime
            file = _LogFile(self.directory / "run.log", encoding="utf-8")
            file.setFormatter(formatter)
            screen = logging.StreamHandler(sys.stderr)
            screen.setFormatter(_Printable("%(message)s"))
            for handler in (file, screen):
                logger.addHandler(handler)
        return logger

    # ---------------------------------------------------------------------------------------------- recording

    def redact(self, text: str) -> str:
        """The text with secret values, and parts that look like secrets, masked (`engine.config.secrecy`)."""
        return secrecy.redact(text, self.hidden)

    def masked(self, value: Any) -> Any:
        """A JSON value with secrets in its texts masked."""
        return json.loads(self._text(value))

    def _text(self, value: Any, **options: Any) -> str:
        """JSON with its texts masked."""
        text = json.dumps(value, ensure_ascii=False, **options)
        if self.redact(text) == text:
            return text
        return json.dumps(secrecy.masked(json.loads(text), self.redact), ensure_ascii=False, **options)

    def log(self, message: str) -> None:
        """Write one line to run.log and stderr."""
        self._logger.info(self.redact(message))

    def warn(self, message: str) -> None:
        """Write a warning to run.log and stderr."""
        self._logger.warning(self.redact(f"warning: {message}"))

    def alarm(self, message: str) -> None:
        """Log and record an alarm; the exit code becomes 2."""
        self.alarms.append(self.redact(message))
        self.record["alarms"] = self.alarms
        self._logger.warning(f"ALARM: {self.alarms[-1]}")

    def cannot_judge(self, message: str) -> None:
        """Log and record that a check has no result; without an alarm the exit code becomes 3."""
        self.unjudged.append(self.redact(message))
        self.record["unjudged"] = self.unjudged
        self._logger.warning(f"CANNOT BE JUDGED: {self.unjudged[-1]}")

    def save(self) -> None:
        """Write run.json."""
        storage.write_text(
            self.directory / "run.json", self._text(self.record, indent=1, allow_nan=False, default=str) + "\n"
        )

    def note(self, **values: Unpack[Facts]) -> None:
        """Add top-level facts to run.json."""
        self.record.update(values)
        self.save()

    def add_inputs(self, digests: Mapping[str, str]) -> None:
        """Record input files and their digests."""
        self.record["inputs"].update(digests)
        self.save()

    def add_output(self, name: str, value: str) -> None:
        """Record an output and its digest."""
        self.record["outputs"][name] = value
        self.save()

    def add_used(self, name: str, value: str) -> None:
        """Record an output of another run that this run used, by the digest recorded there."""
        self.record.setdefault("used", {})[name] = value
        self.save()

    def link(self, name: str, value: str) -> None:
        """Set one link of the chain (hex SHA-256); links are kept in the chain's order."""
        if not any(name == known or (known.endswith("@") and name.startswith(known)) for known in LINKS):
            raise AssertionError(f"unknown link {name!r}; links are {LINKS}")
        chain = {**self.record["chain"], name: value}
        self.record["chain"] = dict(sorted(chain.items(), key=lambda item: link_order(item[0])))
        self.save()

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line to metrics.jsonl; a value that is not finite is written as null."""
        series = self.series
        line = {"step": series.after + step, "time": round(time.time(), 3)}
        line.update(storage.finite({series.prefix + name: value for name, value in values.items()}))
        with storage.disk_errors(series.folder), open(series.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def progress(self, label: str, total: int | None = None, unit: str = "rows", start: int = 0) -> Progress:
        """A progress display."""
        return Progress(label, total, unit, start)

    def path(self, *parts: str) -> Path:
        """A path inside the run directory."""
        return storage.inside(self.directory, *parts)

    def write_patch(self, name: str, patch: str) -> None:
        """Save uncommitted changes as `<name>.patch`, without secrets; omissions are recorded as `not_in_patch` and logged."""
        kept, omitted = secrecy.masked_patch(patch, self.hidden)
        storage.write_text(self.directory / f"{name}.patch", kept)
        if omitted:
            self.record.setdefault("not_in_patch", {})[name] = omitted
            self._log_file(f"warning: {name}.patch omits what looks like a secret: {', '.join(omitted)}")

    # ---------------------------------------------------------------------------------------------- closing

    def finish(self, metrics: Mapping[str, float], status: str = "done") -> None:
        """Write metrics.json, the metrics link, run.json, and DONE last."""
        finite = {name: storage.finite(float(value)) for name, value in sorted(metrics.items())}
        storage.write_json(self.directory / "metrics.json", finite)
        judged = {name: value for name, value in finite.items() if name.startswith(("valid/", "test/"))}
        if judged:
            self.link("metrics", digest.of_json(judged))
        self._end(status)
        with storage.disk_errors(self.directory):
            seal.write(self.directory, leave_out=UNSEALED)
        storage.write_text(self.directory / "DONE", "")
        self._close()

    def fail(self, error: BaseException, status: str = "failed") -> None:
        """Record why the run ended, with the traceback in run.log unless it is the user's mistake. Writes no DONE."""
        self.record["error"] = self.redact(f"{type(error).__name__}: {error}")
        if isinstance(error, (UserError, KeyboardInterrupt)):
            self._log_file(f"{status}: {error}".removesuffix(": "))
        else:
            self._log_file("".join(traceback.format_exception(error)).rstrip())
        # On a full disk run.json stays unchanged (`running`, unlocked), and `error` is reported.
        with contextlib.suppress(UserError, OSError):
            self._end(status)
        self._close()

    def _log_file(self, message: str) -> None:
        # For run.log only: the shell prints its own message on the screen.
        for handler in self._logger.handlers:
            if isinstance(handler, _LogFile):
                handler.handle(self._logger.makeRecord("run", logging.ERROR, "", 0, self.redact(message), (), None))

    def _end(self, status: str) -> None:
        self.record["status"] = status
        self.record["ended"] = _now().isoformat(timespec="microseconds")
        self.record["seconds"] = round(self.record.get("seconds", 0) + time.monotonic() - self._began, 3)
        self.save()

    def _close(self) -> None:
        for handler in list(self._logger.handlers):
            handler.close()
            self._logger.removeHandler(handler)
        if (self.directory / "DONE").exists():  # a finished run is never resumed, so no process waits for this file
            (self.directory / LOCK).unlink(missing_ok=True)
        self._release()


class _Printable(logging.Formatter):
    """Log lines without control characters, so that data cannot steer the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """The line with control characters escaped."""
        return terminal.printable(super().format(record))


class _LogFile(logging.FileHandler):
    """run.log. A line that cannot be written is lost, but does not stop the run."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Do nothing: a full disk is reported by other writes."""

    def close(self) -> None:
        """Close, even if the last lines do not fit on the disk."""
        with contextlib.suppress(OSError):
            super().close()


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _new_directory(parent: Path, now: datetime.datetime) -> Path:
    """An exclusive `<UTC second>-<id>`; the id starts with the microseconds, so that names sort by time."""
    with storage.disk_errors(parent):
        storage.make_folder(parent)
        while True:
            directory = parent / f"{now:%Y%m%dT%H%M%S}-{now.microsecond:05x}{random_names.token_hex(1)}"
            try:
                directory.mkdir()
                return directory
            except FileExistsError:
                continue


def _try_lock(directory: Path) -> int | None:
    """Descriptor of the locked lock file of a run directory, or None if another process holds the lock."""
    with storage.disk_errors(directory):
        descriptor = os.open(directory / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
    mine = False
    try:
        mine = storage.lock(descriptor, directory, wait=False)
    finally:
        if not mine:
            os.close(descriptor)
    return descriptor if mine else None


def _dirty_trees(code: CodeRecord) -> list[tuple[str, Path]]:
    """(name of the patch file, root) of git trees with uncommitted changes; once if engine and user share a tree."""
    roots = {"engine": code["engine_git"], "user": code["user_git"]}
    if roots["engine"] and roots["user"] and roots["engine"]["root"] == roots["user"]["root"]:
        del roots["user"]
    return [(name, Path(state["root"])) for name, state in roots.items() if state and state["dirty"]]


def link_order(name: str) -> tuple[int, int]:
    """Sort key of links in the order of the chain; `loss` is before every `loss@<step>`."""
    if name.startswith("loss"):
        return LINKS.index("loss@"), int(name.partition("@")[2] or 0)
    return LINKS.index(name), 0


def runs_folder(config: Config, command: str) -> Path:
    """Where the run directories of a command and a name are."""
    return storage.inside(Path(config.paths.runs), command, config.name)


def is_free(directory: Path) -> bool:
    """Whether no process is working in a run directory."""
    lock = _try_lock(directory)
    if lock is not None:
        os.close(lock)
    return lock is not None


def remove(directory: Path, runs: Path) -> bool:
    """Remove a run directory below `runs` completely or not at all; False if a process is working in it."""
    lock = _try_lock(directory)
    if lock is not None:
        try:
            storage.remove(directory, runs)
        finally:
            os.close(lock)
    return lock is not None


def load_record(directory: str | Path, refuse: bool = False) -> RunRecord:
    """run.json of a run directory, `as_written`. Raises records.Damaged, naming the wrong key."""
    return records.read(as_written(Path(directory), "run.json", refuse), RunRecord)


def records_below(directories: Iterable[Path]) -> Iterator[tuple[Path, RunRecord]]:
    """(directory, run.json) of each; a damaged record is skipped with a warning, one that was removed without."""
    for directory in directories:
        try:
            yield directory, load_record(directory)
        except UserError as error:
            if directory.exists():
                terminal.err(f"warning: skipped: {error}\n")


def facts_of_runs(config: Config, shape: Any) -> Iterator[tuple[Path, Any]]:
    """(directory, the part `shape` of run.json) of every run, and of the runs that backtests keep in the store.

    Raises UserError for a damaged record: it may have named what a clean-up would remove.
    """
    for runs in (Path(config.paths.runs), Path(config.paths.store) / "backtest"):
        for path in sorted(runs.glob("*/*/*/run.json")):
            yield path.parent, records.read(as_written(path.parent, path.name, refuse=True), shape)


def load_metrics(directory: Path, refuse: bool = False) -> dict[str, float | None]:
    """metrics.json of a run, `as_written`; empty if the run did not finish."""
    if not (directory / "metrics.json").exists():
        return {}
    return dict(records.read(as_written(directory, "metrics.json", refuse), Metrics))


def as_written(directory: Path, name: str, refuse: bool = False) -> Path:
    """The path of a file of a run. If it differs from the seal of the finished run: a warning, or Damaged with `refuse`.

    Use `refuse` for files that a decision depends on. Runs of older engines have no seal.
    Raises UserError for a link that leads out of the run.
    """
    path = storage.inside(directory, *Path(name).parts)
    if not (directory / "DONE").exists():
        return path
    try:
        return seal.sealed(directory, name, f"Run {directory.parts[-3:][0]} again")
    except UserError as error:
        if refuse:
            raise
        terminal.err(f"warning: {error}\n")
        return path
