"""Cross-entropy of a linear layer's output, without ever holding the logits ``[T, V]``.

    logits = hidden @ weight.T + bias        loss as in `lemur_fast.ops._loss`

Rows that do not train are dropped before the projection; the rest go through it in chunks. Two operators:

* ``linear_cross_entropy_sum`` computes dhidden, dweight and dbias of the weighted sum of losses in the forward, while a
  chunk's logits are at hand. The backward only multiplies them by the incoming scalar. Used for ``mean`` and ``sum``.
* ``linear_cross_entropy`` yields the loss of every token, and its backward projects each chunk once more. Used for
  ``none``, where every token has an incoming gradient of its own, and for weights that want a gradient.

dweight is summed in float32 over the chunks and reaches the weight's dtype once, at the end. Where a CPU takes all
tokens in one chunk, and products in the weight's dtype, there is nothing to sum: it has that dtype from the start.

Source of the idea: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024, arXiv 2411.09009.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from lemur_fast import _compiled, _triton
from lemur_fast.dispatch import choose, implementation, register_backend, serves_any
from lemur_fast.ops import _products
from lemur_fast.ops._checks import (
    check_count,
    check_device,
    check_dims,
    check_floats,
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
    compiled_sum,
    compiled_token_loss,
    divide_by_items,
    divisor,
    empty_sum,
    empty_token_loss,
    loss_options,
    only_rows,
    sum_losses,
    token_loss_backward_reference,
    token_loss_reference,
    trained_weight,
    triton_token_loss,
)
from lemur_fast.ops._registration import define, differentiable, once_differentiable

T = TypeVar("T")


class Layer(NamedTuple):
    """What is projected: hidden ``[T, H]``, weight ``[V, H]``, bias ``[V]`` or None."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    def in_dtype_of_hidden(self) -> Layer:
        """The product is taken in the dtype of hidden."""
        dtype = self.hidden.dtype
        if self.weight.dtype == dtype:  # which is the bias's, too
            return self
        return Layer(self.hidden, self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))


class Gradients(NamedTuple):
    """dhidden ``[T, H]`` in the dtype of hidden, dweight ``[V, H]`` as wanted, dbias ``[V]`` in float32; empty if
    unwanted.

    In bfloat16 with AMX dweight lies in memory as ``[H, V]``: its products take half as long when the short operand is
    turned.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor


class Wanted(NamedTuple):
    """Which gradients are wanted; of the weight's, in which dtype."""

    hidden: bool
    weight: torch.dtype | None
    bias: bool


def _empty_gradients(layer: Layer, wanted: Wanted) -> Gradients:
    hidden, weight, _ = layer
    wide = compute_dtype(hidden.dtype)
    if wanted.weight not in (None, wide, hidden.dtype):  # the kernels take memory as it is called
        raise TypeError(f"want_weight: got {wanted.weight}; takes {wide}, {hidden.dtype}, the dtype of hidden, or None")
    if wanted.weight is None:
        dweight = hidden.new_empty(0, 0, dtype=wide)
    elif hidden.device.type == "cpu" and hidden.dtype == torch.bfloat16 and _products.has_amx():
        dweight = hidden.new_empty(weight.T.shape, dtype=wanted.weight).T
    else:
        dweight = hidden.new_empty(weight.shape, dtype=wanted.weight)
    return Gradients(
        hidden.new_empty(hidden.shape if wanted.hidden else 0),
        dweight,
        hidden.new_empty(weight.shape[0] if wanted.bias else 0, dtype=wide),
    )


# ---- reference -------------------------------------------------------------------------------------------------------
# run: (layer, labels, rows or None, options, want_stats, dloss or None, wanted, chunk_tokens) -> (TokenLoss, Gradients)
# labels are ignored wherever rows, which only say where to look, do not have them. The gradients are those of
# (dloss * loss).sum(); dloss None stands for ones.


