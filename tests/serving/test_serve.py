"""The endpoint: the bits of batch scoring, whoever asks and however; errors name the field; the log finds skew."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import engine
from engine.__main__ import main
from engine.config.compose import compose
from engine.config.sections.data import Column
from engine.config.sections.serving import ServeConfig
from engine.config.tree import Config
from engine.config.units import Moment, Size, Span
from engine.data.dataset import Dataset, newest_dataset
from engine.errors import UserError
from engine.runtime.run import Run, load_record
from engine.scoring.predictor import Predictor, predictor_of
from engine.scoring.read import predictions
from engine.serving import skew
from engine.serving.online import Online
from engine.serving.openapi import _schema
from engine.serving.past import Past, Rows
from engine.serving.request import ARROW
from engine.serving.served import Log
from engine.serving.server import Server, token_of
from engine.serving.skew import differs, skew_of
from engine.training.bundle import read_bundle
from tests.serving.asking import Client, listening
from tests.tiny import overrides, write_tiny

ROOT = Path(__file__).resolve().parents[2]
FIELDS = ("visit", "at", "shop", "size")


@dataclasses.dataclass(frozen=True)
class Shop:
    """A trained model, its dataset, and the scores of all rows by batch scoring."""

    folder: Path
    model: Path
    predictor: Predictor
    dataset: Dataset
    rows: list[dict[str, Any]]
    scores: dict[str, np.float32]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    folder = write_tiny(tmp_path_factory.mktemp("serve"), 1500)
    conf = str(folder / "conf")
    model = engine.run("train", *overrides(folder, "train.epochs=1", "evaluate.bootstrap=0"), config_dir=conf).directory
    scored = engine.run("score", *overrides(folder, f"score.model={model}"), config_dir=conf)
    dataset = newest_dataset(folder / "store" / "datasets" / "tiny")
    assert dataset is not None
    rows = [{**row, "at": row["at"].isoformat()} for row in dataset.read(list(FIELDS)).to_pylist()]
    table = predictions(scored)
    scores = dict(zip(table["row_id"].to_pylist(), table["score"].to_numpy(), strict=True))
    return Shop(folder, model, predictor_of(read_bundle(model / "model"), threads=1), dataset, rows, scores)


def server(
    shop: Shop, log: Log | None = None, past: Past | None = None, token: str | None = None, **keys: Any
) -> Server:
    config = ServeConfig(**keys)
    bundle = shop.predictor.bundle
    past = past or Past(bundle.data, bundle.features, shop.dataset)
    return Server(Online(shop.predictor, past, config), config, "tiny@champion", log, token, lambda text: None)


@pytest.fixture(scope="module")
def client(shop: Shop) -> Iterator[Client]:
    with listening(server(shop, rows=1000, body=Size("1MB")).app) as found:
        yield found


def ask(client: Client, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    response = client.post("/v1/score", {"rows": rows})
    assert response.status == 200, response.text
    return list(response.json()["rows"])


def same_bits(shop: Shop, answers: list[dict[str, Any]]) -> bool:
    return all(np.float32(row["score"]).tobytes() == shop.scores[row["row_id"]].tobytes() for row in answers)


def test_rows_have_the_bits_of_batch_scoring_alone_together_and_in_any_order(shop: Shop, client: Client) -> None:
    draw = np.random.default_rng(0).permutation(len(shop.rows))
    picked = [shop.rows[place] for place in draw[:400]]
    assert same_bits(shop, [answer for row in picked[:30] for answer in ask(client, [row])])
    assert same_bits(shop, [answer for at in range(0, 100, 10) for answer in ask(client, picked[at : at + 10])])
    answers = ask(client, picked)
    assert same_bits(shop, answers) and len(answers) == 400
    assert same_bits(shop, ask(client, picked[::-1]))


def test_clients_at_once_get_their_own_rows(shop: Shop, client: Client) -> None:
    parts = [shop.rows[at : at + 7] for at in range(0, 224, 7)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda rows: ask(client, rows), parts))
    assert all(same_bits(shop, found) and len(found) == 7 for found in answers)
    wanted = [ask(client, rows) for rows in parts[:3]]
    assert [[row["row_id"] for row in found] for found in answers[:3]] == [
        [row["row_id"] for row in found] for found in wanted
    ]


def test_an_arrow_stream_is_answered_by_one(shop: Shop, client: Client) -> None:
    table, sink = shop.dataset.read(list(FIELDS), rows=(100, 300)), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    response = client.post("/v1/score", content=bytes(sink.getvalue()), kind=ARROW)
    assert response.status == 200
    found = pa.ipc.open_stream(response.content).read_all()
    for row_id, score in zip(found["row_id"].to_pylist(), found["score"].to_numpy(), strict=True):
        assert score.tobytes() == shop.scores[row_id].tobytes()


def test_events_that_are_posted_count_as_if_they_had_been_there(shop: Shop) -> None:
    bundle = shop.predictor.bundle
    cut = shop.dataset.rows - 300
    short, whole = (Past(bundle.data, bundle.features, shop.dataset) for _ in range(2))
    assert short.events is not None
    events, names = short.events.table, short.events.table.column_names
    short.events = Rows.of(events.slice(0, cut), bundle.data.event_time, set(short.events.indices))
    probes = shop.dataset.read(list(FIELDS), rows=(cut + 50, cut + 300))
    lacking = Online(shop.predictor, short, ServeConfig()).score(probes)
    later = events.slice(cut)
    place = names.index("amount")
    first = later.slice(0, 40)  # a row that comes twice counts once, as it came last
    first = first.set_column(place, "amount", pa.compute.add(first["amount"], 1.0))
    for rows in (first, later, later.slice(0, 40)):
        with listening(server(shop, past=short).app) as client:
            body = [
                {name: value.isoformat() if hasattr(value, "isoformat") else value for name, value in row.items()}
                for row in rows.select(names).to_pylist()
            ]
            assert client.post("/v1/events", {"rows": body}).json() == {"added": len(body)}
    assert short.newest == whole.newest
    folded = Online(shop.predictor, short, ServeConfig()).score(probes)
    wanted = Online(shop.predictor, whole, ServeConfig()).score(probes)
    assert any(differs(lacking.raw[name], wanted.raw[name]).any() for name in wanted.raw.column_names)
    for name in wanted.raw.column_names:
        assert not differs(folded.raw[name], wanted.raw[name]).any(), name


ROW = {"visit": 1, "at": "2020-01-28T10:00:00Z", "shop": "shop-1", "size": 0.5}


@pytest.mark.parametrize(
    ("body", "status", "message", "field"),
    [
        (b"nonsense", 422, "the body must be JSON", None),
        (b'{"rows": []}', 422, "of 1 to 1,000 rows", None),
        (b'{"rows": [7]}', 422, "row 0 must be an object", None),
        (b"[" * 100_000, 422, "must be", None),
        (b"\xff\xfe", 422, "UTF-8", None),
        ({**ROW, "size": "large"}, 422, "'size' must be float64 in row 0", "size"),
        ({**ROW, "visit": 1.5}, 422, "'visit' must be int64 in row 0", "visit"),
        ({**ROW, "visit": 10**30}, 422, "'visit' must have whole numbers of 64 bits", "visit"),
        ([ROW, {**ROW, "size": [1.0]}], 422, "'size' must have values of one kind, found float, list", "size"),
        ({**ROW, "shop": 7}, 422, "'shop' must be string in row 0, found int64", "shop"),
        ({**ROW, "at": "soon"}, 422, "'at' must be timestamp in row 0", "at"),
        ({**ROW, "shop": {"name": 1}}, 422, "shop", "shop"),
        ({**ROW, "sise": 1}, 422, "field 'sise' is not known. Did you mean 'size'", "sise"),
        ({"visit": 1, "at": "2020-01-28", "size": 1}, 422, "field 'shop' must be given in row 0", "shop"),
        ([ROW] * 1001, 422, "of 1 to 1,000 rows", None),
        ([{**ROW, "shop": "x" * 2000}] * 1000, 413, "at most 1,000,000 bytes", None),
    ],
)
def test_a_malformed_request_names_the_field(
    body: Any, status: int, message: str, field: str | None, client: Client
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = client.post("/v1/score", content=content)
    assert response.status == status, response.text
    assert message in response.json()["error"]
    assert response.json().get("field") == field


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2),
)


@given(st.dictionaries(st.sampled_from([*FIELDS, "amount", "other"]), JUNK, max_size=6))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_sent_is_never_a_fault_of_the_server(client: Client, row: dict[str, Any]) -> None:
    response = client.post("/v1/score", content=json.dumps({**ROW, **row}).encode())
    assert response.status in (200, 422), response.text


@pytest.mark.slow
@given(st.lists(st.dictionaries(st.sampled_from([*FIELDS, "amount", "other"]), JUNK, max_size=6), max_size=4))
@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_thousand_requests_of_any_kind_are_never_a_fault_of_the_server(client: Client, rows: list[Any]) -> None:
    response = client.post("/v1/score", content=json.dumps({"rows": rows}).encode())
    assert response.status in (200, 422), response.text


def test_a_row_that_ingest_would_quarantine_is_answered_as_such(client: Client) -> None:
    bad = {**ROW, "at": None, "visit": 2}
    first, second = ask(client, [bad, ROW])
    assert first == {"row_id": first["row_id"], "refused": "at: must not be null"}
    assert "score" in second
    alone = ask(client, [bad])
    assert alone == [first]
    assert ask(client, [ROW]) == [second]


def test_events_are_kept_only_where_windows_read_them(shop: Shop) -> None:
    past = Past(shop.predictor.bundle.data, shop.predictor.bundle.features, shop.dataset)
    past.events = None
    with listening(server(shop, past=past).app) as client:
        answer = client.post("/v1/events", {"rows": [{"visit": 1, "at": ROW["at"]}]}).json()
    assert answer == {"added": 0, "why": "the model has no windows over past events"}


def test_the_log_has_no_value_of_a_sensitive_column(shop: Shop, tmp_path: Path) -> None:
    bundle = shop.predictor.bundle
    hidden = {name: dataclasses.replace(bundle.data.columns[name], sensitive=True) for name in ("size", "amount")}
    secret = dataclasses.replace(
        bundle, data=dataclasses.replace(bundle.data, columns={**bundle.data.columns, **hidden})
    )
    rows = shop.dataset.read(list(FIELDS), rows=(0, 10))
    online = Online(shop.predictor, Past(bundle.data, bundle.features, shop.dataset), ServeConfig())
    log = Log(tmp_path)
    log.add(rows, dataclasses.replace(online.score(rows), bundle=secret), 0)
    log.close()
    names = set(pq.read_schema(tmp_path / "part-00000.parquet").names)
    assert {"given.shop", "feature.shop", "feature.shop_count_6h", "feature.at_hour"} <= names
    assert not {name for name in names if "size" in name or "amount" in name}


def test_lists_are_described_and_read(shop: Shop) -> None:
    column = Column(type="list<float32>", role="vector", width=2, known_at=Moment("prior"))
    assert _schema(column) == {
        "type": ["array", "null"], "items": {"type": "number"}, "minItems": 2, "maxItems": 2,
    }  # fmt: skip
    left, right = pa.array([[1.0, 2.0], None, [3.0]]), pa.array([[1.0, 2.0], [1.0], [4.0]])
    assert differs(left, right).tolist() == [False, True, True]


def test_the_token_is_asked_for_everywhere_but_at_the_probes(shop: Shop, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("a-secret-of-some-length\n")
    with listening(server(shop, token=token_of(str(tmp_path / "token"))).app) as client:
        assert client.get("/healthz").status == client.get("/readyz").status == 200
        for route in ("/v1/model", "/metrics", "/openapi.json"):
            assert client.get(route).status == 401
            assert client.get(route, headers={"authorization": "Bearer wrong"}).status == 401
        assert client.get("/v1/model", headers={"authorization": "Bearer a-secret-of-some-length"}).status == 200
    with pytest.raises(UserError, match="at least 16 characters"):
        (tmp_path / "short").write_text("short")
        token_of(str(tmp_path / "short"))
    with pytest.raises(UserError, match="token_file must be given to listen on"):
        ServeConfig(host="0.0.0.0")


def test_more_rows_than_may_wait_are_answered_429(shop: Shop) -> None:
    one = server(shop, rows=10, queue_rows=10)
    with listening(one.app) as client:
        one.batches.rows = 5
        response = client.post("/v1/score", {"rows": [ROW] * 6})
        assert response.status == 429 and response.headers["retry-after"] == "1"
        assert client.post("/v1/score", {"rows": [ROW] * 5}).status == 200


def test_a_past_that_is_too_old_is_said_row_by_row(shop: Shop) -> None:
    with listening(server(shop, max_age=Span("2d")).app) as client:
        rows = [ROW, {**ROW, "visit": 2, "at": "2020-03-01T00:00:00Z"}]
        first, second = client.post("/v1/score", {"rows": rows}).json()["rows"]
        assert "score" in first and "the past is older than serve.max_age=2d" in second["refused"]


def test_the_description_has_the_fields_with_their_types(client: Client) -> None:
    row = client.get("/openapi.json").json()["paths"]["/v1/score"]["post"]["requestBody"]["content"]["application/json"]
    properties = row["schema"]["anyOf"][0]["properties"]
    assert properties["size"]["type"] == ["number", "null"] and properties["visit"]["type"] == "integer"
    assert properties["at"] == {"type": "string", "format": "date-time"}
    assert [field["name"] for field in client.get("/v1/model").json()["fields"]] == ["visit", "at", "shop", "size"]
    assert "engine_serve_rows_total" in client.get("/metrics").text


# ------------------------------------------------------------------------------------------------------- log and skew


def served_run(shop: Shop, folder: Path, change: Callable[[pa.Table], pa.Table], past: Past | None = None) -> Path:
    """A serving run's directory whose log has some rows of the dataset, changed before they are asked."""
    run = Run.create(
        "serve", load_config(shop), {**load_record(shop.model)["config"], "score": {"model": str(shop.model)}}
    )
    rows = change(shop.dataset.read(list(FIELDS), rows=(1000, 1200)))
    bundle = shop.predictor.bundle
    online = Online(shop.predictor, past or Past(bundle.data, bundle.features, shop.dataset), ServeConfig())
    log = Log(run.path("served"))
    log.add(rows, online.score(rows), 0)
    log.close()
    run.finish({})
    return run.directory


