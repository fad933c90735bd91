"""Arithmetic, comparisons, conversions and moves between registers. Source: PTX ISA 8.8, chapter 9.7."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from tests.ptxsim.faults import Unsupported
from tests.ptxsim.instructions import DTYPES, Mask, Operands, Run, instruction, pure
from tests.ptxsim.numbers import (
    F32,
    F64,
    U16,
    U32,
    U64,
    approximate,
    bf16_to_f32,
    f32_to_bf16,
    f64_to_bf16,
    flush,
    share,
)
from tests.ptxsim.program import Vector

INTEGERS = r"[us](?:16|32|64)"
HALF_ULP = 2.0**-24
"""Half the place of the last bit of a float32 of 1; the same, or twice as much, is what one place is of any other."""

# ---- integers --------------------------------------------------------------------------------------------------------


@instruction(rf"(?P<op>add|sub)\.(?P<t>{INTEGERS})", rf"(?P<op>mul)\.lo\.(?P<t>{INTEGERS})")
def _add_sub_mul(m: re.Match, o: Operands) -> Run:
    function = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[m["op"]]
    return pure(o, m["t"], (m["t"],) * 2, function)


@instruction(rf"(?P<op>min|max)\.(?P<t>{INTEGERS})")
def _min_max(m: re.Match, o: Operands) -> Run:
    return pure(o, m["t"], (m["t"],) * 2, {"min": np.minimum, "max": np.maximum}[m["op"]])


@instruction(r"(?P<op>min|max)\.relu\.s32")
def _min_max_relu(m: re.Match, o: Operands) -> Run:
    function = {"min": np.minimum, "max": np.maximum}[m["op"]]
    return pure(o, "s32", ("s32",) * 2, lambda a, b: np.maximum(function(a, b), np.int32(0)))


def _wider(kind: str) -> str:
    return f"{kind[0]}{2 * int(kind[1:])}"


@instruction(r"mul\.wide\.(?P<t>[us](?:16|32))")
def _mul_wide(m: re.Match, o: Operands) -> Run:
    wide = DTYPES[_wider(m["t"])].type
    return pure(o, _wider(m["t"]), (m["t"],) * 2, lambda a, b: a.astype(wide) * b.astype(wide))


@instruction(r"mul\.hi\.(?P<t>[us](?:16|32))")
def _mul_hi(m: re.Match, o: Operands) -> Run:
    bits, wide, narrow = int(m["t"][1:]), DTYPES[_wider(m["t"])].type, DTYPES[m["t"]].type
    return pure(
        o, m["t"], (m["t"],) * 2, lambda a, b: ((a.astype(wide) * b.astype(wide)) >> wide(bits)).astype(narrow)
    )  # fmt: skip


@instruction(rf"mad\.lo\.(?P<t>{INTEGERS})")
def _mad_lo(m: re.Match, o: Operands) -> Run:
    return pure(o, m["t"], (m["t"],) * 3, lambda a, b, c: a * b + c)


@instruction(r"mad\.wide\.(?P<t>[us](?:16|32))")
def _mad_wide(m: re.Match, o: Operands) -> Run:
    wide = DTYPES[_wider(m["t"])].type
    kinds = (m["t"], m["t"], _wider(m["t"]))
    return pure(o, _wider(m["t"]), kinds, lambda a, b, c: a.astype(wide) * b.astype(wide) + c)


@instruction(rf"(?P<op>div|rem)\.(?P<t>{INTEGERS})")
def _div_rem(m: re.Match, o: Operands) -> Run:
    def divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        # Towards zero, as in C; by zero the result is not specified, all ones on devices.
        safe = np.where(b == 0, b.dtype.type(1), b)
        remainder = np.fmod(a, safe)
        result = (a - remainder) // safe if m["op"] == "div" else remainder
        return np.where(b == 0, np.array(-1).astype(a.dtype), result).astype(a.dtype)

    return pure(o, m["t"], (m["t"],) * 2, divide)


@instruction(r"(?P<op>and|or|xor)\.(?P<t>pred|b16|b32|b64)")
def _logic(m: re.Match, o: Operands) -> Run:
    function = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[m["op"]]
    return pure(o, m["t"], (m["t"],) * 2, function)


@instruction(r"not\.(?P<t>pred|b16|b32|b64)")
def _not(m: re.Match, o: Operands) -> Run:
    return pure(o, m["t"], (m["t"],), np.invert)


@instruction(r"neg\.(?P<t>s16|s32|s64|f32|f64)")
def _neg(m: re.Match, o: Operands) -> Run:
    return pure(o, m["t"], (m["t"],), np.negative)


@instruction(r"abs\.(?P<t>s16|s32|s64|f32|f64)")
def _abs(m: re.Match, o: Operands) -> Run:
    return pure(o, m["t"], (m["t"],), np.abs)


@instruction(r"shl\.(?P<t>b16|b32|b64)", r"shr\.(?P<t>[bus](?:16|32|64))")
def _shift(m: re.Match, o: Operands) -> Run:
    kind = m["t"]
    bits, dtype = int(kind[1:]), DTYPES[kind].type
    left = m[0].startswith("shl")

    def shift(a: np.ndarray, count: np.ndarray) -> np.ndarray:
        within = np.minimum(count, U32(bits - 1)).astype(dtype)
        result = np.left_shift(a, within) if left else np.right_shift(a, within)
        # A shift by more than the width leaves nothing but signs.
        return result if kind[0] == "s" else np.where(count >= bits, dtype(0), result).astype(dtype)

    return pure(o, kind, (kind, "u32"), shift)


@instruction(r"shf\.(?P<way>l|r)\.(?P<mode>wrap|clamp)\.b32")
def _funnel_shift(m: re.Match, o: Operands) -> Run:
    def shift(low: np.ndarray, high: np.ndarray, count: np.ndarray) -> np.ndarray:
        n = (count & U32(31) if m["mode"] == "wrap" else np.minimum(count, U32(32))).astype(U64)
        both = (high.astype(U64) << U64(32)) | low.astype(U64)
        moved = (both << n) >> U64(32) if m["way"] == "l" else both >> n
        return (moved & U64(0xFFFFFFFF)).astype(U32)

    return pure(o, "b32", ("b32", "b32", "u32"), shift)


@instruction(r"bfe\.(?P<t>u32|s32)")
def _bit_field(m: re.Match, o: Operands) -> Run:
    signed = m["t"] == "s32"

    def extract(a: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
        position, length = (position & U32(255)).astype(np.int64), (length & U32(255)).astype(np.int64)
        wide = a.astype(np.int64)  # with its sign, which is what stands past bit 31
        field = np.right_shift(wide, np.minimum(position, 63)) & ((1 << np.minimum(length, 32)) - 1)
        if signed:
            # The sign is the field's last bit, or bit 31 where the field passes the end.
            last = np.minimum(position + length - 1, 31)
            sign = (length > 0) & ((np.right_shift(wide, np.maximum(last, 0)) & 1) == 1)
            field = np.where(sign, field | (-1 << np.minimum(length, 32)), field)
        return field.astype(DTYPES[m["t"]])

    return pure(o, m["t"], (m["t"], "u32", "u32"), extract)


@instruction(r"bfi\.b32")
def _bit_field_insert(m: re.Match, o: Operands) -> Run:
    def insert(a: np.ndarray, b: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
        position, length = (position & U32(255)).astype(U64), (length & U32(255)).astype(U64)
        ones = (U64(1) << np.minimum(length, U64(32))) - U64(1)
        mask = np.where(position < 32, (ones << np.minimum(position, U64(32))) & U64(0xFFFFFFFF), U64(0))
        moved = a.astype(U64) << np.minimum(position, U64(32))
        return ((moved & mask) | (b.astype(U64) & ~mask)).astype(U32)

    return pure(o, "b32", ("b32", "b32", "u32", "u32"), insert)


@instruction(r"prmt\.b32")
def _permute(m: re.Match, o: Operands) -> Run:
    def permute(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
        both = (b.astype(U64) << U64(32)) | a.astype(U64)
        result: np.ndarray = U64(0)
        for k in range(4):
            nibble = (selector >> U32(4 * k)).astype(U64)
            byte = (both >> ((nibble & U64(7)) * U64(8))) & U64(0xFF)
            spread = np.where(byte & U64(0x80), U64(0xFF), U64(0))
            result = result | (np.where(nibble & U64(8), spread, byte) << U64(8 * k))
        return result.astype(U32)

    return pure(o, "b32", ("b32", "b32", "b32"), permute)


@instruction(r"lop3\.b32")
def _any_logic(m: re.Match, o: Operands) -> Run:
    table = o.immediate(4)
    if not 0 <= table < 256:
        raise Unsupported(f"table {table} in `{o.statement.text}`")

    def logic(a: np.ndarray, b: np.ndarray, c: np.ndarray, _: np.ndarray) -> np.ndarray:
        result: np.ndarray = U32(0)
        for row in range(8):
            if table >> row & 1:
                result = result | (
                    (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
                )  # fmt: skip
        return result

    return pure(o, "b32", ("b32", "b32", "b32", "b32"), logic)


@instruction(r"popc\.b32")
def _popc(m: re.Match, o: Operands) -> Run:
    return pure(o, "u32", ("b32",), lambda a: np.bitwise_count(a).astype(U32))


@instruction(r"clz\.b32")
def _clz(m: re.Match, o: Operands) -> Run:
    # The exponent of an exact float64 is the place of the first bit.
    return pure(o, "u32", ("b32",), lambda a: (32 - np.frexp(a.astype(F64))[1]).astype(U32))


# ---- floating point --------------------------------------------------------------------------------------------------


def _maybe_flush(function: Callable, ftz: bool) -> Callable:
    if not ftz:
        return function
    return lambda *arguments: flush(function(*[flush(a) for a in arguments]))


@instruction(
    r"(?P<op>add|sub|mul)(?:\.rn)?(?P<ftz>\.ftz)?\.(?P<t>f32)",
    r"(?P<op>add|sub|mul)(?:\.rn)?(?P<ftz>)\.(?P<t>f64)",
)
def _float(m: re.Match, o: Operands) -> Run:
    function = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[m["op"]]
    return pure(o, m["t"], (m["t"],) * 2, _maybe_flush(function, bool(m["ftz"])))


def _fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c, rounded to float64 and then to float32: off by a last bit once in 2^29, on a device never."""
    return (a.astype(F64) * b.astype(F64) + c.astype(F64)).astype(F32)


