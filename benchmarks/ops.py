"""The memory-bound ops, forward and backward, as a share of the bandwidth at which this machine copies.

    python -m benchmarks.ops                            # bfloat16, LLaMA-2-7B's shapes and small ones, five minutes
    python -m benchmarks.ops --only swiglu --shapes small
    LEMUR_FAST_CPU=avx2 python -m benchmarks.ops        # the kernels of another instruction set

Rivals: lemur_fast, what stock Hugging Face LLaMA runs ("eager"), and torch.compile of that. An op's share is the least
number of bytes it must read and write (docs/kernels.md), over its time, over the rate at which torch copies as many
bytes between two buffers: a kernel that did nothing but move its data once would show 1. Forward and backward are timed
one after the other as in training, the rivals and the copies take turns, and the median of the rounds is shown.

Memory fresh from the system costs more than most of these kernels (0.7 to 1.5 us for 4 KiB, against 0.07 us to copy
them), and glibc gives large blocks back at once. So here malloc keeps what is freed, for every rival alike; the last
column counts the pages that were fresh all the same. Each rival is checked against float64 before it is timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

import lemur_fast as lf
from benchmarks.harness import keep_freed_memory, machine, page_faults, write_lines
from lemur_fast import _compiled

RIVALS = ("lemur_fast", "eager", "compile")
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.02, "float16": 0.003}
"""Relative error of the whole tensor; eager's own in 16 bits is about half."""


@dataclass
class Arguments:
    """Times the memory-bound ops against eager torch and torch.compile."""

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of every tensor."""
    shapes: tuple[Literal["llama-2-7b", "small"], ...] = ("llama-2-7b", "small")
    """4,096 tokens of LLaMA-2-7B, of a 52 M model, or both."""
    only: tuple[str, ...] = ()
    """Parts of the names of the ops to run; all by default."""
    rounds: int = 9
    """Timed calls of each rival."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Also write a JSON line for each op and direction."""


@dataclass
class Case:
    """One op at one shape: how to make its inputs, the two functions, and what it must move.

    Attributes:
        name: the op.
        shape: as printed.
        make: rows -> inputs in float32 or int64.
        rows: rows of the timed inputs.
        ours: lemur_fast's op, of the inputs.
        stock: stock Hugging Face's, of the inputs.
        wanted: indices of the inputs that get a gradient.
        forward: elements that the forward must move at least.
        backward: the same of the backward.
    """

    name: str
    shape: str
    make: Callable[[int], list[Tensor]]
    rows: int
    ours: Callable[..., Any]
    stock: Callable[..., Any]
    wanted: Sequence[int]
    forward: int
    backward: int


def stock_rms_norm(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Any:
    """LlamaRMSNorm, after the residual addition where there is one."""
    h = x if residual is None else x + residual
    norm = LlamaRMSNorm(x.shape[-1], eps=1e-5)
    norm.weight = torch.nn.Parameter(weight, requires_grad=False)
    y = torch.func.functional_call(norm, {"weight": weight}, h)
    return y if residual is None else (y, h)


def stock_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    """apply_rotary_pos_emb on the layout that the model gives it, [1, heads, T, D]."""
    return apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos[None], sin[None])


def stock_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of Hugging Face's models: float32 logits."""
    return functional.cross_entropy(logits.float() if logits.dtype != torch.float64 else logits, labels)


def rms_norm(width: int, residual: bool) -> Case:
    """[4096, width]."""

    def make(rows: int) -> list[Tensor]:
        return [torch.randn(rows, width), torch.rand(width) + 0.5, *([torch.randn(rows, width)] if residual else [])]

    def ours(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Any:
        return lf.ops.rms_norm(x, weight, residual=residual) if residual is not None else lf.ops.rms_norm(x, weight)

    n, name = 4096 * width, "rms_norm + residual" if residual else "rms_norm"
    moved = (4 * n, 4 * n) if residual else (2 * n, 3 * n)
    wanted = (0, 1, 2) if residual else (0, 1)
    return Case(name, f"4096 x {width}", make, 4096, ours, stock_rms_norm, wanted, *moved)


def rotary(heads: int, head_dim: int) -> Case:
    """Queries and keys [4096, heads, head_dim]."""

    def make(rows: int) -> list[Tensor]:
        angles = torch.outer(torch.arange(rows), 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)).repeat(1, 2)
        return [torch.randn(rows, heads, head_dim), torch.randn(rows, heads, head_dim), angles.cos(), angles.sin()]

    n = 2 * 4096 * heads * head_dim
    return Case("rotary", f"4096 x {heads} x {head_dim}", make, 4096, lf.ops.rotary, stock_rotary, (0, 1), 2 * n, 2 * n)


