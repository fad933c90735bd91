"""The kernels of every instruction set that this CPU has, and a number of threads that ends with the test."""

from collections.abc import Callable, Iterator

import pytest
import torch

from lemur_fast import _compiled

C = _compiled.C


@pytest.fixture(params=C.cpu.isas())
def isa(request, monkeypatch) -> str:
    monkeypatch.setenv("LEMUR_FAST_CPU", request.param)
    assert C.cpu.isa() == request.param
    return request.param


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
