"""Vectors, sets and texts as features: fitted state, references of scikit-learn, any batch, profiles, what ingest sets aside."""

from __future__ import annotations

import base64
import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.preprocessing import MultiLabelBinarizer, StandardScaler

import engine
from engine import __main__ as shell
from engine.config import schema
from engine.config.compose import compose
from engine.config.sections.data import Column
from engine.config.sections.features import EncodeConfig
from engine.config.units import Moment
from engine.data.column_checks import conform, find
from engine.errors import UserError
from engine.features.encode import Encoder, check_sensitive
from engine.features.parts import PARTS
from engine.features.profile import Profile, ProfileSpec
from engine.features.spec import Feature, type_kind
from engine.lifecycle.reproduce import Options, reproduce_run
from engine.runtime import storage
from engine.runtime.records import Damaged
from engine.scoring.read import predictions
from engine.training.train import check_trainable
from tests import naive
from tests.kernels.cases import examples
from tests.tiny import DATA, EXPERIMENT, FEATURES, START, H, overrides, visits

KINDS = {"v": "vector", "x": "numeric", "t": "text", "s": "set"}
FOUR = [Feature(name, kind, "direct") for name, kind in KINDS.items()]
WORDS = ["alpha", "Beta", "gämma", "日本", "x1"]


def rows(count: int = 120, seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)
    vectors = [None if i % 50 == 1 else rng.normal(i % 3, 2, 3).tolist() for i in range(count)]
    sets = [None if i % 40 == 2 else [f"m{k}" for k in rng.integers(0, 6, rng.integers(0, 4))] for i in range(count)]
    texts = [None if i % 30 == 3 else " ".join(rng.choice(WORDS, rng.integers(0, 5))) for i in range(count)]
    types = {"v": pa.list_(pa.float32()), "s": pa.list_(pa.string()), "t": pa.string()}
    columns = {"v": vectors, "s": sets, "t": texts}
    return pa.table({"x": rng.normal(size=count), **{name: pa.array(columns[name], types[name]) for name in columns}})


def fit(table: pa.Table, *names: str, **options: object) -> Encoder:
    return Encoder.fit([item for item in FOUR if item.name in names], table.select, EncodeConfig(**options))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return fit(rows(), *KINDS, text_buckets=8, text_characters=2, min_count=1)


def test_a_row_gives_the_same_bytes_alone_in_any_batch_and_after_reading_the_state_again(encoder, tmp_path):
    table = pa.concat_tables([rows(), rows(30, seed=7)])
    whole, _ = encoder.transform(table)
    storage.write_json(tmp_path / "features.json", encoder.to_json())
    again = Encoder.read(tmp_path / "features.json")
    assert again.digest == encoder.digest
    cuts = [0, 1, 2, 7, 40, 41, 150]
    parts = [again.transform(table.slice(a, b - a))[0] for a, b in itertools.pairwise(cuts)]
    assert np.concatenate(parts).tobytes() == whole.tobytes()
    assert np.isfinite(whole).all()


def test_fit_does_not_depend_on_the_order_of_rows(encoder):
    table = rows()
    shuffled = table.take(pa.array(np.random.default_rng(1).permutation(table.num_rows)))
    assert fit(shuffled, *KINDS, text_buckets=8, text_characters=2, min_count=1).digest == encoder.digest


def test_each_number_of_a_vector_is_standardised_as_by_scikit_learn_and_a_null_vector_is_marked_once():
    table = rows()
    encoded, _ = fit(table, "v").transform(table)
    block = np.array([item or [np.nan] * 3 for item in table["v"].to_pylist()])
    raw = np.concatenate([np.linalg.norm(block, axis=1)[:, None], block], axis=1)
    expected = np.nan_to_num(StandardScaler().fit_transform(raw))
    np.testing.assert_allclose(encoded[:, [0, 2, 3, 4]], expected, atol=1e-5)
    assert fit(table, "v").numeric_names == ["v[norm]", "v[norm]_missing", "v[0]", "v[1]", "v[2]"]
    np.testing.assert_array_equal(encoded[:, 1], np.isnan(block[:, 0]))


