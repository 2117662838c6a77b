"""From words to the frozen config: resolved once, secrets kept out, nothing that names code to run."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from engine.config import compose, literals, nested, override_values, schema, secrecy
from engine.config.tree import Config
from engine.errors import UserError


@pytest.fixture
def user_conf(tmp_path: Path) -> Callable[[str], str]:
    """`user_conf(text)` is a --config-dir with `+experiment=own`."""

    def write(text: str) -> str:
        (tmp_path / "conf" / "experiment").mkdir(parents=True, exist_ok=True)
        (tmp_path / "conf" / "experiment" / "own.yaml").write_text(f"# @package _global_\n{text}")
        return str(tmp_path / "conf")

    return write


def test_the_defaults_of_the_tree_are_the_config_without_overrides() -> None:
    assert compose.compose().config == Config()


def test_every_default_passes_its_own_checks() -> None:
    assert schema.build(Config, schema.plain(Config())) == Config()


def test_the_saved_config_builds_the_config_that_ran() -> None:
    composed = compose.compose(["train.lr=0.5", "model=linear", "+features.direct.distance=true", "name=x"])
    assert schema.build(Config, json.loads(json.dumps(composed.saved))) == composed.config
    assert composed.config.model.kind == "linear" and composed.config.features.direct == {"distance": True}


@pytest.mark.parametrize("experiment", compose.groups()["experiment"])
def test_every_shipped_experiment_composes(experiment: str) -> None:
    assert compose.compose([f"+experiment={experiment}"]).config.name != "unnamed"


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        compose.compose().config.train.lr = 1  # type: ignore[misc]


def test_a_value_with_an_equals_sign_passes_when_quoted() -> None:
    assert compose.compose(["data.query='a = (b)'"]).config.data.query == "a = (b)"
    with pytest.raises(UserError, match="needs quotes"):
        compose.compose(["data.query=a = (b)"])


# ------------------------------------------------------------------------------------------- F2, resolved once


@pytest.fixture
def drawing() -> Callable[[], int]:
    """Registers `${draw:}`, which gives another number at every call; returns how often it was called."""
    numbers = itertools.count(1)
    calls: list[int] = []

    def draw() -> int:
        calls.append(next(numbers))
        return calls[-1]

    OmegaConf.register_new_resolver("draw", draw, replace=True)
    yield lambda: len(calls)  # type: ignore[misc]
    OmegaConf.clear_resolver("draw")


ORDERS = [
    "train: {seed: '${draw:}', window_rows: '${train.seed}', epochs: '${.window_rows}'}\nname: run-${train.seed}\n",
    "name: run-${train.seed}\ntrain: {epochs: '${.window_rows}', window_rows: '${train.seed}', seed: '${draw:}'}\n",
]


@pytest.mark.parametrize("text", ORDERS, ids=["source first", "source last"])
def test_a_random_value_is_drawn_once_and_shared_by_all_that_refer_to_it(text, drawing, user_conf) -> None:
    composed = compose.compose(["+experiment=own"], user_conf(text))
    train = composed.config.train
    assert train.seed == train.window_rows == train.epochs and composed.config.name == f"run-{train.seed}"
    assert drawing() == 1
    assert composed.saved["train"]["seed"] == train.seed and composed.saved["name"] == composed.config.name


def test_two_draws_are_two_values(drawing, user_conf) -> None:
    train = compose.compose(
        ["+experiment=own"], user_conf("train: {seed: '${draw:}', epochs: '${draw:}'}\n")
    ).config.train
    assert train.seed != train.epochs and drawing() == 2


def test_references_in_references_and_to_whole_sections_are_followed(drawing, user_conf) -> None:
    text = """
