"""Attention over packed documents, forward and backward, side by side, over patterns of lengths.

    python -m benchmarks.attention                      # 4096 tokens, 8 heads of 64, three minutes
    python -m benchmarks.attention --device cuda --tokens 16384 --heads 32 --kv-heads 32 --head-dim 128

Rivals are those of `benchmarks.peers`, on the same tensors; one that cannot run is named with its reason. "fresh" draws
new lengths for every step, as training does; "repeated" runs the same lengths again. What a rival prepares once a batch
for all layers (a mask, the longest length) is not timed. The FLOPs counted are those of the pairs that the causal mask
leaves inside documents, 4 D a pair and head forward and 2.5 times that backward, and the bytes those of the tensors
that are read and written. The slower of the two bounds a pattern, FLOPs at the rate of a large matrix product or bytes
at that of a copy, and the share shown is of that one. Output and gradients of each are checked against float64, on the
pattern itself, before it is timed: a wrong one prints no time. On a CPU malloc keeps what is freed, for every rival
alike, as a training step has it: clearing fresh memory for results takes half as long as documents of 35 tokens do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks import peers
from benchmarks.harness import (
    Row,
    command_line,
    copy_rate,
    dtype_to_measure,
    keep_freed_memory,
    machine_and_dtype,
    matrix_peak,
    phases_in_turns,
    write_rows,
)
from benchmarks.peers import Documents, forward_only
from benchmarks.report import share_of

OURS, PEER = "lemur_fast", "a document at a time"
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.02, "float16": 0.005}
"""Relative error of a whole tensor."""
MASKED_AT_MOST = 16384
"""Tokens; a mask [T, T] of more is more than anyone would hold."""


@dataclass
class Arguments:
    """Times attention over packed documents."""

    tokens: int = 4096
    """Tokens in the packed row."""
    heads: int = 8
    """Query heads."""
    kv_heads: int = 8
    """Key heads; must divide the query heads."""
    head_dim: int = 64
    """Dimensions of a head."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Of queries, keys and values; auto is bfloat16, or float32 on a CPU that only emulates it."""
    device: str = "cpu"
    """Where: cpu or cuda."""
    steps: int = 7
    """Timed steps of each rival."""
    seconds: float = 20.0
    """Budget for one pattern: where all rivals take longer there are fewer steps, but at least three."""
    only: tuple[str, ...] = ()
    """Parts of the names of the rivals to run, beside lemur_fast; all by default."""
    json: Path | None = None
    """Also write a JSON line for each rival, pattern and direction."""

    def __post_init__(self) -> None:
        self.dtype = dtype_to_measure(self.dtype, self.device)  # type: ignore[assignment]


def uniform(tokens: int, generator: torch.Generator) -> list[int]:
    """Documents of similar lengths, about 250 tokens."""
    return _filled(tokens, lambda: int(torch.randint(200, 313, (), generator=generator)))


def long_tail(tokens: int, generator: torch.Generator) -> list[int]:
    """Many short documents and a few long ones: log-normal lengths, as text has."""
    return _filled(tokens, lambda: max(1, int(torch.exp(5 + 1.2 * torch.randn((), generator=generator)))))


