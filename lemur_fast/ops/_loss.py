"""What `cross_entropy` and `linear_cross_entropy` share: options, the loss of a row, reductions.

With x the logits after softcap, lse their log-sum-exp, y the label, e the label smoothing, z the z-loss factor, V the
vocabulary:

    x      = c * tanh(logits / c)                         (x = logits without a softcap)
    loss   = (1 - e) * (lse - x_y) + e * (lse - mean_v x) + z * lse^2
    dx_v   = p_v * (1 + 2 * z * lse) - (1 - e) * [v = y] - e / V,        p = softmax(x)
    dlogits = dx * (1 - (x / c)^2)

A row whose label is ignored has loss 0 and gradient 0. A label outside the vocabulary raises on the CPU, where looking
costs nothing; elsewhere its loss and gradient are NaN, so that it cannot go unnoticed and costs no sync
(``LEMUR_FAST_DEBUG=1`` raises there too).

Sources: z-loss, Chowdhery et al., "PaLM", 2022, arXiv 2204.02311, section 5; softcap, Gemma 2, arXiv 2408.00118.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lemur_fast import _compiled, _triton
from lemur_fast.dispatch import debug_enabled
from lemur_fast.ops._checks import (
    check_device,
    check_float,
    check_integer,
    check_number,
    check_shape,
    compute_dtype,
)

_LABELS = (torch.int64, torch.int32)
REDUCTIONS = ("mean", "sum", "none")


class LossStats(NamedTuple):
    """Per-token facts, each ``[T]``, not differentiable; 0 (False) where a token is not trained.

    Attributes:
        lse: log-sum-exp of the logits, natural log, float32.
        log_prob: log-probability of the label, float32.
        entropy: entropy of the predicted distribution in nats, float32.
        correct: whether no logit is larger than the label's, bool.
    """

    lse: Tensor
    log_prob: Tensor
    entropy: Tensor
    correct: Tensor


class LossOptions(NamedTuple):
    """The numbers that shape a loss; `softcap` 0 stands for none."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float


class TokenLoss(NamedTuple):
    """Loss and log-sum-exp of rows, and their stats where wanted (else empty)."""

    loss: Tensor
    lse: Tensor
    log_prob: Tensor
    entropy: Tensor
    correct: Tensor


def empty_token_loss(like: Tensor, tokens: int, want_stats: bool) -> TokenLoss:
    """Zeros for `tokens` rows, in the dtype that losses of `like` have."""
    wide = compute_dtype(like.dtype)
    stats = tokens if want_stats else 0
    return TokenLoss(
        like.new_zeros(tokens, dtype=wide),
        like.new_zeros(tokens, dtype=wide),
        like.new_zeros(stats, dtype=wide),
        like.new_zeros(stats, dtype=wide),
        like.new_zeros(stats, dtype=torch.bool),
    )


def _unwritten(logits: Tensor, want_stats: bool) -> TokenLoss:
    """Memory for what a kernel writes of every row, ignored ones included."""
    rows = logits.shape[0]
    stats = rows if want_stats else 0
    lse = logits.new_empty(rows, dtype=torch.float32)
    return TokenLoss(
        torch.empty_like(lse),
        lse,
        lse.new_empty(stats),
        lse.new_empty(stats),
        lse.new_empty(stats, dtype=torch.bool),
    )


# ---- the formula in plain torch --------------------------------------------------------------------------------------


def _capped(logits: Tensor, softcap: float) -> Tensor:
    wide = logits.to(compute_dtype(logits.dtype))
    return softcap * torch.tanh(wide / softcap) if softcap else wide


def token_loss_reference(logits: Tensor, labels: Tensor, options: LossOptions, want_stats: bool) -> TokenLoss:
    """Loss of every row: ``logits [T, V]``, ``labels [T]``."""
    ignore_index, smoothing, z_loss, softcap = options
    x = _capped(logits, softcap)
    trained = labels != ignore_index
    known = (labels >= 0) & (labels < x.shape[1])
    lse = torch.logsumexp(x, -1)
    x_y = x.gather(1, labels.clamp(0, x.shape[1] - 1)[:, None])[:, 0]
    loss = (1 - smoothing) * (lse - x_y) + z_loss * lse.square()
    if smoothing:  # guarded: 0 * (lse - mean) is NaN where a logit is -inf
        loss = loss + smoothing * (lse - x.mean(-1))
    loss = torch.where(trained, torch.where(known, loss, torch.nan), 0.0)
    if not want_stats:
        return TokenLoss(loss, lse, *empty_token_loss(logits, 0, False)[2:])
    p = torch.softmax(x, -1)
    entropy = lse - torch.where(p > 0, p * x, 0.0).sum(-1)
    return TokenLoss(
        loss,
        torch.where(trained, lse, 0.0),
        torch.where(trained, x_y - lse, 0.0),
        torch.where(trained, entropy, 0.0),
        trained & (x_y >= x.amax(-1)),
    )


