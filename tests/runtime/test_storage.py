"""A file is whole or absent, a folder likewise, and a path stays under its root."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from engine.config.sections.runtime import PathsConfig
from engine.config.tree import Config
from engine.data import order
from engine.errors import UserError
from engine.runtime import storage
from engine.runtime.registry import Registry
from engine.runtime.run import Run
from engine.scoring import export
from engine.training.checkpoint import save_checkpoint


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    storage.write_json(path, {"old": 1})
    with pytest.raises(RuntimeError), storage.atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"old": 1} and list(tmp_path.iterdir()) == [path]


def test_a_file_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.txt"
    with storage.atomic_path(path) as temporary:
        temporary.write_text("half")
        assert not path.exists()
        temporary.write_text("whole")
    assert path.read_text() == "whole" and list(path.parent.iterdir()) == [path]


def test_a_directory_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "set"
    with pytest.raises(RuntimeError), storage.atomic_directory(path) as temporary:
        (temporary / "a").write_text("1")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with storage.atomic_directory(path) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "a").write_text("1")
        assert not path.exists()
    assert (path / "sub" / "a").read_text() == "1" and list(tmp_path.iterdir()) == [path]


def test_of_two_that_write_the_same_directory_the_first_wins(tmp_path: Path) -> None:
    path = tmp_path / "set"
    with storage.atomic_directory(path) as slow:
        (slow / "a").write_text("slow")
        with storage.atomic_directory(path) as quick:
            (quick / "a").write_text("quick")
    assert (path / "a").read_text() == "quick" and list(tmp_path.iterdir()) == [path]


def test_a_directory_that_comes_at_the_last_moment_wins_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, rename = tmp_path / "set", os.rename

    def late(source: Path, target: Path) -> None:
        target.mkdir()
        (target / "a").write_text("theirs")
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    with storage.atomic_directory(path) as temporary:
        (temporary / "a").write_text("ours")
    assert (path / "a").read_text() == "theirs" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_a_message_that_names_the_place(tmp_path: Path, number: int) -> None:
    with pytest.raises(UserError, match=f"{tmp_path}.* is full; free some space"), storage.disk_errors(tmp_path):
        raise OSError(number, os.strerror(number))


def test_a_full_disk_as_arrow_says_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is full"), storage.disk_errors(tmp_path):
        raise OSError("[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device")


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), storage.disk_errors(tmp_path):
        raise FileNotFoundError(errno.ENOENT, "gone")


@pytest.mark.parametrize("parts", [("..",), ("a", "../../b"), ("/etc/passwd",), ("",), ("a\0b",)])
def test_a_path_that_leaves_its_root_is_refused(tmp_path: Path, parts: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="must stay inside"):
        storage.inside(tmp_path, *parts)


def test_a_link_is_followed_before_it_is_judged(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "in").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "out").symlink_to(tmp_path)
    assert storage.inside(tmp_path / "root", "in", "a").name == "a"
    with pytest.raises(UserError, match="which leads to"):
        storage.inside(tmp_path / "root", "out", "a")


def test_names_with_signs_of_urls_are_names(tmp_path: Path) -> None:
    assert storage.inside(tmp_path, "a#b?c").name == "a#b?c"


def test_a_number_that_json_does_not_have_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        storage.write_json(tmp_path / "b.json", float("nan"))
    assert not (tmp_path / "b.json").exists()


def test_parquet_comes_back_and_a_flipped_byte_is_found(tmp_path: Path) -> None:
    table = pa.table({"a": pa.array(range(10_000), pa.int64()), "b": pa.array(["x", None] * 5_000)})
    path = tmp_path / "a.parquet"
    storage.write_parquet(path, table)
    assert storage.read_parquet(path).equals(table) and storage.read_parquet(path, ["b"]).column_names == ["b"]
    broken = bytearray(path.read_bytes())
    broken[200] ^= 0xFF
    path.write_bytes(broken)
    with pytest.raises(OSError):
        storage.read_parquet(path)


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (calls.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda old, new: (calls.append("replace"), replace(old, new)))
    storage.write_text(tmp_path / "a", "text")
    assert calls == ["fsync", "replace", "fsync"]  # the file, its name, the folder that holds the name


@pytest.mark.parametrize(
    "write",
    [
        lambda path: storage.write_text(path, "x"),
        lambda path: storage.write_json(path, {}),
        lambda path: storage.write_parquet(path, pa.table({"x": [1]})),
        lambda path: storage.atomic_directory(path).__enter__(),
        lambda path: storage.make_folder(path),
    ],
)
def test_an_address_is_refused_where_files_are_written(write, tmp_path: Path, monkeypatch) -> None:
    """A path library makes `s3:/bucket/x` of `s3://bucket/x`: a folder named `s3:` in the working directory."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"must be a path of a file system, found an address: .*`score\.output`"):
        write(Path("s3://bucket/folder/x.parquet"))
    assert not list(tmp_path.iterdir())


