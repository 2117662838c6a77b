"""A run directory of which any file is damaged: a sentence or a warning from every command that reads it, never a traceback."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine import __main__ as shell
from engine.config import compose
from engine.runtime.run import RunRecord
from tests.lifecycle.recorded import make_run, sha
from tests.runtime.test_records import json_values

COMMANDS = (
    ["runs"],
    ["ui"],
    ["compare", "RUN", "OTHER"],
    ["lineage", "RUN"],
    ["reproduce", "RUN"],
    ["registry", "list"],
)
FILES = ("run.json", "metrics.json", "metrics.jsonl")


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place of a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in places(item, (*path, key)))]


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """The value with another one at the place."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = put(copy[path[0]], path[1:], new)
    return copy


@pytest.fixture
def composed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands with the same words get the same config: composing it took most of the time of hundreds of commands."""
    compose_anew, kept = compose.compose, dict[tuple[str, ...], compose.Composed]()

    def composed(words: list[str], config_dir: str | None) -> compose.Composed:
        assert config_dir is None
        if tuple(words) not in kept:
            kept[tuple(words)] = compose_anew(words)
        return kept[tuple(words)]

    monkeypatch.setattr(compose, "compose", composed)


@settings(max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_at_any_place_of_a_record_is_survived(workplace, capsys, composed_once, data) -> None:
    folder = workplace / "again"
    shutil.rmtree(folder, ignore_errors=True)
    chain = {"dataset": sha("a"), "weights": sha("b")}
    run = make_run(folder, "20260101T000000-aaaaaa", chain=chain, resumes=[{"engine_digest": sha("c"), "started": "x"}])
    make_run(folder, "20260101T000001-bbbbbb", chain={"dataset": sha("c")})
    file = run / data.draw(st.sampled_from(FILES), "file")
    if file.suffix == ".json":
        record = json.loads(file.read_text())
        place = data.draw(st.sampled_from(places(record)), "place")
        file.write_text(json.dumps(put(record, place, data.draw(json_values, "value"))))
    else:
        file.write_text(data.draw(st.text(max_size=60), "text"))
    words = data.draw(st.sampled_from(COMMANDS), "command")
    named = {"RUN": str(run), "OTHER": str(run.with_name("20260101T000001-bbbbbb"))}
    words = [named.get(word, word) for word in words]
    code = shell.main([*words, f"paths.runs={folder / 'runs'}", f"paths.store={folder / 'store'}"])
    shown = capsys.readouterr()
    assert code in (0, 1) and "Traceback" not in shown.err, shown.err


@pytest.mark.parametrize("text", ["[]", "", "{", "null", '{"format": 99}', "[" * 100_000])
def test_a_foreign_or_torn_record_stops_nobody_elses_command(cli, step, workplace, text) -> None:
    whole = make_run(workplace, "20260101T000000-aaaaaa")
    torn = make_run(workplace, "20260101T000001-bbbbbb")
    (torn / "run.json").write_text(text)
    (workplace / "runs/train/unnamed/29990101T000000-zzzzzz").mkdir(parents=True)
    (workplace / "runs/train/unnamed/29990101T000000-zzzzzz/run.json").write_text(text)
    listed = cli("runs")
    assert listed.code == 0 and whole.name in listed.out and torn.name not in listed.out
    assert f"skipped: {torn.relative_to(workplace)}" in listed.err or str(torn) in listed.err
    step(lambda config, run: {"test/roc_auc": 0.5})
    assert cli("train").code == 0
    named = cli("lineage", str(torn))
    assert named.code == 1 and "run.json" in named.err and "Traceback" not in named.err


def test_every_field_of_the_shape_is_what_a_run_writes(cli, step) -> None:
    step(lambda config, run: {"test/roc_auc": 0.5})
    record = json.loads((cli("train").directory / "run.json").read_text())
    assert set(record) <= set(RunRecord.__annotations__)