name: seed
train: {seed: '${draw:}', epochs: '${train.${name}}'}
features: {views: {a: {entity: [x], windows: [1h], aggregates: {rows: [count]}}, b: '${features.views.a}'}}
"""
    config = compose.compose(["+experiment=own"], user_conf(text)).config
    assert config.train.epochs == config.train.seed == 1
    assert config.features.views["a"] == config.features.views["b"]


def test_the_saved_config_repeats_the_run(drawing, user_conf) -> None:
    first = compose.compose(["+experiment=own"], user_conf("train: {seed: '${draw:}'}\n"))
    again = compose.compose(["+experiment=own"], user_conf(compose.to_yaml(first.saved)))
    assert again.config == first.config


# ------------------------------------------------------------------------------------------------- F3, secrets


def test_what_comes_from_the_environment_is_saved_as_a_reference(monkeypatch, user_conf) -> None:
    monkeypatch.setenv("ENGINE_TEST_LOGIN", "hunter-two")
    text = "tracking: {entity: '${oc.env:ENGINE_TEST_LOGIN}', project: 'of-${tracking.entity}'}\n"
    composed = compose.compose(["+experiment=own"], user_conf(text))
    assert composed.config.tracking.project == "of-hunter-two"
    assert composed.saved["tracking"]["entity"] == "${oc.env:ENGINE_TEST_LOGIN}"
    assert "hunter-two" not in json.dumps(composed.saved) and "hunter-two" in composed.secrets


def test_a_place_from_the_environment_is_no_secret(monkeypatch, tmp_path, user_conf) -> None:
    monkeypatch.setenv("ENGINE_TEST_PLACE", str(tmp_path))
    composed = compose.compose(["+experiment=own"], user_conf("data: {path: '${oc.env:ENGINE_TEST_PLACE}/raw'}\n"))
    assert composed.saved["data"]["path"] == f"{tmp_path}/raw" and composed.secrets == ()


def test_a_key_named_like_a_secret_is_masked_on_the_command_line_and_in_messages() -> None:
    with pytest.raises(UserError) as caught:
        compose.compose(["db.password=S3CR3T"])
    assert "S3CR3T" not in str(caught.value) and "db.password" in str(caught.value)
    with pytest.raises(UserError) as caught:
        compose.compose(["db.password=S3CR3T {"])
    assert "S3CR3T" not in str(caught.value)
    masked = secrecy.masked_word("++data.sources.x.secret_token=S3CR3T")
    assert masked == "++data.sources.x.secret_token=***"
    for word in (
        r"+monitor.alerts.a.to=https://h/T0?k\=S3CR3T",
        "+monitor.alerts={a:{kind:webhook,to:'https://h/S3CR3T'}}",
    ):
        assert secrecy.masked_word(word) == word.partition("=")[0] + "=***"
    with pytest.raises(UserError) as caught:
        compose.compose(["+monitor.alerts.a.to=https://h/T0?k=S3CR3T"])
    assert "S3CR3T" not in str(caught.value)
    assert secrecy.masked_word("+monitor.alerts.a.to=alarms.jsonl") == "+monitor.alerts.a.to=alarms.jsonl"


def test_a_column_may_be_called_token() -> None:
    words = ["+data.columns={token:int64,at:{type:timestamp,role:event_time},id:{type:string,role:id}}"]
    composed = compose.compose([*words, "+data.sources.a={path:a.csv,columns:{id:string}}"])
    assert composed.saved["data"]["columns"]["token"] == "int64" and composed.secrets == ()


def test_names_with_dots_and_names_like_secrets_change_nothing_in_what_is_hidden(user_conf) -> None:
    text = """
data:
  sources: {a: {path: a.csv, columns: {id: string, at: timestamp, user.token: string}}}
  columns: {id: {type: string, role: id}, at: {type: timestamp, role: event_time}, user.token: string}
  rules: {token: "id <> ''"}
