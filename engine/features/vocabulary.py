"""Fitted codes of one categorical feature; the texts of a sensitive one are concealed."""

from __future__ import annotations

import hmac
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.config.sections.features import EncodeConfig
from engine.runtime import digest

NULL, UNSEEN, RARE, FIRST_KNOWN = 0, 1, 2, 3
RARE_KEPT = 100_000  # rare categories beyond this many count as unseen
NO_TEXT = "(null)"
CONCEALED = "hmac:"  # prefix of 32 hex digits that replace a text of a sensitive column
_IS_CONCEALED = re.compile(CONCEALED + "[0-9a-f]{32}")


@dataclass(frozen=True)
class Vocabulary:
    """State of one categorical feature: known categories, most frequent first, then by text.

    The texts of a sensitive feature (`salt_`) are concealed; the codes do not change.
    """

    name: str
    known_: tuple[str, ...]
    rare_: tuple[str, ...]
    salt_: str = ""

    @property
    def size(self) -> int:
        """Number of codes."""
        return FIRST_KNOWN + len(self.known_)

    def codes(self, column: pa.ChunkedArray | pa.Array) -> np.ndarray:
        """int32[n] codes of a column of any type; values are compared as text."""
        texts = concealed(column, self.salt_) if self.salt_ else as_texts(column)
        index = pc.index_in(texts, value_set=pa.array(self.known_, pa.large_string()), skip_nulls=True)
        codes = np.asarray(pc.fill_null(index, -1)).astype(np.int32)
        codes[codes >= 0] += FIRST_KNOWN
        unknown = codes < 0
        if unknown.any():
            rare = pc.is_in(texts, value_set=pa.array(self.rare_, pa.large_string()), skip_nulls=True)
            codes[unknown] = np.where(np.asarray(rare)[unknown], RARE, UNSEEN)
            codes[np.asarray(pc.is_null(texts))] = NULL
        return codes


def as_texts(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """large_string[n] of any column: categories are compared as text."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pa.large_string())


def concealed(column: pa.ChunkedArray | pa.Array, salt: str) -> pa.Array:
    """large_string[n]: `hmac:` and 128 bits of HMAC-SHA256 (RFC 2104) of each text under the salt; nulls stay.

    A concealed text stays as it is, so that the gate's rows, which are stored without their texts, get the same codes.
    """
    found = as_texts(column).dictionary_encode()
    standing = [text if _IS_CONCEALED.fullmatch(text) else _hmac(salt, text) for text in found.dictionary.to_pylist()]
    return pa.array(standing, pa.large_string()).take(found.indices)


def _hmac(salt: str, text: str) -> str:
    return CONCEALED + hmac.digest(salt.encode(), text.encode(), "sha256").hex()[:32]


def conceal_all(vocabularies: Sequence[Vocabulary], sensitive: Collection[str]) -> tuple[Vocabulary, ...]:
    """The vocabularies, with the texts of sensitive features concealed.

    Scoring must compute the codes, so the salt is stored in the bundle: it defeats precomputed tables, but not somebody who
    tries likely texts one by one. It is derived from the texts themselves: the same rows give the same bundle.
    """
    state = [[item.name, item.known_, item.rare_] for item in vocabularies if item.name in sensitive]
    salt = digest.of_json(["salt", state])[:32]

    def conceal(texts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_hmac(salt, text) for text in texts)

    return tuple(
        Vocabulary(item.name, conceal(item.known_), tuple(sorted(conceal(item.rare_))), salt)
        if item.name in sensitive
        else item
        for item in vocabularies
    )


def numbered_labels(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """str[n]: `(value 1)`, `(value 2)`, ... by falling frequency instead of the values of a sensitive column; a null is
    `(null)`.
    """
    found = as_texts(column).dictionary_encode()
    texts = np.asarray(found.dictionary.to_pylist(), object).astype(str)
    index = np.asarray(pc.fill_null(found.indices, len(texts)))
    order = np.lexsort((texts, -np.bincount(index, minlength=len(texts) + 1)[: len(texts)]))
    labels = np.empty(len(texts) + 1, object)
    labels[order] = [f"(value {place + 1})" for place in range(len(texts))]
    labels[-1] = NO_TEXT
    return np.asarray(labels[index]).astype(str)


def group_labels(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """str[n]: the text of each value; a null is `(null)`; a text that reads so is put in quotes."""
    texts = as_texts(column)
    texts = pc.if_else(pc.equal(texts, NO_TEXT), repr(NO_TEXT), texts)
    return np.asarray(pc.fill_null(texts, NO_TEXT).to_pylist(), object).astype(str)


def fit_vocabulary(name: str, column: pa.ChunkedArray, config: EncodeConfig) -> Vocabulary:
    """The categories of a column, counted; those less frequent than `min_count`, or beyond `max_categories`, are rare."""
    counts = pc.value_counts(as_texts(column).drop_null())
    pairs = sorted(
        zip(counts.field("counts").to_pylist(), counts.field("values").to_pylist(), strict=True),
        key=lambda x: (-x[0], x[1]),
    )
    known = [text for count, text in pairs if count >= config.min_count][: config.max_categories]
    rare = sorted(text for _, text in pairs[len(known) :])[:RARE_KEPT]
    return Vocabulary(name, tuple(known), tuple(rare))
