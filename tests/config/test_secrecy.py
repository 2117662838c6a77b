"""One helper knows secrets: by key, by form, by the environment; and masks each part in every form that text gives it."""

from __future__ import annotations

import json

import pytest

from engine.config import compose, secrecy
from engine.errors import UserError

# Put together here: a run keeps the patch of an uncommitted tree, this file included.
TOKEN = "-".join(("canary", "t0ken", "<&'", "7f3a"))
WORDS = {
    "tracking.api_key=abc": "tracking.api_key=***",
    "data.path=s3://me:hunter2@h/x": "data.path=s3://me:***@h/x",
    "data.path=https://h/x?X-Amz-Signature=0a1b2c&part=2": "data.path=https://h/x?X-Amz-Signature=***&part=2",
    "data.path=https://h/x?part=2&sig=0a1b2c": "data.path=https://h/x?part=2&sig=***",
    "+monitor.alerts.a.to=https://h/T0": "+monitor.alerts.a.to=***",
    "+data.sources.a.endpoint=https://hooks.slack.com/services/T0/B0/x": "+data.sources.a.endpoint=https://hooks.slack.com/***",
    "registry.why=Bearer 0123456789abc": "registry.why=Bearer ***",
    "registry.why=AKIA" + "A1" * 8: "registry.why=***",
}


@pytest.fixture
def user_conf(tmp_path):
    """Write the text as an experiment called `own`; the folder for --config-dir."""

    def write(text: str) -> str:
        (tmp_path / "experiment").mkdir(exist_ok=True)
        (tmp_path / "experiment" / "own.yaml").write_text(f"# @package _global_\n{text}")
        return str(tmp_path)

    return write


@pytest.mark.parametrize("word", WORDS)
def test_a_secret_of_each_form_is_masked_in_a_word(word: str) -> None:
    assert secrecy.masked_word(word) == WORDS[word] and secrecy.is_secret_word(word)


@pytest.mark.parametrize(
    "word",
    [
        "train.lr=1",
        "tracking.api_key=${oc.env:KEY}",
        "+monitor.alerts.a.to=https://h/${oc.env:T}",
        "data.path=s3://b/k?part=2",
    ],
)
def test_what_is_no_secret_stays(word: str) -> None:
    assert not secrecy.is_secret_word(word)


def test_a_secret_beside_a_reference_is_one() -> None:
    assert secrecy.is_secret_word("+data.sources.a.endpoint=http://me:hunter2@h/${oc.env:T}")


def test_each_part_of_a_composed_value_is_masked_alone_and_in_every_form(monkeypatch, user_conf) -> None:
    monkeypatch.setenv("A_PART", TOKEN)
    monkeypatch.setenv("A_FOLDER", "/usr")
    text = """
monitor: {alerts: {ops: {kind: command, to: '${oc.env:A_FOLDER}/bin/sh -c "curl -H x:${oc.env:A_PART} h"'}}}
"""
    composed = compose.compose(["+experiment=own"], user_conf(text))
    assert TOKEN in composed.config.monitor.alerts["ops"].to and TOKEN in composed.secrets
    assert "/usr" not in composed.secrets
    assert TOKEN not in compose.to_yaml(composed.saved) and "${oc.env:A_PART}" in compose.to_yaml(composed.saved)
    for said in (
        TOKEN,
        json.dumps(TOKEN),
        repr(TOKEN),
        "canary-t0ken-&lt;&amp;&#39;-7f3a",
        "canary-t0ken-%3C%26%27-7f3a",
    ):
        shown = secrecy.redact(f"sh: {said}: not found", composed.secrets)
        assert "canary" not in shown and "7f3a" not in shown and "not found" in shown


def test_what_the_shell_has_put_into_a_word_is_masked_too(monkeypatch) -> None:
    monkeypatch.setenv("OPS_WEBHOOK", "https://h.example/canary-t0ken")
    word = "registry.why='sent to https://h.example/canary-t0ken'"
    composed = compose.compose([word])
    assert composed.saved["registry"]["why"] == "sent to ***" and composed.overrides == ("registry.why='sent to ***'",)
    assert secrecy.is_secret_word(word)


def test_a_refused_value_of_the_environment_is_not_quoted(monkeypatch, user_conf) -> None:
    monkeypatch.setenv("A_PART", TOKEN)
    for value in ("${oc.env:A_PART}", "${oc.decode:'{${oc.env:A_PART}'}"):
        with pytest.raises(UserError) as caught:
            compose.compose(["+experiment=own"], user_conf(f'train: {{lr: "{value}"}}\n'))
        assert "train.lr" in str(caught.value) and "canary" not in str(caught.value)


def test_numbers_stay_numbers_and_short_values_mask_no_part_of_a_word() -> None:
    assert secrecy.masked({"rows": 8080, "at": "h:8080"}, lambda text: secrecy.redact(text, ["8080"])) == {
        "rows": 8080,
        "at": "h:***",
    }
    assert secrecy.redact("production of prod", ["prod"]) == "production of ***"


PATCH = """diff --git a/engine/x.py b/engine/x.py
--- a/engine/x.py
+++ b/engine/x.py
@@ -1,3 +1,6 @@
 def token(words): return words[0]
+token = token_of(text)
+api_key = "c4nary-{n}-written"
+PASSWORD: c4nary{n}99
+url = "https://me:c4nary-pw-{n}@h/x"
+-----BEGIN RSA PRIVATE KEY-----
+c4narykeymaterial
+-----END RSA PRIVATE KEY-----
diff --git a/.env b/.env
--- a/.env
+++ b/.env
@@ -1 +1 @@
-A=c4nary
+A=c4nary-new
diff --git a/keys/tls.pem b/keys/tls.pem
deleted file mode 100644
--- a/keys/tls.pem
+++ /dev/null
@@ -1 +0,0 @@
-c4nary
diff --git a/README.md b/README.md
--- a/README.md
+++ b/README.md
@@ -1 +1 @@
-a
+b
"""


def test_a_patch_keeps_its_lines_and_loses_secrets_and_files_that_hold_them() -> None:
    kept, lacking = secrecy.masked_patch(PATCH.replace("{n}", "1"))
    assert "c4nary" not in kept
    assert lacking == ["engine/x.py (4 lines masked)", ".env (left out)", "keys/tls.pem (left out)"]
    assert "+token = token_of(text)\n" in kept and kept.endswith("-a\n+b\n") and '+api_key = "***"\n' in kept
    assert secrecy.masked_patch(kept)[0] == kept


def test_an_error_and_its_causes_lose_their_secrets() -> None:
    with pytest.raises(OSError) as caught, secrecy.masked_errors(["c4nary-value"]):
        try:
            raise ValueError("c4nary-value is bad")
        except ValueError as error:
            raise FileNotFoundError(2, "No such file", "/x/c4nary-value") from error
    assert str(caught.value) == "[Errno 2] No such file: '/x/***'" and str(caught.value.__cause__) == "*** is bad"


def test_errors_that_lead_back_to_each_other_are_masked_and_come_to_an_end() -> None:
    first, second, third = ValueError("opensesame one"), KeyError("opensesame two"), OSError(2, "opensesame three")
    first.__cause__, first.__context__, second.__context__ = second, third, first
    secrecy.hide_in(first, ["opensesame"])
    assert "opensesame" not in f"{first!r} {second!r} {third!r} {third.strerror}"
