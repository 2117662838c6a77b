"""The slow, obvious twin of every kernel. Plain Python, no cleverness: read it and believe it."""

from __future__ import annotations

import decimal
import functools
import itertools
import math
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

NAT = np.iinfo(np.int64).min


def asof(probe_entity: Any, probe_time: Any, source: Any, max_age: int | None, inclusive: bool = False) -> Any:
    """source = (entity, event_time, known_at)."""
    rows = list(enumerate(zip(*(a.tolist() for a in source), strict=True)))
    chosen = []
    for g, t in zip(probe_entity.tolist(), probe_time.tolist(), strict=True):
        candidates = [
            (event, known, r)
            for r, (e, event, known) in rows
            if e == g >= 0 and NAT not in (event, known, t) and (known < t or (inclusive and known == t))
        ]
        event, _, r = max(candidates, default=(0, 0, -1))
        chosen.append(r if r >= 0 and (max_age is None or event >= t - max_age) else -1)
    return np.array(chosen, np.int64)


def aggregate(name: str | tuple[str, int], rows: list[tuple[int, int, int, float]], t: int, window: int) -> float:
    """rows = (event_time, known_at, row position, value), those that count; a name may have a parameter."""
    name, parameter = name if isinstance(name, tuple) else (name, None)
    if name == "count":
        return float(len(rows))
    if not rows:
        return math.nan
    rows = sorted(rows)
    x = [v + 0.0 for _, _, _, v in rows]
    if name == "recency":
        place = parameter or 1
        return (t - rows[-place][0]) / 1e6 if place <= len(rows) else math.nan
    if name in ("first", "last"):
        return x[0] if name == "first" else x[-1]
    if name in ("min", "max"):
        return min(x) if name == "min" else max(x)
    if name == "distinct":
        return float(len(set(x)))
    if name == "quantile":
        return quantile(sorted(x), Fraction(parameter or 0, 100))
    half_life = parameter / 1e6 if parameter else window / 2e6
    weights = [2.0 ** (-(max(t - e, 0) / 1e6) / half_life) for e, _, _, _ in rows]
    if name in ("ewm_sum", "ewm_mean"):
        total = exact_sum([w * v for w, v in zip(weights, x, strict=True)])
        return total if name == "ewm_sum" else total / exact_sum(weights)
    if name == "sum":
        return exact_sum(x)
    if name == "mean":
        return exact_sum(x) / len(x)
    return exact_std(x)


def fold(one: Any, rows: list[tuple[int, int, int, float]], t: int) -> float:
    """Of a caller's own aggregate; rows as above."""
    if not rows:
        return math.nan
    pairs = sorted((event, value + 0.0) for event, _, _, value in rows)
    values, ages = [np.array(column, float) for column in zip(*((v, (t - e) / 1e6) for e, v in pairs), strict=True)]
    if one.function is not None:
        return float(one.function(values, ages))
    state = np.array(one.start, float)
    for value, age in zip(values, ages, strict=True):
        one.add(state, value, age)
    return float(one.result(state))


def quantile(x: Sequence[float], share: Fraction) -> float:
    """Of ascending numbers, linear between neighbours; next to one infinity it is that infinity."""
    through = (len(x) - 1) * share
    part = through - math.floor(through)
    low, high = x[math.floor(through)], x[math.ceil(through)]
    if math.isinf(low) or math.isinf(high):
        return low if low == high else low + high
    return float((1 - part) * Fraction(low) + part * Fraction(high))


def exact_sum(x: Sequence[float]) -> float:
    infinite = [v for v in x if math.isinf(v)]
    if infinite:
        return infinite[0] if len(set(infinite)) == 1 else math.nan
    return float(sum((Fraction(v) for v in x), Fraction(0)))


def exact_std(x: Sequence[float]) -> float:
    if len(x) < 2 or any(math.isinf(v) for v in x):
        return math.nan
    total = sum((Fraction(v) for v in x), Fraction(0))
    spread = len(x) * sum((Fraction(v) ** 2 for v in x), Fraction(0)) - total * total
    return square_root(spread / (len(x) * (len(x) - 1)))


