"""What made a thing and what was made of it, from digests in run directories."""

from __future__ import annotations

import json

import pytest

from tests.lifecycle.recorded import make_run, sha

DATASET, FEATURES, MODEL, OTHER = sha("d"), sha("f"), sha("a"), sha("b")


@pytest.fixture
def house(workplace):
    """ingest -> train (two) -> score -> monitor, and a run that has nothing to do with them."""
    raw = workplace / "raw.csv"
    raw.write_text("a\n1\n")
    chain = {"inputs": sha("1"), "dataset": DATASET}
    trained = {**chain, "features": FEATURES}
    inputs = {str(raw): __import__("hashlib").sha256(raw.read_bytes()).hexdigest()}
    found = {
        "ingest": make_run(workplace, "0ingest", "ingest", chain=chain, inputs=inputs, outputs={"dataset": DATASET}),
        "train": make_run(
            workplace, "1train", chain={**trained, "weights": sha("4")}, inputs=inputs, outputs={"model": MODEL}
        ),
        "second": make_run(
            workplace, "2second", chain={**trained, "weights": sha("5")}, inputs=inputs, outputs={"model": OTHER}
        ),
        "score": make_run(
            workplace,
            "3score",
            "score",
            chain={**chain, "scores": sha("6")},
            model=MODEL,
            inputs=inputs,
            outputs={"profile": sha("2")},
        ),
        "monitor": make_run(
            workplace,
            "4monitor",
            "monitor",
            chain={},
            model=MODEL,
            used={"scoring profile": sha("2")},
            outputs={"drift": sha("3")},
            alarms=["drift: drift in 1 of 3 columns"],
        ),
        "stranger": make_run(workplace, "5stranger", chain={"dataset": sha("9")}, outputs={"model": sha("8")}),
    }
    (found["score"] / "predictions").mkdir()
    (found["score"] / "predictions" / "part-0.parquet").write_bytes(b"scores")
    calibration = {"lines": {"values": 1.5}, "alpha": 0.01, "floors": {"psi": 0.1}, "window_scores": [1, 2]}
    (found["monitor"] / "drift.json").write_text(json.dumps({"calibration": calibration}))
    return found


def traced(cli, reference) -> dict:
    outcome = cli("lineage", str(reference), "--json")
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


def ids(entries: list[dict]) -> list[str]:
    return [entry["run"].rsplit("/", 1)[1][1:] for entry in entries]


def test_a_scored_part_leads_to_model_data_and_code(cli, house) -> None:
    found = traced(cli, house["score"] / "predictions" / "part-0.parquet")
    assert found["is"] == "predictions/part-0.parquet of a score run"
    assert ids(found["made_by"]) == ["score", "train", "ingest"]
    score, train, ingest = found["made_by"]
    assert score["model"] == MODEL and train["outputs"] == {"model": MODEL}
    assert train["chain"]["weights"] == sha("4") and train["chain"]["features"] == FEATURES
    assert ingest["inputs"] and all(entry["code"]["engine_digest"] == sha("e") for entry in found["made_by"])


def test_an_alarm_leads_to_thresholds_scores_weights_features_data_and_code(cli, house) -> None:
    found = traced(cli, house["monitor"] / "drift.json")
    assert sorted(ids(found["made_by"])) == ["ingest", "monitor", "score", "train"]
    alarm = found["made_by"][0]
    assert alarm["thresholds"] == {"lines": {"values": 1.5}, "alpha": 0.01, "floors": {"psi": 0.1}}
    assert alarm["alarms"] == ["drift: drift in 1 of 3 columns"]
    assert alarm["used"] == {"scoring profile": sha("2"), "model": MODEL}
    train = next(entry for entry in found["made_by"] if entry["command"] == "train")
    assert train["chain"]["weights"] == sha("4") and train["chain"]["features"] == FEATURES
    text = cli("lineage", str(house["monitor"])).out
    assert (
        "alarm     drift: drift in 1 of 3" in text
        and 'threshold lines = {"values": 1.5}' in text
        and "scoring profile" in text
    )


