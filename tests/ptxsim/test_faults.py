"""Each fault that the simulator promises: a small kernel that has it, and one that differs by a line and is right."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptxsim import Counts, Fault, Kernel, Unsupported
from tests.ptxsim.memory import Watch
from tests.ptxsim.snippets import element, entry, module

KEEP = [*element("%out", "%thread", 4, "%d20"), "st.global.b32 [%d20], %r0;"]
"""Stores %r0 of each thread."""

SLOT = ["shl.b32 %r50, %thread, 2;", "mov.b32 %r51, sm;", "add.u32 %r50, %r50, %r51;"]
"""%r50: the address of a shared word of the thread's own; %r51: where shared memory begins."""


def launch(
    lines: list[str], threads: int = 32, ctas: int = 1, shared: int = 4096, out: np.ndarray | None = None, **arrays
) -> Counts:
    """Runs lines; a pointer to `out` is in %out, to the other arrays in registers of their names."""
    arrays = {"out": np.zeros(2048, np.uint32) if out is None else out} | arrays
    text = module(entry(lines, dict.fromkeys(arrays, "u64"), shared=shared))
    return Kernel(text).launch((ctas,), threads, arrays)


def faults(match: str, lines: list[str], **options) -> str:
    """The message, which has to say where: the statement, the CTA and the kernel."""
    with pytest.raises(Fault, match=match) as caught:
        launch(lines, **options)
    message = str(caught.value)
    assert " at `" in message
    assert message.endswith(" of snippet")
    return message


# ---- bounds and alignment --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "match"),
    [
        ("+-4", "global load out of bounds: 1 threads, the first is 0, 4 bytes before `x`"),
        ("+4", "global load out of bounds: 1 threads, the first is 31, 0 bytes past the end of `x`"),
        ("+1048576", "global load out of bounds: 32 threads, the first is 0, [0-9]+ bytes past the end of `(x|out)`"),
        ("+-1048576", "global load out of bounds: 32 threads, the first is 0, [0-9]+ bytes before `(x|out)`"),
    ],
)
def test_global_load_out_of_bounds(at: str, match: str) -> None:
    def lines(at: str) -> list[str]:
        return [*element("%x", "%thread", 4, "%d0"), f"ld.global.b32 %r0, [%d0{at}];"]

    launch(lines(""), x=np.zeros(32, np.int32))
    message = faults(match, lines(at), x=np.zeros(32, np.int32))
    assert f"at `ld.global.b32 %r0, [%d0{at}]`, CTA (0, 0, 0)" in message


def test_global_store_out_of_bounds() -> None:
    lines = ["mad.lo.u32 %r1, %block, 32, %thread;", *element("%x", "%r1", 4, "%d0"), "st.global.b32 [%d0], %r1;"]
    launch(lines, ctas=2, x=np.zeros(64, np.int32))
    message = faults("global store out of bounds: 1 threads, the first is 31", lines, ctas=2, x=np.zeros(63, np.int32))
    assert "CTA (1, 0, 0)" in message


def test_global_access_between_the_elements_of_a_view() -> None:
    """Of rows of 8 words, 4 belong to the view."""
    whole = np.zeros((8, 8), np.int32)
    lines = ["shl.b32 %r1, %thread, 1;", *element("%x", "%r1", 4, "%d0"), "ld.global.b32 %r0, [%d0];"]
    launch(lines, x=whole)
    match = "global load out of bounds: 16 threads, the first is 2, byte 16 of `x`, between its elements"
    faults(match, lines, x=whole[:, :4])


def test_lanes_that_are_off_may_hold_any_address() -> None:
    lines = ["setp.lt.u32 %p0, %thread, 5;", *element("%x", "%thread", 4, "%d0")]
    launch([*lines, "@%p0 ld.global.b32 %r0, [%d0];"], x=np.zeros(5, np.int32))
    faults("27 threads, the first is 5", [*lines, "ld.global.b32 %r0, [%d0];"], x=np.zeros(5, np.int32))
    faults("27 threads, the first is 5", [*lines, "@!%p0 ld.global.b32 %r0, [%d0];"], x=np.zeros(5, np.int32))


def test_a_null_pointer() -> None:
    text = module(entry(["ld.global.b32 %r0, [%x];"], {"x": "u64"}))
    with pytest.raises(Fault, match="global load out of bounds"):
        Kernel(text).launch((1,), 32, [0])
    Kernel(text).launch((1,), 32, [np.zeros(1, np.int32)])


def test_misaligned_global_access() -> None:
    x = np.zeros(256, np.int32)
    for width, opcode in ((2, "b16"), (4, "b32"), (8, "b64"), (16, "v2.b64")):
        value = "{%d1, %d2}" if width == 16 else "%d1"
        lines = [*element("%x", "%thread", width, "%d0"), "mov.b64 %d1, 0;", "mov.b64 %d2, 0;"]
        launch([*lines, f"ld.global.{opcode} {value}, [%d0+{width}];"], x=x)
        for kind, statement in (("load", f"ld.global.{opcode} {value}, [%d0+{width // 2}];"),
                                ("store", f"st.global.{opcode} [%d0+{width // 2}], {value};")):  # fmt: skip
            faults(f"misaligned {kind} of {width} bytes from global memory: thread 0", [*lines, statement], x=x)


def test_alignment_is_that_of_the_array() -> None:
    """A view that starts 4 bytes into 16 cannot be read 16 bytes at a time."""
    whole = np.zeros(64, np.int32)
    start = -(whole.__array_interface__["data"][0] // 4) % 4
    lines = ["ld.global.v4.b32 {%r0, %r1, %r2, %r3}, [%x];"]
    launch(lines, x=whole[start:])
    faults("misaligned load of 16 bytes from global memory", lines, x=whole[start + 1 :])


def test_shared_access_out_of_bounds() -> None:
    lines = [*SLOT, "st.shared.b32 [%r50], 1;", "st.shared.b32 [sm+128], 2;"]
    launch(lines, shared=256)
    # Static symbols end at a multiple of their alignment, here 1,024.
    last = [*SLOT, "st.shared.b32 [%r50+{}], 1;"]
    launch([line.format(896) for line in last], shared=1024)
    faults(
        "shared store out of bounds: thread 31 at byte 1024 of 1024", [line.format(900) for line in last], shared=1024
    )
    faults("shared load out of bounds: thread 0 at byte", [*SLOT, "ld.shared.b32 %r0, [%r50+-4];"], shared=1024)


def test_misaligned_shared_access() -> None:
    lines = [*SLOT, "st.shared.b32 [%r50], 1;", "st.shared.b32 [%r50+128], 1;", "bar.warp.sync -1;"]
    launch([*lines, "ld.shared.b32 %r0, [%r50+4];"])
    faults("misaligned load of 4 bytes of shared memory: thread 0", [*lines, "ld.shared.b32 %r0, [%r50+2];"])
    faults("misaligned load of 8 bytes of shared memory: thread 1", [*lines, "ld.shared.b64 %d0, [%r50];"])
    faults("misaligned store of 8 bytes of shared memory: thread 1", [*lines, "st.shared.b64 [%r50], 0;"])


# ---- what was never written ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statement", "register"),
    [
        ("add.u32 %r0, %r1, 1;", "%r1"), ("@%p0 mov.u32 %r0, 1;", "%p0"), ("ld.global.b32 %r0, [%d0];", "%d0"),
        ("st.global.b32 [%out], %r1;", "%r1"), ("cvt.u64.u16 %d0, %h0;", "%h0"),
    ],
)  # fmt: skip
def test_read_of_an_unwritten_register(statement: str, register: str) -> None:
    message = faults(f"register {register} is read before it is written", [statement])
    assert f"at `{statement[:-1]}`" in message
    kind = {
        "%p": "setp.ne.u32 %p0, 1, 0;",
        "%r": "mov.b32 %r1, 1;",
        "%h": "mov.b16 %h0, 1;",
        "%d": "mov.b64 %d0, %out;",
    }
    launch([kind[register[:2]], statement])