def swiglu(width: int) -> Case:
    """[4096, width]."""
    n = 4096 * width
    return Case(
        "swiglu",
        f"4096 x {width}",
        lambda rows: [2 * torch.randn(rows, width), torch.randn(rows, width)],
        4096,
        lf.ops.swiglu,
        lambda gate, up: functional.silu(gate) * up,
        (0, 1),
        3 * n,
        5 * n,
    )


def cross_entropy(rows: int, vocab: int) -> Case:
    """[rows, vocab]."""
    return Case(
        "cross_entropy",
        f"{rows} x {vocab}",
        lambda rows: [2 * torch.randn(rows, vocab), torch.randint(0, vocab, (rows,))],
        rows,
        lf.ops.cross_entropy,
        stock_cross_entropy,
        (0,),
        rows * vocab,
        2 * rows * vocab,
    )


CASES: dict[str, tuple[Callable[[], Case], ...]] = {
    "llama-2-7b": (
        lambda: rms_norm(4096, residual=False),
        lambda: rms_norm(4096, residual=True),
        lambda: rotary(32, 128),
        lambda: swiglu(4096),
        lambda: swiglu(11008),
        lambda: cross_entropy(4096, 32000),
    ),
    "small": (
        lambda: rms_norm(512, residual=False),
        lambda: rms_norm(512, residual=True),
        lambda: rotary(8, 64),
        lambda: swiglu(1408),
        lambda: cross_entropy(1024, 32000),
    ),
}


# ---- one rival -------------------------------------------------------------------------------------------------------


