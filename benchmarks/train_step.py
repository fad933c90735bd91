"""A whole training step, side by side: Hugging Face eager, sdpa and compiled against lemur_fast.

    python -m benchmarks.train_step                     # bfloat16, one packed row of 4096 tokens, about five minutes
    python -m benchmarks.train_step --dtype float32
    python -m benchmarks.train_step --documents 1       # one document fills the row: attention at its dearest

All rows train the same model on the same packed batch of real documents with the same loss: forward, backward and a
fused AdamW step. Each runs in a process of its own and they take turns. The last row is the floor: the model's own
matrix products alone, forward and backward, on tensors of the same shapes. A row whose loss disagrees with the float32
loss of stock Hugging Face prints no time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import lemur_fast as lf
from benchmarks.harness import Measurement, in_turns, machine, write_json
from lemur_fast.data.embedded import embedded_sources
from lemur_fast.data.tokenizer import encode_documents, load_tokenizer

FLOOR = "matrix products alone"
BASELINE = "HF sdpa"
# Relative, to stock Hugging Face in float32, whose own bfloat16 is off by 2e-5. Documents that attend to one another
# show as 1e-3: at random weights the loss hangs little on attention.
LOSS_TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-4}


@dataclass
class Arguments:
    """Times a training step of every rival, in turns."""

    tokens: int = 4096
    """Tokens in the packed row."""
    documents: int = 18
    """Roughly how many documents the row holds: of all best-fit packs of the embedded corpus, the nearest is taken."""
    layers: int = 6
    """Decoder layers of the model."""
    width: int = 512
    """Hidden size; heads have 64 dimensions, the MLP is 8/3 as wide, the vocabulary 32,000."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of weights and activations."""
    rounds: int = 5
    """Timed steps of each rival."""
    only: tuple[str, ...] = ()
    """Parts of the names of the rivals to run; all by default."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Also write a JSON line for each rival."""


def model_config(arguments: Arguments) -> LlamaConfig:
    """LLaMA-2's architecture at the size asked for."""
    if arguments.width % 64:
        raise SystemExit(f"--width: got {arguments.width}; takes a multiple of 64, the head dimension")
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=arguments.width,
        intermediate_size=(arguments.width * 8 // 3 + 63) // 64 * 64,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.width // 64,
        max_position_embeddings=arguments.tokens,
        rms_norm_eps=1e-5,
    )


def real_batch(arguments: Arguments) -> lf.PackedBatch:
    """The best-fit pack of whole documents of the embedded corpus whose number of documents is nearest to the wish."""
    tokenizer = load_tokenizer()
    records = (record for source in embedded_sources() for part in source.parts() for record in source.read(part))
    texts = [record.text for record in records if record.text is not None]
    documents = [torch.from_numpy(ids) for ids in encode_documents(tokenizer, texts)]
    plan = lf.packing.plan([len(ids) for ids in documents], arguments.tokens, overlong="truncate")
    full = [pack for pack in plan if sum(s.length for s in pack) >= 0.98 * arguments.tokens]
    chosen = min(full, key=lambda pack: abs(len(pack) - arguments.documents))
    pieces = [documents[s.document][s.start : s.start + s.length] for s in chosen]
    return lf.PackedBatch.from_documents(pieces, pad_to=arguments.tokens)


# ---- rivals: each function runs in a fresh process and returns the step to time --------------------------------------


