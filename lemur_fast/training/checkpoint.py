"""Checkpoints: everything that the next step depends on, so that a run killed at any moment goes on as if it never was.

    OUT/checkpoints/step-00000040/
      __0_0.distcp, ...   torch's distributed checkpoint: model, optimizer, guard, RNG; each process writes its share
      .metadata           what lies where in them
      state.json          step, settings, data position, ...; and size and CRC-32 of every file above

The state is copied, and written by another thread while training goes on; into a folder beside, which is renamed when
it is whole and on the disk. A checkpoint is therefore either there or not. One that was damaged later is noticed by its
checksums, set aside, and the one before it is used.
"""

import dataclasses
import functools
import io
import json
import os
import pickle
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from lemur_fast.training.distributed import World

PREFIX = "step-"
_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)  # frozen parameters come from where they came from


class Position(Protocol):
    """What reads the data: its state is plain JSON."""

    def state(self) -> Any:
        """Where it stands."""

    def load_state(self, state: Any) -> None:
        """Go there."""


class Judge(Protocol):
    """A `Guard`, or whatever else keeps a tensor from step to step."""

    state: Tensor


@dataclass
class TrainingState:
    """The parts of a run that a checkpoint holds; the settings make all else anew."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    guard: Judge
    data: Position

    def tensors(self, world: World) -> dict[str, Any]:
        """Model, optimizer, guard and random numbers of this process, as tensors (sharded ones stay sharded)."""
        model, optimizer = get_state_dict(self.model, self.optimizer, options=_TRAINED)
        random = {f"cpu-{world.rank}": torch.get_rng_state()}
        if world.device.type == "cuda":
            random[f"cuda-{world.rank}"] = torch.cuda.get_rng_state(world.device)
        # Without the optimizer's groups: their numbers come from the settings and the schedule.
        return {"model": model, "optimizer": optimizer["state"], "guard": self.guard.state, "random": random}

    def load(self, folder: Path, facts: Mapping[str, Any], world: World) -> None:
        """Take everything from a checkpoint that any number of processes wrote, each part as this one is sharded."""
        reader = _Reader(folder)
        tensors = self.tensors(world)
        saved = reader.read_metadata().state_dict_metadata
        # A process that was not there before keeps the random numbers it started with.
        tensors["random"] = {name: value for name, value in tensors["random"].items() if f"random.{name}" in saved}
        dcp.load(tensors, storage_reader=reader, process_group=world.writers)
        groups = get_state_dict(self.model, self.optimizer, options=_TRAINED)[1]["param_groups"]
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=tensors["model"],
            optim_state_dict={"state": tensors["optimizer"], "param_groups": groups},
            options=_TRAINED,
        )
        self.guard.state = tensors["guard"]
        for name, value in tensors["random"].items():
            if name.startswith("cuda"):
                torch.cuda.set_rng_state(value, world.device)
            else:
                torch.set_rng_state(value)
        self.data.load_state(facts["data"])
        # A schedule is a function of the step alone; its peak and length are those of the settings.
        schedule: Any = self.schedule
        rates = [
            base * shape(facts["step"]) for base, shape in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        ]
        schedule.last_epoch, schedule._step_count, schedule._last_lr = facts["step"], facts["step"] + 1, rates
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, world: World, keep: int) -> None:
        """Look after the checkpoints in `folder`, which is made when the first is written.

        Args:
            folder: on a file system that all processes see.
            world: the processes that write.
            keep: how many of the latest to keep, at least 1.
        """
        self.folder, self.world, self.keep = folder, world, keep
        self.failed = 0
        """Checkpoints that could not be written."""
        self.seconds = 0.0
        """That `save` and `wait` held up their caller."""
        pinned = world.device.type == "cuda"
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=pinned,
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=pinned,
            )
        )
        self._writing: tuple[int, Path, Future] | None = None

    def steps(self) -> list[int]:
        """Steps of which there is a checkpoint, ascending."""
        if not self.folder.is_dir():
            return []
        names = [path.name.removeprefix(PREFIX) for path in self.folder.iterdir() if path.name.startswith(PREFIX)]
        return sorted(int(name) for name in names if name.isdecimal())

    def path(self, step: int) -> Path:
        """Folder of the checkpoint of a step."""
        return self.folder / f"{PREFIX}{step:08d}"

    def save(self, step: int, state: TrainingState, facts: Mapping[str, Any]) -> None:
        """Begin to write a checkpoint: returns when the state is copied. All processes call it.

        Waits for the checkpoint before it, if that is still being written. Between steps, when no gradients are held.

        Args:
            step: optimizer steps done, at least 1: before the first, an optimizer has no state to save.
            state: what to save.
            facts: more to find in `state.json`; plain JSON.
        """
        self.wait()
        begun = time.perf_counter()
        target = self.path(step)
        if target.exists():  # the last step of a run that had nothing left to do
            return
        staging = target.with_name(f".{target.name}.partial")
        if self.world.is_main:
            shutil.rmtree(staging, ignore_errors=True)
        facts = {**facts, "step": step, "processes": self.world.size, "data": state.data.state()}
        writer = _Writer(staging, target, facts, self._forget_old)
        saving = dcp.async_save(
            state.tensors(self.world),
            storage_writer=writer,
            async_stager=self._stager,
            process_group=self.world.writers,
        )
        assert isinstance(saving, Future)  # staging was not asked to be asynchronous
        self._writing = (step, staging, saving)
        self.seconds += time.perf_counter() - begun

    def poll(self) -> str | None:
        """A message if the checkpoint that was being written has failed meanwhile. Training can go on."""
        if self._writing is None or not self._writing[2].done():
            return None
        step, staging, saving = self._writing
        self._writing = None
        error = saving.exception()
        if error is None:
            return None
        if self.world.is_main:
            shutil.rmtree(staging, ignore_errors=True)
        self.failed += 1
        steps = self.steps()
        kept = f"the one of step {steps[-1]} is whole" if steps else "there is none before it"
        return f"the checkpoint of step {step} could not be written ({_reason(error)}); {kept}"

    def wait(self) -> None:
        """Wait until nothing is being written; a failure is printed."""
        if self._writing is None:
            return
        begun = time.perf_counter()
        self._writing[2].exception()
        message = self.poll()
        if message:
            self.world.print(f"WARNING    {message}")
        self.seconds += time.perf_counter() - begun

    def latest(self) -> dict[str, Any] | None:
        """`state.json` of the latest checkpoint that is whole, or None. All processes call it.

        Damaged ones are renamed to end in `.damaged`, with a message.

        Raises:
            ValueError: there are only damaged ones, whether this call or one before it has set them aside.
        """
        if self.world.is_main:
            for left in self.folder.glob(f".{PREFIX}*.partial"):  # by a process that was killed while it wrote
                shutil.rmtree(left)
        for step in reversed(self.world.first(self.steps)):
            folder = self.path(step)
            reasons = self.world.everyone(damage(folder, self.world.rank, self.world.size))
            reason = next((reason for reason in reasons if reason), None)
            if reason is None:
                return json.loads((folder / "state.json").read_text(encoding="utf-8"))
            aside = folder.with_name(f"{folder.name}.damaged")
            self.world.print(
                f"WARNING    {folder} is damaged: {reason}. Set aside as {aside.name}; the one before is tried"
            )
            self.world.first(functools.partial(_set_aside, folder, aside))
        if self.world.first(lambda: any(self.folder.glob(f"{PREFIX}*.damaged"))):
            raise ValueError(
                f"--resume: no checkpoint in {self.folder} is whole; they are set aside as *.damaged. Start a new run, "
                "or go on from the model that was saved, with --model"
            )
        return None

    def _forget_old(self) -> None:
        for step in self.steps()[: -self.keep]:
            shutil.rmtree(self.path(step))


def damage(folder: Path, share: int = 0, shares: int = 1) -> str | None:
    """What is wrong with a checkpoint, or None; with `shares`, only a part of its files is read."""
    try:
        facts = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        files = sorted(facts["files"].items())
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"state.json cannot be read ({error})"
    for name, (size, checksum) in files[share::shares]:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
        if _checksum(path) != checksum:
            return f"{name} has other contents than were written"
    return None


def differences(saved: Mapping[str, Any], now: Mapping[str, Any], ignored: Iterable[str] = ()) -> dict[str, str]:
    """Settings that are not what they were: name -> "was X, is Y"."""
    plain = json.loads(json.dumps(dict(now), default=str))
    names = sorted((saved.keys() | plain.keys()) - set(ignored))
    return {
        name: f"was {saved.get(name)}, is {plain.get(name)}" for name in names if saved.get(name) != plain.get(name)
    }


def check_same_run(
    saved: Mapping[str, Any], now: Mapping[str, Any], ignored: Iterable[str], changeable: Iterable[str], allowed: bool
) -> None:
    """Refuse to go on from a checkpoint of another training, naming what differs.

    Args:
        saved: settings that the checkpoint was written with.
        now: those of this run.
        ignored: names that say nothing of the training.
        changeable: names that may change in the middle of a run, when that is asked for.
        allowed: whether it was asked for, by --resume-changed.

    Raises:
        ValueError: settings differ.
    """
    changed = differences(saved, now, ignored)
    fatal = {name: what for name, what in changed.items() if name not in set(changeable)}
    named = "; ".join(f"--{name.replace('_', '-')} {what}" for name, what in (fatal or changed).items())
    if fatal:
        raise ValueError(
            f"--resume: this is not the run that was stopped: {named}. Resume with what it had, or start a new run "
            "from its model with --model"
        )
    if changed and not allowed:
        raise ValueError(f"--resume: settings are not what they were: {named}. To use these, add --resume-changed")


def _set_aside(folder: Path, aside: Path) -> None:
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(2**24):
            value = zlib.crc32(block, value)
    return value


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: BaseException) -> str:
    """The first thing that went wrong in any process."""
    while isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return str(error) or type(error).__name__


class _Writer(dcp.FileSystemWriter):
    """Writes into a folder beside, notes checksums, and renames it when all processes are done."""

    def __init__(self, staging: Path, target: Path, facts: Mapping[str, Any], renamed: Callable[[], None]) -> None:
        super().__init__(staging)
        self.staging, self.target, self.facts, self.renamed = staging, target, facts, renamed

    def write_data(self, plan: Any, planner: Any) -> Any:
        """Write this process's share; its checksums lie beside it until `finish` collects them."""
        written = super().write_data(plan, planner)
        prefix = plan.storage_data.prefix
        sums = {path.name: (path.stat().st_size, _checksum(path)) for path in self.staging.glob(f"{prefix}*.distcp")}
        (self.staging / f"{prefix}.sums").write_text(json.dumps(sums), encoding="utf-8")
        return written

    def finish(self, metadata: Metadata, results: Any) -> None:
        """In the main process, when all have written: state.json, the disk, the name."""
        super().finish(metadata, results)
        path = self.staging / ".metadata"
        files = {path.name: (path.stat().st_size, _checksum(path))}
        for sums in self.staging.glob("*.sums"):
            files |= json.loads(sums.read_text(encoding="utf-8"))
            sums.unlink()
        state = self.staging / "state.json"
        state.write_text(json.dumps({**self.facts, "files": files}, indent=2, default=str) + "\n", encoding="utf-8")
        _sync(state)
        _sync(self.staging)
        self.staging.rename(self.target)
        _sync(self.target.parent)
        self.renamed()


