"""The pipeline, from sources to a token store.

    plan       parts of all sources                                                plan.json, tokenizer/
    read       part by part: records, filters, digests and signatures              work/read/PART/
    equal      exact duplicates, over all parts                                    work/equal/
    match      band by band: pairs that may be near duplicates                     work/match/BAND
    verify     part by part: those pairs whose shingles really overlap             work/verify/PART
    resolve    which of them are dropped                                           work/resolve/
    tokenize   part by part: ids, split, and what became of each document          train/ held_out/ documents/
    finish     the manifest and the summary; work/ goes

A stage is a list of pieces that need nothing of one another, and whatever runs them, in whatever order and on however
many machines, the store is the same, byte by byte. A piece writes its output beside and renames it, so a run that was
interrupted, or met a full disk, continues with the pieces that are missing. `lemur_fast.data.executors` runs the
stages.

Of the texts a process holds a few megabytes at a time. What grows with the corpus is 32 bytes a document while a band
is matched, and about 100 for each near duplicate found. On disk, while it is made, a document takes its text and 200
bytes more.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from lemur_fast.data import dedup
from lemur_fast.data.decontamination import EvaluationSets
from lemur_fast.data.dedup import text_digest
from lemur_fast.data.filters import Quality
from lemur_fast.data.manifest import corpus_manifest
from lemur_fast.data.sources import Part, Record, Source
from lemur_fast.data.store import LABELS, SPLITS, Split, token_schema
from lemur_fast.data.summary import summary_page
from lemur_fast.data.tokenizer import encode_documents, fingerprint, load_tokenizer
from lemur_fast.files import staged_file, staged_folder, write_json, write_text

_BATCH_BYTES, _BATCH_DOCUMENTS = 4 * 2**20, 1024  # held in memory at a time

_OPEN_PARTS = 4  # mapped into memory at a time
_EXAMPLES = 12  # pairs of near duplicates that the summary shows

_READ = pa.schema(
    {
        **dict.fromkeys(("name", "licence", "language", "reason"), pa.string()),
        **{"bytes": pa.int64(), "text": pa.large_string()},
    }
)
_LEDGER = pa.schema(
    {
        **dict.fromkeys(("source", "name", "language"), pa.string()),
        **dict.fromkeys(("bytes", "tokens"), pa.int64()),
        **{"fate": pa.string(), "like": pa.string(), "similarity": pa.float32()},
    }
)


@dataclass(frozen=True)
class Settings:
    """What decides which documents are kept, and where they go."""

    quality: Quality = field(default_factory=Quality)
    """Rules that a document must meet."""
    near_duplicates: float = 0.7
    """Jaccard similarity of 5-word shingles from which on a document is dropped; 0 keeps near duplicates."""
    evaluation_sets: tuple[str, ...] = ()
    """Files or folders; documents that share a run of words with them are dropped."""
    ngram_words: int = 13
    """Words in such a run."""
    held_out: float = 0.05
    """Share of the documents set apart for evaluation, chosen by a hash of the text."""

    def check(self) -> None:
        """Raise ValueError for a setting out of range."""
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out must be in [0, 1), got {self.held_out}")
        if not 0 <= self.near_duplicates <= 1:
            raise ValueError(f"near_duplicates must be in [0, 1], got {self.near_duplicates}")
        if self.ngram_words < 1:
            raise ValueError(f"ngram_words must be at least 1, got {self.ngram_words}")
        for name, value in dataclasses.asdict(self.quality).items():
            if value < 0:
                raise ValueError(f"quality.{name} must not be negative, got {value}")


@dataclass
class Corpus:
    """A corpus in the making: what its stages need to know. Plain data, so that it travels to other machines."""

    folder: Path
    sources: list[Source]
    parts: list[tuple[int, Part]]
    """(index of the source, part), in the order that decides which of two copies is the first."""
    settings: Settings
    tokenizer_notice: str = ""

    def work(self, stage: str, piece: int, suffix: str = "") -> Path:
        """Where a piece of a stage leaves its output."""
        return self.folder / "work" / stage / f"{piece:05d}{suffix}"

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        """int64 [parts + 1]: number of the first document of each part."""
        counts = [json.loads((self.work("read", part) / "counts.json").read_text()) for part in range(len(self.parts))]
        return np.cumsum([0, *(count["documents"] for count in counts)])

    @functools.cached_property
    def _tables(self) -> OrderedDict[int, pa.Table]:
        return OrderedDict()

    def table(self, part: int) -> pa.Table:
        """What the stage `read` made of a part, memory-mapped; a few stay open, so that few pages stay mapped."""
        if part not in self._tables:
            with pa.memory_map(str(self.work("read", part) / "documents.arrow")) as file:
                self._tables[part] = pa.ipc.open_stream(file).read_all()
            if len(self._tables) > _OPEN_PARTS:
                self._tables.popitem(last=False)
        self._tables.move_to_end(part)
        return self._tables[part]

    def value(self, column: str, document: int) -> Any:
        """A column's value of any document of the corpus."""
        part = int(np.searchsorted(self.offsets, document, "right")) - 1
        return self.table(part).column(column)[int(document - self.offsets[part])].as_py()

    def full_name(self, document: int) -> str:
        """`source/name` of any document."""
        part = int(np.searchsorted(self.offsets, document, "right")) - 1
        return f"{self.sources[self.parts[part][0]].name}/{self.value('name', document)}"

    def __getstate__(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}


