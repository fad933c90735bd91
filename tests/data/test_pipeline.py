"""What becomes of documents on the way into a token store."""

import json
import shutil

import pyarrow.parquet as pq
import pytest

from lemur_fast.data import pipeline
from lemur_fast.data.embedded import embedded_sources
from lemur_fast.data.executors import build_store
from lemur_fast.data.filters import Quality
from lemur_fast.data.pipeline import split_of
from lemur_fast.data.sources import Generated
from lemur_fast.data.store import TokenStore

CODE = [f"def f{i}(x):\n    return x + {i}\n" for i in range(60)]
TEXT = [f"Paragraph {i} speaks of nothing in particular, {i * i} times over." for i in range(60)]
LONG = " ".join(f"word{i}" for i in range(200))


def build(folder, tokenizer, sources, settings):
    return build_store(folder, sources, tokenizer, settings, progress=False)


def read_all(documents, tokenizer):
    return [tokenizer.decode(documents.tokens(i), skip_special_tokens=True) for i in range(len(documents))]


def dropped(store, source):
    return {reason: of["documents"] for reason, of in store.manifest["sources"][source]["dropped"].items()}


def ledger(store):
    return pq.read_table(store.folder / "documents").to_pylist()


def test_every_document_is_kept_once_or_counted(tmp_path, tokenizer, source, lenient):
    bad = ["  \n", None, CODE[3] + "\n\n", "lone \ud800 surrogate", "zero \0 byte"]
    code = source("code", "code", [CODE[0], *CODE, *bad])
    text = source("text", "text", [*TEXT, CODE[5], ""])
    store = build(tmp_path / "store", tokenizer, [code, text], lenient(held_out=0.2))
    entries = store.manifest["sources"]
    assert dropped(store, "code") == {
        "exact duplicate": 2,
        "empty": 1,
        "unreadable": 1,
        "wrong encoding": 1,
        "binary": 1,
    }
    assert dropped(store, "text") == {"exact duplicate": 1, "empty": 1}
    assert entries["code"]["documents"] == 66
    assert sorted(read_all(store.train, tokenizer) + read_all(store.held_out, tokenizer)) == sorted(CODE + TEXT)
    for entry in entries.values():
        for of in ("documents", "bytes", "tokens"):
            kept = entry["train"][of] + entry["held_out"][of]
            assert entry[of] == kept + sum(count[of] for count in entry["dropped"].values())
    for split in ("train", "held_out"):
        documents = getattr(store, split)
        for field, value in (("documents", len(documents)), ("tokens", documents.lengths.sum())):
            assert sum(entry[split][field] for entry in entries.values()) == value
        assert sum(entry[split]["bytes"] for entry in entries.values()) == sum(
            len(text.encode()) for text in read_all(documents, tokenizer)
        )
    assert (store.held_out.kinds == "text").sum() == entries["text"]["held_out"]["documents"] > 0


def test_the_ledger_says_what_became_of_each(tmp_path, tokenizer, source, lenient):
    near = LONG.replace("word199", "other")
    sources = [source("a", "text", [TEXT[0], LONG, None]), source("b", "code", [TEXT[0] + "\n", near, TEXT[1]])]
    rows = ledger(build(tmp_path / "store", tokenizer, sources, lenient(held_out=0)))
    assert [(row["source"], row["name"], row["fate"], row["like"]) for row in rows] == [
        ("a", "0.txt", "train", ""),
        ("a", "1.txt", "train", ""),
        ("a", "2.txt", "unreadable", ""),
        ("b", "0.txt", "exact duplicate", "a/0.txt"),
        ("b", "1.txt", "near duplicate", "a/1.txt"),
        ("b", "2.txt", "train", ""),
    ]
    assert rows[4]["similarity"] == pytest.approx(195 / 197)  # of 196 shingles each, one differs
    assert rows[3]["tokens"] > 0 == rows[2]["tokens"]


