"""The tiny preset's loss curve beside stock Hugging Face: the same seed, batches, precision and optimizer.

    python -m benchmarks.curve                    # 30 steps of 4,096 tokens: some ten minutes on two idle cores
    python -m benchmarks.curve --steps 110        # the whole preset

Both models begin with the same weights and take the same steps in turns; one runs `lemur_fast`, the other transformers
with sdpa, which keeps packed documents apart by their positions. Times are those of the steps alone.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup_lr_rate

import lemur_fast as lf
from benchmarks.harness import machine
from lemur_fast.data.embedded import embedded_sources
from lemur_fast.data.executors import build_store
from lemur_fast.data.loader import Loader
from lemur_fast.data.mixture import Mixture
from lemur_fast.data.store import TokenStore
from lemur_fast.data.tokenizer import load_tokenizer
from lemur_fast.training.distributed import compute_dtype, process_group, shard
from lemur_fast.training.optimizer import adamw, clip_gradients


@dataclass
class Arguments:
    """Trains two models on the same batches."""

    steps: int = 30
    """Optimizer steps."""
    batch_tokens: int = 4096
    """Tokens of a step: one packed row."""
    lr: float = 2e-3
    """Peak learning rate."""
    seed: int = 0
    """Decides the weights and the data."""
    data: Path | None = None
    """Token store; by default the embedded corpus is tokenized."""
    plot: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Draw both curves into this picture."""


class Trained:
    """One of the two, with an optimizer of its own."""

    def __init__(self, args: Arguments, config: LlamaConfig, world: Any, ours: bool) -> None:
        torch.manual_seed(args.seed)
        self.model = LlamaForCausalLM(config).train()
        self.ours, self.world = ours, world
        if ours:
            lf.accelerate(self.model)
        shard(self.model, list(self.model.model.layers), world.mesh, compute_dtype(world.device))
        self.optimizer = adamw(self.model, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
        self.schedule = get_cosine_with_min_lr_schedule_with_warmup_lr_rate(
            self.optimizer, num_warmup_steps=min(10, args.steps // 3), num_training_steps=args.steps, min_lr_rate=0.1
        )
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, batch: lf.PackedBatch) -> None:
        """Forward, backward, clipping, AdamW."""
        inputs: dict[str, Any] = batch.model_inputs()
        if not self.ours:  # the arguments that stock transformers knows
            known = ("input_ids", "position_ids", "shift_labels", "num_items_in_batch")
            inputs = {name: inputs[name] for name in known} | {"labels": inputs["shift_labels"], "use_cache": False}
        begun = time.perf_counter()
        loss = self.model(**inputs).loss
        loss.backward()
        clip_gradients(self.model.parameters(), 1.0, self.world.mesh)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - begun)


def main() -> None:
    """Run from the command line."""
    args = tyro.cli(Arguments, description=__doc__)
    console, tokenizer = Console(width=120), load_tokenizer()
    console.print(machine())
    with tempfile.TemporaryDirectory() as scratch, process_group("cpu") as world:
        folder = args.data or build_store(Path(scratch) / "data", embedded_sources(), tokenizer).folder
        store = TokenStore(folder)
        loader = Loader(store.train, Mixture(store.train, {"code": 10, "text": 1}, args.batch_tokens, args.seed), 1)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=6,
            num_attention_heads=4,
            max_position_embeddings=args.batch_tokens,
            rms_norm_eps=1e-5,
        )
        rivals = {"lemur_fast": Trained(args, config, world, True), "HF sdpa": Trained(args, config, world, False)}
        for number in range(args.steps):
            (batch,) = next(loader)[1]
            for trained in sorted(rivals.values(), key=lambda trained: trained.ours == bool(number % 2)):
                trained.step(batch)
            print(f"step {number + 1}/{args.steps}", end="\r", flush=True)
    ours, theirs = rivals.values()
    off = [abs(a - b) / b for a, b in zip(ours.losses, theirs.losses, strict=True)]
    table = Table(title=f"{args.steps} steps of {args.batch_tokens:,} tokens")
    for column in ("", "first loss", "last loss", "seconds of all steps", "tokens/s"):
        table.add_column(column, justify="right" if column else "left")
    for name, trained in rivals.items():
        total = sum(trained.seconds)
        speed = f"{args.steps * args.batch_tokens / total:,.0f}"
        table.add_row(name, f"{trained.losses[0]:.4f}", f"{trained.losses[-1]:.4f}", f"{total:,.1f}", speed)
    console.print(table)
    console.print(
        f"losses differ by at most {max(off):.2%} of themselves, by {sum(off) / len(off):.3%} on average; "
        f"lemur_fast takes 1/{sum(theirs.seconds) / sum(ours.seconds):.2f} of the time"
    )
    if args.plot:
        draw(args.plot, {name: trained.losses for name, trained in rivals.items()})


def draw(path: Path, curves: dict[str, list[float]]) -> None:
    """Both curves in one picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for (name, losses), style in zip(curves.items(), ("-", "--"), strict=True):
        axes.plot(range(1, len(losses) + 1), losses, style, label=name)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", title="The same seed and data")
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