def test_load_of_unwritten_shared_memory() -> None:
    lines = [*SLOT, "setp.lt.u32 %p0, %thread, {};", "@%p0 st.shared.b32 [%r50], 1;", "ld.shared.b32 %r0, [%r50];"]
    launch([line.format(32) for line in lines])
    match = "load of shared memory that nobody has written: byte 124, thread 31"
    faults(match, [line.format(31) for line in lines])


def test_shared_memory_of_the_cta_before_is_gone() -> None:
    lines = [*SLOT, "setp.eq.u32 %p0, %block, 0;", "{}st.shared.b32 [%r50], 1;", "ld.shared.b32 %r0, [%r50];"]
    launch([line.format("") for line in lines], ctas=2)
    message = faults("nobody has written", [line.format("@%p0 ") for line in lines], ctas=2)
    assert "CTA (1, 0, 0)" in message


# ---- races in shared memory ------------------------------------------------------------------------------------------

STORE, LOAD = "st.shared.b32 [%r50], %thread;", "ld.shared.b32 %r0, [%r50];"
# The mirror image of the thread's own word: another warp's, with 64 threads.
MIRROR = ["sub.u32 %r52, 63, %thread;", "shl.b32 %r52, %r52, 2;", "add.u32 %r52, %r52, %r51;"]
STORE_OTHER, LOAD_OTHER = "st.shared.b32 [%r52], %thread;", "ld.shared.b32 %r0, [%r52];"


@pytest.mark.parametrize(
    ("first", "second", "match"),
    [
        (STORE, LOAD_OTHER, "load of what another thread stored"),
        (LOAD, STORE_OTHER, "store where another thread loads or stores"),
        (STORE, STORE_OTHER, "store where another thread loads or stores"),
    ],
)  # fmt: skip
def test_shared_race_between_warps(first: str, second: str, match: str) -> None:
    start = [*SLOT, *MIRROR, STORE, "bar.sync 0;", first]
    launch([*start, "bar.sync 0;", second], threads=64)
    match = f"race: a shared {match}, with no barrier between: byte 252, thread 0"
    message = faults(match, [*start, second], threads=64)
    assert f"at `{second[:-1]}`" in message
    # A barrier of the warp is not enough.
    faults(match, [*start, "bar.warp.sync -1;", second], threads=64)


def test_a_buffer_that_is_used_again_needs_a_second_barrier() -> None:
    once = [STORE, "bar.sync 0;", LOAD_OTHER]
    launch([*SLOT, *MIRROR, *once, "bar.sync 0;", *once], threads=64)
    faults("race: a shared store", [*SLOT, *MIRROR, *once, *once], threads=64)


def test_loads_of_one_word_by_many_are_no_race() -> None:
    read = ["ld.shared.b32 %r0, [sm];", "ld.shared.b32 %r1, [%r50];"]
    launch([*SLOT, STORE, "bar.sync 0;", *read, "bar.sync 0;", STORE], threads=96)
    faults("race: a shared store", [*SLOT, STORE, "bar.sync 0;", *read, STORE], threads=96)


@pytest.mark.parametrize(
    ("first", "second"), [(STORE, LOAD_OTHER), (LOAD, STORE_OTHER), (STORE, STORE_OTHER)]
)  # fmt: skip
def test_race_inside_a_warp(first: str, second: str) -> None:
    mirror = [line.replace("63", "31") for line in MIRROR]
    start = [*SLOT, *mirror, STORE, "bar.sync 0;", first]
    launch([*start, "bar.warp.sync 0xffffffff;", second])
    faults("race: a shared", [*start, second])


def test_a_barrier_of_one_warp_is_none_for_another() -> None:
    """Warp 1 alone has one; its threads may read one another's words, those of warp 0 may not."""
    start = [*SLOT, "sub.u32 %r52, 31, %lane;", "and.b32 %r53, %thread, 32;", "add.u32 %r52, %r52, %r53;"]
    start += ["shl.b32 %r52, %r52, 2;", "add.u32 %r52, %r52, %r51;", STORE, "setp.ge.u32 %p0, %thread, 32;"]
    launch([*start, "@%p0 bar.warp.sync -1;", f"@%p0 {LOAD_OTHER}"], threads=64)
    faults("race: a shared load", [*start, "@%p0 bar.warp.sync -1;", LOAD_OTHER], threads=64)


def test_two_threads_of_a_store_with_different_values() -> None:
    launch([*SLOT, "st.shared.b32 [sm], 7;"])
    match = "race: two threads of one shared store write different values to one address"
    faults(match, [*SLOT, "st.shared.b32 [sm], %thread;"])
    launch(["st.global.b32 [%out], 7;"])
    match = "race: two threads of one global store write different values to one address"
    faults(match, ["st.global.b32 [%out], %thread;"])
    faults(match, ["mov.b32 %r1, 0;", "st.global.v2.b32 [%out], {%r1, %thread};"])


# ---- races in global memory ------------------------------------------------------------------------------------------

MINE = element("%out", "%thread", 4, "%d0")
OTHERS = ["sub.u32 %r1, 63, %thread;", *element("%out", "%r1", 4, "%d1")]


@pytest.mark.parametrize(
    ("first", "second", "match"),
    [
        ("st.global.b32 [%d0], %thread;", "ld.global.b32 %r0, [%d1];", "of what another thread of the CTA stored"),
        ("ld.global.b32 %r0, [%d0];", "st.global.b32 [%d1], %thread;", "where another thread of the CTA loads or"),
        ("st.global.b32 [%d0], %thread;", "st.global.b32 [%d1], 1;", "where another thread of the CTA loads or"),
    ],
)  # fmt: skip
def test_global_race_inside_a_cta(first: str, second: str, match: str) -> None:
    launch([*MINE, *OTHERS, first, "bar.sync 0;", second], threads=64)
    message = faults(f"race: a global (load|store) {match}", [*MINE, *OTHERS, first, second], threads=64)
    assert "byte 252 of `out`, thread 0" in message