def test_near_duplicates_are_found_within_and_across_sources(tmp_path, tokenizer, source, lenient):
    """Of each family the first stays; families share nothing."""
    families = [[f"w{family}x{i}" for i in range(120)] for family in range(8)]
    versions = [
        " ".join([*words[:at], f"changed{version}", *words[at + 1 :]])
        for words in families
        for version, at in enumerate((5, 60, 110))
    ]
    firsts = [" ".join(words) for words in families]
    sources = [source("a", "code", [*firsts[:4], *versions[:12]]), source("b", "text", [*versions[12:], *firsts[4:]])]
    store = build(tmp_path / "store", tokenizer, sources, lenient(held_out=0))
    assert dropped(store, "a") == {"near duplicate": 12}
    assert dropped(store, "b") == {"near duplicate": 12}  # here the first of a family is a version
    assert read_all(store.train, tokenizer) == [*firsts[:4], *versions[12::3]]
    kept = build(tmp_path / "kept", tokenizer, sources, lenient(held_out=0, near_duplicates=0))
    assert len(kept.train) == 32


def test_contaminated_documents_are_dropped_by_name(tmp_path, tokenizer, source, lenient):
    item = "Write a function that counts how many of the numbers in a list are larger than their neighbours."
    (tmp_path / "HumanEval.jsonl").write_text(json.dumps({"task_id": "x/0", "prompt": item, "tests": ["short"]}) + "\n")
    with_it = f"Some page. {item.upper().replace(' ', '  ').replace('.', '!')} The end."
    half = "Write a function that counts how many of the numbers in a tuple are odd."  # 11 words in a row
    settings = lenient(held_out=0, evaluation_sets=(str(tmp_path / "HumanEval.jsonl"),))
    store = build(tmp_path / "store", tokenizer, [source("web", "text", [TEXT[0], with_it, half])], settings)
    assert dropped(store, "web") == {"contaminated by HumanEval": 1}
    assert read_all(store.train, tokenizer) == [TEXT[0], half]
    assert store.manifest["evaluation_sets"] == {"HumanEval": {"items": 3, "items too short to look for": 2}}


def test_quality_is_judged_by_kind(tmp_path, tokenizer, source):
    minified = "var a=1;" * 300
    sources = [source("code", "code", [minified, CODE[0]]), source("text", "text", [TEXT[0], "Too short."])]
    store = build(tmp_path / "store", tokenizer, sources, pipeline.Settings(held_out=0))
    assert dropped(store, "code") == {"a line too long": 1}
    assert dropped(store, "text") == {"too short": 1}


def test_splits_are_disjoint_and_depend_on_the_text_alone(tmp_path, tokenizer, source, lenient):
    settings = lenient(held_out=0.3)
    one = build(tmp_path / "one", tokenizer, [source("a", "code", CODE)], settings)
    other = build(tmp_path / "other", tokenizer, [source("b", "text", [*TEXT, *reversed(CODE)])], settings)
    train, held_out = set(read_all(one.train, tokenizer)), set(read_all(one.held_out, tokenizer))
    assert not train & held_out
    assert 8 <= len(held_out) <= 28  # 18 +- 3 standard deviations
    assert held_out == set(read_all(other.held_out, tokenizer)) & set(CODE)
    assert split_of(CODE[0], 0.5) == split_of(f"\n{CODE[0]}  ", 0.5)


def test_the_hash_of_a_source_is_that_of_its_texts(tmp_path, tokenizer, source, lenient):
    def hash_of(name, texts):
        entry = build(tmp_path / name, tokenizer, [source("a", "text", texts)], lenient()).manifest["sources"]["a"]
        return entry["hash"]

    assert hash_of("one", TEXT[:3]) == hash_of("same", TEXT[:3]) != hash_of("changed", [*TEXT[:2], "changed"])


@pytest.mark.parametrize("texts", [[], ["", " ", None]])
def test_an_empty_corpus_is_named_and_is_no_store(tmp_path, tokenizer, source, lenient, texts):
    with pytest.raises(ValueError, match=r"corpus is empty.*nothing: "):
        build(tmp_path / "store", tokenizer, [source("nothing", "code", texts)], lenient())
    assert not (tmp_path / "store" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"held_out": 1.0}, r"held_out must be in \[0, 1\), got 1.0"),
        ({"near_duplicates": 1.5}, r"near_duplicates must be in \[0, 1\], got 1.5"),
        ({"ngram_words": 0}, "ngram_words must be at least 1"),
        ({"quality": Quality(min_words=-1)}, "quality.min_words must not be negative"),
        ({"evaluation_sets": ("/nonexistent.jsonl",)}, "evaluation set /nonexistent.jsonl cannot be read"),
    ],
)
def test_settings_are_refused_before_anything_is_written(tmp_path, tokenizer, source, settings, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "store", tokenizer, [source("a", "text", TEXT)], pipeline.Settings(**settings))
    assert not list(tmp_path.iterdir())


