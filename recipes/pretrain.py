"""Pretrain a LLaMA on code and text, 10:1 by tokens.

    python recipes/pretrain.py                                  # preset tiny: learns from nothing in four minutes
    python recipes/pretrain.py --steps 20 --out runs/look       # a quick look, in a folder of your choice
    python recipes/pretrain.py --batch-tokens 65536 --lr 1e-3   # every field below can be set
    python recipes/pretrain.py --model DIR --lr 1e-4            # continue the LLaMA in a Hugging Face folder
    python recipes/pretrain.py --preset smollm2-135m --model DIR

Without `--data` the corpus is what every Python brings: the standard library's code, Python's documentation and the
READMEs of installed packages. Nothing is downloaded. What a run leaves in its folder:

    run.json         what was run, on what, and how it ended       loss.png       training and held-out loss
    metrics.jsonl    every step's figures                          tensorboard/   the same figures
    data/            the corpus: summary.html, manifest, tokens    samples.txt    what the model writes at the end
    model/           the model, for `AutoModelForCausalLM.from_pretrained`

Ctrl-C (or SIGTERM) finishes the step, saves the model and leaves; a second one leaves at once.
"""

import argparse
import dataclasses
import math
import os
import platform
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # tokenize on all cores

import torch
import transformers
import tyro
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)
from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup_lr_rate

import lemur_fast as lf
from lemur_fast.data.embedded import embedded_sources
from lemur_fast.data.executors import build_store
from lemur_fast.data.loader import Loader, held_out_batches
from lemur_fast.data.mixture import Mixture
from lemur_fast.data.pipeline import Settings
from lemur_fast.data.store import TokenStore
from lemur_fast.data.tokenizer import MISTRAL_V1_NOTICE, fingerprint, load_tokenizer
from lemur_fast.files import write_json, write_text
from lemur_fast.training.distributed import compute_dtype, full_state_dict, process_group, shard
from lemur_fast.training.interruption import Interrupted, Interruption
from lemur_fast.training.metrics import MetricsLog, peak_memory_gib, plot_losses
from lemur_fast.training.optimizer import adamw
from lemur_fast.training.saving import run_folder, save_model
from lemur_fast.training.step import accumulate, held_out_losses

PROMPTS = {"code": 'def read_json(path):\n    """', "text": "The Python interpreter is"}


@dataclass(frozen=True)
class Pretrain:
    """Settings of a run. Defaults are those of the preset."""

    # What, and where to.
    preset: Literal["tiny", "smollm2-135m"] = "tiny"
    """Where the other defaults come from. tiny: a LLaMA-2 of 21.1M parameters from random weights, made for two cores.
    smollm2-135m: continue a SmolLM2-135M (needs --model)."""
    out: Path | None = None
    """Folder of the run; must be new or empty. Default: runs/pretrain-PRESET, or -2, -3, ... when that is taken."""
    overwrite: bool = False
    """Delete the earlier run in --out first."""
    model: Path | None = None
    """Hugging Face folder of a LLaMA to continue, and its tokenizer. Default: random weights, Mistral v1 tokenizer."""
    resume: Literal["never", "auto"] = "never"
    """Continue an interrupted run. Not supported yet: auto is refused."""
    seed: int = 0
    """Decides the first weights, the order of the data and the samples."""

    # Shape of a model made from random weights; --model brings its own.
    hidden_size: int = 256
    """Width of the residual stream."""
    intermediate_size: int = 688
    """Width of the MLP."""
    layers: int = 6
    """Decoder layers."""
    heads: int = 4
    """Query heads; hidden_size / heads is the size of one head."""
    kv_heads: int = 4
    """Key and value heads; fewer than --heads is grouped-query attention."""

    # Data.
    data: Path | None = None
    """Corpus to train on: what prepare_data.py wrote, or the data/ folder of an earlier run. Default: prepare the
    embedded corpus."""
    mixture: dict[str, float] = field(default_factory=lambda: {"code": 10.0, "text": 1.0})
    """Share of the tokens for each kind of document, or source of the corpus, in any unit; 0 leaves one out, but still
    measures it."""
    seq_len: int = 4096
    """Tokens in a packed row: the longest piece of a document that the model sees at once."""
    held_out: float = 0.05
    """Share of the documents kept from training, to measure on; chosen by a hash of the text."""

    # Optimization.
    steps: int = 110
    """Optimizer steps."""
    batch_tokens: int = 4096
    """Tokens in an optimizer step, a multiple of seq_len; they are read seq_len at a time and accumulated."""
    lr: float = 2e-3
    """Peak learning rate. It warms up linearly, then follows a cosine down to a tenth."""
    warmup_steps: int = 10
    """Steps until the learning rate is at its peak."""
    weight_decay: float = 0.1
    """AdamW's weight decay; on matrices, never on norms or biases."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's averaging of gradients and of their squares."""
    clip: float = 1.0
    """Longest gradient, over all parameters together; longer ones are scaled down to it."""

    # Looking at it.
    eval_every: int = 30
    """Steps between held-out measurements; there is one before the first step and one after the last in any case."""
    eval_tokens: int = 8192
    """Held-out tokens of each kind in a measurement."""
    sample_tokens: int = 64
    """Longest sample to write at the end, for each of two prompts."""

    # Machine.
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a CUDA GPU if there is one, else the CPU."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of forward and backward; weights, gradient sums and optimizer are float32. auto: bfloat16 where it is fast."""