SETS = st.lists(st.one_of(st.none(), st.lists(st.sampled_from("abcdé"), max_size=5)), min_size=1, max_size=12)


@examples(30)
@given(SETS, st.integers(0, 4), st.integers(1, 3))
def test_members_are_those_of_scikit_learns_binarizer(sets, most, least):
    column = pa.array(sets, pa.list_(pa.string()))
    state, _ = PARTS["set"].fit("s", column, EncodeConfig(set_members=most, min_count=least), lambda _: None)
    counts = {text: sum(text in set(item or []) for item in sets) for text in "abcdé"}
    kept = [text for text in sorted(counts, key=lambda text: (-counts[text], text)) if counts[text] >= least][:most]
    assert state.names == ["s[members]", "s[others]", *(f"s[{text}]" for text in kept)]
    found = state.numbers(column)
    binary = MultiLabelBinarizer(classes=list("abcdé")).fit_transform([item or [] for item in sets])
    np.testing.assert_array_equal(found[:, 2:], binary[:, ["abcdé".index(text) for text in kept]])
    there = binary.sum(1).astype(float)
    np.testing.assert_array_equal(found[:, 0], np.where([item is None for item in sets], np.nan, there))
    np.testing.assert_array_equal(found[:, 1], there - found[:, 2:].sum(1))


def test_texts_are_lower_case_composed_words_and_ascii_is_the_same_beside_other_texts():
    column = pa.array(["Red, RED-blue", "Gr\u0308u\u0308n\u00a0tea", "“red” — blue", None, ""])
    state, _ = PARTS["text"].fit("t", column, EncodeConfig(text_buckets=16), lambda _: None)
    plain = ["red red blue", "gr\u0308\u00fcn tea", " red   blue", "", ""]
    settings = (16, 2, 0, state.seed)
    seen = np.frombuffer(base64.b64decode(state.seen_), np.uint8)
    expected = np.array([naive.encoded_text(text.encode(), settings, state.idf_, seen) for text in plain])
    expected[3, 0] = np.nan
    np.testing.assert_allclose(state.numbers(column), expected, rtol=1e-12)
    assert state.numbers(column.slice(0, 1)).tobytes() == state.numbers(column)[:1].tobytes()
    assert state.numbers(pa.array(["red unheard of words"]))[0, 1] == 0.75


def test_a_slice_of_ascii_texts_gives_the_bytes_that_it_has_in_the_whole():
    column = pa.array(
        ["Red tea", "", "blue Tea cup", "a", "GREEN"] * 9
    )  # a null would be filled, which joins them anew
    state, _ = PARTS["text"].fit("t", column, EncodeConfig(text_buckets=16), lambda _: None)
    whole = state.numbers(column)
    parts = [state.numbers(column.slice(a, b - a)) for a, b in itertools.pairwise([0, 1, 7, 20, 45])]
    assert np.concatenate(parts).tobytes() == whole.tobytes()


def test_a_profile_counts_parts_alike_in_any_split_and_is_read_again(encoder, tmp_path):
    table = rows()
    spec = ProfileSpec.fit(encoder, table.select, np.linspace(0, 1, table.num_rows))
    whole = Profile.count(spec, table)
    parts = Profile.count_ranges(spec, table, [(0, 17), (17, 18), (18, table.num_rows)])
    assert parts[0].merge(parts[1]).merge(parts[2]).digest == whole.digest
    storage.write_json(tmp_path / "profile_spec.json", spec.to_json())
    again = ProfileSpec.read(tmp_path / "profile_spec.json", encoder)
    assert again.digest == spec.digest
    assert Profile.from_json(json.loads(json.dumps(whole.to_json())), again).digest == whole.digest
    assert {"x", "v[norm]", "v[0]", "s[members]", "s[others]", "s[m0]", "t[words]", "t[new]"} < set(spec.inputs)
    assert spec.features == ["x", "v", "t", "s"]
    nulls = {name: whole.to_json()["numeric"][name]["missing"] for name in ("v[norm]", "s[members]", "t[words]")}
    assert nulls == {"v[norm]": 3, "s[members]": 3, "t[words]": 4}