def _full_from_now_on(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Every sync of a file fails, which is where a disk tells what it could not keep."""

    def refuse(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ENOSPC, errno.ESTALE])
def test_what_a_disk_refuses_at_the_sync_names_cause_and_place(tmp_path: Path, monkeypatch, number: int) -> None:
    _full_from_now_on(monkeypatch, number)
    path = tmp_path / "a.json"
    cause = "is full" if number == errno.ENOSPC else os.strerror(number)
    with pytest.raises(UserError, match=f"(?s){path}.*{cause}"):
        storage.write_json(path, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_folder_that_cannot_be_synced_is_one_warning(tmp_path: Path, monkeypatch, capsys, number: int) -> None:
    sync = os.fsync

    def refuse(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    monkeypatch.setattr(storage, "_unsynced", set())
    for name in ("a", "b"):
        storage.write_json(tmp_path / name, {})
    assert capsys.readouterr().err == (
        f"warning: {tmp_path} cannot be synced ({os.strerror(number)}): a power cut may lose what was just written\n"
    )


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_is_a_message_that_names_the_place(
    tmp_path: Path, monkeypatch, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UserError, match=f"{tmp_path}.* must be on a file system with locks.*{os.strerror(number)}"):
        Run.create("train", Config(paths=PathsConfig(runs=str(tmp_path / "runs"))), {})
    with pytest.raises(UserError, match="must be on a file system with locks"), Registry(tmp_path, "a").lock():
        pass


TABLE = pa.table(
    {"row_id": [f"row {number}" for number in range(20_000)], "at": np.random.default_rng(0).random(20_000)}
)


def _safetensors(path: Path) -> None:
    save_checkpoint(path, 1, {"weights": torch.zeros(50_000)}, {}, 1)


def _stream(kind: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with storage.atomic_path(path) as temporary, export.WRITERS[kind](temporary, TABLE.schema) as rows:
            rows(TABLE)

    return write


WRITERS: dict[str, Callable[[Path], None]] = {
    "json": lambda path: storage.write_json(path, list(range(50_000))),
    "parquet": lambda path: storage.write_parquet(path, TABLE),
    "safetensors": _safetensors,
    "arrow": lambda path: order._write_ipc(path, [TABLE], TABLE.schema),
    **{kind: _stream(kind) for kind in export.WRITERS},
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("size", [0, 3, 4_000, 100_000])
def test_a_writer_that_runs_out_of_room_at_any_byte_names_the_place(tmp_path: Path, name: str, size: int) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        with pytest.raises(UserError, match=f"{tmp_path}/a.* cannot be read or written: File too large"):
            WRITERS[name](tmp_path / "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


KILLED = """
import os, sys
from pathlib import Path
from engine.runtime import storage
with storage.atomic_directory(Path(sys.argv[1])) as temporary:
    (temporary / "part").write_text("half")
    print(temporary, flush=True)
    if sys.argv[2] == "die":
        os._exit(9)
    sys.stdin.read()
"""


def test_a_partial_folder_goes_with_the_next_one_when_its_writer_has_died_and_stays_while_it_lives(
    tmp_path: Path,
) -> None:
    def start(end: str) -> subprocess.Popen[str]:
        program = [sys.executable, "-c", KILLED, str(tmp_path / "a"), end]
        return subprocess.Popen(program, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)

    with start("die") as dead, start("wait") as alive:
        gone, busy = (Path(child.stdout.readline().strip()) for child in (dead, alive))  # type: ignore[union-attr]
        dead.wait()
        of_another_machine = tmp_path / ".a.00000000-11111111.tmp"
        of_another_machine.mkdir()
        assert storage.is_abandoned(gone) or not gone.exists()  # the other one may have been the next
        assert not storage.is_abandoned(busy) and not storage.is_abandoned(of_another_machine)
        with storage.atomic_directory(tmp_path / "b"):
            assert not gone.exists() and (busy / "part").read_text() == "half" and of_another_machine.exists()
        alive.communicate("")
    assert (tmp_path / "a" / "part").exists() and not busy.exists()
