"""XGBoost as a grower of trees: cuts from exact quantiles of all rows, a part of the rows for each worker. The only module that
imports it.

Workers add their histograms through XGBoost's own collective. The cuts are the same everywhere and sums are exact, so the
trees are those of one worker.
"""

from __future__ import annotations

import contextlib
import importlib
import ipaddress
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.config.sections.training import TreesConfig
from engine.training.boosting.gradients import seed_of
from engine.training.boosting.grower import Rows, assembled, check_library, check_params
from engine.training.boosting.memory import columns_at_once, rows_at_once
from engine.training.trees import Trees

# What may be set in addition: it changes which splits are made, but no tree then depends on workers or on the order of rows.
ALLOWED = frozenset(("gamma", "interaction_constraints", "max_cat_threshold", "max_cat_to_onehot", "max_delta_step"))


LISTENING, ANY_ADDRESS = "0A", "00000000:"  # as the kernel writes them


class XgboostGrower:
    """Grows trees on the rows of this worker: every `world`-th, from `rank` on."""

    sums = "float32"

    def __init__(
        self, rows: Rows, settings: TreesConfig, seed: int, threads: int, rank: int = 0, world: int = 1
    ) -> None:
        self._xgboost = check_library("xgboost")
        self._rows, self._settings, self._seed = rows, settings, seed
        self._part = slice(rank, None, world)
        self._params = _params(settings, rows, threads)
        facts = {"nthread": threads, "enable_categorical": True, "max_bin": self._params["max_bin"]}
        reference = self._xgboost.QuantileDMatrix(cut_rows(rows, settings.bins), feature_types=_types(rows), **facts)
        self._data = self._xgboost.QuantileDMatrix(_in_parts(self._xgboost, rows, self._part), ref=reference, **facts)
        self._booster: Any = None
        self._grown = 0

    def grow(self, round_: int, gradient: NDArray[np.float32], hessian: NDArray[np.float32]) -> Trees | None:
        """One tree an output from [n, outputs] of all rows, of which this worker uses its own."""
        if self._booster is None or self._settings.column_fraction < 1:  # a new one has the seed of the round
            params = self._params | {"seed": seed_of(self._seed, round_)}
            self._booster, self._grown = self._xgboost.Booster(params, [self._data]), 0
        g, h = np.ascontiguousarray(gradient[self._part]), np.ascontiguousarray(hessian[self._part])
        self._booster.boost(self._data, iteration=self._grown, grad=g, hess=h)
        text = self._booster[self._grown : self._grown + 1].save_raw("json")
        self._grown += 1
        return trees_of(bytes(text), self._rows)


def _in_parts(library: Any, rows: Rows, part: slice) -> Any:
    """The rows of a part as an iterator of the library's, so that they lie in memory once, or only in a file."""
    places, count = range(len(rows.numeric))[part], rows_at_once(rows.numeric.shape[1] + rows.codes.shape[1])

    class Parts(library.DataIter):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.at = 0

        def reset(self) -> None:
            self.at = 0

        def next(self, input_data: Callable[..., None]) -> bool:
            if self.at >= len(places):
                return False
            taken = places[self.at : self.at + count]
            here = slice(taken.start, taken.stop, taken.step)
            block = np.concatenate([rows.numeric[here], rows.codes[here].astype(np.float32)], axis=1)
            input_data(data=block, label=np.zeros(len(block), np.float32), feature_types=_types(rows))
            self.at += count
            return True

    return Parts()


def _types(rows: Rows) -> list[str]:
    return ["float"] * rows.numeric.shape[1] + ["c"] * rows.codes.shape[1]


def cut_rows(rows: Rows, bins: int) -> NDArray[np.float32]:
    """float32[m, F + K]: rows whose distinct values are the cuts of each number and all codes of each category.

    Cuts are quantiles of all rows, without interpolation: they do not depend on the order of rows, nor on workers.
    """
    most = max([bins, 1, *rows.cardinalities])
    width = rows.numeric.shape[1]
    out = np.zeros((most, width + rows.codes.shape[1]), np.float32)
    several = columns_at_once(len(rows.numeric))
    for index in range(width):
        if index % several == 0:
            block = np.array(rows.numeric[:, index : index + several].T, order="C")
            block.sort(axis=1)
        values = block[index % several]
        cuts = _distinct(values)
        if len(cuts) > bins:
            cuts = np.unique(values[np.linspace(0, len(values) - 1, bins).round().astype(np.int64)])
        out[: len(cuts), index] = cuts
        out[len(cuts) :, index] = cuts[-1] if len(cuts) else 0.0
    for index, cardinality in enumerate(rows.cardinalities):
        out[:, width + index] = np.minimum(np.arange(most), cardinality - 1)
    return out


