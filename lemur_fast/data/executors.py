"""What runs the stages of the pipeline: datatrove's executors, on this machine, on Slurm, or on Ray.

A stage becomes a datatrove pipeline of one step; a task takes every n-th of its pieces and does those that are not
done. That makes a run resumable piece by piece, whatever datatrove remembers of its tasks.
"""

import contextlib
import importlib.util
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import multiprocess
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from loguru import logger
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from lemur_fast.data.pipeline import STAGES, Corpus, Settings, Stage, clean, plan, sweep
from lemur_fast.data.sources import Source
from lemur_fast.data.store import TokenStore


class Step(PipelineStep):
    """A stage of the pipeline as datatrove runs it."""

    type = "lemur_fast"

    def __init__(self, corpus: Corpus, stage: Stage, quiet: bool) -> None:
        super().__init__()
        self.name, self.corpus, self.stage, self.quiet = stage.name, corpus, stage, quiet

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Do this task's pieces, as far as they are not done."""
        sizes = self.stage.sizes(self.corpus)
        progress = _progress_folder(self.corpus, self.stage) / f"{rank:05d}"
        for folder in (progress.parent, self.stage.output(self.corpus, 0).parent):
            folder.mkdir(parents=True, exist_ok=True)
        done = 0

        def advance(more: int) -> None:
            nonlocal done
            done += more
            progress.write_text(str(done))

        for piece in range(rank, len(sizes), world_size):
            if not self.stage.output(self.corpus, piece).exists():
                self.stage.work(self.corpus, piece, advance)
                if self.stage.counts_pieces:
                    advance(1)
        if self.stage.name == STAGES[-1].name:
            clean(self.corpus)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.quiet and multiprocess.parent_process():  # a worker of this machine: its parent reports, and stops it
            _leave_with_parent()
            logger.disable("datatrove")
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            os.environ.update(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1")


def _leave_with_parent(_: Any = None) -> None:
    """In a child: end at once when the parent does, also when that was killed.

    datatrove's manager would stay for ever, and keep the lock that it inherits from the parent.
    """

    def follow() -> None:
        multiprocess.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _progress_folder(corpus: Corpus, stage: Stage) -> Path:
    return corpus.folder / "work" / "progress" / stage.name


def _missing(corpus: Corpus, stages: Sequence[Stage] = STAGES) -> list[Stage]:
    """Stages with pieces that are not done."""
    if (corpus.folder / "manifest.json").is_file():
        return []
    return [
        stage
        for stage in stages
        if not all(stage.output(corpus, piece).exists() for piece in range(len(stage.sizes(corpus))))
    ]


def run_local(
    corpus: Corpus, workers: int = 0, tasks: int = 0, progress: bool = True, stages: Sequence[Stage] = STAGES
) -> None:
    """Run the stages that are not done, on this machine.

    Args:
        corpus: what `plan` made.
        workers: processes; 0 for as many as there are cores if the corpus has work for them, and for this one alone if
            not. A process alone tokenizes on all cores by threads.
        tasks: tasks that the pieces of a stage are dealt to; 0 for four a process, or one for one. The store is the
            same for any number.
        progress: show a progress bar for each stage.
        stages: those to run; the stages before them must be done.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = workers or (cores if len(corpus.parts) >= 2 * cores else 1)
    sweep(corpus)
    logger.disable("datatrove")
    multiprocess.set_forkserver_preload(["__main__", __name__])
    multiprocess.util.register_after_fork(corpus, _leave_with_parent)
    try:
        for stage in _missing(corpus, stages):
            pieces = len(stage.sizes(corpus))
            number = min(tasks or (4 * workers if workers > 1 else 1), pieces)
            with _bar(corpus, stage, progress):
                LocalPipelineExecutor(
                    [Step(corpus, stage, quiet=True)],
                    tasks=number,
                    workers=min(workers, number),
                    logging_dir=str(corpus.folder / "logs" / stage.name),
                    skip_completed=False,  # the pieces themselves say what is done
                ).run()
    finally:
        logger.enable("datatrove")
        shutil.rmtree(corpus.folder / "logs", ignore_errors=True)
    clean(corpus)  # also after a run that was killed between its manifest and this


@contextlib.contextmanager
def _bar(corpus: Corpus, stage: Stage, progress: bool) -> Iterator[None]:
    """A progress bar that follows what the tasks write down."""
    sizes = stage.sizes(corpus)
    done = sum(size for piece, size in enumerate(sizes) if stage.output(corpus, piece).exists())
    shutil.rmtree(_progress_folder(corpus, stage), ignore_errors=True)
    finished = threading.Event()
    bar = tqdm(
        desc=f"{stage.verb:<16}",
        total=sum(sizes) if all(sizes) else None,
        initial=done,
        unit=stage.unit,
        unit_scale=not stage.counts_pieces,
        leave=False,
        disable=None if progress else True,
    )

    def follow() -> None:
        while not finished.wait(0.2):
            files = _progress_folder(corpus, stage).glob("*")
            with contextlib.suppress(OSError, ValueError):  # a file that is just being written
                bar.n = done + sum(int(file.read_text() or 0) for file in files)
                bar.refresh()

    thread = threading.Thread(target=follow, daemon=True)
    if not bar.disable:
        thread.start()
    try:
        yield
    finally:
        finished.set()
        if not bar.disable:
            thread.join()
        bar.close()


@dataclass(frozen=True)
class Cluster:
    """What a cluster is asked for."""

    tasks: int = 100
    """Tasks of a stage; each does its share of the parts."""
    workers: int = -1
    """How many of them run at the same time; -1 for all."""
    cpus_per_task: int = 1
    mem_per_cpu_gb: int = 4
    partition: str = ""
    """Slurm: the partition."""
    time: str = "24:00:00"
    """Slurm: longest time of a task."""
    env_command: str = ""
    """Slurm: shell command that activates the environment on a node."""
    sbatch_args: dict[str, str] = field(default_factory=dict)
    """Slurm: further options of sbatch, such as account."""


def submit_slurm(corpus: Corpus, cluster: Cluster) -> list[str]:
    """Submit the stages that are not done to Slurm, each to begin when the one before has ended well.

    The folder must be one that every node sees. Returns the ids of the jobs. Submit again after a failure: it
    continues.
    """
    from datatrove.executor import SlurmPipelineExecutor

    if not shutil.which("sbatch"):
        raise ValueError("--executor slurm: there is no sbatch on this machine")
    jobs: list[str] = []
    previous = None
    for stage in _missing(corpus):
        previous = SlurmPipelineExecutor(
            [Step(corpus, stage, quiet=False)],
            tasks=min(cluster.tasks, len(stage.sizes(corpus))),
            time=cluster.time,
            partition=cluster.partition,
            cpus_per_task=cluster.cpus_per_task,
            mem_per_cpu_gb=cluster.mem_per_cpu_gb,
            workers=cluster.workers,
            job_name=f"lemur_fast-{stage.name}",
            env_command=cluster.env_command or None,
            sbatch_args=dict(cluster.sbatch_args),
            qos="",
            logging_dir=str(corpus.folder / "logs" / stage.name),
            depends=previous,
            skip_completed=False,
        )
        previous.run()
        jobs.append(str(previous.job_id))
    return jobs


def run_ray(corpus: Corpus, cluster: Cluster) -> None:
    """Run the stages that are not done on the Ray cluster that this process is connected to."""
    from datatrove.executor import RayPipelineExecutor

    if importlib.util.find_spec("ray") is None:
        raise ValueError("--executor ray: the package ray is not installed; run `pip install ray`")
    sweep(corpus)
    for stage in _missing(corpus):
        RayPipelineExecutor(
            [Step(corpus, stage, quiet=False)],
            tasks=min(cluster.tasks, len(stage.sizes(corpus))),
            workers=cluster.workers,
            cpus_per_task=cluster.cpus_per_task,
            mem_per_cpu_gb=cluster.mem_per_cpu_gb,
            logging_dir=str(corpus.folder / "logs" / stage.name),
            skip_completed=False,
        ).run()


def build_store(
    folder: str | Path,
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings | None = None,
    *,
    tokenizer_notice: str = "",
    workers: int = 0,
    tasks: int = 0,
    progress: bool = True,
) -> TokenStore:
    """Make a token store at `folder` from `sources`, or finish one that was begun there.

    Args:
        folder: the store to make; new, empty, or begun with the same arguments.
        sources: in order; of two equal documents, that of the earlier source stays.
        tokenizer: gives the ids.
        settings: what decides which documents are kept.
        tokenizer_notice: origin and licence of the tokenizer, for the manifest.
        workers: as for `run_local`.
        tasks: as for `run_local`.
        progress: as for `run_local`.

    Raises:
        ValueError: a source or setting cannot be used, or no document is left to train on.
        FileExistsError: `folder` holds something else.
        OSError: the disk is full, or cannot be written. Call again to continue.
    """
    corpus = plan(folder, sources, tokenizer, settings or Settings(), tokenizer_notice)
    run_local(corpus, workers, tasks, progress)
    return TokenStore(folder)
