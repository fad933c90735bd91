"""What a call of each op costs the host, in microseconds: checks, choice of a backend, dispatch, allocation, launch.

    python -m benchmarks.host_overhead                     # every op, about half a minute; exits with 1 over the bar
    python -m benchmarks.host_overhead --only rms_norm --rounds 101

The inputs are one token of eight columns, on the CPU, where hardly anything but the call itself takes time. Beside
each op: what does the same in plain torch, and a "bare" operator, registered through `torch.library` with the schema
of ours, whose implementation allocates the outputs, whose gradient formula allocates the gradients, and no more. Only
the twin of linear_cross_entropy does: it multiplies hidden by weight, once. No implementation can do without that call
of torch's, which is the op's arithmetic. The bar is on the forward: at most 12 us more than the bare operator. All are
timed in turns, on one thread of one process; a figure is the median of the turns, each of which counts by the median
of its calls.

Where the forward goes:

- checks: all of the public function that is none of the following
- choose: the choice of the backend
- operator: torch's dispatch and what is wrapped around our implementation
- allocate: the implementation without its calls of the compiled part
- C++: those calls, kernels included

On a GPU a launch stands in the place of C++, and is not in these figures: looking up the stream, guarding the device,
and launching. What the implementation does with torch operators, in "allocate", launches kernels of its own there.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import lemur_fast as lf
from benchmarks.harness import Row, command_line, machine, write_rows
from lemur_fast import _compiled

BAR = 12.0
"""Microseconds that a forward may take more than the bare operator."""

CALLS = 50
"""Calls of a function in one round. Each is timed: where another process takes the core, a median does not see it."""

TOKENS, WIDTH, HEADS = 1, 8, 1
"""One head: the arithmetic of two takes attention a microsecond, which is not the host's."""


@dataclass
class Arguments:
    """Times what a call costs the host."""

    only: tuple[str, ...] = ()
    """Parts of the names of the ops to run; all by default."""
    rounds: int = 31
    """Turns of each function, of 50 timed calls."""
    json: Path | None = None
    """Also write a JSON line for each op, direction and function."""


@dataclass
class Case:
    """One op on inputs of next to no size.

    Attributes:
        name: as printed.
        operator: the operator that it calls.
        body: the function that implements the operator; its fake has the same name and ``_fake``.
        inputs: the arguments of `ours` and `plain`.
        ours: lemur_fast's op.
        plain: the same in plain torch.
        wanted: indices of the inputs that get a gradient.
        unavoidable: what the op cannot do without calling torch for it, of the operator's arguments; the bare operator
            does it too.
    """

    name: str
    operator: str
    body: str
    inputs: Sequence[Tensor]
    ours: Callable[..., Any]
    plain: Callable[..., Any]
    wanted: Sequence[int]
    unavoidable: Callable[..., Any] | None = None


def module_of(case: Case) -> Any:
    """The module of `lemur_fast.ops` that holds the op, whose name in the package is the function's."""
    return sys.modules[f"lemur_fast.ops.{case.name.split()[0]}"]


def operator_of(case: Case) -> Any:
    """The operator, without the search for its overload."""
    return getattr(torch.ops.lemur_fast, case.operator).default