def test_profiles_of_texts_with_other_weights_are_never_merged(encoder):
    first = ProfileSpec.fit(encoder, rows().select, None)
    assert Profile.empty(first).merge(Profile.empty(dataclasses.replace(first))).rows == 0
    parts = [
        (name, dataclasses.replace(item, idf_=(2.0, *item.idf_[1:])) if name.startswith("t[") else item, place)
        for name, item, place in first.parts
    ]
    second = dataclasses.replace(first, parts=tuple(parts))
    with pytest.raises(UserError, match="those of two models"):
        Profile.empty(first).merge(Profile.empty(second))


def test_a_part_never_has_the_name_of_a_feature():
    features = [Feature("s", "set", "direct"), Feature("s[members]", "numeric", "direct")]
    table = pa.table({"s": pa.array([["members"], ["others"]] * 3), "s[members]": np.arange(6.0)})
    found = Encoder.fit(features, table.select, EncodeConfig(min_count=1))
    spec = ProfileSpec.fit(found, table.select, None)
    for names in (found.numeric_names, spec.columns):
        assert len(set(names)) == len(names)
    assert Profile.count(spec, table).rows == 6


@pytest.mark.parametrize(
    ("item", "words"),
    [([1.0, 2.0], "3 numbers in each row, found 2"), ([1.0, None, 2.0], "finite"), ([1.0, np.nan, 2.0], "finite")],
)
def test_a_malformed_vector_is_refused_by_name(encoder, item, words):
    table = rows(2).set_column(1, "v", pa.array([item, [1.0, 2.0, 3.0]], pa.list_(pa.float32())))
    with pytest.raises(UserError, match=f"'v' must (have|hold) {words}"):
        encoder.transform(table)


@pytest.mark.parametrize("kind", [pa.list_(pa.float32(), 3), pa.list_(pa.float32()), pa.large_list(pa.float32())])
def test_a_malformed_vector_is_found_beside_nulls_of_lists_of_every_kind(kind):
    items = [[1.0, 2.0, 3.0], None, [4.0, np.nan, 6.0], [7.0, 8.0, 9.0]]
    column = Column(type="list<float32>", role="vector", width=3, known_at=Moment("prior"))
    read, _ = conform(pa.table({"v": pa.array(items, kind)}), {"v": column}, "UTC", "here")
    for table in (read, read.slice(1), pa.table({"v": pa.array(items, kind)})):
        (found,) = find(table, {"v": column}, "UTC")
        assert (found.reason, found.positions.tolist()) == ("must hold finite numbers", [len(table) - 2])


@pytest.mark.parametrize(("kind", "held"), [("vector", "numbers"), ("set", "members"), ("text", "words")])
def test_why_a_feature_must_not_be_sensitive_is_said_of_its_kind(kind, held):
    with pytest.raises(UserError, match=f"because [a-z ]*its {held} would be part of the model") as error:
        check_sensitive(FOUR, [item.name for item in FOUR if item.kind == kind])
    assert str(error.value).count("words") == (held == "words")


def test_a_sensitive_set_is_refused_before_anything_is_read(tmp_path):
    words = [*write(tmp_path, "parquet"), "+data.columns.tags.sensitive=true"]
    config = compose(words, str(tmp_path / "conf")).config
    with pytest.raises(UserError, match="'tags' is a set, which must not be sensitive"):
        check_trainable(config)


def test_a_sensitive_set_is_refused_because_the_model_would_hold_its_members():
    with pytest.raises(UserError, match="'s' is a set, which must not be sensitive"):
        Encoder.fit([FOUR[3]], rows().select, EncodeConfig(), sensitive=["s"])


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("text", {"seen_": "!"}, "base64"),
        ("text", {"seen_": ""}, "base64"),
        ("text", {"counted_": [8]}, "buckets"),
        ("text", {"idf_": [0.0] * 8}, "weights"),
        ("text", {"words": 0, "characters": 0}, "n-grams"),
        ("text", {"words": 99}, "words"),
        ("text", {"idf_": [1.0] * 9}, "numeric must hold"),
        ("vector", {"width": 10**9}, "width"),
        ("vector", {"width": 4}, "numeric must hold"),
        ("set", {"members_": ["m0"]}, "numeric must hold"),
        ("set", {"name": "q"}, "once each"),
    ],
)
def test_damaged_state_is_found_before_it_is_used(encoder, tmp_path, kind, change, words):
    state = json.loads(json.dumps(encoder.to_json()))
    state[kind][0] |= change
    (tmp_path / "features.json").write_text(json.dumps(state))
    with pytest.raises(Damaged, match=words):
        Encoder.read(tmp_path / "features.json")


