"""The page over everything is whole, reaches for nothing outside, and what a file says can neither steer it nor stop it."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest

from engine.lifecycle import ui
from engine.runtime import digest
from tests.lifecycle.recorded import make_run, sha

HOSTILE = '<script>alert("x")</script>&\u202e'
VERDICT = {
    "format": 3, "verdict": "alarm", "headline": "drift in 1 of 4 columns", "alarm": True,
    "window": ["2013-06-01T00:00:00", "2013-07-01T00:00:00"], "rows": 28243,
}  # fmt: skip


def policy(name: str, mean: float) -> dict[str, Any]:
    figures = {"mean_metric": mean, "gain_over_never": 0.01, "regret_to_every": 0.0, "share_of_gain": 0.5}
    return {"name": name, "triggers": [], "window": "expanding", "retrains": 3, "promotions": 2, "seconds": 9.0,
            "periods": [], **figures}  # fmt: skip


def backtest(folder: Path, text: str) -> None:
    made = make_run(folder, "20260101T000010-bbbbbb", "backtest")
    policies = [policy(text, 0.731), policy("every", 0.742)]
    first = {"format": 1, "name": text, "metric": "roc_auc", "period": "month", "dataset": sha("d"), "seconds": 60.0}
    record = {**first, "first_model": {}, "retrain": {}, "policies": policies}
    (made / "backtest.json").write_text(json.dumps(record))


def sweep(folder: Path, text: str) -> None:
    made = make_run(folder, "20260101T000011-cccccc", "sweep")
    best = {"number": 0, "test": 0.751, "test_without_search": 0.744, "too_good_by": 0.01}
    record = {"format": 1, "name": text, "metric": "roc_auc", "higher_is_better": True, "dataset": sha("d"), "trials": [],
              "seeds": [], "best": best, "importance": {}, "seconds": 60.0}  # fmt: skip
    (made / "sweep.json").write_text(json.dumps(record))


def registered(folder: Path, source: str, text: str) -> None:
    """A version that is the champion, by its records alone."""
    place = folder / "runs" / "registry" / "shop"
    (place / "versions" / sha("a")).mkdir(parents=True)
    facts = {"format": 1, "digest": sha("a"), "seal": sha("b"), "registered": "2026-01-01T00:00:00+00:00",
             "source": source, "metric": {"name": text, "value": 0.75}}  # fmt: skip
    (place / "versions" / sha("a") / "version.json").write_text(json.dumps(facts))
    move = {"format": 1, "number": 1, "time": "2026-01-02T00:00:00+00:00", "action": "promote", "from": None,
            "to": sha("a"), "who": text, "why": text, "decision": None}  # fmt: skip
    (place / "moves").mkdir()
    (place / "moves" / "000001.json").write_text(json.dumps({**move, "check": digest.of_json(move)}))


def everything(folder: Path, text: str = "shop") -> Path:
    """A folder with a file of every kind that the page shows; returns the champion's run."""
    champion = make_run(folder, "20260101T000000-aaaaaa", name=text)
    make_run(folder, "20260101T000001-aaaaab", name=text, metrics={"test/roc_auc": 0.77})
    (champion / "report.html").write_text("report")
    failed = make_run(folder, "20260101T000002-aaaaac", name=text, status="failed", error=f"UserError: {text}")
    (failed / "DONE").unlink()
    window = make_run(folder, "20260101T000003-dddddd", "monitor", name=text, alarms=[text])
    (window / "drift.json").write_text(json.dumps({**VERDICT, "headline": text}))
    backtest(folder, text)
    sweep(folder, text)
    registered(folder, str(champion), text)
    return champion


def links(page: Path) -> list[Path]:
    return [(page.parent / unquote(html.unescape(found))) for found in re.findall(r'href="([^"]*)"', page.read_text())]


def test_the_page_shows_each_kind_and_its_path_comes_last(cli, workplace) -> None:
    everything(workplace)
    outcome = cli("ui")
    assert outcome.code == 0 and outcome.out.splitlines()[-1] == "runs/ui.html" and not outcome.err
    text = (workplace / "runs/ui.html").read_text()
    for said in (
        "roc_auc 0.75",
        "2013-06-01 to 2013-07-01",
        "28,243",
        "0.731",
        "0.742",
        "0.751",
        "train (3)",
        "1 failed",
    ):
        assert said in text, said
    assert '<div class="tile bad"><div class="label">Alarms</div><div class="value">1</div>' in text
    assert text.count("<polyline") == 1, "the metric of the trainings over time"


@pytest.mark.parametrize("out", ["runs/ui.html", "elsewhere/deep/page.html", "runs/train/shop/ui.html"])
def test_links_are_relative_and_lead_to_the_reports(cli, workplace, out) -> None:
    champion = everything(workplace)
    assert cli("ui", "--out", out).out.strip() == out
    found = links(workplace / out)
    assert len(found) == 2, "of the champion, and of its run"
    assert {path.resolve() for path in found} == {(champion / "report.html").resolve()}


