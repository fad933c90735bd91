"""Sources: where documents come from, and under which licence.

    Source ── parts() ──> parts, each read on its own, by whichever process ── read(part) ──> records

A source has a name, a kind (what the mixture weighs: "code" or "text"), an origin and a licence that a reader can
check. Its parts and their order depend on the source alone, never on how many processes read them. What cannot be read
is a record with a problem in the place of a text: it is counted, never left out in silence.
"""

import bz2
import glob
import gzip
import io
import json
import lzma
import os
import stat
import tokenize
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lemur_fast.data.languages import LANGUAGES, language_of

PART_BYTES = 64 * 2**20
"""About how much text a part holds: small enough to redo after an interruption, large enough to be few."""
PART_ROWS = 20_000
"""Rows in a part of a source that does not know its bytes."""
MAX_DOCUMENT_BYTES = 10_000_000
"""A longer document is dropped unread: with one of 50 GB in a single line, memory still stays flat."""


@dataclass(frozen=True)
class Record:
    """A document as its source gives it."""

    name: str
    """Where in the source it comes from: a path, a title, a place in a file."""
    text: str | None
    """None where there is none to read."""
    licence: str = ""
    language: str = ""
    """Programming language, where it is known."""
    problem: str = ""
    """Why there is no text: a few words, counted in the manifest."""
    bytes: int = 0
    """Size of a file that is not read."""


@dataclass(frozen=True)
class Part:
    """A piece of a source, in plain data: it is written to the plan and read on another machine."""

    where: dict[str, Any]
    bytes: int
    """About how much there is to read; 0 when nobody knows."""


@dataclass(frozen=True)
class Source(ABC):
    """Documents of one origin and one kind."""

    name: str
    kind: str
    """What the mixture weighs: "code" or "text"."""
    origin: str
    licence: str
    """Of every document that does not bring its own."""

    @abstractmethod
    def parts(self) -> list[Part]:
        """All parts, in order.

        Raises:
            ValueError: the source cannot be used: no such file, an unknown column.
        """

    @abstractmethod
    def read(self, part: Part) -> Iterator[Record]:
        """The documents of a part, in order."""


@dataclass(frozen=True)
class Generated(Source):
    """Documents that a function makes: (name, text, licence) each, text None for one that cannot be read."""

    documents: Callable[[], Iterator[tuple[str, str | None, str]]]

    def parts(self) -> list[Part]:
        """One: a function has no parts."""
        return [Part({}, 0)]

    def read(self, part: Part) -> Iterator[Record]:
        """Call the function."""
        for name, text, licence in self.documents():
            language = language_of(name) or "" if self.kind == "code" else ""
            yield Record(name, text, licence, language, problem="" if text is not None else "unreadable")


# Folders that hold no work of the project's own: version control, caches, other people's packages, build products.
_SKIPPED_FOLDERS = {".git", ".hg", ".svn", "__pycache__", "node_modules", ".venv", "venv", ".tox", ".mypy_cache"}
_TEXT_SUFFIXES = {"", ".txt", ".text", ".md", ".markdown", ".rst", ".adoc", ".org", ".tex"}


