"""Whether a planner that orders the tiles of a pack, longest first, would shorten attention on a GPU: modelled.

    python -m benchmarks.gpu_schedule                                    # A100 and H100, heads of 128 and 64: minutes
    python -m benchmarks.gpu_schedule --targets sm_90 --head-dims 128    # one of them

Programs start in the order of the grid (x fastest), each where a slot is first free; a processor has as many slots as
`programs_at_once` finds in the machine code, and the programs that it holds share it. A program costs so much for being
launched, for having a tile at all, and for each block that it walks with and without a mask: these prices are solved
from counts of the machine code, executed on four short documents (`tests.ptxsim`), unit by unit, and a program needs
what its busiest unit needs (`benchmarks.gpu_bound`). Instructions do not show what a program waits for before it has
work: a guess of that is added (`Model`), and one table varies what is assumed. Times know nothing of caches; what an
order asks of DRAM stands in a table of its own.
"""

from __future__ import annotations

import functools
import heapq
import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.ahead_of_time import programs_at_once, resources
from benchmarks.gpu_bound import DEVICES, UNITS, cycles
from benchmarks.gpu_tiles import Kernel, launch_of
from benchmarks.packing import lengths_of_text
from lemur_fast import packing
from lemur_fast.kernels import attention
from lemur_fast.kernels.attention import Tile

KERNELS: tuple[Kernel, ...] = ("forward", "dq", "dkdv")

HEADS = ((32, 32), (32, 8))
"""Query and key heads: LLaMA-2-7B's, and as many query heads in groups of four."""


@dataclass
class Arguments:
    """Models how long attention takes in several orders of its programs."""

    targets: tuple[str, ...] = ("sm_80", "sm_90")
    """Architectures."""
    head_dims: tuple[int, ...] = (128, 64)
    """Head dimensions."""
    tokens: tuple[int, ...] = (4096, 16384, 32768)
    """Tokens of a pack."""
    rows: int = 4
    """Packs of text of each kind; their times are added up."""


@dataclass(frozen=True)
class Model:
    """What is assumed.

    Attributes:
        launch: cycles until a program runs.
        search: for each step of the search for its document: a load from the L1 cache, as neighbours had it, and what
            is done with it.
        fetch: for its own block and its first walked one, from DRAM.
        overlap: whether the units of a processor work at once, or else take turns.
        slots: programs that a processor holds; 0: as many as the machine code leaves room for.
        shared: whether these share the processor, or else keep an equal part of it, alone or not.
        section: heads of a section, in the orders that have such.
    """

    launch: float = 500
    search: float = 100
    fetch: float = 1500
    overlap: bool = True
    slots: int = 0
    shared: bool = True
    section: int = 8


VARIANTS = {
    "as above": Model(),
    "no waits at all": Model(0, 0, 0),
    "searches go to the L2 cache": Model(search=300),
    "all waits x 3": Model(1500, 300, 4500),
    "units take turns": Model(overlap=False),
    "two programs a processor, sharing it": Model(slots=2),
    "two programs a processor, half of it each": Model(slots=2, shared=False),
    "sections of 16 heads": Model(section=16),
}

ORDERS = {
    "present": "tiles from the last (dk, dv: the first) on, head by head",
    "sections": "the same tile for 8 heads, then the next tile; then the next 8 heads",
    "heads": "the same tile for all heads, then the next tile",
    "quick": "as sections, and all boundaries are loaded at once and counted, in place of the search",
    "by head": "planner: tiles longest first, head by head",
    "planner": "planner: longest first over tiles and heads",
}
"""The planner's grids have no empty programs, and their programs look their tile up instead of searching for it."""


