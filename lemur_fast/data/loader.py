"""From rows of segments to packed batches: the last stretch of the data pipeline, the only one that reads tokens."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lemur_fast import packing
from lemur_fast.data.mixture import Mixture, MixtureState, Row, Segments, members
from lemur_fast.data.store import Documents
from lemur_fast.packing import PackedBatch, Segment

_HELD_OUT_SEED = 0  # never the run's: the same documents are asked of every run


def packed(documents: Documents, row: Row, row_tokens: int) -> PackedBatch:
    """Read the segments of one row; every segment is a document of the batch, padded to `row_tokens`."""
    segments = [torch.from_numpy(documents.tokens(*segment)) for segment in row]
    masks = [documents.trained(*segment) for segment in row]
    return PackedBatch.from_documents(segments, masks, pad_to=row_tokens)


class Loader(Iterator[tuple[list[Row], list[PackedBatch]]]):
    """The steps of a run: for each, the rows it reads and the micro-batches of this process, one per row.

    Every process walks through the rows of all, which are but lengths, and reads the tokens of its own: row i belongs
    to process i modulo their number. So the rows of a step do not depend on how many processes share them. Where that
    number does not divide them, the last micro-batch of some processes is empty.

    The next step is read by a thread while this one is trained on, so the mixture is a step ahead: where a run stands,
    `state` says, and it counts only what was handed out.
    """

    def __init__(
        self, documents: Documents, mixture: Mixture, rows_per_step: int, rank: int = 0, processes: int = 1
    ) -> None:
        """Read `rows_per_step` rows for every step.

        Raises:
            ValueError: there are more processes than rows.
        """
        if processes > rows_per_step:
            raise ValueError(f"a step of {rows_per_step} rows cannot be shared by {processes} processes")
        self.documents, self.mixture, self.rows_per_step = documents, mixture, rows_per_step
        self.rank, self.processes = rank, processes
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._state = mixture.state()
        self._ahead = self._reader.submit(self._read)

    def __next__(self) -> tuple[list[Row], list[PackedBatch]]:
        rows, batches, self._state = self._ahead.result()
        self._ahead = self._reader.submit(self._read)
        return rows, batches

    def _read(self) -> tuple[list[Row], list[PackedBatch], MixtureState]:
        rows = [next(self.mixture) for _ in range(self.rows_per_step)]
        batches = [packed(self.documents, row, self.mixture.row_tokens) for row in self._own(rows)]
        return rows, batches, self.mixture.state()

    def tags(self, rows: list[Row]) -> list[Tensor]:
        """For each micro-batch of this process the source of every token, int64 [T]; padding counts as source 0."""
        tags = []
        for row in self._own(rows):
            segments = np.array(row, np.int64).reshape(-1, 3)  # document, start, length
            tag = np.repeat(self.documents.source_codes[segments[:, 0]].astype(np.int64), segments[:, 2])
            tags.append(torch.from_numpy(np.pad(tag, (0, self.mixture.row_tokens - len(tag)))))
        return tags

    def names(self, rows: list[Row]) -> list[str]:
        """Names of the documents that rows are made of, sorted."""
        return sorted({self.documents.name(segment.document) for row in rows for segment in row})

    def _own(self, rows: list[Row]) -> list[Row]:
        own = rows[self.rank :: self.processes]
        return own if len(own) == -(-len(rows) // self.processes) else [*own, []]

    def state(self) -> MixtureState:
        """Where the loader stands: after the steps that it handed out."""
        return self._state

    def load_state(self, state: MixtureState) -> None:
        """Continue from `state`."""
        self._ahead.cancel()
        wait([self._ahead])
        self.mixture.load_state(state)
        self._state = self.mixture.state()
        self._ahead = self._reader.submit(self._read)


@dataclass
class HeldOut:
    """Held-out documents of one kind, packed, and the size of the text that the model has to predict in them."""

    kind: str
    batches: list[PackedBatch]
    tokens: int
    """Tokens to predict."""
    bytes: int
    """Bytes of UTF-8 that these tokens spell."""


def held_out_batches(
    documents: Documents, kind: str, tokens: int, row_tokens: int, tokenizer: PreTrainedTokenizerBase
) -> HeldOut:
    """About `tokens` held-out tokens of a kind or source; the same documents for every run on the same store.

    Raises:
        ValueError: there are none.
    """
    of_kind = members(documents, kind)
    segments = Segments.cut(of_kind, documents.lengths[of_kind], row_tokens)
    if not len(segments):
        raise ValueError(f"no held-out documents of kind {kind!r}: the corpus is too small, or its held_out share is")
    order = np.random.default_rng(_HELD_OUT_SEED).permutation(len(segments))
    enough = int(np.searchsorted(np.cumsum(segments.length[order]), tokens)) + 1
    pool = [segments[int(index)] for index in order[:enough]]
    plan = packing.plan(
        np.array([segment.length for segment in pool]), row_tokens, strategy="best_fit", overlong="error"
    )
    rows = [[pool[document] for document, _, _ in batch] for batch in plan]
    batches = [packed(documents, row, row_tokens) for row in rows]
    predicted = sum(int(batch.num_items) for batch in batches)
    return HeldOut(kind, batches, predicted, sum(_predicted_bytes(documents, segment, tokenizer) for segment in pool))


def _predicted_bytes(documents: Documents, segment: Segment, tokenizer: PreTrainedTokenizerBase) -> int:
    """Bytes that the trained tokens of a segment spell, but for its first: that has nothing to be predicted from."""
    ids, trained = documents.tokens(*segment), documents.trained(*segment)
    spelled = (ids[trained], ids[:1][trained[:1]])
    whole, first = (str(tokenizer.decode(part, skip_special_tokens=True)) for part in spelled)
    return len(whole.encode()) - len(first.encode())
