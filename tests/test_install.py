"""What is installed works in any folder, and takes no name that is not its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engine.errors import UserError
from engine.runtime import environment
from engine.runtime.on_ray import cluster
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
Place = Callable[[Path], Path]


# ---------------------------------------------------------------------------------------- what hides a package


def folder_of(path: Path) -> None:
    (path / "notes").mkdir(parents=True)


def package_of(path: Path) -> None:
    path.mkdir(parents=True)
    (path / "__init__.py").write_text("")


def script_of(path: Path) -> None:
    path.with_suffix(".py").write_text("raise SystemExit('a script of somebody')\n")


@pytest.mark.parametrize("make", [package_of, script_of])
@pytest.mark.parametrize("name", ["kernels"])
def test_another_package_of_a_name_of_ours_is_named_with_what_works(tmp_path, process, name, make) -> None:
    make(tmp_path / name)
    done = process("--version")
    assert done.code == 1 and "Traceback" not in done.err
    assert f"the package {name!r} must be {ROOT / name}, found {tmp_path / name}" in done.err
    command = [sys.executable, "-P", "-m", "engine", "--version"]  # as the message says
    again = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
    )
    assert again.returncode == 0 and again.stdout.startswith("engine ")


def test_a_folder_that_python_takes_for_the_engine_is_named(tmp_path, monkeypatch) -> None:
    """As an editable install leaves it that answers after the current folder: `engine` is the folder, `engine.x` is ours."""
    (tmp_path / "engine").mkdir()
    hidden = type(sys)("engine")
    hidden.__path__ = [str(tmp_path / "engine")]  # type: ignore[attr-defined]
    hidden.__file__ = None
    monkeypatch.setitem(sys.modules, "engine", hidden)
    with pytest.raises(UserError, match=rf"the package 'engine' must be {ROOT}/engine, found {tmp_path}/engine"):
        environment.check_names()


def test_ours_are_found_where_they_are() -> None:
    environment.check_names()


@pytest.mark.parametrize(("make", "hidden"), [(package_of, True), (script_of, True), (folder_of, False)])
def test_what_rays_workers_would_import_in_place_of_the_engine_is_refused(tmp_path, monkeypatch, make, hidden) -> None:
    make(tmp_path / "engine")
    monkeypatch.chdir(tmp_path)
    assert bool(environment.hidden_from_workers(tmp_path)) == hidden
    if hidden:
        with pytest.raises(UserError, match=r"workers .* would import .*engine.* Start the command in another folder"):
            cluster.check_folder()
    else:
        cluster.check_folder()
    environment_of_the_repository = environment.hidden_from_workers(ROOT)
    assert not environment_of_the_repository


# ------------------------------------------------------------------------------------------------- installed


def copy_of_the_repository(target: Path) -> Path:
    """The files that git tracks, so that no earlier build is in the way."""
    names = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, names.split("\0")):
        if name.startswith(("engine/", "kernels/", "conf/")) or "/" not in name:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes((ROOT / name).read_bytes())
    return target


def make_environment(folder: Path, *install: str) -> Path:
    """Its Python: an environment with what is installed here besides the engine, and then `pip install` of the words."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "others.pth").write_text(str(Path(np.__file__).parents[1]) + "\n")
    words = ["install", "--no-deps", "--no-index", "--no-build-isolation", *install]
    subprocess.run([*PIP, "--python", str(python), *words], check=True, env=clean(), cwd=folder)
    return python


def clean() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


def started(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, env=clean(), capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip("setuptools")
    out = tmp_path_factory.mktemp("wheel")
    repository = copy_of_the_repository(tmp_path_factory.mktemp("repository") / "engine")
    words = ["wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(out), str(repository)]
    subprocess.run([*PIP, *words], check=True, env=clean())
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """Python of an environment with the wheel."""
    return make_environment(tmp_path_factory.mktemp("environment"), str(wheel))


@pytest.mark.slow
def test_a_wheel_has_two_names_and_the_choices_inside_the_package(wheel) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"engine", "kernels"}
    choices = {path.relative_to(ROOT).as_posix() for path in (ROOT / "conf").rglob("*.yaml")}
    assert {name.removeprefix("engine/") for name in names if name.startswith("engine/conf/")} == choices


@pytest.mark.slow
def test_an_installed_engine_works_from_any_folder(installed, tmp_path) -> None:
    command = installed.with_name("engine")
    digests = []
    for name, odd in (("plain", ()), ("odd", ("engine", "conf", "conf/experiment"))):
        folder = tmp_path / name
        tiny.write_tiny(folder / "mine")
        for part in odd:
            (folder / part).mkdir(parents=True)
        if odd:
            (folder / "engine" / "main.py").write_text("raise SystemExit('somebody else')\n")
            (folder / "conf" / "config.yaml").write_text("not: ours\n")
        shown = started([str(command), "--help"], folder)
        assert shown.returncode == 0 and "commands:" in shown.stdout, shown.stderr
        words = ["ingest", "--config-dir", "mine/conf", *tiny.overrides(Path("mine"))]
        for way in ([str(command)], [str(installed), "-m", "engine"]):
            done = started([*way, *words], folder)
            assert done.returncode == 0, done.stderr
            record = json.loads((folder / done.stdout.splitlines()[-1] / "run.json").read_text())
            digests.append((record["chain"]["dataset"], record["code"]["engine_digest"]))
    assert len(set(digests)) == 1
    assert digests[0][1] == environment.code()["engine_digest"]  # the same engine, wherever its choices lie


@pytest.mark.slow
def test_kernels_of_another_package_over_ours_are_named(wheel, tmp_path) -> None:
    python = make_environment(tmp_path / "environment", str(wheel))
    site = next(python.parents[1].glob("lib/python*/site-packages"))
    (site / "kernels" / "__init__.py").write_text('"""Kernels of somebody else."""\n')
    done = started([str(python.with_name("engine")), "--version"], tmp_path)
    assert done.returncode == 1 and "installed over it" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_an_installed_engine_works_where_a_script_has_its_name(installed, tmp_path) -> None:
    script_of(tmp_path / "engine")
    done = started([str(installed.with_name("engine")), "--version"], tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("engine "), done.stderr
    done = started([str(installed), "-P", "-m", "engine", "--version"], tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("engine "), done.stderr


@pytest.mark.slow
def test_an_editable_install_works_in_the_parent_of_the_clone(tmp_path) -> None:
    pytest.importorskip("setuptools")
    clone = copy_of_the_repository(tmp_path / "engine")
    python = make_environment(tmp_path / "environment", "--editable", str(clone))
    for folder in (tmp_path, clone, tmp_path / "environment"):
        for way in ([str(python), "-m", "engine"], [str(python.with_name("engine"))]):
            done = started([*way, "train", "--cfg", "job", "+experiment=flights"], folder)
            assert done.returncode == 0 and "name: flights" in done.stdout, (folder, done.stderr)
