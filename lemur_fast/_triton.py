"""Whether Triton's kernels can serve a call, and how they are reached without importing Triton before one is needed."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from lemur_fast._devices import capability

OLDEST = (3, 6)
"""The oldest Triton that the kernels are written for."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def installed() -> str | None:
    """The version of the installed Triton; None when there is none."""
    for package in ("triton", "triton-rocm", "pytorch-triton-rocm"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None


def _why_missing() -> str | None:
    """Why there is no usable Triton; None when there is."""
    found = installed()
    if found is None:
        return f"triton is not installed; needs triton >= {OLDEST[0]}.{OLDEST[1]}"
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
        return f"triton {found} is too old; needs triton >= {OLDEST[0]}.{OLDEST[1]}"
    return None


# Looked up once, at import, so that torch.compile can go through `refuses`.
missing: str | None = _why_missing()
"""Why Triton's kernels cannot run at all; None when they can."""

INTERPRETING = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
"""Whether kernels run in Triton's interpreter, on CPU tensors; Triton, too, reads it when a kernel is defined."""


def refuses(device: torch.device, dtype: torch.dtype, **traits: object) -> str | None:
    """Why the Triton kernels cannot serve a call; None when they can."""
    if missing is not None:
        return missing
    if device.type == "cpu" and not INTERPRETING:
        return "needs CUDA or ROCm tensors (or TRITON_INTERPRET=1, which runs the kernels on the CPU, slowly)"
    if device.type not in ("cpu", "cuda"):
        return "needs CUDA or ROCm tensors"
    if device.type == "cuda" and torch.version.cuda and capability(device)[0] < 8:
        return "needs compute capability 8.0 or newer"
    for value in (dtype, *traits.values()):
        if type(value) is torch.dtype and value not in _DTYPES:
            return f"takes float32, bfloat16 and float16, not {value}"
    return None


def kernel(module: str, function: str) -> Callable[..., Any]:
    """`function` of ``lemur_fast.kernels.<module>``, imported when it is first called."""

    @functools.cache
    def find() -> Callable[..., Any]:
        return getattr(importlib.import_module(f"lemur_fast.kernels.{module}"), function)

    return lambda *args, **kwargs: find()(*args, **kwargs)
