"""GPU versions of CPU kernels (NVIDIA): encode, profile, row order and dropout masks.

A GPU version is compiled from the source of the CPU loop wherever that source can run on a GPU (`_Twins`), so the arithmetic
is written once. Only loops that call NumPy or make one pass over a column are rewritten here.

Agreement with the CPU
    integers (profile counts and moments, row order, dropout masks)                 equal
    standardise, uniform, ple                                                       equal
    normal (logarithm and fused multiply-add differ in the last bit of a double)    1e-6 relative, float32

Numba's CUDA target is imported by the first call only: `import kernels.cuda` works on any machine, and `require_cuda`
raises `CudaMissing` where there is no GPU. With NUMBA_ENABLE_CUDASIM=1 in the environment before numba is imported,
this module runs in Numba's simulator, without a GPU. Arguments may be NumPy arrays (copied to the device) or arrays already
on the device with `__cuda_array_interface__`, such as torch tensors (not copied); results stay on the device.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from kernels import encode as cpu_encode
from kernels import exact, hashing
from kernels import order as cpu_order
from kernels import profile as cpu_profile
from kernels.encode import NumericPlan
from kernels.exact import WIDE
from kernels.profile import Profile, ProfilePlan

THREADS = 256  # of a block
LANES = 32  # of a warp; one lane a column in the profile
SHARED_BYTES = 48 * 1024  # of shared memory: every card gives a block this much by default

cuda: Any = None  # numba.cuda, once `require_cuda` has found it


class CudaMissing(RuntimeError):
    """There is no usable NVIDIA GPU, or Numba's CUDA target is missing."""


# --------------------------------------------------------------------------- access to the GPU
def simulated() -> bool:
    """Whether Numba's simulator replaces the GPU (NUMBA_ENABLE_CUDASIM=1 when numba was imported)."""
    return bool(numba.config.ENABLE_CUDASIM)


def require_cuda() -> Any:
    """The module `numba.cuda`. Raises CudaMissing, naming what is missing, when it cannot launch kernels."""
    global cuda
    if cuda is None:
        try:
            from numba import cuda as found
        except ImportError as error:
            raise CudaMissing(
                f"GPU kernels need numba's CUDA target, which is missing ({error}): "
                "pip install 'numba-cuda[cu13]' 'numpy<2.5'"
            ) from None
        if not found.is_available():
            raise CudaMissing("GPU kernels need an NVIDIA GPU and its driver; none was found: use the CPU kernels")
        _settings().CUDA_LOW_OCCUPANCY_WARNINGS = 0  # small inputs make small grids on purpose
        cuda = found
    return cuda


def _settings() -> Any:
    """Numba's settings; those of numba-cuda when it has separate ones."""
    try:
        from numba.cuda.core import config
    except ImportError:
        return numba.config
    return config


class _Twins:
    """Device functions and kernels compiled from plain Python source, each once.

    `device(f)` rebuilds a CPU function (or a plain one of this file) with other globals: every compiled function that it
    calls becomes its GPU version, and functions in `replaced` become their replacements.
    """

    def __init__(self, module: Any) -> None:
        self.cuda = module
        self.real = not simulated()
        self._made: dict[Any, Any] = {}
        self.replaced: dict[Any, Callable[..., Any]] = {cpu_encode._rank: _rank}

    def device(self, function: Any, **constants: Any) -> Any:
        """The device function of a CPU function or of a plain one."""
        source = self.replaced.get(function, function)
        key = (source, tuple(sorted(constants.items(), key=lambda item: item[0])))
        if key not in self._made:
            self._made[key] = self.cuda.jit(device=True)(self._rebuilt(source, constants))
        return self._made[key]

    def kernel(self, function: Callable[..., None], **constants: Any) -> Any:
        """The kernel of a plain function."""
        return self.cuda.jit(self._rebuilt(function, constants))

    def _rebuilt(self, function: Any, constants: dict[str, Any]) -> Any:
        plain = _source_of(function)
        names = dict(plain.__globals__)
        names |= {"cuda": self.cuda, **constants}
        for name in plain.__code__.co_names:
            value = names.get(name)
            if name not in constants and _is_compiled(value):
                names[name] = self.device(value)
        if self.real:
            names["_product"] = self.cuda.libdevice.dmul_rn
        return types.FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__)


