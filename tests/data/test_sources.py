"""Sources: what they give, in which order, and what they make of bad input."""

import bz2
import gzip
import json
import lzma
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from lemur_fast.data import sources
from lemur_fast.data.languages import language_of
from lemur_fast.data.sources import Columns, Files, HuggingFace, JsonLines, Parquet, decode
from lemur_fast.data.specification import source_from_path, sources_from_toml

COMMON = {"name": "s", "kind": "code", "origin": "a test", "licence": "CC0-1.0"}


def read(source):
    return [record for part in source.parts() for record in source.read(part)]


@pytest.mark.parametrize(
    ("name", "head", "language"),
    [
        ("a/b.py", b"", "python"),
        ("b.PY", b"", "python"),
        ("q.sql", b"", "sql"),
        ("Makefile", b"", "makefile"),
        ("run", b"#!/bin/bash\n", "shell"),
        ("run", b"#!/usr/bin/env python3\n", "python"),
        ("run", b"#!/usr/bin/env -S python3.11 -u\n", "python"),
        ("run", b"#! /usr/bin/perl -w\n", "perl"),
        ("run.txt", b"#!/bin/sh\n", "shell"),
        ("notes.txt", b"hello", None),
        ("run", b"#!", None),
        ("run", b"#!/usr/bin/env\n", None),
        ("run", b"#!/opt/unknown\n", None),
    ],
)
def test_languages(name, head, language):
    assert language_of(name, head) == language


def test_files_good_and_bad(tmp_path):
    root = tmp_path / "repo"
    (root / ".git").mkdir(parents=True)
    (root / "node_modules").mkdir()
    (root / "pkg").mkdir()
    good = {"a.py": "x = 1\n", "pkg/b.sql": "SELECT 1;\n", "run": "#!/bin/sh\necho\n"}
    for name, text in good.items():
        (root / name).write_text(text)
    (root / ".git" / "c.py").write_text("hidden")
    (root / "node_modules" / "d.js").write_text("others'")
    (root / "binary.py").write_bytes(b"\x7fELF\0\0")
    (root / "latin.py").write_bytes("# caf\u00e9".encode("latin-1"))
    (root / "declared.py").write_bytes("# -*- coding: latin-1 -*-\n# caf\u00e9\n".encode("latin-1"))
    (root / "data.json").write_text("{}")
    (root / "empty.py").write_text("")
    os.mkfifo(root / "pipe.py")
    os.symlink(root / "gone", root / "broken.py")
    with (root / "giant.py").open("wb") as file:
        file.truncate(sources.MAX_DOCUMENT_BYTES + 1)  # sparse: takes no room
    records = {record.name: record for record in read(Files(**COMMON, paths=(str(root),)))}
    assert list(records) == [
        *("repo/a.py", "repo/binary.py", "repo/broken.py", "repo/data.json", "repo/declared.py", "repo/empty.py"),
        *("repo/giant.py", "repo/latin.py", "repo/pipe.py", "repo/run", "repo/pkg/b.sql"),
    ]
    assert {name.partition("/")[2]: r.text for name, r in records.items() if r.text} == {
        **good,
        "declared.py": "# -*- coding: latin-1 -*-\n# café\n",
    }
    assert {name.partition("/")[2]: r.problem for name, r in records.items() if r.problem} == {
        "binary.py": "binary",
        "broken.py": "unreadable",
        "data.json": "no known language",
        "giant.py": "too long",
        "latin.py": "wrong encoding",
        "pipe.py": "not a file",
    }
    assert records["repo/run"].language == "shell"
    sql = read(Files(**COMMON, paths=(str(root),), languages=("sql",)))
    assert [record.name for record in sql if record.text] == ["repo/pkg/b.sql"]
    assert sum(record.problem == "other language" for record in sql) >= 5


def test_files_that_cannot_be_read_are_counted(tmp_path, monkeypatch):
    def refused(path):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "a.py").write_text("x")
    monkeypatch.setattr(sources.Path, "read_bytes", refused)  # chmod would not stop root
    assert [record.problem for record in read(Files(**COMMON, paths=(str(tmp_path),)))] == ["unreadable"]