def square_root(x: Fraction) -> float:
    """Of an exact fraction of any size."""
    if x == 0:
        return 0.0
    shift = 2 * ((200 - x.numerator.bit_length() + x.denominator.bit_length()) // 2)
    root = math.isqrt(int(x * Fraction(2) ** shift))
    return float(Fraction(root) / Fraction(2) ** (shift // 2))


def counted(rows: Any, t: int, window: int, by: str = "event") -> list[tuple[int, int, int, float]]:
    """rows = (event_time, known_at or None, position, value or None): those that count, placed by their event or known time."""
    found = []
    for event, known, at, value in rows:
        if known is None or value is None or value != value:
            continue
        known = max(event, known)
        placed = known if by == "known" else event
        if known < t and placed >= t - window:
            found.append((placed, known, at, value))
    return found


def trailing(probes: Any, source: Any, values: Any, windows: Sequence[int], aggregates: Sequence[str]) -> Any:
    """probes = (entity, time), source = (entity, event_time, known_at)."""
    out = np.empty((len(probes[0]), len(windows), len(aggregates)))
    numbers = [0.0] * len(source[0]) if values is None else values.tolist()
    rows = list(zip(*(a.tolist() for a in source), range(len(numbers)), numbers, strict=True))
    for i, (g, t) in enumerate(zip(probes[0].tolist(), probes[1].tolist(), strict=True)):
        for w, window in enumerate(windows):
            counting = [
                (event, known, r, v)
                for e, event, known, r, v in rows
                if e == g >= 0 and NAT not in (event, known, t) and v == v and known < t and event >= t - window
            ]
            out[i, w] = [
                fold(name, counting, t) if hasattr(name, "start") else aggregate(name, counting, t, window)
                for name in aggregates
            ]
    return out


def rank(x: float, quantiles: Sequence[float]) -> float:
    """Share of the way through the quantiles, by walking them."""
    q = list(quantiles)
    last = len(q) - 1
    if q[0] == q[-1]:
        return 0.0
    equal = [i for i, v in enumerate(q) if v == x]
    if equal:
        return (equal[0] + equal[-1]) / 2 / last
    below = [i for i, v in enumerate(q) if v < x]
    if not below or len(below) == len(q):
        return 0.0 if not below else 1.0
    i = below[-1]
    return (i + float((Fraction(x) - Fraction(q[i])) / (Fraction(q[i + 1]) - Fraction(q[i])))) / last


def ple(x: float, edges: Sequence[float]) -> list[float]:
    pairs = itertools.pairwise(edges)
    if edges[0] == edges[-1]:
        return [0.0] * (len(edges) - 1)
    return [
        0.0 if x <= a else 1.0 if x >= b else float((Fraction(x) - Fraction(a)) / (Fraction(b) - Fraction(a)))
        for a, b in pairs
    ]


WORD = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def mix64(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


def splitmix64(x: int) -> int:
    return mix64((x + GOLDEN) & WORD)


def combine64(a: int, b: int) -> int:
    return mix64(splitmix64(a) ^ ((b * 0xBF58476D1CE4E5B9 + GOLDEN) & WORD))


def hash_bytes(text: bytes, seed: int) -> int:
    """Words of eight bytes, least significant first, the last one filled with zeros."""
    h = mix64(splitmix64(seed) ^ len(text))
    for start in range(0, len(text), 8):
        h = splitmix64(h ^ int.from_bytes(text[start : start + 8], "little"))
    return splitmix64(h)


def permutation(position: int, n: int, seed: int, epoch: int) -> int:
    """The row at a position: few rows sorted by hash; many by a Feistel network of six rounds, walked until inside."""
    key = combine64(combine64(seed, epoch), n)
    keys = [splitmix64((key + k * GOLDEN) & WORD) for k in range(1, 7)]
    if n <= 4096:
        return sorted(range(n), key=lambda row: splitmix64(keys[0] ^ splitmix64(row)))[position]
    bits = (n - 1).bit_length()
    low = 2 ** (bits // 2)
    high = 2 ** (bits - bits // 2)
    x = position
    while True:
        left, right = divmod(x, low)
        for k in (0, 2, 4):
            left ^= feistel_round(right, keys[k]) % high
            right ^= feistel_round(left, keys[k + 1]) % low
        x = left * low + right
        if x < n:
            return x


def feistel_round(half: int, key: int) -> int:
    z = ((half ^ key) * 0x9E3779B97F4A7C15) & WORD
    z = ((z ^ (z >> 32)) * 0xD6E8FEB86659FD93) & WORD
    return z ^ (z >> 32)


def lane(row: int, column: int, seed: int, step: int, layer: int) -> int:
    """The 16 bits that decide about an entry: four columns share a hash of 64 bits."""
    key = combine64(combine64(combine64(seed, step), layer), row % 2**64)
    word = mix64((key + column // 4 * GOLDEN) & WORD)
    return (word >> 16 * (column % 4)) % 65536


def dropped(row: int, column: int, seed: int, step: int, layer: int, p: float) -> bool:
    return lane(row, column, seed, step, layer) < min(round(p * 65536), 65535)


def roc_auc(y: Sequence[int], score: Sequence[float], weight: Sequence[float]) -> float:
    wins = pairs = Fraction(0)
    for yi, si, wi in zip(y, score, weight, strict=True):
        for yj, sj, wj in zip(y, score, weight, strict=True):
            if yi == 1 and yj == 0:
                pairs += Fraction(wi) * Fraction(wj)
                wins += Fraction(wi) * Fraction(wj) * (Fraction(1) if si > sj else Fraction(1, 2) if si == sj else 0)
    return float(wins / pairs) if pairs else math.nan


def average_precision(y: Sequence[int], score: Sequence[float], weight: Sequence[float]) -> float:
    total = sum(Fraction(w) for yi, w in zip(y, weight, strict=True) if yi)
    if not total:
        return math.nan
    area, before = Fraction(0), Fraction(0)
    for threshold in sorted(set(score), reverse=True):
        above = [(yi, Fraction(w)) for yi, s, w in zip(y, score, weight, strict=True) if s >= threshold]
        true, mass = sum(w for yi, w in above if yi), sum(w for _, w in above)
        if mass:
            area += (true / total - before) * true / mass
            before = true / total
    return float(area)


def weighted_mean(x: Sequence[Any], weight: Sequence[float]) -> float:
    mass = sum((Fraction(w) for w in weight), Fraction(0))
    whole = sum((Fraction(v) * Fraction(w) for v, w in zip(x, weight, strict=True)), Fraction(0))
    return float(whole / mass) if mass else math.nan


def log_loss(y: Sequence[int], score: Sequence[float], weight: Sequence[float]) -> float:
    likely = [Fraction(s) if yi else 1 - Fraction(s) for yi, s in zip(y, score, strict=True)]
    return weighted_mean([-math.log(max(p, Fraction(1, 2**52))) for p in likely], weight)


def brier(y: Sequence[int], score: Sequence[float], weight: Sequence[float]) -> float:
    return weighted_mean([(Fraction(s) - Fraction(yi)) ** 2 for yi, s in zip(y, score, strict=True)], weight)


def pinball(y: Sequence[float], score: Sequence[float], quantile: float, weight: Sequence[float]) -> float:
    q, errors = Fraction(quantile), [Fraction(yi) - Fraction(s) for yi, s in zip(y, score, strict=True)]
    return weighted_mean([q * e if e >= 0 else (q - 1) * e for e in errors], weight)


def ece(y: Sequence[int], score: Sequence[float], weight: Sequence[float], edges: Sequence[float]) -> float:
    """|positives - sum of scores| of each bin [low, high), the last one closed, over the whole weight."""
    excess = [Fraction(0)] * (len(edges) - 1)
    for yi, s, w in zip(y, score, weight, strict=True):
        b = max(b for b, low in enumerate(edges[:-1]) if low <= s)
        excess[b] += Fraction(w) * (Fraction(yi) - Fraction(s))
    mass = sum((Fraction(w) for w in weight), Fraction(0))
    return float(sum(map(abs, excess)) / mass) if mass else math.nan


def profile_column(x: Sequence[float], edges: Sequence[float]) -> list[int]:
    """[below, bins..., above, missing, -inf, +inf]"""
    counts = [0] * (len(edges) + 4)
    for v in x:
        if v != v:
            counts[-3] += 1
        elif math.isinf(v):
            counts[-2 if v < 0 else -1] += 1
        elif v < edges[0]:
            counts[0] += 1
        elif v > edges[-1]:
            counts[len(edges)] += 1
        else:
            bins = [b for b in range(len(edges) - 1) if edges[b] <= v < edges[b + 1]]
            counts[1 + (bins[0] if bins else len(edges) - 2)] += 1
    return counts


def profile_moments(x: Sequence[float], edges: Sequence[float]) -> tuple[Fraction, Fraction, int]:
    """(mean of all finite values, variance of those inside the edges, how many are inside), exactly."""
    finite = [Fraction(v) for v in x if math.isfinite(v)]
    inside = [v for v in finite if edges[0] <= v <= edges[-1]]
    center = sum(inside, Fraction(0)) / max(len(inside), 1)
    spread = sum(((v - center) ** 2 for v in inside), Fraction(0))
    return sum(finite, Fraction(0)) / max(len(finite), 1), spread / max(len(inside) - 1, 1), len(inside)


def cumulative(x: Sequence[float], at: float) -> Fraction:
    return Fraction(sum(v <= at for v in x), len(x))


def ks(a: Sequence[float], b: Sequence[float]) -> float:
    return float(max(abs(cumulative(a, t) - cumulative(b, t)) for t in {*a, *b}))


def wasserstein(a: Sequence[float], b: Sequence[float]) -> float:
    points = sorted({*a, *b})
    steps = itertools.pairwise(points)
    return float(
        sum((abs(cumulative(a, s) - cumulative(b, s)) * (Fraction(t) - Fraction(s)) for s, t in steps), Fraction(0))
    )


def shares(a: Sequence[int], b: Sequence[int]) -> list[tuple[Fraction, Fraction]]:
    return [(Fraction(x, sum(a)), Fraction(y, sum(b))) for x, y in zip(a, b, strict=True)]


def psi(a: Sequence[int], b: Sequence[int], floor: float) -> float:
    pairs = [(max(p, Fraction(floor)), max(q, Fraction(floor))) for p, q in shares(a, b)]
    return math.fsum(float(p - q) * math.log(p / q) for p, q in pairs)


def js_divergence(a: Sequence[int], b: Sequence[int]) -> float:
    """The square of the distance, in 100 decimal digits."""
    with decimal.localcontext(prec=100):
        p, q = (
            [decimal.Decimal(x.numerator) / x.denominator for x in side] for side in zip(*shares(a, b), strict=True)
        )
        middle = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
        terms = [x * (x / m).ln() for side in (p, q) for x, m in zip(side, middle, strict=True) if x]
        return float(sum(terms) / (2 * decimal.Decimal(2).ln()))


def chi_square(a: dict[Any, int], b: dict[Any, int]) -> float:
    """Sum over the cells of a table of two rows of (found - expected)**2 / expected."""
    sides = (a, b)
    rows = [sum(side.values()) for side in sides]
    total = Fraction(0)
    for level in {*a, *b}:
        column = sum(side.get(level, 0) for side in sides)
        for side, row in zip(sides, rows, strict=True):
            if column:
                expected = Fraction(row * column, sum(rows))
                total += (side.get(level, 0) - expected) ** 2 / expected
    return float(total)


def ngrams(text: bytes, words: int, characters: int, seed: int) -> tuple[list[int], list[int]]:
    """(hashes of the words, hashes of the n-grams) of lower-case UTF-8 text."""
    key, found = seed ^ (1 << 63), []
    parts = re.findall(rb"[A-Za-z0-9_\x80-\xff]+", text)
    hashes = [hash_bytes(part, seed) for part in parts]
    for size in range(1, words + 1):
        for at in range(len(hashes) - size + 1):
            found.append(functools.reduce(combine64, hashes[at : at + size]))
    for part in parts if characters else ():
        padded = f" {part.decode()} "
        pieces = [padded[at : at + characters] for at in range(max(1, len(padded) - characters + 1))]
        found += [hash_bytes(piece.encode(), key) for piece in pieces]
    return hashes, found


def encoded_text(
    text: bytes, settings: tuple[int, int, int, int], idf: Sequence[float], seen: Sequence[int]
) -> list[float]:
    """Words, share of new ones, weights of the buckets; settings = (buckets, words, characters, seed)."""
    buckets, *rest = settings
    hashes, found = ngrams(text, *rest)
    bits = [byte >> bit & 1 for byte in seen for bit in range(8)]
    new = sum(1 - bits[h % len(bits)] for h in hashes)
    counts = [sum(h % buckets == bucket for h in found) for bucket in range(buckets)]
    weights = [(1 + math.log(count)) * idf[at] if count else 0.0 for at, count in enumerate(counts)]
    norm = math.sqrt(sum(weight * weight for weight in weights)) or 1.0
    return [len(hashes), new / len(hashes) if hashes else 0.0, *(weight / norm for weight in weights)]
