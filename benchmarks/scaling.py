"""How time and memory of the ops grow: with tokens, documents, vocabulary and width.

    python -m benchmarks.scaling                    # float32, small sizes, three minutes on a CPU
    python -m benchmarks.scaling --device cuda      # bfloat16, sizes 16 times as large

Growth should be linear in tokens (for documents of one length), in documents, in the vocabulary and in the width, and
attention's in the sum of squares of the lengths (of as many tokens: short documents and one that grows). For each curve
the exponent of the power law through its points is printed, 1 where it is linear; a call's fixed cost pulls it below 1,
so that of the last step stands beside it. Each point is a forward and a backward, timed in turns with the
plain torch that `benchmarks.peers` calls eager, and with a copy of the bytes that must be moved, whose share is told,
or that of a large matrix product's rate; the memory is what a call holds at its peak beside its inputs. The packer's
plan is on the host, and has a curve of its own where the device is the CPU. Each rival is checked against float64 at
its smallest size.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from benchmarks import attention, ops, peers
from benchmarks.harness import (
    Row,
    command_line,
    copy_run,
    lines_of,
    machine,
    matrix_peak,
    peak_above,
    phases_in_turns,
    write_rows,
)
from benchmarks.peers import Documents
from benchmarks.report import curves, growth_table
from lemur_fast import packing

RIVALS = ("lemur_fast", "eager", "torch", "Liger", "CCE", "a document at a time", "FlashAttention 2", "varlen")


@dataclass
class Arguments:
    """Times the ops over ranges of sizes."""

    device: str = "cpu"
    """Where: cpu or cuda."""
    dtype: Literal["", "float32", "bfloat16"] = ""
    """Of the tensors; by default float32 on a CPU and bfloat16 on a GPU."""
    points: int = 5
    """Of each curve, each twice the size of the one before."""
    smaller: int = 1
    """Divides the sizes, for a trial."""
    only: tuple[str, ...] = ()
    """Parts of the names of the ops to run; all by default."""
    rounds: int = 5
    """Timed calls at each point."""
    seconds: float = 4.0
    """Budget of a point: where its rivals take longer there are fewer rounds, but at least three."""
    json: Path | None = None
    """Also write a JSON line for each rival and point."""


def of_op(case: Callable[[int], ops.Case]) -> Callable[[int, torch.device, torch.dtype], Any]:
    """A point of a curve of an op of `benchmarks.ops`.

    That is inputs, which of them want gradients, rivals, a check, and the elements and the FLOPs that are counted.
    """

    def point(size: int, device: torch.device, dtype: torch.dtype) -> Any:
        made = case(size)
        found, _ = peers.functions(made.name, device)
        inputs = ops.make_inputs(made, made.rows, dtype, device)
        check = lambda function: ops.check(made, function, str(dtype).split(".")[1], device)  # noqa: E731
        return inputs, made.wanted, found, check, made.forward + made.backward, made.flops

    return point


def of_attention(lengths: Callable[[int], list[int]]) -> Callable[[int, torch.device, torch.dtype], Any]:
    """The same of attention, 8 heads of 64, over documents of these lengths."""

    def point(size: int, device: torch.device, dtype: torch.dtype) -> Any:
        documents = Documents.of(lengths(size), device)
        torch.manual_seed(0)
        inputs = [torch.randn(sum(documents.lengths), 8, 64).to(device, dtype).requires_grad_() for _ in range(3)]
        found, _ = peers.attentions(documents)
        name = str(dtype).split(".")[1]

        def check(function: Callable) -> str:
            return attention.check(function, inputs, attention.exact(*inputs, documents.lengths), name)

        return inputs, (0, 1, 2), found, check, 0, 3.5 * 4 * 64 * 8 * documents.pairs  # as benchmarks.attention counts

    return point


def _with_rows(make: Callable[..., ops.Case], *sizes: Any) -> Callable[[int], ops.Case]:
    """A case of `benchmarks.ops` with as many rows as asked for."""

    def case(rows: int) -> ops.Case:
        made = vars(make(*sizes))
        moved = {name: made[name] * rows // made["rows"] for name in ("forward", "backward")}
        return ops.Case(**made | moved | {"rows": rows})

    return case


def documents_of(squares: int) -> list[int]:
    """Lengths of 8,192 tokens whose squares add up to about `squares`: documents of 64 and one that is longer.

    Fewer tokens where documents of 64 would have more than half of the squares, more where one document has too few.
    """
    tokens = max(min(8192, squares // 128), math.isqrt(squares))
    longest = min(32 + math.isqrt(32**2 + squares - 64 * tokens), tokens)  # n^2 + 64 (tokens - n) = squares
    rest = tokens - longest
    return [length for length in [longest, *[64] * (rest // 64), rest % 64] if length]


# (op, axis, smallest size on a CPU, the point of a size)
CURVES: list[tuple[str, str, int, Callable]] = [
    ("rms_norm", "tokens", 256, of_op(_with_rows(ops.rms_norm, 1024, False))),
    ("rotary", "tokens", 256, of_op(_with_rows(ops.rotary, 16, 64))),
    ("swiglu", "tokens", 256, of_op(_with_rows(ops.swiglu, 2816))),
    ("cross_entropy", "tokens", 64, of_op(lambda rows: ops.cross_entropy(rows, 32000))),
    ("linear_cross_entropy", "tokens", 64, of_op(lambda rows: ops.linear_cross_entropy(rows, 256, 32000))),
    ("attention, one document", "tokens", 128, of_attention(lambda tokens: [tokens])),
    ("attention, documents of 128", "documents", 2, of_attention(lambda number: [128] * number)),
    ("attention, 8192 tokens", "sum of squares", 2**20, of_attention(documents_of)),
    ("attention, documents of 8", "documents", 16, of_attention(lambda number: [8] * number)),
    ("cross_entropy", "vocabulary", 8000, of_op(lambda vocab: ops.cross_entropy(128, vocab))),
    ("linear_cross_entropy", "vocabulary", 8000, of_op(lambda vocab: ops.linear_cross_entropy(128, 256, vocab))),
    ("rms_norm", "width", 512, of_op(lambda width: _with_rows(ops.rms_norm, width, False)(512))),
    ("swiglu", "width", 512, of_op(lambda width: _with_rows(ops.swiglu, width)(512))),
    ("linear_cross_entropy", "width", 128, of_op(lambda width: ops.linear_cross_entropy(128, width, 8000))),
]
GROWS_ON_GPU = {"tokens": 16, "documents": 16, "sum of squares": 1, "vocabulary": 1, "width": 4}
"""How many times as large the sizes are there."""


def dtype_of(arguments: Arguments) -> torch.dtype:
    """The one asked for, or the device's."""
    on_gpu = torch.device(arguments.device).type == "cuda"
    return getattr(torch, arguments.dtype or ("bfloat16" if on_gpu else "float32"))


