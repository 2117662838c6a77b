"""A file of code beside the experiment goes through every command, and runs where it was made or where the user says so."""

from __future__ import annotations

import json
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import engine
from engine import __main__ as shell
from engine.config import plugins, schema
from engine.config.compose import compose
from engine.config.tree import Config
from engine.errors import UserError
from engine.lifecycle import reproduce
from engine.lifecycle.reproduce import Options, reproduce_run
from engine.runtime.run import Run, plan_digest
from engine.scoring.read import predictions
from engine.training.bundle import read_bundle
from tests.tiny import overrides, visits, write_tiny

VIEW = "features.views.mine={kind: function, function: double, inputs: [size], outputs: {twice: float64}}"
FAST = ("train.epochs=1", "evaluate.bootstrap=0", "features.windows=off")
TEST = "score.between=[2020-01-26,2020-01-31]"
DOUBLE = '''import pyarrow as pa
import pyarrow.compute as pc


def double(rows):
    """Twice the size.

    More about it.
    """
    return pa.table({"twice": pc.multiply(rows["size"], 2)})
'''


class Shop(NamedTuple):
    """A workplace with a plug-in, and a model that was trained there."""

    folder: Path
    trained: Run

    @property
    def words(self) -> list[str]:
        return [*overrides(self.folder, "plugins=[features.py]", VIEW, *FAST)]

    def run(self, command: str, *more: str) -> Run:
        return engine.run(command, *self.words, *more, config_dir=str(self.folder / "conf"))


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    folder = write_tiny(tmp_path_factory.mktemp("plugins"), 600)
    (folder / "conf" / "features.py").write_text(DOUBLE)
    made = Shop(folder, None)  # type: ignore[arg-type]
    return Shop(folder, made.run("train"))


def elsewhere(shop: Shop, tmp_path: Path) -> tuple[Path, list[str]]:
    """The model on another machine: its run directory, and the words of a command with a store of its own."""
    run = tmp_path / "brought" / shop.trained.directory.name
    shutil.copytree(shop.trained.directory, run)
    place = (f"data.path={shop.folder}", f"paths.store={tmp_path / 'store'}", f"paths.runs={tmp_path / 'runs'}")
    return run, [f"score.model={run}", TEST, *place]


# ---------------------------------------------------------------------------------------------------------- the file


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("def double(rows:\n", r"features.py, line 1 must be Python"),
        ("from .other import double\n", "must not import relative to itself"),
        ("import helpers\n\ndef double(rows): ...\n", "must not import helpers"),
        (None, r"features.py must be a readable file \(No such file"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, text: str | None, found: str) -> None:
    (tmp_path / "helpers.py").write_text("")
    if text is not None:
        (tmp_path / "features.py").write_text(text)
    with pytest.raises(UserError, match=f"plugins: .*{found}"):
        compose(["plugins=[features.py]"], str(tmp_path))


@pytest.mark.parametrize("helper", ["helpers.py", "helpers/__init__.py", "helpers/deep.py"])
def test_a_file_imports_nothing_of_the_current_folder_unless_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, helper: str
) -> None:
    conf, here = tmp_path / "conf", tmp_path / "here"
    (here / helper).parent.mkdir(parents=True)
    (here / helper).write_text("")
    conf.mkdir()
    (conf / "features.py").write_text("import json, engine, helpers.deep\n\ndef double(rows): ...\n")
    monkeypatch.chdir(here)
    words = ["plugins=[features.py]"]
    compose(words, str(conf))  # Python does not look in the current folder here
    monkeypatch.syspath_prepend("")
    with pytest.raises(
        UserError, match=r"plugins: .*must not import helpers: a file in .*here is no part of its digest"
    ):
        compose(words, str(conf))
    monkeypatch.setattr(metadata, "packages_distributions", lambda: {"helpers": ["helpers"]})
    compose(words, str(conf))


@pytest.mark.parametrize("name", ["/etc/features.py", "../features.py", "features.yaml", "a@b.py"])
def test_a_plugin_is_a_python_file_in_the_config_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"plugins: must be a Python file in the folder of --config-dir"):
        compose([f"plugins=['{name}']"], str(tmp_path))


