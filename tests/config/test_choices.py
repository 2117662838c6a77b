"""What the config offers is what the modules that do the work define."""

from __future__ import annotations

import dataclasses
from typing import Any

from engine.config.sections import data
from engine.config.sections.training import ModelConfig
from engine.data import files
from engine.data.readers.formats import READERS, TITLES
from engine.training.model import MODELS


def choices(section: Any, name: str) -> list[str]:
    (found,) = [item for item in dataclasses.fields(section) if item.name == name]
    return sorted(found.metadata["choices"])


def test_every_format_of_a_source_has_a_reader_and_a_title() -> None:
    assert sorted(data.FORMATS) == sorted(["auto", *READERS])
    assert READERS.keys() == TITLES.keys() >= set(files.SUFFIXES.values())


def test_every_model_is_one_that_is_built() -> None:
    assert choices(ModelConfig, "kind") == sorted(MODELS)
