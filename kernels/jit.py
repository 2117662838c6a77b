"""Compilation, its cache, and threads: the policy of all kernels. No other CPU kernel imports Numba's decorators.

Policy
- `njit` compiles with `nogil` and an on-disk cache, single threaded, with IEEE semantics. Fast-math flags are opt-in per
  function and can never include `nnan` or `ninf`: a kernel that sees nulls must be able to test for them.
- The cache is in a folder named by the digest of all sources of this package, so that a change of a helper in another file
  invalidates it. Its files are executed, so only this user may be able to write to it. The first folder that qualifies is
  used: `NUMBA_CACHE_DIR` (with a warning if others may write to it), `__pycache__` beside the sources, the user's cache
  folder, a private folder in the temporary directory (one warning), none (one warning).
- Parallelism is `run_ranges`: serial `nogil` loops over ranges on plain threads. Numba's own parallel layer is not used (its
  workqueue layer aborts on concurrent calls, its thread limit is not seen by other threads, and it hangs after fork).
- With `NUMBA_DISABLE_JIT=1` every kernel runs as plain Python; integer wrap-around is then silent as in compiled code.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import stat
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, event
from numba.extending import intrinsic

from kernels import compiling

DISABLED = bool(numba.config.DISABLE_JIT)
FORBIDDEN_FASTMATH = frozenset({"nnan", "ninf", "fast"})
_SOURCES = Path(__file__).parent


# --------------------------------------------------------------------------- cache
def source_digest(folder: Path = _SOURCES) -> str:
    """Digest of every source file of the package and of the versions that shape machine code (16 hex digits)."""
    digest = hashlib.sha256(f"{numba.__version__} {np.__version__} {sys.version}".encode())
    for path in sorted(folder.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _writable(folder: Path) -> bool:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o755, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def others_write(folder: Path, trusted: frozenset[int] = frozenset()) -> str:
    """How other users could write to a cache folder, its files or its parent folders; empty if they cannot.

    `trusted`: ids of users who may, besides this one and root. Raises OSError.
    """
    if not hasattr(os, "getuid"):
        return ""
    folder = folder.resolve()
    for place in (folder, *folder.iterdir()):
        status = place.lstat()
        if status.st_uid not in {os.getuid(), 0, *trusted}:
            return f"{place} belongs to user {status.st_uid}"
        if not stat.S_ISLNK(status.st_mode) and _open_to_others(status):
            return f"{place} has mode {stat.S_IMODE(status.st_mode):o}"
    for place in folder.parents:
        status = place.stat()
        if status.st_uid not in {os.getuid(), 0, *trusted}:
            return f"{place} belongs to user {status.st_uid}"
        if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
            return f"{place} has mode {stat.S_IMODE(status.st_mode):o}"
    return ""


def _open_to_others(status: os.stat_result) -> bool:
    """Whether everybody may write, or a group with other members."""
    if status.st_mode & stat.S_IWOTH:
        return True
    return bool(status.st_mode & stat.S_IWGRP) and not _is_own_group(status.st_gid)


def _is_own_group(number: int) -> bool:
    """Whether this is the user's private group, which systems create where files are group-writable by default."""
    import grp
    import pwd

    try:
        user, group = pwd.getpwuid(os.getuid()), grp.getgrgid(number)
    except KeyError:
        return False
    return user.pw_gid == number and group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}


def _usable(folder: Path, trusted: frozenset[int]) -> tuple[bool, str]:
    """(whether a cache folder can be used, why it is not safe if that is the reason)."""
    if not _writable(folder):
        return False, ""
    try:
        why = others_write(folder.parent, trusted) or others_write(folder, trusted)
    except OSError:
        return False, ""
    return not why, why


