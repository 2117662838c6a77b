"""Alerts reach their sink, once a cause and cool-down, and never stop the run."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import http.server
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

from engine.config.sections.monitoring import AlertConfig, MonitorConfig
from engine.config.sections.runtime import PathsConfig
from engine.config.tree import Config
from engine.config.units import Span
from engine.monitoring import alerts
from engine.runtime.run import Run

PAYLOAD = {"model": "m", "headline": "drift in x", "verdict": "alarm"}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    config = Config(name="watched", paths=PathsConfig(runs=str(tmp_path / "runs")))
    return Run.create("monitor", config, {})


class Service(http.server.BaseHTTPRequestHandler):
    """Answers with the statuses in `answers`, one a request; keeps what it was sent."""

    answers: list[int]
    received: list[dict]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.received.append(json.loads(body))
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        self.send_response(self.answers.pop(0) if self.answers else 200)
        self.send_header("Location", "/elsewhere")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(alerts, "BACKOFF", 0.01)
    kind = type("OneService", (Service,), {"answers": [], "received": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    kind.url = f"http://127.0.0.1:{server.server_port}/hook"
    yield kind
    server.shutdown()
    thread.join()
    server.server_close()


def settings(cooldown: str = "1d", **sinks: AlertConfig) -> MonitorConfig:
    return MonitorConfig(alerts=sinks, cooldown=Span(cooldown))


def test_a_webhook_gets_the_alarm_as_json_and_is_tried_again(run, service) -> None:
    service.answers[:] = [503, 500]
    told = alerts.tell(settings(page=AlertConfig(kind="webhook", to=service.url)), run, "drift:x", PAYLOAD)
    assert told == {"page": "sent"}
    assert service.received == [PAYLOAD] * 3


def test_a_refused_webhook_is_not_repeated_and_a_dead_one_does_not_stop_the_run(run, service) -> None:
    service.answers[:] = [404]
    sinks = {
        "refused": AlertConfig(kind="webhook", to=service.url),
        "dead": AlertConfig(kind="webhook", to="http://127.0.0.1:1/?token=SECRET", timeout=Span("1s"), tries=2),
        "local": AlertConfig(kind="webhook", to="file:///etc/passwd"),
    }
    told = alerts.tell(settings(**sinks), run, "drift:x", PAYLOAD)
    assert len(service.received) == 1
    assert "status 404" in told["refused"]
    assert "2 attempts" in told["dead"] and "SECRET" not in told["dead"]
    assert "http or https" in told["local"]


def test_a_redirect_is_no_answer_since_it_would_lose_the_alarm(run, service) -> None:
    service.answers[:] = [302]
    told = alerts.tell(settings(page=AlertConfig(kind="webhook", to=service.url)), run, "drift:x", PAYLOAD)
    assert "status 302" in told["page"]


@pytest.mark.parametrize("address", ["http://127.0.0.1:1/a b/SECRET", "http://127.0.0.1:SECRET/"])
def test_a_broken_address_is_said_without_a_part_of_it(run, address: str) -> None:
    told = alerts.tell(settings(page=AlertConfig(kind="webhook", to=address)), run, "drift:x", PAYLOAD)
    assert told["page"].startswith("failed") and "SECRET" not in told["page"]
    assert "SECRET" not in (run.directory / "run.log").read_text()


def test_a_clock_that_was_set_back_does_not_silence_an_alarm(run, monkeypatch) -> None:
    sink = settings(log=AlertConfig(kind="log"))
    assert alerts.tell(sink, run, "drift:x", PAYLOAD) == {"log": "sent"}
    now = alerts.time.time()
    monkeypatch.setattr(alerts.time, "time", lambda: now - 10 * 86_400)
    assert alerts.tell(sink, run, "drift:x", PAYLOAD) == {"log": "sent"}


def test_the_same_cause_is_told_once_within_the_cool_down(run, tmp_path: Path) -> None:
    sink = {"file": AlertConfig(kind="file", to=str(tmp_path / "deep" / "alerts.jsonl"))}

    def lines() -> int:
        return len((tmp_path / "deep" / "alerts.jsonl").read_text().splitlines())

    assert alerts.tell(settings(**sink), run, "drift:x", PAYLOAD)["file"] == "sent"
    assert "not sent again" in alerts.tell(settings(**sink), run, "drift:x", PAYLOAD)["file"]
    assert lines() == 1
    assert alerts.tell(settings(**sink), run, "drift:y", PAYLOAD)["file"] == "sent"
    assert alerts.tell(settings(**sink), run, "drift:x", {**PAYLOAD, "model": "other"})["file"] == "sent"
    assert alerts.tell(settings(cooldown="0s", **sink), run, "drift:x", PAYLOAD)["file"] == "sent"
    assert lines() == 4


def test_a_file_system_without_locks_does_not_stop_the_run(run, tmp_path: Path, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert alerts.tell(settings(log=AlertConfig(kind="log")), run, "drift:x", PAYLOAD) == {"log": "sent"}


def test_a_sink_that_failed_is_told_next_time(run, tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where a folder should be")
    sink = {"file": AlertConfig(kind="file", to=str(blocked / "alerts.jsonl"))}
    assert alerts.tell(settings(**sink), run, "drift:x", PAYLOAD)["file"].startswith("failed")
    blocked.unlink()
    assert alerts.tell(settings(**sink), run, "drift:x", PAYLOAD)["file"] == "sent"


def test_a_command_gets_the_record_and_its_failure_and_its_hanging_are_said(run, tmp_path: Path) -> None:
    script = tmp_path / "hook.py"
    script.write_text(f"import sys\nopen({str(tmp_path / 'got')!r}, 'w').write(sys.argv[1] + sys.stdin.read())\n")
    sinks = {
        "good": AlertConfig(kind="command", to=f"{sys.executable} {script}"),
        "bad": AlertConfig(kind="command", to=f"{sys.executable} -c 'raise SystemExit(3)'"),
        "slow": AlertConfig(
            kind="command", to=f"{sys.executable} -c 'import time; time.sleep(30)'", timeout=Span("500ms")
        ),
        "none": AlertConfig(kind="command", to="/no/such/program"),
        "log": AlertConfig(kind="log"),
    }
    told = alerts.tell(settings(**sinks), run, "drift:x", PAYLOAD)
    assert told["good"] == "sent" and told["log"] == "sent"
    assert (tmp_path / "got").read_text() == f"{run.path('drift.json')}{json.dumps(PAYLOAD)}"
    assert "ended with 3" in told["bad"]
    assert "took longer than 500ms" in told["slow"] and "sleep" not in told["slow"]
    assert told["none"].startswith("failed")
    assert "alert: drift in x" in (run.directory / "run.log").read_text()


def test_the_log_says_which_command_an_alarm_starts_without_its_secrets(tmp_path) -> None:
    config = Config(name="watched", paths=PathsConfig(runs=str(tmp_path / "runs")))
    run = Run.create("monitor", config, {}, hidden=("hunter2",))
    sinks = {
        "page": AlertConfig(kind="command", to="/bin/page --key hunter2"),
        "log": AlertConfig(kind="log"),
        "hook": AlertConfig(kind="webhook", to="http://127.0.0.1:1/hook"),
    }
    alerts.announce(MonitorConfig(alerts=sinks), run)
    told = (run.directory / "run.log").read_text()
    assert "an alarm starts the command of monitor.alerts.page in your config: /bin/page --key ***" in told
    assert "hunter2" not in told and "hook" not in told


def test_a_service_that_drips_is_left_at_the_deadline_and_the_memory_is_free_meanwhile(run, tmp_path) -> None:
    listener, ended = socket.create_server(("127.0.0.1", 0)), threading.Event()

    def drip() -> None:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            while not ended.wait(0.1):
                connection.sendall(b"H")

    thread = threading.Thread(target=drip)
    thread.start()
    sinks = {
        "page": AlertConfig(
            kind="webhook", to=f"http://127.0.0.1:{listener.getsockname()[1]}/", timeout=Span("1s"), tries=1
        )
    }
    told: list[dict[str, str]] = []
    first = threading.Thread(target=lambda: told.append(alerts.tell(settings(**sinks), run, "drift:x", PAYLOAD)))
    began = time.monotonic()
    first.start()
    time.sleep(0.3)
    other = {"page": sinks["page"], "log": AlertConfig(kind="log")}
    assert alerts.tell(settings(**other), run, "drift:x", PAYLOAD) == {
        "page": "not sent again: another monitor is sending the same cause at this moment",
        "log": "sent",
    }
    assert time.monotonic() - began < 0.9
    first.join()
    assert time.monotonic() - began < 3
    ended.set()
    thread.join()
    listener.close()
    assert told == [{"page": "failed: RuntimeError: no answer after 1 attempts (no complete answer in 1s)"}]
    assert ":sending" not in (run.directory.parent / alerts.MEMORY).read_text()


def test_what_a_command_has_started_ends_with_it_at_the_deadline(run, tmp_path: Path) -> None:
    script, child = tmp_path / "hook.sh", tmp_path / "child"
    script.write_text(f"sleep 60 & echo $! > {child}; wait\n")
    sinks = {"slow": AlertConfig(kind="command", to=f"sh {script}", timeout=Span("1s"))}
    assert "took longer than 1s" in alerts.tell(settings(**sinks), run, "drift:x", PAYLOAD)["slow"]
    end = time.monotonic() + 5
    while time.monotonic() < end:
        with contextlib.suppress(FileNotFoundError, IndexError):
            if Path(f"/proc/{child.read_text().strip()}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                time.sleep(0.05)
                continue
        return
    os.kill(int(child.read_text()), 9)
    raise AssertionError("the child outlived its deadline")