def _model(config: LlamaConfig, dtype: str, attention: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(config, attn_implementation=attention)
    return model.to(getattr(torch, dtype)).train()


def _step(model: LlamaForCausalLM, forward: Callable[[], Tensor]) -> Callable[[], float]:
    # Learning rate 0: the same loss at every step, and the same work.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def step() -> float:
        loss = forward()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def hugging_face(
    config: LlamaConfig, batch: lf.PackedBatch, dtype: str, attention: str, compiled: bool
) -> Callable[[], float]:
    """Stock transformers; documents are given by positions that restart, as its documentation says."""
    model = _model(config, dtype, attention)
    run = torch.compile(model) if compiled else model
    inputs = {
        "input_ids": batch.input_ids[None],
        "position_ids": batch.position_ids[None],
        "labels": batch.labels[None],  # switches the loss on; shift_labels is what it uses
        "shift_labels": batch.labels[None],
        "num_items_in_batch": batch.num_items,
        "use_cache": False,  # else the positions are not looked at
    }
    return _step(model, lambda: run(**inputs).loss)


def lemur(config: LlamaConfig, batch: lf.PackedBatch, dtype: str, compiled: bool) -> Callable[[], float]:
    """The same model, accelerated."""
    model = _model(config, dtype, "sdpa")
    lf.accelerate(model)
    run = torch.compile(model) if compiled else model
    return _step(model, lambda: run(**batch.model_inputs()).loss)


def matrix_products(config: LlamaConfig, batch: lf.PackedBatch, dtype: str) -> Callable[[], None]:
    """Output, input gradient and weight gradient of every linear layer, one after another, and nothing else."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    shapes = [m.weight.shape for m in model.modules() if isinstance(m, torch.nn.Linear)]
    tokens, kind = batch.input_ids.numel(), getattr(torch, dtype)
    weights = [torch.randn(shape).to(kind) for shape in shapes]
    inputs = {width: torch.randn(tokens, width).to(kind) for width in {shape[1] for shape in shapes}}
    gradients = {width: torch.randn(tokens, width).to(kind) for width in {shape[0] for shape in shapes}}

    def step() -> None:
        for weight in weights:
            out_features, in_features = weight.shape
            x, dy = inputs[in_features], gradients[out_features]
            torch.mm(x, weight.T)
            torch.mm(dy, weight)
            torch.mm(dy.T, x)

    return step


def rivals(arguments: Arguments, batch: lf.PackedBatch) -> dict[str, tuple[Callable, tuple]]:
    """Name -> how to build its step."""
    config, dtype = model_config(arguments), arguments.dtype
    return {
        "HF eager": (hugging_face, (config, batch, dtype, "eager", False)),
        BASELINE: (hugging_face, (config, batch, dtype, "sdpa", False)),
        "HF sdpa + compile": (hugging_face, (config, batch, dtype, "sdpa", True)),
        "lemur_fast": (lemur, (config, batch, dtype, False)),
        "lemur_fast + compile": (lemur, (config, batch, dtype, True)),
        FLOOR: (matrix_products, (config, batch, dtype)),
    }


# ---- the table -------------------------------------------------------------------------------------------------------


def expected_loss(arguments: Arguments, batch: lf.PackedBatch) -> float:
    """Stock Hugging Face's eager loss in float32, a document at a time: no packing to get wrong."""
    model = _model(model_config(arguments), arguments.dtype, "eager").float()
    total = 0.0
    with torch.no_grad():
        for start, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
            if end - start > 1:
                ids = batch.input_ids[None, start:end]
                total += float(model(input_ids=ids, labels=ids, num_items_in_batch=batch.num_items).loss)
    return total


def table(arguments: Arguments, measurements: list[Measurement], expected: float) -> Table:
    """The figures, with ratios to the baseline and to the floor of the same run."""
    by_name = {m.name: m for m in measurements if m.seconds}
    floor, baseline = by_name.get(FLOOR), by_name.get(BASELINE)
    result = Table(title=f"training step, {arguments.tokens} tokens, {arguments.dtype}")
    for heading in ("", "tokens/s", "± %", f"x {BASELINE}", "x floor", "peak GB", f"x {BASELINE}", "loss"):
        result.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for m in measurements:
        if m.error:
            result.add_row(m.name, "failed: " + m.error.strip().splitlines()[-1])
            continue
        losses = [loss for loss in m.results if loss is not None]
        if any(not abs(loss - expected) <= LOSS_TOLERANCE[arguments.dtype] * expected for loss in losses):
            result.add_row(m.name, "wrong loss", *[""] * 5, f"{losses[0]:.5f}")
            continue
        result.add_row(
            m.name,
            f"{arguments.tokens / m.median:,.0f}",
            f"{100 * m.spread:.0f}",
            f"{baseline.median / m.median:.2f}" if baseline else "-",
            f"{m.median / floor.median:.2f}" if floor else "-",
            f"{m.peak_bytes / 1e9:.2f}",
            f"{m.peak_bytes / baseline.peak_bytes:.2f}" if baseline else "-",
            f"{losses[0]:.5f}" if losses else "-",
        )
    return result


def main(arguments: Arguments) -> None:
    """Measures and prints."""
    console = Console(width=110, highlight=False)
    batch = real_batch(arguments)
    lengths = sorted(batch.cu_seqlens.diff().tolist(), reverse=True)
    config = model_config(arguments)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in LlamaForCausalLM(config).parameters())
    console.print(machine())
    console.print(f"{parameters / 1e6:.1f} M parameters, {arguments.layers} layers, width {arguments.width}")
    console.print(f"{len(lengths)} documents of {', '.join(map(str, lengths))} tokens; {int(batch.num_items)} trained")
    chosen = {
        name: rival
        for name, rival in rivals(arguments, batch).items()
        if not arguments.only or any(part in name for part in arguments.only)
    }
    if not chosen:
        raise SystemExit(f"--only: got {arguments.only}; takes parts of {', '.join(rivals(arguments, batch))}")
    expected = expected_loss(arguments, batch)
    with console.status("starting") as status:
        measurements = in_turns(chosen, rounds=arguments.rounds, warmup=2, report=status.update)
    console.print(table(arguments, measurements, expected))
    console.print(f"expected loss, stock Hugging Face in float32, a document at a time: {expected:.5f}")
    if arguments.json:
        facts: dict[str, Any] = {"benchmark": "train_step", "machine": machine(), "lengths": lengths}
        write_json(arguments.json, facts | {"dtype": arguments.dtype}, measurements)
    for m in measurements:
        if m.error:
            console.print(f"[bold]{m.name} failed[/bold]\n{m.error}")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
