"""What the config offers is what the modules that do the work define."""

from __future__ import annotations

import dataclasses
from typing import Any

from engine.config.sections import data
from engine.config.sections.training import AUTO, BLEND, BOOSTERS, MODELS
from engine.data.readers.formats import READERS
from engine.training.kinds import BUILT_IN


def choices(section: Any, name: str) -> list[str]:
    (found,) = [item for item in dataclasses.fields(section) if item.name == name]
    return sorted(found.metadata["choices"])


def test_every_format_of_a_source_has_a_reader() -> None:
    assert choices(data.SourceConfig, "format") == sorted(["auto", *READERS])


def test_every_model_is_one_that_is_built() -> None:
    assert sorted(MODELS) == sorted([AUTO, *BUILT_IN, *BOOSTERS, BLEND])
