"""Processes and precision: one training path, for one process on a laptop and for many on a cluster.

A single process is a mesh of one. Parameters stay in fp32 (the master weights); FSDP2 casts them to the compute dtype
for forward and backward, and reduces gradients in fp32.

    python recipes/pretrain.py                                   one process, no network
    torchrun --nproc-per-node 8 recipes/pretrain.py              eight: `process_group` reads what torchrun tells
"""

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

T = TypeVar("T")

REFUSALS = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError)
"""Errors of what a user asked for, which all processes meet alike: no reason to warn of a process that died."""

PATIENCE = timedelta(days=1)
"""How long processes wait for what the main one does alone, such as writing a 70B model. A process that died
is noticed at once all the same, by its broken connection."""


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it natively, else float32: emulated, it is slower than float32."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported()  # AMX processors have this as well
    return torch.bfloat16 if native else torch.float32


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them."""

    rank: int
    size: int
    device: torch.device
    """Of this process."""
    mesh: DeviceMesh
    """[size], or [replicas, shards] for hybrid sharding."""
    writers: dist.ProcessGroup
    """A group of its own for checkpoints, whose collectives run in another thread beside those of the training step."""
    held: ExitStack = field(default_factory=ExitStack)
    """What the main process gives free when the processes part."""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def print(self, *values: Any) -> None:
        """`print`, in the main process only."""
        if self.is_main:
            print(*values, flush=True)

    def sum(self, *counts: int) -> list[int]:
        """Adds integers over all processes, on the host: no device waits for it."""
        if self.size == 1:
            return list(counts)
        totals = torch.tensor(counts, dtype=torch.int64)
        dist.all_reduce(totals)
        return totals.tolist()

    def stops(self, signum: int | None) -> int:
        """The signal that asked any process to stop, the same in all of them; 0 if none did."""
        highest = torch.tensor(signum or 0)
        if self.size > 1:
            dist.all_reduce(highest, dist.ReduceOp.MAX)
        return int(highest)

    def add_(self, values: Tensor) -> Tensor:
        """Adds a tensor over all processes, in place, on its device; the host does not wait."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def everyone(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.writers)
        return values

    def first(self, function: Callable[[], T]) -> T:
        """Runs `function` in the main process while the others wait; all get its result, or raise its error."""
        if self.size == 1:
            return function()
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = function()
            except (ValueError, OSError) as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, group=self.writers)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def hold(self, resource: AbstractContextManager[Any]) -> None:
        """The main process enters `resource` while the others wait, and leaves it when the processes part."""

        def enter() -> None:
            self.held.enter_context(resource)

        self.first(enter)


@contextmanager
def process_group(device: str | torch.device, shard_size: int | None = None) -> Iterator[World]:
    """The processes that torchrun started, or this one alone without any network; taken down at the end.

    An error in one of many processes ends that process at once, with a message: it must not wait for the others, who
    find out by the broken connection and end in the same way.

    Args:
        device: "cpu" or "cuda"; each process of a machine gets its own GPU.
        shard_size: processes that share one copy of the parameters, optimizer and gradients. Default: all (full
            sharding). Fewer is hybrid sharding: shards inside a group, replicas between groups.

    Raises:
        ValueError: `shard_size` does not divide the number of processes.
    """
    device = torch.device(device)
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    shards = shard_size or size
    if size % shards:
        raise ValueError(f"shard_size: got {shards}; must divide the number of processes, {size}")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    backend = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}[device.type]
    if size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(backend)
    try:
        if shards == size:
            mesh = init_device_mesh(device.type, (size,))
        else:
            mesh = init_device_mesh(device.type, (size // shards, shards), mesh_dim_names=("replicate", "shard"))
        writers: Any = dist.new_group(backend="gloo", timeout=PATIENCE)
        world = World(rank, size, device, mesh, writers)
        with world.held:
            yield world
    except Exception as error:
        if size > 1 and not isinstance(error, REFUSALS):
            traceback.print_exc()
            print(
                f"process {rank} of {size} stops: {(str(error) or type(error).__name__).splitlines()[0]}. "
                "If another one died before, this is only its echo. Nothing that a checkpoint holds is lost: "
                "run the same command with --resume auto",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)  # an orderly end would wait for processes that are gone
        raise
    finally:
        dist.destroy_process_group()


def shard(
    model: nn.Module, layers: list[nn.Module], mesh: DeviceMesh, dtype: torch.dtype, compile: bool = False
) -> FSDPModule:
    """Shard a model in place over `mesh`, layer by layer: fp32 parameters, `dtype` compute, fp32 reduction.

    Gradients are summed over processes, not averaged: the loss is divided by the global count of trained tokens.

    Args:
        model: with the same values in every process, or on the meta device.
        layers: submodules to gather one at a time.
        mesh: one dimension for full sharding; two, replicas and shards, for hybrid sharding.
        dtype: of forward and backward.
        compile: run each layer through `torch.compile`, which compiles one and serves all.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    # Freeing gathered weights between forward and backward saves memory only where they are spread over processes.
    reshard = mesh.size(mesh.ndim - 1) > 1
    for layer in layers:
        if compile:
            layer.compile()
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    sharded = fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other sum with a factor
    return sharded


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The fp32 master weights, whole and on the CPU, in the main process; the others take part and get nothing."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}
