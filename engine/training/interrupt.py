"""Stop requests: SIGTERM (spot instances), the first Ctrl-C, or a file named `stop` in the run directory stops training at
the next step.

The loop then writes a checkpoint and ends. A second Ctrl-C stops at once.
"""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

FILE = "stop"
LOOK_SECONDS = 0.5


class StopFlag:
    """`with StopFlag(directory) as stop: ... stop.requested()`; handlers are set in the main thread only, and
    restored.
    """

    def __init__(self, directory: Path) -> None:
        self._file = directory / FILE
        self._set = False
        self._looked = 0.0
        self._outer: dict[int, Any] = {}

    def __enter__(self) -> StopFlag:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._outer[number] = signal.signal(number, self._catch)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._outer.items():
            signal.signal(number, handler)
        if self._set and kind is None:  # requested after the last check of a step: the request is not lost
            self.clear()
            raise KeyboardInterrupt("stopped after the last step; resume to continue")

    def _catch(self, _number: int, _frame: FrameType | None) -> None:
        if self._set:
            raise KeyboardInterrupt
        self._set = True

    def requested(self) -> bool:
        """Whether to stop; checks for the file twice a second."""
        now = time.monotonic()
        if not self._set and now - self._looked > LOOK_SECONDS:
            self._looked = now
            self._set = self._file.exists()
        return self._set

    def clear(self) -> None:
        """Remove the file, so that a resumed run continues."""
        self._file.unlink(missing_ok=True)
