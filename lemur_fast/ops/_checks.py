"""Argument checks and dtype rules that the public functions share.

Every check looks at shapes, dtypes, devices and layouts only, never at values: no check costs a device sync.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

_STRIDED = torch.strided
FLOAT_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))


def check_float(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}; takes a torch.Tensor")
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: got dtype {tensor.dtype}; takes float32, bfloat16, float16 or float64")
    if tensor.layout != _STRIDED:
        raise ValueError(f"{name}: got layout {tensor.layout}; takes a strided (dense) tensor")


def check_floats(names: tuple[str, ...], *tensors: Tensor) -> None:
    """`check_float` of all, and `check_device` against the device of the first: in one pass, when all is well."""
    first = tensors[0]
    if isinstance(first, Tensor):
        device = first.device
        for x in tensors:
            if not isinstance(x, Tensor) or x.dtype not in FLOAT_DTYPES or x.layout != _STRIDED or x.device != device:
                break
        else:
            return
    for name, x in zip(names, tensors, strict=True):
        check_float(name, x)
    for name, x in zip(names, tensors, strict=True):
        check_device(name, x, first.device)


def check_integer(name: str, tensor: Tensor, dtypes: Collection[torch.dtype]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}; takes a torch.Tensor")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: got dtype {tensor.dtype}; takes {' or '.join(map(str, dtypes))}")


def check_count(name: str, value: object) -> None:
    """Checks an integer that counts something."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {type(value).__name__}; takes an int")
    if value < 1:
        raise ValueError(f"{name}: got {value}; must be at least 1")


def check_number(name: str, value: object, *, positive: bool = False) -> None:
    """Checks a Python number that must not be negative (or must be positive); nan is neither."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {type(value).__name__}; takes a Python number")
    if not (value > 0 if positive else value >= 0):
        raise ValueError(f"{name}: got {value}; must {'be positive' if positive else 'not be negative'}")


def check_flag(name: str, value: object) -> None:
    """Checks a bool; None and words would else count as one."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}; takes True or False")


def check_dims(name: str, tensor: Tensor, layout: str) -> None:
    """Checks the number of dimensions against a layout such as ``[T, Hq, D]``."""
    if tensor.dim() != layout.count(",") + 1:
        raise ValueError(f"{name}: got shape {list(tensor.shape)}; takes {layout}")


def check_shape(name: str, tensor: Tensor, shape: Sequence[int], why: str) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name}: got shape {list(tensor.shape)}; takes {list(shape)} ({why})")


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name}: got device {tensor.device}; takes {device}, where the other inputs are")


def check_constant(name: str, tensor: Tensor) -> None:
    """Refuses a tensor that wants a gradient the op would not compute."""
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: got a tensor that requires a gradient; takes a constant (detach it)")


def unit_stride(tensor: Tensor) -> Tensor:
    """`tensor` with its last dimension contiguous: itself when it is, else a copy."""
    # First what is usual, and quick to ask.
    if tensor.is_contiguous() or tensor.stride(-1) == 1 or tensor.shape[-1] == 1:
        return tensor
    return tensor.contiguous()


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics, sums and softmax are taken: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def to_autocast_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Casts float tensors to the autocast dtype while autocast is on for their device (matmul-like ops).

    float64 stays, as under torch's own rule.
    """
    first = tensors[0]
    device_type = "cpu" if first.is_cpu else first.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)
