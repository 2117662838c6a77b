"""Exact sums of float64 and of their squares, as integers, so that adding and removing leaves no trace and no order matters.

Two forms hold the same exact number, and both are rounded by the same rule, so a result does not depend on the form:
- fixed, uint64[10]: words 0-2 the sum in units of 2**-92, words 3-7 the sum of squares in units of 2**-184 (two's complement),
  words 8-9 how many +inf and -inf were added. Takes |x| in [2**-40, 2**52) and 0 (see `is_wide`); 2**31 rows fit.
- wide, int64[201]: 67 digits base 2**32 for the sum in units of 2**-1084, 134 for the squares in units of 2**-2168: every double
  (Kulisch's long accumulator; digits carry only when read).

`moments` gives, of the rows in A but not in D: the correctly rounded sum (equal to math.fsum), mean and sample standard
deviation, the last from n * sum(x**2) - sum(x)**2 in exact integers: never negative, 0 exactly when all values are equal.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kernels import check
from kernels.jit import clz64, mul128, njit

FIXED = 10
WIDE = 67 + 134
_SUM, _SQUARES = 67, 134
_UNIT = 92  # fixed sums are in units of 2**-92
WIDE_UNIT = 1084  # wide sums are in units of 2**-1084
_ZERO, _ONE = np.uint64(0), np.uint64(1)
_FRACTION = np.uint64((1 << 52) - 1)
_HIDDEN = np.uint64(1 << 52)
_LOW32 = np.uint64(0xFFFFFFFF)
_S32, _S63 = np.uint64(32), np.uint64(63)


@njit(inline=True)
def _exponent(bits: Any) -> Any:
    return np.int64((bits >> 52) & 0x7FF)


@njit
def is_wide(bits: Any) -> Any:
    """Whether the double with these bits (int64) is finite, not zero, and outside the fixed form's range."""
    exponent = _exponent(bits)
    return (exponent < 1075 - _UNIT or exponent > 1074) and exponent != 0x7FF and (bits << 1) != 0


@njit
def any_wide(bits: Any) -> Any:
    """Whether any of these doubles needs the wide form."""
    for i in range(len(bits)):
        if is_wide(bits[i]):
            return True
    return False


@njit
def add_fixed(acc: Any, bits: Any, squares: Any) -> None:
    """Add the double with these bits (int64) to a fixed accumulator; its square too when `squares`."""
    exponent = _exponent(bits)
    if exponent == 0x7FF:
        acc[8 if bits > 0 else 9] += _ONE
        return
    if exponent == 0:  # zero: denormals are wide
        return
    mantissa = (np.uint64(bits) & _FRACTION) | _HIDDEN
    shift = exponent - (1075 - _UNIT)
    off = np.uint64(shift & 63)
    low = mantissa << off
    high = (mantissa >> _ONE) >> (_S63 - off)
    a0, a1, a2 = acc[0], acc[1], acc[2]
    if shift >= 64:
        if bits >= 0:
            a1 += low
            a2 += high + np.uint64(a1 < low)
        else:
            a2 -= high + np.uint64(a1 < low)
            a1 -= low
    elif bits >= 0:
        a0 += low
        high += np.uint64(a0 < low)
        a1 += high
        a2 += np.uint64(a1 < high)
    else:
        high += np.uint64(a0 < low)
        a0 -= low
        a2 -= np.uint64(a1 < high)
        a1 -= high
    acc[0], acc[1], acc[2] = a0, a1, a2
    if squares:
        _add_square(acc, mantissa, 2 * shift)


@njit
def _add_square(acc: Any, mantissa: Any, shift: Any) -> None:
    high, low = mul128(mantissa, mantissa)
    high, low = np.uint64(high), np.uint64(low)
    off = np.uint64(shift & 63)
    word = 3 + (shift >> 6)
    w0 = low << off
    w1 = (high << off) | ((low >> _ONE) >> (_S63 - off))
    w2 = (high >> _ONE) >> (_S63 - off)
    s0 = acc[word] + w0
    carry = np.uint64(s0 < w0)
    s1 = acc[word + 1] + w1
    overflow = np.uint64(s1 < w1)
    s1 += carry
    carry = overflow + np.uint64(s1 < carry)
    w2 += carry  # below 2**43: no overflow
    s2 = acc[word + 2] + w2
    carry = np.uint64(s2 < w2)
    acc[word], acc[word + 1], acc[word + 2] = s0, s1, s2
    word += 3
    while carry != _ZERO and word < 8:
        acc[word] += _ONE
        carry = np.uint64(acc[word] == _ZERO)
        word += 1


