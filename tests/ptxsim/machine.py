"""Runs a program: one CTA after the other, the threads of a CTA in step.

Threads that take different ways run in groups, the group at the earliest instruction first, so that they meet again
where the ways do. Nothing hangs on that order: what a device could do in another order is a race, and a fault.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tests.ptxsim import arithmetic, transfer  # noqa: F401  they fill the table of instructions
from tests.ptxsim.counting import Counts
from tests.ptxsim.faults import Fault, Unsupported
from tests.ptxsim.instructions import DTYPES, Operands, Run, Undefined, decode
from tests.ptxsim.matrix import Products
from tests.ptxsim.memory import GlobalMemory, SharedMemory
from tests.ptxsim.program import Program, Statement, parse

SPECIAL = (
    *(f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"),
    "%laneid",
)
"""Registers that the machine sets."""

MOST_SHARED = 227 * 1024
"""Bytes of shared memory that a CTA may have, on an H100; others have less."""

_PLAIN, _BRANCH, _EXIT, _BARRIER = range(4)

Argument = np.ndarray | int | float


@dataclass
class Instruction:
    """A statement that is ready to run."""

    statement: Statement
    kind: int
    run: Run | None
    guard: int | None
    negated: bool
    target: int
    reads: frozenset[int]
    writes: frozenset[int]
    asynchronous: bool


class Kernel:
    """A PTX entry, decoded.

    Args:
        ptx: a module, as Triton or ``nvcc -ptx`` write it, for sm_80 or sm_90.
        entry: the entry's name or a part of it, where there are several.

    Raises:
        Unsupported: the program has an instruction, a modifier or a directive that is not known.

    Example:
        >>> kernel = Kernel(ptx)
        >>> counts = kernel.launch(grid=(4,), threads=128, arguments=[x, y, x.size])
    """

    def __init__(self, ptx: str, entry: str | None = None) -> None:
        self.program: Program = parse(ptx, entry)
        names = [*SPECIAL, *self.program.registers]
        self.indices = {name: i for i, name in enumerate(names)}
        self.code = [self._instruction(statement) for statement in self.program.statements]
        self.has_wgmma = any(ins.asynchronous for ins in self.code)
        self.grains = {space: self._grain(space) for space in ("global", "shared")}

    @property
    def name(self) -> str:
        """The entry's name."""
        return self.program.name

    def _instruction(self, statement: Statement) -> Instruction:
        operands = Operands(self.program, self.indices, statement)
        guard = None
        if statement.guard is not None:
            guard = operands.register(statement.guard, 1)
            operands.reads.add(guard)
        kind, run, target = _PLAIN, None, -1
        if statement.opcode in ("bra", "bra.uni"):
            operands.expect(1)
            kind, label = _BRANCH, operands.name(0)
            if label not in self.program.labels:
                raise Unsupported(f"`{statement.text}`: no such label")
            target = self.program.labels[label]
        elif statement.opcode in ("ret", "exit"):
            operands.expect(0)
            kind = _EXIT
        elif statement.opcode in ("bar.sync", "barrier.sync.aligned"):
            operands.expect(1)
            if operands.immediate(0) != 0:
                raise Unsupported(f"`{statement.text}`: a barrier other than 0")
            kind = _BARRIER
        else:
            run = decode(operands)
        asynchronous = statement.opcode.startswith("wgmma.mma_async")
        if asynchronous and guard is not None:
            raise Unsupported(f"`{statement.text}`: a predicated wgmma")
        return Instruction(
            statement, kind, run, guard, statement.negated, target,
            frozenset(operands.reads), frozenset(operands.writes), asynchronous,
        )  # fmt: skip

    def _grain(self, space: str) -> int:
        """Bytes of the narrowest access to a memory; 4 where nothing is narrower."""
        narrowest = 4
        for statement in self.program.statements:
            m = re.match(rf"(?:ld|st)\b.*\.{space}\b.*\.[a-z](\d+)$", statement.opcode)
            if m:
                count = re.search(r"\.v(\d)\.", statement.opcode)
                narrowest = min(narrowest, int(m[1]) // 8 * (int(count[1]) if count else 1))
        return 2 if space == "shared" and self.has_wgmma else narrowest

    def launch(
        self,
        grid: Sequence[int],
        threads: int | Sequence[int],
        arguments: Sequence[Argument] | Mapping[str, Argument],
        shared_bytes: int = 0,
        most_steps: int = 20_000_000,
    ) -> Counts:
        """Runs every CTA, and copies what was stored back to the arrays.

        Args:
            grid: CTAs along x, y and z; fewer are allowed.
            threads: of a CTA, along x, y and z; a multiple of 32 in all.
            arguments: in the order of the kernel's parameters, by name if only for messages: an array for a pointer,
                a number for the rest. A pointer may also be 0, if nothing reads through it.
            shared_bytes: dynamic shared memory.
            most_steps: instructions of a CTA after which it counts as running for ever.

        Returns:
            What was counted.

        Raises:
            Fault: the kernel does what is wrong on a device.
            ValueError: the arguments do not fit the parameters.
        """
        sizes = (threads,) if isinstance(threads, int) else tuple(threads)
        block = (*sizes, *(1,) * (3 - len(sizes)))
        shape = (*grid, *(1,) * (3 - len(grid)))
        if np.prod(block) % 32 or not 0 < np.prod(block) <= 1024:
            raise ValueError(f"threads: got {sizes}; takes a multiple of 32 up to 1024")
        required = self.program.threads
        if required is not None and (*required, *(1,) * (3 - len(required))) != block:
            raise ValueError(f"threads: got {sizes}; the program requires {required}")
        if not all(0 <= n < limit for n, limit in zip(shape, (2**31, 2**16, 2**16), strict=True)):
            raise ValueError(f"grid: got {tuple(grid)}; takes fewer than 2^31 along x, and 65,535 along y and z")
        if shared_bytes + self.program.shared_bytes > MOST_SHARED:
            raise ValueError(f"shared_bytes: got {shared_bytes}; a CTA has at most {MOST_SHARED} on any device")
        named = arguments if isinstance(arguments, Mapping) else {f"argument {i}": a for i, a in enumerate(arguments)}
        counts = Counts()
        memory = GlobalMemory(
            {name: a for name, a in named.items() if isinstance(a, np.ndarray)}, self.grains["global"], counts
        )
        parameters = self._parameters(named, memory)
        shared = SharedMemory(self.program.shared_bytes + shared_bytes, self.grains["shared"], counts)
        hits = [0] * len(self.code)
        partial: Counter[int] = Counter()
        lanes: Counter[int] = Counter()
        with np.errstate(all="ignore"):
            for z, y, x in itertools.product(*(range(n) for n in reversed(shape))):
                cta = Cta(self, (x, y, z), shape, block, parameters, memory, shared)
                memory.begin(counts.ctas, cta.threads)
                shared.begin(cta.threads)
                cta.run(hits, partial, lanes, most_steps)
                memory.end()
                counts.ctas += 1
                counts.barriers += cta.barriers
        for i, ins in enumerate(self.code):
            whole = hits[i] * (int(np.prod(block)) // 32)
            if whole or partial[i]:
                counts.instructions[ins.statement.opcode] += whole + partial[i]
                counts.lanes[ins.statement.opcode] += 32 * whole + lanes[i]
        memory.write_back()
        return counts

    def _parameters(self, arguments: Mapping[str, Argument], memory: GlobalMemory) -> dict[str, np.ndarray]:
        expected = self.program.parameters
        if len(arguments) != len(expected):
            raise ValueError(f"arguments: got {len(arguments)}; {self.name} takes {len(expected)}")
        values = {}
        for parameter, (name, value) in zip(expected, arguments.items(), strict=True):
            dtype = DTYPES[parameter.type]
            if isinstance(value, np.ndarray):
                if dtype.itemsize != 8:
                    raise ValueError(f"{name}: got an array; {parameter.name} is a {parameter.type}")
                values[parameter.name] = np.array([memory.addresses[name]], np.uint64)
            elif dtype.kind == "f":
                values[parameter.name] = np.array([value], dtype)
            else:
                bits = 8 * dtype.itemsize
                if not isinstance(value, int) or not -(1 << (bits - 1)) <= value < 1 << bits:
                    raise ValueError(f"{name}: got {value!r}; {parameter.name} is a {parameter.type}")
                values[parameter.name] = np.array([value & ((1 << bits) - 1)], f"u{dtype.itemsize}")
        return values


class Cta:
    """A CTA that runs: its registers and memories, as instructions see them."""

    def __init__(
        self,
        kernel: Kernel,
        place: tuple[int, int, int],
        grid: tuple[int, ...],
        block: tuple[int, ...],
        parameters: dict[str, np.ndarray],
        global_memory: GlobalMemory,
        shared_memory: SharedMemory,
    ) -> None:
        self.kernel, self.place, self.parameters = kernel, place, parameters
        self.global_memory, self.shared_memory = global_memory, shared_memory
        self.threads = int(np.prod(block))
        self.thread = np.arange(self.threads)
        self.lane = (self.thread % 32).astype(np.uint32)
        self.registers: list = [Undefined(name) for name in kernel.indices]
        self.products = Products([None if ins.asynchronous else (ins.reads, ins.writes) for ins in kernel.code])
        self.barriers = 0
        tid = (self.thread % block[0], self.thread // block[0] % block[1], self.thread // (block[0] * block[1]))
        for i, axis in enumerate("xyz"):
            self._set(f"%tid.{axis}", tid[i])
            self._set(f"%ntid.{axis}", block[i])
            self._set(f"%ctaid.{axis}", place[i])
            self._set(f"%nctaid.{axis}", grid[i])
        self._set("%laneid", self.lane)

    def _set(self, name: str, value: np.ndarray | int) -> None:
        values = np.broadcast_to(np.asarray(value), self.threads).astype(np.uint32)
        self.registers[self.kernel.indices[name]] = values

    def poison(self, dtype: np.dtype) -> np.ndarray:
        """What stands in lanes of a register that were never written."""
        if dtype.kind == "b":
            return np.ones(self.threads, bool)
        return np.full(self.threads, int("EE" * dtype.itemsize, 16), dtype)

    def run(self, hits: list[int], partial: Counter[int], lanes: Counter[int], most_steps: int) -> None:
        """Runs to the end, and adds up how often each instruction is executed: by the whole CTA, or by some warps."""
        self.at = 0
        try:
            self._run(hits, partial, lanes, most_steps)
        except Fault as fault:
            statement = self.kernel.code[min(self.at, len(self.kernel.code) - 1)].statement
            place = f", {statement.source}" if statement.source else ""
            raise Fault(f"{fault}\n  at `{statement.text}`{place}, CTA {self.place} of {self.kernel.name}") from None

    def _run(self, hits: list[int], partial: Counter[int], lanes: Counter[int], most_steps: int) -> None:
        code, products, has_wgmma = self.kernel.code, self.products, self.kernel.has_wgmma
        end = len(code)
        i, mask = 0, None  # all threads are at i; or else:
        places = np.zeros(self.threads, np.int64)
        alive = np.ones(self.threads, bool)
        waiting = np.zeros(self.threads, bool)
        together = True
        for _ in range(most_steps):
            if not together:
                running = alive & ~waiting
                if not running.any():
                    if not alive.any():
                        return
                    self._release(places[alive])
                    waiting[:] = False
                    continue
                i = int(places[running].min())
                mask = running & (places == i)
                if mask.all():
                    together, mask = True, None
            self.at = i
            if i >= end:
                raise Fault("a thread runs past the last instruction")
            ins = code[i]
            active = mask
            if ins.guard is not None:
                guard = self.registers[ins.guard].view(bool)
                active = ~guard if ins.negated else guard
                if mask is not None:
                    active = active & mask
                if active.all():
                    active = None
            if mask is None:
                hits[i] += 1
                if active is not None:
                    lanes[i] += int(np.count_nonzero(active)) - self.threads
            else:
                partial[i] += int(np.count_nonzero(mask.reshape(-1, 32).any(axis=1)))
                lanes[i] += int(np.count_nonzero(mask if active is None else active))
            if products.accumulators and not ins.asynchronous:
                products.check(ins.reads, ins.writes)
            if ins.kind == _PLAIN:
                if active is None:
                    ins.run(self, None)
                elif active.any():
                    ins.run(self, active)
                if has_wgmma:
                    products.since_fence.add(i)
                    if ins.statement.opcode == "wgmma.fence.sync.aligned":
                        products.since_fence.clear()
                if together:
                    i += 1
                else:
                    places[mask] = i + 1
                continue
            if ins.kind == _BRANCH:
                if together and active is None:
                    i = ins.target
                    continue
                if together and not active.any():
                    i += 1
                    continue
                if ins.statement.opcode == "bra.uni" and active is not None:
                    taken, there = active.reshape(-1, 32), (alive if mask is None else mask).reshape(-1, 32)
                    if (taken.any(axis=1) & (there & ~taken).any(axis=1)).any():
                        raise Fault("bra.uni that only some threads of a warp take")
                here = slice(None) if mask is None else mask
                places[here] = i + 1
                places[active if active is not None else here] = ins.target
                together = False
                continue
            if ins.kind == _EXIT:
                if together and active is None:
                    return
                here = slice(None) if mask is None else mask
                places[here] = i + 1
                alive[active if active is not None else here] = False
                together = False
                continue
            if active is not None and ins.guard is not None:
                if not active.any():  # nobody comes
                    if together:
                        i += 1
                    else:
                        places[mask] = i + 1
                    continue
                if mask is None or (mask & ~active).any():
                    raise Fault("a barrier that a predicate keeps some threads from")
            if together:
                self._barrier()
                i += 1
                continue
            whole = mask.reshape(-1, 32)
            if (whole.any(axis=1) & (alive.reshape(-1, 32) & ~whole).any(axis=1)).any():
                raise Fault("divergent barrier: part of a warp")
            waiting |= mask
            places[mask] = i + 1
        raise Fault(f"runs for ever: {most_steps} instructions")

    def _release(self, places: np.ndarray) -> None:
        if (places != places[0]).any():
            raise Fault("divergent barrier: warps wait at different ones")
        self._barrier()

    def _barrier(self) -> None:
        self.barriers += 1
        self.global_memory.watch.barrier()
        self.shared_memory.watch.barrier()
