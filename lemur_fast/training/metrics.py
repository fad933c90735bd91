"""What a run reports: a line of JSON a step, the same in TensorBoard and other trackers, a picture of the losses."""

import contextlib
import importlib
import json
import math
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from lemur_fast.files import staged_file, write_text

Tracker = Literal["none", "wandb", "trackio"]


def tracker_package(tracker: Tracker) -> Any:
    """The module of a tracker; None for "none".

    Raises:
        ValueError: it is not installed.
    """
    if tracker == "none":
        return None
    try:
        return importlib.import_module(tracker)
    except ImportError as error:
        raise ValueError(f"--track {tracker}: not installed; run `pip install {tracker}`") from error


class MetricsLog:
    """Appends to `metrics.jsonl`, writes TensorBoard events, and tells a tracker; a context manager."""

    def __init__(self, folder: Path, resumed_at: int = -1, tracker: Tracker = "none", **run: Any) -> None:
        """Open the log in `folder`.

        Args:
            folder: of the run.
            resumed_at: step after which a run goes on; what was logged later is dropped, because it comes again.
            tracker: wandb or trackio, whose package must be installed.
            **run: `project`, `name`, `config`: for the tracker.

        Raises:
            ValueError: the tracker's package is not installed.
        """
        from torch.utils.tensorboard import SummaryWriter  # imports tensorboard, which only recipes need

        self._tracker = tracker_package(tracker)
        if self._tracker is not None:
            self._tracker.init(**run)
        path = folder / "metrics.jsonl"
        self.records: list[dict[str, Any]] = []
        if path.is_file():
            self.records = [record for record in _records(path) if record["step"] <= resumed_at]
            write_text(path, "".join(json.dumps(record) + "\n" for record in self.records))
        self._file = path.open("a", encoding="utf-8")
        self._failed = False
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_at + 1)

    def write(self, step: int, **values: float) -> None:
        """Record named values of a step; a slash in a name groups it in TensorBoard.

        A value that is not finite is written as null: NaN is not JSON.
        """
        record = {"step": step, **{name: value if math.isfinite(value) else None for name, value in values.items()}}
        self.records.append(record)
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:  # a full disk: what the run has learned is worth more than its log
            if not self._failed:
                tqdm.write(f"WARNING    metrics.jsonl cannot be written ({error}); the run goes on without")
            self._failed = True
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if self._tracker is not None:
            self._tracker.log(dict(values), step=step)

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values at which `name` was recorded."""
        found = [(record["step"], record[name]) for record in self.records if record.get(name) is not None]
        return [step for step, _ in found], [value for _, value in found]

    def last(self, prefix: str) -> dict[str, float]:
        """The latest value of every name that begins with `prefix`."""
        latest: dict[str, float] = {}
        for record in self.records:
            latest |= {name: value for name, value in record.items() if name.startswith(prefix)}
        return latest

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(OSError):  # what a full disk did not take it does not take now; that was said
            self._file.close()
        self._board.close()
        if self._tracker is not None:
            self._tracker.finish()


def _records(path: Path) -> list[dict[str, Any]]:
    """What can be read of a log: a killed process may have left half a line."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


class Figures:
    """Numbers of a step on their way from the device: asked for at once, read when a later step is under way."""

    def __init__(self, values: Tensor) -> None:
        """Begin to copy `values` [N]; the host does not wait."""
        self._values = values.to("cpu", non_blocking=True)
        self._copied = None
        if values.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def there(self) -> bool:
        """Whether reading does not wait: the device is done with the step."""
        return self._copied is None or self._copied.query()

    def read(self) -> list[float]:
        """The numbers; waits for the device if they are not there yet."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.tolist()


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
