"""Walks over nested dicts and lists."""

from __future__ import annotations

from engine.config import nested

VALUES = {"a": {"b": 1, "c": {}}, "d": [1, {"e": 2}], "f": None}


def test_leaves_are_values_empty_dicts_and_unless_they_are_walked_lists() -> None:
    assert dict(nested.leaves(VALUES)) == {"a.b": 1, "a.c": {}, "d": [1, {"e": 2}], "f": None}
    assert dict(nested.leaves(VALUES, lists=True)) == {"a.b": 1, "a.c": {}, "d.0": 1, "d.1.e": 2, "f": None}
    assert not list(nested.leaves({}))


def test_mapped_changes_values_by_their_paths_and_names_and_leaves_the_original_alone() -> None:
    found = nested.mapped(
        {1: (2, {"a": 3}), "b": {}}, lambda path, value: f"{path}={value}", key=lambda name: f"<{name}>"
    )
    assert found == {"<1>": ["1.0=2", {"<a>": "1.1.a=3"}], "<b>": {}}
    assert nested.mapped(VALUES, lambda _, value: value) == VALUES and nested.mapped(
        3, lambda path, value: (path, value)
    ) == ("", 3)


def test_differences_name_every_value_that_differs_and_entries_of_lists_by_their_name() -> None:
    first = {"a": {"b": 1}, "d": [{"name": "x", "e": 1}], "f": [1], "same": 3}
    second = {"a": {"b": 2}, "d": [{"name": "x", "e": 2}], "f": [1, 2], "same": 3, "new": None, "more": 4}
    whole = [("a.b", 1, 2), ("d", first["d"], second["d"]), ("f", [1], [1, 2]), ("more", None, 4)]
    assert list(nested.differences(first, second)) == whole
    assert list(nested.differences(first, second, lists=True)) == [whole[0], ("d.x.e", 1, 2), *whole[2:]]