def plain_rms_norm(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Any:
    """Root-mean-square normalisation by torch, after the addition where there is one."""
    if residual is None:
        return functional.rms_norm(x, weight.shape, weight, 1e-5)
    h = x + residual
    return functional.rms_norm(h, weight.shape, weight, 1e-5), h


def plain_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Hugging Face's apply_rotary_pos_emb, on [T, heads, D]."""

    def rotate_half(x: Tensor) -> Tensor:
        low, high = x.chunk(2, -1)
        return torch.cat((-high, low), -1)

    cos, sin = cos[:, None], sin[:, None]
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def plain_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Attention by torch, over one document."""
    heads_first = [x.transpose(0, 1)[None] for x in (q, k, v)]
    return functional.scaled_dot_product_attention(*heads_first, is_causal=True)[0].transpose(0, 1)


def cases() -> list[Case]:
    """Every op."""
    torch.manual_seed(0)
    x, residual = torch.randn(TOKENS, WIDTH), torch.randn(TOKENS, WIDTH)
    weight, head = torch.rand(WIDTH) + 0.5, torch.randn(WIDTH, WIDTH)
    q, k, v = (torch.randn(TOKENS, HEADS, WIDTH) for _ in range(3))
    angles = torch.rand(TOKENS, WIDTH // 2).repeat(1, 2)
    cu_seqlens = torch.tensor([0, TOKENS], dtype=torch.int32)
    labels = torch.arange(TOKENS)
    ops = lf.ops
    return [
        Case("rms_norm", "rms_norm", "_rms_norm", (x, weight), ops.rms_norm, plain_rms_norm, (0, 1)),
        Case(
            "rms_norm + residual",
            "add_rms_norm",
            "_add_rms_norm",
            (x, weight, residual),
            lambda x, weight, residual: ops.rms_norm(x, weight, residual=residual),
            plain_rms_norm,
            (0, 1, 2),
        ),
        Case("rotary", "rotary", "_rotary", (q, k, angles.cos(), angles.sin()), ops.rotary, plain_rotary, (0, 1)),
        Case(
            "swiglu",
            "swiglu",
            "_swiglu",
            (x, residual),
            ops.swiglu,
            lambda gate, up: functional.silu(gate) * up,
            (0, 1),
        ),
        Case("attention", "attention", "_attention", (q, k, v, cu_seqlens), ops.attention, plain_attention, (0, 1, 2)),
        Case(
            "cross_entropy",
            "cross_entropy_sum",
            "_sum",
            (x, labels),
            ops.cross_entropy,
            functional.cross_entropy,
            (0,),
        ),
        Case(
            "linear_cross_entropy",
            "linear_cross_entropy_sum",
            "_sum",
            (x, head, labels),
            ops.linear_cross_entropy,
            lambda hidden, weight, labels: functional.cross_entropy(functional.linear(hidden, weight), labels),
            (0, 1),
            unavoidable=lambda hidden, weight, *_: functional.linear(hidden, weight),
        ),
    ]


# ---- the bare operator -----------------------------------------------------------------------------------------------

_BARE = torch.library.Library("lemur_fast_bare", "DEF")


def bare(case: Case) -> Callable[..., Any]:
    """The bare twin of the case's operator."""
    known = operator_of(case)
    if not hasattr(torch.ops.lemur_fast_bare, case.operator):
        _BARE.define(str(known._schema).removeprefix("lemur_fast::"), tags=(torch.Tag.pt2_compliant_tag,))
        allocate, unavoidable = getattr(module_of(case), f"{case.body}_fake"), case.unavoidable

        def with_the_unavoidable(*args: Any) -> Any:
            assert unavoidable is not None
            unavoidable(*args)
            return allocate(*args)

        body = allocate if unavoidable is None else with_the_unavoidable
        _BARE.impl(case.operator, body, "CompositeExplicitAutograd")

        def save(ctx: Any, inputs: tuple, output: Any) -> None:
            ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs))
            if isinstance(output, tuple):
                ctx.mark_non_differentiable(*output[1:])

        def backward(ctx: Any, *gradients: Any) -> tuple:
            needed = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=True)
            return tuple(x.new_empty(x.shape) if needs else None for x, needs in needed)

        torch.library.register_autograd(f"lemur_fast_bare::{case.operator}", backward, setup_context=save, lib=_BARE)
    return getattr(torch.ops.lemur_fast_bare, case.operator).default


# ---- taking a call to pieces -----------------------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """Remembers the arguments of the last call of each of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: dict[str, tuple] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Runs it as it is."""
        if func.namespace == "lemur_fast":
            self.arguments[func._opname] = args
        return func(*args, **(kwargs or {}))


