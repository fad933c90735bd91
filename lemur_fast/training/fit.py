"""The loop of the recipes: steps, measurements, checkpoints, and an orderly end."""

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lemur_fast.data.loader import HeldOut, Loader
from lemur_fast.training.checkpoint import Checkpoints, TrainingState
from lemur_fast.training.distributed import World
from lemur_fast.training.guard import Guard
from lemur_fast.training.interruption import Interrupted, Interruption
from lemur_fast.training.loop import StepFacts, Telemetry, train_step
from lemur_fast.training.step import held_out_losses


@dataclass
class Progress:
    """How far a run has come; a checkpoint takes it along."""

    done: int
    """Optimizer steps."""
    trained: dict[str, int]
    """Tokens read so far, by kind."""
    outcome: str = "finished"
    exit_code: int = 0
    """The same in every process: 128 + the signal that stopped the run, 1 for a run that went wrong."""
    evaluation_seconds: float = 0.0


def fit(
    state: TrainingState,
    loader: Loader,
    held_out: Sequence[HeldOut],
    *,
    world: World,
    telemetry: Telemetry,
    checkpoints: Checkpoints,
    interruption: Interruption,
    traced: Callable[[], None],
    settings: Mapping[str, Any],
    progress: Progress,
    steps: int,
    clip: float,
    eval_every: int,
    checkpoint_every: int,
    sync_every: bool = False,
) -> None:
    """Train until `steps` are done, somebody asks to stop, or nothing is gained any more; then write a checkpoint.

    Args:
        state: model, optimizer, schedule, guard, and the same `loader`.
        loader: of the steps.
        held_out: measured before the first step, every `eval_every` steps, and after the last.
        world: the processes; all call this.
        telemetry: told of every step.
        checkpoints: written every `checkpoint_every` steps (0: at the end only).
        interruption: looked at before every step.
        traced: called after every step.
        settings: of the run, for the checkpoints.
        progress: where the run stands; kept up to date.
        steps: of the whole run.
        clip: longest gradient.
        eval_every: steps between measurements; 0: at both ends only.
        checkpoint_every: steps between checkpoints.
        sync_every: see `step.accumulate`.
    """
    guard, mixture = state.guard, loader.mixture
    assert isinstance(guard, Guard)
    kinds = [part.kind for part in held_out]
    num_sources, stopping = len(loader.documents.source_names), 0

    def evaluate() -> None:
        begun = time.perf_counter()
        telemetry.evaluated(progress.done, held_out_losses(state.model, held_out, world), kinds)
        progress.evaluation_seconds += time.perf_counter() - begun

    def save() -> None:
        facts = {"settings": dict(settings), "trained": progress.trained, "skipped": telemetry.skipped}
        checkpoints.save(progress.done, state, facts)

    if progress.done == 0:
        evaluate()
    while progress.done < steps:
        stopping = world.stops(interruption.signum)  # the same answer in every process, as that of telemetry
        if stopping or telemetry.hopeless():
            break
        telemetry.begin()
        rows, batches = next(loader)
        tags = loader.tags(rows)
        waited = telemetry.since_begin()
        (supervised,) = world.sum(sum(int(batch.num_items) for batch in batches))
        lr = float(state.schedule.get_last_lr()[0])
        options: Any = {"num_sources": num_sources, "clip": clip, "sync_every": sync_every}
        figures = train_step(state.model, guard, batches, tags, world, num_items=supervised, **options)
        state.schedule.step()
        progress.done += 1
        before = mixture.epochs(progress.trained)
        progress.trained = {kind: progress.trained[kind] + count for kind, count in mixture.tokens(rows).items()}
        for kind, epochs in mixture.epochs(progress.trained).items():
            if epochs > max(1, math.ceil(before[kind])):  # more than there is: some of it was read before
                telemetry.warn(f"all of {kind} was read; its epoch {math.ceil(epochs)} begins, documents repeat")
        lengths = [segment.length for row in rows for segment in row]
        read = {f"data/{kind}_tokens": float(count) for kind, count in progress.trained.items()}
        names = functools.partial(loader.names, rows)
        telemetry.queued(StepFacts(progress.done, lengths, supervised, lr, waited, names, read), figures)
        traced()
        last = progress.done == steps
        evaluation = last or bool(eval_every and progress.done % eval_every == 0)
        checkpoint = not last and bool(checkpoint_every and progress.done % checkpoint_every == 0)
        if evaluation or checkpoint:
            telemetry.flush()
        if evaluation:
            evaluate()
        if checkpoint:
            save()
        telemetry.warn(checkpoints.poll())
    telemetry.flush()
    if telemetry.hopeless():
        refused = f"{telemetry.refused_in_a_row} steps in a row could not be taken"
        progress.outcome = f"stopped after step {progress.done}: {refused}"
    elif stopping:
        progress.outcome = f"stopped by {Interrupted(stopping)} after step {progress.done} of {steps}"
    if progress.done:
        save()  # before anything else: this can not be had again
    checkpoints.wait()
    whole = progress.outcome == "finished" and progress.done in checkpoints.steps()
    progress.exit_code = 128 + stopping if stopping else 0 if whole else 1
