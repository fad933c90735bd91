"""Attention over packed documents, causal by default, with grouped-query heads, window and softcap.

Document i holds the queries ``cu_seqlens[i]:cu_seqlens[i+1]`` and the keys ``cu_seqlens_k[i]:cu_seqlens_k[i+1]``.
With lq queries and lk keys, query r stands at key position r + lk - lq (bottom-right alignment). For the queries of one
head:

    s    = scale * q @ k.T            s = c * tanh(s / c) with a softcap c
    s_rj = -inf where j > position (causal) or j <= position - window
    p    = softmax(s)                 lse = logsumexp(s)
    out  = p @ v

Backward, with delta = rowsum(out * dout) - dlse:

    dv = p.T @ dout       ds = p * (dout @ v.T - delta), times 1 - (s / c)^2 with a softcap
    dq = scale * ds @ k   dk = scale * ds.T @ q

A query that sees no key has out 0 and lse -inf. Tokens past ``cu_seqlens[-1]`` are a tail with out 0, lse -inf and
gradients 0.

Sources: Dao, "FlashAttention-2", 2023, arXiv 2307.08691 (forward and backward from lse); Ainslie et al., "GQA", 2023,
arXiv 2305.13245; softcap, Gemma 2, arXiv 2408.00118.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lemur_fast import _compiled, _triton, preferences
from lemur_fast.dispatch import choose, debug_enabled, implementation, register_backend, serves_any, wants_grad
from lemur_fast.ops import _flash
from lemur_fast.ops._checks import (
    check_count,
    check_device,
    check_dims,
    check_flag,
    check_floats,
    check_integer,
    check_number,
    check_shape,
    compute_dtype,
    to_autocast_dtype,
    unit_stride,
)
from lemur_fast.ops._registration import define, differentiable, once_differentiable

MAX_HEAD_DIM = 256
_INT32 = frozenset((torch.int32,))


class AttentionOptions(NamedTuple):
    """The numbers that shape attention; `window` 0 and `softcap` 0 stand for none."""

    causal: bool
    window: int
    softcap: float
    scale: float


class _Document(NamedTuple):
    """A document's slices of the packed queries and keys."""

    q0: int
    lq: int
    k0: int
    lk: int


# ---- reference: one block of queries against the keys it can see -----------------------------------------------------


def _documents(cu_seqlens: Tensor, cu_seqlens_k: Tensor) -> list[_Document]:
    """Documents that hold at least one query and one key. On a GPU this costs a sync."""
    q_ends, k_ends = cu_seqlens.tolist(), cu_seqlens_k.tolist()
    documents = [
        _Document(q0, q1 - q0, k0, k1 - k0)
        for q0, q1, k0, k1 in zip(q_ends, q_ends[1:], k_ends, k_ends[1:], strict=False)
    ]
    return [document for document in documents if document.lq and document.lk]


class _Block(NamedTuple):
    """Rows of queries and the range of keys that any of them can see, with the mask inside it."""

    queries: slice
    keys: slice
    hidden: Tensor | None  # [rows, keys], True where a query must not see a key


_BLOCK_ROWS = 128  # queries whose scores are held at a time


def _blocks(document: _Document, options: AttentionOptions, device: torch.device) -> Iterator[_Block]:
    q0, lq, k0, lk = document
    for first in range(0, lq, _BLOCK_ROWS):
        last = min(first + _BLOCK_ROWS, lq)
        position = torch.arange(first, last, device=device) + (lk - lq)
        low, high = 0, lk
        if options.causal:
            high = min(lk, last + lk - lq)
            if options.window:
                low = max(0, first + lk - lq - options.window + 1)
        if high <= low:  # more queries than keys: the first ones see nothing
            continue
        hidden = None
        if options.causal:
            key = torch.arange(low, high, device=device)
            hidden = key[None, :] > position[:, None]
            if options.window:
                hidden |= key[None, :] <= position[:, None] - options.window
        yield _Block(slice(q0 + first, q0 + last), slice(k0 + low, k0 + high), hidden)


