"""Products of linear layers, taken as this CPU is fastest at them.

    y = x @ weight.T + bias        dx = dy @ weight        dweight = dy.T @ x        dbias = sum over the rows of dy

torch multiplies bfloat16 as bfloat16 on every CPU. One with AMX is far faster at that. One that has only `vdpbf16ps`
takes twice as long as for float32, where a virtual machine hides the AMX of Intel's, and one without either many times
as long (`python -m benchmarks.products`). Here the operands are widened, products are torch's in float32, and a result
is rounded once. A thousand rows at a time are: few enough to stay in the caches, and enough for a product to run at its
full rate.

With AMX, dweight is what takes longer than it need, by up to two thirds: dy lies across what is summed. Here the
smaller operand of a large one is transposed first. Layers of one input (`linears`) do that once, and sum the input's
gradient inside the products.
"""

from __future__ import annotations

import functools
import math
import platform
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lemur_fast import _compiled, dispatch
from lemur_fast.ops._registration import define, differentiable, once_differentiable

_ROWS = 1024
"""Rows of the long operand that are widened at a time."""

_FEWEST_ROWS = 64
"""Below, to widen the weight costs more than the product gains."""

_WEIGHT_ELEMENTS = 2**20
"""Elements of the weight that are widened at a time: 4 MiB."""


@functools.cache
def float32_is_faster() -> bool:
    """Whether this CPU multiplies float32 matrices faster than bfloat16 ones."""
    if _compiled.missing is not None or platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    features = _compiled.C.cpu.features()
    if "amx_bf16" in features:
        return False
    # Intel's chips with fp16 arithmetic were made for AMX: vdpbf16ps has half of the rate of an fma there. Those before
    # it, and AMD's, run it at the full rate.
    return "avx512_bf16" not in features or "avx512_fp16" in features


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether a product of ``x [..., K]`` and ``weight [N, K]`` is taken here."""
    return (
        x.dtype == weight.dtype == torch.bfloat16
        and x.device.type == weight.device.type == "cpu"
        and _has_rows(x)
        and weight.dim() == 2
        and weight.shape[0] > 0
        and weight.shape[1] > 0
        and dispatch.allows("cpu")
        and _float32_is_faster()
    )


def _has_rows(x: Tensor, fewest: int = _FEWEST_ROWS) -> bool:
    enough = math.prod(x.shape[:-1]) >= fewest
    if torch.compiler.is_compiling():  # a number of rows that only the data tell is left to torch
        from torch.fx.experimental.symbolic_shapes import guard_or_false

        return guard_or_false(enough)
    return enough


@torch.compiler.assume_constant_result  # the CPU does not change
def _float32_is_faster() -> bool:
    return float32_is_faster()


def _parts(count: int, most: int) -> Iterator[slice]:
    for start in range(0, count, most):
        yield slice(start, min(start + most, count))


def _weight_parts(outputs: int, inputs: int) -> list[slice]:
    return list(_parts(outputs, max(1, _WEIGHT_ELEMENTS // inputs)))


class _Wide:
    """Memory for what is widened, or waits to be rounded. It stays with its thread, by name, up to 16 MiB.

    Fresh memory is dear, and pieces that come and go between the activations of a step leave holes of their size.
    """

    _kept = threading.local()
    MOST_KEPT = 2**22  # elements

    def __init__(self, name: str, elements: int) -> None:
        kept = vars(self._kept)
        if elements > self.MOST_KEPT:
            self._memory = torch.empty(elements, dtype=torch.float32)
            return
        if name not in kept or kept[name].numel() < elements:
            with torch.inference_mode(False):  # it outlives that mode, and its tensors may not be written outside of it
                kept[name] = torch.empty(elements, dtype=torch.float32)
        self._memory = kept[name]

    def like(self, x: Tensor) -> Tensor:
        """Of the shape of `x`, with anything in it."""
        return self._memory[: x.numel()].view(x.shape)

    def of(self, x: Tensor) -> Tensor:
        """`x`, widened."""
        return self.like(x).copy_(x)


def _rows_at_once(rows: int, widest: int) -> int:
    """As many as keep their memory, up to `_ROWS`."""
    return min(rows, _ROWS, max(_FEWEST_ROWS, _Wide.MOST_KEPT // widest))


def project(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Sets ``out [T, N]`` to ``x [T, K] @ weight [N, K].T + bias [N]``, all of bfloat16; no size is 0."""
    (rows, inputs), parts = x.shape, _weight_parts(*weight.shape)
    widest = parts[0].stop
    most = _rows_at_once(rows, max(inputs, widest))
    wide_x, wide_y = _Wide("x", most * inputs), _Wide("y", most * widest)
    wide_w = _Wide("weight", widest * inputs)
    for columns in parts:
        wide_weight = wide_w.of(weight[columns]).T
        wide_bias = None if bias is None else bias[columns].float()
        for part in _parts(rows, most):
            left, y = wide_x.of(x[part]), wide_y.like(out[part, columns])
            if wide_bias is None:
                torch.mm(left, wide_weight, out=y)
            else:
                torch.addmm(wide_bias, left, wide_weight, out=y)
            out[part, columns].copy_(y)