OWN = ["mad.lo.u32 %r1, %block, 32, %thread;", *element("%out", "%r1", 4, "%d0")]
SHARED_BY_CTAS = ["mad.lo.u32 %r1, %block, 16, %thread;", *element("%out", "%r1", 4, "%d0")]


def test_two_ctas_store_to_one_place() -> None:
    store = "st.global.b32 [%d0], 5;"
    launch([*OWN, store], ctas=2)
    message = faults("race: a global store where another CTA stores", [*SHARED_BY_CTAS, store], ctas=2)
    assert "byte 64 of `out`, thread 0" in message
    assert "CTA (1, 0, 0)" in message


def test_one_cta_reads_what_another_stores() -> None:
    """Whichever comes first in the order in which CTAs happen to run."""
    store, load = "st.global.b32 [%d0], 5;", "ld.global.b32 %r0, [%d0];"
    launch([*SHARED_BY_CTAS, load], ctas=3)
    for first, second, match in (("@%p0 ", "@!%p0 ", "load where another CTA stores"),
                                 ("@!%p0 ", "@%p0 ", "store where another CTA loads")):  # fmt: skip
        guard = ["setp.eq.u32 %p0, %block, 0;"]
        launch([*OWN, *guard, first + store, second + load], ctas=3)
        faults(f"race: a global {match}", [*SHARED_BY_CTAS, *guard, first + store, second + load], ctas=3)
    # Two CTAs have loaded, not one.
    late = ["setp.eq.u32 %p0, %block, 2;", "@!%p0 ld.global.b32 %r0, [%out];", "@%p0 st.global.b32 [%out+{}], 5;"]
    launch([line.format(4) for line in late], ctas=3)
    faults("race: a global store where another CTA loads", [line.format(0) for line in late], ctas=3)


@pytest.mark.parametrize("ctas", [1, 2, 3])
def test_atomic_and_ordinary_access(ctas: int) -> None:
    """In one CTA or in several, in either order."""
    add = "red.global.add.u32 [%out], 1;"
    launch([add, "atom.global.add.u32 %r0, [%out], 1;"], ctas=ctas)
    for ordinary in ("ld.global.b32 %r0, [%out+{}];", "st.global.b32 [%out+{}], 9;"):
        if ordinary.startswith("ld") or ctas == 1:
            launch([add, ordinary.format(4)], ctas=ctas)
        faults("race: a global (load|store) where an atomic add of the same launch goes", [add, ordinary.format(0)])
        faults("race: an atomic add where an ordinary load or store", [ordinary.format(0), add])
    # The last CTA adds where the others have loaded.
    lines = [f"setp.eq.u32 %p0, %block, {ctas - 1};", "@!%p0 ld.global.b32 %r0, [%out];", f"@%p0 {add}"]
    if ctas == 1:
        launch(lines)
    else:
        faults("race: an atomic add where an ordinary load or store", lines, ctas=ctas)


def test_load_through_the_constant_cache_of_what_is_stored() -> None:
    nc, store = "ld.global.nc.b32 %r0, [%d0{}];", "st.global.b32 [%d0], 5;"
    launch([*MINE, store, "bar.sync 0;", nc.format("+4096")])
    launch([*MINE, store, "bar.sync 0;", "ld.global.b32 %r0, [%d0];"])
    faults("a load with .nc of what the launch stores: byte 0 of `out`", [*MINE, store, nc.format("")])
    faults("a global store of what the launch loads with .nc", [*MINE, nc.format(""), store])


# ---- asynchronous copies ---------------------------------------------------------------------------------------------

COPY = "cp.async.ca.shared.global [%r50], [%d0], 4;"
COMMIT, WAIT = "cp.async.commit_group;", "cp.async.wait_group 0;"
IN_FLIGHT = "of shared memory that cp.async has not been waited for: byte 0, thread 0"


def test_copy_read_before_the_wait() -> None:
    start = [*SLOT, *MINE, COPY, COMMIT]
    launch([*start, WAIT, LOAD])  # by the thread that issued it: no barrier is needed
    faults(f"load {IN_FLIGHT}", [*start, LOAD])
    faults(f"load {IN_FLIGHT}", [*start, "bar.sync 0;", LOAD])  # a barrier does not wait for it
    launch([*SLOT, *MINE, COPY, "cp.async.wait_all;", LOAD])


def test_copy_waited_for_but_read_by_another_thread() -> None:
    start = [*SLOT, *MIRROR, *MINE, COPY, COMMIT, WAIT]
    launch([*start, "bar.sync 0;", LOAD_OTHER], threads=64)
    faults("race: a shared load of what another thread stored", [*start, LOAD_OTHER], threads=64)
    # The barrier has to come after the wait.
    early = [*SLOT, *MIRROR, *MINE, COPY, COMMIT, "bar.sync 0;", WAIT]
    faults("race: a shared load of what another thread stored", [*early, LOAD_OTHER], threads=64)


def test_copy_overwritten_in_flight() -> None:
    start = [*SLOT, *MINE, COPY, COMMIT]
    for again in (STORE, COPY):
        launch([*start, WAIT, again, COMMIT, WAIT])
        faults("a store to shared memory that cp.async has not been waited for: byte 0, thread 0", [*start, again])


def test_copy_over_what_others_still_read() -> None:
    lines = [*SLOT, *MIRROR, *MINE, STORE, "bar.sync 0;", LOAD_OTHER]
    launch([*lines, "bar.sync 0;", COPY, COMMIT, WAIT], threads=64)
    faults("race: a shared store where another thread loads", [*lines, COPY, COMMIT, WAIT], threads=64)


def test_wait_for_one_group_too_few() -> None:
    second = "cp.async.ca.shared.global [%r50+128], [%d0+128], 4;"
    start = [*SLOT, *MINE, COPY, COMMIT, second, COMMIT]
    late = "ld.shared.b32 %r0, [%r50+128];"
    launch([*start, "cp.async.wait_group 1;", LOAD])
    launch([*start, "cp.async.wait_group 0;", LOAD, late])
    faults(f"load {IN_FLIGHT}", [*start, "cp.async.wait_group 2;", LOAD])
    faults("has not been waited for: byte 128", [*start, "cp.async.wait_group 1;", LOAD, late])


def test_group_that_is_not_committed() -> None:
    start = [*SLOT, *MINE, COPY]
    launch([*start, COMMIT, WAIT, LOAD])
    faults(f"load {IN_FLIGHT}", [*start, WAIT, LOAD])
    # An empty group counts: waiting for all but one leaves the empty one.
    launch([*start, COMMIT, COMMIT, "cp.async.wait_group 1;", LOAD])
    faults(f"load {IN_FLIGHT}", [*start, COMMIT, "cp.async.wait_group 1;", LOAD])


