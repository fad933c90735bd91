"""What becomes of documents on the way into a token store."""

import json

import numpy as np
import pytest

from lemur_fast.data.sources import Document, embedded_sources
from lemur_fast.data.store import TokenStore, build_store, split_of
from lemur_fast.data.tokenizer import encode_documents

CODE = [f"def f{i}(x):\n    return x + {i}\n" for i in range(60)]
TEXT = [f"Paragraph {i} speaks of nothing in particular, {i * i} times over." for i in range(60)]


def build(folder, tokenizer, sources, **options):
    return build_store(folder, sources, tokenizer, progress=False, **options)


def read_all(documents, tokenizer):
    return [tokenizer.decode(documents.tokens(i), skip_special_tokens=True) for i in range(len(documents))]


def test_every_document_is_kept_once_or_counted(tmp_path, tokenizer, source):
    code = source("code", "code", [CODE[0], *CODE, "  \n", None, CODE[3] + "\n\n", "lone \ud800 surrogate"])
    text = source("text", "text", [*TEXT, CODE[5], ""])
    store = build(tmp_path / "store", tokenizer, [code, text], held_out=0.2)
    entries = store.manifest["sources"]
    assert entries["code"]["dropped"] == {"exact duplicate": 2, "empty": 1, "unreadable": 2}
    assert entries["text"]["dropped"] == {"exact duplicate": 1, "empty": 1}
    assert entries["code"]["documents"] == 65
    assert sorted(read_all(store.train, tokenizer) + read_all(store.held_out, tokenizer)) == sorted(CODE + TEXT)
    for split in ("train", "held_out"):
        documents = getattr(store, split)
        for field, value in (("documents", len(documents)), ("tokens", documents.lengths.sum())):
            assert sum(entry[split][field] for entry in entries.values()) == value
        assert sum(entry[split]["bytes"] for entry in entries.values()) == sum(
            len(text.encode()) for text in read_all(documents, tokenizer)
        )
    assert (store.held_out.kinds == "text").sum() == entries["text"]["held_out"]["documents"] > 0


def test_splits_are_disjoint_and_depend_on_the_text_alone(tmp_path, tokenizer, source):
    one = build(tmp_path / "one", tokenizer, [source("a", "code", CODE)], held_out=0.3)
    other = build(tmp_path / "other", tokenizer, [source("b", "text", [*TEXT, *reversed(CODE)])], held_out=0.3)
    train, held_out = set(read_all(one.train, tokenizer)), set(read_all(one.held_out, tokenizer))
    assert not train & held_out
    assert 8 <= len(held_out) <= 28  # 18 +- 3 standard deviations
    assert held_out == set(read_all(other.held_out, tokenizer)) & set(CODE)
    copies = [Document(text, name, name, "code", "") for name, text in (("x", CODE[0]), ("y", f"\n{CODE[0]}  "))]
    assert split_of(copies[0], 0.5) == split_of(copies[1], 0.5)


def test_tokens_are_memory_mapped_and_sliced(tmp_path, tokenizer, source):
    long = " ".join(map(str, range(5000)))
    build(tmp_path / "store", tokenizer, [source("a", "text", [TEXT[0], long])], held_out=0.0)
    store = TokenStore(tmp_path / "store")
    (expected,) = encode_documents(tokenizer, [long])
    assert store.train.lengths.tolist()[1] == len(expected)
    np.testing.assert_array_equal(store.train.tokens(1), expected)
    np.testing.assert_array_equal(store.train.tokens(1, 4096, 100), expected[4096:4196])
    assert store.train.tokens(1).dtype == np.int64
    assert store.train.name(1) == "a/1.txt"
    assert len(store.held_out) == 0
    assert store.train.rows.cache_files[0]["filename"] == str(tmp_path / "store" / "train.arrow")


@pytest.mark.parametrize("texts", [[], ["", " ", None]])
def test_an_empty_corpus_is_named_and_leaves_nothing(tmp_path, tokenizer, source, texts):
    with pytest.raises(ValueError, match=r"corpus is empty.*nothing: "):
        build(tmp_path / "store", tokenizer, [source("nothing", "code", texts)])
    assert list(tmp_path.iterdir()) == []


def test_a_failure_half_way_leaves_nothing(tmp_path, tokenizer, source):
    class Broken:
        def __call__(self, document):
            if document.text == CODE[40]:
                raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        build(tmp_path / "store", tokenizer, [source("a", "code", CODE)], filters=[Broken()])
    assert list(tmp_path.iterdir()) == []


def test_filters_of_ones_own_are_counted_by_their_reason(tmp_path, tokenizer, source):
    def unlucky(document):
        return "has a 7" if "7" in document.text else None

    store = build(tmp_path / "store", tokenizer, [source("a", "code", CODE)], filters=[unlucky], held_out=0)
    kept = [text for text in CODE if "7" not in text]
    assert store.manifest["sources"]["a"]["dropped"] == {"has a 7": len(CODE) - len(kept)}
    assert read_all(store.train, tokenizer) == kept


def test_a_folder_that_is_no_store_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({}))
    with pytest.raises(FileNotFoundError, match=r"not a token store: it has no train\.arrow, held_out\.arrow"):
        TokenStore(tmp_path)


def test_the_embedded_sources_are_code_and_text_without_tests():
    sources = {source.name: list(source.documents()) for source in embedded_sources()}
    names = [document.name for document in sources["python-stdlib"] if document]
    assert {"json/decoder.py", "argparse.py", "asyncio/events.py"} <= set(names)
    parts = {part for name in names for part in name.split("/")[:-1]}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "encodings", "pydoc_data"}
    assert {document.kind for document in sources["python-docs"] if document} == {"text"}
    readmes = {document.name.rpartition("-")[0]: document for document in sources["package-readmes"] if document}
    assert "tqdm" in readmes
    assert "MIT" in readmes["tqdm"].licence
    assert all(document.licence for documents in sources.values() for document in documents if document)
