"""Chat tuning side by side: Hugging Face padded, padding-free and with TRL's packing, against lemur_fast.

    python -m benchmarks.chat                        # 32 embedded conversations, about ten minutes
    python -m benchmarks.chat --conversations 64 --layers 12 --width 768

All rows train the same model on the same conversations, drawn from the embedded ones, with the same labels: a step is
forward and backward over all of them and one AdamW step. What differs is how they are laid out: 8 at a time, padded to
the longest (the defaults of Trainer); 8 at a time, end to end (DataCollatorWithFlattening); packed by TRL; packed by
lemur_fast. Supervised tokens are those that the answers are made of; padding counts for nothing. Each row runs in a
process of its own and they take turns. The last row is the floor: the matrix products that the real tokens need in the
layers and the trained ones in the output layer, and nothing else. A row whose loss disagrees with stock Hugging Face in
float32, one conversation at a time, prints no speed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from datasets import Dataset, disable_progress_bars
from rich.console import Console
from rich.table import Table
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, LlamaConfig, LlamaForCausalLM

import lemur_fast as lf
from benchmarks.harness import Measurement, dtype_to_measure, in_turns, machine_and_dtype, write_json
from benchmarks.train_step import products_of_layer
from lemur_fast import _malloc
from lemur_fast.data.chat.chatml import ChatEncoder, Encoded, add_chat_tokens, fitted
from lemur_fast.data.chat.conversation import Conversation, Unfit, checked
from lemur_fast.data.chat.sources import embedded_chat_sources
from lemur_fast.data.tokenizer import load_tokenizer

PADDED, FREE, OURS, FLOOR = "HF padded", "HF padding-free", "lemur_fast", "matrix products alone"
LOSS_TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-4}  # relative; see train_step


@dataclass
class Arguments:
    """Times an epoch over some conversations for every rival, in turns."""

    conversations: int = 32
    """How many; drawn from all embedded ones alike."""
    seq_len: int = 4096
    """Tokens of a packed row, and of the longest conversation."""
    batch: int = 8
    """Conversations that the first two rivals take at a time; Trainer's default."""
    layers: int = 6
    """Decoder layers of the model."""
    width: int = 512
    """Hidden size; heads have 64 dimensions, the MLP is 8/3 as wide, the vocabulary 32,005."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of weights and activations; auto is bfloat16, or float32 on a CPU that only emulates it."""
    rounds: int = 3
    """Timed steps of each rival."""
    seed: int = 0
    """Draws the conversations and their order."""
    only: tuple[str, ...] = ()
    """Parts of the names of the rivals to run; all by default."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Also write a JSON line for each rival."""

    def __post_init__(self) -> None:
        self.dtype = dtype_to_measure(self.dtype, "cpu")  # type: ignore[assignment]


Example = dict[str, list[int]]  # input_ids, labels


def drawn(arguments: Arguments) -> tuple[list[Encoded], int]:
    """Conversations as tokens, and the number of those that they were drawn from."""
    tokenizer = load_tokenizer()
    add_chat_tokens(tokenizer)
    everything: list[Conversation] = []
    for source in embedded_chat_sources():
        for item in source.read():
            try:
                everything.append(checked(item))
            except Unfit:
                continue
    order = np.random.default_rng(arguments.seed).permutation(len(everything))[: arguments.conversations]
    encoder = ChatEncoder(tokenizer)
    pieces = (fitted(encoded, arguments.seq_len, "truncate") for encoded in encoder([everything[i] for i in order]))
    return [piece for found in pieces for piece in found], len(everything)


def example(encoded: Encoded) -> Example:
    """Hugging Face's form of a conversation: labels not yet shifted, -100 where nothing is trained."""
    labels = np.where(encoded.trained, encoded.ids, -100)
    return {"input_ids": encoded.ids.tolist(), "labels": labels.tolist()}


# ---- rivals: each function runs in a fresh process and returns the step to time --------------------------------------


def _model(arguments: Arguments) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return (
        LlamaForCausalLM._from_config(model_config(arguments), attn_implementation="sdpa")
        .to(getattr(torch, arguments.dtype))
        .train()
    )


def _step(model: LlamaForCausalLM, batches: list[dict[str, Any]]) -> Callable[[], float]:
    # Learning rate 0: the same loss at every step, and the same work.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def step() -> float:
        total = 0.0
        for batch in batches:
            loss = model(**batch).loss
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def _counted(batches: list[dict[str, Any]], examples: list[Example]) -> list[dict[str, Any]]:
    """Batches whose losses add up to the mean over all trained tokens, as Trainer accumulates them."""
    count = torch.tensor(sum(label != -100 for e in examples for label in e["labels"]))
    return [batch | {"num_items_in_batch": count, "use_cache": False} for batch in batches]


