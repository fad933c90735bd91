"""RMSNorm, alone or with the residual addition in front of it.

    h     = x + residual                        (rounded to h's dtype; h = x without a residual)
    rstd  = 1 / sqrt(mean(h^2) + eps)           (float32)
    x_hat = round(h * rstd)                     (to h's dtype, as Hugging Face's LLaMA rounds)
    y     = x_hat * weight

Backward, with g = dy * weight:

    dh = rstd * (g - x_hat * mean(g * x_hat)) + dh_out      dx = dresidual = dh
    dw = sum over rows of dy * x_hat                         (float32)

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, arXiv 1910.07467.
"""

from __future__ import annotations

from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from lemur_fast import _compiled, _triton
from lemur_fast.dispatch import choose, implementation, register_backend, serves_any, wants_grad
from lemur_fast.ops._checks import (
    check_floats,
    check_number,
    check_shape,
    compute_dtype,
    unit_stride,
)
from lemur_fast.ops._registration import define, differentiable, once_differentiable

# ---- reference -------------------------------------------------------------------------------------------------------


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """The formula in plain torch: (y, rstd)."""
    x_wide = x.to(compute_dtype(x.dtype))
    rstd = torch.rsqrt(x_wide.square().mean(-1) + eps)
    return (x_wide * rstd[..., None]).to(x.dtype) * weight, rstd


def rms_norm_backward_reference(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor, want_dw: bool
) -> tuple[Tensor, Tensor]:
    """(dx, dw) by the formulas above; dw is empty when it is not wanted."""
    wide = compute_dtype(h.dtype)
    x_hat = h.to(wide) * rstd[:, None]
    g = dy.to(wide) * weight.to(wide)
    dx = rstd[:, None] * (g - x_hat * (g * x_hat).mean(-1, keepdim=True))
    if dh is not None:
        dx = dx + dh.to(wide)
    dw = (dy.to(wide) * x_hat.to(h.dtype).to(wide)).sum(0) if want_dw else dx.new_empty(0)
    return dx.to(h.dtype), dw


# ---- backends --------------------------------------------------------------------------------------------------------
# forward: (x [R, H], residual [R, H] or None, weight [H], eps) -> (y, h or what stands for none, rstd [R])
# backward: (dy, dh or None, h, weight, rstd, want_dw) -> (dx, dw or empty)


def _reference_forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    h = x if residual is None else x + residual
    y, rstd = rms_norm_reference(h, weight, eps)
    return y, x.new_empty(0) if residual is None else h, rstd


def _weight_for(x: Tensor, weight: Tensor) -> Tensor:
    """The weight as the compiled kernels take it, with the same values: in x's dtype, or in float32."""
    return weight if weight.dtype == x.dtype else weight.float()


def _compiled_forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    rows, cols = x.shape
    dtype, of_weight = x.dtype, weight.dtype
    if dtype == of_weight:
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
    else:
        y = x.new_empty(rows, cols, dtype=torch.promote_types(dtype, of_weight))
        weight = _weight_for(x, weight)
    rstd = x.new_empty(rows, dtype=torch.float32)
    h = rstd if residual is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    kernels, where = _compiled.place(x)
    kernels.rms_norm_fwd(
        x.data_ptr(),
        x.stride()[0],
        0 if residual is None else residual.data_ptr(),
        0 if residual is None else residual.stride()[0],
        weight.data_ptr(),
        y.data_ptr(),
        0 if residual is None else h.data_ptr(),
        rstd.data_ptr(),
        rows,
        cols,
        eps,
        _compiled.dtype_code(dtype),
        _compiled.dtype_code(weight.dtype),
        **where,
    )
    return y, h, rstd


