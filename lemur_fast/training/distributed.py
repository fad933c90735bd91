"""Processes and precision: one training path, for one process on a laptop and for many on a cluster.

A single process is a mesh of one. Parameters stay in fp32 (the master weights); FSDP2 casts them to the compute dtype
for forward and backward, and reduces gradients in fp32.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it natively, else float32: emulated, it is slower than float32."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported()  # AMX processors have this as well
    return torch.bfloat16 if native else torch.float32


@contextmanager
def process_group(device: torch.device) -> Iterator[DeviceMesh]:
    """A process group of this process alone, without any network, and its mesh; taken down at the end.

    Raises:
        ValueError: a launcher asks for more than one process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) != 1:
        raise ValueError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}: training on more than one process is not supported yet"
        )
    backend = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}[device.type]
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh(device.type, (1,))
    finally:
        dist.destroy_process_group()


def shard(model: nn.Module, layers: list[nn.Module], mesh: DeviceMesh, dtype: torch.dtype) -> FSDPModule:
    """Shard a model in place over `mesh`, layer by layer: fp32 parameters, `dtype` compute, fp32 reduction.

    Gradients are summed over processes, not averaged: the loss is divided by the global count of trained tokens.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    # Freeing gathered weights between forward and backward saves memory only where they are spread over processes.
    reshard = mesh.size() > 1
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    sharded = fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    sharded.set_gradient_divide_factor(1.0)
    return sharded


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The fp32 master weights, whole and on the CPU."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}
