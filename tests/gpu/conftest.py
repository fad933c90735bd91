"""The device that a test runs on, the backends there, and uninitialised memory filled with NaN."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import lemur_fast as lf
from lemur_fast.dispatch import BackendError
from tests.conftest import INTERPRETING

if INTERPRETING:
    collect_ignore_glob = ["test_*.py"]  # there tests/ops runs Triton's kernels

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch asks for where algorithms are deterministic

OPTIONAL = ("varlen", "flash_attn", *(("cuda",) if torch.version.hip else ()))
"""Backends that a machine may lack, or that serve some calls alone. Any other that refuses is a failure: on an NVIDIA
GPU the CUDA kernels, too, for then they were not built, or not for this GPU, and would go untested in silence."""


def on_gpu(*values: Any) -> Any:
    """A parameter that is left out where there is no GPU."""
    return pytest.param(*values, marks=pytest.mark.gpu)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Any:
    """A call that an optional backend refuses skips the test, with its reason."""
    try:
        return (yield)
    except BackendError as reason:
        if pyfuncitem.funcargs.get("backend") in OPTIONAL:
            pytest.skip(str(reason))
        raise


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    return torch.device(name)


@pytest.fixture(params=["cpu", on_gpu("cuda")])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and under ``-m gpu`` the GPU."""
    return _device(request.param)


@pytest.fixture(params=[on_gpu("cuda")])
def gpu(request: pytest.FixtureRequest) -> torch.device:
    """A GPU alone: for what a CPU has no like of."""
    return _device(request.param)


@pytest.fixture
def backend(served: tuple[str, str]) -> Iterator[str]:
    """The backend of the fixture `served` (or of an `attention_served`), and no other."""
    with lf.use_backend(served[1]):
        yield served[1]


EVERY = [("cpu", "cpu"), *(on_gpu(("cuda", name)) for name in ("cuda", "triton", "reference"))]


@pytest.fixture(params=EVERY, ids="-".join)
def served(request: pytest.FixtureRequest) -> tuple[str, str]:
    """(device, backend)."""
    _device(request.param[0])
    return request.param


@pytest.fixture
def place(served: tuple[str, str]) -> torch.device:
    """The device of the backend."""
    return torch.device(served[0])


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """torch fills what it allocates without values with NaN: an element that no kernel writes cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.cuda.empty_cache()
