"""Exact sums of float64 and of their squares, as integers: rows can be added and removed in any order without rounding.

An accumulator has one of three forms. All are exact and rounded by the same rule, so a result does not depend on the form:
- fixed, uint64[10]: words 0-2 the sum in units of 2**-92, words 3-7 the sum of squares in units of 2**-184 (two's complement),
  words 8-9 how many +inf and -inf were added. Takes |x| in [2**-40, 2**52) and 0 (see `is_wide`); 2**31 rows fit.
- whole, in the words of the fixed form: word 0 the sum, word 3 the sum of squares. Takes whole numbers (delays, counts, flags)
  whose squares add up to less than 2**62.
- wide, int64[201]: 67 digits base 2**32 for the sum in units of 2**-1084, 134 for the squares in units of 2**-2168: every double
  (Kulisch's long accumulator; carries are resolved only when it is read).

Carries: uint64 sums wrap, so word + x overflowed exactly when the result is below x, and word - x borrowed exactly when word
was below x. Where a word receives two terms, at most one of the two additions (or subtractions) overflows, so their carries
add up to 0 or 1. A shift by 64 is undefined, so "x >> (64 - off)" is written (x >> 1) >> (63 - off): 0 for off = 0.

`moments_*` give, of the rows in one accumulator but not in another: the correctly rounded sum (equal to math.fsum),
mean and sample standard deviation, the last from n * sum(x**2) - sum(x)**2 in exact integers: never negative, and
exactly 0 when all values are equal.
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
WORDS = 34 + 69  # scratch of the rounding functions
_SUM, _SQUARES = 67, 134
FIXED_FORM, WIDE_FORM, WHOLE_FORM = 0, 1, 2
_UNIT = 92  # fixed sums are in units of 2**-92
WIDE_UNIT = 1084  # wide sums are in units of 2**-1084
_ZERO, _ONE = np.uint64(0), np.uint64(1)
_FRACTION = np.uint64((1 << 52) - 1)
_HIDDEN = np.uint64(1 << 52)
_LOW32 = np.uint64(0xFFFFFFFF)
_S32, _S63, _S64 = np.uint64(32), np.uint64(63), np.uint64(64)
_TWO, _THREE, _SIX, _EIGHT = np.uint64(2), np.uint64(3), np.uint64(6), np.uint64(8)


@njit(inline=True, allocates=False)
def _exponent(bits: Any) -> Any:
    return np.int64((bits >> 52) & 0x7FF)


@njit(allocates=False)
def is_wide(bits: Any) -> Any:
    """Whether the double with these bits (int64) is finite, not zero, and out of range for the fixed form."""
    exponent = _exponent(bits)
    return (exponent < 1075 - _UNIT or exponent > 1074) and exponent != 0x7FF and (bits << 1) != 0


@njit(allocates=False)
def any_wide(values: Any) -> Any:
    """Whether any of these doubles needs the wide form."""
    for i in range(len(values)):
        if is_wide(np.float64(values[i]).view(np.int64)):
            return True
    return False


@njit(allocates=False)
def whole_bound(values: Any) -> Any:
    """The largest magnitude of float64[n], ignoring NaN, if all are whole numbers up to 2**31; else -1."""
    most = 0.0
    for i in range(len(values)):
        size = abs(values[i])
        if size != size:
            continue
        if not (size <= 2147483648.0 and size == np.floor(size)):
            return -1.0
        most = max(most, size)
    return most


@njit(inline=True, allocates=False)
def add_fixed(acc: Any, which: Any, bits: Any, squares: Any) -> None:
    """Add the double with these bits (int64) to the fixed accumulator acc[which]; its square too when `squares`."""
    exponent = _exponent(bits)
    if exponent == 0x7FF:
        acc[which, 8 if bits > 0 else 9] += _ONE
        return
    if exponent == 0:  # zero: denormals need the wide form
        return
    mantissa = (np.uint64(bits) & _FRACTION) | _HIDDEN
    # The mantissa, shifted left, is in two words: low and high, from word 0 on or, when shift >= 64, from word 1 on.
    shift = np.uint64(exponent - (1075 - _UNIT))
    off = shift & _S63
    low = mantissa << off
    high = (mantissa >> _ONE) >> (_S63 - off)
    # A negative term is negated in two's complement, ~x + 1 over three words (`top` is the sign extension): without a branch,
    # since signs are hard to predict.
    sign = np.uint64(bits >> 63)  # all ones when negative
    one = sign & _ONE
    low = (low ^ sign) + one
    high = (high ^ sign) + np.uint64(low < one)
    top = sign + (one & np.uint64(low == _ZERO) & np.uint64(high == _ZERO))
    if shift >= _S64:
        a1 = acc[which, 1] + low
        acc[which, 1] = a1
        acc[which, 2] += high + np.uint64(a1 < low)
    else:
        a0, a1 = acc[which, 0] + low, acc[which, 1] + high
        carry = np.uint64(a0 < low)
        over = np.uint64(a1 < high)
        a1 += carry
        acc[which, 0], acc[which, 1] = a0, a1
        acc[which, 2] += top + over + np.uint64(a1 < carry)
    if squares:
        _add_square(acc, which, mantissa, shift << _ONE)


@njit(inline=True, allocates=False)
def _add_square(acc: Any, which: Any, mantissa: Any, shift: Any) -> None:
    """Add mantissa**2 << shift to words 3-7: three words from word 3 + shift // 64 on, then the carry ripples upwards."""
    high, low = mul128(mantissa, mantissa)
    high, low = np.uint64(high), np.uint64(low)
    off = shift & _S63
    word = _THREE + (shift >> _SIX)
    w0 = low << off
    w1 = (high << off) | ((low >> _ONE) >> (_S63 - off))
    w2 = (high >> _ONE) >> (_S63 - off)
    s0 = acc[which, word] + w0
    carry = np.uint64(s0 < w0)
    s1 = acc[which, word + _ONE] + w1
    overflow = np.uint64(s1 < w1)
    s1 += carry
    w2 += overflow + np.uint64(s1 < carry)  # below 2**43: no overflow
    s2 = acc[which, word + _TWO] + w2
    carry = np.uint64(s2 < w2)
    acc[which, word], acc[which, word + _ONE], acc[which, word + _TWO] = s0, s1, s2
    word += _THREE
    while carry != _ZERO and word < _EIGHT:
        acc[which, word] += _ONE
        carry = np.uint64(acc[which, word] == _ZERO)
        word += _ONE


