"""From words to the frozen config: resolved once, secrets kept out, nothing that names code to run."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from engine.config import compose, schema
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
    masked = compose._masked_word("++data.sources.x.secret_token=S3CR3T")
    assert masked == "++data.sources.x.secret_token=***"
    for word in (
        r"+monitor.alerts.a.to=https://h/T0?k\=S3CR3T",
        "+monitor.alerts={a:{kind:webhook,to:'https://h/S3CR3T'}}",
    ):
        assert compose._masked_word(word) == word.partition("=")[0] + "=***"
    with pytest.raises(UserError) as caught:
        compose.compose(["+monitor.alerts.a.to=https://h/T0?k=S3CR3T"])
    assert "S3CR3T" not in str(caught.value)
    assert compose._masked_word("+monitor.alerts.a.to=alarms.jsonl") == "+monitor.alerts.a.to=alarms.jsonl"


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
    assert composed.saved["monitor"]["alerts"]["team.ops"]["to"] == compose.MASK


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
        ("seed=1", "Did you mean 'monitor.seed' or 'train.seed'?"),
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
    plans = compose.sweep(["train.seed=1,2", "name=x", "train.lr=0.1,0.2"])
    assert [" ".join(plan) for plan in plans] == [
        f"train.seed={seed} name=x train.lr={lr}" for seed in (1, 2) for lr in (0.1, 0.2)
    ]
    assert compose.sweep(["score.between=[a,b]"]) == [["score.between=[a,b]"]]


def test_known_keys_has_keys_sections_and_groups() -> None:
    assert {"train", "train.lr", "experiment", "features.encode.bins"} <= set(compose.known_keys())