def load_config(shop: Shop) -> Config:
    words = overrides(shop.folder, f"score.model={shop.model}")
    return compose(words, str(shop.folder / "conf")).config


def other(name: str, value: Any) -> Callable[[pa.Table], pa.Table]:
    def change(rows: pa.Table) -> pa.Table:
        values = rows[name].to_pylist()
        values[3:8] = [value] * 5
        return rows.set_column(rows.column_names.index(name), name, pa.array(values, rows.schema.field(name).type))

    return change


def ended(shop: Shop) -> Past:
    """The past without the last rows of the dataset."""
    bundle = shop.predictor.bundle
    found = Past(bundle.data, bundle.features, shop.dataset)
    assert found.events is not None
    found.events = Rows.of(found.events.table.slice(0, 900), bundle.data.event_time, set(found.events.indices))
    return found


def altered(shop: Shop) -> Past:
    """The past with another outcome of each event."""
    bundle = shop.predictor.bundle
    found = Past(bundle.data, bundle.features, shop.dataset)
    assert found.events is not None
    table = found.events.table
    place = table.column_names.index("amount")
    table = table.set_column(place, "amount", pa.compute.add(table["amount"], 1.0))
    found.events = Rows.of(table, bundle.data.event_time, set(found.events.indices))
    return found


