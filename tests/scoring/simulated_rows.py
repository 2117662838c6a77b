"""Rows encoded, scored and counted by GPU kernels in Numba's simulator, against the CPU; prints what was equal.

A process of its own, started with NUMBA_ENABLE_CUDASIM=1, which Numba reads when it is imported.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
warnings.simplefilter("error")
warnings.filterwarnings("ignore", category=RuntimeWarning)  # wrap-around of NumPy scalars, meant, in simulated threads

import engine  # noqa: E402
from engine.scoring import predictor as predictors  # noqa: E402
from engine.scoring import score as scoring  # noqa: E402
from engine.scoring.cuda_tiles import DeviceScorer  # noqa: E402
from engine.scoring.predictor import Predictor, load  # noqa: E402
from engine.scoring.read import predictions  # noqa: E402
from tests.tiny import overrides  # noqa: E402

TILE = 32


def scorer_of(predictor: Predictor, kernels: bool) -> DeviceScorer:
    """The device's code path on the CPU."""
    bundle = predictor.bundle
    return DeviceScorer(
        predictor.model.network, bundle.model["precision"], "cpu", TILE, plan=bundle.encoder.plan, kernels=kernels
    )


def raw_rows(predictor: Predictor) -> pa.Table:
    """Raw features with everything that is awkward: missing, infinite, far off, unseen."""
    rng = np.random.default_rng(3)
    columns = {}
    for feature in predictor.bundle.encoder.features:
        values = rng.normal(0, 3, 75)
        values[:9] = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e300, -1e300, 5e-324, 1e30]
        texts = [None, "shop-1", "unknown"] * 25
        columns[feature.name] = pa.array(values) if feature.kind == "numeric" else pa.array(texts)
    return pa.table(columns)


def blocks(predictor: Predictor) -> None:
    """Blocks, scores and profiles of all rows and of some."""
    on_cpu, on_device = (replace(predictor, scorer=scorer_of(predictor, kernels)) for kernels in (False, True))
    assert on_device.scorer is not None and on_device.scorer.encodes and not on_cpu.scorer.encodes  # type: ignore[union-attr]
    raw, spec = raw_rows(predictor), predictor.profile_spec
    assert spec is not None and len(spec.numeric) > 3
    want, found = on_cpu.scored(raw), on_device.scored(raw)
    for name in ("numeric", "codes", "scores"):
        assert getattr(found, name).tobytes() == getattr(want, name).tobytes(), name
    for good in (np.ones(75, bool), np.arange(75) % 3 > 0, np.zeros(75, bool)):
        assert found.count(spec, good).to_json() == want.count(spec, good).to_json()
    nothing = on_device.scored(raw.slice(0, 0))
    assert nothing.scores.shape == (0,) and nothing.count(spec, np.ones(0, bool)).rows == 0


def whole_run(folder: Path, model: Path, place: Path) -> None:
    """`score` itself: the same predictions and the same bytes of profile.json."""
    results = []
    for kernels in (False, True):
        made = []

        def opened(network, precision, device, plan=None, kernels=kernels, made=made):  # type: ignore[no-untyped-def]
            made.append(DeviceScorer(network, precision, "cpu", TILE, plan=plan, kernels=kernels))
            return made[-1]

        predictors.DeviceScorer = opened  # type: ignore[assignment]
        words = overrides(folder, f"score.model={model}", f"paths.runs={place}/{kernels}", "score.unit_rows=256")
        run = engine.run("score", *words, "score.between=[2020-01-27,2020-01-28]", config_dir=str(folder / "conf"))
        assert made and all(scorer.encodes == kernels for scorer in made)
        table = predictions(run.directory, store=str(folder / "store")).combine_chunks()
        results.append(((run.directory / "profile.json").read_bytes(), table, run.record["chain"]["scores"]))
    assert results[0][0] == results[1][0], "profile.json"
    assert results[0][1].equals(results[1][1]) and results[0][2] == results[1][2]


if __name__ == "__main__":
    shop, trained, place = map(Path, sys.argv[1:])
    blocks(load(trained, threads=1))
    print("blocks")  # noqa: T201
    scoring.device_of = lambda _: "cuda"
    whole_run(shop, trained, place)
    print("run")  # noqa: T201
