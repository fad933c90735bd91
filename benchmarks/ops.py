"""The ops, forward and backward, side by side: as a share of what this machine copies and multiplies.

    python -m benchmarks.ops                            # LLaMA-2-7B's, 13B's and small shapes, a quarter hour
    python -m benchmarks.ops --only swiglu --shapes small
    python -m benchmarks.ops --device cuda --shapes llama-2-7b llama-2-13b llama-2-70b small
    LEMUR_FAST_CPU=avx2 python -m benchmarks.ops        # the kernels of another instruction set

Rivals are those of `benchmarks.peers`; one that cannot run is named with its reason. A memory-bound op's share is the
least number of bytes it must read and write (docs/kernels.md), over its time, over the rate at which torch copies as
many bytes between two buffers: a kernel that did nothing but move its data once would show 1. linear_cross_entropy's is
that of the rate of a large matrix product; its forward and backward are timed as one, since several rivals compute
gradients in the forward. Elsewhere forward and backward are timed one after the other as in training. The rivals and
the copies take turns, and the median of the rounds is shown.

Memory fresh from the system costs a CPU more than most of these kernels (0.7 to 1.5 us for 4 KiB, against 0.07 us to
copy them), and glibc gives large blocks back at once. So here malloc keeps what is freed, for every rival alike; the
last column counts the pages that were fresh all the same. On a GPU the second-level cache is emptied before each call,
and events in the stream tell the time. Each rival is checked against float64 before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks import peers
from benchmarks.harness import (
    Row,
    command_line,
    copy_run,
    dtype_to_measure,
    keep_freed_memory,
    machine_and_dtype,
    matrix_peak,
    phases_in_turns,
    write_rows,
)
from lemur_fast import _compiled

OURS = "lemur_fast"
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.02, "float16": 0.003}
"""Relative error of the whole tensor; eager's own in 16 bits is about half."""


Shape = Literal["llama-2-7b", "llama-2-13b", "llama-2-70b", "small"]


@dataclass
class Arguments:
    """Times the ops against everyone who has them."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Of every tensor; auto is bfloat16, or float32 on a CPU that only emulates it."""
    device: str = "cpu"
    """Where: cpu or cuda."""
    shapes: tuple[Shape, ...] = ("llama-2-7b", "llama-2-13b", "small")
    """4,096 tokens of each LLaMA-2, or of a 52 M model. Those of 70B take twice the memory of 13B's, about 11 GB."""
    only: tuple[str, ...] = ()
    """Parts of the names of the ops to run; all by default."""
    rounds: int = 9
    """Timed calls of each rival."""
    seconds: float = 30.0
    """Budget for one op at one shape: where all its rivals take longer there are fewer rounds, but at least three."""
    json: Path | None = None
    """Also write a JSON line for each rival, op and direction."""

    def __post_init__(self) -> None:
        self.dtype = dtype_to_measure(self.dtype, self.device)  # type: ignore[assignment]


@dataclass
class Case:
    """One op at one shape: how to make its inputs, and what it must move or multiply.

    Attributes:
        name: the op, of `peers.OPS`.
        shape: as printed.
        make: rows -> inputs in float32 or int64.
        rows: rows of the timed inputs.
        wanted: indices of the inputs that get a gradient.
        forward: elements that the forward must move at least.
        backward: the same of the backward.
        flops: that forward and backward must compute, where products are what takes the time.
    """

    name: str
    shape: str
    make: Callable[[int], list[Tensor]]
    rows: int
    wanted: Sequence[int]
    forward: int = 0
    backward: int = 0
    flops: float = 0.0


def rms_norm(width: int, residual: bool) -> Case:
    """[4096, width]."""

    def make(rows: int) -> list[Tensor]:
        return [torch.randn(rows, width), torch.rand(width) + 0.5, *([torch.randn(rows, width)] if residual else [])]

    n, name = 4096 * width, "rms_norm + residual" if residual else "rms_norm"
    moved = (4 * n, 4 * n) if residual else (2 * n, 3 * n)
    return Case(name, f"4096 x {width}", make, 4096, (0, 1, 2) if residual else (0, 1), *moved)


def rotary(heads: int, head_dim: int, kv_heads: int | None = None) -> Case:
    """Queries [4096, heads, head_dim] and keys [4096, kv_heads, head_dim]."""
    kv_heads = kv_heads or heads

    def make(rows: int) -> list[Tensor]:
        angles = torch.outer(torch.arange(rows), 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)).repeat(1, 2)
        return [torch.randn(rows, heads, head_dim), torch.randn(rows, kv_heads, head_dim), angles.cos(), angles.sin()]

    n = 4096 * (heads + kv_heads) * head_dim
    shape = f"4096 x {heads} x {head_dim}" if heads == kv_heads else f"4096 x ({heads} + {kv_heads}) x {head_dim}"
    return Case("rotary", shape, make, 4096, (0, 1), 2 * n, 2 * n)


