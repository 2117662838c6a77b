"""A small experiment without any time, for end-to-end tests: loans of customers, cut by a hash.

`write_loans(folder)` writes the source file and a config folder; `overrides(folder)` are the words of a command line.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv

DATA = """
name: loans
sources:
  loans:
    path: loans*.csv
    columns: {loan: int64, customer: string, country: string, amount: float64, income: float64, part: string, bad: bool}
columns:
  loan: {type: int64, role: id}
  customer: {type: string, role: entity, known_at: prior}
  country: {type: string, role: categorical, known_at: prior}
  amount: {type: float64, role: numeric, known_at: prior, min: 0}
  income: {type: float64, role: numeric, known_at: prior}
  part: {type: string}
  bad: {type: bool, role: target}
group: customer
"""
FEATURES = """
direct: {country: true, amount: true, income: true}
"""
EXPERIMENT = """# @package _global_
defaults:
  - /data: loans
  - /features: loans
  - _self_
name: loans
split: {by: hash}
model: {hidden: [16, 16], dropout: 0}
train: {epochs: 3, batch_size: 64, precision: fp32, lr: 0.01}
evaluate: {slices: [country], bootstrap: 20}
"""


def loans(rows: int = 1200, seed: int = 0, first: int = 0, shift: float = 0.0) -> pa.Table:
    """`rows` loans from number `first` on in random order; `shift` moves incomes, in standard deviations."""
    rng = np.random.default_rng(seed)
    customer = rng.integers(0, rows // 3, rows)
    country = rng.choice(["DE", "FR", "US"], rows)
    income = rng.normal(shift, 1, rows)
    amount = np.round(np.exp(rng.normal(0, 1, rows)), 2)
    bad = rng.random(rows) < 1 / (1 + np.exp(1.5 * income - 0.6 * amount + (country == "DE")))
    part = np.array(["train", "valid", "test"])[np.minimum(customer % 10, 9) // 4]
    return pa.table(
        {
            "loan": first + rng.permutation(rows),
            "customer": pa.array([None if number % 71 == 0 else f"c{number}" for number in customer]),
            "country": country,
            "amount": amount,
            "income": pa.array(income, mask=np.arange(rows) % 41 == 3),
            "part": part,
            "bad": pa.array(bad, mask=np.arange(rows) % 50 == 7),
        }
    )


def write(folder: Path, name: str, rows: pa.Table) -> Path:
    """Write rows as a CSV file; null is empty."""
    path = folder / name
    pyarrow.csv.write_csv(rows, path)
    return path


def write_loans(folder: Path, rows: int = 1200) -> Path:
    """Write `loans.csv` and `conf/` below `folder`; returns `folder`."""
    for name, text in (("data", DATA), ("features", FEATURES), ("experiment", EXPERIMENT)):
        (folder / "conf" / name).mkdir(parents=True, exist_ok=True)
        (folder / "conf" / name / "loans.yaml").write_text(text)
    write(folder, "loans.csv", loans(rows))
    return folder


def overrides(folder: Path, *more: str) -> list[str]:
    """Words after the command; pass `--config-dir` yourself: `str(folder / "conf")`."""
    return [
        "+experiment=loans",
        f"data.path={folder}",
        f"paths.store={folder / 'store'}",
        f"paths.runs={folder / 'runs'}",
        "resources.threads=2",
        *more,
    ]