@dataclass(frozen=True)
class Files(Source):
    """A document a file: from folders (everything below), globs and single files.

    Below a folder, code is what has a known programming language, by extension, name or `#!` line, and text is what has
    the suffix of a text file; files named one by one or by a glob are taken as they are.
    """

    paths: tuple[str, ...]
    languages: tuple[str, ...] = ()
    """Programming languages to keep; all when empty."""
    part_bytes: int = PART_BYTES

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.languages) - LANGUAGES):
            raise ValueError(f"source {self.name}: unknown languages {unknown}; known: {', '.join(sorted(LANGUAGES))}")

    def parts(self) -> list[Part]:
        """Files in order, about `part_bytes` to a part."""
        parts: list[Part] = []
        files: list[tuple[str, str, bool]] = []
        size = 0
        for entry in self._files():
            files.append(entry)
            size += _size(entry[0])
            if size >= self.part_bytes or len(files) >= PART_ROWS:
                parts.append(Part({"files": files}, size))
                files, size = [], 0
        if files:
            parts.append(Part({"files": files}, size))
        if not parts:
            raise ValueError(f"source {self.name}: there are no files in {', '.join(self.paths)}")
        return parts

    def read(self, part: Part) -> Iterator[Record]:
        """Read file after file."""
        for path, name, chosen in part.where["files"]:
            yield self._read(Path(path), name, chosen)

    def _unreadable(self, error: OSError) -> None:
        raise ValueError(f"source {self.name}: {error.filename} cannot be read: {error.strerror}")

    def _files(self) -> Iterator[tuple[str, str, bool]]:
        """(path, name in the source, whether it was named by the user).

        Raises:
            ValueError: a folder may not be read.
        """
        for path in self.paths:
            root = Path(path).expanduser()
            if root.is_dir():
                for folder, folders, names in os.walk(root, onerror=self._unreadable):
                    folders[:] = sorted(set(folders) - _SKIPPED_FOLDERS)
                    for name in sorted(names):
                        file = Path(folder, name)
                        yield str(file), str(file.relative_to(root.parent)), False
            elif root.is_file():
                yield str(root), root.name, True
            else:
                found = sorted(glob.glob(str(root), recursive=True))
                if not found:
                    raise ValueError(f"source {self.name}: there is no file or folder {path}")
                yield from ((file, file, True) for file in found if not os.path.isdir(file))

    def _read(self, path: Path, name: str, chosen: bool) -> Record:
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):  # a pipe would never end
                return Record(name, None, problem="not a file")
            size = status.st_size
            language = ""
            if self.kind == "code":
                language = language_of(name) or ""
                if not language:
                    with path.open("rb") as file:
                        language = language_of(name, file.read(256)) or ""
                if not (language or chosen):
                    return Record(name, None, problem="no known language", bytes=size)
                if self.languages and language not in self.languages:
                    return Record(name, None, language=language, problem="other language", bytes=size)
            elif not chosen and path.suffix.lower() not in _TEXT_SUFFIXES:
                return Record(name, None, problem="not a text file", bytes=size)
            if size > MAX_DOCUMENT_BYTES:
                return Record(name, None, language=language, problem="too long", bytes=size)
            content = path.read_bytes()
        except OSError:
            return Record(name, None, problem="unreadable")
        text, problem = decode(content, python=language == "python")
        return Record(name, text, language=language, problem=problem, bytes=size)


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def decode(content: bytes, python: bool = False) -> tuple[str | None, str]:
    """The text of a file, or None and why there is none.

    UTF-8, with or without a mark; UTF-16 with its mark; a Python file in the encoding that it declares.
    """
    encoding = "utf-8-sig"
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        encoding = "utf-16"
    elif b"\0" in content:
        return None, "binary"
    elif python:
        try:
            encoding = tokenize.detect_encoding(io.BytesIO(content).readline)[0]
        except SyntaxError:
            return None, "wrong encoding"
    try:
        text = content.decode(encoding)
    except (UnicodeDecodeError, LookupError):
        return None, "wrong encoding"
    return text.replace("\r\n", "\n").replace("\r", "\n"), ""


@dataclass(frozen=True)
class Columns:
    """Which columns of a table say what; "" for none."""

    text: str = "text"
    name: str = ""
    licence: str = ""
    language: str = ""

    def wanted(self) -> list[str]:
        """Those that are named."""
        return [column for column in (self.text, self.name, self.licence, self.language) if column]

    def check(self, source: str, there: Sequence[str]) -> None:
        """Raise ValueError for a column that is not there."""
        for column in self.wanted():
            if column not in there:
                raise ValueError(f"source {source}: there is no column {column!r}; there are: {', '.join(there)}")

    def record(self, row: dict[str, Any], place: str, languages: Sequence[str]) -> Record:
        """A row as a record."""
        name, licence, language = (
            str(row.get(column) or "") if column else "" for column in (self.name, self.licence, self.language)
        )
        name, text = name or place, row.get(self.text)
        language = language.lower() if self.language else language_of(name) or ""
        if not isinstance(text, str):
            return Record(name, None, licence, language, problem="no text")
        if languages and language not in languages:
            return Record(name, None, licence, language, problem="other language", bytes=len(text))
        if len(text) > MAX_DOCUMENT_BYTES:
            return Record(name, None, licence, language, problem="too long", bytes=len(text))
        return Record(name, text, licence, language)


