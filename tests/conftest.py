"""Fixtures and the error criterion that all tests share."""

from __future__ import annotations

import os
import tempfile

import pytest
import torch

# Tests meet networks nowhere: a hub look-up would be a defect of the test.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Nor do they read or write what the user tuned: here, in subprocesses, and while tests are collected.
_cache = tempfile.TemporaryDirectory(prefix="lemur_fast-tests-")
os.environ["XDG_CACHE_HOME"] = _cache.name

from lemur_fast._triton import INTERPRETING  # noqa: E402 - importing it reads those

if INTERPRETING:  # tests of ops then run through Triton's kernels, and watch their memory
    from tests.interpreter import mend

    mend()

slow_compiled = () if INTERPRETING else pytest.mark.slow
"""Marks a test of kernels that is quick in the interpreter, and slow where it compiles and executes machine code."""


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