def _source_of(function: Any) -> Any:
    """The plain Python function of a compiled one (or of its wrapper under NUMBA_DISABLE_JIT)."""
    return getattr(function, "py_func", None) or getattr(function, "__wrapped__", function)


def _is_compiled(value: Any) -> bool:
    """Whether a global is a function that needs a GPU version: compiled by `kernels.jit.njit`, or marked `_on_device` here."""
    return hasattr(value, "py_func") or hasattr(value, "__wrapped__") or getattr(value, "on_device", False)


@functools.cache
def _twins() -> _Twins:
    return _Twins(require_cuda())


def _on_device(function: Any) -> Any:
    """Mark a plain function of this file as callable from kernels."""
    function.on_device = True
    return function


@functools.cache
def _kernel(name: str, **constants: Any) -> Any:
    """A kernel of this file by name, compiled for these values of the constants that it names."""
    return _twins().kernel(globals()[name], **constants)


def _put(array: Any) -> Any:
    """The array on the device; not copied when it is there already."""
    module = require_cuda()
    if hasattr(array, "copy_to_host"):
        return array
    if hasattr(array, "__cuda_array_interface__"):
        return module.as_cuda_array(array, sync=False)
    if simulated() and hasattr(array, "data_ptr"):  # a tensor in host memory, which is the simulator's device memory
        return type(module.device_array(1))(array.numpy())
    return module.to_device(np.ascontiguousarray(array))


