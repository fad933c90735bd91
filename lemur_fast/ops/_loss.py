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

from lemur_fast.dispatch import debug_enabled
from lemur_fast.ops._checks import (
    check_device,
    check_float,
    check_integer,
    check_number,
    check_shape,
    compute_dtype,
)

REDUCTIONS = ("mean", "sum", "none")


class LossStats(NamedTuple):
    """Per-token facts, each ``[T]``, not differentiable; 0 (False) where a token is not trained.

    Attributes:
        lse: log-sum-exp of the logits, natural log, float32.
        log_prob: log-probability of the label, float32.
        entropy: entropy of the predicted distribution in nats, float32.
        correct: whether the label has the largest logit, bool.
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
        trained & (x.argmax(-1) == labels),
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


# ---- the same on the CPU, with as few passes and temporaries as torch allows -----------------------------------------


def trained_rows_loss(
    logits: Tensor,
    labels: Tensor,
    options: LossOptions,
    want_stats: bool,
    dloss: Tensor | None = None,
    grad_out: Tensor | None = None,
) -> TokenLoss:
    """Loss of rows that are all trained, and their gradient in the same pass.

    Args:
        logits: ``[R, V]``.
        labels: ``[R]``, all within the vocabulary.
        options: the loss.
        want_stats: fill `log_prob`, `entropy` and `correct`.
        dloss: ``[R]``, factors of the rows' gradient; None stands for ones.
        grad_out: ``[R, V]`` that receives the gradient, or None. May be `logits` itself.
    """
    _, smoothing, z_loss, softcap = options
    wide = compute_dtype(logits.dtype)
    x = _capped(logits, softcap) if softcap else logits
    # One fused kernel reads 16-bit logits and writes float32; logsumexp would round in 16 bits.
    log_p = torch.log_softmax(x, -1, dtype=wide)
    column = labels[:, None]
    log_p_y = log_p.gather(1, column)[:, 0]
    # By the largest logit, not by the label's: there is nothing to cancel, also where the label is masked out.
    lse = x.amax(-1).to(wide) - log_p.amax(-1) if z_loss or want_stats else log_p_y  # else nobody reads it
    loss = -log_p_y if not smoothing else -(1 - smoothing) * log_p_y - smoothing * log_p.mean(-1)
    if z_loss:
        loss = loss + z_loss * lse.square()
    log_prob, entropy, correct = empty_token_loss(logits, 0, False)[2:]
    if want_stats:
        p = log_p.exp()
        log_prob = log_p_y
        entropy = -torch.where(p > 0, p * log_p, 0.0).sum(-1)
        correct = x.argmax(-1) == labels
    if grad_out is not None:
        dx = log_p.exp_()
        if z_loss:
            dx *= (1 + 2 * z_loss * lse)[:, None]
        dx.scatter_add_(1, column, torch.full_like(column, -(1 - smoothing), dtype=wide))
        if smoothing:
            dx -= smoothing / dx.shape[1]
        if softcap:
            dx *= 1 - (x / softcap).square()
        if dloss is not None:
            dx *= dloss.to(wide)[:, None]
        grad_out.copy_(dx)
    return TokenLoss(loss, lse, log_prob, entropy, correct)


def rows_per_chunk(vocab: int) -> int:
    """Rows whose float32 logits take 128 MiB: large enough for the products, small beside the model."""
    return max(256, 2**25 // vocab)


# ---- checks and reductions -------------------------------------------------------------------------------------------


def check_label_values(labels: Tensor, vocab: int, ignore_index: int) -> None:
    """Raises for a label outside the vocabulary, where looking is free (CPU) or asked for (debug mode)."""
    if labels.device.type != "cpu" and not debug_enabled():
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
    check_integer("labels", labels, (torch.int64, torch.int32))
    check_shape("labels", labels, (tokens,), "one per row")
    check_device("labels", labels, device)
    if weights is not None:
        check_float("weights", weights)
        check_shape("weights", weights, (tokens,), "one per row")
        check_device("weights", weights, device)


def divide_by_items(total: Tensor, num_items: Tensor | float | int | None, trained_weight: Tensor | None) -> Tensor:
    """`total` over `num_items`, or over the weight of the trained tokens; 0 when both are 0."""
    items = trained_weight if num_items is None else num_items
    assert items is not None
    if not isinstance(items, Tensor):
        items = torch.full_like(total, items)
    items = items.to(device=total.device, dtype=total.dtype).reshape(())
    # Nothing trained: 0 / 1 has finite gradients. Losses over no items stay infinite: the count is wrong.
    return total / torch.where((items == 0) & (total == 0), 1.0, items)


def trained_weight(labels: Tensor, weights: Tensor | None, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """Sum of the weights of the trained tokens."""
    trained = labels != ignore_index
    return trained.sum().to(dtype) if weights is None else torch.where(trained, weights.to(dtype), 0.0).sum()
