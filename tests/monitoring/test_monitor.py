"""The monitor step from the shell: exit codes, drift.json, history, report; the taxi year that everybody remembers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from engine import __main__ as shell
from engine import api
from engine.features.profile import FORMAT
from engine.monitoring import window as monitored
from engine.monitoring.history import SCHEMA
from tests import tiny

FAST = ("train.epochs=1", "monitor.resamples=60", "monitor.alpha=0.05")


def command(folder: Path, name: str, *words: str) -> int:
    return shell.main([name, "--config-dir", str(folder / "conf"), *tiny.overrides(folder, *FAST, *words)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(folder, model) of the tiny experiment; its test period has shops whose sizes have grown."""
    folder = tiny.write_tiny(tmp_path_factory.mktemp("monitor"), rows=3000)
    assert command(folder, "train") == 0
    return folder, str(max((folder / "runs" / "train" / "tiny").iterdir()))


@pytest.fixture
def monitor(trained, capfd) -> Callable[..., tuple[int, Path]]:
    folder, model = trained

    def run(*words: str) -> tuple[int, Path]:
        capfd.readouterr()
        code = command(folder, "monitor", f"monitor.model={model}", *words)
        out = capfd.readouterr().out.splitlines()
        return code, Path(out[-1]) if out else Path()

    return run


def record(directory: Path) -> dict:
    return json.loads((directory / "drift.json").read_text())


def test_a_later_window_of_the_same_process_is_quiet_and_leaves_record_history_report(monitor) -> None:
    code, run = monitor("monitor.window=[2020-01-26,2020-01-30]", "monitor.alarm_on=[drift]")
    found = record(run)
    assert code == (2 if found["alarm"] else 0)
    assert found["verdict"] == "quiet", found["headline"]
    assert found["rows"] > 100
    assert found["window"] == ["2020-01-26T00:00:00+00:00", "2020-01-30T00:00:00+00:00"]
    calibration = found["calibration"]
    assert calibration["alpha"] == 0.05 and calibration["windows_needed"] == 40
    assert not calibration["enough"] and "cannot be promised" in calibration["words"]
    assert calibration["held_out"]["windows"] >= 2
    performance = found["performance"]["metrics"]["roc_auc"]
    assert performance["band"][0] < performance["band"][1]
    assert found["estimated"]["metrics"]["roc_auc"]["error"] is not None
    assert found["multivariate"]["domain_auc"]["value"] is not None
    table = pq.read_table(run / "monitor" / "history.parquet")
    assert table.schema.equals(SCHEMA)
    names = {item["name"] for item in found["columns"]}
    current = table.filter(pc.equal(table["source"], "current")).to_pylist()
    assert names <= {row["column"] for row in current}
    report = (run / "report.html").read_text()
    assert "http://" not in report.replace("http://www.w3.org", "") and "<script src" not in report
    assert "Quiet" in report and "shop_count_2d" in report


def test_a_model_whose_bins_lie_on_data_values_is_monitored_with_a_warning(monitor, monkeypatch) -> None:
    # As if a later format had moved the edges.
    monkeypatch.setattr("engine.monitoring.monitor.BETWEEN_VALUES", FORMAT + 1)
    _, run = monitor("monitor.window=2020-01-27", "monitor.alarm_on=[drift]")
    assert "Train the model again" in (run / "run.log").read_text()


def test_windows_longer_than_the_data_are_left_out_with_the_reason(tmp_path: Path, capfd) -> None:
    folder = tiny.write_tiny(tmp_path, rows=3000)
    long = "features.views.shop.windows=[2d,60d]"
    assert command(folder, "train", long, "split.known_by=any") == 0  # the reference has every day
    model = max((folder / "runs" / "train" / "tiny").iterdir())
    assert json.loads((model / "model" / "reference.json").read_text())["history_days"] == 0
    words = [long, f"monitor.model={model}", "monitor.window=[2020-01-26,2020-01-30]", "monitor.alarm_on=[drift]"]
    found = {}
    for choice in ("leave_out", "judge"):
        capfd.readouterr()
        command(folder, "monitor", *words, f"monitor.rising={choice}")
        shown = capfd.readouterr()
        found[choice] = record(Path(shown.out.splitlines()[-1]))
        columns = {item["name"]: item for item in found[choice]["columns"]}
        assert columns["shop_count_2d"]["status"] == "quiet"
        assert (columns["shop_count_60d"]["status"] == "left out") == (choice == "leave_out")
    assert "left out, for they follow the time: shop_count_60d" in found["leave_out"]["headline"]
    assert found["judge"]["attribution"][0]["column"] == "shop_count_60d" and found["judge"]["attribution"][0]["alarm"]
    assert found["leave_out"]["causes"] == []
    assert (
        "drift in 1 of 13 columns: prediction" in found["leave_out"]["headline"]
    )  # what such values do to scores is seen