class Stopwatch:
    """Stands in for the compiled part, and adds up the seconds that calls of its CPU kernels take."""

    def __init__(self, compiled: Any) -> None:
        self.cpu = self
        self.seconds = 0.0
        self._kernels = compiled.cpu

    def __getattr__(self, name: str) -> Callable[..., Any]:
        kernel = getattr(self._kernels, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = kernel(*args, **kwargs)
            self.seconds += time.perf_counter() - start
            return result

        return timed


def record(case: Case, inputs: Sequence[Any]) -> tuple[Any, tuple]:
    """How the op calls `choose`, and the arguments with which it calls its operator."""
    module = module_of(case)
    with mock.patch.object(module, "choose", wraps=module.choose) as choose, Recorder() as recorder:
        case.ours(*inputs)
    return choose.call_args, recorder.arguments[case.operator]


def leaves(inputs: Sequence[Any], wanted: Sequence[int]) -> list[Any]:
    """The inputs, those that get a gradient as leaves of their own."""
    return [x.detach().clone().requires_grad_() if i in wanted else x for i, x in enumerate(inputs)]


def forward_backward(function: Callable[..., Any], inputs: Sequence[Any]) -> Callable[[], list[Tensor]]:
    """A call of the function and of its gradient formula, for incoming gradients of ones."""
    wanted = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]

    def forward() -> list[Tensor]:
        outputs = function(*inputs)
        return [outputs] if isinstance(outputs, Tensor) else [x for x in outputs if x.requires_grad]

    seeds = [torch.ones_like(x) for x in forward()]

    def both() -> list[Tensor]:
        outputs = forward()
        return [*outputs, *torch.autograd.grad(outputs, wanted, seeds)]

    return both


def check(case: Case) -> None:
    """Stops the benchmark when ours is not what plain torch computes: its time would mean nothing."""
    inputs = leaves(case.inputs, case.wanted)
    ours, plain = forward_backward(case.ours, inputs)(), forward_backward(case.plain, inputs)()
    for number, (a, b) in enumerate(zip(ours, plain, strict=True)):
        if not torch.allclose(a, b, atol=1e-5):
            raise SystemExit(f"{case.name}: result {number} differs from plain torch's; nothing was timed")


def functions(case: Case, stopwatch: Stopwatch) -> dict[str, Callable[[], Any]]:
    """What is timed, by name; "body" is our implementation, outside of torch's dispatch."""
    inputs = leaves(case.inputs, case.wanted)
    chosen, arguments = record(case, case.inputs)
    _, recorded = record(case, inputs)
    recorded = leaves(recorded, [i for i, x in enumerate(recorded) if isinstance(x, Tensor) and x.requires_grad])
    choose, body = module_of(case).choose, getattr(module_of(case), case.body)
    operator, twin = operator_of(case), bare(case)

    def watched() -> None:
        with mock.patch.object(_compiled, "C", stopwatch):
            body(*arguments)

    return {
        "ours": lambda: case.ours(*case.inputs),
        "plain": lambda: case.plain(*case.inputs),
        "bare": lambda: twin(*arguments),
        "choose": lambda: choose(*chosen.args, **chosen.kwargs),
        "operator": lambda: operator(*arguments),
        "body": lambda: body(*arguments),
        "watched": watched,
        "ours, backward": forward_backward(case.ours, inputs),
        "plain, backward": forward_backward(case.plain, inputs),
        "bare, backward": forward_backward(twin, recorded),
    }


def seconds_of_calls(function: Callable[[], Any]) -> list[float]:
    """Of each of `CALLS` calls."""
    seconds = []
    for _ in range(CALLS):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return seconds


def measure(case: Case, rounds: int) -> dict[str, list[float]]:
    """Microseconds of each round by name: what `functions` names, and "C++" for the calls of the compiled part."""
    stopwatch = Stopwatch(_compiled.C)
    timed = functions(case, stopwatch)
    seen: dict[str, list[float]] = {name: [] for name in (*timed, "C++")}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for number in range(-2, rounds):
            for name, function in timed.items():
                stopwatch.seconds = 0.0
                seconds = seconds_of_calls(function)
                if number >= 0:
                    seen[name].append(1e6 * statistics.median(seconds))
                    seen["C++"] += [1e6 * stopwatch.seconds / CALLS] if name == "watched" else []
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    return seen


