"""Hashed n-grams of texts: the slow twin, scikit-learn's tokens and weights, and the same bytes in any batch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

from kernels.text import NGrams, encode_texts, text_counts, vector_norms
from tests import naive
from tests.kernels.cases import examples

TEXTS = st.text(st.sampled_from("ab c.é日_7 "), max_size=12)
LETTERS = st.text(st.sampled_from("abcé日 "), max_size=16)


def arrow(texts):
    raw = [text.encode() for text in texts]
    return np.frombuffer(b"".join(raw), np.uint8), np.cumsum([0, *map(len, raw)])


@examples(40)
@given(st.lists(TEXTS, max_size=5), st.integers(1, 9), st.integers(0, 3), st.integers(0, 4), st.integers(0, 2**63 - 1))
def test_every_number_is_that_of_the_slow_twin(texts, buckets, words, characters, seed):
    settings = NGrams(buckets, words, characters or (not words), seed)
    idf, seen = np.linspace(1, 2, buckets), np.frombuffer(b"\x5a\x0f", np.uint8)
    found = encode_texts(*arrow(texts), settings, idf, seen)
    expected = [naive.encoded_text(text.encode(), settings, idf, seen) for text in texts]
    np.testing.assert_allclose(found, np.array(expected).reshape(len(texts), 2 + buckets), rtol=1e-13)
    counts, lengths, hashes = text_counts(*arrow(texts), settings)
    each = [naive.ngrams(text.encode(), *settings[1:]) for text in texts]
    assert counts.tolist() == [sum(any(h % buckets == at for h in all_) for _, all_ in each) for at in range(buckets)]
    assert lengths.tolist() == [len(own) for own, _ in each]
    assert hashes.tolist() == sorted({h for own, _ in each for h in own})


@examples(30)
@given(st.lists(LETTERS, min_size=1, max_size=6), st.sampled_from([(1, 0), (2, 0), (3, 0), (0, 2), (0, 4)]))
def test_tokens_and_weights_are_those_of_scikit_learn(texts, kind):
    words, characters = kind
    tokens = HashingVectorizer(
        analyzer="word" if words else "char_wb", ngram_range=(1, words) if words else (characters, characters),
        token_pattern=r"[^ ]+", lowercase=False,
    ).build_analyzer()  # fmt: skip
    settings = NGrams(64, words, characters, 5)
    count = np.zeros((len(texts), 64))
    for row, text in enumerate(texts):
        for token in tokens(text):
            if words:
                hashes = [naive.hash_bytes(word.encode(), 5) for word in token.split(" ")]
                hash_ = hashes[0]
                for more in hashes[1:]:
                    hash_ = naive.combine64(hash_, more)
            else:
                hash_ = naive.hash_bytes(token.encode(), 5 ^ (1 << 63))
            count[row, hash_ % 64] += 1
    fitted = TfidfTransformer(sublinear_tf=True).fit(count)
    found = encode_texts(*arrow(texts), settings, fitted.idf_, np.zeros(1, np.uint8))[:, 2:]
    np.testing.assert_allclose(found, fitted.transform(count).toarray(), rtol=1e-12)
    np.testing.assert_array_equal(text_counts(*arrow(texts), settings)[0], (count > 0).sum(0))


@examples(20)
@given(st.lists(TEXTS, min_size=1, max_size=9))
def test_a_text_gives_the_same_bytes_alone_and_on_any_number_of_threads(texts):
    settings, idf, seen = NGrams(7, 2, 2, 1), np.linspace(1, 2, 7), np.frombuffer(b"\x01", np.uint8)
    whole = encode_texts(*arrow(texts), settings, idf, seen)
    for threads in (2, 3):
        assert encode_texts(*arrow(texts), settings, idf, seen, threads).tobytes() == whole.tobytes()
    alone = np.concatenate([encode_texts(*arrow([text]), settings, idf, seen) for text in texts])
    assert alone.tobytes() == whole.tobytes()


def test_hashes_of_ngrams_are_fixed_for_ever():
    found = text_counts(*arrow(["a b"]), NGrams(1 << 20, 2, 3, 0))
    assert np.flatnonzero(found[0]).tolist() == [288385, 396724, 478627, 665693, 809809]
    assert found[2].tolist() == [3261932395218554275, 7808632033373457844]


@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e200])
def test_norms_are_those_of_numpy_and_do_not_overflow(scale):
    block = np.random.default_rng(0).normal(size=(20, 5))
    block[3] = 0.0
    np.testing.assert_allclose(vector_norms(block * scale), np.linalg.norm(block, axis=1) * scale, rtol=1e-14)
    alone = np.concatenate([vector_norms(row[None] * scale) for row in block])
    assert alone.tobytes() == vector_norms(block * scale).tobytes()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: text_counts(np.zeros(2, np.uint8), np.array([0, 3]), NGrams(1, 1, 0, 0)), "offsets must rise within"),
        (lambda: text_counts(np.zeros(2, np.uint8), np.array([0, 2]), NGrams(0, 1, 0, 0)), "buckets"),
        (lambda: text_counts(np.zeros(2, np.uint8), np.array([0, 2]), NGrams(1, 0, 0, 0)), "n-grams of words"),
        (
            lambda: encode_texts(
                np.zeros(2, np.uint8), np.array([0, 2]), NGrams(2, 1, 0, 0), np.ones(1), np.ones(1, np.uint8)
            ),
            "2 weights",
        ),
        (lambda: vector_norms(np.zeros(3)), "shape"),
    ],
)
def test_bad_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