def test_files_of_text_and_globs(tmp_path):
    for name in ("a.md", "b.png", "c.html", "sub/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    text = COMMON | {"kind": "text"}
    folder = read(Files(**text, paths=(str(tmp_path),)))
    assert [(r.name.split("/")[-1], r.problem) for r in folder] == [
        *(("a.md", ""), ("b.png", "not a text file"), ("c.html", "not a text file"), ("d.txt", "")),
    ]
    chosen = read(Files(**text, paths=(str(tmp_path / "**" / "*.html"), str(tmp_path / "a.md"))))
    assert [record.text for record in chosen] == ["c.html", "a.md"]


def test_parts_hold_every_file_once_in_order(tmp_path):
    for index in range(20):
        (tmp_path / f"{index:02d}.py").write_text("x" * 100)
    source = Files(**COMMON, paths=(str(tmp_path),), part_bytes=350)
    parts = source.parts()
    assert [len(part.where["files"]) for part in parts] == [4, 4, 4, 4, 4]
    assert [record.name.split("/")[-1] for record in read(source)] == [f"{index:02d}.py" for index in range(20)]


def test_encodings():
    assert decode("\ufeffx\r\ny\rz".encode()) == ("x\ny\nz", "")
    assert decode("ñ".encode("utf-16")) == ("ñ", "")
    assert decode(b"a\0b") == (None, "binary")
    assert decode(b"\xff\xfe\x00") == (None, "wrong encoding")
    assert decode(b"# coding: nonsense\n", python=True) == (None, "wrong encoding")
    assert decode(b"") == ("", "")


ROWS = [{"content": f"text {i}", "path": f"{i}.py", "license": "MIT", "more": [i]} for i in range(50)]
COLUMNS = Columns("content", "path", "license")


@pytest.fixture(params=["", ".gz", ".bz2", ".xz", ".zst"])
def jsonl(request, tmp_path):
    content = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    path = tmp_path / f"rows.jsonl{request.param}"
    if request.param == ".zst":
        with pa.output_stream(str(path), compression="zstd") as file:
            file.write(content)
    else:
        path.write_bytes(
            {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[request.param](content)
        )
    return path


def test_json_lines(jsonl):
    records = read(JsonLines(**COMMON, columns=COLUMNS, paths=(str(jsonl),)))
    assert [(r.text, r.name, r.licence, r.language) for r in records] == [
        (row["content"], row["path"], "MIT", "python") for row in ROWS
    ]
    with pytest.raises(ValueError, match="no column 'text'; there are: content, path, license, more"):
        JsonLines(**COMMON, paths=(str(jsonl),)).parts()


@pytest.mark.parametrize("step", [1, 7, 64, 65, 66, 1000])
def test_json_lines_are_cut_between_lines(tmp_path, monkeypatch, step):
    monkeypatch.setattr(sources, "PART_BYTES", step)
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps(row) + "\n" for row in ROWS[:9]) + json.dumps(ROWS[9])
    )  # the last has no newline
    source = JsonLines(**COMMON, columns=COLUMNS, paths=(str(path),))
    assert len(source.parts()) == -(-path.stat().st_size // step)
    assert [record.name for record in read(source)] == [row["path"] for row in ROWS[:10]]


def test_bad_json_lines_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_DOCUMENT_BYTES", 500)
    path = tmp_path / "rows.jsonl"
    lines = [b'{"text": "good"}', b"", b"{broken", b"[1]", b'{"other": 1}', b'{"text": 5}', b'{"text": "\xff"}']
    lines += [b'{"text": "' + b"x" * 5000 + b'"}', b'{"text": "' + b"x" * 600 + b'"}', b'{"text": "end"}']
    path.write_bytes(b"\n".join(lines))
    records = read(JsonLines(**COMMON, paths=(str(path),)))
    assert [record.text or record.problem for record in records] == [
        *("good", "broken JSON", "no text", "no text", "no text", "wrong encoding", "too long", "too long", "end"),
    ]
    assert records[0].name == "rows.jsonl@0"
    assert records[1].name == "rows.jsonl@18"


def test_a_truncated_file_is_named(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(os.urandom(2000).hex().encode() + b"\n" + b'{"text": "x"}\n' * 1000)[:1200])
    with pytest.raises(ValueError, match=r"rows\.jsonl\.gz cannot be read to its end"):
        JsonLines(**COMMON, paths=(str(path),)).parts()


def test_parquet(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PART_BYTES", 400)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet", row_group_size=7)
    source = Parquet(**COMMON, columns=Columns("content"), paths=(str(tmp_path / "*.parquet"),))
    assert len(source.parts()) > 2
    assert [(record.text, record.name) for record in read(source)] == [
        (row["content"], f"rows.parquet#{index}") for index, row in enumerate(ROWS)
    ]
    with pytest.raises(ValueError, match="no column 'text'; there are: content, path"):
        Parquet(**COMMON, paths=(str(tmp_path / "rows.parquet"),)).parts()
    (tmp_path / "bad.parquet").write_text("not parquet")
    with pytest.raises(ValueError, match=r"bad\.parquet cannot be read as parquet"):
        Parquet(**COMMON, paths=(str(tmp_path / "bad.parquet"),)).parts()
    with pytest.raises(ValueError, match="there is no file"):
        Parquet(**COMMON, paths=(str(tmp_path / "none*.parquet"),)).parts()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("saved", [False, True])
def test_hugging_face_datasets(tmp_path, monkeypatch, streaming, saved):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "PART_ROWS", 20)
    data = Dataset.from_list(ROWS)
    if saved:
        data.save_to_disk(str(tmp_path / "data"), num_shards=3)
    else:
        for shard in range(3):
            data.shard(3, shard, contiguous=True).to_parquet(tmp_path / "data" / f"train-{shard}.parquet")
    source = HuggingFace(**COMMON, columns=COLUMNS, path=str(tmp_path / "data"), streaming=streaming)
    assert len(source.parts()) > 1 or (streaming and saved)
    assert [(r.text, r.name, r.licence) for r in read(source)] == [(r["content"], r["path"], "MIT") for r in ROWS]
    first = HuggingFace(**COMMON, columns=Columns("content"), path=source.path, streaming=streaming, take=25)
    assert [record.text for record in read(first)] == [row["content"] for row in ROWS[:25]]
    with pytest.raises(ValueError, match="no column 'text'; there are: content, path, license, more"):
        HuggingFace(**COMMON, path=source.path, streaming=streaming).parts()


