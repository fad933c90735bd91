"""The token store, opened."""

import json

import numpy as np
import pytest

from lemur_fast.data.executors import build_store
from lemur_fast.data.store import TokenStore
from lemur_fast.data.tokenizer import encode_documents

TEXTS = [f"Paragraph {i} speaks of nothing in particular, {i * i} times over." for i in range(40)]
LONG = " ".join(map(str, range(5000)))


@pytest.fixture(scope="module")
def store(tmp_path_factory, tokenizer, source, lenient):
    sources = [source("a", "text", [*TEXTS[:20], LONG]), source("b", "code", TEXTS[20:])]
    return build_store(
        tmp_path_factory.mktemp("corpus") / "store", sources, tokenizer, lenient(held_out=0.0), progress=False
    )


def test_tokens_are_memory_mapped_and_sliced(store, tokenizer):
    (expected,) = encode_documents(tokenizer, [LONG])
    assert store.train.lengths.tolist()[20] == len(expected)
    np.testing.assert_array_equal(store.train.tokens(20), expected)
    np.testing.assert_array_equal(store.train.tokens(20, 4096, 100), expected[4096:4196])
    np.testing.assert_array_equal(store.train.tokens(20, len(expected) - 3, 100), expected[-3:])
    assert store.train.tokens(20).dtype == np.int64
    assert {file["filename"] for file in store.train.rows.cache_files} == {
        str(path) for path in (store.folder / "train").iterdir()
    }


def test_documents_of_all_shards_in_order(store, tokenizer):
    expected = encode_documents(tokenizer, [*TEXTS[:20], LONG, *TEXTS[20:]])
    assert len(store.train) == len(expected)
    for document, ids in enumerate(expected):
        np.testing.assert_array_equal(store.train.tokens(document), ids)
    assert store.train.kinds.tolist() == ["text"] * 21 + ["code"] * 20
    assert store.train.sources.tolist() == ["a"] * 21 + ["b"] * 20
    assert store.train.name(1) == "a/1.txt"
    assert store.train.name(22) == "b/1.txt"
    assert len(store.held_out) == len(store.held_out.kinds) == 0


def test_a_folder_that_is_no_store_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({}))
    with pytest.raises(FileNotFoundError, match=r"not a token store: it has no train, held_out"):
        TokenStore(tmp_path)