def places(lengths: Iterable[int], own: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As kernels find them, of each tile of the grid: its document, its first token in there, the document's length."""
    all_lengths = np.array([*lengths, 0])  # and the document past the last one
    bounds = np.concatenate([[0], np.cumsum(all_lengths[:-1])])
    begins = bounds // own + np.arange(bounds.size)
    index = np.arange(bounds[-1] // own + bounds.size)
    document = np.searchsorted(begins, index, side="right") - 1
    return document, (index - begins[document]) * own, all_lengths[document]


def walks(kernel: Kernel, lengths: Iterable[int], tile: Tile) -> np.ndarray:
    """[grid, 4] what each program of a head does, in the order of the grid: 1, has a tile, whole and masked blocks.

    With a causal mask, and as many keys as queries.
    """
    _, first, length = places(lengths, tile.own)
    end = np.minimum(first + tile.own, length)
    if kernel == "dkdv":
        split = np.maximum(first, -(-(end - 1) // tile.walked) * tile.walked)  # from here, queries see all of the keys
        whole, masked = length - split, split - first
    else:
        whole = np.minimum(length, first + 1) // tile.walked * tile.walked
        masked = end - whole
    busy = first < length
    blocks = [np.where(busy, np.maximum(0, -(-x // tile.walked)), 0) for x in (whole, masked)]
    table = np.stack([np.ones_like(first), busy, *blocks], 1)
    return table if kernel == "dkdv" else table[::-1]


@functools.cache
def tile_of(kernel: Kernel, target: str, head_dim: int) -> Tile:
    """The tile that the kernel is launched with, in bfloat16."""
    return getattr(attention.TILES[target][head_dim], kernel)


@functools.cache
def prices(kernel: Kernel, target: str, head_dim: int) -> tuple[np.ndarray, int]:
    """[units, 4] cycles of a processor for each column of `walks`; and the programs that it holds at once."""
    tile = tile_of(kernel, target, head_dim)
    lengths = (1, tile.own, 2 * tile.own, 3 * tile.own + 1)
    done = [launch_of(kernel, target, head_dim, torch.bfloat16, n, True, "causal") for n in lengths]
    counted = [cycles(launch.arguments["counts"], DEVICES[target]) for launch in done]
    units = [[c[unit] * DEVICES[target].processors for unit in UNITS if unit != "dram"] for c in counted]
    did = np.array([walks(kernel, [n], tile).sum(0) for n in lengths])
    return np.linalg.lstsq(did, np.array(units), rcond=None)[0].T, programs_at_once(target, resources(done[0].compiled))


def makespan(costs: Iterable[float], processors: int, slots: int, shared: bool) -> float:
    """When the last of the programs ends, if each starts, in this order, where a slot is free first.

    Programs of a processor share it evenly if `shared`; else each runs at 1 / slots of its speed, alone or not.
    """
    if not shared:
        free = [0.0] * (processors * slots)
        for cost in costs:
            heapq.heapreplace(free, free[0] + cost * slots)
        return max(free)
    # Of each processor: the work that every program it holds has got since its start, and the marks at which they end.
    # A freed slot is taken at once, so that a processor changes only when one of its own programs ends.
    got = [0.0] * processors
    marks: list[list[float]] = [[] for _ in range(processors)]
    coming = iter(costs)
    for _ in range(slots):
        for held, cost in zip(marks, itertools.islice(coming, processors), strict=False):
            heapq.heappush(held, cost)
    ends = [(held[0] * len(held), i) for i, held in enumerate(marks) if held]
    heapq.heapify(ends)
    now = 0.0
    while ends:
        now, i = heapq.heappop(ends)
        got[i] = heapq.heappop(marks[i])
        cost = next(coming, None)
        if cost is not None:
            heapq.heappush(marks[i], got[i] + cost)
        if marks[i]:
            heapq.heappush(ends, (now + (marks[i][0] - got[i]) * len(marks[i]), i))
    return now


@dataclass(frozen=True)
class Times:
    """Modelled cycles, in every order and at least; programs, empty ones, cycles of these: of one launch or more."""

    cycles: np.ndarray
    least: float
    programs: int
    empty: int
    wasted: float

    def __add__(self, other: Times) -> Times:
        return Times(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


def times_of(
    kernel: Kernel, lengths: list[int], target: str, head_dim: int, heads: int, kv_heads: int, model: Model
) -> Times:
    """One launch."""
    price, slots = prices(kernel, target, head_dim)
    did = walks(kernel, lengths, tile_of(kernel, target, head_dim))
    busy = did[:, 1] > 0
    if kernel == "dkdv":  # walks the blocks of every query head of the group
        did = did * [1, 1, heads // kv_heads, heads // kv_heads]
        heads = kv_heads
    work = did @ price.T
    work = (work.max(1) if model.overlap else work.sum(1)) + model.launch + model.fetch * busy
    loads = np.ceil(np.log2(len(lengths) + 1)) + 1
    cost = work + model.search * loads
    planned = np.sort(work[busy] + model.search)[::-1]
    section = min(model.section, heads)
    orders = {
        "present": np.tile(cost, heads),
        "sections": np.tile(np.repeat(cost, section), heads // section),
        "heads": np.repeat(cost, heads),
        "quick": np.tile(np.repeat(work + model.search * np.minimum(loads, 3), section), heads // section),
        "by head": np.tile(planned, heads),
        "planner": np.repeat(planned, heads),
    }
    processors = DEVICES[target].processors
    spans = [makespan(orders[o].tolist(), processors, model.slots or slots, model.shared) for o in ORDERS]
    least = max(float(planned.sum()) * heads / processors, float(planned[0]))
    return Times(
        np.array(spans),
        least,
        heads * busy.size,
        heads * int((~busy).sum()),
        heads * float(cost[~busy].sum()) / processors,
    )


def dram_bytes(
    kernel: Kernel, lengths: list[int], target: str, head_dim: int, heads: int, kv_heads: int, section: int
) -> int:
    """Bytes of walked blocks that DRAM sends, in bfloat16, if each `section` heads go tile by tile together.

    Of the programs that run at once, the first to need a block fetches it for all; nothing stays for those after them.
    """
    _, at_once = prices(kernel, target, head_dim)
    tile = tile_of(kernel, target, head_dim)
    document, _, _ = places(lengths, tile.own)
    did = walks(kernel, lengths, tile)
    if kernel != "dkdv":
        document = document[::-1]
    group = heads // kv_heads
    own_heads = kv_heads if kernel == "dkdv" else heads
    order = [
        (tile_index, head)
        for first in range(0, own_heads, section)
        for tile_index in np.flatnonzero(did[:, 1]).tolist()
        for head in range(first, min(first + section, own_heads))
    ]
    blocks = did[:, 2:].sum(1).tolist()
    total = 0
    wave = DEVICES[target].processors * at_once
    for start in range(0, len(order), wave):
        most: dict[tuple[int, int], int] = {}
        for i, head in order[start : start + wave]:
            key = (int(document[i]), head if kernel == "dkdv" else head // group)
            most[key] = max(most.get(key, 0), blocks[i])
        total += sum(most.values())
    return total * tile.walked * head_dim * 2 * 2 * (group if kernel == "dkdv" else 1)


TEXTS = 2
"""So many of the packs below are text."""


def packs_of(tokens: int, rows: int) -> dict[str, list[list[int]]]:
    """Lengths of documents, by what the packs hold. Those of text come first."""
    drawn = lengths_of_text(rows * tokens // 200)  # four times as many as fill the rows
    small, long = [128] * (tokens // 256), [tokens // 2]
    packs = {}
    for name, strategy in (("text, best fit", "best_fit"), ("text, back to back", "concatenate")):
        plan = packing.plan(drawn, tokens, strategy=strategy)
        packs[name] = [[segment.length for segment in plan[i]] for i in range(rows)]
    return packs | {
        "equal, 512": [[512] * (tokens // 512)],
        "one document": [[tokens]],
        "small, then long": [small + long],
        "long, then small": [long + small],
    }


def attention_of(
    packs: list[list[int]], target: str, head_dim: int, heads: tuple[int, int], model: Model
) -> dict[Kernel, Times]:
    """The three launches, each over all of these packs, one after another."""
    return {
        k: functools.reduce(Times.__add__, (times_of(k, p, target, head_dim, *heads, model) for p in packs))
        for k in KERNELS
    }


def dram_table(arguments: Arguments) -> Table:
    """How busy DRAM would be with walked blocks, where no group of heads shares them."""
    head_dim, heads = arguments.head_dims[0], HEADS[0]
    table = Table(
        title=f"DRAM's time for walked blocks / time modelled for the present order, {heads[0]} heads of {head_dim}"
    )
    sections = {"present": 1, "sections": Model().section, "heads": heads[0]}
    for heading in ("device", "tokens", "documents", *sections):
        table.add_column(heading, justify="right")
    for target, tokens in itertools.product(arguments.targets, arguments.tokens):
        device = DEVICES[target]
        for name, packs in packs_of(tokens, arguments.rows).items():
            times = attention_of(packs, target, head_dim, heads, Model())
            modelled = sum(t.cycles[0] for t in times.values()) / device.gigahertz
            jobs = list(itertools.product(KERNELS, packs))
            needed = [
                sum(dram_bytes(k, p, target, head_dim, *heads, section) for k, p in jobs) / device.dram
                for section in sections.values()
            ]
            table.add_row(device.name, f"{tokens:,}", name, *(f"{n / modelled:.0%}" for n in needed))
        table.add_section()
    return table


def main(arguments: Arguments) -> None:
    """Prints the tables."""
    console = Console(width=165, highlight=False)
    console.print("Modelled, not measured. " + "; ".join(f"[bold]{k}[/]: {v}" for k, v in ORDERS.items()) + ".")
    shapes = list(itertools.product(arguments.targets, arguments.head_dims))
    for target, head_dim in shapes:
        device = DEVICES[target]
        table = Table(
            title=f"{device.name}, heads of {head_dim}: empty programs, their time; present / planner, by launch "
            "and of all; then each order of all three / the least"
        )
        for heading in ("heads", "tokens", "documents", "empty", "time", "us", *KERNELS, "all", *ORDERS):
            table.add_column(heading, justify="left" if heading == "documents" else "right", no_wrap=True)
        for heads, tokens in itertools.product(HEADS, arguments.tokens):
            for name, packs in packs_of(tokens, arguments.rows).items():
                times = attention_of(packs, target, head_dim, heads, Model())
                whole = functools.reduce(Times.__add__, times.values())
                table.add_row(
                    "/".join(map(str, heads)), f"{tokens:,}", name, f"{whole.empty / whole.programs:.0%}",
                    f"{whole.wasted / whole.cycles[0]:.1%}",
                    f"{whole.cycles[0] / device.gigahertz / 1e3 / len(packs):,.0f}",
                    *(f"{t.cycles[0] / t.cycles[-1]:.3f}" for t in times.values()),
                    f"[bold]{whole.cycles[0] / whole.cycles[-1]:.3f}[/]",
                    *(f"{c / whole.least:.3f}" for c in whole.cycles),
                )  # fmt: skip
            table.add_section()
        console.print(table)
    console.print(dram_table(arguments))
    table = Table(title="Packs of text, all launches, devices and heads above: order / planner, mean (largest)")
    for heading in ("assumed", "tokens", *list(ORDERS)[:-1]):
        table.add_column(heading, justify="left" if heading == "assumed" else "right")
    for name, model in VARIANTS.items():
        for tokens in arguments.tokens:
            ratios = []
            for (target, head_dim), heads in itertools.product(shapes, HEADS):
                for packs in list(packs_of(tokens, arguments.rows).values())[:TEXTS]:
                    times = attention_of(packs, target, head_dim, heads, model)
                    whole = functools.reduce(Times.__add__, times.values())
                    ratios.append(whole.cycles[:-1] / whole.cycles[-1])
            cells = zip(np.mean(ratios, 0), np.max(ratios, 0), strict=True)
            table.add_row(name, f"{tokens:,}", *(f"{mean:.3f} ({largest:.3f})" for mean, largest in cells))
        table.add_section()
    console.print(table)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
