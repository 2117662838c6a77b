"""Checkpoints are whole or do not count, and none of them runs code."""

from __future__ import annotations

import contextlib
import json
import pickle
import re
from pathlib import Path

import pytest
import torch

from engine.config.sections.training import ModelConfig
from engine.errors import UserError
from engine.runtime import digest, seal
from engine.training import checkpoint
from engine.training.checkpoint import load_checkpoint, newest_whole, save_checkpoint
from engine.training.model import architecture, build_model, from_architecture


class Marker:
    """A payload that would leave a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """One checkpoint."""
    return save_checkpoint(tmp_path / "checkpoints", 7, {"weights": torch.arange(5.0)}, {"plan": "p"}, keep=2)


def harmful(payload: bytes, folder: Path) -> None:
    """Put a payload in the place of the tensors, with a manifest that vouches for it."""
    (folder / checkpoint.TENSORS).write_bytes(payload)
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    manifest["files"][checkpoint.TENSORS] = {"bytes": len(payload), "sha256": digest.of_bytes(payload)}
    del manifest["check"]
    (folder / checkpoint.MANIFEST).write_text(json.dumps(seal.checked(manifest)))


def test_what_was_saved_is_loaded(saved):
    found = load_checkpoint(saved)
    assert (
        found.step == 7 and torch.equal(found.tensors["weights"], torch.arange(5.0)) and found.manifest["plan"] == "p"
    )


def test_no_byte_of_a_manifest_changes_without_a_word(saved):
    path = saved / checkpoint.MANIFEST
    content = path.read_bytes()
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with contextlib.suppress(UserError):
            assert {**load_checkpoint(saved).manifest, "check": "x"} == {**json.loads(content), "check": "x"}


def test_a_checkpoint_of_an_older_engine_is_taken(saved):
    path = saved / checkpoint.MANIFEST
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({name: item for name, item in manifest.items() if name != "check"} | {"format": 1}))
    assert load_checkpoint(saved).step == 7


def test_a_leftover_of_a_later_step_does_not_push_out_the_checkpoint_that_was_just_written(saved):
    """A kill in the middle of a save leaves a folder without a manifest; training went on from the one before."""
    root = saved.parent
    broken = root / f"step-{99:010d}"
    broken.mkdir()
    (broken / checkpoint.TENSORS).write_bytes(b"cut off")
    written = save_checkpoint(root, 8, {"weights": torch.ones(3)}, {"plan": "p"}, keep=1)
    assert checkpoint.candidates(root) == [written]
    assert newest_whole(root)[0].step == 8


@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_a_pickle_is_refused_and_its_code_does_not_run(saved, tmp_path, kind):
    """Field report J1."""
    marker = tmp_path / "marker"
    source = tmp_path / "payload"
    if kind == "torch":
        torch.save({"weights": Marker(marker)}, source)
    else:
        source.write_bytes(pickle.dumps(Marker(marker)))
    harmful(source.read_bytes(), saved)
    with pytest.raises(UserError, match="must be safetensors; pickled"):
        load_checkpoint(saved)
    assert not marker.exists()


def test_the_digest_is_checked_before_a_byte_is_interpreted(saved, monkeypatch):
    path = saved / checkpoint.TENSORS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    monkeypatch.setattr(checkpoint, "read_tensors", lambda *_: pytest.fail("the bytes were interpreted"))
    with pytest.raises(UserError, match="digest"):
        load_checkpoint(saved)


@pytest.mark.parametrize("length", [0, 4, 9, 40])
def test_a_header_that_lies_is_refused(saved, length):
    harmful((b"\xff" * 7 + b"\x7f" + b"{" * 40)[:length], saved)
    with pytest.raises(UserError, match="must be safetensors"):
        load_checkpoint(saved)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 99}', '{"format": 1}', '{"format": 1, "files": {"x": 1}}']
)
def test_a_broken_manifest_is_passed_over(saved, text):
    (saved / checkpoint.MANIFEST).write_text(text)
    found, passed_over = newest_whole(saved.parent)
    assert found is None and len(passed_over) == 1 and saved.name in passed_over[0]


def test_torch_load_is_never_called_anywhere():
    root = Path(checkpoint.__file__).resolve().parents[1]
    for path in root.rglob("*.py"):
        code = path.read_text()
        assert not re.search(r"(?<!safetensors\.)torch\.load\(", code) and "import pickle" not in code, path


def test_a_model_of_more_weights_than_a_checkpoint_holds_takes_no_memory():
    settings = {"hidden": [2**20, 2**20], "dropout": 0.0, "embedding_max": 8}
    described = architecture(build_model(ModelConfig(), 3, [], 1, 0)) | {"settings": settings}
    with pytest.raises(UserError, match=r"must describe at most 100 weights, found 1,099,5"):
        from_architecture(described, 100)