def one_giant(tokens: int, generator: torch.Generator) -> list[int]:
    """One document of nearly the whole row, and a remainder."""
    giant = tokens - int(torch.randint(1, tokens // 8, (), generator=generator))
    return [giant, tokens - giant]


def many_tiny(tokens: int, generator: torch.Generator) -> list[int]:
    """Documents of 10 to 60 tokens."""
    return _filled(tokens, lambda: int(torch.randint(10, 61, (), generator=generator)))


def _filled(tokens: int, draw: Callable[[], int]) -> list[int]:
    lengths: list[int] = []
    while sum(lengths) < tokens:
        lengths.append(min(draw(), tokens - sum(lengths)))
    return lengths


PATTERNS = (uniform, long_tail, one_giant, many_tiny)

# ---- correctness -----------------------------------------------------------------------------------------------------


def exact(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> list[Tensor]:
    """Output and gradients in float64 for a gradient of ones: softmax over each document, written out by hand.

    One head at a time: the scores of a long document, of all heads, are more than a GPU holds.
    """
    q, k, v = (x.detach().double() for x in (q, k, v))
    out, dq, dk, dv = torch.empty_like(q), torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    first = 0
    for length in lengths:
        rows = slice(first, first + length)
        hidden = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        for head in range(q.shape[1]):
            shared = head * k.shape[1] // q.shape[1]
            here = [x[rows, h].clone().requires_grad_() for x, h in ((q, head), (k, shared), (v, shared))]
            scores = here[0] @ here[1].T * q.shape[-1] ** -0.5
            result = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ here[2]
            gradients = torch.autograd.grad(result.sum(), here)
            out[rows, head], dq[rows, head] = result.detach(), gradients[0]
            dk[rows, shared] += gradients[1]
            dv[rows, shared] += gradients[2]
        first += length
    return [out, dq, dk, dv]


def check(function: Callable, inputs: list[Tensor], right: list[Tensor], dtype: str, backward: bool = True) -> str:
    """What is wrong with a rival; nothing when it is right."""
    try:
        out = function(*(inputs if backward else [x.detach() for x in inputs]))
        got = [out.detach(), *(torch.autograd.grad(out, inputs, torch.ones_like(out)) if backward else ())]
    except Exception as error:  # whatever a rival fails by, the others are measured
        return peers.failure(error)
    for what, a, b in zip(("out", "dq", "dk", "dv"), got, right, strict=False):
        error = float((a.double() - b).norm() / b.norm())
        if not error < TOLERANCE[dtype]:
            return f"wrong: relative error of {what} is {error:.1e}"
    return ""


# ---- a pattern -------------------------------------------------------------------------------------------------------


@dataclass
class Batches:
    """Attention of every rival over the documents of the step, prepared before the step is timed.

    Attributes:
        draw: lengths of the next step.
        device: where.
        fresh: whether lengths change at every step.
    """

    draw: Callable[[], list[int]]
    device: torch.device
    fresh: bool
    documents: list[Documents] = field(default_factory=list)
    _current: dict[str, Callable] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def next(self) -> dict[str, Callable]:
        """Rival -> its attention over the next documents."""
        if self.fresh or not self.documents:
            self.documents.append(Documents.of(self.draw(), self.device))
            self._current, self.missing = peers.attentions(self.documents[-1])
        return self._current


def bytes_moved(arguments: Arguments) -> tuple[int, int]:
    """Of tensors that are read and written, forward (q, k, v; out) and backward (q, k, v, out, dout; dq, dk, dv)."""
    size = arguments.tokens * arguments.head_dim * getattr(torch, arguments.dtype).itemsize
    q, kv = size * arguments.heads, size * arguments.kv_heads
    return 2 * q + 2 * kv, 4 * q + 4 * kv


def measure(pattern: Callable, fresh: bool, arguments: Arguments, peak: float, copy: float) -> list[Row]:
    """Rows of all rivals over one pattern, in every direction; `peak` FLOP/s of a product, `copy` bytes/s of a copy."""
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    shapes = [(arguments.tokens, h, arguments.head_dim) for h in (arguments.heads, *[arguments.kv_heads] * 2)]
    inputs = [torch.randn(shape).to(device, dtype).requires_grad_() for shape in shapes]
    batches = Batches(lambda: pattern(arguments.tokens, generator), device, fresh)
    rivals = batches.next()
    errors = dict(batches.missing)
    if arguments.tokens > MASKED_AT_MOST:
        errors["whole row, masked"] = f"a mask of {arguments.tokens} x {arguments.tokens} was not tried"
    for name in rivals:
        if arguments.only and name != OURS and not any(part in name for part in arguments.only):
            errors.setdefault(name, "not asked for")
    right = exact(*inputs, batches.documents[-1].lengths)
    for name, function in rivals.items():
        if name not in errors:
            why = check(function, inputs, right, arguments.dtype, not forward_only(name, device))
            errors |= {name: why} if why else {}
    del right
    running = [name for name in rivals if name not in errors]
    step: dict[str, Callable] = {}

    def run_of(name: str) -> Callable[[Callable[[], None]], None]:
        backward = not forward_only(name, device)
        given = inputs if backward else [x.detach() for x in inputs]

        def run(mark: Callable[[], None]) -> None:
            out = step[name](*given)
            mark()
            if backward:
                torch.autograd.grad(out, inputs, torch.ones_like(out))
                mark()

        return run

    # A round at a time, for each round has documents of its own.
    seconds: dict[str, list[list[float]]] = {name: [] for name in running}
    pairs, spent = [], 0.0
    for number in range(-2, arguments.steps):
        step.update(batches.next())
        timings = phases_in_turns({n: run_of(n) for n in running}, device=device, rounds=1, warmup=0)
        if number >= 0:
            pairs.append(batches.documents[-1].pairs)
            for name, timing in timings.items():
                seconds[name].append([phase[0] for phase in timing.seconds])
            spent += sum(sum(rounds[-1]) for rounds in seconds.values())
            if spent > arguments.seconds and number >= 2:
                break
    forward = 4.0 * arguments.head_dim * arguments.heads * sum(pairs) / max(len(pairs), 1)
    shape = f"{arguments.tokens} x {arguments.heads} x {arguments.head_dim}"
    if arguments.kv_heads != arguments.heads:
        shape = f"{arguments.tokens} x ({arguments.heads} + {arguments.kv_heads}) x {arguments.head_dim}"
    rows = []
    there, back = bytes_moved(arguments)
    for place, (direction, flops, moved) in enumerate(
        (("forward", forward, there), ("backward", 2.5 * forward, back), ("both", 3.5 * forward, there + back))
    ):
        for name in peers.ATTENTION:
            case = f"{pattern.__name__.replace('_', ' ')}, {'fresh' if fresh else 'repeated'}"
            row = Row("attention", case, name, shape, direction, arguments.dtype, error=errors.get(name, ""))
            row.flops, row.bytes = flops, moved
            if moved / copy > flops / peak:
                row.copy_seconds = moved / copy
            else:
                row.peak_flops = peak
            if name in seconds:
                if place and forward_only(name, device):
                    row.error = forward_only(name, device)
                else:
                    row.seconds = [sum(phases) if place == 2 else phases[place] for phases in seconds[name]]
            rows.append(row)
    return rows


# ---- the table -------------------------------------------------------------------------------------------------------


def table(rows: list[Row], arguments: Arguments) -> Table:
    """Milliseconds by pattern and direction."""
    names = [n for n in dict.fromkeys(row.rival for row in rows) if any(r.rival == n and r.median for r in rows)]
    title = f"attention, {arguments.tokens} tokens, {arguments.heads} heads of {arguments.head_dim}, {arguments.dtype}"
    result = Table(title=f"{title}: median ms")
    for heading in ("lengths", "", *names, f"x {PEER}", "share"):
        result.add_column(heading, justify="left" if heading in ("lengths", "") else "right", no_wrap=True)
    groups: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        groups.setdefault(row.group, {})[row.rival] = row
    for group in groups.values():
        ours, peer = group[OURS], group[PEER]
        medians = [group[name].median for name in names]
        cells = ["-" if median is None else f"{1e3 * median:.3g}" for median in medians]
        ratio = f"{peer.median / ours.median:.1f}" if peer.median and ours.median else ""
        share = share_of(vars(ours) | {name: getattr(ours, name) for name in ("share_of_copy", "share_of_peak")})
        result.add_row(ours.case, ours.direction, *cells, ratio, share)
    return result


def main(arguments: Arguments) -> list[Row]:
    """Measures and prints."""
    console = Console(width=150, highlight=False)
    device = torch.device(arguments.device)
    if arguments.kv_heads < 1 or arguments.heads % arguments.kv_heads:
        raise SystemExit(f"--kv-heads: got {arguments.kv_heads}; must divide --heads, which is {arguments.heads}")
    console.print(machine_and_dtype(arguments.dtype, device))
    if device.type == "cpu":
        console.print(keep_freed_memory())
    peak, copy = matrix_peak(getattr(torch, arguments.dtype), device), copy_rate(sum(bytes_moved(arguments)), device)
    console.print(
        f"a large matrix product: {peak / 1e9:,.0f} GFLOP/s; a copy: {copy / 1e9:,.1f} GB/s, read and written"
    )
    rows: list[Row] = []
    todo = [(pattern, fresh) for pattern in PATTERNS for fresh in (True, False)]
    for pattern, fresh in track(todo, "measuring", console=console, transient=True):
        rows += measure(pattern, fresh, arguments, peak, copy)
        if arguments.json:
            write_rows(arguments.json, rows, device)
    console.print(table(rows, arguments))
    for line in dict.fromkeys(f"{r.rival}: {r.error}" for r in rows if r.error and r.error != "not asked for"):
        console.print(f"  {line}")
    return rows


if __name__ == "__main__":
    main(command_line(Arguments, __doc__))
