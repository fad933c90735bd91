"""Broken machine code of ``csrc/cuda`` is noticed: mutants of what nvcc makes, judged as Triton's are.

``python -m pytest -m "" tests/cuda/test_mutations.py`` tests; ``python -m tests.cuda.test_mutations`` prints the score.
"""

from __future__ import annotations

import functools
import shutil

import pytest
import torch

from benchmarks.gpu_static import CUDA
from tests.conftest import INTERPRETING
from tests.cuda.simulated import simulated
from tests.kernels import test_mutations as judged

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH"),
    pytest.mark.skipif(INTERPRETING, reason="mutates machine code, which the interpreter has none of"),
]

# Sizes for the kernels that move 16 bytes at a time: strides differ, the last packs of a row are not all there, loops
# turn several times and not at all, blocks have from 1 to 16 warps.
OPS = {
    "rms_norm": functools.partial(
        judged.norm_trials, shapes=((7, 5000), (41, 2056), (3, 40)), strides=(8, 16, 24, 32)
    ),
    "cross_entropy": functools.partial(judged.cross_entropy_trials, widths=(8308, 3060, 2036, 20), apart=(12, 0)),
    "swiglu": functools.partial(judged.swiglu_trials, widths=(2056, 8104), strides=(8, 16, 24)),
    "rotary": functools.partial(judged.rotary_trials, shapes=((3, 120, 60), (40, 7, 3))),
}
SIZES = {"rms_norm": 3, "cross_entropy": 4, "swiglu": 2, "rotary": 2}


def trials_of(op: str) -> list[list[judged.Trial]]:
    """Runs an op with all its sizes, and returns its launches: those of each kernel are one program."""
    found = []
    for sizes in range(SIZES[op]):
        torch.manual_seed(0)
        with simulated() as launches:
            found.append(OPS[op](CUDA, "sm_80", launches, sizes))
    by_kernel = [list(trials) for trials in zip(*found, strict=True)]
    for first, *others in by_kernel:
        assert all(other.ptx == first.ptx for other in others), first.kernel
    return by_kernel