@njit
def add_wide(acc: Any, bits: Any) -> None:
    """Add any finite double with these bits (int64), and its square, to a wide accumulator."""
    exponent = _exponent(bits)
    mantissa = np.uint64(bits) & _FRACTION
    if exponent > 0:
        mantissa |= _HIDDEN
    else:
        exponent = np.int64(1)
    position = exponent + (WIDE_UNIT - 1075)
    off = np.uint64(position & 31)
    digit = position >> 5
    low = mantissa << off
    high = (mantissa >> _ONE) >> (_S63 - off)
    sign = np.int64(1) if bits >= 0 else np.int64(-1)
    acc[digit] += sign * np.int64(low & _LOW32)
    acc[digit + 1] += sign * np.int64(low >> _S32)
    acc[digit + 2] += sign * np.int64(high)
    position *= 2
    off = np.uint64(position & 31)
    digit = _SUM + (position >> 5)
    high, low = mul128(mantissa, mantissa)
    high, low = np.uint64(high), np.uint64(low)
    w0 = low << off
    w1 = (high << off) | ((low >> _ONE) >> (_S63 - off))
    w2 = (high >> _ONE) >> (_S63 - off)
    acc[digit] += np.int64(w0 & _LOW32)
    acc[digit + 1] += np.int64(w0 >> _S32)
    acc[digit + 2] += np.int64(w1 & _LOW32)
    acc[digit + 3] += np.int64(w1 >> _S32)
    if w2 != _ZERO:
        acc[digit + 4] += np.int64(w2)


# --------------------------------------------------------------------------- rounding
@njit(inline=True)
def _power(exponent: Any) -> Any:
    """2.0 ** exponent for -1022 <= exponent <= 1023."""
    return np.int64((exponent + 1023) << 52).view(np.float64)


@njit
def _scaled(x: Any, exponent: Any) -> Any:
    """x * 2 ** exponent, rounded once."""
    if -900 < exponent < 900:  # x is in [2**-63, 2**64]: neither overflow nor denormal
        return x * _power(np.int64(exponent))
    return np.ldexp(x, exponent)


@njit
def _top(words: Any, unit: Any) -> Any:
    """Magnitude in `words` (lowest first, units of 2**unit) as (64 leading bits, the last one sticky, their exponent)."""
    i = len(words) - 1
    while i >= 0 and words[i] == _ZERO:
        i -= 1
    if i < 0:
        return _ZERO, np.int64(0)
    zeros = clz64(words[i])
    shift = np.uint64(zeros)
    leading = words[i] << shift
    rest = _ZERO
    if i > 0:
        leading |= (words[i - 1] >> _ONE) >> (_S63 - shift)
        rest = words[i - 1] << shift
        for j in range(i - 1):
            rest |= words[j]
    if rest != _ZERO:
        leading |= _ONE
    return leading, np.int64(64 * i - zeros + unit)


@njit
def _round(leading: Any, exponent: Any, negative: Any, variance: Any, n: Any, out: Any) -> None:
    """out = [sum, mean, std] from the leading bits of |sum| and of n * squares - sum ** 2 (variance, a like pair)."""
    magnitude = np.float64(leading)
    if negative:
        magnitude = -magnitude
    out[0] = _scaled(magnitude, exponent)
    out[1] = _scaled(magnitude / n, exponent)
    if n < 2:
        out[2] = np.nan
        return
    bits, power = variance
    scale = np.float64(n) * np.float64(n - 1)
    ratio = np.float64(bits) / scale
    if power & 1:
        ratio *= 2.0
        power -= 1
    out[2] = _scaled(math.sqrt(ratio), power >> 1)


