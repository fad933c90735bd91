"""The mixture: which segments of which documents a run reads, in which packed row, in which order.

    documents of every kind
      1  cut into segments of at most `row_tokens` tokens
      2  shuffled, kind by kind, anew in every epoch
      3  drawn by tokens: always from the kind that is furthest behind its weight
      4  packed, a window of rows at a time, without cutting any segment again
      5  the rows of a window: shuffled, then put in the order that keeps the mixture from row to row

Only lengths are looked at here; the tokens are read when a row is. The order is a pure function of (seed, position):
two mixtures of the same store, weights and seed give the same rows, and `state()` returns to any of them.
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


class Mixture(Iterator[Row]):
    """An endless stream of packed rows in which every kind has its share of the tokens."""

    def __init__(self, documents: Documents, weights: Mapping[str, float], row_tokens: int, seed: int) -> None:
        """Mix `documents`.

        Args:
            documents: a split of a token store.
            weights: share of the tokens for each kind, in any unit; kinds with 0, or not named, are left out.
            row_tokens: tokens in a full row.
            seed: decides the order.

        Raises:
            ValueError: a weight is negative or all are 0, or a kind has nothing to draw.
        """
        self.segments: dict[str, Segments] = {}
        for kind, weight in weights.items():
            if not weight >= 0:
                raise ValueError(f"mixture: the weight of {kind!r} must not be negative, got {weight}")
        weights = {kind: weight for kind, weight in weights.items() if weight > 0}
        if not weights:
            raise ValueError("mixture: no kind has a weight above 0")
        for kind in weights:
            of_kind = np.flatnonzero(documents.kinds == kind)
            self.segments[kind] = Segments.cut(of_kind, documents.lengths[of_kind], row_tokens)
            if not len(self.segments[kind]):
                there = sorted(set(documents.kinds.tolist())) or "none"
                raise ValueError(
                    f"the mixture asks for {kind!r}, of which the store has no tokens (kinds in it: {there})"
                )
        total = sum(weights.values())
        self.weights = {kind: weight / total for kind, weight in weights.items()}
        self.row_tokens, self.seed = row_tokens, seed
        self.kinds = documents.kinds
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
        if self._orders.get(kind, (None,))[0] != epoch:
            salt = list(self.weights).index(kind) + 1
            self._orders[kind] = (epoch, np.random.default_rng([self.seed, salt, epoch]).permutation(len(segments)))
        return segments[int(self._orders[kind][1][index])]
