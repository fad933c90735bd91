from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lemur_fast.data.filters import Quality
from lemur_fast.data.pipeline import Settings
from lemur_fast.data.sources import Generated, Source
from lemur_fast.data.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return load_tokenizer()


@pytest.fixture(scope="session")
def source() -> Callable[..., Source]:
    """Makes a source of given texts; None stands for a file that cannot be read."""

    def make(name: str, kind: str, texts: list[str | None]) -> Source:
        def read() -> Iterator[tuple[str, str | None, str]]:
            for index, text in enumerate(texts):
                yield f"{index}.txt", text, "CC0-1.0"

        return Generated(name, kind, origin="a test", licence="CC0-1.0", documents=read)

    return make


@pytest.fixture(scope="session")
def lenient() -> Callable[..., Settings]:
    """Settings that drop nothing for its looks: texts of tests are short and plain."""

    def make(**settings: Any) -> Settings:
        return Settings(quality=Quality.off(), **settings)

    return make
