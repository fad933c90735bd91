"""A linear layer of bfloat16 on the CPU, forward and backward: torch's products, and those of lemur_fast.

    python -m benchmarks.products                              # half a minute
    ONEDNN_MAX_CPU_ISA=AVX2 python -m benchmarks.products --shapes "small, attention"    # torch's bfloat16 on AVX2

lemur_fast takes products of bfloat16 in float32 where a table of CPU features says that this is faster, and leaves them
to torch elsewhere. Which it is here, and what the other way would cost, this shows; "float32" has its operands in
float32 to begin with, so it is what lemur_fast's can reach at most. Each result is checked against float64 before it
is timed: a wrong one prints no time.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from benchmarks.harness import CPU, Row, command_line, machine, phases_in_turns, write_rows
from lemur_fast.ops import _products

SHAPES = {
    "small, attention": (4096, 512, 512),
    "small, MLP": (4096, 512, 1408),
    "LLaMA-2-7B, attention": (1024, 4096, 4096),
}
TOLERANCE = 0.01
"""Relative error of a whole tensor; a rounding to bfloat16 is 0.002."""
PHASES = ("forward", "backward")


@dataclass
class Arguments:
    """Times a linear layer."""

    shapes: tuple[str, ...] = tuple(SHAPES)
    """Names of shapes: "small, attention", "small, MLP", "LLaMA-2-7B, attention"."""
    rounds: int = 7
    """Timed rounds of each rival."""
    seconds: float = 10.0
    """Budget for one shape: where all rivals take longer there are fewer rounds, but at least three."""
    json: Path | None = None
    """Also write a JSON line for each rival, shape and direction."""


def rivals() -> dict[str, tuple[Callable[[Tensor, Tensor], Tensor], torch.dtype]]:
    """Name -> (the layer, the dtype of its tensors)."""
    return {
        "lemur_fast": (_products.linear, torch.bfloat16),
        "torch": (functional.linear, torch.bfloat16),
        "torch, float32": (functional.linear, torch.float32),
    }


def error_of(layer: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, dy: Tensor) -> str:
    """What is wrong with a layer; nothing when it is right."""
    y = layer(x, weight)
    found = [y, *torch.autograd.grad(y, (x, weight), dy)]
    wide = [tensor.detach().double() for tensor in (x, weight, dy)]
    right = [wide[0] @ wide[1].T, wide[2] @ wide[1], wide[2].T @ wide[0]]
    for name, got, exact in zip(("y", "dx", "dweight"), found, right, strict=True):
        error = float((got.detach().double() - exact).norm() / exact.norm())
        if not error < TOLERANCE:
            return f"wrong: relative error of {name} is {error:.1e}"
    return ""


def measure(case: str, shape: tuple[int, int, int], arguments: Arguments) -> list[Row]:
    """The rows of one shape."""
    tokens, inputs, outputs = shape
    generator = torch.Generator().manual_seed(0)
    drawn = [
        torch.randn(size, generator=generator) for size in ((tokens, inputs), (outputs, inputs), (tokens, outputs))
    ]
    errors, runs = {}, {}
    for name, (layer, dtype) in rivals().items():
        x, weight, dy = (tensor.to(torch.bfloat16).to(dtype) for tensor in drawn)
        x.requires_grad_(), weight.requires_grad_()
        errors[name] = error_of(layer, x, weight, dy)

        def run(mark: Callable[[], None], layer=layer, x=x, weight=weight, dy=dy) -> None:
            y = layer(x, weight)
            mark()
            torch.autograd.grad(y, (x, weight), dy)
            mark()

        if not errors[name]:
            runs[name] = run
    timed = phases_in_turns(runs, device=CPU, rounds=arguments.rounds, budget=arguments.seconds)
    return [
        Row(
            "products",
            case,
            name,
            f"{tokens:,} x {inputs:,} x {outputs:,}",
            direction,
            "bfloat16",
            seconds=timed[name].seconds[phase] if name in timed else [],
            error=errors[name],
            flops=2.0 * tokens * inputs * outputs * (1 + phase),
        )
        for phase, direction in enumerate(PHASES)
        for name in errors
    ]


def main(arguments: Arguments) -> None:
    """Measures and prints."""
    console = Console(width=110, highlight=False)
    console.print(machine())
    console.print(
        "lemur_fast takes products of bfloat16 "
        + ("in float32 here" if _products.float32_is_faster() else "as torch does here: in bfloat16")
    )
    if unknown := set(arguments.shapes) - set(SHAPES):
        raise SystemExit(f"--shapes: got {', '.join(sorted(unknown))}; takes {'; '.join(SHAPES)}")
    rows: list[Row] = []
    for case in track(arguments.shapes, "products", console=console, transient=True):
        rows += measure(case, SHAPES[case], arguments)
    table = Table(title="a linear layer of bfloat16: GFLOP/s")
    for heading in ("tokens x inputs x outputs", "", *rivals(), "x torch"):
        table.add_column(heading, justify="right" if heading in ("x torch", *rivals()) else "left", no_wrap=True)
    for first in range(0, len(rows), len(rivals())):
        each = {row.rival: row for row in rows[first : first + len(rivals())]}
        row, peer = each["lemur_fast"], each["torch"]
        rates = [(r.flops or 0) / statistics.median(r.seconds) / 1e9 if r.seconds else 0 for r in each.values()]
        ratio = f"{peer.median / row.median:.2f}" if row.median and peer.median else "-"
        table.add_row(row.shape, row.direction, *(f"{rate:.0f}" if rate else "-" for rate in rates), ratio)
    console.print(table)
    for row in rows:
        if row.error:
            console.print(f"{row.rival}, {row.shape}, {row.direction}: {row.error}")
    if arguments.json:
        write_rows(arguments.json, rows)


if __name__ == "__main__":
    main(command_line(Arguments, __doc__))