def test_what_is_in_the_folder_is_respected(tmp_path, tokenizer, source, lenient):
    folder, sources = tmp_path / "store", [source("a", "text", TEXT)]
    folder.mkdir()
    (folder / "thesis").write_text("precious")
    with pytest.raises(FileExistsError, match="holds no corpus that was begun"):
        build(folder, tokenizer, sources, lenient())
    shutil.rmtree(folder)
    build(folder, tokenizer, sources, lenient())
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    build(folder, tokenizer, sources, lenient())  # finished: nothing is done again
    with pytest.raises(ValueError, match="was begun with other settings"):
        build(folder, tokenizer, sources, lenient(held_out=0.3))
    with pytest.raises(ValueError, match="was begun with other sources"):
        build(folder, tokenizer, [source("b", "text", TEXT)], lenient())
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_sources_need_names_of_their_own(tmp_path, tokenizer, source, lenient):
    with pytest.raises(ValueError, match="used twice: a"):
        build(tmp_path / "store", tokenizer, [source("a", "text", TEXT), source("a", "code", CODE)], lenient())


def test_the_summary_shows_sources_and_reasons_and_needs_nothing_else(tmp_path, tokenizer, source, lenient):
    sources = [source("<b>a & co</b>", "text", [*TEXT, TEXT[0], LONG, LONG.replace("word7", "x"), None])]
    page = (build(tmp_path / "store", tokenizer, sources, lenient()).folder / "summary.html").read_text()
    for needed in ("exact duplicate", "near duplicate", "unreadable", "&lt;b&gt;a &amp; co&lt;/b&gt;", "<svg", "0.95"):
        assert needed in page
    for outside in ("http://", "https://", "<script", "<b>a &"):
        assert outside not in page


def test_the_embedded_sources_are_code_and_text_without_tests():
    sources = {source.name: source for source in embedded_sources()}
    records = {name: list(source.read(source.parts()[0])) for name, source in sources.items()}
    names = [record.name for record in records["python-stdlib"] if record.text is not None]
    assert {"json/decoder.py", "argparse.py", "asyncio/events.py"} <= set(names)
    parts = {part for name in names for part in name.split("/")[:-1]}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "encodings", "pydoc_data"}
    assert (sources["python-docs"].kind, sources["python-stdlib"].kind) == ("text", "code")
    readmes = {record.name.rpartition("-")[0]: record for record in records["package-readmes"]}
    assert "tqdm" in readmes
    assert "MIT" in readmes["tqdm"].licence
    assert all(record.licence for of_source in records.values() for record in of_source)


def test_a_licence_that_is_no_unicode_stops_nothing(tmp_path, tokenizer, lenient):
    words = " ".join(f"word{i}" for i in range(30))
    texts = [(f"{i}", f"{i} {words} {i}", "\ud800") for i in range(20)]
    source = Generated("odd", "text", "a test", "CC0-1.0", lambda: iter(texts))
    store = build(tmp_path / "store", tokenizer, [source], lenient(held_out=0.2, near_duplicates=0))
    assert store.manifest["sources"]["odd"]["documents"] == 20


def test_what_a_killed_task_left_is_no_part_of_a_store(tmp_path, tokenizer, source, lenient):
    texts = [f"{i} " + " ".join(f"word{j * i}" for j in range(30)) for i in range(40)]
    store = build(tmp_path / "store", tokenizer, [source("a", "text", texts)], lenient(held_out=0.2))
    (shard,) = (tmp_path / "store" / "train").glob("*.arrow")
    (shard.parent / f".{shard.stem}.1234.partial.arrow").write_bytes(shard.read_bytes())
    assert len(TokenStore(tmp_path / "store").train) == len(store.train)
