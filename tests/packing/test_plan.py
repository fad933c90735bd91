"""Plans: nothing lost that the report does not say, no batch too full, the bins that best-fit-decreasing defines."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lemur_fast import _compiled, packing

lengths_strategy = st.lists(st.integers(0, 40), max_size=60)
max_tokens_strategy = st.integers(1, 32)


def naive_best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best-fit-decreasing as its definition reads, O(n^2). Of equally tight bins, the one touched last."""
    bins: list[dict] = []
    for clock, item in enumerate(sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))):
        fitting = [b for b in bins if b["room"] >= lengths[item]]
        if not fitting:
            fitting = [{"room": capacity, "touched": -1, "items": []}]
            bins.append(fitting[0])
        chosen = min(fitting, key=lambda b: (b["room"], -b["touched"]))
        chosen["room"] -= lengths[item]
        chosen["touched"] = clock
        chosen["items"].append(item)
    return [b["items"] for b in bins]


def segments(plan: packing.PackPlan) -> list[packing.Segment]:
    return [segment for batch in plan for segment in batch]


def covered(plan: packing.PackPlan, documents: int) -> list[list[int]]:
    """For each document the tokens that the plan holds, sorted; doubles stay."""
    tokens: list[list[int]] = [[] for _ in range(documents)]
    for document, start, length in segments(plan):
        tokens[document].extend(range(start, start + length))
    return [sorted(t) for t in tokens]


def kept_length(length: int, max_tokens: int, overlong: str) -> int:
    return {"split": length, "truncate": min(length, max_tokens), "drop": length if length <= max_tokens else 0}[
        overlong
    ]


@given(
    lengths_strategy,
    max_tokens_strategy,
    st.sampled_from(["best_fit", "concatenate"]),
    st.sampled_from(["split", "truncate", "drop"]),
)
@example([], 4, "best_fit", "split")
@example([0, 0], 4, "concatenate", "split")
@example([9], 4, "best_fit", "drop")
@settings(deadline=None, max_examples=300)
def test_every_token_once_in_batches_that_fit(lengths, max_tokens, strategy, overlong):
    plan = packing.plan(lengths, max_tokens, strategy=strategy, overlong=overlong)
    kept = [kept_length(length, max_tokens, overlong) for length in lengths]
    assert covered(plan, len(lengths)) == [list(range(k)) for k in kept]
    sizes = [sum(s.length for s in batch) for batch in plan]
    assert all(1 <= size <= max_tokens for size in sizes)
    if strategy == "concatenate":
        assert all(size == max_tokens for size in sizes[:-1])
        assert segments(plan) == sorted(segments(plan))

    report = plan.report
    assert report.documents == len(lengths)
    assert report.tokens == sum(lengths)
    assert report.packed_tokens == sum(kept)
    assert report.batches == len(plan) == len(sizes)
    assert report.packed_tokens == report.tokens - report.tokens_truncated - report.tokens_dropped
    over = [length for length in lengths if length > max_tokens]
    lost = sum(over) - sum(kept_length(length, max_tokens, overlong) for length in over)
    assert report.tokens_truncated == (lost if overlong == "truncate" else 0)
    assert report.documents_truncated == (len(over) if overlong == "truncate" else 0)
    assert report.tokens_dropped == (lost if overlong == "drop" else 0)
    assert report.documents_dropped == (len(over) if overlong == "drop" else 0)
    pieces = [sum(s.document == d for s in segments(plan)) for d in range(len(lengths))]
    assert report.documents_split == sum(p > 1 for p in pieces)
    assert report.documents_untrained == sum(length < 2 for length in lengths)
    assert report.trained_tokens == sum(max(length - 1, 0) for length in lengths)
    assert report.trained_tokens_lost == report.trained_tokens - sum(s.length - 1 for s in segments(plan))
    assert report.fill == (sum(kept) / (len(sizes) * max_tokens) if sizes else 1.0)


@given(st.lists(st.integers(1, 30), max_size=80), st.integers(30, 64))
@settings(deadline=None, max_examples=300)
def test_bins_are_those_of_naive_best_fit_decreasing(lengths, capacity):
    plan = packing.plan(lengths, capacity)
    ours = [sorted(s.document for s in batch) for batch in plan]
    assert sorted(ours) == sorted(sorted(items) for items in naive_best_fit(lengths, capacity))


@given(st.lists(st.integers(1, 30), max_size=80), st.integers(30, 64))
@settings(deadline=None, max_examples=200)
def test_compiled_and_python_packers_agree(lengths, capacity):
    array = np.array(lengths, np.int64)
    compiled, count = _compiled.C.best_fit_decreasing(array, capacity)
    python, python_count = packing._best_fit_in_python(array, capacity)
    assert count == python_count
    assert compiled.tolist() == python.tolist()


