"""The mixture: which segments of which documents a run reads, in which packed row, in which order.

    documents of every kind
      1  cut into segments of at most `row_tokens` tokens
      2  shuffled, kind by kind, anew in every epoch
      3  drawn by tokens: always from the kind that is furthest behind its weight
      4  packed, a window of rows at a time, without cutting any segment again
      5  the rows of a window: shuffled, then put in the order that keeps the mixture from row to row

What is weighed is a kind, or a source by its name. Only lengths are looked at here; the tokens are read when a row is.
The order is a pure function of (seed, position): two mixtures of the same store, weights and seed give the same rows,
and `state()` returns to any of them. In memory a segment takes 32 bytes, and a document 8.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

from lemur_fast import packing
from lemur_fast.data.store import Documents
from lemur_fast.packing import Segment

WINDOW_ROWS = (
    64  # rows packed together: enough short segments at hand to fill the rows, few enough to plan in an instant
)

Row = list[Segment]


class MixtureState(TypedDict):
    """Where a mixture stands: everything that its next row depends on, beside the store, the weights and the seed."""

    window: int
    """Index of the window that is being read."""
    row: int
    """How many of that window's rows are read."""
    drawn: dict[str, int]
    """Segments drawn from each kind before that window, all epochs together."""
    tokens: dict[str, int]
    """Tokens drawn from each kind before that window."""
    held_over: list[tuple[int, int, int]]
    """Segments drawn before that window that found no full row."""


