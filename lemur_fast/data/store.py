"""The token store: a folder of tokenized documents, memory-mapped, with a manifest of what became of every source.

    manifest.json     sources, licences, documents dropped by reason, tokens and bytes kept, the tokenizer
    train.arrow       one row per document: tokens, kind, source, name, licence
    held_out.arrow    the same, for the documents set apart for evaluation

Arrow stream files, read through `datasets.Dataset.from_file`: opening a store of any size costs nothing, and processes
on one machine share the pages. Documents carry their bos and eos.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from lemur_fast.data.filters import DropEmpty, DropExactDuplicates, Filter, text_digest
from lemur_fast.data.sources import Document, Source
from lemur_fast.data.tokenizer import encode_documents
from lemur_fast.files import staged_folder

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")

_LABELS = ("kind", "source", "name", "licence")  # what a row says of its document, beside the tokens
_CHUNK = 256  # documents tokenized and written at a time: keeps all cores busy and memory flat


def split_of(document: Document, held_out: float) -> Split:
    """The split a document belongs to: decided by its text alone, so copies of it never fall on both sides."""
    place = int.from_bytes(text_digest(document.text)[:8], "big") / 2**64
    return "held_out" if place < held_out else "train"


def build_store(
    folder: str | Path,
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    *,
    held_out: float = 0.05,
    filters: Sequence[Filter] | None = None,
    tokenizer_notice: str = "",
    progress: bool = True,
) -> "TokenStore":
    """Read, filter, split and tokenize the documents of `sources` into a new store at `folder`.

    Args:
        folder: the store to make; it appears only when it is whole.
        sources: read one after another; a document of an earlier one wins over its duplicate in a later one.
        tokenizer: gives the ids.
        held_out: share of the documents to set apart for evaluation, in [0, 1).
        filters: asked in this order; the first that drops a document is the one counted. Default: empty documents,
            then exact duplicates.
        tokenizer_notice: origin and licence of the tokenizer, for the manifest.
        progress: show a progress bar.

    Raises:
        ValueError: no document is left to train on, or `held_out` is out of range.
    """
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out must be in [0, 1), got {held_out}")
    filters = [DropEmpty(), DropExactDuplicates()] if filters is None else filters
    ledger = {source.name: _new_entry(source) for source in sources}
    token_type = pa.uint16() if len(tokenizer) <= 2**16 else pa.int32()
    schema = pa.schema([("tokens", pa.list_(token_type)), *((label, pa.string()) for label in _LABELS)])

    with staged_folder(folder) as staging:
        writers = {split: pa.ipc.new_stream(staging / f"{split}.arrow", schema) for split in SPLITS}
        bar = tqdm(desc="tokenizing", unit=" tokens", unit_scale=True, leave=False, disable=None if progress else True)
        for documents in _chunks(_kept(sources, filters, ledger), _CHUNK):
            ids = encode_documents(tokenizer, [document.text for document in documents])
            rows: dict[Split, list[tuple[Document, np.ndarray]]] = {split: [] for split in SPLITS}
            for document, tokens in zip(documents, ids, strict=True):
                split = split_of(document, held_out)
                rows[split].append((document, tokens))
                entry = ledger[document.source][split]
                entry["documents"] += 1
                entry["tokens"] += len(tokens)
                entry["bytes"] += len(document.text.encode())
            for split, writer in writers.items():
                tokens = pa.array([tokens for _, tokens in rows[split]], type=schema.field("tokens").type)
                labels = [pa.array([getattr(doc, label) for doc, _ in rows[split]], pa.string()) for label in _LABELS]
                writer.write_batch(pa.record_batch([tokens, *labels], schema=schema))
            bar.update(sum(map(len, ids)))
        bar.close()
        for writer in writers.values():
            writer.close()
        if not any(entry["train"]["documents"] for entry in ledger.values()):
            found = "; ".join(
                f"{name}: {e['documents']} documents, dropped {e['dropped']}" for name, e in ledger.items()
            )
            raise ValueError(f"the corpus is empty: nothing is left to train on ({found or 'no sources'})")
        tokenizer_entry = {"vocab_size": len(tokenizer), "notice": tokenizer_notice}
        manifest = {"tokenizer": tokenizer_entry, "held_out": held_out, "sources": ledger}
        (staging / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return TokenStore(folder)


def _new_entry(source: Source) -> dict[str, Any]:
    entry: dict[str, Any] = {"kind": source.kind, "origin": source.origin, "licence": source.licence}
    entry |= {"documents": 0, "dropped": {}}
    return entry | {split: {"documents": 0, "tokens": 0, "bytes": 0} for split in SPLITS}


def _kept(sources: Sequence[Source], filters: Sequence[Filter], ledger: dict[str, dict]) -> Iterator[Document]:
    for source in sources:
        entry = ledger[source.name]
        for document in source.documents():
            entry["documents"] += 1
            if document is None:
                reason: str | None = "unreadable"
            else:
                reason = next((why for f in filters if (why := f(document))), None)
            if reason:
                entry["dropped"][reason] = entry["dropped"].get(reason, 0) + 1
            elif document is not None:
                yield document


def _chunks(documents: Iterable[Document], size: int) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    for document in documents:
        chunk.append(document)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


class TokenStore:
    """A store on disk, opened; `train` and `held_out` are its two `Documents`."""

    def __init__(self, folder: str | Path) -> None:
        """Open the store at `folder`.

        Raises:
            FileNotFoundError: there is no whole store.
        """
        self.folder = Path(folder)
        needed = ["manifest.json", *(f"{split}.arrow" for split in SPLITS)]
        missing = [name for name in needed if not (self.folder / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{self.folder} is not a token store: it has no {', '.join(missing)}")
        self.manifest: dict[str, Any] = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))
        self.train = Documents(Dataset.from_file(str(self.folder / "train.arrow")))
        self.held_out = Documents(Dataset.from_file(str(self.folder / "held_out.arrow")))

    def describe(self) -> str:
        """Sources with origin, licence, tokens, and what was dropped: a few lines for people."""
        lines = [f"tokenizer  {self.manifest['tokenizer']['notice']}"]
        for name, source in self.manifest["sources"].items():
            train, held_out = (source[split]["tokens"] for split in SPLITS)
            dropped = ", ".join(f"{count} {reason}" for reason, count in source["dropped"].items()) or "none"
            lines += [
                f"data       {name} ({source['kind']}): {source['origin']}; licence: {source['licence']}",
                f"           {train:,} tokens to train on, {held_out:,} held out; "
                f"{source['documents']} documents, dropped: {dropped}",
            ]
        return "\n".join(lines)


class Documents:
    """The documents of one split: lengths and kinds in memory, tokens on disk."""

    lengths: np.ndarray
    """int64 [N]: tokens in each document."""
    kinds: np.ndarray
    """str [N]: what the mixture weighs."""
    sources: np.ndarray
    """int64 [N]: the source of each document, an index into `source_names`."""
    source_names: list[str]

    def __init__(self, rows: Dataset) -> None:
        self.rows = rows.with_format("numpy")
        table = rows.data.table
        lengths = [np.asarray(chunk.value_lengths()) for chunk in table.column("tokens").chunks]
        self.lengths = np.concatenate([np.empty(0, np.int64), *lengths]).astype(np.int64)
        self.kinds = table.column("kind").to_numpy()
        names, self.sources = np.unique(table.column("source").to_numpy().astype(str), return_inverse=True)
        self.source_names = names.tolist()

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, document: int, start: int = 0, length: int | None = None) -> np.ndarray:
        """Ids of a piece of a document, int64 `[length]`; to its end by default."""
        ids = self.rows[int(document)]["tokens"]
        return ids[start : None if length is None else start + length].astype(np.int64)

    def trained(self, document: int, start: int = 0, length: int | None = None) -> np.ndarray:
        """Which tokens of a piece are trained on, bool `[length]`: all, unless the store says something else."""
        if "trained" in self.rows.column_names:
            mask = self.rows[int(document)]["trained"]
        else:
            mask = np.ones(self.lengths[document], bool)
        return mask[start : None if length is None else start + length]

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with the documents' order, lengths, kinds and sources."""
        digest = hashlib.blake2b(self.lengths.tobytes(), digest_size=8)
        digest.update(self.sources.tobytes() + "\0".join([*self.source_names, *self.kinds]).encode())
        return digest.hexdigest()

    def name(self, document: int) -> str:
        """`source/name` of a document, for people to read."""
        row = self.rows[int(document)]
        return f"{row['source']}/{row['name']}"
