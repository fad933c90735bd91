"""``attn_implementation="lemur_fast"``: `ops.attention` in any causal model of transformers, without `accelerate`.

>>> import lemur_fast.llama
>>> model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="lemur_fast")

Documents are told apart as `documents` says: by ``cu_seq_lens_q/k``, by an ``attention_mask [B, T]``, or by
``position_ids`` that restart. A model calls its attention layer by layer, so finding them in a mask or in positions
costs its device syncs in every layer; `accelerate` pays them once per call.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from lemur_fast import ops
from lemur_fast.llama.documents import find_documents

NAME = "lemur_fast"


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of ``query [B, Hq, T, D]`` over ``key, value [B, Hk, S, D]``, in the form transformers asks for.

    Returns:
        ``[B, T, Hq, D]``, with zeros at padding, and None for the weights.

    Raises:
        ValueError: dropout, or another argument that `ops.attention` does not have.
    """
    if dropout:
        raise ValueError(f"dropout: got {dropout}; the attention of lemur_fast has none")
    for name in ("position_bias", "s_aux", "cache"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{name}: got a value; the attention of lemur_fast does not take it")
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask: got shape {list(attention_mask.shape)}; the attention of lemur_fast takes [B, T], and "
            "finds out itself what a token may see"
        )
    batch, _, tokens, _ = query.shape
    if attention_mask is not None:  # a static cache is longer than what fills it
        key, value = (x[:, :, : attention_mask.shape[1]] for x in (key, value))
    keys = key.shape[2]
    if tokens == keys:
        documents = key_documents = find_documents(
            (batch, tokens),
            query.device,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cu_seq_lens_q=cu_seq_lens_q,
            cu_seq_lens_k=cu_seq_lens_k,
        )
    else:  # behind a KV cache: each row is one document, of which these are the last queries
        mask = attention_mask
        documents = find_documents(
            (batch, tokens), query.device, attention_mask=None if mask is None else mask[:, -tokens:]
        )
        key_documents = find_documents((batch, keys), query.device, attention_mask=mask)
    q, k, v = (
        which.take(x.transpose(1, 2)) for which, x in ((documents, query), (key_documents, key), (key_documents, value))
    )
    out: Any = ops.attention(
        q,
        k,
        v,
        documents.cu_seqlens,
        None if key_documents is documents else key_documents.cu_seqlens,
        causal=module.is_causal if is_causal is None else is_causal,
        window=sliding_window,
        softcap=softcap,
        scale=scaling,
    )
    return documents.put_back(out), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, flash_attention_mask)
