"""Environments for peers whose requirements contradict ours: one folder each, made once and reused.

Evidently needs pandas < 3, so it lives alone; it is timed inside its own process, import not counted.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import venv
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ENVIRONMENTS = HERE.parent / ".venvs"
REQUIREMENTS = {"evidently": ["evidently>=0.7,<0.8", "pandas<3"], "feast": ["feast>=0.60,<1"]}

_making = threading.Lock()  # two threads that ask for one peer would clear what the other installs


def python_of(peer: str) -> Path:
    """The interpreter of the peer's environment, made if it is not complete."""
    with _making:
        return _made(peer)


def _made(peer: str) -> Path:
    folder = ENVIRONMENTS / peer
    python, done = folder / "bin/python", folder / ".complete"
    wanted = json.dumps(REQUIREMENTS[peer])
    if not done.exists() or done.read_text() != wanted:
        print(f"making {folder} (minutes, once)", file=sys.stderr)
        venv.create(folder, clear=True, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *REQUIREMENTS[peer]], check=True)
        done.write_text(wanted)
    return python


def timed(peer: str, code: str, arguments: dict[str, Any]) -> float:
    """Seconds that `code` (which prints them as its last line) takes in the peer's environment; NaN when it cannot be run."""
    try:
        found = subprocess.run(
            [python_of(peer), "-c", code, json.dumps(arguments)],
            capture_output=True,
            text=True,
            check=True,
            timeout=1800,
        )
    except (subprocess.SubprocessError, OSError) as error:
        detail = getattr(error, "stderr", "") or str(error)
        print(f"{peer}: {str(detail).strip().splitlines()[-1:]}", file=sys.stderr)
        return float("nan")
    return float(found.stdout.strip().splitlines()[-1])
