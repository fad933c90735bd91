"""Packing: documents of any length laid end to end in rows of at most `max_tokens` tokens, with next to no padding.

    documents (token ids, and which of them are trained on)
      -> plan      lengths alone decide what goes where: numpy in, numpy out, fit for a store of billions of tokens
      -> PackPlan  per batch the segments (document, start, length)
      -> PackedBatch  one row of tokens, with cu_seqlens, positions and shifted labels

`pack` does all of it for documents that are in memory; `plan` alone is for those that are not. Documents in a batch
never see each other: attention, positions and the loss are bounded by `PackedBatch.cu_seqlens`, so a batch trains as
its documents would one by one.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lemur_fast import _compiled
from lemur_fast.dispatch import debug_enabled

IGNORE_INDEX = -100

Strategy = Literal["best_fit", "concatenate"]
Overlong = Literal["split", "truncate", "drop", "error"]
_STRATEGIES = ("best_fit", "concatenate")
_OVERLONG = ("split", "truncate", "drop", "error")
_MAX_INT32 = 2**31 - 1


@dataclass(frozen=True, eq=False, repr=False)
class PackedBatch:
    """One row of `T` tokens from `num_docs` documents, and all that attention, rotary and the loss need to know of it.

    All tensors lie on one device. Tokens past ``cu_seqlens[-1]`` are a tail of padding: nothing attends to them and
    nothing is trained on them.

    Raises:
        TypeError: a field is not a tensor, or has another dtype than its own.
        ValueError: a shape, a device, or ``cu_seqlens`` (looked into on the CPU only: a GPU would have to sync) is
            wrong. Under ``LEMUR_FAST_DEBUG=1`` the contents of every field are checked, on any device.
    """

    input_ids: Tensor
    """[T] int64."""
    labels: Tensor
    """[T] int64, already shifted: the target at a token is the token after it. -100 where there is none: at the last
    token of every document, at tokens that are not trained on, in the tail."""
    position_ids: Tensor
    """[T] int64, from 0 in every document."""
    cu_seqlens: Tensor
    """[num_docs + 1] int32: document i is ``[cu_seqlens[i], cu_seqlens[i + 1])``. May end in repeats of its last
    value."""
    num_items: Tensor
    """[] int64: number of trained tokens, those whose label is not -100."""
    trained_rows: Tensor
    """[R] int32, ascending: indices of the trained tokens. Entries equal to T are padding."""

    def __post_init__(self) -> None:
        expected = {"cu_seqlens": (torch.int32, 1), "num_items": (torch.int64, 0), "trained_rows": (torch.int32, 1)}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            dtype, ndim = expected.get(field.name, (torch.int64, 1))
            if not isinstance(value, Tensor):
                raise TypeError(f"{field.name}: got {type(value).__name__}; takes a {dtype} tensor")
            if value.dtype != dtype:
                raise TypeError(f"{field.name}: got {value.dtype}; takes {dtype}")
            if value.ndim != ndim:
                raise ValueError(f"{field.name}: got shape {tuple(value.shape)}; takes {ndim} dimensions")
            if value.device != self.input_ids.device:
                raise ValueError(f"{field.name}: is on {value.device}, input_ids on {self.input_ids.device}")
        for name in ("labels", "position_ids"):
            if getattr(self, name).shape != self.input_ids.shape:
                raise ValueError(
                    f"{name}: got {getattr(self, name).numel()} tokens; input_ids has {self.input_ids.numel()}"
                )
        if self.cu_seqlens.numel() == 0:
            raise ValueError("cu_seqlens: got no element; takes [num_docs + 1], so [0] for no documents")
        if self.cu_seqlens.device.type == "cpu" or debug_enabled():
            ends = self.cu_seqlens
            if ends[0] != 0 or ends[-1] > self.input_ids.numel() or bool((ends.diff() < 0).any()):
                raise ValueError(
                    f"cu_seqlens: got {_abridged(ends)}; must start at 0, never fall, and end at no more than T = "
                    f"{self.input_ids.numel()}"
                )
        if debug_enabled():
            self._check_contents()

    def _check_contents(self) -> None:
        """Raises ValueError for contents that break a field's own description."""
        ends = self.cu_seqlens.long()
        total = int(ends[-1])
        lengths = ends.diff()
        starts = torch.repeat_interleave(ends[:-1], lengths)
        if not torch.equal(self.position_ids[:total], torch.arange(total, device=ends.device) - starts):
            raise ValueError("position_ids: must count from 0 in every document of cu_seqlens")
        trained = self.labels != IGNORE_INDEX
        if bool(trained[total:].any()) or bool(trained[ends[1:][lengths > 0] - 1].any()):
            raise ValueError(
                "labels: the last token of a document and the tail must be -100: there is no target for them"
            )
        rows = trained.nonzero().flatten().int()
        if not torch.equal(self.trained_rows[self.trained_rows != self.num_tokens], rows):
            raise ValueError("trained_rows: must list the tokens whose label is not -100, in order (padding: T)")
        if int(self.num_items) != rows.numel():
            raise ValueError(f"num_items: got {int(self.num_items)}; {rows.numel()} labels are not -100")

    def __repr__(self) -> str:
        return (
            f"PackedBatch(tokens={self.num_tokens}, documents={self.num_documents}, "
            f"trained_rows={self.trained_rows.numel()}, device={str(self.input_ids.device)!r})"
        )

    @property
    def num_tokens(self) -> int:
        """T: tokens in the row, the tail included."""
        return self.input_ids.numel()

    @property
    def num_documents(self) -> int:
        """Documents that `cu_seqlens` has room for; empty ones and padding count."""
        return self.cu_seqlens.numel() - 1

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The batch on `device`; with `non_blocking`, a copy from pinned memory does not wait."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """The batch in page-locked memory; ``DataLoader(pin_memory=True)`` calls this."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Any) -> PackedBatch:
        return PackedBatch(**{field.name: function(getattr(self, field.name)) for field in dataclasses.fields(self)})

    def model_inputs(self) -> dict[str, Tensor]:
        """Keyword arguments for an accelerated model: tokens as [1, T], the rest as it is.

        ``labels`` go in as ``shift_labels``, Hugging Face's name for targets that are already shifted.
        """
        return {
            "input_ids": self.input_ids[None],
            "position_ids": self.position_ids[None],
            "shift_labels": self.labels[None],
            "cu_seqlens": self.cu_seqlens,
            "num_items_in_batch": self.num_items,
            "trained_rows": self.trained_rows,
        }

    def padded(
        self,
        *,
        tokens: int | None = None,
        documents: int | None = None,
        trained_rows: int | None = None,
        pad_id: int = 0,
    ) -> PackedBatch:
        """The batch with static shapes: what is given is filled up to that size, in ways that no op computes anything
        for.

        Args:
            tokens: T. The tail past ``cu_seqlens[-1]`` gets `pad_id`, label -100 and position 0.
            documents: `cu_seqlens` becomes ``[documents + 1]``, by repeats of its last value.
            trained_rows: `trained_rows` becomes ``[trained_rows]``, with entries equal to T.
            pad_id: input id of the tail.

        Raises:
            TypeError: a size or `pad_id` is not an integer.
            ValueError: the batch is larger than one of the sizes, or `pad_id` is below 0.
        """

        def missing(name: str, wanted: int | None, have: int) -> int:
            if wanted is None:
                return 0
            size = _as_int(wanted, name)
            if size < have:
                raise ValueError(f"{name}: got {size}; the batch has {have} already")
            return size - have

        pad_id = _as_int(pad_id, "pad_id")
        if pad_id < 0:
            raise ValueError(f"pad_id: got {pad_id}; must be at least 0")

        def extended(tensor: Tensor, count: int, value: Any) -> Tensor:
            return torch.cat(
                [tensor, tensor.new_full((count,), value) if isinstance(value, int) else value.expand(count)]
            )

        tail = missing("tokens", tokens, self.num_tokens)
        total = self.num_tokens + tail
        rows = torch.where(self.trained_rows == self.num_tokens, total, self.trained_rows).int()
        return PackedBatch(
            input_ids=extended(self.input_ids, tail, pad_id),
            labels=extended(self.labels, tail, IGNORE_INDEX),
            position_ids=extended(self.position_ids, tail, 0),
            cu_seqlens=extended(
                self.cu_seqlens, missing("documents", documents, self.num_documents), self.cu_seqlens[-1:]
            ),
            num_items=self.num_items,
            trained_rows=extended(rows, missing("trained_rows", trained_rows, rows.numel()), total),
        )

    @classmethod
    def from_documents(
        cls,
        documents: Sequence[Any],
        loss_masks: Sequence[Any] | None = None,
        *,
        pad_to: int | None = None,
        pad_id: int = 0,
    ) -> PackedBatch:
        """One batch of these documents, in this order. Empty documents keep their place in `cu_seqlens`.

        Args:
            documents: token ids of each document: a list, a 1-D array or a 1-D tensor of integers >= 0.
            loss_masks: for each document, for each of its tokens, whether the model is trained to predict it. The first
                token of a document never is. None trains on everything.
            pad_to: fill up to this many tokens, as `padded` does.
            pad_id: input id of that tail.

        Raises:
            TypeError: ids are not integers, or masks neither booleans nor integers.
            ValueError: an id below 0, a mask that is not 0 or 1 or not as long as its document, more than 2**31 - 1
                tokens, or more than `pad_to`.
        """
        rows, masks = _checked_documents(documents, loss_masks)
        batch = cls._from_arrays(rows, masks)
        if pad_to is not None and _as_int(pad_to, "pad_to") < batch.num_tokens:
            raise ValueError(f"pad_to: got {pad_to}; the documents have {batch.num_tokens} tokens")
        return batch.padded(tokens=pad_to, pad_id=pad_id)

    @classmethod
    def _from_arrays(cls, documents: Sequence[np.ndarray], masks: Sequence[np.ndarray] | None) -> PackedBatch:
        """`from_documents` on checked arrays: int64 ids, boolean masks."""
        lengths = np.array([len(document) for document in documents], dtype=np.int64)
        total = int(lengths.sum())
        if total > _MAX_INT32:
            raise ValueError(f"documents: got {total} tokens for one batch; cu_seqlens is int32 and takes {_MAX_INT32}")
        ends = np.concatenate([[0], np.cumsum(lengths)])
        input_ids = np.concatenate([np.zeros(0, np.int64), *documents])
        labels = np.full(total, IGNORE_INDEX, np.int64)
        labels[:-1] = input_ids[1:]
        if masks is not None:
            targets = np.concatenate([np.zeros(0, bool), *masks])
            labels[:-1][~targets[1:]] = IGNORE_INDEX
        labels[ends[1:][lengths > 0] - 1] = IGNORE_INDEX
        rows = np.flatnonzero(labels != IGNORE_INDEX).astype(np.int32)
        return cls(
            input_ids=torch.from_numpy(input_ids),
            labels=torch.from_numpy(labels),
            position_ids=torch.from_numpy(np.arange(total) - np.repeat(ends[:-1], lengths)),
            cu_seqlens=torch.from_numpy(ends.astype(np.int32)),
            num_items=torch.tensor(len(rows)),
            trained_rows=torch.from_numpy(rows),
        )