def test_a_folder_that_is_named_like_an_address_is_still_a_folder(cli, workplace) -> None:
    made = make_run(workplace, "javascript:alert(1)")
    (made / "report.html").write_text("report")
    page = workplace / "runs/train/shop/ui.html"
    assert cli("ui", "--out", str(page)).code == 0
    assert "javascript:" not in " ".join(re.findall(r'href="([^"]*)"', page.read_text()))
    assert links(page) == [made / "report.html"]


def test_a_report_that_leads_out_of_its_run_gets_no_link(cli, workplace) -> None:
    (workplace / "secret.html").write_text("secret")
    (make_run(workplace, "20260101T000000-aaaaaa") / "report.html").symlink_to(workplace / "secret.html")
    assert cli("ui").code == 0 and not links(workplace / "runs/ui.html")


def test_no_text_of_a_file_becomes_markup_or_steers_and_nothing_is_fetched(cli, workplace) -> None:
    everything(workplace, HOSTILE)
    assert cli("ui").code == 0
    text = (workplace / "runs/ui.html").read_text()
    assert text.count("&lt;script&gt;") > 8 and "<script" not in text and "\u202e" not in text
    assert not re.search(r"src\s*=|@import|url\(|https?://", text)
    whole = re.sub(r"<(meta)([^>]*)>", r"<\1\2/>", text.replace("<!doctype html>", "")).replace(
        "<details open>", "<details>"
    )
    ElementTree.fromstring(whole)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("train/shop/*0-aaaaaa/run.json", "{"),
        ("train/shop/*0-aaaaaa/metrics.json", "[]"),
        ("monitor/shop/*/drift.json", '{"format": 99}'),
        ("backtest/shop/*/backtest.json", '{"policies": 1}'),
        ("sweep/shop/*/sweep.json", "null"),
        ("registry/shop/moves/000001.json", "{}"),
        ("registry/shop/versions/*/version.json", "[" * 100_000),
    ],
)
def test_what_is_damaged_is_left_out_with_a_warning_and_counted(cli, workplace, file, text) -> None:
    everything(workplace)
    (damaged,) = (workplace / "runs").glob(file)
    damaged.write_text(text)
    outcome = cli("ui")
    assert outcome.code == 0 and "warning: " in outcome.err and damaged.name in outcome.err
    page = (workplace / "runs/ui.html").read_text()
    assert "of another version: 1." in page and page.count("train (") == 1


@pytest.mark.parametrize(("mode", "others"), [(0o755, True), (0o700, False)])
def test_the_page_is_private_where_a_run_is(cli, workplace, mode, others) -> None:
    everything(workplace).chmod(mode)
    assert cli("ui").code == 0
    assert bool((workplace / "runs/ui.html").stat().st_mode & 0o077) == others


def test_nothing_at_all_says_what_to_run(cli, workplace) -> None:
    assert cli("ui").code == 0
    text = (workplace / "runs/ui.html").read_text()
    for command in ("train", "monitor", "backtest", "sweep", "features", "registry promote"):
        assert f"`engine {command}" in text


@pytest.mark.parametrize("words", [["page.html"], ["--out", "page.txt"]])
def test_what_it_cannot_take_is_said(cli, words) -> None:
    outcome = cli("ui", *words)
    assert outcome.code == 1 and "--out" in outcome.err and words[-1] in outcome.err


@pytest.mark.parametrize("text", ["", "x", "0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59"])
def test_a_time_that_is_none_stands_as_it_is(text) -> None:
    assert ui._when(text) == text


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser_nothing_is_wider_than_the_window_and_the_colours_follow_the_reader(
    cli, workplace, width, scheme
) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("needs a browser: apt-get install chromium")
    everything(workplace, "a long name of an experiment, " * 12)
    assert cli("ui").code == 0
    page = html.escape((workplace / "runs/ui.html").read_text())
    (workplace / "probe.html").write_text(
        f'<iframe id="page" style="width:{width}px;border:0" srcdoc="{page}"></iframe><script>onload = () => {{'
        "const inner = document.getElementById('page').contentWindow, root = inner.document.documentElement;"
        "for (const part of inner.document.querySelectorAll('details')) part.open = true;"
        "document.title = [root.clientWidth, root.scrollWidth, inner.getComputedStyle(inner.document.body).color]"
        ".join(' ')}</script>"
    )
    words = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={workplace / 'profile'}",
    ]
    words += [f"--window-size={width + 100},900", f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"]
    shown = subprocess.run(
        [browser, *words, "--dump-dom", (workplace / "probe.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip
    room, wide, colour = re.findall(r"<title>(\d+) (\d+) (rgb.*?)</title>", shown)[0]
    assert int(room) == width and int(wide) <= width
    assert (max(map(int, re.findall(r"\d+", colour))) > 128) == (scheme == "dark")
