"""Cross-entropy of rows of logits, its stats, and its gradient; the formulas stand in ``lemur_fast/ops/_loss.py``.

A program has a row. The forward reads it once, with a running maximum; where the gradient is wanted at once (the loss
chunk of `linear_cross_entropy`), a second walk writes it, over the logits themselves if so asked. Every row is written,
an ignored one with zeros. A label outside the vocabulary makes its row NaN: nothing is read or written out of bounds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lemur_fast.kernels.common import LN2, LOG2E, next_power_of_2, on_device_of, tanh

WIDEST = 4096
"""Columns in flight at a time."""


@triton.jit
def _capped(v, softcap, SOFTCAP: tl.constexpr):
    v = v.to(tl.float32)
    if SOFTCAP:
        v = softcap * tanh(v / softcap)
    return v


@triton.jit
def _gradient_of_row(
    row_logits, row_dlogits, label, trained, known, lse, dloss, cols, label_smoothing, z_loss, softcap,
    SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes dlogits of a row; `row_dlogits` may be `row_logits`."""
    dloss = tl.where(known, dloss, float("nan"))
    factor = 1.0 + 2.0 * z_loss * lse
    uniform = label_smoothing / cols
    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        inside = col < cols
        raw = tl.load(row_logits + col, mask=inside, other=0.0).to(tl.float32)
        x = _capped(raw, softcap, SOFTCAP)
        d = tl.math.exp2((x - lse) * LOG2E) * factor - uniform
        d = tl.where(col == label, d - (1.0 - label_smoothing), d)
        if SOFTCAP:
            t = x / softcap
            d *= 1.0 - t * t
        d = tl.where(trained, d * dloss, 0.0)
        tl.store(row_dlogits + col, d.to(row_dlogits.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["ignore_index"])
def forward_kernel(
    logits, labels, loss, lse, log_prob, entropy, correct, dloss, dlogits,
    logits_stride, dlogits_stride, cols, ignore_index, label_smoothing, z_loss, softcap,
    SMOOTH: tl.constexpr, SOFTCAP: tl.constexpr, STATS: tl.constexpr, GRADIENT: tl.constexpr, WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A program for a row."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    trained = label != ignore_index
    known = (label >= 0) & (label < cols)
    row_logits = logits + row * logits_stride
    # A thread loads 8 neighbours at a time. They share a maximum, so that moving to a new one takes one exponential for
    # all 8, and nothing is exchanged between threads until the row is read.
    GROUPS: tl.constexpr = BLOCK // 8
    largest = tl.full([GROUPS], -float("inf"), tl.float32)
    total = tl.zeros([GROUPS], tl.float32)
    products = tl.zeros([GROUPS], tl.float32)  # of exp(x - largest) and x - largest
    plain = tl.zeros([GROUPS], tl.float32)
    of_label = 0.0
    if trained:
        for start in range(0, cols, BLOCK):
            col = start + tl.arange(0, GROUPS)[:, None] * 8 + tl.arange(0, 8)[None, :]
            inside = col < cols
            x = _capped(tl.load(row_logits + col, mask=inside, other=0.0), softcap, SOFTCAP)
            if SMOOTH:
                plain += tl.sum(tl.where(inside, x, 0.0), 1)
            x = tl.where(inside, x, -float("inf"))
            high = tl.maximum(largest, tl.max(x, 1))
            base = tl.where(high == -float("inf"), 0.0, high)
            shrink = tl.math.exp2((largest - base) * LOG2E)
            weight = tl.math.exp2((x - base[:, None]) * LOG2E)
            if STATS:
                # sum w' (x - high) = shrink * (sum w (x - largest) + (largest - high) * sum w); where all shrinks to
                # nothing, as under a mask of the least float, the second factor may be infinite.
                moved = tl.where(total > 0.0, (largest - base) * total, 0.0)
                here = tl.where(weight > 0.0, weight * (x - base[:, None]), 0.0)
                products = tl.where(shrink > 0.0, shrink * (products + moved), 0.0) + tl.sum(here, 1)
            total = total * shrink + tl.sum(weight, 1)
            largest = high
        of_label = _capped(tl.load(row_logits + label, mask=known, other=0.0), softcap, SOFTCAP)
    high = tl.max(largest, 0)
    base = tl.where(high == -float("inf"), 0.0, high)
    shrink = tl.math.exp2((largest - base) * LOG2E)
    if STATS:
        moved = tl.where(total > 0.0, (largest - base) * total, 0.0)
        product = tl.sum(tl.where(shrink > 0.0, shrink * (products + moved), 0.0), 0)
    sum_all = tl.sum(total * shrink, 0)
    log_sum = tl.math.log2(sum_all) * LN2
    row_lse = high + log_sum
    row_loss = (1.0 - label_smoothing) * (row_lse - of_label) + z_loss * row_lse * row_lse
    if SMOOTH:
        row_loss += label_smoothing * (row_lse - tl.sum(plain, 0) / cols)
    row_loss = tl.where(known, row_loss, float("nan"))
    tl.store(loss + row, tl.where(trained, row_loss, 0.0))
    tl.store(lse + row, tl.where(trained, row_lse, 0.0))
    if STATS:
        tl.store(log_prob + row, tl.where(trained, of_label - row_lse, 0.0))
        tl.store(entropy + row, tl.where(trained, log_sum - product / sum_all, 0.0))
        tl.store(correct + row, trained & (of_label >= high))
    if GRADIENT:
        incoming = 1.0
        if WEIGHTED:
            incoming = tl.load(dloss + row)
        _gradient_of_row(
            row_logits, dlogits + row * dlogits_stride, label, trained, known, row_lse, incoming, cols,
            label_smoothing, z_loss, softcap, SOFTCAP, BLOCK,
        )  # fmt: skip


@triton.jit(do_not_specialize=["ignore_index"])
def backward_kernel(
    dloss, logits, labels, lse, dlogits, logits_stride, dlogits_stride, cols, ignore_index, label_smoothing, z_loss,
    softcap, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program for a row."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    _gradient_of_row(
        logits + row * logits_stride, dlogits + row * dlogits_stride, label, label != ignore_index,
        (label >= 0) & (label < cols), tl.load(lse + row), tl.load(dloss + row), cols, label_smoothing, z_loss, softcap,
        SOFTCAP, BLOCK,
    )  # fmt: skip


def _launch_options(cols: int) -> dict[str, int]:
    block = min(WIDEST, max(8, next_power_of_2(cols)))
    return {"BLOCK": block, "num_warps": min(8, max(1, block // 512))}


def forward(
    logits: Tensor,
    labels: Tensor,
    want_stats: bool,
    dloss: Tensor | None = None,
    dlogits: Tensor | None = None,
    *,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss of every row, and the gradient of ``(dloss * loss).sum()`` where `dlogits` is given to receive it.

    Args:
        logits: ``[T, V]``, rows contiguous.
        labels: ``[T]`` int64.
        want_stats: whether log_prob, entropy and correct are computed.
        dloss: ``[T]`` float32; None stands for ones.
        dlogits: ``[T, V]``, rows contiguous, or None. May be `logits` itself.
        ignore_index: label of rows that are not trained.
        label_smoothing: 0 to 1.
        z_loss: factor of the squared log-sum-exp.
        softcap: 0 for none.

    Returns:
        loss, lse, log_prob, entropy (float32) and correct (bool), each ``[T]``; stats are empty when unwanted.
    """
    rows, cols = logits.shape
    stats = rows if want_stats else 0
    loss, lse = (logits.new_empty(rows, dtype=torch.float32) for _ in range(2))
    log_prob, entropy = (logits.new_empty(stats, dtype=torch.float32) for _ in range(2))
    correct = logits.new_empty(stats, dtype=torch.bool)
    if rows:
        with on_device_of(logits):
            forward_kernel[(rows,)](
                logits, labels, loss, lse, log_prob, entropy, correct, loss if dloss is None else dloss,
                logits if dlogits is None else dlogits, logits.stride(0), 0 if dlogits is None else dlogits.stride(0),
                cols, ignore_index, float(label_smoothing), float(z_loss), float(softcap),
                SMOOTH=label_smoothing != 0.0, SOFTCAP=softcap != 0.0, STATS=want_stats,
                GRADIENT=dlogits is not None, WEIGHTED=dloss is not None, **_launch_options(cols),
            )  # fmt: skip
    return loss, lse, log_prob, entropy, correct


def backward(
    dloss: Tensor,
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    *,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> Tensor:
    """dlogits ``[T, V]``, contiguous, from dloss and lse ``[T]`` float32; the rest as in `forward`."""
    rows, cols = logits.shape
    dlogits = logits.new_empty(logits.shape)
    if rows:
        with on_device_of(logits):
            backward_kernel[(rows,)](
                dloss, logits, labels, lse, dlogits, logits.stride(0), dlogits.stride(0), cols, ignore_index,
                float(label_smoothing), float(z_loss), float(softcap), SOFTCAP=softcap != 0.0, **_launch_options(cols),
            )  # fmt: skip
    return dlogits
