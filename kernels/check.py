"""Argument checks shared by the public functions. Each message says what is required and what was found."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

NAT = np.iinfo(np.int64).min


def integers(name: str, values: ArrayLike, length: int | None = None) -> NDArray[np.int64]:
    """`values` as int64[n], without loss: integers, booleans or datetimes (their stored number), but not floats.

    Raises ValueError for another number of dimensions or another length, TypeError for a type that does not fit int64.
    """
    array = np.asarray(values)
    if array.dtype.kind in "mM":
        array = array.view(np.int64)
    elif array.size == 0 and array.dtype.kind == "f" and not isinstance(values, np.ndarray):
        array = array.astype(np.int64)  # an empty list
    elif array.dtype.kind not in "iub" or array.dtype == np.uint64:
        raise TypeError(f"{name} must hold integers that fit int64, found dtype {array.dtype}")
    return _vector(name, array.astype(np.int64, copy=False), length)


def floats(name: str, values: ArrayLike, length: int | None = None) -> NDArray[np.float64]:
    """`values` as float64[n]. Raises ValueError for a wrong shape, TypeError for other than numbers."""
    array = np.asarray(values)
    if array.dtype.kind not in "iubf":
        raise TypeError(f"{name} must hold numbers, found dtype {array.dtype}")
    return _vector(name, array.astype(np.float64, copy=False), length)


def _vector(name: str, array: NDArray[Any], length: int | None) -> NDArray[Any]:
    if array.ndim != 1:
        raise ValueError(f"{name} must have one dimension, found shape {array.shape}")
    if length is not None and len(array) != length:
        raise ValueError(f"{name} must have {length} entries, found {len(array)}")
    return array


def output(name: str, out: NDArray[Any], shape: tuple[int, ...], dtype: Any) -> None:
    """Raise unless `out` is a writable C-contiguous array of this shape and dtype."""
    if not isinstance(out, np.ndarray) or out.dtype != np.dtype(dtype):
        raise TypeError(
            f"{name} must be an array of {np.dtype(dtype)}, found {getattr(out, 'dtype', type(out).__name__)}"
        )
    if out.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, found {out.shape}")
    if not out.flags.writeable or not out.flags.c_contiguous:
        raise ValueError(f"{name} must be writable and C-contiguous")
