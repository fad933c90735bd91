"""Decontamination: documents that contain a piece of an evaluation set are dropped.

A piece is a run of 13 words (GPT-3's choice, arXiv 2005.14165), compared without case and punctuation. One is enough.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lemur_fast.data.shingles import ngram_hashes, words_of
from lemur_fast.data.sources import decode, json_lines

NGRAM_WORDS = 13


class EvaluationSets:
    """Runs of words of evaluation sets; 8 bytes each, held by every process that reads documents."""

    def __init__(self, paths: Sequence[str | Path], ngram_words: int = NGRAM_WORDS) -> None:
        """Read evaluation sets.

        Args:
            paths: files of JSON lines (compressed or not), JSON, parquet, or text, and folders of those. Every string
                in them, however deep, is an item; a text file is one.
            ngram_words: words in a run.

        Raises:
            ValueError: a path holds no items.
        """
        self.ngram_words = ngram_words
        self.names: list[str] = []
        self.report: dict[str, dict[str, int]] = {}
        hashes, owners = [np.empty(0, np.uint64)], [np.empty(0, np.int32)]
        for path in paths:
            name = Path(path).name.split(".")[0]
            if name in self.report:  # mbpp/test.parquet, gsm8k/test.parquet
                name = f"{Path(path).parent.name}/{name}"
            items = short = 0
            for batch in _batches(_items(Path(path).expanduser())):
                found = ngram_hashes(batch, ngram_words, lower=True)
                items += len(batch)
                short += sum(len(words_of(item)) < ngram_words for item in batch)
                hashes += found
                owners += [np.full(len(each), len(self.names), np.int32) for each in found]
            if not items:
                raise ValueError(f"evaluation set {path}: there is no text in it")
            self.names.append(name)
            self.report[name] = {"items": items, "items too short to look for": short}
        self.hashes, first = np.unique(np.concatenate(hashes), return_index=True)
        self.owners = np.concatenate(owners)[first]

    def fingerprint(self) -> str:
        """A hash that changes when the sets do."""
        return hashlib.blake2b(self.hashes.tobytes() + repr(self.names).encode(), digest_size=16).hexdigest()

    def contaminated(self, texts: Sequence[str]) -> list[str]:
        """For each text the evaluation set that it has a run of words of, or ""."""
        if not len(self.hashes):
            return [""] * len(texts)
        return [self._owner(found) for found in ngram_hashes(texts, self.ngram_words, lower=True)]

    def _owner(self, hashes: np.ndarray) -> str:
        places = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        hits = np.flatnonzero(self.hashes[places] == hashes)
        return self.names[self.owners[places[hits[0]]]] if hits.size else ""


def _items(path: Path) -> Iterator[str]:
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.is_file():
                yield from _items(file)
        return
    suffixes = path.suffixes
    try:
        if ".jsonl" in suffixes:
            for row, _ in json_lines(str(path)):
                if isinstance(row, dict):
                    yield from _strings(row)
        elif path.suffix == ".json":
            yield from _strings(json.loads(path.read_bytes()))
        elif path.suffix == ".parquet":
            for batch in pq.ParquetFile(path).iter_batches(64):
                yield from _strings(batch.to_pylist())
        else:
            text, problem = decode(path.read_bytes())
            if text is None:
                raise ValueError(problem)
            yield text
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ValueError(f"evaluation set {path} cannot be read: {error}") from error


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _strings(list(value.values()))
    elif isinstance(value, list):
        for each in value:
            yield from _strings(each)


def _batches(items: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for item in items:
        batch.append(item)
        if len(batch) == 256:
            yield batch
            batch = []
    if batch:
        yield batch
