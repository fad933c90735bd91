"""Tests of the GPU kernels themselves, on machines that need no GPU.

``python -m pytest tests/kernels`` compiles Triton's for sm_80 and sm_90, and those of ``csrc/cuda`` for
sm_80, and executes the machine code (`tests.ptxsim`). ``TRITON_INTERPRET=1 python -m pytest tests/kernels`` runs the
source of Triton's in its interpreter.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from benchmarks.ahead_of_time import recording
from lemur_fast.kernels import common, cross_entropy, rms_norm, rotary, swiglu
from tests.conftest import INTERPRETING
from tests.cuda import simulated as cuda
from tests.ptxsim.from_triton import execute

COMPILED = ["sm_80", "sm_90"]


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """torch fills what it allocates without values with NaN: an element that no kernel writes cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _run_on(name: str) -> Iterator[str]:
    architecture, _, how = name.partition(" ")
    if how == "interpreted":
        with common.pretending(architecture, 4):
            yield architecture
    else:
        with recording(architecture, execute):
            yield architecture


@pytest.fixture(params=["sm_80 interpreted"] if INTERPRETING else COMPILED)
def machine(request: pytest.FixtureRequest) -> Iterator[str]:
    """What runs the kernels: the interpreter, or the machine code of each architecture."""
    yield from _run_on(request.param)


@pytest.fixture(params=[f"{name} interpreted" for name in COMPILED] if INTERPRETING else COMPILED)
def architecture(request: pytest.FixtureRequest) -> Iterator[str]:
    """As `machine`, with the tiles of each architecture in the interpreter, too."""
    yield from _run_on(request.param)


@dataclass(frozen=True)
class RowKernels:
    """The kernels that walk rows, in one of the ways that they are written, and what makes a GPU smaller."""

    rms_norm: Any
    swiglu: Any
    cross_entropy: Any
    rotary: Any
    processors: Callable[[int], AbstractContextManager]


@pytest.fixture(params=["sm_80 interpreted"] if INTERPRETING else [*COMPILED, "cuda"])
def kernels(request: pytest.FixtureRequest) -> Iterator[RowKernels]:
    """Triton's kernels, by what runs them, and those of ``csrc/cuda``."""
    if request.param != "cuda":
        for architecture in _run_on(request.param):
            smaller = functools.partial(common.pretending, architecture)
            yield RowKernels(rms_norm, swiglu, cross_entropy, rotary, smaller)
        return
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on the PATH")
    with cuda.simulated():
        yield RowKernels(cuda.rms_norm, cuda.swiglu, cuda.cross_entropy, cuda.rotary, cuda.processors)
