"""What the store has seen before is marked by files that check themselves; a damaged mark is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.errors import UserError
from engine.runtime import marks

DIGEST = "a" * 64


def mark(store: Path) -> Path:
    marks.put(store, "places", DIGEST, why="a test")
    return store / "places" / f"{DIGEST}.json"


def test_a_mark_is_found_by_its_digest_alone(tmp_path) -> None:
    mark(tmp_path)
    assert marks.has(tmp_path, "places", DIGEST)
    assert not marks.has(tmp_path, "code", DIGEST) and not marks.has(tmp_path, "places", "b" * 64)


def test_no_byte_of_a_mark_changes_without_a_word_and_the_next_run_writes_it_again(tmp_path) -> None:
    path = mark(tmp_path)
    content = path.read_bytes()
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        # White space between the parts says nothing.
        assert not marks.has(tmp_path, "places", DIGEST) or json.loads(path.read_bytes()) == json.loads(content)
    path.write_bytes(b"{}")
    assert mark(tmp_path).read_bytes() == content


def test_a_mark_under_another_name_is_none(tmp_path) -> None:
    path = mark(tmp_path)
    path.rename(path.with_name(f"{'b' * 64}.json"))
    assert not marks.has(tmp_path, "places", "b" * 64)


def test_marks_of_older_engines_hold(tmp_path) -> None:
    path = mark(tmp_path)
    path.write_text(json.dumps({"format": 1}))
    assert marks.has(tmp_path, "places", DIGEST)
    for content in ({"format": 2}, {"format": 1, "check": DIGEST}, {}):
        path.write_text(json.dumps(content))
        with pytest.raises(UserError):
            marks.check(path)


def test_a_digest_that_climbs_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="must stay inside"):
        marks.has(tmp_path, "places", "../../x")