def test_two_threads_copy_different_data_to_one_place() -> None:
    lines = [*SLOT, *MINE, "cp.async.ca.shared.global [sm], [{}], 4;", COMMIT, WAIT]
    data = np.arange(32, dtype=np.uint32)
    launch([line.format("%out") for line in lines], out=data)
    match = "race: two threads of one cp.async write different values to one address"
    faults(match, [line.format("%d0") for line in lines], out=data)


def test_copy_out_of_bounds() -> None:
    lines = [*SLOT, *element("%x", "%thread", 4, "%d0"), "setp.lt.u32 %p0, %thread, 20;", "selp.u32 %r1, 4, 0, %p0;"]
    x = np.zeros(20, np.int32)
    launch([*lines, "cp.async.ca.shared.global [%r50], [%d0], 4, %r1;"], x=x)
    faults("global load out of bounds: 12 threads, the first is 20", [*lines, COPY], x=x)
    faults("shared cp.async out of bounds", [*SLOT, *MINE, "cp.async.ca.shared.global [%r50+4000], [%d0], 4;"])
    faults("misaligned cp.async of 8 bytes", [*SLOT, *MINE, "cp.async.ca.shared.global [%r50], [%out], 8;"])


# ---- barriers and warps ----------------------------------------------------------------------------------------------

HALF = "setp.lt.u32 %p0, %thread, 16;"


def test_barrier_by_part_of_a_warp() -> None:
    lines = [HALF, "@%p0 bra OVER;", "{}", "OVER:", "{}"]
    launch([line.format(text) for line, text in zip(lines, ("", "", "", "", "bar.sync 0;"), strict=True)], threads=64)
    once = [line.format(text) for line, text in zip(lines, ("", "", "bar.sync 0;", "", ""), strict=True)]
    message = faults("divergent barrier: part of a warp", once, threads=64)
    assert "at `bar.sync 0`" in message


def test_warps_at_different_barriers() -> None:
    lines = ["setp.lt.u32 %p0, %thread, 32;", "@%p0 bra OVER;", "bar.sync 0;", "bra END;", "OVER:", "{}", "END:", "{}"]
    wrong = [line.format("bar.sync 0;" if i == 5 else "") for i, line in enumerate(lines)]
    faults("divergent barrier: warps wait at different ones", wrong, threads=64)
    right = [line.format("bar.sync 0;" if i == 7 else "") for i, line in enumerate(lines) if i != 2]
    launch(right, threads=64)


@pytest.mark.parametrize("threads", [32, 64])
def test_predicated_barrier(threads: int) -> None:
    lines = ["setp.lt.u32 %p0, %thread, {};", "@%p0 bar.sync 0;"]
    launch([line.format(64) for line in lines], threads=threads)
    launch([line.format(0) for line in lines], threads=threads)
    faults("a barrier that a predicate keeps some threads from", [line.format(16) for line in lines], threads=threads)


def test_uniform_branch_that_is_not() -> None:
    lines = ["setp.lt.u32 %p0, %thread, {};", "@%p0 bra.uni OVER;", "mov.u32 %r0, 1;", "OVER:"]
    for least in (0, 32, 64):
        launch([line.format(least) for line in lines], threads=64)
    faults("bra.uni that only some threads of a warp take", [line.format(40) for line in lines], threads=64)


@pytest.mark.parametrize(
    "statement", ["shfl.sync.bfly.b32 %r0, %thread, 1, 31, {};", "vote.sync.any.pred %p1, %p0, {};"]
)
def test_lanes_that_a_member_mask_names_are_missing(statement: str) -> None:
    launch([HALF, statement.format("0xffffffff")])
    launch([HALF, "@%p0 " + statement.format("0xffff")])
    faults("sync: a lane that the member mask names is not here", [HALF, "@%p0 " + statement.format("0xffffffff")])
    faults("sync: a lane is here that its member mask does not name", [HALF, statement.format("0xffff")])
    parted = [HALF, "@%p0 bra OVER;", statement.format("-1"), "OVER:"]
    faults("sync: a lane that the member mask names is not here", parted)


def test_shuffle_from_a_lane_that_is_missing() -> None:
    lines = [HALF, "@%p0 shfl.sync.idx.b32 %r0, %thread, {}, 31, 0xffff;"]
    launch([line.format(15) for line in lines])
    faults("shfl.sync reads a lane that is not here", [line.format(16) for line in lines])


def test_barrier_of_a_warp_with_lanes_missing() -> None:
    launch([HALF, "bar.warp.sync -1;"])
    faults("bar.warp.sync: a lane that the member mask names is not here", [HALF, "@%p0 bar.warp.sync -1;"])
    with pytest.raises(Unsupported, match=r"bar\.warp\.sync of part of a warp"):
        launch([HALF, "@%p0 bar.warp.sync 0xffff;"])


ZEROS = [f"mov.b32 %r{i}, 0;" for i in range(12)]
MMA = (
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
    "{%r0, %r1, %r2, %r3}, {%r4, %r5, %r6, %r7}, {%r8, %r9}, {%r0, %r1, %r2, %r3};"
)
FILL = [
    *SLOT,
    "st.shared.b32 [%r50], 0;",
    "shr.u32 %r53, %r50, 5;",
    "shl.b32 %r53, %r53, 4;",
    "and.b32 %r54, %lane, 7;",
]
LDMATRIX = "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r0}, [%r55];"
ROWS = ["shl.b32 %r55, %lane, 4;", "and.b32 %r55, %r55, 127;", "add.u32 %r55, %r55, %r51;"]
STMATRIX = "stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r55], {%r1};"


def test_matrix_instructions_by_part_of_a_warp() -> None:
    for what, start, statement in (
        ("mma", ZEROS, MMA),
        ("ldmatrix", [*FILL, *ROWS, "bar.warp.sync -1;"], LDMATRIX),
        ("stmatrix", [*SLOT, *ROWS, "mov.b32 %r1, 0;"], STMATRIX),
    ):
        launch([*start, statement])
        faults(f"{what} by part of a warp", [*start, HALF, f"@%p0 {statement}"])
        # By one of two warps it is right.
        launch([*start, "setp.lt.u32 %p0, %thread, 32;", f"@%p0 {statement}"], threads=64)


def test_ldmatrix_of_what_other_lanes_stored() -> None:
    launch([*FILL, *ROWS, "bar.warp.sync -1;", LDMATRIX])
    faults("race: ldmatrix of what another thread stored, with no barrier between", [*FILL, *ROWS, LDMATRIX])
    lines = [*FILL, *ROWS, "bar.warp.sync -1;", LDMATRIX]
    launch([*lines, "bar.warp.sync -1;", STORE])
    faults("race: a shared store where another thread loads", [*lines, STORE])
    unwritten = [*SLOT, *ROWS, "setp.lt.u32 %p0, %lane, 31;", "@%p0 st.shared.b32 [%r50], 0;", "bar.warp.sync -1;"]
    faults("ldmatrix of shared memory that nobody has written: byte 124", [*unwritten, LDMATRIX])