def _private_temporary() -> Path | None:
    """A folder in the temporary directory that only this user can write to, or None."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(tempfile.gettempdir()) / f"kernels-cache-{user}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError:
        return None
    owned = not hasattr(os, "getuid") or status.st_uid == user
    return folder if owned and not folder.is_symlink() and status.st_mode & 0o077 == 0 else None


def choose_cache_dir(folder: Path = _SOURCES) -> Path | None:
    """The cache folder by the rule of the module docstring; warns when it is a temporary one or there is none."""
    name = f"jit-{source_digest(folder)}"
    home = os.environ.get("XDG_CACHE_HOME") or (os.environ.get("HOME") and os.environ["HOME"] + "/.cache")
    candidates = [os.environ.get("NUMBA_CACHE_DIR"), folder / "__pycache__", home and Path(home) / "engine-kernels"]
    owners = frozenset({folder.stat().st_uid})  # whoever owns the sources can change what runs anyway
    for place, candidate in enumerate(candidates):
        if not candidate:
            continue
        fits, why = _usable(Path(candidate) / name, owners)
        if fits:
            return Path(candidate) / name
        if why and place == 0:
            warnings.warn(
                f"kernels: NUMBA_CACHE_DIR={candidate} is not used, because others could put code there ({why}): take it from "
                f"them with chmod go-w, or name another folder",
                RuntimeWarning,
                stacklevel=2,
            )
    private = _private_temporary()
    if private is not None and _writable(private / name):
        warnings.warn(
            f"kernels: no writable cache folder; compiled code goes to {private}", RuntimeWarning, stacklevel=2
        )
        return private / name
    warnings.warn("kernels: no writable cache folder; every process compiles anew", RuntimeWarning, stacklevel=2)
    return None


CACHE_DIR: Path | None = None if DISABLED else choose_cache_dir()


# --------------------------------------------------------------------------- compilation
def njit(
    function: Callable[..., Any] | None = None,
    *,
    fastmath: Sequence[str] = (),
    inline: bool = False,
    allocates: bool = True,
) -> Any:
    """`numba.njit` under this package's policy.

    allocates=False omits reference counting: counters are atomic, and threads that share arrays wait for each other (a hot
    loop ran 5 times slower). Such a function must not create arrays. Raises ValueError for a fast-math flag that assumes
    that there are no NaN or infinities.
    """
    if function is None:
        return functools.partial(njit, fastmath=fastmath, inline=inline, allocates=allocates)
    refused = FORBIDDEN_FASTMATH.intersection(fastmath)
    if refused:
        raise ValueError(f"fastmath must keep NaN and infinity, found {sorted(refused)} on {function.__name__}")
    if DISABLED:
        return _wrapping(function)
    previous = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(CACHE_DIR or "")
    try:
        return numba.njit(
            nogil=True,
            cache=CACHE_DIR is not None,
            fastmath=set(fastmath) or False,
            error_model="numpy",
            forceinline=inline,
            **({} if allocates else {"_nrt": False}),
        )(function)
    finally:
        numba.config.CACHE_DIR = previous


CannotCompile = numba.core.errors.NumbaError


def njit_given(function: Callable[..., Any]) -> Any:
    """A function that a caller brings, compiled for this process alone: its source is no file of this package, so there is no
    cache. A place outside of an array raises IndexError.
    """
    if DISABLED:
        return _wrapping(function)
    return numba.njit(nogil=True, error_model="numpy", boundscheck=True)(function)


class _Compilations(event.Listener):  # type: ignore[misc]
    """Reports to `compiling` when Numba compiles a function that is neither loaded nor in the cache."""

    def on_start(self, event: Any) -> None:  # noqa: ARG002
        compiling.begin()

    def on_end(self, event: Any) -> None:  # noqa: ARG002
        compiling.end()


event.register("numba:compile", _Compilations())


def _wrapping(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function as plain Python with the arithmetic of machine code: NumPy scalars wrap and divide without warnings."""

    @functools.wraps(function)
    def plain(*arguments: Any) -> Any:
        with np.errstate(all="ignore"):
            return function(*arguments)

    return plain