def test_replay_gives_the_same_bytes(monitor) -> None:
    runs = [monitor("monitor.window=2020-01-27", "monitor.alarm_on=[drift]")[1] for _ in range(2)]
    assert runs[0] != runs[1]
    for name in ("drift.json", "report.html", "monitor/history.parquet"):
        assert (runs[0] / name).read_bytes() == (runs[1] / name).read_bytes(), name
    assert str(runs[0].name) not in (runs[0] / "drift.json").read_text()


def test_a_report_tells_of_its_window_as_of_its_time_whatever_was_monitored_later(monitor) -> None:
    day = "monitor.window=2020-01-2{}"
    runs = [monitor(day.format(end), "monitor.alarm_on=[drift]")[1] for end in (7, 8, 7)]
    assert "2020-01-27" in (runs[1] / "report.html").read_text()
    assert (runs[0] / "report.html").read_bytes() == (runs[2] / "report.html").read_bytes()


def test_a_scoring_run_is_monitored_by_its_stored_profile_with_the_same_verdict(trained, monitor, capfd) -> None:
    folder, model = trained
    between = "score.between=[2020-01-26,2020-01-30]"
    assert command(folder, "score", f"score.model={model}", between) == 0
    scored = capfd.readouterr().out.splitlines()[-1]
    code, run = monitor(f"monitor.run={scored}")
    _, sliced = monitor("monitor.window=[2020-01-26,2020-01-30]")
    stored, whole = record(run), record(sliced)
    assert stored["profile"] == whole["profile"]
    assert stored["columns"] == whole["columns"]
    assert stored["calibration"] == whole["calibration"]
    assert stored["performance"] == whole["performance"]
    assert stored["estimated"] == whole["estimated"] and "labels of recent days" in stored["estimated"]["method"]
    assert code == (2 if stored["alarm"] else 0)
    assert "no rows" in stored["multivariate"]["pca"]["reason"]
    assert stored["operational"]["rows_per_second"] > 0


