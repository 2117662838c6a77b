"""Progress of long work: one bar on a terminal, plain lines elsewhere. An observer: it never stops the work."""

from __future__ import annotations

import contextlib
import shutil
import sys
import threading
import time
from collections.abc import Iterable
from types import TracebackType

from kernels import compiling

PLAIN_SECONDS = 10.0
BAR_SECONDS = 0.2
COMPILING = "compiling kernels (once)"


def format_count(value: float) -> str:
    """1234567 -> 1.23 M."""
    for limit, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def format_seconds(seconds: float) -> str:
    """75 -> 1m15s."""
    if seconds < 60:
        return f"{seconds:.1f}s" if seconds < 10 else f"{seconds:.0f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"


class Laps:
    """Seconds of each part of some work; `parts` that are named beforehand count from 0."""

    def __init__(self, parts: Iterable[str] = ()) -> None:
        self.seconds = dict.fromkeys(parts, 0.0)
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        """The time since the last lap belongs to `part`."""
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now


class Progress:
    """`with Progress("ingest", total=n) as progress: progress.advance(1000)`; safe to call from threads.

    Rates and remaining time leave out the compilation of kernels, which happens only once.
    """

    def __init__(self, label: str, total: int | None = None, unit: str = "rows", start: int = 0) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = self._start = start
        self._note = ""
        self._lock = threading.Lock()
        self._terminal = sys.stderr.isatty()
        self._every = BAR_SECONDS if self._terminal else PLAIN_SECONDS

    def __enter__(self) -> Progress:
        self._began = self._shown = time.monotonic()
        self._compiled = compiling.seconds()
        self._told = False
        compiling.listeners.append(self._compiles)
        return self

    def _compiles(self) -> None:
        """Show at once, the first time, that a kernel is being compiled, since nothing else is shown meanwhile."""
        with self._lock:
            if not self._told:
                self._told, self._shown = True, time.monotonic()
                self._show(self._shown)

    def advance(self, count: int, note: str = "") -> None:
        """Add work done; `note` is shown after the figures (a loss, a retry count)."""
        with self._lock:
            self.done += count
            self._note = note or self._note
            now = time.monotonic()
            finished = self.total is not None and self.done >= self.total
            if not finished and now - self._shown >= self._every:
                self._shown = now
                self._show(now)

    def follow(self, start: int, done: int, seconds: float, note: str) -> None:
        """Show the work of another process: `done` so far, from `start` on, in `seconds`."""
        self._start, self._began = start, time.monotonic() - seconds
        changed, self._note = (done, note) != (self.done, self._note), note
        if changed:
            self.advance(done - self.done)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        compiling.listeners.remove(self._compiles)
        self._show(time.monotonic(), last=True, failed=kind is not None)

    @property
    def rate(self) -> float:
        """Work per second so far."""
        return (self.done - self._start) / self._worked(time.monotonic())

    def _worked(self, now: float) -> float:
        """Seconds since the start, without those of compiling kernels."""
        return max(now - self._began - (compiling.seconds() - self._compiled), 1e-9)

    def _show(self, now: float, last: bool = False, failed: bool = False) -> None:
        seconds, worked = now - self._began, self._worked(now)
        rate = (self.done - self._start) / worked
        text = f"{self.label}: {self.done:,}"
        if self.total:
            text += f" of {self.total:,} ({100 * self.done / self.total:.0f}%)"
        text += f" {self.unit}"
        if last or not compiling.active():
            text += f", {format_count(rate)} {self.unit}/s"
        if last:
            text += f", {'stopped after' if failed else 'took'} {format_seconds(seconds)}"
            if seconds - worked >= 1:
                text += f", {format_seconds(seconds - worked)} of it {COMPILING}"
        elif compiling.active():
            text += f", {COMPILING}"
        elif self.total and rate > 0:
            text += f", {format_seconds((self.total - self.done) / rate)} left"
        if self._note:
            text += f"  {self._note}"
        if self._terminal:
            bar = ""
            if self.total:
                filled = int(24 * min(self.done / self.total, 1))
                bar = f"[{'█' * filled}{'·' * (24 - filled)}] "
            # A wrapped line cannot be overwritten.
            line = f"{bar}{text}"[: shutil.get_terminal_size().columns - 1]
            text = f"\r\x1b[2K{line}" + ("\n" if last else "")
        else:
            text += "\n"
        with contextlib.suppress(OSError, ValueError):  # the terminal may be gone; the work continues
            sys.stderr.write(text)
            sys.stderr.flush()
