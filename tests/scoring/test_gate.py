"""The skew gate: an altered bundle is stopped before the first row, and what was altered is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from engine.config.sections.data import DataConfig
from engine.config.sections.features import EncodeConfig, FeaturesConfig
from engine.errors import UserError
from engine.features.encode import Encoder
from engine.features.spec import Feature
from engine.runtime import storage
from engine.runtime.run import Run
from engine.scoring.predictor import load
from engine.training import gate
from engine.training.bundle import seal
from engine.training.gate import check_gate
from tests.scoring.conftest import Shop


def change(state: Any, path: tuple[Any, ...], edit: Callable[[Any], Any]) -> None:
    *parents, last = path
    for name in parents:
        state = state[name]
    state[last] = edit(state[last])


def column(state: dict[str, Any], kind: str, name: str) -> int:
    return next(index for index, item in enumerate(state[kind]) if item["name"] == name)


ALTERATIONS: dict[str, tuple[str, Callable[[Any], None], str]] = {
    "fitted mean": (
        "features.json",
        lambda s: change(s, ("numeric", column(s, "numeric", "size"), "center_"), lambda x: x + 1e-3),
        "column 'size'",
    ),
    "fitted mean of a window": (
        "features.json",
        lambda s: change(s, ("numeric", column(s, "numeric", "shop_amount_max_2d"), "center_"), lambda x: x * 1.01),
        "column 'shop_amount_max_2d'",
    ),
    "fitted scale by one bit": (
        "features.json",
        lambda s: change(s, ("numeric", column(s, "numeric", "size"), "scale_"), lambda x: x * (1 + 2**-52)),
        "column 'size'",
    ),
    "vocabulary entry": (
        "features.json",
        lambda s: change(s, ("categorical", column(s, "categorical", "shop"), "known_", 0), lambda _: "shop-x"),
        "column 'shop'",
    ),
    "vocabulary order": (
        "features.json",
        lambda s: change(
            s, ("categorical", column(s, "categorical", "shop"), "known_"), lambda x: [x[1], x[0], *x[2:]]
        ),
        "column 'shop'",
    ),
    "rare entry that no row of the gate has": (
        "features.json",
        lambda s: change(s, ("categorical", column(s, "categorical", "shop"), "rare_"), lambda x: [*x, "never seen"]),
        "column 'shop'",
    ),
    "window length": (
        "spec.json",
        lambda s: change(s, ("features", "views", "shop", "windows"), lambda _: ["6h", "3d"]),
        "'shop_count_2d'",
    ),
    "lead of the decision": (
        "spec.json",
        lambda s: change(s, ("features", "as_of"), lambda _: "at - 2h"),
        "column 'shop_",
    ),
    "time zone": (
        "spec.json",
        lambda s: change(s, ("data", "time_zone"), lambda _: "America/New_York"),
        "column 'at_hour'",
    ),
    "when a value becomes known": (
        "spec.json",
        lambda s: change(s, ("data", "columns", "amount", "known_at"), lambda _: "prior"),
        "column 'shop_amount_",
    ),
}


def altered(shop: Shop, folder: Path, file: str, edit: Callable[[Any], None]) -> Path:
    shutil.copytree(shop.model / "model", folder)
    state = json.loads((folder / file).read_text())
    edit(state)
    storage.write_json(folder / file, state)
    return folder


@pytest.mark.parametrize("case", ALTERATIONS)
def test_an_altered_bundle_that_was_sealed_again_is_stopped_and_the_column_named(
    shop: Shop, tmp_path: Path, case: str
) -> None:
    file, edit, named = ALTERATIONS[case]
    folder = altered(shop, tmp_path / "model", file, edit)
    with pytest.raises(UserError, match="its digest differs from that of the file that was written"):
        load(folder)
    seal(folder)
    predictor = load(folder)
    with pytest.raises(UserError, match=f"the gate stopped scoring: .*{named}"):
        check_gate(predictor.bundle, predictor.model)


def test_scoring_stops_before_the_first_unit(shop: Shop, score: Callable[..., Run], tmp_path: Path) -> None:
    file, edit, _ = ALTERATIONS["fitted mean"]
    folder = altered(shop, tmp_path / "model", file, edit)
    seal(folder)
    with pytest.raises(UserError, match="the gate stopped scoring: encoded column 'size' differs for row"):
        score(f"score.model={folder}")
    (directory,) = (tmp_path / "runs" / "score" / "tiny").iterdir()
    assert not (directory / "parts").exists() and not (directory / "predictions").exists()


def test_altered_weights_are_stopped_at_the_score(shop: Shop, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(shop.model / "model", folder)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-2] ^= 0x40  # the last float of the last tensor
    (folder / "model.safetensors").write_bytes(bytes(weights))
    seal(folder)
    predictor = load(folder)
    with pytest.raises(UserError, match="score column 'score' differs"):
        check_gate(predictor.bundle, predictor.model)


def test_scores_agree_to_the_bit_here_and_to_the_stated_tolerance_elsewhere(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = load(shop.model)
    assert check_gate(predictor.bundle, predictor.model) == gate.ROWS

    def off_by(much: float) -> Any:
        return lambda numeric, codes: predictor.logits(numeric, codes) + much

    assert check_gate(predictor.bundle, predictor.model, logits_of=off_by(1e-5)) == gate.ROWS
    with pytest.raises(UserError, match="score column 'score' differs"):
        check_gate(predictor.bundle, predictor.model, logits_of=off_by(1e-2))
    monkeypatch.setattr(gate, "hardware", lambda: {"machine": "other"})
    assert check_gate(predictor.bundle, predictor.model) == gate.ROWS


def test_a_feature_that_is_not_a_number_equals_itself_and_nothing_else() -> None:
    nan = float("nan")
    seen = pa.array([1.0, nan, None, 2.0])
    assert gate._first_difference(seen, pa.array([1.0, nan, None, 2.0]), 0.0) is None
    assert gate._first_difference(seen, pa.array([1.0, nan, nan, 2.0]), 0.0) == 2
    assert gate._first_difference(seen, pa.array([1.0, nan, None, nan]), 0.0) == 3


def test_a_bundle_older_than_a_key_of_the_specification_passes(shop: Shop, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(shop.model / "model", folder)
    for path in (folder / "gate" / "state.json", folder / "spec.json"):
        state = json.loads(path.read_text())
        del state["features"]["views"]["shop"]["inclusive"]
        storage.write_json(path, state)
    seal(folder)
    predictor = load(folder)
    assert check_gate(predictor.bundle, predictor.model) == gate.ROWS


def test_columns_called_like_the_gate_s_own_words_or_like_an_indicator_are_compared_each() -> None:
    gaps = [None if k % 3 == 0 else float(k) for k in range(60)]
    table = pa.table({"order": gaps, "x": gaps, "x_missing": ["yes" if gap is None else "no" for gap in gaps]})
    features = [
        Feature("order", "numeric", "d"),
        Feature("x", "numeric", "d"),
        Feature("x_missing", "categorical", "d"),
    ]
    encoder = Encoder.fit(features, table.select, EncodeConfig(min_count=1))
    assert encoder.numeric_names == ["order", "order_missing", "x", "(x_missing)"]
    encoded = gate.encoded_table(encoder, *encoder.transform(table))
    assert encoded.num_columns == 5 and encoded["x_missing"].type == pa.int32()
    state = gate.state_of(encoder, DataConfig(), FeaturesConfig())
    assert set(state["columns"]) == {"order", "x", "x_missing"}
    other = Encoder.fit(features, table.slice(9).select, EncodeConfig(min_count=1))
    with pytest.raises(UserError, match="the fitted state of column 'order' is not what the model was trained with"):
        gate._compare_state(state, gate.state_of(other, DataConfig(), FeaturesConfig()))
    # A bundle of an older engine held fewer: what it holds is compared, and an equal model passes.
    old = {**state, "fitted": {**state["columns"], **state["fitted"]}}
    del old["columns"]
    now = gate.state_of(encoder, DataConfig(), FeaturesConfig())
    gate._compare_state(gate._filled(old, DataConfig(), now), now)
    with pytest.raises(UserError, match="the fitted state of column 'x'"):
        changed = gate.state_of(other, DataConfig(), FeaturesConfig())
        gate._compare_state(gate._filled(old, DataConfig(), changed), changed)
    assert gate._merged(encoder, encoded).column_names == ["order", "order_missing", "x", "x_missing"]
