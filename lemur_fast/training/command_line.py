"""The command line of the recipes: tyro's, without what it drops in silence."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

T = TypeVar("T")


def parse_settings(settings: type[T], argv: Sequence[str] | None = None, **options: Any) -> T:
    """`tyro.cli`, which leaves with code 2 when an option is given twice: of the two, tyro takes the last.

    Args:
        settings: a dataclass.
        argv: arguments; those of the process by default.
        options: for `tyro.cli`.
    """
    argv = sys.argv[1:] if argv is None else argv
    names = [word.partition("=")[0].replace("_", "-") for word in argv if word.startswith("--")]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        print(
            f"{Path(sys.argv[0]).stem}: {repeated} is given {names.count(repeated)} times; give it once. "
            f"Where it takes several values, they follow it: {repeated} A B",
            file=sys.stderr,
        )
        raise SystemExit(2)
    return tyro.cli(settings, args=argv, **options)
