"""The order of the data: mixed by tokens, every segment once an epoch, a pure function of (seed, position)."""

import itertools
import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from lemur_fast.data.mixture import WINDOW_ROWS, Mixture, Segments

ROW = 512
WEIGHTS = {"code": 10.0, "text": 1.0}


@pytest.fixture
def documents():
    rng = np.random.default_rng(0)
    kinds = np.array(["code"] * 400 + ["text"] * 300, dtype=object)
    lengths = np.concatenate([rng.lognormal(6, 1.2, 400), rng.lognormal(4.5, 1, 300)]).astype(np.int64) + 2
    order = rng.permutation(700)
    return SimpleNamespace(lengths=lengths[order], kinds=kinds[order])


def take(mixture, count):
    return list(itertools.islice(mixture, count))


def test_segments_cover_every_document_once():
    lengths = np.array([1, 2, 511, 512, 513, 514, 1024, 1500])
    segments = Segments.cut(np.arange(10, 18), lengths, ROW)
    expected = [
        (document, start, min(ROW, length - start))
        for document, length in zip(range(10, 18), lengths.tolist(), strict=True)
        for start in range(0, length, ROW)
        if min(ROW, length - start) > 1
    ]
    assert [tuple(segments[i]) for i in range(len(segments))] == expected


@pytest.mark.parametrize("rows", [24, 70, 200, 500])
def test_the_mixture_holds_from_early_on(documents, rows):
    mixture = Mixture(documents, WEIGHTS, ROW, seed=1)
    counts = mixture.tokens(take(mixture, rows))
    share = counts["text"] / sum(counts.values())
    # A run may stop anywhere: it is never further off than the tokens of about one row.
    assert abs(share - 1 / 11) < max(0.01 / 11, 1 / rows)


def test_any_number_of_kinds_and_weights_in_any_unit(documents):
    documents.kinds = np.where(np.arange(700) % 3 == 0, "sql", documents.kinds)
    mixture = Mixture(documents, {"text": 0.5, "sql": 2, "code": 7.5}, ROW, seed=0)
    counts = mixture.tokens(take(mixture, 4 * WINDOW_ROWS))
    total = sum(counts.values())
    assert {kind: round(count / total, 2) for kind, count in counts.items()} == {"text": 0.05, "sql": 0.2, "code": 0.75}


def test_rows_are_full_and_never_too_full(documents):
    mixture = Mixture(documents, WEIGHTS, ROW, seed=0)
    filled = [sum(segment.length for segment in row) for row in take(mixture, 300)]
    assert max(filled) <= ROW
    assert np.mean(filled) > 0.97 * ROW


def test_every_segment_once_an_epoch(documents):
    mixture = Mixture(documents, WEIGHTS, ROW, seed=0)
    drawn = Counter(segment for row in take(mixture, 1000) for segment in row)
    for kind, segments in mixture.segments.items():
        counts = [drawn[segments[i]] for i in range(len(segments))]
        read = mixture.epochs(
            {kind: sum(segment.length * n for segment, n in drawn.items() if mixture.kinds[segment.document] == kind)}
        )
        # Held-over segments wait a window: at most one epoch less, and none is read ahead of its epoch.
        assert np.floor(read[kind]) - 1 <= min(counts)
        assert max(counts) <= np.ceil(read[kind]) + 1
        assert np.mean(counts) == pytest.approx(read[kind], abs=0.25)


def test_the_order_is_a_function_of_the_seed(documents):
    rows = take(Mixture(documents, WEIGHTS, ROW, seed=5), 150)
    assert rows == take(Mixture(documents, WEIGHTS, ROW, seed=5), 150)
    assert rows != take(Mixture(documents, WEIGHTS, ROW, seed=6), 150)


@pytest.mark.parametrize("position", [0, 1, 62, 63, 64, 65, 140])
def test_a_state_returns_to_its_position(documents, position):
    mixture = Mixture(documents, WEIGHTS, ROW, seed=5)
    take(mixture, position)
    state = json.loads(json.dumps(mixture.state()))
    expected = take(mixture, 100)
    fresh = Mixture(documents, WEIGHTS, ROW, seed=5)
    take(fresh, 17)
    fresh.load_state(state)
    assert take(fresh, 100) == expected


def test_epochs_are_counted(documents):
    mixture = Mixture(documents, WEIGHTS, ROW, seed=0)
    text = int(documents.lengths[documents.kinds == "text"].sum())
    assert mixture.epochs({"text": 2.5 * text})["text"] == pytest.approx(2.5, rel=0.01)


def test_a_weight_of_zero_leaves_a_kind_out(documents):
    mixture = Mixture(documents, {"code": 1, "text": 0}, ROW, seed=0)
    assert {mixture.kinds[segment.document] for row in take(mixture, 100) for segment in row} == {"code"}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "no kind has a weight above 0"),
        ({"code": 0}, "no kind has a weight above 0"),
        ({"code": 1, "text": -1}, "'text' must not be negative, got -1"),
        ({"code": 1, "prose": 1}, r"asks for 'prose'.*kinds in it: \['code', 'text'\]"),
    ],
)
def test_impossible_mixtures_are_refused(documents, weights, message):
    with pytest.raises(ValueError, match=message):
        Mixture(documents, weights, ROW, seed=0)