def gradients(
    dy: Tensor,
    of_x: tuple[Tensor, Tensor] | None = None,
    of_weight: tuple[Tensor, Tensor] | None = None,
    add: bool = False,
) -> None:
    """Sets ``dx = dy @ weight`` and ``dweight = dy.T @ x``, or one of them. No size is 0.

    Args:
        dy: ``[T, N]``, bfloat16.
        of_x: weight ``[N, K]`` and dx ``[T, K]``, both bfloat16.
        of_weight: x ``[T, K]``, bfloat16, and dweight ``[N, K]`` of any strides, bfloat16 or float32.
        add: add to dweight, which is float32 then.
    """
    given = of_x or of_weight
    if given is None:
        return
    (rows, outputs), inputs = dy.shape, given[0].shape[1]
    parts = _weight_parts(outputs, inputs)
    widest = parts[0].stop
    most = _rows_at_once(rows, max(inputs, widest))
    wide_dy, wide_x = _Wide("y", most * widest), _Wide("x", most * inputs)
    wide_weight, wide_dweight = _Wide("weight", widest * inputs), _Wide("dweight", widest * inputs)
    # Over several parts of the weight dx is a sum, which must not be rounded between them.
    total = dy.new_empty(rows, inputs, dtype=torch.float32) if of_x and len(parts) > 1 else None
    for columns in parts:
        if of_x:
            right = wide_weight.of(of_x[0][columns])
        if of_weight:
            dweight = of_weight[1][columns]
            sums = dweight if dweight.dtype == torch.float32 else wide_dweight.like(dweight)
        for part in _parts(rows, most):
            left = wide_dy.of(dy[part, columns])
            if total is not None:
                total[part].addmm_(left, right, beta=int(columns.start > 0))  # beta 0 ignores what lies there
            elif of_x:
                dx = of_x[1][part]
                dx.copy_(torch.mm(left, right, out=wide_x.like(dx)))
            if of_weight:
                sums.addmm_(left.T, wide_x.of(of_weight[0][part]), beta=int(add or part.start > 0))
        if of_weight and sums is not dweight:
            dweight.copy_(sums)
    if total is not None and of_x:
        of_x[1].copy_(total)


# ---- the linear layer ------------------------------------------------------------------------------------------------


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    project(x.reshape(-1, x.shape[-1]), weight, bias, out=y.view(-1, y.shape[-1]))
    return y


def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _linear_bwd(dy: Tensor, x: Tensor | None, weight: Tensor | None, want_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = _linear_bwd_fake(dy, x, weight, want_bias)
    dy = dy.reshape(-1, dy.shape[-1])
    gradients(
        dy,
        None if weight is None else (weight, dx.view(-1, dx.shape[-1])),
        None if x is None else (x.reshape(-1, x.shape[-1]), dweight),
    )
    if want_bias:
        dbias.copy_(dy.sum(0, dtype=torch.float32))
    return dx, dweight, dbias


def _linear_bwd_fake(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, want_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = dy.shape[-1]
    return (
        dy.new_empty(0) if weight is None else dy.new_empty(*dy.shape[:-1], weight.shape[1]),
        dy.new_empty(0) if x is None else dy.new_empty(outputs, x.shape[-1]),
        dy.new_empty(outputs if want_bias else 0),
    )


_linear_op = define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _linear, _linear_fake)
linear_bwd = define(
    "linear_bwd(Tensor dy, Tensor? x, Tensor? weight, bool want_bias) -> (Tensor, Tensor, Tensor)",
    _linear_bwd,
    _linear_bwd_fake,
)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, _ = inputs
    of_x, of_weight = ctx.needs_input_grad[:2]
    # Only what the gradients need: a frozen weight's layer must not keep its input.
    ctx.save_for_backward(x if of_weight else None, weight if of_x else None)


def _backward(ctx: Any, dy: Tensor) -> tuple:
    x, weight = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:3]
    result = linear_bwd(dy, x, weight, wanted[2])
    return tuple(gradient if want else None for gradient, want in zip(result, wanted, strict=True))


differentiable("linear", _backward, _save)
once_differentiable("linear_bwd")


# ---- dweight on AMX --------------------------------------------------------------------------------------------------

