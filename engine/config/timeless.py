"""Tables without an event time: what they cannot have, and splits by hash, whose parts are shares of all places of rows."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from engine.config.sections.data import BLOCKS, PLACE
from engine.config.sections.features import FeaturesConfig
from engine.config.units import MICROSECONDS, Moment, Share
from engine.errors import UserError

if TYPE_CHECKING:
    from engine.config.tree import Config

SPACE = BLOCKS * MICROSECONDS["d"]  # places are in [0, SPACE)
WHY = "no column of the data has role event_time"


def features_of(features: FeaturesConfig) -> FeaturesConfig:
    """The features, decided at the place of a row. Raises UserError where they are to be decided at a time."""
    if features.as_of not in (None, PLACE):
        raise UserError(f"features.as_of must be left out, for {WHY}, found `{features.as_of}`")
    return dataclasses.replace(features, as_of=Moment(PLACE))


def check(config: Config) -> None:
    """Raise UserError for what has no meaning without an event time, with the reason."""
    for name, view in config.features.active_views.items():
        looks_back = view.kind == "windows" and "windows look back on the time before a row"
        table = config.data.tables.get(view.table or "")
        if view.kind == "asof" and table is not None and not table.static:
            looks_back = "as-of joins take the latest row before a time"
        if looks_back:
            raise UserError(
                f"features.views.{name} cannot be computed: {looks_back}, and {WHY}. Give the time of each row that role, or "
                "leave the view out"
            )
    split = config.split
    if split.by == "time" and (split.train or split.valid or split.test):
        raise UserError(f"split.by must be hash or column, for {WHY} and periods cannot be cut, found by=time")
    for key, value, instead in (
        ("score.between", config.score.between, "all rows are scored, or those of score.input"),
        ("monitor.window", config.monitor.window, "monitor.run names a scoring run, whose rows are one batch"),
        ("monitor.rule=sudden", config.monitor.rule == "sudden", "a batch is compared with the reference"),
        ("monitor.season=weekday", config.monitor.season == "weekday", "a batch has no weekdays"),
    ):
        if value:
            raise UserError(f"{key} must be left out, for {WHY}: {instead}")


def places_of(bounds: tuple[str, ...], _zone: str = "") -> tuple[int, int]:
    """(from included, to excluded) of a part of split.by=hash, written as shares: ["80%", "90%"]. Raises UserError."""
    try:
        start, stop = (round(Share(bound).fraction * SPACE) for bound in bounds)
    except ValueError:  # a UserError is one: no share, or not two of them
        raise UserError(
            f"a part of split.by=hash must be [from, to], shares of all rows as in [80%, 90%], found {list(bounds)}. With train, "
            "valid and test empty, as in split={by: hash, train: [], valid: [], test: []}, they are 80, 10 and 10 %"
        ) from None
    if start >= stop:
        raise UserError(f"a part must end after it starts, found {list(bounds)}")
    return start, stop
