"""Every spelling in the table of instructions, against answers that Python's integers, fractions and decimals give.

The oracle is none of the simulator's code: a float here is a pattern of bits and a `Fraction`, rounded by `rounded`.
Each instruction runs with registers, under a guard, and with numbers in place of registers.
"""

from __future__ import annotations

import itertools
import math
import random
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest

from tests.ptxsim import Kernel
from tests.ptxsim.instructions import _TABLE
from tests.ptxsim.snippets import element, entry, module
from tests.ptxsim.spellings import untested

# ---- numbers as bits -------------------------------------------------------------------------------------------------

WIDTH = {"pred": 1} | {f"{k}{n}": n for k in "bus" for n in (8, 16, 32, 64)}
WIDTH |= {"f16": 16, "bf16": 16, "f32": 32, "f64": 64, "f16x2": 32, "bf16x2": 32}
FORMAT = {"f16": (5, 10), "bf16": (8, 7), "f32": (8, 23), "f64": (11, 52)}
"""Bits of the exponent and of the fraction."""

NAN, INF = math.nan, math.inf


def wrap(x: int, bits: int) -> int:
    """The bits of a whole number."""
    return x & ((1 << bits) - 1)


def signed(x: int, bits: int) -> int:
    """The number that bits stand for in two's complement."""
    return x - (1 << bits) if x >> (bits - 1) else x


def number(x: int, kind: str) -> int:
    """The integer that bits stand for."""
    return signed(x, WIDTH[kind]) if kind[0] == "s" else x


def value(x: int, kind: str) -> Fraction | float:
    """What bits of a float stand for: a fraction, or an infinity, or NaN, or -0.0."""
    exponent_bits, fraction_bits = FORMAT[kind]
    sign = -1 if x >> (exponent_bits + fraction_bits) else 1
    exponent, fraction = x >> fraction_bits & ((1 << exponent_bits) - 1), x & ((1 << fraction_bits) - 1)
    bias = (1 << (exponent_bits - 1)) - 1
    if exponent == (1 << exponent_bits) - 1:
        return NAN if fraction else sign * INF
    if exponent == fraction == 0:
        return Fraction(0) if sign == 1 else -0.0
    significand = fraction if exponent == 0 else fraction + (1 << fraction_bits)
    return sign * significand * Fraction(2) ** (max(exponent, 1) - bias - fraction_bits)


def rounded(x: Fraction | float, kind: str) -> int | str:
    """The bits nearest to a number, ties to even; "nan" for NaN."""
    exponent_bits, fraction_bits = FORMAT[kind]
    top = 1 << (exponent_bits + fraction_bits)
    if isinstance(x, float):
        if math.isnan(x):
            return "nan"
        if math.isinf(x) or x == 0:
            infinite = ((1 << exponent_bits) - 1) << fraction_bits if math.isinf(x) else 0
            return infinite | (top if math.copysign(1, x) < 0 else 0)
        x = Fraction(x)
    sign, x = (top if x < 0 else 0), abs(x)
    if x == 0:
        return sign
    bias = (1 << (exponent_bits - 1)) - 1
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    exponent -= x < Fraction(2) ** exponent
    unit = Fraction(2) ** (max(exponent, 1 - bias) - fraction_bits)
    whole = round(x / unit)  # Python rounds a Fraction's ties to even
    magnitude = whole + max(exponent + bias - 1, 0) * (1 << fraction_bits)
    return sign | min(magnitude, ((1 << exponent_bits) - 1) << fraction_bits)


def flushed(x: int | str, kind: str = "f32") -> int | str:
    """Subnormal bits become a zero of their sign."""
    if x == "nan":
        return x
    exponent_bits, fraction_bits = FORMAT[kind]
    top = x >> (exponent_bits + fraction_bits) << (exponent_bits + fraction_bits)
    return top if (x ^ top) >> fraction_bits == 0 else x


def is_nan(x: int, kind: str) -> bool:
    return isinstance(v := value(x, kind), float) and math.isnan(v)


def test_the_oracle_rounds_as_struct_does() -> None:
    draw = random.Random(0)
    for _ in range(2000):
        x = draw.choice((1, -1)) * draw.uniform(0.5, 2) * 2.0 ** draw.randint(-150, 126)
        assert rounded(Fraction(x), "f32") == struct.unpack("<I", struct.pack("<f", x))[0]
        assert rounded(Fraction(x), "f64") == struct.unpack("<Q", struct.pack("<d", x))[0]
        y = math.ldexp(math.frexp(x)[0], draw.randint(-25, 14))
        assert rounded(Fraction(y), "f16") == struct.unpack("<H", struct.pack("<e", y))[0]
    assert rounded(2 ** Fraction(128), "f32") == 0x7F800000
    assert rounded(Fraction(257, 256), "bf16") == 0x3F80  # a tie, to even
    assert rounded(Fraction(259, 256), "bf16") == 0x3F82


INTEGERS = {
    bits: [
        wrap(x, bits)
        for x in (
            0,
            1,
            2,
            7,
            100,
            -1,
            -2,
            -7,
            1 << (bits - 1),
            (1 << (bits - 1)) - 1,
            0x5AF019C3E87B4D26 >> (64 - bits),
        )
    ]
    for bits in (16, 32, 64)
}
"""0, small ones, the ends of the range, and one with no pattern."""

# Zeros, subnormals, the ends of the normal range, ties, infinities, NaN.
FLOATS = {
    "f32": [
        0x00000000, 0x80000000, 0x00000001, 0x807FFFFF, 0x00800000, 0x80800001, 0x3F800000, 0xBF800000, 0x3F800001,
        0x3FFFFFFF, 0x40490FDB, 0xC2F6E979, 0x34000000, 0x33800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000,
        0x7FC00000, 0x4B800001,
    ],
    "f64": [
        0, 1 << 63, 1, 0x000FFFFFFFFFFFFF, 0x0010000000000000, 0x3FF0000000000000, 0xBFF0000000000001,
        0x400921FB54442D18, 0x7FEFFFFFFFFFFFFF, 0x7FF0000000000000, 0xFFF0000000000000, 0x7FF8000000000000,
        0x3CA0000000000000,
    ],
    "bf16": [
        0x0000, 0x8000, 0x0001, 0x807F, 0x0080, 0x3F80, 0xBF80, 0x3F81, 0x3FFF, 0x4049, 0xC2F7, 0x3B80, 0x3B81, 0x7F7F,
        0xFF7F, 0x7F80, 0xFF80, 0x7FC0, 0x0040, 0x5F00,
    ],
    "f16": [
        0x0000, 0x8000, 0x0001, 0x83FF, 0x0400, 0x3C00, 0xBC00, 0x3C01, 0x3FFF, 0x4248, 0xD7B7, 0x1000, 0x1400, 0x7BFF,
        0xFBFF, 0x7C00, 0xFC00, 0x7E00, 0x0200, 0x1001,
    ],
}  # fmt: skip

# ---- one instruction as a program ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One opcode: what it takes, and what it must give.

    Attributes:
        opcode: as spelled.
        results: types of what it writes; a second one follows a bar.
        kinds: types of what it reads; "imm" for a number that is part of the program.
        rows: bits of the operands, a row for each thread.
        want: for each row the bits of the results; "nan" for any NaN, None for what is not defined.
    """

    opcode: str
    results: tuple[str, ...]
    kinds: tuple[str, ...]
    rows: tuple[tuple[int, ...], ...]
    want: tuple[tuple[int | str | None, ...], ...]


def case(opcode: str, result: str | tuple[str, ...], kinds: tuple[str, ...], rows: Iterable, oracle: Callable) -> Case:
    rows = tuple(tuple(row) if isinstance(row, tuple) else (row,) for row in rows)
    results = (result,) if isinstance(result, str) else result
    want = [oracle(*row) for row in rows]
    return Case(opcode, results, kinds, rows, tuple(w if isinstance(w, tuple) else (w,) for w in want))


SENTINEL = {1: 1, 16: 0x7B7B, 32: 0x7B7B7B7B, 64: 0x7B7B7B7B7B7B7B7B}
BANK = {1: "%p", 16: "%h", 32: "%r", 64: "%d"}


def literal(bits: int, kind: str) -> str | None:
    """A number as an operand, where PTX has a way to write it."""
    if kind == "f32":
        return f"0f{bits:08X}"
    if kind == "f64":
        return f"0d{bits:016X}"
    if kind in ("f16", "bf16", "f16x2", "bf16x2", "pred"):
        return None
    return str(number(bits, kind)) if WIDTH[kind] < 64 else f"0x{bits:X}"


def program_of(c: Case, name: str = "snippet") -> str:
    """Runs a case with registers, then under a guard, then each row with numbers; results are 64 bits each."""
    lines = [f"mov.u32 %r90, {len(c.rows)};", "setp.ge.u32 %p15, %thread, %r90;", "@%p15 ret;"]
    operands = []
    for i, kind in enumerate(c.kinds):
        if kind == "imm":
            operands.append(str(c.rows[0][i]))
            continue
        bits = WIDTH[kind]
        register = f"{BANK[bits]}{i}"
        lines += element(f"%in{i}", "%thread", 8, "%d20")
        if bits == 1:
            lines += ["ld.global.b32 %r91, [%d20];", f"setp.ne.s32 {register}, %r91, 0;"]
        else:
            lines += [f"ld.global.b{max(bits, 16)} {register}, [%d20];"]
        operands.append(register)
    destinations = [f"{BANK[WIDTH[k]]}{10 + i}" for i, k in enumerate(c.results)]
    into = "|".join(destinations)

    def keep(part: int, only: str = "") -> list[str]:
        kept = []
        for k, (kind, register) in enumerate(zip(c.results, destinations, strict=True)):
            kept += [f"add.u32 %r92, %thread, {(part * len(c.results) + k) * len(c.rows)};"]
            kept += element("%out", "%r92", 8, "%d20")
            if WIDTH[kind] == 1:
                kept += [f"selp.u32 %r93, 1, 0, {register};", f"{only}st.global.b32 [%d20], %r93;"]
            else:
                kept += [f"{only}st.global.b{WIDTH[kind]} [%d20], {register};"]
        return kept

    lines += [f"{c.opcode} {into}, {', '.join(operands)};", *keep(0)]
    for kind, register in zip(c.results, destinations, strict=True):
        if WIDTH[kind] == 1:
            lines += [f"setp.eq.u32 {register}, 0, 0;"]
        else:
            lines += [f"mov.b{WIDTH[kind]} {register}, {SENTINEL[WIDTH[kind]]};"]
    lines += ["and.b32 %r94, %thread, 1;", "setp.ne.u32 %p14, %r94, 0;"]
    lines += [f"@%p14 {c.opcode} {into}, {', '.join(operands)};", *keep(1)]
    for at, row in enumerate(c.rows[:LITERAL_ROWS]):
        for i, kind in enumerate(c.kinds):
            if kind != "imm" and (text := literal(row[i], kind)) is not None:
                operands[i] = text
        lines += [f"{c.opcode} {into}, {', '.join(operands)};", f"setp.eq.u32 %p13, %thread, {at};", *keep(2, "@%p13 ")]
    parameters = {"out": "u64"} | {f"in{i}": "u64" for i, k in enumerate(c.kinds) if k != "imm"}
    return entry(lines, parameters, name)


LITERAL_ROWS = 3


def check(c: Case) -> None:
    count = len(c.rows)
    out = np.zeros((3, len(c.results), count), np.uint64)
    columns = [np.array([row[i] for row in c.rows], np.uint64) for i, k in enumerate(c.kinds) if k != "imm"]
    Kernel(module(program_of(c))).launch((1,), -(-count // 32) * 32, [out, *columns])
    for part, title in enumerate(("with registers", "under a guard", "with numbers")):
        for k, kind in enumerate(c.results):
            for at in range(LITERAL_ROWS if part == 2 else count):
                if at >= count:
                    continue
                got, want = int(out[part, k, at]), c.want[at][k]
                if part == 1 and at % 2 == 0:
                    want = SENTINEL[WIDTH[kind]]
                if want is None or (want == "nan" and is_nan(got, kind)):
                    continue
                shown = want if isinstance(want, str) else f"{want:#x}"
                operands = ", ".join(f"{x:#x}" for x in c.rows[at])
                assert got == want, f"{c.opcode} {operands} {title}: got {got:#x}; should be {shown}"


CASES: list[Case] = []


def add(*arguments) -> None:
    CASES.append(case(*arguments))


# ---- integers --------------------------------------------------------------------------------------------------------


def by_number(kind: str, function: Callable, result: str | None = None) -> Callable:
    """An oracle that works on whole numbers, wrapped to the result's width."""
    return lambda *row: wrap(function(*[number(x, kind) for x in row]), WIDTH[result or kind])


