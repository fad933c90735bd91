"""Cross-entropy from logits, with label smoothing, z-loss, softcap and token weights.

The formula and its gradient stand in `lemur_fast.ops._loss`. The operator yields the loss of every token; weights and
reductions are applied to those ``[T]`` numbers in plain torch, so their gradients come from autograd.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lemur_fast import _compiled, _triton
from lemur_fast.dispatch import choose, implementation, register_backend, serves_any, wants_grad
from lemur_fast.ops._checks import check_dims, check_float, unit_stride
from lemur_fast.ops._loss import (
    LossOptions,
    LossStats,
    TokenLoss,
    check_label_values,
    check_labels,
    compiled_sum,
    compiled_token_loss,
    divide_by_items,
    empty_sum,
    empty_token_loss,
    loss_options,
    sum_losses,
    token_loss_backward_reference,
    token_loss_reference,
    trained_weight,
    triton_token_loss,
)
from lemur_fast.ops._registration import define, differentiable, once_differentiable

# ---- backends --------------------------------------------------------------------------------------------------------
# forward: (logits [T, V], labels [T], options, want_stats) -> TokenLoss; backward: (dloss [T], logits, labels, lse,
# options) -> dlogits [T, V]. The reference is `token_loss_reference`.


def _compiled_forward(logits: Tensor, labels: Tensor, options: LossOptions, want_stats: bool) -> TokenLoss:
    return compiled_token_loss(unit_stride(logits), labels, options, want_stats)


def _compiled_backward(dloss: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, options: LossOptions) -> Tensor:
    logits, dlogits = unit_stride(logits), logits.new_empty(logits.shape)
    dloss, labels, lse = dloss.contiguous(), labels.contiguous(), lse.contiguous()
    kernels, where = _compiled.place(logits)
    kernels.cross_entropy_bwd(
        dloss=dloss.data_ptr(),
        logits=logits.data_ptr(),
        logits_stride=logits.stride(0),
        labels=labels.data_ptr(),
        lse=lse.data_ptr(),
        dlogits=dlogits.data_ptr(),
        rows=logits.shape[0],
        cols=logits.shape[1],
        dtype=_compiled.dtype_code(logits.dtype),
        **options._asdict(),
        **where,
    )
    return dlogits


_backward_kernel = _triton.kernel("cross_entropy", "backward")


def _triton_forward(logits: Tensor, labels: Tensor, options: LossOptions, want_stats: bool) -> TokenLoss:
    return triton_token_loss(unit_stride(logits), labels, options, want_stats)


def _triton_backward(dloss: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, options: LossOptions) -> Tensor:
    return _backward_kernel(
        dloss.contiguous(), unit_stride(logits), labels.contiguous(), lse.contiguous(), **options._asdict()
    )


for _name, _refuse in (("cuda", _compiled.refuses_cuda), ("cpu", _compiled.refuses_cpu)):
    register_backend("cross_entropy", _name, refuse=_refuse, forward=_compiled_forward, backward=_compiled_backward)
register_backend("cross_entropy", "triton", refuse=_triton.refuses, forward=_triton_forward, backward=_triton_backward)
register_backend(
    "cross_entropy",
    "reference",
    refuse=serves_any,
    forward=token_loss_reference,
    backward=token_loss_backward_reference,
)

# ---- registration and autograd ---------------------------------------------------------------------------------------


# The schemas below name the options between the tensors and the backend, in the order of LossOptions.


def _cross_entropy(logits: Tensor, labels: Tensor, *arguments: Any) -> TokenLoss:
    *options, want_stats, backend = arguments
    return _token_loss(logits, labels.long(), LossOptions(*options), want_stats, backend)


def _token_loss(logits: Tensor, labels: Tensor, options: LossOptions, want_stats: bool, backend: str) -> TokenLoss:
    if backend != "cpu":  # which looks at them itself
        check_label_values(labels, logits.shape[1], options.ignore_index)
    return implementation("cross_entropy", backend, "forward")(logits, labels, options, want_stats)


def _cross_entropy_fake(logits: Tensor, labels: Tensor, *arguments: Any) -> TokenLoss:
    return empty_token_loss(logits, logits.shape[0], want_stats=arguments[-2])


def _sum(logits: Tensor, labels: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    options, (mean, want_stats, backend) = LossOptions(*arguments[:4]), arguments[4:]
    labels = labels.long()
    if backend == "cpu":
        return compiled_sum(unit_stride(logits), labels, options, mean, want_stats)
    losses = _token_loss(logits, labels, options, want_stats, backend)
    return *sum_losses(losses.loss, labels, options.ignore_index, mean, backend), *losses[1:]


def _sum_fake(logits: Tensor, labels: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    mean, want_stats, _ = arguments[-3:]
    loss, *rest = empty_token_loss(logits, logits.shape[0], want_stats)
    return *empty_sum(loss, mean), *rest


def _cross_entropy_bwd(dloss: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, *arguments: Any) -> Tensor:
    *options, backend = arguments
    backward = implementation("cross_entropy", backend, "backward")
    return backward(dloss, logits, labels.long(), lse, LossOptions(*options))


def _cross_entropy_bwd_fake(dloss: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


_cross_entropy_op = define(
    "cross_entropy(Tensor logits, Tensor labels, int ignore_index, float label_smoothing, float z_loss, float softcap,"
    " bool want_stats, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _cross_entropy,
    _cross_entropy_fake,
)
_cross_entropy_sum_op = define(
    "cross_entropy_sum(Tensor logits, Tensor labels, int ignore_index, float label_smoothing, float z_loss,"
    " float softcap, bool mean, bool want_stats, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _sum,
    _sum_fake,
)
_cross_entropy_bwd_op = define(
    "cross_entropy_bwd(Tensor dloss, Tensor logits, Tensor labels, Tensor lse, int ignore_index,"
    " float label_smoothing, float z_loss, float softcap, str backend) -> Tensor",
    _cross_entropy_bwd,
    _cross_entropy_bwd_fake,
)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, labels, *ctx.options, _, ctx.backend = inputs
    ctx.save_for_backward(logits, labels, output[1])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros for each of those


def _backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple:
    if dloss is None:
        return (None,) * 8
    logits, labels, lse = ctx.saved_tensors[:3]
    dlogits = _cross_entropy_bwd_op(dloss, logits, labels, lse, *ctx.options, ctx.backend)
    return dlogits, None, None, None, None, None, None, None


def _save_sum(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, labels, *ctx.options, ctx.mean, _, ctx.backend = inputs
    _, items, lse, *_ = output
    ctx.save_for_backward(logits, labels, lse, items)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward_sum(ctx: Any, dtotal: Tensor | None, *_: Any) -> tuple:
    if dtotal is None:
        return (None,) * 9
    logits, *_, items = ctx.saved_tensors
    dloss = dtotal / items if ctx.mean else dtotal
    return *_backward(ctx, dloss.expand(logits.shape[0])), None


differentiable("cross_entropy", _backward, _save)
differentiable("cross_entropy_sum", _backward_sum, _save_sum)
once_differentiable("cross_entropy_bwd")

# ---- public ----------------------------------------------------------------------------------------------------------


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    weights: Tensor | None = None,
    num_items: Tensor | float | int | None = None,
    reduction: str = "mean",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, LossStats]:
    """Cross-entropy of ``labels`` under ``softmax(logits)``.

    Per token, with x the logits after softcap: ``w * [(1-e)(lse - x_y) + e(lse - mean_v x) + z * lse^2]``.

    Args:
        logits: ``[T, V]``.
        labels: ``[T]`` int64 or int32, the target of each row (already shifted); `ignore_index` where there is none.
        ignore_index: label of rows that do not train.
        label_smoothing: e, 0 to 1.
        z_loss: z, factor of the squared log-sum-exp.
        softcap: c, logits become ``c * tanh(logits / c)``; None for none.
        weights: ``[T]``, a factor for each token's loss; gradients flow into it when it wants them.
        num_items: what ``mean`` divides by (tokens trained in the whole step, across micro-batches and processes);
            a tensor stays on its device. Default: the sum of the weights of the trained tokens here.
        reduction: ``"mean"`` (0 when nothing is trained), ``"sum"`` or ``"none"``.
        return_stats: also return `LossStats`.

    Returns:
        The loss in float32 (float64 for float64 logits), a scalar, or ``[T]`` for ``"none"``; with `return_stats` a
        pair of it and `LossStats`.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: a shape, device or option does not fit; on the CPU also a label outside the vocabulary.
    """
    check_float("logits", logits)
    device, shape = logits.device, logits.shape
    if len(shape) != 2 or shape[1] == 0:
        check_dims("logits", logits, "[T, V]")
        raise ValueError(f"logits: got shape {list(shape)}; takes [T, V] with V > 0")
    check_labels(labels, weights, shape[0], device)
    options = loss_options(ignore_index, label_smoothing, z_loss, softcap, reduction, num_items)
    backend = choose("cross_entropy", device, logits.dtype, logits.numel(), wants_grad(logits))
    if reduction == "none" or weights is not None:
        loss, *stats = _cross_entropy_op(logits, labels, *options, return_stats, backend)
        if weights is not None:
            # where: 0 * weight would be NaN for an infinite weight of a token that does not train
            loss = torch.where(labels != ignore_index, loss * weights.to(loss.dtype), 0.0)
        if reduction != "none":
            loss = loss.sum()
        if reduction == "mean":
            items = trained_weight(labels, weights, ignore_index, loss.dtype) if num_items is None else None
            loss = divide_by_items(loss, num_items, items)
    else:
        mean = reduction == "mean" and num_items is None
        loss, _, *stats = _cross_entropy_sum_op(logits, labels, *options, mean, return_stats, backend)
        if num_items is not None:
            loss = divide_by_items(loss, num_items, None)
    return (loss, LossStats(*stats)) if return_stats else loss