def test_a_dataset_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"source s: the dataset .* cannot be loaded"):
        HuggingFace(**COMMON, path=str(tmp_path / "none")).parts()


def test_sources_of_a_toml_file(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.py").write_text("x = 1")
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]))
    (tmp_path / "corpus.toml").write_text(
        """
        [[source]]
        name = "mine"
        kind = "code"
        licence = "MIT"
        files = ["src"]
        languages = ["python"]

        [[source]]
        name = "rows"
        kind = "text"
        licence = "CC0"
        jsonl = "rows.jsonl"
        columns = { text = "content", name = "path" }
        """
    )
    mine, rows = sources_from_toml(tmp_path / "corpus.toml")
    assert (mine.name, mine.kind, mine.licence) == ("mine", "code", "MIT")
    assert [record.text for record in read(mine) + read(rows)] == ["x = 1", "text 0"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("", "must hold .*source.* entries and nothing else; it holds: nothing"),
        ("[[source]]\nname = 'a'", "source 1 must say where it is by one of files, jsonl, parquet, huggingface"),
        ("[[source]]\nfiles = ['x']\njsonl = 'y'", "it says .*files.*jsonl"),
        ("[[source]]\nfiles = ['x']\nname = 'a'\nkind = 'text'", "source 1 needs licence"),
        ("[[source]]\nfiles = ['x']\ncolumn = 'a'", "'column' is not something files takes; it takes name, kind"),
        ("[[source]]\nhuggingface = 'x'\nstreaming = 'yes'", "streaming must be a bool, got 'yes'"),
        (
            "[[source]]\njsonl = 'x'\nname = 'a'\nkind = 'text'\nlicence = 'l'\ncolumns = {body = 'b'}",
            "columns takes text, name, licence, language; got body",
        ),
        ("[[source]]\nfiles = ['x']\nname='a'\nkind='code'\nlicence='l'\nlanguages=['klingon']", "unknown languages"),
        ("nonsense", "cannot be read"),
    ],
)
def test_a_toml_file_that_nobody_understands(tmp_path, entry, message):
    (tmp_path / "corpus.toml").write_text(entry)
    with pytest.raises(ValueError, match=message):
        sources_from_toml(tmp_path / "corpus.toml")


def test_sources_of_a_path(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_text('{"text": "x"}')
    (tmp_path / "a.py").write_text("x")
    assert read(source_from_path(str(tmp_path / "rows.parquet"), "text", "l"))[0].text == "text 0"
    assert [r.text for r in read(source_from_path(str(tmp_path / "*.jsonl"), "text", "l"))] == ["x"]
    assert [r.text for r in read(source_from_path(str(tmp_path / "*.py"), "code", "l"))] == ["x"]
    (tmp_path / "rows.jsonl").write_text('{"body": "x"}')
    with pytest.raises(ValueError, match="no column 'text'; there are: body"):
        source_from_path(str(tmp_path / "rows.jsonl"), "text", "l")
    with pytest.raises(ValueError, match="there is no file or folder"):
        source_from_path(str(tmp_path / "none"), "text", "l").parts()
    (tmp_path / "void").mkdir()
    with pytest.raises(ValueError, match="there are no files in"):
        source_from_path(str(tmp_path / "void"), "text", "l").parts()


def test_names_of_globs_and_languages_of_tables(tmp_path):
    (tmp_path / "wiki").mkdir()
    (tmp_path / "wiki" / "a.jsonl").write_text('{"text": "x"}\n')
    assert source_from_path(str(tmp_path / "wiki" / "*.jsonl"), "text", "l").name == "wiki"
    assert source_from_path("*.py", "code", "l").name == "code"
    with pytest.raises(ValueError, match=r"--languages: .*a\.jsonl is a table"):
        source_from_path(str(tmp_path / "wiki" / "a.jsonl"), "code", "l", ("python",))


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    source = Files("mine", "text", "here", "l", (str(tmp_path),))

    def refused(top, onerror):
        onerror(PermissionError(13, "Permission denied", f"{top}/secret"))
        return iter(())

    monkeypatch.setattr("lemur_fast.data.sources.os.walk", refused)
    with pytest.raises(ValueError, match=r"source mine: .*secret cannot be read: Permission denied"):
        source.parts()
