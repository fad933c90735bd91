from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lemur_fast.data.sources import Source
from lemur_fast.data.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return load_tokenizer()


@pytest.fixture
def source() -> Callable[..., Source]:
    """Makes a source of given texts; None stands for a file that cannot be read."""

    def make(name: str, kind: str, texts: list[str | None]) -> Source:
        def read() -> Iterator[tuple[str, str | None, str]]:
            for index, text in enumerate(texts):
                yield f"{index}.txt", text, "CC0-1.0"

        return Source(name, kind, origin="a test", licence="CC0-1.0", read=read)

    return make