@njit
def _infinite(positive: Any, negative: Any, out: Any) -> None:
    total = np.nan if positive > 0 and negative > 0 else (np.inf if positive > 0 else -np.inf)
    out[0], out[1], out[2] = total, total, np.nan


@njit
def moments_fixed(add: Any, drop: Any, n: Any, squares: Any, words: Any, out: Any) -> None:
    """out[0:3] = sum, mean, std of the n > 0 rows in `add` but not in `drop`; words: uint64[12] of scratch."""
    positive, negative = add[8] - drop[8], add[9] - drop[9]
    if positive != _ZERO or negative != _ZERO:
        _infinite(positive, negative, out)
        return
    s0 = add[0] - drop[0]
    borrow = np.uint64(add[0] < drop[0])
    s1 = add[1] - drop[1]
    under = np.uint64(add[1] < drop[1])
    under += np.uint64(s1 < borrow)
    s1 -= borrow
    s2 = add[2] - drop[2] - under
    minus = s2 >> _S63 != _ZERO
    if minus:
        s0, s1, s2 = ~s0, ~s1, ~s2
        s0 += _ONE
        if s0 == _ZERO:
            s1 += _ONE
            if s1 == _ZERO:
                s2 += _ONE
    words[0], words[1], words[2] = s0, s1, s2
    leading, exponent = _top(words[:3], -_UNIT)
    if squares and n > 1:
        _variance_fixed(add, drop, n, words)
        _round(leading, exponent, minus, _top(words[6:12], -2 * _UNIT), n, out)
    else:
        _round(leading, exponent, minus, (_ZERO, np.int64(0)), n, out)
        out[2] = np.nan


@njit
def _variance_fixed(add: Any, drop: Any, n: Any, words: Any) -> None:
    """words[6:12] = n * squares - sum ** 2, where words[0:3] holds |sum|."""
    count = np.uint64(n)
    borrow, carry = _ZERO, _ZERO
    for j in range(5):  # n * (squares added - squares dropped)
        a, d = add[3 + j], drop[3 + j]
        word = a - d
        under = np.uint64(a < d)
        under += np.uint64(word < borrow)
        word -= borrow
        borrow = under
        high, low = mul128(word, count)
        low = np.uint64(low) + carry
        carry = np.uint64(high) + np.uint64(low < carry)
        words[6 + j] = low
    words[11] = carry
    for i in range(3):  # minus sum ** 2, one row of the long multiplication at a time
        if words[i] == _ZERO:
            continue
        carry, borrow = _ZERO, _ZERO
        for j in range(3):
            high, low = mul128(words[i], words[j])
            low = np.uint64(low) + carry
            carry = np.uint64(high) + np.uint64(low < carry)
            word = words[6 + i + j]
            under = np.uint64(word < low)
            word -= low
            under += np.uint64(word < borrow)
            words[6 + i + j] = word - borrow
            borrow = under
        j = 9 + i
        carry += borrow
        while carry != _ZERO and j < 12:
            word = words[j]
            words[j] = word - carry
            carry = np.uint64(word < carry)
            j += 1


@njit
def _words(add: Any, drop: Any, out: Any) -> Any:
    """Digits add - drop as magnitude in 64-bit words `out`; returns whether the number is negative."""
    carry = np.int64(0)
    for i in range(len(add)):  # is it negative? the carry out of the top digit says
        carry = (add[i] - drop[i] + carry) >> 32
    minus = carry < 0
    sign = np.int64(-1) if minus else np.int64(1)
    carry = np.int64(0)
    out[:] = _ZERO
    for i in range(len(add)):
        total = sign * (add[i] - drop[i]) + carry
        carry = total >> 32
        out[i >> 1] |= (np.uint64(total) & _LOW32) << np.uint64(32 * (i & 1))
    if len(add) & 1:
        out[len(add) >> 1] |= np.uint64(carry) << _S32
    else:
        out[len(add) >> 1] = np.uint64(carry)
    return minus


