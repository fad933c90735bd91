"""What a run reports: one line of JSON a step, the same in TensorBoard, and a picture of the losses."""

import json
import math
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lemur_fast.files import staged_file


class MetricsLog:
    """Appends to `metrics.jsonl` and writes TensorBoard events, in one folder; a context manager."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter  # imports tensorboard, which only recipes need

        self.records: list[dict[str, Any]] = []
        self._file = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"))

    def write(self, step: int, **values: float) -> None:
        """Record named values of a step; a slash in a name groups it in TensorBoard.

        A value that is not finite is written as null: NaN is not JSON.
        """
        record = {"step": step, **{name: value if math.isfinite(value) else None for name, value in values.items()}}
        self.records.append(record)
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values at which `name` was recorded."""
        found = [(record["step"], record[name]) for record in self.records if record.get(name) is not None]
        return [step for step, _ in found], [value for _, value in found]

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        self._board.close()


def peak_memory_gib(device: torch.device) -> float:
    """Most memory this process has held so far: of the device, or resident when it is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def plot_losses(path: Path, log: MetricsLog, kinds: Sequence[str], title: str) -> None:
    """Draw the training loss and each kind's held-out loss over the steps."""
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    steps, losses = log.series("train/loss")
    axes.plot(steps, losses, color="0.6", linewidth=1, label="training batch")
    for kind in kinds:
        steps, losses = log.series(f"held_out/{kind}/loss")
        label = f"held-out {kind}" + (f" ({losses[0]:.2f} → {losses[-1]:.2f})" if losses else "")
        axes.plot(steps, losses, marker="o", markersize=4, label=label)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    with staged_file(path) as staging:
        figure.savefig(staging, dpi=120)