def _compiled_backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor, want_dw: bool
) -> tuple[Tensor, Tensor]:
    rows, cols = h.shape
    dx = h.new_empty((rows, cols))
    dw = h.new_empty(cols if want_dw else 0, dtype=torch.float32)
    weight = _weight_for(h, weight)
    kernels, where = _compiled.place(h)
    if where:  # on a GPU every processor makes a part of dw
        parts = max(1, min(rows, _compiled.processors(where["device"])))
        partial = h.new_empty((parts, cols) if want_dw else 0, dtype=torch.float32)
        where |= {"partial": partial.data_ptr(), "parts": parts}
    kernels.rms_norm_bwd(
        dy=dy.data_ptr(),
        dy_stride=dy.stride(0),
        dh=0 if dh is None else dh.data_ptr(),
        dh_stride=0 if dh is None else dh.stride(0),
        h=h.data_ptr(),
        h_stride=h.stride(0),
        weight=weight.data_ptr(),
        rstd=rstd.data_ptr(),
        dx=dx.data_ptr(),
        dw=dw.data_ptr() if want_dw else 0,
        rows=rows,
        cols=cols,
        x_dtype=_compiled.dtype_code(h.dtype),
        w_dtype=_compiled.dtype_code(weight.dtype),
        **where,
    )
    return dx, dw


for _name, _refuse in (("cuda", _compiled.refuses_cuda), ("cpu", _compiled.refuses_cpu)):
    register_backend("rms_norm", _name, refuse=_refuse, forward=_compiled_forward, backward=_compiled_backward)
register_backend(
    "rms_norm",
    "triton",
    refuse=_triton.refuses,
    forward=_triton.kernel("rms_norm", "forward"),
    backward=_triton.kernel("rms_norm", "backward"),
)
register_backend(
    "rms_norm",
    "reference",
    refuse=serves_any,
    forward=_reference_forward,
    backward=rms_norm_backward_reference,
)

# ---- registration and autograd ---------------------------------------------------------------------------------------
# Two operators, because a functional one may not return its input x as h.


def _rms_norm(x: Tensor, weight: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    y, _, rstd = implementation("rms_norm", backend, "forward")(unit_stride(x), None, unit_stride(weight), eps)
    return y, rstd


def _rms_norm_fake(x: Tensor, weight: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype))
    return y, x.new_empty(x.shape[:-1], dtype=compute_dtype(x.dtype))


def _add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    forward = implementation("rms_norm", backend, "forward")
    return forward(unit_stride(x), unit_stride(residual), unit_stride(weight), eps)


def _add_rms_norm_fake(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    y, rstd = _rms_norm_fake(x, weight, eps, backend)
    return y, x.new_empty(x.shape), rstd


def _rms_norm_bwd(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor, want_dw: bool, backend: str
) -> tuple[Tensor, Tensor]:
    backward = implementation("rms_norm", backend, "backward")
    dh = None if dh is None else unit_stride(dh)
    return backward(unit_stride(dy), dh, unit_stride(h), unit_stride(weight), rstd, want_dw)


def _rms_norm_bwd_fake(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor, want_dw: bool, backend: str
) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.shape), h.new_empty(weight.shape if want_dw else 0, dtype=compute_dtype(h.dtype))


_rms_norm_op = define(
    "rms_norm(Tensor x, Tensor weight, float eps, str backend) -> (Tensor, Tensor)", _rms_norm, _rms_norm_fake
)
_add_rms_norm_op = define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, str backend) -> (Tensor, Tensor, Tensor)",
    _add_rms_norm,
    _add_rms_norm_fake,
)
_rms_norm_bwd_op = define(
    "rms_norm_bwd(Tensor dy, Tensor? dh, Tensor h, Tensor weight, Tensor rstd, bool want_dw, str backend)"
    " -> (Tensor, Tensor)",
    _rms_norm_bwd,
    _rms_norm_bwd_fake,
)