def test_no_skew_is_found_where_the_server_had_what_the_lake_has(shop: Shop, tmp_path: Path) -> None:
    found = skew_of(served_run(shop, tmp_path, lambda rows: rows), load_config(shop))
    assert found == {"rows": 200, "absent": 0, "differences": []}


@pytest.mark.parametrize(
    ("change", "past", "feature", "cause"),
    [
        (other("size", 9.5), None, "size", "the request gave another value of size"),
        (other("shop", "shop-9"), None, "shop_count_6h", "the request gave another value of shop"),
        (lambda rows: rows, ended, "shop_count_2d", skew.STALE),
        (lambda rows: rows, altered, "shop_amount_mean_2d", skew.PAST_OTHER),
    ],
)
def test_skew_is_found_by_feature_with_its_cause(
    change: Any, past: Any, feature: str, cause: str, shop: Shop, tmp_path: Path
) -> None:
    directory = served_run(shop, tmp_path, change, None if past is None else past(shop))
    found = {item["feature"]: item["causes"] for item in skew_of(directory, load_config(shop))["differences"]}
    assert set(found[feature]) == {cause}, found


def test_skew_of_other_code_is_named(shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = served_run(shop, tmp_path, lambda rows: rows)
    real = skew.raw_features

    def computed(*arguments: Any) -> pa.Table:
        raw = real(*arguments)
        place = raw.column_names.index("at_hour")
        return raw.set_column(place, "at_hour", pa.compute.add(raw["at_hour"], 1))

    monkeypatch.setattr(skew, "raw_features", computed)
    found = skew_of(directory, load_config(shop))["differences"]
    assert [(item["feature"], item["causes"]) for item in found] == [("at_hour", {skew.CODE: 200})]


# ------------------------------------------------------------------------------------------------- a process of its own


@pytest.mark.slow
def test_a_server_follows_promotions_and_ends_with_its_log_written(shop: Shop, tmp_path: Path) -> None:
    conf = str(shop.folder / "conf")
    second = engine.run(
        "train", *overrides(shop.folder, "train.epochs=1", "train.seed=5", "evaluate.bootstrap=0"), config_dir=conf
    ).directory
    paths = [f"paths.runs={shop.folder / 'runs'}", f"paths.store={shop.folder / 'store'}"]
    assert main(["registry", "promote", "shop", str(shop.model), *paths]) == 0
    words = ["serve", "score.model=shop@champion", "serve.port=0", "serve.follow=200ms", "name=shop", *paths]
    process = subprocess.Popen(
        [sys.executable, "-m", "engine", *words], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        until = time.monotonic() + 120
        while (
            not (ready := list((shop.folder / "runs/serve/shop").glob("*/endpoint.json"))) and time.monotonic() < until
        ):
            time.sleep(0.1)
        client = Client(json.loads(ready[0].read_text())["port"])
        models, asked, promoted = set(), 0, False
        until = time.monotonic() + 60
        while time.monotonic() < until and not (promoted and len(models) == 2 and asked > 300):
            response = client.post("/v1/score", {"rows": [shop.rows[asked % 1000]]})
            assert response.status == 200, response.text
            models.add(response.json()["model"])
            asked += 1
            if asked == 100:
                assert main(["registry", "promote", "shop", str(second), *paths]) == 0
                promoted = True
        assert len(models) == 2
    finally:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    directory = Path(out.splitlines()[-1])
    files = sorted(directory.glob("served/part-*.parquet"))
    assert sum(pq.read_metadata(path).num_rows for path in files) == asked
    assert main(["skew", str(directory), *paths]) == 0