@instruction(r"fma\.rn(?P<ftz>\.ftz)?\.f32")
def _fma(m: re.Match, o: Operands) -> Run:
    return pure(o, "f32", ("f32",) * 3, _maybe_flush(_fused, bool(m["ftz"])))


@instruction(r"(?P<op>min|max)(?P<ftz>\.ftz)?(?P<nan>\.NaN)?\.f32")
def _float_min_max(m: re.Match, o: Operands) -> Run:
    """A NaN gives way to a number, or stays where ``.NaN`` says so; -0 is less than +0."""
    plain = {
        ("min", False): np.fmin, ("max", False): np.fmax, ("min", True): np.minimum, ("max", True): np.maximum,
    }[m["op"], bool(m["nan"])]  # fmt: skip

    def choose(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        zeros = (a == 0) & (b == 0)
        a_first = np.signbit(a) == (m["op"] == "min")
        return np.where(zeros, np.where(a_first, a, b), plain(a, b)).astype(F32)

    return pure(o, "f32", ("f32",) * 2, _maybe_flush(choose, bool(m["ftz"])))


@instruction(r"div\.(?P<how>rn|full|approx)(?P<ftz>\.ftz)?\.f32")
def _float_div(m: re.Match, o: Operands) -> Run:
    def divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        exact = np.asarray(a).astype(F64) / b.astype(F64)
        near = exact.astype(F32)
        if m["how"] == "rn":
            return near
        # Within 2 units in the last place; a quotient that float32 holds is met by real devices, and is here.
        loose = np.where((near == exact) | ~np.isfinite(near), near, approximate(exact, near, 1.5 * HALF_ULP))
        if m["how"] == "approx":
            # 1 / b is taken first, and flushed to 0 where b is large.
            loose = np.where((np.abs(b) > F32(2.0**126)) & np.isfinite(b), a * np.copysign(F32(0), b), loose)
        return loose.astype(F32)

    return pure(o, "f32", ("f32",) * 2, _maybe_flush(divide, bool(m["ftz"])))


_FUNCTIONS: dict[str, tuple[Callable, float]] = {
    # The largest relative error that the PTX ISA allows, less what the rounding to float32 adds. It states 2 units in
    # the last place for ex2, 1 unit or 2^-23 for rcp, 2^-23 for sqrt, and relative errors for the rest.
    "ex2": (np.exp2, 1.5 * HALF_ULP),
    "lg2": (np.log2, 2.0**-22 - HALF_ULP),
    "rcp": (np.reciprocal, HALF_ULP),
    "rsqrt": (lambda x: 1 / np.sqrt(x), 2.0**-22.9 - HALF_ULP),
    "sqrt": (np.sqrt, HALF_ULP),
    "tanh": (np.tanh, 2.0**-11 - HALF_ULP),
}


@instruction(r"(?P<op>ex2|lg2|rcp|rsqrt|sqrt)\.approx(?P<ftz>\.ftz)?\.f32", r"(?P<op>tanh)\.approx(?P<ftz>)\.f32")
def _approximate(m: re.Match, o: Operands) -> Run:
    function, bound = _FUNCTIONS[m["op"]]

    def compute(a: np.ndarray) -> np.ndarray:
        exact = function(a.astype(F64))
        near = exact.astype(F32)
        off = approximate(exact, a, bound)
        if m["op"] == "lg2":  # between 1/2 and 2 the bound is absolute: near 1, most digits may be wrong
            off = np.where((a > 0.5) & (a < 2), (exact + bound * share(a)).astype(F32), off)
        # A result that float32 holds, such as 2^3 or 1/4, is met by real devices, and is here.
        return np.where((near == exact) | ~np.isfinite(near), near, off).astype(F32)

    return pure(o, "f32", ("f32",), _maybe_flush(compute, bool(m["ftz"])))


@instruction(r"(?P<op>rcp|sqrt)\.rn(?P<ftz>\.ftz)?\.f32")
def _rounded(m: re.Match, o: Operands) -> Run:
    function = _FUNCTIONS[m["op"]][0]
    return pure(o, "f32", ("f32",), _maybe_flush(lambda a: function(a.astype(F64)).astype(F32), bool(m["ftz"])))


def _halves(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The low and the high 16 bits."""
    return (x & U32(0xFFFF)).astype(U16), (x >> U32(16)).astype(U16)


def _joined(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return (high.astype(U32) << U32(16)) | low.astype(U32)


_BF16 = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "fma": lambda a, b, c: a * b + c,
}


@instruction(r"(?P<op>add|sub|mul)(?:\.rn)?\.(?P<t>bf16(?:x2)?)", r"(?P<op>fma)\.rn\.(?P<t>bf16(?:x2)?)")
def _bf16(m: re.Match, o: Operands) -> Run:
    """In float64, where products and all but the widest sums are exact, and rounded once."""
    function = _BF16[m["op"]]

    def compute(*arguments: np.ndarray) -> np.ndarray:
        return f64_to_bf16(function(*[bf16_to_f32(np.asarray(a)).astype(F64) for a in arguments]))

    def twice(*arguments: np.ndarray) -> np.ndarray:
        pairs = [_halves(a) for a in arguments]
        return _joined(compute(*[low for low, _ in pairs]), compute(*[high for _, high in pairs]))

    kinds = (m["t"],) * (3 if m["op"] == "fma" else 2)
    return pure(o, m["t"], kinds, twice if m["t"].endswith("x2") else compute)


@instruction(r"(?P<op>add|sub|mul)(?:\.rn)?\.f16", r"(?P<op>fma)\.rn\.f16")
def _f16(m: re.Match, o: Operands) -> Run:
    function = _BF16[m["op"]]
    kinds = ("f16",) * (3 if m["op"] == "fma" else 2)
    return pure(o, "f16", kinds, lambda *x: function(*[np.asarray(a).astype(F64) for a in x]).astype(np.float16))


@instruction(r"(?P<op>add|sub|mul)(?:\.rn)?\.f16x2", r"(?P<op>fma)\.rn\.f16x2")
def _f16x2(m: re.Match, o: Operands) -> Run:
    function = _BF16[m["op"]]

    def compute(*halves: np.ndarray) -> np.ndarray:
        return function(*[np.asarray(h).view(np.float16).astype(F64) for h in halves]).astype(np.float16).view(U16)

    def twice(*arguments: np.ndarray) -> np.ndarray:
        pairs = [_halves(a) for a in arguments]
        return _joined(compute(*[low for low, _ in pairs]), compute(*[high for _, high in pairs]))

    return pure(o, "f16x2", ("f16x2",) * (3 if m["op"] == "fma" else 2), twice)


# ---- comparisons -----------------------------------------------------------------------------------------------------

_COMPARISONS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def _compare(name: str, kind: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """By the type: for numbers a NaN makes a plain comparison false and one ending in u true."""
    if kind[0] == "f" or kind == "bf16":
        widen = bf16_to_f32 if kind == "bf16" else (lambda x: x)

        def nan(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            return np.isnan(a) | np.isnan(b)

        def compare(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            a, b = widen(np.asarray(a)), widen(np.asarray(b))
            if name == "num":
                return ~nan(a, b)
            if name == "nan":
                return nan(a, b)
            if name.endswith("u") and name[:-1] in _COMPARISONS:
                return _COMPARISONS[name[:-1]](a, b) | nan(a, b)
            return _COMPARISONS[name](a, b) & ~nan(a, b)

        return compare
    return _COMPARISONS[name]


_SIGNED_NAMES = "eq|ne|lt|le|gt|ge"
_SETP = (
    rf"setp\.(?P<c>{_SIGNED_NAMES})(?:\.(?P<and>and|or|xor))?\.(?P<t>[us](?:16|32|64))",
    r"setp\.(?P<c>lo|ls|hi|hs)(?:\.(?P<and>and|or|xor))?\.(?P<t>u(?:16|32|64))",
    r"setp\.(?P<c>eq|ne)(?:\.(?P<and>and|or|xor))?\.(?P<t>b(?:16|32|64))",
    rf"setp\.(?P<c>(?:{_SIGNED_NAMES})u?|num|nan)(?:\.(?P<and>and|or|xor))?(?:\.ftz)?\.(?P<t>f32)",
    rf"setp\.(?P<c>(?:{_SIGNED_NAMES})u?|num|nan)(?:\.(?P<and>and|or|xor))?\.(?P<t>bf16|f16|f64)",
)


@instruction(*_SETP)
def _setp(m: re.Match, o: Operands) -> Run:
    compare = _compare(m["c"], m["t"])
    if ".ftz." in m[0]:
        inner = compare
        compare = lambda a, b: inner(flush(a), flush(b))  # noqa: E731
    o.expect(4 if m["and"] else 3)
    first, _, second = o.name(0).partition("|")
    if second and m["t"] in ("f16", "bf16"):
        raise Unsupported(f"`{o.statement.text}`: a second result")
    put, put_not = o.write(first, "pred"), o.write(second, "pred") if second else None
    a, b = o.read(1, m["t"]), o.read(2, m["t"])
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}.get(m["and"] or "")
    other = o.read(3, "pred") if m["and"] else None

    def run(cta, mask: Mask) -> None:
        result = compare(a(cta), b(cta))
        opposite = ~result
        if combine is not None:
            result, opposite = combine(result, other(cta)), combine(opposite, other(cta))
        put(cta, result, mask)
        if put_not is not None:
            put_not(cta, opposite, mask)

    return run


@instruction(r"selp\.(?P<t>[bus](?:16|32|64)|f32|f64)")
def _selp(m: re.Match, o: Operands) -> Run:
    return pure(o, m["t"], (m["t"], m["t"], "pred"), lambda a, b, p: np.where(p, a, b))


# ---- moves and conversions -------------------------------------------------------------------------------------------


@instruction(r"mov\.(?P<t>pred|[bus](?:16|32|64)|f32|f64)")
def _mov(m: re.Match, o: Operands) -> Run:
    o.expect(2)
    kind = m["t"]
    if isinstance(o[0], Vector):
        return _unpack(kind, o)
    if isinstance(o[1], Vector):
        return _pack(kind, o)
    return pure(o, kind, (kind,), np.asarray)


def _unpack(kind: str, o: Operands) -> Run:
    names = o.elements(0)
    bits = int(kind[1:]) // len(names)
    if kind[0] != "b" or f"b{bits}" not in DTYPES:
        raise Unsupported(f"`{o.statement.text}`")
    read, puts = o.read(1, kind), [o.write(name, f"b{bits}") for name in names]
    whole, part = DTYPES[kind].type, DTYPES[f"b{bits}"].type

    def run(cta, mask: Mask) -> None:
        value = read(cta)
        for k, put in enumerate(puts):
            put(cta, (value >> whole(k * bits)).astype(part), mask)

    return run


def _pack(kind: str, o: Operands) -> Run:
    names = o.elements(1)
    bits = int(kind[1:]) // len(names)
    if kind[0] != "b" or f"b{bits}" not in DTYPES:
        raise Unsupported(f"`{o.statement.text}`")
    put, reads = o.write(0, kind), [o.read(name, f"b{bits}") for name in names]
    whole = DTYPES[kind].type

    def run(cta, mask: Mask) -> None:
        value: np.ndarray = whole(0)
        for k, read in enumerate(reads):
            value = value | (read(cta).astype(whole) << whole(k * bits))
        put(cta, np.asarray(value), mask)

    return run


@instruction(r"cvta(?:\.to)?\.global\.u64")
def _cvta(m: re.Match, o: Operands) -> Run:
    return pure(o, "u64", ("u64",), np.asarray)  # global memory has one address, generic or not


@instruction(r"cvt\.(?P<to>[us](?:8|16|32|64))\.(?P<from>[us](?:8|16|32|64))")
def _integer_to_integer(m: re.Match, o: Operands) -> Run:
    o.expect(2)
    put, read = o.write(0, m["to"], extend=True), o.read(1, m["from"], narrow=True)
    dtype = DTYPES[m["to"]]
    return lambda cta, mask: put(cta, read(cta).astype(dtype), mask)


@instruction(r"cvt\.rn\.(?P<to>f32|f64)\.(?P<from>[us](?:16|32|64))")
def _integer_to_float(m: re.Match, o: Operands) -> Run:
    return pure(o, m["to"], (m["from"],), lambda a: a.astype(DTYPES[m["to"]]))


@instruction(r"cvt\.(?P<how>rzi|rni|rmi|rpi)(?P<ftz>\.ftz)?\.(?P<to>[us](?:32|64))\.(?P<from>f32)")
def _float_to_integer(m: re.Match, o: Operands) -> Run:
    rounding = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[m["how"]]
    dtype = DTYPES[m["to"]]
    limits = np.iinfo(dtype)

    def convert(a: np.ndarray) -> np.ndarray:
        # Out of range is clamped, NaN is 0.
        whole = rounding(a.astype(F64))
        high = whole >= float(limits.max)
        low = whole <= float(limits.min)
        inside = np.where(high | low | np.isnan(whole), 0.0, whole).astype(dtype)
        return np.where(high, limits.max, np.where(low, limits.min, inside)).astype(dtype)

    return pure(o, m["to"], ("f32",), _maybe_flush_input(convert, bool(m["ftz"])))


def _maybe_flush_input(function: Callable, ftz: bool) -> Callable:
    return (lambda a: function(flush(a))) if ftz else function


def _maybe_flush_result(function: Callable, ftz: bool) -> Callable:
    return (lambda a: flush(function(a))) if ftz else function


@instruction(r"cvt(?:\.ftz)?\.f32\.(?P<from>bf16|f16)", r"cvt\.rn\.f32\.(?P<from>f64)", r"cvt\.f64\.(?P<from>f32)")
def _widen(m: re.Match, o: Operands) -> Run:
    if m["from"] == "bf16":
        # Only a subnormal bfloat16 becomes a subnormal float32.
        return pure(o, "f32", ("bf16",), _maybe_flush_result(bf16_to_f32, ".ftz." in m[0]))
    to = "f64" if m["from"] == "f32" else "f32"
    return pure(o, to, (m["from"],), lambda a: a.astype(DTYPES[to]))


@instruction(r"cvt\.rn\.(?P<to>bf16|f16)\.f32")
def _narrow(m: re.Match, o: Operands) -> Run:
    convert = f32_to_bf16 if m["to"] == "bf16" else (lambda a: a.astype(np.float16))
    return pure(o, m["to"], ("f32",), lambda a: convert(np.asarray(a)))


@instruction(r"cvt\.rn\.(?P<to>bf16|f16)x2\.f32")
def _narrow_two(m: re.Match, o: Operands) -> Run:
    """The first source becomes the upper half."""
    convert = f32_to_bf16 if m["to"] == "bf16" else (lambda a: a.astype(np.float16).view(U16))
    return pure(
        o, f"{m['to']}x2", ("f32", "f32"), lambda a, b: _joined(convert(np.asarray(b)), convert(np.asarray(a)))
    )  # fmt: skip
