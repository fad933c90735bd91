"""How an instruction is decoded: the table of known spellings, and access to operands.

A spelling is a regular expression for the whole opcode with all its modifiers. What matches none is `Unsupported`: no
modifier is ever ignored. Decoding happens once; what runs is a closure.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from tests.ptxsim.faults import Fault, Unsupported
from tests.ptxsim.program import WIDTHS, Address, Operand, Program, Statement, Vector

if TYPE_CHECKING:
    from tests.ptxsim.machine import Cta

DTYPES: dict[str, np.dtype] = {
    kind: np.dtype(name)
    for kind, name in {
        "pred": "bool", "b8": "u1", "u8": "u1", "s8": "i1", "b16": "u2", "u16": "u2", "s16": "i2", "f16": "f2",
        "bf16": "u2", "b32": "u4", "u32": "u4", "s32": "i4", "f32": "f4", "f16x2": "u4", "bf16x2": "u4",
        "b64": "u8", "u64": "u8", "s64": "i8", "f64": "f8",
    }.items()
}  # fmt: skip
"""numpy's type for an instruction type; formats that numpy lacks are bits."""

Mask = np.ndarray | None
"""Lanes that take part; None for all."""

Read = Callable[["Cta"], np.ndarray]
Write = Callable[["Cta", np.ndarray, Mask], None]
Run = Callable[["Cta", Mask], None]


class Undefined:
    """The value of a register that nothing has been written to: using it is a fault."""

    def __init__(self, name: str) -> None:
        self.name = name

    def view(self, dtype: np.dtype) -> np.ndarray:
        raise Fault(f"register {self.name} is read before it is written")


class Operands:
    """The operands of one instruction, as the decoders see them.

    Attributes:
        statement: what is decoded.
        reads: registers that it reads, by index.
        writes: registers that it writes, by index.
    """

    def __init__(self, program: Program, indices: dict[str, int], statement: Statement) -> None:
        self.program, self.indices, self.statement = program, indices, statement
        self.reads: set[int] = set()
        self.writes: set[int] = set()

    def __len__(self) -> int:
        return len(self.statement.operands)

    def __getitem__(self, at: int) -> Operand:
        if at >= len(self):
            raise Unsupported(f"`{self.statement.text}` has {len(self)} operands")
        return self.statement.operands[at]

    def expect(self, *counts: int) -> None:
        """Refuses any other number of operands."""
        if len(self) not in counts:
            raise Unsupported(f"`{self.statement.text}` has {len(self)} operands, not {' or '.join(map(str, counts))}")

    def name(self, at: int) -> str:
        """An operand that is a name or a number."""
        operand = self[at]
        if not isinstance(operand, str):
            raise Unsupported(f"operand {at} of `{self.statement.text}` is no register and no number")
        return operand

    def elements(self, at: int, count: int | None = None) -> tuple[str, ...]:
        """The elements of a vector; one that is alone counts as one."""
        operand = self[at]
        names = operand.elements if isinstance(operand, Vector) else (self.name(at),)
        if count is not None and len(names) != count:
            raise Unsupported(f"operand {at} of `{self.statement.text}` has {len(names)} elements, not {count}")
        return names

    def register(self, name: str, bits: int, wider: bool = False) -> int:
        """Index of a register, which must have so many bits."""
        if name not in self.indices:
            raise Unsupported(f"register {name} in `{self.statement.text}`")
        width = self.program.registers.get(name, 32)
        if width != bits and not (wider and width > bits > 1):
            raise Unsupported(f"register {name} has {width} bits in `{self.statement.text}`, which takes {bits}")
        return self.indices[name]

    def immediate(self, at: int | str) -> int:
        """An operand that has to be a whole number."""
        text = self.name(at) if isinstance(at, int) else at
        try:
            return int(text.rstrip("U"), 0)
        except ValueError:
            raise Unsupported(f"`{text}` is no number in `{self.statement.text}`") from None

    def read(self, at: int | str, kind: str, narrow: bool = False) -> Read:
        """Reads an operand as `kind`: a register, a number or the address of a shared symbol.

        `narrow` lets the register be wider, as stores and conversions may: its low bits count.
        """
        text = self.name(at) if isinstance(at, int) else at
        dtype = DTYPES[kind]
        bits = 1 if kind == "pred" else dtype.itemsize * 8
        if text in self.indices:
            index = self.register(text, bits, wider=narrow)
            self.reads.add(index)
            width = self.program.registers.get(text, 32)
            if width != bits:
                whole, part = np.dtype(f"u{width // 8}"), np.dtype(f"u{dtype.itemsize}")
                return lambda cta: cta.registers[index].view(whole).astype(part).view(dtype)
            return lambda cta: cta.registers[index].view(dtype)
        if text in self.program.shared:
            address = dtype.type(self.program.shared[text])
            return lambda cta: address
        constant = self._number(text, kind)
        return lambda cta: constant

    def _number(self, text: str, kind: str) -> np.generic:
        dtype = DTYPES[kind]
        if kind == "pred":
            return np.bool_(self.immediate(text) != 0)
        if m := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
            value = np.array([int(m[1], 16)], np.uint32)
        elif m := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", text):
            value = np.array([int(m[1], 16)], np.uint64)
        else:
            if dtype.kind == "f" and dtype.itemsize > 2:
                raise Unsupported(f"`{text}` for a {dtype} in `{self.statement.text}`")
            bits = 8 * dtype.itemsize
            number = self.immediate(text)
            if not -(1 << (bits - 1)) <= number < 1 << bits:
                raise Unsupported(f"`{text}` does not fit {bits} bits in `{self.statement.text}`")
            value = np.array([number & ((1 << bits) - 1)], f"u{dtype.itemsize}")
        if value.itemsize != dtype.itemsize:
            raise Unsupported(f"`{text}` for {dtype} in `{self.statement.text}`")
        return value.view(dtype)[0]

    def write(self, at: int | str, kind: str, extend: bool = False) -> Write:
        """Writes an operand as `kind`; `extend` lets the register be wider, as loads and conversions may."""
        text = self.name(at) if isinstance(at, int) else at
        if text == "_":
            return lambda cta, value, mask: None
        dtype = DTYPES[kind]
        bits = 1 if kind == "pred" else dtype.itemsize * 8
        index = self.register(text, bits, wider=extend)
        if text not in self.program.registers:
            raise Unsupported(f"`{self.statement.text}` writes to {text}")
        self.writes.add(index)
        width = self.program.registers[text]
        # A signed value is extended by its sign, the bits of anything else by zeros.
        unsigned = np.dtype(f"u{dtype.itemsize}")
        full = dtype if width == bits else np.dtype(f"{'i' if dtype.kind == 'i' else 'u'}{width // 8}")
        storage = full if kind == "pred" else np.dtype(f"u{full.itemsize}")

        def put(cta: Cta, value: np.ndarray, mask: Mask) -> None:
            if value.dtype != dtype:
                raise AssertionError(f"{value.dtype} for {dtype} in `{self.statement.text}`")
            if full is not dtype:
                value = (value.view(unsigned) if dtype.kind == "f" else value).astype(full)
            if value.ndim == 0:
                value = np.full(cta.threads, value)
            value = value.view(storage)
            if mask is not None:
                before = cta.registers[index]
                merged = cta.poison(storage) if isinstance(before, Undefined) else before.copy()
                merged[mask] = value[mask]
                value = merged
            cta.registers[index] = value

        return put

    def address(self, at: int) -> Read:
        """The bytes' addresses that an operand in brackets names: uint64 for a wide register, uint32 for a narrow."""
        operand = self[at]
        if not isinstance(operand, Address):
            raise Unsupported(f"operand {at} of `{self.statement.text}` is no address")
        if operand.base in self.program.shared:
            place = self.program.shared[operand.base] + operand.offset
            return lambda cta: np.full(cta.threads, place, np.uint32)
        index = self.indices.get(operand.base)
        width = self.program.registers.get(operand.base)
        if index is None or width not in (32, 64):
            raise Unsupported(f"address `{operand.base}` in `{self.statement.text}`")
        self.reads.add(index)
        dtype = np.dtype(f"u{width // 8}")
        offset = dtype.type(operand.offset & ((1 << width) - 1))
        if not operand.offset:
            return lambda cta: cta.registers[index].view(dtype)
        return lambda cta: cta.registers[index].view(dtype) + offset


