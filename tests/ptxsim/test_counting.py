"""What a launch counts, against values that are worked out by hand beside each case."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptxsim import Counts, Kernel
from tests.ptxsim.counting import Requests
from tests.ptxsim.snippets import element, entry, module


def launch(lines: list[str], threads: int = 32, ctas: int = 1, shared: int = 0, **arrays: np.ndarray) -> Counts:
    text = module(entry(lines, dict.fromkeys(arrays, "u64"), shared=shared))
    return Kernel(text).launch((ctas,), threads, arrays)


def aligned(count: int, dtype=np.uint32) -> np.ndarray:
    """An array that starts at a multiple of 128 bytes."""
    raw = np.zeros(count * np.dtype(dtype).itemsize + 128, np.uint8)
    start = -raw.__array_interface__["data"][0] % 128
    return raw[start : start + count * np.dtype(dtype).itemsize].view(dtype)


def requests(of: Requests) -> tuple[int, int, int, int, int]:
    return of.requests, of.bytes, of.unique_bytes, of.units, of.fewest_units


# ---- global memory: 32-byte sectors ----------------------------------------------------------------------------------

# Index of each lane, first element, bytes of an element; then requests, bytes, unique bytes, sectors, fewest sectors.
GLOBAL = {
    "32 words in a row: 128 bytes": ("%lane", 0, 4, (1, 128, 128, 4, 4)),
    "the same from the middle of a sector": ("%lane", 4, 4, (1, 128, 128, 5, 4)),
    "the same from the last word of one": ("%lane", 7, 4, (1, 128, 128, 5, 4)),
    "every second word: 256 bytes, half of them asked for": ("2", 0, 4, (1, 128, 128, 8, 4)),
    "a word of every sector": ("8", 0, 4, (1, 128, 128, 32, 4)),
    "one word for all": ("0", 0, 4, (1, 128, 4, 1, 1)),
    "16 bits: 64 bytes": ("%lane", 0, 2, (1, 64, 64, 2, 2)),
    "16 bits from the middle of a sector": ("%lane", 8, 2, (1, 64, 64, 3, 2)),
    "8 bytes a lane": ("%lane", 0, 8, (1, 256, 256, 8, 8)),
    "16 bytes a lane: 512 bytes": ("%lane", 0, 16, (1, 512, 512, 16, 16)),
    "16 bytes a lane from the middle of a sector": ("%lane", 1, 16, (1, 512, 512, 17, 16)),
    "16 bytes, every second: half of each sector": ("2", 0, 16, (1, 512, 512, 32, 16)),
    "one byte a lane": ("%lane", 0, 1, (1, 32, 32, 1, 1)),
}
TYPE = {1: "b8", 2: "b16", 4: "b32", 8: "b64", 16: "v2.b64"}
VALUE = {1: "%h0", 2: "%h0", 4: "%r0", 8: "%d0", 16: "{%d0, %d1}"}


def indexed(index: str, first: int, size: int) -> list[str]:
    """%d9: where each lane's element is; by a multiple of the lane if `index` is a number."""
    lines = ["mov.b16 %h0, 0;", "mov.b32 %r0, 0;", "mov.b64 %d0, 0;", "mov.b64 %d1, 0;"]
    factor = "1" if index == "%lane" else index
    return [*lines, f"mad.lo.u32 %r9, %lane, {factor}, {first};", *element("%x", "%r9", size, "%d9")]


@pytest.mark.parametrize("case", GLOBAL)
def test_sectors(case: str) -> None:
    index, first, size, want = GLOBAL[case]
    lines = indexed(index, first, size)
    x = aligned(4096)
    counts = launch([*lines, f"ld.global.{TYPE[size]} {VALUE[size]}, [%d9];"], x=x)
    assert requests(counts.loads) == want
    assert requests(counts.stores) == (0, 0, 0, 0, 0)
    assert counts.loads.efficiency == want[4] / want[3]
    counts = launch([*lines, f"st.global.{TYPE[size]} [%d9], {VALUE[size]};"], x=x)
    assert requests(counts.stores) == want
    assert requests(counts.loads) == (0, 0, 0, 0, 0)


