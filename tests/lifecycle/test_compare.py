"""What differs between runs, and nothing else."""

from __future__ import annotations

import copy
import json
import math
import subprocess

import pytest
from scipy.spatial.distance import jensenshannon

from engine.lifecycle import compare
from engine.runtime import digest
from tests.lifecycle.recorded import ENVIRONMENT, config, make_run, sha

CHAIN = {"inputs": sha("1"), "dataset": sha("2"), "features": sha("3"), "weights": sha("4")}


def compared(cli, *directories) -> dict:
    outcome = cli("compare", *map(str, directories), "--json")
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


def test_one_override_and_the_metrics_and_nothing_spurious(cli, workplace) -> None:
    first = make_run(workplace, "a", chain=CHAIN)
    metrics = {"test/roc_auc": 0.9, "test/roc_auc_low": 0.85, "test/roc_auc_high": 0.95, "train/seconds": 8.0}
    second = make_run(
        workplace, "b", chain={**CHAIN, "weights": sha("5")}, metrics=metrics, config=config(train__lr=0.1)
    )
    found = compared(cli, first, second)
    assert found["config"] == {"train.lr": [0.01, 0.1]}
    assert found["code"] == {} and found["data"] == {} and found["environment"] == [[]]
    assert found["chain"] == {"weights": [sha("4"), sha("5")]}
    assert [row["metric"] for row in found["metrics"]] == ["test/roc_auc"]
    row = found["metrics"][0]
    assert row["values"] == [0.75, 0.9] and row["intervals"] == [[0.7, 0.8], [0.85, 0.95]]
    assert math.isclose(row["difference"][0], 0.15) and row["intervals_overlap"] == [False]
    assert {row["figure"]: row["values"] for row in found["cost"]} == {
        "wall seconds": [10.0, 10.0],
        "train/seconds": [9.0, 8.0],
    }
    text = cli("compare", str(first), str(second)).out
    assert "train.lr" in text and "intervals apart" in text and "data: the same" in text and "code: the same" in text


def test_a_run_and_itself_differ_in_nothing(cli, workplace) -> None:
    first = make_run(workplace, "a", chain=CHAIN)
    found = compared(cli, first, first)
    assert not found["config"] and not found["code"] and not found["data"] and not found["chain"]
    assert found["metrics"][0]["difference"] == [0.0]


def test_where_files_go_is_no_difference_and_an_absent_key_is_one(cli, workplace) -> None:
    first = make_run(workplace, "a")
    second = make_run(workplace, "b", config=config(paths__store="elsewhere", train__epochs=3))
    assert compared(cli, first, second)["config"] == {"train.epochs": [None, 3]}


def test_environment_by_weight(cli, workplace) -> None:
    other = copy.deepcopy(ENVIRONMENT)
    other["packages"]["torch"], other["hardware"]["cpu"] = "2.14", "y"
    found = compared(cli, make_run(workplace, "a"), make_run(workplace, "b", environment=other))
    assert [item["name"] for item in found["environment"][0]] == ["packages.torch", "hardware.cpu"]
    third = copy.deepcopy(ENVIRONMENT)
    third["packages"]["torch"] = "2.15"
    sides = [make_run(workplace, "a2"), make_run(workplace, "b2", environment=other)]
    sides.append(make_run(workplace, "c2", environment=third))
    lines = list(compare.environment_lines(compared(cli, *sides)["environment"]))
    assert lines == [["packages.torch", "2.13", "2.14", "2.15"], ["hardware.cpu", "x", "y", "x"]]


