"""Tests of the Triton kernels themselves, on machines that need no GPU.

``python -m pytest tests/kernels`` compiles them for sm_80 and sm_90 and executes the machine code (`tests.ptxsim`);
``TRITON_INTERPRET=1 python -m pytest tests/kernels`` runs their source in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks.ahead_of_time import recording
from lemur_fast.kernels import common
from tests.conftest import INTERPRETING
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
