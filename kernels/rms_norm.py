"""RMSNorm, with the residual addition in front of it: h = x + residual, y = round(h * rstd) * weight.

Forward: a program has whole rows in registers, up to 16,384 columns; wider rows are walked twice. Backward: one program
for each processor, because every program writes a dw of its own; it loads the next rows while it sums over these. A
second kernel adds the parts up in a fixed order: the same bits every time, and no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lemur_fast.kernels.common import cdiv, next_power_of_2, on_device_of, processors, warp_size

WIDEST_FORWARD = 16384
"""Columns that a forward program keeps in registers."""

WIDEST_BACKWARD = 8192
"""Columns that a backward program keeps in registers, with their dw."""


# Without fused multiply-adds: where a thread has one element of a sum of products, the compiler would fuse its product
# with the neighbour's, which differs in the last bit from the neighbour's with its own. The lanes of a warp would then
# write different sums to one place.
EXACT = {"enable_fp_fusion": False}


def forward_tile(cols: int) -> dict[str, int | bool]:
    """Rows and columns of a program's tile, and its warps: 16 elements a thread, two loads of 16 bytes in 16 bits."""
    block = min(next_power_of_2(cols), WIDEST_FORWARD)
    rows = max(1, 1024 // block)
    return {"ROWS": rows, "BLOCK": block, "WHOLE": cols <= block, "num_warps": min(16, max(1, rows * block // 512))}


def backward_tile(cols: int, warp: int) -> dict[str, int | bool]:
    """512 threads, 8 elements each or more: enough for a processor that has one program, and so one part of dw."""
    block = min(next_power_of_2(cols), WIDEST_BACKWARD)
    whole = cols <= block
    return {"ROWS": max(1, 4096 // block) if whole else 1, "BLOCK": block, "WHOLE": whole, "num_warps": 512 // warp}


@triton.jit
def _sum_and_norm(x, residual, h, at_x, at_residual, at_h, inside, ADD: tl.constexpr):
    """The row's elements in float32, as h has them; h is written where there is a residual."""
    v = tl.load(x + at_x, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        r = tl.load(residual + at_residual, mask=inside, other=0.0).to(tl.float32)
        rounded = (v + r).to(h.dtype.element_ty)
        tl.store(h + at_h, rounded, mask=inside)
        v = rounded.to(tl.float32)
    return v


@triton.jit
def _scaled(v, rstd, weight, col, col_inside, x, y):
    """round(v * rstd) * weight, in y's dtype."""
    w = tl.load(weight + col, mask=col_inside, other=0.0).to(tl.float32)
    x_hat = (v * rstd[:, None]).to(x.dtype.element_ty).to(tl.float32)
    return (x_hat * w[None, :]).to(y.dtype.element_ty)


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    x, residual, weight, y, h, rstd, x_stride, residual_stride, rows, cols, eps,
    ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """A program for every ROWS rows. y and h are contiguous."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_inside = (row < rows)[:, None]
    col = tl.arange(0, BLOCK)
    if WHOLE:
        col_inside = col < cols
        inside = row_inside & col_inside[None, :]
        at = row[:, None] * cols + col[None, :]
        v = _sum_and_norm(
            x, residual, h, row[:, None] * x_stride + col[None, :], row[:, None] * residual_stride + col[None, :], at,
            inside, ADD,
        )  # fmt: skip
        scale = tl.rsqrt(tl.sum(v * v, 1) / cols + eps)
        tl.store(y + at, _scaled(v, scale, weight, col, col_inside, x, y), mask=inside)
    else:
        squares = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(0, cols, BLOCK):
            at_col = start + col
            inside = row_inside & (at_col < cols)[None, :]
            v = _sum_and_norm(
                x, residual, h, row[:, None] * x_stride + at_col[None, :],
                row[:, None] * residual_stride + at_col[None, :], row[:, None] * cols + at_col[None, :], inside, ADD,
            )  # fmt: skip
            squares += v * v
        scale = tl.rsqrt(tl.sum(squares, 1) / cols + eps)
        for start in range(0, cols, BLOCK):
            at_col = start + col
            col_inside = at_col < cols
            inside = row_inside & col_inside[None, :]
            at = row[:, None] * cols + at_col[None, :]
            v = tl.load(x + row[:, None] * x_stride + at_col[None, :], mask=inside, other=0.0).to(tl.float32)
            if ADD:  # as h was rounded; what another thread of the program wrote there is not read
                other = tl.load(residual + row[:, None] * residual_stride + at_col[None, :], mask=inside, other=0.0)
                v = (v + other.to(tl.float32)).to(h.dtype.element_ty).to(tl.float32)
            tl.store(y + at, _scaled(v, scale, weight, at_col, col_inside, x, y), mask=inside)
    tl.store(rstd + row, scale, mask=row < rows)


@triton.jit
def _gradient(dy, dh, x_hat, g, mean, rstd, at_dh, inside, dx, ADD: tl.constexpr):
    d = rstd[:, None] * (g - x_hat * mean[:, None])
    if ADD:
        d += tl.load(dh + at_dh, mask=inside, other=0.0).to(tl.float32)
    return d.to(dx.dtype.element_ty)


@triton.jit
def _rows_of(h, dy, rstd, row, h_stride, dy_stride, col, col_inside, end):
    """h, dy and rstd of the rows before `end`; zeros for the others."""
    row_inside = row < end
    inside = row_inside[:, None] & col_inside[None, :]
    v = tl.load(h + row[:, None] * h_stride + col[None, :], mask=inside, other=0.0)
    d = tl.load(dy + row[:, None] * dy_stride + col[None, :], mask=inside, other=0.0)
    return v, d, tl.load(rstd + row, mask=row_inside, other=0.0)


@triton.jit(do_not_specialize=["rows", "rows_each"])
def backward_kernel(
    dy, dh, h, weight, rstd, dx, partial, dy_stride, dh_stride, h_stride, rows, rows_each, cols,
    ADD: tl.constexpr, WEIGHT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """A program for `rows_each` rows, a multiple of ROWS; its part of dw goes to its row of `partial`."""
    program = tl.program_id(0).to(tl.int64)
    first = program * rows_each
    col = tl.arange(0, BLOCK)
    if WHOLE:
        col_inside = col < cols
        w = tl.load(weight + col, mask=col_inside, other=0.0).to(tl.float32)
        dw = tl.zeros([ROWS, BLOCK], tl.float32)
        row = first + tl.arange(0, ROWS)
        next_v, next_d, next_scale = _rows_of(
            h, dy, rstd, row, h_stride, dy_stride, col, col_inside, rows
        )  # fmt: skip
        for start in range(0, rows_each, ROWS):
            row = first + start + tl.arange(0, ROWS)
            inside = (row < rows)[:, None] & col_inside[None, :]
            v = next_v
            scale = next_scale
            d = next_d.to(tl.float32)
            # On their way while this row's sum is made; in the last turn there are none.
            next_v, next_d, next_scale = _rows_of(
                h, dy, rstd, row + ROWS, h_stride, dy_stride, col, col_inside,
                tl.where(start + ROWS < rows_each, rows, 0),
            )  # fmt: skip
            x_hat = v.to(tl.float32) * scale[:, None]
            g = d * w[None, :]
            mean = tl.sum(g * x_hat, 1) / cols
            out = _gradient(
                dy, dh, x_hat, g, mean, scale, row[:, None] * dh_stride + col[None, :], inside, dx, ADD
            )  # fmt: skip
            tl.store(dx + row[:, None] * cols + col[None, :], out, mask=inside)
            if WEIGHT:
                dw += d * x_hat.to(v.dtype).to(tl.float32)
        if WEIGHT:
            tl.store(partial + program * cols + col, tl.sum(dw, 0), mask=col_inside)
    else:
        # One row at a time (ROWS is 1), in two walks; dw is summed in the program's own row of `partial`.
        for start in range(0, rows_each):
            row = first + start
            if row < rows:
                scale = tl.load(rstd + row)
                products = tl.zeros([BLOCK], tl.float32)
                for begin in range(0, cols, BLOCK):
                    at = begin + col
                    col_inside = at < cols
                    v = tl.load(h + row * h_stride + at, mask=col_inside, other=0.0).to(tl.float32)
                    d = tl.load(dy + row * dy_stride + at, mask=col_inside, other=0.0).to(tl.float32)
                    w = tl.load(weight + at, mask=col_inside, other=0.0).to(tl.float32)
                    products += d * w * (v * scale)
                mean = tl.sum(products, 0) / cols
                for begin in range(0, cols, BLOCK):
                    at = begin + col
                    col_inside = at < cols
                    v = tl.load(h + row * h_stride + at, mask=col_inside, other=0.0)
                    d = tl.load(dy + row * dy_stride + at, mask=col_inside, other=0.0).to(tl.float32)
                    w = tl.load(weight + at, mask=col_inside, other=0.0).to(tl.float32)
                    x_hat = v.to(tl.float32) * scale
                    out = scale * (d * w - x_hat * mean)
                    if ADD:
                        out += tl.load(dh + row * dh_stride + at, mask=col_inside, other=0.0).to(tl.float32)
                    tl.store(dx + row * cols + at, out.to(dx.dtype.element_ty), mask=col_inside)
                    if WEIGHT:
                        total = d * x_hat.to(v.dtype).to(tl.float32)
                        if start > 0:
                            total += tl.load(partial + program * cols + at, mask=col_inside, other=0.0)
                        tl.store(partial + program * cols + at, total, mask=col_inside)


@triton.jit(do_not_specialize=["rows"])
def sum_rows_kernel(x, total, rows, cols, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """total [cols] = the sum over the rows of x [rows, cols], in the order of the rows' blocks."""
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (col < cols)[None, :]
        sums += tl.load(x + row[:, None].to(tl.int64) * cols + col[None, :], mask=inside, other=0.0)
    tl.store(total + col, tl.sum(sums, 0), mask=col < cols)


def forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y, h and rstd of rows.

    Args:
        x: ``[R, H]``, rows contiguous.
        residual: as `x`, or None.
        weight: ``[H]``.
        eps: added to the mean of squares.

    Returns:
        ``y [R, H]`` in the dtype that x and weight promote to; ``h [R, H]`` in x's dtype, empty without a residual;
        ``rstd [R]`` float32.
    """
    rows, cols = x.shape
    y = x.new_empty((rows, cols), dtype=torch.promote_types(x.dtype, weight.dtype))
    h = x.new_empty(0 if residual is None else (rows, cols))
    rstd = x.new_empty(rows, dtype=torch.float32)
    options = forward_tile(cols) | EXACT
    if rows:
        with on_device_of(x):
            forward_kernel[(cdiv(rows, options["ROWS"]),)](
                x, x if residual is None else residual, weight, y, y if residual is None else h, rstd,
                x.stride(0), 0 if residual is None else residual.stride(0), rows, cols, eps,
                ADD=residual is not None, **options,
            )  # fmt: skip
    return y, h, rstd


def backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor, want_dw: bool
) -> tuple[Tensor, Tensor]:
    """dx and dw of rows.

    Args:
        dy: ``[R, H]``, rows contiguous, as all below.
        dh: the gradient that comes down the residual stream, or None.
        h: what was normalised.
        weight: ``[H]``.
        rstd: ``[R]`` float32, the forward's.
        want_dw: whether dw is computed.

    Returns:
        ``dx [R, H]`` in h's dtype; ``dw [H]`` float32, empty when it is not wanted.
    """
    rows, cols = h.shape
    dx = h.new_empty((rows, cols))
    options = backward_tile(cols, warp_size(h)) | EXACT
    if not rows:
        return dx, h.new_zeros(cols if want_dw else 0, dtype=torch.float32)
    programs = min(cdiv(rows, options["ROWS"]), processors(h))
    rows_each = cdiv(cdiv(rows, programs), options["ROWS"]) * options["ROWS"]
    programs = cdiv(rows, rows_each)
    partial = h.new_empty((programs, cols) if want_dw else 0, dtype=torch.float32)
    with on_device_of(h):
        backward_kernel[(programs,)](
            dy, h if dh is None else dh, h, weight, rstd, dx, partial,
            dy.stride(0), 0 if dh is None else dh.stride(0), h.stride(0), rows, rows_each, cols,
            ADD=dh is not None, WEIGHT=want_dw, **options,
        )  # fmt: skip
    return dx, sum_rows(partial) if want_dw else h.new_empty(0, dtype=torch.float32)


def sum_rows(x: Tensor) -> Tensor:
    """The sum ``[H]`` over the rows of x ``[R, H]``, float32, contiguous, in an order that hangs on R alone."""
    rows, cols = x.shape
    total = x.new_empty(cols)
    with on_device_of(x):
        sum_rows_kernel[(cdiv(cols, 64),)](x, total, rows, cols, ROWS=32, BLOCK=64, num_warps=4)
    return total
