"""Triton's interpreter, mended and made strict: for ``TRITON_INTERPRET=1`` on CPU tensors. Import it before a launch.

Mended, because the stock interpreter (3.6 to 3.8) is wrong where it matters here: products of bfloat16 multiply raw
bits, float32 is truncated on its way to bfloat16, and `input_precision` is ignored. Arithmetic on bfloat16 itself,
which it does on raw bits too and which our kernels do not use, raises.

Strict: every launch is watched. An access outside the tensors that were passed raises `Fault`; so does a store that
another program's load or store also touches (programs run in any order on a device), and two lanes of one store that
hit the same address with different values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle


class Fault(Exception):
    """A kernel did what would be wrong on a device."""


# ---- bfloat16 --------------------------------------------------------------------------------------------------------


def _widened(bits: np.ndarray) -> np.ndarray:
    """bfloat16, as uint16, to float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _rounded(values: np.ndarray) -> np.ndarray:
    """float32 to bfloat16, as uint16: to nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _is_bfloat16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _cast(self: InterpreterBuilder, handle: TensorHandle, dtype: tl.dtype) -> TensorHandle:
    source, target = handle.dtype.scalar, dtype.scalar
    if source == target:
        return TensorHandle(handle.data, target)
    data = _widened(handle.data) if source == tl.bfloat16 else handle.data
    if target == tl.bfloat16:
        return TensorHandle(_rounded(data.astype(np.float32)), target)
    with np.errstate(over="ignore"):  # float16 of a large number is infinite, as on a device
        return TensorHandle(data.astype(interpreter._get_np_dtype(target)), target)


def _fp_to_fp(self: InterpreterBuilder, handle: TensorHandle, dtype: tl.dtype, rounding_mode: object) -> TensorHandle:
    return _cast(self, handle, dtype)


def _tf32(values: np.ndarray) -> np.ndarray:
    """float32 with the 10 bits of mantissa that a tensor core keeps of it."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0xFFF + ((bits >> 13) & 1)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(values), rounded, bits).astype(np.uint32).view(np.float32)


def _dot(
    self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, d: TensorHandle, input_precision: Any, _: object
) -> TensorHandle:
    if d.dtype.scalar != tl.float32:
        raise Fault(f"a dot adds up in {d.dtype.scalar}: takes float32")
    operands = []
    for handle in (a, b):
        data = _widened(handle.data) if _is_bfloat16(handle) else handle.data.astype(np.float32)
        tf32 = handle.dtype.scalar == tl.float32 and input_precision == interpreter._ir.INPUT_PRECISION.TF32
        operands.append(_tf32(data) if tf32 else data)
    return TensorHandle(np.matmul(*operands) + d.data, tl.float32)


def _refusing_bfloat16(original: Callable, operands: int) -> Callable:
    def run(self: InterpreterBuilder, *arguments: Any) -> TensorHandle:
        if arguments[operands] is not np.where and any(_is_bfloat16(x) for x in arguments[:operands]):
            raise Fault(f"{arguments[operands].__name__} of bfloat16: the interpreter would take its bits for integers")
        with np.errstate(all="ignore"):
            return original(self, *arguments)

    return run


# ---- memory ----------------------------------------------------------------------------------------------------------

_NOBODY, _MANY = -1, -2

_PAGE = 4096

watch_races = True
"""Whether races are faults. Tests of input that no result is promised for switch it off."""