# --- plan -------------------------------------------------------------------------------------------------------------


def plan(
    folder: str | Path,
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    tokenizer_notice: str = "",
) -> Corpus:
    """Look at the sources, and begin a corpus in `folder`, or take up one that was begun there with the same settings.

    Raises:
        ValueError: a setting or a source cannot be used; or `folder` was begun with others.
        FileExistsError: `folder` holds something else.
    """
    settings.check()
    folder = Path(folder)
    names = [source.name for source in sources]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"sources need names of their own; used twice: {', '.join(repeated)}")
    wanted: dict[str, Any] = {
        "settings": dataclasses.asdict(settings),
        "evaluation_sets": _evaluation_sets(settings).fingerprint(),  # raises for those that cannot be read
        "tokenizer": fingerprint(tokenizer),
        "sources": [dataclasses.asdict(source) for source in sources],
    }
    wanted = json.loads(json.dumps(wanted, default=_name_of))
    begun = folder / "plan.json"
    if begun.is_file():
        there = json.loads(begun.read_text(encoding="utf-8"))
        if differing := [key for key in wanted if there[key] != wanted[key]]:
            raise ValueError(
                f"{folder} was begun with other {' and '.join(differing)}: give those again to continue it, or another "
                "folder to begin anew"
            )
        parts = [(index, Part(**part)) for index, part in there["parts"]]
        return Corpus(folder, list(sources), parts, settings, tokenizer_notice)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists already, and holds no corpus that was begun")
    parts = [(index, part) for index, source in enumerate(sources) for part in source.parts()]
    if not parts:
        raise ValueError("the corpus is empty: there are no sources, or there is nothing in them")
    with staged_folder(folder) as staging:
        tokenizer.save_pretrained(staging / "tokenizer")
        for split in (*SPLITS, "documents"):
            (staging / split).mkdir()
        write_json(staging / "plan.json", wanted | {"parts": [(i, dataclasses.asdict(part)) for i, part in parts]})
    return Corpus(folder, list(sources), parts, settings, tokenizer_notice)


@functools.lru_cache(1)
def _evaluation_sets(settings: Settings) -> EvaluationSets:
    return EvaluationSets(settings.evaluation_sets, settings.ngram_words)


@functools.lru_cache(1)
def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(folder)


def _name_of(value: Any) -> str:
    """What JSON does not know: functions by their name, so that the plan of two runs is the same."""
    return getattr(value, "__qualname__", None) or str(value)


# --- read -------------------------------------------------------------------------------------------------------------