def test_labels_of_other_rows_than_the_run_scored_are_not_taken_for_its_own(
    trained, monitor, capfd, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model = trained
    assert command(folder, "score", f"score.model={model}", "score.between=[2020-01-26,2020-01-30]") == 0
    scored = capfd.readouterr().out.splitlines()[-1]
    original = monitored.predictions

    def of_others(directory: Path, **options: object) -> pa.Table:
        table = original(directory, **options)
        ids = pa.array([f"{text}0" for text in table["row_id"].to_pylist()])
        return table.set_column(table.column_names.index("row_id"), "row_id", ids)

    monkeypatch.setattr(monitored, "predictions", of_others)
    _, run = monitor(f"monitor.run={scored}")
    assert "the run scored other rows than the dataset now has" in json.dumps(record(run)["performance"])


def test_a_moved_column_is_an_alarm_with_exit_code_two_told_once(trained, tmp_path: Path, capfd) -> None:
    _, model = trained
    moved = tiny.write_tiny(tmp_path / "moved", rows=3000)
    table = pq.read_table(moved / "visits.parquet")
    late = pc.greater(table["at"], pa.scalar(tiny.START + 26 * 24 * tiny.H, pa.timestamp("us", tz="UTC")))
    grown = pc.if_else(late, pc.add(table["size"], 3.0), table["size"])
    pq.write_table(table.set_column(table.column_names.index("size"), "size", grown), moved / "visits.parquet")
    key = "-".join(("key", "of", "the", "door"))  # put together: a run keeps the patch of a changed tree
    words = ["monitor.window=[2020-01-27,2020-01-30]", f"monitor.model={model}", f"paths.runs={tmp_path / 'runs'}"]
    words += [
        f"++monitor.alerts.page={{kind: file, to: {tmp_path / 'alerts.jsonl'}}}",
        f"++monitor.alerts.chat={{kind: webhook, to: 'http://127.0.0.1:1/services/{key}', tries: 1}}",
        "monitor.business.size='mean(size)'",
        f"++monitor.alerts.mark={{kind: command, to: 'touch {tmp_path / 'ran'}'}}",
    ]
    for _ in range(2):
        capfd.readouterr()
        assert command(moved, "monitor", *words) == 2
    shown = capfd.readouterr()
    line = f"an alarm starts the command of monitor.alerts.mark in your config: touch {tmp_path / 'ran'}"
    assert line in shown.err and (tmp_path / "ran").exists()
    run = Path(shown.out.splitlines()[-1])
    found = record(run)
    assert found["verdict"] == "alarm"
    assert "alert chat: failed" in shown.err
    written = [path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert len(written) > 10 and not [text for text in [shown.err.encode(), *written] if key.encode() in text]
    assert found["attribution"][0]["column"] == "size"
    assert found["causes"][0].startswith("size: ")
    assert found["alarms"][0]["kind"] == "drift"
    assert found["business"]["size"]["value"] > 2.5
    told = [json.loads(line) for line in (tmp_path / "alerts.jsonl").read_text().splitlines()]
    assert len(told) == 1 and told[0]["causes"] == found["causes"]
    assert json.loads((run / "run.json").read_text())["alarms"]


def later(folder: Path, change: Callable[[pa.Table, pa.Array], pa.Table]) -> Path:
    """The tiny data, changed in the rows from 27 January on."""
    tiny.write_tiny(folder, rows=3000)
    table = pq.read_table(folder / "visits.parquet")
    late = pc.greater_equal(table["at"], pa.scalar(tiny.START + 26 * 24 * tiny.H, pa.timestamp("us", tz="UTC")))
    pq.write_table(change(table, late), folder / "visits.parquet")
    return folder


def test_a_window_whose_labels_are_all_negative_is_judged_and_alarms(trained, tmp_path: Path, capfd) -> None:
    def negative(table: pa.Table, late: pa.Array) -> pa.Table:
        bought = pc.if_else(late, pc.and_(table["bought"], False), table["bought"])
        return table.set_column(table.column_names.index("bought"), "bought", bought)

    folder, model = later(tmp_path / "negative", negative), trained[1]
    words = ["monitor.window=[2020-01-27,2020-01-30]", f"monitor.model={model}", "monitor.alarm_on=[performance]"]
    capfd.readouterr()
    assert command(folder, "monitor", *words) == 2
    shown = capfd.readouterr()
    run = Path(shown.out.splitlines()[-1])
    found = record(run)["performance"]
    assert found["metrics"]["roc_auc"]["value"] is None and found["status"] == "alarm"
    assert "ece" in found["alarming"]
    assert found["labels_moved"] == ["positive_rate"] and "labels moved: positive_rate 0 against" in shown.err
    report = (run / "report.html").read_text()
    assert "positive_rate of the labels" in report and "roc_auc not computable" in report


def test_labels_that_cannot_be_matched_are_exit_code_three(trained, tmp_path: Path, capfd) -> None:
    folder, model = trained
    assert command(folder, "score", f"score.model={model}", "score.between=[2020-01-26,2020-01-28]") == 0
    scored = capfd.readouterr().out.splitlines()[-1]
    fewer = later(tmp_path / "fewer", lambda table, late: table.filter(pc.invert(late)))
    words = [f"monitor.model={model}", f"monitor.run={scored}"]
    assert command(fewer, "monitor", *words) == 3
    shown = capfd.readouterr()
    run = Path(shown.out.splitlines()[-1])
    assert record(run)["verdict"] == "cannot be judged"
    assert "CANNOT BE JUDGED: performance: quality cannot be judged" in shown.err
    assert json.loads((run / "run.json").read_text())["unjudged"]
    assert command(fewer, "monitor", *words, "monitor.alarm_on=[drift]") == 0
    assert command(fewer, "monitor", *words, "monitor.labels=false") == 0


def test_labels_that_are_not_asked_for_are_not_read(monitor, trained, capfd) -> None:
    folder, model = trained
    between = "[2020-01-26,2020-01-28]"
    assert command(folder, "score", f"score.model={model}", f"score.between={between}") == 0
    scored = capfd.readouterr().out.splitlines()[-1]
    words = ["monitor.labels=false", "monitor.business.mean='mean(score)'", "monitor.business.paid='mean(label)'"]
    for place in (f"monitor.window={between}", f"monitor.run={scored}"):
        _, run = monitor(place, *words)
        found = record(run)
        assert found["performance"] == {
            "alarm": False,
            "status": "not asked",
            "reason": "not computable, because labels were not asked for (monitor.labels=false)",
        }
        assert found["business"]["mean"]["value"] is not None
        assert found["business"]["paid"]["status"] == "waiting"


def test_a_window_without_rows_is_no_quiet_window(monitor) -> None:
    code, run = monitor("monitor.window=2021-05")
    found = record(run)
    assert code == 2
    assert {item["status"] for item in found["columns"]} == {"not computable", "alarm"}
    assert "not computable" in found["headline"]
    assert "reason" in found["performance"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "monitor.window"),
        (["monitor.window=2020-13"], "2020-13"),
        (["monitor.window=2020-01-27", "monitor.run=somewhere"], "either"),
        (["monitor.run=/nowhere"], "/nowhere"),
        (["monitor.window=2020-01-27", "monitor.thresholds.sise=1"], "'size'"),
        (["monitor.window=2020-01-27", "monitor.floors.pssi=1"], "'psi'"),
        (["monitor.window=2020-01-27", "monitor.floors.psi=inf"], "finite"),
        (["monitor.window=2020-01-27", "monitor.thresholds.size=nan"], "finite"),
        (["monitor.window=2020-01-27", "monitor.business.x='mean(amout)'"], "'amout'"),
        (["monitor.window=2020-01-27", "monitor.business.x='__import__(size)'"], "__import__"),
    ],
)
def test_mistakes_are_one_message_and_exit_code_one(trained, capfd, words, message) -> None:
    folder, model = trained
    capfd.readouterr()
    assert command(folder, "monitor", f"monitor.model={model}", *words) == 1
    error = capfd.readouterr().err
    assert message in error
    assert "Traceback" not in error