def test_load_of_what_stmatrix_stored() -> None:
    """Even of the row that the lane itself named: other lanes gave the numbers."""
    start = [*SLOT, *ROWS, "mov.b32 %r1, 0;", STMATRIX]
    launch([*start, "bar.warp.sync -1;", "ld.shared.b32 %r0, [%r55];"])
    faults("race: a shared load of what another thread stored", [*start, "ld.shared.b32 %r0, [%r55];"])


# ---- warpgroup products ----------------------------------------------------------------------------------------------

# A and B of zeros: 8 KB, K-major without a swizzle. %f0 to %f3 are the accumulators of N = 8.
WG_SETUP = [
    ".reg .f32 %f<8>;", "shl.b32 %r60, %thread, 4;", "mov.b32 %r61, sm;", "add.u32 %r60, %r60, %r61;",
    "mov.b32 %r62, 0;", "mov.b64 %d0, 0x0000000800400000;", "mov.b64 %d1, 0x0000000800400080;",
    "setp.ne.u32 %p0, 1, 0;",
    *(f"mov.b32 %f{i}, 0f00000000;" for i in range(8)), *(f"mov.b32 %r{i}, 0;" for i in range(8)),
]  # fmt: skip
WG_STORE = [f"st.shared.v4.b32 [%r60+{2048 * i}], {{%r62, %r62, %r62, %r62}};" for i in range(4)]
PROXY, FENCE = "fence.proxy.async.shared::cta;", "wgmma.fence.sync.aligned;"
WGMMA = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f0, %f1, %f2, %f3}, %d0, %d1, %p0, 1, 1, 0, 0;"
WGMMA_R = (
    "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f0, %f1, %f2, %f3}, {%r0, %r1, %r2, %r3}, %d1, %p0, 1, 1, 0;"
)
WG_COMMIT, WG_WAIT = "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"
READY = [*WG_SETUP, *WG_STORE, PROXY, "bar.sync 0;", FENCE]
DONE = [WG_COMMIT, WG_WAIT]
USE = "add.f32 %f5, %f0, 0f00000000;"


def wg(lines: list[str], threads: int = 128) -> Counts:
    return launch(lines, threads=threads, shared=8192)


def wg_faults(match: str, lines: list[str], threads: int = 128) -> None:
    faults(match, lines, threads=threads, shared=8192)


def test_wgmma_accumulator_touched_before_the_wait() -> None:
    wg([*READY, WGMMA, *DONE, USE])
    match = "an accumulator of a wgmma that has not been waited for is touched"
    for touch in (USE, "mov.f32 %f3, 0f00000000;", "@%p0 mov.f32 %f1, %f4;"):
        wg_faults(match, [*READY, WGMMA, WG_COMMIT, touch, WG_WAIT])
    wg_faults(match, [*READY, WGMMA, WG_WAIT, USE])  # not committed
    wg_faults(match, [*READY, WGMMA, WG_COMMIT, "wgmma.wait_group.sync.aligned 1;", USE])
    wg([*READY, WGMMA, WG_COMMIT, WG_COMMIT, "wgmma.wait_group.sync.aligned 1;", USE])
    wg([*READY, WGMMA, WGMMA, *DONE, USE])  # one product after the other may go on with them


def test_wgmma_a_register_overwritten_before_the_wait() -> None:
    wg([*READY, WGMMA_R, *DONE, "mov.b32 %r0, 1;"])
    wg([*READY, WGMMA_R, WG_COMMIT, "add.u32 %r5, %r0, 1;", WG_WAIT])  # reading is right
    match = "a register that a wgmma reads is written before the wgmma has been waited for"
    wg_faults(match, [*READY, WGMMA_R, WG_COMMIT, "mov.b32 %r0, 1;", WG_WAIT])


def test_wgmma_takes_what_another_is_not_done_with() -> None:
    chained = WGMMA_R.replace("%f0, %f1, %f2, %f3", "%f4, %f5, %f6, %f7").replace(
        "%r0, %r1, %r2, %r3", "%f0, %r1, %r2, %r3"
    )
    wg([*READY, WGMMA, *DONE, FENCE, chained, *DONE])
    wg_faults("wgmma reads A from an accumulator of a wgmma", [*READY, WGMMA, FENCE, chained, *DONE])
    reverse = WGMMA.replace("%f0, %f1, %f2, %f3", "%r0, %f1, %f2, %f3")
    wg([*READY, WGMMA_R, *DONE, FENCE, reverse, *DONE])
    wg_faults("wgmma accumulates in an A register of a wgmma", [*READY, WGMMA_R, reverse, *DONE])
    wider = WGMMA.replace("n8k", "n16k").replace("%f3}", "%f3, %f4, %f5, %f6, %f7}")
    wg([*READY, WGMMA, *DONE, FENCE, wider, *DONE])
    wg_faults("wgmma shares some accumulators with one of another shape", [*READY, WGMMA, wider, *DONE])


def test_wgmma_operand_overwritten_before_the_wait() -> None:
    wg([*READY, WGMMA, *DONE, "bar.sync 0;", WG_STORE[0]])
    match = "a store to an operand of a wgmma that has not been waited for: byte 0"
    wg_faults(match, [*READY, WGMMA, WG_COMMIT, WG_STORE[0], WG_WAIT])
    wg_faults(match, [*READY, WGMMA, WG_COMMIT, "bar.sync 0;", WG_STORE[0], WG_WAIT])
    wg([*READY, WGMMA, WG_COMMIT, WG_STORE[3], WG_WAIT])  # not part of it
    copy = "cp.async.cg.shared.global [%r60], [%out], 16;"
    wg_faults(match, [*READY, WGMMA, WG_COMMIT, copy, WG_WAIT])
    # Each warp waits for itself alone: another may still be at it.
    wg_faults("race: a shared store where another thread loads", [*READY, WGMMA, *DONE, WG_STORE[0]])


def test_wgmma_without_its_fence() -> None:
    bare = [line for line in READY if line != FENCE]
    wg_faults("wgmma with no wgmma.fence before it", [*bare, WGMMA, *DONE])
    match = "wgmma takes registers that were written since the last wgmma.fence"
    scale = "mul.f32 %f0, %f0, 0f40000000;"
    again = [*READY, WGMMA, *DONE, scale]
    wg([*again, FENCE, WGMMA, *DONE])
    wg_faults(match, [*again, WGMMA, *DONE])
    wg_faults(match, [*READY, WGMMA_R, *DONE, "mov.b32 %r2, 5;", WGMMA_R, *DONE])
    wg([*READY, WGMMA, *DONE, "mov.b32 %r7, 5;", WGMMA, *DONE])  # it takes none that was written


