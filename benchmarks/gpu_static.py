"""What the kernels become on GPUs that are not here: registers, tensor-core instructions, traffic, limits.

    python -m benchmarks.gpu_static                        # bfloat16, every kernel, every target: a few minutes
    python -m benchmarks.gpu_static --targets sm_90        # one of them
    make gpu-static                                        # every option, too, into docs/gpu-static.md

Every kernel, Triton's and those of ``csrc/cuda``, is compiled ahead of time as it is launched at LLaMA-2-7B's shapes,
and its machine code is read. For sm_80 and sm_90 (CUDA C++: sm_80) it is executed as well (`tests.ptxsim`) on a part of
those shapes, what it does is counted, and the counts are multiplied to 4,096 tokens: equal rows, documents and
heads. These are counts, not times.

The program fails where a bar breaks: registers that spill, a stack, shared memory past the device's limit, no load of
128 bits, attention without the tensor cores of its generation; and, where it is executed, bytes that do not move 16 at
a time, more traffic than the formula beside it allows, sectors used in part, bank conflicts.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import nvcc
from benchmarks.ahead_of_time import (
    SHARED_LIMIT,
    TARGETS,
    Launch,
    Resources,
    programs_at_once,
    recording,
    resources,
)
from benchmarks.gpu_bound import DEVICES, UNITS, bound, cycles
from benchmarks.harness import commit
from lemur_fast.kernels import attention, common, cross_entropy, rms_norm, rotary, swiglu
from tests.cuda import simulated as cuda
from tests.ptxsim import Counts
from tests.ptxsim.from_triton import execute

TENSOR_CORES = {"sm_90": ("HGMMA",), "sm_100": ("UTCHMMA", "HMMA"), "gfx942": ("v_mfma",)}
"""Instructions by which products run on the tensor cores of a generation, where they are not HMMA."""

TOKENS, WIDTH, INNER, HEADS, VOCABULARY = 4096, 4096, 11008, 32, 32000
"""LLaMA-2-7B's shapes."""

DOCUMENT = 512
"""Tokens of each document that attention is counted with."""


@dataclass
class Arguments:
    """Compiles every kernel for every target, executes what can be executed, and prints what became of it."""

    targets: tuple[str, ...] = tuple(TARGETS)
    """Architectures."""
    dtypes: tuple[str, ...] = ("bfloat16",)
    """Dtypes of the inputs. The first is printed in full, the others only where a bar breaks."""
    head_dims: tuple[int, ...] = (64, 96, 128, 256)
    """Head dimensions for attention."""
    every_option: bool = False
    """Attention with windows, softcaps and without a causal mask, too."""
    out: Path | None = None
    """Also write the tables to this Markdown file."""
    processes: int = 2
    """Compilers that run at once."""


@dataclass(frozen=True)
class Kernels:
    """The kernels of a language that walk rows.

    Attributes:
        language: they are written in.
        processors: a context in which a device of a target has so many.
    """

    language: str
    rms_norm: Any
    swiglu: Any
    cross_entropy: Any
    rotary: Any
    processors: Callable[[str, int], AbstractContextManager]


TRITON = Kernels("Triton", rms_norm, swiglu, cross_entropy, rotary, common.pretending)
CUDA = Kernels(
    "CUDA C++",
    cuda.rms_norm,
    cuda.swiglu,
    cuda.cross_entropy,
    cuda.rotary,
    lambda target, count: cuda.processors(count),
)

CUDA_TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
"""That nvcc compiles for: all that are NVIDIA's."""


@dataclass(frozen=True)
class Row:
    """One compiled kernel, and what it did where it was executed.

    Attributes:
        language: of the kernel.
        times: how often the counted launch makes the whole shape.
        least: bytes that have to move for the whole shape; None where no bar stands.
        formula: how `least` is made, n being the elements of the op's input.
        scattered: share of `least` that is a float32 for each token of a document. Documents begin anywhere, so these
            cannot move 16 bytes at a time.
    """

    language: str
    op: str
    kernel: str
    shape: str
    config: str
    resources: Resources
    counts: Counts | None = None
    times: float = 1.0
    least: float | None = None
    formula: str = ""
    scattered: float = 0.0


