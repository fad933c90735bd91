"""Cross-entropy of a linear layer's output, without ever holding the logits ``[T, V]``.

    logits = hidden @ weight.T + bias        loss as in `lemur_fast.ops._loss`

Rows that do not train are dropped before the projection; the rest go through it in chunks. Two operators:

* ``linear_cross_entropy_sum`` computes dhidden, dweight and dbias of the weighted sum of losses in the forward, while a
  chunk's logits are at hand. The backward only multiplies them by the incoming scalar. Used for ``mean`` and ``sum``.
* ``linear_cross_entropy`` yields the loss of every token, and its backward projects each chunk once more. Used for
  ``none``, where every token has an incoming gradient of its own, and for weights that want a gradient.

dweight is summed in float32 over the chunks and reaches the weight's dtype once, at the end.

Source of the idea: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024, arXiv 2411.09009.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lemur_fast.dispatch import choose, implementation, register_backend, serves_any, serves_cpu
from lemur_fast.ops._checks import (
    check_count,
    check_device,
    check_dims,
    check_float,
    check_integer,
    check_shape,
    compute_dtype,
    to_autocast_dtype,
)
from lemur_fast.ops._loss import (
    LossOptions,
    LossStats,
    TokenLoss,
    check_label_values,
    check_labels,
    divide_by_items,
    empty_token_loss,
    loss_options,
    rows_per_chunk,
    token_loss_backward_reference,
    token_loss_reference,
    trained_rows_loss,
    trained_weight,
)
from lemur_fast.ops._registration import define, differentiable, once_differentiable


class Gradients(NamedTuple):
    """dhidden ``[T, H]`` in the dtype of hidden, dweight ``[V, H]`` and dbias ``[V]`` in float32; empty if unwanted."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor


class Wanted(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool


def _empty_gradients(hidden: Tensor, weight: Tensor, wanted: Wanted) -> Gradients:
    wide = compute_dtype(hidden.dtype)
    return Gradients(
        hidden.new_empty(hidden.shape if wanted.hidden else 0),
        hidden.new_empty(weight.shape if wanted.weight else 0, dtype=wide),
        hidden.new_empty(weight.shape[0] if wanted.bias else 0, dtype=wide),
    )


# ---- reference -------------------------------------------------------------------------------------------------------
# run: (hidden, weight, bias, labels, options, want_stats, dloss or None, wanted, chunk_tokens)
#      -> (TokenLoss, Gradients)
# The gradients are those of (dloss * loss).sum(); dloss None stands for ones.


def _reference_run(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    options: LossOptions,
    want_stats: bool,
    dloss: Tensor | None,
    wanted: Wanted,
    chunk_tokens: int | None,
) -> tuple[TokenLoss, Gradients]:
    wide = compute_dtype(hidden.dtype)
    hidden_wide, weight_wide = hidden.to(wide), weight.to(hidden.dtype).to(wide)
    logits = hidden_wide @ weight_wide.T
    if bias is not None:
        logits = logits + bias.to(hidden.dtype).to(wide)
    losses = token_loss_reference(logits, labels, options, want_stats)
    gradients = _empty_gradients(hidden, weight, wanted)
    if any(wanted):
        dloss = torch.ones_like(losses.loss) if dloss is None else dloss
        dlogits = token_loss_backward_reference(dloss, logits, labels, losses.lse, options)
        gradients = Gradients(
            (dlogits @ weight_wide).to(hidden.dtype) if wanted.hidden else gradients.hidden,
            dlogits.T @ hidden_wide if wanted.weight else gradients.weight,
            dlogits.sum(0) if wanted.bias else gradients.bias,
        )
    return losses, gradients


# ---- CPU -------------------------------------------------------------------------------------------------------------


def _cpu_run(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    options: LossOptions,
    want_stats: bool,
    dloss: Tensor | None,
    wanted: Wanted,
    chunk_tokens: int | None,
) -> tuple[TokenLoss, Gradients]:
    tokens, vocab = hidden.shape[0], weight.shape[0]
    weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
    losses = empty_token_loss(hidden, tokens, want_stats)
    gradients = _empty_gradients(hidden, weight, wanted)
    for gradient in gradients:
        gradient.zero_()
    trained = (labels != options.ignore_index).nonzero()[:, 0]
    for rows in trained.split(chunk_tokens or rows_per_chunk(vocab)):
        hidden_rows = hidden[rows]
        logits = torch.nn.functional.linear(hidden_rows, weight, bias)
        chunk = trained_rows_loss(
            logits,
            labels[rows],
            options,
            want_stats,
            None if dloss is None else dloss[rows],
            grad_out=logits if any(wanted) else None,
        )
        for whole, part in zip(losses, chunk, strict=True):
            if whole.numel():
                whole[rows] = part
        if wanted.hidden:
            gradients.hidden[rows] = logits @ weight
        if wanted.weight:
            _add_product(gradients.weight, logits, hidden_rows)
        if wanted.bias:
            gradients.bias.add_(logits.sum(0, dtype=gradients.bias.dtype))
    return losses, gradients


def _add_product(total: Tensor, dlogits: Tensor, hidden: Tensor) -> None:
    """Total += dlogits.T @ hidden, in the dtype of total (CPU products cannot widen their output)."""
    if total.dtype == hidden.dtype:
        total.addmm_(dlogits.T, hidden)
    else:
        total.add_(dlogits.T @ hidden)


register_backend("linear_cross_entropy", "cpu", refuse=serves_cpu, run=_cpu_run)
register_backend("linear_cross_entropy", "reference", refuse=serves_any, run=_reference_run)

# ---- registration and autograd ---------------------------------------------------------------------------------------


def _labels_of_rows(labels: Tensor, rows: Tensor | None, ignore_index: int) -> Tensor:
    """`labels` with every token that is not in `rows` ignored; entries of `rows` outside [0, T) are padding."""
    labels = labels.long()
    if rows is None:
        return labels
    tokens = labels.numel()
    rows = torch.where((rows >= 0) & (rows < tokens), rows, tokens).long()
    listed = torch.zeros(tokens + 1, dtype=torch.bool, device=labels.device).index_fill_(0, rows, True)
    return torch.where(listed[:tokens], labels, ignore_index)


def _tokens(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    rows: Tensor | None,
    chunk_tokens: int | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    want_stats: bool,
    backend: str,
) -> TokenLoss:
    check_label_values(labels, weight.shape[0], ignore_index)
    options = LossOptions(ignore_index, label_smoothing, z_loss, softcap)
    labels = _labels_of_rows(labels, rows, ignore_index)
    run = implementation("linear_cross_entropy", backend, "run")
    nothing = Wanted(False, False, False)
    return run(hidden, weight, bias, labels, options, want_stats, None, nothing, chunk_tokens)[0]


def _tokens_fake(hidden: Tensor, *args: Any) -> TokenLoss:
    return empty_token_loss(hidden, hidden.shape[0], args[-2])


def _tokens_bwd(
    dloss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    rows: Tensor | None,
    chunk_tokens: int | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
    backend: str,
) -> Gradients:
    options = LossOptions(ignore_index, label_smoothing, z_loss, softcap)
    labels = _labels_of_rows(labels, rows, ignore_index)
    run = implementation("linear_cross_entropy", backend, "run")
    wanted = Wanted(want_hidden, want_weight, want_bias)
    return run(hidden, weight, bias, labels, options, False, dloss, wanted, chunk_tokens)[1]


def _tokens_bwd_fake(dloss: Tensor, hidden: Tensor, weight: Tensor, *args: Any) -> Gradients:
    return _empty_gradients(hidden, weight, Wanted(*args[-4:-1]))


def _sum(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    rows: Tensor | None,
    weights: Tensor | None,
    chunk_tokens: int | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    want_stats: bool,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    check_label_values(labels, weight.shape[0], ignore_index)
    options = LossOptions(ignore_index, label_smoothing, z_loss, softcap)
    labels = _labels_of_rows(labels, rows, ignore_index)
    run = implementation("linear_cross_entropy", backend, "run")
    wanted = Wanted(want_hidden, want_weight, want_bias)
    losses, gradients = run(hidden, weight, bias, labels, options, want_stats, weights, wanted, chunk_tokens)
    loss = losses.loss
    if weights is not None:
        loss = torch.where(labels != ignore_index, loss * weights.to(loss.dtype), 0.0)
    return loss.sum(), *losses[1:], *gradients


def _sum_fake(hidden: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, ...]:
    want_stats, *wanted, _ = args[-5:]
    losses = empty_token_loss(hidden, hidden.shape[0], want_stats)
    return losses.loss.new_empty(()), *losses[1:], *_empty_gradients(hidden, weight, Wanted(*wanted))


def _sum_bwd(
    dtotal: Tensor, dhidden: Tensor, dweight: Tensor, dbias: Tensor, hidden: Tensor, weight: Tensor
) -> Gradients:
    # dtotal multiplies in float32: in the 16-bit range of dhidden a loss scale could overflow.
    return Gradients(
        (dhidden * dtotal).to(hidden.dtype), (dweight * dtotal).to(weight.dtype), (dbias * dtotal).to(weight.dtype)
    )


def _sum_bwd_fake(
    dtotal: Tensor, dhidden: Tensor, dweight: Tensor, dbias: Tensor, hidden: Tensor, weight: Tensor
) -> Gradients:
    return Gradients(
        dhidden.new_empty(dhidden.shape),
        dweight.new_empty(dweight.shape, dtype=weight.dtype),
        dbias.new_empty(dbias.shape, dtype=weight.dtype),
    )


_INPUTS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? rows, "
_OPTIONS = "int? chunk_tokens, int ignore_index, float label_smoothing, float z_loss, float softcap, "
_WANTED = "bool want_hidden, bool want_weight, bool want_bias, str backend"

define(
    f"linear_cross_entropy({_INPUTS}{_OPTIONS}bool want_stats, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _tokens,
    _tokens_fake,
)
define(
    f"linear_cross_entropy_bwd(Tensor dloss, {_INPUTS}{_OPTIONS}{_WANTED}) -> (Tensor, Tensor, Tensor)",
    _tokens_bwd,
    _tokens_bwd_fake,
)
define(
    f"linear_cross_entropy_sum({_INPUTS}Tensor? weights, {_OPTIONS}bool want_stats, {_WANTED})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _sum,
    _sum_fake,
)
# hidden and weight are inputs of the backward so that differentiating it again reaches them, and raises.
define(
    "linear_cross_entropy_sum_bwd(Tensor dtotal, Tensor dhidden, Tensor dweight, Tensor dbias, Tensor hidden,"
    " Tensor weight) -> (Tensor, Tensor, Tensor)",
    _sum_bwd,
    _sum_bwd_fake,
)


def _save_tokens(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden, weight, bias, labels, rows, *ctx.options, _, ctx.backend = inputs
    ctx.save_for_backward(hidden, weight, bias, labels, rows)
    ctx.mark_non_differentiable(*output[1:])


def _backward_tokens(ctx: Any, dloss: Tensor, *_: Any) -> tuple:
    hidden, weight, bias, labels, rows = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:3]
    dhidden, dweight, dbias = torch.ops.lemur_fast.linear_cross_entropy_bwd(
        dloss, hidden, weight, bias, labels, rows, *ctx.options, *wanted, ctx.backend
    )
    return (
        dhidden if wanted[0] else None,
        dweight.to(weight.dtype) if wanted[1] else None,
        dbias.to(bias.dtype) if wanted[2] else None,
        *(None,) * 9,
    )


def _save_sum(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden, weight, bias, *_ = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(hidden, weight, *output[-3:])
    ctx.mark_non_differentiable(*output[1:])


def _backward_sum(ctx: Any, dtotal: Tensor, *_: Any) -> tuple:
    hidden, weight, *unscaled = ctx.saved_tensors
    dhidden, dweight, dbias = torch.ops.lemur_fast.linear_cross_entropy_sum_bwd(dtotal, *unscaled, hidden, weight)
    wanted = ctx.needs_input_grad[:3]
    return (
        dhidden if wanted[0] else None,
        dweight if wanted[1] else None,
        dbias.to(ctx.bias_dtype) if wanted[2] else None,
        *(None,) * 13,
    )


differentiable("linear_cross_entropy", _backward_tokens, _save_tokens)
differentiable("linear_cross_entropy_sum", _backward_sum, _save_sum)
once_differentiable("linear_cross_entropy_bwd")
once_differentiable("linear_cross_entropy_sum_bwd")

# ---- public ----------------------------------------------------------------------------------------------------------


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    chunk_tokens: int | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    weights: Tensor | None = None,
    num_items: Tensor | float | int | None = None,
    reduction: str = "mean",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, LossStats]:
    """``cross_entropy(hidden @ weight.T + bias, labels)`` without holding the logits.

    The product is taken in the dtype of `hidden` (under autocast, in the autocast dtype); `weight` may be wider, and
    gets its gradient from a float32 sum either way.

    Args:
        hidden: ``[T, H]``.
        weight: ``[V, H]``, dtype of `hidden` or float32.
        labels: ``[T]`` int64 or int32, already shifted; `ignore_index` where a token does not train.
        bias: ``[V]``, dtype of `weight`.
        rows: ``[R]`` int32 or int64, the only tokens to project (`PackedBatch.trained_rows`): all others count as
            ignored. Entries outside [0, T) are padding. On a CPU the trained tokens are found without it.
        chunk_tokens: tokens projected at a time; chosen from V by default.
        ignore_index: as in `cross_entropy`, like all that follow.
        label_smoothing: see `cross_entropy`.
        z_loss: see `cross_entropy`.
        softcap: see `cross_entropy`.
        weights: see `cross_entropy`.
        num_items: see `cross_entropy`.
        reduction: see `cross_entropy`.
        return_stats: see `cross_entropy`.

    Returns:
        As `cross_entropy`.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: a shape, device or option does not fit; on the CPU also a label outside the vocabulary.
    """
    check_float("hidden", hidden)
    check_float("weight", weight)
    check_dims("hidden", hidden, "[T, H]")
    check_dims("weight", weight, "[V, H]")
    tokens, width = hidden.shape
    if weight.shape[0] == 0:
        raise ValueError(f"weight: got shape {list(weight.shape)}; takes [V, H] with V > 0")
    check_shape("weight", weight, (weight.shape[0], width), "the width of hidden")
    check_device("weight", weight, hidden.device)
    if bias is not None:
        check_float("bias", bias)
        check_shape("bias", bias, (weight.shape[0],), "one per row of weight")
        check_device("bias", bias, hidden.device)
        if bias.dtype != weight.dtype:
            raise ValueError(f"bias: got dtype {bias.dtype}; takes {weight.dtype}, the dtype of weight")
    check_labels(labels, weights, tokens, hidden.device)
    if rows is not None:
        check_integer("rows", rows, (torch.int32, torch.int64))
        check_dims("rows", rows, "[R]")
        check_device("rows", rows, hidden.device)
    if chunk_tokens is not None:
        check_count("chunk_tokens", chunk_tokens)
    options = loss_options(ignore_index, label_smoothing, z_loss, softcap, reduction, num_items)
    (hidden,) = to_autocast_dtype(hidden)
    if weight.dtype not in (hidden.dtype, torch.float32):
        raise ValueError(f"weight: got dtype {weight.dtype}; takes {hidden.dtype}, the dtype of hidden, or float32")
    backend = choose("linear_cross_entropy", hidden.device, hidden.dtype)

    wants_grad = torch.is_grad_enabled()
    wanted = Wanted(
        wants_grad and hidden.requires_grad,
        wants_grad and weight.requires_grad,
        wants_grad and bias is not None and bias.requires_grad,
    )
    weights_want_grad = wants_grad and weights is not None and weights.requires_grad
    if reduction == "none" or weights_want_grad:
        loss, *stats = torch.ops.lemur_fast.linear_cross_entropy(
            hidden, weight, bias, labels, rows, chunk_tokens, *options, return_stats, backend
        )
        if weights is not None:
            loss = torch.where(labels != ignore_index, loss * weights.to(loss.dtype), 0.0)
        if reduction != "none":
            loss = loss.sum()
    else:
        loss, *stats = torch.ops.lemur_fast.linear_cross_entropy_sum(
            hidden, weight, bias, labels, rows, weights, chunk_tokens, *options, return_stats, *wanted, backend
        )
        stats = stats[:4]
    if reduction == "mean":
        items = None
        if num_items is None:
            counted = labels if rows is None else _labels_of_rows(labels, rows, ignore_index)
            items = trained_weight(counted, weights, ignore_index, compute_dtype(hidden.dtype))
        loss = divide_by_items(loss, num_items, items)
    return (loss, LossStats(*stats)) if return_stats else loss