def _list(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def make_inputs(case: Case, rows: int, dtype: torch.dtype) -> list[Tensor]:
    """The case's inputs, the same at every call, those that get a gradient as leaves."""
    torch.manual_seed(0)
    inputs = [x.to(dtype) if x.is_floating_point() else x for x in case.make(rows)]
    for index in case.wanted:
        inputs[index].requires_grad_()
    return inputs


def seeds_like(outputs: list[Tensor]) -> list[Tensor]:
    """Incoming gradients: ones for a scalar, else noise that float16 holds exactly."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.ones_like(o) if o.dim() == 0 else torch.randn(o.shape, generator=generator).half().to(o.dtype)
        for o in outputs
    ]


def results(case: Case, function: Callable, dtype: torch.dtype, rows: int) -> list[Tensor]:
    """Outputs and gradients of `function`, on inputs rounded to `dtype`; a rival's layout made ours."""
    inputs = make_inputs(case, rows, dtype)
    outputs = _list(function(*inputs))
    turned = [o[0].transpose(0, 1) if o.dim() == 4 else o for o in outputs]
    gradients = torch.autograd.grad(turned, [inputs[i] for i in case.wanted], seeds_like(turned))
    return [x.detach() for x in (*turned, *gradients)]


def check(case: Case, name: str, function: Callable, dtype: str) -> str:
    """What is wrong with a rival against float64, on 64 rows; nothing when it is right."""
    rows = min(64, case.rows)
    rounded = make_inputs(case, rows, getattr(torch, dtype))
    wide = [x.detach().double() if x.is_floating_point() else x for x in rounded]
    exact_case = Case(**{**vars(case), "make": lambda _: wide})
    got = results(case, function, getattr(torch, dtype), rows)
    exact = results(exact_case, case.stock, torch.float64, rows)
    for index, (a, b) in enumerate(zip(got, exact, strict=True)):
        error = float((a.double() - b).norm() / b.norm())
        if not error <= TOLERANCE[dtype]:
            return f"wrong: relative error {error:.1e} in result {index}"
    return ""


@dataclass
class Times:
    """Seconds of the timed calls, and the fresh pages they met."""

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    faults: int = 0


def time_once(function: Callable, inputs: list[Tensor], wanted: list[Tensor], seeds: list[Tensor], to: Times) -> None:
    """One forward and its backward."""
    before = page_faults()
    start = time.perf_counter()
    outputs = _list(function(*inputs))
    middle = time.perf_counter()
    gradients = torch.autograd.grad(outputs, wanted, seeds)
    end = time.perf_counter()
    del gradients
    to.forward.append(middle - start)
    to.backward.append(end - middle)
    to.faults += page_faults() - before


def measure(case: Case, arguments: Arguments) -> tuple[dict[str, Times | str], dict[int, float]]:
    """Times of each rival (or what is wrong with it), and seconds to copy each number of bytes."""
    dtype = getattr(torch, arguments.dtype)
    functions = {"lemur_fast": case.ours, "eager": case.stock, "compile": torch.compile(case.stock, dynamic=False)}
    found: dict[str, Times | str] = {}
    runs = {}
    inputs = make_inputs(case, case.rows, dtype)
    wanted = [inputs[i] for i in case.wanted]
    for name, function in functions.items():
        wrong = check(case, name, function, arguments.dtype)
        found[name] = wrong or Times()
        if not wrong:
            runs[name] = (function, seeds_like(_list(function(*inputs))))
    copied: dict[int, list[float]] = {case.forward: [], case.backward: []}
    buffers = {n: [torch.zeros(n // 2, dtype=dtype) for _ in range(2)] for n in copied}
    for number in range(-2, arguments.rounds):
        for name, (function, seeds) in runs.items():
            to = found[name] if number >= 0 else Times()
            assert isinstance(to, Times)
            time_once(function, inputs, wanted, seeds, to)
        for elements, (source, target) in buffers.items():
            start = time.perf_counter()
            target.copy_(source)
            if number >= 0:
                copied[elements].append(time.perf_counter() - start)
    return found, {elements: statistics.median(seconds) for elements, seconds in copied.items()}


# ---- the table -------------------------------------------------------------------------------------------------------


def rows_of(case: Case, found: dict[str, Times | str], copies: dict[int, float], size: int) -> list[dict[str, Any]]:
    """Two rows, forward and backward, as plain facts."""
    rows = []
    for direction in ("forward", "backward"):
        elements = getattr(case, direction)
        row: dict[str, Any] = {
            "op": case.name,
            "shape": case.shape,
            "direction": direction,
            "least_bytes": elements * size,
            "copy_bytes_per_second": elements * size / copies[elements],
        }
        for name in RIVALS:
            times = found[name]
            if isinstance(times, str):
                row[name] = times
                continue
            seconds = statistics.median(getattr(times, direction))
            row[name] = {
                "seconds": seconds,
                "share": copies[elements] / seconds,
                "spread": (max(getattr(times, direction)) - min(getattr(times, direction))) / 2 / seconds,
                "page_faults": times.faults / len(times.forward),
            }
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]], arguments: Arguments) -> Table:
    """Milliseconds and shares of the copy bandwidth."""
    result = Table(title=f"memory-bound ops, {arguments.dtype}: median ms, and share of the copy bandwidth")
    for heading in (
        "op",
        "shape",
        "",
        "copy GB/s",
        "lemur_fast",
        "± %",
        "eager",
        "compile",
        "x compile",
        "fresh pages",
    ):
        result.add_column(heading, justify="left" if heading in ("op", "shape", "") else "right", no_wrap=True)
    for row in rows:
        cells = []
        for name in RIVALS:
            facts = row[name]
            wrong = isinstance(facts, str)
            cells.append(facts if wrong else f"{1e3 * facts['seconds']:.2f} ms {facts['share']:.2f}")
            if name == "lemur_fast":
                cells.append("" if wrong else f"{100 * facts['spread']:.0f}")
        ours, compiled = row["lemur_fast"], row["compile"]
        known = not isinstance(ours, str) and not isinstance(compiled, str)
        result.add_row(
            row["op"],
            row["shape"],
            row["direction"],
            f"{row['copy_bytes_per_second'] / 1e9:.1f}",
            *cells,
            f"{compiled['seconds'] / ours['seconds']:.2f}" if known else "",
            "" if isinstance(ours, str) else f"{ours['page_faults']:.0f}",
        )
    return result


def chosen_cases(arguments: Arguments) -> list[Case]:
    """The cases asked for."""
    cases = [make() for shapes in arguments.shapes for make in CASES[shapes]]
    chosen = [c for c in cases if not arguments.only or any(part in c.name for part in arguments.only)]
    if not chosen:
        raise SystemExit(
            f"--only: got {arguments.only}; takes parts of {', '.join(dict.fromkeys(c.name for c in cases))}"
        )
    return chosen


def main(arguments: Arguments) -> None:
    """Measures and prints."""
    console = Console(width=150, highlight=False)
    cases = chosen_cases(arguments)
    console.print(machine())
    if _compiled.missing:
        raise SystemExit(f"lemur_fast: {_compiled.missing}")
    console.print(f"instruction set {_compiled.C.cpu.isa()}; {keep_freed_memory()}")
    rows = []
    size = getattr(torch, arguments.dtype).itemsize
    for case in track(cases, "measuring (torch.compile takes its time)", console=console, transient=True):
        rows += rows_of(case, *measure(case, arguments), size)
        torch._dynamo.reset()
    console.print(table(rows, arguments))
    if arguments.json:
        facts = {"benchmark": "ops", "machine": machine(), "isa": _compiled.C.cpu.isa(), "dtype": arguments.dtype}
        write_lines(arguments.json, [facts | row for row in rows])


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