@given(lengths_strategy, max_tokens_strategy)
@settings(deadline=None)
def test_best_fit_order_follows_the_documents(lengths, max_tokens):
    plan = packing.plan(lengths, max_tokens)
    assert all(batch == sorted(batch) for batch in plan)
    firsts = [batch[0] for batch in plan]
    assert firsts == sorted(firsts)


def test_known_answer():
    # 6+4, 5+3+2 and 7 alone: best fit fills what first fit (7+2+..., 6+4, 5+3) leaves open.
    plan = packing.plan([3, 6, 7, 4, 5, 2], 10)
    assert [[s.document for s in batch] for batch in plan] == [[0, 2], [1, 3], [4, 5]]
    assert plan[-1] == [packing.Segment(4, 0, 5), packing.Segment(5, 0, 2)]


def test_split_and_truncate_known_answer():
    assert list(packing.plan([10], 4)) == [[(0, 0, 4)], [(0, 4, 4)], [(0, 8, 2)]]
    assert list(packing.plan([10, 0, 3], 4, overlong="truncate")) == [[(0, 0, 4)], [(2, 0, 3)]]
    assert list(packing.plan([3, 6], 4, strategy="concatenate")) == [[(0, 0, 3), (1, 0, 1)], [(1, 1, 4)], [(1, 5, 1)]]


def test_report_reads_well():
    text = str(packing.plan([10, 1, 3], 4, overlong="truncate").report)
    assert text.splitlines() == [
        "packed 8 of 14 tokens from 3 documents into 2 batches of at most 4 (100.00% full)",
        "  split      0 documents",
        "  truncated  1 documents, 6 tokens lost",
        "  dropped    0 documents, 0 tokens lost",
        "  untrained  1 documents have nothing to train on",
        "  targets    6 of 11 lost (54.55%)",
    ]


def test_takes_the_arrays_that_stores_keep():
    for dtype in (np.int32, np.uint32, np.int64, np.uint16):
        plan = packing.plan(np.array([3, 5, 2], dtype), 8)
        assert [len(batch) for batch in plan] == [2, 1]
    assert plan.lengths.dtype == plan.starts.dtype == plan.documents.dtype == np.int64


def test_two_runs_give_the_same_plan():
    lengths = np.random.default_rng(0).integers(1, 5000, 20_000)
    first, second = packing.plan(lengths, 4096), packing.plan(lengths, 4096)
    for field in ("documents", "starts", "lengths", "offsets"):
        assert np.array_equal(getattr(first, field), getattr(second, field))


def test_tokens_past_int32_are_counted():
    lengths = np.full(3, 2**31, np.int64)
    plan = packing.plan(lengths, 2**30)
    assert len(plan) == 6
    assert plan.report.packed_tokens == 3 * 2**31
    assert plan[5] == [packing.Segment(2, 2**30, 2**30)]
    concatenated = packing.plan(lengths, 2**30 + 1, strategy="concatenate")
    assert concatenated.report.packed_tokens == 3 * 2**31
    assert [sum(s.length for s in b) for b in concatenated][:-1] == [2**30 + 1] * 5


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([3, -1], 4), {}, ValueError, r"lengths: got -1 at 1"),
        (([3.5], 4), {}, TypeError, r"lengths: got float64; takes integers"),
        (([[3]], 4), {}, ValueError, r"lengths: got shape \(1, 1\)"),
        (([3], 0), {}, ValueError, r"max_tokens: got 0"),
        (([3], 2**31), {}, ValueError, r"max_tokens: got 2147483648"),
        (([3], 4.0), {}, TypeError, r"max_tokens: got float"),
        (([3], 4), {"strategy": "first_fit"}, ValueError, r"strategy: got 'first_fit'; takes best_fit, concatenate"),
        (([3], 4), {"overlong": "keep"}, ValueError, r"overlong: got 'keep'; takes split, truncate, drop, error"),
        (([3, 9, 8], 4), {"overlong": "error"}, ValueError, r"2 have more .* documents\[1\] with 9"),
    ],
)
def test_bad_input_is_refused_by_name(arguments, options, error, message):
    with pytest.raises(error, match=message):
        packing.plan(*arguments, **options)


def test_index_out_of_range():
    plan = packing.plan([3, 3], 4)
    with pytest.raises(IndexError, match="batch: got 2; the plan has 2"):
        plan[2]
    with pytest.raises(ValueError, match=r"lengths: got 5 at 1; must lie in \[1, 4\]"):
        _compiled.C.best_fit_decreasing(np.array([1, 5]), 4)
