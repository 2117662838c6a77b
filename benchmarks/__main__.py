"""python -m benchmarks NAME [--json FILE] [--table FILE] [--scale X] [--threads N] [--only WORK]

Runs benchmarks/NAME.py and prints its table; without NAME lists them.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
HELPERS = {"__init__", "__main__", "harness", "headline", "peers", "screenshot", "shipped_alarm"}


def names() -> dict[str, str]:
    """Benchmark -> its question, the first line of its docstring."""
    files = sorted(p for p in HERE.glob("*.py") if p.stem not in HELPERS and not p.stem.startswith("_"))
    return {p.stem: (ast.get_docstring(ast.parse(p.read_text())) or "").split("\n")[0] for p in files}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Ours against a peer and the machine's limit."
    )
    parser.add_argument("name", nargs="?", help="one of " + ", ".join(names()))
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--table", type=Path, help="replace the benchmark's table in this document")
    parser.add_argument("--scale", type=float, default=1.0, help="multiply the rows (default 1: the figures to print)")
    parser.add_argument("--threads", type=int, default=2, help="threads of ours and of the peer (default 2)")
    parser.add_argument("--repeats", type=int, default=7, help="warm calls a figure is the median of (default 7)")
    parser.add_argument("--only", default="", help="only works whose name contains this")
    options = parser.parse_args(arguments)
    if options.name not in names():
        print("\n".join(f"{name:12} {question}" for name, question in names().items()))
        return 0 if options.name is None else 1
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # for both sides, as the engine has it
    for variable in ("POLARS_MAX_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # read when a peer is imported
        os.environ[variable] = str(options.threads)
    harness = importlib.import_module("benchmarks.harness")
    settings = harness.Settings(options.scale, options.threads, options.repeats, options.only)
    card = harness.machine(options.threads)
    card["copy_bytes_per_second"] = harness.copy_bandwidth(options.threads)
    print(
        f"{card['cpu']}, {options.threads} threads, copy {card['copy_bytes_per_second'] / 1e9:.1f} GB/s",
        file=sys.stderr,
    )
    module = importlib.import_module(f"benchmarks.{options.name}")
    rows = module.run(settings, card["copy_bytes_per_second"])
    card |= getattr(module, "FACTS", {})
    table = getattr(module, "markdown", harness.markdown)(rows)
    print(table)
    whole = options.scale == 1 and not options.only
    target = options.json or (getattr(module, "JSON", None) if whole else None)
    if target:
        harness.write_json(target, options.name, rows, card)
    if options.table:
        harness.update_table(options.table, options.name, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
