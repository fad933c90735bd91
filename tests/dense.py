"""Attention of packed documents as one masked softmax over the whole pack: slow, and plainly right."""

from __future__ import annotations

import torch


def bounds(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def dense(q, k, v, cu_q, cu_k, *, causal=True, window=None, softcap=None, scale=None):
    """One softmax over [Hq, T, S] with everything that must not be seen masked out: (out, lse)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    index_q, index_k = (torch.arange(len(x), device=q.device) for x in (q, k))
    doc_q = torch.bucketize(index_q, cu_q[1:], right=True)
    doc_k = torch.bucketize(index_k, cu_k[1:], right=True)
    last = len(cu_q) - 1  # the tail past the last document
    length_q, length_k = (torch.cat((cu.diff(), cu.new_zeros(1))) for cu in (cu_q, cu_k))
    place_q = index_q - cu_q[doc_q] + (length_k - length_q)[doc_q]
    place_k = index_k - cu_k[doc_k]
    seen = (doc_q[:, None] == doc_k[None]) & (doc_q[:, None] < last)
    if causal:
        seen &= place_k[None] <= place_q[:, None]
    if window is not None:
        seen &= place_k[None] > place_q[:, None] - window
    group = q.shape[1] // k.shape[1]
    keys, values = (x.to(wide).repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.to(wide), keys) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    lse = torch.logsumexp(scores.masked_fill(~seen, -torch.inf), -1)
    p = torch.where(seen, torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]), 0.0)
    return torch.einsum("hqk,khd->qhd", p, values).to(q.dtype), lse
