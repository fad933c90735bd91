"""Settings that all recipes which train share, and how they are refused; a recipe adds its own to them."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch

from lemur_fast.training.activations import Mode
from lemur_fast.training.metrics import Tracker, tracker_package


@dataclass(frozen=True)
class RunSettings:
    """Settings of a run."""

    # What, and where to.
    preset: str = "tiny"
    """Where the other defaults come from."""
    model: str | None = None
    """LLaMA to start from, and its tokenizer: a Hugging Face folder, or ORG/NAME of the hub."""
    out: Path | None = None
    """Folder of the run; must be new or empty. Default: runs/RECIPE-PRESET, or -2, -3, ... when that is taken."""
    overwrite: bool = False
    """Delete the earlier run in --out first."""
    resume: Literal["never", "auto"] = "never"
    """auto: go on from the last whole checkpoint in --out (by default of the latest run); start if there is none."""
    resume_changed: bool = False
    """Resume although settings of the training are not what they were."""
    checkpoint_every: int = 50
    """Steps between checkpoints; there is one at the end, and when the run is stopped, in any case. 0: only those."""
    keep: int = 2
    """Checkpoints to keep."""
    seed: int = 0
    """Decides everything random: weights that no model brings, the order of the data, the samples."""

    # Optimization.
    steps: int = 100
    """Optimizer steps."""
    batch_tokens: int = 4096
    """Tokens in an optimizer step, a multiple of seq_len; rows of seq_len are shared by the processes, accumulated."""
    seq_len: int = 4096
    """Tokens in a packed row: the longest piece of a document, or conversation, that the model sees at once."""
    lr: float = 1e-3
    """Peak learning rate. It warms up linearly, then follows a cosine down to a tenth."""
    warmup_steps: int = 10
    """Steps until the learning rate is at its peak."""
    weight_decay: float = 0.1
    """AdamW's weight decay; on matrices, never on norms or biases."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's averaging of gradients and of their squares."""
    clip: float = 1.0
    """Longest gradient, over all parameters together; longer ones are scaled down to it."""
    spike: float = 10.0
    """A step whose gradient norm is above this many times its running mean is not taken; 0: only what is not finite."""

    # Looking at it.
    eval_every: int = 30
    """Steps between held-out measurements; there is one before the first step and one after the last in any case."""
    eval_tokens: int = 8192
    """Held-out tokens of each kind, or source of conversations, in a measurement."""
    sample_tokens: int = 64
    """Longest sample to write at the end, for each of two prompts."""
    track: Tracker = "none"
    """Send the figures there, too; its package must be installed."""
    profile: bool = False
    """Write a torch profiler trace of two steps to profile/."""

    # Machine.
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a CUDA GPU if there is one, else the CPU."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of forward and backward; weights, gradient sums and optimizer are float32. auto: bfloat16 where it is fast."""
    shard_size: int | None = None
    """Processes that share one copy of the model. Default: all (full sharding); fewer, such as those of one machine, is
    hybrid sharding."""
    sync_every: bool = False
    """Reduce gradients after every row, not once a step: slower, but no process then holds whole gradients."""
    checkpointing: Mode = "none"
    """Activations made again in the backward pass: all of a layer, or what is cheap to make."""
    compile: bool = False
    """Run the layers through torch.compile."""

    NOT_OF_THE_TRAINING: ClassVar[frozenset[str]] = frozenset(
        {"out", "overwrite", "resume", "resume_changed", "checkpoint_every", "keep", "data", "eval_every"}
        | {"eval_tokens", "sample_tokens", "track", "profile", "device", "shard_size", "sync_every", "checkpointing"}
        | {"compile"}
    )
    """Settings that may differ from those of the run that is resumed: the training is the same. Where documents lie
    may, too; what they are is compared by a fingerprint."""
    MAY_CHANGE: ClassVar[frozenset[str]] = frozenset(
        {"steps", "batch_tokens", "lr", "warmup_steps", "weight_decay", "betas", "clip", "spike", "dtype"}
    )
    """Of the others, those that --resume-changed may change; with another model or data it would be another run."""
    ABOVE_ZERO: ClassVar[frozenset[str]] = frozenset(
        {"steps", "batch_tokens", "eval_tokens", "lr", "clip", "keep", "shard_size"}
    )
    NOT_NEGATIVE: ClassVar[frozenset[str]] = frozenset(
        {"seed", "warmup_steps", "weight_decay", "eval_every", "sample_tokens", "checkpoint_every", "spike"}
    )

    @property
    def device_type(self) -> str:
        """Where the run takes place: "cpu" or "cuda"."""
        return self.device if self.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"

    def check(self) -> None:
        """Refuse what cannot work, before anything is done.

        Raises:
            ValueError: with the name of the setting, what it is, and what it takes.
        """
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{flag(name)} must be finite, got {value}")
            if name in self.ABOVE_ZERO and value is not None and value <= 0:
                raise ValueError(f"{flag(name)} must be above 0, got {value}")
            if name in self.NOT_NEGATIVE and value < 0:
                raise ValueError(f"{flag(name)} must not be negative, got {value}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"--betas must be in [0, 1), got {self.betas}")
        if self.seed >= 2**63:
            raise ValueError(f"--seed must be below 2^63, got {self.seed}")
        if self.seq_len < 2:
            raise ValueError(f"--seq-len must be at least 2, got {self.seq_len}")
        if self.batch_tokens % self.seq_len:
            raise ValueError(
                f"--batch-tokens must be a multiple of --seq-len ({self.seq_len}), got {self.batch_tokens}"
            )
        if self.overwrite and (self.out is None or self.resume != "never"):
            raise ValueError("--overwrite needs --out, to say which run may be deleted, and no --resume")
        tracker_package(self.track)
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch finds no CUDA GPU here")


def flag(name: str) -> str:
    """A setting as the command line spells it."""
    return f"--{name.replace('_', '-')}"


def check_mixture(mixture: dict[str, float]) -> None:
    """Refuse weights that are no shares.

    Raises:
        ValueError: one is negative or not finite, or all are 0.
    """
    weights = mixture.values()
    if mixture and (not all(0 <= weight < math.inf for weight in weights) or not any(weights)):
        raise ValueError(f"--mixture: weights must not be negative, nor all 0; they must be finite; got {mixture}")
