"""The two halves of a loop: a step that never waits for the device, and the report of it, a step later."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, schedule
from tqdm import tqdm
from transformers import LlamaConfig

from lemur_fast.packing import PackedBatch
from lemur_fast.training.distributed import World
from lemur_fast.training.flops import model_flops
from lemur_fast.training.guard import VERDICTS, Guard
from lemur_fast.training.metrics import Figures, MetricsLog, peak_memory_gib
from lemur_fast.training.optimizer import clip_gradients
from lemur_fast.training.step import SourceLosses, accumulate

MAX_REFUSED = 10
"""Steps refused in a row after which going on makes no sense."""


def train_step(
    model: nn.Module,
    guard: Guard,
    batches: Sequence[PackedBatch],
    tags: Sequence[Tensor],
    world: World,
    *,
    num_items: int,
    num_sources: int,
    clip: float,
    sync_every: bool = False,
) -> Figures:
    """Forward, backward, clipping, and the optimizer's step if the guard lets it pass; no host sync.

    Args:
        model: sharded by `distributed.shard`.
        guard: holds the optimizer.
        batches: this process's micro-batches; as many in every process.
        tags: for each of them the source of every token, [T] int64.
        world: all processes.
        num_items: trained tokens of the step in all processes.
        num_sources: how many sources there are.
        clip: longest gradient.
        sync_every: see `step.accumulate`.

    Returns:
        On their way to the host: loss, gradient norm, verdict, steps refused in a row; then for each source the sum of
        its losses, and for each its trained tokens.
    """
    sources = SourceLosses(num_sources, world.device)
    batches = [batch.to(world.device, non_blocking=True) for batch in batches]
    tags = [tag.to(world.device, non_blocking=True) for tag in tags]
    loss = accumulate(model, batches, num_items=num_items, sources=sources, tags=tags, sync_every=sync_every)
    totals = world.add_(torch.cat([loss[None], sources.totals.flatten()]))
    norm = clip_gradients(model.parameters(), clip, world.mesh)
    verdict = guard.step(totals[0], norm)
    guard.optimizer.zero_grad()
    return Figures(torch.cat([totals[:1], norm[None], verdict, totals[1:]]))


@dataclass
class StepFacts:
    """What the host knows of a step when it is queued."""

    step: int
    lengths: list[int]
    """Tokens of every document of the step, all processes together."""
    supervised: int
    """Trained tokens, all processes together."""
    lr: float
    waited: float
    """Seconds that the loop waited for data."""
    names: Callable[[], list[str]]
    """Names of the documents, asked for when the step is refused."""
    extra: dict[str, float] = field(default_factory=dict)
    """More to log."""


class Telemetry:
    """Figures of every step: metrics, a progress bar, and the steps that the guard refused.

    A step is reported while the next one runs. Every process takes part, because all must come to the same decision;
    the main process writes.
    """

    def __init__(
        self,
        log: MetricsLog | None,
        world: World,
        config: LlamaConfig,
        *,
        peak: float,
        source_names: Sequence[str],
        steps: int,
        batch_tokens: int,
        lora: Any = None,
        done: int = 0,
        skipped: Sequence[dict[str, Any]] = (),
    ) -> None:
        """Report to `log`.

        Args:
            log: in the main process.
            world: all processes.
            config: of the model, for its FLOPs.
            peak: FLOP/s of one process's device.
            source_names: in the order of their tags.
            steps: of the whole run.
            batch_tokens: room of a step.
            lora: a `peft.LoraConfig` where only adapters are trained, for the FLOPs.
            done: steps done before.
            skipped: steps refused before.
        """
        self.log, self.world, self.config, self.lora, self.peak = log, world, config, lora, peak
        self.source_names, self.steps, self.batch_tokens = list(source_names), steps, batch_tokens
        self.skipped: list[dict[str, Any]] = list(skipped)
        """Step, reason and documents of every step that was not taken."""
        self.refused_in_a_row = 0
        self.seconds = 0.0
        """Of all steps reported so far."""
        self.tokens = 0
        """Read in them, by all processes."""
        self._started = done
        self._pending: tuple[StepFacts, Figures, float, float] | None = None
        self._ended = 0.0  # when the step that was reported last did
        # A line that renews itself; nothing where there is no terminal.
        self.bar = tqdm(total=steps, initial=done, unit="step", disable=None if world.is_main else True)
        self._begun = 0.0

    def begin(self) -> None:
        """A step begins."""
        self._begun = time.perf_counter()

    def since_begin(self) -> float:
        """Seconds since then."""
        return time.perf_counter() - self._begun

    def queued(self, facts: StepFacts, figures: Figures) -> None:
        """A step is queued: report the one before."""
        queued = time.perf_counter()
        self.flush()
        self._pending = (facts, figures, self._begun, queued)

    def flush(self) -> None:
        """Report the step that is still pending; waits for it."""
        if self._pending is None:
            return
        facts, figures, begun, ended = self._pending
        self._pending = None
        waits = not figures.there()
        loss, norm, verdict, refused, *totals = figures.read()
        if waits:  # the device was behind the host
            ended = time.perf_counter()
        elapsed = ended - max(begun, self._ended)  # steps overlap: the host begins one while the device ends another
        self._ended = ended
        self.seconds += elapsed
        self.tokens += sum(facts.lengths)
        self.refused_in_a_row = int(refused)
        if verdict:
            reason = f"loss {loss:.4g}, gradient norm {norm:.4g}: {VERDICTS[int(verdict)]}"
            names = facts.names()
            self.skipped.append({"step": facts.step, "reason": reason, "documents": names})
            shown = f"{', '.join(names[:8])}{f' and {len(names) - 8} others' if len(names) > 8 else ''}"
            self._say(f"step {facts.step:>5}  NOT TAKEN ({reason}); read from {shown}")
        if self.log is None:
            return
        tokens, count = sum(facts.lengths), len(self.source_names)
        flops = model_flops(self.config, facts.lengths, facts.supervised, self.lora)
        mfu = flops / (elapsed * self.peak * self.world.size)
        self.log.write(
            facts.step,
            **{"train/loss": loss, "train/grad_norm": norm, "train/lr": facts.lr},
            **{"train/skipped": float(bool(verdict)), "train/skipped_in_all": len(self.skipped)},
            **{
                f"source/{name}/loss": totals[index] / totals[count + index]
                for index, name in enumerate(self.source_names)
                if totals[count + index]
            },
            **{"speed/tokens_per_s": tokens / elapsed, "speed/supervised_tokens_per_s": facts.supervised / elapsed},
            **{"speed/mfu": mfu, "speed/data_wait_share": facts.waited / elapsed},
            **{"data/fill": tokens / self.batch_tokens, "data/supervised_share": facts.supervised / tokens},
            **{"memory/peak_gib": peak_memory_gib(self.world.device), **facts.extra},
        )
        line = f"loss {loss:.3f}, {tokens / elapsed:,.0f} tokens/s, MFU {mfu:.1%}"
        self.bar.set_postfix_str(line, refresh=False)
        self.bar.update()
        done = facts.step - self._started
        if self.bar.disable and (facts.step % max(1, self.steps // 20) == 0 or done == 1):
            left = self.seconds / done * (self.steps - facts.step)
            self._say(f"step {facts.step:>5}/{self.steps}  {line}, {left:.0f} s of training left")

    def hopeless(self) -> bool:
        """Whether so many steps were refused in a row that the run should end; the same answer in every process."""
        return self.refused_in_a_row >= MAX_REFUSED

    def evaluated(self, step: int, values: dict[str, float], kinds: Sequence[str]) -> None:
        """Held-out figures, as `held_out_losses` returns them."""
        if self.log is not None:
            self.log.write(step, **values)
        each = [f"{kind} {values[f'held_out/{kind}/loss']:.3f}" for kind in kinds]
        each += [f"{kind} {values[f'held_out/{kind}/bits_per_byte']:.3f} bits/byte" for kind in kinds]
        self._say(f"step {step:>5}  held out: {', '.join(each)}")

    def warn(self, message: str | None) -> None:
        """Show a warning, if there is one."""
        if message:
            self._say(f"WARNING    {message}")

    def tokens_per_second(self) -> float:
        """Real tokens, all processes together, over all steps."""
        return self.tokens / max(self.seconds, 1e-9)

    def _say(self, line: str) -> None:
        if self.world.is_main:
            tqdm.write(line)

    def __enter__(self) -> "Telemetry":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()


@contextlib.contextmanager
def tracing(folder: Path | None, world: World) -> Iterator[Callable[[], None]]:
    """Write a trace of the third and fourth step, to open in chrome://tracing or Perfetto, as `folder/rank-N.json`.

    Yields what to call after every step; without a folder it does nothing.
    """
    if folder is None:
        yield lambda: None
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank-{world.rank}.json"
    activities = [ProfilerActivity.CPU]
    if world.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)

    def write(finished: profile) -> None:
        finished.export_chrome_trace(str(path))
        world.print(f"profile    {path}")

    with profile(
        activities=activities, schedule=schedule(wait=1, warmup=1, active=2, repeat=1), on_trace_ready=write
    ) as profiler:
        yield profiler.step