def _groups(examples: list[Example], size: int) -> list[list[Example]]:
    return [examples[start : start + size] for start in range(0, len(examples), size)]


def padded(arguments: Arguments, examples: list[Example]) -> Callable[[], float]:
    """Trainer's defaults: 8 conversations in random order, padded to the longest of them."""
    tokenizer = load_tokenizer()
    add_chat_tokens(tokenizer)
    collate = DataCollatorForSeq2Seq(tokenizer, padding=True)
    batches = [dict(collate(group)) for group in _groups(examples, arguments.batch)]
    return _step(_model(arguments), _counted(batches, examples))


def padding_free(arguments: Arguments, examples: list[Example]) -> Callable[[], float]:
    """The same 8 conversations, end to end in one row, told apart by positions that restart."""
    collate = DataCollatorWithFlattening()
    batches = [dict(collate(group, return_tensors="pt")) for group in _groups(examples, arguments.batch)]
    return _step(_model(arguments), _counted(batches, examples))


def trl(arguments: Arguments, examples: list[Example]) -> Callable[[], float]:
    """TRL's SFTTrainer with packing: best-fit-decreasing, a row at a time."""
    from trl.data_utils import pack_dataset  # not installed everywhere
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    disable_progress_bars()
    packed = pack_dataset(Dataset.from_list(examples), arguments.seq_len, "bfd", {"keep_in_memory": True})
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    return _step(_model(arguments), _counted([dict(collate([row])) for row in packed], examples))


def lemur(arguments: Arguments, examples: list[Example]) -> Callable[[], float]:
    """The same model, accelerated, on rows that lemur_fast has packed."""
    model = _model(arguments)
    lf.accelerate(model)
    masks = [[label != -100 for label in e["labels"]] for e in examples]
    packed, _ = lf.pack([e["input_ids"] for e in examples], arguments.seq_len, loss_masks=masks)
    count = sum(int(batch.num_items) for batch in packed)
    return _step(model, [batch.model_inputs() | {"num_items_in_batch": count} for batch in packed])


