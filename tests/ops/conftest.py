"""Every op test runs with uninitialised memory filled with NaN, on each backend that serves this machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import lemur_fast as lf
from lemur_fast._compiled import C
from tests.conftest import INTERPRETING


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """torch fills what it allocates without values with NaN: an element that no kernel writes cannot pass."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


BACKENDS = ["triton"] if INTERPRETING else [f"cpu-{isa}" for isa in C.cpu.isas()] + ["reference"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs the test once for each backend of the CPU, the C++ one with every instruction set this CPU has.

    Under ``TRITON_INTERPRET=1`` it runs through Triton's kernels, and through them alone.
    """
    name, _, isa = request.param.partition("-")
    monkeypatch.setenv("LEMUR_FAST_CPU", isa)
    with lf.use_backend(name):
        yield name