def _reference_run(
    layer: Layer,
    labels: Tensor,
    rows: Tensor | None,
    options: LossOptions,
    want_stats: bool,
    dloss: Tensor | None,
    wanted: Wanted,
    chunk_tokens: int | None,
) -> tuple[TokenLoss, Gradients]:
    wide = compute_dtype(layer.hidden.dtype)
    _, weight, bias = layer.in_dtype_of_hidden()
    hidden, weight = layer.hidden.to(wide), weight.to(wide)
    bias = None if bias is None else bias.to(wide)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    losses = token_loss_reference(logits, labels, options, want_stats)
    gradients = _empty_gradients(layer, wanted)
    if any(wanted):
        dloss = torch.ones_like(losses.loss) if dloss is None else dloss
        dlogits = token_loss_backward_reference(dloss, logits, labels, losses.lse, options)
        gradients = Gradients(
            (dlogits @ weight).to(layer.hidden.dtype) if wanted.hidden else gradients.hidden,
            gradients.weight.copy_(dlogits.T @ hidden) if wanted.weight else gradients.weight,
            dlogits.sum(0) if wanted.bias else gradients.bias,
        )
    return losses, gradients


def _reference_scale(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return (x * factor).to(dtype).contiguous()


# ---- CPU -------------------------------------------------------------------------------------------------------------

_CHUNK_BYTES = 96 * 2**20
"""Of the logits held at a time. Few chunks, because each adds its dweight to the whole of the sum; and with AMX long
batches of 16 bits stay clear of 350 to 1,300 rows, for which oneDNN's product with a weight of 32,000 x 384 to 768
takes twice as long as it need."""

_BFLOAT16_CHUNK_BYTES = 32 * 2**20
"""The same in bfloat16 without AMX, where this costs no time: 500 rows of 32,000."""

_PRODUCT_ROWS = 8192
"""Rows of dweight computed at a time, before they are added to the sum."""


def _chunks(rows: Tensor, most: int) -> tuple[Tensor, ...]:
    """`rows` in chunks of nearly equal size, none longer than `most`."""
    count = -(-rows.numel() // most)
    return rows.tensor_split(count) if count else ()


def _cpu_run(
    layer: Layer,
    labels: Tensor,
    rows: Tensor | None,
    options: LossOptions,
    want_stats: bool,
    dloss: Tensor | None,
    wanted: Wanted,
    chunk_tokens: int | None,
) -> tuple[TokenLoss, Gradients]:
    layer = layer.in_dtype_of_hidden()
    hidden, weight, bias = layer
    (tokens, _), (vocab, _) = hidden.shape, weight.shape
    labels = labels.contiguous()
    most = _most_tokens(layer, chunk_tokens)
    gradients = _empty_gradients(layer, wanted)
    count = _count_trained(labels, vocab, options)
    if 0 < count == tokens <= most:
        factors = None if dloss is None else dloss.float()
        return _cpu_run_at_once(
            layer,
            wanted,
            gradients,
            lambda logits, dlogits: compiled_token_loss(logits, labels, options, want_stats, factors, dlogits),
        ), gradients
    trained = torch.empty_like(labels)
    _compiled.C.cpu.trained_rows(labels.data_ptr(), tokens, vocab, options.ignore_index, trained.data_ptr())
    losses = empty_token_loss(hidden, tokens, want_stats)
    if count < tokens:
        gradients.hidden.zero_()
    if not count:
        gradients.weight.zero_()
        gradients.bias.zero_()
        return losses, gradients
    chunks = _chunks(trained[:count], most)
    wide = compute_dtype(hidden.dtype)
    if len(chunks) > 1 and wanted.weight not in (None, wide):  # a graph from a CPU that takes more in a chunk
        wider = wanted._replace(weight=wide)
        losses, gradients = _cpu_run(layer, labels, rows, options, want_stats, dloss, wider, chunk_tokens)
        return losses, gradients._replace(weight=gradients.weight.to(wanted.weight))
    # Fresh memory is dear (the system clears it page by page), so all chunks share theirs.
    memory = hidden.new_empty(chunks[0].numel(), vocab)
    widened = _products.serves(hidden[: chunks[0].numel()], weight)
    product = _memory_of_product(gradients.weight, hidden) if wanted.weight and not widened else None
    for number, chunk_rows in enumerate(chunks):
        logits = memory[: chunk_rows.numel()]
        hidden_rows = hidden[chunk_rows]
        if widened:
            _products.project(hidden_rows, weight, bias, out=logits)
        elif bias is None:
            torch.mm(hidden_rows, weight.T, out=logits)
        else:
            torch.addmm(bias, hidden_rows, weight.T, out=logits)
        chunk = compiled_token_loss(
            logits,
            labels[chunk_rows],
            options,
            want_stats,
            None if dloss is None else dloss[chunk_rows].float(),
            grad_out=logits if any(wanted) else None,
        )
        for whole, part in zip(losses, chunk, strict=True):
            if whole.numel():
                whole[chunk_rows] = part
        if widened:
            dhidden = torch.empty_like(hidden_rows)
            _products.gradients(
                [_products.Layer(logits, weight, gradients.weight if wanted.weight else None)],
                hidden_rows if wanted.weight else None,
                dhidden if wanted.hidden else None,
                add=number > 0,
            )
            if wanted.hidden:
                gradients.hidden[chunk_rows] = dhidden
        else:
            if wanted.hidden:
                gradients.hidden[chunk_rows] = logits @ weight
            if wanted.weight:
                _add_product(gradients.weight, logits, hidden_rows, product, first=number == 0)
        if wanted.bias:
            _add(gradients.bias[None], logits.sum(0, dtype=torch.float32)[None], first=number == 0)
    return losses, gradients


def _most_tokens(layer: Layer, chunk_tokens: int | None) -> int:
    small = layer.hidden.dtype == torch.bfloat16 and not _products.has_amx()
    nbytes = _BFLOAT16_CHUNK_BYTES if small else _CHUNK_BYTES
    return chunk_tokens or max(256, nbytes // (layer.weight.shape[0] * layer.hidden.element_size()))


def _dtype_of_dweight(hidden: Tensor, weight: Tensor, chunk_tokens: int | None, backend: str) -> torch.dtype:
    """That of a sum, or of a CPU's product where there is but one, which torch has rounded already."""
    wide = compute_dtype(hidden.dtype)
    if hidden.dtype == wide or backend != "cpu" or weight.dtype != hidden.dtype or _products.serves(hidden, weight):
        return wide
    at_once = hidden.shape[0] <= _most_tokens(Layer(hidden, weight, None), chunk_tokens)
    if torch.compiler.is_compiling() or not isinstance(at_once, bool):  # a trace for any number of tokens stays one
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        at_once = statically_known_true(at_once)
    return hidden.dtype if at_once else wide


def _count_trained(labels: Tensor, vocab: int, options: LossOptions) -> int:
    return _compiled.C.cpu.trained_rows(labels.data_ptr(), labels.shape[0], vocab, options.ignore_index, 0)


def _cpu_run_at_once(
    layer: Layer, wanted: Wanted, gradients: Gradients, loss: Callable[[Tensor, Tensor | None], T]
) -> T:
    """`_cpu_run` where all rows train and are one chunk: nothing is gathered, and nothing put back.

    `loss` takes the logits, and the memory for their gradient, which are they themselves, or None.
    """
    hidden, weight, bias = layer
    widened = _products.serves(hidden, weight)
    if widened:
        logits = hidden.new_empty(hidden.shape[0], weight.shape[0])
        _products.project(hidden, weight, bias, out=logits)
    else:
        logits = torch.nn.functional.linear(hidden, weight, bias)
    if not any(wanted):
        return loss(logits, None)
    result = loss(logits, logits)
    if widened:
        _products.gradients(
            [_products.Layer(logits, weight, gradients.weight if wanted.weight else None)],
            hidden if wanted.weight else None,
            gradients.hidden if wanted.hidden else None,
        )
    else:
        if wanted.hidden:
            torch.mm(logits, weight, out=gradients.hidden)
        if wanted.weight:
            product = _memory_of_product(gradients.weight, hidden)
            _add_product(gradients.weight, logits, hidden, product, first=True)
    if wanted.bias:
        _add(gradients.bias[None], logits.sum(0, dtype=torch.float32)[None], first=True)
    return result


def _cpu_sum_at_once(
    layer: Layer,
    labels: Tensor,
    options: LossOptions,
    mean: bool,
    want_stats: bool,
    wanted: Wanted,
    chunk_tokens: int | None,
) -> tuple[Tensor, ...] | None:
    """What `_sum` returns, in as few calls as can be; None where not all rows train, or are more than a chunk."""
    tokens, vocab, labels = labels.shape[0], layer.weight.shape[0], labels.contiguous()
    if not 0 < _count_trained(labels, vocab, options) == tokens <= _most_tokens(layer, chunk_tokens):
        return None
    layer = layer.in_dtype_of_hidden()
    gradients = _empty_gradients(layer, wanted)
    losses = _cpu_run_at_once(
        layer,
        wanted,
        gradients,
        lambda logits, dlogits: compiled_sum(logits, labels, options, mean, want_stats, dlogits),
    )
    return *losses, *gradients


def _memory_of_product(dweight: Tensor, hidden: Tensor) -> Tensor | None:
    """For _add_product, where dweight must be widened."""
    if dweight.dtype == hidden.dtype:
        return None
    return hidden.new_empty(dweight.shape[1] * min(dweight.shape[0], _PRODUCT_ROWS))


def _add_product(total: Tensor, dlogits: Tensor, hidden: Tensor, memory: Tensor | None, first: bool) -> None:
    """Sets total to ``dlogits.T @ hidden``, or adds it."""
    turned = not total.is_contiguous()
    left, right = (hidden.T.contiguous(), dlogits) if turned else (dlogits.T, hidden)
    total = total.T if turned else total
    if memory is None:
        if first:
            torch.mm(left, right, out=total)
        else:
            total.addmm_(left, right)
        return
    long = 1 if turned else 0
    for start in range(0, total.shape[long], _PRODUCT_ROWS):
        part = total.narrow(long, start, min(_PRODUCT_ROWS, total.shape[long] - start))
        if turned:
            factors = left, right[:, start : start + _PRODUCT_ROWS]
        else:
            factors = left[start : start + _PRODUCT_ROWS], right
        _add(part, torch.mm(*factors, out=memory[: part.numel()].view(part.shape)), first)


def _add(total: Tensor, x: Tensor, first: bool) -> None:
    """Sets total to x, or adds x, widened on the way: CPU products cannot widen their output."""
    if not x.numel():
        return
    _compiled.C.cpu.accumulate(
        total=total.data_ptr(),
        total_stride=total.stride(0),
        x=x.data_ptr(),
        rows=x.shape[0],
        cols=x.shape[1],
        add=not first,
        dtype=_compiled.dtype_code(x.dtype),
    )


def _cpu_scale(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    y = x.new_empty(x.shape, dtype=dtype)
    if x.numel():
        _compiled.C.cpu.scale(
            x=x.data_ptr(),
            transposed=not x.is_contiguous(),
            y=y.data_ptr(),
            rows=x.shape[0],
            cols=x.numel() // x.shape[0],
            factor=float(factor),
            x_dtype=_compiled.dtype_code(x.dtype),
            y_dtype=_compiled.dtype_code(dtype),
        )
    return y


# ---- GPU: products by cuBLAS, the rest of a chunk in one kernel ------------------------------------------------------

_GPU_CHUNK_LOGITS = 2**27
"""Logits held at a time: 256 MiB in 16 bits, 4,096 rows of 32,000. The products of chunks much smaller than that do not
fill a GPU."""


def _gpu_run(
    token_loss: Callable[..., TokenLoss],
    layer: Layer,
    labels: Tensor,
    rows: Tensor | None,
    options: LossOptions,
    want_stats: bool,
    dloss: Tensor | None,
    wanted: Wanted,
    chunk_tokens: int | None,
) -> tuple[TokenLoss, Gradients]:
    # Nothing here looks at values: with `rows` their number is known, without it every row is projected.
    layer = layer.in_dtype_of_hidden()
    hidden, weight, bias = layer
    tokens, vocab = hidden.shape[0], weight.shape[0]
    gradients = _empty_gradients(layer, wanted)
    if rows is not None:
        return _gpu_run_of_rows(token_loss, layer, labels, rows, options, want_stats, dloss, wanted, chunk_tokens)
    losses = empty_token_loss(hidden, tokens, want_stats)
    most = chunk_tokens or max(1024, _GPU_CHUNK_LOGITS // vocab)
    count = max(1, -(-tokens // most))
    memory = hidden.new_empty(-(-tokens // count), vocab)
    bounds = [number * tokens // count for number in range(count + 1)]
    for number, (start, end) in enumerate(itertools.pairwise(bounds)):
        chunk = slice(start, end)
        logits, hidden_rows = memory[: end - start], hidden[chunk]
        if bias is None:
            torch.mm(hidden_rows, weight.T, out=logits)
        else:
            torch.addmm(bias, hidden_rows, weight.T, out=logits)
        dlogits = logits if any(wanted) else None
        chunk_dloss = None if dloss is None else dloss[chunk].float()
        parts = token_loss(logits, labels[chunk], options, want_stats, chunk_dloss, dlogits)
        for whole, values in zip(losses, parts, strict=True):
            if whole.numel():
                whole[chunk] = values
        if wanted.hidden:
            torch.mm(logits, weight, out=gradients.hidden[chunk])
        if wanted.weight:
            _add_wide_product(gradients.weight, logits.T, hidden_rows, first=number == 0)
        if wanted.bias:
            total = logits.sum(0, dtype=torch.float32)
            gradients.bias.copy_(total if number == 0 else gradients.bias + total)
    return losses, gradients


def _gpu_run_of_rows(
    token_loss: Callable[..., TokenLoss],
    layer: Layer,
    labels: Tensor,
    rows: Tensor,
    options: LossOptions,
    want_stats: bool,
    dloss: Tensor | None,
    wanted: Wanted,
    chunk_tokens: int | None,
) -> tuple[TokenLoss, Gradients]:
    """`_gpu_run` on `rows` alone, with its results put where they belong: those of padding in a row too many."""
    run = functools.partial(_gpu_run, token_loss)
    hidden, weight, bias = layer
    tokens = hidden.shape[0]
    if tokens == 0:  # all rows are padding
        return run(layer, labels, None, options, want_stats, dloss, wanted, chunk_tokens)
    inside = (rows >= 0) & (rows < tokens)
    source = torch.where(inside, rows, 0).long()
    target = torch.where(inside, rows, tokens).long()
    # A row that is named twice counts once: the last place that names it stands.
    place = torch.arange(rows.shape[0], device=rows.device)
    last = place.new_full((tokens + 1,), -1).scatter_reduce_(0, target, place, "amax")
    inside = inside & (last[target] == place)
    target = torch.where(inside, target, tokens)
    chosen = torch.where(inside, labels[source], options.ignore_index)
    chosen_dloss = None if dloss is None else dloss[source]
    losses, gradients = run(
        Layer(hidden[source], weight, bias), chosen, None, options, want_stats, chosen_dloss, wanted, chunk_tokens
    )

    def spread(values: Tensor, count: int) -> Tensor:
        whole = values.new_zeros((count + 1, *values.shape[1:]))
        return whole.index_copy_(0, target, values)[:count].clone()

    whole_losses = TokenLoss(*(spread(values, tokens) if values.numel() else values for values in losses))
    return whole_losses, gradients._replace(hidden=spread(gradients.hidden, tokens) if wanted.hidden else hidden[:0, 0])


def _add_wide_product(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """Sets the float32 total to left @ right, or adds it; on a GPU without a temporary of its size, in 16 bits."""
    if not total.is_cuda or left.dtype == torch.float32:  # the CPU, where kernels are interpreted, cannot widen
        product = left.float() @ right.float()
        total.copy_(product if first else total + product)
    elif first:
        torch.mm(left, right, out_dtype=torch.float32, out=total)
    else:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)


register_backend("linear_cross_entropy", "cpu", refuse=_compiled.refuses_cpu, run=_cpu_run, scale=_cpu_scale)
register_backend(
    "linear_cross_entropy",
    "cuda",
    refuse=_compiled.refuses_cuda,
    run=functools.partial(_gpu_run, compiled_token_loss),
    scale=_reference_scale,
)
register_backend(
    "linear_cross_entropy",
    "triton",
    refuse=_triton.refuses,
    run=functools.partial(_gpu_run, triton_token_loss),
    scale=_reference_scale,
)
register_backend("linear_cross_entropy", "reference", refuse=serves_any, run=_reference_run, scale=_reference_scale)

# ---- registration and autograd ---------------------------------------------------------------------------------------
# In the schemas below come the tensors, the options in the order of LossOptions, what is wanted, and the backend.


def _tokens(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    rows: Tensor | None,
    chunk_tokens: int | None,
    *arguments: Any,
) -> TokenLoss:
    *options, want_stats, backend = arguments
    checked = LossOptions(*options)
    check_label_values(labels, weight.shape[0], checked.ignore_index)
    labels = only_rows(labels, rows, checked.ignore_index)
    run = implementation("linear_cross_entropy", backend, "run")
    nothing = Wanted(False, None, False)
    return run(Layer(hidden, weight, bias), labels, rows, checked, want_stats, None, nothing, chunk_tokens)[0]


def _tokens_fake(hidden: Tensor, *arguments: Any) -> TokenLoss:
    return empty_token_loss(hidden, hidden.shape[0], arguments[-2])


def _tokens_bwd(
    dloss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    rows: Tensor | None,
    chunk_tokens: int | None,
    *arguments: Any,
) -> Gradients:
    options, wanted, backend = arguments[:-4], Wanted(*arguments[-4:-1]), arguments[-1]
    checked = LossOptions(*options)
    labels = only_rows(labels, rows, checked.ignore_index)
    run = implementation("linear_cross_entropy", backend, "run")
    return run(Layer(hidden, weight, bias), labels, rows, checked, False, dloss, wanted, chunk_tokens)[1]


def _tokens_bwd_fake(dloss: Tensor, hidden: Tensor, weight: Tensor, *arguments: Any) -> Gradients:
    return _empty_gradients(Layer(hidden, weight, None), Wanted(*arguments[-4:-1]))


def _sum(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    rows: Tensor | None,
    weights: Tensor | None,
    chunk_tokens: int | None,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    checked, mean, want_stats = LossOptions(*arguments[:4]), arguments[4], arguments[5]
    wanted, backend = Wanted(*arguments[6:9]), arguments[9]
    if backend != "cpu" or rows is not None:  # it looks at what it projects
        check_label_values(labels, weight.shape[0], checked.ignore_index)
    labels = only_rows(labels, rows, checked.ignore_index)
    layer = Layer(hidden, weight, bias)
    if backend == "cpu" and weights is None:
        at_once = _cpu_sum_at_once(layer, labels, checked, mean, want_stats, wanted, chunk_tokens)
        if at_once is not None:
            return at_once
    run = implementation("linear_cross_entropy", backend, "run")
    losses, gradients = run(layer, labels, rows, checked, want_stats, weights, wanted, chunk_tokens)
    loss = losses.loss
    if weights is None:
        return *sum_losses(loss, labels, checked.ignore_index, mean, backend), *losses[1:], *gradients
    loss = torch.where(labels != checked.ignore_index, loss * weights.to(loss.dtype), 0.0)
    total, items = loss.sum(), loss.new_empty(0)
    if mean:
        items = divisor(total, trained_weight(labels, weights, checked.ignore_index, loss.dtype))
        total = total / items
    return total, items, *losses[1:], *gradients


def _sum_fake(hidden: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    mean, want_stats, *wanted, _ = arguments[-6:]
    loss, *rest = empty_token_loss(hidden, hidden.shape[0], want_stats)
    gradients = _empty_gradients(Layer(hidden, weight, None), Wanted(*wanted))
    return *empty_sum(loss, mean), *rest, *gradients


def _sum_bwd(
    dtotal: Tensor, dhidden: Tensor, dweight: Tensor, dbias: Tensor, hidden: Tensor, weight: Tensor, backend: str
) -> Gradients:
    # dtotal multiplies in float32: in the 16-bit range of dhidden a loss scale could overflow.
    scale = implementation("linear_cross_entropy", backend, "scale")
    return Gradients(
        scale(dhidden, dtotal, hidden.dtype), scale(dweight, dtotal, weight.dtype), scale(dbias, dtotal, weight.dtype)
    )


def _sum_bwd_fake(
    dtotal: Tensor, dhidden: Tensor, dweight: Tensor, dbias: Tensor, hidden: Tensor, weight: Tensor, backend: str
) -> Gradients:
    return Gradients(
        dhidden.new_empty(dhidden.shape),
        dweight.new_empty(dweight.shape, dtype=weight.dtype),
        dbias.new_empty(dbias.shape, dtype=weight.dtype),
    )


_INPUTS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? rows, "
_OPTIONS = "int? chunk_tokens, int ignore_index, float label_smoothing, float z_loss, float softcap, "
_WANTED = "bool want_hidden, ScalarType? want_weight, bool want_bias, str backend"

_linear_cross_entropy_op = define(
    f"linear_cross_entropy({_INPUTS}{_OPTIONS}bool want_stats, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _tokens,
    _tokens_fake,
)
_linear_cross_entropy_bwd_op = define(
    f"linear_cross_entropy_bwd(Tensor dloss, {_INPUTS}{_OPTIONS}{_WANTED}) -> (Tensor, Tensor, Tensor)",
    _tokens_bwd,
    _tokens_bwd_fake,
)
_linear_cross_entropy_sum_op = define(
    f"linear_cross_entropy_sum({_INPUTS}Tensor? weights, {_OPTIONS}bool mean, bool want_stats, {_WANTED})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _sum,
    _sum_fake,
)
# hidden and weight are inputs of the backward so that differentiating it again reaches them, and raises.
_linear_cross_entropy_sum_bwd_op = define(
    "linear_cross_entropy_sum_bwd(Tensor dtotal, Tensor dhidden, Tensor dweight, Tensor dbias, Tensor hidden,"
    " Tensor weight, str backend) -> (Tensor, Tensor, Tensor)",
    _sum_bwd,
    _sum_bwd_fake,
)


def _save_tokens(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden, weight, bias, labels, rows, *ctx.options, _, ctx.backend = inputs
    ctx.save_for_backward(hidden, weight, bias, labels, rows)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward_tokens(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple:
    if dloss is None:
        return (None,) * 12
    hidden, weight, bias, labels, rows = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:3]
    dtype_of_dweight = _dtype_of_dweight(hidden, weight, ctx.options[0], ctx.backend) if wanted[1] else None
    dhidden, dweight, dbias = _linear_cross_entropy_bwd_op(
        dloss, hidden, weight, bias, labels, rows, *ctx.options, wanted[0], dtype_of_dweight, wanted[2], ctx.backend
    )
    return (
        dhidden if wanted[0] else None,
        dweight.to(weight.dtype) if wanted[1] else None,
        dbias.to(bias.dtype) if wanted[2] else None,
        *(None,) * 9,
    )


def _save_sum(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden, weight, bias, *_ = inputs
    ctx.bias_dtype, ctx.mean, ctx.backend = None if bias is None else bias.dtype, inputs[-6], inputs[-1]
    ctx.save_for_backward(hidden, weight, output[1], *output[-3:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros of the size of dweight among them


def _backward_sum(ctx: Any, dtotal: Tensor | None, *_: Any) -> tuple:
    if dtotal is None:
        return (None,) * 17
    hidden, weight, items, *unscaled = ctx.saved_tensors
    factor = dtotal / items if ctx.mean else dtotal
    dhidden, dweight, dbias = _linear_cross_entropy_sum_bwd_op(factor, *unscaled, hidden, weight, ctx.backend)
    wanted = ctx.needs_input_grad[:3]
    return (
        dhidden if wanted[0] else None,
        dweight if wanted[1] else None,
        dbias.to(ctx.bias_dtype) if wanted[2] else None,
        *(None,) * 14,
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
    gets its gradient from a float32 sum then. One of the same dtype gets it from a float32 sum over the chunks, whose
    products torch rounds to that dtype where it multiplies as such.

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
    if bias is None:
        check_floats(("hidden", "weight"), hidden, weight)
    else:
        check_floats(("hidden", "weight", "bias"), hidden, weight, bias)
    device, shape, of_weight = hidden.device, hidden.shape, weight.shape
    if len(shape) != 2 or len(of_weight) != 2:
        check_dims("hidden", hidden, "[T, H]")
        check_dims("weight", weight, "[V, H]")
    (tokens, width), (vocab, depth) = shape, of_weight
    if vocab == 0:
        raise ValueError(f"weight: got shape {list(of_weight)}; takes [V, H] with V > 0")
    if depth != width:
        check_shape("weight", weight, (vocab, width), "the width of hidden")
    if bias is not None:
        check_shape("bias", bias, (vocab,), "one per row of weight")
        if bias.dtype != weight.dtype:
            raise ValueError(f"bias: got dtype {bias.dtype}; takes {weight.dtype}, the dtype of weight")
    check_labels(labels, weights, tokens, device)
    if rows is not None:
        check_integer("rows", rows, (torch.int32, torch.int64))
        check_dims("rows", rows, "[R]")
        check_device("rows", rows, device)
    if chunk_tokens is not None:
        check_count("chunk_tokens", chunk_tokens)
    options = loss_options(ignore_index, label_smoothing, z_loss, softcap, reduction, num_items)
    (hidden,) = to_autocast_dtype(hidden)
    dtype = hidden.dtype
    if weight.dtype not in (dtype, torch.float32):  # 16 bits of another kind: autocast casts them, too
        (weight,) = to_autocast_dtype(weight)
        bias = None if bias is None else to_autocast_dtype(bias)[0]
    if weight.dtype not in (dtype, torch.float32):
        raise ValueError(f"weight: got dtype {weight.dtype}; takes {dtype}, the dtype of hidden, or float32")
    wants_grad = torch.is_grad_enabled()
    wanted = (
        wants_grad and hidden.requires_grad,
        wants_grad and weight.requires_grad,
        wants_grad and bias is not None and bias.requires_grad,
    )
    backend = choose("linear_cross_entropy", device, dtype, tokens * width, True in wanted)
    weights_want_grad = wants_grad and weights is not None and weights.requires_grad
    if reduction == "none" or weights_want_grad:
        loss, *stats = _linear_cross_entropy_op(
            hidden, weight, bias, labels, rows, chunk_tokens, *options, return_stats, backend
        )
        if weights is not None:
            loss = torch.where(labels != ignore_index, loss * weights.to(loss.dtype), 0.0)
        if reduction != "none":
            loss = loss.sum()
        if reduction == "mean":
            counted = only_rows(labels, rows, ignore_index)
            items = trained_weight(counted, weights, ignore_index, loss.dtype) if num_items is None else None
            loss = divide_by_items(loss, num_items, items)
    else:
        mean = reduction == "mean" and num_items is None
        want_hidden, want_weight, want_bias = wanted
        dtype_of_dweight = _dtype_of_dweight(hidden, weight, chunk_tokens, backend) if want_weight else None
        loss, _, *stats = _linear_cross_entropy_sum_op(
            hidden,
            weight,
            bias,
            labels,
            rows,
            weights,
            chunk_tokens,
            *options,
            mean,
            return_stats,
            want_hidden,
            dtype_of_dweight,
            want_bias,
            backend,
        )
        if num_items is not None:
            loss = divide_by_items(loss, num_items, None)
    return (loss, LossStats(*stats[:4])) if return_stats else loss
