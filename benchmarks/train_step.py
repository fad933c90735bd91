"""A whole training step, side by side: Hugging Face eager, sdpa and compiled against lemur_fast.

    python -m benchmarks.train_step                     # one packed row of 4096 tokens, about five minutes
    python -m benchmarks.train_step --dtype float32
    python -m benchmarks.train_step --documents 1       # one document fills the row: attention at its dearest
    python -m benchmarks.train_step --device cuda --model llama-2-7b --batch drawn --rounds 10

All rows train the same model on the same packed batch with the same loss: forward, backward and a fused AdamW step.
Each runs in a process of its own and they take turns, except on a GPU, where one after the other has the memory: first
the baseline and lemur_fast, last what torch compiles, so that what a time limit cuts off is the least. On a CPU
`accelerate` makes malloc keep what a step frees, which anyone can ask of it by the environment, too: a row shows what
Hugging Face gains by that.
Liger's patches, and Hugging Face on FlashAttention, take part where they are installed and there is a GPU. The last row
is the floor: the model's own matrix products alone, forward and backward, on tensors of the same shapes, in float32
where lemur_fast takes them so because this CPU is faster at that. A row whose loss disagrees with the float32 loss of
stock Hugging Face prints no time.

MFU is the FLOPs that the mathematics asks for (`lemur_fast.training.flops`: attention inside documents, the output
layer for trained tokens alone) over the time, over the peak: the datasheet's on a GPU that is known, else that of a
large matrix product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import lemur_fast as lf
from benchmarks.attention import long_tail
from benchmarks.harness import (
    Measurement,
    Row,
    command_line,
    dtype_to_measure,
    in_turns,
    machine_and_dtype,
    rows_of_measurements,
    write_rows,
)
from benchmarks.peers import Unavailable, needs
from lemur_fast import _malloc
from lemur_fast.ops import _products
from lemur_fast.training.flops import model_flops, peak_flops

FLOOR = "matrix products alone"
BASELINE, KEPT = "HF sdpa", "HF sdpa, memory kept"
# Relative, to stock Hugging Face in float32, whose own bfloat16 is off by 2e-5. Documents that attend to one another
# show as 1e-3: at random weights the loss hangs little on attention.
LOSS_TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-4}


@dataclass
class Arguments:
    """Times a training step of every rival, in turns."""

    tokens: int = 4096
    """Tokens in the packed row."""
    batch: Literal["corpus", "drawn"] = "corpus"
    """Whole documents of the embedded corpus, or random tokens in documents of lengths drawn as text has them."""
    documents: int = 18
    """Roughly how many documents the row holds: of all best-fit packs of the embedded corpus, the nearest is taken."""
    model: Literal["small", "llama-2-7b"] = "small"
    """The size of the model: `--width` says it, or it is LLaMA-2-7B's."""
    layers: int = 0
    """Decoder layers; 0 for 6 of the small model, and of LLaMA-2-7B for as many as the device can train."""
    width: int = 512
    """Hidden size of the small model; heads have 64 dimensions, the MLP is 8/3 as wide, the vocabulary 32,000."""
    device: str = "cpu"
    """Where: cpu or cuda."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of weights and activations; auto is bfloat16, or float32 on a CPU that only emulates it."""
    rounds: int = 5
    """Timed steps of each rival."""
    only: tuple[str, ...] = ()
    """Parts of the names of the rivals to run; all by default."""
    json: Path | None = None
    """Also write a JSON line for each rival."""

    def __post_init__(self) -> None:
        self.dtype = dtype_to_measure(self.dtype, self.device)  # type: ignore[assignment]


def model_config(arguments: Arguments) -> LlamaConfig:
    """LLaMA-2's architecture at the size asked for."""
    if arguments.model == "llama-2-7b":
        layers = arguments.layers or layers_that_fit(torch.device(arguments.device), arguments.tokens)
        return LlamaConfig(num_hidden_layers=layers, max_position_embeddings=arguments.tokens, rms_norm_eps=1e-5)
    if arguments.width % 64:
        raise SystemExit(f"--width: got {arguments.width}; takes a multiple of 64, the head dimension")
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=arguments.width,
        intermediate_size=(arguments.width * 8 // 3 + 63) // 64 * 64,
        num_hidden_layers=arguments.layers or 6,
        num_attention_heads=arguments.width // 64,
        max_position_embeddings=arguments.tokens,
        rms_norm_eps=1e-5,
    )


