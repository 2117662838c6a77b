"""Features that are several numbers: vectors, sets of texts and free text, each taken apart by fitted state.

A part is one number of the feature, with a name such as `embedding[norm]`, `tags[red]` or `title[words]`; from then on it is
encoded like a numeric feature, and the drift profile counts some of them (`counted`). Each one costs the alarms of the others a
little power, so those are chosen of which some move with any likely change:

vector  its norm, then its numbers; the norm and at most COUNTED numbers, evenly spaced, are counted. If the model that makes the
        vectors is replaced, each of them moves; the multivariate check of `monitor` reads them all.
set     how many members it has, how many of them are not among the most frequent ones of training, and 0 or 1 for each of
        these. The first two are counted, and the COUNTED most frequent members.
text    words, the share of words that training never had, and the weights of hashed n-grams (kernels.text). The first two are
        counted, and COUNTED buckets that about half of the texts of training have, which a change of subject moves most.

A null has no norm, no number of members and no number of words (NaN); its other parts are NaN (vector) or 0 (set, text).
"""

from __future__ import annotations

import base64
import binascii
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from engine.config.names import distinct
from engine.config.sections.features import EncodeConfig
from engine.data.arrow_types import as_lists, list_items
from engine.errors import UserError
from engine.features.numbers import NumericColumn, fit_number
from engine.features.spec import SET, TEXT, VECTOR
from engine.runtime.records import Count, Damaged, Within
from kernels.text import NGrams, encode_texts, text_counts, vector_norms

COUNTED = 16  # parts of a vector, members of a set and buckets of a text that the profile counts
WIDEST = 65_536  # parts of one feature
SEED = 0x7465787473  # of the hashes of n-grams; kept with the state, so that another one may be chosen later
BITS_A_WORD, FEWEST_BITS, MOST_BITS = (
    16,
    1 << 12,
    1 << 22,
)  # of 16 words that training never had, at most one seems known
FIT_ROWS = CHUNK = 65_536
_MARKS = r"[^\pL\pN\pM_]+"  # of Unicode: what separates words
Column: TypeAlias = pa.ChunkedArray | pa.Array


