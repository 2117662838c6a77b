"""A run: its exclusive directory, its record, its chain of digests, its metrics and its log."""

from __future__ import annotations

import datetime
import json
import logging
import math
import os
import re
import secrets as random_names
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.config import schema
from engine.config.tree import IMMATERIAL, Config, without
from engine.errors import UserError
from engine.runtime import digest, environment, storage
from engine.runtime.progress import Progress

FORMAT = 1
LINKS = ("inputs", "dataset", "features", "fitted", "order", "loss@", "weights", "metrics", "scores")
MASK = "***"
_NAME = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_.\-]*$")


def plan_digest(command: str, config: Config, *, code: Mapping[str, Any] | None = None) -> str:
    """Digest of what a run is to do: the config without what must not change the result."""
    return digest.of_json([command, without(schema.plain(config), IMMATERIAL), code or {}])


class Run:
    """One run directory, `runs/<command>/<name>/<UTC time>-<id>/`.

    Open with `Run.create` or `Run.resume`; the shell calls `finish` (writes DONE last) or `fail`.
    """

    def __init__(self, directory: Path, record: dict[str, Any], hidden: tuple[str, ...] = (), resumed: bool = False) -> None:
        self.directory = directory
        self.record = record
        self.resumed = resumed
        self._hidden = hidden
        self._began = time.monotonic()
        self._logger = self._open_log()

    # ---------------------------------------------------------------------------------------------- opening

    @classmethod
    def create(
        cls,
        command: str,
        config: Config,
        saved_config: dict[str, Any],
        *,
        command_line: list[str] | None = None,
        hidden: tuple[str, ...] = (),
    ) -> Run:
        """A new exclusive directory; two runs in the same instant get two."""
        parent = _runs_folder(config, command)
        now = datetime.datetime.now(datetime.UTC)
        with storage.disk_errors(parent):
            parent.mkdir(parents=True, exist_ok=True)
            while True:
                directory = parent / f"{now:%Y%m%dT%H%M%S}-{random_names.token_hex(3)}"
                try:
                    directory.mkdir()
                    break
                except FileExistsError:
                    continue
        record: dict[str, Any] = {
            "format": FORMAT,
            "command": command,
            "name": config.name,
            "command_line": command_line or [],
            "config": saved_config,
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
        run = cls(directory, record, hidden)
        for owner in ("engine_git", "user_git"):
            state = record["code"][owner]
            if state and state["dirty"]:
                storage.write_text(directory / f"{owner.removesuffix('_git')}.patch", run.redact(environment.patch(Path(state["root"]))))
        run.save()
        return run

    @classmethod
    def resume(cls, directory: Path, hidden: tuple[str, ...] = ()) -> Run:
        """The unfinished run in `directory`, opened to go on."""
        record = storage.read_json(directory / "run.json")
        if (directory / "DONE").exists():
            raise UserError(f"{directory} is finished: there is nothing to resume. Start anew with resume=never")
        record["resumes"] = [*record.get("resumes", []), datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")]
        record["status"] = "running"
        record["pid"] = os.getpid()
        run = cls(directory, record, hidden, resumed=True)
        run.save()
        return run

    def _open_log(self) -> logging.Logger:
        logger = logging.getLogger(f"engine.run.{self.directory.name}")
        logger.setLevel(logging.INFO)
        logger.propagate = False
        if not logger.handlers:
            formatter = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
            formatter.converter = time.gmtime
            file = logging.FileHandler(self.directory / "run.log", encoding="utf-8")
            file.setFormatter(formatter)
            screen = logging.StreamHandler(sys.stderr)
            screen.setFormatter(logging.Formatter("%(message)s"))
            for handler in (file, screen):
                logger.addHandler(handler)
        return logger

    # ---------------------------------------------------------------------------------------------- recording

    def redact(self, text: str) -> str:
        """The text without secret values."""
        for value in self._hidden:
            if len(value) >= 4:
                text = text.replace(value, MASK)
        return text

    def log(self, message: str) -> None:
        """One line for a person, to run.log and stderr."""
        self._logger.info(self.redact(message))

    def warn(self, message: str) -> None:
        """One line that a person should act on."""
        self._logger.warning(self.redact(f"warning: {message}"))

    def save(self) -> None:
        """Write run.json."""
        text = json.dumps(self.record, indent=1, ensure_ascii=False, allow_nan=False, default=str)
        storage.write_text(self.directory / "run.json", self.redact(text) + "\n")

    def note(self, **values: Any) -> None:
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

    def link(self, name: str, value: str) -> None:
        """Set one link of the chain (hex SHA-256); links are kept in the chain's order."""
        if not any(name == known or (known.endswith("@") and name.startswith(known)) for known in LINKS):
            raise AssertionError(f"unknown link {name!r}; links are {LINKS}")
        chain = {**self.record["chain"], name: value}
        self.record["chain"] = dict(sorted(chain.items(), key=lambda item: _link_order(item[0])))
        self.save()

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line to metrics.jsonl; a value that is not finite is written as null."""
        line = {"step": step, "time": round(time.time(), 3)}
        line.update({name: value if math.isfinite(value) else None for name, value in values.items()})  # type: ignore[misc]
        with storage.disk_errors(self.directory), open(self.directory / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def progress(self, label: str, total: int | None = None, unit: str = "rows", start: int = 0) -> Progress:
        """A progress display."""
        return Progress(label, total, unit, start)

    def path(self, *parts: str) -> Path:
        """A path inside the run directory."""
        return storage.inside(self.directory, *parts)

    # ---------------------------------------------------------------------------------------------- closing

    def finish(self, metrics: Mapping[str, float], status: str = "done") -> None:
        """Write metrics.json, the metrics link, run.json, and DONE last."""
        finite = {name: float(value) if math.isfinite(value) else None for name, value in sorted(metrics.items())}
        storage.write_json(self.directory / "metrics.json", finite)
        judged = {name: value for name, value in finite.items() if name.startswith(("valid/", "test/"))}
        if judged:
            self.link("metrics", digest.of_json(judged))
        self._close(status)
        storage.write_text(self.directory / "DONE", "")

    def fail(self, error: BaseException, status: str = "failed") -> None:
        """Record why the run ended; no DONE is written."""
        self.record["error"] = self.redact(f"{type(error).__name__}: {error}")
        self._close(status)

    def _close(self, status: str) -> None:
        self.record["status"] = status
        self.record["ended"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
        self.record["seconds"] = round(self.record.get("seconds", 0) + time.monotonic() - self._began, 3)
        self.save()
        for handler in list(self._logger.handlers):
            handler.close()
            self._logger.removeHandler(handler)


def _link_order(name: str) -> tuple[int, int]:
    if name.startswith("loss@"):
        return LINKS.index("loss@"), int(name.removeprefix("loss@"))
    return LINKS.index(name), 0


def _runs_folder(config: Config, command: str) -> Path:
    if not _NAME.match(config.name):
        raise UserError(f"name must be letters, digits, dot, dash or underscore, found {config.name!r}")
    return storage.inside(Path(config.paths.runs), command, config.name)


def unfinished(command: str, config: Config) -> Path | None:
    """The newest run of the same command, name and plan that has no DONE and no living process."""
    plan = plan_digest(command, config)
    folder = _runs_folder(config, command)
    for directory in sorted(folder.glob("*-*"), reverse=True) if folder.is_dir() else []:
        record_path = directory / "run.json"
        if (directory / "DONE").exists() or not record_path.exists():
            continue
        record = storage.read_json(record_path)
        if record.get("plan") == plan and not (record.get("status") == "running" and _alive(record.get("pid"))):
            return directory
    return None


def _alive(pid: int | None) -> bool:
    if not pid or pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    # A recycled id is some other program: an engine process has `engine` among its words.
    try:
        return b"engine" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return True


def load_record(directory: Path) -> dict[str, Any]:
    """run.json of a run directory."""
    return dict(storage.read_json(directory / "run.json"))