def _distinct(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The distinct ones of sorted values, NaN once; numpy's `unique` sorts again."""
    found = values[np.concatenate([[True], ~(values[1:] <= values[:-1])])[: len(values)]]
    return found[: np.count_nonzero(~np.isnan(found)) + 1]


def _params(settings: TreesConfig, rows: Rows, threads: int) -> dict[str, Any]:
    check_params(settings, "xgboost", ALLOWED)
    found: dict[str, Any] = dict(settings.params)
    found |= {
        "tree_method": "hist",
        "objective": "reg:squarederror",  # not used: gradients are given
        "base_score": 0.0,
        "eta": settings.learning_rate,
        "max_depth": settings.depth,
        "max_leaves": settings.leaves,
        "grow_policy": "lossguide" if settings.leaves else "depthwise",
        "lambda": settings.l2,
        "alpha": settings.l1,
        "min_child_weight": settings.min_child,
        "colsample_bytree": settings.column_fraction,
        "max_bin": max([settings.bins, 2]),
        "nthread": threads,
        "verbosity": 0,
    }
    if rows.outputs > 1:
        found |= {"objective": "multi:softprob", "num_class": rows.outputs}
    if any(rows.monotone):
        found["monotone_constraints"] = tuple([*rows.monotone, *[0] * rows.codes.shape[1]])
    return found


@contextlib.contextmanager
def collective(rank: int, world: int, address: str, broadcast: Callable[[Any], Any]) -> Iterator[None]:
    """The workers' collective of XGBoost, whose tracker listens on `address` of rank 0; nothing for one worker.

    `broadcast` gives every worker the value of rank 0.
    """
    if world == 1:
        yield
        return
    check_library("xgboost")
    communicator, trackers = importlib.import_module("xgboost.collective"), importlib.import_module("xgboost.tracker")
    tracker = None
    if rank == 0:
        tracker = trackers.RabitTracker(n_workers=world, host_ip=address)
        tracker.start()
    where = broadcast([address, int(tracker.worker_args()["dmlc_tracker_port"])] if tracker is not None else None)
    try:
        with communicator.CommunicatorContext(
            dmlc_communicator="rabit",
            dmlc_tracker_uri=where[0],
            dmlc_tracker_port=where[1],
            dmlc_task_id=f"{rank:06d}",
            dmlc_nworker=world,
        ):
            if ipaddress.ip_address(where[0]).is_loopback:
                refuse_other_machines()
            yield
    except BaseException:  # to wait for the tracker would be to wait for dead workers
        if tracker is not None:
            with contextlib.suppress(Exception):  # it complains of them
                tracker.free()
        raise
    if tracker is not None:
        tracker.wait_for()


def refuse_other_machines() -> int:
    """Bind this process's listeners on all addresses to the loopback device; returns how many there are.

    Workers of XGBoost listen on 0.0.0.0, whatever address their tracker has, and it has no setting for that. Linux only.
    """
    inodes = {}
    for line in _lines(Path("/proc/self/net/tcp")):
        words = line.split()
        if len(words) > 9 and words[3] == LISTENING and words[1].startswith(ANY_ADDRESS):
            inodes[f"socket:[{words[9]}]"] = words[1]
    bound = 0
    for entry in Path("/proc/self/fd").iterdir() if inodes else ():
        try:
            if os.readlink(entry) in inodes:
                with socket.socket(fileno=os.dup(int(entry.name))) as listener:
                    listener.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
                bound += 1
        except OSError:
            continue
    return bound


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").splitlines()
    except OSError:
        return []


def trees_of(text: bytes, rows: Rows) -> Trees:
    """The trees of a model's JSON. A number goes left where x < split, so the threshold is the float32 below."""
    found = json.loads(text)["learner"]["gradient_booster"]["model"]["trees"]
    parts = [_tree(tree, rows) for tree in found]
    nodes = [node for part in parts for node in part]
    split = np.array([node.get("split", 0.0) for node in nodes], np.float32)
    leaf = np.array(["value" in node for node in nodes], bool)
    threshold = np.where(leaf, np.float32(0), np.nextafter(split, np.float32(-np.inf)))
    return assembled("xgboost", XgboostGrower.sums, rows, [len(part) for part in parts], nodes, threshold)


def _tree(tree: dict[str, Any], rows: Rows) -> list[dict[str, Any]]:
    """Nodes in level order, the children of a node side by side."""
    width, queue, nodes, at = rows.numeric.shape[1], [0], [], 0
    of_sets = dict(zip(tree["categories_nodes"], range(len(tree["categories_nodes"])), strict=True))
    while at < len(queue):
        node = queue[at]
        at += 1
        left, cover = tree["left_children"][node], tree["sum_hessian"][node]
        if left < 0:
            nodes.append({"value": tree["split_conditions"][node], "cover": cover})
            continue
        column = tree["split_indices"][node]
        made: dict[str, Any] = {"column": column, "gain": tree["loss_changes"][node], "cover": cover}
        if node in of_sets:
            begin = tree["categories_segments"][of_sets[node]]
            right = tree["categories"][begin : begin + tree["categories_sizes"][of_sets[node]]]
            made["set"] = _words(set(range(rows.cardinalities[column - width])) - set(right))
        else:
            made |= {"split": tree["split_conditions"][node], "missing": bool(tree["default_left"][node])}
        nodes.append(made)
        queue += [left, tree["right_children"][node]]
    return nodes


def _words(codes: set[int]) -> NDArray[np.uint32]:
    """The set of codes as bits."""
    out = np.zeros(max(codes, default=-1) // 32 + 1, np.uint32)
    for code in codes:
        out[code >> 5] |= np.uint32(1) << np.uint32(code & 31)
    return out
