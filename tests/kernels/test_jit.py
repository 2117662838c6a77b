from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import kernels
from kernels import check, jit
from kernels.warmup import FAMILIES, warmup

SOURCES = Path(kernels.__file__).parent


def python(code: str, folder: Path, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """Run `code` where `folder` is first on the path."""
    changed = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"} | environment
    kept = {k: v for k, v in changed.items() if v is not None}
    return subprocess.run(
        [sys.executable, "-c", code], env=kept, cwd=folder, capture_output=True, text=True, timeout=120
    )


def copy_of_kernels(folder: Path) -> Path:
    shutil.copytree(SOURCES, folder / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    return folder / "kernels"


HASH = "import numpy as np; from kernels.order import permutation; print(permutation(0, 3, 5000, 1, 1).tolist())"


@pytest.mark.skipif(jit.DISABLED, reason="nothing is compiled")
def test_i1_a_read_only_package_without_a_home_falls_back_with_one_warning(tmp_path):
    package = copy_of_kernels(tmp_path)
    (package / "__pycache__").touch()  # no folder can be made here, whoever we are
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    lost = {"HOME": None, "XDG_CACHE_HOME": None, "NUMBA_CACHE_DIR": None, "TMPDIR": str(scratch)}
    found = python(HASH, tmp_path, **lost)
    assert found.returncode == 0, found.stderr
    assert found.stderr.count("RuntimeWarning") == 1 and "compiled code goes to" in found.stderr
    assert list(scratch.rglob("*.nbi")) and not list((tmp_path / "kernels").rglob("*.nbi"))


@pytest.mark.skipif(jit.DISABLED, reason="nothing is compiled")
def test_i1_a_changed_helper_in_another_file_is_never_served_stale(tmp_path):
    package = copy_of_kernels(tmp_path)
    (package / "warmup.py").unlink()
    first = python(HASH, tmp_path, NUMBA_CACHE_DIR=str(tmp_path / "cache"))
    helper = package / "hashing.py"
    helper.write_text(
        helper.read_text().replace("_S27, _S31 = ", "_S31, _S27 = ").replace("np.uint64(27)", "np.uint64(26)")
    )
    second = python(HASH, tmp_path, NUMBA_CACHE_DIR=str(tmp_path / "cache"))
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert first.stdout != second.stdout


@pytest.mark.slow
@pytest.mark.skipif(jit.DISABLED, reason="this is that run")
def test_every_kernel_passes_its_tests_as_plain_python_too():
    """Of what is compiled a debugger and coverage see nothing, and indices are not checked: here they are."""
    tests = Path(__file__).parent
    words = ["-q", "-x", "-p", "no:cacheprovider", str(tests), f"--ignore={tests / 'test_cuda.py'}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words],
        env=os.environ | {"NUMBA_DISABLE_JIT": "1"},
        cwd=tests.parents[1],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "nothing is compiled" in done.stdout  # the reason of the tests that skip without a compiler


def test_cache_folder_without_any_place_is_none_with_a_warning(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.touch()
    for name in ("HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR"):
        monkeypatch.setenv(name, str(blocked))
    monkeypatch.setattr(jit.tempfile, "gettempdir", lambda: str(blocked))
    with pytest.warns(RuntimeWarning, match="every process compiles anew"):
        assert jit.choose_cache_dir(blocked) is None


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """NUMBA_CACHE_DIR, and sources beside which nothing can be written."""
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "__pycache__").touch()
    cache = tmp_path / "above" / "cache"
    cache.mkdir(parents=True, mode=0o755)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(cache))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return cache


def put_code(cache):
    folder = cache / f"jit-{jit.source_digest(cache.parents[1] / 'sources')}"
    (folder / "below").mkdir(parents=True)
    return folder


ATTACKS = {
    "everybody may write": lambda cache: cache.chmod(0o777),
    "everybody may write, with a sticky bit": lambda cache: cache.chmod(0o1777),
    "a group may write": lambda cache: (os.chown(cache, -1, 12345), cache.chmod(0o775)),
    "another owns it": lambda cache: os.chown(cache, 12345, -1),
    "another made our folder": lambda cache: os.chown(put_code(cache), 12345, -1),
    "our folder is open": lambda cache: put_code(cache).chmod(0o777),
    "a folder in ours is open": lambda cache: (put_code(cache) / "below").chmod(0o777),
    "the folder above is open": lambda cache: cache.parent.chmod(0o777),
}


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs users")
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_cache_folder_where_others_could_put_code_is_not_used(cache, attack):
    try:
        ATTACKS[attack](cache)
    except PermissionError:
        pytest.skip("only root can give a folder away")
    with pytest.warns(RuntimeWarning, match="NUMBA_CACHE_DIR=.* is not used, because others could put code there"):
        found = jit.choose_cache_dir(cache.parents[1] / "sources")
    assert found.is_relative_to(cache.parents[1] / "home") and found.stat().st_mode & 0o022 == 0


def test_what_the_warning_says_makes_the_folder_usable_again(cache):
    cache.chmod(0o777)
    with pytest.warns(RuntimeWarning, match="chmod go-w"):
        jit.choose_cache_dir(cache.parents[1] / "sources")
    cache.chmod(0o755)
    assert jit.choose_cache_dir(cache.parents[1] / "sources").is_relative_to(cache)


def test_the_cache_in_the_temporary_folder_is_for_this_user_alone(cache, monkeypatch):
    cache.chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "home"))
    temporary = cache.parents[1] / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(jit.tempfile, "gettempdir", lambda: str(temporary))
    with pytest.warns(RuntimeWarning) as told:
        found = jit.choose_cache_dir(cache.parents[1] / "sources")
    assert found.is_relative_to(temporary) and found.parent.stat().st_mode & 0o077 == 0 and len(told) == 2