def towards_zero(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


PAIRS = {bits: list(itertools.product(INTEGERS[bits], repeat=2)) for bits in INTEGERS}
TRIPLES = {bits: random.Random(1).sample(list(itertools.product(INTEGERS[bits], repeat=3)), 128) for bits in INTEGERS}

for bits, sign in itertools.product((16, 32, 64), "us"):
    t = f"{sign}{bits}"
    for op, function in {"add": int.__add__, "sub": int.__sub__, "mul.lo": int.__mul__, "min": min, "max": max}.items():
        add(f"{op}.{t}", t, (t, t), PAIRS[bits], by_number(t, function))
    add(f"mad.lo.{t}", t, (t, t, t), TRIPLES[bits], by_number(t, lambda a, b, c: a * b + c))
    # By zero, and the least number by -1, nothing is defined.
    least = (1 << (bits - 1), wrap(-1, bits)) if sign == "s" else None
    defined = [row for row in PAIRS[bits] if row[1] and row != least]
    add(f"div.{t}", t, (t, t), defined, by_number(t, towards_zero))
    add(f"rem.{t}", t, (t, t), defined, by_number(t, lambda a, b: a - towards_zero(a, b) * b))
    if bits < 64:
        wide = f"{sign}{2 * bits}"
        add(f"mul.wide.{t}", wide, (t, t), PAIRS[bits], by_number(t, int.__mul__, wide))
        addends = INTEGERS[2 * bits]
        rows = [(a, b, addends[i % len(addends)]) for i, (a, b) in enumerate(PAIRS[bits])]
        add(
            f"mad.wide.{t}", wide, (t, t, wide), rows,
            lambda a, b, c, t=t, wide=wide: wrap(number(a, t) * number(b, t) + number(c, wide), WIDTH[wide]),
        )  # fmt: skip
        add(f"mul.hi.{t}", t, (t, t), PAIRS[bits], by_number(t, lambda a, b, n=bits: (a * b) >> n))

for op, function in {"min": min, "max": max}.items():
    add(
        f"{op}.relu.s32", "s32", ("s32", "s32"), PAIRS[32], by_number("s32", lambda a, b, f=function: max(f(a, b), 0))
    )  # fmt: skip

for bits in (16, 32, 64):
    t = f"b{bits}"
    for op, function in {"and": int.__and__, "or": int.__or__, "xor": int.__xor__}.items():
        add(f"{op}.{t}", t, (t, t), PAIRS[bits], by_number(t, function))
    add(f"not.{t}", t, (t,), INTEGERS[bits], by_number(t, int.__invert__))
    add(f"neg.s{bits}", f"s{bits}", (f"s{bits}",), INTEGERS[bits], by_number(f"s{bits}", int.__neg__))
    add(f"abs.s{bits}", f"s{bits}", (f"s{bits}",), INTEGERS[bits], by_number(f"s{bits}", abs))
    # Counts past the width, and past what a byte holds.
    counts = (0, 1, 7, bits - 1, bits, bits + 1, 255, 256, 0x80000000, 0xFFFFFFFF)
    shifts = list(itertools.product(INTEGERS[bits], counts))
    add(f"shl.{t}", t, (t, "u32"), shifts, lambda a, n, b=bits: wrap(a << min(n, 64), b))
    for kind in "bus":
        u = f"{kind}{bits}"
        add(f"shr.{u}", u, (u, "u32"), shifts, lambda a, n, u=u: wrap(number(a, u) >> min(n, 64), WIDTH[u]))

PRED_PAIRS = list(itertools.product((0, 1), repeat=2))
add("and.pred", "pred", ("pred", "pred"), PRED_PAIRS, lambda a, b: a & b)
add("or.pred", "pred", ("pred", "pred"), PRED_PAIRS, lambda a, b: a | b)
add("xor.pred", "pred", ("pred", "pred"), PRED_PAIRS, lambda a, b: a ^ b)
add("not.pred", "pred", ("pred",), (0, 1), lambda a: 1 - a)

FUNNEL = [(a, b, n) for (a, b), n in zip(PAIRS[32], itertools.cycle((0, 1, 13, 31, 32, 33, 63, 64, 0xFFFFFFFF)))]
for mode, count in {"wrap": lambda n: n & 31, "clamp": lambda n: min(n, 32)}.items():
    add(
        f"shf.l.{mode}.b32", "b32", ("b32", "b32", "u32"), FUNNEL,
        lambda low, high, n, count=count: ((high << 32 | low) << count(n)) >> 32 & 0xFFFFFFFF,
    )  # fmt: skip
    add(
        f"shf.r.{mode}.b32", "b32", ("b32", "b32", "u32"), FUNNEL,
        lambda low, high, n, count=count: (high << 32 | low) >> count(n) & 0xFFFFFFFF,
    )  # fmt: skip

PLACES = list(itertools.product((0, 1, 5, 16, 31, 32, 40, 255, 256 + 3), (0, 1, 4, 16, 31, 32, 33, 255, 256)))


def extracted(a: int, at: int, length: int, signed_: bool) -> int:
    """Bit by bit, as the PTX ISA puts it: past bit 31 stands the sign, or nothing."""
    at, length = at & 255, length & 255
    sign = 0 if not signed_ or length == 0 else a >> min(at + length - 1, 31) & 1
    bits = [(a >> (at + i) & 1) if i < length and at + i < 32 else sign for i in range(32)]
    return sum(b << i for i, b in enumerate(bits))


def inserted(a: int, b: int, at: int, length: int) -> int:
    at, length = at & 255, length & 255
    for i in range(length):
        if at + i < 32:
            b = b & ~(1 << (at + i)) | (a >> i & 1) << (at + i) if i < 32 else b & ~(1 << (at + i))
    return b


SOURCES = (0x5AF019C3, 0x80000001, 0xFFFFFFFF)
FIELDS = [(a, at, length) for a in SOURCES for at, length in PLACES]
add("bfe.u32", "u32", ("u32", "u32", "u32"), FIELDS, lambda a, at, n: extracted(a, at, n, False))
add("bfe.s32", "s32", ("s32", "u32", "u32"), FIELDS, lambda a, at, n: extracted(a, at, n, True))
INSERTS = [(a, b, at, length) for a, b in ((0x5AF019C3, 0x0F0F3C3C), (0, 0xFFFFFFFF)) for at, length in PLACES]
add("bfi.b32", "b32", ("b32", "b32", "u32", "u32"), INSERTS, inserted)


def permuted(a: int, b: int, selector: int) -> int:
    data = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    picked = []
    for k in range(4):
        nibble = selector >> 4 * k & 15
        byte = data[nibble & 7]
        picked.append((255 if byte & 128 else 0) if nibble & 8 else byte)
    return int.from_bytes(bytes(picked), "little")


SELECTORS = (0x3210, 0x7654, 0x5410, 0x7632, 0x0123, 0xFEDC, 0xBA98, 0x8765, 0xFFFF1234, 0)
add(
    "prmt.b32", "b32", ("b32", "b32", "b32"),
    [(a, b, s) for a, b in ((0x80FF7F01, 0x13579BDF), (0x00800080, 0xDEADBEEF)) for s in SELECTORS], permuted,
)  # fmt: skip


def by_table(a: int, b: int, c: int, table: int) -> int:
    """Bit by bit: those of a, b and c are the number of a bit of the table."""
    rows = [(a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1) for i in range(32)]
    return sum((table >> row & 1) << i for i, row in enumerate(rows))


for table in (*range(0, 256, 17), 0x01, 0x80, 0xF8, 0x96, 0xE8, 0xCA, 0xD8, 0x3C, 0xFE):
    add(
        "lop3.b32", "b32", ("b32", "b32", "b32", "imm"),
        [(a, b, c, table) for a, b, c in TRIPLES[32][:32]],
        by_table,
    )  # fmt: skip
BIT_SOURCES = [*INTEGERS[32], *(1 << i for i in range(32)), 0x00FFFFFF, 0x01000000]
add("popc.b32", "u32", ("b32",), BIT_SOURCES, int.bit_count)
add("clz.b32", "u32", ("b32",), BIT_SOURCES, lambda a: 32 - a.bit_length())

# ---- floating point --------------------------------------------------------------------------------------------------


def exactly(function: Callable, kind: str) -> Callable:
    """An oracle for floats: the exact result rounded once; zeros, infinities and NaN as IEEE 754 has them."""

    def oracle(*row: int) -> int | str:
        values = [value(x, kind) for x in row]
        # Among infinities and NaN, and for the sign of a zero, numbers of size 1 stand for all that are finite.
        plain = [float(v) if isinstance(v, float) or v == 0 else math.copysign(1.0, v) for v in values]
        if not all(math.isfinite(v) for v in plain):
            return rounded(function(*plain), kind)
        exact = function(*[Fraction(v) for v in values])
        return rounded(exact if exact else function(*plain), kind)

    return oracle


def in_halves(oracle: Callable) -> Callable:
    """The same on both 16-bit halves."""
    return lambda *row: tuple(oracle(*[x >> s & 0xFFFF for x in row]) for s in (0, 16))


def with_ftz(oracle: Callable) -> Callable:
    return lambda *row: flushed(oracle(*[flushed(x) for x in row]))


BINARY = {"add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b}
FLOAT_PAIRS = {kind: list(itertools.product(FLOATS[kind], repeat=2)) for kind in FLOATS}
FLOAT_TRIPLES = {kind: random.Random(2).sample(list(itertools.product(FLOATS[kind], repeat=3)), 256) for kind in FLOATS}

for kind in ("f32", "f64"):
    for op, function in BINARY.items():
        oracle = exactly(function, kind)
        for rn in ("", ".rn"):
            add(f"{op}{rn}.{kind}", kind, (kind, kind), FLOAT_PAIRS[kind], oracle)
            if kind == "f32":
                add(f"{op}{rn}.ftz.f32", "f32", ("f32", "f32"), FLOAT_PAIRS[kind], with_ftz(oracle))
    top = 1 << (WIDTH[kind] - 1)
    numbers = [x for x in FLOATS[kind] if not is_nan(x, kind)]
    add(f"neg.{kind}", kind, (kind,), numbers, lambda a, top=top: a ^ top)
    add(f"abs.{kind}", kind, (kind,), numbers, lambda a, top=top: a & ~top)

FUSED = exactly(lambda a, b, c: a * b + c, "f32")
add("fma.rn.f32", "f32", ("f32",) * 3, FLOAT_TRIPLES["f32"], FUSED)
add("fma.rn.ftz.f32", "f32", ("f32",) * 3, FLOAT_TRIPLES["f32"], with_ftz(FUSED))


def chosen(op: str, keeps_nan: bool) -> Callable:
    def oracle(a: int, b: int) -> int | str:
        nans = [is_nan(x, "f32") for x in (a, b)]
        if all(nans) or (keeps_nan and any(nans)):
            return "nan"
        if any(nans):
            return b if nans[0] else a
        # -0 comes before +0: compare the patterns as sign and magnitude.
        order = sorted((a, b), key=lambda x: (-(x & 0x7FFFFFFF), 0) if x >> 31 else (x, 1))
        return order[0] if op == "min" else order[1]

    return oracle


for op, keeps in itertools.product(("min", "max"), (False, True)):
    nan = ".NaN" if keeps else ""
    add(f"{op}{nan}.f32", "f32", ("f32", "f32"), FLOAT_PAIRS["f32"], chosen(op, keeps))
    add(f"{op}.ftz{nan}.f32", "f32", ("f32", "f32"), FLOAT_PAIRS["f32"], with_ftz(chosen(op, keeps)))


def quotient(a: int, b: int, kind: str = "f32") -> int | str:
    x, y = value(a, kind), value(b, kind)
    sign = -1.0 if (a ^ b) >> 31 else 1.0
    if any(isinstance(v, float) and math.isnan(v) for v in (x, y)):
        return "nan"
    if y == 0 or x in (INF, -INF):
        return "nan" if x == 0 or y in (INF, -INF) else rounded(sign * INF, kind)
    if y in (INF, -INF) or x == 0:
        return rounded(sign * 0.0, kind)
    return rounded(Fraction(x) / Fraction(y), kind)


def square_root(a: int) -> int | str:
    x = value(a, "f32")
    if isinstance(x, float):
        return rounded(x if x != -INF else NAN, "f32")
    if x < 0:
        return "nan"
    with localcontext() as context:
        context.prec = 80
        return rounded(Fraction((Decimal(x.numerator) / Decimal(x.denominator)).sqrt()), "f32")


draw = random.Random(3)
ORDINARY = [rounded(Fraction(draw.uniform(-2, 2)) * 2 ** draw.randint(-20, 20), "f32") for _ in range(64)]
SPECIAL_AND_ORDINARY = [*FLOATS["f32"], *ORDINARY]
DIVISIONS = [*FLOAT_PAIRS["f32"], *zip(ORDINARY, reversed(ORDINARY), strict=True)]
add("div.rn.f32", "f32", ("f32", "f32"), DIVISIONS, quotient)
add("div.rn.ftz.f32", "f32", ("f32", "f32"), DIVISIONS, with_ftz(quotient))
for op, oracle in {"rcp": lambda a: quotient(0x3F800000, a), "sqrt": square_root}.items():
    add(f"{op}.rn.f32", "f32", ("f32",), SPECIAL_AND_ORDINARY, oracle)
    add(f"{op}.rn.ftz.f32", "f32", ("f32",), SPECIAL_AND_ORDINARY, with_ftz(oracle))


def joined(oracle: Callable, kind: str) -> Callable:
    """Both halves as one number; where one is NaN, the check is left to the scalar form."""

    def both(*row: int) -> int | None:
        low, high = in_halves(oracle)(*row)
        return None if "nan" in (low, high) else low | high << 16

    return both


for kind in ("bf16", "f16"):
    pairs, triples = FLOAT_PAIRS[kind], FLOAT_TRIPLES[kind]
    twice = [
        tuple(x | y << 16 for x, y in zip(*p, strict=True))
        for p in zip(pairs, random.Random(4).sample(pairs, len(pairs)), strict=False)
    ]
    for op, function in BINARY.items():
        oracle = exactly(function, kind)
        for rn in ("", ".rn"):
            add(f"{op}{rn}.{kind}", kind, (kind, kind), pairs, oracle)
            add(f"{op}{rn}.{kind}x2", f"{kind}x2", (f"{kind}x2",) * 2, twice, joined(oracle, kind))
    oracle = exactly(lambda a, b, c: a * b + c, kind)
    add(f"fma.rn.{kind}", kind, (kind,) * 3, triples, oracle)
    twice = [tuple(x | y << 16 for x, y in zip(*p, strict=True)) for p in zip(triples, reversed(triples), strict=False)]
    add(f"fma.rn.{kind}x2", f"{kind}x2", (f"{kind}x2",) * 3, twice, joined(oracle, kind))

# ---- comparisons -----------------------------------------------------------------------------------------------------

ORDER = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b, "lo": lambda a, b: a < b, "ls": lambda a, b: a <= b,
    "hi": lambda a, b: a > b, "hs": lambda a, b: a >= b,
}  # fmt: skip
COMBINE = {"": lambda p, c: p, "and": lambda p, c: p & c, "or": lambda p, c: p | c, "xor": lambda p, c: p ^ c}


def compared(name: str, kind: str, ftz: bool = False) -> Callable[[int, int], bool]:
    def compare(a: int, b: int) -> bool:
        if kind not in FORMAT:
            return ORDER[name](number(a, kind), number(b, kind))
        x, y = (value(flushed(v) if ftz else v, kind) for v in (a, b))
        unordered = x != x or y != y
        if name in ("num", "nan"):
            return unordered == (name == "nan")
        return name.endswith("u") if unordered else ORDER[name.removesuffix("u")](x, y)

    return compare


def add_comparisons(names: Iterable[str], kind: str, ftz: str = "") -> None:
    pairs = (FLOAT_PAIRS[kind] if kind in FORMAT else PAIRS[WIDTH[kind]])[:400]
    results = ("pred",) if kind in ("f16", "bf16") else ("pred", "pred")  # of 16 bits there is no second one
    for name, by in itertools.product(names, COMBINE):
        compare, combine = compared(name, kind, bool(ftz)), COMBINE[by]
        opcode = f"setp.{name}{f'.{by}' if by else ''}{ftz}.{kind}"
        if by:
            rows = [(a, b, i % 2) for i, (a, b) in enumerate(pairs)]
            add(
                opcode, results, (kind, kind, "pred"), rows,
                lambda a, b, c, f=compare, g=combine: (int(g(f(a, b), bool(c))), int(g(not f(a, b), bool(c)))),
            )  # fmt: skip
        else:
            add(opcode, results, (kind, kind), pairs, lambda a, b, f=compare: (int(f(a, b)), int(not f(a, b))))


SIX = ("eq", "ne", "lt", "le", "gt", "ge")
for bits in (16, 32, 64):
    add_comparisons(SIX, f"s{bits}")
    add_comparisons((*SIX, "lo", "ls", "hi", "hs"), f"u{bits}")
    add_comparisons(("eq", "ne"), f"b{bits}")
for kind in FLOATS:
    add_comparisons((*SIX, *(f"{n}u" for n in SIX), "num", "nan"), kind)
add_comparisons((*SIX, *(f"{n}u" for n in SIX), "num", "nan"), "f32", ".ftz")

MOVABLE = [*(f"{k}{n}" for k in "bus" for n in (16, 32, 64)), "f32", "f64"]
for kind in MOVABLE:
    values = FLOATS[kind] if kind in FLOATS else INTEGERS[WIDTH[kind]]
    rows = [(a, b, i % 2) for i, (a, b) in enumerate(zip(values, reversed(values), strict=True))]
    add(f"selp.{kind}", kind, (kind, kind, "pred"), rows, lambda a, b, p: a if p else b)
    add(f"mov.{kind}", kind, (kind,), values, lambda a: a)
add("mov.pred", "pred", ("pred",), (0, 1), lambda a: a)
add("cvta.global.u64", "u64", ("u64",), INTEGERS[64], lambda a: a)
add("cvta.to.global.u64", "u64", ("u64",), INTEGERS[64], lambda a: a)

# ---- conversions -----------------------------------------------------------------------------------------------------

SIZES = (16, 32, 64)
for to, source in itertools.product([f"{k}{n}" for k in "us" for n in (8, 16, 32, 64)], repeat=2):
    # A byte lives in a wider register, which it fills: by its sign, or by zeros.
    held = {k: max(WIDTH[k], 16) for k in (to, source)}
    add(
        f"cvt.{to}.{source}", f"b{held[to]}", (f"b{held[source]}",), INTEGERS[held[source]],
        lambda a, t=to, s=source, h=held: wrap(
            number(wrap(number(wrap(a, WIDTH[s]), s), WIDTH[t]), t), h[t]
        ),
    )  # fmt: skip
for to, source in itertools.product(("f32", "f64"), [f"{k}{n}" for k in "us" for n in SIZES]):
    bits = WIDTH[source]
    ties = [
        wrap(x, bits) for x in ((1 << 24) + 1, (1 << 24) + 3, (1 << 53) + 1, (1 << 62) + (1 << 38), (1 << 32) - 129)
    ]
    add(
        f"cvt.rn.{to}.{source}", to, (source,), [*INTEGERS[bits], *ties],
        lambda a, t=to, s=source: rounded(Fraction(number(a, s)), t),
    )  # fmt: skip

WHOLE = {"rzi": math.trunc, "rni": round, "rmi": math.floor, "rpi": math.ceil}


def clamped(to: str, how: str) -> Callable[[int], int]:
    low, high = (-(1 << (WIDTH[to] - 1)), (1 << (WIDTH[to] - 1)) - 1) if to[0] == "s" else (0, (1 << WIDTH[to]) - 1)

    def oracle(a: int) -> int:
        x = value(a, "f32")
        if x != x:
            return 0
        whole = high if x == INF else low if x == -INF else WHOLE[how](x)
        return wrap(min(max(whole, low), high), WIDTH[to])

    return oracle


HALVES = [rounded(Fraction(k, 2), "f32") for k in (-7, -5, -3, -1, 1, 3, 5, 7, 16777215)]
LARGE = [
    rounded(s * Fraction(2) ** e * f, "f32")
    for s in (1, -1)
    for e in (31, 32, 63, 64)
    for f in (1, 1 - Fraction(1, 2**24))
]
for how, to, ftz in itertools.product(WHOLE, ("u32", "s32", "u64", "s64"), ("", ".ftz")):
    oracle = clamped(to, how)
    add(
        f"cvt.{how}{ftz}.{to}.f32", to, ("f32",), [*SPECIAL_AND_ORDINARY, *HALVES, *LARGE],
        (lambda a, f=oracle: f(flushed(a))) if ftz else oracle,
    )  # fmt: skip


def converted(to: str, source: str) -> Callable[[int], int | str]:
    return lambda a: rounded(value(a, source), to)


for source in ("bf16", "f16"):
    for ftz in ("", ".ftz"):
        # .ftz flushes subnormal float32 alone; a subnormal of bfloat16 becomes one.
        oracle = converted("f32", source)
        add(
            f"cvt{ftz}.f32.{source}", "f32", (source,), FLOATS[source],
            (lambda a, f=oracle: flushed(f(a))) if ftz else oracle,
        )  # fmt: skip
TIES = {
    "bf16": [0x3F808000, 0x3F818000, 0x3F808001, 0x7F7F8000, 0x00008000, 0x00018000, 0x80004000],
    "f16": [0x3F801000, 0x3F803000, 0x3F801001, 0x477FF000, 0x477FEFFF, 0x33000000, 0x33000001, 0x33C00000, 0xB3800000],
}
for to in ("bf16", "f16"):
    rows = [*SPECIAL_AND_ORDINARY, *TIES[to]]
    add(f"cvt.rn.{to}.f32", to, ("f32",), rows, converted(to, "f32"))

    def packed(a: int, b: int, to: str = to) -> int | None:
        """The first operand is the upper half."""
        upper, lower = rounded(value(a, "f32"), to), rounded(value(b, "f32"), to)
        return None if "nan" in (upper, lower) else upper << 16 | lower

    add(f"cvt.rn.{to}x2.f32", f"{to}x2", ("f32", "f32"), list(zip(rows, reversed(rows), strict=True)), packed)
DOUBLES = [
    *FLOATS["f64"],
    0x3FF0000010000000,
    0x3FF0000030000000,
    0x47EFFFFFF0000000,
    0x47EFFFFFEFFFFFFF,
    0x3690000000000000,
    0x3690000000000001,
]
add("cvt.rn.f32.f64", "f32", ("f64",), DOUBLES, converted("f32", "f64"))
add("cvt.f64.f32", "f64", ("f32",), SPECIAL_AND_ORDINARY, converted("f64", "f32"))


@pytest.mark.parametrize("c", CASES, ids=lambda c: c.opcode)
def test_known_answers(c: Case) -> None:
    check(c)


def test_nan_of_16_bits_is_the_one_that_devices_give() -> None:
    """Cases that end in NaN above take any; this one is documented."""
    c = case("cvt.rn.bf16.f32", "b16", ("f32",), [0x7FC00000, 0xFFC00001, 0x7F800001], lambda a: 0x7FFF)
    check(c)


def test_assembles(tmp_path) -> None:
    """NVIDIA's assembler takes every spelling, with the same operands."""
    ptxas = shutil.which("ptxas")
    if ptxas is None:
        pytest.skip("ptxas is not on the PATH")
    seen = {c.opcode: c for c in CASES}
    short = [Case(c.opcode, c.results, c.kinds, c.rows[:1], c.want[:1]) for c in seen.values()]
    text = module(*(program_of(c, f"k{i}") for i, c in enumerate(short)))
    done = subprocess.run(
        [ptxas, "-arch=sm_90a", "-O0", "-o", tmp_path / "out", "-"], input=text, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[:2000]


# ---- approximations --------------------------------------------------------------------------------------------------


def run(lines: list[str], arrays: dict[str, np.ndarray], threads: int = 32, shared: int = 0, ctas: int = 1) -> None:
    """Runs a few lines; pointers to the arrays are in registers of their names."""
    text = module(entry(lines, dict.fromkeys(arrays, "u64"), shared=shared))
    Kernel(text).launch((ctas,), threads, arrays)


def unary(opcode: str, *operands: np.ndarray) -> np.ndarray:
    """An instruction on float32 arrays of 1,024."""
    out = np.zeros(1024, np.float32)
    lines, names = [], []
    for i in range(len(operands)):
        lines += [*element(f"%in{i}", "%thread", 4, "%d0"), f"ld.global.f32 %r{i}, [%d0];"]
        names.append(f"%r{i}")
    lines += [f"{opcode} %r9, {', '.join(names)};", *element("%out", "%thread", 4, "%d0"), "st.global.f32 [%d0], %r9;"]
    run(lines, {"out": out} | {f"in{i}": x for i, x in enumerate(operands)}, threads=1024)
    return out


def exact_value(x: float) -> Fraction:
    return Fraction(float(x))


def decimal_of(function: Callable[[Decimal], Decimal], x: float) -> Fraction:
    with localcontext() as context:
        context.prec = 40
        return Fraction(function(Decimal(float(x))))


def log2(x: Decimal) -> Decimal:
    return x.ln() / Decimal(2).ln()


def tanh(x: Decimal) -> Decimal:
    e = (2 * x).exp()
    return (e - 1) / (e + 1)


def ulp(x: Fraction) -> Fraction:
    return Fraction(2) ** (math.floor(math.log2(abs(x))) - 23)


# Function, arguments, largest error (relative, or in units in the last place), results that float32 holds, edges.
Edges = list[tuple[float, float]]
Approximate = tuple[Callable, Callable, Callable, Edges, Edges]
POSITIVE = lambda d: d.uniform(1, 2) * 2.0 ** d.randint(-60, 60)  # noqa: E731
APPROXIMATE: dict[str, Approximate] = {
    "ex2": (
        lambda x: (Decimal(2).ln() * x).exp(), lambda d: d.uniform(-100, 100), lambda y: 2 * ulp(y),
        [(0.0, 1.0), (3.0, 8.0), (-2.0, 0.25), (127.0, 2.0**127)],
        [(-INF, 0.0), (INF, INF), (NAN, NAN), (129.0, INF), (-200.0, 0.0)],
    ),
    "lg2": (
        log2, POSITIVE, lambda y: max(abs(y), 1 if abs(y) < 1 else 0) * Fraction(1, 2**22),
        [(1.0, 0.0), (8.0, 3.0), (0.25, -2.0)], [(0.0, -INF), (-0.0, -INF), (-1.0, NAN), (INF, INF), (NAN, NAN)],
    ),
    "rcp": (
        lambda x: 1 / x, POSITIVE, lambda y: min(Fraction(3, 2) * ulp(y), abs(y) * Fraction(1, 2**23)),
        [(4.0, 0.25), (-0.5, -2.0)], [(0.0, INF), (-0.0, -INF), (INF, 0.0), (-INF, -0.0), (NAN, NAN)],
    ),
    "rsqrt": (
        lambda x: 1 / x.sqrt(), POSITIVE, lambda y: abs(y) * Fraction(2.0**-22.9),
        [(4.0, 0.5), (1.0, 1.0)], [(0.0, INF), (-0.0, -INF), (INF, 0.0), (-1.0, NAN), (NAN, NAN)],
    ),
    "sqrt": (
        lambda x: x.sqrt(), POSITIVE, lambda y: abs(y) * Fraction(1, 2**23),
        [(4.0, 2.0), (2.25, 1.5)], [(0.0, 0.0), (-0.0, -0.0), (INF, INF), (-1.0, NAN), (NAN, NAN)],
    ),
    "tanh": (
        tanh, lambda d: d.uniform(-4, 4), lambda y: abs(y) * Fraction(1, 2**11),
        [(0.0, 0.0), (-0.0, -0.0)], [(INF, 1.0), (-INF, -1.0), (NAN, NAN)],
    ),
}  # fmt: skip
APPROXIMATE_OPCODES = {
    f"{op}.approx{ftz}.f32": op for op in APPROXIMATE for ftz in ("", ".ftz") if (op, ftz) != ("tanh", ".ftz")
}


@pytest.mark.parametrize("opcode", APPROXIMATE_OPCODES)
def test_approximate_functions(opcode: str) -> None:
    function, argument, bound, representable, edges = APPROXIMATE[APPROXIMATE_OPCODES[opcode]]
    draw = random.Random(opcode)
    x = np.array([argument(draw) for _ in range(1024)], np.float32)
    if opcode.startswith("lg2"):
        x[:512] = [draw.uniform(0.51, 1.99) for _ in range(512)]
    fixed = representable + edges
    x[: len(fixed)] = [a for a, _ in fixed]
    got = unary(opcode, x)
    for k, (_, want) in enumerate(fixed):
        assert np.array_equal(got[k : k + 1].view(np.uint32), np.float32([want]).view(np.uint32)) or (
            math.isnan(want) and math.isnan(got[k])
        ), f"{opcode} {x[k]}: got {got[k]}, should be {want}"
    off = 0
    for a, b in zip(x[len(fixed) :], got[len(fixed) :], strict=True):
        y = decimal_of(function, a)
        assert abs(exact_value(b) - y) <= bound(y), f"{opcode} {a}: got {b}, should be {float(y)}"
        off += np.float32(float(y)) != b
    assert off > 200, "a kernel has to bear errors: they are not always zero"


@pytest.mark.parametrize("opcode", [op for op in APPROXIMATE_OPCODES if op.startswith(("ex2", "rcp", "rsqrt", "sqrt"))])
def test_approximate_functions_flush_where_they_say_so(opcode: str) -> None:
    tiny = np.float32(2.0**-140)
    x = np.full(1024, tiny)
    x[1] = -149 if opcode.startswith("ex2") else 2.0**127
    got = unary(opcode, x)
    flushes = ".ftz" in opcode
    if opcode.startswith("ex2"):
        assert got[1] == (0 if flushes else 2.0**-149)
    elif opcode.startswith("rcp"):
        assert got[0] == INF  # 2^140 is past float32, either way
        assert got[1] == (0 if flushes else 2.0**-127)
    elif opcode.startswith("rsqrt"):
        assert got[0] == (INF if flushes else 2.0**70)
    else:
        assert got[0] == (0 if flushes else 2.0**-70)


DIVISION_OPCODES = [f"div.{how}{ftz}.f32" for how in ("full", "approx") for ftz in ("", ".ftz")]


@pytest.mark.parametrize("opcode", DIVISION_OPCODES)
def test_approximate_division(opcode: str) -> None:
    draw = random.Random(5)
    a, b = (np.array([draw.choice((-1, 1)) * POSITIVE(draw) for _ in range(1024)], np.float32) for _ in range(2))
    fixed = [(6.0, 2.0, 3.0), (-1.0, 4.0, -0.25), (1.0, 0.0, INF), (0.0, -5.0, -0.0), (1.0, INF, 0.0), (NAN, 1.0, NAN)]
    fixed += [(0.0, 0.0, NAN), (INF, INF, NAN)]
    if ".approx" in opcode:  # its 1 / b underflows
        fixed += [(2.0**127, 2.0**127, 0.0), (INF, 2.0**127, NAN)]
    else:
        fixed += [(2.0**127, 2.0**127, 1.0)]
    a[: len(fixed)], b[: len(fixed)] = [f[0] for f in fixed], [f[1] for f in fixed]
    got = unary(opcode, a, b)
    want = np.float32([f[2] for f in fixed])
    assert np.array_equal(got[: len(fixed)], want, equal_nan=True)
    assert np.array_equal(np.signbit(got[: len(fixed) - 1][3:5]), [True, False])
    off = 0
    for x, y, z in zip(a[len(fixed) :], b[len(fixed) :], got[len(fixed) :], strict=True):
        exact = exact_value(x) / exact_value(y)
        assert abs(exact_value(z) - exact) <= 2 * ulp(exact), f"{opcode} {x} {y}: got {z}"
        off += np.float32(float(exact)) != z
    assert off > 200


# ---- moves of vectors ------------------------------------------------------------------------------------------------


def test_mov_packs_and_unpacks() -> None:
    out = np.zeros((32, 4), np.uint64)
    lines = [
        "mov.b32 %r0, 0x33445566;", "mov.b32 %r1, 0x778899AA;", "mov.b64 %d0, {%r0, %r1};",
        "mov.b64 {%r2, %r3}, %d0;", "mov.b64 {%h0, %h1, %h2, %h3}, %d0;", "mov.b32 {_, %h4}, %r0;",
        "mov.b32 %r4, {%h3, %h0};", "mov.b64 %d1, {%h3, %h2, %h1, %h0};", "mov.b64 %d2, {%r3, %r2};",
        "cvt.u64.u16 %d3, %h4;", "cvt.u64.u32 %d4, %r4;",
        *element("%out", "%thread", 32, "%d5"), "st.global.v2.b64 [%d5], {%d1, %d2};",
        "st.global.v2.b64 [%d5+16], {%d3, %d4};",
    ]  # fmt: skip
    run(lines, {"out": out})
    assert out[7].tolist() == [0x5566334499AA7788, 0x33445566778899AA, 0x3344, 0x55667788]


# ---- memory ----------------------------------------------------------------------------------------------------------

TYPES = ("b8", "u8", "s8", "b16", "u16", "s16", "b32", "u32", "s32", "f32", "b64", "u64", "s64", "f64")
PRIORITIES = [f".L1::{p}" for p in ("evict_normal", "evict_first", "evict_last", "evict_unchanged", "no_allocate")]
RELAXED = [f".relaxed.{scope}" for scope in ("cta", "gpu", "sys")]


def accesses(width: int = 16) -> list[str]:
    """Vectors and types of at most 16 bytes."""
    return [
        f"{v}.{t}" for t in TYPES for v in ("", ".v2", ".v4") if WIDTH[t] // 8 * int(v[2:] or 1) <= width
    ]  # fmt: skip


FEW = (".b16", ".v2.f32", ".v4.u32", ".b64", ".v2.u64")


def with_hints(op: str, caches: tuple[str, ...]) -> list[str]:
    """Every type and vector with the plain, the weak and the relaxed form; hints with a few of them."""
    plain = [f"{op}{where}{a}" for where in (".global", ".relaxed.gpu.global") for a in accesses()]
    wheres = [f"{w}.global{h}" for w in ("", ".weak") for h in ("", *caches, *PRIORITIES)]
    wheres += [f"{w}.global{h}" for w in RELAXED for h in ("", *PRIORITIES)]
    return list(dict.fromkeys([*plain, *(f"{op}{where}{a}" for where in wheres for a in FEW)]))


LOADS = with_hints("ld", (".ca", ".cg", ".cs", ".lu", ".cv"))
LOADS += [f"ld.global.nc{a}" for a in accesses()]
LOADS += [f"ld.global{h}.nc{a}" for h in (".ca", ".cg", ".cs") for a in FEW]
LOADS += [f"ld.global.nc{h}{a}" for h in PRIORITIES for a in (*FEW, ".s64", ".f64", ".v2.f64")]
STORES = with_hints("st", (".wb", ".cg", ".cs", ".wt"))
SHARED = [f".shared{cta}{a}" for cta in ("", "::cta") for a in accesses()]


def parts(opcode: str) -> tuple[str, int]:
    """Type and number of elements."""
    pieces = opcode.split(".")
    return pieces[-1], int(pieces[-2][1]) if pieces[-2] in ("v2", "v4") else 1


def registers(count: int, bits: int) -> list[str]:
    return [f"{BANK[max(bits, 16)]}{i}" for i in range(count)]


def braced(names: list[str]) -> str:
    return f"{{{', '.join(names)}}}" if len(names) > 1 else names[0]


def widened(x: int, kind: str) -> int:
    """What a load leaves in a register of 64 bits."""
    return wrap(number(x, kind), 64)


def load_lines(opcode: str, address: str) -> list[str]:
    """Loads into 64-bit registers, extended as the type says, and stores those one by one."""
    _, count = parts(opcode)
    names = [f"%d{i}" for i in range(count)]
    lines = [f"{opcode} {braced(names)}, [{address}];", *element("%out", "%thread", 8 * count, "%d10")]
    return lines + [f"st.global.b64 [%d10+{8 * i}], {name};" for i, name in enumerate(names)]


@pytest.mark.parametrize("opcode", LOADS)
def test_loads_from_global_memory(opcode: str) -> None:
    kind, count = parts(opcode)
    size = WIDTH[kind] // 8
    data = np.random.default_rng(0).integers(0, 256, 32 * count * size, np.uint8)
    out = np.zeros((32, count), np.uint64)
    run([*element("%x", "%thread", size * count, "%d9"), *load_lines(opcode, "%d9")], {"out": out, "x": data})
    for i, got in enumerate(out.ravel().tolist()):
        assert got == widened(int.from_bytes(data[i * size : (i + 1) * size].tobytes(), "little"), kind)


def store_lines(opcode: str, address: str) -> list[str]:
    """Stores the low bits of 64-bit registers that hold ``0x0123456789ABCDEF * (4 * thread + i + 1)``."""
    _, count = parts(opcode)
    lines = ["cvt.u64.u32 %d10, %thread;", "shl.b64 %d10, %d10, 2;"]
    for i in range(count):
        lines += [f"add.s64 %d{i}, %d10, {i + 1};", f"mul.lo.s64 %d{i}, %d{i}, 0x0123456789ABCDEF;"]
    return [*lines, f"{opcode} [{address}], {braced([f'%d{i}' for i in range(count)])};"]


def stored_bytes(size: int, count: int, threads: int = 32) -> bytes:
    values = [0x0123456789ABCDEF * (4 * t + i + 1) for t in range(threads) for i in range(count)]
    return b"".join(wrap(v, 8 * size).to_bytes(size, "little") for v in values)


@pytest.mark.parametrize("opcode", STORES)
def test_stores_to_global_memory(opcode: str) -> None:
    kind, count = parts(opcode)
    size = WIDTH[kind] // 8
    out = np.zeros(32 * count * size, np.uint8)
    run([*element("%out", "%thread", size * count, "%d9"), *store_lines(opcode, "%d9")], {"out": out})
    assert out.tobytes() == stored_bytes(size, count)


@pytest.mark.parametrize("where", SHARED)
def test_shared_memory(where: str) -> None:
    kind, count = parts(where)
    size = WIDTH[kind] // 8
    out = np.zeros((32, count), np.uint64)
    lines = [f"mul.lo.u32 %r90, %thread, {size * count};", "mov.u32 %r91, sm;", "add.u32 %r90, %r90, %r91;"]
    lines += [*store_lines(f"st{where}", "%r90+64"), *load_lines(f"ld{where}", "%r90+64")]
    run(lines, {"out": out}, shared=64 + 32 * 16)
    stored = stored_bytes(size, count)
    for i, got in enumerate(out.ravel().tolist()):
        assert got == widened(int.from_bytes(stored[i * size : (i + 1) * size], "little"), kind)


@pytest.mark.parametrize("kind", TYPES)
def test_parameters(kind: str) -> None:
    out = np.zeros(32, np.uint64)
    bits = WIDTH[kind]
    given = -1.5 if kind[0] == "f" else -3 if kind[0] == "s" else 250
    text = f"""
.visible .entry k(.param .u64 .ptr .global .align 1 k_out, .param .{kind} k_x)
{{
    .reg .b64 %d<4>;
    .reg .b32 %r;
    ld.param.u64 %d0, [k_out];
    ld.param.{kind} %d1, [k_x];
    mov.u32 %r, %tid.x;
    mul.wide.u32 %d2, %r, 8;
    add.s64 %d2, %d2, %d0;
    st.global.b64 [%d2], %d1;
    ret;
}}"""
    Kernel(module(text)).launch((1,), 32, [out, given])
    want = rounded(Fraction(given), kind) if kind[0] == "f" else widened(wrap(given, bits), kind)
    assert int(out[5]) == want


ATOMIC_WHERE = (".global", ".relaxed.global", ".gpu.global", ".relaxed.gpu.global", ".global.gpu")
ATOMICS = [f"{op}{where}.add.{t}" for op in ("red", "atom") for where in ATOMIC_WHERE for t in ("f32", "u32", "s32")]


@pytest.mark.parametrize("opcode", ATOMICS)
def test_atomic_add(opcode: str) -> None:
    kind = opcode.rsplit(".", 1)[1]
    dtype = {"f32": np.float32, "u32": np.uint32, "s32": np.int32}[kind]
    sums, before = np.array([0, 5], dtype), np.zeros((2, 32), dtype)
    start = {"u32": 0xFFFFFFF0, "s32": 0x7FFFFFF0, "f32": 16}[kind]
    sums[0] = start
    one = "0f3F800000" if kind == "f32" else "1"
    lines = [f"atom{opcode[4:]} %r0, [%sums], {one};" if opcode[0] == "a" else f"{opcode} [%sums], {one};"]
    if opcode[0] == "a":
        lines += [
            "mad.lo.s32 %r1, %block, 32, %thread;",
            *element("%before", "%r1", 4, "%d0"),
            "st.global.b32 [%d0], %r0;",
        ]
    run(lines, {"sums": sums, "before": before}, ctas=2)
    wide = [start + i for i in range(65)]
    expected = [int(w) if kind == "f32" else wrap(w, 32) for w in wide]
    assert int(sums[0]) & 0xFFFFFFFF == expected[64]
    assert sums[1] == 5
    if opcode[0] == "a":
        assert sorted(int(b) & 0xFFFFFFFF for b in before.ravel()) == sorted(expected[:64])


COPIES = [
    (f"cp.async.{cache}.shared{cta}.global{ahead}", width)
    for cache, widths in (("ca", (4, 8, 16)), ("cg", (16,)))
    for cta in ("", "::cta")
    for ahead in ("", ".L2::64B", ".L2::128B", ".L2::256B")
    for width in widths
]


@pytest.mark.parametrize("wait", ["cp.async.commit_group;\ncp.async.wait_group 0;", "cp.async.wait_all;"])
@pytest.mark.parametrize("size", [None, "register", "0"])
@pytest.mark.parametrize(("opcode", "width"), COPIES[::5])
def test_asynchronous_copies(opcode: str, width: int, size: str | None, wait: str) -> None:
    check_copy(opcode, width, size, wait)


@pytest.mark.parametrize(("opcode", "width"), COPIES)
def test_every_asynchronous_copy(opcode: str, width: int) -> None:
    check_copy(opcode, width, None, "cp.async.wait_all;")


def check_copy(opcode: str, width: int, size: str | None, wait: str) -> None:
    """Even lanes copy, where the size is in a register; the others get zeros."""
    data = np.arange(1, 1 + 32 * width, dtype=np.uint32).astype(np.uint8)
    out = np.zeros((32, width), np.uint8)
    last = {None: "", "register": ", %r2", "0": ", 0"}[size]
    lines = [
        *element("%x", "%thread", width, "%d0"), f"mul.lo.u32 %r0, %thread, {width};", "mov.u32 %r1, sm;",
        "add.u32 %r0, %r0, %r1;", "and.b32 %r2, %thread, 1;", "setp.eq.u32 %p0, %r2, 0;",
        f"selp.u32 %r2, {width}, 0, %p0;", f"{opcode} [%r0], [%d0], {width}{last};", wait,
        *element("%out", "%thread", width, "%d1"),
    ]  # fmt: skip
    for at in range(0, width, 4):
        lines += [f"ld.shared.b32 %r3, [%r0+{at}];", f"st.global.b32 [%d1+{at}], %r3;"]
    run(lines, {"out": out, "x": data}, shared=512)
    want = data.reshape(32, width).copy()
    if size == "register":
        want[1::2] = 0
    elif size == "0":
        want[:] = 0
    assert np.array_equal(out, want)


# ---- between lanes ---------------------------------------------------------------------------------------------------

SHUFFLES = [f"shfl.sync.{how}.b32" for how in ("up", "down", "bfly", "idx")]


def shuffled(how: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    """Lane to read from, and whether it is in range: as the PTX ISA's pseudocode has it."""
    clamp, mask = c & 31, c >> 8 & 31
    most = (lane & mask) | (clamp & ~mask & 31)
    least = lane & mask
    j = {"up": lane - (b & 31), "down": lane + (b & 31), "bfly": lane ^ (b & 31)}.get(how, least | (b & ~mask & 31))
    inside = j >= most if how == "up" else j <= most
    return (j if inside else lane), inside


@pytest.mark.parametrize("c", [0, 31, 0x1F00 | 31, 0x1800 | 31, 0x1000 | 15, 0x1C1F, 0x1800, 7])
@pytest.mark.parametrize("b", [0, 1, 5, 8, 16, 31, 33, "lane"])
@pytest.mark.parametrize("opcode", SHUFFLES)
def test_shuffles(opcode: str, b: int | str, c: int) -> None:
    how = opcode.split(".")[2]
    out, found = np.zeros(64, np.uint32), np.zeros(64, np.uint32)
    by = "%r2" if b == "lane" else str(b)
    lines = [
        "mul.lo.u32 %r0, %thread, 1000;", "mul.lo.u32 %r2, %lane, 7;", f"{opcode} %r1|%p0, %r0, {by}, {c}, 0xffffffff;",
        f"{opcode} %r4, %r0, {by}, {c}, -1;", "setp.ne.u32 %p1, %r4, %r1;", "selp.u32 %r3, 1, 0, %p0;",
        "selp.u32 %r3, 9, %r3, %p1;",
        *element("%out", "%thread", 4, "%d0"), "st.global.b32 [%d0], %r1;",
        *element("%found", "%thread", 4, "%d0"), "st.global.b32 [%d0], %r3;",
    ]  # fmt: skip
    run(lines, {"out": out, "found": found}, threads=64)
    for thread in range(64):
        lane, inside = shuffled(how, thread % 32, 7 * (thread % 32) if b == "lane" else b, c)
        assert (out[thread], found[thread]) == (1000 * (thread // 32 * 32 + lane), inside)


def test_shuffles_of_half_a_warp() -> None:
    out = np.zeros(32, np.uint32)
    lines = [
        "mov.u32 %r1, 77;",
        "setp.lt.u32 %p0, %thread, 16;",
        "@%p0 shfl.sync.bfly.b32 %r1, %thread, 1, 31, 0xffff;",
    ]
    run([*lines, *element("%out", "%thread", 4, "%d0"), "st.global.b32 [%d0], %r1;"], {"out": out})
    assert out.tolist() == [t ^ 1 if t < 16 else 77 for t in range(32)]


VOTES = ["vote.sync.any.pred", "vote.sync.all.pred", "vote.sync.ballot.b32"]


@pytest.mark.parametrize("opcode", VOTES)
@pytest.mark.parametrize("least", [0, 1, 17, 31, 32])
def test_votes(opcode: str, least: int) -> None:
    """Lanes from `least` on vote yes; first all lanes, then the upper half."""
    out = np.zeros((2, 32), np.uint32)
    result = "%r1" if "ballot" in opcode else "%p1"
    shown = [] if "ballot" in opcode else ["selp.u32 %r1, 1, 0, %p1;"]
    lines = [f"setp.ge.u32 %p0, %thread, {least};", f"{opcode} {result}, %p0, -1;", *shown]
    lines += [*element("%out", "%thread", 4, "%d0"), "st.global.b32 [%d0], %r1;", "setp.ge.u32 %p2, %thread, 16;"]
    lines += [f"@%p2 {opcode} {result}, %p0, 0xffff0000;", *shown, "@%p2 st.global.b32 [%d0+128], %r1;"]
    run(lines, {"out": out})
    for part, lanes in enumerate((range(32), range(16, 32))):
        yes = [lane >= least for lane in lanes]
        ballot = sum(y << lane for y, lane in zip(yes, lanes, strict=True))
        want = {"any": any(yes), "all": all(yes), "ballot": ballot}[opcode.split(".")[2]]
        assert (out[part, lanes.start :] == want).all()


# ---- matrices --------------------------------------------------------------------------------------------------------


def numbers_of(kind: str, shape: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Bits of random numbers that 16 bits hold, and the numbers in float64."""
    bits = 16 if kind == "f16" else 32
    drawn = np.random.default_rng(seed).integers(-128, 128, shape) / 32.0
    if bits == 16:
        return drawn.astype(np.float16).view(np.uint16), drawn
    return (drawn.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16), drawn


LDMATRIX = [
    f"ldmatrix.sync.aligned.m8n8.x{n}{trans}.shared{cta}.b16"
    for n in (1, 2, 4) for trans in ("", ".trans") for cta in ("", "::cta")
]  # fmt: skip


@pytest.mark.parametrize("opcode", LDMATRIX)
def test_ldmatrix(opcode: str) -> None:
    """Row r of matrix k is 16 bytes at its own place; places are shuffled."""
    count = int(opcode.split(".x")[1][0])
    matrices = np.arange(count * 64, dtype=np.uint16).reshape(count, 8, 8)
    place = np.random.default_rng(0).permutation(count * 8).astype(np.uint32) * 16
    image = np.zeros(count * 64, np.uint16)
    for k, r in itertools.product(range(count), range(8)):
        image[place[8 * k + r] // 2 :][:8] = matrices[k, r]
    rows = np.full(32, 0xFFFF0, np.uint32)  # lanes past the matrices name nothing
    rows[: 8 * count] = place
    out = np.zeros((32, 4), np.uint32)
    names = [f"%r{i}" for i in range(count)]
    lines = [
        *element("%x", "%thread", 4, "%d0"), "shl.b32 %r20, %thread, 2;", "mov.b32 %r30, sm;",
        "add.u32 %r20, %r20, %r30;",
    ]  # fmt: skip
    for at in range(0, count * 128, 128):
        lines += [f"ld.global.b32 %r21, [%d0+{at}];", f"st.shared.b32 [%r20+{at}], %r21;"]
    lines += [
        "bar.warp.sync -1;", *element("%rows", "%thread", 4, "%d1"), "ld.global.b32 %r22, [%d1];",
        f"{opcode} {{{', '.join(names)}}}, [%r22];", *element("%out", "%thread", 16, "%d2"),
        *(f"st.global.b32 [%d2+{4 * i}], {name};" for i, name in enumerate(names)),
    ]  # fmt: skip
    run(lines, {"out": out, "x": image, "rows": rows}, shared=count * 128)
    for lane, k in itertools.product(range(32), range(count)):
        m = matrices[k].T if ".trans" in opcode else matrices[k]
        low, high = m[lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2].tolist()
        assert out[lane, k] == low | high << 16


STMATRIX = [opcode.replace("ldmatrix", "stmatrix") for opcode in LDMATRIX]


@pytest.mark.parametrize("opcode", STMATRIX)
def test_stmatrix(opcode: str) -> None:
    """Two warps; row r of matrix k goes to a place of its own; places are shuffled."""
    count = int(opcode.split(".x")[1][0])
    matrices = np.arange(2 * count * 64, dtype=np.uint16).reshape(2, count, 8, 8)
    place = np.random.default_rng(0).permutation(2 * count * 8).astype(np.uint32).reshape(2, -1) * 16
    rows = np.full((2, 32), 0xFFFF0, np.uint32)  # lanes past the matrices name nothing
    rows[:, : 8 * count] = place
    held = np.zeros((64, 4), np.uint32)
    for thread, k in itertools.product(range(64), range(count)):
        lane, m = thread % 32, matrices[thread // 32, k]
        held[thread, k] = pair(m.T if ".trans" in opcode else m, lane // 4, lane % 4 * 2)
    out = np.zeros(2 * count * 64, np.uint16)
    names = [f"%r{i}" for i in range(count)]
    lines = [*element("%held", "%thread", 16, "%d0"), "ld.global.v4.b32 {%r0, %r1, %r2, %r3}, [%d0];"]
    lines += [*element("%rows", "%thread", 4, "%d1"), "ld.global.b32 %r22, [%d1];"]
    lines += [f"{opcode} [%r22], {{{', '.join(names)}}};", "bar.sync 0;", *element("%out", "%thread", 4, "%d2")]
    lines += ["shl.b32 %r20, %thread, 2;", "mov.b32 %r30, sm;", "add.u32 %r20, %r20, %r30;"]
    for at in range(0, count * 256, 256):
        lines += [f"ld.shared.b32 %r21, [%r20+{at}];", f"st.global.b32 [%d2+{at}], %r21;"]
    run(lines, {"out": out, "held": held, "rows": rows}, threads=64, shared=count * 256)
    for w, k, r in itertools.product(range(2), range(count), range(8)):
        assert out[place[w, 8 * k + r] // 2 :][:8].tolist() == matrices[w, k, r].tolist()


def pair(m: np.ndarray, row: int, column: int) -> int:
    """Two neighbours of a row in one register."""
    return int(m[row, column]) | int(m[row, column + 1]) << 16


MMA = [f"mma.sync.aligned.m16n8k16.row.col.f32.{t}.{t}.f32" for t in ("bf16", "f16")]


@pytest.mark.parametrize("in_place", ["no", "same", "reversed"])
@pytest.mark.parametrize("opcode", MMA)
def test_mma(opcode: str, in_place: str) -> None:
    """Two warps; C in other registers than D, in the same, and in the same in another order."""
    kind = opcode.split(".")[-2]
    a_bits, a = numbers_of(kind, (2, 16, 16), 1)
    b_bits, b = numbers_of(kind, (2, 16, 8), 2)
    c = np.random.default_rng(3).integers(-50, 50, (2, 16, 8)).astype(np.float32)
    registers_in = np.zeros((64, 10), np.uint32)
    for thread in range(64):
        w, g, t = thread // 32, thread % 32 // 4, thread % 4
        left = [(g, 2 * t), (g + 8, 2 * t), (g, 2 * t + 8), (g + 8, 2 * t + 8)]
        registers_in[thread, :4] = [pair(a_bits[w], *at) for at in left]
        registers_in[thread, 4:6] = [pair(b_bits[w].T, g, 2 * t), pair(b_bits[w].T, g, 2 * t + 8)]
        places = [(g, 2 * t), (g, 2 * t + 1), (g + 8, 2 * t), (g + 8, 2 * t + 1)]
        registers_in[thread, 6:] = np.float32([c[w][at] for at in places]).view(np.uint32)
    out = np.zeros((64, 4), np.float32)
    d = {"no": [20, 21, 22, 23], "same": [6, 7, 8, 9], "reversed": [9, 8, 7, 6]}[in_place]
    lines = element("%x", "%thread", 40, "%d0") + [f"ld.global.b32 %r{i}, [%d0+{4 * i}];" for i in range(10)]
    d_names = ", ".join(f"%r{i}" for i in d)
    lines += [f"{opcode} {{{d_names}}}, {{%r0, %r1, %r2, %r3}}, {{%r4, %r5}}, {{%r6, %r7, %r8, %r9}};"]
    lines += element("%out", "%thread", 16, "%d1") + [f"st.global.b32 [%d1+{4 * i}], %r{r};" for i, r in enumerate(d)]
    run(lines, {"out": out, "x": registers_in}, threads=64)
    want = a @ b + c
    for thread in range(64):
        w, g, t = thread // 32, thread % 32 // 4, thread % 4
        assert out[thread].tolist() == [
            want[w, g, 2 * t],
            want[w, g, 2 * t + 1],
            want[w, g + 8, 2 * t],
            want[w, g + 8, 2 * t + 1],
        ]


# The canonical layouts of PTX ISA 9.7.15.5.1.2 (the same as in CUTLASS's mma_traits_sm90_gmma.hpp), as CuTe writes
# them: shapes and strides of both coordinates, in elements of 16 bits, T = 8 of them in 16 bytes, and Swizzle<B, 4, 3>
# of the byte address: bits 4.. are xored with bits 7.. of it, B of them. The table is transcribed, not derived.
T = 8


def canonical(mode: int, k_major: bool, leading: int, stride: int) -> tuple:
    """((shape of rows), (strides of rows)), ((shape of k), (strides of k)); the last shape of each is open."""
    w = {0: 1, 32: 2, 64: 4, 128: 8}[mode]
    if k_major:
        if mode == 0:
            return ((8, None), (T, stride)), ((T, None), (1, leading))
        return ((8, None), (w * T, stride)), ((T, None), (1, T))
    if mode == 0:
        return ((T, 1, None), (1, T, stride)), ((8, None), (T, leading))
    return ((T, w, None), (1, T, leading)), ((8, None), (w * T, stride))


def coordinate(x: int, shape: tuple, strides: tuple) -> int:
    at = 0
    for size, step in zip(shape, strides, strict=True):
        x, digit = (x // size, x % size) if size is not None else (0, x)
        at += digit * step
    return at


def swizzle(address: int, mode: int) -> int:
    bits = {0: 0, 32: 1, 64: 2, 128: 3}[mode]
    return address ^ (address >> 3 & ((1 << bits) - 1) << 4)


def place_tile(
    image: np.ndarray, tile: np.ndarray, start: int, mode: int, k_major: bool, leading: int, stride: int
) -> int:
    """Writes a [rows, 16] tile into shared memory; returns its descriptor. Offsets are in elements."""
    (r_shape, r_strides), (k_shape, k_strides) = canonical(mode, k_major, leading, stride)
    used = set()
    for r, k in itertools.product(range(tile.shape[0]), range(16)):
        offset = coordinate(r, r_shape, r_strides) + coordinate(k, k_shape, k_strides)
        at = swizzle(start + 2 * offset, mode)
        used.add(at)
        image[at // 2] = tile[r, k]
    assert len(used) == tile.size, "two elements share a place: the test's offsets are too small"
    code = {0: 0, 128: 1, 64: 2, 32: 3}[mode]
    return (start >> 4) | (2 * leading >> 4) << 16 | (2 * stride >> 4) << 32 | code << 62


def offsets_of(mode: int, k_major: bool, rows: int) -> tuple[int, int]:
    """Leading and stride offsets in elements, unequal and with gaps, so that a mix-up cannot pass."""
    w = {0: 1, 32: 2, 64: 4, 128: 8}[mode]
    if k_major:
        return (rows * T + 64, 8 * T) if mode == 0 else (8, 8 * w * T)
    if mode == 0:
        return (rows // 8 * 64 + 192, 64)
    blocks = -(-rows // (w * T))
    return 8 * w * T, blocks * 8 * w * T


def product_lines(
    kind: str, n: int, a: str, b: str, scale_d: str, flags: str, threads: int = 128, shared: int = 0
) -> list[str]:
    """Fills shared memory from %x, sets accumulators to thread + i, and multiplies."""
    names = ", ".join(f"%f{i}" for i in range(n // 2))
    lines = [".reg .f32 %f<128>;", "mov.b32 %r80, sm;", "shl.b32 %r81, %thread, 4;", "add.u32 %r80, %r80, %r81;"]
    lines += element("%x", "%thread", 16, "%d10")
    for at in range(0, shared, 16 * threads):
        lines += [f"ld.global.v4.b32 {{%r82, %r83, %r84, %r85}}, [%d10+{at}];"]
        lines += [f"st.shared.v4.b32 [%r80+{at}], {{%r82, %r83, %r84, %r85}};"]
    lines += ["fence.proxy.async.shared::cta;", "bar.sync 0;", *element("%regs", "%thread", 16, "%d11")]
    lines += [f"ld.global.b32 %r{i}, [%d11+{4 * i}];" for i in range(4)]
    lines += [*element("%desc", "0", 8, "%d12"), "ld.global.b64 %d0, [%d12];", "ld.global.b64 %d1, [%d12+8];"]
    lines += ["cvt.rn.f32.u32 %f0, %thread;"]
    lines += [f"add.f32 %f{i}, %f0, 0f{np.float32(i).view(np.uint32):08X};" for i in range(1, n // 2)]
    lines += [
        f"setp.ne.s32 %p0, {scale_d}, 0;", "wgmma.fence.sync.aligned;",
        f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind} {{{names}}}, {a}, {b}, %p0, {flags};",
        "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;",
        *element("%out", "%thread", 2 * n, "%d13"),
    ]  # fmt: skip
    return lines + [f"st.global.f32 [%d13+{4 * i}], %f{i};" for i in range(n // 2)]


def accumulator_place(thread: int, i: int) -> tuple[int, int]:
    """Row and column of register i: PTX ISA, figure "WGMMA .m64nNk16 register fragment layout for accumulator"."""
    warp, lane = thread // 32 % 4, thread % 32
    return 16 * warp + lane // 4 + 8 * (i // 2 % 2), i // 4 * 8 + lane % 4 * 2 + i % 2


WGMMA_NS = (8, 64, 136, 256)


def wgmma(
    kind: str = "bf16", n: int = 64, mode: int = 128, b_mode: int | None = None, a_k: bool = True, b_k: bool = True,
    registers: bool = False, scale_d: int = 1, signs: tuple[int, int] = (1, 1), groups: int = 1,
) -> None:  # fmt: skip
    b_mode = mode if b_mode is None else b_mode
    a_bits, a = numbers_of(kind, (64, 16), 1)
    b_bits, b = numbers_of(kind, (n, 16), 2)
    shared = 49152
    image = np.zeros(shared // 2, np.uint16)
    a_desc = place_tile(image, a_bits, 1024, mode, a_k, *offsets_of(mode, a_k, 64))
    b_desc = place_tile(image, b_bits, 14336, b_mode, b_k, *offsets_of(b_mode, b_k, n))
    threads = 128 * groups
    regs = np.zeros((threads, 4), np.uint32)
    for thread in range(threads):
        row, k = 16 * (thread // 32 % 4) + thread % 32 // 4, thread % 4 * 2
        regs[thread] = [pair(a_bits, *at) for at in ((row, k), (row + 8, k), (row, k + 8), (row + 8, k + 8))]
    out = np.zeros((threads, n // 2), np.float32)
    left = "{%r0, %r1, %r2, %r3}" if registers else "%d0"
    flags = f"{signs[0]}, {signs[1]}, " + ("" if registers else f"{int(not a_k)}, ") + f"{int(not b_k)}"
    lines = product_lines(kind, n, left, "%d1", str(scale_d), flags, threads, shared)
    desc = np.array([a_desc, b_desc], np.uint64)
    run(lines, {"out": out, "x": image, "regs": regs, "desc": desc}, threads=threads, shared=shared)
    want = signs[0] * signs[1] * (a @ b.T)
    for thread, i in itertools.product(range(threads), range(n // 2)):
        start = (thread + i if i else thread) if scale_d else 0
        assert out[thread, i] == want[accumulator_place(thread, i)] + start


@pytest.mark.parametrize("a_k", [True, False])
@pytest.mark.parametrize("b_k", [True, False])
@pytest.mark.parametrize("mode", [0, 32, 64, 128])
def test_wgmma_layouts(mode: int, a_k: bool, b_k: bool) -> None:
    wgmma(mode=mode, a_k=a_k, b_k=b_k, n=136)


@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize("n", WGMMA_NS)
def test_wgmma_shapes(kind: str, n: int) -> None:
    wgmma(kind, n)


@pytest.mark.parametrize("mode", [0, 32, 64, 128])
@pytest.mark.parametrize("b_k", [True, False])
def test_wgmma_with_a_in_registers(mode: int, b_k: bool) -> None:
    wgmma(registers=True, b_mode=mode, b_k=b_k)


@pytest.mark.parametrize("registers", [True, False])
@pytest.mark.parametrize("scale_d", [0, 1])
@pytest.mark.parametrize("signs", [(1, 1), (-1, 1), (1, -1), (-1, -1)])
def test_wgmma_scales(signs: tuple[int, int], scale_d: int, registers: bool) -> None:
    wgmma(n=8, signs=signs, scale_d=scale_d, registers=registers)


def test_wgmma_of_two_warpgroups() -> None:
    wgmma(n=16, groups=2)


def test_wgmma_along_k_inside_a_swizzle() -> None:
    """A descriptor that starts 32, 64 or 96 bytes into rows of 128: the swizzle hangs on the address."""
    from tests.ptxsim.matrix import operand_offsets

    for step in range(4):
        at = operand_offsets((1024 + 32 * step) >> 4 | 1 << 16 | 64 << 32 | 1 << 62, 64, False)
        for r, k in itertools.product(range(64), range(16)):
            assert at[r, k] == swizzle(1024 + 128 * r + 32 * step + 2 * k, 128)


# ---- the way through the program -------------------------------------------------------------------------------------


def traced(lines: list[str], threads: int = 32) -> list[int]:
    """What %r0 holds at the end, a thread."""
    out = np.full(threads, 0xFFFFFFFF, np.uint32)
    run(
        ["mov.u32 %r0, 0;", *lines, *element("%out", "%thread", 4, "%d0"), "st.global.b32 [%d0], %r0;"],
        {"out": out},
        threads,
    )
    return out.tolist()


@pytest.mark.parametrize("bra", ["bra", "bra.uni"])
def test_jumps(bra: str) -> None:
    assert traced([f"{bra} OVER;", "add.u32 %r0, %r0, 1;", "OVER:", "add.u32 %r0, %r0, 2;"]) == [2] * 32


def test_guards() -> None:
    lines = ["setp.lt.u32 %p0, %thread, 10;", "@%p0 add.u32 %r0, %r0, 1;", "@!%p0 add.u32 %r0, %r0, 2;"]
    assert traced(lines) == [1] * 10 + [2] * 22


@pytest.mark.parametrize("guard", ["@%p0", "@!%p1"])
def test_branches_part_and_meet(guard: str) -> None:
    lines = [
        "setp.lt.u32 %p0, %thread, 40;", "setp.ge.u32 %p1, %thread, 40;", f"{guard} bra LOW;",
        "add.u32 %r0, %r0, 1;", "bra MEET;", "LOW:", "add.u32 %r0, %r0, 2;", "MEET:",
        # All lanes are here again, or the shuffle would fault.
        "shfl.sync.bfly.b32 %r1, %r0, 31, 31, -1;", "mad.lo.u32 %r0, %r1, 10, %r0;",
    ]  # fmt: skip
    got = traced(lines, 64)
    mine = [2 if t < 40 else 1 for t in range(64)]
    assert got == [mine[t] + 10 * mine[t ^ 31] for t in range(64)]


def test_loops_of_different_lengths() -> None:
    """Nested: thread t adds (0 + .. + t)."""
    lines = [
        "mov.u32 %r1, 0;", "OUTER:", "mov.u32 %r2, 0;", "INNER:", "setp.ge.u32 %p0, %r2, %r1;", "@%p0 bra NEXT;",
        "add.u32 %r0, %r0, 1;", "add.u32 %r2, %r2, 1;", "bra.uni INNER;", "NEXT:", "add.u32 %r1, %r1, 1;",
        "setp.le.u32 %p0, %r1, %lane;", "@%p0 bra OUTER;", "bar.warp.sync 0xffffffff;",
    ]  # fmt: skip
    assert traced(lines) == [t * (t + 1) // 2 for t in range(32)]


@pytest.mark.parametrize("leave", ["ret", "exit"])
@pytest.mark.parametrize("at", [0, 1, 16, 32, 40, 64])
def test_some_threads_leave(leave: str, at: int) -> None:
    out = np.zeros(64, np.uint32)
    lines = [f"setp.lt.u32 %p0, %thread, {at};", f"@%p0 {leave};"]
    run([*lines, *element("%out", "%thread", 4, "%d0"), "st.global.b32 [%d0], 5;"], {"out": out}, 64)
    assert out.tolist() == [0] * at + [5] * (64 - at)


@pytest.mark.parametrize("barrier", ["bar.sync 0", "barrier.sync.aligned 0"])
def test_barriers_order_shared_memory(barrier: str) -> None:
    """Thread t reads what thread 63 - t wrote; then again, with the buffer used a second time."""
    lines = ["shl.b32 %r1, %thread, 2;", "mov.b32 %r2, sm;", "add.u32 %r1, %r1, %r2;", "sub.u32 %r3, 63, %thread;"]
    lines += ["shl.b32 %r3, %r3, 2;", "add.u32 %r3, %r3, %r2;", "mov.u32 %r4, %thread;", "mov.u32 %r6, 0;", "AGAIN:"]
    lines += ["st.shared.b32 [%r1], %r4;", f"{barrier};", "ld.shared.b32 %r5, [%r3];", f"{barrier};"]
    lines += ["add.u32 %r4, %r5, 100;", "add.u32 %r6, %r6, 1;", "setp.lt.u32 %p0, %r6, 2;", "@%p0 bra AGAIN;"]
    out = np.zeros(64, np.uint32)
    run([*lines, *element("%out", "%thread", 4, "%d0"), "st.global.b32 [%d0], %r4;"], {"out": out}, 64, shared=256)
    assert out.tolist() == [t + 200 for t in range(64)]


def test_a_barrier_that_nobody_or_everybody_comes_to() -> None:
    lines = ["setp.lt.u32 %p0, %thread, 64;", "@%p0 bar.sync 0;", "@!%p0 bar.sync 0;", "mov.u32 %r0, 1;"]
    assert traced(lines, 64) == [1] * 64


def test_a_barrier_when_some_threads_have_left() -> None:
    out = np.zeros(64, np.uint32)
    lines = ["setp.lt.u32 %p0, %thread, 32;", "@%p0 ret;", "bar.sync 0;"]
    run([*lines, *element("%out", "%thread", 4, "%d0"), "st.global.b32 [%d0], 5;"], {"out": out}, 64)
    assert out.tolist() == [0] * 32 + [5] * 32


def test_special_registers() -> None:
    names = [f"{n}.{axis}" for n in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"] + ["laneid"]
    out = np.zeros((24, 64, 13), np.uint32)
    lines = []
    for name in names:
        lines += [f"mov.u32 %r{names.index(name)}, %{name};"]
    lines += [
        "mad.lo.u32 %r20, %r8, 3, %r7;", "mad.lo.u32 %r20, %r20, 4, %r6;",  # CTA: x fastest
        "mad.lo.u32 %r21, %r2, 4, %r1;", "mad.lo.u32 %r21, %r21, 8, %r0;",
        "mad.lo.u32 %r20, %r20, 64, %r21;", *element("%out", "%r20", 52, "%d0"),
        *(f"st.global.b32 [%d0+{4 * i}], %r{i};" for i in range(13)),
    ]  # fmt: skip
    Kernel(module(entry(lines, {"out": "u64"}))).launch((4, 3, 2), (8, 4, 2), [out])
    for cta, thread in itertools.product(range(24), range(64)):
        want = [
            thread % 8,
            thread // 8 % 4,
            thread // 32,
            8,
            4,
            2,
            cta % 4,
            cta // 4 % 3,
            cta // 12,
            4,
            3,
            2,
            thread % 32,
        ]
        assert out[cta, thread].tolist() == want


def test_names_in_braces_hide_those_outside() -> None:
    lines = [
        "add.u32 %r0, %r0, 1;", "{ .reg .b32 %r0; .reg .b64 x; mov.u32 %r0, 50; mov.b64 x, 5;",
        "{ .reg .b16 x; mov.b16 x, 6; } .reg .b16 y; mov.b16 y, 7; mov.b64 x, 8; }",
        "{ .reg .b16 x; mov.b16 x, 9; cvt.u32.u16 %r1, x; }", "add.u32 %r0, %r0, %r1;",
    ]  # fmt: skip
    assert traced(lines) == [10] * 32


# ---- all of the table ------------------------------------------------------------------------------------------------

BY_HAND = {
    "bar.warp.sync": "test_ldmatrix and the faults",
    "cp.async.commit_group": "check_copy", "cp.async.wait_group": "check_copy", "cp.async.wait_all": "check_copy",
    "fence.proxy.async.shared::cta": "product_lines", "fence.proxy.async": "test_faults.py",
    "wgmma.fence.sync.aligned": "product_lines", "wgmma.commit_group.sync.aligned": "product_lines",
    "wgmma.wait_group.sync.aligned": "product_lines",
}  # fmt: skip
"""Opcodes that are no parameter of a test, and where they are."""


def test_every_spelling_has_a_test() -> None:
    tested = {c.opcode for c in CASES} | {*APPROXIMATE_OPCODES, *DIVISION_OPCODES, *LOADS, *STORES, *ATOMICS, *BY_HAND}
    tested |= {f"{op}{where}" for op in ("ld", "st") for where in SHARED} | {f"ld.param.{kind}" for kind in TYPES}
    tested |= {opcode for opcode, _ in COPIES} | {*SHUFFLES, *VOTES, *LDMATRIX, *STMATRIX, *MMA}
    tested |= {f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{t}.{t}" for n in WGMMA_NS for t in ("bf16", "f16")}
    missing = {pattern.pattern: sorted(untested(pattern, tested))[:5] for pattern, _ in _TABLE}
    assert not {pattern: some for pattern, some in missing.items() if some}
