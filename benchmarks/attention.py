"""Attention over packed documents whose lengths change at every step: forward and backward, in turns.

    python -m benchmarks.attention                      # bfloat16, 4096 tokens, 8 heads of 64, about two minutes

Rivals, on the same tensors: lemur_fast; torch's scaled_dot_product_attention a document at a time; the same over the
whole row with a mask [T, T], as stock Hugging Face does. "fresh" draws new lengths for every step, as training does;
"repeated" runs the same lengths again. Output and gradients of each are checked against lemur_fast's reference before
any is timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import lemur_fast as lf
from benchmarks.harness import machine


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
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of queries, keys and values."""
    steps: int = 7
    """Timed steps of each rival."""


def uniform(tokens: int, generator: torch.Generator) -> list[int]:
    """About 16 documents of similar lengths."""
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


def a_document_at_a_time(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Runs torch's attention on each document alone, at its exact length."""
    outs = []
    for start, end in pairwise(cu_seqlens.tolist()):
        heads_first = [x[None, start:end].transpose(1, 2) for x in (q, k, v)]
        outs.append(scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(outs)


def whole_row_masked(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Runs torch's attention over the whole row with a block-diagonal mask."""
    place = torch.arange(q.shape[0])
    document = torch.bucketize(place, cu_seqlens[1:], right=True)
    mask = (document[:, None] == document[None]) & (place[:, None] >= place[None])
    heads_first = [x[None].transpose(1, 2) for x in (q, k, v)]
    return scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)


RIVALS: dict[str, Callable] = {
    "lemur_fast": lf.ops.attention,
    "a document at a time": a_document_at_a_time,
    "whole row, masked": whole_row_masked,
}


def forward_backward(rival: Callable, inputs: list[Tensor], cu_seqlens: Tensor) -> list[Tensor]:
    """Output and gradients, for an incoming gradient of ones."""
    out = rival(*inputs, cu_seqlens)
    return [out.detach(), *torch.autograd.grad(out, inputs, torch.ones_like(out))]


def check(name: str, got: list[Tensor], exact: list[Tensor]) -> None:
    """Stops the benchmark when a rival is wrong: its time would mean nothing."""
    for what, a, b in zip(("out", "dq", "dk", "dv"), got, exact, strict=True):
        error = float((a.float() - b.float()).norm() / b.float().norm())
        if not error < 0.02:
            raise SystemExit(f"{name}: relative error of {what} is {error:.3g}; nothing was timed")


def main(arguments: Arguments) -> None:
    """Measures and prints."""
    console = Console(width=110, highlight=False)
    console.print(machine())
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    shapes = [(arguments.tokens, h, arguments.head_dim) for h in (arguments.heads, *[arguments.kv_heads] * 2)]
    inputs = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    table = Table(title=f"attention forward + backward, {arguments.tokens} tokens, {arguments.dtype}, median ms")
    for heading in ("lengths", "", *RIVALS, "x a document at a time"):
        table.add_column(heading, justify="left" if heading in ("lengths", "") else "right", no_wrap=True)
    for pattern in track((uniform, long_tail, one_giant, many_tiny), "measuring", console=console, transient=True):
        for fresh in (True, False):
            times: dict[str, list[float]] = {name: [] for name in RIVALS}
            for step in range(-1, arguments.steps):
                if fresh or step == -1:
                    lengths = pattern(arguments.tokens, generator)
                    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
                for name, rival in RIVALS.items():
                    start = time.perf_counter()
                    got = forward_backward(rival, inputs, cu_seqlens)
                    if step >= 0:
                        times[name].append(time.perf_counter() - start)
                        continue
                    with lf.use_backend("reference"):
                        check(name, got, forward_backward(lf.ops.attention, inputs, cu_seqlens))
            medians = {name: statistics.median(values) for name, values in times.items()}
            ratio = medians["a document at a time"] / medians["lemur_fast"]
            cells = [f"{1e3 * seconds:.0f}" for seconds in medians.values()]
            table.add_row(pattern.__name__.replace("_", " "), "fresh" if fresh else "repeated", *cells, f"{ratio:.1f}")
    console.print(table)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