@pytest.mark.parametrize("flag", sorted(jit.FORBIDDEN_FASTMATH))
def test_i2_no_kernel_may_assume_nan_or_infinity_away(flag):
    with pytest.raises(ValueError, match=rf"must keep NaN and infinity, found \['{flag}'\] on f"):

        @jit.njit(fastmath=["contract", flag])
        def f(x):
            return x


def test_only_jit_decides_how_to_compile():
    """No other file of CPU kernels imports Numba, and nothing here imports the engine."""
    for path in SOURCES.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            roots = {name.split(".")[0] for name in names}
            assert "engine" not in roots, path.name
            assert path.name in ("jit.py", "cuda.py") or not roots & {"numba", "llvmlite"}, path.name


# ------------------------------------------------------------------ threads
def test_i5_never_more_ranges_at_once_than_cpus(monkeypatch):
    monkeypatch.setattr(jit, "_slots", threading.BoundedSemaphore(1))
    running, most, lock = [0], [0], threading.Lock()

    def work(a, b):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        threading.Event().wait(0.002)
        with lock:
            running[0] -= 1
        return a, b

    callers = [threading.Thread(target=jit.run_ranges, args=(work, jit.split(8, 8), 4)) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert most[0] == 1


FORK = """
import os, sys, threading, numpy as np
from kernels.gather import gather_rows
block, index = np.ones((1000, 4), np.float32), np.arange(1000)
def call():
    return gather_rows(block, index, np.empty((1000, 4), np.float32), threads=2).sum()
threads = [threading.Thread(target=call) for _ in range(4)]
[t.start() for t in threads]; [t.join() for t in threads]
child = os.fork()
if child == 0:
    os._exit(0 if call() == 4000 else 3)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_i5_a_forked_child_computes_after_its_parent_used_threads():
    found = python(FORK, SOURCES.parent)
    assert found.returncode == 0, found.stderr


def test_results_come_in_order_and_errors_through():
    assert jit.run_ranges(lambda a, b: (a, b), jit.split(10, 3), 2) == [(0, 3), (3, 6), (6, 10)]
    assert jit.split(2, 5) == [(0, 1), (1, 2)] and jit.split(0, 3) == []
    with pytest.raises(ZeroDivisionError):
        jit.run_ranges(lambda a, b: 1 // a, [(0, 1), (1, 2)], 2)
    for threads in (0, -1, 1.5):
        with pytest.raises(ValueError, match=f"found {threads}"):
            jit.check_threads(threads)


# ------------------------------------------------------------------ integers
@pytest.mark.parametrize("a", [0, 1, 2**32, 2**63 + 12345, 2**64 - 1])
@pytest.mark.parametrize("b", [0, 3, 2**33 + 7, 2**64 - 1])
def test_wide_products(a, b):
    high, low = jit.mul128(np.uint64(a), np.uint64(b))
    assert (int(high) << 64) + int(low) == a * b
    assert int(jit.clz64(np.uint64(a))) == 64 - a.bit_length()


def test_i4_unsigned_and_signed_never_meet_as_floats():
    """uint64 2**63 + 1 is refused where int64 is meant, not rounded."""
    with pytest.raises(TypeError, match="fit int64, found dtype uint64"):
        check.integers("entity", np.array([2**63 + 1], np.uint64))


def test_warmup_names_every_family():
    seconds = warmup()
    assert set(seconds) == {*FAMILIES, "total"} and all(s >= 0 for s in seconds.values())


def test_work_that_runs_ranges_itself_waits_for_no_thread():
    """As many as there are CPUs hold a slot at once, and each asks for more."""
    count = jit.cpu_count()
    together = threading.Barrier(count)

    def work(start, stop):
        together.wait(20)
        with pytest.raises(ValueError, match="found 0"):
            jit.run_ranges(lambda a, b: b - a, [(0, 1)], 0)
        return jit.run_ranges(lambda a, b: (threading.get_ident(), start + a, start + b), [(0, 1), (1, 2)], 2)

    found = []
    ranges = [(i, i + 1) for i in range(count)]
    thread = threading.Thread(target=lambda: found.extend(jit.run_ranges(work, ranges, count)), daemon=True)
    thread.start()
    thread.join(30)
    assert len(found) == count, "it hangs"
    for place, parts in enumerate(found):
        assert [part[1:] for part in parts] == [(place, place + 1), (place + 1, place + 2)]
        assert parts[0][0] == parts[1][0]
    assert jit.run_ranges(lambda a, b: b - a, ranges, 1) == [1] * count, "the slots are free again"
