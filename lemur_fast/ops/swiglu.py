"""SwiGLU: the gated activation of LLaMA's MLP.

    y = silu(gate) * up,    silu(x) = x * s(x),    s(x) = 1 / (1 + exp(-x))

Backward recomputes silu; nothing but the two inputs is saved:

    dup = dy * silu(gate)        dgate = dy * up * s(gate) * (1 + gate * (1 - s(gate)))

The linear layer behind it would keep y, half as much again. `swiglu_linear` makes y once more in backward instead.

Source: Shazeer, "GLU Variants Improve Transformer", 2020, arXiv 2002.05202.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lemur_fast import _compiled, _triton
from lemur_fast.dispatch import choose, implementation, register_backend, serves_any, wants_grad
from lemur_fast.ops._checks import (
    check_floats,
    check_shape,
    compute_dtype,
    to_autocast_dtype,
    unit_stride,
)
from lemur_fast.ops._products import linear, linear_bwd, serves, weight_gradients
from lemur_fast.ops._registration import define, differentiable, once_differentiable

# ---- reference -------------------------------------------------------------------------------------------------------


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The formula in plain torch."""
    wide = compute_dtype(gate.dtype)
    return (functional.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)


def swiglu_backward_reference(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(dgate, dup) by the formulas above."""
    wide = compute_dtype(gate.dtype)
    dy, gate_wide, up = dy.to(wide), gate.to(wide), up.to(wide)
    sigmoid = torch.sigmoid(gate_wide)
    dgate = dy * up * sigmoid * (1 + gate_wide * (1 - sigmoid))
    return dgate.to(gate.dtype), (dy * gate_wide * sigmoid).to(gate.dtype)


# ---- backends --------------------------------------------------------------------------------------------------------


def _rows(x: Tensor) -> Tensor:
    """``[rows, cols]`` with contiguous rows, however far apart; a view where the strides allow it."""
    if x.dim() != 2 or not x.numel():
        x = x.reshape(-1, x.shape[-1]) if x.numel() and x.dim() else x.reshape(1, -1)
    return unit_stride(x)


def _compiled_forward(gate: Tensor, up: Tensor) -> Tensor:
    y = torch.empty_like(gate, memory_format=torch.contiguous_format)
    gate, up = _rows(gate), _rows(up)
    if y.numel():
        kernels, where = _compiled.place(gate)
        kernels.swiglu_fwd(
            gate.data_ptr(),
            gate.stride()[0],
            up.data_ptr(),
            up.stride()[0],
            y.data_ptr(),
            *gate.shape,
            _compiled.dtype_code(gate.dtype),
            **where,
        )
    return y


def _compiled_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = gate.new_empty(gate.shape), up.new_empty(up.shape)
    dy, gate, up = _rows(dy), _rows(gate), _rows(up)
    if dgate.numel():
        kernels, where = _compiled.place(gate)
        kernels.swiglu_bwd(
            dy=dy.data_ptr(),
            dy_stride=dy.stride(0),
            gate=gate.data_ptr(),
            gate_stride=gate.stride(0),
            up=up.data_ptr(),
            up_stride=up.stride(0),
            dgate=dgate.data_ptr(),
            dup=dup.data_ptr(),
            rows=gate.shape[0],
            cols=gate.shape[1],
            dtype=_compiled.dtype_code(gate.dtype),
            **where,
        )
    return dgate, dup


def _triton_forward(gate: Tensor, up: Tensor) -> Tensor:
    return _forward_kernel(_rows(gate), _rows(up)).view(gate.shape)


def _triton_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = _backward_kernel(_rows(dy), _rows(gate), _rows(up))
    return dgate.view(gate.shape), dup.view(up.shape)


_forward_kernel, _backward_kernel = _triton.kernel("swiglu", "forward"), _triton.kernel("swiglu", "backward")
for _name, _refuse in (("cuda", _compiled.refuses_cuda), ("cpu", _compiled.refuses_cpu)):
    register_backend("swiglu", _name, refuse=_refuse, forward=_compiled_forward, backward=_compiled_backward)
register_backend("swiglu", "triton", refuse=_triton.refuses, forward=_triton_forward, backward=_triton_backward)
register_backend("swiglu", "reference", refuse=serves_any, forward=swiglu_reference, backward=swiglu_backward_reference)

# ---- registration and autograd ---------------------------------------------------------------------------------------


def _swiglu(gate: Tensor, up: Tensor, backend: str) -> Tensor:
    return implementation("swiglu", backend, "forward")(gate, up).contiguous()


def _swiglu_fake(gate: Tensor, up: Tensor, backend: str) -> Tensor:
    return gate.new_empty(gate.shape)


def _swiglu_bwd(dy: Tensor, gate: Tensor, up: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    dgate, dup = implementation("swiglu", backend, "backward")(dy, gate, up)
    return dgate.contiguous(), dup.contiguous()


def _swiglu_bwd_fake(dy: Tensor, gate: Tensor, up: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


_swiglu_op = define("swiglu(Tensor gate, Tensor up, str backend) -> Tensor", _swiglu, _swiglu_fake)
_swiglu_bwd_op = define(
    "swiglu_bwd(Tensor dy, Tensor gate, Tensor up, str backend) -> (Tensor, Tensor)", _swiglu_bwd, _swiglu_bwd_fake
)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    gate, up, ctx.backend = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx: Any, dy: Tensor) -> tuple:
    return *_swiglu_bwd_op(dy, *ctx.saved_tensors, ctx.backend), None


differentiable("swiglu", _backward, _save)
once_differentiable("swiglu_bwd")


class _SwigluLinear(torch.autograd.Function):
    @staticmethod
    def forward(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
        return linear(_swiglu_op(gate, up, backend), weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        gate, up, weight, _, ctx.backend = inputs
        ctx.save_for_backward(gate, up, weight)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple:
        # Inside autocast the products would be of its dtype, and so the gradient of y, which is one of gate's dtype.
        with torch.autocast(dout.device.type, enabled=False):
            return _SwigluLinear._gradients(ctx, dout)

    @staticmethod
    def _gradients(ctx: Any, dout: Tensor) -> tuple:
        gate, up, weight = ctx.saved_tensors
        of_bias = ctx.needs_input_grad[3]
        y = _swiglu_op(gate, up, ctx.backend)
        dbias = None
        if serves(gate, weight):
            dy, dweight, dbias = linear_bwd(dout, y, weight, of_bias)
        else:
            rows = math.prod(gate.shape[:-1])
            dout = dout.reshape(rows, weight.shape[0])
            dy = (dout @ weight).view(gate.shape)
            (dweight,) = weight_gradients([dout], y.view(rows, weight.shape[1]), ctx.backend == "cpu")
            if of_bias:
                dbias = dout.sum(0)
        del y
        dgate, dup = _swiglu_bwd_op(dy, gate, up, ctx.backend)
        return dgate, dup, dweight, dbias if of_bias else None, None


# ---- public ----------------------------------------------------------------------------------------------------------


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, element by element.

    Under autocast both inputs are cast to the autocast dtype, as the products around it are.

    Args:
        gate: any shape and strides.
        up: shape and dtype of `gate`.

    Returns:
        Contiguous, shape and dtype of `gate`.

    Raises:
        TypeError: a tensor is not of a float dtype.
        ValueError: shapes, dtypes or devices do not fit.
    """
    return _swiglu_op(*_checked(gate, up))


def _checked(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, str]:
    """Both as the operator takes them, and the backend that serves them."""
    check_floats(("gate", "up"), gate, up)
    check_shape("up", up, gate.shape, "the shape of gate")
    gate, up = to_autocast_dtype(gate, up)
    dtype = gate.dtype
    if up.dtype != dtype:
        raise ValueError(f"up: got dtype {up.dtype}; takes {dtype}, the dtype of gate")
    return gate, up, choose("swiglu", gate.device, dtype, gate.numel(), wants_grad(gate, up))


def swiglu_linear(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``linear(swiglu(gate, up), weight, bias)``, which keeps `gate` and `up` for backward, but not their product.

    Args:
        gate: ``[..., K]``.
        up: shape and dtype of `gate`.
        weight: ``[N, K]``, of the dtype of `gate` unless autocast casts both.
        bias: ``[N]``, or none.

    Returns:
        ``[..., N]``.

    Raises:
        TypeError, ValueError: as `swiglu` and ``torch.nn.functional.linear`` do.
    """
    if gate.is_meta or torch.is_autocast_enabled(gate.device.type) or not (wants_grad(weight) and wants_grad(gate, up)):
        # Autocast casts a weight once for all of its uses, which a function of our own cannot ask for; and y is kept
        # for the weight's gradient alone.
        return linear(swiglu(gate, up), weight, bias)
    gate, up, backend = _checked(gate, up)
    return _SwigluLinear.apply(gate, up, weight, bias, backend)