Decoder = Callable[[re.Match, Operands], Run]

_TABLE: list[tuple[re.Pattern, Decoder]] = []


def instruction(*spellings: str) -> Callable[[Decoder], Decoder]:
    """Enters a decoder for opcodes that match one of the regular expressions as a whole."""

    def enter(decoder: Decoder) -> Decoder:
        _TABLE.extend((re.compile(spelling), decoder) for spelling in spellings)
        return decoder

    return enter


@functools.cache
def _find(opcode: str) -> tuple[re.Match, Decoder] | None:
    found = [(m, decoder) for pattern, decoder in _TABLE if (m := pattern.fullmatch(opcode))]
    assert len(found) < 2, f"{opcode} is in the table twice"
    return found[0] if found else None


def decode(operands: Operands) -> Run:
    """The closure that executes a statement.

    Raises:
        Unsupported: its spelling, or an operand, is unknown.
    """
    statement = operands.statement
    found = _find(statement.opcode)
    if found is None:
        raise Unsupported(f"{statement.opcode} in `{statement.text}` ({statement.source})")
    match, decoder = found
    return decoder(match, operands)


def pure(operands: Operands, result: str, kinds: tuple[str, ...], function: Callable[..., np.ndarray]) -> Run:
    """An instruction that computes operand 0 from those that follow it, each lane for itself.

    Args:
        operands: of the instruction.
        result: type of operand 0.
        kinds: types of the others.
        function: from arrays (or numbers) of those types to one of the result's.
    """
    operands.expect(1 + len(kinds))
    put = operands.write(0, result)
    reads = [operands.read(1 + i, kind) for i, kind in enumerate(kinds)]
    if len(reads) == 1:
        (a,) = reads
        return lambda cta, mask: put(cta, function(a(cta)), mask)
    if len(reads) == 2:
        a, b = reads
        return lambda cta, mask: put(cta, function(a(cta), b(cta)), mask)
    if len(reads) == 3:
        a, b, c = reads
        return lambda cta, mask: put(cta, function(a(cta), b(cta), c(cta)), mask)
    return lambda cta, mask: put(cta, function(*[read(cta) for read in reads]), mask)


assert set(WIDTHS) <= set(DTYPES), "every register type has a numpy type"
