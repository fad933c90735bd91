"""Exact and near duplicates, of documents of all sources.

    digests, signatures      of each document, as it is read
    equal()                  documents with the same digest as an earlier one
    candidates()             band by band: documents whose signatures agree in a whole band
    verified()               those pairs whose shingles really overlap, exactly
    resolve()                in the order of the corpus: a document that is like an earlier one that is kept, is dropped

So every document that is dropped is like one that is kept, by exact Jaccard similarity of its sets of 5-word shingles;
MinHash (Broder 1997) decides only which pairs are looked at. A chain of versions, each like the one before but not like
the first, is not dropped as a whole, as it would be by connected components.

Signatures are rensa's R-MinHash, 128 numbers, of which 21 bands of 6 are used: a pair of similarity s is looked at with
probability 1 - (1 - s^6)^21, which is 0.998 at 0.8 and 0.93 at 0.7. On disk a document has 16 bytes of digest and 8 a
band. In memory there is one band at a time: about 32 bytes a document.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from rensa import RMinHash

from lemur_fast.data.shingles import shingles

BANDS, BAND_ROWS = 21, 6
_SLOTS, _SEED = 128, 42  # R-MinHash is fastest at a power of two; 2 of the 128 numbers belong to no band
_FIRST = 8  # members of a band's bucket that each later one is compared with, beside the one just before it
_CACHED_SHINGLES = 2**23  # 64 MiB


def text_digest(text: str) -> bytes:
    """16 bytes that stand for a text: equal texts, however they end, have equal digests."""
    return hashlib.blake2b(text.strip().encode(), digest_size=16).digest()


def band_keys(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Keys of the bands of each text, uint64 [texts, BANDS], and which texts have words at all, bool [texts]."""
    sets = shingles(texts)
    offsets = np.cumsum([0, *map(len, sets)]).astype(np.uint64)
    flat = np.concatenate([np.empty(0, np.uint64), *sets])
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(flat, offsets, _SLOTS, _SEED)
    slots = np.array(matrix.to_rows(), np.uint64).reshape(len(texts), _SLOTS)[:, : BANDS * BAND_ROWS]
    keys = np.zeros((len(texts), BANDS), np.uint64)
    for row in range(BAND_ROWS):  # 6 x 32 bits into 64
        keys = (keys + slots[:, row::BAND_ROWS]) * np.uint64(0x9E3779B97F4A7C15)
        keys ^= keys >> np.uint64(29)
    return keys, np.array([len(each) > 0 for each in sets], bool)


def equal(digests: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Exact duplicates.

    Args:
        digests: uint64 [N, 2].
        documents: numbers of the documents, int64 [N], ascending.

    Returns:
        int64 [duplicates, 2]: a document, and the first one equal to it; in the order of the documents.
    """
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: equal ones stay in the order of the documents
    if not len(order):
        return np.empty((0, 2), np.int64)
    ordered = digests[order]
    new = np.concatenate([[True], (ordered[1:] != ordered[:-1]).any(1)])
    first = np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))
    pairs = np.stack([documents[order[~new]], documents[order[first[~new]]]], 1)
    return pairs[np.argsort(pairs[:, 0])]


def candidates(keys: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Pairs that agree in a band: each document with the first 8 that have its key, and with the one just before it.

    Args:
        keys: uint64 [N], of one band.
        documents: numbers of the documents, int64 [N], ascending.

    Returns:
        int64 [pairs, 2]: later document, earlier document; in order, without repeats.
    """
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    place = np.arange(len(order))
    new = np.ones(len(order), bool)
    new[1:] = ordered[1:] != ordered[:-1]
    first = np.maximum.accumulate(np.where(new, place, 0))
    rank = place - first
    pairs = [np.stack([documents[order[rank > 0]], documents[order[place[rank > 0] - 1]]], 1)]
    for other in range(_FIRST):
        later = rank > other + 1  # the one just before is there already
        pairs.append(np.stack([documents[order[later]], documents[order[first[later] + other]]], 1))
    return np.unique(np.concatenate(pairs), axis=0)


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """Jaccard similarity of two sets, sorted arrays without repeats."""
    common = np.intersect1d(one, other, assume_unique=True).size
    return common / max(1, one.size + other.size - common)


def verified(pairs: np.ndarray, text_of: Callable[[int], str], threshold: float) -> Iterator[tuple[int, int, float]]:
    """Those of the pairs (later, earlier) whose Jaccard similarity is at least `threshold`, and the similarity."""
    cache: OrderedDict[int, np.ndarray] = OrderedDict()
    held = 0

    def set_of(document: int) -> np.ndarray:
        nonlocal held
        if document in cache:
            cache.move_to_end(document)
            return cache[document]
        found = np.unique(shingles([text_of(document)])[0])
        cache[document] = found
        held += found.size
        while held > _CACHED_SHINGLES and len(cache) > 2:
            held -= cache.popitem(last=False)[1].size
        return found

    for later, earlier in pairs.tolist():
        one, other = set_of(later), set_of(earlier)
        if min(one.size, other.size) >= threshold * max(one.size, other.size):
            similarity = jaccard(one, other)
            if similarity >= threshold:
                yield later, earlier, similarity


def resolve(pairs: np.ndarray, similarities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which documents go, and for which.

    Args:
        pairs: int64 [P, 2]: later document, earlier document; in order.
        similarities: float [P].

    Returns:
        int64 [duplicates, 2]: a document to drop, and the first one that it is like and that is kept; float
        [duplicates]: how like they are.
    """
    dropped: set[int] = set()
    chosen = []
    for index, (later, earlier) in enumerate(pairs.tolist()):
        if later not in dropped and earlier not in dropped:
            dropped.add(later)
            chosen.append(index)
    return pairs[chosen].reshape(-1, 2), similarities[chosen]
