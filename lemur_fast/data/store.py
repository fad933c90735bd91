"""The token store: a folder of tokenized documents, memory-mapped, with a manifest of what became of every source.

    manifest.json        sources, licences, hashes, what was dropped and why, tokens and bytes kept, settings, tokenizer
    summary.html         the same, to look at
    train/*.arrow        a row per document: tokens, kind, source, name, licence
    held_out/*.arrow     the same, for the documents set apart for evaluation
    documents/*.parquet  a row per document that was met: what became of it, and of which other it is a copy
    tokenizer/           the tokenizer that gave the ids

Arrow stream files, opened through `datasets.Dataset.from_file`: opening costs no reading, and processes on one machine
share the pages. Documents carry their bos and eos. In memory a document takes 28 bytes: length, kind and source.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from datasets import Dataset, concatenate_datasets, disable_progress_bars

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")
LABELS = ("kind", "source", "name", "licence")
"""What a row says of its document, beside the tokens."""


def token_schema(vocab_size: int) -> pa.Schema:
    """Columns of `train` and `held_out`; ids take 2 bytes where the vocabulary allows it."""
    token = pa.uint16() if vocab_size <= 2**16 else pa.int32()
    return pa.schema([("tokens", pa.list_(token)), *((label, pa.string()) for label in LABELS)])


class TokenStore:
    """A store on disk, opened; `train` and `held_out` are its two `Documents`."""

    def __init__(self, folder: str | Path) -> None:
        """Open the store at `folder`.

        Raises:
            FileNotFoundError: there is no whole store.
            ValueError: a file of it is damaged.
        """
        self.folder = Path(folder)
        needed = ["manifest.json", *SPLITS]
        missing = [name for name in needed if not (self.folder / name).exists()]
        if missing:
            raise FileNotFoundError(f"{self.folder} is not a token store: it has no {', '.join(missing)}")
        manifest = self.folder / "manifest.json"
        try:
            self.manifest: dict[str, Any] = json.loads(manifest.read_text(encoding="utf-8"))
            lacking = [key for key in ("tokenizer", "sources") if key not in self.manifest]
        except (ValueError, TypeError) as error:
            raise ValueError(f"{manifest} is damaged: {error}") from error
        if lacking:
            raise ValueError(f"{manifest} is damaged: it has no {' and no '.join(lacking)}")
        self.train, self.held_out = (
            Documents.open(sorted((self.folder / split).glob("[!.]*.arrow"))) for split in SPLITS
        )

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with the documents, their order, split and tokenizer, not with their place.

        What a source's documents say is told by the hash in the manifest; of conversations, by their numbers alone.
        """
        sources = {name: [of.get("hash"), of["train"], of["held_out"]] for name, of in self.manifest["sources"].items()}
        splits = [self.train.fingerprint(), self.held_out.fingerprint()]
        told = json.dumps([self.manifest["tokenizer"]["fingerprint"], sources, splits], sort_keys=True)
        return hashlib.blake2b(told.encode(), digest_size=8).hexdigest()

    def describe(self) -> str:
        """Sources with origin, licence, tokens, and what was dropped: a few lines for people."""
        lines = [f"tokenizer  {self.manifest['tokenizer']['notice']}"]
        for name, source in self.manifest["sources"].items():
            train, held_out = (source[split]["tokens"] for split in SPLITS)
            dropped = ", ".join(f"{of['documents']} {reason}" for reason, of in source["dropped"].items()) or "none"
            lines += [
                f"data       {name} ({source['kind']}): {source['origin']}; licence: {source['licence']}",
                f"           {train:,} tokens to train on, {held_out:,} held out; "
                f"{source['documents']:,} documents, dropped: {dropped}",
            ]
        return "\n".join(lines)


class Documents:
    """The documents of one split: lengths, kinds and sources in memory, tokens on disk."""

    lengths: np.ndarray
    """int64 [N]: tokens in each document."""
    kinds: np.ndarray
    """str [N]: what the mixture weighs."""
    sources: np.ndarray
    """str [N]: name of the source."""
    source_codes: np.ndarray
    """int32 [N]: the source, as an index into `source_names`."""
    source_names: list[str]

    def __init__(self, rows: Dataset) -> None:
        self.rows = rows
        table = rows.data.table
        self._ids = _Lists(table.column("tokens"))
        self._trained = _Lists(table.column("trained")) if "trained" in table.column_names else None
        self.lengths = self._ids.lengths
        names, codes = _encoded(table.column("kind"))
        self.kinds = np.array(names, object)[codes]
        self.source_names, self.source_codes = _encoded(table.column("source"))
        self.sources = np.array(self.source_names, object)[self.source_codes]

    @classmethod
    def open(cls, files: Sequence[Path]) -> "Documents":
        """The documents of some Arrow files, in order."""
        disable_progress_bars()
        parts = []
        for file in files:
            try:
                parts.append(Dataset.from_file(str(file)))
            except (OSError, pa.ArrowException) as error:
                raise ValueError(f"{file} is damaged: {error}") from error
        return cls(concatenate_datasets(parts))

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, document: int, start: int = 0, length: int | None = None) -> np.ndarray:
        """Ids of a piece of a document, int64 `[length]`; to its end by default."""
        return self._ids.piece(document, start, length).astype(np.int64)

    def trained(self, document: int, start: int = 0, length: int | None = None) -> np.ndarray:
        """Which tokens of a piece are trained on, bool `[length]`: all, where the store has no column `trained`."""
        if self._trained is None:
            return np.ones(len(self._ids.piece(document, start, length)), bool)
        return self._trained.piece(document, start, length).astype(bool)

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with the documents' order, lengths, kinds and sources."""
        digest = hashlib.blake2b(self.lengths.tobytes(), digest_size=8)
        for label in ("source", "kind"):
            names, codes = _encoded(self.rows.data.table.column(label))
            digest.update(codes.tobytes() + "\0".join(names).encode())
        return digest.hexdigest()

    def name(self, document: int) -> str:
        """`source/name` of a document, for people to read."""
        row = self.rows[int(document)]
        return f"{row['source']}/{row['name']}"


class _Lists:
    """A column of lists of numbers. Its pages are those of the files: a slice costs microseconds, a row of the data set
    200.
    """

    def __init__(self, column: pa.ChunkedArray) -> None:
        self.values = [chunk.values.to_numpy(zero_copy_only=True) for chunk in column.chunks]
        self.offsets = [chunk.offsets.to_numpy(zero_copy_only=True) for chunk in column.chunks]
        self.first = np.cumsum([0, *map(len, column.chunks)])  # [chunks + 1]: number of a chunk's first row
        self.lengths = np.concatenate([np.empty(0, np.int64), *map(np.diff, self.offsets)]).astype(np.int64)

    def piece(self, row: int, start: int, length: int | None) -> np.ndarray:
        """A part of a row's list; to its end by default."""
        chunk = int(np.searchsorted(self.first, row, "right")) - 1
        begin, end = (int(place) for place in self.offsets[chunk][row - self.first[chunk] :][:2])
        stop = end if length is None else min(end, begin + start + length)
        return self.values[chunk][begin + start : stop]


def _encoded(column: pa.ChunkedArray) -> tuple[list[str], np.ndarray]:
    """The different strings of a column, in the order in which they come, and which of them each row has, int32 [N]."""
    encoded = column.dictionary_encode().unify_dictionaries()
    if not encoded.num_chunks:
        return [], np.empty(0, np.int32)
    codes = np.concatenate([chunk.indices.to_numpy() for chunk in encoded.chunks])
    return encoded.chunk(0).dictionary.to_pylist(), codes.astype(np.int32)
