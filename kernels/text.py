"""Texts as numbers: hashed n-grams of words and characters, weighted; and lengths of vectors.

A word is a longest run of letters, digits, underscores and bytes from 128 on (all of a character beyond ASCII). The hash of n
words in a row is that of the first, combined with that of each next one. N-grams of characters are those of a word between two
blanks, of which a shorter word is one (scikit-learn's `char_wb`). An n-gram counts in the bucket hash % buckets (the hashing
trick: Weinberger et al., Feature hashing for large scale multitask learning, ICML 2009, without signs).

A bucket with c n-grams weighs (1 + ln c) * idf[bucket], and the buckets of a text are divided by their Euclidean norm (Salton,
Buckley: Term-weighting approaches in automatic text retrieval, 1988). Every number depends on its own row only.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kernels import check
from kernels.hashing import combine64, hash_slice, seed_u64, splitmix64
from kernels.jit import njit, run_ranges, split

_BLANK = np.uint8(32)


class NGrams(NamedTuple):
    """What is counted: n-grams of 1 to `words` words (0: none), and of `characters` characters (0: none), in `buckets`."""

    buckets: int
    words: int
    characters: int
    seed: int

    def checked(self) -> NGrams:
        """Itself. Raises ValueError for a number that is too small."""
        if self.buckets < 1 or min(self.words, self.characters) < 0 or self.words + self.characters == 0:
            raise ValueError(f"there must be buckets, and n-grams of words or of characters, found {self}")
        return self


@njit(inline=True)
def _in_word(byte: Any) -> Any:
    return byte >= 128 or 48 <= byte <= 57 or 65 <= byte <= 90 or byte == 95 or 97 <= byte <= 122


@njit
def _words(data: Any, start: Any, stop: Any, spans: Any) -> Any:
    """Write start and stop of each word to spans[k]; returns how many there are."""
    count, at = 0, start
    while at < stop:
        if not _in_word(data[at]):
            at += 1
            continue
        first = at
        while at < stop and _in_word(data[at]):
            at += 1
        spans[count, 0], spans[count, 1] = first, at
        count += 1
    return count


@njit
def _characters(data: Any, first: Any, stop: Any, size: Any, key: Any, padded: Any, grams: Any, found: Any) -> Any:
    """Append the hashes of the n-grams of characters of one word to grams[found:]; returns the new number of them."""
    padded[0] = _BLANK
    padded[1 : 1 + stop - first] = data[first:stop]
    length = stop - first + 2
    padded[length - 1] = _BLANK
    low, high, inside = 0, 0, 0  # the n-gram is padded[low:high], of `inside` characters
    while high < length:
        high += 1
        while high < length and (padded[high] & 192) == 128:
            high += 1
        inside += 1
        if inside < size:
            continue
        grams[found] = hash_slice(padded, low, high, key)
        found += 1
        low += 1
        while low < length and (padded[low] & 192) == 128:
            low += 1
        inside -= 1
    if low == 0:
        grams[found] = hash_slice(padded, 0, length, key)
        found += 1
    return found


@njit
def _grams(data: Any, start: Any, stop: Any, ngrams: Any, keys: Any, spans: Any, padded: Any, grams: Any) -> Any:
    """Hashes of the n-grams of one text, its words first; returns (words, n-grams)."""
    words, characters = ngrams
    count = _words(data, start, stop, spans)
    for k in range(count):
        grams[k] = hash_slice(data, spans[k, 0], spans[k, 1], keys[0])
    found = count
    for k in range(count):
        whole = grams[k]
        for more in range(1, words):
            if k + more < count:
                whole = combine64(whole, grams[k + more])
                grams[found] = whole
                found += 1
        if characters > 0:
            found = _characters(data, spans[k, 0], spans[k, 1], characters, keys[1], padded, grams, found)
    return count, found


@njit
def _room(offsets: Any, words: Any) -> Any:
    """Rows of the buffers that the longest text needs: (words, bytes, n-grams)."""
    longest = 0
    for i in range(len(offsets) - 1):
        longest = max(longest, offsets[i + 1] - offsets[i])
    most = longest // 2 + 1
    return most, longest + 2, most * max(words, 1) + longest + 2 * most


@njit
def _encode(data: Any, offsets: Any, settings: Any, keys: Any, idf: Any, seen: Any, out: Any) -> None:
    buckets, words, characters = np.uint64(settings[0]), settings[1], settings[2]
    most, longest, total = _room(offsets, words)
    spans, padded = np.empty((most, 2), np.int64), np.empty(longest, np.uint8)
    grams, touched = np.empty(total, np.uint64), np.empty(total, np.int64)
    bits = np.uint64(len(seen) * 8)
    for i in range(len(offsets) - 1):
        row = out[i]
        row[:] = 0.0
        count, found = _grams(data, offsets[i], offsets[i + 1], (words, characters), keys, spans, padded, grams)
        new = 0
        for k in range(count):
            bit = grams[k] % bits
            new += 1 - ((seen[bit >> np.uint64(3)] >> np.uint8(bit & np.uint64(7))) & 1)
        row[0], row[1] = count, new / count if count > 0 else 0.0
        used = 0
        for k in range(0 if words > 0 else count, found):
            bucket = np.int64(grams[k] % buckets)
            if row[2 + bucket] == 0.0:
                touched[used] = bucket
                used += 1
            row[2 + bucket] += 1.0
        total_square = 0.0
        for k in range(used):
            bucket = touched[k]
            weight = (1.0 + math.log(row[2 + bucket])) * idf[bucket]
            row[2 + bucket] = weight
            total_square += weight * weight
        norm = math.sqrt(total_square)
        for k in range(used if norm > 0.0 else 0):
            row[2 + touched[k]] /= norm


@njit
def _count(data: Any, offsets: Any, settings: Any, keys: Any, texts: Any, lengths: Any, hashes: Any) -> Any:
    """Add the texts with each bucket to texts[buckets]; write the words of each text to lengths[n], and the hash of each word to
    `hashes`, whose number is returned.
    """
    buckets, words, characters = np.uint64(settings[0]), settings[1], settings[2]
    most, longest, total = _room(offsets, words)
    spans, padded, grams = np.empty((most, 2), np.int64), np.empty(longest, np.uint8), np.empty(total, np.uint64)
    last = np.full(len(texts), -1, np.int64)
    filled = 0
    for i in range(len(offsets) - 1):
        count, found = _grams(data, offsets[i], offsets[i + 1], (words, characters), keys, spans, padded, grams)
        lengths[i] = count
        hashes[filled : filled + count] = grams[:count]
        filled += count
        for k in range(0 if words > 0 else count, found):
            bucket = np.int64(grams[k] % buckets)
            if last[bucket] != i:
                last[bucket] = i
                texts[bucket] += 1
    return filled


def _keys(ngrams: NGrams) -> NDArray[np.uint64]:
    """Keys of the hashes of words and of characters, so that a word and an equal n-gram of characters are different."""
    seed = seed_u64("seed", ngrams.seed)
    return np.array([splitmix64(seed), splitmix64(seed ^ np.uint64(1 << 63))], np.uint64)


def _bytes(data: NDArray[np.uint8], offsets: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    edges = check.integers("offsets", offsets)
    if len(edges) < 1 or edges[0] < 0 or edges[-1] > len(data) or np.any(edges[1:] < edges[:-1]):
        raise ValueError(f"offsets must rise within [0, {len(data)}]")
    return np.ascontiguousarray(data, np.uint8), edges


def text_counts(
    data: NDArray[np.uint8], offsets: NDArray[np.int64], ngrams: NGrams
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint64]]:
    """(texts that have each bucket int64[buckets], words of each text int64[n], distinct hashes of words uint64[w], ascending)
    of UTF-8 texts data[offsets[i]:offsets[i + 1]].

    Raises ValueError for offsets outside of the data.
    """
    raw, edges = _bytes(data, offsets)
    texts, lengths = np.zeros(ngrams.checked().buckets, np.int64), np.empty(len(edges) - 1, np.int64)
    hashes = np.empty((int(edges[-1] - edges[0]) + len(edges)) // 2 + 1, np.uint64)
    filled = _count(raw, edges, np.array(ngrams[:3]), _keys(ngrams), texts, lengths, hashes)
    return texts, lengths, np.unique(hashes[:filled])


def encode_texts(
    data: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    ngrams: NGrams,
    idf: NDArray[np.float64],
    seen: NDArray[np.uint8],
    threads: int = 1,
) -> NDArray[np.float64]:
    """float64[n, 2 + buckets] of UTF-8 texts: words, share of words whose bit is not set in `seen`, weight of each bucket.

    Shape: data uint8[bytes], offsets int64[n + 1], idf float64[buckets], seen uint8[m], of which a word sets bit hash % 8m (bit k
    is bit k % 8 of byte k // 8). Raises ValueError for other shapes.
    """
    raw, edges = _bytes(data, offsets)
    weights, mask = check.floats("idf", idf), np.ascontiguousarray(seen, np.uint8)
    if len(weights) != ngrams.checked().buckets or mask.ndim != 1 or not len(mask):
        raise ValueError(
            f"idf must have {ngrams.buckets} weights and seen some bytes, found {len(weights)} and {mask.shape}"
        )
    out = np.empty((len(edges) - 1, 2 + len(weights)))
    settings, keys = np.array(ngrams[:3]), _keys(ngrams)

    def part(a: int, b: int) -> None:
        _encode(raw, edges[a : b + 1], settings, keys, weights, mask, out[a:b])

    run_ranges(part, split(len(out), threads), threads)
    return out


@njit
def _norms(block: Any, out: Any) -> None:
    for i in range(len(block)):
        largest = 0.0
        for value in block[i]:
            largest = max(largest, abs(value))
        total = 0.0
        if largest > 0.0:
            for value in block[i]:
                total += (value / largest) * (value / largest)
        out[i] = largest * math.sqrt(total)


def vector_norms(block: NDArray[np.float64]) -> NDArray[np.float64]:
    """float64[n]: the Euclidean norm of each row of finite numbers [n, k], summed from left to right.

    Scaled by the largest, so that squares do not overflow.
    """
    rows = np.ascontiguousarray(block, np.float64)
    if rows.ndim != 2:
        raise ValueError(f"block must be [n, k], found shape {rows.shape}")
    out = np.empty(len(rows))
    _norms(rows, out)
    return out
