"""What robustness costs the step loop: checkpoints, and two processes in the place of one.

    python -m benchmarks.pretrain                          # both, some minutes on two idle cores
    python -m benchmarks.pretrain --only checkpoints --every 50

Checkpoints: blocks of steps in turns, one that begins with a checkpoint and waits for it at its end, and one without.
Processes: two gloo processes of one thread each and one process of two threads, in turns, on the same global batches,
sharded in full. The model is that of the recipe's preset tiny, in the dtype that the recipe would choose. CPU seconds
are those of the process and its threads: on a machine that others use, too, they say more than the clock.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig
from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup_lr_rate

from benchmarks.harness import Row, command_line, machine, write_rows
from lemur_fast.packing import PackedBatch
from lemur_fast.training.checkpoint import Checkpoints, TrainingState
from lemur_fast.training.distributed import World, compute_dtype, process_group
from lemur_fast.training.guard import Guard
from lemur_fast.training.loop import train_step
from lemur_fast.training.optimizer import adamw
from lemur_fast.training.weights import make_model

TINY = LlamaConfig(
    vocab_size=32000,
    hidden_size=256,
    intermediate_size=688,
    num_hidden_layers=6,
    num_attention_heads=4,
    max_position_embeddings=4096,
)


@dataclass
class Arguments:
    """Times checkpoints and processes."""

    only: Literal["all", "checkpoints", "processes", "worker"] = "all"
    """Which of the two to measure; a worker is one of the processes that are timed."""
    every: int = 10
    """Steps between checkpoints: the length of a block. The recipe's default is 50."""
    steps: int = 4
    """Timed steps of each turn of the processes."""
    rows: int = 2
    """Packed rows of a step; the processes share them."""
    seq_len: int = 2048
    """Tokens of a row."""
    rounds: int = 3
    """Turns."""
    json: Path | None = None
    """Also write a JSON line for each way of running."""


class Rows:
    """Rows of random documents, always the same."""

    def __init__(self, args: Arguments) -> None:
        self.args, self.position = args, 0

    def state(self) -> int:
        """Rows read."""
        return self.position

    def load_state(self, state: int) -> None:
        """Go on from there."""
        self.position = state

    def step(self, world: World) -> list[PackedBatch]:
        """This process's rows of the next step."""
        batches = []
        for _ in range(self.args.rows):
            self.position += 1
            rng, room, documents = np.random.default_rng(self.position), self.args.seq_len, []
            while room:
                length = min(room, int(rng.lognormal(5.3, 0.8)) + 2)
                documents.append(rng.integers(0, TINY.vocab_size, length))
                room -= length
            batches.append(PackedBatch.from_documents(documents))
        return batches[world.rank :: world.size]