_FEWEST_TRANSPOSED = 256, 2**20
"""Rows of both operands, and elements of dweight, from which on to transpose one of them pays."""


@functools.cache
def has_amx() -> bool:
    """Whether this CPU has AMX's product of bfloat16."""
    return _compiled.missing is None and "amx_bf16" in _compiled.C.cpu.features()


@torch.compiler.assume_constant_result  # the CPU does not change
def _has_amx() -> bool:
    return has_amx()


def _transposed(x: Tensor) -> Tensor:
    if x.device.type != "cpu" or not x.numel():
        return x.T.clone(memory_format=torch.contiguous_format)
    x, y = x.contiguous(), _transposed_fake(x)
    code = _compiled.dtype_code(x.dtype)
    _compiled.C.cpu.scale(
        x=x.data_ptr(),
        transposed=True,
        y=y.data_ptr(),
        rows=y.shape[0],
        cols=y.shape[1],
        factor=1.0,
        x_dtype=code,
        y_dtype=code,
    )
    return y


def _transposed_fake(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], x.shape[0])


_transposed_op = define("transposed(Tensor x) -> Tensor", _transposed, _transposed_fake)
once_differentiable("transposed")


def weight_gradients(dys: Sequence[Tensor | None], x: Tensor, compiled: bool) -> list[Tensor | None]:
    """``dy.T @ x`` of each dy that is not None.

    Args:
        dys: each ``[T, N]`` with its own N, of the dtype of x.
        x: ``[T, K]``.
        compiled: whether the CPU kernels may be used.
    """
    inputs, x_transposed = x.shape[1], None
    fewest_rows, fewest_elements = _FEWEST_TRANSPOSED
    pays = (
        x.dtype == torch.bfloat16 and x.device.type == "cpu" and compiled and _has_amx() and _has_rows(x, fewest_rows)
    )
    result: list[Tensor | None] = []
    for dy in dys:
        if dy is None:
            result.append(None)
        elif not pays or dy.shape[1] * inputs < fewest_elements:
            result.append(dy.T @ x)
        elif dy.shape[1] <= inputs:
            result.append(_transposed_op(dy) @ x)
        else:
            x_transposed = _transposed_op(x) if x_transposed is None else x_transposed
            result.append(_transposed_op(x_transposed @ dy))
    return result


# ---- layers of one input ---------------------------------------------------------------------------------------------


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        return tuple(linear(x, weight) for weight in weights)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, *weights = inputs
        of_x, *of_weights = ctx.needs_input_grad
        ctx.compiled = dispatch.allows("cpu")
        ctx.save_for_backward(x if any(of_weights) else None, *(weights if of_x else ()))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple:
        # Inside autocast a product would be of its dtype, and the sum it is added to would not.
        with torch.autocast(next(dy.device.type for dy in dys if dy is not None), enabled=False):
            return _Linears._gradients(ctx, dys)

    @staticmethod
    def _gradients(ctx: Any, dys: Sequence[Tensor | None]) -> tuple:
        x, *weights = ctx.saved_tensors
        _, *of_weights = ctx.needs_input_grad
        leading = next(dy.shape[:-1] for dy in dys if dy is not None)
        dys = [None if dy is None else dy.reshape(-1, dy.shape[-1]) for dy in dys]
        dx = None
        for dy, weight in zip(dys, weights, strict=False):
            if dy is not None:
                dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
        dweights: list[Tensor | None] = [None] * len(dys)
        if x is not None:
            wanted = [dy if want else None for dy, want in zip(dys, of_weights, strict=True)]
            dweights = weight_gradients(wanted, x.reshape(-1, x.shape[-1]), ctx.compiled)
        return None if dx is None else dx.view(*leading, dx.shape[-1]), *dweights


def linears(x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """``linear(x, weight)`` of each weight, with one gradient of `x` that is summed inside the products.

    Args:
        x: ``[..., K]``.
        weights: each ``[N, K]`` with its own N, of the dtype of x unless autocast casts both.

    Returns:
        ``[..., N]`` of each.
    """
    if (
        not torch.is_grad_enabled()
        or x.is_meta  # autocast does not know it
        or torch.is_autocast_enabled(x.device.type)  # it casts a weight once for all of its uses
        or any(serves(x, weight) for weight in weights)  # in float32, where products cannot add to a gradient
    ):
        return tuple(linear(x, weight) for weight in weights)
    return _Linears.apply(x, *weights)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``, in float32 where both are bfloat16 and this CPU is faster at that."""
    if serves(x, weight) and (bias is None or (bias.dtype == weight.dtype and bias.shape == weight.shape[:1])):
        return _linear_op(x, weight, bias)
    return functional.linear(x, weight, bias)
