"""Every op test runs with uninitialised memory filled with NaN, on each backend that serves this machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import lemur_fast as lf


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """torch fills what it allocates without values with NaN: an element that no kernel writes cannot pass."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once for each backend of the CPU."""
    with lf.use_backend(request.param):
        yield request.param
