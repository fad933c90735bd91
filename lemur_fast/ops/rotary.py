"""Rotary position embedding of queries and keys, in one call.

With D the head dimension and columns paired as (i, i + D/2), or as (2i, 2i + 1) when interleaved:

    x'_a = x_a * cos_a - x_b * sin_a            x'_b = x_b * cos_b + x_a * sin_b

Backward is the transpose:

    dx_a = dx'_a * cos_a + dx'_b * sin_b        dx_b = dx'_b * cos_b - dx'_a * sin_a

Source: Su et al., "RoFormer", 2021, arXiv 2104.09864; the pairing (i, i + D/2) is Hugging Face's LLaMA's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lemur_fast import _compiled, _triton
from lemur_fast.dispatch import choose, implementation, register_backend, serves_any, wants_grad
from lemur_fast.ops._checks import (
    check_constant,
    check_dims,
    check_flag,
    check_floats,
    check_shape,
    compute_dtype,
    unit_stride,
)
from lemur_fast.ops._registration import define, differentiable, once_differentiable

# ---- reference -------------------------------------------------------------------------------------------------------


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Views of the first and the second element of every pair, each [..., D/2]."""
    if interleaved:
        return x[..., 0::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def _tables(table: Tensor, head_dim: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The two halves of cos or sin, each [T, 1, D/2]; a table of D/2 columns serves both."""
    a, b = _pairs(table, interleaved) if table.shape[-1] == head_dim else (table, table)
    return a[:, None], b[:, None]


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """The formula in plain torch for one of q, k ``[T, heads, D]``."""
    out_dtype = torch.promote_types(x.dtype, cos.dtype)
    wide = compute_dtype(out_dtype)
    (x_a, x_b) = _pairs(x.to(wide), interleaved)
    (cos_a, cos_b), (sin_a, sin_b) = (_tables(t.to(wide), x.shape[-1], interleaved) for t in (cos, sin))
    rotated_a, rotated_b = x_a * cos_a - x_b * sin_a, x_b * cos_b + x_a * sin_b
    joined = torch.stack((rotated_a, rotated_b), -1) if interleaved else torch.stack((rotated_a, rotated_b), -2)
    return joined.flatten(-2).to(out_dtype)


def rotary_backward_reference(dx: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, dtype: torch.dtype) -> Tensor:
    """The transposed rotation: the forward formula with sin's halves swapped and negated."""
    sin_a, sin_b = (t[:, 0] for t in _tables(sin, dx.shape[-1], interleaved))
    swapped = torch.stack((-sin_b, -sin_a), -1 if interleaved else -2).flatten(-2)
    return rotary_reference(dx, cos, swapped, interleaved).to(dtype)


# ---- backends --------------------------------------------------------------------------------------------------------
# forward: (q, k, cos, sin, interleaved) -> (q', k'); backward: (dq', dk', cos, sin, interleaved, dtype) -> (dq, dk)


def _reference_forward(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return rotary_reference(q, cos, sin, interleaved), rotary_reference(k, cos, sin, interleaved)


def _reference_backward(
    dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return (
        rotary_backward_reference(dq, cos, sin, interleaved, dtype),
        rotary_backward_reference(dk, cos, sin, interleaved, dtype),
    )


def _rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, dtype: torch.dtype, backward: bool
) -> tuple[Tensor, Tensor]:
    q_out = torch.empty_like(q, dtype=dtype, memory_format=torch.contiguous_format)
    k_out = torch.empty_like(k, dtype=dtype, memory_format=torch.contiguous_format)
    q, k, cos, sin = unit_stride(q), unit_stride(k), unit_stride(cos), unit_stride(sin)
    # Kernels are built for tables of one dtype with x and y, and for float32, which has the values of all.
    if not q.dtype == cos.dtype == dtype:
        cos, sin = cos.float(), sin.float()
    tokens, heads, head_dim = q.shape
    if head_dim:
        kernels, where = _compiled.place(q)
        kernels.rotary(
            [
                (q.data_ptr(), *q.stride()[:2], q_out.data_ptr(), heads),
                (k.data_ptr(), *k.stride()[:2], k_out.data_ptr(), k.shape[1]),
            ],
            cos.data_ptr(),
            cos.stride()[0],
            sin.data_ptr(),
            sin.stride()[0],
            cos.shape[1],
            tokens,
            head_dim,
            interleaved,
            backward,
            _compiled.dtype_code(q.dtype),
            _compiled.dtype_code(dtype),
            _compiled.dtype_code(cos.dtype),
            **where,
        )
    return q_out, k_out


def _compiled_forward(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return _rotate(q, k, cos, sin, interleaved, torch.promote_types(q.dtype, cos.dtype), backward=False)


def _compiled_backward(
    dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return _rotate(dq, dk, cos, sin, interleaved, dtype, backward=True)


_rotate_kernel = _triton.kernel("rotary", "rotate")


def _triton_forward(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    q, k, cos, sin = (unit_stride(x) for x in (q, k, cos, sin))
    return _rotate_kernel(q, k, cos, sin, interleaved, torch.promote_types(q.dtype, cos.dtype), transposed=False)


def _triton_backward(
    dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    dq, dk, cos, sin = (unit_stride(x) for x in (dq, dk, cos, sin))
    return _rotate_kernel(dq, dk, cos, sin, interleaved, dtype, transposed=True)


for _name, _refuse in (("cuda", _compiled.refuses_cuda), ("cpu", _compiled.refuses_cpu)):
    register_backend("rotary", _name, refuse=_refuse, forward=_compiled_forward, backward=_compiled_backward)
register_backend("rotary", "triton", refuse=_triton.refuses, forward=_triton_forward, backward=_triton_backward)
register_backend("rotary", "reference", refuse=serves_any, forward=_reference_forward, backward=_reference_backward)

# ---- registration and autograd ---------------------------------------------------------------------------------------


def _rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, backend: str) -> tuple[Tensor, Tensor]:
    return implementation("rotary", backend, "forward")(q, k, cos, sin, interleaved)


def _rotary_fake(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, backend: str
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, cos.dtype)
    return q.new_empty(q.shape, dtype=dtype), k.new_empty(k.shape, dtype=dtype)


def _rotary_bwd(
    dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor]:
    return implementation("rotary", backend, "backward")(dq, dk, cos, sin, interleaved, dtype)


def _rotary_bwd_fake(
    dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor]:
    return dq.new_empty(dq.shape, dtype=dtype), dk.new_empty(dk.shape, dtype=dtype)


_rotary_op = define(
    "rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved, str backend) -> (Tensor, Tensor)",
    _rotary,
    _rotary_fake,
)
_rotary_bwd_op = define(
    "rotary_bwd(Tensor dq, Tensor dk, Tensor cos, Tensor sin, bool interleaved, ScalarType dtype, str backend)"
    " -> (Tensor, Tensor)",
    _rotary_bwd,
    _rotary_bwd_fake,
)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, _, cos, sin, ctx.interleaved, ctx.backend = inputs
    ctx.dtype = q.dtype
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple:
    cos, sin = ctx.saved_tensors
    dq, dk = _rotary_bwd_op(dq, dk, cos, sin, ctx.interleaved, ctx.dtype, ctx.backend)
    return dq, dk, None, None, None, None


differentiable("rotary", _backward, _save)
once_differentiable("rotary_bwd")

# ---- public ----------------------------------------------------------------------------------------------------------


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """Rotates queries and keys by their positions.

    Args:
        q: ``[T, Hq, D]``, D even; any strides.
        k: ``[T, Hk, D]``, dtype of `q`.
        cos: ``[T, D]``, or ``[T, D/2]`` when both elements of a pair share an angle, as they always do in LLaMA.
            A constant: it gets no gradient.
        sin: as `cos`.
        interleaved: pair columns (2i, 2i + 1), as GPT-J and Meta's own LLaMA code, instead of (i, i + D/2).

    Returns:
        The rotated q and k; dtype by torch's promotion of q with cos.

    Raises:
        TypeError: a tensor is not of a float dtype.
        ValueError: shapes, dtypes or devices do not fit, or cos or sin requires a gradient.
    """
    check_floats(("q", "k", "cos", "sin"), q, k, cos, sin)
    q_shape, k_shape, cos_shape = q.shape, k.shape, cos.shape
    if len(q_shape) != 3 or len(k_shape) != 3:
        check_dims("q", q, "[T, Hq, D]")
        check_dims("k", k, "[T, Hk, D]")
    tokens, _, head_dim = q_shape
    if head_dim % 2:
        raise ValueError(f"q: got head dimension {head_dim}; must be even")
    if k_shape[0] != tokens or k_shape[2] != head_dim:
        check_shape("k", k, (tokens, k_shape[1], head_dim), "tokens and head dimension of q")
    dtype, table_dtype = q.dtype, cos.dtype
    if k.dtype != dtype:
        raise ValueError(f"k: got dtype {k.dtype}; takes {dtype}, the dtype of q")
    if len(cos_shape) != 2 or cos_shape[1] not in (head_dim, head_dim // 2) or cos_shape[0] != tokens:
        raise ValueError(
            f"cos: got shape {list(cos_shape)}; takes [{tokens}, {head_dim}] or [{tokens}, {head_dim // 2}]"
        )
    check_shape("sin", sin, cos_shape, "the shape of cos")
    if sin.dtype != table_dtype:
        raise ValueError(f"sin: got dtype {sin.dtype}; takes {table_dtype}, the dtype of cos")
    check_constant("cos", cos)
    check_constant("sin", sin)
    backend = choose("rotary", q.device, dtype, q.numel(), wants_grad(q, k), table_dtype=table_dtype)
    if interleaved is not False:
        check_flag("interleaved", interleaved)
    return _rotary_op(q, k, cos, sin, interleaved, backend)
