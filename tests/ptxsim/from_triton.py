"""Runs what Triton launches: ``with recording("sm_80", execute=execute): ...``."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from benchmarks.ahead_of_time import Launch
from tests.ptxsim.counting import Counts
from tests.ptxsim.machine import Kernel


@functools.lru_cache(maxsize=256)
def _decoded(ptx: str) -> Kernel:
    return Kernel(ptx)


def _array(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's own memory; a bfloat16 becomes an int16, for want of a type."""
    tensor = tensor.detach()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def arguments_of(launch: Launch) -> dict[str, Any]:
    """What the compiled kernel takes of a launch's arguments, by name: all but its constants."""
    signature = launch.compiled.src.signature
    names = [name for name, kind in signature.items() if kind != "constexpr"]
    values = {name: launch.arguments[name] for name in names}
    return {k: _array(v) if isinstance(v, torch.Tensor) else v for k, v in values.items()}


def execute(launch: Launch, ptx: str | None = None, most_steps: int = 20_000_000) -> Counts:
    """Runs a launch on its own tensors.

    Args:
        launch: as `benchmarks.ahead_of_time.recording` has it.
        ptx: a changed program, in place of the one that was compiled; it is decoded every time.
        most_steps: instructions of a CTA after which it counts as running for ever.
    """
    kernel = _decoded(launch.compiled.asm["ptx"]) if ptx is None else Kernel(ptx)
    arguments = arguments_of(launch)
    # Triton appends pointers to scratch memory, which none of our kernels asks for.
    extra = len(kernel.program.parameters) - len(arguments)
    arguments |= {f"scratch {i}": 0 for i in range(extra)}
    metadata = launch.compiled.metadata
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise NotImplementedError("a kernel with scratch memory in global memory")
    return kernel.launch(launch.grid, 32 * metadata.num_warps, arguments, metadata.shared, most_steps)
