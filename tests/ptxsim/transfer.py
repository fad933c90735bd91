"""Loads, stores, asynchronous copies, shuffles and votes. Source: PTX ISA 8.8, chapters 9.7.9 and 9.7.13."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from tests.ptxsim.faults import Fault, Unsupported
from tests.ptxsim.instructions import DTYPES, Mask, Operands, Run, instruction
from tests.ptxsim.numbers import U32
from tests.ptxsim.program import Address

_NARROW = r"(?:b8|u8|s8|b16|u16|s16|b32|u32|s32|f32)"
_WIDE = r"(?:b64|u64|s64|f64)"
_TYPES = rf"(?:{_NARROW}|{_WIDE})"
# What one thread loads or stores at a time: 16 bytes at most.
_ACCESSES = (rf"(?:\.v(?P<n>2|4))?\.(?P<t>{_NARROW})", rf"(?:\.v(?P<n>2))?\.(?P<t>{_WIDE})")
# Hints about caches change no value.
_PRIORITY = r"\.L1::(?:evict_normal|evict_first|evict_last|evict_unchanged|no_allocate)"
_RELAXED = r"\.relaxed\.(?:cta|gpu|sys)"


@instruction(rf"ld\.param\.(?P<t>{_TYPES})")
def _load_parameter(m: re.Match, o: Operands) -> Run:
    o.expect(2)
    operand = o[1]
    if not isinstance(operand, Address) or operand.offset:
        raise Unsupported(f"`{o.statement.text}`")
    names = {p.name: p.type for p in o.program.parameters}
    dtype = DTYPES[m["t"]]
    if operand.base not in names or DTYPES[names[operand.base]].itemsize != dtype.itemsize:
        raise Unsupported(f"`{o.statement.text}` of a parameter of type {names.get(operand.base)}")
    put, name = o.write(0, m["t"], extend=True), operand.base
    return lambda cta, mask: put(cta, np.full(cta.threads, cta.parameters[name].view(dtype)), mask)


@instruction(*(rf"ld(?:\.weak)?\.global(?:\.(?:ca|cg|cs|lu|cv)|{_PRIORITY})?{a}" for a in _ACCESSES))
@instruction(*(rf"ld{_RELAXED}\.global(?:{_PRIORITY})?{a}" for a in _ACCESSES))
def _load_global(m: re.Match, o: Operands) -> Run:
    return _load(m, o, lambda cta: (cta.global_memory, cta.global_memory.load))


@instruction(*(rf"ld\.global(?:(?:\.(?:ca|cg|cs))?\.nc|\.nc{_PRIORITY}){a}" for a in _ACCESSES))
def _load_constant(m: re.Match, o: Operands) -> Run:
    return _load(m, o, lambda cta: (cta.global_memory, cta.global_memory.load_constant))


@instruction(*(rf"ld\.shared(?:::cta)?{a}" for a in _ACCESSES))
def _load_shared(m: re.Match, o: Operands) -> Run:
    return _load(m, o, lambda cta: (cta.shared_memory, cta.shared_memory.load))


def _load(m: re.Match, o: Operands, memory: Callable) -> Run:
    o.expect(2)
    dtype, count = DTYPES[m["t"]], int(m["n"] or 1)
    address = o.address(1)
    puts = [o.write(name, m["t"], extend=True) for name in o.elements(0, count)]
    width, size = count * dtype.itemsize, dtype.itemsize

    def run(cta, mask: Mask) -> None:
        space, load = memory(cta)
        at = load(address(cta), width, mask, cta.thread) // size
        for k, put in enumerate(puts):
            put(cta, space.words[size][at + k].view(dtype), mask)

    return run


@instruction(*(rf"st(?:\.weak)?\.global(?:\.(?:wb|cg|cs|wt)|{_PRIORITY})?{a}" for a in _ACCESSES))
@instruction(*(rf"st{_RELAXED}\.global(?:{_PRIORITY})?{a}" for a in _ACCESSES))
def _store_global(m: re.Match, o: Operands) -> Run:
    return _store(m, o, "global_memory")


@instruction(*(rf"st\.shared(?:::cta)?{a}" for a in _ACCESSES))
def _store_shared(m: re.Match, o: Operands) -> Run:
    return _store(m, o, "shared_memory")


def _store(m: re.Match, o: Operands, memory: str) -> Run:
    o.expect(2)
    dtype, count = DTYPES[m["t"]], int(m["n"] or 1)
    address = o.address(0)
    reads = [o.read(name, m["t"], narrow=True) for name in o.elements(1, count)]
    width, bits = count * dtype.itemsize, np.dtype(f"u{dtype.itemsize}")

    def run(cta, mask: Mask) -> None:
        values = [np.broadcast_to(read(cta), cta.threads).view(bits) for read in reads]
        getattr(cta, memory).store(address(cta), width, mask, cta.thread, values)

    return run


@instruction(r"red(?:(?:\.relaxed)?(?:\.gpu)?\.global|\.global\.gpu)\.add\.(?P<t>f32|u32|s32)")
def _reduce(m: re.Match, o: Operands) -> Run:
    o.expect(2)
    address, value = o.address(0), o.read(1, m["t"])

    def run(cta, mask: Mask) -> None:
        cta.global_memory.add(address(cta), np.broadcast_to(value(cta), cta.threads), mask)

    return run


@instruction(r"atom(?:(?:\.relaxed)?(?:\.gpu)?\.global|\.global\.gpu)\.add\.(?P<t>f32|u32|s32)")
def _atomic(m: re.Match, o: Operands) -> Run:
    o.expect(3)
    put, address, value = o.write(0, m["t"]), o.address(1), o.read(2, m["t"])

    def run(cta, mask: Mask) -> None:
        put(cta, cta.global_memory.add(address(cta), np.broadcast_to(value(cta), cta.threads), mask), mask)

    return run


# ---- asynchronous copies ---------------------------------------------------------------------------------------------


@instruction(r"cp\.async\.(?P<cache>ca|cg)\.shared(?:::cta)?\.global(?:\.L2::(?:64|128|256)B)?")
def _copy(m: re.Match, o: Operands) -> Run:
    o.expect(3, 4)
    width = o.immediate(2)
    if width not in ((16,) if m["cache"] == "cg" else (4, 8, 16)):
        raise Unsupported(f"`{o.statement.text}` copies {width} bytes")
    to, source = o.address(0), o.address(1)
    size = o.read(3, "u32") if len(o) == 4 else None

    def run(cta, mask: Mask) -> None:
        data = np.zeros((cta.threads, width), np.uint8)
        if size is None:
            given = np.ones(cta.threads, bool)
        else:  # fewer bytes than the width: the rest is zeros
            bytes_given = np.broadcast_to(size(cta), cta.threads)
            given = bytes_given == width
            if (~given & (bytes_given != 0)).any():
                raise Unsupported(f"`{o.statement.text}` of part of its width")
        asked = given if mask is None else given & mask
        if asked.any():
            at = cta.global_memory.load(source(cta), width, None if asked.all() else asked, cta.thread)
            data[asked] = cta.global_memory.bytes[at[asked, None] + np.arange(width)]
        cta.shared_memory.copy_async(to(cta), data, mask, cta.thread)

    return run


@instruction(r"cp\.async\.commit_group")
def _commit(m: re.Match, o: Operands) -> Run:
    o.expect(0)
    return lambda cta, mask: cta.shared_memory.commit(mask)


@instruction(r"cp\.async\.wait_group")
def _wait(m: re.Match, o: Operands) -> Run:
    o.expect(1)
    pending = o.immediate(0)
    return lambda cta, mask: cta.shared_memory.wait(pending, mask)


@instruction(r"cp\.async\.wait_all")
def _wait_all(m: re.Match, o: Operands) -> Run:
    o.expect(0)

    def run(cta, mask: Mask) -> None:
        cta.shared_memory.commit(mask)
        cta.shared_memory.wait(0, mask)

    return run


@instruction(r"fence\.proxy\.async(?:\.shared::cta)?")
def _fence_proxy(m: re.Match, o: Operands) -> Run:
    o.expect(0)
    return lambda cta, mask: cta.shared_memory.fence_async_proxy(mask)


# ---- between lanes ---------------------------------------------------------------------------------------------------


def _check_members(cta, members: np.ndarray, mask: Mask, what: str) -> None:
    """Every lane that a member mask names has to be here, with the same mask."""
    members = np.broadcast_to(members, cta.threads).reshape(-1, 32)
    active = np.ones(members.shape, bool) if mask is None else mask.reshape(-1, 32)
    named = ((members[:, :, None] >> np.arange(32, dtype=U32)) & U32(1)).astype(bool)  # [warp, lane, named lane]
    if (active[:, :, None] & named & ~active[:, None, :]).any():
        raise Fault(f"{what}: a lane that the member mask names is not here")
    if (active & ~named[:, np.arange(32), np.arange(32)]).any():
        raise Fault(f"{what}: a lane is here that its member mask does not name")


@instruction(r"shfl\.sync\.(?P<how>up|down|bfly|idx)\.b32")
def _shuffle(m: re.Match, o: Operands) -> Run:
    o.expect(5)
    first, _, second = o.name(0).partition("|")
    put, put_found = o.write(first, "b32"), o.write(second, "pred") if second else None
    value, b, c, members = o.read(1, "b32"), o.read(2, "b32"), o.read(3, "b32"), o.read(4, "b32")

    def run(cta, mask: Mask) -> None:
        named = members(cta)
        if mask is not None or named.ndim or named != 0xFFFFFFFF:
            _check_members(cta, named, mask, "shfl.sync")
        lane = cta.lane
        by = b(cta) & U32(31)
        clamp, segment = c(cta) & U32(31), (c(cta) >> U32(8)) & U32(31)
        low, last = lane & segment, (lane & segment) | (clamp & ~segment)
        if m["how"] == "up":
            source = lane.astype(np.int64) - by.astype(np.int64)
            found = source >= last
        else:
            source = {
                "down": lambda: lane + by,
                "bfly": lambda: lane ^ by,
                "idx": lambda: low | (by & ~segment & U32(31)),
            }[m["how"]]()
            found = source <= last
        source = np.where(found, source, lane).astype(np.int64)
        absolute = cta.thread - lane + source
        if mask is not None and (mask & ~mask[absolute]).any():
            raise Fault("shfl.sync reads a lane that is not here")
        put(cta, np.broadcast_to(value(cta), cta.threads)[absolute], mask)
        if put_found is not None:
            put_found(cta, np.broadcast_to(found, cta.threads), mask)

    return run


@instruction(r"vote\.sync\.(?P<how>any|all)\.pred", r"vote\.sync\.(?P<how>ballot)\.b32")
def _vote(m: re.Match, o: Operands) -> Run:
    o.expect(3)
    put = o.write(0, "b32" if m["how"] == "ballot" else "pred")
    p, members = o.read(1, "pred"), o.read(2, "b32")

    def run(cta, mask: Mask) -> None:
        _check_members(cta, members(cta), mask, "vote.sync")
        here = np.ones(cta.threads, bool) if mask is None else mask
        votes = (np.broadcast_to(p(cta), cta.threads) & here).reshape(-1, 32)
        if m["how"] == "any":
            result = votes.any(axis=1)
        elif m["how"] == "all":
            result = (votes | ~here.reshape(-1, 32)).all(axis=1)
        else:
            result = (votes.astype(U32) << np.arange(32, dtype=U32)).sum(axis=1, dtype=U32)
        put(cta, np.repeat(result, 32), mask)

    return run


@instruction(r"bar\.warp\.sync")
def _warp_barrier(m: re.Match, o: Operands) -> Run:
    o.expect(1)
    members = o.read(0, "b32")

    def run(cta, mask: Mask) -> None:
        named = members(cta)
        _check_members(cta, named, mask, "bar.warp.sync")
        if (np.broadcast_to(named, cta.threads) != 0xFFFFFFFF).any():
            raise Unsupported("bar.warp.sync of part of a warp")
        warps = np.unique(cta.thread if mask is None else cta.thread[mask]) // 32
        cta.shared_memory.watch.warp_barrier(np.unique(warps))
        cta.global_memory.watch.warp_barrier(np.unique(warps))

    return run
