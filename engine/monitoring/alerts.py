"""Sends alarms to the sinks of `monitor.alerts`: log, file, command, webhook. A sink that fails never stops the run.

The same cause of the same model is sent once per cool-down; what was sent is stored beside the runs of the experiment.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import os
import shlex
import signal
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from engine.config.sections.monitoring import AlertConfig, MonitorConfig
from engine.errors import UserError
from engine.runtime import digest, records, stall, storage
from engine.runtime.run import Run

MEMORY = "alerts.json"
BACKOFF = 0.5  # seconds before the second attempt; doubled each time


def announce(config: MonitorConfig, run: Run) -> None:
    """Log which commands an alarm starts: they come from the config alone, but somebody else may have written its folder."""
    for name, sink in config.alerts.items():
        if sink.kind == "command":
            run.log(f"an alarm starts the command of monitor.alerts.{name} in your config: {sink.to}")


def tell(config: MonitorConfig, run: Run, cause: str, payload: Mapping[str, object]) -> dict[str, str]:
    """Send the payload to every sink that has not had this cause within the cool-down; returns the outcome of each."""
    outcome: dict[str, str] = {}
    if not config.alerts:
        return outcome
    key = digest.of_json([payload.get("model"), cause])
    memory = run.directory.parent / MEMORY
    cooldown = config.cooldown.seconds
    for name, sink in config.alerts.items():
        place, now = f"{name}:{key}", time.time()
        with _remembered(memory, cooldown) as told:
            age, sending = now - told.get(place, 0.0), told.get(f"{place}:sending", 0.0) - now
            if 0 <= age < cooldown:
                outcome[name] = f"not sent again: the same cause was sent {age / 3600:.1f} h ago"
                continue
            if 0 < sending <= _longest(sink):
                outcome[name] = "not sent again: another monitor is sending the same cause at this moment"
                continue
            told[f"{place}:sending"] = now + _longest(sink)
        outcome[name] = _try(sink, run, payload)  # not under the lock: it may be slow
        with _remembered(memory, cooldown) as told:
            told.pop(f"{place}:sending", None)
            if outcome[name] == "sent":
                told[place] = time.time()
    for name, text in outcome.items():
        (run.log if text.startswith(("sent", "not sent again")) else run.warn)(f"alert {name}: {text}")
    return outcome


def _try(sink: AlertConfig, run: Run, payload: Mapping[str, object]) -> str:
    try:
        SINKS[sink.kind](sink, run, payload)
    except Exception as error:
        return f"failed: {type(error).__name__}: {error}"
    return "sent"


def _log(_sink: AlertConfig, run: Run, payload: Mapping[str, object]) -> None:
    run.warn(f"alert: {payload['headline']}")


def _file(sink: AlertConfig, _run: Run, payload: Mapping[str, object]) -> None:
    path = Path(sink.to)
    storage.make_folder(path.parent)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(payload, ensure_ascii=False) + "\n")


def _command(sink: AlertConfig, run: Run, payload: Mapping[str, object]) -> None:
    words = [*shlex.split(sink.to), str(run.path("drift.json"))]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as process:
        try:
            _, said = process.communicate(json.dumps(payload), _limit(sink))
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its children too
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            # The error's own message holds every word, perhaps a token.
            raise RuntimeError(f"{words[0]} took longer than {sink.timeout}") from None
    if process.returncode:
        raise RuntimeError(f"{words[0]} ended with {process.returncode}: {said.strip()[-200:]}")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses redirects: they would be followed by GET, without the alarm."""

    def redirect_request(self, *_: Any) -> None:
        """Nowhere."""


OPENER = urllib.request.build_opener(_NoRedirect)


def _webhook(sink: AlertConfig, _run: Run, payload: Mapping[str, object]) -> None:
    if urllib.parse.urlsplit(sink.to).scheme not in ("http", "https"):
        raise UserError("a webhook must be an http or https address")
    body = json.dumps(payload, ensure_ascii=False).encode()
    headers = {"Content-Type": "application/json"}
    for attempt in range(sink.tries):
        if attempt:
            time.sleep(BACKOFF * 2 ** (attempt - 1))
        request = urllib.request.Request(sink.to, body, headers, method="POST")
        try:
            return stall.bounded(functools.partial(_ask, request, _limit(sink)), _limit(sink), "webhook")
        except urllib.error.HTTPError as error:
            reason = f"status {error.code}"
            error.close()
            if error.code < 500 and error.code != 429:
                break  # the request is wrong: another attempt cannot succeed
        except stall.NoAnswer:
            reason = f"no complete answer in {sink.timeout}"
        except (http.client.InvalidURL, UnicodeError):
            raise RuntimeError("the address is not a valid URL") from None
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            reason = str(getattr(error, "reason", error))
    raise RuntimeError(f"no answer after {attempt + 1} attempts ({reason})")  # the address may hold a token


def _ask(request: urllib.request.Request, limit: float) -> None:
    """Send the request. `limit` seconds may pass between two bytes of the answer."""
    with OPENER.open(request, timeout=limit):
        pass


def _limit(sink: AlertConfig) -> float:
    """Seconds that a command, or one attempt at a web service, may take from beginning to end."""
    return sink.timeout.seconds


def _longest(sink: AlertConfig) -> float:
    """Seconds after which a sink has answered or failed."""
    return sink.tries * _limit(sink) + BACKOFF * 2**sink.tries + 1


SINKS: dict[str, Callable[[AlertConfig, Run, Mapping[str, object]], None]] = {
    "log": _log,
    "file": _file,
    "command": _command,
    "webhook": _webhook,
}


@contextlib.contextmanager
def _remembered(path: Path, cooldown: float) -> Iterator[dict[str, float]]:
    """The record of sent alarms, under its lock, for changes: two monitors at once must not both send."""
    storage.make_folder(path.parent)
    with open(path.with_name(f".{path.name}.lock"), "a") as file:
        with contextlib.suppress(UserError, OSError):  # a file system without locks: sent twice, at worst
            storage.lock(file, path)
        told = _read(path)
        before = dict(told)
        yield told
        if told != before:
            oldest = time.time() - cooldown
            storage.write_json(path, {place: at for place, at in sorted(told.items()) if at >= oldest})


def _read(path: Path) -> dict[str, float]:
    try:
        return records.read(path, dict[str, float])
    except UserError:
        return {}  # a lost record sends once too often, never too seldom