@njit(allocates=False)
def add_wide(acc: Any, which: Any, bits: Any, squares: Any) -> None:
    """Add any finite double with these bits (int64) to the wide accumulator acc[which]; its square too when `squares`."""
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
    # No carries here: a digit is an int64 that grows by less than 2**32 each time, so 2**31 terms fit before it is read.
    sign = np.int64(1) if bits >= 0 else np.int64(-1)
    acc[which, digit] += sign * np.int64(low & _LOW32)
    acc[which, digit + 1] += sign * np.int64(low >> _S32)
    acc[which, digit + 2] += sign * np.int64(high)
    if squares:
        _add_wide_square(acc, which, mantissa, position * 2)


@njit(inline=True, allocates=False)
def _add_wide_square(acc: Any, which: Any, mantissa: Any, position: Any) -> None:
    """Add mantissa**2 << position to the digits of squares, without carries (see `add_wide`)."""
    off = np.uint64(position & 31)
    digit = _SUM + (position >> 5)
    high, low = mul128(mantissa, mantissa)
    high, low = np.uint64(high), np.uint64(low)
    w0 = low << off
    w1 = (high << off) | ((low >> _ONE) >> (_S63 - off))
    w2 = (high >> _ONE) >> (_S63 - off)
    acc[which, digit] += np.int64(w0 & _LOW32)
    acc[which, digit + 1] += np.int64(w0 >> _S32)
    acc[which, digit + 2] += np.int64(w1 & _LOW32)
    acc[which, digit + 3] += np.int64(w1 >> _S32)
    if w2 != _ZERO:
        acc[which, digit + 4] += np.int64(w2)