def test_wgmma_without_a_fence_of_the_proxy() -> None:
    match = "wgmma reads what a thread stored, with no fence.proxy.async between"
    bare = [line for line in READY if line != PROXY]
    wg_faults(match, [*bare, WGMMA, *DONE])
    wg([*[line.replace(".shared::cta", "") if line == PROXY else line for line in READY], WGMMA, *DONE])
    some = [line if line != PROXY else f"@%p1 {PROXY}" for line in READY]
    wg_faults(match, ["setp.lt.u32 %p1, %thread, 127;", *some, WGMMA, *DONE])
    wg(["setp.lt.u32 %p1, %thread, 128;", *some, WGMMA, *DONE])


def test_wgmma_of_what_was_copied() -> None:
    copies = [f"cp.async.cg.shared.global [%r60+{2048 * i}], [%out], 16;" for i in range(4)]
    start = [*WG_SETUP, *copies, COMMIT]
    wg([*start, WAIT, "bar.sync 0;", FENCE, WGMMA, *DONE])  # no fence of the proxy: see `SharedMemory.wait`
    match = "wgmma of shared memory that cp.async has not been waited for"
    wg_faults(match, [*start, "bar.sync 0;", FENCE, WGMMA, *DONE])


def test_wgmma_without_a_barrier() -> None:
    bare = [line for line in READY if line != "bar.sync 0;"]
    wg_faults("race: wgmma reads what a thread stored, with no barrier between", [*bare, WGMMA, *DONE])


def test_wgmma_of_unwritten_or_missing_shared_memory() -> None:
    some = [line for line in READY if line != WG_STORE[1]]
    beyond = WGMMA.replace("%d1", "%d2")
    wg_faults(
        "wgmma of shared memory that nobody has written: byte 2048", [*some, "mov.b64 %d2, 0x0000000800400080;", beyond]
    )
    wg_faults("an operand of wgmma lies outside shared memory", [*READY, "mov.b64 %d2, 0x00000008004001F8;", beyond])


def test_wgmma_by_part_of_a_warpgroup() -> None:
    for statement in (WGMMA, FENCE, WG_COMMIT, WG_WAIT):
        branch = ["setp.lt.u32 %p1, %thread, COUNT;", "@!%p1 bra OVER;", statement, "OVER:"]
        wg([*READY, *(line.replace("COUNT", "128") for line in branch)])
        match = f"{statement.split('.sync')[0].replace('.mma_async', '')} by part of a warpgroup"
        wg_faults(match, [*READY, *(line.replace("COUNT", "64") for line in branch)])
        stores = [f"@%p2 {line}" if line in WG_STORE else line for line in READY]
        branch = [line.replace("COUNT", "128") for line in branch]
        with pytest.raises(Unsupported, match="by some of the warpgroups"):
            wg(["setp.lt.u32 %p2, %thread, 128;", *stores, *branch], threads=256)
    wg_faults("wgmma.fence in a CTA that is no whole number of warpgroups", READY, threads=96)


def test_wgmma_operands_that_differ_within_a_warpgroup() -> None:
    differs = ["setp.lt.u32 %p1, %thread, {};", "selp.b64 %d1, %d1, %d0, %p1;"]
    wg([*READY, *(line.format(128) for line in differs), WGMMA, *DONE])
    wg_faults("wgmma: a descriptor differs within a warpgroup", [*READY, *(line.format(64) for line in differs), WGMMA])
    keep = ["setp.lt.u32 %p0, %thread, {};"]
    wg([*READY, *(line.format(128) for line in keep), WGMMA, *DONE])
    wg_faults("wgmma: its predicate differs within a warpgroup", [*READY, *(line.format(64) for line in keep), WGMMA])


# ---- programs that do not end ----------------------------------------------------------------------------------------


def test_endless_loop() -> None:
    lines = ["mov.u32 %r0, 0;", "AGAIN:", "add.u32 %r0, %r0, {};", "setp.ne.u32 %p0, %r0, 10;", "@%p0 bra AGAIN;"]
    text = [module(entry([line.format(step) for line in lines])) for step in (1, 0)]
    Kernel(text[0]).launch((1,), 32, [], most_steps=100)
    with pytest.raises(Fault, match="runs for ever: 100 instructions"):
        Kernel(text[1]).launch((1,), 32, [], most_steps=100)


def test_past_the_last_instruction() -> None:
    text = module(entry(["mov.u32 %r0, 0;"]))
    Kernel(text).launch((1,), 32, [])
    with pytest.raises(Fault, match="a thread runs past the last instruction"):
        Kernel(text.replace("ret;", "")).launch((1,), 32, [])


def test_the_line_of_the_source_is_named() -> None:
    lines = [".loc 1 41 9", "add.u32 %r0, %r1, 1;"]
    text = module(entry(lines)) + '\n.file 1 "/somewhere/kernel.py"\n'
    with pytest.raises(Fault, match=r"at `add.u32 %r0, %r1, 1`, kernel.py:41, CTA \(0, 0, 0\) of snippet"):
        Kernel(text).launch((1,), 32, [])


# ---- what is not known -----------------------------------------------------------------------------------------------

UNKNOWN = [
    "sin.approx.f32 %r0, %r1;", "add.sat.s32 %r0, %r1, %r2;", "ld.global.volatile.b32 %r0, [%d0];",
    "ld.volatile.global.b32 %r0, [%d0];", "ld.acquire.gpu.global.b32 %r0, [%d0];", "add.rz.f32 %r0, %r1, %r2;",
    "fma.rn.sat.f32 %r0, %r1, %r2, %r3;", "fma.rn.f64 %d0, %d1, %d2, %d3;", "cvt.rz.f16.f32 %h0, %r1;",
    "cvt.rn.relu.bf16.f32 %h0, %r1;", "cvt.sat.u8.s32 %r0, %r1;", "mul.hi.s64 %d0, %d1, %d2;",
    "red.global.max.s32 [%d0], %r1;", "atom.global.cas.b32 %r0, [%d0], %r1, %r2;",
    "atom.shared.add.u32 %r0, [%r1], %r2;",
    "prmt.b32.f4e %r0, %r1, %r2, %r3;", "shfl.sync.bfly.b64 %d0, %d1, 1, 31, -1;", "vote.sync.uni.pred %p0, %p1, -1;",
    "ld.global.v8.b32 {%r0, %r1, %r2, %r3, %r4, %r5, %r6, %r7}, [%d0];",
    "ld.global.v4.b64 {%d1, %d2, %d3, %d4}, [%d0];",
    "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%r0, %r1, %r2, %r3}, {%r4, %r5}, {%r6}, {%r0, %r1, %r2, %r3};",
    "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%r0, %r1}, {%r2, %r3, %r4, %r5}, {%r6, %r7}, {%r0, %r1};",
    "ldmatrix.sync.aligned.m8n8.x3.shared.b16 {%r0, %r1, %r2}, [%r3];",
    "wgmma.mma_async.sync.aligned.m64n8k8.f32.tf32.tf32 {%r0, %r1, %r2, %r3}, %d0, %d1, %p0, 1, 1;",
    "cp.async.bulk.commit_group;", "mbarrier.init.shared.b64 [%r0], 1;", "membar.gl;", "fence.acq_rel.gpu;",
    "bar.arrive 0, 64;", "trap;", "ld.local.b32 %r0, [%r1];", "cvta.shared.u64 %d0, %d1;",
    # generic addresses
    "ld.b32 %r0, [%d0];", "st.b32 [%d0], %r0;",
]  # fmt: skip


