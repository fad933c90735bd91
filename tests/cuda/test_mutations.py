"""Broken machine code of ``csrc/cuda`` is noticed: mutants of what nvcc makes, judged as Triton's are.

``python -m pytest -m "" tests/cuda/test_mutations.py`` tests; ``python -m tests.cuda.test_mutations`` prints the score.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from collections import Counter

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
SIZES = {
    "rms_norm": ((7, 5000), (41, 2056), (3, 40), (3, 2040), (3, 4000), (3, 1496)),
    "cross_entropy": (8308, 3060, 2036, 20),
    "swiglu": (2056, 8104),
    "rotary": ((3, 120, 60), (40, 7, 3), (60, 2, 1)),
}
OPS = {
    "rms_norm": functools.partial(judged.norm_trials, shapes=SIZES["rms_norm"], strides=(8, 16, 24, 32)),
    "cross_entropy": functools.partial(judged.cross_entropy_trials, widths=SIZES["cross_entropy"], apart=(12, 0)),
    "swiglu": functools.partial(judged.swiglu_trials, widths=SIZES["swiglu"], strides=(8, 16, 24)),
    "rotary": functools.partial(judged.rotary_trials, shapes=SIZES["rotary"]),
}


def trials_of(op: str) -> list[list[judged.Trial]]:
    """Runs an op with all its sizes, and returns its launches: those of each kernel are one program."""
    found = []
    for sizes in range(len(SIZES[op])):
        torch.manual_seed(0)
        with simulated() as launches:
            found.append(OPS[op](CUDA, "sm_80", launches, sizes))
    by_kernel = [list(trials) for trials in zip(*found, strict=True)]
    for first, *others in by_kernel:
        assert all(other.ptx == first.ptx for other in others), first.kernel
    return by_kernel


NVCC = "release 13.0"
"""What compiled the programs of `SURVIVORS`."""

FIRST_TERM = "a sum that begins with 0: its first term alone is the same"
GUARDED_ONE_BY_ONE = "the packs inside are guarded one by one, too"
LOG = "the logarithm of infinity or NaN: no row has such a sum"
NONE_BEGINS_THERE = "a thread's first pair lies below half the head: equality does not occur"
ONE_TURN = "the step of a loop that turns for heads wider than 4,096 alone"

SURVIVORS: dict[tuple[str, str], tuple[int, str]] = {
    ("rms_norm forward", "addend dropped"): (1, FIRST_TERM),
    ("rms_norm backward", "addend dropped"): (1, FIRST_TERM),
    ("rms_norm sum of rows", "sum dropped"): (1, FIRST_TERM),
    ("cross_entropy forward", "branch widened"): (4, f"{GUARDED_ONE_BY_ONE} (3); {LOG} (1)"),
    ("cross_entropy forward", "maximum"): (1, judged.MAXIMUM),
    ("cross_entropy backward", "branch widened"): (2, GUARDED_ONE_BY_ONE),
    ("rotary", "branch widened"): (1, NONE_BEGINS_THERE),
    ("rotary", "factor of an address"): (1, ONE_TURN),
}
"""Mutants that nothing catches, by kernel and kind: how many, and why; each was read in the PTX."""


def nvcc_version() -> str:
    """The words that nvcc says of itself."""
    return subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("op", ["swiglu", *(pytest.param(op, marks=pytest.mark.slow) for op in OPS if op != "swiglu")])
def test_mutants_are_caught(op):
    torch.use_deterministic_algorithms(True)
    for trials in trials_of(op):
        kernel = trials[0].kernel
        found = list(judged.outcomes(trials, judged.mutants_of(trials, lambda kind: True)))
        survived = Counter(outcome.mutant.kind for outcome in found if outcome.how == "survived")
        if NVCC in nvcc_version():
            listed = {kind: count for (name, kind), (count, _) in SURVIVORS.items() if name == kernel}
            assert dict(survived) == listed, [str(o) for o in found if o.how == "survived"]
        valid = sum(outcome.how != "invalid" for outcome in found)
        assert valid >= 20
        assert survived.total() <= (1 - judged.LEAST) * valid, f"{kernel}: {survived.total()} of {valid} survived"


def main() -> None:
    """Prints the score, and what survived."""
    torch.use_deterministic_algorithms(True)
    found: dict[str, list[judged.Outcome]] = {}
    for op in OPS:
        for trials in trials_of(op):
            kernel = trials[0].kernel
            found[kernel] = list(judged.outcomes(trials, judged.mutants_of(trials, lambda kind: True)))
            judged.print_survivors(kernel, found[kernel])
    release = re.search(r"release [\d.]+", nvcc_version())
    assert release
    judged.print_table(f"sm_80, nvcc {release[0]}", found)


if __name__ == "__main__":
    main()