def matrix_products(arguments: Arguments, examples: list[Example]) -> Callable[[], None]:
    """Output, input gradient and weight gradient of every linear layer, a packed row at a time."""
    _malloc.keep_freed_memory()  # as accelerate does
    with torch.device("meta"):
        model = LlamaForCausalLM(model_config(arguments))
    shapes = {name: m.weight.shape for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    kind = getattr(torch, arguments.dtype)
    weights = {name: torch.randn(shape).to(kind) for name, shape in shapes.items()}
    packed, _ = lf.pack([e["input_ids"] for e in examples], arguments.seq_len)
    trained = sum(label != -100 for e in examples for label in e["labels"])
    shares = [(batch.num_tokens, max(1, round(trained / len(packed)))) for batch in packed]
    inputs = {
        width: torch.randn(arguments.seq_len, width).to(kind) for width in {shape[1] for shape in shapes.values()}
    }
    gradients = {width: torch.randn(arguments.seq_len, width).to(kind) for width in {s[0] for s in shapes.values()}}

    def step() -> None:
        for tokens, targets in shares:
            for name, weight in weights.items():
                rows = targets if name == "lm_head" else tokens
                x, dy = inputs[weight.shape[1]][:rows], gradients[weight.shape[0]][:rows]
                products_of_layer(x, weight, dy)

    return step


RIVALS: dict[str, Callable] = {
    PADDED: padded,
    FREE: padding_free,
    "TRL packing": trl,
    OURS: lemur,
    FLOOR: matrix_products,
}


def model_config(arguments: Arguments) -> LlamaConfig:
    """LLaMA-2's architecture at the size asked for."""
    if arguments.width % 64:
        raise SystemExit(f"--width: got {arguments.width}; takes a multiple of 64, the head dimension")
    return LlamaConfig(
        vocab_size=32005,
        hidden_size=arguments.width,
        intermediate_size=(arguments.width * 8 // 3 + 63) // 64 * 64,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.width // 64,
        max_position_embeddings=arguments.seq_len,
        rms_norm_eps=1e-5,
    )


# ---- the table -------------------------------------------------------------------------------------------------------


def expected_loss(arguments: Arguments, examples: list[Example]) -> float:
    """Stock Hugging Face's loss in float32, a conversation at a time: no layout to get wrong."""
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(model_config(arguments), attn_implementation="eager")
    model.to(getattr(torch, arguments.dtype)).float()
    total, count = 0.0, sum(label != -100 for e in examples for label in e["labels"])
    with torch.no_grad():
        for one in examples:
            ids, labels = (torch.tensor([one[name]]) for name in ("input_ids", "labels"))
            total += float(model(input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(count)).loss)
    return total


def judge(arguments: Arguments, measurements: list[Measurement], expected: float) -> None:
    """Take the time from those whose loss is wrong: it means nothing, neither printed nor written."""
    for m in measurements:
        allowed = LOSS_TOLERANCE[arguments.dtype] * expected
        wrong = [loss for loss in m.results if loss is not None and not abs(loss - expected) <= allowed]
        if wrong and not m.error:
            m.error, m.seconds = f"wrong loss: {wrong[0]:.5f}, not {expected:.5f}", []


def table(arguments: Arguments, measurements: list[Measurement], trained: int) -> Table:
    """What the rivals showed, side by side."""
    by_name = {m.name: m for m in measurements if m.seconds}
    result = Table(title=f"{arguments.dtype}, medians of {arguments.rounds} steps")
    headings = ("", "supervised tok/s", "± %", "x padded", "x padding-free", "x floor", "GB", "of padded", "loss")
    for heading in headings:
        result.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    floor = by_name.get(FLOOR)
    for m in measurements:
        if m.error:
            result.add_row(m.name, "failed")
            continue
        losses = [loss for loss in m.results if loss is not None]
        ratios = [f"{by_name[p].median / m.median:.2f}" if p in by_name else "-" for p in (PADDED, FREE)]
        result.add_row(
            m.name,
            f"{trained / m.median:,.0f}",
            f"{100 * m.spread:.0f}",
            *ratios,
            f"{m.median / floor.median:.2f}" if floor else "-",
            f"{m.peak_bytes / 1e9:.2f}",
            f"{m.peak_bytes / by_name[PADDED].peak_bytes:.2f}" if PADDED in by_name else "-",
            f"{losses[0]:.5f}" if losses else "-",
        )
    return result


def main(arguments: Arguments) -> None:
    """Measures and prints."""
    console = Console(width=130, highlight=False)
    chosen = {n: r for n, r in RIVALS.items() if not arguments.only or any(part in n for part in arguments.only)}
    if not chosen:
        raise SystemExit(f"--only: got {arguments.only}; takes parts of {', '.join(RIVALS)}")
    conversations, of_all = drawn(arguments)
    examples = [example(encoded) for encoded in conversations]
    lengths = [len(encoded) for encoded in conversations]
    tokens, trained = sum(lengths), sum(int(encoded.trained.sum()) for encoded in conversations)
    room = sum(len(group) * max(len(e["input_ids"]) for e in group) for group in _groups(examples, arguments.batch))
    with torch.device("meta"):
        parameters = sum(p.numel() for p in LlamaForCausalLM(model_config(arguments)).parameters())
    console.print(machine_and_dtype(arguments.dtype))
    console.print(f"{parameters / 1e6:.1f} M parameters, {arguments.layers} layers, width {arguments.width}")
    console.print(
        f"{len(lengths)} of {of_all:,} embedded conversations: {tokens:,} tokens (median {np.median(lengths):.0f}, "
        f"longest {max(lengths):,}), {trained:,} trained on; padded {arguments.batch} at a time they take {room:,}"
    )
    expected = expected_loss(arguments, examples)
    rivals = {name: (rival, (arguments, examples)) for name, rival in chosen.items()}
    with console.status("starting") as status:
        measurements = in_turns(rivals, rounds=arguments.rounds, warmup=1, report=status.update)
    judge(arguments, measurements, expected)
    console.print(table(arguments, measurements, trained))
    console.print(f"expected loss, stock Hugging Face in float32, a conversation at a time: {expected:.5f}")
    if arguments.json:
        case = {"case": "conversations", "shape": f"{tokens} tokens, {len(lengths)} conversations"}
        facts: dict[str, Any] = {"benchmark": "chat", "dtype": arguments.dtype, **case}
        write_json(arguments.json, facts | {"tokens": tokens, "trained": trained, "padded": room}, measurements)
    for m in measurements:
        if m.error:
            console.print(f"[bold]{m.name} failed[/bold]\n{m.error}")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