def _scores(q: Tensor, k: Tensor, block: _Block, options: AttentionOptions) -> Tensor:
    """[Hk, G, rows, keys]; capped, not masked."""
    scores = torch.einsum("qhgd,khd->hgqk", q, k) * options.scale
    return options.softcap * torch.tanh(scores / options.softcap) if options.softcap else scores


def _grouped(x: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """[rows, Hq, D] -> [rows, Hk, G, D]."""
    return x.to(dtype).unflatten(1, (kv_heads, -1))


def _block_forward(
    q: Tensor, k: Tensor, v: Tensor, block: _Block, options: AttentionOptions, out: Tensor, lse: Tensor
) -> None:
    wide = compute_dtype(q.dtype)
    rows, keys, hidden = block
    scores = _scores(_grouped(q[rows], k.shape[1], wide), k[keys].to(wide), block, options)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    block_lse = torch.logsumexp(scores, -1)
    sees_nothing = block_lse == -torch.inf
    p = torch.exp(scores - block_lse.masked_fill(sees_nothing, 0.0)[..., None])
    out[rows] = torch.einsum("hgqk,khd->qhgd", p, v[keys].to(wide)).flatten(1, 2).to(out.dtype)
    lse[:, rows] = block_lse.flatten(0, 1)


def _block_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block: _Block,
    options: AttentionOptions,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Writes dq of the block's rows; adds to dk and dv, which are wide."""
    wide = compute_dtype(q.dtype)
    rows, keys, hidden = block
    kv_heads = k.shape[1]
    q_rows, dout_rows = _grouped(q[rows], kv_heads, wide), _grouped(dout[rows], kv_heads, wide)
    k_wide, v_wide = k[keys].to(wide), v[keys].to(wide)
    scores = _scores(q_rows, k_wide, block, options)
    # A row that sees nothing has lse -inf; +inf in its place makes every p of it 0.
    block_lse = lse[:, rows].unflatten(0, (kv_heads, -1))
    p = torch.exp(scores - block_lse.masked_fill(block_lse == -torch.inf, torch.inf)[..., None])
    if hidden is not None:
        p = p.masked_fill(hidden, 0.0)
    delta = (dout_rows * _grouped(out[rows], kv_heads, wide)).sum(-1).permute(1, 2, 0)
    if dlse is not None:
        delta = delta - dlse[:, rows].to(wide).unflatten(0, (kv_heads, -1))
        # Merging two lse of -inf sends NaN back, as logaddexp does: it must not reach 0 * NaN below.
        delta = delta.masked_fill(block_lse == -torch.inf, 0.0)
    ds = p * (torch.einsum("qhgd,khd->hgqk", dout_rows, v_wide) - delta[..., None])
    if options.softcap:
        ds = ds * (1 - (scores / options.softcap).square())
    ds = ds * options.scale
    dq[rows] = torch.einsum("hgqk,khd->qhgd", ds, k_wide).flatten(1, 2).to(dq.dtype)
    dk[keys] += torch.einsum("hgqk,qhgd->khd", ds, q_rows)
    dv[keys] += torch.einsum("hgqk,qhgd->khd", p, dout_rows)


def _empty_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    """What a query that sees nothing gets: out 0, lse -inf."""
    lse = q.new_full((q.shape[1], q.shape[0]), -torch.inf, dtype=compute_dtype(q.dtype))
    return torch.zeros_like(q, memory_format=torch.contiguous_format), lse


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    """The formula in plain torch: (out, lse)."""
    out, lse = _empty_outputs(q)
    for document in _documents(cu_seqlens, cu_seqlens_k):
        for block in _blocks(document, options, q.device):
            _block_forward(q, k, v, block, options, out, lse)
    return out, lse


def attention_backward_reference(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) by the formulas above."""
    wide = compute_dtype(q.dtype)
    dq = torch.zeros_like(q, memory_format=torch.contiguous_format)
    dk, dv = k.new_zeros(k.shape, dtype=wide), v.new_zeros(v.shape, dtype=wide)
    for document in _documents(cu_seqlens, cu_seqlens_k):
        for block in _blocks(document, options, q.device):
            _block_backward(dout, dlse, q, k, v, out, lse, block, options, dq, dk, dv)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


# ---- backends --------------------------------------------------------------------------------------------------------
# forward: (q, k, v, cu_seqlens, cu_seqlens_k, options) -> (out, lse); backward: (dout, dlse or None, q, k, v, out, lse,
# cu_seqlens, cu_seqlens_k, options) -> (dq, dk, dv)


def _item(x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """A tensor [tokens, heads, D] as the compiled part takes it, and what must outlive the call."""
    token, head, column = x.stride()
    if column != 1:
        x = unit_stride(x)
        token, head, _ = x.stride()
    return x, (x.data_ptr(), token, head)


def _cpu_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    query_tokens, q_heads, head_dim = q.shape
    key_tokens, kv_heads, _ = k.shape
    out = q.new_empty(query_tokens, q_heads, head_dim)
    lse = q.new_empty(q_heads, query_tokens, dtype=torch.float32)
    q, q_item = _item(q)
    k, k_item = _item(k)
    v, v_item = _item(v)
    shared = cu_seqlens_k is cu_seqlens
    cu_seqlens = cu_seqlens.contiguous()
    cu_seqlens_k = cu_seqlens if shared else cu_seqlens_k.contiguous()
    _compiled.C.cpu.attention_fwd(
        cu_seqlens.data_ptr(),
        cu_seqlens_k.data_ptr(),
        cu_seqlens.numel() - 1,
        q_item,
        k_item,
        v_item,
        out.data_ptr(),
        lse.data_ptr(),
        query_tokens,
        key_tokens,
        q_heads,
        kv_heads,
        head_dim,
        *options,
        _compiled.dtype_code(q.dtype),
    )
    return out, lse


def _cpu_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    query_tokens, q_heads, head_dim = q.shape
    key_tokens, kv_heads, _ = k.shape
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    dout, dout_item = _item(dout)
    q, q_item = _item(q)
    k, k_item = _item(k)
    v, v_item = _item(v)
    out, out_item = _item(out)
    lse, dlse = lse.contiguous(), None if dlse is None else dlse.contiguous()
    cu_seqlens, cu_seqlens_k = cu_seqlens.contiguous(), cu_seqlens_k.contiguous()
    _compiled.C.cpu.attention_bwd(
        cu_seqlens.data_ptr(),
        cu_seqlens_k.data_ptr(),
        cu_seqlens.numel() - 1,
        dout_item,
        0 if dlse is None else dlse.data_ptr(),
        q_item,
        k_item,
        v_item,
        out_item,
        lse.data_ptr(),
        dq.data_ptr(),
        dk.data_ptr(),
        dv.data_ptr(),
        query_tokens,
        key_tokens,
        q_heads,
        kv_heads,
        head_dim,
        *options,
        _compiled.dtype_code(q.dtype),
    )
    return dq, dk, dv


_forward_kernel, _backward_kernel = _triton.kernel("attention", "forward"), _triton.kernel("attention", "backward")


def _triton_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    q, k, v = (unit_stride(x) for x in (q, k, v))
    tiles = preferences.tiles_for(q.device, q.shape[2])
    return _forward_kernel(q, k, v, cu_seqlens.contiguous(), cu_seqlens_k.contiguous(), options, tiles)


def _triton_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    dout, q, k, v, out = (unit_stride(x) for x in (dout, q, k, v, out))
    dlse = None if dlse is None else dlse.contiguous()
    cu_seqlens, cu_seqlens_k = cu_seqlens.contiguous(), cu_seqlens_k.contiguous()
    tiles = preferences.tiles_for(q.device, q.shape[2])
    return _backward_kernel(dout, dlse, q, k, v, out, lse.contiguous(), cu_seqlens, cu_seqlens_k, options, tiles)


register_backend("attention", "cpu", refuse=_compiled.refuses_cpu, forward=_cpu_forward, backward=_cpu_backward)
register_backend("attention", "triton", refuse=_triton.refuses, forward=_triton_forward, backward=_triton_backward)
register_backend(
    "attention",
    "reference",
    refuse=serves_any,
    forward=attention_reference,
    backward=attention_backward_reference,
)
register_backend(
    "attention",
    "varlen",
    refuse=_flash.refuses_varlen,
    forward=_flash.varlen_forward,
    backward=_flash.varlen_backward,
)
register_backend(
    "attention",
    "flash_attn",
    refuse=_flash.refuses_flash_attn,
    forward=_flash.flash_attn_forward,
    backward=_flash.flash_attn_backward,
)

# ---- registration and autograd ---------------------------------------------------------------------------------------


def _check_boundaries(name: str, cu_seqlens: Tensor, tokens: int) -> None:
    """Raises for bounds that do not describe documents; on a GPU this costs a sync."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0:
        raise ValueError(f"{name}: got {bounds[0]} at position 0; must start at 0")
    for at, (low, high) in enumerate(pairwise(bounds), 1):
        if high < low:
            raise ValueError(f"{name}: got {high} after {low} at position {at}; must not decrease")
    if bounds[-1] > tokens:
        raise ValueError(f"{name}: got {bounds[-1]} as its last value; takes at most {tokens}, the number of tokens")


def _check_documents(q: Tensor, k: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor) -> None:
    _check_boundaries("cu_seqlens", cu_seqlens, q.shape[0])
    if cu_seqlens_k is not cu_seqlens or k.shape[0] != q.shape[0]:
        _check_boundaries("cu_seqlens_k", cu_seqlens_k, k.shape[0])


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool,
    window: int,
    softcap: float,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    forward = implementation("attention", backend, "forward")
    options = AttentionOptions(causal, window, softcap, scale)
    if backend == "cpu":
        try:
            return forward(q, k, v, cu_seqlens, cu_seqlens_k, options)
        except ValueError:  # the kernel looks at the bounds before it runs; here it is said what is wrong with them
            _check_documents(q, k, cu_seqlens, cu_seqlens_k)
            raise
    # Where looking is free, done anyway, or asked for.
    if cu_seqlens.is_cpu or backend == "reference" or debug_enabled():
        _check_documents(q, k, cu_seqlens, cu_seqlens_k)
    return forward(q, k, v, cu_seqlens, cu_seqlens_k, options)


def _attention_fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=compute_dtype(q.dtype))