@pytest.mark.parametrize(
    ("column", "words"),
    [
        ({"type": "list<float32>", "role": "vector"}, "width must say"),
        ({"type": "float32", "role": "vector", "width": 3}, "list<float32>, found 'float32'"),
        ({"type": "int64", "role": "set"}, "list<string>"),
        ({"type": "list<string>", "role": "text"}, "string"),
        ({"type": "list<string>", "role": "set", "width": 3}, "width 3 with role set"),
    ],
)
def test_a_role_says_which_type_it_needs(column, words):
    with pytest.raises(UserError, match=words):
        schema.build(Column, column)


def test_kinds_of_what_functions_give_follow_from_the_type():
    assert [type_kind(name) for name in ("list<float32>", "list<string>", "string")] == ["vector", "set", "categorical"]


COLUMNS = """  emb: {type: list<float32>, role: vector, width: 3, known_at: prior}
  tags: {type: list<string>, role: set, known_at: prior}
  title: {type: string, role: text, known_at: prior}
"""


def write(folder: Path, kind: str, views: str = "", rows: int = 600) -> list[str]:
    """The tiny experiment with the three columns, which say something of the target; three rows are malformed. From 28 January on
    the vectors come from another model, members are rarer, and the texts have a new word.
    """
    table = visits(rows)
    later = np.asarray(table["at"].cast(pa.int64())) >= START + 27 * 24 * H
    rng = np.random.default_rng(0)
    bought = [bool(value) for value in table["bought"].to_pylist()]
    vectors = [None if i % 40 == 0 else (rng.normal(size=3) + yes).round(3).tolist() for i, yes in enumerate(bought)]
    vectors[5], vectors[6] = [1.0, 2.0], [1.0, None, 2.0]
    tags = [[f"t{k}" for k in rng.integers(0, 5, 2)] for _ in bought]
    tags[8] = ["t1", None]  # type: ignore[list-item]
    titles = [
        " ".join(rng.choice(["red", "blue", "Straße"], 3)) + (" wow" if yes and i % 3 else "")
        for i, yes in enumerate(bought)
    ]
    for at in np.flatnonzero(later):
        vectors[at] = [9.0, 9.0, 9.0] if vectors[at] else None
        tags[at], titles[at] = ["t9"], "unheard " + titles[at]
    more = {"emb": pa.array(vectors, pa.list_(pa.float32())), "tags": pa.array(tags), "title": pa.array(titles)}
    for name, values in more.items():
        table = table.append_column(name, values)
    if kind == "parquet":
        pq.write_table(table, folder / "visits.parquet")
    else:
        lines = [
            {**row, "at": str(row["at"]), "paid_at": row["paid_at"] and str(row["paid_at"])}
            for row in table.to_pylist()
        ]
        (folder / "visits.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = "      bought: bool\n      emb: list<float32>\n      tags: list<string>\n      title: string\n"
    data = DATA.replace("      bought: bool\n", source, 1).replace("visits*.parquet", f"visits.{kind}") + COLUMNS
    features = FEATURES.replace("size: true}", "size: true, emb: true, tags: true, title: true}") + views
    for name, text in (("data", data), ("features", features), ("experiment", EXPERIMENT)):
        (folder / "conf" / name).mkdir(parents=True, exist_ok=True)
        (folder / "conf" / name / "tiny.yaml").write_text(text)
    return overrides(folder, "features.encode.text_buckets=16")


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_ingest_keeps_malformed_vectors_and_sets_aside_with_file_row_and_reason(tmp_path, kind):
    run = engine.run("ingest", *write(tmp_path, kind), config_dir=str(tmp_path / "conf"))
    (dataset,) = (tmp_path / "store/datasets/tiny").glob("[0-9a-f]*")
    found = pq.read_table(next(dataset.glob("quarantine/*.parquet"))).to_pylist()
    assert sorted((item["row"], item["column"], item["reason"]) for item in found) == [
        (6, "emb", "must have 3 numbers"),
        (7, "emb", "must hold finite numbers"),
        (9, "tags", "must hold no null"),
    ]
    assert {item["file"].rsplit("/")[-1] for item in found} == {f"visits.{kind}"}
    assert run.metrics["ingest/rows"] == 597


def test_windows_over_a_list_or_a_text_are_refused_by_name(tmp_path):
    for column in ("emb", "tags", "title"):
        view = f"  more: {{entity: [shop], windows: [1d], aggregates: {{{column}: [mean]}}}}\n"
        with pytest.raises(UserError, match=f"column '{column}' must be a number or a boolean"):
            engine.run("features", *write(tmp_path, "parquet", view), config_dir=str(tmp_path / "conf"))


def test_a_list_that_is_a_feature_says_what_it_is(tmp_path):
    words = write(tmp_path, "parquet")
    with pytest.raises(UserError, match=r"features\.direct\.tags is a list, which must have role"):
        engine.run("features", *words, "data.columns.tags.role=ignore", config_dir=str(tmp_path / "conf"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, words, run) of a model of boosted trees with the three columns."""
    folder = tmp_path_factory.mktemp("parts")
    words = [*write(folder, "parquet", rows=2000), "model=lightgbm", "monitor.resamples=60", "monitor.alpha=0.05"]
    return folder, words, engine.run("train", *words, config_dir=str(folder / "conf"))


@pytest.mark.slow
def test_the_columns_make_the_model_better_and_the_run_is_reproduced(trained):
    folder, words, run = trained
    without = [f"features.direct.{name}=false" for name in ("emb", "tags", "title")]
    plain = engine.run("train", *words, *without, config_dir=str(folder / "conf"))
    assert run.metrics["valid/roc_auc"] > plain.metrics["valid/roc_auc"] + 0.05
    names = set(json.loads((run.directory / "importance.json").read_text()))
    assert {"emb", "tags", "title"} <= names
    assert reproduce_run(run.directory, Options(code="current", store=folder / "store"))["first_difference"] is None


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
def test_scores_are_the_same_bytes_in_any_unit_on_ray_and_in_python(trained):
    folder, words, run = trained
    model = f"score.model={run.directory}"
    places = [[], ["score.unit_rows=200"], ["cluster=ray", "cluster.workers=2", "score.unit_rows=300"]]
    runs = [engine.run("score", *words, model, *place, config_dir=str(folder / "conf")) for place in places]
    assert len({item.record["chain"]["scores"] for item in runs}) == 1
    assert len({(item.directory / "profile.json").read_bytes() for item in runs}) == 1
    scored = predictions(runs[0].directory)
    table = pq.read_table(folder / "visits.parquet").slice(20, 5)
    found = pa.concat_tables(
        [engine.load(run.directory).predict(table.slice(at, 1), history=table.slice(0, 0)) for at in range(5)]
    )
    assert set(found["row_id"].to_pylist()) <= set(scored["row_id"].to_pylist())


@pytest.mark.slow
def test_monitor_names_the_columns_that_changed(trained, capfd):
    folder, words, run = trained
    engine.run("score", *words, f"score.model={run.directory}", config_dir=str(folder / "conf"))
    more = [f"monitor.model={run.directory}", "monitor.window=[2020-01-28,2020-01-31]", "monitor.alarm_on=[drift]"]
    assert shell.main(["monitor", "--config-dir", str(folder / "conf"), *words, *more]) == 2
    found = json.loads((Path(capfd.readouterr().out.splitlines()[-1]) / "drift.json").read_text())
    alarmed = {item["column"] for item in found["attribution"] if item["alarm"]}
    assert {"emb[norm]", "emb[0]", "tags[others]", "title[new]"} <= alarmed


@pytest.mark.slow
def test_the_columns_are_shown(trained, capfd):
    folder, words, _ = trained
    assert shell.main(["data", "show", "tiny", "--config-dir", str(folder / "conf"), *words]) == 0
    assert "list<float32>" in capfd.readouterr().out
