"""The order of the data: mixed by tokens, every segment once an epoch, a pure function of (seed, position)."""

import itertools
import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from lemur_fast.data.mixture import WINDOW_ROWS, Mixture, Segments
from lemur_fast.packing import Segment

ROW = 512
WEIGHTS = {"code": 10.0, "text": 1.0}


@pytest.fixture
def documents():
    rng = np.random.default_rng(0)
    kinds = np.array(["code"] * 400 + ["text"] * 300, dtype=object)
    lengths = np.concatenate([rng.lognormal(6, 1.2, 400), rng.lognormal(4.5, 1, 300)]).astype(np.int64) + 2
    order = rng.permutation(700)
    sources = np.where(kinds == "text", "docs", np.where(rng.random(700) < 0.3, "stack", "stdlib")).astype(object)
    return SimpleNamespace(lengths=lengths[order], kinds=kinds[order], sources=sources[order])


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


@pytest.mark.parametrize("seed", range(4))
def test_the_mixture_holds_wherever_a_run_stops(documents, seed):
    """No kind is ever ahead or behind by more than about a row's tokens, so a run of 100 rows is right within 1%."""
    mixture = Mixture(documents, WEIGHTS, ROW, seed)
    counts = np.array([mixture.tokens([row])["text"] for row in take(mixture, 500)])
    sizes = np.array(
        [sum(segment.length for segment in row) for row in take(Mixture(documents, WEIGHTS, ROW, seed), 500)]
    )
    ahead = counts.cumsum() - sizes.cumsum() / 11
    assert np.abs(ahead).max() < 1.1 * ROW
    assert np.abs(ahead[:10]).max() < 0.7 * ROW


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


@pytest.mark.parametrize("windows", [1, 2, 20])
def test_every_segment_once_an_epoch(documents, windows):
    """What was drawn is what was given out and what is held over, nothing lost and nothing twice."""
    mixture = Mixture(documents, WEIGHTS, ROW, seed=0)
    given: Counter = Counter()
    while mixture.state()["window"] < windows:
        given.update(next(mixture))
    state = mixture.state()  # one row of the next window is given out
    given.subtract(mixture._rows[0])
    given.update(Segment(*segment) for segment in state["held_over"])
    for kind, segments in mixture.segments.items():
        counts = [given[segments[i]] for i in range(len(segments))]
        epochs, rest = divmod(state["drawn"][kind], len(segments))
        assert Counter(counts) == {n: c for n, c in ((epochs + 1, rest), (epochs, len(segments) - rest)) if c}
        assert sum(segments.length[i] * n for i, n in enumerate(counts)) == state["tokens"][kind]


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


def test_epochs_are_counted_by_source(documents):
    """Against a count of every segment that was given out."""
    mixture = Mixture(documents, WEIGHTS, ROW, seed=1)
    counts: Counter = Counter()
    for rows in range(1, 1200):
        for segment in next(mixture):
            counts[documents.sources[segment.document]] += segment.length
        if rows in (1, 63, 64, 200, 1199):
            read = mixture.sources_read(json.loads(json.dumps(mixture.state())))
            assert {source: of["tokens"] for source, of in read.items() if of["tokens"]} == counts
    for source, of in read.items():
        assert of["epochs"] == counts[source] / documents.lengths[documents.sources == source].sum()
    assert min(of["epochs"] for of in read.values()) > 1.2


def test_sources_are_weighed_by_name(documents):
    mixture = Mixture(documents, {"stack": 1, "text": 1}, ROW, seed=0)
    rows = take(mixture, 300)
    counts = mixture.tokens(rows)
    assert counts["stack"] / sum(counts.values()) == pytest.approx(0.5, abs=0.01)
    assert {documents.sources[segment.document] for row in rows for segment in row} == {"stack", "docs"}


def test_a_weight_of_zero_leaves_a_kind_out(documents):
    mixture = Mixture(documents, {"code": 1, "text": 0}, ROW, seed=0)
    assert {mixture.kinds[segment.document] for row in take(mixture, 100) for segment in row} == {"code"}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "no kind has a weight above 0"),
        ({"code": 0}, "no kind has a weight above 0"),
        ({"code": 1, "text": -1}, "'text' must not be negative, got -1"),
        ({"code": 1, "prose": 1}, r"asks for 'prose'.*kinds in it: \['code', 'text'\]; sources: \['docs', 'stack'"),
        ({"prose": 1}, r"name what is there, as in --mixture code 1"),
        ({"code": 1, "stack": 1}, "documents of 'stack' are weighed as 'code', too"),
    ],
)
def test_impossible_mixtures_are_refused(documents, weights, message):
    with pytest.raises(ValueError, match=message):
        Mixture(documents, weights, ROW, seed=0)