def test_sectors_of_some_lanes() -> None:
    """Lanes 0 to 9: 40 bytes in 2 sectors; of two warps, one takes no part."""
    lines = ["setp.lt.u32 %p0, %thread, 10;", *indexed("%lane", 0, 4), "@%p0 ld.global.b32 %r0, [%d9];"]
    assert requests(launch(lines, threads=64, x=aligned(64)).loads) == (1, 40, 40, 2, 2)
    lines = ["setp.lt.u32 %p0, %thread, 0;", *indexed("%lane", 0, 4), "@%p0 ld.global.b32 %r0, [%d9];"]
    assert requests(launch(lines, threads=64, x=aligned(64)).loads) == (0, 0, 0, 0, 0)


def test_requests_are_those_of_warps_and_ctas() -> None:
    """2 CTAs of 3 warps, a row of 128 bytes each."""
    lines = ["mad.lo.u32 %r1, %block, 96, %thread;", *element("%x", "%r1", 4, "%d0"), "ld.global.b32 %r0, [%d0];"]
    counts = launch(lines, threads=96, ctas=2, x=aligned(192))
    assert requests(counts.loads) == (6, 768, 768, 24, 24)
    assert counts.ctas == 2


def test_atomic_adds_count_as_stores() -> None:
    counts = launch(["red.global.add.u32 [%x], 1;"], x=aligned(8))
    assert requests(counts.stores) == (1, 128, 4, 1, 1)
    assert dict(counts.stored) == {"x": 32}


def test_distinct_sectors_of_each_cta() -> None:
    """Two loads of the same row count once, and once again for the other CTA; stores apart from loads."""
    row = element("%x", "%thread", 4, "%d0")
    mine = ["mad.lo.u32 %r1, %block, 32, %thread;", *element("%y", "%r1", 4, "%d1")]
    lines = [*row, *mine, "ld.global.b32 %r0, [%d0];", "ld.global.b32 %r2, [%d0];", "ld.global.b32 %r3, [%d1];"]
    lines += ["st.global.b32 [%d1], %r0;"]
    counts = launch(lines, ctas=3, x=aligned(32), y=aligned(96))
    assert dict(counts.loaded) == {"x": 3 * 128, "y": 3 * 128}
    assert dict(counts.stored) == {"y": 3 * 128}
    assert counts.traffic == 9 * 128
    assert counts.loads.units == 9 * 4  # requests have no memory


def test_sectors_at_the_edges_of_an_array() -> None:
    """12 bytes that lie across two sectors are 64 bytes of traffic."""
    whole = aligned(64)
    lines = ["setp.lt.u32 %p0, %thread, 3;", *element("%x", "%thread", 4, "%d0"), "@%p0 ld.global.b32 %r0, [%d0];"]
    assert dict(launch(lines, x=whole[6:9]).loaded) == {"x": 64}
    assert dict(launch(lines, x=whole[8:11]).loaded) == {"x": 32}


def test_views_of_one_array_are_counted_together() -> None:
    whole = aligned(64)
    lines = [*element("%x", "%thread", 4, "%d0"), "ld.global.b32 %r0, [%d0];", "ld.global.b32 %r1, [%y];"]
    assert dict(launch(lines, x=whole[:32], y=whole[16:]).loaded) == {"x or y": 128}


def test_asynchronous_copies_count_in_both_memories() -> None:
    """Of 32 lanes with 16 bytes, 8 give nothing: they are not loaded, but zeros are stored."""
    lines = ["shl.b32 %r0, %thread, 4;", "mov.b32 %r1, sm;", "add.u32 %r0, %r0, %r1;", "setp.lt.u32 %p0, %thread, 24;"]
    lines += ["selp.u32 %r2, 16, 0, %p0;", *element("%x", "%thread", 16, "%d0")]
    lines += ["cp.async.cg.shared.global [%r0], [%d0], 16, %r2;", "cp.async.wait_all;"]
    counts = launch(lines, shared=512, x=aligned(128))
    assert requests(counts.loads) == (1, 384, 384, 12, 12)
    assert requests(counts.shared_stores) == (1, 512, 512, 4, 4)
    assert dict(counts.loaded) == {"x": 384}


# ---- shared memory: passes over 32 banks of 4 bytes ------------------------------------------------------------------