features: {views: {a: {kind: function, function: f, inputs: [id], outputs: {secret_token: float64}}}, as_of: at}
monitor: {alerts: {team.ops: {kind: webhook, to: 'https://hooks.example/T0/S3CR3T'}}}
"""
    text = text.replace("{type: string, role: id}", "{type: string, role: id, known_at: prior}")
    composed = compose.compose(["+experiment=own"], user_conf(text))
    assert composed.secrets == ("https://hooks.example/T0/S3CR3T",)  # and not `string`, `float64` or a rule
    assert composed.saved["monitor"]["alerts"]["team.ops"]["to"] == secrecy.MASK


# --------------------------------------------------------------------------------------- J4, no code by config


@pytest.mark.parametrize(
    "word",
    [
        "+_target_=os.system",
        "+train._target_=os.system",
        "+features.direct.x={_target_:os.system}",
        "+features.views={a:{entity:[x],aggregates:{y:[{_target_:builtins.print}]}}}",
        "+model={_partial_:true}",
    ],
)
def test_a_config_that_names_code_to_run_is_refused(word: str) -> None:
    with pytest.raises(UserError, match=r"never names code to run|has a choice already"):
        compose.compose([word])


def test_a_target_in_a_users_file_is_refused_with_its_key(user_conf, tmp_path) -> None:
    marker = tmp_path / "marker"
    text = f"train: {{lr: {{_target_: pathlib.Path.touch, self: {{_target_: pathlib.Path, _args_: ['{marker}']}}}}}}\n"
    with pytest.raises(UserError, match=r"'train\.lr\._target_' is not allowed"):
        compose.compose(["+experiment=own"], user_conf(text))
    assert not marker.exists()


# -------------------------------------------------------------------------------------------------- messages


def test_broken_yaml_names_the_file(user_conf) -> None:
    with pytest.raises(UserError, match=r"must be YAML.*own\.yaml"):
        compose.compose(["+experiment=own"], user_conf("a: [1\n"))


def test_a_value_left_open_is_named(user_conf) -> None:
    with pytest.raises(UserError, match=r"data\.sources\.a\.path"):
        compose.compose(["+experiment=own"], user_conf("data: {sources: {a: {path: '???', columns: {x: string}}}}\n"))


def test_an_unknown_key_in_a_users_file_is_named(user_conf) -> None:
    with pytest.raises(UserError, match=r"'train\.lrr'.*'train\.lr'"):
        compose.compose(["+experiment=own"], user_conf("train: {lrr: 1}\n"))


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("runs=x", "Did you mean 'paths.runs'?"),
        ("rnus=x", "Did you mean 'paths.runs'?"),
        ("seed=1", "Did you mean 'monitor.seed' or 'sweep.seed' or 'train.seed'?"),
        ("store.runs=x", "Did you mean 'paths.runs'?"),
        ("trian.lr=1", "Did you mean 'train.lr'?"),
        ("train.lrr=1", "Did you mean 'train.lr'?"),
    ],
)
def test_an_unknown_key_gets_the_nearest_by_its_whole_name_or_its_last_word(word: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        compose.compose([word])
    assert str(caught.value) == f"unknown config key {word.partition('=')[0]!r}. {hint}"


def test_an_unknown_key_that_is_near_to_none_gets_the_sections_not_every_key() -> None:
    with pytest.raises(UserError, match=r"'qqq'\. Known: backtest, cluster, data, ") as caught:
        compose.compose(["qqq=1"])
    assert "paths" in str(caught.value) and "." not in str(caught.value).partition("Known: ")[2].rstrip(".")


def test_sweep_gives_every_combination_in_order() -> None:
    plans = override_values.combinations(["train.seed=1,2", "name=x", "train.lr=0.1,0.2"])
    assert [" ".join(plan) for plan in plans] == [
        f"train.seed={seed} name=x train.lr={lr}" for seed in (1, 2) for lr in (0.1, 0.2)
    ]
    assert override_values.combinations(["score.between=[a,b]"]) == [["score.between=[a,b]"]]


def test_known_keys_has_keys_sections_and_groups() -> None:
    assert {"train", "train.lr", "experiment", "features.encode.bins"} <= set(compose.known_keys())


# --------------------------------------------------------------------------------------------- advice that works


def test_no_refused_key_is_proposed_as_its_own_correction(user_conf) -> None:
    """A section that a file leaves empty (`features:` with nothing below) takes its keys away."""
    sections = {key.partition(".")[0] for key in compose.known_keys() if "." in key} - set(compose.chosen())
    for section in sorted(sections):
        folder = user_conf(f"{section}:\n")
        keys = [key for key in compose.known_keys() if key.startswith(f"{section}.") and "<" not in key]
        key = next(key for key in keys if key not in schema.maps(Config))
        for word in (f"{key}=1", f"~{key}"):
            with pytest.raises(UserError) as caught:
                compose.compose(["+experiment=own", word], folder)
            assert f"'{key}' has no value to change or remove" in str(caught.value), word
            assert "Did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "advice", "follow"),
    [
        ("features.views: {}\n", "write `features: {views: ...}`", "features: {views: {}}\n"),
        ("train: {encode.bins: 3}\n", "write `encode: {bins: ...}`", "features: {encode: {bins: 3}}\n"),
        ("features:\n  views.shop: {}\n", "write `views: {shop: ...}`", "features: {views: {}}\n"),
    ],
)
def test_a_key_with_a_dot_in_a_file_is_written_as_a_section(user_conf, text: str, advice: str, follow: str) -> None:
    with pytest.raises(UserError) as caught:
        compose.compose(["+experiment=own"], user_conf(text))
    assert advice in str(caught.value)
    compose.compose(["+experiment=own"], user_conf(follow))


@pytest.mark.parametrize("path", sorted(schema.maps(Config)))
def test_entries_of_a_map_are_given_on_the_command_line(path: str) -> None:
    """The map is empty so far, and Hydra takes new entries only where it is told so."""
    if path == "model.settings":  # of any shape: the constructor of the model says what it takes
        assert compose.compose([f"{path}={{fresh: [[]]}}"]).config.model.settings == {"fresh": [[]]}
        return
    with pytest.raises(UserError) as caught:  # that an entry is no mapping is said by the schema, after composition
        compose.compose([f"{path}={{fresh: [[]]}}"])
    assert f"{path}.fresh" in str(caught.value)


@pytest.mark.parametrize(
    ("word", "said", "follow"),
    [
        ("+train.lr=0.5", "write train.lr=VALUE, without the +", "train.lr=0.5"),
        ("+cluster=ray", "write cluster=CHOICE, without the +", "cluster=ray"),
        ("+model=linear", "write model=CHOICE, without the +", "model=linear"),
        ("~train.lr=3", "write ~train.lr", "~train.lr"),
        ("features.views=[a]", "a section or a map takes {name: value}", "features.views={}"),
        ("~features.views.nope", "features.views has no entry 'nope'", "features.views={}"),
    ],
)
def test_what_hydra_refuses_is_said_in_our_words_and_the_advice_works(word: str, said: str, follow: str) -> None:
    with pytest.raises(UserError) as caught:
        compose.compose([word])
    assert said in str(caught.value) and "\n" not in str(caught.value)
    compose.compose([follow])


def test_a_file_that_gives_a_list_for_a_section_says_what_is_wrong(user_conf) -> None:
    with pytest.raises(UserError, match=r"features\.direct must be a mapping from name to value, found \['a'\]"):
        compose.compose(["+experiment=own"], user_conf("features: {direct: [a]}\n"))


VALUES = st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1).filter(lambda text: "${" not in text)


@given(VALUES)
def test_a_quoted_value_is_the_text_whatever_is_in_it(value: str) -> None:
    assert override_values.parse(f"data.description={schema.quoted(value)}")[1] == value


@given(VALUES.filter(lambda text: text.strip() == text and not text.startswith(("'", '"'))))
def test_a_value_that_hydra_cannot_read_is_given_back_as_the_word_to_write(value: str) -> None:
    try:
        override_values.parse(f"data.description={value}")
    except UserError as error:
        advice = str(error).partition("needs quotes inside the word: ")[2]
        (word,) = shlex.split(advice)
        assert override_values.parse(word)[1] == value


def test_an_expression_with_quotes_survives_the_advice() -> None:
    value = 'mean(where((score > 0.5) & (country == "DE"), 5, 0))'
    with pytest.raises(UserError) as caught:
        compose.compose([f"monitor.business.cost.expression={value}"])
    (word,) = shlex.split(str(caught.value).partition("needs quotes inside the word: ")[2])
    composed = compose.compose([word, "monitor.business.cost.better=lower"])
    assert composed.config.monitor.business["cost"].expression == value


@pytest.mark.parametrize("word", ['data.columns.a.values=["0123",~]', "+data.columns.a={values: [a(]}", "train.x=[~]"])
def test_a_list_that_hydra_cannot_read_is_told_to_quote_its_texts_and_that_is_read(word: str) -> None:
    with pytest.raises(UserError, match=r"A text in a list or mapping needs quotes of its own") as caught:
        override_values.parse(word)
    (example,) = shlex.split(str(caught.value).rpartition("as in ")[2])
    assert literals.texts(override_values.parse(f"data.columns.a.values={example}")[1]) == ["~", "c"]


# ------------------------------------------------------------------------------------------- maps given whole


DEFAULT_POLICIES = ["drift", "every", "never", "performance"]


@pytest.mark.parametrize(
    ("text", "words", "names"),
    [
        ("", [], DEFAULT_POLICIES),
        ("backtest: {policies: {}}\n", [], DEFAULT_POLICIES),
        ("backtest: {policies: {mine: {triggers: [age]}}}\n", [], ["mine"]),
        ("backtest: {policies: {every: {}, mine: {}}}\n", [], ["every", "mine"]),
        ("", ["backtest.policies={mine: {triggers: [age]}}"], ["mine"]),
        ("", ["backtest.policies.drift.budget=9"], DEFAULT_POLICIES),
        ("", ["~backtest.policies.performance"], ["drift", "every", "never"]),
        ("", ["backtest.policies.mine.triggers=[age]"], [*DEFAULT_POLICIES, "mine"]),
        ("backtest: {policies: {mine: {}}}\n", ["backtest.policies.drift.budget=9"], ["drift", "mine"]),
        ("backtest: {policies: {mine: {}, drift: {}}}\n", ["~backtest.policies.drift"], ["mine"]),
    ],
)
def test_the_policies_that_are_named_are_all_that_run(user_conf, text: str, words: list[str], names: list[str]) -> None:
    composed = compose.compose(["+experiment=own", *words], user_conf(text))
    found = composed.config.backtest.policies
    assert sorted(found) == sorted(names) == sorted(composed.saved["backtest"]["policies"])
    # One that is named as a default is that default, with what was changed.
    assert "drift" not in found or found["drift"].triggers == ("drift", "age")
    assert "every" not in found or found["every"].cool_down == "0s"


# ------------------------------------------------------------------------------------------ where files go by default


@pytest.mark.parametrize(
    ("here", "config_dir", "store"),
    [
        ("project", "mine", "store"),  # beside the folder, which is the working directory
        ("project/mine", ".", "store"),  # the folder is the working directory
        ("project/mine", "{root}/project/mine", "store"),
        ("project/deep", "../mine", "{root}/project/store"),
        ("elsewhere", "{root}/project/mine", "{root}/project/store"),
        ("elsewhere", "../project/mine/", "{root}/project/store"),
        ("elsewhere", "{root}/flat", "{root}/flat/store"),  # which holds its runs already
        (".", "project/mine", "project/store"),  # below the working directory: a job's copy of it has the same layout
        (".", "flat", "flat/store"),
        ("project", None, "store"),
    ],
)
def test_store_and_runs_lie_beside_the_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: str, config_dir: str | None, store: str
) -> None:
    for folder in ("project/mine", "project/deep", "elsewhere", "flat/runs"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / here)
    place = config_dir and config_dir.format(root=tmp_path)
    paths = compose.compose([], place).config.paths
    assert paths.store == store.format(root=tmp_path)
    assert Path(paths.runs) == Path(paths.store).with_name("runs")
    given = compose.compose(["paths.runs=other"], place).config.paths
    assert (given.runs, given.store) == ("other", paths.store)


def test_a_file_and_an_interpolation_say_where_files_go(user_conf, tmp_path: Path) -> None:
    folder = user_conf("paths: {store: lake/store}\nscore: {output: '${paths.runs}/out'}\n")
    config = compose.compose(["+experiment=own"], folder).config
    assert (config.paths.store, config.paths.runs) == ("lake/store", f"{tmp_path}/runs")
    assert config.score.output == f"{tmp_path}/runs/out"


# ------------------------------------------------------------------------------------- times that cannot be compared

TRIPS = """
data:
  sources: {{trips: {{path: x.csv, columns: {{trip: string}}}}}}
  columns:
    trip: {{type: string, role: id, known_at: prior}}
    booked: {{type: timestamp, role: time, known_at: booked}}
    arrival: {{type: timestamp, role: event_time, known_at: arrival}}
    size: {{type: float64, role: numeric, known_at: {known_at}}}