@njit(inline=True, allocates=False)
def add(fixed: Any, wide: Any, which: Any, bits: Any, form: Any) -> None:
    """Add a double to accumulator `which`. form = (whether sums are needed, squares too, which of the three forms)."""
    if not form[0]:
        return
    if form[2] == WHOLE_FORM:
        whole = np.int64(np.int64(bits).view(np.float64))
        fixed[which, 0] += np.uint64(whole)
        fixed[which, 3] += np.uint64(whole * whole)
    elif form[2] == WIDE_FORM and (bits >> 52) & 0x7FF != 0x7FF:
        add_wide(wide, which, bits, form[1])
    else:
        add_fixed(fixed, which, bits, form[1])


# --------------------------------------------------------------------------- rounding
@njit(inline=True, allocates=False)
def _power(exponent: Any) -> Any:
    """2.0 ** exponent for -1022 <= exponent <= 1023."""
    return np.int64((exponent + 1023) << 52).view(np.float64)


@njit(allocates=False)
def _scaled(x: Any, exponent: Any) -> Any:
    """x * 2 ** exponent, rounded once."""
    if -900 < exponent < 900:  # x is in [2**-63, 2**64]: neither overflow nor denormal
        return x * _power(np.int64(exponent))
    return np.ldexp(x, exponent)


@njit(inline=True, allocates=False)
def _leading(word: Any, below: Any, rest: Any) -> Any:
    """(64 leading bits of the number word, below, rest..., the last bit sticky; number of leading zero bits). word is not 0.

    Sticky: set when any bit below is set, so that rounding to 53 bits later is correct.
    """
    zeros = clz64(word)
    shift = np.uint64(zeros)
    leading = (word << shift) | ((below >> _ONE) >> (_S63 - shift))
    if (below << shift) | rest != _ZERO:
        leading |= _ONE
    return leading, zeros


@njit(allocates=False)
def _top(words: Any, length: Any, unit: Any) -> Any:
    """The magnitude in words[:length] (lowest first, units of 2**unit) as (64 leading bits, last one sticky; exponent)."""
    i = length - 1
    while i >= 0 and words[i] == _ZERO:
        i -= 1
    if i < 0:
        return _ZERO, np.int64(0)
    rest = _ZERO
    for j in range(i - 1):
        rest |= words[j]
    leading, zeros = _leading(words[i], words[i - 1] if i > 0 else _ZERO, rest)
    return leading, np.int64(64 * i - zeros + unit)


@njit(inline=True, allocates=False)
def _deviation(bits: Any, power: Any, n: Any) -> Any:
    """Square root of bits * 2**power / (n (n - 1))."""
    ratio = np.float64(bits) / (np.float64(n) * np.float64(n - 1))
    if power & 1:
        ratio *= 2.0
        power -= 1
    return _scaled(math.sqrt(ratio), power >> 1)


@njit(inline=True, allocates=False)
def _put(leading: Any, exponent: Any, negative: Any, n: Any, out: Any, at: Any) -> None:
    """out[at : at + 2] = sum and mean, from the leading bits of |sum|."""
    magnitude = np.float64(leading)
    if negative:
        magnitude = -magnitude
    out[at] = _scaled(magnitude, exponent)
    out[at + 1] = _scaled(magnitude / n, exponent)


@njit(allocates=False)
def _infinite(positive: Any, negative: Any, out: Any, at: Any) -> None:
    total = np.nan if positive > 0 and negative > 0 else (np.inf if positive > 0 else -np.inf)
    out[at], out[at + 1], out[at + 2] = total, total, np.nan