def swiglu(width: int) -> Case:
    """[4096, width]."""
    n = 4096 * width
    make = lambda rows: [2 * torch.randn(rows, width), torch.randn(rows, width)]  # noqa: E731
    return Case("swiglu", f"4096 x {width}", make, 4096, (0, 1), 3 * n, 5 * n)


def cross_entropy(rows: int, vocab: int) -> Case:
    """[rows, vocab]."""
    make = lambda rows: [2 * torch.randn(rows, vocab), torch.randint(0, vocab, (rows,))]  # noqa: E731
    return Case("cross_entropy", f"{rows} x {vocab}", make, rows, (0,), rows * vocab, 2 * rows * vocab)


def linear_cross_entropy(rows: int, width: int, vocab: int) -> Case:
    """Hidden [rows, width] and weight [vocab, width]; every row is trained."""

    def make(rows: int) -> list[Tensor]:
        weight = torch.randn(vocab, width) / width**0.5
        return [torch.randn(rows, width), weight, torch.randint(0, vocab, (rows,))]

    shape = f"{rows} x {width} -> {vocab}"
    return Case("linear_cross_entropy", shape, make, rows, (0, 1), flops=3 * 2 * rows * width * vocab)


MODELS = {
    # width, heads, key heads, width of the MLP
    "llama-2-7b": (4096, 32, 32, 11008),
    "llama-2-13b": (5120, 40, 40, 13824),
    "llama-2-70b": (8192, 64, 8, 28672),
    "small": (512, 8, 8, 1408),
}


def cases(model: str, device: torch.device) -> list[Case]:
    """The ops of a model with 4,096 tokens; of its loss a part, that a CPU may get through."""
    width, heads, kv_heads, intermediate = MODELS[model]
    small, gpu = model == "small", device.type == "cuda"
    return [
        rms_norm(width, residual=False),
        rms_norm(width, residual=True),
        rotary(heads, 64 if small else 128, kv_heads),
        swiglu(intermediate),
        cross_entropy(1024 if small else 4096, 32000),
        linear_cross_entropy(4096 if gpu else 1024 if small else 256, width, 32000),
    ]


# ---- one rival -------------------------------------------------------------------------------------------------------


