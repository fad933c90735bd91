"""Write beside, then rename: a file or folder is either whole or not there, whenever the process dies."""

import json
import os
import platform
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LOCK = ".lock"
"""In the folder of a run or a corpus, held by the process that is at work there."""


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


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keep other processes from working in the folder of a run or a corpus; what a killed one left half written goes.

    The system itself gives the folder free when the process ends, however it does.

    Raises:
        FileExistsError: another process is at work there.
    """
    import fcntl  # here, since only this needs it, and not every system has it

    with (folder / LOCK).open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise FileExistsError(
                f"{folder} is in use by {lock.read() or 'another process'}; choose another --out"
            ) from None
        except OSError as error:  # some cluster file systems have no locks
            warnings.warn(f"{folder} cannot be locked ({error.strerror}): no second process may use it", stacklevel=2)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {platform.node()}")
        lock.flush()
        for left in (*folder.glob(".*.partial*"), *folder.glob(".*.old")):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink()
        yield