# Bytes of an element, distance of lanes in bytes; then requests, bytes, unique bytes, passes, fewest passes.
SHARED = {
    "words in a row: each its own bank": (4, 4, (1, 128, 128, 1, 1)),
    "words 2 apart: 16 banks, twice each": (4, 8, (1, 128, 128, 2, 1)),
    "words 4 apart": (4, 16, (1, 128, 128, 4, 1)),
    "words 32 apart: one bank for all": (4, 128, (1, 128, 128, 32, 1)),
    "words 33 apart: padded, each its own bank": (4, 132, (1, 128, 128, 1, 1)),
    "words 3 apart: odd, each its own bank": (4, 12, (1, 128, 128, 1, 1)),
    "one word for all": (4, 0, (1, 128, 4, 1, 1)),
    "halves in a row: two in a word": (2, 2, (1, 64, 64, 1, 1)),
    "halves 128 bytes apart": (2, 128, (1, 64, 64, 32, 1)),
    "bytes in a row: four in a word": (1, 1, (1, 32, 32, 1, 1)),
    # Half a warp at a time: 16 lanes of 8 bytes fill the banks.
    "8 bytes in a row": (8, 8, (1, 256, 256, 2, 2)),
    "8 bytes 16 apart: 8 lanes fill the banks once, 16 twice": (8, 16, (1, 256, 256, 4, 2)),
    "8 bytes, one place for all: a pass for each half": (8, 0, (1, 256, 8, 2, 2)),
    # A quarter at a time: 8 lanes of 16 bytes fill the banks.
    "16 bytes in a row": (16, 16, (1, 512, 512, 4, 4)),
    "16 bytes 32 apart: 4 lanes fill the banks, 8 twice": (16, 32, (1, 512, 512, 8, 4)),
    "16 bytes 128 apart: rows of 64 halves, all in the same 4 banks": (16, 128, (1, 512, 512, 32, 4)),
    "16 bytes 144 apart: rows padded by 16 bytes": (16, 144, (1, 512, 512, 4, 4)),
}


@pytest.mark.parametrize("case", SHARED)
def test_bank_conflicts(case: str) -> None:
    size, step, want = SHARED[case]
    lines = ["mov.b16 %h0, 0;", "mov.b32 %r0, 0;", "mov.b64 %d0, 0;", "mov.b64 %d1, 0;", "mov.b32 %r1, sm;"]
    lines += [f"mad.lo.u32 %r2, %lane, {step}, %r1;"]
    lines += [
        f"st.shared.{TYPE[size]} [%r2], {VALUE[size]};",
        f"bar.sync 0;\nld.shared.{TYPE[size]} {VALUE[size]}, [%r2];",
    ]
    counts = launch(lines, shared=8192)
    assert requests(counts.shared_stores) == want
    assert requests(counts.shared_loads) == want
    assert counts.shared_loads.conflicts == want[3] - want[4]
    assert requests(counts.loads) == requests(counts.stores) == (0, 0, 0, 0, 0)


def test_bank_conflicts_of_some_lanes() -> None:
    """The even lanes, 2 words apart each: 16 lanes in 8 banks, two words a bank. The second warp takes no part."""
    lines = [
        "mov.b32 %r1, sm;",
        "mad.lo.u32 %r2, %thread, 8, %r1;",
        "and.b32 %r3, %thread, 33;",
        "setp.eq.u32 %p0, %r3, 0;",
    ]
    lines += ["@%p0 st.shared.b32 [%r2], 0;"]
    assert requests(launch(lines, threads=64, shared=4096).shared_stores) == (1, 64, 64, 2, 1)


LDMATRIX = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r10, %r11, %r12, %r13}, [%r3];"


