"""Where a model runs is resolved once; a GPU that is asked for and absent is an error."""

from __future__ import annotations

import pytest
import torch

from engine.errors import UserError
from engine.training import device
from engine.training.device import Placement, describe_device, is_resident, prepare_backend, resolve_device


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """`gpu(True)`: what torch says of this machine."""
    return lambda found: monkeypatch.setattr(torch.cuda, "is_available", lambda: found)


@pytest.mark.parametrize(
    ("wanted", "found", "resolved"),
    [("auto", False, "cpu"), ("auto", True, "cuda"), ("cpu", True, "cpu"), ("cuda", True, "cuda")],
)
def test_a_device_is_resolved_by_what_there_is(config, gpu, wanted, found, resolved):
    gpu(found)
    assert resolve_device(config(train__device=wanted)) == resolved


def test_a_gpu_that_is_asked_for_and_absent_is_refused(config, gpu):
    gpu(False)
    with pytest.raises(UserError, match=r"train\.device=cuda needs an NVIDIA GPU, found none: torch .*device=cpu"):
        resolve_device(config(train__device="cuda"))


def test_a_resumed_run_takes_the_recorded_device_and_never_changes_it_silently(config, gpu):
    gpu(True)
    assert resolve_device(config(), recorded="cpu") == "cpu"
    gpu(False)
    with pytest.raises(UserError, match="this run began on one"):
        resolve_device(config(), recorded="cuda")


def test_on_a_cluster_what_counts_is_what_workers_are_given(config, gpu):
    gpu(False)  # a driver without a GPU says nothing of the workers
    with_gpus = config(cluster__kind="ray", cluster__gpus_per_worker=1)
    assert resolve_device(with_gpus) == "cuda"
    gpu(True)
    assert resolve_device(config(cluster__kind="ray")) == "cpu"
    with pytest.raises(UserError, match=r"cluster\.gpus_per_worker=0: set cluster\.gpus_per_worker=1"):
        resolve_device(config(cluster__kind="ray", train__device="cuda"))


def test_rows_stay_on_the_device_while_they_fill_the_stated_share():
    free = 1000
    assert is_resident(int(device.RESIDENT_SHARE * free), free)
    assert not is_resident(int(device.RESIDENT_SHARE * free) + 1, free)
    placed = Placement(False, 900, free)
    assert "streamed from host memory (60% of 1,000 free bytes" in placed.described()
    assert Placement.choose(10**15, torch.device("cpu")).resident


def test_tf32_is_off_as_stated(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    prepare_backend()
    assert asked == ["highest"] and device.TF32 is False
    assert describe_device("cpu")["kind"] == "cpu"


@pytest.mark.gpu
def test_a_card_is_described():
    facts = describe_device("cuda")
    assert facts["memory_bytes"] > 0 and facts["tf32"] is False and facts["name"]