class _Unpickler(pickle.Unpickler):
    """Reads the metadata of torch's checkpoints, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        known = (
            module.startswith("torch.distributed.checkpoint.")
            or (module, name) in {("torch", "Size"), ("collections", "OrderedDict"), ("pathlib", "PosixPath")}
            or (module == "torch.serialization" and name == "_get_layout")
            or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype))
        )
        # Protocol 4 takes dotted names, and modules hold what they import: neither may lead out of torch's classes.
        found = super().find_class(module, name) if known and "." not in name else None
        if module.startswith("torch.distributed.checkpoint.") and not (
            isinstance(found, type) and found.__module__ == module
        ):
            found = None
        if found is None:
            raise pickle.UnpicklingError(f"a checkpoint's metadata does not hold {module}.{name}")
        return found


class _Reader(dcp.FileSystemReader):
    """torch's reader, which reads tensors with `weights_only`, and metadata without trusting it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        metadata = _Unpickler(io.BytesIO(path.read_bytes())).load()
        if not all(isinstance(entry, TensorStorageMetadata) for entry in metadata.state_dict_metadata.values()):
            raise ValueError(f"{path}: a checkpoint holds nothing but tensors; other objects would be unpickled")
        return dataclasses.replace(
            metadata, storage_meta=dataclasses.replace(metadata.storage_meta, load_id=self.load_id)
        )
