"""Names of Ray that are not public: all in one file, and each is there in the installed Ray."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest

from engine.runtime.on_ray import ray_private

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("module", ray_private.NAMES)
def test_the_installed_ray_has_every_private_name(module: str) -> None:
    found = importlib.import_module(module)
    lacking = [name for name in ray_private.NAMES[module] if not hasattr(found, name)]
    assert not lacking, (
        f"this Ray lacks {module}.{lacking[0]}: mend engine/runtime/on_ray/ray_private.py, or bound Ray in setup.py"
    )


def test_the_installed_ray_has_the_private_members_of_public_classes() -> None:
    from ray._private import worker
    from ray.job_submission import JobSubmissionClient
    from ray.train.torch import TorchTrainer

    assert hasattr(JobSubmissionClient, ray_private.REQUEST)
    assert hasattr(TorchTrainer, ray_private.CALLBACKS)
    assert f'"{ray_private.NODE_ADDRESS}"' in inspect.getsource(worker.init)


def test_no_other_file_uses_them() -> None:
    private = {part for module in ray_private.NAMES for part in module.split(".") if part.startswith("_")}
    words = {*private, *(name for names in ray_private.NAMES.values() for name in names if name != "Config")}
    words |= {ray_private.REQUEST, ray_private.CALLBACKS, ray_private.NODE_ADDRESS}
    for path in sorted(ROOT.glob("engine/**/*.py")):
        if path.name != "ray_private.py":
            text = path.read_text()
            found = sorted(word for word in words - {"_internal", "_private"} if re.search(rf"\b{word}\b", text))
            found += re.findall(r"\bray(?:\.\w+)*\._[a-z]\w*", text)
            assert not found, (
                f"{path.relative_to(ROOT)} uses {found[0]}: it belongs into engine/runtime/on_ray/ray_private.py"
            )


def test_ray_has_an_upper_bound() -> None:
    assert re.search(r'"ray\[default,data,train\]>=[\d.]+,<[\d.]+"', (ROOT / "setup.py").read_text())
