"""From the store to batches, tokens unchanged."""

import math
from concurrent.futures import wait

import pytest
import torch

from lemur_fast.data.executors import build_store
from lemur_fast.data.loader import Loader, held_out_batches
from lemur_fast.data.mixture import Mixture

ROW = 128


@pytest.fixture(scope="module")
def store(tmp_path_factory, tokenizer, source, lenient):
    code = [f"class C{i}:\n" + "".join(f"    a{j} = {i * j}\n" for j in range(i)) for i in range(80)]
    text = [f"Die {i}. Straße: naïve café № {i} 😀" for i in range(80)]
    sources = [source("code", "code", code), source("text", "text", text)]
    return build_store(
        tmp_path_factory.mktemp("corpus") / "store",
        sources,
        tokenizer,
        lenient(held_out=0.3, near_duplicates=0),
        progress=False,
    )


def test_batches_hold_the_documents_tokens(store):
    loader = Loader(store.train, Mixture(store.train, {"code": 3, "text": 1}, ROW, seed=0), rows_per_step=3)
    for _ in range(10):
        rows, batches = next(loader)
        assert len(rows) == len(batches) == 3
        for row, batch in zip(rows, batches, strict=True):
            ends = torch.tensor([segment.length for segment in row]).cumsum(0)
            assert batch.cu_seqlens.tolist() == [0, *ends.tolist()]
            assert batch.num_tokens == ROW
            ids = torch.cat([torch.from_numpy(store.train.tokens(*segment)) for segment in row])
            assert torch.equal(batch.input_ids[: len(ids)], ids)
            assert int(batch.num_items) == len(ids) - len(row)  # all but each segment's last token


def test_a_loader_returns_to_its_state(store):
    loaders = [Loader(store.train, Mixture(store.train, {"code": 1}, ROW, seed=0), rows_per_step=2) for _ in range(2)]
    for _ in range(40):
        next(loaders[0])
    loaders[1].load_state(loaders[0].state())
    for _ in range(40):
        (rows, batches), (other_rows, other_batches) = next(loaders[0]), next(loaders[1])
        assert rows == other_rows
        assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(batches, other_batches, strict=True))


def test_reading_ahead_counts_for_nothing(store):
    """The state is that of the steps handed out, however far the thread has read."""
    loader = Loader(store.train, Mixture(store.train, {"code": 3, "text": 1}, ROW, seed=0), rows_per_step=2)
    alone = Mixture(store.train, {"code": 3, "text": 1}, ROW, seed=0)
    assert loader.state() == alone.state()
    for _ in range(40):
        rows, _ = next(loader)
        assert rows == [next(alone), next(alone)]
        assert loader.state() == alone.state()


def test_an_error_of_the_reading_thread_is_raised_where_the_step_is_asked_for(store, monkeypatch):
    loader = Loader(store.train, Mixture(store.train, {"code": 1}, ROW, seed=0), rows_per_step=1)
    next(loader)
    wait([loader._ahead])

    def gone(*_):
        raise OSError("the disk is gone")

    monkeypatch.setattr(store.train, "tokens", gone)
    next(loader)  # was read before
    with pytest.raises(OSError, match="the disk is gone"):
        next(loader)


@pytest.mark.parametrize("kind", ["code", "text"])
def test_held_out_bytes_are_those_of_the_text(store, tokenizer, kind):
    part = held_out_batches(store.held_out, kind, 10**9, ROW, tokenizer)
    source = store.manifest["sources"][kind]["held_out"]
    cut = sum(math.ceil(length / ROW) - 1 for length in store.held_out.lengths[store.held_out.kinds == kind])
    assert cut > 0 if kind == "code" else cut == 0
    # Nothing predicts the first token of the later segments of a cut document, a few bytes each.
    assert source["bytes"] - 8 * cut <= part.bytes <= source["bytes"]
    assert part.tokens == source["tokens"] - source["documents"] - cut


def test_held_out_batches_are_few_and_always_the_same(store, tokenizer):
    parts = [held_out_batches(store.held_out, "code", 300, ROW, tokenizer) for _ in range(2)]
    assert 300 - ROW < parts[0].tokens < 300 + ROW
    assert parts[0].tokens == sum(int((batch.labels != -100).sum()) for batch in parts[0].batches)
    for one, other in zip(parts[0].batches, parts[1].batches, strict=True):
        assert torch.equal(one.input_ids, other.input_ids)


def test_no_held_out_documents_is_refused(store, tokenizer):
    with pytest.raises(ValueError, match="no held-out documents of kind 'sql'"):
        held_out_batches(store.held_out, "sql", 100, ROW, tokenizer)
