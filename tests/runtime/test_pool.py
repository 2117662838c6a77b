"""Actors of the pool, called as Ray calls them: what goes wrong becomes a reply, and a try is counted when it begins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.errors import UserError
from engine.runtime.pool import Work, _Actor

ROW = {"item": json.dumps({"n": 1})}


def test_an_actor_that_cannot_start_says_what_is_to_be_mended(tmp_path: Path) -> None:
    def make() -> Work:
        raise UserError("the store must be there, found nothing")

    reply = _Actor(make, 3, str(tmp_path))(ROW)
    assert reply["hopeless"] and reply["cause"] == "the store must be there, found nothing"
    assert not list(tmp_path.iterdir()), "no item has lost a try"


def test_an_item_that_raises_has_all_its_tries_and_one_that_waited_at_a_dead_actor_has_lost_none(
    tmp_path: Path,
) -> None:
    began: list[Any] = []

    def make(error: type[BaseException]) -> Work:
        def work(item: dict[str, Any]) -> dict[str, Any]:
            began.append(item["n"])
            raise error("a\nvalue")

        return work

    with pytest.raises(SystemExit):  # the actor dies at its first item; another one waits
        _Actor(lambda: make(SystemExit), 3, str(tmp_path))(ROW)
    second = _Actor(lambda: make(ValueError), 3, str(tmp_path))
    assert second(ROW)["tries"] == 3 and began == [1, 1, 1]
    reply = second({"item": json.dumps({"n": 2})})
    assert began == [1, 1, 1, 2, 2, 2] and reply["cause"] == "ValueError: a value" and not reply["hopeless"]