Bytes = Callable[[str, torch.dtype], float]


@dataclass(frozen=True)
class Case:
    """An op at a shape.

    Attributes:
        op: its name.
        shape: in words.
        launch: launches the kernels of a language for a target and a dtype, on a part of the shape.
        times: how often that part makes the whole, for a target.
        least: bytes that the whole has to move, by kernel, for a target and a dtype; none where no bar stands.
        formula: of `least`, by kernel; n are the bytes of the op's input.
        scattered: bytes of `least` that are a float32 for each token of a document, by kernel.
        counted: whether the kernels are executed where they can be.
        only: of what is launched, the one kernel that counts; empty for all.
        in_cuda: whether ``csrc/cuda`` has these kernels, too.
    """

    op: str
    shape: str
    launch: Callable[[Kernels, str, torch.dtype], None]
    times: Callable[[str], float] = lambda target: 1.0
    least: dict[str, Bytes] = field(default_factory=dict)
    formula: dict[str, str] = field(default_factory=dict)
    scattered: dict[str, Bytes] = field(default_factory=dict)
    counted: bool = True
    only: str = ""
    in_cuda: bool = True


def _processors(target: str) -> int:
    return TARGETS[target][1]


# ---- the ops ---------------------------------------------------------------------------------------------------------


def norm_forward(with_residual: bool) -> Case:
    """Four rows, a program each."""

    def launch(kernels: Kernels, target: str, dtype: torch.dtype) -> None:
        x, residual = (torch.randn(4, WIDTH).to(dtype) for _ in range(2))
        kernels.rms_norm.forward(x, residual if with_residual else None, torch.randn(WIDTH).to(dtype), 1e-5)

    tensors = 4 if with_residual else 2
    return Case(
        "rms_norm + residual" if with_residual else "rms_norm",
        f"{WIDTH} wide",
        launch,
        lambda target: TOKENS / 4,
        {"forward": lambda target, dtype: (tensors * TOKENS + 1) * WIDTH * dtype.itemsize + 4 * TOKENS},
        {"forward": f"{tensors}n, weight, rstd"},
    )