@njit(inline=True, allocates=False)
def moments_fixed(acc: Any, drop: Any, n: Any, squares: Any, words: Any, out: Any, at: Any) -> None:
    """out[at : at + 3] = sum, mean, std of the n > 0 rows in acc[0] but not in acc[drop]; words: uint64[103] of scratch.

    s2:s1:s0 is the difference of the sums, then its magnitude; words[6:12] becomes n * sum(x**2) - sum(x)**2.
    """
    positive, negative = acc[0, 8] - acc[drop, 8], acc[0, 9] - acc[drop, 9]
    if positive | negative != _ZERO:
        _infinite(positive, negative, out, at)
        return
    s0, s1 = acc[0, 0] - acc[drop, 0], acc[0, 1] - acc[drop, 1]
    borrow = np.uint64(acc[0, 0] < acc[drop, 0])
    under = np.uint64(acc[0, 1] < acc[drop, 1]) + np.uint64(s1 < borrow)
    s1 -= borrow
    s2 = acc[0, 2] - acc[drop, 2] - under
    minus = s2 >> _S63 != _ZERO
    if minus:
        s0, s1, s2 = ~s0 + _ONE, ~s1, ~s2
        carry = np.uint64(s0 == _ZERO)
        s1 += carry
        s2 += np.uint64(s1 < carry)
    if s2 != _ZERO:
        leading, zeros = _leading(s2, s1, s0)
        _put(leading, np.int64(128 - _UNIT) - zeros, minus, n, out, at)
    elif s1 != _ZERO:
        leading, zeros = _leading(s1, s0, _ZERO)
        _put(leading, np.int64(64 - _UNIT) - zeros, minus, n, out, at)
    elif s0 != _ZERO:
        leading, zeros = _leading(s0, _ZERO, _ZERO)
        _put(leading, np.int64(-_UNIT) - zeros, minus, n, out, at)
    else:
        out[at], out[at + 1] = 0.0, 0.0
    if not squares or n < 2:
        out[at + 2] = np.nan
        return
    words[0], words[1], words[2] = s0, s1, s2
    _scaled_squares(acc, drop, np.uint64(n), words)
    if s2 == _ZERO:
        _minus_square(words, s0, s1)
    else:
        for i in range(3):
            _subtract_row(words[6:12], words[:3], i)
    bits, power = _top_of_six(words)
    out[at + 2] = _deviation(bits, power, n) if bits != _ZERO else 0.0


@njit(inline=True, allocates=False)
def moments_whole(acc: Any, drop: Any, n: Any, squares: Any, out: Any, at: Any) -> None:
    """`moments_fixed` for the whole form."""
    whole = np.int64(acc[0, 0] - acc[drop, 0])
    total = np.float64(whole)
    out[at], out[at + 1] = total, total / n
    if not squares or n < 2:
        out[at + 2] = np.nan
        return
    size = np.uint64(abs(whole))
    high, low = mul128(acc[0, 3] - acc[drop, 3], np.uint64(n))
    minus_high, minus_low = mul128(size, size)
    high = np.uint64(high) - np.uint64(minus_high) - np.uint64(np.uint64(low) < np.uint64(minus_low))
    low = np.uint64(low) - np.uint64(minus_low)
    if high != _ZERO:
        leading, zeros = _leading(high, low, _ZERO)
        out[at + 2] = _deviation(leading, np.int64(64) - zeros, n)
    elif low != _ZERO:
        leading, zeros = _leading(low, _ZERO, _ZERO)
        out[at + 2] = _deviation(leading, -zeros, n)
    else:
        out[at + 2] = 0.0


@njit(inline=True, allocates=False)
def _top_of_six(words: Any) -> Any:
    """`_top` of words[6:12] in units of squares."""
    i = 11
    rest = words[6] | words[7] | words[8] | words[9]
    if words[11] == _ZERO:
        i, rest = 10, words[6] | words[7] | words[8]
        if words[10] == _ZERO:
            i, rest = 9, words[6] | words[7]
            while words[i] == _ZERO and i > 6:
                i -= 1
                rest = words[6] if i == 8 else _ZERO
    if words[i] == _ZERO:
        return _ZERO, np.int64(0)
    leading, zeros = _leading(words[i], words[i - 1] if i > 6 else _ZERO, rest)
    return leading, np.int64(64 * (i - 6) - 2 * _UNIT) - zeros


@njit(inline=True, allocates=False)
def _scaled_squares(acc: Any, drop: Any, count: Any, words: Any) -> None:
    """words[6:12] = count * (sum of squares in acc[0, 3:8] less that in acc[drop, 3:8])."""
    # `borrow` is of the subtraction, `carry` of the multiplication: the high word, which has room for the overflow of `low`.
    borrow, carry = _ZERO, _ZERO
    for j in range(5):
        a, d = acc[0, 3 + j], acc[drop, 3 + j]
        word = a - d
        under = np.uint64(a < d) + np.uint64(word < borrow)
        word -= borrow
        borrow = under
        high, low = mul128(word, count)
        low = np.uint64(low) + carry
        carry = np.uint64(high) + np.uint64(low < carry)
        words[6 + j] = low
    words[11] = carry