def _attention_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool,
    window: int,
    softcap: float,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    options = AttentionOptions(causal, window, softcap, scale)
    backward = implementation("attention", backend, "backward")
    return backward(dout, dlse, q, k, v, out, lse, cu_seqlens, cu_seqlens_k, options)


def _attention_bwd_fake(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_attention_op = define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor cu_seqlens_k, bool causal, int window,"
    " float softcap, float scale, str backend) -> (Tensor, Tensor)",
    _attention,
    _attention_fake,
)
_attention_bwd_op = define(
    "attention_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens,"
    " Tensor cu_seqlens_k, bool causal, int window, float softcap, float scale, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _attention_bwd,
    _attention_bwd_fake,
)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, cu_seqlens, cu_seqlens_k, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, cu_seqlens_k)
    ctx.set_materialize_grads(False)  # a dlse of None leaves the fast backward open


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple:
    q, k, v, out, lse, cu_seqlens, cu_seqlens_k = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    gradients = _attention_bwd_op(dout, dlse, q, k, v, out, lse, cu_seqlens, cu_seqlens_k, *ctx.options)
    return *gradients, *(None,) * 7


differentiable("attention", _backward, _save)
once_differentiable("attention_bwd")

# ---- public ----------------------------------------------------------------------------------------------------------


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in which every document of a packed batch attends to itself alone.

    Under autocast q, k and v are cast to the autocast dtype.

    Args:
        q: ``[T, Hq, D]``, D <= 256; any strides with a contiguous last dimension cost no copy.
        k: ``[S, Hk, D]``, Hk divides Hq: query head h uses key head h // (Hq / Hk).
        v: shape of `k`.
        cu_seqlens: ``[num_docs + 1]`` int32, from 0, never decreasing: document i holds the queries
            ``cu_seqlens[i]:cu_seqlens[i+1]``. Repeats are empty documents. Queries past the last value get 0.
        cu_seqlens_k: the same for the keys; `cu_seqlens` by default, and then S must be T.
        causal: a query sees no key after its own position, aligned bottom-right where a document has other numbers of
            queries and keys.
        window: with `causal`, the query sees this many latest keys, its own included; None for all.
        softcap: c, scores become ``c * tanh(scores / c)``; None for none.
        scale: factor of the scores; ``D ** -0.5`` by default.
        return_lse: also return the log-sum-exp of the scores.

    Returns:
        ``out [T, Hq, D]`` in the dtype of q; with `return_lse` also ``lse [Hq, T]``, float32 (float64 for float64),
        natural log, -inf for a query that sees nothing; differentiable.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: a shape, device or option does not fit; on the CPU (elsewhere under ``LEMUR_FAST_DEBUG=1``) also
            `cu_seqlens` that decreases or passes the number of tokens.
    """
    check_floats(("q", "k", "v"), q, k, v)
    device, q_shape, k_shape = q.device, q.shape, k.shape
    if len(q_shape) != 3 or len(k_shape) != 3:
        check_dims("q", q, "[T, Hq, D]")
        check_dims("k", k, "[S, Hk, D]")
    tokens, heads, head_dim = q_shape
    key_tokens, kv_heads, width = k_shape
    if not 0 < head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"q: got head dimension {head_dim}; takes 1 to {MAX_HEAD_DIM}")
    if width != head_dim:
        check_shape("k", k, (key_tokens, kv_heads, head_dim), "the head dimension of q")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"k: got {kv_heads} heads; must divide the {heads} heads of q")
    if v.shape != k_shape:
        check_shape("v", v, k_shape, "the shape of k")
    bounds = isinstance(cu_seqlens, Tensor) and cu_seqlens.dtype == torch.int32 and cu_seqlens.device == device
    if not bounds or cu_seqlens.ndim != 1 or not cu_seqlens.numel():
        check_integer("cu_seqlens", cu_seqlens, _INT32)
        check_device("cu_seqlens", cu_seqlens, device)
        raise ValueError(f"cu_seqlens: got shape {list(cu_seqlens.shape)}; takes [num_docs + 1]")
    if cu_seqlens_k is None:
        if key_tokens != tokens:
            raise ValueError(f"k: got {key_tokens} tokens; takes {tokens}, as q has, unless cu_seqlens_k is given")
        cu_seqlens_k = cu_seqlens
    else:
        check_integer("cu_seqlens_k", cu_seqlens_k, _INT32)
        check_shape("cu_seqlens_k", cu_seqlens_k, cu_seqlens.shape, "the shape of cu_seqlens")
        check_device("cu_seqlens_k", cu_seqlens_k, device)
    if causal is not True:
        check_flag("causal", causal)
    if window is not None:
        check_count("window", window)
        if not causal:
            raise ValueError(f"window: got {window} with causal=False; takes causal=True")
    if softcap is not None:
        check_number("softcap", softcap, positive=True)
    q, k, v = to_autocast_dtype(q, k, v)
    dtype = q.dtype
    if not k.dtype == v.dtype == dtype:
        name, other = ("v", v) if k.dtype == dtype else ("k", k)
        raise ValueError(f"{name}: got dtype {other.dtype}; takes {dtype}, the dtype of q")
    window, softcap = window or 0, softcap or 0.0
    traits: dict[str, object] = {"head_dim": head_dim}
    if window or softcap or return_lse or not causal:  # to look at each takes longer than to know that all are as usual
        traits |= {"causal": causal, "window": window, "softcap": softcap, "return_lse": return_lse}
    backend = choose("attention", device, dtype, q.numel(), wants_grad(q, k, v), **traits)
    scale = head_dim**-0.5 if scale is None else float(scale)
    out, lse = _attention_op(q, k, v, cu_seqlens, cu_seqlens_k, causal, window, softcap, scale, backend)
    return (out, lse) if return_lse else out