def token_loss_backward_reference(
    dloss: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, options: LossOptions
) -> Tensor:
    """Gradient of ``(dloss * loss).sum()`` with respect to the logits ``[T, V]``, in the dtype of the logits."""
    ignore_index, smoothing, z_loss, softcap = options
    x = _capped(logits, softcap)
    known = (labels >= 0) & (labels < x.shape[1])
    target = torch.zeros_like(x).scatter_(1, labels.clamp(0, x.shape[1] - 1)[:, None], 1.0)
    dx = (
        torch.exp(x - lse[:, None]) * (1 + 2 * z_loss * lse[:, None])
        - (1 - smoothing) * target
        - smoothing / x.shape[1]
    )
    if softcap:
        dx = dx * (1 - (x / softcap).square())
    dx = dx * torch.where(known, dloss.to(x.dtype), torch.nan)[:, None]
    return torch.where((labels != ignore_index)[:, None], dx, 0.0).to(logits.dtype)


# ---- the same in C++ -------------------------------------------------------------------------------------------------


def compiled_token_loss(
    logits: Tensor,
    labels: Tensor,
    options: LossOptions,
    want_stats: bool,
    dloss: Tensor | None = None,
    grad_out: Tensor | None = None,
    out: TokenLoss | None = None,
) -> TokenLoss:
    """Loss of every row, and the gradient of ``(dloss * loss).sum()`` while the row is at hand.

    Args:
        logits: ``[T, V]``, contiguous rows.
        labels: ``[T]`` int64, within the vocabulary or ignored; on a GPU another one makes its row NaN.
        options: the loss.
        want_stats: fill `log_prob`, `entropy` and `correct`.
        dloss: ``[T]`` float32; None stands for ones.
        grad_out: ``[T, V]``, contiguous, that receives the gradient, or None. May be `logits` itself.
        out: memory for the result, which is then returned; None makes it.
    """
    result = _unwritten(logits, want_stats) if out is None else out
    loss, lse, log_prob, entropy, correct = result
    labels = labels.contiguous()
    dloss = None if dloss is None else dloss.contiguous()
    kernels, where = _compiled.place(logits)
    kernels.cross_entropy_fwd(
        logits.data_ptr(),
        logits.stride()[0],
        labels.data_ptr(),
        loss.data_ptr(),
        lse.data_ptr(),
        log_prob.data_ptr() if want_stats else 0,
        entropy.data_ptr() if want_stats else 0,
        correct.data_ptr() if want_stats else 0,
        0 if dloss is None else dloss.data_ptr(),
        0 if grad_out is None else grad_out.data_ptr(),
        *logits.shape,
        *options,
        _compiled.dtype_code(logits.dtype),
        **where,
    )
    return result


# ---- the same in Triton ----------------------------------------------------------------------------------------------

_forward_kernel = _triton.kernel("cross_entropy", "forward")


def triton_token_loss(
    logits: Tensor,
    labels: Tensor,
    options: LossOptions,
    want_stats: bool,
    dloss: Tensor | None = None,
    grad_out: Tensor | None = None,
) -> TokenLoss:
    """As `compiled_token_loss`, on a GPU; a label outside the vocabulary makes its row NaN."""
    dloss = None if dloss is None else dloss.contiguous()
    return TokenLoss(*_forward_kernel(logits, labels.contiguous(), want_stats, dloss, grad_out, **options._asdict()))


# ---- checks and reductions -------------------------------------------------------------------------------------------


def check_label_values(labels: Tensor, vocab: int, ignore_index: int) -> None:
    """Raises for a label outside the vocabulary, where looking is free (CPU) or asked for (debug mode)."""
    if not (labels.is_cpu or debug_enabled()):
        return
    wrong = (labels != ignore_index) & ((labels < 0) | (labels >= vocab))
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"labels: got {int(labels[at])} at position {at}; takes 0 to {vocab - 1}, or ignore_index {ignore_index}"
        )


def loss_options(
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None, reduction: str, num_items: object
) -> LossOptions:
    """Checks the numbers of a loss and gathers them."""
    usual = (
        type(ignore_index) is int
        and type(label_smoothing) is type(z_loss) is float
        and 0.0 <= label_smoothing <= 1.0
        and z_loss >= 0.0
        and softcap is num_items is None
        and reduction in REDUCTIONS
    )
    if usual:
        return LossOptions(ignore_index, label_smoothing, z_loss, 0.0)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: got {type(ignore_index).__name__}; takes an int")
    check_number("label_smoothing", label_smoothing)
    if label_smoothing > 1:
        raise ValueError(f"label_smoothing: got {label_smoothing}; takes 0 to 1")
    check_number("z_loss", z_loss)
    if softcap is not None:
        check_number("softcap", softcap, positive=True)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}; takes {', '.join(map(repr, REDUCTIONS))}")
    if num_items is not None and reduction != "mean":
        raise ValueError(f"num_items: got a value with reduction={reduction!r}; takes reduction='mean'")
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(f"num_items: got shape {list(num_items.shape)}; takes one number")
    elif num_items is not None:
        check_number("num_items", num_items)
    return LossOptions(ignore_index, label_smoothing, z_loss, softcap or 0.0)


