"""The ops under pytest-benchmark: for its statistics, histograms and comparisons with earlier runs of one's own.

    python -m pytest benchmarks/test_ops.py                                  # the small shapes
    python -m pytest benchmarks/test_ops.py -k "swiglu and lemur_fast" --benchmark-autosave
    python -m pytest benchmarks/test_ops.py --benchmark-compare              # with the run saved last

The cases, rivals and checks are those of `benchmarks.ops`. That program times its rivals in turns, which is what a
comparison between them should rest on; here each is timed by itself, one after the other. No part of the test suite:
pytest collects it when it is named.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import ops, peers

CPU = torch.device("cpu")
CASES = {f"{case.name}, {case.shape}": case for case in ops.cases("small", CPU)}


@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize(
    ("name", "rival"), [(name, rival) for name, case in CASES.items() for rival in peers.OPS[case.name]]
)
def test_op(benchmark, name, rival, direction):
    """One rival, in bfloat16; a wrong result is a failure, not a time."""
    case = CASES[name]
    found, missing = peers.functions(case.name, CPU)
    if rival in missing:
        pytest.skip(missing[rival])
    assert ops.check(case, found[rival], "bfloat16", CPU) == ""
    benchmark.group = f"{name}, {direction}"
    size = torch.bfloat16.itemsize
    moved = case.forward + (case.backward if direction == "both" else 0)
    benchmark.extra_info |= {"bytes": moved * size, "flops": case.flops}
    inputs = ops.make_inputs(case, case.rows, torch.bfloat16, CPU)
    if direction == "forward":
        benchmark(found[rival], *inputs)
    else:
        benchmark(ops.run_of(case, found[rival], inputs), lambda: None)
