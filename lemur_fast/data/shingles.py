"""Words, and the runs of words that duplicates and contamination are told by.

A word is a run of letters, digits and underscores, so that layout and punctuation count for nothing; each character of
a script that is written without spaces is a word of its own. A run of words is known by 64 bits.
"""

import re
from collections.abc import Sequence

import numpy as np
from rensa import RMinHash

SHINGLE_WORDS = 5

_UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # Thai and Lao, kana, Chinese characters
_words = re.compile(rf"[^\W{_UNSPACED}]+|[{_UNSPACED}]").findall
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_SHIFT = np.uint64(29)


def words_of(text: str) -> list[str]:
    """The words of a text, in order."""
    return _words(text)


def ngram_hashes(texts: Sequence[str], size: int, lower: bool = False) -> list[np.ndarray]:
    """Hashes of all runs of `size` words of each text, in order, uint64 `[max(words - size + 1, 0)]`."""
    words = RMinHash.hash_token_sets([words_of(text.lower() if lower else text) for text in texts])
    return [_runs(np.array(hashes, np.uint64), size) for hashes in words]


def shingles(texts: Sequence[str]) -> list[np.ndarray]:
    """Hashes of the 5-word shingles of each text, uint64; a shorter text is one shingle, one without words none."""
    words = RMinHash.hash_token_sets([words_of(text) for text in texts])
    return [_runs(np.array(hashes, np.uint64), max(1, min(SHINGLE_WORDS, len(hashes)))) for hashes in words]


def _runs(words: np.ndarray, size: int) -> np.ndarray:
    """Hashes of all runs of `size` of the words [N], uint64 [max(N - size + 1, 0)]."""
    count = max(len(words) - size + 1, 0)
    run = np.zeros(count, np.uint64)
    for place in range(size):  # unsigned products wrap around
        run = (run + words[place : place + count]) * _MULTIPLIER
        run ^= run >> _SHIFT
    return run