def medians(seen: dict[str, list[float]]) -> dict[str, float]:
    """Of the rounds."""
    return {name: statistics.median(rounds) for name, rounds in seen.items()}


# ---- the table -------------------------------------------------------------------------------------------------------

PARTS = ("checks", "choose", "operator", "allocate", "C++")


def parts(seen: dict[str, float]) -> dict[str, float]:
    """Where the forward goes, from what was timed: together, "ours"."""
    return {
        "checks": seen["ours"] - seen["choose"] - seen["operator"],
        "choose": seen["choose"],
        "operator": seen["operator"] - seen["body"],
        "allocate": seen["body"] - seen["C++"],
        "C++": seen["C++"],
    }


def table(found: dict[str, dict[str, float]]) -> Table:
    """A row for each op."""
    result = Table(title=f"host time of a call, us; the bar is {BAR:g} us over the bare operator, forward")
    names = ("ours", "plain", "bare")
    both = [f"{name} f+b" for name in names]
    for heading in ("op", *names, "over bare", "x plain", *PARTS, *both, "over bare f+b"):
        result.add_column(heading, justify="left" if heading == "op" else "right", no_wrap=True)
    for op, seen in found.items():
        forward, backward = [seen[name] for name in names], [seen[f"{name}, backward"] for name in names]
        figures = (
            *forward,
            forward[0] - forward[2],
            forward[0] / forward[1],
            *parts(seen).values(),
            *backward,
            backward[0] - backward[2],
        )
        result.add_row(op, *(f"{figure:.1f}" for figure in figures))
    return result


def rows_of(found: dict[str, dict[str, list[float]]]) -> list[Row]:
    """A row for each op, direction and function, of what `measure` returned; of our forward, where the time goes."""
    names = {"lemur_fast": "ours", "plain torch": "plain", "bare operator": "bare"}
    shape = f"{TOKENS} x {WIDTH}"
    rows = []
    for op, seen in found.items():
        for direction, suffix in (("forward", ""), ("both", ", backward")):
            for rival, name in names.items():
                row = Row("host_overhead", op, rival, shape, direction, "float32")
                row.seconds = [us / 1e6 for us in seen[name + suffix]]
                if rival == "lemur_fast" and not suffix:
                    row.facts = {f"{part}_us": round(us, 2) for part, us in parts(medians(seen)).items()}
                rows.append(row)
    return rows


def over_the_bar(found: dict[str, dict[str, float]]) -> list[str]:
    """A line for each op that takes more than it may."""
    excess = {op: seen["ours"] - seen["bare"] for op, seen in found.items()}
    return [f"{op}: {us:.1f} us over the bare operator; at most {BAR:g}" for op, us in excess.items() if us > BAR]


def chosen_cases(arguments: Arguments) -> list[Case]:
    """The cases asked for."""
    every = cases()
    chosen = [case for case in every if not arguments.only or any(part in case.name for part in arguments.only)]
    if not chosen:
        raise SystemExit(f"--only: got {arguments.only}; takes parts of {', '.join(case.name for case in every)}")
    return chosen


def main(arguments: Arguments) -> None:
    """Measures, prints, and exits with 1 where the bar is missed."""
    console = Console(width=180, highlight=False)
    chosen = chosen_cases(arguments)
    torch.set_num_threads(1)  # or attention, whose tasks are never too small for a thread, would wait for a second one
    console.print(machine())
    if _compiled.missing:
        raise SystemExit(f"lemur_fast: {_compiled.missing}")
    found = {}
    for case in track(chosen, "measuring", console=console, transient=True):
        check(case)
        found[case.name] = measure(case, arguments.rounds)
    figures = {op: medians(seen) for op, seen in found.items()}
    console.print(table(figures))
    console.print(
        "On the CPU: C++ holds the kernels' arithmetic too. Not included: what a GPU's launch takes instead (the"
        " lookup of the stream, the guard of the device, the launch)."
    )
    if arguments.json:
        write_rows(arguments.json, rows_of(found))
    missed = over_the_bar(figures)
    for line in missed:
        console.print(f"BROKEN  {line}")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main(command_line(Arguments, __doc__))