class Segment(NamedTuple):
    """A piece of a document: its tokens ``[start, start + length)``."""

    document: int
    start: int
    length: int


@dataclass(frozen=True)
class PackReport:
    """What packing did to the documents. ``print(report)`` reads well."""

    documents: int
    """Documents that went in."""
    tokens: int
    """Tokens that went in."""
    batches: int
    """Batches that came out."""
    max_tokens: int
    """Tokens that a batch may hold."""
    packed_tokens: int
    """Tokens that came out."""
    documents_split: int
    """Documents in more than one piece; each piece is a document of its own in its batch."""
    documents_truncated: int
    """Documents cut off at `max_tokens`."""
    tokens_truncated: int
    """Tokens lost by that."""
    documents_dropped: int
    """Documents left out because they were over-long."""
    tokens_dropped: int
    """Tokens lost by that."""
    documents_untrained: int
    """Documents that have nothing to train on, whatever is done with them: empty ones (which take no place in a batch),
    those of one token, those with an empty loss mask."""
    trained_tokens: int
    """Targets that the documents had: tokens to predict from those before them."""
    trained_tokens_lost: int
    """Targets lost by truncating, by dropping, and by splitting: the first token of a later piece has nothing before
    it."""

    @property
    def fill(self) -> float:
        """Share of the batches' room that holds tokens; 1.0 without batches."""
        return self.packed_tokens / (self.batches * self.max_tokens) if self.batches else 1.0

    def __str__(self) -> str:
        lost = self.trained_tokens_lost / self.trained_tokens if self.trained_tokens else 0.0
        lines = [
            f"packed {self.packed_tokens:,} of {self.tokens:,} tokens from {self.documents:,} documents into "
            f"{self.batches:,} batches of at most {self.max_tokens:,} ({self.fill:.2%} full)",
            f"  split      {self.documents_split:,} documents",
            f"  truncated  {self.documents_truncated:,} documents, {self.tokens_truncated:,} tokens lost",
            f"  dropped    {self.documents_dropped:,} documents, {self.tokens_dropped:,} tokens lost",
            f"  untrained  {self.documents_untrained:,} documents have nothing to train on",
            f"  targets    {self.trained_tokens_lost:,} of {self.trained_tokens:,} lost ({lost:.2%})",
        ]
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class PackPlan:
    """Which piece of which document goes into which batch.

    ``plan[b]`` lists the segments of batch b in the order of its row; ``len(plan)`` is the number of batches. The
    arrays hold the same for all batches at once.
    """

    documents: np.ndarray
    """[S] int64: the document of every segment."""
    starts: np.ndarray
    """[S] int64: where in its document the segment starts."""
    lengths: np.ndarray
    """[S] int64: tokens of the segment, at least 1."""
    offsets: np.ndarray
    """[batches + 1] int64: batch b has the segments ``[offsets[b], offsets[b + 1])``."""
    report: PackReport
    """What was lost, and how full the batches are."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, batch: int) -> list[Segment]:
        if not -len(self) <= batch < len(self):
            raise IndexError(f"batch: got {batch}; the plan has {len(self)}")
        batch %= len(self)
        part = slice(self.offsets[batch], self.offsets[batch + 1])
        columns = (self.documents[part], self.starts[part], self.lengths[part])
        return [Segment(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]

    def __iter__(self) -> Iterator[list[Segment]]:
        return (self[batch] for batch in range(len(self)))


def plan(lengths: Any, max_tokens: int, *, strategy: Strategy = "best_fit", overlong: Overlong = "split") -> PackPlan:
    """Decides from lengths alone what goes into which batch. Deterministic; about a second for a million documents.

    Args:
        lengths: [documents] tokens of each document, >= 0: a list or an integer array.
        max_tokens: most tokens of a batch.
        strategy: ``best_fit`` keeps documents whole (best-fit-decreasing: from the longest down, each into the batch
            that it fills best). ``concatenate`` lays them back to back in their order and cuts where a batch is full,
            so that every batch but the last is full.
        overlong: what becomes of documents longer than `max_tokens`. ``split``: cut into pieces, each a document of its
            own. ``truncate``: the first `max_tokens` tokens stay. ``drop``: left out. ``error``: raise.

    Returns:
        Batches in the order of the earliest document they hold, with their segments in the order of the documents, so
        that documents that were shuffled stay shuffled. Empty documents are in no batch.

    Raises:
        ValueError: a negative length, `max_tokens` outside [1, 2**31 - 1], an unknown name, or an over-long document
            under ``error``.
    """
    if strategy not in _STRATEGIES:
        raise ValueError(f"strategy: got {strategy!r}; takes {', '.join(_STRATEGIES)}")
    if overlong not in _OVERLONG:
        raise ValueError(f"overlong: got {overlong!r}; takes {', '.join(_OVERLONG)}")
    max_tokens = _as_int(max_tokens, "max_tokens")
    if not 1 <= max_tokens <= _MAX_INT32:
        raise ValueError(f"max_tokens: got {max_tokens}; must lie in [1, {_MAX_INT32}] (cu_seqlens is int32)")
    whole = _as_integers(lengths, "lengths")
    if whole.size and whole.min() < 0:
        raise ValueError(f"lengths: got {whole.min()} at {whole.argmin()}; must be at least 0")

    over = whole > max_tokens
    if overlong == "error" and over.any():
        first = int(over.argmax())
        raise ValueError(
            f"documents: {int(over.sum())} have more than max_tokens = {max_tokens} tokens, the first of them "
            f"documents[{first}] with {whole[first]}; overlong='split', 'truncate' or 'drop' takes them"
        )
    kept = whole
    if overlong == "truncate":
        kept = np.minimum(whole, max_tokens)
    elif overlong == "drop":
        kept = np.where(over, 0, whole)

    if strategy == "best_fit":
        document, start, length = _cut(kept, np.zeros_like(kept), max_tokens)
        batch, count = _best_fit(length, max_tokens)
        # Stable sorts: segments of a batch stay in the order of the documents.
        by_bin = np.argsort(batch, kind="stable")
        first_segment = by_bin[np.searchsorted(batch[by_bin], np.arange(count))]
        renumbered = np.empty(count, np.int64)
        renumbered[np.argsort(first_segment, kind="stable")] = np.arange(count)
        batch = renumbered[batch]
        order = np.argsort(batch, kind="stable")
        document, start, length, batch = document[order], start[order], length[order], batch[order]
    else:
        ends = np.cumsum(kept)
        document, start, length = _cut(kept, ends - kept, max_tokens)
        batch = (ends[document] - kept[document] + start) // max_tokens
        count = int(batch[-1]) + 1 if batch.size else 0

    targets = int(np.maximum(whole - 1, 0).sum())
    report = PackReport(
        documents=whole.size,
        tokens=int(whole.sum()),
        batches=count,
        max_tokens=max_tokens,
        packed_tokens=int(length.sum()),
        documents_split=int((np.bincount(document, minlength=1) > 1).sum()),
        documents_truncated=int(over.sum()) if overlong == "truncate" else 0,
        tokens_truncated=int((whole - kept).sum()) if overlong == "truncate" else 0,
        documents_dropped=int(over.sum()) if overlong == "drop" else 0,
        tokens_dropped=int((whole - kept).sum()) if overlong == "drop" else 0,
        documents_untrained=int((whole < 2).sum()),
        trained_tokens=targets,
        trained_tokens_lost=targets - int((length - 1).sum()),
    )
    return PackPlan(document, start, length, np.searchsorted(batch, np.arange(count + 1)), report)


def pack(
    documents: Sequence[Any],
    max_tokens: int,
    *,
    strategy: Strategy = "best_fit",
    overlong: Overlong = "split",
    loss_masks: Sequence[Any] | None = None,
) -> tuple[list[PackedBatch], PackReport]:
    """Packs documents that are in memory into batches of at most `max_tokens` tokens.

    Args:
        documents: token ids of each document: a list, a 1-D array or a 1-D tensor of integers >= 0. Empty ones are in
            no batch.
        max_tokens: most tokens of a batch.
        strategy: ``best_fit`` or ``concatenate``; see `plan`.
        overlong: ``split``, ``truncate``, ``drop`` or ``error``; see `plan`.
        loss_masks: for each document, for each of its tokens, whether the model is trained to predict it; None trains
            on all.

    Returns:
        The batches, on the CPU, in the order that `plan` describes, and a report of what was lost and how full they
        are. `PackedBatch.padded` gives them static shapes.

    Raises:
        TypeError, ValueError: what `plan` and `PackedBatch.from_documents` refuse.

    Example:
        >>> batches, report = lf.pack(documents, 4096)
        >>> print(report)
        >>> loss = model(**batches[0].model_inputs()).loss
    """
    rows, masks = _checked_documents(documents, loss_masks)
    packing = plan([len(row) for row in rows], max_tokens, strategy=strategy, overlong=overlong)
    batches = []
    for segments in packing:
        parts = [(document, slice(start, start + length)) for document, start, length in segments]
        batches.append(
            PackedBatch._from_arrays(
                [rows[document][part] for document, part in parts],
                None if masks is None else [masks[document][part] for document, part in parts],
            )
        )
    report = packing.report
    if masks is not None:
        targets = [int(mask[1:].sum()) for mask in masks]
        report = dataclasses.replace(
            report,
            documents_untrained=targets.count(0),
            trained_tokens=sum(targets),
            trained_tokens_lost=sum(targets) - sum(int(batch.num_items) for batch in batches),
        )
    return batches, report


def _cut(lengths: np.ndarray, begins: np.ndarray, period: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts documents that begin at `begins` wherever a multiple of `period` falls inside: (document, start, length)."""
    ends = begins + lengths
    first = begins // period
    pieces = np.where(lengths > 0, (ends - 1) // period - first + 1, 0)
    document = np.repeat(np.arange(lengths.size), pieces)
    nth = np.arange(document.size) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    border = (first[document] + nth) * period
    start = np.maximum(begins[document], border)
    length = np.minimum(ends[document], border + period) - start
    return document, start - begins[document], length


def _best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Best-fit-decreasing: (bin of every length, number of bins). The same with and without the compiled part."""
    if _compiled.C is not None:
        return _compiled.C.best_fit_decreasing(lengths, capacity)
    return _best_fit_in_python(lengths, capacity)


def _best_fit_in_python(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """What `csrc/packing.cpp` does, a few times slower."""
    bins = np.empty(lengths.size, np.int64)
    count = 0
    rooms: list[int] = []  # the different rooms that bins have left, ascending
    stacks: dict[int, list[int]] = {}  # for each room, the bins that have it, the last touched on top
    items = lengths.tolist()
    for item in np.argsort(-lengths, kind="stable").tolist():
        at = bisect.bisect_left(rooms, items[item])
        if at == len(rooms):
            room, chosen = capacity, count
            count += 1
        else:
            room = rooms[at]
            chosen = stacks[room].pop()
            if not stacks[room]:
                del stacks[room], rooms[at]
        bins[item] = chosen
        room -= items[item]
        if room:
            if room not in stacks:
                stacks[room] = []
                bisect.insort(rooms, room)
            stacks[room].append(chosen)
    return bins, count


def _checked_documents(
    documents: Sequence[Any], loss_masks: Sequence[Any] | None
) -> tuple[list[np.ndarray], list[np.ndarray] | None]:
    """Documents as int64 arrays and masks as boolean ones, of equal lengths."""
    rows = [_as_integers(document, f"documents[{i}]") for i, document in enumerate(documents)]
    for i, row in enumerate(rows):
        if row.size and row.min() < 0:
            raise ValueError(f"documents[{i}]: got the id {row.min()} at {row.argmin()}; ids are at least 0")
    if loss_masks is None:
        return rows, None
    if len(loss_masks) != len(rows):
        raise ValueError(f"loss_masks: got {len(loss_masks)}; there are {len(rows)} documents")
    masks = []
    for i, (row, given) in enumerate(zip(rows, loss_masks, strict=True)):
        mask = np.asarray(given)
        if mask.dtype != bool:
            mask = _as_integers(given, f"loss_masks[{i}]")
            if mask.size and (mask.min() < 0 or mask.max() > 1):
                raise ValueError(f"loss_masks[{i}]: got {mask.min()} to {mask.max()}; takes 0 and 1")
            mask = mask.astype(bool)
        if mask.shape != row.shape:
            raise ValueError(f"loss_masks[{i}]: got shape {mask.shape}; documents[{i}] has {row.size} tokens")
        masks.append(mask)
    return rows, masks


def _as_int(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name}: got {type(value).__name__}; takes an int")
    return int(value)


def _as_integers(values: Any, name: str) -> np.ndarray:
    """`values` as a 1-D int64 array; refuses what is not made of integers."""
    try:
        array = np.asarray(values)
    except (ValueError, TypeError) as error:
        raise TypeError(f"{name}: takes a 1-D sequence of integers on the CPU ({error})") from error
    if array.ndim != 1:
        raise ValueError(f"{name}: got shape {array.shape}; takes one dimension")
    if array.size == 0:
        return np.zeros(0, np.int64)
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{name}: got {array.dtype}; takes integers")
    return array.astype(np.int64, copy=False)


def _abridged(values: Tensor) -> str:
    """A 1-D tensor as text, short enough for a message."""
    shown = values.tolist() if values.numel() <= 8 else [*values[:4].tolist(), "...", *values[-3:].tolist()]
    return "[" + ", ".join(map(str, shown)) + "]"
