"""``attn_implementation="lemur_fast"``: `ops.attention` in any causal model of transformers, without `accelerate`.

>>> import lemur_fast.llama
>>> model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="lemur_fast")

Documents are told apart as `documents` says: by ``cu_seqlens``, ``cu_seq_lens_q/k`` or ``seq_idx``, by an
``attention_mask [B, T]``, or by ``position_ids`` that restart. A model calls its attention layer by layer, so finding
them in a mask, in numbers or in positions costs its device syncs in every layer; `accelerate` pays them once per call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, bidirectional_mask_function, flash_attention_mask

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
    cu_seqlens: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    seq_idx: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of ``query [B, Hq, T, D]`` over ``key, value [B, Hk, S, D]``, in the form transformers asks for.

    Returns:
        ``[B, T, Hq, D]``, with zeros at padding, and None for the weights.

    Raises:
        ValueError: dropout, or another argument that `ops.attention` does not have; a layer that attends in chunks;
            documents beside a KV cache that holds other tokens.
    """
    if dropout:
        raise ValueError(f"dropout: got {dropout}; the attention of lemur_fast has none")
    for name in ("position_bias", "s_aux", "cache"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{name}: got a value; the attention of lemur_fast does not take it")
    if _layer_type(module) == "chunked_attention":
        raise ValueError("layer_types: got 'chunked_attention'; the attention of lemur_fast has windows, but no chunks")
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask: got shape {list(attention_mask.shape)}; the attention of lemur_fast takes [B, T], and "
            "finds out itself what a token may see"
        )
    batch, _, tokens, _ = query.shape
    slots = key.shape[2]
    if attention_mask is not None:  # a static cache is longer than what fills it
        key, value = (x[:, :, : attention_mask.shape[1]] for x in (key, value))
    keys = key.shape[2]
    causal = module.is_causal if is_causal is None else is_causal
    stated = {
        "cu_seqlens": cu_seqlens,
        "cu_seq_lens_q": cu_seq_lens_q,
        "cu_seq_lens_k": cu_seq_lens_k,
        "seq_idx": seq_idx,
    }
    if tokens == slots:
        documents = key_documents = find_documents(
            (batch, tokens), query.device, attention_mask=attention_mask, position_ids=position_ids, **stated
        )
    else:  # behind a KV cache: each row is one document, of which these are the last queries
        for name, bounds in stated.items():
            if bounds is not None:
                raise ValueError(f"{name}: got documents beside a KV cache; pass use_cache=False and no cache")
        real = attention_mask if causal else None
        documents = find_documents(
            (batch, tokens), query.device, attention_mask=None if real is None else real[:, -tokens:]
        )
        key_documents = find_documents((batch, keys), query.device, attention_mask=attention_mask)
    if attention_mask is not None and not causal and not documents.split_rows:
        # Of the keys, which may be those of an encoder: every query has a result.
        documents = find_documents((batch, tokens), query.device)
    q, k, v = (
        which.take(x.transpose(1, 2)) for which, x in ((documents, query), (key_documents, key), (key_documents, value))
    )
    out: Any = ops.attention(
        q,
        k,
        v,
        documents.cu_seqlens,
        None if key_documents is documents else key_documents.cu_seqlens,
        causal=causal,
        window=sliding_window,
        softcap=softcap,
        scale=scaling,
    )
    return documents.put_back(out), None


def mask_of_keys(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """What `attend` gets as its mask: Hugging Face's for flash attention, but never None where keys are missing.

    A static cache hands over all of its slots, filled or not. The length of the mask tells how many are filled.

    Returns:
        ``[B, S]``, or None where every one of the `kv_length` keys is a real token.

    Raises:
        ValueError: the model adds something to its causal mask, such as tokens of an image that see one another.
    """
    if kwargs.get("use_vmap") or getattr(mask_function, "__qualname__", "").startswith("or_masks."):
        raise ValueError("mask_function: got more than a causal mask, which the attention of lemur_fast does not have")
    mask = flash_attention_mask(batch_size, q_length, kv_length, attention_mask=attention_mask)
    if mask is not None or mask_function is bidirectional_mask_function:
        return mask
    # int(), because the offset of a static cache is a tensor: a device sync, and a break in torch.compile's graph.
    seen = int(q_offset + q_length - kv_offset) if attention_mask is None else attention_mask.shape[1]
    if seen >= kv_length:
        return None
    return torch.ones(batch_size, seen, dtype=torch.bool, device=kwargs.get("device"))


def _layer_type(module: Any) -> str | None:
    """What the configuration says of the layer that an attention module belongs to."""
    types, index = getattr(getattr(module, "config", None), "layer_types", None), getattr(module, "layer_idx", None)
    return types[index] if types and index is not None else None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, mask_of_keys)