# ------------------------------------------------------------------------------------------------------------- taxi


def taxi(shared_data: Path, folder: Path, experiment: str, command: str, *words: str):
    return api.run(
        command,
        f"+experiment={experiment}",
        f"data.path={shared_data / 'taxi'}",
        f"paths.store={folder / 'store'}",
        f"paths.runs={folder / 'runs'}",
        "resources.threads=2",
        *words,
    )


def months(first: str, count: int) -> list[str]:
    year, month = map(int, first.split("-"))
    return [f"{year + (month - 1 + k) // 12}-{(month - 1 + k) % 12 + 1:02d}" for k in range(count)]


def watch(shared_data: Path, folder: Path, experiment: str, windows: list[str], *words: str) -> dict[str, dict]:
    model = taxi(shared_data, folder, experiment, "train", "model.hidden=[64]", *words).directory
    found = {}
    for window in windows:
        asked = ("monitor.window=" + window, f"monitor.model={model}", "monitor.multivariate=false")
        run = taxi(shared_data, folder, experiment, "monitor", *asked)
        found[window] = record(run.directory) | {"exit": 2 if run.alarms else 0}
    return found


def test_taxi_is_quiet_in_an_ordinary_month_and_names_the_places_in_april_2020(shared_data, tmp_path) -> None:
    found = watch(shared_data, tmp_path, "taxi", ["2019-10", "2020-04"], "train.epochs=2")
    assert found["2019-10"]["exit"] == 0, found["2019-10"]["headline"]
    assert found["2020-04"]["exit"] == 2
    assert found["2020-04"]["attribution"][0]["column"] in ("pickup_location_id", "dropoff_location_id")


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["taxi", "taxi_card"])
def test_taxi_alarms_every_month_from_april_2020_and_never_before(shared_data, tmp_path, experiment) -> None:
    quiet, loud = months("2019-07", 8), months("2020-04", 9)
    found = watch(shared_data, tmp_path, experiment, quiet + loud)
    assert {window: found[window]["exit"] for window in quiet} == dict.fromkeys(quiet, 0)
    assert {window: found[window]["exit"] for window in loud} == dict.fromkeys(loud, 2)
    causes = {found[window]["attribution"][0]["column"] for window in loud}
    assert causes <= {"pickup_location_id", "dropoff_location_id"}