def read(corpus: Corpus, piece: int, advance: Callable[[int], None]) -> None:
    """Read a part: every document, whatever becomes of it, into an Arrow file, and what duplicates are told by."""
    index, part = corpus.parts[piece]
    source = corpus.sources[index]
    evaluation = _evaluation_sets(corpus.settings)
    digests, alive, keys, with_words = [np.empty((0, 2), np.uint64)], [], [np.empty((0, dedup.BANDS), np.uint64)], []
    documents = size = 0
    with staged_folder(corpus.work("read", piece)) as folder:
        with pa.ipc.new_stream(folder / "documents.arrow", _READ) as writer:
            for batch in _batches(source.read(part)):
                texts = [_unicode(record) for record in batch]
                reasons = [
                    _problem(source, record, text, corpus.settings.quality)
                    for record, text in zip(batch, texts, strict=True)
                ]
                left = [row for row, reason in enumerate(reasons) if not reason]
                sets = evaluation.contaminated([texts[row] or "" for row in left])
                for row, name in zip(left, sets, strict=True):
                    if name:
                        reasons[row] = f"contaminated by {name}"
                left = [row for row in left if not reasons[row]]

                sizes = [
                    record.bytes if text is None else len(text.encode())
                    for record, text in zip(batch, texts, strict=True)
                ]
                columns = {
                    "name": [_clean(record.name) for record in batch],
                    "licence": [_clean(record.licence or source.licence) for record in batch],
                    "language": [_clean(record.language) for record in batch],
                    "reason": reasons,
                    "bytes": sizes,
                    "text": texts,
                }
                writer.write_batch(pa.RecordBatch.from_pydict(columns, _READ))
                digests.append(
                    np.frombuffer(
                        b"".join(b"\0" * 16 if t is None else text_digest(t) for t in texts), np.uint64
                    ).reshape(-1, 2)
                )
                alive += [documents + row for row in left]
                if corpus.settings.near_duplicates:
                    found, has_words = dedup.band_keys([texts[row] or "" for row in left])
                    keys.append(found[has_words])
                    with_words += [documents + row for row, has in zip(left, has_words, strict=True) if has]
                documents += len(batch)
                size += sum(len(text) for text in texts if text is not None)
                advance(sum(sizes))
        np.save(folder / "digests.npy", np.concatenate(digests))
        np.save(folder / "alive.npy", np.array(alive, np.int64))
        np.save(folder / "keys.npy", np.ascontiguousarray(np.concatenate(keys).T))
        np.save(folder / "with_words.npy", np.array(with_words, np.int64))
        write_json(folder / "counts.json", {"documents": documents, "characters": size})