@dataclass(frozen=True)
class VectorParts:
    """A vector of `width` numbers."""

    KIND: ClassVar[str] = VECTOR
    name: str
    width: Annotated[int, Within(1, WIDEST)]

    @property
    def names(self) -> list[str]:
        """Names of the parts."""
        return [f"{self.name}[norm]", *(f"{self.name}[{place}]" for place in range(self.width))]

    @property
    def counted(self) -> list[int]:
        """Places of the parts that the profile counts."""
        places = np.linspace(0, self.width - 1, min(self.width, COUNTED)).astype(np.int64)
        return [0, *(1 + int(place) for place in places)]

    def numbers(self, column: Column) -> NDArray[np.float64]:
        """float64[n, 1 + width], NaN for a null. Raises UserError for another width, and for a number that is not finite."""
        lists = as_lists(column)
        there = np.asarray(lists.is_valid())
        block = self._block(lists.drop_null())
        out = np.full((len(lists), 1 + self.width), np.nan)
        out[there, 0], out[there, 1:] = vector_norms(block), block
        return out

    def _block(self, lists: pa.ListArray) -> NDArray[np.float64]:
        lengths = np.asarray(pc.list_value_length(lists))
        if (wrong := np.flatnonzero(lengths != self.width)).size:
            raise UserError(
                f"the vector {self.name!r} must have {self.width} numbers in each row, found {lengths[wrong[0]]}"
            )
        flat = lists.flatten().cast(pa.float64())
        block = np.asarray(flat.to_numpy(zero_copy_only=False), np.float64).reshape(-1, self.width)
        if not np.isfinite(block).all():
            raise UserError(
                f"the vector {self.name!r} must hold finite numbers, found null, NaN or an infinite one: mend it, or make the "
                "whole vector null"
            )
        return block

    @classmethod
    def fit(
        cls, name: str, column: Column, config: EncodeConfig, warn: Callable[[str], None]
    ) -> tuple[VectorParts, list[NumericColumn]]:
        """The width of the training vectors, and centre and scale of each number of at most FIT_ROWS of them, evenly spaced."""
        lists = as_lists(column)
        lengths = pc.list_value_length(lists.drop_null())
        width = int(lengths[0].as_py()) if len(lengths) else 1
        if not 1 <= width <= WIDEST:
            raise UserError(f"the vector {name!r} must have 1 to {WIDEST:,} numbers, found {width}")
        state, plain = cls(name, width), _standardised(config)
        numbers = state.numbers(lists.take(pa.array(np.arange(0, len(lists), max(1, -(-len(lists) // FIT_ROWS))))))
        columns = [fit_number(part, numbers[:, at], plain, warn, True) for at, part in enumerate(state.names)]
        marked = config.missing_indicator and lists.null_count > 0  # of the first part only: all are null together
        return state, [replace(item, missing_=marked and not at) for at, item in enumerate(columns)]


@dataclass(frozen=True)
class SetParts:
    """A set of texts; `members_`: the most frequent ones of training, then by text."""

    KIND: ClassVar[str] = SET
    name: str
    members_: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """Names of the parts."""
        return distinct(f"{self.name}[{part}]" for part in ("members", "others", *self.members_))

    @property
    def counted(self) -> list[int]:
        """Places of the parts that the profile counts."""
        return list(range(2 + min(len(self.members_), COUNTED)))

    def numbers(self, column: Column) -> NDArray[np.float64]:
        """float64[n, 2 + members]; a member that is there twice counts once, a null member not at all."""
        lists = as_lists(column)
        rows, codes, texts = _members(lists)
        places = np.asarray(pc.fill_null(pc.index_in(texts, value_set=pa.array(self.members_, pa.large_string())), -1))
        places = places.astype(np.int64)[codes]
        out = np.zeros((len(lists), 2 + len(self.members_)))
        out[:, 0] = np.bincount(rows, minlength=len(lists))
        out[:, 1] = np.bincount(rows[places < 0], minlength=len(lists))
        out[rows[places >= 0], 2 + places[places >= 0]] = 1.0
        out[np.asarray(lists.is_null()), 0] = np.nan
        return out

    @classmethod
    def fit(
        cls, name: str, column: Column, config: EncodeConfig, warn: Callable[[str], None]
    ) -> tuple[SetParts, list[NumericColumn]]:
        """The `set_members` most frequent members with `min_count` rows, and centre and scale of their numbers."""
        _, codes, texts = _members(as_lists(column))
        found = sorted(zip(-np.bincount(codes, minlength=len(texts)), texts.to_pylist(), strict=True))
        members = tuple(text for count, text in found if -count >= config.min_count)[: config.set_members]
        state = cls(name, members)
        lists, plain = as_lists(column), _standardised(config)
        parts = [state.numbers(lists.slice(at, CHUNK))[:, :2] for at in range(0, max(len(lists), 1), CHUNK)]
        counts = np.concatenate(parts)
        columns = [fit_number(part, counts[:, at], plain, warn, True) for at, part in enumerate(state.names[:2])]
        return state, columns + [_between(part, 1.0) for part in state.names[2:]]


@dataclass(frozen=True)
class TextParts:
    """Free text: n-grams of `words` words and of `characters` characters in `len(idf_)` buckets.

    `seen_`: a bit for the hash of each word of training, in base64; `counted_`: the buckets that the profile counts.
    """

    KIND: ClassVar[str] = TEXT
    name: str
    words: Annotated[int, Within(0, 5)]
    characters: Annotated[int, Within(0, 10)]
    seed: Count
    idf_: tuple[float, ...]
    seen_: str
    counted_: tuple[int, ...]

    @property
    def ngrams(self) -> NGrams:
        """The kernel's form."""
        return NGrams(len(self.idf_), self.words, self.characters, self.seed)

    @property
    def names(self) -> list[str]:
        """Names of the parts."""
        return [f"{self.name}[words]", f"{self.name}[new]", *(f"{self.name}[{at}]" for at in range(len(self.idf_)))]

    @property
    def counted(self) -> list[int]:
        """Places of the parts that the profile counts."""
        return [0, 1, *(2 + at for at in self.counted_)]

    def numbers(self, column: Column) -> NDArray[np.float64]:
        """float64[n, 2 + buckets]."""
        texts = _flat(column)
        out = encode_texts(*_buffers(_plain(texts)), self.ngrams, np.array(self.idf_), _mask(self.seen_))
        out[np.asarray(texts.is_null()), 0] = np.nan
        return out

    @classmethod
    def fit(
        cls, name: str, column: Column, config: EncodeConfig, warn: Callable[[str], None]
    ) -> tuple[TextParts, list[NumericColumn]]:
        """Weights of the buckets, ln((1 + n) / (1 + texts with it)) + 1, and the words, of n training texts."""
        texts = _flat(column)
        ngrams = NGrams(config.text_buckets, config.text_words, config.text_characters, SEED)
        counts, known, lengths = np.zeros(ngrams.buckets, np.int64), np.empty(0, np.uint64), [np.empty(0)]
        for at in range(0, len(texts), CHUNK):
            chunk = texts.slice(at, CHUNK)
            part, words, hashes = text_counts(*_buffers(_plain(chunk)), ngrams)
            counts, known = counts + part, np.union1d(known, hashes)
            lengths.append(np.where(np.asarray(chunk.is_null()), np.nan, words))
        there = len(texts) - texts.null_count
        idf = np.log((1 + there) / (1 + counts)) + 1
        nearest = np.argsort(np.abs(counts - there / 2), kind="stable")[:COUNTED]
        counted = tuple(sorted(int(at) for at in nearest if counts[at]))
        seen = base64.b64encode(_bits(known)).decode()
        state = cls(name, ngrams.words, ngrams.characters, ngrams.seed, tuple(idf.tolist()), seen, counted)
        first = fit_number(state.names[0], np.concatenate(lengths), _standardised(config), warn, True)
        # The buckets' squares have the sum 1: divided by this, their mean square is 1 as that of a standardised number.
        scale = 1 / np.sqrt(len(idf))
        return state, [first, _between(state.names[1], 1.0), *(_between(part, scale) for part in state.names[2:])]


Parts = VectorParts | SetParts | TextParts
PARTS: dict[str, type[Parts]] = {item.KIND: item for item in (VectorParts, SetParts, TextParts)}


def check(parts: Sequence[Parts], where: str) -> None:
    """Raise Damaged for state that cannot be used."""
    for item in parts:
        if len(item.names) > 2 + WIDEST or len(set(item.names)) != len(item.names):
            raise Damaged(f"{where}: {item.name!r} must have at most {WIDEST:,} parts, each with a name of its own")
        if isinstance(item, TextParts):
            _check_text(item, where)


def _check_text(item: TextParts, where: str) -> None:
    buckets = len(item.idf_)
    if not buckets or not all(0 <= at < buckets for at in item.counted_) or len(item.counted_) > COUNTED:
        raise Damaged(f"{where}: text {item.name!r} must count at most {COUNTED} of its {buckets} buckets")
    if not item.words + item.characters or not all(0 < weight < 1e6 for weight in item.idf_):
        raise Damaged(f"{where}: text {item.name!r} must have n-grams, and weights between 0 and 1e6")
    try:
        size = len(_mask(item.seen_))
    except (ValueError, binascii.Error):
        size = 0
    if not 0 < size <= MOST_BITS // 8:
        raise Damaged(f"{where}: text {item.name!r} must have 1 to {MOST_BITS // 8:,} bytes of words in base64")


def _standardised(config: EncodeConfig) -> EncodeConfig:
    """The config with one column a number: a vector of 300 numbers would have 4,800 bins."""
    return EncodeConfig(clip=config.clip, missing_indicator=config.missing_indicator)


def _between(name: str, scale: float) -> NumericColumn:
    """A number from 0 to 1 that is only divided: most are 0 and stay so."""
    return NumericColumn(name, "standardise", 0.0, float(scale), 0.0, 1.0, False)


def _flat(column: Column) -> pa.Array:
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def _members(lists: pa.ListArray) -> tuple[NDArray[np.int64], NDArray[np.int64], pa.Array]:
    """(row, code) of each different member of each row, and the text of each code."""
    rows, items = list_items(lists)
    encoded = items.cast(pa.large_string()).dictionary_encode()
    codes = np.asarray(pc.fill_null(encoded.indices, -1)).astype(np.int64)
    there = codes >= 0
    size = max(len(encoded.dictionary), 1)
    pairs = np.unique(rows[there] * size + codes[there])
    return pairs // size, pairs % size, encoded.dictionary


def _plain(texts: pa.Array) -> pa.Array:
    """Lower case; beyond ASCII in composed form (NFC) and with blanks for marks. ASCII texts come out the same either way."""
    # Joined anew: Arrow's lower case of texts that do not begin at offset 0, as after a slice, is wrong (pyarrow 26).
    texts = pa.concat_arrays([pc.fill_null(texts.cast(pa.large_string()), "")])
    if pc.all(pc.string_is_ascii(texts)).as_py() is not False:
        return pc.ascii_lower(texts)
    return pc.replace_substring_regex(pc.utf8_lower(pc.utf8_normalize(texts, "NFC")), _MARKS, " ")


def _buffers(texts: pa.Array) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """(bytes, offsets) of a large_string array."""
    offsets = np.frombuffer(texts.buffers()[1] or bytes(8), np.int64)[texts.offset : texts.offset + len(texts) + 1]
    return np.frombuffer(texts.buffers()[2] or b"", np.uint8), offsets


@functools.lru_cache(maxsize=64)
def _mask(text: str) -> NDArray[np.uint8]:
    """The bits of `seen_`. Raises ValueError."""
    return np.frombuffer(base64.b64decode(text, validate=True), np.uint8)


def _bits(hashes: NDArray[np.uint64]) -> bytes:
    size = FEWEST_BITS
    while size < min(BITS_A_WORD * len(hashes), MOST_BITS):
        size *= 2
    bits = np.zeros(size, np.uint8)
    bits[hashes % np.uint64(size)] = 1
    return np.packbits(bits, bitorder="little").tobytes()