@pytest.mark.parametrize("statement", UNKNOWN)
def test_unknown_spellings(statement: str) -> None:
    opcode = statement.split()[0].rstrip(";")
    with pytest.raises(Unsupported, match=opcode.replace(".", r"\.")):
        Kernel(module(entry([statement])))


@pytest.mark.parametrize(
    ("wrong", "right", "match"),
    [
        ("add.u32 %r0, %d1, 1;", "add.u64 %d0, %d1, 1;", "register %d1 has 64 bits"),
        ("add.u32 %h0, %r1, 1;", "add.u16 %h0, %h1, 1;", "register %h0 has 16 bits"),
        ("add.u64 %d0, %d1, %r1;", "add.u64 %d0, %d1, %d1;", "register %r1 has 32 bits"),
        ("mov.u32 %r0, %p0;", "mov.pred %p1, %p0;", "register %p0 has 1 bits"),
        ("setp.eq.s32 %r0, %r1, %r2;", "setp.eq.s32 %p0, %r1, %r2;", "register %r0 has 32 bits"),
        ("ld.global.b32 %h0, [%d0];", "ld.global.b16 %r0, [%d0];", "register %h0 has 16 bits"),
        ("st.global.b64 [%d0], %r0;", "st.global.b16 [%d0], %r0;", "register %r0 has 32 bits"),
        ("ld.global.b32 %r0, [%h0];", "ld.global.b32 %r0, [%d0];", "address `%h0`"),
        ("ld.global.v2.b32 {%r0}, [%d0];", "ld.global.v2.b32 {%r0, %r1}, [%d0];", "has 1 elements, not 2"),
        ("add.u32 %r0, %r1;", "add.u32 %r0, %r1, %r2;", "has 2 operands, not 3"),
        ("add.u32 %r0, %r1, %r2, %r3;", "add.u32 %r0, %r1, %r2;", "has 4 operands, not 3"),
        ("setp.eq.and.u32 %p0, %r1, %r2;", "setp.eq.and.u32 %p0, %r1, %r2, %p1;", "has 3 operands, not 4"),
        ("ret %r0;", "ret;", "has 1 operands, not 0"),
        ("add.u32 %nobody, %r1, 1;", "add.u32 %r0, %r1, 1;", "register %nobody"),
        ("add.u32 %r0, %nobody, 1;", "add.u32 %r0, %thread, 1;", "%nobody"),
        ("mov.u32 %tid.x, 1;", "mov.u32 %r0, %tid.x;", "writes to %tid.x"),
        ("mov.u32 %r0, %clock;", "mov.u32 %r0, %laneid;", "%clock"),
        ("bra NOWHERE;", "bra HERE;", "`bra NOWHERE`: no such label"),
        ("bar.sync 1;", "bar.sync 0;", "`bar.sync 1`: a barrier other than 0"),
        ("bar.sync 0, 64;", "bar.sync 0;", "has 2 operands, not 1"),
        ("barrier.sync.aligned 3;", "barrier.sync.aligned 0;", "a barrier other than 0"),
        ("add.u16 %h0, %h1, 65536;", "add.u16 %h0, %h1, 65535;", "`65536` does not fit 16 bits"),
        ("add.f32 %r0, %r1, 1.0;", "add.f32 %r0, %r1, 0f3F800000;", "`1.0` for a float32"),
        ("add.f64 %d0, %d1, 0f3F800000;", "add.f64 %d0, %d1, 0d3FF0000000000000;", "0f3F800000"),
        ("lop3.b32 %r0, %r1, %r2, %r3, 256;", "lop3.b32 %r0, %r1, %r2, %r3, 255;", "table 256"),
        ("cp.async.cg.shared.global [%r0], [%d0], 8;", "cp.async.ca.shared.global [%r0], [%d0], 8;", "copies 8 bytes"),
        ("setp.eq.f16 %p0|%p1, %h0, %h1;", "setp.eq.f32 %p0|%p1, %r0, %r1;", "a second result"),
        ("mov.b64 {%r0, %r1, %r2}, %d0;", "mov.b64 {%r0, %r1}, %d0;", "mov.b64"),
        ("mov.u32 %r0, {%h0, %h1};", "mov.b32 %r0, {%h0, %h1};", "mov.u32"),
        (".reg .b128 %q;", ".reg .b64 %q;", "registers of type .b128"),
        (".local .b8 buffer[4];", "", ".local"),
        ("HERE: ret;", "THERE: ret;", "label HERE stands twice"),
        ("ld.global.b32 %r0, [%d0*4];", "ld.global.b32 %r0, [%d0+4];", "operand"),
        ("ld.param.b32 %r0, [nothing];", "ld.param.b64 %d0, [snippet_x];", "of a parameter of type None"),
        ("ld.param.b32 %r0, [snippet_x];", "ld.param.u64 %d0, [snippet_x];", "of a parameter of type u64"),
        ("ld.param.b64 %d0, [snippet_x+8];", "ld.param.b64 %d0, [snippet_x+0];", "snippet_x"),
        (WGMMA.replace("n8k", "n12k"), WGMMA, "m64n12k16"),
        (WGMMA.replace("1, 1, 0, 0", "2, 1, 0, 0"), WGMMA, r"factors \[2, 1\]"),
        (f"@%p0 {WGMMA}", WGMMA, "a predicated wgmma"),
    ],
)  # fmt: skip
def test_what_is_not_known(wrong: str, right: str, match: str) -> None:
    before = [".reg .f32 %f<8>;"]
    Kernel(module(entry([*before, right, "HERE:"], {"x": "u64"})))
    with pytest.raises((Unsupported, ValueError), match=match) as caught:
        Kernel(module(entry([*before, wrong, "HERE:"], {"x": "u64"})))
    assert caught.type is Unsupported