@pytest.mark.parametrize(
    ("address", "want"),
    [
        # 8 rows of 16 bytes at a time. Rows of 128 bytes, matrix k in columns 8 k..: all 8 rows in the same 4 banks.
        (["and.b32 %r4, %lane, 7;", "shr.u32 %r5, %lane, 3;"], (1, 512, 512, 32, 4)),
        # The same with the column's 16 bytes xored with the row, as Swizzle<3, 4, 3> does.
        (["and.b32 %r4, %lane, 7;", "shr.u32 %r5, %lane, 3;", "xor.b32 %r5, %r5, %r4;"], (1, 512, 512, 4, 4)),
        # Xored with two bits of the row: two rows share banks.
        (
            ["and.b32 %r4, %lane, 7;", "shr.u32 %r5, %lane, 3;", "and.b32 %r6, %r4, 3;", "xor.b32 %r5, %r5, %r6;"],
            (1, 512, 512, 8, 4),
        ),
    ],
)
def test_bank_conflicts_of_ldmatrix(address: list[str], want: tuple[int, ...]) -> None:
    fill = ["mov.b32 %r1, sm;", "mad.lo.u32 %r2, %thread, 16, %r1;", "mov.b64 %d0, 0;"]
    fill += [f"st.shared.v2.b64 [%r2+{at}], {{%d0, %d0}};" for at in (0, 512)]
    place = ["mad.lo.u32 %r3, %r4, 128, %r1;", "mad.lo.u32 %r3, %r5, 16, %r3;"]
    counts = launch([*fill, "bar.sync 0;", *address, *place, LDMATRIX], shared=1024)
    assert requests(counts.shared_loads) == want
    assert requests(counts.shared_stores) == (2, 1024, 1024, 8, 8)


def test_ldmatrix_of_one_matrix_asks_for_eight_rows() -> None:
    lines = ["mov.b32 %r1, sm;", "mad.lo.u32 %r2, %thread, 4, %r1;", "st.shared.b32 [%r2], 0;", "bar.sync 0;"]
    lines += ["and.b32 %r4, %lane, 7;", "mad.lo.u32 %r3, %r4, 16, %r1;"]
    lines += ["ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r10}, [%r3];"]
    assert requests(launch(lines, shared=128).shared_loads) == (1, 128, 128, 1, 1)


# ---- instructions, lanes, barriers -----------------------------------------------------------------------------------


def test_instructions_and_lanes() -> None:
    """4 warps. Of the branch, warp 0 goes both ways with 10 and 22 lanes, the others one way."""
    lines = [
        "setp.lt.u32 %p0, %thread, 10;", "@%p0 bra LOW;", "sub.u32 %r0, %thread, 1;", "bra.uni MEET;", "LOW:",
        "mul.lo.u32 %r0, %thread, 2;", "MEET:", "xor.b32 %r0, %r0, 1;",
        "@%p0 or.b32 %r0, %r0, 1;", "@!%p0 shl.b32 %r0, %r0, 1;",
    ]  # fmt: skip
    counts = launch(lines, threads=128, ctas=2)
    # Instructions for the warps that execute them, lanes for those that are not predicated off; two CTAs.
    assert (counts.instructions["sub.u32"], counts.lanes["sub.u32"]) == (2 * 4, 2 * 118)
    assert (counts.instructions["bra.uni"], counts.lanes["bra.uni"]) == (2 * 4, 2 * 118)
    assert (counts.instructions["mul.lo.u32"], counts.lanes["mul.lo.u32"]) == (2 * 1, 2 * 10)
    assert (counts.instructions["xor.b32"], counts.lanes["xor.b32"]) == (2 * 4, 2 * 128)
    assert (counts.instructions["bra"], counts.lanes["bra"]) == (2 * 4, 2 * 10)
    # All warps issue what a predicate switches off, with no lanes where it does.
    assert (counts.instructions["or.b32"], counts.lanes["or.b32"]) == (2 * 4, 2 * 10)
    assert (counts.instructions["shl.b32"], counts.lanes["shl.b32"]) == (2 * 4, 2 * 118)
    assert (counts.instructions["ret"], counts.lanes["ret"]) == (2 * 4, 2 * 128)
    assert "div.u32" not in counts.instructions


def test_instructions_of_a_loop() -> None:
    """Lane t goes round t + 1 times: a warp issues 32 rounds, 32 + 31 + .. + 1 lanes."""
    lines = ["mov.u32 %r0, 0;", "AGAIN:", "add.u32 %r0, %r0, 1;", "setp.le.u32 %p0, %r0, %lane;", "@%p0 bra AGAIN;"]
    counts = launch(lines, threads=64)
    assert (counts.instructions["add.u32"], counts.lanes["add.u32"]) == (2 * 32, 2 * 528)


