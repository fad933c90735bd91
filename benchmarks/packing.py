"""Packing a million documents into rows of 4096 tokens: seconds, and how full the rows are.

    python -m benchmarks.packing                       # a million documents, about four minutes

Rivals, in turns, on the same lengths: lemur_fast's plan (best fit, and documents laid back to back); TRL's pack_dataset
(`bfd_split`, which splits over-long documents as ours does) over all documents at once, and as it comes, a thousand at
a time. TRL packs tokens, not lengths: it is given tokens of one byte, so that moving them is little of its time. Each
result is checked before it is printed: every token in one row, no row too long.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.compute
from datasets import Dataset, disable_progress_bars
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from trl.data_utils import pack_dataset

from benchmarks.harness import Row, command_line, machine, write_rows
from lemur_fast import packing


@dataclass
class Arguments:
    """Times packing."""

    documents: int = 1_000_000
    """Documents to pack; their lengths are log-normal (median 403 tokens, mean 830), as text has."""
    max_tokens: int = 4096
    """Tokens of a row."""
    rounds: int = 3
    """Timed runs of each rival."""
    json: Path | None = None
    """Also write a JSON line for each rival."""


def lengths_of_text(documents: int) -> np.ndarray:
    """[documents] int64, the same at every run."""
    drawn = np.random.default_rng(0).lognormal(6, 1.2, documents)
    return np.clip(drawn, 1, 200_000).astype(np.int64)


def as_dataset(lengths: np.ndarray) -> Dataset:
    """Documents of these lengths; the first byte of each, and no other, is 1."""
    ends = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.zeros(ends[-1], np.int8)
    tokens[ends[:-1]] = 1
    return Dataset(pyarrow.table({"input_ids": pyarrow.LargeListArray.from_arrays(ends, pyarrow.array(tokens))}))


def rows_of_plan(plan: packing.PackPlan, lengths: np.ndarray) -> np.ndarray:
    """[rows] tokens of each, once every token is found to be in one row."""
    order = np.lexsort((plan.starts, plan.documents))
    documents, starts, pieces = plan.documents[order], plan.starts[order], plan.lengths[order]
    ends = np.cumsum(lengths) - lengths
    places = ends[documents] + starts  # of the pieces, were the documents one text
    if not (np.array_equal(places, np.cumsum(pieces) - pieces) and pieces.sum() == lengths.sum()):
        raise SystemExit("lemur_fast: a token is in no row, or in two; nothing is printed")
    return np.add.reduceat(plan.lengths, plan.offsets[:-1])


def rows_of_dataset(packed: Dataset, lengths: np.ndarray) -> np.ndarray:
    """The same of TRL's result, as far as it tells: how many tokens there are, and how many documents begin."""
    tokens = packed.data.column("input_ids").combine_chunks()
    whole = tokens.flatten().to_numpy()
    if not (len(whole) == lengths.sum() and whole.sum(dtype=np.int64) == len(lengths)):
        raise SystemExit("TRL: tokens are lost or doubled; nothing is printed")
    return pyarrow.compute.list_value_length(tokens).to_numpy()


def main(arguments: Arguments) -> None:
    """Measures and prints."""
    console = Console(width=110, highlight=False)
    console.print(machine())
    disable_progress_bars()
    lengths, size = lengths_of_text(arguments.documents), arguments.max_tokens
    dataset = as_dataset(lengths)

    def ours(strategy: packing.Strategy) -> Callable[[], packing.PackPlan]:
        return lambda: packing.plan(lengths, size, strategy=strategy)

    def trl(batch_size: int) -> Callable[[], Dataset]:
        options = {"batch_size": batch_size, "load_from_cache_file": False, "keep_in_memory": True}
        return lambda: pack_dataset(dataset, size, "bfd_split", options)

    rivals: dict[str, tuple[Callable, Callable]] = {
        "lemur_fast, best fit": (ours("best_fit"), rows_of_plan),
        "lemur_fast, back to back": (ours("concatenate"), rows_of_plan),
        "TRL, all at once": (trl(arguments.documents), rows_of_dataset),
        "TRL, a thousand at a time": (trl(1000), rows_of_dataset),
    }
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    rows: dict[str, np.ndarray] = {}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("packing", total=arguments.rounds * len(rivals))
        for _ in range(arguments.rounds):
            for name, (pack, check) in rivals.items():
                progress.update(task, description=name)
                start = time.perf_counter()
                result = pack()
                seconds[name].append(time.perf_counter() - start)
                rows[name] = check(result, lengths)
                if rows[name].max() > size:
                    raise SystemExit(f"{name}: a row has {rows[name].max()} tokens; nothing is printed")
                progress.advance(task)
    table = Table(title=f"{len(lengths):,} documents, {lengths.sum():,} tokens, rows of {size:,}")
    for heading in ("", "seconds", "± %", "x TRL, all at once", "rows", "full"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    peer = statistics.median(seconds["TRL, all at once"])
    for name, times in seconds.items():
        median = statistics.median(times)
        spread = 50 * (max(times) - min(times)) / median
        full = lengths.sum() / (len(rows[name]) * size)
        cells = (f"{median:.3f}", f"{spread:.0f}", f"{peer / median:.0f}", f"{len(rows[name]):,}", f"{full:.2%}")
        table.add_row(name, *cells)
    console.print(table)
    if arguments.json:
        shape = f"{len(lengths):,} documents into rows of {size:,}"
        write_rows(
            arguments.json,
            [
                Row("packing", "plan", name, shape, seconds=times, facts={"rows": len(rows[name])})
                for name, times in seconds.items()
            ],
        )


if __name__ == "__main__":
    main(command_line(Arguments, __doc__))