def check_labels(labels: Tensor, weights: Tensor | None, tokens: int, device: torch.device) -> None:
    usual = isinstance(labels, Tensor) and labels.dtype in _LABELS and labels.device == device and weights is None
    if usual and labels.shape == (tokens,):
        return
    check_integer("labels", labels, _LABELS)
    check_shape("labels", labels, (tokens,), "one per row")
    check_device("labels", labels, device)
    if weights is not None:
        check_float("weights", weights)
        check_shape("weights", weights, (tokens,), "one per row")
        check_device("weights", weights, device)


def only_rows(labels: Tensor, rows: Tensor | None, ignore_index: int) -> Tensor:
    """`labels` with every token that is not in `rows` ignored; entries of `rows` outside [0, T) are padding."""
    labels = labels if labels.dtype == torch.int64 else labels.long()
    if rows is None:
        return labels
    tokens = labels.numel()
    rows = torch.where((rows >= 0) & (rows < tokens), rows, tokens).long()
    listed = torch.zeros(tokens + 1, dtype=torch.bool, device=labels.device).index_fill(0, rows, True)
    return torch.where(listed[:tokens], labels, ignore_index)


def sum_losses(loss: Tensor, labels: Tensor, ignore_index: int, mean: bool, backend: str) -> tuple[Tensor, Tensor]:
    """The sum of the losses and an empty tensor; or their mean and the number of trained tokens, by which it divided.

    That number is at least 1, so that a mean over none of them is 0.

    Args:
        loss: ``[T]``, 0 where a token does not train.
        labels: ``[T]`` int64.
        ignore_index: label of a token that does not train.
        mean: whether the mean is wanted.
        backend: that of the op. In plain torch these are seven small operators, dearer than a small loss itself.
    """
    if backend != "cpu":
        if not mean:
            return loss.sum(), loss.new_empty(0)
        items = trained_weight(labels, None, ignore_index, loss.dtype).clamp(min=1)
        return loss.sum() / items, items
    total, items = empty_sum(loss, mean)
    labels = labels.contiguous()
    _compiled.C.cpu.sum_losses(
        loss.data_ptr(),
        labels.data_ptr(),
        labels.shape[0],
        ignore_index,
        total.data_ptr(),
        items.data_ptr() if mean else 0,
    )
    return total, items


def compiled_sum(
    logits: Tensor,
    labels: Tensor,
    options: LossOptions,
    mean: bool,
    want_stats: bool,
    grad_out: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """`sum_losses` of `compiled_token_loss` on a CPU, and then its lse and stats: one call, which keeps the losses."""
    rows, cols = logits.shape
    stats = rows if want_stats else 0
    lse = logits.new_empty(rows, dtype=torch.float32)
    total, items = empty_sum(lse, mean)
    log_prob, entropy, correct = lse.new_empty(stats), lse.new_empty(stats), lse.new_empty(stats, dtype=torch.bool)
    labels = labels.contiguous()
    _compiled.C.cpu.cross_entropy_sum(
        logits.data_ptr(),
        logits.stride()[0],
        labels.data_ptr(),
        total.data_ptr(),
        items.data_ptr() if mean else 0,
        lse.data_ptr(),
        log_prob.data_ptr() if want_stats else 0,
        entropy.data_ptr() if want_stats else 0,
        correct.data_ptr() if want_stats else 0,
        0 if grad_out is None else grad_out.data_ptr(),
        rows,
        cols,
        *options,
        _compiled.dtype_code(logits.dtype),
    )
    return total, items, lse, log_prob, entropy, correct


def empty_sum(loss: Tensor, mean: bool) -> tuple[Tensor, Tensor]:
    """Memory for what `sum_losses` returns, in the dtype of the losses."""
    total = loss.new_empty(())
    return total, torch.empty_like(total) if mean else loss.new_empty(0)


def divide_by_items(total: Tensor, num_items: Tensor | float | int | None, trained_weight: Tensor | None) -> Tensor:
    """`total` over `num_items`, or over the weight of the trained tokens; 0 when both are 0."""
    items = trained_weight if num_items is None else num_items
    assert items is not None
    if not isinstance(items, Tensor):
        if items:
            return total / items
        items = torch.full_like(total, items)
    items = items.to(device=total.device, dtype=total.dtype).reshape(())
    return total / divisor(total, items)


def divisor(total: Tensor, items: Tensor) -> Tensor:
    """`items`, but 1 where `total` is 0 over none: 0 / 1 has finite gradients.

    Losses over no items stay infinite: the count is wrong.
    """
    return items + ((items == 0) & (total == 0))


def trained_weight(labels: Tensor, weights: Tensor | None, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """Sum of the weights of the trained tokens."""
    trained = labels != ignore_index
    return trained.sum().to(dtype) if weights is None else torch.where(trained, weights.to(dtype), 0.0).sum()
