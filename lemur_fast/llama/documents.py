"""Where the documents of a call lie, and which of its tokens the layers see.

A call of the model says where documents end in one of these ways; the first one present rules:

1. ``cu_seqlens`` beside ``input_ids [1, T]``;
2. ``cu_seq_lens_q``, Hugging Face's name for the same;
3. ``seq_idx [B, T]``, the number of every token's document; beside an ``attention_mask [B, T]`` that of every real one;
4. ``attention_mask [B, T]``: each row's real tokens are a document, or several where their ``position_ids`` go back;
5. ``position_ids [B, T]``: a document ends wherever they do not grow by one, which is Hugging Face's own rule;
6. nothing: each row is a document.

The answer is ``cu_seqlens`` over the tokens that the layers see and, for padded input, the ``rows`` that unpadding
keeps. Ways 1, 2 and 6 cost no device sync. Ways 3 and 5 cost one, way 4 one, or two when it has position_ids. Under
``torch.compile`` none costs a sync: shapes then stay static, so ``cu_seqlens`` is padded with repeats of its last
value, and padding is moved to the end instead of being dropped.

Shape suffixes used here: B rows, T tokens of a row, N documents, P tokens that the layers see.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lemur_fast.dispatch import debug_enabled


@dataclass(frozen=True)
class Documents:
    """Where documents lie in a ``[B, T]`` input.

    Attributes:
        batch_shape: (B, T).
        cu_seqlens: ``[N + 1]`` int32, bounds of the documents among the tokens that the layers see.
        position_ids: ``[B, T]``, or ``[1, P]`` where there are `rows`: positions for the rotary embedding.
        rows: ``[P]`` int64, the tokens of the flattened input that the layers see; None when they see all, in place.
        split_rows: whether a row may hold more than one document.
    """

    batch_shape: tuple[int, int]
    cu_seqlens: Tensor
    position_ids: Tensor
    rows: Tensor | None
    split_rows: bool

    def take(self, x: Tensor) -> Tensor:
        """The tokens that the layers see: ``[B, T, ...] -> [P, ...]``."""
        x = x.flatten(0, 1)
        return x if self.rows is None else x.index_select(0, self.rows)

    def put_back(self, x: Tensor) -> Tensor:
        """The inverse of `take`, with zeros at padding: ``[P, ...] -> [B, T, ...]``."""
        if self.rows is not None:
            tokens = self.batch_shape[0] * self.batch_shape[1]
            if torch.compiler.is_compiling():  # the padding is there, as a tail
                tail = torch.arange(tokens, device=x.device) >= self.cu_seqlens[-1]
                x = x.masked_fill(tail.view(-1, *(1,) * (x.dim() - 1)), 0)
            x = x.new_zeros((tokens, *x.shape[1:])).index_copy(0, self.rows, x)
        return x.unflatten(0, self.batch_shape)


def find_documents(
    batch_shape: tuple[int, int],
    device: torch.device,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> Documents:
    """Settles where documents end, by the rules at the top of this file.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: a shape or device does not fit, or two arguments contradict each other.
    """
    batch, tokens = batch_shape
    if position_ids is not None:
        _check_rows("position_ids", position_ids, (batch, tokens), device, may_broadcast=True)
        position_ids = position_ids.expand(batch, tokens)
    if cu_seqlens is None and cu_seq_lens_q is not None:
        cu_seqlens = _flash_cu_seqlens(cu_seq_lens_q, cu_seq_lens_k)
    elif cu_seq_lens_k is not None and cu_seqlens is None:
        raise ValueError("cu_seq_lens_k: got a tensor without cu_seq_lens_q; pass both, or cu_seqlens")

    if cu_seqlens is not None:
        if attention_mask is not None:
            raise ValueError(
                "attention_mask: got a tensor beside cu_seqlens; a packed batch has no padding to mask (tokens past "
                "cu_seqlens[-1] already count as a tail that nothing attends to)"
            )
        cu_seqlens = _check_cu_seqlens(cu_seqlens, batch_shape, device)
        if position_ids is None:
            position_ids = positions_in_documents(cu_seqlens, tokens)[None]
        return Documents(batch_shape, cu_seqlens, position_ids, None, True)

    if seq_idx is not None:
        _check_rows("seq_idx", seq_idx, (batch, tokens), device, may_broadcast=True)
        seq_idx = seq_idx.expand(batch, tokens)
    if attention_mask is not None and attention_mask.dim() == 2:
        _check_rows("attention_mask", attention_mask, (batch, tokens), device)
        return _find_in_padded(batch_shape, attention_mask != 0, position_ids, seq_idx)

    if seq_idx is not None:
        breaks = seq_idx.diff() != 0
    elif position_ids is not None:
        breaks = position_ids.diff() != 1
    else:
        ends = torch.arange(0, batch * tokens + 1, max(tokens, 1), dtype=torch.int32, device=device)
        return Documents(batch_shape, ends[: batch + 1], _row_positions(batch_shape, device), None, False)
    starts = F.pad(breaks, (1, 0), value=True) if tokens else breaks.new_empty(batch, 0)
    bounds = _bounds(starts.flatten(), starts.numel())
    if position_ids is None:
        position_ids = positions_in_documents(bounds, batch * tokens).view(batch_shape)
    split_rows = torch.compiler.is_compiling() or bounds.numel() - 1 > batch
    return Documents(batch_shape, bounds, position_ids, None, split_rows)


def positions_in_documents(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """``[tokens]`` int64: every token's distance from its document's start; the tail counts as one more document."""
    index = torch.arange(tokens, device=cu_seqlens.device, dtype=torch.int32)
    document = torch.searchsorted(cu_seqlens[1:].contiguous(), index, right=True)
    return (index - cu_seqlens.index_select(0, document)).long()


def targets_within_documents(labels: Tensor, documents: Documents, ignore_index: int) -> Tensor:
    """Labels that are already shifted, as the layers' tokens see them, without those that leave their document.

    Whatever `labels` says, the last token of a document and the tokens of the tail predict nothing.

    Args:
        labels: ``[B, T]``: the target of every token.
        documents: where documents end.
        ignore_index: the value that marks a token without a target.

    Returns:
        ``[P]`` int64.
    """
    targets = documents.take(labels)
    tokens = targets.numel()
    if tokens == 0:
        return targets
    bounds = documents.cu_seqlens.long()
    # A leading empty document ends at -1. The remainder turns that into the last token, which never has a target.
    targets = targets.index_fill(0, torch.remainder(bounds[1:] - 1, tokens), ignore_index)
    return targets.masked_fill(torch.arange(tokens, device=targets.device) >= bounds[-1], ignore_index)


def _find_in_padded(
    batch_shape: tuple[int, int], real: Tensor, position_ids: Tensor | None, seq_idx: Tensor | None
) -> Documents:
    batch, tokens = batch_shape
    flat = real.flatten()
    if torch.compiler.is_compiling():
        rows = torch.argsort(flat.to(torch.int8), descending=True, stable=True)  # real tokens first, in order
    else:
        rows = flat.nonzero().flatten()
    positions = _row_positions(batch_shape, real.device) if position_ids is None else position_ids
    positions = positions.flatten().index_select(0, rows)
    if position_ids is None and seq_idx is None:
        bounds = F.pad(real.sum(1).cumsum(0), (1, 0)).int()
        split_rows = False
    else:
        # Unlike without a mask, positions may jump forward: over the tokens that the mask leaves out.
        row = rows // max(tokens, 1)
        breaks = positions.diff() <= 0 if seq_idx is None else seq_idx.flatten().index_select(0, rows).diff() != 0
        starts = F.pad((row.diff() != 0) | breaks, (1, 0), value=True)[: rows.numel()]
        bounds = _bounds(starts, flat.sum() if torch.compiler.is_compiling() else rows.numel())
        split_rows = torch.compiler.is_compiling() or bounds.numel() - 1 > batch
        if position_ids is None:
            positions = positions_in_documents(bounds, rows.numel())
    if not torch.compiler.is_compiling() and rows.numel() == batch * tokens:
        return Documents(batch_shape, bounds, positions.view(batch_shape), None, split_rows)
    return Documents(batch_shape, bounds, positions[None], rows, split_rows)


def _bounds(starts: Tensor, end: Tensor | int) -> Tensor:
    """``cu_seqlens`` of documents that begin where `starts [P]` is true; tokens from `end` on belong to none."""
    if torch.compiler.is_compiling():
        index = torch.arange(starts.numel(), device=starts.device)
        first = torch.where(starts & (index < end), index, end).sort().values
    else:
        first = starts.nonzero().flatten()
    return torch.cat((first, torch.as_tensor(end, dtype=first.dtype, device=first.device).reshape(1))).int()


def _row_positions(batch_shape: tuple[int, int], device: torch.device) -> Tensor:
    return torch.arange(batch_shape[1], device=device).expand(batch_shape)


def _may_look(tensor: Tensor) -> bool:
    """Whether values may be looked at: free on a CPU, a sync elsewhere, a graph break under torch.compile.

    What is not checked here, the attention operator checks again where looking is free or asked for.
    """
    return not torch.compiler.is_compiling() and (tensor.device.type == "cpu" or debug_enabled())


def _flash_cu_seqlens(cu_seq_lens_q: Tensor, cu_seq_lens_k: Tensor | None) -> Tensor:
    if cu_seq_lens_k is not None and cu_seq_lens_k is not cu_seq_lens_q:
        differ = cu_seq_lens_k.shape != cu_seq_lens_q.shape or (
            _may_look(cu_seq_lens_k) and not torch.equal(cu_seq_lens_k, cu_seq_lens_q)
        )
        if differ:
            raise ValueError("cu_seq_lens_k: differs from cu_seq_lens_q; self-attention takes the same bounds for both")
    return cu_seq_lens_q


def _check_cu_seqlens(cu_seqlens: Tensor, batch_shape: tuple[int, int], device: torch.device) -> Tensor:
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens: got {type(cu_seqlens).__name__}; takes an int32 tensor [N + 1]")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens: got dtype {cu_seqlens.dtype}; takes int32")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
        raise ValueError(f"cu_seqlens: got shape {list(cu_seqlens.shape)}; takes [N + 1]")
    if batch_shape[0] != 1:
        raise ValueError(f"cu_seqlens: got it beside an input of shape {list(batch_shape)}; takes an input of [1, T]")
    if cu_seqlens.device != device:
        raise ValueError(f"cu_seqlens: got device {cu_seqlens.device}; takes {device}, where the input is")
    if _may_look(cu_seqlens):
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] > batch_shape[1] or bounds != sorted(bounds):
            raise ValueError(
                f"cu_seqlens: got {bounds}; must start at 0, never decrease, and end at most at {batch_shape[1]}"
            )
    return cu_seqlens.int()


def _check_rows(
    name: str, tensor: Tensor, shape: tuple[int, int], device: torch.device, may_broadcast: bool = False
) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}; takes a torch.Tensor")
    shapes = [shape, (1, shape[1])] if may_broadcast else [shape]
    if tuple(tensor.shape) not in shapes:
        raise ValueError(f"{name}: got shape {list(tensor.shape)}; takes {' or '.join(str(list(s)) for s in shapes)}")
    if tensor.device != device:
        raise ValueError(f"{name}: got device {tensor.device}; takes {device}, where the input is")