def _save_plain(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, _, ctx.backend = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _save_added(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, _, weight, _, ctx.backend = inputs
    _, h, rstd = output
    ctx.save_for_backward(h, weight, rstd)
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Tensor | None, dh: Tensor | None, want_dw: bool) -> tuple[Tensor | None, Tensor | None]:
    h, weight, rstd = ctx.saved_tensors
    if dy is None:  # only h was used
        return dh, None
    dx, dw = _rms_norm_bwd_op(dy, dh, h, weight, rstd, want_dw, ctx.backend)
    return dx, dw.to(weight.dtype) if want_dw else None


def _backward_plain(ctx: Any, dy: Tensor | None, _: Any) -> tuple:
    dx, dw = _gradients(ctx, dy, None, ctx.needs_input_grad[1])
    return dx, dw, None, None


def _backward_added(ctx: Any, dy: Tensor | None, dh: Tensor | None, _: Any) -> tuple:
    dx, dw = _gradients(ctx, dy, dh, ctx.needs_input_grad[2])
    return dx, dx, dw, None, None


differentiable("rms_norm", _backward_plain, _save_plain)
differentiable("add_rms_norm", _backward_added, _save_added)
once_differentiable("rms_norm_bwd")


class Normed(NamedTuple):
    """What a result of `rms_norm` was made of: whoever needs it in backward can make it again instead of keeping it.

    Attributes:
        hidden: ``[..., H]``: x, or the sum that came back beside the result. The norm keeps it for its own backward.
        weight: ``[H]``.
        eps: as it was given.
    """

    hidden: Tensor
    weight: Tensor
    eps: float

    def backend(self) -> str:
        """The backend that serves such a norm now."""
        x, weight = self.hidden, self.weight
        return choose("rms_norm", x.device, x.dtype, x.numel(), wants_grad(x, weight), weight_dtype=weight.dtype)

    def again(self, backend: str) -> Tensor:
        """The result, as ``[rows, H]``."""
        return _rms_norm_op(_rows(self.hidden), self.weight, self.eps, backend)[0]


# ---- public ----------------------------------------------------------------------------------------------------------


def _rows(x: Tensor) -> Tensor:
    """``[rows, H]``; to be spared where x is that, because a view costs more than all checks."""
    return x.reshape(-1 if x.numel() else 0, x.shape[-1])


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float = ..., residual: None = ...) -> Tensor: ...
@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float = ..., *, residual: Tensor) -> tuple[Tensor, Tensor]: ...


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Root-mean-square normalisation over the last dimension, with an optional residual added first.

    Statistics are taken in float32 (float64 for float64 inputs); the normalised row is rounded to the input's dtype
    before the weight is applied, as Hugging Face's LLaMA does. Mixed dtypes promote as in torch.

    Args:
        x: ``[..., H]``.
        weight: ``[H]``.
        eps: added to the mean of squares.
        residual: same shape as `x`, or None.

    Returns:
        ``y [..., H]``; with a residual ``(y, x + residual)``.

    Raises:
        TypeError: a tensor is not of a float dtype.
        ValueError: shapes or devices do not fit.
    """
    if residual is None:
        check_floats(("x", "weight"), x, weight)
    else:
        check_floats(("x", "weight", "residual"), x, weight, residual)
    shape, flat = x.shape, x.ndim == 2
    if len(shape) == 0 or shape[-1] == 0:
        raise ValueError(f"x: got shape {list(shape)}; takes [..., H] with H > 0")
    check_shape("weight", weight, shape[-1:], "the last dimension of x")
    check_number("eps", eps)
    if residual is None:
        backend = choose("rms_norm", x.device, x.dtype, x.numel(), wants_grad(x, weight), weight_dtype=weight.dtype)
        y, _ = _rms_norm_op(x if flat else _rows(x), weight, eps, backend)
        return y if flat else y.reshape(shape)
    check_shape("residual", residual, shape, "the shape of x")
    # Under autocast the stream is float32 and x comes from a bfloat16 product: their sum is float32, as in torch.
    dtype = x.dtype
    if residual.dtype != dtype:
        dtype = torch.promote_types(dtype, residual.dtype)
        x, residual = x.to(dtype), residual.to(dtype)
    backend = choose("rms_norm", x.device, dtype, x.numel(), wants_grad(x, weight, residual), weight_dtype=weight.dtype)
    if flat:  # No views where none are needed: FSDP2 warns of layers that return views.
        y, h, _ = _add_rms_norm_op(x, residual, weight, eps, backend)
        return y, h
    y, h, _ = _add_rms_norm_op(_rows(x), _rows(residual), weight, eps, backend)
    return y.reshape(shape), h.reshape(shape)
