"""Tests of the config compose it anew each time."""

from __future__ import annotations

import pytest

from engine.config import compose


@pytest.fixture(autouse=True)
def composed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra itself, in the place of the suite's memory of what it has composed."""
    monkeypatch.setattr(compose, "_compose_with_hydra", compose._compose_with_hydra.__wrapped__)  # type: ignore[attr-defined]