def test_a_name_that_two_files_define_is_refused(shop: Shop, tmp_path: Path) -> None:
    shutil.copytree(shop.folder / "conf", tmp_path / "conf")
    (tmp_path / "conf" / "more.py").write_text(DOUBLE)
    words = overrides(shop.folder, "plugins=[features.py,more.py]", VIEW)
    with pytest.raises(UserError, match=r"'double' must be defined once, found it in features.py and more.py"):
        compose(words, str(tmp_path / "conf"))


@pytest.mark.parametrize("word", ["plugins=['features.py@{0}']", VIEW.replace("double", "'double@{0}'")])
def test_a_digest_that_is_written_down_must_be_that_of_the_file(shop: Shop, word: str) -> None:
    words = overrides(shop.folder, "plugins=[features.py]", VIEW, word.replace("{0}", "0" * 64))
    with pytest.raises(UserError, match=r"digest 0{64}, (found|but)"):
        compose(words, str(shop.folder / "conf"))


def test_the_plan_changes_with_the_code_and_is_as_it_was_without_any(shop: Shop, tmp_path: Path) -> None:
    def plan(text: str) -> str:
        (tmp_path / "features.py").write_text(text)
        return plan_digest("train", compose(["plugins=[features.py]"], str(tmp_path)).config)

    assert plan("A = 1\n") == plan("A = 1\n") != plan("A = 2\n")
    composed = compose(overrides(shop.folder), str(shop.folder / "conf"))
    assert "plugins" not in schema.plain(Config()) and "plugins" not in composed.saved
    later = {"batch_rows", "retries", "retry_pause", "on_error"}
    assert not later & schema.plain(composed.config.features.views["shop"]).keys()


def test_a_class_of_a_plugin_finds_its_module_and_its_source(tmp_path: Path) -> None:
    text = "from __future__ import annotations\nimport dataclasses\n\n@dataclasses.dataclass\nclass Pair:\n    a: int\n"
    plugin = plugins.Plugin("pair.py", text.encode())
    plugins.add([plugin])
    made = plugins.load(f"Pair@{plugin.digest}")
    assert made(3).a == 3 and plugins.load(f"Pair@{plugin.digest}") is made
    with pytest.raises(UserError, match=r"'Pair' \(digest 1{64}\) must be among plugins"):
        plugins.load(f"Pair@{'1' * 64}")


# ------------------------------------------------------------------------------------------------------ the commands


def test_the_run_and_the_model_carry_the_file(shop: Shop) -> None:
    digest = plugins.Plugin("features.py", DOUBLE.encode()).digest
    for folder in (shop.trained.directory, shop.trained.directory / "model"):
        assert (folder / "code" / "features.py").read_text() == DOUBLE
    config = shop.trained.record["config"]
    assert config["plugins"] == [f"features.py@{digest}"]
    assert read_bundle(shop.trained.directory / "model").features.views["mine"].function == f"double@{digest}"
    assert (shop.folder / "store" / "code" / f"{digest}.json").is_file()
    assert repr(shop.trained) == f"<Run of train 'tiny', done: {shop.trained.directory}>"


