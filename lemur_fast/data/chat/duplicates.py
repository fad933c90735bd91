"""Exact and near duplicates among conversations, told as those of the corpus are: see `lemur_fast.data.dedup`.

    keep       conversations of all sources, read once, on the disk; digests and signatures in memory
    equal      a copy of an earlier one: the same messages by the same roles
    near       like an earlier one that stays, by exact Jaccard similarity of 5-word shingles

Near duplicates are told by what is learned: the exchanges whose answer is trained on must be alike, and so must their
answers alone, or one long question would stand for all the answers that it got. System messages, which whole data sets
share, and exchanges that are there for their context do not count.

Conversations of fewer than 10 words, such as greetings, are dropped only as exact copies. They have at most 5 shingles:
any other word makes them unlike at 0.7 anyway, and what words do not tell, "C" from "C++", is much of what they say.
"""

import functools
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from lemur_fast.data import dedup
from lemur_fast.data.chat.conversation import Conversation, Message, text
from lemur_fast.data.shingles import shingles, words_of

MIN_WORDS = 10
"""Words of a conversation from which on it may be a near duplicate."""
_CHUNK = 256  # conversations looked at together
_PAIRS = 4096  # compared between two steps of the progress bar
_SCHEMA = pa.schema(
    {
        "name": pa.string(),
        "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string(), "trained": pa.bool_()})),
    }
)


class Kept:
    """Conversations in a file, numbered in the order in which they came; about 200 bytes of each are held in memory."""

    def __init__(self, path: Path) -> None:
        """Keep them in a new file at `path`."""
        self._path, self._writer, self._count = path, pa.ipc.new_stream(path, _SCHEMA), 0
        self._digests: list[bytes] = []
        self._keys = [np.empty((0, dedup.BANDS), np.uint64)]
        self._comparable = [np.empty(0, np.int64)]

    def add(self, conversations: Iterable[Conversation]) -> range:
        """Write conversations, note what duplicates are told by, and return their numbers."""
        begin = self._count
        for chunk in chunks(conversations):
            messages = [[vars(message) for message in each.messages] for each in chunk]
            columns = {"name": [each.name for each in chunk], "messages": messages}
            self._writer.write_batch(pa.RecordBatch.from_pydict(columns, _SCHEMA))
            self._digests += [dedup.text_digest(text(each)) for each in chunk]
            texts = [learned(each) for each in chunk]
            enough = [row for row, each in enumerate(texts) if len(words_of(each)) >= MIN_WORDS]
            self._keys.append(dedup.band_keys([texts[row] for row in enough])[0])
            self._comparable.append(self._count + np.array(enough, np.int64))
            self._count += len(chunk)
        return range(begin, self._count)

    @functools.cached_property
    def _table(self) -> pa.Table:
        """What was written, mapped into memory; nothing can be added any more."""
        self._writer.close()
        with pa.memory_map(str(self._path)) as file:
            return pa.ipc.open_stream(file).read_all()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Conversation:
        messages = self._table.column("messages")[number].as_py()
        return Conversation(tuple(Message(**each) for each in messages), self._table.column("name")[number].as_py())

    def duplicates(self, threshold: float) -> dict[int, str]:
        """Numbers of the conversations to drop, and why.

        Args:
            threshold: Jaccard similarity from which on an earlier conversation is a near duplicate; 0: none is.
        """
        digests = np.frombuffer(b"".join(self._digests), np.uint64).reshape(-1, 2)
        copies = dedup.equal(digests, np.arange(len(self)))[:, 0]
        dropped = dict.fromkeys(copies.tolist(), "exact duplicate")
        if threshold:
            numbers, keys = np.concatenate(self._comparable), np.concatenate(self._keys)
            unique = ~np.isin(numbers, copies)
            pairs = [dedup.candidates(band[unique], numbers[unique]) for band in keys.T]
            found = list(self._alike(np.unique(np.concatenate(pairs), axis=0), threshold))
            alike = np.array([pair[:2] for pair in found], np.int64).reshape(-1, 2)
            near, _ = dedup.resolve(alike, np.array([pair[2] for pair in found]))
            dropped |= dict.fromkeys(near[:, 0].tolist(), "near duplicate")
        return dropped

    def _alike(self, pairs: np.ndarray, threshold: float) -> Iterator[tuple[int, int, float]]:
        def answers(number: int) -> np.ndarray:
            return np.unique(shingles([learned(self[number], questions=False)])[0])

        with tqdm(desc="near duplicates", total=len(pairs), unit=" pairs", leave=False, disable=None) as bar:
            for begin in range(0, len(pairs), _PAIRS):
                block = pairs[begin : begin + _PAIRS]
                for later, earlier, similarity in dedup.verified(block, self._learned, threshold):
                    if dedup.jaccard(answers(later), answers(earlier)) >= threshold:
                        yield later, earlier, similarity
                bar.update(len(block))

    def _learned(self, number: int) -> str:
        return learned(self[number])


def learned(conversation: Conversation, questions: bool = True) -> str:
    """The answers that are trained on, each with the user's message before it unless `questions` is False."""
    lines = []
    for message, after in zip(conversation.messages, (*conversation.messages[1:], None), strict=True):
        answered = after if message.role == "user" and questions else message
        if answered is not None and answered.role == "assistant" and answered.trained:
            lines.append(message.content.strip())
    return "\n".join(lines)


def chunks(conversations: Iterable[Conversation]) -> Iterator[list[Conversation]]:
    """The conversations in lists of 256."""
    chunk: list[Conversation] = []
    for conversation in conversations:
        chunk.append(conversation)
        if len(chunk) == _CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