def _call(function: Callable, inputs: list[Tensor], wanted: Any) -> Callable[[], Any]:
    """A forward and a backward on tensors of its own, for some rivals write into them."""
    own = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]

    def call() -> Any:
        outputs = ops._list(function(*own))
        return outputs, torch.autograd.grad(outputs, [own[i] for i in wanted], ops.seeds_like(outputs))

    return call


def _timed(call: Callable[[], Any]) -> Callable[[Callable[[], None]], None]:
    """For `phases_in_turns`: a call as one phase."""

    def run(mark: Callable[[], None]) -> None:
        call()
        mark()

    return run


def measure(op: str, axis: str, smallest: int, point: Callable, arguments: Arguments, peak: float) -> list[Row]:
    """Rows of one curve; `peak` is the rate of a matrix product."""
    device, dtype = torch.device(arguments.device), dtype_of(arguments)
    smallest = smallest * (GROWS_ON_GPU[axis] if device.type == "cuda" else 1) // arguments.smaller
    rows, wrong = [], {}
    for number in range(arguments.points):
        size = max(1, smallest) << number
        inputs, wanted, found, check, elements, flops = point(size, device, dtype)
        rivals = {name: function for name, function in found.items() if name in RIVALS}
        if not number:
            wrong = {name: check(function) for name, function in rivals.items()}

        calls = {name: _call(function, inputs, wanted) for name, function in rivals.items() if not wrong[name]}
        copy = {"copy": copy_run(elements * dtype.itemsize, device)} if elements else {}
        timings = phases_in_turns(
            {name: _timed(run) for name, run in calls.items()} | copy,
            device=device,
            rounds=arguments.rounds,
            budget=arguments.seconds,
        )
        for name in rivals:
            row = Row("scaling", op, name, f"{axis} {size}", "both", str(dtype).split(".")[1], error=wrong[name])
            row.at = {axis: size}
            row.bytes = elements * dtype.itemsize or None
            row.copy_seconds = statistics.median(timings["copy"].seconds[0]) if elements else None
            row.flops, row.peak_flops = (flops, peak) if flops else (None, None)
            if name in calls:
                row.seconds, row.peak_bytes = timings[name].seconds[0], peak_above(calls[name])
            rows.append(row)
    return rows


def measure_packing(arguments: Arguments) -> list[Row]:
    """The packer's plan against documents, on the host."""
    from benchmarks.packing import lengths_of_text, rows_of_plan

    rows = []
    for number in range(arguments.points):
        size = max(1, 16000 // arguments.smaller) << number
        lengths = lengths_of_text(size)
        rows_of_plan(packing.plan(lengths, 4096), lengths)

        def run(mark: Callable[[], None], lengths: Any = lengths) -> None:
            packing.plan(lengths, 4096)
            mark()

        timing = phases_in_turns({"": run}, device=torch.device("cpu"), rounds=arguments.rounds)[""]
        rows.append(Row("scaling", "packing.plan", "lemur_fast", f"documents {size}", seconds=timing.seconds[0]))
        rows[-1].at = {"documents": size}
    return rows


def main(arguments: Arguments) -> list[Row]:
    """Measures and prints."""
    console = Console(width=170, highlight=False)
    device = torch.device(arguments.device)
    console.print(machine(device))
    # The packer is no GPU's: its rows would bear that machine's name.
    names = list(dict.fromkeys([op for op, *_ in CURVES] + ["packing.plan"] * (device.type == "cpu")))
    chosen = [name for name in names if not arguments.only or any(part in name for part in arguments.only)]
    if not chosen:
        raise SystemExit(f"--only: got {arguments.only}; takes parts of {', '.join(names)}")
    rows: list[Row] = []
    todo = [curve for curve in CURVES if curve[0] in chosen]
    peak = matrix_peak(dtype_of(arguments), device)
    for curve in track(todo, "measuring", console=console, transient=True):
        rows += measure(*curve, arguments, peak)
        if arguments.json:
            write_rows(arguments.json, rows, device)
    if "packing.plan" in chosen:
        rows += measure_packing(arguments)
    lines = lines_of(rows, device)
    if arguments.json:
        write_rows(arguments.json, rows, device)
    if curves(lines):
        console.print("\n".join(growth_table(lines)))
    for line in dict.fromkeys(f"{row.case}: {row.rival}: {row.error}" for row in rows if row.error):
        console.print(f"  {line}")
    return rows


if __name__ == "__main__":
    main(command_line(Arguments, __doc__))
