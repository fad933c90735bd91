"""Tests of the Triton kernels themselves, in the interpreter: ``TRITON_INTERPRET=1 python -m pytest tests/kernels``."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import INTERPRETING

REASON = "Triton runs its kernels on the CPU only under TRITON_INTERPRET=1, which has to be set before the start"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if not INTERPRETING and here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=REASON))
