"""The data pipeline: how fast it tokenizes, what it holds in memory, and whether training waits for it.

    python -m benchmarks.data                  # the installed transformers package, then ten copies of it

1. Tokens a second of the stage that tokenizes, on all cores, writing included; and for each second of a core's time,
   which others at work on the machine disturb less.
2. Peak memory of preparing a corpus and another of ten times its size, each in a process of its own. The copies are
   made different (every long name gets a suffix), so that none is dropped as a duplicate.
3. Milliseconds that a packed row takes the loader, and the share of a training step that waits for data while a thread
   reads ahead; the step is a sleep, as long as a row takes a GPU.
"""

import json
import multiprocessing
import re
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import transformers
from rich.console import Console
from rich.table import Table

from benchmarks.harness import Row, command_line, machine, peak_memory, reset_peak_memory, write_rows
from lemur_fast.data.executors import run_local
from lemur_fast.data.filters import Quality
from lemur_fast.data.loader import Loader
from lemur_fast.data.mixture import Mixture
from lemur_fast.data.pipeline import STAGES, Settings, plan
from lemur_fast.data.sources import Files
from lemur_fast.data.store import TokenStore
from lemur_fast.data.tokenizer import load_tokenizer


@dataclass
class Arguments:
    """Measures the data pipeline."""

    megabytes: int = 10
    """Size of the smaller corpus; the other has ten times as much."""
    times: int = 10
    """How much larger that is."""
    row_tokens: int = 4096
    """Tokens of a packed row."""
    step_ms: tuple[float, ...] = (10.0, 100.0, 1000.0)
    """Lengths of a step of one row."""
    json: Path | None = None
    """Also write a JSON line for each size of corpus and length of a step."""


def write_corpus(folder: Path, megabytes: int, copies: int) -> None:
    """Files of the transformers package, `megabytes` of them, in so many different copies."""
    files, size = [], 0
    for path in sorted(Path(transformers.__file__).parent.rglob("*.py")):
        files.append(path.read_text())
        size += len(files[-1])
        if size > megabytes * 1e6:
            break
    for copy in range(copies):
        (folder / str(copy)).mkdir(parents=True)
        for number, text in enumerate(files):
            changed = re.sub(r"(\w{6,})", rf"\1_{copy}", text) if copy else text
            (folder / str(copy) / f"{number}.py").write_text(changed)


def prepare(folder: str, out: str, connection: multiprocessing.connection.Connection) -> None:
    """Prepare a corpus in this process alone.

    Sends seconds of each stage by the clock, and of cores; memory before and at its peak, in MB.
    """
    source = Files("files", "code", "files", "Apache-2.0", (folder,), part_bytes=2**24)
    settings = Settings(quality=Quality.off())
    load_tokenizer(plan(out, [source], load_tokenizer(), settings).folder / "tokenizer")
    corpus = plan(out, [source], load_tokenizer(), settings)
    reset_peak_memory()
    before, seconds, cpu = peak_memory(), {}, {}
    for stage in STAGES:
        started, busy = time.perf_counter(), time.process_time()
        run_local(corpus, workers=1, progress=False, stages=[stage])
        seconds[stage.name] = time.perf_counter() - started
        cpu[stage.name] = time.process_time() - busy
    connection.send((seconds, cpu, before / 1e6, peak_memory() / 1e6))


def main(arguments: Arguments) -> None:
    """Measures and prints."""
    console = Console(width=110, highlight=False)
    console.print(machine())
    context = multiprocessing.get_context("spawn")
    rows = []
    table = Table(title="Preparing a corpus, one process (threads tokenize)")
    for heading in (
        "documents",
        "MB of text",
        "M tokens",
        "read, s",
        "tokenize, s",
        "M tokens/s",
        "a core",
        "MB before",
        "MB peak",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    with tempfile.TemporaryDirectory() as scratch:
        for copies in (1, arguments.times):
            folder, out = Path(scratch) / f"files-{copies}", Path(scratch) / f"corpus-{copies}"
            write_corpus(folder, arguments.megabytes, copies)
            receiver, sender = context.Pipe(False)
            process = context.Process(target=prepare, args=(str(folder), str(out), sender))
            process.start()
            seconds, cpu, before, peak = receiver.recv()
            process.join()
            entry = json.loads((out / "manifest.json").read_text())["sources"]["files"]
            rates = [entry["tokens"] / spent["tokenize"] / 1e6 for spent in (seconds, cpu)]
            cells = (f"{entry['documents']:,}", f"{entry['bytes'] / 1e6:.0f}", f"{entry['tokens'] / 1e6:.1f}")
            cells += (f"{seconds['read']:.1f}", f"{seconds['tokenize']:.1f}")
            cells += tuple(f"{rate:.2f}" for rate in rates)
            table.add_row(*cells, f"{before:.0f}", f"{peak:.0f}")
            facts = {"M tokens": round(entry["tokens"] / 1e6, 1)}
            facts |= {f"{name}, s": round(seconds[name], 2) for name in ("read", "tokenize")}
            facts |= {"M tokens/s": round(rates[0], 2), "a core": round(rates[1], 2), "GB before": before / 1e3}
            shape = f"{entry['documents']:,} documents, {entry['bytes'] / 1e6:.0f} MB"
            took = [sum(seconds.values())]
            row = Row("data", "prepare a corpus", "lemur_fast", shape, seconds=took, peak_bytes=int(peak * 1e6))
            row.facts = facts
            rows.append(row)
        console.print(table)
        store = TokenStore(out)
        table = Table(title=f"The loader, rows of {arguments.row_tokens:,} tokens")
        for heading in ("step, ms", "wait, median ms", "wait, all steps", "share of the time"):
            table.add_column(heading, justify="right")
        for step in (0.0, *arguments.step_ms):
            loader = Loader(store.train, Mixture(store.train, {"code": 1}, arguments.row_tokens, seed=0), 1)
            waits: list[float] = []
            steps = 512 if step < 50 else max(20, int(20_000 / step))
            began = time.perf_counter()
            for _ in range(steps):
                asked = time.perf_counter()
                next(loader)
                waits.append(time.perf_counter() - asked)
                time.sleep(step / 1e3)
            total = time.perf_counter() - began
            cells = (
                f"{step:g}",
                f"{statistics.median(waits) * 1e3:.3f}",
                f"{sum(waits) * 1e3:.0f} ms of {steps} steps",
            )
            share = sum(waits) / total if step else 1.0
            table.add_row(*cells, "100%" if not step else f"{share:.2%}")
            shape = f"rows of {arguments.row_tokens:,} tokens, steps of {step:g} ms"
            facts = {"steps": steps, "longest, ms": round(max(waits) * 1e3, 2), "% of the time waited": 100 * share}
            seconds = [statistics.median(waits)]
            rows.append(Row("loader", "wait for a row, median", "lemur_fast", shape, seconds=seconds, facts=facts))
        console.print(table)
    if arguments.json:
        write_rows(arguments.json, rows)


if __name__ == "__main__":
    main(command_line(Arguments, __doc__))