# --------------------------------------------------------------------------- integer intrinsics
@intrinsic
def _mul128(_typing: Any, _a: Any, _b: Any) -> Any:  # pragma: no cover - emits code
    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        wide = ir.IntType(128)
        product = builder.mul(builder.zext(arguments[0], wide), builder.zext(arguments[1], wide))
        low = builder.trunc(product, ir.IntType(64))
        high = builder.trunc(builder.lshr(product, ir.Constant(wide, 64)), ir.IntType(64))
        return _context.make_tuple(builder, _signature.return_type, [high, low])

    return numba.types.UniTuple(numba.uint64, 2)(numba.uint64, numba.uint64), generate


@intrinsic
def _clz64(_typing: Any, _a: Any) -> Any:  # pragma: no cover - emits code
    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.ctlz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return numba.int64(numba.uint64), generate


LANES = 64  # rows that one compare takes together: a mask of them is one uint64


def _lanes(
    context: Any, builder: Any, kind: Any, flat: Any, at: Any, element: Any
) -> Any:  # pragma: no cover - emits code
    """Pointer to LANES elements of a flat array from `at` on, as one vector."""
    data = context.make_array(kind)(context, builder, flat).data
    return builder.bitcast(builder.gep(data, [at]), ir.VectorType(element, LANES).as_pointer())


def _splat(builder: Any, value: Any) -> Any:  # pragma: no cover - emits code
    wide = ir.VectorType(value.type, LANES)
    one = builder.insert_element(ir.Constant(wide, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES))


def _compare(ordered: bool) -> Any:  # pragma: no cover - emits code
    def declared(_typing: Any, flat: Any, at: Any, _value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointer = _lanes(context, builder, signature.args[0], arguments[0], arguments[1], ir.FloatType())
            found, value = builder.load(pointer, align=4), _splat(builder, arguments[2])
            compare = builder.fcmp_ordered if ordered else builder.fcmp_unordered
            return builder.bitcast(compare("<=", found, value), ir.IntType(64))

        return numba.uint64(flat, at, numba.float32), generate

    return intrinsic(declared)


_at_most, _not_above = _compare(True), _compare(False)


@intrinsic
def _put_lanes(_typing: Any, flat: Any, mask: Any, _value: Any) -> Any:  # pragma: no cover - emits code
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        zero = ir.Constant(ir.IntType(64), 0)
        pointer = _lanes(context, builder, signature.args[0], arguments[0], zero, ir.IntType(16))
        chosen = builder.bitcast(arguments[1], ir.VectorType(ir.IntType(1), LANES))
        kept = builder.load(pointer, align=2)
        builder.store(builder.select(chosen, _splat(builder, arguments[2]), kept), pointer, align=2)
        return context.get_dummy_value()

    return numba.void(flat, mask, numba.uint16), generate


@intrinsic
def _prefetch(_typing: Any, array: Any, _row: Any) -> Any:  # pragma: no cover - emits code
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        made = context.make_array(signature.args[0])(context, builder, arguments[0])
        stride = builder.extract_value(made.strides, 0)
        begin = builder.add(builder.ptrtoint(made.data, stride.type), builder.mul(arguments[1], stride))
        number = ir.IntType(32)
        address = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [address, number, number, number])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        with cgutils.for_range_slice(builder, stride.type(0), stride, stride.type(64)) as (at, _):
            place = builder.inttoptr(builder.add(begin, at), address)
            builder.call(prefetch, [place, number(1), number(3), number(1)])  # to write, into every cache, data
        return context.get_dummy_value()

    return numba.void(array, numba.int64), generate