features:
  as_of: arrival
  {use}
"""


@pytest.mark.parametrize(
    "use",
    [
        "direct: {size: true}",
        "views: {v: {entity: [size], windows: [1d], aggregates: {rows: [count]}}}",
        "views: {v: {kind: function, function: 'a:b', inputs: [size], outputs: {x: float64}}}",
    ],
)
def test_a_time_of_another_column_is_said_to_be_incomparable_and_the_advice_works(user_conf, use: str) -> None:
    with pytest.raises(UserError, match="'size' is known at `booked` and the decision is taken at `arrival`") as caught:
        compose.compose(["+experiment=own"], user_conf(TRIPS.format(known_at="booked", use=use)))
    assert "cannot be compared" in str(caught.value) and "after the decision" not in str(caught.value)
    (declared,) = [part for part in str(caught.value).split("`") if part.startswith("data.columns.size.known_at: ")]
    for known_at in (declared.partition(": ")[2], "prior"):
        compose.compose(["+experiment=own"], user_conf(TRIPS.format(known_at=known_at, use=use)))
    with pytest.raises(UserError, match=r"known at `arrival \+ 1h`, after the decision"):
        compose.compose(["+experiment=own"], user_conf(TRIPS.format(known_at="arrival + 1h", use=use)))


@pytest.mark.parametrize(("named", "meant"), [
    ("mine/experiment", "mine"),
    ("mine/data", "mine"),
    (".", "mine"),
    ("mine/deep/er", "mine"),
    (None, "mine"),
])  # fmt: skip
def test_a_config_dir_at_another_level_is_told_the_folder_that_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str | None, meant: str
) -> None:
    for folder in ("experiment", "data", "deep/er"):
        (tmp_path / "mine" / folder).mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "shop.yaml").write_text("# @package _global_\nname: shop\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"experiment/shop\.yaml: --config-dir \S+") as caught:
        compose.compose(["+experiment=shop"], named)
    (folder,) = re.findall(r"--config-dir (\S+?)(?:,|$)", str(caught.value).split(".yaml: ")[1])
    assert folder == meant
    assert compose.compose(["+experiment=shop"], folder).config.name == "shop", "the advice works"
    with pytest.raises(UserError, match="has no choice 'nothing'") as caught:
        compose.compose(["+experiment=nothing"], named)
    assert "must be the folder" not in str(caught.value)


@example("").via("the shortest text")
@example("${oc.env:HOME}").via("a reference")
@example("\\\\${name}").via("a reference that is escaped")
@example("a\\\\\\\\${${name}}").via("one in another")
@given(st.lists(st.sampled_from(["a", "\\", "${", "}", ":", ".", "$", "{"]), min_size=8).map("".join))
@settings(max_examples=12, deadline=None)  # a composition takes a tenth of a second, and each text has many places
def test_a_text_that_is_escaped_is_taken_as_it_is_also_by_what_refers_to_it(text: str) -> None:
    values = json.dumps({"path": literals.escaped(text), "description": "<${data.path}>"})
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "experiment").mkdir()
        (Path(folder) / "experiment" / "x.yaml").write_text(f'# @package _global_\n{{"data": {values}}}\n')
        found = compose.compose(["+experiment=x"], folder).config.data
    assert (found.path, found.description) == (text, f"<{text}>")


def test_a_key_that_earlier_versions_lacked_is_set_like_any_other_and_saved_where_it_is_set() -> None:
    later = {"monitor.rule": "distance", "monitor.acknowledge": ["2024-03-01"], "monitor.holidays": ["2024-12-25"]}
    later |= {"evaluate.block": "7d"}
    words = [f"{name}={str(value).replace(chr(39), '')}" for name, value in later.items()]
    found = compose.compose(["+experiment=flights", *words])
    assert found.config.monitor.acknowledge == ("2024-03-01",) and found.config.evaluate.block == "7d"
    assert later.items() <= dict(nested.leaves(found.saved)).items()
    untouched = dict(nested.leaves(compose.compose(["+experiment=flights"]).saved))
    assert not {*later, "plugins"} & untouched.keys()
    assert (
        compose.compose(["+experiment=flights", "monitor.rule=auto"]).saved
        == compose.compose(["+experiment=flights"]).saved
    )