@dataclass(frozen=True)
class Segments:
    """All segments of one kind, [N] each."""

    document: np.ndarray
    start: np.ndarray
    length: np.ndarray

    @classmethod
    def cut(cls, documents: np.ndarray, lengths: np.ndarray, row_tokens: int) -> "Segments":
        """Cut documents (indices [D], lengths [D]) into segments of `row_tokens` and a rest.

        A segment of one token is left out: it has no next token to learn from.
        """
        counts = -(-lengths // row_tokens)
        document = np.repeat(documents, counts)
        first = np.repeat(np.cumsum(counts) - counts, counts)
        start = (np.arange(len(document)) - first) * row_tokens
        length = np.minimum(np.repeat(lengths, counts) - start, row_tokens)
        useful = length > 1
        return cls(document[useful], start[useful], length[useful])

    def __len__(self) -> int:
        return len(self.document)

    def __getitem__(self, index: int) -> Segment:
        return Segment(int(self.document[index]), int(self.start[index]), int(self.length[index]))


def members(documents: Documents, name: str) -> np.ndarray:
    """Numbers of the documents of a kind, or of a source, int64 [D]."""
    return np.flatnonzero((documents.kinds == name) | (documents.sources == name))


class Mixture(Iterator[Row]):
    """An endless stream of packed rows in which every kind has its share of the tokens."""

    def __init__(self, documents: Documents, weights: Mapping[str, float], row_tokens: int, seed: int) -> None:
        """Mix `documents`.

        Args:
            documents: a split of a token store.
            weights: share of the tokens for each kind, or source, in any unit; what has 0, or is not named, is left
                out.
            row_tokens: tokens in a full row.
            seed: decides the order.

        Raises:
            ValueError: a weight is negative or all are 0, a kind has nothing to draw, or a document is weighed twice.
        """
        self.segments: dict[str, Segments] = {}
        for kind, weight in weights.items():
            if not weight >= 0:
                raise ValueError(f"mixture: the weight of {kind!r} must not be negative, got {weight}")
        weights = {kind: weight for kind, weight in weights.items() if weight > 0}
        if not weights:
            raise ValueError("mixture: no kind has a weight above 0")
        self.kinds = np.full(len(documents.lengths), None, object)
        for kind in weights:
            of_kind = members(documents, kind)
            self.segments[kind] = Segments.cut(of_kind, documents.lengths[of_kind], row_tokens)
            if not len(self.segments[kind]):
                there = sorted(set(documents.kinds.tolist()))
                raise ValueError(
                    f"the mixture asks for {kind!r}, of which the store has no tokens (kinds in it: {there or 'none'}; "
                    f"sources: {sorted(set(documents.sources.tolist())) or 'none'}); name what is there, as in "
                    f"--mixture {there[0] if there else 'text'} 1"
                )
            others = set(self.kinds[of_kind].tolist()) - {None}
            if others:
                raise ValueError(
                    f"mixture: documents of {kind!r} are weighed as {others.pop()!r}, too; name one of them"
                )
            self.kinds[of_kind] = kind
        total = sum(weights.values())
        self.weights = {kind: weight / total for kind, weight in weights.items()}
        self.row_tokens, self.seed = row_tokens, seed
        self.sources = documents.sources
        self._orders: dict[str, tuple[int, np.ndarray]] = {}  # kind -> epoch, its order
        zeros = dict.fromkeys(self.weights, 0)
        self.load_state({"window": 0, "row": 0, "drawn": dict(zeros), "tokens": dict(zeros), "held_over": []})

    def state(self) -> MixtureState:
        """Where the stream stands; plain data, made for JSON."""
        start = self._window_start
        return {**start, "row": self._row, "drawn": dict(start["drawn"]), "tokens": dict(start["tokens"])}

    def load_state(self, state: MixtureState) -> None:
        """Continue from `state`, which a mixture of the same store, weights and seed gave."""
        self._window_start: MixtureState = {**state, "row": 0}
        self._rows, self._next = self._plan(self._window_start)
        self._row = state["row"]

    def __next__(self) -> Row:
        """The next row: segments of together at most `row_tokens` tokens."""
        if self._row == len(self._rows):
            self.load_state(self._next)
        self._row += 1
        return self._rows[self._row - 1]

    def tokens(self, rows: list[Row]) -> dict[str, int]:
        """Tokens of each kind in some rows."""
        counts = dict.fromkeys(self.weights, 0)
        for row in rows:
            for segment in row:
                counts[self.kinds[segment.document]] += segment.length
        return counts

    def epochs(self, tokens: Mapping[str, float]) -> dict[str, float]:
        """How often each kind's documents are read when so many of their tokens are; above 1, they repeat."""
        return {kind: count / int(self.segments[kind].length.sum()) for kind, count in tokens.items()}

    def sources_read(self, state: MixtureState) -> dict[str, dict[str, float]]:
        """For each source the `tokens` read up to `state`, and the `epochs` that they are."""
        rows, after = self._plan({**state, "row": 0})
        # Drawn for this window, or for the next, and not given out.
        unread = [*after["held_over"], *(segment for row in rows[state["row"] :] for segment in row)]
        counts: dict[str, int] = {}
        totals: dict[str, int] = {}
        for kind, segments in self.segments.items():
            epochs, rest = divmod(after["drawn"][kind], len(segments))
            begun = self._order(kind, epochs)[:rest]
            sources = self.sources[segments.document]
            for source in dict.fromkeys(sources.tolist()):
                of = np.where(sources == source, segments.length, 0)
                totals[source] = totals.get(source, 0) + int(of.sum())
                counts[source] = counts.get(source, 0) + epochs * int(of.sum()) + int(of[begun].sum())
        for document, _, length in unread:
            counts[self.sources[document]] -= length
        return {source: {"tokens": count, "epochs": count / totals[source]} for source, count in counts.items()}

    def _plan(self, start: MixtureState) -> tuple[list[Row], MixtureState]:
        """The rows of the window that begins at `start`, and the state after it."""
        drawn, tokens = dict(start["drawn"]), dict(start["tokens"])
        pool = [Segment(*segment) for segment in start["held_over"]]
        room = WINDOW_ROWS * self.row_tokens - sum(segment.length for segment in pool)
        while room > 0:
            kind = min(self.weights, key=lambda k: tokens[k] / self.weights[k])
            segment = self._segment(kind, drawn[kind])
            pool.append(segment)
            drawn[kind] += 1
            tokens[kind] += segment.length
            room -= segment.length
        plan = packing.plan(
            np.array([segment.length for segment in pool]), self.row_tokens, strategy="best_fit", overlong="error"
        )
        rows = [[pool[document] for document, _, _ in batch] for batch in plan]
        # The row that the last segments left half empty waits for the next window: rows to train on are full.
        held_over = rows.pop(int(np.argmin([sum(segment.length for segment in row) for row in rows])))
        after: MixtureState = {
            "window": start["window"] + 1,
            "row": 0,
            "drawn": drawn,
            "tokens": tokens,
            "held_over": [(document, begin, length) for document, begin, length in held_over],
        }
        return self._ordered(rows, start["window"]), after

    def _ordered(self, rows: list[Row], window: int) -> list[Row]:
        """Rows in random order, but always next the one that brings the tokens read so far nearest to the weights."""
        shuffled = [rows[index] for index in np.random.default_rng([self.seed, 0, window]).permutation(len(rows))]
        weights = np.array(list(self.weights.values()))
        counts = np.array([list(self.tokens([row]).values()) for row in shuffled])  # [R, K]
        ordered, read, left = [], np.zeros(len(weights)), np.ones(len(rows), bool)
        for _ in rows:
            after = read + counts
            off = np.abs(after / after.sum(1, keepdims=True) - weights).sum(1)
            choice = int(np.argmin(np.where(left, off, np.inf)))
            ordered.append(shuffled[choice])
            read, left[choice] = after[choice], False
        return ordered

    def _segment(self, kind: str, position: int) -> Segment:
        """The segment at `position` of a kind's endless stream of epochs."""
        segments = self.segments[kind]
        epoch, index = divmod(position, len(segments))
        return segments[int(self._order(kind, epoch)[index])]

    def _order(self, kind: str, epoch: int) -> np.ndarray:
        """The order of a kind's segments in an epoch; that of the latest epoch asked for is remembered."""
        known, order = self._orders.get(kind, (None, None))
        if order is None or known != epoch:
            salt = list(self.weights).index(kind) + 1
            order = np.random.default_rng([self.seed, salt, epoch]).permutation(len(self.segments[kind]))
            self._orders[kind] = (epoch, order)
        return order
