"""Matrix products of tensor cores, and the loads that feed them. Source: PTX ISA 8.8, chapters 9.7.14 and 9.7.15.

Products of 16-bit numbers are exact in float32; sums are float32, in numpy's order, which is no device's.
"""

from __future__ import annotations

import re

import numpy as np

from tests.ptxsim.faults import Fault, Unsupported
from tests.ptxsim.instructions import Mask, Operands, Run, instruction
from tests.ptxsim.numbers import F32, U16, U32, bf16_to_f32
from tests.ptxsim.program import Vector

WARPGROUP = 128


def _whole_warps(cta, mask: Mask, what: str) -> np.ndarray:
    """The warps that take part, all lanes of each."""
    if mask is None:
        return np.arange(cta.threads // 32)
    lanes = mask.reshape(-1, 32)
    if (lanes.any(axis=1) != lanes.all(axis=1)).any():
        raise Fault(f"{what} by part of a warp")
    return np.flatnonzero(lanes.all(axis=1))


def _whole_cta(cta, mask: Mask, what: str) -> None:
    """Faults where part of a warpgroup takes part; that some warpgroups do and others not is not followed."""
    if cta.threads % WARPGROUP:
        raise Fault(f"{what} in a CTA that is no whole number of warpgroups")
    if mask is not None:
        lanes = mask.reshape(-1, WARPGROUP)
        if (lanes.any(axis=1) != lanes.all(axis=1)).any():
            raise Fault(f"{what} by part of a warpgroup")
        raise Unsupported(f"{what} by some of the warpgroups")


def _low_high(bits: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """The two 16-bit numbers of each register, in float32."""
    if kind == "bf16":
        return (bits << U32(16)).view(F32), (bits & U32(0xFFFF0000)).view(F32)
    halves = np.ascontiguousarray(bits).view(np.float16).astype(F32).reshape(-1, 2)
    return halves[:, 0], halves[:, 1]


@instruction(r"ldmatrix\.sync\.aligned\.m8n8\.x(?P<n>1|2|4)(?P<trans>\.trans)?\.shared(?:::cta)?\.b16")
def _load_matrices(m: re.Match, o: Operands) -> Run:
    """8 x 8 matrices of 16 bits: lane 8 k + r names row r of matrix k, lane 4 r + c gets numbers 2 c and 2 c + 1."""
    o.expect(2)
    count = int(m["n"])
    puts, address = [o.write(name, "b32") for name in o.elements(0, count)], o.address(1)

    def run(cta, mask: Mask) -> None:
        _whole_warps(cta, mask, "ldmatrix")
        naming = cta.lane < 8 * count if mask is None else mask & (cta.lane < 8 * count)
        rows = cta.shared_memory.load_matrix_rows(address(cta), naming, cta.thread).reshape(-1, 32)
        for k, put in enumerate(puts):
            of_matrix = rows[:, 8 * k : 8 * k + 8, None]
            if m["trans"]:
                numbers = cta.shared_memory.words[2][of_matrix // 2 + np.arange(8)]  # [warp, row, column]
                words = np.ascontiguousarray(numbers.transpose(0, 2, 1)).view(U32)
            else:
                words = cta.shared_memory.words[4][of_matrix // 4 + np.arange(4)]
            put(cta, words.reshape(-1), mask)

    return run


@instruction(r"stmatrix\.sync\.aligned\.m8n8\.x(?P<n>1|2|4)(?P<trans>\.trans)?\.shared(?:::cta)?\.b16")
def _store_matrices(m: re.Match, o: Operands) -> Run:
    """The reverse of ldmatrix: lane 8 k + r names row r of matrix k, lane 4 r + c has its numbers 2 c and 2 c + 1."""
    o.expect(2)
    count = int(m["n"])
    reads, address = [o.read(name, "b32") for name in o.elements(1, count)], o.address(0)

    def run(cta, mask: Mask) -> None:
        _whole_warps(cta, mask, "stmatrix")
        naming = cta.lane < 8 * count if mask is None else mask & (cta.lane < 8 * count)
        rows = np.zeros((cta.threads // 32, 32, 8), U16)  # [warp, lane that names the row, number]
        for k, read in enumerate(reads):
            words = np.broadcast_to(read(cta), cta.threads).reshape(-1, 8, 4)
            numbers = np.ascontiguousarray(words).view(U16).reshape(-1, 8, 8)
            rows[:, 8 * k : 8 * k + 8] = numbers.transpose(0, 2, 1) if m["trans"] else numbers
        values = list(np.ascontiguousarray(rows.reshape(-1, 8)).view("u8").T)
        cta.shared_memory.store_matrix_rows(address(cta), naming, cta.thread, values)

    return run


@instruction(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(?P<t>bf16|f16)\.(?P=t)\.f32")
def _multiply(m: re.Match, o: Operands) -> Run:
    """D [16, 8] = A [16, 16] B [16, 8] + C. Lane 4 g + t holds of A rows g and g + 8, of B and D columns of its own."""
    o.expect(4)
    kind = m["t"]
    puts = [o.write(name, "f32") for name in o.elements(0, 4)]
    a = [o.read(name, "b32") for name in o.elements(1, 4)]
    b = [o.read(name, "b32") for name in o.elements(2, 2)]
    c = [o.read(name, "f32") for name in o.elements(3, 4)]

    def run(cta, mask: Mask) -> None:
        _whole_warps(cta, mask, "mma")
        warps = cta.threads // 32
        # k runs over (t, upper half of k, second of a pair): the order of a sum does not matter, if A and B agree.
        left = np.empty((warps, 2, 8, 4, 2, 2), F32)  # [warp, upper rows, g, t, ...]
        right = np.empty((warps, 8, 4, 2, 2), F32)  # [warp, g, t, ...]
        for k, read in enumerate(a):
            low, high = _low_high(read(cta), kind)
            left[:, k % 2, :, :, k // 2, 0] = low.reshape(warps, 8, 4)
            left[:, k % 2, :, :, k // 2, 1] = high.reshape(warps, 8, 4)
        for k, read in enumerate(b):
            low, high = _low_high(read(cta), kind)
            right[:, :, :, k, 0] = low.reshape(warps, 8, 4)
            right[:, :, :, k, 1] = high.reshape(warps, 8, 4)
        product = left.reshape(warps, 16, 16) @ right.reshape(warps, 8, 16).transpose(0, 2, 1)
        product = product.reshape(warps, 2, 8, 4, 2)  # [warp, upper rows, g, t, second of a pair]
        # All of C is read before any of D is written: they may share registers, in any order.
        sums = [product[:, k // 2, :, :, k % 2].reshape(-1) + read(cta) for k, read in enumerate(c)]
        for put, value in zip(puts, sums, strict=True):
            put(cta, value, mask)

    return run


# ---- warpgroup products ----------------------------------------------------------------------------------------------


def operand_offsets(descriptor: int, rows: int, transposed: bool) -> np.ndarray:
    """[rows, 16] offsets in shared memory of an operand's elements, by its descriptor.

    Args:
        descriptor: start address, leading and stride byte offsets, all in 16 bytes; swizzle mode.
        rows: 64 for A, N for B.
        transposed: whether rows, and not k, are the direction in which elements are contiguous.

    Source: PTX ISA 8.8, 9.7.15.5.1, "Shared memory matrix layout", table of canonical layouts; the swizzles xor the
    16-byte part of an address with the bits from the seventh on, as many as the mode has. With no swizzle the stride
    leads to the next 8 rows and the leading offset to the next 8 of k, whichever is contiguous; with a swizzle and rows
    contiguous it is the other way round.
    """
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    if descriptor >> 49 & 7:
        raise Unsupported("wgmma: a matrix descriptor with a base offset")
    if descriptor & ~(3 << 62 | 0x3FFF << 32 | 0x3FFF << 16 | 0x3FFF):
        raise Unsupported(f"wgmma: the matrix descriptor {descriptor:#x} has bits that are no field's")
    span, bits = {0: (16, 0), 1: (128, 7), 2: (64, 3), 3: (32, 1)}[descriptor >> 62]
    r, k = np.arange(rows)[:, None], np.arange(16)[None, :]
    if span == 16:  # no swizzle: core matrices of 8 x 16 bytes
        if transposed:
            at = start + (r // 8) * stride + (k // 8) * leading + (k % 8) * 16 + (r % 8) * 2
        else:
            at = start + (r // 8) * stride + (k // 8) * leading + (r % 8) * 16 + (k % 8) * 2
    elif transposed:
        wide = span // 2
        at = start + (r // wide) * leading + (k // 8) * stride + (k % 8) * span + (r % wide) * 2
    else:
        at = start + (r // 8) * stride + (r % 8) * span + k * 2
    return at ^ ((at >> 7 & bits) << 4)


_WGMMA = r"wgmma\.mma_async\.sync\.aligned\.m64n(?P<n>\d+)k16\.f32\.(?P<t>bf16|f16)\.(?P=t)"


@instruction(_WGMMA)
def _warpgroup_multiply(m: re.Match, o: Operands) -> Run:
    """D [64, N] (+)= A [64, 16] B [16, N] for each warpgroup, asynchronously."""
    kind, columns = m["t"], int(m["n"])
    from_registers = isinstance(o[1], Vector)
    o.expect(7 if from_registers else 8)
    if columns % 8 or not 8 <= columns <= 256:
        raise Unsupported(f"`{o.statement.opcode}`")
    names = o.elements(0, columns // 2)
    accumulators = [o.register(name, 32) for name in names]
    puts = [o.write(name, "f32") for name in names]
    a_registers = [o.register(name, 32) for name in o.elements(1, 4)] if from_registers else []
    left = [o.read(name, "b32") for name in o.elements(1, 4)] if from_registers else [o.read(1, "b64")]
    right, keep = o.read(2, "b64"), o.read(3, "pred")
    signs = [o.immediate(4), o.immediate(5)]
    if any(sign not in (1, -1) for sign in signs):
        raise Unsupported(f"`{o.statement.text}`: factors {signs}")
    a_transposed = 0 if from_registers else o.immediate(6)
    b_transposed = o.immediate(6 if from_registers else 7)

    def one(cta, values: np.ndarray, warpgroup: int, what: str) -> int:
        ours = np.broadcast_to(values, cta.threads)[WARPGROUP * warpgroup : WARPGROUP * (warpgroup + 1)]
        if (ours != ours[0]).any():
            raise Fault(f"wgmma: {what} differs within a warpgroup")
        return int(ours[0])

    def tile(cta, descriptor: int, rows: int, transposed: int, grains: list[np.ndarray]) -> np.ndarray:
        bits, claimed = cta.shared_memory.read_operand(operand_offsets(descriptor, rows, bool(transposed)))
        grains.append(claimed)
        return bf16_to_f32(bits) if kind == "bf16" else bits.view(np.float16).astype(F32)

    def run(cta, mask: Mask) -> None:
        _whole_cta(cta, mask, "wgmma")
        cta.products.check_fenced({*accumulators, *a_registers})
        cta.products.check_taken(accumulators, a_registers)
        groups = cta.threads // WARPGROUP
        grains: list[np.ndarray] = []
        result = np.empty((cta.threads, len(puts)), F32)
        lane = np.arange(WARPGROUP)
        row, column = 16 * (lane // 32) + lane % 32 // 4, lane % 4 * 2
        a_values = [read(cta) for read in left]
        b_values, kept = right(cta), np.broadcast_to(keep(cta), cta.threads)
        for group in range(groups):
            ours = slice(WARPGROUP * group, WARPGROUP * (group + 1))
            if from_registers:
                a = np.empty((4, 2, 8, 2, 4, 2), F32)  # [warp, lower rows, g, upper k, t, second of a pair]
                for k, bits in enumerate(a_values):
                    low, high = _low_high(bits[ours], kind)
                    a[:, k % 2, :, k // 2, :, 0] = low.reshape(4, 8, 4)
                    a[:, k % 2, :, k // 2, :, 1] = high.reshape(4, 8, 4)
                a = a.reshape(64, 16)
            else:
                a = tile(cta, one(cta, a_values[0], group, "a descriptor"), 64, a_transposed, grains)
            b = tile(cta, one(cta, b_values, group, "a descriptor"), columns, b_transposed, grains)
            product = (a * F32(signs[0])) @ (b * F32(signs[1])).T
            for j in range(len(puts)):
                result[ours, j] = product[row + j // 2 % 2 * 8, column + j % 2 + j // 4 * 8]
            if (kept[ours] != kept[ours][0]).any():
                raise Fault("wgmma: its predicate differs within a warpgroup")
        for j, put in enumerate(puts):
            value = result[:, j]
            if kept.any():
                before = cta.registers[accumulators[j]]
                value = np.where(kept, value + before.view(F32), value)
            put(cta, value, None)
        cta.products.issue(accumulators, a_registers, grains)

    return run


@instruction(r"wgmma\.fence\.sync\.aligned")
def _warpgroup_fence(m: re.Match, o: Operands) -> Run:
    o.expect(0)

    def run(cta, mask: Mask) -> None:
        _whole_cta(cta, mask, "wgmma.fence")
        cta.products.fence()

    return run


@instruction(r"wgmma\.commit_group\.sync\.aligned")
def _warpgroup_commit(m: re.Match, o: Operands) -> Run:
    o.expect(0)

    def run(cta, mask: Mask) -> None:
        _whole_cta(cta, mask, "wgmma.commit_group")
        cta.products.commit()

    return run


@instruction(r"wgmma\.wait_group\.sync\.aligned")
def _warpgroup_wait(m: re.Match, o: Operands) -> Run:
    o.expect(1)
    pending = o.immediate(0)

    def run(cta, mask: Mask) -> None:
        _whole_cta(cta, mask, "wgmma.wait_group")
        for grains in cta.products.wait(pending):
            cta.shared_memory.release(grains)

    return run


class Products:
    """The wgmma of a CTA that have not been waited for.

    Until then nothing but another wgmma may touch their accumulators, and nothing may write to their A registers.
    Registers that other instructions read or wrote need a ``wgmma.fence`` before a wgmma takes them.
    """

    def __init__(self, accesses: list[tuple[frozenset[int], frozenset[int]] | None]) -> None:
        self.accesses = accesses  # registers read and written, by place in the program; None for wgmma itself
        self.open: list[tuple[list[int], list[int], list[np.ndarray]]] = []
        self.groups: list[list[tuple[list[int], list[int], list[np.ndarray]]]] = []
        self.accumulators: frozenset[int] = frozenset()
        self.inputs: frozenset[int] = frozenset()
        self.since_fence: set[int] = set()
        self.fenced = False

    def fence(self) -> None:
        """Registers accessed so far may be taken."""
        self.since_fence.clear()
        self.fenced = True

    def check_fenced(self, registers: set[int]) -> None:
        """Faults where one of the registers was read or written since the last fence."""
        if not self.fenced:
            raise Fault("wgmma with no wgmma.fence before it")
        for reads, writes in filter(None, (self.accesses[at] for at in self.since_fence)):
            if not registers.isdisjoint(writes):
                raise Fault("wgmma takes registers that were written since the last wgmma.fence")
            if not registers.isdisjoint(reads):
                raise Fault("wgmma takes registers that were read since the last wgmma.fence")

    def check_taken(self, accumulators: list[int], inputs: list[int]) -> None:
        """Faults where a wgmma takes what another has not finished with.

        Accumulators alone may be handed on, and only from one product to the next of the same shape.
        """
        if not self.accumulators.isdisjoint(inputs):
            raise Fault("wgmma reads A from an accumulator of a wgmma that has not been waited for")
        if not self.inputs.isdisjoint(accumulators):
            raise Fault("wgmma accumulates in an A register of a wgmma that has not been waited for")
        if not self.accumulators.isdisjoint(accumulators):
            left = [product for group in [*self.groups, self.open] for product in group]
            if any(other != accumulators and not set(other).isdisjoint(accumulators) for other, _, _ in left):
                raise Fault("wgmma shares some accumulators with one of another shape that has not been waited for")

    def issue(self, accumulators: list[int], inputs: list[int], grains: list[np.ndarray]) -> None:
        """A wgmma begins."""
        self.open.append((accumulators, inputs, grains))
        self.accumulators |= frozenset(accumulators)
        self.inputs |= frozenset(inputs)

    def commit(self) -> None:
        """The wgmma since the last commit become a group."""
        self.groups.append(self.open)
        self.open = []

    def wait(self, pending: int) -> list[np.ndarray]:
        """All but the latest `pending` groups have finished; returns the grains of their operands."""
        done = self.groups[: max(0, len(self.groups) - pending)]
        self.groups = self.groups[len(done) :]
        left = [product for group in [*self.groups, self.open] for product in group]
        self.accumulators = frozenset(r for accumulators, _, _ in left for r in accumulators)
        self.inputs = frozenset(r for _, inputs, _ in left for r in inputs)
        return [grains for group in done for _, _, several in group for grains in several]

    def check(self, reads: frozenset[int], writes: frozenset[int]) -> None:
        """Faults where an instruction that is no wgmma touches what is in use."""
        if not self.accumulators.isdisjoint(reads) or not self.accumulators.isdisjoint(writes):
            raise Fault("an accumulator of a wgmma that has not been waited for is touched")
        if not self.inputs.isdisjoint(writes):
            raise Fault("a register that a wgmma reads is written before the wgmma has been waited for")