def test_code_differs_by_commit_and_by_what_was_not_committed(cli, workplace) -> None:
    def git(*words: str) -> str:
        command = ["git", "-C", str(workplace), "-c", "user.name=t", "-c", "user.email=t@t", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    (workplace / "engine").mkdir()
    git("init", "-q")
    commits = []
    for value in "12":
        (workplace / "engine" / "x.py").write_text(f"VALUE = {value}\n")
        git("add", "engine")
        git("commit", "-q", "-m", value)
        commits.append(git("rev-parse", "HEAD"))
    codes = [
        {
            "engine_version": "0.1.0",
            "engine_digest": sha(letter),
            "engine_git": {"root": str(workplace), "commit": commit},
        }
        for letter, commit in zip("ab", commits, strict=True)
    ]
    first, second = make_run(workplace, "a", code=codes[0]), make_run(workplace, "b", code=codes[1])
    (second / "engine.patch").write_text("+NOT_COMMITTED = 1\n")
    found = compared(cli, first, second)["code"]
    assert found["commit"] == commits and "engine_version" not in found
    page = workplace / "page.html"
    assert cli("compare", str(first), str(second), "--html", str(page)).code == 0
    assert "+VALUE = 2" in page.read_text()
    lines = found["diff"][0]
    assert "-VALUE = 1" in lines and "+VALUE = 2" in lines and "++NOT_COMMITTED = 1" in lines


def store(folder, letter: str, counts: list[int], columns: dict[str, str]) -> None:
    entry = folder / "store" / "datasets" / "shop" / letter
    entry.mkdir(parents=True)
    listed = [
        {"name": name, "type": kind, "role": "numeric", "known_at": None, "digest": digest.of_json([letter, name])}
        for name, kind in columns.items()
    ]
    totals = {"rows_in": 0, "kept": 0, "quarantined": 0, "refused_files": 0, "files": [], "results": {}}
    manifest = {
        "format": 1,
        "name": "shop",
        "recipe": sha(letter),
        "digest": sha(letter),
        "rows": sum(counts),
        "event_time": "at",
        "ids": ["id"],
        "time_zone": "UTC",
        "columns": listed,
        "parts": [],
        "tables": {},
        "accounting": totals,
        "null_counts": {},
        "spec": {},
    }
    (entry / "manifest.json").write_text(json.dumps(manifest))
    histogram = {"edges": [0.0, 1.0, 2.0], "counts": counts}
    profile = {
        "size": {"nulls": 0, "null_rate": 0.0, "nan": 0, "histogram": histogram},
        "shop": {"nulls": 0, "null_rate": 0.0, "nan": 0, "top": [["a", 3], ["b", 1]]},
    }
    (entry / "profile.json").write_text(
        json.dumps({"rows": sum(counts), "sample_rows": sum(counts), "columns": profile})
    )


def test_data_rows_schema_and_profile_distance(cli, workplace) -> None:
    store(workplace, "1", [5, 5], {"size": "float64", "shop": "string"})
    store(workplace, "2", [9, 3], {"size": "float32", "shop": "string"})
    first = make_run(workplace, "a", chain={"dataset": sha("1")}, inputs={"x.csv": sha("8")})
    second = make_run(workplace, "b", chain={"dataset": sha("2")}, inputs={"x.csv": sha("9")})
    found = compared(cli, first, second)["data"]
    assert found["rows"] == [10, 12] and found["inputs"] == {"x.csv": [sha("8"), sha("9")]}
    assert found["schema"] == {"size": ["float64 numeric", "float32 numeric"]} and found["columns"] == ["shop", "size"]
    assert found["profile_distance"] == [{"size": pytest.approx(jensenshannon([0.5, 0.5], [0.75, 0.25], base=2))}]


def test_profile_distance_on_different_edges_and_its_ends() -> None:
    low, high = {"edges": [0.0, 1.0], "counts": [4]}, {"edges": [1.0, 2.0], "counts": [7]}
    assert compare._distance({"histogram": low}, {"histogram": high}) == 1.0
    assert compare._distance({"histogram": low}, {"histogram": {"edges": [0.0, 0.5, 1.0], "counts": [2, 2]}}) == 0.0
    assert compare._distance({"null_rate": 1.0, "top": [["a", 1]]}, {"null_rate": 0.0, "top": [["a", 1]]}) == 1.0
    assert compare._distance({}, {}) is None


def test_the_page_lays_curves_over_one_another(cli, workplace) -> None:
    first, second = make_run(workplace, "first"), make_run(workplace, "second", config=config(train__lr="<script>"))
    assert cli("compare", str(first), str(second), "--html", "out/page.html").code == 0
    page = (workplace / "out" / "page.html").read_text()
    assert page.count("<svg") == 1 and "train/loss" in page and "first" in page and "second" in page
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page


def test_three_runs_and_too_few(cli, workplace) -> None:
    directories = [
        make_run(workplace, name, config=config(train__lr=lr)) for name, lr in (("a", 1), ("b", 2), ("c", 3))
    ]
    assert compared(cli, *directories)["config"] == {"train.lr": [1, 2, 3]}
    outcome = cli("compare", str(directories[0]))
    assert outcome.code == 1 and "two runs or more, or a sweep, found 1" in outcome.err
