"""Near duplicates: how fast they are found, how many of them, and how many of those that are none.

    python -m benchmarks.dedup                             # the sources of the installed transformers package
    python -m benchmarks.dedup --folder ~/src --threshold 0.8

The truth is every pair of documents, compared as Python sets of their 5-word shingles. Held against it: the product's
stages, from files on disk to the list of what is dropped, and datatrove's MinHash steps (14 bands of 8, their default),
given the same words, because its own need spaCy. Recall: of the pairs above a similarity, how many have lost one of
their two documents (what is left of them would be duplicates in the corpus). Precision: of the documents dropped, how
many are at least as similar as the threshold to one that is kept.
"""

import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import transformers
from datatrove.data import Document
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.utils.word_tokenizers import WordTokenizer
from loguru import logger
from rensa import RMinHash
from rich.console import Console
from rich.table import Table

from benchmarks.harness import Row, command_line, machine, write_rows
from lemur_fast.data.executors import run_local
from lemur_fast.data.filters import Quality
from lemur_fast.data.pipeline import STAGES, Corpus, Settings, plan
from lemur_fast.data.shingles import shingles, words_of
from lemur_fast.data.sources import Files
from lemur_fast.data.tokenizer import load_tokenizer


@dataclass
class Arguments:
    """Measures the removal of near duplicates."""

    folder: Path = Path(transformers.__file__).parent
    """Where the documents are; Python files."""
    threshold: float = 0.7
    """Jaccard similarity from which on a document is dropped."""
    workers: int = 2
    """Processes of the product."""
    json: Path | None = None
    """Also write a JSON line for each rival."""


def all_pairs(texts: Sequence[str], least: float) -> dict[tuple[int, int], float]:
    """Jaccard similarity of every pair (earlier, later) that has at least `least`, by comparing them all."""
    numbers: dict[tuple[str, ...], int] = {}
    holders: dict[int, list[int]] = defaultdict(list)
    sets = []
    for document, text in enumerate(texts):
        words = re.findall(r"\w+", text)
        runs = {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))} if words else set()
        sets.append([numbers.setdefault(run, len(numbers)) for run in runs])
        for number in sets[-1]:
            holders[number].append(document)
    arrays = {number: np.array(documents) for number, documents in holders.items() if len(documents) > 1}
    sizes = np.array([len(each) for each in sets])
    pairs = {}
    for document, mine in enumerate(sets):
        shared = [arrays[number] for number in mine if number in arrays]
        if shared:
            common = np.bincount(np.concatenate(shared), minlength=len(texts))
            similarity = common / np.maximum(1, sizes + sizes[document] - common)
            for earlier in np.flatnonzero(similarity[:document] >= least):
                pairs[int(earlier), document] = float(similarity[earlier])
    return pairs


def ours(folder: Path, corpus_folder: Path, threshold: float, workers: int) -> tuple[Corpus, float, set[int]]:
    """Seconds from files to the list of duplicates, and their numbers."""
    source = Files("files", "code", str(folder), "unknown", (str(folder / "**" / "*.py"),), part_bytes=2**24)
    settings = Settings(quality=Quality.off(), near_duplicates=threshold)
    tokenizer = load_tokenizer()
    started = time.perf_counter()
    corpus = plan(corpus_folder, [source], tokenizer, settings)
    names = {"read", "equal", "match", "verify", "resolve"}
    run_local(corpus, workers, stages=[stage for stage in STAGES if stage.name in names])
    seconds = time.perf_counter() - started
    exact = np.load(corpus.work("equal", 0, ".npy"))[:, 0].tolist()
    near = np.load(corpus.work("resolve", 0, ".npz"))["dropped"][:, 0].tolist()
    return corpus, seconds, {*exact, *near}


class Words(WordTokenizer):
    """The product's words; datatrove asks for more than it uses here."""

    def word_tokenize(self, text: str) -> list[str]:
        """Words, in order."""
        return words_of(text)

    def sent_tokenize(self, text: str) -> list[str]:
        """One sentence."""
        return [text]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """One span."""
        return [(0, len(text))]


class SameShingles(MinhashDedupSignature):
    """datatrove's signatures of the product's shingles."""

    def get_shingles(self, text: str) -> np.ndarray:
        """uint64 [shingles, 1]."""
        return shingles([text])[0].reshape(-1, 1) >> np.uint64(32)  # below the prime that its products are taken by


