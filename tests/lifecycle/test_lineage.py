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
            workplace, "3score", "score", chain={**chain, "scores": sha("6")}, model=MODEL, inputs=inputs
        ),
        "monitor": make_run(workplace, "4monitor", "monitor", chain={}, model=MODEL),
        "stranger": make_run(workplace, "5stranger", chain={"dataset": sha("9")}, outputs={"model": sha("8")}),
    }
    (found["score"] / "predictions").mkdir()
    (found["score"] / "predictions" / "part-0.parquet").write_bytes(b"scores")
    (found["monitor"] / "drift.json").write_text(json.dumps({"thresholds": {"alpha": 0.01}}))
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


def test_an_alarm_leads_to_its_thresholds_and_model(cli, house) -> None:
    found = traced(cli, house["monitor"] / "drift.json")
    assert ids(found["made_by"]) == ["monitor", "train", "ingest"]
    assert found["made_by"][0]["thresholds"] == {"thresholds": {"alpha": 0.01}}


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
    assert "made by:" in text and "used by: nothing" in text and MODEL[:12] in text and "engine 0.1.0" in text


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
