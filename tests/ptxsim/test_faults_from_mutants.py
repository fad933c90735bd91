"""Faults that mutants of the kernels' machine code needed: what survived `tests/kernels/test_mutations.py` at first."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptxsim import Fault, Kernel
from tests.ptxsim.snippets import element, entry, module


def launch(lines: list[str], threads: int = 128, shared: int = 8192, **arrays: np.ndarray) -> None:
    text = module(entry(lines, dict.fromkeys(arrays, "u64"), shared=shared))
    Kernel(text).launch((1,), threads, arrays)


@pytest.mark.parametrize("access", ["ld.global.b32 %r0, [%d0];", "st.global.b32 [%d0], %thread;"])
@pytest.mark.parametrize("past", [0, 1 << 10, 1 << 12, 3 << 12])
def test_a_tile_past_the_end_does_not_reach_the_next_array(access, past):
    """A block of columns with no mask runs thousands of bytes past a row's end, into what lies behind it."""
    arrays = {name: np.zeros(4096, np.int32) for name in ("x", "y", "z")}
    for name, array in arrays.items():
        lines = [*element(f"%{name}", "%thread", 4, "%d0"), f"add.s64 %d0, %d0, {array.nbytes + past};", access]
        with pytest.raises(Fault, match=f"out of bounds: 128 threads, the first is 0, {past} bytes past the end"):
            launch(lines, **arrays)
        launch([line.replace(str(array.nbytes + past), "0") for line in lines], **arrays)


def test_wgmma_overwrites_an_accumulator_that_was_read_since_its_fence():
    """The instruction that reads may not be done: PTX ISA, wgmma.fence, asks for one after any access."""
    setup = [
        ".reg .f32 %f<8>;", "shl.b32 %r60, %thread, 4;", "mov.b32 %r61, sm;", "add.u32 %r60, %r60, %r61;",
        "mov.b32 %r62, 0;", "mov.b64 %d0, 0x0000000800400000;", "mov.b64 %d1, 0x0000000800400080;",
        "setp.ne.u32 %p0, 1, 1;", *(f"mov.b32 %f{i}, 0f00000000;" for i in range(8)),
        *(f"st.shared.v4.b32 [%r60+{2048 * i}], {{%r62, %r62, %r62, %r62}};" for i in range(4)),
        "fence.proxy.async.shared::cta;", "bar.sync 0;",
    ]  # fmt: skip
    product = [
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f0, %f1, %f2, %f3}, %d0, %d1, %p0, 1, 1, 0, 0;",
        "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;",
    ]  # fmt: skip
    fence, use = "wgmma.fence.sync.aligned;", "add.f32 %f5, %f0, 0f00000000;"
    launch([*setup, fence, *product, use, fence, *product], x=np.zeros(1, np.int32))
    launch([*setup, fence, *product, *product, use], x=np.zeros(1, np.int32))
    with pytest.raises(Fault, match="registers that were read since the last wgmma"):
        launch([*setup, fence, *product, use, *product], x=np.zeros(1, np.int32))