@dataclass(frozen=True)
class Table(Source):
    """What JSON lines, parquet and Hugging Face datasets have in common: a document a row."""

    columns: Columns = Columns()
    languages: tuple[str, ...] = ()
    """Programming languages to keep, in lower case, as the language column or the extension of the name tells; all
    when empty."""

    def __post_init__(self) -> None:
        if self.languages and not (self.columns.language or self.columns.name):
            raise ValueError(f"source {self.name}: languages needs a column that tells them: language, or name")


@dataclass(frozen=True)
class JsonLines(Table):
    """A document a line: `.jsonl`, plain or compressed (.gz, .bz2, .xz, .zst)."""

    paths: tuple[str, ...] = ()

    def parts(self) -> list[Part]:
        """A compressed file is one part; a plain one is cut by bytes, at the ends of lines."""
        parts = []
        for file in _expand(self.name, self.paths):
            for row, _ in json_lines(file, 0, None):
                if isinstance(row, dict):
                    self.columns.check(self.name, list(row))
                    break
            size = _size(file)
            step = PART_BYTES if _opener(file) is open else max(size, 1)
            parts += [
                Part({"file": file, "start": start, "end": start + step}, min(step, size - start))
                for start in range(0, size, step)
            ]
        return parts

    def read(self, part: Part) -> Iterator[Record]:
        """The lines that begin within the part."""
        file, start = part.where["file"], part.where["start"]
        end = part.where["end"] if _opener(file) is open else None
        for row, place in json_lines(file, start, end):
            name = f"{Path(file).name}@{place}"
            if isinstance(row, dict):
                yield self.columns.record(row, name, self.languages)
            else:
                yield Record(name, None, problem=row)


def _opener(file: str) -> Callable[..., Any]:
    suffix = Path(file).suffix
    if suffix == ".zst":
        return lambda path, _: io.BufferedReader(pa.input_stream(path, compression="zstd"))
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return openers.get(suffix, open)


def json_lines(file: str, start: int = 0, end: int | None = None) -> Iterator[tuple[dict[str, Any] | str, int]]:
    """Rows, or why they are none, and the places of their lines in the file, for lines that begin in [start, end)."""
    limit = 2 * MAX_DOCUMENT_BYTES  # escapes may double a text; never more of a line than this is held
    try:
        with _opener(file)(file, "rb") as lines:
            place = start
            if start:  # the line that is cut here belongs to the part before, unless it ends just here
                lines.seek(start - 1)
                place = start - 1 + _skip_line(lines, limit)
            while end is None or place < end:
                begun = place
                line = lines.readline(limit)
                if not line:
                    return
                place += len(line)
                if not line.endswith(b"\n") and len(line) == limit:
                    place += _skip_line(lines, limit)
                    yield "too long", begun
                elif line.strip():
                    yield _json_row(line), begun
    except (OSError, EOFError, lzma.LZMAError, pa.ArrowException) as error:
        raise ValueError(f"{file} cannot be read to its end: {error}") from error


def _skip_line(lines: Any, limit: int) -> int:
    """Read to the end of a line; how many bytes that was."""
    skipped = 0
    while True:
        piece = lines.readline(limit)
        skipped += len(piece)
        if not piece or piece.endswith(b"\n"):
            return skipped


def _json_row(line: bytes) -> dict[str, Any] | str:
    try:
        row = json.loads(line)
    except UnicodeDecodeError:
        return "wrong encoding"
    except (ValueError, RecursionError):
        return "broken JSON"
    return row if isinstance(row, dict) else "no text"