def norm_backward(with_residual: bool) -> Case:
    """The rows of one program, of as many programs as there are processors."""

    def launch(kernels: Kernels, target: str, dtype: torch.dtype) -> None:
        rows = -(-TOKENS // _processors(target))
        h, dy, dh = (torch.randn(rows, WIDTH).to(dtype) for _ in range(3))
        with kernels.processors(target, 1):
            kernels.rms_norm.backward(
                dy, dh if with_residual else None, h, torch.randn(WIDTH).to(dtype), torch.rand(rows), True
            )

    def least(target: str, dtype: torch.dtype) -> float:
        rows = (tensors * TOKENS + 1) * WIDTH * dtype.itemsize + 4 * TOKENS
        return rows + 4 * WIDTH * (_processors(target) + 1)

    tensors = 4 if with_residual else 3
    return Case(
        "rms_norm + residual" if with_residual else "rms_norm",
        f"{WIDTH} wide",
        launch,
        lambda target: TOKENS / -(-TOKENS // _processors(target)),
        {"backward": least},
        {"backward": f"{tensors}n, weight, rstd, a float32 dw for each processor, dw"},
        only="backward",
    )


def norm_parts() -> Case:
    """The second kernel of the backward, whole: its traffic counts for the first one, whose formula has no room."""

    def launch(kernels: Kernels, target: str, dtype: torch.dtype) -> None:
        rows, weight = torch.randn(_processors(target), WIDTH).to(dtype), torch.ones(WIDTH).to(dtype)
        with kernels.processors(target, _processors(target)):
            kernels.rms_norm.backward(rows, None, rows, weight, torch.ones(len(rows)), True)

    return Case("rms_norm", f"{WIDTH} wide", launch, only="sum_rows")


def swiglu_case() -> Case:
    """A few programs of each direction."""
    elements = 2**14

    def launch(kernels: Kernels, target: str, dtype: torch.dtype) -> None:
        gate, up, dy = (torch.randn(1, elements).to(dtype) for _ in range(3))
        kernels.swiglu.forward(gate, up)
        kernels.swiglu.backward(dy, gate, up)

    n = TOKENS * INNER
    return Case(
        "swiglu",
        f"{INNER} wide",
        launch,
        lambda target: n / elements,
        {
            "forward": lambda target, dtype: 3 * n * dtype.itemsize,
            "backward": lambda target, dtype: 5 * n * dtype.itemsize,
        },
        {"forward": "3n", "backward": "5n"},
    )


def rotary_case(head_dim: int) -> Case:
    """Four tokens; the backward is the same kernel."""

    def launch(kernels: Kernels, target: str, dtype: torch.dtype) -> None:
        q, k = (torch.randn(4, HEADS, head_dim).to(dtype) for _ in range(2))
        cos, sin = (torch.randn(4, head_dim).to(dtype) for _ in range(2))
        kernels.rotary.rotate(q, k, cos, sin, False, dtype, False)

    n = 2 * TOKENS * HEADS * head_dim
    return Case(
        "rotary",
        f"q and k, {HEADS} heads of {head_dim}",
        launch,
        lambda target: TOKENS / 4,
        {"rotary": lambda target, dtype: 2 * (n + TOKENS * head_dim) * dtype.itemsize},
        {"rotary": "2n, cos, sin"},
    )


def cross_entropy_case() -> Case:
    """Two rows."""
    options = {"ignore_index": -100, "label_smoothing": 0.0, "z_loss": 0.0, "softcap": 0.0}

    def launch(kernels: Kernels, target: str, dtype: torch.dtype) -> None:
        logits, labels = torch.randn(2, VOCABULARY).to(dtype), torch.tensor([5, 7])
        kernels.cross_entropy.forward(logits, labels, False, **options)
        kernels.cross_entropy.backward(torch.ones(2), logits, labels, torch.ones(2), **options)

    n = TOKENS * VOCABULARY
    return Case(
        "cross_entropy",
        f"{VOCABULARY} wide",
        launch,
        lambda target: TOKENS / 2,
        {
            "forward": lambda target, dtype: n * dtype.itemsize + TOKENS * (8 + 4 + 4),
            "backward": lambda target, dtype: 2 * n * dtype.itemsize + TOKENS * (8 + 4 + 4),
        },
        {"forward": "n, label, loss, lse", "backward": "2n, label, dloss, lse"},
    )


def loss_chunk_case() -> Case:
    """The loss of a chunk of `linear_cross_entropy`: the gradient goes over the logits, which the cache still has."""
    options = {"ignore_index": -100, "label_smoothing": 0.0, "z_loss": 0.0, "softcap": 0.0}

    def launch(kernels: Kernels, target: str, dtype: torch.dtype) -> None:
        logits, labels = torch.randn(2, VOCABULARY).to(dtype), torch.tensor([5, 7])
        kernels.cross_entropy.forward(logits, labels, False, torch.ones(2), logits, **options)

    n = TOKENS * VOCABULARY
    return Case(
        "linear_cross_entropy, loss chunk",
        f"{VOCABULARY} wide",
        launch,
        lambda target: TOKENS / 2,
        {"forward": lambda target, dtype: 2 * n * dtype.itemsize + TOKENS * (8 + 4 + 4 + 4)},
        {"forward": "2n, label, dloss, loss, lse"},
    )


OPTIONS = {
    "": attention.Options(True, 0, 0.0, 0.1),
    ", not causal": attention.Options(False, 0, 0.0, 0.1),
    ", window": attention.Options(True, 300, 0.0, 0.1),
    ", softcap": attention.Options(True, 0, 30.0, 0.1),
    ", window, softcap": attention.Options(True, 300, 30.0, 0.1),
}


def attention_case(head_dim: int, option: str = "") -> Case:
    """One document and one head, executed for the plain causal mask."""

    def launch(kernels: Kernels, target: str, dtype: torch.dtype) -> None:
        q, k, v, dout = (torch.randn(DOCUMENT, 1, head_dim).to(dtype) for _ in range(4))
        cu_seqlens, lse = torch.tensor([0, DOCUMENT], dtype=torch.int32), torch.zeros(1, DOCUMENT)
        attention.forward(q, k, v, cu_seqlens, cu_seqlens, OPTIONS[option])
        attention.backward(dout, None, q, k, v, q, lse, cu_seqlens, cu_seqlens, OPTIONS[option])

    documents = TOKENS // DOCUMENT * HEADS

    def needed(kind: str, fixed: int, walked: int, statistics: int, of_walked: int) -> Bytes:
        """Of every tile its rows of `fixed` tensors, and of `walked` tensors the rows that it sees, or that see it."""

        def total(target: str, dtype: torch.dtype) -> float:
            with common.pretending(target, 1):
                own = getattr(attention.tiles_for(torch.empty(1, 1, head_dim, dtype=dtype), OPTIONS[option]), kind).own
            row, bytes_needed = head_dim * dtype.itemsize, 0
            for start in range(0, DOCUMENT, own):
                rows = min(own, DOCUMENT - start)
                seen = DOCUMENT - start if kind == "dkdv" else start + rows
                bytes_needed += rows * (fixed * row + 4 * statistics) + seen * (walked * row + 4 * of_walked)
            return bytes_needed * documents

        return total

    least = {
        "forward": needed("forward", 2, 2, 1, 0),
        "dq": needed("dq", 3, 2, 2, 0),
        "dkdv": needed("dkdv", 4, 2, 0, 2),
        "delta": lambda target, dtype: TOKENS * HEADS * (2 * head_dim * dtype.itemsize + 4),
    }
    return Case(
        "attention",
        f"{HEADS} heads of {head_dim}{option}",
        launch,
        lambda target: documents,
        {} if option else least,
        {
            "forward": "of each tile q, out, lse; k, v that it sees",
            "dq": "of each tile q, dout, dq, lse, delta; k, v that it sees",
            "dkdv": "of each tile k, v, dk, dv; q, dout, lse, delta that see it",
            "delta": "out, dout, delta",
        },
        {
            "forward": needed("forward", 0, 0, 1, 0),
            "dq": needed("dq", 0, 0, 2, 0),
            "dkdv": needed("dkdv", 0, 0, 0, 2),
            "delta": lambda target, dtype: TOKENS * HEADS * 4,
        },
        counted=not option,
        in_cuda=False,
    )


def cases(head_dims: tuple[int, ...], every_option: bool) -> list[Case]:
    """Every kernel at LLaMA-2-7B's shapes."""
    rows = [norm_forward(False), norm_backward(False), norm_parts(), norm_forward(True), norm_backward(True)]
    rows += [swiglu_case(), rotary_case(128), cross_entropy_case(), loss_chunk_case()]
    options = OPTIONS if every_option else ("",)
    return rows + [attention_case(head_dim, option) for head_dim in head_dims for option in options]


# ---- compiling, executing --------------------------------------------------------------------------------------------


def rows_of(case: Case, target: str, dtype: torch.dtype, kernels: Kernels = TRITON) -> list[Row]:
    """Compiles the kernels of a case, and executes them where that is wanted and possible."""
    torch.manual_seed(0)
    if kernels is CUDA:
        return _cuda_rows_of(case, target, dtype)
    rows = []
    executed = case.counted and target in DEVICES and dtype.itemsize == 2

    def note(launch: Launch) -> None:
        kernel = launch.name.removesuffix("_kernel")
        if case.only not in ("", kernel):
            return
        sizes = {k: v for k, v in launch.arguments.items() if k in ("OWN", "BLOCK", "ROWS", "TOKENS")}
        meta = launch.compiled.metadata
        config = " ".join(f"{k.lower()} {v}" for k, v in sizes.items())
        config = f"{config}, {meta.num_warps} warps, {meta.num_stages} stages"
        counts = execute(launch) if executed else None
        rows.append(_row(case, "Triton", kernel, config, resources(launch.compiled), counts, target, dtype))

    with recording(target, note):
        case.launch(kernels, target, dtype)
    return rows


def _row(
    case: Case,
    language: str,
    kernel: str,
    config: str,
    resources: Resources,
    counts: Counts | None,
    target: str,
    dtype: torch.dtype,
) -> Row:
    least, scattered = case.least.get(kernel), case.scattered.get(kernel)
    return Row(
        language,
        case.op,
        kernel,
        case.shape,
        config,
        resources,
        counts,
        case.times(target),
        least(target, dtype) if least else None,
        case.formula.get(kernel, ""),
        scattered(target, dtype) / least(target, dtype) if least and scattered else 0.0,
    )


def _cuda_rows_of(case: Case, target: str, dtype: torch.dtype) -> list[Row]:
    """The same for ``csrc/cuda``: its launchers decide which kernels run."""
    executed = case.counted and target == "sm_80" and dtype.itemsize == 2
    with cuda.simulated(execute=False) as launches:
        case.launch(CUDA, target, dtype)
    rows = []
    for launch in launches:
        name, _, variant = launch.name.removesuffix(">").partition("<")
        kernel = name.removesuffix("_kernel")
        kernel = "forward" if kernel.endswith("_fwd") else "backward" if kernel.endswith("_bwd") else kernel
        if case.only not in ("", kernel):
            continue
        x, y, _ = launch.block
        resources = nvcc.compiled(target)[launch.name].resources(x * y, launch.shared)
        config = f"{x} x {y} threads, {variant}"
        counts = launch.execute() if executed else None
        rows.append(_row(case, "CUDA C++", kernel, config, resources, counts, target, dtype))
    return rows


def traffic(target: str, row: Row, rows: list[Row]) -> float:
    """Bytes that the whole shape moves: the distinct sectors of each program, the weight's once a processor.

    The kernel that sums the parts of dw counts for the backward of rms_norm.
    """
    assert row.counts is not None
    weight = row.counts.loaded["weight"]
    cached = min(weight * row.times, weight / row.counts.ctas * _processors(target))
    moved = (row.counts.traffic - weight) * row.times + cached
    if row.op.startswith("rms_norm") and row.kernel == "backward":
        moved += next(
            r.counts.traffic for r in rows if (r.language, r.kernel) == (row.language, "sum_rows") and r.counts
        )
    return moved


def wide_share(counts: Counts) -> float:
    """Share of the bytes of global memory that requests move 16 at a time; what many lanes ask for counts once."""
    return (counts.loads.wide_bytes + counts.stores.wide_bytes) / (
        counts.loads.unique_bytes + counts.stores.unique_bytes
    )


def broken_bars(target: str, dtype: torch.dtype, row: Row, rows: list[Row]) -> list[str]:
    """What is wrong with a kernel."""
    r, wrong = row.resources, []
    if r.stack or r.spills:
        wrong.append(f"stack {r.stack} bytes, spills {r.spills} bytes")
    if r.shared > SHARED_LIMIT[target] * 1024:
        wrong.append(f"shared memory {r.shared} bytes, past {SHARED_LIMIT[target]} KiB")
    if r.widest < 128:
        wrong.append(f"its widest load has {r.widest} bits")
    products = row.op == "attention" and row.kernel in ("forward", "dq", "dkdv") and dtype.itemsize == 2
    if products and not r.count(*TENSOR_CORES.get(target, ("HMMA",))):
        wrong.append("no tensor-core instruction of this generation")
    if products and target in ("sm_80", "sm_89") and not r.count("LDGSTS"):
        wrong.append("no asynchronous copy")
    if row.counts is not None:
        wrong += broken_counts(target, row, rows)
    return [f"{target}: {row.language}, {row.op} {row.kernel}, {row.shape}, {row.config}: {what}" for what in wrong]


def broken_counts(target: str, row: Row, rows: list[Row]) -> list[str]:
    """What is wrong with what a kernel did."""
    counts, wrong, of_rows, strict = row.counts, [], row.op != "attention", row.language != "Triton"
    assert counts is not None
    used = 0.98 if strict else 0.95
    if row.least is not None:
        ratio, allowed = traffic(target, row, rows) / row.least, (1.02 if strict else 1.05) if of_rows else 1.15
        if ratio > allowed:
            wrong.append(f"traffic {ratio:.3f} times its formula ({row.formula}); at most {allowed}")
    for name, requests in (("loads", counts.loads), ("stores", counts.stores)):
        if of_rows and requests.efficiency < used:
            wrong.append(f"{name} use {requests.efficiency:.1%} of their sectors; at least {used:.0%}")
    for name, requests in (("loads", counts.shared_loads), ("stores", counts.shared_stores)):
        if requests.conflicts > 0.1:
            wrong.append(f"{requests.conflicts:.2f} bank conflicts a request of shared {name}; at most 0.1")
    wide = 0.95 if of_rows else 0.99 * (1 - row.scattered)
    if row.least is not None and wide_share(counts) < wide:
        wrong.append(f"{wide_share(counts):.1%} of its global bytes move 16 at a time; at least {wide:.1%}")
    return wrong


def broken_variants(target: str) -> list[str]:
    """What is wrong with the kernels of ``csrc/cuda``, those that no case launches among them."""
    found = {name: kernel.resources(0, 0) for name, kernel in nvcc.compiled(target).items()}
    return [
        f"{target}: CUDA C++, {name}: stack {r.stack} bytes, spills {r.spills} bytes"
        for name, r in found.items()
        if r.stack or r.spills
    ]


# ---- tables ----------------------------------------------------------------------------------------------------------

STATIC = (
    "language", "op", "kernel", "shape", "config", "registers", "stack", "spills", "shared", "at once", "tensor",
    "widest", "code",
)  # fmt: skip
COUNTED = (
    "language", "op", "kernel", "shape", "MB", "x formula", "formula", "sectors used", "16-byte", "conflicts", "limit",
    "bound us",
    *(f"{unit} kcycles" for unit in UNITS),
)  # fmt: skip
WORDS = 5
"""Columns of words, on the left."""


def static_cells(target: str, row: Row) -> tuple[str, ...]:
    """A row of the table of what was compiled."""
    r = row.resources
    tensor = r.count("HMMA", "HGMMA", "UTCHMMA", "v_mfma")
    numbers = (r.registers, r.stack, r.spills, r.shared, programs_at_once(target, r), tensor, r.widest)
    return (
        row.language,
        row.op,
        row.kernel,
        row.shape,
        row.config,
        *map(str, (*numbers, sum(r.instructions.values()))),
    )


def counted_cells(target: str, row: Row, rows: list[Row]) -> tuple[str, ...]:
    """A row of the table of what was executed."""
    counts, device = row.counts, DEVICES[target]
    assert counts is not None
    moved = traffic(target, row, rows)
    needs = cycles(counts, device, row.times)
    limit, microseconds = bound(needs, device)
    used = (counts.loads.fewest_units + counts.stores.fewest_units) / max(1, counts.loads.units + counts.stores.units)
    conflicts = max(counts.shared_loads.conflicts, counts.shared_stores.conflicts)
    return (
        row.language, row.op, row.kernel, row.shape, f"{moved / 1e6:.1f}",
        f"{moved / row.least:.3f}" if row.least else "-",
        row.formula or "-", f"{used:.1%}", f"{wide_share(counts):.1%}", f"{conflicts:.2f}", limit,
        f"{microseconds:.1f}", *(f"{needs[unit] / 1e3:.1f}" for unit in UNITS),
    )  # fmt: skip


def printed(title: str, headings: tuple[str, ...], rows: list[tuple[str, ...]], console: Console) -> list[str]:
    """Prints a table, and returns it as Markdown."""
    table = Table(title=title)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i < WORDS else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    lines = [headings, ("---",) * len(headings), *rows]
    return [f"## {title}", "", *("| " + " | ".join(line) + " |" for line in lines), ""]


INTRODUCTION = """# What the kernels become on a GPU

Printed by `make gpu-static`, on a machine without a GPU: counted, not measured. It fails where a bar breaks.
`python -m benchmarks.gpu_static --help` explains how; `benchmarks/gpu_bound.py` has the rates of the units, with their
sources.

- Compiled: registers of a thread, bytes of stack, spills and shared memory, programs that a processor holds at once,
  tensor-core instructions in the code, bits of the widest load, instructions in the code.
- Executed: 4,096 tokens of LLaMA-2-7B, attention in documents of 512. MB are the distinct 32-byte sectors of every
  program, added up; beside them the formula of what has to move, n being the bytes of the op's main input. Sectors
  used: of what the requests of warps touch. 16-byte: share of the bytes that move in accesses of 16. Conflicts: passes
  over the banks of shared memory beyond the fewest, a request. Then the cycles that each unit of every processor needs,
  and the unit that limits: a bound, not a time.
"""


def compile_all(arguments: Arguments, console: Console) -> dict[tuple[str, str], list[Row]]:
    """The rows of every target and dtype."""
    every_case = cases(arguments.head_dims, arguments.every_option)
    jobs = [
        (case_index, target, dtype, language, arguments.head_dims, arguments.every_option)
        for target in arguments.targets
        for dtype in arguments.dtypes
        for case_index, case in enumerate(every_case)
        for language in languages(case, target)
    ]
    found: dict[tuple[str, str], list[Row]] = {}
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        done = track(pool.imap(_job, jobs), "compiling, executing", total=len(jobs), console=console, transient=True)
        for (_, target, dtype, *_), rows in zip(jobs, done, strict=True):
            found.setdefault((target, dtype), []).extend(rows)
    return found


def languages(case: Case, target: str) -> list[str]:
    """Those that a case's kernels are written in and compiled from, for a target."""
    in_cuda = case.in_cuda and target in CUDA_TARGETS and nvcc.missing() is None
    return ["Triton", "CUDA C++"] if in_cuda else ["Triton"]


def _job(job: tuple[int, str, str, str, tuple[int, ...], bool]) -> list[Row]:
    index, target, dtype, language, head_dims, every_option = job
    torch.set_num_threads(1)
    kernels = TRITON if language == "Triton" else CUDA
    return rows_of(cases(head_dims, every_option)[index], target, getattr(torch, dtype), kernels)


def main(arguments: Arguments) -> None:
    """Compiles, executes, prints, and exits with 1 where a bar breaks."""
    for target in arguments.targets:
        if target not in TARGETS:
            raise SystemExit(f"--targets: got {target!r}; takes {', '.join(TARGETS)}")
    console = Console(width=260, highlight=False)
    header = f"triton {version('triton')}, torch {version('torch')}, {commit()}; counted, not measured"
    console.print(header)
    broken: list[str] = []
    if reason := nvcc.missing():
        console.print(f"Without the kernels of csrc/cuda: {reason}.")
    else:  # here, so that processes do not compile the same
        cuda.build()
        for target in track(arguments.targets, "compiling csrc/cuda", console=console, transient=True):
            if target in CUDA_TARGETS:
                broken += broken_variants(target)
    text = [INTRODUCTION, header + ".", ""]
    for (target, dtype), rows in compile_all(arguments, console).items():
        for row in rows:
            broken += broken_bars(target, getattr(torch, dtype), row, rows)
        if dtype != arguments.dtypes[0]:
            text.append(f"{target}, {dtype}: {len(rows)} kernels compiled.\n")
            console.print(text[-1])
            continue
        text += printed(f"{target}, {dtype}: compiled", STATIC, [static_cells(target, r) for r in rows], console)
        executed = [row for row in rows if row.counts is not None]
        if executed:
            title = f"{target} ({DEVICES[target].name}), {dtype}: executed"
            text += printed(title, COUNTED, [counted_cells(target, r, rows) for r in executed], console)
    text += [f"Broken bars: {len(broken)}.", *(f"- {line}" for line in broken), ""]
    if arguments.out:
        arguments.out.write_text("\n".join(text))
    for line in broken:
        console.print(f"BROKEN  {line}")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
