"""Training examples: encoded rows in packed row-major blocks, in memory or mapped from files.

A batch is a gather of rows from these blocks. Workers of a cluster open the same files; no row is sent between
processes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypedDict

import numpy as np
from numpy.typing import DTypeLike, NDArray

from engine.errors import UserError
from engine.runtime import records, storage
from engine.training.target import Values

FORMAT = 1
ALIGNMENT = 64  # bytes: a cache line, and the widest vector register


def aligned_empty(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """An uninitialised C-contiguous array that is aligned to 64 bytes.

    Kernels of torch may use another code path, with other bits, for another alignment.
    """
    kind = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    offset = -raw.ctypes.data % ALIGNMENT
    return raw[offset : offset + size].view(kind).reshape(shape)


def aligned(array: NDArray[Any], dtype: DTypeLike) -> NDArray[Any]:
    """`array` itself when it is C-contiguous, aligned and of the type; else such a copy."""
    if array.dtype == np.dtype(dtype) and array.flags.c_contiguous and array.ctypes.data % ALIGNMENT == 0:
        return np.asarray(array)
    out = aligned_empty(array.shape, dtype)
    out[...] = array
    return out


class ExamplesRecord(TypedDict):
    """examples.json: bytes of each array's file."""

    format: Annotated[int, records.Format(FORMAT)]
    rows: records.Count
    files: dict[str, records.Count]


class Labels(NamedTuple):
    """The target [n], weight float32[n] (None: 1 each) and dataset rows int64[n] of rows that have a target."""

    target: Values
    weight: NDArray[np.float32] | None
    rows: NDArray[np.int64]


@dataclass(frozen=True)
class Examples:
    """Rows ready for a model.

    Shape: numeric float32[n, F] and codes int32[n, K], row-major and 64-byte aligned; target float32[n] (0 or 1, class
    index, or value) or float64[n] (see engine.training.target), of several targets [n, targets], NaN where a row has none;
    weight float32 of the same shape, or [n], or None; rows int64[n], the dataset row numbers: keys of dropout, and the names
    in errors.
    """

    numeric: NDArray[np.float32]
    codes: NDArray[np.int32]
    target: Values
    rows: NDArray[np.int64]
    weight: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        wide = np.float64 if self.target.dtype == np.float64 else np.float32
        kinds = {"numeric": np.float32, "codes": np.int32, "target": wide, "rows": np.int64, "weight": np.float32}
        for name, kind in kinds.items():
            array = getattr(self, name)
            if array is None:
                continue
            allowed = {"numeric": (2,), "codes": (2,), "rows": (1,)}.get(name, (1, 2))
            if array.dtype != kind or array.ndim not in allowed or len(array) != len(self.rows):
                raise ValueError(
                    f"{name} must be {np.dtype(kind)} of {' or '.join(map(str, allowed))} dimensions and {len(self.rows)} rows, "
                    f"found {array.dtype}{list(array.shape)}"
                )
            object.__setattr__(self, name, aligned(array, kind))

    def __len__(self) -> int:
        return len(self.rows)

    def labels(self, k: int) -> Labels:
        """Of the target k, those of the rows that have it; of the only target all."""
        if self.target.ndim == 1:
            return Labels(self.target, self.weight, self.rows)
        known = np.flatnonzero(~np.isnan(self.target[:, k]))
        weight = self.weight if self.weight is None or self.weight.ndim == 1 else self.weight[:, k]
        return Labels(self.target[known, k], None if weight is None else weight[known], self.rows[known])

    def of_target(self, k: int, rows: NDArray[np.int64]) -> Examples:
        """The examples of the target k alone: its dataset `rows`, ascending, copied; of the only target all as they are."""
        if self.target.ndim == 1:
            return self
        part = self.take(np.searchsorted(self.rows, rows))
        weight = part.weight if part.weight is None or part.weight.ndim == 1 else part.weight[:, k]
        return replace(part, target=part.target[:, k], weight=weight)

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return sum(array.nbytes for array in self._arrays().values())

    def _arrays(self) -> dict[str, NDArray[Any]]:
        arrays: dict[str, NDArray[Any]] = {}
        arrays |= {"numeric": self.numeric, "codes": self.codes, "target": self.target, "rows": self.rows}
        return arrays if self.weight is None else {**arrays, "weight": self.weight}

    def take(self, index: NDArray[Any]) -> Examples:
        """The rows at `index` (positions int64[m], or a mask bool[n]), copied."""
        return Examples(
            self.numeric[index],
            self.codes[index],
            self.target[index],
            self.rows[index],
            None if self.weight is None else self.weight[index],
        )

    def save(self, folder: Path) -> None:
        """Write one raw .npy file an array and a manifest with sizes, last; readers map them."""
        names = {}
        for name, array in self._arrays().items():
            with storage.atomic_path(folder / f"{name}.npy") as temporary, open(temporary, "wb") as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
            names[name] = (folder / f"{name}.npy").stat().st_size
        storage.write_json(folder / "examples.json", {"format": FORMAT, "rows": len(self), "files": names})

    @classmethod
    def open(cls, folder: Path) -> Examples:
        """Examples mapped from the files that `save` wrote; pages are read when they are touched.

        Raises UserError when the folder is incomplete.
        """
        manifest = records.read(folder / "examples.json", ExamplesRecord)
        arrays = {}
        for name, size in manifest["files"].items():
            path = storage.inside(folder, f"{name}.npy")
            if not path.exists() or path.stat().st_size != size:
                raise UserError(
                    f"{path} must have {size} bytes, found {path.stat().st_size if path.exists() else 'nothing'}"
                )
            arrays[name] = _map(path)
        return cls(**arrays)


def _map(path: Path) -> NDArray[Any]:
    if path.stat().st_size == 0 or _rows(path) == 0:
        return np.asarray(np.load(path, allow_pickle=False))
    # Copy-on-write: nothing here writes, and kernels need no second variant compiled for read-only arrays.
    return np.asarray(np.load(path, mmap_mode="c", allow_pickle=False))


def _rows(path: Path) -> int:
    with open(path, "rb") as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, _ = read(file)
    return int(np.prod(shape))