@dataclass(frozen=True)
class Parquet(Table):
    """A document a row of parquet files."""

    paths: tuple[str, ...] = ()

    def parts(self) -> list[Part]:
        """Row groups, about `PART_BYTES` to a part."""
        parts = []
        for file in _expand(self.name, self.paths):
            try:
                described = pq.ParquetFile(file)
            except (OSError, pa.ArrowException) as error:
                raise ValueError(f"source {self.name}: {file} cannot be read as parquet: {error}") from error
            self.columns.check(self.name, described.schema_arrow.names)
            groups: list[int] = []
            size = row = first = 0
            for group in range(described.num_row_groups):
                about = described.metadata.row_group(group)
                groups.append(group)
                size += about.total_byte_size
                row += about.num_rows
                if size >= PART_BYTES or group == described.num_row_groups - 1:
                    parts.append(Part({"file": file, "groups": groups, "first": first}, size))
                    groups, size, first = [], 0, row
        return parts

    def read(self, part: Part) -> Iterator[Record]:
        """A few rows at a time."""
        row = part.where["first"]
        file = pq.ParquetFile(part.where["file"])
        for batch in file.iter_batches(64, row_groups=part.where["groups"], columns=self.columns.wanted()):
            for values in batch.to_pylist():
                yield self.columns.record(values, f"{Path(part.where['file']).name}#{row}", self.languages)
                row += 1


def _expand(source: str, paths: Sequence[str]) -> list[str]:
    """Files of paths and globs, in order."""
    files = [file for path in paths for file in sorted(glob.glob(os.path.expanduser(path), recursive=True))]
    if not files:
        raise ValueError(f"source {source}: there is no file {', '.join(paths)}")
    return files


@dataclass(frozen=True)
class HuggingFace(Table):
    """A Hugging Face dataset: a name on the hub, a folder of data files, or what `save_to_disk` wrote."""

    path: str = ""
    config: str | None = None
    split: str = "train"
    data_dir: str | None = None
    streaming: bool = False
    """Read it from where it is as it is needed; nothing is kept on disk."""
    take: int | None = None
    """Only the first so many rows."""

    def parts(self) -> list[Part]:
        """Streamed: the dataset's own shards, or one part for the first rows. Otherwise ranges of rows."""
        data = self._load()
        there = data.column_names or list(next(iter(data), {}))
        self.columns.check(self.name, there)
        if self.streaming:
            shards = 1 if self.take is not None else data.num_shards
            return [Part({"shard": shard, "shards": shards}, 0) for shard in range(shards)]
        rows = len(data) if self.take is None else min(self.take, len(data))
        return [Part({"rows": [first, min(first + PART_ROWS, rows)]}, 0) for first in range(0, rows, PART_ROWS)]

    def read(self, part: Part) -> Iterator[Record]:
        """Row after row."""
        data, first, prefix = self._load().select_columns(self.columns.wanted()), 0, ""
        if self.streaming:
            if self.take is not None:
                data = data.take(self.take)
            elif part.where["shards"] > 1:
                data = data.shard(part.where["shards"], part.where["shard"])
            prefix = f"{part.where['shard']}#"
        else:
            first, last = part.where["rows"]
            data = data.select(range(first, last))
        for row, values in enumerate(data, first):
            yield self.columns.record(values, f"{prefix}{row}", self.languages)

    def _load(self) -> Any:
        import datasets

        try:
            if (Path(self.path) / "state.json").is_file():
                data = datasets.load_from_disk(self.path)
                return data.to_iterable_dataset() if self.streaming else data
            return datasets.load_dataset(
                self.path, self.config, split=self.split, data_dir=self.data_dir, streaming=self.streaming
            )
        except Exception as error:  # of many kinds: no network, no such dataset, split or config
            raise ValueError(f"source {self.name}: the dataset {self.path} cannot be loaded: {error}") from error
