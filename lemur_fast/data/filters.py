"""Filters: each takes a document and says why it is dropped, or None to keep it.

A filter sees the documents of all sources in one fixed order, so what it drops does not depend on anything but the
corpus. It may remember what it saw: the first of several equal documents is the one that stays.
"""

import hashlib
from typing import Protocol

from lemur_fast.data.sources import Document


class Filter(Protocol):
    """One reason, or several, to drop documents."""

    def __call__(self, document: Document) -> str | None:
        """The reason to drop `document` (a few words, counted per source in the manifest), or None to keep it."""
        ...


def text_digest(text: str) -> bytes:
    """16 bytes that stand for a text: equal texts, however they end, have equal digests."""
    return hashlib.blake2b(text.strip().encode(), digest_size=16).digest()


class DropEmpty:
    """Documents of nothing but whitespace (the standard library has many an empty `__init__.py`)."""

    def __call__(self, document: Document) -> str | None:
        """Drop as "empty"."""
        return None if document.text.strip() else "empty"


class DropExactDuplicates:
    """Documents equal to an earlier one, of any source; holds 16 bytes for each document kept."""

    def __init__(self) -> None:
        self.seen: set[bytes] = set()

    def __call__(self, document: Document) -> str | None:
        """Drop as "exact duplicate"."""
        digest = text_digest(document.text)
        if digest in self.seen:
            return "exact duplicate"
        self.seen.add(digest)
        return None
