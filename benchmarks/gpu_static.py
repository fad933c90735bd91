"""What the Triton kernels become on GPUs that are not here: registers, shared memory, tensor-core instructions.

    python -m benchmarks.gpu_static                        # every kernel, every target; minutes the first time
    python -m benchmarks.gpu_static --targets sm_90        # one of them
    python -m benchmarks.gpu_static --out docs/gpu-static.md

Every kernel is compiled ahead of time with the specialisation and the config with which it is launched at LLaMA-2's
shapes, and its machine code is read. These are counts, not times. The program fails where a bar breaks: registers that
spill to memory, a stack, shared memory past the device's limit, loads narrower than 128 bits, attention without the
tensor cores of its generation.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.ahead_of_time import TARGETS, Launch, Resources, recording, resources
from benchmarks.harness import commit
from lemur_fast.kernels import attention, cross_entropy, rms_norm, rotary, swiglu

SHARED_LIMIT = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
"""KiB of shared memory that a program may have. Sources: CUDA C++ Programming Guide, table of compute capabilities; AMD
CDNA 3 ISA."""

REGISTERS = {"sm_80": 65536, "sm_90": 65536, "sm_100": 65536, "sm_120": 65536, "gfx942": 131072}
"""Registers of a processor, and the most threads it holds, from the same tables."""

THREADS = {"sm_80": 2048, "sm_90": 2048, "sm_100": 2048, "sm_120": 1536, "gfx942": 2048}

TENSOR_CORES = {"sm_80": ("HMMA",), "sm_90": ("HGMMA",), "sm_100": ("UTCHMMA", "HMMA"), "sm_120": ("HMMA",)}
"""Instructions by which products run on the tensor cores of each generation; on gfx942 they are v_mfma."""


@dataclass
class Arguments:
    """Compiles every kernel for every target and prints what became of it."""

    targets: tuple[str, ...] = tuple(TARGETS)
    """Architectures."""
    out: Path | None = None
    """Also write the tables to this Markdown file."""
    head_dims: tuple[int, ...] = (64, 96, 128, 256)
    """Head dimensions for attention."""
    dtypes: tuple[str, ...] = ("bfloat16",)
    """Dtypes of the inputs."""
    every_option: bool = False
    """Attention with windows, softcaps and without a causal mask, too."""


@dataclass(frozen=True)
class Row:
    """One compiled kernel."""

    op: str
    kernel: str
    shape: str
    config: str
    resources: Resources


def programs_at_once(target: str, r: Resources) -> int:
    """Programs that one processor holds, by its registers, threads and shared memory."""
    by_registers = REGISTERS[target] // (max(r.registers, 1) * r.threads)
    by_shared = SHARED_LIMIT[target] * 1024 // (r.shared + 1024)
    return min(by_registers, THREADS[target] // r.threads, by_shared, 32)


def launches(target: str, dtype: torch.dtype, head_dims: tuple[int, ...], every_option: bool) -> Iterator[Row]:
    """Every kernel at the shapes of LLaMA-2-7B; few rows, because nothing runs."""

    def rows(op: str, shape: str, recorded: list[Launch]) -> Iterator[Row]:
        for launch in recorded:
            sizes = {k: v for k, v in launch.arguments.items() if k in ("OWN", "BLOCK", "ROWS", "TOKENS", "HEADS")}
            if op == "attention":
                sizes.pop("HEADS", None)
            meta = launch.compiled.metadata
            config = " ".join(f"{k.lower()} {v}" for k, v in sizes.items())
            config += f", {meta.num_warps} warps, {meta.num_stages} stages"
            yield Row(op, launch.name.removesuffix("_kernel"), shape, config, resources(launch.compiled))

    x, w, stat = torch.empty(64, 4096, dtype=dtype), torch.empty(4096, dtype=dtype), torch.empty(64)
    with recording(target) as recorded:
        rms_norm.forward(x, None, w, 1e-5)
        rms_norm.backward(x, None, x, w, stat, True)
        yield from rows("rms_norm", "4096", recorded)
    with recording(target) as recorded:
        rms_norm.forward(x, x, w, 1e-5)
        rms_norm.backward(x, x, x, w, stat, True)
        yield from (row for row in rows("rms_norm + residual", "4096", recorded) if row.kernel != "sum_rows")
    with recording(target) as recorded:
        swiglu.forward(x, x)
        swiglu.backward(x, x, x)
        yield from rows("swiglu", "4096", recorded)
    q, table = torch.empty(64, 32, 128, dtype=dtype), torch.empty(64, 128, dtype=dtype)
    with recording(target) as recorded:
        rotary.rotate(q, q, table, table, False, dtype, False)
        yield from rows("rotary", "32 heads of 128", recorded)
    logits, labels = torch.empty(64, 32000, dtype=dtype), torch.zeros(64, dtype=torch.int64)
    options = {"ignore_index": -100, "label_smoothing": 0.0, "z_loss": 0.0, "softcap": 0.0}
    with recording(target) as recorded:
        cross_entropy.forward(logits, labels, False, **options)
        cross_entropy.backward(stat, logits, labels, stat, **options)
        yield from rows("cross_entropy", "32000", recorded)
    with recording(target) as recorded:
        cross_entropy.forward(logits, labels, False, stat, logits, **options)
        yield from rows("linear_cross_entropy", "32000", recorded)
    cu_seqlens = torch.zeros(9, dtype=torch.int32)
    plain = attention.Options(True, 0, 0.0, 0.1)
    asked = {"": plain}
    if every_option:
        asked |= {", all": plain._replace(causal=False), ", window": plain._replace(window=1000)}
        asked |= {", softcap": plain._replace(softcap=30.0)}
    for head_dim in head_dims:
        q, lse = torch.empty(64, 32, head_dim, dtype=dtype), torch.empty(32, 64)
        for name, chosen in asked.items():
            with recording(target) as recorded:
                attention.forward(q, q, q, cu_seqlens, cu_seqlens, chosen)
                attention.backward(q, None, q, q, q, q, lse, cu_seqlens, cu_seqlens, chosen)
                yield from rows("attention", f"heads of {head_dim}{name}", recorded)


def broken_bars(target: str, row: Row) -> list[str]:
    """What is wrong with a kernel."""
    r, wrong = row.resources, []
    if r.stack or r.spills:
        wrong.append(f"stack {r.stack} bytes, spills {r.spills} bytes")
    if r.shared > SHARED_LIMIT[target] * 1024:
        wrong.append(f"shared memory {r.shared} bytes, past {SHARED_LIMIT[target]} KiB")
    if r.widest < 128:
        wrong.append(f"its widest load has {r.widest} bits")
    products = row.kernel in ("forward", "dq", "dkdv") and row.op == "attention"
    if products and not r.count(*TENSOR_CORES.get(target, ("v_mfma",))):
        wrong.append("no tensor-core instruction of this generation")
    if products and target == "sm_80" and not r.count("LDGSTS"):
        wrong.append("no asynchronous copy")
    return [f"{target}: {row.op} {row.kernel}, {row.shape}, {row.config}: {what}" for what in wrong]


HEADINGS = (
    "op",
    "kernel",
    "shape",
    "config",
    "regs",
    "stack",
    "spill",
    "shared",
    "at once",
    "tensor",
    "widest",
    "code",
)


def cells(target: str, row: Row) -> tuple[str, ...]:
    """A row of the table."""
    r = row.resources
    tensor = r.count("HMMA", "HGMMA", "UTCHMMA", "v_mfma")
    numbers = (r.registers, r.stack, r.spills, r.shared, programs_at_once(target, r), tensor, r.widest)
    return (row.op, row.kernel, row.shape, row.config, *map(str, (*numbers, sum(r.instructions.values()))))


def main(arguments: Arguments) -> None:
    """Compiles, prints, and exits with 1 where a bar breaks."""
    console = Console(width=170, highlight=False)
    header = f"triton {version('triton')}, torch {version('torch')}, {commit()}; counted, not measured"
    console.print(header)
    broken: list[str] = []
    text = [
        "# What the Triton kernels become on a GPU",
        "",
        "`python -m benchmarks.gpu_static --out docs/gpu-static.md`",
    ]
    text += ["", header + ".", ""]
    for target in arguments.targets:
        if target not in TARGETS:
            raise SystemExit(f"--targets: got {target!r}; takes {', '.join(TARGETS)}")
        for dtype in arguments.dtypes:
            table = Table(title=f"{target}, {dtype}")
            for heading in HEADINGS:
                table.add_column(heading, justify="left" if heading in HEADINGS[:4] else "right", no_wrap=True)
            found = launches(target, getattr(torch, dtype), arguments.head_dims, arguments.every_option)
            text += [f"## {target}, {dtype}", "", "| " + " | ".join(HEADINGS) + " |", "|---" * len(HEADINGS) + "|"]
            for row in track(found, f"compiling for {target}", console=console, transient=True):
                table.add_row(*cells(target, row))
                text.append("| " + " | ".join(cells(target, row)) + " |")
                broken += broken_bars(target, row)
            text.append("")
            console.print(table)
    if arguments.out:
        arguments.out.write_text("\n".join(text))
    for line in broken:
        console.print(f"BROKEN  {line}")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
