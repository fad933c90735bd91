"""Rotary position embedding of queries and keys in one launch; the backward is the same kernel, transposed.

A program takes whole tokens: it reads their cos and sin once, for all heads of both tensors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lemur_fast.kernels.common import cdiv, next_power_of_2, on_device_of

ELEMENTS = 4096
"""Elements of a program's tile: 32 a thread, in two halves."""


@triton.jit
def _pairs(p, at, i, inside, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The first and the second elements of all pairs of the rows that begin at `at`, in float32."""
    if INTERLEAVED:
        column = tl.arange(0, 2 * i.shape[0])
        mask = inside & (column < 2 * HALF)
        v = tl.load(p + at + column, mask=mask, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(v, v.shape[:-1] + [i.shape[0], 2]))
    else:
        mask = inside & (i < HALF)
        a = tl.load(p + at + i, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(p + at + HALF + i, mask=mask, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def _table(p, at, i, inside, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, WHOLE: tl.constexpr):
    """What a table has for the first and for the second element of every pair, [TOKENS, 1, pairs]."""
    if WHOLE:
        a, b = _pairs(p, at, i, inside, HALF, INTERLEAVED)
    else:
        a = tl.load(p + at + i, mask=inside & (i < HALF), other=0.0).to(tl.float32)
        b = a
    return a, b


@triton.jit
def _rotate(
    x, y, token, token_inside, token_stride, head_stride, i, cos_a, cos_b, sin_a, sin_b,
    NUM_HEADS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Rotates every head of the tokens; y is contiguous."""
    for first in tl.static_range(0, NUM_HEADS, HEADS):
        head = first + tl.arange(0, HEADS)[None, :, None].to(tl.int64)
        inside = token_inside & (head < NUM_HEADS)
        a, b = _pairs(x, token * token_stride + head * head_stride, i, inside, HALF, INTERLEAVED)
        out_a = (a * cos_a - b * sin_a).to(y.dtype.element_ty)
        out_b = (b * cos_b + a * sin_b).to(y.dtype.element_ty)
        at = (token * NUM_HEADS + head) * (2 * HALF)
        if INTERLEAVED:
            column = tl.arange(0, 2 * i.shape[0])
            joined = tl.join(out_a, out_b)
            joined = tl.reshape(joined, joined.shape[:-2] + [2 * i.shape[0]])
            tl.store(y + at + column, joined, mask=inside & (column < 2 * HALF))
        else:
            mask = inside & (i < HALF)
            tl.store(y + at + i, out_a, mask=mask)
            tl.store(y + at + HALF + i, out_b, mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def rotary_kernel(
    q, k, q_out, k_out, cos, sin, q_token, q_head, k_token, k_head, cos_stride, sin_stride, tokens,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, WHOLE: tl.constexpr,
    TRANSPOSED: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """A program for TOKENS tokens. Pairs are (i, i + HALF), or (2 i, 2 i + 1) when interleaved."""
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS))[:, None, None].to(tl.int64)
    inside = token < tokens
    i = tl.arange(0, PAIRS)
    cos_a, cos_b = _table(cos, token * cos_stride, i, inside, HALF, INTERLEAVED, WHOLE)
    sin_a, sin_b = _table(sin, token * sin_stride, i, inside, HALF, INTERLEAVED, WHOLE)
    if TRANSPOSED:
        swapped = -sin_b
        sin_b = -sin_a
        sin_a = swapped
    _rotate(
        q, q_out, token, inside, q_token, q_head, i, cos_a, cos_b, sin_a, sin_b, Q_HEADS, HEADS, HALF, INTERLEAVED
    )  # fmt: skip
    _rotate(
        k, k_out, token, inside, k_token, k_head, i, cos_a, cos_b, sin_a, sin_b, K_HEADS, HEADS, HALF, INTERLEAVED
    )  # fmt: skip


def rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, dtype: torch.dtype, transposed: bool
) -> tuple[Tensor, Tensor]:
    """Rotated queries and keys.

    Args:
        q: ``[T, Hq, D]``, the last dimension contiguous, as in all below.
        k: ``[T, Hk, D]``.
        cos: ``[T, D]`` or ``[T, D / 2]``.
        sin: as `cos`.
        interleaved: pairs are neighbours, not half a head apart.
        dtype: of the results.
        transposed: rotate by the transpose, which is the backward.

    Returns:
        As `q` and `k`, contiguous.
    """
    outputs = q.new_empty(q.shape, dtype=dtype), k.new_empty(k.shape, dtype=dtype)
    tokens, q_heads, head_dim = q.shape
    half, k_heads = head_dim // 2, k.shape[1]
    if not (outputs[0].numel() or outputs[1].numel()):
        return outputs
    pairs = next_power_of_2(half)
    heads = min(next_power_of_2(max(q_heads, k_heads)), max(1, ELEMENTS // 2 // pairs))
    block = max(1, min(16, ELEMENTS // 2 // (pairs * heads)))
    with on_device_of(q):
        rotary_kernel[(cdiv(tokens, block),)](
            q, k, *outputs, cos, sin, *q.stride()[:2], *k.stride()[:2], cos.stride(0), sin.stride(0), tokens,
            Q_HEADS=q_heads, K_HEADS=k_heads, HALF=half, INTERLEAVED=interleaved, WHOLE=cos.shape[1] == head_dim,
            TRANSPOSED=transposed, TOKENS=block, HEADS=heads, PAIRS=pairs, num_warps=4,
        )  # fmt: skip
    return outputs