if DISABLED:

    def at_most(flat: Any, at: Any, value: Any, missing: Any) -> Any:
        """uint64: bit r says whether flat[at + r] <= value, for LANES float32; NaN is where `missing`."""
        found = 0
        for r in range(LANES):
            x = flat[at + r]
            found |= int(bool(x <= value) or bool(missing and x != x)) << r
        return np.uint64(found)

    def put_lanes(flat: Any, mask: Any, value: Any) -> None:
        """flat[r] = value, uint16, for every bit r of the mask."""
        for r in range(LANES):
            if int(mask) >> r & 1:
                flat[r] = value

    def prefetch_row(array: Any, row: Any) -> None:
        """Ask the processor for the memory of array[row], which will be written soon: changes nothing but the time it takes."""

    def mul128(a: Any, b: Any) -> tuple[Any, Any]:
        """(high, low) 64-bit halves of the product of two uint64."""
        product = int(a) * int(b)
        return np.uint64(product >> 64), np.uint64(product & 0xFFFFFFFFFFFFFFFF)

    def clz64(a: Any) -> Any:
        """Number of leading zero bits of a uint64 (64 for zero)."""
        return np.int64(64 - int(a).bit_length())
else:

    @njit(inline=True)
    def at_most(flat: Any, at: Any, value: Any, missing: Any) -> Any:
        """uint64: bit r says whether flat[at + r] <= value, for LANES float32; NaN is where `missing`."""
        return _not_above(flat, at, value) if missing else _at_most(flat, at, value)

    @njit(inline=True)
    def put_lanes(flat: Any, mask: Any, value: Any) -> None:
        """flat[r] = value, uint16, for every bit r of the mask."""
        _put_lanes(flat, mask, np.uint16(value))

    @njit(inline=True, allocates=False)
    def prefetch_row(array: Any, row: Any) -> None:
        """Ask the processor for the memory of array[row], which will be written soon: changes nothing but the time it takes."""
        _prefetch(array, np.int64(row))

    @njit
    def mul128(a: Any, b: Any) -> Any:
        """(high, low) 64-bit halves of the product of two uint64."""
        return _mul128(np.uint64(a), np.uint64(b))

    @njit
    def clz64(a: Any) -> Any:
        """Number of leading zero bits of a uint64 (64 for zero)."""
        return _clz64(np.uint64(a))


# --------------------------------------------------------------------------- threads
def cpu_count() -> int:
    """Number of CPUs that this process may use (its affinity, not the machine's total)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_slots = threading.BoundedSemaphore(cpu_count())
_mine = threading.local()  # .slot: this thread holds one


def _renew_slots() -> None:
    global _slots
    _slots = threading.BoundedSemaphore(cpu_count())


if hasattr(os, "register_at_fork"):  # a slot held by another thread of the parent is never released in the child
    os.register_at_fork(after_in_child=_renew_slots)


def check_threads(threads: int) -> int:
    """`threads` as an int; raises ValueError unless it is at least 1."""
    if int(threads) != threads or threads < 1:
        raise ValueError(f"threads must be a whole number of at least 1, found {threads}")
    return int(threads)


def split(total: int, parts: int) -> list[tuple[int, int]]:
    """Cut [0, total) into at most `parts` non-empty ranges of nearly equal length."""
    edges = [total * i // max(parts, 1) for i in range(max(parts, 1) + 1)]
    return [(a, b) for a, b in itertools.pairwise(edges) if b > a]


def run_ranges(work: Callable[[int, int], Any], ranges: Sequence[tuple[int, int]], threads: int) -> list[Any]:
    """Call `work(start, stop)` for every range and return the results in order.

    At most `threads` ranges run at once, and in the whole process at most one per CPU. `work` must release the GIL (every
    kernel here does) and write only to its range. The pool exists only during the call, so a fork inherits no threads.
    A nested call runs in the calling thread: threads that hold a slot and wait for another would deadlock.
    """

    def one(bounds: tuple[int, int]) -> Any:
        with _slots:
            _mine.slot = True
            try:
                return work(*bounds)
            finally:
                _mine.slot = False

    workers = min(check_threads(threads), len(ranges), cpu_count())
    if getattr(_mine, "slot", False):
        return [work(*bounds) for bounds in ranges]
    if workers <= 1:
        return [one(bounds) for bounds in ranges]
    with ThreadPoolExecutor(workers, thread_name_prefix="kernels") as pool:
        return list(pool.map(one, ranges))
