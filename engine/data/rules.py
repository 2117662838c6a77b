"""Rules over several columns of a row, as SQL expressions that must not be false."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import pyarrow as pa

from engine.config.sections.data import RuleConfig
from engine.data import failures, query
from engine.data.columns import Finding


def find(
    table: pa.Table, rules: Mapping[str, RuleConfig], skip: list[Finding], sensitive: Collection[str] = ()
) -> list[Finding]:
    """Rows for which a rule is false (null is not false), without rows that are already quarantined.

    Raises UserError if a rule cannot be computed, without values of the data if columns are `sensitive`.
    """
    if not rules or not table.num_rows:
        return []
    gone = np.zeros(table.num_rows, bool)
    for finding in skip:
        if finding.policy == "quarantine":
            gone[finding.positions] = True
    columns = ", ".join(
        f'(({rule.holds}) IS NOT DISTINCT FROM false) AS "{place}"' for place, rule in enumerate(rules.values())
    )
    with query.connect() as connection, failures.explained("data.rules", sensitive=sensitive):
        connection.register("events", table)
        broken = connection.sql(f"SELECT {columns} FROM events").to_arrow_table()
    findings = []
    for place, (name, rule) in enumerate(rules.items()):
        positions = np.flatnonzero(np.asarray(broken.column(place).combine_chunks()) & ~gone)
        if len(positions):
            hidden: list[str | None] = [None] * len(positions)
            reason = f"breaks the rule {rule.holds}"
            findings.append(
                Finding(name, positions, reason, rule.on_violation, hidden, f"data.rules.{name}.on_violation")
            )
    return findings