def _blocks(work: int, most: int = 1 << 16) -> int:
    return max(1, min(-(-work // THREADS), most))


# --------------------------------------------------------------------------- device versions of single operations
def _product(a: Any, b: Any) -> Any:
    """a * b, never fused with a following addition: on a GPU this name is libdevice's __dmul_rn."""
    return a * b


@_on_device
def _rank(x: Any, edges: Any) -> Any:
    """Rank of x in [0, 1] among ascending quantiles; see kernels.encode, which calls np.searchsorted."""
    last = len(edges) - 1
    if edges[0] == edges[last]:
        return -1.0
    left, high = np.int64(0), np.int64(last + 1)
    while left < high:
        middle = (left + high) >> 1
        if edges[middle] < x:
            left = middle + 1
        else:
            high = middle
    right, high = left, np.int64(last + 1)
    while right < high:
        middle = (right + high) >> 1
        if edges[middle] <= x:
            right = middle + 1
        else:
            high = middle
    if left == right:
        if left == 0:
            return 0.0
        if left > last:
            return 1.0
        low, top = edges[left - 1], edges[left]
        part = (x * 0.5 - low * 0.5) / (top * 0.5 - low * 0.5)
        return (left - 1 + part) / last
    return 0.5 * (left + right - 1) / last


# --------------------------------------------------------------------------- encode
_encode_cell = cpu_encode._encode_cell


def _encode_numeric(values: Any, integers: Any, numbers: Any, edges: Any, out: Any) -> None:
    """One thread per cell, row by row, so that the threads of a warp read and write neighbouring addresses."""
    columns = values.shape[1]
    for cell in range(cuda.grid(1), values.shape[0] * columns, cuda.gridsize(1)):
        i, k = cell // columns, cell % columns
        _encode_cell(np.float64(values[i, k]), integers[k], numbers[k], edges, out[i])


def encodes_as_cpu(plan: NumericPlan) -> bool:
    """Whether every column of the plan is encoded to the same bits as on the CPU: true for all kinds but `normal`."""
    return not np.any(plan.integers[:, 0] == cpu_encode.KINDS["normal"])


class NumericEncoder:
    """A NumericPlan on the device: `encode(values)` is one launch for all numeric columns."""

    def __init__(self, plan: NumericPlan) -> None:
        self.columns, self.width = len(plan.integers), plan.width
        edges = plan.edges if len(plan.edges) else np.zeros(1)
        self._plan = [_put(array) for array in (plan.integers, plan.numbers, edges)]

    def encode(self, values: Any, out: Any = None, stream: Any = 0) -> Any:
        """float32[n, width] on the device from float64 or float32 values [n, columns], NaN missing.

        Raises ValueError for another number of columns.
        """
        block = _put(values)
        if block.ndim != 2 or block.shape[1] != self.columns:
            raise ValueError(f"values must be [n, {self.columns}], found shape {block.shape}")
        result = cuda.device_array((block.shape[0], self.width), np.float32) if out is None else _put(out)
        if block.size:
            _kernel("_encode_numeric")[_blocks(block.size), THREADS, stream](block, *self._plan, result)
        return result


# --------------------------------------------------------------------------- profile
REAL, WORD = numba.types.float64, numba.types.int32  # of shared memory; REAL is the type of the block
SIZE = 1  # of a column's padded edges: a constant of each compiled kernel, so that its search loop is unrolled
AHEAD = 4  # rows that a thread searches for at once
MISSING, NEGATIVE_INFINITE, POSITIVE_INFINITE = (
    cpu_profile.MISSING,
    cpu_profile.NEGATIVE_INFINITE,
    cpu_profile.POSITIVE_INFINITE,
)
DIGITS = 6  # of 32 bits: two of the sum of q, four of the sum of q**2
_UNIT = exact.WIDE_UNIT


@_on_device
def _add_far(far: Any, k: Any, side: Any, value: Any) -> None:
    """Add a finite double to a wide accumulator that all threads share; carries are resolved when it is read."""
    bits = np.float64(value).view(np.int64)
    exponent = np.int64((bits >> 52) & 0x7FF)
    mantissa = np.uint64(bits) & np.uint64((1 << 52) - 1)
    if exponent > 0:
        mantissa |= np.uint64(1 << 52)
    else:
        exponent = np.int64(1)
    position = exponent + (_UNIT - 1075)
    off = np.uint64(position & 31)
    digit = position >> 5
    low = mantissa << off
    high = (mantissa >> np.uint64(1)) >> (np.uint64(63) - off)
    sign = np.int64(1) if bits >= 0 else np.int64(-1)
    cuda.atomic.add(far, (k, side, digit), sign * np.int64(low & np.uint64(0xFFFFFFFF)))
    cuda.atomic.add(far, (k, side, digit + 1), sign * np.int64(low >> np.uint64(32)))
    cuda.atomic.add(far, (k, side, digit + 2), sign * np.int64(high))


@_on_device
def _outside(value: Any, first: Any, k: Any, bins: Any, counts: Any, far: Any) -> Any:
    """Count a value outside the edges directly in device memory, which is rare. Returns whether it is finite."""
    width = counts.shape[1]
    at, finite = np.int64(0), False
    if value != value:
        at = width + MISSING
    elif value == np.inf:
        at = width + POSITIVE_INFINITE
    elif value == -np.inf:
        at = width + NEGATIVE_INFINITE
    else:
        finite = True
        side = 0 if value < first else 1
        at = np.int64(0) if side == 0 else np.int64(bins + 1)
        _add_far(far, k, side, np.float64(value) + 0.0)
    cuda.atomic.add(counts, (k, at), np.int64(1))
    return finite


@_on_device
def _place(value: Any, reals: Any, lane: Any, half: Any) -> Any:
    """Position of the lane's counter for the value's bin: a binary search of its 2 * half edges in shared memory."""
    at, step = lane, half * LANES
    while step >= LANES:
        if reals[at + step - LANES] <= value:
            at += step
        step >>= 1
    return at


@_on_device
def _add_sums(digits: Any, k: Any, total: Any, squares: Any, top: Any) -> None:
    """Add a thread's sum of q and its sum of q**2 (low 64 bits, and `top` above them) to the digits that all threads share."""
    half, s32 = np.uint64(0xFFFFFFFF), np.uint64(32)
    cuda.atomic.add(digits, (k, 0), total & half)
    cuda.atomic.add(digits, (k, 1), total >> s32)
    cuda.atomic.add(digits, (k, 2), squares & half)
    cuda.atomic.add(digits, (k, 3), squares >> s32)
    cuda.atomic.add(digits, (k, 4), top)


@_on_device
def _add_counts(counts: Any, k: Any, words: Any, first: Any) -> None:
    """Add the block's counts of a column to the totals of all blocks; each warp adds some of the bins."""
    for b in range(cuda.threadIdx.y, counts.shape[1] - 4, cuda.blockDim.y):
        found = words[first + b * LANES]
        if found:
            cuda.atomic.add(counts, (k, b), np.int64(found))


def _profile(  # noqa: PLR0913
    block: Any, edges: Any, ends: Any, bins: Any, ranges: Any, counts: Any, low: Any, high: Any, digits: Any, far: Any
) -> None:
    """A lane is a column, a warp a row: 32 columns per block (chosen by blockIdx.y), rows strided over warps and blocks.

    Shared memory: edges [SIZE, 32] then counts int32 [bins + 1, 32], laid out so that lanes never share a bank. Each read of
    a search depends on the one before, so a thread searches for AHEAD rows at once before it counts them.
    """
    lane, warp, warps = cuda.threadIdx.x, cuda.threadIdx.y, cuda.blockDim.y
    inner = counts.shape[1] - 4
    k = cuda.blockIdx.y * LANES + lane
    there = k < block.shape[1]
    reals = cuda.shared.array(0, REAL)
    words = cuda.shared.array(0, WORD)
    base = SIZE * LANES * (reals.itemsize // 4)
    for b in range(warp, SIZE, warps):
        reals[b * LANES + lane] = edges[min(k, edges.shape[0] - 1), b]
    for b in range(warp, inner, warps):
        words[base + b * LANES + lane] = 0
    cuda.syncthreads()
    if there:
        first, last, last_bin = ends[k, 0], ends[k, 1], bins[k]
        last_place = last_bin * LANES + lane
        shift, scale = ranges[k, 0], ranges[k, 1]
        least, most = REAL(np.inf), REAL(-np.inf)
        total, squares, top = np.uint64(0), np.uint64(0), np.uint64(0)
        rows, stride = block.shape[0], cuda.gridDim.x * warps
        values, places = cuda.local.array(AHEAD, REAL), cuda.local.array(AHEAD, WORD)
        for row in range(cuda.blockIdx.x * warps + warp, rows, stride * AHEAD):
            for ahead in range(AHEAD):
                i = row + ahead * stride
                values[ahead] = block[i, k] if i < rows else REAL(np.nan)
            for ahead in range(AHEAD):
                places[ahead] = min(_place(values[ahead], reals, lane, SIZE >> 1), last_place)
            for ahead in range(AHEAD):
                value = values[ahead]
                if first <= value and value <= last:
                    cuda.atomic.add(words, base + places[ahead], 1)
                    q = np.uint64(np.int64(_product(np.float64(value) * 0.5 - shift, scale) + 0.5))
                    total += q
                    q *= q
                    squares += q
                    top += np.uint64(squares < q)
                    least, most = min(least, value), max(most, value)
                elif row + ahead * stride < rows and _outside(value, first, k, last_bin, counts, far):
                    least, most = min(least, value), max(most, value)
        _add_sums(digits, k, total, squares, top)
        cuda.atomic.min(low, k, np.float64(least) + 0.0)
        cuda.atomic.max(high, k, np.float64(most) + 0.0)
    cuda.syncthreads()
    if there:
        _add_counts(counts, k, words, base + lane)


class Profiler:
    """A ProfilePlan and its counts on the device: `add(block)` launches a kernel, `result()` reads the counts."""

    def __init__(self, plan: ProfilePlan, real: Any = np.float32) -> None:
        """`real` is the type of the blocks. Edges are rounded up to it, which moves no value of that type to another bin."""
        self.plan, self.real = plan, np.dtype(real)
        if self.real not in (np.float32, np.float64):
            raise TypeError(f"real must be float32 or float64, found {self.real}")
        self._size = plan.edges.shape[1] if len(plan.bins) else 1
        need = LANES * (self._size * self.real.itemsize + 4 * (int(plan.bins.max(initial=0)) + 1))
        if need > SHARED_BYTES:
            raise ValueError(f"edges of 32 columns must fit {SHARED_BYTES} bytes of shared memory, found {need}")
        self._shared = need
        edges = _rounded(plan.edges, self.real, up=True)
        last = plan.edges[np.arange(len(plan.bins)), plan.bins]
        ends = np.stack([edges[:, 0], _rounded(last, self.real, up=False)], axis=1)
        self._plan = [_put(array) for array in (edges, ends, plan.bins, plan.ranges)]
        empty = cpu_profile.empty_profile(plan)
        k = len(plan.bins)
        state = (
            empty.counts,
            empty.low,
            empty.high,
            np.zeros((k, DIGITS), np.uint64),
            np.zeros((k, 2, WIDE), np.int64),
        )
        self._state = [_put(array) for array in state]

    def add(self, block: Any, stream: Any = 0) -> None:
        """Count the rows of block [n, k] of the profiler's type, row-major. Raises ValueError for another shape or type."""
        rows = _put(block)
        if rows.ndim != 2 or rows.shape[1] != len(self.plan.bins) or rows.dtype != self.real:
            raise ValueError(
                f"block must be {self.real} [n, {len(self.plan.bins)}], found {rows.dtype}{list(rows.shape)}"
            )
        if not rows.size:
            return
        warps = THREADS // LANES
        groups = -(-rows.shape[1] // LANES)
        # Enough blocks to fill any card, and few enough that adding up their counts costs little.
        grid = (max(1, min(-(-rows.shape[0] // (64 * warps)), -(-2048 // groups))), groups)
        kernel = _kernel("_profile", REAL=getattr(numba.types, self.real.name), SIZE=self._size, AHEAD=AHEAD)
        kernel[grid, (LANES, warps), stream, self._shared](rows, *self._plan, *self._state)

    def result(self) -> Profile:
        """The profile so far: equal to `kernels.profile.profile` of the same rows."""
        counts, low, high, digits, far = (array.copy_to_host() for array in self._state)
        sums = [
            (
                _whole(d[:2]),
                _whole(d[2:4]) + (int(d[4]) << 64),
                exact.wide_integer(f[0]),
                exact.wide_integer(f[1]),
            )
            for d, f in zip(digits, far, strict=True)
        ]
        return Profile(counts, low, high, sums)


def _whole(digits: NDArray[np.uint64]) -> int:
    return sum(int(digit) << (32 * place) for place, digit in enumerate(digits))


def _rounded(numbers: NDArray[np.float64], real: Any, up: bool) -> NDArray[Any]:
    """Numbers in another type, rounded up or down: x >= e exactly when x >= e rounded up, for every x of that type."""
    with np.errstate(over="ignore"):
        near = numbers.astype(real)
    wrong = near.astype(np.float64) < numbers if up else near.astype(np.float64) > numbers
    return np.where(wrong, np.nextafter(near, np.asarray(np.inf if up else -np.inf, real)), near).astype(real)


# --------------------------------------------------------------------------- row order and dropout
_feistel, combine64, mix64 = cpu_order._feistel, hashing.combine64, hashing.mix64
GOLDEN = hashing.GOLDEN


def _permute(start: Any, n: Any, keys: Any, right_bits: Any, left_bits: Any, out: Any) -> None:
    """out[i] = row at position start + i. One thread per position; each repeats the network until x is below n."""
    one, shift = np.uint64(1), np.uint64(right_bits)
    right_mask = (one << np.uint64(right_bits)) - one
    left_mask = (one << np.uint64(left_bits)) - one
    size = np.uint64(n)
    for i in range(cuda.grid(1), len(out), cuda.gridsize(1)):
        x = _feistel(np.uint64(start + i), keys, shift, left_mask, right_mask)
        while x >= size:
            x = _feistel(x, keys, shift, left_mask, right_mask)
        out[i] = np.int64(x)


def permutation(
    start: int, stop: int, n: int, seed: int, epoch: int, out: Any = None, stream: Any = 0, keys: Any = None
) -> Any:
    """`kernels.order.permutation` into int64[stop - start] on the device. Small n (<= 4096) is sorted on the CPU and copied.

    `keys`: the uint64[6] round keys if they are on the device already (a copy would wait for the stream).
    """
    module = require_cuda()
    if n <= cpu_order.SMALL:
        found = cpu_order.permutation(start, stop, n, seed, epoch)
        if out is None:
            return _put(found)
        result = _put(out)
        result.copy_to_device(found, stream=stream)
        return result
    cpu_order.permutation(start, start, n, seed, epoch)  # the same checks
    if keys is None:
        keys = np.asarray(cpu_order._keys(np.uint64(seed), np.uint64(epoch), np.uint64(n)), np.uint64)
    bits = (int(n) - 1).bit_length()
    result = module.device_array(stop - start, np.int64) if out is None else _put(out)
    if stop > start:
        arguments = (start, n, _put(keys), bits // 2, bits - bits // 2, result)
        _kernel("_permute")[_blocks(stop - start), THREADS, stream](*arguments)
    return result


def _mask(rows: Any, keys: Any, cursor: Any, layer: Any, limit: Any, kept: Any, out: Any) -> None:
    """out[i, j] = kept or 0: one hash per thread serves four columns; its key is that of step cursor[0] and the layer."""
    width = out.shape[1]
    words = (width + 3) // 4
    key = np.uint64(keys[cursor[0], layer])
    for at in range(cuda.grid(1), out.shape[0] * words, cuda.gridsize(1)):
        i, j = at // words, at % words
        row_key = combine64(key, np.uint64(rows[i]))
        hashed = mix64(row_key + np.uint64(j) * GOLDEN)
        for lane in range(4):
            column = j * 4 + lane
            if column < width:
                part = np.int64((hashed >> np.uint64(16 * lane)) & np.uint64(0xFFFF))
                out[i, column] = kept if part >= limit else 0


def dropout_mask(rows: Any, keys: Any, cursor: Any, layer: int, p: float, kept: int, out: Any, stream: Any = 0) -> None:
    """Fill out [b, width] with `kept` or 0: the mask of `kernels.dropout` for rows int64[b], as bit patterns.

    keys int64[steps, layers] holds the bits of the mask key of each step and layer, cursor int64[1] the current step; both are
    on the device, so that a captured graph replays with the next step's keys. `out` is an unsigned integer array as wide as
    the type it is read as (uint16 for bf16, uint32 for float32), `kept` the bit pattern of 1 / (1 - p) in that type.
    """
    limit = min(round(p * 65536), 65535)
    target = _put(out)
    words = target.shape[0] * ((target.shape[1] + 3) // 4)
    arguments = (_put(rows), _put(keys), _put(cursor), layer, limit, target.dtype.type(kept), target)
    _kernel("_mask")[_blocks(words), THREADS, stream](*arguments)


@functools.cache
def fault() -> str:
    """Why GPU kernels cannot run here; empty if they can. One kernel is compiled, launched and read, once per process.

    The presence of a GPU is not enough: NumPy, Numba, its CUDA target, NVIDIA's compiler and the driver come in versions
    that are not all compatible.
    """
    asked = (0, THREADS, cpu_order.SMALL + 1, 1, 0)
    try:
        found = permutation(*asked).copy_to_host()
    except Exception as error:  # each of these libraries raises types of its own
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return "" if np.array_equal(found, cpu_order.permutation(*asked)) else "a kernel gives other numbers than the CPU"