def layers_that_fit(device: torch.device, tokens: int) -> int:
    """Layers of LLaMA-2-7B that stock Hugging Face can train on a device, of its 32.

    A layer has 202 M parameters of 8 bytes (weight, gradient and two moments, in bfloat16) and keeps about 440 kB a
    token for its backward; embedding, output layer and logits come once.
    """
    if device.type != "cuda":
        return 1
    memory = torch.cuda.mem_get_info(device)[0] - 2 * 131e6 * 8 - tokens * 32000 * 14
    return max(1, min(32, int(0.92 * memory / (202e6 * 8 + 440e3 * tokens))))


def batch_of(arguments: Arguments) -> lf.PackedBatch:
    """The batch that the arguments ask for, on the CPU."""
    return real_batch(arguments) if arguments.batch == "corpus" else drawn_batch(arguments)


def drawn_batch(arguments: Arguments) -> lf.PackedBatch:
    """Random tokens in documents of log-normal lengths, the last one cut."""
    generator = torch.Generator().manual_seed(0)
    lengths = long_tail(arguments.tokens, generator)
    return lf.PackedBatch.from_documents([torch.randint(0, 32000, (n,), generator=generator) for n in lengths])


def real_batch(arguments: Arguments) -> lf.PackedBatch:
    """The best-fit pack of whole documents of the embedded corpus whose number of documents is nearest to the wish."""
    from lemur_fast.data.embedded import embedded_sources  # what they need is not installed everywhere
    from lemur_fast.data.tokenizer import encode_documents, load_tokenizer

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


def _model(config: LlamaConfig, dtype: str, attention: str, device: torch.device) -> LlamaForCausalLM:
    torch.manual_seed(0)
    with device:
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
    config: LlamaConfig,
    batch: lf.PackedBatch,
    dtype: str,
    device: torch.device,
    attention: str,
    compiled: bool = False,
    keeps_memory: bool = False,
) -> Callable[[], float]:
    """Stock transformers; documents are given by positions that restart, as its documentation says."""
    if keeps_memory:
        _malloc.keep_freed_memory()
    model, batch = _model(config, dtype, attention, device), batch.to(device)
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


def liger(
    config: LlamaConfig, batch: lf.PackedBatch, dtype: str, device: torch.device, attention: str
) -> Callable[[], float]:
    """Stock transformers under Liger's patches, all of them, which it makes before the model is built."""
    needs("liger_kernel.transformers", device).apply_liger_kernel_to_llama()
    return hugging_face(config, batch, dtype, device, attention)


def lemur(
    config: LlamaConfig, batch: lf.PackedBatch, dtype: str, device: torch.device, compiled: bool
) -> Callable[[], float]:
    """The same model, accelerated."""
    model, batch = _model(config, dtype, "sdpa", device), batch.to(device)
    lf.accelerate(model)
    run = torch.compile(model) if compiled else model
    return _step(model, lambda: run(**batch.model_inputs()).loss)


def products_of_layer(x: Tensor, weight: Tensor, dy: Tensor) -> None:
    """Output, input gradient and weight gradient of a linear layer, as lemur_fast takes them."""
    if _products.serves(x, weight):
        _products.project(x, weight, None, out=torch.empty_like(dy))
        _products.gradients([_products.Layer(dy, weight, torch.empty_like(weight))], x, torch.empty_like(x))
        return
    torch.mm(x, weight.T)
    torch.mm(dy, weight)
    _products.weight_gradients([dy], x, compiled=True)


