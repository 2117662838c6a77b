"""`model=auto`: the kind of model, by the table in `rules`, from the task, rows, features and what is installed.

Trees come first where they can be grown: on the flights of 2013 they are ahead of the mlp in seven months of eight
(benchmarks/README.md, quality). Of networks TabM comes first, as in its authors' comparison, where its work, which grows with
rows x features x members, can be afforded.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from engine.config import schema
from engine.config.sections.training import AUTO, ModelConfig
from engine.config.tree import Config
from engine.runtime.run import Run
from engine.training.boosting.gradients import fits_trees
from engine.training.losses import loss_of
from engine.training.warm_start import start_bundle

TABM_VALUES = 2_000_000  # rows x features up to which a TabM trains within minutes on two cores
TABM = {"hidden": (512, 512), "embeddings": "ple"}  # conf/model/tabm.yaml, a test compares them


def rules(config: Config, rows: int, features: int) -> Iterator[tuple[bool, str, str]]:
    """The table: (whether a line holds, kind, why), of which the first that holds counts."""
    balanced, windowed = config.train.sampling == "balanced", config.train.order == "windowed"
    several = bool(config.train.targets)
    grown = fits_trees(loss_of(config.train)) and not balanced and not windowed and not several
    installed = importlib.util.find_spec("lightgbm") is not None
    why = (
        "lightgbm is not installed"
        if grown
        else "trees do not take several targets, this loss, sampling or order of rows"
    )
    yield grown and installed, "lightgbm", "it is installed and takes the loss"
    yield rows * features <= TABM_VALUES, "tabm", f"{why}; rows x features are at most {TABM_VALUES:,}"
    yield True, "mlp", f"{why}; rows x features are above {TABM_VALUES:,}"


def choose(config: Config, run: Run, rows: int, features: int) -> Config:
    """The config with its model as `auto` means it, which run.json records for resume and reproduction.

    `rows` of the training period, `features` before they are encoded. Training that continues from a model keeps its kind.
    """
    if config.model.kind != AUTO:
        return config
    found: Any = run.record.get("chosen_model")
    if found is None:
        start = start_bundle(config)
        if start is not None:
            kind, why = start.model["architecture"]["kind"], "training continues from one"
        else:
            kind, why = next((kind, why) for holds, kind, why in rules(config, rows, features) if holds)
        found = {"kind": kind} | (_tabm(config.model) if kind == "tabm" else {})
        run.log(f"train: model {kind} by rule for {rows:,} rows of {features:,} features: {why} (auto)")
    run.note(chosen_model=found)
    return replace(config, model=schema.build(ModelConfig, {**schema.plain(config.model), **found}, "model"))


def _tabm(model: ModelConfig) -> dict[str, Any]:
    """The settings of model=tabm that the config leaves at the defaults of other networks."""
    usual = ModelConfig()
    same = {name: value for name, value in TABM.items() if getattr(model, name) == getattr(usual, name)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in same.items()}
