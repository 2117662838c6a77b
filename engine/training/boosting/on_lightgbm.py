"""LightGBM as a grower of trees: binned once, given gradients every round. The only module that imports it."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.config.sections.training import TreesConfig
from engine.training.boosting.gradients import seed_of
from engine.training.boosting.grower import Rows, assembled, check_library, check_params
from engine.training.trees import Trees

# What may be set in addition: it changes which splits are made, but no tree then depends on threads or on the order of rows.
ALLOWED = frozenset((
    "cat_l2", "cat_smooth", "interaction_constraints", "max_cat_threshold", "max_cat_to_onehot", "max_delta_step",
    "min_data_in_bin", "min_data_per_group", "min_gain_to_split", "monotone_constraints_method", "monotone_penalty",
    "path_smooth",
))  # fmt: skip


class LightgbmGrower:
    """Grows trees on rows that are binned once."""

    sums = "float64"

    def __init__(self, rows: Rows, settings: TreesConfig, seed: int, threads: int) -> None:
        self._lightgbm = check_library("lightgbm")
        self._rows, self._settings, self._seed = rows, settings, seed
        width, columns = rows.numeric.shape[1], rows.codes.shape[1]
        self._params = _params(settings, rows, threads)
        block = np.concatenate([rows.numeric, rows.codes.astype(np.float32)], axis=1) if columns else rows.numeric
        self._data = self._lightgbm.Dataset(
            block,
            np.zeros(len(block), np.float32),
            params=self._params,
            categorical_feature=list(range(width, width + columns)),
            feature_name=[f"c{index}" for index in range(width + columns)],
            free_raw_data=True,
        ).construct()
        self._booster: Any = None
        self._grown = 0

    def grow(self, round_: int, gradient: NDArray[np.float32], hessian: NDArray[np.float32]) -> Trees | None:
        """One tree an output from [n, outputs]; None where no split is worth it."""
        if self._booster is None or self._settings.column_fraction < 1:  # a new one has the seed of the round
            params = self._params | {"seed": seed_of(self._seed, round_)}
            self._booster, self._grown = self._lightgbm.Booster(params, self._data), 0
        g, h = gradient, hessian
        if gradient.shape[1] == 1:
            g, h = gradient[:, 0], hessian[:, 0]
        self._booster.update(fobj=lambda _margin, _data: (g, h))
        if self._booster.num_trees() < (self._grown + 1) * self._rows.outputs:
            return None
        text = self._booster.model_to_string(num_iteration=1, start_iteration=self._grown)
        self._grown += 1
        return trees_of(text, self._rows)


def _params(settings: TreesConfig, rows: Rows, threads: int) -> dict[str, Any]:
    check_params(settings, "lightgbm", ALLOWED)
    found: dict[str, Any] = dict(settings.params)
    found |= {
        "objective": "none",
        "num_class": rows.outputs,
        "learning_rate": settings.learning_rate,
        "num_leaves": settings.leaves or 2**settings.depth,
        "max_depth": settings.depth or -1,
        "lambda_l1": settings.l1,
        "lambda_l2": settings.l2,
        "min_sum_hessian_in_leaf": settings.min_child,
        "min_data_in_leaf": settings.min_rows,
        "feature_fraction": settings.column_fraction,
        "max_bin": settings.bins,
        "bin_construct_sample_cnt": max(len(rows.numeric), 1),  # bins of all rows: a sample depends on their order
        "deterministic": True,
        "force_col_wise": True,
        "feature_pre_filter": False,
        "num_threads": threads,
        "verbosity": -1,
    }
    if any(rows.monotone):
        found["monotone_constraints"] = [*rows.monotone, *[0] * rows.codes.shape[1]]
    return found


def trees_of(text: str, rows: Rows) -> Trees:
    """The trees of a model's text. Thresholds become the float32 below: x <= t is the same for float32 x."""
    parts = [_tree(block) for block in re.split(r"\nTree=\d+\n", text[: text.index("end of trees")])[1:]]
    nodes = [node for part in parts for node in part]
    threshold = np.array([node.get("threshold", np.inf) for node in nodes], np.float64)
    narrow = threshold.astype(np.float32)
    above = narrow.astype(np.float64) > threshold
    narrow[above] = np.nextafter(narrow[above], np.float32(-np.inf))
    narrow[np.isinf(threshold)] = 0
    return assembled("lightgbm", LightgbmGrower.sums, rows, [len(part) for part in parts], nodes, narrow)


def _tree(block: str) -> list[dict[str, Any]]:
    """Nodes in level order, the children of a node side by side."""
    field = dict(line.split("=", 1) for line in block.strip().splitlines() if "=" in line)

    def numbers(name: str, kind: Any) -> NDArray[Any]:
        return np.array(field.get(name, "").split(), kind)

    leaf, split = numbers("leaf_value", float), numbers("split_feature", int)
    if not len(split):
        return [{"value": float(leaf[0])}]
    seen, above = numbers("leaf_count", float), numbers("internal_count", float)
    left, right, gain = numbers("left_child", int), numbers("right_child", int), numbers("split_gain", float)
    threshold, kind = numbers("threshold", float), numbers("decision_type", int)
    edges, bits = numbers("cat_boundaries", int), numbers("cat_threshold", np.uint32)
    queue, nodes, at = [0], [], 0  # a node's number, or that of a leaf as -1 - number
    while at < len(queue):
        node = queue[at]
        at += 1
        if node < 0:
            nodes.append({"value": float(leaf[~node]), "cover": float(seen[~node])})
            continue
        found: dict[str, Any] = {"column": int(split[node]), "gain": float(gain[node]), "cover": float(above[node])}
        if kind[node] & 1:
            which = int(threshold[node])
            found["set"] = bits[edges[which] : edges[which + 1]]
        else:
            found["threshold"] = float(threshold[node])
            # where training saw nothing missing, a missing number is read as 0
            found["missing"] = bool(kind[node] & 2) if (kind[node] >> 2) & 3 == 2 else 0.0 <= threshold[node]
        nodes.append(found)
        queue += [int(left[node]), int(right[node])]
    return nodes
