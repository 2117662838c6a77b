"""The three files of a draft as text: short YAML, with each guess explained beside the line."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator
from typing import Any

import yaml

from engine.config import units
from engine.config.sections.data import CsvOptions, SourceColumn
from engine.draft.plan import FEATURES, ColumnDraft, Draft

WIDTH = 124


def scalar(value: Any) -> str:
    """One value in YAML, on one line."""
    return (
        yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6).removesuffix("\n...\n").strip()
    )


def _flow(values: dict[str, Any]) -> str:
    return "{" + ", ".join(f"{name}: {scalar(value)}" for name, value in values.items()) + "}"


def _said(line: str, comment: str) -> str:
    return f"{line}  # {comment}" if comment else line


def _block(text: str) -> Iterator[str]:
    yield from (f"# {line}" for line in textwrap.wrap(text, WIDTH - 2, break_long_words=False))


def data_yaml(draft: Draft) -> str:
    """`data/<name>.yaml`."""
    return "\n".join(_data(draft)) + "\n"


def _data(draft: Draft) -> Iterator[str]:
    source = draft.source
    yield from _block(f"Drafted from {source.config.path} ({draft.rows:,} rows). Read it, and change what is not so.")
    for question in draft.questions:
        yield from _block(f"Question: {question}.")
    yield f"name: {scalar(draft.name)}"
    yield f"time_zone: {scalar(draft.zone)}"
    yield ""
    yield "sources:"
    yield from (f"  # {note}" for note in source.notes[1:])
    yield f"  {scalar(source.name)}:"
    yield f"    path: {scalar(source.config.path)}"
    if source.config.format != "auto":
        yield f"    format: {source.config.format}"
    if source.config.hive:
        yield "    hive: true"
    changed = _changed(source.config.csv)
    if changed:
        yield f"    csv: {_flow(changed)}"
    if source.left_out:
        yield "    unexpected: ignore"
        yield from (f"    # {name} {reason}" for name, reason in source.left_out.items())
    yield "    columns:"
    for name, column in source.config.columns.items():
        guess = draft.guesses.get(name)
        yield _said(f"      {scalar(name)}: {_source_column(column)}", guess.note if guess else "")
    yield ""
    if draft.query:
        yield "query: |"
        yield from (f"  {line}" for line in draft.query)
        yield ""
    yield "columns:"
    said = f"{draft.time} is the event time" if draft.time else "Rows have no event time"
    yield from _block_in(f"{said}: {draft.time_why}.")
    yield from _block_in(f"Identity: {draft.ids_why}.")
    yield from _block_in(f"{draft.target} is the target: {draft.target_why}.")
    for name, drafted in draft.columns.items():
        yield _said(f"  {scalar(name)}: {_event_column(drafted)}", _reason(draft, name, drafted))
    yield ""
    yield from _block(
        "A value that is not of its type or breaks a rule is kept aside and counted; ingest stops where that happens to "
        "more than this share of rows."
    )
    yield "max_quarantine: 1%"
    if draft.group:
        yield f"group: {scalar(draft.group)}  # its rows are never divided among training, validation and test"
    if draft.duplicates and draft.time:
        yield "duplicates: first  # rows with the id of an earlier row are left out, and counted"


def _block_in(text: str) -> Iterator[str]:
    yield from (f"  {line}" for line in _block(text))


def _changed(csv: CsvOptions) -> dict[str, Any]:
    usual = CsvOptions()
    found = {
        field.name: getattr(csv, field.name)
        for field in dataclasses.fields(csv)
        if getattr(csv, field.name) != getattr(usual, field.name)
    }
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def _source_column(column: SourceColumn) -> str:
    usual = SourceColumn(type=column.type)
    extra = {
        field.name: getattr(column, field.name)
        for field in dataclasses.fields(column)
        if getattr(column, field.name) != getattr(usual, field.name)
    }
    return _flow({"type": column.type, **extra}) if extra else scalar(column.type)


def _event_column(column: ColumnDraft) -> str:
    more: dict[str, Any] = {"id": True} if column.id and column.role != "id" else {}
    more |= {"width": column.width} if column.width else {}
    more |= {"known_at": column.known_at} if column.known_at else {}
    return _flow({"type": column.type, "role": column.role, **more})


def _reason(draft: Draft, name: str, column: ColumnDraft) -> str:
    parts = [column.comment] if column.comment else []
    if name in draft.left_out:
        parts.append(
            f"left out: {draft.left_out[name]}" if column.role in ("ignore", "time") else "left out: see the features"
        )
    return "; ".join(parts)


def features_yaml(draft: Draft) -> str:
    """`features/<name>.yaml`."""
    return "\n".join(_features(draft)) + "\n"


def _features(draft: Draft) -> Iterator[str]:
    yield "# What is known of a row at its event time." if draft.time else "# What is known of a row when it is scored."
    if draft.time:
        yield f"as_of: {scalar(units.named(draft.time))}"
        yield ""
    if draft.direct:
        yield "direct:"
        yield from (f"  {scalar(name)}: true" for name in draft.direct)
    doubts = {name: reason for name, reason in draft.left_out.items() if draft.columns[name].role in FEATURES}
    if doubts:
        yield from _block(
            f"Left out, because they may not be known yet at {'the event time' if draft.time else 'that time'}. To let one in, "
            f"set its known_at in the data file to {draft.time or 'prior'}, and take the # away:"
        )
        if not draft.direct:
            yield "# direct:"
        yield from (f"#  {scalar(name)}: true  # {reason}" for name, reason in doubts.items())
    if not draft.time:
        return
    yield ""
    yield "calendar:"
    yield "  event:"
    yield f"    column: {scalar(draft.time)}"
    yield "    parts: [hour, weekday]" if draft.calendar else "    parts: [weekday, month]"
    if not draft.views:
        return
    yield ""
    yield from _block("Histories: what became known of an entity in trailing windows, by the gaps between its rows.")
    yield "views:"
    for view in draft.views:
        yield f"  {scalar(view.entity)}:"
        yield f"    entity: [{scalar(view.entity)}]"
        yield "    by: known"
        yield f"    windows: [{', '.join(view.windows)}]"
        yield "    aggregates:"
        yield from (f"      {scalar(name)}: [{', '.join(asked)}]" for name, asked in view.aggregates.items())


def _split(draft: Draft) -> list[str]:
    if not draft.time:
        of = draft.group or "the identity"
        return [
            f"# Of a hash of {of}, the last tenth is for the test, the tenth before for validation. A row's part never changes.",
            "split: {by: hash}",
        ]
    return [
        "# The last tenth of the rows is for the test, the tenth before for validation.",
        "split:",
        *(f'  {name}: ["{first}", "{last}"]' for name, (first, last) in draft.split.items()),
    ]


def experiment_yaml(draft: Draft) -> str:
    """`experiment/<name>.yaml`."""
    lines = [
        "# @package _global_",
        "defaults:",
        f"  - /data: {draft.name}",
        f"  - /features: {draft.name}",
        "  - _self_",
        "",
        f"name: {scalar(draft.name)}",
        "",
        *_split(draft),
        "",
        "train:",
        f"  loss: {draft.loss}",
    ]
    return "\n".join(lines) + "\n"
