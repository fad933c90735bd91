"""Prepare a corpus to pretrain on: read, filter, remove duplicates, tokenize.

    python recipes/prepare_data.py                                    # the embedded corpus, into corpora/embedded
    python recipes/prepare_data.py --code ~/src --text ~/notes --out corpora/mine      # folders, files, globs
    python recipes/prepare_data.py --code repos.jsonl.zst --text 'wiki/*.parquet' --decontaminate HumanEval.jsonl.gz
    python recipes/prepare_data.py --sources corpus.toml --out corpora/big             # any source; see below
    python recipes/prepare_data.py --sources corpus.toml --out corpora/big --executor slurm --cluster.partition cpu
    python recipes/pretrain.py --data corpora/mine                    # train on it

Run the same command again after an interruption or a full disk: it continues where it was. What it leaves behind:

    manifest.json    for every source: what came in, what was dropped and why, what was kept, licence, hash
    summary.html     the same, to look at in a browser
    documents/       a row per document that was met: what became of it, and of which other it is a copy (parquet)
    train/, held_out/    tokens, memory-mapped (Arrow)            tokenizer/, plan.json    what they were made with

A TOML file of sources has an entry for each:

    [[source]]
    name = "stack-python"
    kind = "code"                            # what the mixture weighs: 10 code to 1 text by default
    licence = "as each file states"
    huggingface = "bigcode/the-stack-dedup"  # or files = [...], jsonl = [...], parquet = [...]
    streaming = true                         # a Hugging Face dataset takes config, split, data_dir, streaming, take
    columns = { text = "content", name = "path", licence = "licence" }
    languages = ["python"]
"""

import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # tokenize on all cores

from lemur_fast.data.embedded import embedded_sources
from lemur_fast.data.executors import Cluster, run_local, run_ray, submit_slurm
from lemur_fast.data.filters import Quality
from lemur_fast.data.pipeline import Settings, clean, plan
from lemur_fast.data.sources import Source
from lemur_fast.data.specification import source_from_path, sources_from_toml
from lemur_fast.data.store import TokenStore
from lemur_fast.data.tokenizer import MISTRAL_V1_NOTICE, load_tokenizer
from lemur_fast.files import claimed
from lemur_fast.training.command_line import parse_settings
from lemur_fast.training.distributed import REFUSALS

MIXTURE = {"code": 10, "text": 1}  # what pretrain.py reads by default


@dataclass(frozen=True)
class PrepareData:
    """Settings. Without sources, the corpus is what every Python brings."""

    out: Path = Path("corpora/embedded")
    """Folder of the corpus: new, empty, or one that was begun with the same settings."""

    # What to read.
    code: tuple[str, ...] = ()
    """Code: folders, files, globs, .jsonl (.gz, .bz2, .xz, .zst) and .parquet; each is a source."""
    text: tuple[str, ...] = ()
    """Text: the same."""
    sources: Path | None = None
    """TOML file that lists sources, with everything that can be said of them."""
    licence: str = "not stated"
    """Licence of what --code and --text name, for the manifest."""
    languages: tuple[str, ...] = ()
    """Programming languages to keep of --code, such as python sql shell. Default: all that are known."""

    # What to keep.
    quality: Quality = field(default_factory=Quality)
    near_duplicates: float = 0.7
    """Jaccard similarity of 5-word shingles from which on a document is dropped; 0 keeps near duplicates."""
    decontaminate: tuple[str, ...] = ()
    """Evaluation sets (.jsonl, .json, .parquet, text, folders): documents that share 13 words in a row are dropped."""
    held_out: float = 0.05
    """Share of the documents kept from training, to measure on; chosen by a hash of the text."""

    # The tokens.
    tokenizer: Path | None = None
    """Folder of a model or tokenizer. Default: the 32,000-piece Mistral v1 tokenizer."""

    # Where to run.
    workers: int = 0
    """Processes on this machine. 0: one for each core, or just this one where there is too little to share."""
    executor: Literal["local", "slurm", "ray"] = "local"
    """local: this machine. slurm: submit a chain of jobs and leave. ray: the Ray cluster this machine belongs to."""
    cluster: Cluster = field(default_factory=Cluster)


def all_sources(args: PrepareData) -> list[Source]:
    """What --code, --text and --sources name, or the embedded corpus."""
    sources = [source_from_path(path, "code", args.licence, args.languages) for path in args.code]
    sources += [source_from_path(path, "text", args.licence) for path in args.text]
    sources += sources_from_toml(args.sources) if args.sources else []
    return sources or embedded_sources()


def report(store: TokenStore) -> str:
    """What is in the store, and how far it goes at pretrain.py's mixture."""
    lines = [store.describe()]
    tokens = dict.fromkeys(MIXTURE, 0)
    for name, source in store.manifest["sources"].items():
        if not source["train"]["documents"]:
            lines.append(f"NOTHING    is left of {name} to train on: see why its documents were dropped")
        tokens[source["kind"]] = tokens.get(source["kind"], 0) + source["train"]["tokens"]
    if all(tokens[kind] for kind in MIXTURE):
        rounds = {kind: tokens[kind] / weight for kind, weight in MIXTURE.items()}
        first = min(rounds, key=lambda kind: rounds[kind])
        total = rounds[first] * sum(MIXTURE.values())
        mixture = ":".join(str(weight) for weight in MIXTURE.values())
        lines.append(
            f"mixture    at {':'.join(MIXTURE)} = {mixture}, {total:,.0f} tokens until {first} begins to repeat"
        )
    return "\n".join(lines)


def prepare_data(args: PrepareData) -> int:
    """The whole run; returns the exit code."""
    started = time.perf_counter()
    try:
        if args.workers < 0:
            raise ValueError(f"--workers must not be negative, got {args.workers}")
        tokenizer = load_tokenizer(args.tokenizer)
        notice = MISTRAL_V1_NOTICE if args.tokenizer is None else f"the tokenizer in {args.tokenizer}"
        settings = Settings(args.quality, args.near_duplicates, args.decontaminate, held_out=args.held_out)
        corpus = plan(args.out, all_sources(args), tokenizer, settings, notice)
        if args.executor == "slurm":
            jobs = submit_slurm(corpus, args.cluster)
            print(
                f"submitted  {len(jobs)} jobs: {', '.join(jobs)}; the corpus is whole when {args.out} has manifest.json"
            )
            return 0
        if (args.out / "manifest.json").is_file():
            print(f"{args.out} is finished already")
            clean(corpus)
        else:
            with claimed(args.out):
                if args.executor == "ray":
                    run_ray(corpus, args.cluster)
                else:
                    run_local(corpus, args.workers)
        store = TokenStore(args.out)
    except REFUSALS as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # most of all: no space left on device
        print(f"prepare_data: {error}; run the same command again to continue from here", file=sys.stderr)
        return 1
    print(report(store))
    print(f"corpus     {args.out}, in {time.perf_counter() - started:.1f} s; look at {args.out / 'summary.html'}")
    return 0


def main() -> int:
    """Run from the command line."""
    try:
        return prepare_data(parse_settings(PrepareData, description=__doc__))
    except KeyboardInterrupt:
        print("\nprepare_data: interrupted; run the same command again to continue from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