class _Watch:
    """The bytes of the tensors of a launch, and which program last stored and loaded each."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        spans = sorted(_span(tensor) for tensor in tensors if tensor.numel())
        self.starts: list[int] = []
        ends: list[int] = []
        for start, end in spans:  # tensors may overlap: gradients written over logits
            if ends and start <= ends[-1]:
                ends[-1] = max(ends[-1], end)
            else:
                self.starts.append(start)
                ends.append(end)
        self.begin, self.end = np.array(self.starts, np.int64), np.array(ends, np.int64)
        self.base = np.concatenate([[0], np.cumsum(self.end - self.begin)])
        # Kept for the pages that are touched: tensors may have gaps of gigabytes. Slot 0 is no page's.
        self.slots = np.zeros(self.base[-1] // _PAGE + 1, np.int32)
        self.used = 1
        self.stored = np.full(64 * _PAGE, _NOBODY, np.int32)
        self.loaded = np.full(64 * _PAGE, _NOBODY, np.int32)

    def places(self, kind: str, addresses: np.ndarray, width: int) -> np.ndarray:
        """Index into `stored` and `loaded` of every address."""
        span = np.searchsorted(self.begin, addresses, "right") - 1
        wrong = (span < 0) | (addresses + width > self.end[np.maximum(span, 0)]) if len(self.begin) else addresses >= 0
        if wrong.any():
            raise Fault(f"{kind} out of bounds: {int(wrong.sum())} lanes, the first at {hex(int(addresses[wrong][0]))}")
        if (addresses % width).any():
            raise Fault(f"misaligned {kind} of {width} bytes")
        offsets = self.base[span] + addresses - self.begin[span]
        pages = offsets // _PAGE
        new = np.unique(pages[self.slots[pages] == 0])
        if len(new):
            self.slots[new] = np.arange(self.used, self.used + len(new))
            self.used += len(new)
            while len(self.stored) < self.used * _PAGE:
                self.stored = np.concatenate([self.stored, np.full_like(self.stored, _NOBODY)])
                self.loaded = np.concatenate([self.loaded, np.full_like(self.loaded, _NOBODY)])
        return self.slots[pages].astype(np.int64) * _PAGE + offsets % _PAGE

    def load(self, program: int, addresses: np.ndarray, width: int) -> None:
        at = self.places("load", addresses, width)
        if not watch_races:
            return
        if ((self.stored[at] != _NOBODY) & (self.stored[at] != program)).any():
            raise Fault("race: a program loads what another one stores")
        before = self.loaded[at]
        self.loaded[at] = np.where((before == _NOBODY) | (before == program), program, _MANY)

    def store(self, program: int, addresses: np.ndarray, values: np.ndarray, width: int) -> None:
        at = self.places("store", addresses, width)
        if not watch_races:
            return
        for other, what in ((self.stored, "stores"), (self.loaded, "loads")):
            if ((other[at] != _NOBODY) & (other[at] != program)).any():
                raise Fault(f"race: a program stores where another one {what}")
        order = np.argsort(addresses, kind="stable")
        same = addresses[order][1:] == addresses[order][:-1]
        if (same & (values[order][1:] != values[order][:-1])).any():
            raise Fault("race: two lanes of a store write different values to one address")
        self.stored[at] = program


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte, and the byte past the last, that the tensor's elements take."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


_watch: _Watch | None = None


def _active(pointers: TensorHandle, mask: TensorHandle) -> tuple[np.ndarray, np.ndarray]:
    inside = np.broadcast_to(mask.data, pointers.data.shape).ravel().astype(bool)
    return pointers.data.astype(np.int64).ravel()[inside], inside


def _program(builder: InterpreterBuilder) -> int:
    x, y, z = builder.grid_idx
    _, ny, nz = builder.grid_dim
    return (x * ny + y) * nz + z


def _watched_load(original: Callable) -> Callable:
    def load(self: InterpreterBuilder, pointers: TensorHandle, mask: TensorHandle, *rest: Any) -> TensorHandle:
        addresses, _ = _active(pointers, mask)
        width = pointers.get_element_ty().primitive_bitwidth // 8 or 1
        assert _watch is not None
        if len(addresses):
            _watch.load(_program(self), addresses, width)
        return original(self, pointers, mask, *rest)

    return load


def _watched_store(original: Callable) -> Callable:
    def store(self: InterpreterBuilder, pointers: TensorHandle, value: TensorHandle, mask: TensorHandle, *rest: Any):
        addresses, inside = _active(pointers, mask)
        width = pointers.get_element_ty().primitive_bitwidth // 8 or 1
        assert _watch is not None
        if len(addresses):
            values = np.broadcast_to(value.data, pointers.data.shape).ravel()[inside]
            bits = values.view(f"u{values.itemsize}") if values.dtype != bool else values
            _watch.store(_program(self), addresses, bits, width)
        return original(self, pointers, value, mask, *rest)

    return store


def _watched_launch(original: Callable) -> Callable:
    def launch(self: GridExecutor, *arguments: Any, **keywords: Any) -> None:
        global _watch
        everything = [*arguments, *keywords.values()]
        _watch = _Watch([x for x in everything if isinstance(x, torch.Tensor)])
        try:
            original(self, *arguments, **keywords)
        except interpreter.InterpreterError as error:
            if isinstance(error.__cause__, Fault):
                raise error.__cause__ from None
            raise
        finally:
            _watch = None

    return launch


def mend() -> None:
    """Replaces the parts of the interpreter that are wrong, and watches memory from now on. Once a process."""
    if InterpreterBuilder.cast_impl is _cast:
        return
    InterpreterBuilder.cast_impl = _cast
    InterpreterBuilder.create_fp_to_fp = _fp_to_fp
    InterpreterBuilder.create_dot = _dot
    InterpreterBuilder.binary_op = _refusing_bfloat16(InterpreterBuilder.binary_op, 2)
    InterpreterBuilder.unary_op = _refusing_bfloat16(InterpreterBuilder.unary_op, 1)
    InterpreterBuilder.create_masked_load = _watched_load(InterpreterBuilder.create_masked_load)
    InterpreterBuilder.create_masked_store = _watched_store(InterpreterBuilder.create_masked_store)
    GridExecutor.__call__ = _watched_launch(GridExecutor.__call__)
