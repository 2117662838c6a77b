"""What a library is asked for: rows in, one tree for each output and round out."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.config.sections.training import TreesConfig
from engine.errors import UserError, nearest
from engine.training.target import PLAIN
from engine.training.trees import Trees
from kernels.trees import Forest

# The key that does the work of a library's parameter, for the message that refuses the parameter.
INSTEAD = {
    "model.trees.row_fraction": ("bagging_fraction", "bagging", "sub_row", "subsample", "bagging_freq", "subsample_freq"),
    "model.trees.column_fraction": ("feature_fraction", "sub_feature", "colsample_bytree"),
    "model.trees.learning_rate": ("learning_rate", "eta", "shrinkage_rate"),
    "model.trees.leaves": ("num_leaves", "num_leaf", "max_leaves", "max_leaf", "max_leaf_nodes"),
    "model.trees.depth": ("max_depth",),
    "model.trees.rounds": ("num_iterations", "num_iteration", "num_trees", "num_rounds", "num_boost_round", "n_estimators"),
    "model.trees.patience": ("early_stopping_round", "early_stopping_rounds", "early_stopping", "n_iter_no_change"),
    "model.trees.l1": ("lambda_l1", "reg_alpha", "l1_regularization"),
    "model.trees.l2": ("lambda_l2", "lambda", "reg_lambda", "l2_regularization"),
    "model.trees.min_child": ("min_sum_hessian_in_leaf", "min_sum_hessian", "min_hessian", "min_child_weight"),
    "model.trees.min_rows": ("min_data_in_leaf", "min_data", "min_child_samples", "min_samples_leaf"),
    "model.trees.bins": ("max_bin", "max_bins"),
    "model.trees.monotone": ("monotone_constraints", "monotone_constraint", "monotonic_cst", "mc"),
    "train.loss": ("objective", "objective_type", "application", "app", "loss"),
    "train.metric": ("metric", "metrics", "eval_metric"),
    "train.class_weight": ("scale_pos_weight", "is_unbalance", "unbalance"),
    "train.seed": ("seed", "random_seed", "random_state"),
    "cluster.threads": ("num_threads", "num_thread", "nthreads", "nthread", "n_jobs"),
}  # fmt: skip

LOST_WORKER = "/src/collective/"  # in an error of XGBoost: the file that raised it


@dataclass(frozen=True)
class Rows:
    """Encoded rows to grow trees on: numeric float32[n, F], codes int32[n, K], the codes that each category has, -1, 0 or 1 for
    each number: falls, free, rises with it.
    """

    numeric: NDArray[np.float32]
    codes: NDArray[np.int32]
    cardinalities: Sequence[int]
    outputs: int
    monotone: Sequence[int] = ()


class Grower(Protocol):
    """Grows trees; a round depends on its number and its gradients only. `sums`: the type that leaves are summed in."""

    sums: str

    def grow(self, round_: int, gradient: NDArray[np.float32], hessian: NDArray[np.float32]) -> Trees | None:
        """One tree an output from gradient and hessian [n, outputs]; None where no split is worth it."""


def assembled(
    kind: str,
    sums: str,
    rows: Rows,
    sizes: Sequence[int],
    nodes: Sequence[Mapping[str, Any]],
    threshold: NDArray[np.float32],
) -> Trees:
    """The trees of a library's nodes: `sizes` of the trees, and for all nodes in level order what they have of column, missing,
    set (uint32 words of codes), value, gain and cover, and the threshold float32[nodes]. `sums`: the type of the values.
    """
    sets = [node["set"] for node in nodes if "set" in node]
    is_set = np.array(["set" in node for node in nodes], bool)
    forest = Forest(
        root=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        column=np.array([node.get("column", -1) for node in nodes], np.int32),
        threshold=np.where(is_set, np.float32(0), threshold),
        missing_left=np.array([node.get("missing", False) for node in nodes], bool),
        set_of=np.where(is_set, np.cumsum(is_set) - 1, -1).astype(np.int32),
        set_at=np.concatenate([[0], np.cumsum([len(words) for words in sets])]).astype(np.int64),
        words=np.concatenate([np.empty(0, np.uint32), *sets]).astype(np.uint32),
        value=np.array([node.get("value", 0.0) for node in nodes], sums),
        base=np.zeros(rows.outputs),
    )
    gain = np.array([node.get("gain", 0.0) for node in nodes], np.float64)
    cover = np.array([node.get("cover", 0.0) for node in nodes], np.float64)
    return Trees(kind, rows.numeric.shape[1], list(rows.cardinalities), forest, gain, PLAIN, cover)


def check_library(name: str) -> Any:
    """The library, imported. Raises UserError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"model={name} needs the package {name}: pip install 'tabular-engine[{name}]'") from None


def check_params(settings: TreesConfig, kind: str, allowed: Set[str]) -> None:
    """Raise UserError for a parameter of model.trees.params that is not among `allowed`, names of the library `kind`.

    A list of what is allowed holds against every other name of a parameter, also of one that the library will add.
    """
    for name in settings.params:
        if name in allowed:
            continue
        key = next((key for key, names in INSTEAD.items() if name in names), None)
        near = nearest(name, allowed, listed=False)
        advice = f": use {key}" if key else f".{near}" if near else ": leave it out"
        listed = ", ".join(sorted(allowed))
        raise UserError(f"model.trees.params for model={kind} must be among {listed}, found {name}{advice}")


@contextlib.contextmanager
def library_errors(kind: str, settings: TreesConfig) -> Iterator[None]:
    """What the library refuses, as a UserError; but not the loss of another worker, after which the attempt is repeated."""
    library = check_library(kind)
    refused = library.basic.LightGBMError if kind == "lightgbm" else library.core.XGBoostError
    try:
        yield
    except refused as error:
        if LOST_WORKER in str(error):
            raise
        said = " ".join(str(error).partition("Stack trace")[0].split())
        given = (
            f" (params: {', '.join(settings.params)})" if settings.params else ""
        )  # LightGBM does not name the wrong one
        raise UserError(
            f"model={kind} cannot grow trees: {said}: correct model.trees{given}, or the features"
        ) from error