@njit(inline=True, allocates=False)
def _minus_square(words: Any, s0: Any, s1: Any) -> None:
    """words[6:12] -= (s0 + 2**64 s1) ** 2, as s0**2 + 2**65 s0 s1 + 2**128 s1**2 in words q3:q2:q1:q0."""
    h00, q0 = mul128(s0, s0)
    h01, l01 = mul128(s0, s1)
    h11, l11 = mul128(s1, s1)
    q0, q1, q2, q3 = np.uint64(q0), np.uint64(h00), np.uint64(l11), np.uint64(h11)
    twice1 = np.uint64(l01) << _ONE  # 2 * s0 * s1 = twice3 : twice2 : twice1
    twice2 = (np.uint64(h01) << _ONE) | (np.uint64(l01) >> _S63)
    twice3 = np.uint64(h01) >> _S63
    q1 += twice1
    carry = np.uint64(q1 < twice1)
    q2 += twice2
    over = np.uint64(q2 < twice2)
    q2 += carry
    over += np.uint64(q2 < carry)
    q3 += twice3 + over
    borrow = np.uint64(words[6] < q0)
    words[6] -= q0
    word = words[7] - q1
    under = np.uint64(words[7] < q1) + np.uint64(word < borrow)
    words[7] = word - borrow
    word = words[8] - q2
    borrow = np.uint64(words[8] < q2) + np.uint64(word < under)
    words[8] = word - under
    word = words[9] - q3
    under = np.uint64(words[9] < q3) + np.uint64(word < borrow)
    words[9] = word - borrow
    if under != _ZERO:
        words[11] -= np.uint64(words[10] < under)
        words[10] -= under


@njit(allocates=False)
def _subtract_row(words: Any, factor: Any, i: Any) -> None:
    """words -= factor[i] * factor, shifted by i words: one row of the long multiplication.

    `carry` is the high word of the products, `borrow` of the subtraction; above the row both are subtracted together.
    """
    carry, borrow = _ZERO, _ZERO
    for j in range(len(factor)):
        high, low = mul128(factor[i], factor[j])
        low = np.uint64(low) + carry
        carry = np.uint64(high) + np.uint64(low < carry)
        word = words[i + j]
        under = np.uint64(word < low)
        word -= low
        under += np.uint64(word < borrow)
        words[i + j] = word - borrow
        borrow = under
    j = i + len(factor)
    carry += borrow
    while carry != _ZERO and j < len(words):
        word = words[j]
        words[j] = word - carry
        carry = np.uint64(word < carry)
        j += 1


@njit(allocates=False)
def _words(acc: Any, drop: Any, first: Any, length: Any, out: Any) -> Any:
    """|acc[0] - acc[drop]|, digits first to first + length, in 64-bit words `out`; returns whether it is negative.

    Digits are signed and larger than the base; an arithmetic shift carries the excess, rounding down, so that what remains is
    in [0, 2**32). The first pass only finds the sign, which is that of the carry out of the top digit.
    """
    carry = np.int64(0)
    for i in range(length):
        carry = (acc[0, first + i] - acc[drop, first + i] + carry) >> 32
    minus = carry < 0
    sign = np.int64(-1) if minus else np.int64(1)
    carry = np.int64(0)
    out[:] = _ZERO
    for i in range(length):
        digit = sign * (acc[0, first + i] - acc[drop, first + i]) + carry
        carry = digit >> 32
        out[i >> 1] |= (np.uint64(digit) & _LOW32) << np.uint64(32 * (i & 1))
    if length & 1:
        out[length >> 1] |= np.uint64(carry) << _S32
    else:
        out[length >> 1] = np.uint64(carry)
    return minus


