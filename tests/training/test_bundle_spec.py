"""What of the data's config may differ between training and scoring, and what may not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from engine.config import schema
from engine.config.tree import Config
from engine.errors import UserError
from engine.training.bundle_spec import with_spec_of

DATA: dict[str, Any] = {
    "name": "t",
    "sources": {"s": {"path": "a.csv", "columns": {"id": "string", "at": "timestamp"}}},
    "columns": {"id": {"type": "string", "role": "id"}, "at": {"type": "timestamp", "role": "event_time"}},
    "max_quarantine": "2%",
}


def config(**data: Any) -> Config:
    found: Config = schema.build(Config, {"name": "t", "data": data})
    return found


def bundle() -> Any:
    trained = config(**DATA)
    model = {"loss": "squared", "classes": []}
    return SimpleNamespace(data=trained.data, features=trained.features, model=model, code=())


@pytest.mark.parametrize(
    ("key", "value"),
    [("max_quarantine", "100%"), ("min_rows", 1), ("max_rows", 5), ("max_row_change", "5%"), ("freshness", "1d")],
)
@pytest.mark.parametrize("experiment", [True, False])
def test_what_one_ingest_may_lose_is_asked_anew_at_scoring(key: str, value: Any, experiment: bool) -> None:
    asked = config(**({**DATA, key: value} if experiment else {key: value}))
    assert getattr(with_spec_of(asked, bundle()).data, key) == value


def test_a_limit_that_is_not_said_is_that_of_training() -> None:
    assert with_spec_of(config(), bundle()).data.max_quarantine == "2%"


@pytest.mark.parametrize(
    "source",
    [
        {"csv": {"skip": 2, "comment": "#"}},
        {"csv": {"encoding": "cp1252"}},
        {"format": "csv"},
        {"refused": "skip"},
        {"path": "b.csv"},
    ],
)
def test_how_files_are_written_may_differ_at_scoring(source: dict[str, Any]) -> None:
    asked = config(**{**DATA, "sources": {"s": {**DATA["sources"]["s"], **source}}})
    assert with_spec_of(asked, bundle()).data.sources["s"] == asked.data.sources["s"]


@pytest.mark.parametrize("change", [{"time_zone": "Asia/Tokyo"}, {"duplicates": "first"}])
def test_what_a_row_means_may_not(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="scoring uses the model's specification"):
        with_spec_of(config(**{**DATA, **change}), bundle())