def test_what_is_not_known_until_it_runs() -> None:
    x = np.zeros(64, np.int32)
    lines = [*SLOT, *element("%x", "%thread", 8, "%d0"), "mov.b32 %r50, sm;", "mov.b32 %r1, {};"]
    lines += ["setp.eq.u32 %p0, %thread, 0;", "@%p0 cp.async.ca.shared.global [%r50], [%d0], 8, %r1;"]
    launch([line.format(8) for line in lines], x=x)
    with pytest.raises(Unsupported, match="of part of its width"):
        launch([line.format(5) for line in lines], x=x)
    for descriptor, match in (
        (1 << 49, "a base offset"),
        (1 << 52, "bits that are no field's"),
        (1 << 14, "no field's"),
    ):
        with pytest.raises(Unsupported, match=match):
            wg([*READY, f"or.b64 %d1, %d1, {descriptor};", WGMMA])


def test_modules() -> None:
    good = entry(["mov.u32 %r0, 1;"], {"x": "u64"})
    Kernel(module(good))
    with pytest.raises(Unsupported, match=r"no \.target"):
        Kernel(good)
    with pytest.raises(Unsupported, match="a brace is never closed"):
        Kernel(module(good.rstrip().rstrip("}")))
    with pytest.raises(Unsupported, match=r"parameter `\.param \.align 8 \.b8 snippet_x"):
        Kernel(module(good.replace(".param .u64 snippet_x", ".param .align 8 .b8 snippet_x[24]")))
    two = module(good, good.replace("snippet", "another"))
    with pytest.raises(ValueError, match="takes the name of one of: snippet, another"):
        Kernel(two)
    assert Kernel(two, "another").name == "another"
    with pytest.raises(ValueError, match="entry: got 'third'"):
        Kernel(two, "third")


# ---- launches --------------------------------------------------------------------------------------------------------


def test_launch_arguments() -> None:
    lines = ["st.global.b32 [%x], %n;"]
    kernel = Kernel(module(entry(lines, {"x": "u64", "n": "s32", "f": "f32"})))
    x = np.zeros(1, np.int32)
    kernel.launch((1,), 32, {"x": x, "n": -(1 << 31), "f": 1})
    assert x[0] == -(1 << 31)
    kernel.launch((1,), 32, [x, 2**32 - 1, 0.5])
    assert x[0] == -1
    for arguments, match in (
        ([x, 1], "arguments: got 2; snippet takes 3"),
        ([x, 1, 1.0, 2], "arguments: got 4; snippet takes 3"),
        ([x, x, 1.0], "argument 1: got an array; snippet_n is a s32"),
        ({"x": x, "n": 1 << 32, "f": 1.0}, "n: got 4294967296; snippet_n is a s32"),
        ({"x": x, "n": -(1 << 31) - 1, "f": 1.0}, "n: got -2147483649; snippet_n is a s32"),
        ([x, 1.5, 1.0], "argument 1: got 1.5; snippet_n is a s32"),
        ([x[::-1].repeat(2)[::-1], 1, 1.0], "takes none that are negative"),
    ):
        with pytest.raises(ValueError, match=match):
            kernel.launch((1,), 32, arguments)


@pytest.mark.parametrize(
    ("threads", "right"), [(33, 32), (0, 32), (2048, 1024), ((16, 3), (16, 4)), ((5, 5, 5), (4, 4, 4))]
)
def test_launch_threads(threads, right) -> None:
    kernel = Kernel(module(entry(["mov.u32 %r0, 1;"])))
    kernel.launch((1,), right, [])
    with pytest.raises(ValueError, match=r"threads: got .*; takes a multiple of 32 up to 1024"):
        kernel.launch((1,), threads, [])


@pytest.mark.parametrize("grid", [(-1,), (2**31,), (1, 65536), (1, 1, 65536)])
def test_launch_grid(grid) -> None:
    with pytest.raises(ValueError, match=r"grid: got .*; takes fewer than 2\^31 along x, and 65,535 along y and z"):
        Kernel(module(entry(["mov.u32 %r0, 1;"]))).launch(grid, 32, [])


def test_launch_shared_memory() -> None:
    kernel = Kernel(module(entry(["mov.u32 %r0, 1;"])))
    kernel.launch((1,), 32, [], 227 * 1024)
    with pytest.raises(ValueError, match="shared_bytes: got 232449; a CTA has at most 232448"):
        kernel.launch((1,), 32, [], 227 * 1024 + 1)


def test_launch_with_other_threads_than_required() -> None:
    kernel = Kernel(module(entry(["mov.u32 %r0, 1;"], directives=".reqntid 64, 2, 1")))
    kernel.launch((1,), (64, 2), [])
    for threads in (64, 128, (2, 64), (64, 2, 2)):
        with pytest.raises(ValueError, match=r"threads: got .*; the program requires \(64, 2, 1\)"):
            kernel.launch((1,), threads, [])


def test_results_come_back_after_a_fault_in_none_of_the_arrays() -> None:
    """What was stored before a fault is not copied back: the arrays are as they were."""
    out = np.zeros(64, np.uint32)
    lines = [*MINE, "st.global.b32 [%d0], 5;", "ld.shared.b32 %r0, [sm];"]
    faults("nobody has written", lines, out=out)
    assert not out.any()


# ---- races, at random ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(200))
def test_races_are_those_that_a_list_of_all_accesses_shows(seed: int) -> None:
    """The watch keeps two numbers a word; here every access is kept, with the barriers before it."""
    draw = np.random.default_rng(seed)
    watch = Watch(3)
    watch.begin(96)
    past: list[tuple[str, int, int, int, int]] = []  # kind, word, thread, barriers of its warp, barriers of the CTA
    warp_barriers, cta_barriers = [0, 0, 0], 0
    for _ in range(60):
        step = draw.choice(["load", "store", "rows", "warp", "cta"], p=[0.45, 0.15, 0.1, 0.2, 0.1])
        if step == "cta":
            watch.barrier()
            cta_barriers += 1
            continue
        if step == "warp":
            warps = np.flatnonzero(draw.random(3) < 0.6)
            watch.warp_barrier(warps)
            for warp in warps:
                warp_barriers[warp] += 1
            continue
        lanes = 1 if step == "store" else int(draw.integers(1, 4))
        threads, words = draw.choice(96, lanes, replace=False), draw.integers(0, 3, lanes)
        if step == "rows":  # as ldmatrix: each row for all lanes of the warp that names it
            races = watch.load_by_many(words, threads)
            now = [
                ("load", w, 32 * (t // 32) + lane) for w, t in zip(words, threads, strict=True) for lane in range(32)
            ]
        else:
            races = getattr(watch, step)(words, threads)
            now = [(step, w, t) for w, t in zip(words, threads, strict=True)]
        expected = any(
            word == w and "store" in (kind, k) and t != thread and cta == cta_barriers
            and not (t // 32 == thread // 32 and warp < warp_barriers[t // 32])
            for kind, word, thread in now for k, w, t, warp, cta in past
        )  # fmt: skip
        assert races.any() == expected
        if expected:
            return  # the simulator stops here
        past += [(kind, w, t, warp_barriers[t // 32], cta_barriers) for kind, w, t in now]