def test_features_show_has_the_signature(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    assert shell.main(["features", "show", "mine", *shop.words, "--config-dir", str(shop.folder / "conf")]) == 0
    said = capsys.readouterr().out
    assert "double(rows: pyarrow.Table[size: float64]) -> pyarrow.Table[twice: float64]" in said
    assert "Twice the size." in said and "More about it" not in said and "from features.py, line 5, " in said


def test_score_monitor_and_predict_use_the_code_of_the_model(shop: Shop) -> None:
    (shop.folder / "conf" / "features.py").write_text("raise SystemExit('the file of today must not run')\n")
    try:
        scored = engine.run("score", f"score.model={shop.trained.directory}", TEST, *overrides(shop.folder)[1:])
        window = "monitor.window=[2020-01-26,2020-01-31]"
        model = f"monitor.model={shop.trained.directory}"
        watched = engine.run("monitor", model, window, *overrides(shop.folder)[1:])
    finally:
        (shop.folder / "conf" / "features.py").write_text(DOUBLE)
    assert watched.metrics
    rows = visits(600).filter(pa.compute.is_in(visits(600)["visit"].cast(pa.string()), predictions(scored)["row_id"]))
    again = engine.load(shop.trained).predict(rows).sort_by("row_id")
    assert again["score"].equals(predictions(scored).sort_by("row_id")["score"])


def test_another_version_of_the_code_is_not_taken_for_the_models(shop: Shop, tmp_path: Path) -> None:
    shutil.copytree(shop.folder / "conf", tmp_path / "conf")
    (tmp_path / "conf" / "features.py").write_text(DOUBLE.replace("2)", "3)"))
    with pytest.raises(
        UserError, match=r"features.views.mine.function is 'double@\w+' here but the model was trained with"
    ):
        engine.run(
            "score", *shop.words, f"score.model={shop.trained.directory}", TEST, config_dir=str(tmp_path / "conf")
        )


@pytest.mark.slow
def test_a_champion_and_a_challenger_have_their_own_code(shop: Shop, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, 600)
    (folder / "conf" / "features.py").write_text(DOUBLE)
    here = Shop(folder, shop.trained)
    periods = ('split.train=["2020-01-01","2020-01-12"]', 'split.valid=["2020-01-12","2020-01-15"]', "split.test=[]")
    champion = here.run("train", *periods)
    assert shell.main(["registry", "promote", "tiny", str(champion.directory), *overrides(folder)[2:4]]) == 0
    here.run("monitor", "monitor.model=tiny@champion", 'monitor.window=["2020-01-20","2020-01-25"]')
    (folder / "conf" / "features.py").write_text(DOUBLE.replace("2)", "3)"))
    policy = "{triggers: [age], max_age: 1d, valid_length: 3d, judge_length: 6d, maturity: 1d, gate: {min_rows: 20}}"
    run = here.run("retrain", f"retrain={policy}")
    challenger = Run.read(run.record["challenger_run"])
    codes = [item["config"]["features"]["views"]["mine"]["function"] for item in (champion.record, challenger)]
    assert codes[0] != codes[1] and run.metrics["retrain/started"] == 1
    assert {"retrain/roc_auc_champion", "retrain/roc_auc_challenger"} <= run.metrics.keys()


# ------------------------------------------------------------------------------------------------------------ trust


def test_the_code_of_a_model_from_elsewhere_needs_trust(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugins, "_HELD", {})
    run, words = elsewhere(shop, tmp_path)
    digest = plugins.Plugin("features.py", DOUBLE.encode()).digest
    refused = (
        rf"code must have run with the store .*\n  {run}/model/code/features.py, digest {digest}\n.*add trust={digest}"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=refused):
        engine.run("score", *words)
    with pytest.raises(UserError, match="code must have run with the store"):
        engine.load(run)
    with pytest.raises(UserError, match="code must have run with the store"):
        engine.run("score", *words, f"trust={'0' * 64}")
    assert not plugins.held()
    assert engine.load(run, trust=digest).predict(visits(50)).num_rows == 50
    assert engine.run("score", *words, f"trust={digest}").metrics["score/gate_rows"] > 0


def test_promoting_a_model_from_elsewhere_needs_trust_and_then_the_registry_knows_it(
    shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, words = elsewhere(shop, tmp_path)
    place = words[3:]
    assert shell.main(["registry", "promote", "tiny", str(run), *place]) == 1
    digest = plugins.Plugin("features.py", DOUBLE.encode()).digest
    assert f"add trust={digest}" in capsys.readouterr().err and not (tmp_path / "runs" / "registry" / "tiny").exists()
    assert shell.main(["registry", "promote", "tiny", str(run), *place, f"trust={digest}"]) == 0
    assert engine.run("score", "score.model=tiny@champion", *words[1:]).metrics["score/gate_rows"] > 0


def test_a_model_whose_code_was_changed_is_refused(shop: Shop, tmp_path: Path) -> None:
    run, words = elsewhere(shop, tmp_path)
    (run / "model" / "code" / "features.py").write_text(DOUBLE.replace("2)", "3)"))
    with pytest.raises(UserError, match=r"code/features.py is damaged"):
        engine.run("score", *words)


# ------------------------------------------------------------------------------------------------------- reproduce


@pytest.mark.slow
def test_a_run_reproduces_with_the_code_that_it_had(shop: Shop) -> None:
    (shop.folder / "conf" / "features.py").write_text("def double(rows): ...\n")  # edited since
    try:
        found = reproduce_run(shop.trained.directory, Options(code="current", store=shop.folder / "store"))
    finally:
        (shop.folder / "conf" / "features.py").write_text(DOUBLE)
    assert found["first_difference"] is None and found["promise"] == "equal bits"


def test_a_run_from_elsewhere_needs_trust_and_its_code_must_be_the_recorded_one(shop: Shop, tmp_path: Path) -> None:
    run, _ = elsewhere(shop, tmp_path)
    with pytest.raises(UserError, match=rf"{run}/code/features.py, digest"):
        reproduce_run(run, Options(code="current", store=tmp_path / "store"))
    (run / "code" / "features.py").write_text(DOUBLE.replace("2)", "3)"))
    with pytest.raises(UserError, match="another file, or an edited one"):
        reproduce_run(run, Options(code="current", store=tmp_path / "store"))


def test_the_code_of_the_models_of_a_run_is_listed_too(shop: Shop) -> None:
    scored = engine.run("score", f"score.model={shop.trained.directory}", TEST, *overrides(shop.folder)[1:])
    record = json.loads((scored.directory / "run.json").read_text())
    assert "plugins" not in record["config"] or record["config"]["plugins"] == []
    carried = reproduce._carried(record, scored.directory)
    assert [str(path.relative_to(shop.trained.directory)) for path in carried] == ["model/code/features.py"]


def test_two_runs_with_other_code_differ_in_the_files_digest(
    shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(shop.folder / "conf", tmp_path / "conf")
    (tmp_path / "conf" / "features.py").write_text(DOUBLE.replace("2)", "3)"))
    other = engine.run("train", *shop.words, config_dir=str(tmp_path / "conf"))
    assert shell.main(["compare", str(shop.trained.directory), str(other.directory), "--json"]) == 0
    text = capsys.readouterr().out
    assert "plugins" in text and "features.py@" in text
    assert other.record["chain"]["dataset"] == shop.trained.record["chain"]["dataset"]
    assert other.record["chain"]["features"] != shop.trained.record["chain"]["features"]


# -------------------------------------------------------------------------------------------------------------- Ray


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
def test_two_workers_compute_and_score_with_code_that_they_do_not_have(shop: Shop, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, 10)
    (folder / "conf" / "features.py").write_text(DOUBLE)
    months = visits(3000)
    for month in range(2):
        shifted: dict[str, Any] = {name: months[name] for name in months.column_names}
        for name in ("at", "paid_at"):
            shifted[name] = pa.compute.add(months[name], pa.scalar(month * 31 * 86_400_000_000, pa.duration("us")))
        shifted["visit"] = pa.compute.add(months["visit"], month * 10_000)
        pq.write_table(pa.table(shifted), folder / f"visits-{month}.parquet")
    (folder / "visits.parquet").unlink()
    other = Shop(folder, shop.trained)
    ray = ("cluster=ray", "cluster.workers=2")
    computed = other.run("features", *ray)
    here = other.run("features", f"paths.store={folder / 'fresh'}")
    assert computed.record["chain"] == here.record["chain"]
    words = (f"score.model={shop.trained.directory}", "score.between=[2020-01-01,2020-03-01]", "score.unit_rows=2048")
    scored = [
        engine.run("score", *overrides(folder, f"paths.store={shop.folder / 'store'}")[1:], *words, *more)
        for more in ((*ray, "score.features=compute"), ())
    ]
    assert scored[0].metrics["score/units_scored"] > 1
    assert predictions(scored[0]).equals(predictions(scored[1]))