def _list(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def make_inputs(case: Case, rows: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """The case's inputs, the same at every call, those that get a gradient as leaves."""
    torch.manual_seed(0)
    inputs = [x.to(device, dtype if x.is_floating_point() else None) for x in case.make(rows)]
    for index in case.wanted:
        inputs[index].requires_grad_()
    return inputs


def seeds_like(outputs: list[Tensor]) -> list[Tensor]:
    """Incoming gradients: ones for a scalar, else noise that float16 holds exactly."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.ones_like(o) if o.dim() == 0 else torch.randn(o.shape, generator=generator).half().to(o) for o in outputs
    ]


def results(case: Case, function: Callable, inputs: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients of `function`; a rival's layout made ours."""
    outputs = _list(function(*inputs))
    turned = [o[0].transpose(0, 1) if o.dim() == 4 else o for o in outputs]
    kept = [o.detach().clone() for o in turned]  # some rivals' backward overwrites them
    gradients = torch.autograd.grad(turned, [inputs[i] for i in case.wanted], seeds_like(turned))
    return [*kept, *gradients]


def check(case: Case, function: Callable, dtype: str, device: torch.device) -> str:
    """What is wrong with a rival against float64, on 64 rows; nothing when it is right."""
    rows = min(64, case.rows)
    rounded = make_inputs(case, rows, getattr(torch, dtype), device)
    wide = [x.detach().double() if x.is_floating_point() else x for x in rounded]
    for index in case.wanted:
        wide[index].requires_grad_()
    exact = results(case, peers.OPS[case.name]["eager"](device), wide)
    try:
        got = results(case, function, rounded)
    except Exception as error:  # whatever a rival fails by, the others are measured
        return peers.failure(error)
    for index, (a, b) in enumerate(zip(got, exact, strict=True)):
        error = float((a.double() - b).norm() / b.norm())
        if not error <= TOLERANCE[dtype]:
            return f"wrong: relative error {error:.1e} in result {index}"
    return ""


def run_of(case: Case, function: Callable, inputs: list[Tensor]) -> Callable[[Callable[[], None]], None]:
    """For `phases_in_turns`: a forward, and its backward."""
    wanted = [inputs[i] for i in case.wanted]
    seeds: list[Tensor] = []

    def run(mark: Callable[[], None]) -> None:
        outputs = _list(function(*inputs))
        if not seeds:
            seeds.extend(seeds_like(outputs))
        mark()
        torch.autograd.grad(outputs, wanted, seeds)
        mark()

    return run


def measure(case: Case, arguments: Arguments, peak: float = 0.0) -> list[Row]:
    """Rows of all rivals, in every direction; `peak` is the device's matrix product, in FLOP/s."""
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    functions, missing = peers.functions(case.name, device)
    wrong = {name: check(case, function, arguments.dtype, device) for name, function in functions.items()}
    runs = {
        name: run_of(case, function, make_inputs(case, case.rows, dtype, device))
        for name, function in functions.items()
        if not wrong[name]
    }
    copies = {f"copy {n}": copy_run(n * dtype.itemsize, device) for n in {case.forward, case.backward} if n}
    timings = phases_in_turns(runs | copies, device=device, rounds=arguments.rounds, budget=arguments.seconds)
    copied = {n: timings[f"copy {n}"].seconds[0] if n else [] for n in (case.forward, case.backward)}
    forward, backward = copied[case.forward], copied[case.backward]
    rows = []
    for direction, elements, copy in (
        ("forward", case.forward, forward),
        ("backward", case.backward, backward),
        ("both", case.forward + case.backward, [a + b for a, b in zip(forward, backward, strict=True)]),
    ):
        if case.flops and direction != "both":
            continue
        for name in peers.OPS[case.name]:
            row = Row("ops", case.name, name, case.shape, direction, arguments.dtype)
            row.error = missing.get(name) or wrong.get(name, "")
            row.bytes = elements * dtype.itemsize or None
            row.flops, row.peak_flops = (case.flops, peak or None) if case.flops else (None, None)
            row.copy_seconds = sorted(copy)[len(copy) // 2] if copy else None
            if name in runs:
                phases = timings[name].seconds
                both = [a + b for a, b in zip(*phases, strict=True)]
                row.seconds = {"forward": phases[0], "backward": phases[1], "both": both}[direction]
                row.facts["fresh_pages"] = timings[name].faults / len(row.seconds)
            rows.append(row)
    return rows


# ---- the table -------------------------------------------------------------------------------------------------------


def table(rows: list[Row], arguments: Arguments) -> Table:
    """Milliseconds and shares of the bandwidth of a copy, or of the rate of a matrix product."""
    names = list(dict.fromkeys(row.rival for row in rows if row.median or row.error.startswith("wrong")))
    result = Table(title=f"ops, {arguments.dtype}: median ms, and share of a copy or a matrix product")
    for heading in ("op", "shape", "", *names, "± %", "x best other", "fresh pages"):
        result.add_column(heading, justify="left" if heading in ("op", "shape", "") else "right", no_wrap=True)
    groups: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        groups.setdefault(row.group, {})[row.rival] = row
    for group in groups.values():
        first = next(iter(group.values()))
        cells = []
        for name in names:
            row = group.get(name)
            share = (row.share_of_copy or row.share_of_peak) if row else None
            cells.append(
                f"{1e3 * row.median:.3g}" + (f" {share:.2f}" if share else "")
                if row and row.median
                else "wrong"
                if row and row.error.startswith("wrong")
                else "-"
            )
        ours = group[OURS]
        others = [row.median for name, row in group.items() if name != OURS and row.median]
        known = ours.median and others
        result.add_row(
            first.case,
            first.shape,
            first.direction,
            *cells,
            f"{100 * ours.spread:.0f}" if ours.spread is not None else "",
            f"{min(others) / ours.median:.2f}" if known else "",
            f"{ours.facts['fresh_pages']:.0f}" if "fresh_pages" in ours.facts else "",
        )
    return result


def errors(rows: list[Row]) -> list[str]:
    """A line for each rival and op without a time, and why; each once."""
    found: dict[str, None] = {}
    for row in rows:
        if row.error:
            wrong = f", {row.shape}" if row.error.startswith("wrong") else ""
            found[f"{row.case}{wrong}: {row.rival}: {row.error}"] = None
    return list(found)


def chosen_cases(arguments: Arguments) -> list[Case]:
    """The cases asked for, each once."""
    device = torch.device(arguments.device)
    every = {(c.name, c.shape): c for model in arguments.shapes for c in cases(model, device)}
    chosen = [c for c in every.values() if not arguments.only or any(part in c.name for part in arguments.only)]
    if not chosen:
        names = ", ".join(dict.fromkeys(c.name for c in every.values()))
        raise SystemExit(f"--only: got {arguments.only}; takes parts of {names}")
    return chosen


def main(arguments: Arguments) -> list[Row]:
    """Measures and prints."""
    console = Console(width=180, highlight=False)
    chosen, device = chosen_cases(arguments), torch.device(arguments.device)
    console.print(machine_and_dtype(arguments.dtype, device))
    if _compiled.missing and device.type == "cpu":
        raise SystemExit(f"lemur_fast: {_compiled.missing}")
    if device.type == "cpu":
        console.print(f"instruction set {_compiled.C.cpu.isa()}; {keep_freed_memory()}")
    peak = matrix_peak(getattr(torch, arguments.dtype), device) if any(case.flops for case in chosen) else 0.0
    rows: list[Row] = []
    for case in track(chosen, "measuring (torch.compile takes its time)", console=console, transient=True):
        rows += measure(case, arguments, peak)
        torch._dynamo.reset()
        if arguments.json:  # what is measured is kept, whatever comes
            write_rows(arguments.json, rows, device)
    console.print(table(rows, arguments))
    for line in errors(rows):
        console.print(f"  {line}")
    return rows


if __name__ == "__main__":
    main(command_line(Arguments, __doc__))
