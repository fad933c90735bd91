"""The optimizer's step against the memory that it must move: clipping of gradients, then fused AdamW.

    python -m benchmarks.optimizer                     # bfloat16, the model of benchmarks.train_step, half a minute
    python -m benchmarks.optimizer --dtype float32 --layers 12

Bytes counted: AdamW reads weight, gradient and two moments and writes all but the gradient; clipping reads the
gradients for their norm, and reads and writes them to scale them. Beside each stands a copy of as many bytes, in the
same turns. Peers: torch's AdamW that goes tensor by tensor (foreach), and
`torch.nn.utils.clip_grad_norm_`. The weights and norms of each are checked against float64 before it is timed: wrong
ones print no time.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from benchmarks import train_step
from benchmarks.harness import CPU, Row, command_line, copy_run, keep_freed_memory, machine, phases_in_turns, write_rows
from lemur_fast.training.optimizer import adamw, clip_gradients

# So large a step that bfloat16 weights show how far it was.
HYPERPARAMETERS = {"lr": 0.05, "betas": (0.9, 0.95), "weight_decay": 0.1}
LONGEST = 0.5  # shorter than the gradients drawn here, so that they are scaled
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.02}
"""Relative error of all weights' changes, and of a norm. torch's float32 norm of a large matrix is off by 1e-3."""


@dataclass
class Arguments:
    """Times the optimizer's step."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of weights, gradients and moments."""
    width: int = 512
    """Hidden size of the model, as in benchmarks.train_step."""
    layers: int = 6
    """Its decoder layers."""
    rounds: int = 9
    """Timed steps."""
    json: Path | None = None
    """Also write a JSON line for each rival."""


@dataclass
class Rival:
    """A model with gradients, and how they are clipped and applied."""

    parameters: list[nn.Parameter]
    clip: Callable[[list[nn.Parameter]], Tensor]
    optimizer: torch.optim.Optimizer

    def run(self, mark: Callable[[], None]) -> None:
        """Both phases of a step."""
        self.clip(self.parameters)
        mark()
        self.optimizer.step()
        mark()


def rivals(model: Callable[[], LlamaForCausalLM]) -> dict[str, Rival]:
    """Name -> the rival, each on a model of its own."""
    found = {}
    for name in ("lemur_fast", "torch", "torch, foreach"):
        built = model()
        if name == "lemur_fast":
            optimizer = adamw(built, **HYPERPARAMETERS)  # type: ignore[arg-type]
            clip = lambda parameters: clip_gradients(parameters, LONGEST)  # noqa: E731
        else:
            # The same groups: norms are not decayed.
            groups = adamw(built, **HYPERPARAMETERS).param_groups  # type: ignore[arg-type]
            kept = [{key: group[key] for key in ("params", "weight_decay")} for group in groups]
            foreach = name.endswith("foreach")
            optimizer = torch.optim.AdamW(kept, foreach=foreach, **HYPERPARAMETERS)  # type: ignore[arg-type]
            clip = lambda parameters, foreach=foreach: nn.utils.clip_grad_norm_(parameters, LONGEST, foreach=foreach)  # noqa: E731
        found[name] = Rival(list(built.parameters()), clip, optimizer)
    return found


def draw_gradients(parameters: list[nn.Parameter], seed: int) -> None:
    """Gradients, the same for every rival."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        drawn = torch.randn(parameter.shape, generator=generator) / parameter.numel() ** 0.5
        parameter.grad = drawn.to(parameter.dtype)


def error_of(rival: Rival, tolerance: float) -> str:
    """What is wrong with two steps of a rival; nothing when they are right."""
    before = [parameter.detach().double() for parameter in rival.parameters]
    exact = [weight.clone().requires_grad_() for weight in before]
    places = {id(parameter): number for number, parameter in enumerate(rival.parameters)}
    groups = [
        {"params": [exact[places[id(p)]] for p in group["params"]], "weight_decay": group["weight_decay"]}
        for group in rival.optimizer.param_groups
    ]
    reference = torch.optim.AdamW(groups, foreach=False, **HYPERPARAMETERS)  # type: ignore[arg-type]
    for seed in (0, 1):
        draw_gradients(rival.parameters, seed)
        norm = sum(float(p.grad.double().square().sum()) for p in rival.parameters if p.grad is not None) ** 0.5
        for weight, parameter in zip(exact, rival.parameters, strict=True):
            assert parameter.grad is not None
            weight.grad = parameter.grad.double() * min(1.0, LONGEST / norm)
        found = float(rival.clip(rival.parameters))
        if not abs(found - norm) < max(tolerance, 2e-3) * norm:
            return f"wrong: norm {found:.6g}, which is {norm:.6g}"
        rival.optimizer.step()
        reference.step()
    moved = off = 0.0
    for old, weight, parameter in zip(before, exact, rival.parameters, strict=True):
        moved += float((weight.detach() - old).square().sum())
        off += float((weight.detach() - parameter.detach().double()).square().sum())
    error = (off / moved) ** 0.5
    return "" if error < tolerance else f"wrong: relative error of what the weights moved is {error:.1e}"


def main(arguments: Arguments) -> list[Row]:
    """Measures and prints."""
    console = Console(width=110, highlight=False)
    console.print(machine())
    console.print(keep_freed_memory())
    dtype = getattr(torch, arguments.dtype)
    config = train_step.model_config(train_step.Arguments(width=arguments.width, layers=arguments.layers))

    def model() -> LlamaForCausalLM:
        torch.manual_seed(0)
        return LlamaForCausalLM(config).to(dtype)

    found = rivals(model)
    elements = sum(parameter.numel() for parameter in found["lemur_fast"].parameters)
    errors = {name: error_of(rival, TOLERANCE[arguments.dtype]) for name, rival in found.items()}
    counted = {"clip": 3 * elements * dtype.itemsize, "AdamW": 7 * elements * dtype.itemsize}
    runs = {name: rival.run for name, rival in found.items() if not errors[name]}
    copies = {f"copy for {phase}": copy_run(nbytes, CPU) for phase, nbytes in counted.items()}
    timed = phases_in_turns({**runs, **copies}, device=CPU, rounds=arguments.rounds)
    rows = []
    for number, (phase, nbytes) in enumerate(counted.items()):
        (copied,) = timed[f"copy for {phase}"].seconds
        for name, error in errors.items():
            row = Row("optimizer", phase, name, f"{elements / 1e6:.1f} M parameters", "", arguments.dtype, error=error)
            row.seconds = [] if error else timed[name].seconds[number]
            row.bytes, row.copy_seconds = nbytes, statistics.median(copied)
            rows.append(row)
    table = Table(title=f"{elements / 1e6:.1f} M parameters, {arguments.dtype}")
    for heading in ("", "", "ms", "± %", "GB/s", "x its memory traffic"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for row in rows:
        if row.median is None or row.share_of_copy is None or row.bytes is None:
            table.add_row(row.case, row.rival, "-")
            continue
        rate = row.bytes / row.median / 1e9
        cells = (f"{1e3 * row.median:.1f}", f"{100 * (row.spread or 0):.0f}", f"{rate:.1f}")
        table.add_row(row.case, row.rival, *cells, f"{1 / row.share_of_copy:.2f}")
    console.print(table)
    for name, error in errors.items():
        if error:
            console.print(f"{name}: {error}")
    if arguments.json:
        write_rows(arguments.json, rows)
    return rows


if __name__ == "__main__":
    main(command_line(Arguments, __doc__))