def datatrove(texts: Sequence[str], folder: Path) -> tuple[float, set[int]]:
    """Seconds of its three steps in this process, and the documents that its clusters drop."""
    logger.disable("datatrove")
    config = MinhashConfig()
    documents = [Document(text, str(number)) for number, text in enumerate(texts)]
    started = time.perf_counter()
    SameShingles(str(folder / "signatures"), config, language=Words()).run(iter(documents))
    for rank in range(config.num_buckets):
        MinhashDedupBuckets(str(folder / "signatures"), str(folder / "buckets"), config=config).run(
            None, rank, config.num_buckets
        )
    MinhashDedupCluster(str(folder / "buckets"), str(folder / "remove"), config).run(None)
    seconds = time.perf_counter() - started
    removed = folder / "remove" / "000000.remove"  # not written where nothing is
    return seconds, set(np.fromfile(removed, "<u4").tolist()) if removed.exists() else set()


def signature_rates(texts: Sequence[str]) -> tuple[float, float]:
    """Million shingles a second that rensa and datatrove make signatures of, one thread for datatrove."""
    sets = shingles(texts)
    offsets = np.cumsum([0, *map(len, sets)]).astype(np.uint64)
    started = time.perf_counter()
    RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(sets), offsets, 128, 42)
    rensa = time.perf_counter() - started
    step = SameShingles(tempfile.mkdtemp(), MinhashConfig(), language=Words())
    some = sets[:: max(1, len(sets) // 300)]
    started = time.perf_counter()
    for each in some:
        if len(each):
            step.get_signature(each.reshape(-1, 1) >> np.uint64(32))
    peer = time.perf_counter() - started
    return int(offsets[-1]) / rensa / 1e6, sum(map(len, some)) / peer / 1e6


def main(arguments: Arguments) -> None:
    """Measures and prints."""
    console = Console(width=110, highlight=False)
    console.print(machine())
    with tempfile.TemporaryDirectory() as scratch:
        corpus, seconds, dropped = ours(
            arguments.folder, Path(scratch) / "ours", arguments.threshold, arguments.workers
        )
        texts = [corpus.value("text", document) or "" for document in range(int(corpus.offsets[-1]))]
        peer_seconds, peer_dropped = datatrove(texts, Path(scratch))
    started = time.perf_counter()
    truth = all_pairs(texts, 0.5)
    console.print(
        f"{len(texts):,} documents, {sum(map(len, texts)) / 1e6:.1f} M characters; "
        f"all pairs took {time.perf_counter() - started:.0f} s"
    )
    alike: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for (earlier, later), similarity in truth.items():
        alike[earlier].append((later, similarity))
        alike[later].append((earlier, similarity))
    table = Table()
    similarities = sorted({0.9, 0.8, arguments.threshold}, reverse=True)
    first, *rest = similarities
    headings = ["", "seconds", "processes", "dropped", "precision", f"recall >= {first}", *(f">= {s}" for s in rest)]
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    rivals = (
        ("lemur_fast (rensa), from files on disk", seconds, arguments.workers, dropped),
        ("datatrove, from texts in memory", peer_seconds, 1, peer_dropped),
    )
    rates, rows = signature_rates(texts), []
    shape = f"{len(texts):,} documents, {sum(map(len, texts)) / 1e6:.1f} M characters"
    for (name, took, processes, gone), rate in zip(rivals, rates, strict=True):
        right = sum(
            any(similarity >= arguments.threshold and other not in gone for other, similarity in alike[document])
            for document in gone
        )
        precision = right / len(gone) if gone else None
        recalls: dict[float, float | None] = {}
        for least in similarities:
            pairs = [pair for pair, similarity in truth.items() if similarity >= least]
            hit = sum(earlier in gone or later in gone for earlier, later in pairs)
            recalls[least] = hit / len(pairs) if pairs else None
        shares = {"precision": precision, **{f"recall >= {least}": recall for least, recall in recalls.items()}}
        told = ("-" if share is None else f"{share:.4f}" for share in shares.values())
        table.add_row(name, f"{took:.1f}", str(processes), f"{len(gone):,}", *told)
        cores = "all cores" if name.startswith("lemur_fast") else "one core"
        facts = {"processes": processes, "dropped": len(gone), f"M shingles/s into signatures, {cores}": round(rate, 2)}
        facts |= {name: round(share, 4) for name, share in shares.items() if share is not None}
        case = f"near duplicates from {arguments.threshold} on"
        rows.append(Row("dedup", case, name, shape, seconds=[took], facts=facts))
    console.print(table)
    rensa, peer = rates
    console.print(f"signatures alone, M shingles/s: rensa {rensa:.1f} (all cores), datatrove {peer:.2f} (one core)")
    if arguments.json:
        write_rows(arguments.json, rows)


if __name__ == "__main__":
    main(command_line(Arguments, __doc__))