def test_a_branch_that_half_warps_take_twice_is_issued_twice() -> None:
    """Both halves of a warp come to the instruction, at different times."""
    lines = ["setp.lt.u32 %p0, %thread, 16;", "mov.u32 %r1, 0;", "@%p0 bra BODY;", "add.u32 %r1, %r1, 1;"]
    lines += ["BODY:", "@%p0 bra LATER;", "popc.b32 %r0, %thread;", "LATER:", "clz.b32 %r2, %thread;"]
    counts = launch(lines)
    assert (counts.instructions["popc.b32"], counts.lanes["popc.b32"]) == (1, 16)
    assert (counts.instructions["clz.b32"], counts.lanes["clz.b32"]) == (1, 32)  # together again


def test_barriers() -> None:
    """Three rounds in each of two CTAs; each warp that waits is an instruction."""
    lines = [
        "mov.u32 %r0, 0;",
        "AGAIN:",
        "bar.sync 0;",
        "add.u32 %r0, %r0, 1;",
        "setp.lt.u32 %p0, %r0, 3;",
        "@%p0 bra AGAIN;",
    ]
    counts = launch(lines, threads=96, ctas=2)
    assert counts.barriers == 2 * 3
    assert counts.instructions["bar.sync"] == 2 * 3 * 3


def test_barriers_of_warps_that_come_one_by_one() -> None:
    lines = ["setp.lt.u32 %p0, %thread, 32;", "@%p0 bra WAIT;", "mov.u32 %r0, 1;", "WAIT:", "bar.sync 0;"]
    counts = launch(lines, threads=64)
    assert counts.barriers == 1
    assert (counts.instructions["bar.sync"], counts.lanes["bar.sync"]) == (2, 64)


def test_wide_bytes_are_those_of_16_byte_accesses() -> None:
    for size, wide in ((8, 0), (16, 512)):
        lines = [*indexed("%lane", 0, size), f"ld.global.{TYPE[size]} {VALUE[size]}, [%d9];"]
        assert launch(lines, x=aligned(4096)).loads.wide_bytes == wide


def test_distinct_sectors_of_all_ctas() -> None:
    """3 CTAs load the same 128 bytes, and store 128 each."""
    lines = [*element("%x", "%thread", 4, "%d0"), "ld.global.b32 %r0, [%d0];"]
    lines += ["mad.lo.u32 %r1, %block, 32, %thread;", *element("%y", "%r1", 4, "%d1"), "st.global.b32 [%d1], %r0;"]
    counts = launch(lines, ctas=3, x=aligned(32), y=aligned(96))
    assert counts.traffic == 3 * 128 + 3 * 128
    assert counts.distinct == 128 + 3 * 128


def test_bytes_that_wgmma_reads() -> None:
    """A [64, 16] and B [8, 16] of 2 bytes for each of two warpgroups; with A in registers B alone."""
    lines = [
        "shl.b32 %r60, %lane, 4;", "mov.b32 %r61, sm;", "add.u32 %r60, %r60, %r61;", "mov.b32 %r62, 0;",
        "setp.lt.u32 %p1, %thread, 32;", ".reg .f32 %f<4>;", "mov.b64 %d0, 0x0000000800400000;",
        "setp.ne.u32 %p0, 1, 1;", *(f"mov.b32 %r{i}, 0;" for i in range(4)),
        *(f"@%p1 st.shared.v4.b32 [%r60+{512 * i}], {{%r62, %r62, %r62, %r62}};" for i in range(8)),
        "fence.proxy.async.shared::cta;", "bar.sync 0;", "wgmma.fence.sync.aligned;", "A;",
        "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;",
    ]  # fmt: skip
    product = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f0, %f1, %f2, %f3}, "
    for rest, want in (
        ("%d0, %d0, %p0, 1, 1, 0, 0;", 2 * (2048 + 256)),
        ("{%r0, %r1, %r2, %r3}, %d0, %p0, 1, 1, 0;", 2 * 256),
    ):
        program = [product + rest if line == "A;" else line for line in lines]
        assert launch(program, threads=256, shared=4096).operand_bytes == want