PRESETS = {
    "tiny": Pretrain(),
    "smollm2-135m": Pretrain(preset="smollm2-135m", seq_len=2048, batch_tokens=8192, steps=50, lr=1e-4, warmup_steps=5),
}


def check(args: Pretrain) -> None:
    """Refuse settings that cannot work, before anything is done."""
    if args.resume != "never":
        raise ValueError("--resume auto: resuming is not supported yet; start anew in another folder")
    for name in ("steps", "batch_tokens", "eval_tokens", "lr", "clip", "hidden_size", "layers", "heads", "kv_heads"):
        if not getattr(args, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0, got {getattr(args, name)}")
    for name in ("seed", "warmup_steps", "weight_decay", "eval_every", "sample_tokens"):
        if not getattr(args, name) >= 0:
            raise ValueError(f"--{name.replace('_', '-')} must not be negative, got {getattr(args, name)}")
    if args.seq_len < 2:
        raise ValueError(f"--seq-len must be at least 2, got {args.seq_len}")
    if args.batch_tokens % args.seq_len:
        raise ValueError(f"--batch-tokens must be a multiple of --seq-len ({args.seq_len}), got {args.batch_tokens}")
    if args.model is None:
        if args.preset != "tiny":
            raise ValueError(f"preset {args.preset} continues a model that exists: give its folder with --model DIR")
        if args.hidden_size % (2 * args.heads) or args.heads % args.kv_heads:
            shape = f"--hidden-size {args.hidden_size}, --heads {args.heads}, --kv-heads {args.kv_heads}"
            raise ValueError(f"{shape}: a head's size must be an even number, --heads a multiple of --kv-heads")
    if min(args.mixture.values()) < 0 or max(args.mixture.values()) == 0:
        raise ValueError(f"--mixture: weights must not be negative, nor all 0; got {args.mixture}")
    if args.overwrite and args.out is None:
        raise ValueError("--overwrite needs --out, to say which run may be deleted")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA GPU here")


def model_config(args: Pretrain, tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
    """Architecture of the model: LLaMA-2's, or that of --model; made to fit the tokenizer and the row."""
    if args.model is None:
        return LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=args.hidden_size,
            intermediate_size=args.intermediate_size,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            num_key_value_heads=args.kv_heads,
            max_position_embeddings=args.seq_len,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    config = transformers.AutoConfig.from_pretrained(args.model)
    if not isinstance(config, LlamaConfig):
        raise ValueError(f"--model {args.model} is a {config.model_type!r}; only LLaMA models are supported")
    if len(tokenizer) > config.vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model's vocabulary only {config.vocab_size}")
    if args.seq_len > config.max_position_embeddings:
        raise ValueError(f"--seq-len {args.seq_len} is longer than the model allows: {config.max_position_embeddings}")
    return config


def prepare_data(args: Pretrain, folder: Path, tokenizer: PreTrainedTokenizerBase) -> TokenStore:
    """Open --data, or tokenize the embedded corpus."""
    if args.data is None:
        notice = MISTRAL_V1_NOTICE if args.model is None else f"the tokenizer in {args.model}"
        settings = Settings(held_out=args.held_out)
        return build_store(folder / "data", embedded_sources(), tokenizer, settings, tokenizer_notice=notice, workers=1)
    store = TokenStore(args.data)
    used = store.manifest["tokenizer"]
    if used["fingerprint"] != fingerprint(tokenizer):
        raise ValueError(
            f"--data {args.data} was tokenized with another tokenizer ({used['notice'] or 'unnamed'}, "
            f"{used['vocab_size']} tokens) than the model's ({len(tokenizer)} tokens)"
        )
    return store


def pretrain(args: Pretrain, interruption: Interruption) -> int:
    """The whole run; returns the exit code."""
    started = time.perf_counter()
    transformers.logging.disable_progress_bar()
    seconds: dict[str, float] = {}  # of each phase

    # 1. Everything that may refuse: settings, folder, tokenizer, data, model.
    try:
        check(args)
        tokenizer = load_tokenizer(args.model)
        config = model_config(args, tokenizer)
        folder = run_folder(args.out, Path("runs") / f"pretrain-{args.preset}", args.overwrite)
        print(f"run        {folder}")
        store = prepare_data(args, folder, tokenizer)
        print(store.describe())
        mixture = Mixture(store.train, args.mixture, args.seq_len, args.seed)
        unseen = store.held_out
        held_out = [held_out_batches(unseen, kind, args.eval_tokens, args.seq_len, tokenizer) for kind in args.mixture]
    except (ValueError, OSError) as error:
        print(f"pretrain: {error}", file=sys.stderr)
        return 2
    run_tokens = args.steps * args.batch_tokens
    planned = {kind: weight * run_tokens for kind, weight in mixture.weights.items()}
    for kind, epochs in mixture.epochs(planned).items():
        repeated = f"; EVERY DOCUMENT IS READ {epochs:.1f} TIMES" if epochs > 1 else ""
        print(f"mixture    {kind} {mixture.weights[kind]:.1%} of the tokens, {epochs:.2f} epochs{repeated}")
    seconds["data"] = time.perf_counter() - started

    device = torch.device(args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    dtype = compute_dtype(device) if args.dtype == "auto" else getattr(torch, args.dtype)
    torch.manual_seed(args.seed)
    if args.model is None:
        model = LlamaForCausalLM(config)
        special = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
        model.generation_config = GenerationConfig(
            do_sample=True, temperature=0.6, top_p=0.9, pad_token_id=config.eos_token_id, **special
        )
    else:
        model = LlamaForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model.to(device).train()
    lf.accelerate(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    record: dict[str, Any] = {"recipe": "pretrain", "settings": dataclasses.asdict(args), "parameters": parameters}
    record |= {"device": str(device), "dtype": str(dtype).removeprefix("torch."), "python": platform.python_version()}
    record |= {module.__name__: module.__version__ for module in (torch, transformers, lf)}
    write_json(folder / "run.json", record)
    print(f"model      {parameters:,} parameters in float32, {record['dtype']} compute on {device}")
    print(f"training   {args.steps} steps of {args.batch_tokens:,} tokens, {run_tokens:,} in all")

    # 2. Train.
    outcome = "finished"
    done = 0  # optimizer steps taken
    trained = dict.fromkeys(mixture.weights, 0)  # tokens read, by kind
    with process_group(device) as mesh, MetricsLog(folder) as log, interruption.deferred():
        shard(model, list(model.model.layers), mesh, dtype)
        optimizer = adamw(model, lr=args.lr, betas=args.betas, weight_decay=args.weight_decay)
        schedule = get_cosine_with_min_lr_schedule_with_warmup_lr_rate(
            optimizer, num_warmup_steps=args.warmup_steps, num_training_steps=args.steps, min_lr_rate=0.1
        )
        loader = Loader(store.train, mixture, args.batch_tokens // args.seq_len)
        seconds["model"] = time.perf_counter() - started - sum(seconds.values())
        seconds["evaluation"] = seconds["training"] = 0.0
        bar = tqdm(total=args.steps, unit="step", disable=None)  # a line that renews itself; nothing when piped

        def evaluate() -> None:
            begun = time.perf_counter()
            values = held_out_losses(model, held_out)
            log.write(done, **values)
            each = [f"{kind} {values[f'held_out/{kind}/loss']:.3f}" for kind in args.mixture]
            each += [f"{kind} {values[f'held_out/{kind}/bits_per_byte']:.3f} bits/byte" for kind in args.mixture]
            tqdm.write(f"step {done:>5}  held out: {', '.join(each)}")
            seconds["evaluation"] += time.perf_counter() - begun

        evaluate()
        while done < args.steps and not interruption.signum:
            begun = time.perf_counter()
            rows, batches = next(loader)
            waited = time.perf_counter() - begun
            loss = accumulate(model, [batch.to(device) for batch in batches])
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            loss_value, norm_value = loss.item(), float(grad_norm.full_tensor())
            if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
                names = sorted({store.train.name(segment.document) for row in rows for segment in row})
                outcome = (
                    f"stopped before step {done + 1}: its loss is {loss_value}, its gradient norm {norm_value}; "
                    f"read from {', '.join(names[:8])}{' and others' if len(names) > 8 else ''}"
                )
                break
            lr = schedule.get_last_lr()[0]
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            done += 1
            elapsed = time.perf_counter() - begun
            seconds["training"] += elapsed

            by_kind = mixture.tokens(rows)
            trained = {kind: trained[kind] + count for kind, count in by_kind.items()}
            tokens, supervised = sum(by_kind.values()), sum(int(batch.num_items) for batch in batches)
            log.write(
                done,
                **{"train/loss": loss_value, "train/grad_norm": norm_value, "train/lr": lr},
                **{"speed/tokens_per_s": tokens / elapsed, "speed/supervised_tokens_per_s": supervised / elapsed},
                **{"speed/data_wait_share": waited / elapsed, "memory/peak_gib": peak_memory_gib(device)},
                **{"data/fill": tokens / args.batch_tokens, "data/supervised_share": supervised / tokens},
                **{f"data/{kind}_tokens": trained[kind] for kind in trained},
            )
            line = f"loss {loss_value:.3f}, {tokens / elapsed:,.0f} tokens/s, {supervised / tokens:.1%} supervised"
            bar.set_postfix_str(line, refresh=False)
            bar.update()
            if bar.disable and (done % max(1, args.steps // 20) == 0 or done == 1):
                left = seconds["training"] / done * (args.steps - done)
                print(f"step {done:>5}/{args.steps}  {line}, {left:.0f} s of training left", flush=True)
            if done == args.steps or (args.eval_every and done % args.eval_every == 0):
                evaluate()
        bar.close()
        if interruption.signum:
            outcome = f"stopped by {Interrupted(interruption.signum)} after step {done} of {args.steps}"

        # 3. Save, whatever the outcome.
        begun = time.perf_counter()
        save_model(folder / "model", model.config, full_state_dict(model), tokenizer, model.generation_config)
        plot_losses(folder / "loss.png", log, list(args.mixture), f"LLaMA, {parameters / 1e6:.1f}M parameters")
        seconds["saving"] = time.perf_counter() - begun

    # 4. What came of it.
    if outcome == "finished" and args.sample_tokens:
        begun = time.perf_counter()
        samples = sample(folder / "model", args.sample_tokens, args.seed)
        write_text(folder / "samples.txt", samples)
        print(samples)
        seconds["sampling"] = time.perf_counter() - begun
    total = max(1, sum(trained.values()))
    record |= {"outcome": outcome, "steps_done": done, "tokens": trained, "seconds": seconds}
    record["held_out"] = {name: log.series(name)[1][-1] for name in log.records[0] if name.startswith("held_out/")}
    record["sources"] = mixture.sources_read(loader.state())
    write_json(folder / "run.json", record)
    for source, of in record["sources"].items():
        print(f"source     {source}: {of['tokens']:,} tokens read, {of['epochs']:.2f} epochs")
    for kind, epochs in mixture.epochs(trained).items():
        print(f"trained on {trained[kind]:,} {kind} tokens: {trained[kind] / total:.1%} of all, {epochs:.2f} epochs")
    for kind in args.mixture:
        loss, bits = (log.series(f"held_out/{kind}/{name}")[1] for name in ("loss", "bits_per_byte"))
        print(f"held out   {kind}: loss {loss[0]:.3f} -> {loss[-1]:.3f}, bits per byte {bits[0]:.3f} -> {bits[-1]:.3f}")
    speed = total / max(seconds["training"], 1e-9)
    print(f"speed      {speed:,.0f} tokens/s, peak memory {peak_memory_gib(device):.2f} GiB")
    phases = ", ".join(f"{phase} {value:.1f}" for phase, value in seconds.items())
    print(f"seconds    {phases}; {time.perf_counter() - started:.1f} in all")
    print(f"{outcome}; the model is in {folder / 'model'}")
    return interruption.exit_code or (0 if outcome == "finished" else 1)


def sample(folder: Path, max_tokens: int, seed: int) -> str:
    """What the saved model writes, loaded by stock transformers as anybody would."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(seed)
    texts = []
    for kind, prompt in PROMPTS.items():
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=max_tokens)
        texts.append(f"--- a sample of {kind}\n{tokenizer.decode(output[0], skip_special_tokens=True)}\n")
    return "".join(texts)


def parse(argv: list[str]) -> Pretrain:
    """Settings from the command line; `--preset` decides the defaults that `--help` shows."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--preset", choices=list(PRESETS), default="tiny")
    try:
        preset = peek.parse_known_args(argv)[0].preset
    except SystemExit:
        preset = "tiny"
    return tyro.cli(Pretrain, args=argv, default=PRESETS[preset], description=__doc__)


def main() -> int:
    """Run from the command line."""
    args = parse(sys.argv[1:])
    with Interruption() as interruption:
        try:
            return pretrain(args, interruption)
        except Interrupted as interrupted:
            print(f"\nleft at once by {interrupted}", file=sys.stderr)
            return 128 + interrupted.signum


if __name__ == "__main__":
    sys.exit(main())
