"""Sources: where documents come from, under which licence, and what is left out before anything else looks at them.

A source is a name, a kind (what the mixture weighs: "code" or "text"), an origin and a licence that a reader can check,
and a function that reads its documents anew each time it is called.
"""

import importlib.metadata
import importlib.util
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Document:
    """One document as its source gives it."""

    text: str
    name: str
    """Where in the source it comes from: a path or a title."""
    source: str
    kind: str
    licence: str


@dataclass(frozen=True)
class Source:
    """Documents of one origin and one kind."""

    name: str
    kind: str
    """What the mixture weighs: "code" or "text"."""
    origin: str
    licence: str
    read: Callable[[], Iterator[tuple[str, str | None, str]]]
    """Yields (name, text, licence) for every document; text is None when the file cannot be read as text."""

    def documents(self) -> Iterator[Document | None]:
        """Every document; None in the place of one that cannot be read."""
        for name, text, licence in self.read():
            readable = text is not None and _is_unicode(text)
            yield Document(text, name, self.name, self.kind, licence) if readable else None  # type: ignore[arg-type]


def _is_unicode(text: str) -> bool:
    """Whether text can be written as UTF-8: a str may hold lone surrogates, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


# Directories of the standard library that hold no code to learn from: tests, other people's packages, build files,
# text in the shape of code (pydoc_data) and generated character tables (encodings).
_NOT_CODE = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data", "encodings"}


def _standard_library() -> Path:
    return Path(sysconfig.get_path("stdlib"))  # of the base Python, also inside a virtual environment


def _read_python(path: Path) -> str | None:
    try:
        with tokenize.open(path) as file:  # honours the encoding line that a Python file may declare
            return file.read()
    except (OSError, SyntaxError, UnicodeDecodeError):
        return None


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _read_standard_library() -> Iterator[tuple[str, str | None, str]]:
    root = _standard_library()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _NOT_CODE.isdisjoint(relative.parts) and not relative.parts[0].startswith(("config-", "_sysconfigdata")):
            yield relative.as_posix(), _read_python(path), "PSF-2.0"


def _read_python_documentation() -> Iterator[tuple[str, str | None, str]]:
    if importlib.util.find_spec("pydoc_data.topics"):
        from pydoc_data.topics import topics

        for title, text in sorted(topics.items()):
            yield f"topics/{title}", text, "PSF-2.0"
    root = _standard_library()
    for path in sorted((root / "idlelib").glob("*.txt")):
        yield path.relative_to(root).as_posix(), _read_text(path), "PSF-2.0"


def _read_package_readmes() -> Iterator[tuple[str, str | None, str]]:
    installed = {dist.metadata["Name"].lower(): dist.metadata for dist in importlib.metadata.distributions()}
    for name, metadata in sorted(installed.items()):
        licence = metadata["License-Expression"] or metadata["License"] or "as the package states"
        text = metadata.json.get("description")
        if isinstance(text, str) and text.strip() not in ("", "UNKNOWN"):
            # A licence field may hold the whole licence text: its first line names it.
            yield f"{name}-{metadata['Version']}", text, licence.strip().splitlines()[0][:80]


def embedded_sources() -> list[Source]:
    """The corpus that every Python installation carries: code and text, nothing to download."""
    return [
        Source(
            name="python-stdlib",
            kind="code",
            origin=f"standard library of this Python, without tests and generated tables ({_standard_library()})",
            licence="PSF-2.0",
            read=_read_standard_library,
        ),
        Source(
            name="python-docs",
            kind="text",
            origin="pydoc_data/topics.py (the language reference) and idlelib/*.txt of this Python",
            licence="PSF-2.0",
            read=_read_python_documentation,
        ),
        Source(
            name="package-readmes",
            kind="text",
            origin="descriptions (READMEs) of the packages installed beside this one",
            licence="each package's own, noted document by document",
            read=_read_package_readmes,
        ),
    ]