def matrix_products(config: LlamaConfig, batch: lf.PackedBatch, dtype: str, device: torch.device) -> Callable[[], None]:
    """Output, input gradient and weight gradient of every linear layer, one after another, and nothing else.

    Each as lemur_fast takes it: in float32 where this CPU is faster at that than at bfloat16, and with its malloc.
    """
    if device.type == "cpu":
        _malloc.keep_freed_memory()
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    shapes = [m.weight.shape for m in model.modules() if isinstance(m, torch.nn.Linear)]
    tokens, kind = batch.input_ids.numel(), getattr(torch, dtype)
    weights = [torch.randn(shape, device=device, dtype=kind) for shape in shapes]
    inputs = {width: torch.randn(tokens, width, device=device, dtype=kind) for width in {shape[1] for shape in shapes}}
    gradients = {
        width: torch.randn(tokens, width, device=device, dtype=kind) for width in {shape[0] for shape in shapes}
    }

    def step() -> None:
        for weight in weights:
            out_features, in_features = weight.shape
            x, dy = inputs[in_features], gradients[out_features]
            products_of_layer(x, weight, dy)

    return step


def rivals(arguments: Arguments, batch: lf.PackedBatch) -> dict[str, tuple[Callable, tuple]]:
    """Name -> how to build its step."""
    device = torch.device(arguments.device)
    given = (model_config(arguments), batch, arguments.dtype, device)
    return {
        "HF eager": (hugging_face, (*given, "eager")),
        BASELINE: (hugging_face, (*given, "sdpa")),
        KEPT: (hugging_face, (*given, "sdpa", False, True)),
        "HF sdpa + compile": (hugging_face, (*given, "sdpa", True)),
        "HF FlashAttention 2": (hugging_face, (*given, "flash_attention_2")),
        "HF sdpa + Liger": (liger, (*given, "sdpa")),
        "HF FlashAttention 2 + Liger": (liger, (*given, "flash_attention_2")),
        "lemur_fast": (lemur, (*given, False)),
        "lemur_fast + compile": (lemur, (*given, True)),
        FLOOR: (matrix_products, given),
    }


def _turn(name: str) -> tuple[bool, bool]:
    """Sorts rivals by when they have the GPU."""
    return "compile" in name, name not in (BASELINE, "lemur_fast")


def cannot_run(name: str, device: torch.device) -> str:
    """Why a rival cannot run here; nothing when it may."""
    try:
        if "FlashAttention" in name:
            needs("flash_attn", device)
        if "Liger" in name:
            needs("liger_kernel.transformers", device)
    except Unavailable as reason:
        return str(reason)
    if name == "HF eager" and device.type == "cuda":
        return "left out on a GPU: it keeps the scores of every layer, T x T for each head"
    if name == KEPT and device.type == "cuda":
        return "malloc has no part in a step on a GPU"
    return ""


# ---- the table -------------------------------------------------------------------------------------------------------


def expected_loss(arguments: Arguments, batch: lf.PackedBatch) -> float:
    """Stock Hugging Face's eager loss in float32, a document at a time: no packing to get wrong."""
    device = torch.device(arguments.device)
    model, batch = _model(model_config(arguments), arguments.dtype, "eager", device).float(), batch.to(device)
    total = 0.0
    with torch.no_grad():
        for start, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
            if end - start > 1:
                ids = batch.input_ids[None, start:end]
                total += float(model(input_ids=ids, labels=ids, num_items_in_batch=batch.num_items).loss)
    return total


def judge(arguments: Arguments, measurements: list[Measurement], expected: float) -> None:
    """Turns a measurement whose loss is wrong into a failed one."""
    for m in measurements:
        losses = [loss for loss in m.results if loss is not None]
        wrong = [x for x in losses if not abs(x - expected) <= LOSS_TOLERANCE[arguments.dtype] * expected]
        if wrong and not m.error:
            m.error, m.seconds = f"wrong loss: {wrong[0]:.5f}", []


def table(arguments: Arguments, measurements: list[Measurement], expected: float) -> Table:
    """The figures, with ratios to the baseline and to the floor of the same run; a wrong loss prints none."""
    judge(arguments, measurements, expected)
    by_name = {m.name: m for m in measurements if m.seconds}
    floor, baseline = by_name.get(FLOOR), by_name.get(BASELINE)
    result = Table(title=f"training step, {arguments.tokens} tokens, {arguments.dtype}")
    for heading in ("", "tokens/s", "± %", f"x {BASELINE}", "x floor", "peak GB", f"x {BASELINE}", "loss"):
        result.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for m in measurements:
        if m.error:
            result.add_row(m.name, m.error.strip().splitlines()[-1][:24])
            continue
        losses = [loss for loss in m.results if loss is not None]
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


