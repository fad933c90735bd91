"""The corpus that every Python installation carries: code and text, nothing to download."""

import importlib.metadata
import importlib.util
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from lemur_fast.data.sources import Generated, Source, decode

# Directories of the standard library that hold no code to learn from: tests, other people's packages, build files,
# text in the shape of code (pydoc_data) and generated character tables (encodings).
_NOT_CODE = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data", "encodings"}


def _standard_library() -> Path:
    return Path(sysconfig.get_path("stdlib"))  # of the base Python, also inside a virtual environment


def _read_text(path: Path) -> str | None:
    try:
        return decode(path.read_bytes(), python=path.suffix == ".py")[0]
    except OSError:
        return None


def _read_standard_library() -> Iterator[tuple[str, str | None, str]]:
    root = _standard_library()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _NOT_CODE.isdisjoint(relative.parts) and not relative.parts[0].startswith(("config-", "_sysconfigdata")):
            yield relative.as_posix(), _read_text(path), "PSF-2.0"


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
    """The standard library's code, Python's documentation, and the READMEs of installed packages."""
    return [
        Generated(
            name="python-stdlib",
            kind="code",
            origin=f"standard library of this Python, without tests and generated tables ({_standard_library()})",
            licence="PSF-2.0",
            documents=_read_standard_library,
        ),
        Generated(
            name="python-docs",
            kind="text",
            origin="pydoc_data/topics.py (the language reference) and idlelib/*.txt of this Python",
            licence="PSF-2.0",
            documents=_read_python_documentation,
        ),
        Generated(
            name="package-readmes",
            kind="text",
            origin="descriptions (READMEs) of the packages installed beside this one",
            licence="each package's own, noted document by document",
            documents=_read_package_readmes,
        ),
    ]