def _batches(records: Iterator[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    size = 0
    for record in records:
        batch.append(record)
        size += len(record.text or "")
        if size >= _BATCH_BYTES or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _clean(value: str) -> str:
    """Without lone surrogates, which Arrow does not take."""
    return value.encode("utf-8", "replace").decode()


def _unicode(record: Record) -> str | None:
    """The text, if it can be written as UTF-8: a str may hold lone surrogates, which no tokenizer takes."""
    try:
        return record.text if record.text is not None and record.text.encode("utf-8") is not None else None
    except UnicodeEncodeError:
        return None


def _problem(source: Source, record: Record, text: str | None, quality: Quality) -> str:
    if text is None:
        return record.problem or "wrong encoding"
    if "\0" in text:
        return "binary"
    return quality.problem(text, source.kind) if text.strip() else "empty"


# --- duplicates -------------------------------------------------------------------------------------------------------


def equal(corpus: Corpus, piece: int, advance: Callable[[int], None]) -> None:
    """Find the exact duplicates of the whole corpus."""
    digests, documents = [], []
    for part, first in enumerate(corpus.offsets[:-1]):
        folder = corpus.work("read", part)
        alive = np.load(folder / "alive.npy")
        digests.append(np.load(folder / "digests.npy", mmap_mode="r")[alive])
        documents.append(alive + first)
    _save(corpus.work("equal", piece, ".npy"), dedup.equal(np.concatenate(digests), np.concatenate(documents)))


def match(corpus: Corpus, piece: int, advance: Callable[[int], None]) -> None:
    """Find the pairs of documents that agree in a band; exact duplicates are left to their first copy."""
    gone = np.load(corpus.work("equal", 0, ".npy"))[:, 0]
    keys, documents = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for part, first in enumerate(corpus.offsets[:-1]):
        folder = corpus.work("read", part)
        numbers = np.load(folder / "with_words.npy") + first
        unique = ~np.isin(numbers, gone, assume_unique=True)
        if len(numbers):
            keys.append(np.load(folder / "keys.npy", mmap_mode="r")[piece][unique])
            documents.append(numbers[unique])
    _save(corpus.work("match", piece, ".npy"), dedup.candidates(np.concatenate(keys), np.concatenate(documents)))


def verify(corpus: Corpus, piece: int, advance: Callable[[int], None]) -> None:
    """Measure the similarity of the pairs whose later document is in this part."""
    here = corpus.offsets[piece : piece + 2]
    slices = [np.empty((0, 2), np.int64)]
    for band in range(dedup.BANDS):
        pairs = np.load(corpus.work("match", band, ".npy"), mmap_mode="r")
        begin, end = np.searchsorted(pairs[:, 0], here)
        slices.append(pairs[begin:end])
    pairs = np.unique(np.concatenate(slices), axis=0)
    found = list(
        dedup.verified(pairs, lambda document: corpus.value("text", document), corpus.settings.near_duplicates)
    )
    similar = np.array([pair[:2] for pair in found], np.int64).reshape(-1, 2)
    with staged_file(corpus.work("verify", piece, ".npz")) as staging:
        np.savez(staging, pairs=similar, similarities=np.array([pair[2] for pair in found]))


def resolve(corpus: Corpus, piece: int, advance: Callable[[int], None]) -> None:
    """Decide which near duplicates are dropped."""
    found = [np.load(corpus.work("verify", part, ".npz")) for part in range(len(corpus.parts))]
    pairs, similarities = (np.concatenate([each[name] for each in found]) for name in ("pairs", "similarities"))
    dropped, how_similar = dedup.resolve(pairs, similarities)
    with staged_file(corpus.work("resolve", piece, ".npz")) as staging:
        np.savez(staging, dropped=dropped, similarities=how_similar)


def _save(path: Path, array: np.ndarray) -> None:
    with staged_file(path) as staging:
        np.save(staging, array)


# --- tokenize ---------------------------------------------------------------------------------------------------------


def split_of(text: str, held_out: float) -> Split:
    """The split a document belongs to: decided by its text alone, so copies of it never fall on both sides."""
    place = int.from_bytes(text_digest(text)[:8], "big") / 2**64
    return "held_out" if place < held_out else "train"


def tokenize(corpus: Corpus, piece: int, advance: Callable[[int], None]) -> None:
    """Tokenize a part, write what is kept of it, and say what became of every document."""
    source = corpus.sources[corpus.parts[piece][0]]
    tokenizer = _tokenizer(corpus.folder / "tokenizer")
    schema = token_schema(len(tokenizer))
    copies = _copies(corpus, piece)
    count = _Count()
    with contextlib.ExitStack() as stack:
        writers = {}
        for split in SPLITS:
            path = stack.enter_context(staged_file(corpus.folder / split / f"{piece:05d}.arrow"))
            writers[split] = stack.enter_context(pa.ipc.new_stream(path, schema))
        path = stack.enter_context(staged_file(corpus.folder / "documents" / f"{piece:05d}.parquet"))
        ledger = stack.enter_context(pq.ParquetWriter(path, _LEDGER))
        document = int(corpus.offsets[piece])
        for batch in corpus.table(piece).to_batches():
            rows = batch.to_pylist()
            with_text = [row for row in rows if row["text"] is not None]
            ids = iter(encode_documents(tokenizer, [row["text"] for row in with_text]))
            kept: dict[Split, list[tuple[dict, np.ndarray]]] = {split: [] for split in SPLITS}
            met = []
            for row in rows:
                tokens = next(ids) if row["text"] is not None else np.empty(0, np.int32)
                fate, like, similarity = row["reason"], "", None
                if document in copies:
                    fate, other, similarity = copies[document]
                    like = corpus.full_name(other)
                if not fate:
                    fate = split = split_of(row["text"], corpus.settings.held_out)
                    kept[split].append((row, tokens))
                count.add(row, fate, len(tokens))
                met.append(
                    (source.name, row["name"], row["language"], row["bytes"], len(tokens), fate, like, similarity)
                )
                document += 1
            for split, writer in writers.items():
                arrays = [pa.array([tokens for _, tokens in kept[split]], schema.field("tokens").type)]
                for label in LABELS:
                    constant = {"kind": source.kind, "source": source.name}.get(label)
                    values = [row[label] if constant is None else constant for row, _ in kept[split]]
                    arrays.append(pa.array(values, pa.string()))
                writer.write_batch(pa.record_batch(arrays, schema=schema))
            met_columns = [
                pa.array(column, kind) for column, kind in zip(zip(*met, strict=True), _LEDGER.types, strict=True)
            ]
            ledger.write_batch(pa.record_batch(met_columns, schema=_LEDGER))
            advance(sum(len(row["text"]) for row in with_text))
    write_json(corpus.work("tokenize", piece, ".json"), vars(count))


def _copies(corpus: Corpus, piece: int) -> dict[int, tuple[str, int, float]]:
    """Documents of a part that are copies: (reason, of which document, similarity)."""
    equal_to = np.load(corpus.work("equal", 0, ".npy"))
    near = np.load(corpus.work("resolve", 0, ".npz"))
    here = corpus.offsets[piece : piece + 2]
    begin, end = np.searchsorted(equal_to[:, 0], here)
    copies = {int(later): ("exact duplicate", int(first), 1.0) for later, first in equal_to[begin:end]}
    begin, end = np.searchsorted(near["dropped"][:, 0], here)
    pairs = zip(near["dropped"][begin:end].tolist(), near["similarities"][begin:end].tolist(), strict=True)
    return copies | {later: ("near duplicate", first, similarity) for (later, first), similarity in pairs}


@dataclass
class _Count:
    """What became of the documents of a part."""

    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    fates: dict[str, dict[str, int]] = field(default_factory=dict)
    """Of the documents of each fate: documents, bytes, tokens."""
    lengths: dict[str, int] = field(default_factory=Counter)
    """Kept documents by the power of two that their tokens fill."""
    licences: dict[str, int] = field(default_factory=Counter)
    """Kept documents."""
    languages: dict[str, int] = field(default_factory=Counter)
    """Tokens of kept documents."""

    def add(self, row: dict[str, Any], fate: str, tokens: int) -> None:
        self.documents += 1
        self.bytes += row["bytes"]
        self.tokens += tokens
        of = self.fates.setdefault(fate, {"documents": 0, "bytes": 0, "tokens": 0})
        of["documents"] += 1
        of["bytes"] += row["bytes"]
        of["tokens"] += tokens
        if fate in SPLITS:
            self.lengths[str(tokens.bit_length() - 1)] += 1
            self.licences[row["licence"]] += 1
            self.languages[row["language"]] += tokens


# --- finish -----------------------------------------------------------------------------------------------------------


def finish(corpus: Corpus, piece: int, advance: Callable[[int], None]) -> None:
    """Write the manifest and the summary; with the manifest the store is whole."""
    sweep(corpus)  # of tasks that were killed: in the last stage no other is at work
    counts = [json.loads(corpus.work("tokenize", part, ".json").read_text()) for part in range(len(corpus.parts))]
    hashes = [hashlib.blake2b(digest_size=16) for _ in corpus.sources]
    for part, (index, _) in enumerate(corpus.parts):
        digests = np.load(corpus.work("read", part) / "digests.npy")
        hashes[index].update(digests[digests.any(1)].tobytes())
    tokenizer = _tokenizer(corpus.folder / "tokenizer")
    evaluation = _evaluation_sets(corpus.settings)
    manifest = {
        "tokenizer": {
            "vocab_size": len(tokenizer),
            "notice": corpus.tokenizer_notice,
            "fingerprint": fingerprint(tokenizer),
        },
        "settings": dataclasses.asdict(corpus.settings),
        "evaluation_sets": evaluation.report,
        "sources": corpus_manifest(
            corpus.sources,
            [each.hexdigest() for each in hashes],
            [(index, count) for (index, _), count in zip(corpus.parts, counts, strict=True)],
        ),
    }
    sources = manifest["sources"].items()
    if not any(entry["train"]["documents"] for _, entry in sources):
        found = "; ".join(
            f"{name}: {entry['documents']} documents, dropped {entry['dropped']}" for name, entry in sources
        )
        raise ValueError(f"the corpus is empty: nothing is left to train on ({found})")
    near = np.load(corpus.work("resolve", 0, ".npz"))
    some = np.linspace(0, len(near["dropped"]) - 1, min(_EXAMPLES, len(near["dropped"]))).astype(int)
    examples = [
        (corpus.full_name(gone), corpus.full_name(kept), float(similarity))
        for (gone, kept), similarity in zip(near["dropped"][some].tolist(), near["similarities"][some], strict=True)
    ]
    write_text(corpus.folder / "summary.html", summary_page(manifest, near["similarities"], examples))
    write_json(corpus.folder / "manifest.json", manifest)


# --- the stages -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """A stage: what its pieces are, what one does, and what it leaves."""

    name: str
    verb: str
    """For the progress bar."""
    work: Callable[[Corpus, int, Callable[[int], None]], None]
    sizes: Callable[[Corpus], list[int]]
    """How much each piece has to do; 1 where pieces are counted, 0 where nobody knows."""
    suffix: str
    unit: str = " pieces"

    @property
    def counts_pieces(self) -> bool:
        """Whether its progress is in pieces, not in what it works through."""
        return self.unit == " pieces"

    def output(self, corpus: Corpus, piece: int) -> Path:
        """What is there when a piece is done."""
        return corpus.folder / "manifest.json" if self.name == "finish" else corpus.work(self.name, piece, self.suffix)


def _once(corpus: Corpus) -> list[int]:
    return [1]


def _bands(corpus: Corpus) -> list[int]:
    return [1] * dedup.BANDS


def _each_part(corpus: Corpus) -> list[int]:
    return [1] * len(corpus.parts)


def _bytes_planned(corpus: Corpus) -> list[int]:
    return [part.bytes for _, part in corpus.parts]


def _characters_read(corpus: Corpus) -> list[int]:
    folders = [corpus.work("read", part) for part in range(len(corpus.parts))]
    if not all(folder.is_dir() for folder in folders):  # asked before the stage `read` is done: on a cluster
        return [0] * len(folders)
    return [json.loads((folder / "counts.json").read_text())["characters"] for folder in folders]


STAGES = (
    Stage("read", "reading", read, _bytes_planned, "", "B"),
    Stage("equal", "exact duplicates", equal, _once, ".npy"),
    Stage("match", "matching bands", match, _bands, ".npy"),
    Stage("verify", "comparing", verify, _each_part, ".npz"),
    Stage("resolve", "near duplicates", resolve, _once, ".npz"),
    Stage("tokenize", "tokenizing", tokenize, _characters_read, ".json", "chars"),
    Stage("finish", "manifest", finish, _once, ""),
)


def sweep(corpus: Corpus) -> None:
    """Remove what interrupted processes left half-written; nothing else may be at work in the folder."""
    for folder, folders, names in os.walk(corpus.folder):
        for name in folders + names:
            if name.startswith(".") and ".partial" in name:
                path = Path(folder, name)
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        folders[:] = [name for name in folders if ".partial" not in name]


def clean(corpus: Corpus) -> None:
    """Remove what only the making needed."""
    if (corpus.folder / "manifest.json").is_file():
        shutil.rmtree(corpus.folder / "work", ignore_errors=True)