class Run:
    """The recipe's loop without its reports."""

    def __init__(self, args: Arguments, world: World) -> None:
        self.world = world
        model = make_model(TINY, None, world, compute_dtype(world.device), seed=0)
        optimizer = adamw(model, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
        schedule = get_cosine_with_min_lr_schedule_with_warmup_lr_rate(
            optimizer, num_warmup_steps=10, num_training_steps=1000, min_lr_rate=0.1
        )
        self.rows = Rows(args)
        self.state = TrainingState(model, optimizer, schedule, Guard.new(optimizer, 10.0, world.device), self.rows)
        self.done = 0

    def step(self) -> float:
        """One step; returns its loss."""
        batches = self.rows.step(self.world)
        tags = [torch.zeros_like(batch.input_ids) for batch in batches]
        (items,) = self.world.sum(sum(int(batch.num_items) for batch in batches))
        state: Any = self.state
        figures = train_step(
            state.model, state.guard, batches, tags, self.world, num_items=items, num_sources=1, clip=1.0
        )
        state.schedule.step()
        self.done += 1
        return figures.read()[0]


def timed(function: Callable[[], None]) -> tuple[float, float]:
    """Seconds by the clock, and of the CPU in all threads."""
    clock, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - clock, time.process_time() - cpu


def measure_checkpoints(args: Arguments, console: Console) -> list[Row]:
    """Blocks with and without a checkpoint, in turns."""
    with process_group("cpu") as world, tempfile.TemporaryDirectory() as folder:
        run = Run(args, world)
        checkpoints = Checkpoints(Path(folder), world, keep=1)

        def block(with_checkpoint: bool) -> None:
            if with_checkpoint:
                checkpoints.save(run.done, run.state, {})
            for _ in range(args.every):
                run.step()
            checkpoints.wait()

        run.step()
        checkpoints.save(run.done, run.state, {})  # the first one gets its memory from the system
        checkpoints.wait()
        run.step()
        checkpoints.seconds = 0.0
        turns = []
        for number in range(args.rounds):
            order = (True, False) if number % 2 else (False, True)
            turns.append({kind: timed(lambda kind=kind: block(kind)) for kind in order})  # type: ignore[misc]
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        table = Table(title=f"a checkpoint of {size / 1e6:,.0f} MB every {args.every} steps, {args.rounds} rounds")
        for column in ("", "without, s", "with, s", "cost, median of the rounds", "each round"):
            table.add_column(column, justify="left" if not column else "right")
        facts = {}
        for index, name in enumerate(("clock", "CPU")):
            costs = [turn[True][index] / turn[False][index] - 1 for turn in turns]
            without, having = (statistics.median(turn[kind][index] for turn in turns) for kind in (False, True))
            each = ", ".join(f"{cost:+.1%}" for cost in costs)
            facts[f"cost, % of {name}"] = round(100 * statistics.median(costs), 2)
            table.add_row(name, f"{without:.2f}", f"{having:.2f}", f"{statistics.median(costs):+.1%}", each)
        console.print(table)
        steps = statistics.median(turn[False][0] for turn in turns)
        blocked = checkpoints.seconds / args.rounds
        console.print(f"the loop stood still for {blocked:.3f} s a checkpoint: {blocked / steps:.1%} of a block")
        label = ("pretrain", f"{args.every} steps and a checkpoint of {size / 1e6:,.0f} MB")
        return [
            Row(*label, "lemur_fast", seconds=[turn[True][0] for turn in turns], facts=facts),
            Row(*label, "no checkpoint", seconds=[turn[False][0] for turn in turns]),
        ]


def work(args: Arguments) -> None:
    """One of the timed processes: the main one prints its steps."""
    with process_group("cpu") as world:
        run = Run(args, world)
        run.step()
        seconds: list[tuple[float, float]] = []
        losses: list[float] = []
        for _ in range(args.steps):
            seconds.append(timed(lambda: losses.append(run.step())))
        world.print(json.dumps({"clock": [clock for clock, _ in seconds], "losses": losses}))


def measure_processes(args: Arguments, console: Console) -> list[Row]:
    """One process of two threads, and two of one, in turns."""
    options = ["--only", "worker", "--steps", str(args.steps), "--rows", str(args.rows), "--seq-len", str(args.seq_len)]
    alone = [sys.executable, "-m", "benchmarks.pretrain", *options]
    launcher = ["torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    pair = [sys.executable, "-m", *launcher, "--rdzv-endpoint", "localhost:0", "-m", "benchmarks.pretrain", *options]
    results: dict[int, list[dict[str, list[float]]]] = {1: [], 2: []}
    for number in range(args.rounds):
        for processes in (1, 2) if number % 2 else (2, 1):
            environment = {**os.environ, "OMP_NUM_THREADS": str(3 - processes)}
            done = subprocess.run(
                alone if processes == 1 else pair, env=environment, check=True, stdout=subprocess.PIPE, text=True
            )
            results[processes].append(json.loads(done.stdout.splitlines()[-1]))
    off = max(
        abs(a - b) / a
        for x, y in zip(*results.values(), strict=True)
        for a, b in zip(x["losses"], y["losses"], strict=True)
    )
    if off > 1e-3:
        raise SystemExit(f"the losses of one and two processes differ by {off:.1e} of themselves: nothing to compare")
    tokens = args.rows * args.seq_len
    speeds = {n: [tokens / statistics.median(result["clock"]) for result in found] for n, found in results.items()}
    ratios = [two / one for one, two in zip(speeds[1], speeds[2], strict=True)]
    table = Table(title=f"{tokens:,} tokens a step, {args.rounds} rounds; losses agree to {off:.0e}")
    for column in ("processes x threads", "tokens/s", "of one process", "each round"):
        table.add_column(column, justify="right")
    table.add_row("1 x 2", f"{statistics.median(speeds[1]):,.0f}", "1", "")
    each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    table.add_row("2 x 1", f"{statistics.median(speeds[2]):,.0f}", f"{statistics.median(ratios):.2f}", each)
    console.print(table)
    label = ("pretrain", f"a step of {tokens:,} tokens")
    return [
        Row(*label, f"lemur_fast, {name}", seconds=[tokens / s for s in speeds[n]], facts={"of one process": ratio})
        for n, name, ratio in (
            (1, "one process of two threads", 1.0),
            (2, "two processes of one thread", statistics.median(ratios)),
        )
    ]


def main() -> None:
    """Run from the command line."""
    args = command_line(Arguments, __doc__)
    if args.only == "worker":
        work(args)
        return
    console = Console(width=120)
    console.print(machine())
    rows: list[Row] = []
    for name, measure in (("checkpoints", measure_checkpoints), ("processes", measure_processes)):
        if args.only in ("all", name):
            rows += measure(args, console)
            if args.json:
                write_rows(args.json, rows)


if __name__ == "__main__":
    main()
