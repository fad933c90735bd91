"""Products of bfloat16 matrices on a CPU, taken in float32 where this CPU is faster at that.

    y = x @ weight.T + bias        dx = dy @ weight        dweight = dy.T @ x        dbias = sum over the rows of dy

torch multiplies bfloat16 as bfloat16 on every CPU. One with AMX is far faster at that; one that has only `vdpbf16ps`
takes twice as long as for float32 (Intel's, where a virtual machine hides AMX), and one without either up to a hundred
times as long. Here the operands are widened, products are torch's in float32, and a result is rounded once. A thousand
rows at a time are: few enough to stay in the caches, and enough for a product to run at its full rate.
"""

from __future__ import annotations

import functools
import platform
import threading
from collections.abc import Iterator
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
"""Elements of the weight that are widened at a time: 16 MiB."""


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
        and x.shape[:-1].numel() >= _FEWEST_ROWS
        and dispatch.allows("cpu")
        and _float32_is_faster()
    )


@torch.compiler.assume_constant_result  # the CPU does not change
def _float32_is_faster() -> bool:
    return float32_is_faster()


def _parts(count: int, most: int) -> Iterator[slice]:
    for start in range(0, count, most):
        yield slice(start, min(start + most, count))


def _weight_parts(weight: Tensor) -> Iterator[slice]:
    return _parts(weight.shape[0], max(1, _WEIGHT_ELEMENTS // max(1, weight.shape[1])))


class _Wide:
    """Memory for what is widened, or waits to be rounded. It stays with its thread, by name, up to 16 MiB.

    Fresh memory is dear, and pieces that come and go between the activations of a step leave holes of their size.
    """

    _kept = threading.local()
    _MOST_KEPT = 2**22  # elements

    def __init__(self, name: str, elements: int) -> None:
        kept = vars(self._kept)
        if elements > self._MOST_KEPT:
            self._memory = torch.empty(elements, dtype=torch.float32)
            return
        if name not in kept or kept[name].numel() < elements:
            kept[name] = torch.empty(elements, dtype=torch.float32)
        self._memory = kept[name]

    def like(self, x: Tensor) -> Tensor:
        """Of the shape of `x`, with anything in it."""
        return self._memory[: x.numel()].view(x.shape)

    def of(self, x: Tensor) -> Tensor:
        """`x`, widened."""
        return self.like(x).copy_(x)


def project(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Sets ``out [T, N]`` to ``x [T, K] @ weight [N, K].T + bias [N]``, all of bfloat16."""
    (rows, inputs), parts = x.shape, list(_weight_parts(weight))
    most, widest = min(rows, _ROWS), parts[0].stop if parts else 0
    wide_x, wide_y = _Wide("x", most * inputs), _Wide("y", most * widest)
    wide_w = _Wide("weight", widest * inputs)
    for columns in parts:
        wide_weight = wide_w.of(weight[columns]).T
        wide_bias = None if bias is None else bias[columns].float()
        for part in _parts(rows, _ROWS):
            left, y = wide_x.of(x[part]), wide_y.like(out[part, columns])
            if wide_bias is None:
                torch.mm(left, wide_weight, out=y)
            else:
                torch.addmm(wide_bias, left, wide_weight, out=y)
            out[part, columns].copy_(y)


def gradients(
    dy: Tensor, x: Tensor, weight: Tensor, dx: Tensor | None, dweight: Tensor | None, add_dweight: bool = False
) -> None:
    """Sets what is wanted of dx and dweight.

    Args:
        dy: ``[T, N]``, bfloat16.
        x: ``[T, K]``, bfloat16.
        weight: ``[N, K]``, bfloat16.
        dx: ``[T, K]``, bfloat16; set to ``dy @ weight``.
        dweight: ``[N, K]``; set to ``dy.T @ x``, in bfloat16 or float32.
        add_dweight: add to it, which must be float32, instead.
    """
    (rows, inputs), parts = x.shape, list(_weight_parts(weight))
    most, widest = min(rows, _ROWS), parts[0].stop if parts else 0
    wide_x, wide_dx, wide_dy = _Wide("x", most * inputs), _Wide("dx", most * inputs), _Wide("y", most * widest)
    wide_w, wide_dw = _Wide("weight", widest * inputs), _Wide("dweight", widest * inputs)
    # Over several parts of the weight dx is a sum, which must not be rounded between them.
    in_parts = len(parts) > 1
    total = torch.empty(x.shape, dtype=torch.float32) if dx is not None and in_parts else None
    for columns in parts:
        if dx is not None:
            wide_weight = wide_w.of(weight[columns])
        if dweight is not None:
            narrow = dweight.dtype != torch.float32
            sums = wide_dw.like(weight[columns]) if narrow else dweight[columns]
        for part in _parts(rows, _ROWS):
            left = wide_dy.of(dy[part, columns])
            if total is not None:
                total[part].addmm_(left, wide_weight, beta=int(columns.start > 0))
            elif dx is not None:
                dx[part].copy_(torch.mm(left, wide_weight, out=wide_dx.like(dx[part])))
            if dweight is not None:  # beta 0 ignores what lies there, NaN too
                sums.addmm_(left.T, wide_x.of(x[part]), beta=int(add_dweight or part.start > 0))
        if dweight is not None and narrow:
            dweight[columns].copy_(sums)
    if total is not None and dx is not None:
        dx.copy_(total)


# ---- the linear layer ------------------------------------------------------------------------------------------------


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    project(x.reshape(-1, x.shape[-1]), weight, bias, out=y.view(-1, y.shape[-1]))
    return y


def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _linear_bwd(dy: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = _linear_bwd_fake(dy, x, weight, wanted)
    dy, x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    if wanted[0] or wanted[1]:
        gradients(dy, x, weight, dx=dx.view(x.shape) if wanted[0] else None, dweight=dweight if wanted[1] else None)
    if wanted[2]:
        dbias.copy_(dy.sum(0, dtype=torch.float32))
    return dx, dweight, dbias


def _linear_bwd_fake(dy: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if wanted[0] else 0),
        weight.new_empty(weight.shape if wanted[1] else 0),
        weight.new_empty(weight.shape[0] if wanted[2] else 0),
    )


_linear_op = define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _linear, _linear_fake)
_linear_bwd_op = define(
    "linear_bwd(Tensor dy, Tensor x, Tensor weight, bool[3] wanted) -> (Tensor, Tensor, Tensor)",
    _linear_bwd,
    _linear_bwd_fake,
)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, dy: Tensor) -> tuple:
    wanted = list(ctx.needs_input_grad)
    result = _linear_bwd_op(dy, *ctx.saved_tensors, wanted)
    return tuple(gradient if want else None for gradient, want in zip(result, wanted, strict=True))


differentiable("linear", _backward, _save)
once_differentiable("linear_bwd")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``, in float32 where both are bfloat16 and this CPU is faster at that."""
    if serves(x, weight) and (bias is None or bias.dtype == weight.dtype):
        return _linear_op(x, weight, bias)
    return functional.linear(x, weight, bias)
