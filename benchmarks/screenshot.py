"""Pictures of reports for the README: `python benchmarks/screenshot.py report.html benchmarks/results/report.png`.

Needs a headless Chromium (Debian: `apt-get install chromium`).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")


def main() -> int:
    """Take the picture; the exit code says whether it worked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=1700)
    options = parser.parse_args()
    browser = next((path for path in map(shutil.which, NAMES) if path), None)
    if browser is None:
        sys.stderr.write(f"one of {', '.join(NAMES)} must be installed (Debian: apt-get install chromium)\n")
        return 1
    with tempfile.TemporaryDirectory() as profile:
        words = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
        words += [f"--window-size={options.width},{options.height}", f"--screenshot={options.picture.absolute()}"]
        subprocess.run(
            [browser, *words, options.report.absolute().as_uri()], check=True, timeout=120, capture_output=True
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