def rows_of(arguments: Arguments, measurements: list[Measurement], batch: lf.PackedBatch) -> list[Row]:
    """The figures, for `--json`."""
    config, lengths = model_config(arguments), batch.cu_seqlens.diff().tolist()
    size = f"width {config.hidden_size}, {config.num_hidden_layers} layers"
    header = {
        "benchmark": "train_step",
        "case": f"LLaMA, {size}" if arguments.model == "small" else f"LLaMA-2-7B's, {size}",
        "shape": f"{arguments.tokens} tokens, {len(lengths)} documents",
        "direction": "step",
        "dtype": arguments.dtype,
        "flops": model_flops(config, lengths, int(batch.num_items)),
    }
    header["peak_flops"], peak = peak_flops(torch.device(arguments.device), getattr(torch, arguments.dtype))
    rows = rows_of_measurements(header | {"peak": peak}, measurements)
    for row in rows:
        row.error = (row.error.strip().splitlines() or [""])[-1]
        if row.median:
            row.facts["tokens_per_second"] = round(arguments.tokens / row.median, 1)
        if row.rival == FLOOR:
            row.flops = None
    return rows


def main(arguments: Arguments) -> list[Row]:
    """Measures and prints."""
    console = Console(width=120, highlight=False)
    device, batch = torch.device(arguments.device), batch_of(arguments)
    lengths = sorted(batch.cu_seqlens.diff().tolist(), reverse=True)
    config = model_config(arguments)
    arguments.layers = config.num_hidden_layers
    with torch.device("meta"):
        parameters = sum(p.numel() for p in LlamaForCausalLM(config).parameters())
    console.print(machine_and_dtype(arguments.dtype, device))
    console.print(f"{parameters / 1e6:.1f} M parameters, {arguments.layers} layers, width {config.hidden_size}")
    if arguments.model == "llama-2-7b" and arguments.layers < 32:
        console.print(f"LLaMA-2-7B has 32 layers; {arguments.layers} is what this device's memory can train")
    console.print(f"{len(lengths)} documents of {', '.join(map(str, lengths))} tokens; {int(batch.num_items)} trained")
    chosen = {
        name: rival
        for name, rival in rivals(arguments, batch).items()
        if not arguments.only or any(part in name for part in arguments.only)
    }
    if not chosen:
        raise SystemExit(f"--only: got {arguments.only}; takes parts of {', '.join(rivals(arguments, batch))}")
    missing = [Measurement(name, error=why) for name in chosen if (why := cannot_run(name, device))]
    for m in missing:
        del chosen[m.name]
    expected = expected_loss(arguments, batch)
    measurements: list[Measurement] = []
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with console.status("starting") as status:
        # Side by side they would not fit a GPU.
        one_by_one = [{name: chosen[name]} for name in sorted(chosen, key=_turn)]
        for group in one_by_one if device.type == "cuda" else [chosen]:
            measurements += in_turns(group, rounds=arguments.rounds, warmup=1, report=status.update)
            judge(arguments, measurements, expected)
            if arguments.json:
                write_rows(arguments.json, rows_of(arguments, [*measurements, *missing], batch), device)
    console.print(table(arguments, measurements, expected))
    console.print(f"expected loss, stock Hugging Face in float32, a document at a time: {expected:.5f}")
    rows = rows_of(arguments, [*measurements, *missing], batch)
    ours = next((row for row in rows if row.rival == "lemur_fast" and row.share_of_peak), None)
    if ours:
        console.print(f"lemur_fast: {ours.share_of_peak:.1%} MFU; {ours.facts['peak']}")
    for m in missing:
        console.print(f"{m.name}: {m.error}")
    for m in measurements:
        if m.error:
            console.print(f"[bold]{m.name} failed[/bold]\n{m.error}")
    return rows


if __name__ == "__main__":
    main(command_line(Arguments, __doc__))
