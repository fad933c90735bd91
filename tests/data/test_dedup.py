"""Duplicates, against exact sets of words that Python compares."""

import itertools
import re

import numpy as np
import pytest

from lemur_fast.data import dedup
from lemur_fast.data.dedup import band_keys, candidates, equal, jaccard, resolve, text_digest, verified
from lemur_fast.data.shingles import ngram_hashes, shingles, words_of


def exact_jaccard(one, other):
    sets = []
    for text in (one, other):
        words = re.findall(r"\w+", text)
        sets.append({tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


@pytest.fixture(scope="module")
def texts():
    """300 documents: families of versions, each with some words changed, so that similarities run from 0 to 1."""
    rng = np.random.default_rng(0)
    documents = []
    for _ in range(50):
        words = rng.integers(0, 5000, int(rng.integers(30, 400))).astype(str)
        for _ in range(6):
            words = words.copy()
            changed = rng.random(len(words)) < rng.choice([0.002, 0.01, 0.03])
            words[changed] = rng.integers(5000, 10000, changed.sum()).astype(str)
            documents.append(" ".join(words))
    return documents


def found_pairs(texts):
    keys, has_words = band_keys(texts)
    assert has_words.all()
    numbers = np.arange(len(texts))
    return np.unique(np.concatenate([candidates(band, numbers) for band in keys.T]), axis=0)


def test_words_and_shingles():
    assert words_of("def f(x_1): return 3.5 # naïve — 中文 ok") == [
        *("def", "f", "x_1", "return", "3", "5", "naïve", "中", "文", "ok"),
    ]
    one, other = shingles(["a b c d e f g", "A(b)  c\n\td-e.f;g".replace("A", "a")])
    assert len(one) == 3
    assert (one == other).all()
    assert [len(each) for each in shingles(["a b c d e", "a b c", "", "..."])] == [1, 1, 0, 0]
    assert shingles(["a b c"])[0] != shingles(["a c b"])[0]
    assert [len(each) for each in ngram_hashes(["a b c", "A B"], 3)] == [1, 0]
    assert (ngram_hashes(["A b"], 2, lower=True)[0] == ngram_hashes(["a B"], 2, lower=True)[0]).all()


def test_jaccard_is_exact(texts):
    sets = [np.unique(each) for each in shingles(texts)]
    for one, other in itertools.combinations(range(24), 2):
        assert jaccard(sets[one], sets[other]) == exact_jaccard(texts[one], texts[other])


def test_recall_and_precision_against_all_pairs(texts):
    truth = {
        (later, earlier): exact_jaccard(texts[later], texts[earlier])
        for earlier, later in itertools.combinations(range(len(texts)), 2)
    }
    pairs = list(verified(found_pairs(texts), texts.__getitem__, 0.7))
    assert all(truth[later, earlier] == similarity >= 0.7 for later, earlier, similarity in pairs)
    found = {pair[:2] for pair in pairs}
    for threshold, recall in ((0.8, 0.98), (0.7, 0.95)):
        wanted = {pair for pair, similarity in truth.items() if similarity >= threshold}
        assert len(wanted) > 100
        assert len(wanted & found) >= recall * len(wanted)


def test_what_is_dropped_is_like_something_kept(texts):
    found = list(verified(found_pairs(texts), texts.__getitem__, 0.7))
    dropped, similarities = resolve(np.array([pair[:2] for pair in found]), np.array([pair[2] for pair in found]))
    gone = set(dropped[:, 0].tolist())
    assert 50 < len(gone) == len(dropped)
    for (later, kept), similarity in zip(dropped.tolist(), similarities, strict=True):
        assert kept < later
        assert kept not in gone
        assert exact_jaccard(texts[later], texts[kept]) == similarity >= 0.7
    left = [text for number, text in enumerate(texts) if number not in gone]
    close = sum(exact_jaccard(a, b) >= 0.8 for a, b in itertools.combinations(left, 2))
    assert close <= 0.02 * len(gone)


def test_a_chain_is_not_dropped_as_a_whole():
    pairs = np.array([[1, 0], [2, 1], [3, 2]])  # 2 is like 1, not like 0
    dropped, similarities = resolve(pairs, np.array([0.9, 0.8, 0.7]))
    assert dropped.tolist() == [[1, 0], [3, 2]]
    assert similarities.tolist() == [0.9, 0.7]


def test_a_large_bucket_stays_linear():
    pairs = candidates(np.zeros(1000, np.uint64), np.arange(1000) * 2)
    assert len(pairs) < 9 * 1000
    for number in (1, 5, 8, 9, 500):
        earlier = set(pairs[pairs[:, 0] == 2 * number, 1].tolist())
        assert earlier == {2 * other for other in range(min(8, number))} | {2 * (number - 1)}
    assert candidates(np.arange(5, dtype=np.uint64), np.arange(5)).shape == (0, 2)
    assert candidates(np.empty(0, np.uint64), np.empty(0, np.int64)).shape == (0, 2)


def test_exact_duplicates_point_to_their_first():
    texts = ["b", "a", "b\n", "c", "a", " b"]
    digests = np.frombuffer(b"".join(map(text_digest, texts)), np.uint64).reshape(-1, 2)
    numbers = np.array([3, 4, 7, 8, 20, 21])
    assert equal(digests, numbers).tolist() == [[7, 3], [20, 4], [21, 3]]
    assert equal(digests[:0], numbers[:0]).shape == (0, 2)


def test_the_cache_of_sets_is_bounded_and_changes_nothing(texts, monkeypatch):
    pairs = found_pairs(texts)
    expected = list(verified(pairs, texts.__getitem__, 0.7))
    monkeypatch.setattr(dedup, "_CACHED_SHINGLES", 500)
    reads = []
    assert list(verified(pairs, lambda number: reads.append(number) or texts[number], 0.7)) == expected
    assert len(reads) > len(texts)


def test_texts_without_words_have_no_keys_to_share():
    keys, has_words = band_keys(["...", "a b", ""])
    assert keys.shape == (3, dedup.BANDS)
    assert has_words.tolist() == [False, True, False]
    assert band_keys([])[0].shape == (0, dedup.BANDS)