@njit
def moments_wide(add: Any, drop: Any, infinite: Any, n: Any, squares: Any, out: Any) -> None:
    """`moments_fixed` for the wide form; infinite = (how many +inf, how many -inf) among the n rows."""
    if infinite[0] > 0 or infinite[1] > 0:
        _infinite(infinite[0], infinite[1], out)
        return
    total = np.zeros(34, np.uint64)
    minus = _words(add[:_SUM], drop[:_SUM], total)
    leading, exponent = _top(total, -WIDE_UNIT)
    if not squares or n < 2:
        _round(leading, exponent, minus, (_ZERO, np.int64(0)), n, out)
        out[2] = np.nan
        return
    spread = np.zeros(69, np.uint64)
    _words(add[_SUM:], drop[_SUM:], spread[:68])
    carry, count = _ZERO, np.uint64(n)
    for i in range(69):
        high, low = mul128(spread[i], count)
        low = np.uint64(low) + carry
        carry = np.uint64(high) + np.uint64(low < carry)
        spread[i] = low
    for i in range(34):
        if total[i] != _ZERO:
            _subtract_row(spread, total, i)
    _round(leading, exponent, minus, _top(spread, -2 * WIDE_UNIT), n, out)


@njit
def _subtract_row(spread: Any, total: Any, i: Any) -> None:
    """spread -= total[i] * total, shifted by i words."""
    carry, borrow = _ZERO, _ZERO
    for j in range(34):
        high, low = mul128(total[i], total[j])
        low = np.uint64(low) + carry
        carry = np.uint64(high) + np.uint64(low < carry)
        word = spread[i + j]
        under = np.uint64(word < low)
        word -= low
        under += np.uint64(word < borrow)
        spread[i + j] = word - borrow
        borrow = under
    j = i + 34
    carry += borrow
    while carry != _ZERO and j < 69:
        word = spread[j]
        spread[j] = word - carry
        carry = np.uint64(word < carry)
        j += 1


# --------------------------------------------------------------------------- whole arrays
def wide_integer(acc: NDArray[np.int64]) -> int:
    """The sum held by a wide accumulator as a Python integer, in units of 2**-1084."""
    return sum(int(digit) << (32 * i) for i, digit in enumerate(acc[:_SUM]) if digit)

@njit
def _moments_of(values: Any, out: Any) -> None:
    """out = [count, sum, mean, std] of the values that are not NaN."""
    fixed, n, wide = np.zeros(FIXED, np.uint64), np.int64(0), False
    for i in range(len(values)):
        if values[i] == values[i]:
            wide = wide or is_wide(np.float64(values[i]).view(np.int64))
            n += 1
    out[0] = np.float64(n)
    out[1:4] = np.nan
    if n == 0:
        return
    if not wide:
        for i in range(len(values)):
            if values[i] == values[i]:
                add_fixed(fixed, np.float64(values[i]).view(np.int64), True)
        moments_fixed(fixed, np.zeros(FIXED, np.uint64), n, True, np.zeros(12, np.uint64), out[1:4])
        return
    long = np.zeros(WIDE, np.int64)
    for i in range(len(values)):
        if values[i] == values[i]:
            bits = np.float64(values[i]).view(np.int64)
            if (bits >> 52) & 0x7FF == 0x7FF:
                add_fixed(fixed, bits, False)
            else:
                add_wide(long, bits)
    moments_wide(long, np.zeros(WIDE, np.int64), fixed[8:10], n, True, out[1:4])


def moments(values: ArrayLike) -> tuple[int, float, float, float]:
    """(count, sum, mean, std) of the values that are not NaN: exact sums, so the bits do not depend on the order.

    Shape: float64[n]. The sum is correctly rounded (math.fsum); std has ddof = 1 and is NaN below two values; without values all
    but the count are NaN; with an infinity sum and mean are infinite (NaN for both signs), std NaN.
    """
    out = np.empty(4)
    _moments_of(check.floats("values", values), out)
    return int(out[0]), float(out[1]), float(out[2]), float(out[3])


def total(values: ArrayLike) -> float:
    """Correctly rounded sum of float64[n] without NaN; 0 for none."""
    count, result, _, _ = moments(values)
    return result if count else 0.0
