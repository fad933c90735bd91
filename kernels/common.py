"""What the kernels share: devices, launches, and the mathematics that Triton's language lacks."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
"""log2(e): exponentials are taken in base 2, which is what the hardware has."""

LN2 = tl.constexpr(0.6931471805599453)
"""log(2)."""


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's device the current one: Triton launches there, wherever the tensors are."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@functools.cache
def _of_device(index: int) -> tuple[str, int]:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0], properties.multi_processor_count
    return _nearest(properties.major, properties.minor), properties.multi_processor_count


def _nearest(major: int, minor: int) -> str:
    """The architecture that stands for a compute capability in tables.

    A generation's devices have its instructions, but those of Ampere and Ada that are no A100 have less shared memory.
    """
    return "sm_89" if (major, minor) in ((8, 6), (8, 9)) else f"sm_{major}0"


_pretended = ("sm_80", 4)


@contextlib.contextmanager
def pretending(name: str, count: int) -> Iterator[None]:
    """Lets CPU tensors count as those of a device of architecture `name` with `count` processors.

    For what needs no device: the interpreter, and compiling ahead of time.
    """
    global _pretended
    before, _pretended = _pretended, (name, count)
    try:
        yield
    finally:
        _pretended = before


def architecture(tensor: Tensor) -> str:
    """The target that configs are kept for: ``sm_80``, ``sm_90``, ``gfx942``, ..."""
    return _of_device(tensor.device.index)[0] if tensor.is_cuda else _pretended[0]


def processors(tensor: Tensor) -> int:
    """Streaming multiprocessors (AMD: compute units) of the tensor's device."""
    return _of_device(tensor.device.index)[1] if tensor.is_cuda else _pretended[1]


def warp_size(tensor: Tensor) -> int:
    """Threads of a warp (AMD: a wavefront) of the tensor's device."""
    return 64 if architecture(tensor).startswith("gfx9") else 32


def next_power_of_2(n: int) -> int:
    """The least power of 2 that is at least n; 1 for 0."""
    return 1 << max(0, n - 1).bit_length()


def cdiv(n: int, d: int) -> int:
    """n / d, rounded up."""
    return -(-n // d)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) in float32."""
    return 1.0 / (1.0 + tl.math.exp2(x * -LOG2E))


@triton.jit
def tanh(x):
    """tanh to a few roundings, for small arguments too. Coefficients: Moshier's Cephes library, tanhf."""
    z = x * x
    p = -5.70498872745e-3
    p = p * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    near_zero = p * z * x + x
    return tl.where(z < 0.390625, near_zero, 1.0 - 2.0 * sigmoid(-2.0 * x))
