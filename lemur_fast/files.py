"""Write beside, then rename: a file or folder is either whole or not there, whenever the process dies."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def staged_folder(target: str | Path, replace: bool = False) -> Iterator[Path]:
    """A fresh folder beside `target` to fill; it takes `target`'s place when the block ends well, and goes otherwise.

    Raises:
        FileExistsError: `target` exists and is not an empty folder, and is not to be replaced.
    """
    target = Path(target)
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    taken = target.exists() and (not target.is_dir() or any(target.iterdir()))
    if taken and not replace:
        raise FileExistsError(f"{target} exists already")
    staging = target.with_name(f".{target.name}.{os.getpid()}.partial")
    staging.mkdir(parents=True)
    try:
        yield staging
        if taken:
            target.replace(old)
        staging.replace(target)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


@contextmanager
def staged_file(target: str | Path) -> Iterator[Path]:
    """A path beside `target`, with the same suffix, to write; it replaces `target` when the block ends well."""
    target = Path(target)
    staging = target.with_name(f".{target.stem}.{os.getpid()}.partial{target.suffix}")
    try:
        yield staging
        staging.replace(target)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise


def write_text(target: str | Path, text: str) -> None:
    """Write a UTF-8 file that is either whole or not there."""
    with staged_file(target) as staging:
        staging.write_text(text, encoding="utf-8")


def write_json(target: str | Path, content: Any) -> None:
    """`write_text` of JSON; what JSON does not know, such as a path, is written as its `str`."""
    write_text(target, json.dumps(content, indent=2, default=str) + "\n")
