"""PackedBatch and pack: what a batch says of its documents, checked token by token against a loop."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lemur_fast import packing
from lemur_fast.packing import PackedBatch, pack

document = st.lists(st.integers(0, 999), max_size=20)
documents_strategy = st.lists(document, max_size=12)


@st.composite
def documents_and_masks(draw):
    documents = draw(documents_strategy)
    masks = [draw(st.lists(st.booleans(), min_size=len(d), max_size=len(d))) for d in documents]
    return documents, draw(st.sampled_from([None, masks]))


def expected_fields(documents, masks):
    """The definition of every field, one token at a time."""
    ids, labels, positions, ends, rows = [], [], [], [0], []
    for i, doc in enumerate(documents):
        for j, token in enumerate(doc):
            is_target = j + 1 < len(doc) and (masks is None or masks[i][j + 1])
            if is_target:
                rows.append(len(ids))
            ids.append(token)
            labels.append(doc[j + 1] if is_target else -100)
            positions.append(j)
        ends.append(len(ids))
    return ids, labels, positions, ends, rows


@given(documents_and_masks())
@settings(deadline=None, max_examples=200)
def test_from_documents_against_a_loop(case):
    documents, masks = case
    batch = PackedBatch.from_documents(documents, masks)
    ids, labels, positions, ends, rows = expected_fields(documents, masks)
    assert batch.input_ids.tolist() == ids
    assert batch.labels.tolist() == labels
    assert batch.position_ids.tolist() == positions
    assert batch.cu_seqlens.tolist() == ends
    assert batch.trained_rows.tolist() == rows
    assert batch.num_items.item() == len(rows)
    batch._check_contents()


@given(documents_and_masks(), st.integers(1, 9), st.sampled_from(["best_fit", "concatenate"]))
@settings(deadline=None, max_examples=200)
def test_pack_trains_on_the_same_pairs(case, max_tokens, strategy):
    """(token, target) pairs that come out are those of the pieces; what is missing is what the report calls lost."""
    documents, masks = case
    batches, report = pack(documents, max_tokens, strategy=strategy, loss_masks=masks)
    plan = packing.plan([len(d) for d in documents], max_tokens, strategy=strategy)
    assert len(batches) == len(plan)
    for batch, segments in zip(batches, plan, strict=True):
        pieces = [documents[d][s : s + n] for d, s, n in segments]
        piece_masks = None if masks is None else [masks[d][s : s + n] for d, s, n in segments]
        assert batch.labels.tolist() == expected_fields(pieces, piece_masks)[1]
        assert batch.input_ids.tolist() == [token for piece in pieces for token in piece]
        last_tokens = batch.cu_seqlens[1:] - 1
        assert (batch.labels[last_tokens] == -100).all()
    trained_in = len(expected_fields(documents, masks)[4])
    assert report.trained_tokens == trained_in
    assert report.trained_tokens_lost == trained_in - sum(b.num_items.item() for b in batches)
    assert report.documents_untrained == sum(
        not expected_fields([d], masks and [masks[i]])[4] for i, d in enumerate(documents)
    )


@given(documents_and_masks(), st.integers(0, 5), st.integers(0, 5), st.integers(0, 5))
@settings(deadline=None, max_examples=100)
def test_padding_adds_nothing(case, tail, spare_documents, spare_rows):
    plain = PackedBatch.from_documents(*case)
    t, n, r = plain.num_tokens, plain.num_documents, plain.trained_rows.numel()
    padded = plain.padded(trained_rows=r + spare_rows).padded(
        tokens=t + tail, documents=n + spare_documents, pad_id=7, trained_rows=r + spare_rows
    )
    padded._check_contents()
    assert padded.num_items == plain.num_items
    assert padded.input_ids.tolist() == plain.input_ids.tolist() + [7] * tail
    assert padded.labels.tolist() == plain.labels.tolist() + [-100] * tail
    assert padded.position_ids.tolist() == plain.position_ids.tolist() + [0] * tail
    assert padded.cu_seqlens.tolist() == plain.cu_seqlens.tolist() + [t] * spare_documents
    assert padded.trained_rows.tolist() == plain.trained_rows.tolist() + [t + tail] * spare_rows


def test_pad_to_is_padded():
    batch = PackedBatch.from_documents([[1, 2], [3]], pad_to=5, pad_id=9)
    assert batch.input_ids.tolist() == [1, 2, 3, 9, 9]
    assert batch.cu_seqlens.tolist() == [0, 2, 3]
    with pytest.raises(ValueError, match="pad_to: got 2; the documents have 3 tokens"):
        PackedBatch.from_documents([[1, 2], [3]], pad_to=2)


def test_one_token_and_empty_documents_have_nothing_to_train_on():
    batch = PackedBatch.from_documents([[5], [], [6]])
    assert batch.num_items.item() == 0
    assert batch.cu_seqlens.tolist() == [0, 1, 1, 2]
    assert batch.labels.tolist() == [-100, -100]
    assert PackedBatch.from_documents([]).cu_seqlens.tolist() == [0]
    batches, report = pack([[5], [], [6, 7]], 8)
    assert batches[0].cu_seqlens.tolist() == [0, 1, 3]
    assert report.documents_untrained == 2


def test_takes_lists_arrays_and_tensors():
    want = PackedBatch.from_documents([[1, 2, 3]] * 4)
    got = PackedBatch.from_documents(
        [torch.tensor([1, 2, 3]), np.array([1, 2, 3], np.uint16), (1, 2, 3), torch.tensor([1, 2, 3], dtype=torch.int32)]
    )
    assert got.input_ids.tolist() == want.input_ids.tolist()
    masked = PackedBatch.from_documents(
        [[1, 2, 3]] * 3, [torch.tensor([0, 0, 1]), np.array([1, 0, 1]), [False, False, True]]
    )
    assert masked.labels.tolist() == [-100, 3, -100] * 3


def test_model_inputs():
    batch = PackedBatch.from_documents([[1, 2, 3], [4, 5]])
    inputs = batch.model_inputs()
    shapes = {name: tuple(value.shape) for name, value in inputs.items()}
    assert shapes == {
        "input_ids": (1, 5),
        "position_ids": (1, 5),
        "shift_labels": (1, 5),
        "cu_seqlens": (3,),
        "num_items_in_batch": (),
        "trained_rows": (3,),
    }
    assert inputs["shift_labels"].tolist() == [[2, 3, -100, 5, -100]]


def test_to_moves_every_field():
    batch = PackedBatch.from_documents([[1, 2, 3]]).to("meta")
    assert {tensor.device.type for tensor in batch.model_inputs().values()} == {"meta"}
    assert repr(batch) == "PackedBatch(tokens=3, documents=1, trained_rows=2, device='meta')"


def fields(**changes):
    batch = PackedBatch.from_documents([[1, 2, 3], [4, 5]])
    return {name: getattr(batch, name) for name in batch.__dataclass_fields__} | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"labels": [1]}, TypeError, "labels: got list; takes a torch.int64 tensor"),
        ({"input_ids": torch.zeros(5, dtype=torch.int32)}, TypeError, "input_ids: got torch.int32; takes torch.int64"),
        ({"cu_seqlens": torch.tensor([0, 3, 5])}, TypeError, "cu_seqlens: got torch.int64; takes torch.int32"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, ValueError, "labels: got 4 tokens; input_ids has 5"),
        ({"position_ids": torch.zeros(1, 5, dtype=torch.int64)}, ValueError, r"position_ids: got shape \(1, 5\)"),
        ({"num_items": torch.zeros(1, dtype=torch.int64)}, ValueError, r"num_items: got shape \(1,\)"),
        ({"cu_seqlens": torch.tensor([], dtype=torch.int32)}, ValueError, "cu_seqlens: got no element"),
        (
            {"cu_seqlens": torch.tensor([1, 5], dtype=torch.int32)},
            ValueError,
            r"cu_seqlens: got \[1, 5\]; must start at 0",
        ),
        ({"cu_seqlens": torch.tensor([0, 4, 3], dtype=torch.int32)}, ValueError, "never fall"),
        ({"cu_seqlens": torch.tensor([0, 6], dtype=torch.int32)}, ValueError, "no more than T = 5"),
        (
            {"labels": torch.zeros(5, dtype=torch.int64, device="meta")},
            ValueError,
            "labels: is on meta, input_ids on cpu",
        ),
    ],
)
def test_wrong_fields_are_refused_by_name(changes, error, message):
    with pytest.raises(error, match=message):
        PackedBatch(**fields(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position_ids": torch.arange(5)}, "position_ids: must count from 0"),
        ({"labels": torch.tensor([2, 3, 4, 5, -100])}, "labels: the last token of a document"),
        ({"labels": torch.tensor([2, -100, -100, 5, -100])}, "trained_rows: must list"),
        ({"num_items": torch.tensor(4)}, "num_items: got 4; 3 labels are not -100"),
    ],
)
def test_debug_mode_looks_into_the_contents(changes, message, monkeypatch):
    PackedBatch(**fields(**changes))
    monkeypatch.setattr(packing, "debug_enabled", lambda: True)
    with pytest.raises(ValueError, match=message):
        PackedBatch(**fields(**changes))


@pytest.mark.parametrize(
    ("documents", "masks", "error", "message"),
    [
        ([[1, -2]], None, ValueError, r"documents\[0\]: got the id -2 at 1"),
        ([[1], [1.5]], None, TypeError, r"documents\[1\]: got float64; takes integers"),
        ([["a"]], None, TypeError, r"documents\[0\]: got <U1"),
        ([[[1]]], None, ValueError, r"documents\[0\]: got shape \(1, 1\)"),
        ([[[1], 2]], None, TypeError, r"documents\[0\]: takes a 1-D sequence of integers"),
        ([[1, 2]], [[1]], ValueError, r"loss_masks\[0\]: got shape \(1,\); documents\[0\] has 2 tokens"),
        ([[1, 2]], [], ValueError, "loss_masks: got 0; there are 1 documents"),
        ([[1, 2]], [[0, 2]], ValueError, r"loss_masks\[0\]: got 0 to 2; takes 0 and 1"),
        ([[1, 2]], [[0.0, 0.5]], TypeError, r"loss_masks\[0\]: got float64; takes integers"),
    ],
)
def test_bad_documents_are_refused_by_name(documents, masks, error, message):
    with pytest.raises(error, match=message):
        PackedBatch.from_documents(documents, masks)
    with pytest.raises(error, match=message):
        pack(documents, 8, loss_masks=masks)


def test_batches_pass_a_dataloader():
    batches, _ = pack([[1, 2, 3]] * 5, 6)
    loaded = list(torch.utils.data.DataLoader(batches, batch_size=None, shuffle=False))
    assert [b.input_ids.tolist() for b in loaded] == [b.input_ids.tolist() for b in batches]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tokens": "a"}, TypeError, "^tokens: got str; takes an int"),
        ({"tokens": 9.0}, TypeError, "^tokens: got float; takes an int"),
        ({"documents": True}, TypeError, "^documents: got bool; takes an int"),
        ({"trained_rows": 2.5}, TypeError, "^trained_rows: got float; takes an int"),
        ({"tokens": 2}, ValueError, "^tokens: got 2; the batch has 3 already"),
        ({"documents": 1}, ValueError, "^documents: got 1; the batch has 2 already"),
        ({"tokens": 5, "pad_id": 1.5}, TypeError, "^pad_id: got float; takes an int"),
        ({"tokens": 5, "pad_id": -1}, ValueError, "^pad_id: got -1; must be at least 0"),
    ],
    ids=str,
)
def test_bad_padding_is_refused_by_name(arguments, error, message):
    batch = PackedBatch.from_documents([[1, 2], [3]])
    with pytest.raises(error, match=message):
        batch.padded(**arguments)
    with pytest.raises(TypeError, match=r"^pad_to: got float; takes an int"):
        PackedBatch.from_documents([[1, 2]], pad_to=2.5)


def test_sizes_may_be_numpy_integers():
    batch = PackedBatch.from_documents([[1, 2], [3]], pad_to=np.int64(5), pad_id=np.int32(7))
    assert batch.input_ids.tolist() == [1, 2, 3, 7, 7]
