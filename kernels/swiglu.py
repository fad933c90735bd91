"""SwiGLU: y = silu(gate) * up, and its gradients, which recompute silu. One read and one write of every tensor."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lemur_fast.kernels.common import cdiv, on_device_of, sigmoid

BLOCK = 2048
"""Elements of a program: 16 a thread, two loads of 16 bytes of each input in 16 bits."""


@triton.jit
def _place(cols, BLOCK: tl.constexpr):
    """Row, columns, and which of them are inside, of this program."""
    program = tl.program_id(0)
    blocks = tl.cdiv(cols, BLOCK)
    col = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return (program // blocks).to(tl.int64), col, col < cols


@triton.jit
def forward_kernel(gate, up, y, gate_stride, up_stride, cols, BLOCK: tl.constexpr):
    """A program for a block of one row. y is contiguous."""
    row, col, inside = _place(cols, BLOCK)
    g = tl.load(gate + row * gate_stride + col, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * cols + col, (g * sigmoid(g) * u).to(y.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(dy, gate, up, dgate, dup, dy_stride, gate_stride, up_stride, cols, BLOCK: tl.constexpr):
    """A program for a block of one row. dgate and dup are contiguous."""
    row, col, inside = _place(cols, BLOCK)
    d = tl.load(dy + row * dy_stride + col, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + col, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + col, mask=inside, other=0.0).to(tl.float32)
    s = sigmoid(g)
    tl.store(dgate + row * cols + col, (d * u * s * (1.0 + g * (1.0 - s))).to(dgate.dtype.element_ty), mask=inside)
    tl.store(dup + row * cols + col, (d * g * s).to(dup.dtype.element_ty), mask=inside)


def _shape(*xs: Tensor) -> tuple[int, int]:
    """Rows and columns to walk: one row of all elements where every tensor lies in one piece."""
    rows, cols = xs[0].shape
    return (1, rows * cols) if all(x.is_contiguous() for x in xs) else (rows, cols)


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """y ``[R, C]``, contiguous, of gate and up ``[R, C]``, whose rows are contiguous."""
    y = gate.new_empty(gate.shape)
    rows, cols = _shape(gate, up)
    if y.numel():
        with on_device_of(gate):
            forward_kernel[(rows * cdiv(cols, BLOCK),)](
                gate, up, y, gate.stride(0), up.stride(0), cols, BLOCK=BLOCK, num_warps=4
            )
    return y


def backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """dgate and dup ``[R, C]``, contiguous, of dy, gate and up ``[R, C]``, whose rows are contiguous."""
    dgate, dup = gate.new_empty(gate.shape), up.new_empty(up.shape)
    rows, cols = _shape(dy, gate, up)
    if dgate.numel():
        with on_device_of(gate):
            backward_kernel[(rows * cdiv(cols, BLOCK),)](
                dy, gate, up, dgate, dup, dy.stride(0), gate.stride(0), up.stride(0), cols, BLOCK=BLOCK, num_warps=4
            )
    return dgate, dup
