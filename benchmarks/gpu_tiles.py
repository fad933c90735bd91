"""Which tiles suit an attention kernel on a GPU that is not here.

    python -m benchmarks.gpu_tiles --target sm_90 --head-dim 128
    python -m benchmarks.gpu_tiles --target sm_120 --head-dim 64 --kernels dq

Every candidate is compiled ahead of time; one with a stack, or too large for shared memory, is left out. Where the
target's machine code can be executed (sm_80, sm_90), the rest run on a document, and are ranked by the cycles of the
unit that limits them (`benchmarks.gpu_bound`): a bound, not a time. Elsewhere they are ranked by tile area for each
register. The tables in `kernels/attention.py` come from here.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.ahead_of_time import SHARED_LIMIT, TARGETS, Launch, Resources, programs_at_once, recording, resources
from benchmarks.gpu_bound import DEVICES, bound, cycles
from lemur_fast.kernels import attention
from lemur_fast.kernels.attention import Tile, Tiles
from tests.ptxsim.from_triton import execute

Kernel = Literal["forward", "dkdv", "dq"]


@dataclass
class Arguments:
    """Compiles candidate tiles, executes them where that is possible, and ranks them."""

    target: str
    """An architecture, such as sm_90."""
    head_dim: int
    """Head dimension."""
    kernels: tuple[Kernel, ...] = ("forward", "dkdv", "dq")
    """The products to find tiles for."""
    dtype: str = "bfloat16"
    """Of the inputs."""
    tokens: int = 512
    """Length of the document that is executed."""
    own: tuple[int, ...] = (64, 128)
    """Candidates: tokens of a program's own block."""
    walked: tuple[int, ...] = (32, 64, 128)
    """Candidates: tokens of the blocks that it walks."""
    warps: tuple[int, ...] = (4, 8)
    """Candidates: warps."""
    stages: tuple[int, ...] = (1, 2, 3)
    """Candidates: stages of the pipeline."""
    all_options: bool = False
    """Leave out what spills without a causal mask, too; for heads up to 32 (float32: 64), and of 256, also with a
    window or a softcap (others then take the tiles of larger ones)."""
    best: int = 6
    """How many of each kernel are shown."""


@dataclass(frozen=True)
class Candidate:
    """A tile that fits: what it takes, and the cycles of each unit for the document, for one head."""

    kernel: str
    tile: Tile
    resources: Resources
    cycles: dict[str, float]


@contextlib.contextmanager
def using(target: str, head_dim: int, dtype: torch.dtype, tile: Tile) -> Iterator[None]:
    """Makes a tile that of all three products."""
    width = max(16, 1 << (head_dim - 1).bit_length())
    table = attention.IN_FLOAT32 if dtype == torch.float32 else attention.TILES.setdefault(target, {})
    before = table.get(width)
    table[width] = Tiles(tile, tile, tile)
    try:
        yield
    finally:
        if before is not None:
            table[width] = before
        else:
            del table[width]


OPTIONS = {
    "causal": attention.Options(True, 0, 0.0, 0.1),
    "all": attention.Options(False, 0, 0.0, 0.1),
    "window": attention.Options(True, 300, 0.0, 0.1),
    "softcap": attention.Options(True, 0, 30.0, 0.1),
}


def launch_of(kernel: str, target: str, head_dim: int, dtype: torch.dtype, tokens: int, run: bool, name: str) -> Launch:
    """The launch of one kernel for a document of so many tokens and one head; executed if `run`."""
    kept: list[Launch] = []

    def execute_this(launch: Launch) -> None:
        if launch.name == f"{kernel}_kernel":
            if run:
                launch.arguments["counts"] = execute(launch)
            kept.append(launch)

    q = torch.randn(tokens, 1, head_dim).to(dtype)
    cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32)
    lse = torch.zeros(1, tokens)
    with recording(target, execute_this, only=f"{kernel}_kernel"):
        if kernel == "forward":
            attention.forward(q, q, q, cu_seqlens, cu_seqlens, OPTIONS[name])
        else:
            attention.backward(q, None, q, q, q, q, lse, cu_seqlens, cu_seqlens, OPTIONS[name])
    return kept[0]


def _try(job: tuple[str, str, int, str, int, Tile, bool]) -> Candidate | None:
    kernel, target, head_dim, dtype_name, tokens, tile, all_options = job
    torch.set_num_threads(1)
    dtype = getattr(torch, dtype_name)
    with using(target, head_dim, dtype, tile):
        found = None
        for name in OPTIONS if all_options else ("causal",):
            if name in ("softcap", "window") and (64 if dtype == torch.float32 else 32) < head_dim <= 128:
                continue
            launch = launch_of(kernel, target, head_dim, dtype, tokens, False, name)
            r = resources(launch.compiled)
            if r.stack or r.spills or r.shared > SHARED_LIMIT[target] * 1024:
                return None
            found = found or r
        assert found is not None
        needs: dict[str, float] = {}
        if target in DEVICES:
            launch = launch_of(kernel, target, head_dim, dtype, tokens, True, "causal")
            needs = cycles(launch.arguments["counts"], DEVICES[target])
        return Candidate(kernel, tile, found, needs)


def rank(candidate: Candidate, target: str) -> float:
    """Smaller is better."""
    if candidate.cycles:
        return bound(candidate.cycles, DEVICES[target])[1]
    # A larger tile reads less; one that leaves room for others hides more.
    tile = candidate.tile
    reads = 1 / tile.own + 1 / tile.walked
    return reads / min(2, programs_at_once(target, candidate.resources))


def main(arguments: Arguments) -> None:
    """Prints the best tiles of every kernel."""
    if arguments.target not in TARGETS:
        raise SystemExit(f"--target: got {arguments.target!r}; takes {', '.join(TARGETS)}")
    console = Console(width=150, highlight=False)
    tiles = [Tile(*c) for c in itertools.product(arguments.own, arguments.walked, arguments.warps, arguments.stages)]
    jobs = [
        (k, arguments.target, arguments.head_dim, arguments.dtype, arguments.tokens, t, arguments.all_options)
        for k in arguments.kernels
        for t in tiles
    ]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        results = list(track(pool.imap(_try, jobs), "compiling", total=len(jobs), console=console, transient=True))
    for kernel in arguments.kernels:
        found = [c for c in results if c is not None and c.kernel == kernel]
        found.sort(key=lambda c: rank(c, arguments.target))
        table = Table(title=f"{arguments.target}, head dimension {arguments.head_dim}, {arguments.dtype}: {kernel}")
        for heading in (
            "own",
            "walked",
            "warps",
            "stages",
            "regs",
            "shared",
            "at once",
            "limit",
            "cycles of each unit",
        ):
            table.add_column(heading, justify="right")
        for c in found[: arguments.best]:
            r = c.resources
            limit = bound(c.cycles, DEVICES[arguments.target])[0] if c.cycles else "-"
            units = ", ".join(f"{unit} {n:.0f}" for unit, n in c.cycles.items())
            at_once = programs_at_once(arguments.target, r)
            table.add_row(*map(str, (*c.tile, r.registers, r.shared, at_once)), limit, units)
        console.print(table)
        console.print(f"{len(found)} of {len(tiles)} candidates fit")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