@njit(allocates=False)
def moments_wide(acc: Any, drop: Any, state: Any, words: Any, out: Any, at: Any) -> None:
    """`moments_fixed` for the wide form; state = (number of +inf, number of -inf, n, squares), words: uint64[103]."""
    positive, negative, n, squares = state
    if positive | negative != _ZERO:
        _infinite(positive, negative, out, at)
        return
    total, spread = words[:34], words[34:103]
    minus = _words(acc, drop, 0, _SUM, total)
    leading, exponent = _top(total, 34, -WIDE_UNIT)
    _put(leading, exponent, minus, n, out, at)
    if not squares or n < 2:
        out[at + 2] = np.nan
        return
    spread[68] = _ZERO
    _words(acc, drop, _SUM, _SQUARES, spread[:68])
    carry, count = _ZERO, np.uint64(n)
    for i in range(69):
        high, low = mul128(spread[i], count)
        low = np.uint64(low) + carry
        carry = np.uint64(high) + np.uint64(low < carry)
        spread[i] = low
    for i in range(34):
        if total[i] != _ZERO:
            _subtract_row(spread, total, i)
    bits, power = _top(spread, 69, -2 * WIDE_UNIT)
    out[at + 2] = _deviation(bits, power, n) if bits != _ZERO else 0.0


# --------------------------------------------------------------------------- sums as Python integers
def wide_integer(acc: NDArray[np.int64]) -> int:
    """The sum in a wide accumulator as a Python integer, in units of 2**-1084."""
    return sum(int(digit) << (32 * i) for i, digit in enumerate(acc[:_SUM]) if digit)


def nearest_double(units: int) -> float:
    """units * 2**-1084 as a double, rounded once; infinite when too large."""
    try:
        return units / (1 << WIDE_UNIT)
    except OverflowError:
        return math.inf if units > 0 else -math.inf


@njit(allocates=False)
def _add_groups(values: Any, groups: Any, acc: Any) -> Any:
    """Add values[i] to the wide accumulator acc[groups[i]]; returns the first row that is not finite, or -1."""
    for i in range(len(values)):
        bits = np.float64(values[i]).view(np.int64)
        if _exponent(bits) == 0x7FF:
            return i
        add_wide(acc, groups[i], bits, False)
    return -1


def group_sums(values: NDArray[np.float64], groups: NDArray[np.int64], count: int) -> list[int]:
    """Exact sum of float64[n] in each of `count` groups (int64[n], in [0, count)), in units of 2**-1084: merging is addition.

    Raises ValueError for a value that is not finite.
    """
    acc = np.zeros((count, WIDE), np.int64)
    wrong = _add_groups(values, groups, acc)
    if wrong >= 0:
        raise ValueError(f"values of an exact sum must be finite, found {values[wrong]} at {wrong}")
    return [wide_integer(sums) for sums in acc]


# --------------------------------------------------------------------------- whole arrays


@njit
def _moments_of(values: Any, out: Any) -> None:
    """out = [count, sum, mean, std] of the values that are not NaN."""
    n, wide = np.int64(0), False
    for i in range(len(values)):
        if values[i] == values[i]:
            wide = wide or is_wide(np.float64(values[i]).view(np.int64))
            n += 1
    out[0] = np.float64(n)
    out[1:4] = np.nan
    if n == 0:
        return
    words = np.zeros(WORDS, np.uint64)
    fixed, long = np.zeros((2, FIXED), np.uint64), np.zeros((2 if wide else 0, WIDE), np.int64)
    for i in range(len(values)):
        if values[i] == values[i]:
            form = (True, True, WIDE_FORM if wide else FIXED_FORM)
            add(fixed, long, 0, np.float64(values[i]).view(np.int64), form)
    if wide:
        moments_wide(long, 1, (fixed[0, 8], fixed[0, 9], n, True), words, out, 1)
    else:
        moments_fixed(fixed, 1, n, True, words, out, 1)


def moments(values: ArrayLike) -> tuple[int, float, float, float]:
    """(count, sum, mean, std) of the values that are not NaN: exact sums, so the bits do not depend on the order.

    Shape: float64[n]. The sum is correctly rounded (math.fsum); std has ddof = 1 and is NaN below two values; without values all
    but the count are NaN; with an infinity sum and mean are infinite (NaN with both signs) and std is NaN.
    """
    out = np.empty(4)
    _moments_of(check.floats("values", values), out)
    return int(out[0]), float(out[1]), float(out[2]), float(out[3])


def total(values: ArrayLike) -> float:
    """Correctly rounded sum of float64[n] without NaN; 0 for none."""
    count, result, _, _ = moments(values)
    return result if count else 0.0