def test_an_alarm_leads_on_to_the_decision_and_the_challenger_that_came_of_it(cli, house, workplace) -> None:
    decision = make_run(
        workplace, "6retrain", "retrain", champion=MODEL, challenger=sha("c"), used={"drift": sha("3")},
        outputs={"decision": sha("0")},
    )  # fmt: skip
    gate = {"min_gain": 0.0}
    (decision / "decision.json").write_text(json.dumps({"policy": {"triggers": ["drift"], "gate": gate, "now": None}}))
    make_run(workplace, "7challenger", outputs={"model": sha("c")}, started_from=MODEL, parent=str(decision))
    down = traced(cli, house["monitor"])["used_by"]
    assert ids(down) == ["retrain", "challenger"]
    assert down[0]["thresholds"] == {"triggers": ["drift"], "gate": gate}
    up = ids(traced(cli, sha("c"))["made_by"])
    assert up[0] == "challenger" and {"retrain", "monitor", "score", "train", "ingest"} <= set(up)


def test_what_a_backtest_trained_and_watched_in_the_store_is_known(cli, house, workplace) -> None:
    backtest = make_run(workplace, "6backtest", "backtest", chain={"dataset": DATASET}, outputs={"backtest": sha("0")})
    inside = workplace / "store" / "backtest"
    for name, command in (("7trained", "train"), ("8watched", "monitor")):
        made = make_run(workplace, name, command, parent=str(backtest), outputs={"model": sha("c")})
        (inside / command / "shop").mkdir(parents=True)
        made.rename(inside / command / "shop" / name)
    assert sorted(ids(traced(cli, backtest)["used_by"])) == ["trained", "watched"]
    assert ids(traced(cli, sha("c")[:10])["made_by"]) == ["trained", "backtest", "ingest"]


def test_a_model_knows_what_was_made_of_it(cli, house) -> None:
    for reference in (MODEL, MODEL[:12]):
        found = traced(cli, reference)
        assert ids(found["made_by"]) == ["train", "ingest"]
        assert sorted(ids(found["used_by"])) == ["monitor", "score"]
    # The second training found the features in the store that the first one had computed.
    assert sorted(ids(traced(cli, house["train"])["used_by"])) == ["monitor", "score", "second"]


def test_a_dataset_and_a_raw_file_lead_down_to_all_that_used_them(cli, house, workplace) -> None:
    found = traced(cli, DATASET)
    assert ids(found["made_by"]) == ["ingest"]
    assert sorted(ids(found["used_by"])) == ["monitor", "score", "second", "train"]
    found = traced(cli, workplace / "raw.csv")
    assert found["is"] == "file" and not found["made_by"]
    assert "stranger" not in ids(found["used_by"]) and {"ingest", "train", "score"} <= set(ids(found["used_by"]))


def test_an_entry_of_the_store_is_known_by_its_manifest(cli, house, workplace) -> None:
    entry = workplace / "store" / "datasets" / "shop" / "x"
    entry.mkdir(parents=True)
    (entry / "manifest.json").write_text(json.dumps({"digest": DATASET}))
    (entry / "part.parquet").write_bytes(b"")
    for path in (entry, entry / "part.parquet"):
        assert ids(traced(cli, path)["made_by"]) == ["ingest"]


def test_for_a_person(cli, house) -> None:
    text = cli("lineage", str(house["score"])).out
    assert "made by:" in text and MODEL[:12] in text and "engine 0.1.0" in text
    assert "used by: nothing" in cli("lineage", str(house["monitor"])).out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((sha("7"),), "no run took or made anything with digest"),
        (("nothing",), "lineage takes a path that exists or at least 8 letters of a hex digest, found 'nothing'"),
        ((), "lineage takes one path or digest, found nothing"),
    ],
)
def test_mistakes_are_named(cli, house, words, message) -> None:
    outcome = cli("lineage", *words)
    assert outcome.code == 1 and message in outcome.err
