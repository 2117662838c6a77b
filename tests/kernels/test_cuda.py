"""The GPU twins against the CPU kernels: in Numba's simulator, and on a card where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from kernels import cuda

SCRIPT = Path(__file__).with_name("simulated_cuda.py")
# One process each: Numba reads the flag when it is imported, and this process has imported it.
CHECKS = (
    ("encode_numeric", "row_order", "masks", "no_fault"),
    ("profiles",),
)
ALL = [name for group in CHECKS for name in group]


def run(names: tuple[str, ...], **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *names],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("names", CHECKS, ids="+".join)
def test_twins_give_what_the_cpu_gives_in_the_simulator(names: tuple[str, ...]) -> None:
    assert run(names, NUMBA_ENABLE_CUDASIM="1").split() == [word for name in names for word in ("ok", name)]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ALL)
def test_twins_give_what_the_cpu_gives_on_a_card(name: str) -> None:
    assert run((name,)).split() == ["ok", name]


def test_without_a_gpu_every_entry_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from numba import cuda as target

    monkeypatch.setattr(cuda, "cuda", None)
    monkeypatch.setattr(target, "is_available", lambda: False)
    with pytest.raises(cuda.CudaMissing, match="need an NVIDIA GPU and its driver; none was found"):
        cuda.permutation(0, 5, 5000, 1, 0)


@pytest.mark.parametrize(
    ("gives", "fault"),
    [
        (AttributeError("module 'numpy' has no attribute 'row_stack'"), "AttributeError: module 'numpy' has no"),
        (np.zeros(cuda.THREADS, np.int64), "other numbers than the CPU"),
        (cuda.cpu_order.permutation(0, cuda.THREADS, cuda.cpu_order.SMALL + 1, 1, 0), ""),
    ],
)
def test_kernels_count_as_working_only_after_one_gave_the_numbers_of_the_cpu(
    monkeypatch: pytest.MonkeyPatch, gives: object, fault: str
) -> None:
    def permutation(*asked: int) -> object:
        if isinstance(gives, Exception):
            raise gives
        return types.SimpleNamespace(copy_to_host=lambda: gives)

    monkeypatch.setattr(cuda, "permutation", permutation)
    found = cuda.fault.__wrapped__()
    assert fault in found and bool(fault) == bool(found)


def test_importing_the_twins_does_not_load_the_cuda_target() -> None:
    code = "import kernels.cuda, sys; print('numba.cuda.cudadrv.driver' in sys.modules, kernels.cuda.cuda)"
    root = SCRIPT.parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "None"]


@pytest.mark.slow
def test_every_twin_compiles_for_a_card() -> None:
    """NVIDIA's compiler library comes as a wheel and needs no GPU: `pip install numba-cuda[cu13]` in any environment."""
    python = os.environ.get("ENGINE_CUDA_PYTHON", sys.executable)
    probe = subprocess.run([python, "-c", "import numba_cuda"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip("numba-cuda is not installed; ENGINE_CUDA_PYTHON names an interpreter that has it")
    script = SCRIPT.with_name("compile_cuda.py")
    done = subprocess.run([python, str(script)], capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    twice = ["_encode_numeric", "_mask", "_profile"]  # for two types of numbers
    names = sorted([*twice, *twice, "_permute"])
    assert sorted(done.stdout.splitlines()) == [f"ok {name}" for name in names]


@pytest.mark.parametrize("up", [True, False])
def test_edges_rounded_to_float32_divide_float32_values_as_the_doubles_do(up: bool) -> None:
    rng = np.random.default_rng(2)
    single = rng.normal(size=300).astype(np.float32)
    awkward = [0.0, 1e-46, -1e-46, 3e38, 1e39, -1e39, np.inf]
    edges = np.concatenate([rng.normal(size=300), single, np.nextafter(single.astype(float), np.inf), awkward])
    rounded = cuda._rounded(edges, np.float32, up)
    for value in single:
        if up:
            np.testing.assert_array_equal(value >= rounded, float(value) >= edges)
        else:
            np.testing.assert_array_equal(value <= rounded, float(value) <= edges)
