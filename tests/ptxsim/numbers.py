"""Number formats and arithmetic that numpy lacks: bfloat16, flushing of subnormals, approximate functions."""

from __future__ import annotations

import numpy as np

U16, U32, U64 = np.uint16, np.uint32, np.uint64
F16, F32, F64 = np.float16, np.float32, np.float64


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    """uint16 bits of bfloat16 to float32, exactly."""
    return (bits.astype(U32) << U32(16)).view(F32)


def f32_to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 to the bits of bfloat16 (uint16), to nearest, ties to even; NaN becomes 0x7FFF, as on a device."""
    bits = np.asarray(x, F32).view(U32)
    rounded = (bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))) >> U32(16)
    return np.where(np.isnan(x), U32(0x7FFF), rounded).astype(U16)


def f64_to_bf16(x: np.ndarray) -> np.ndarray:
    """float64 to the bits of bfloat16, rounded once: float32 in between keeps a sticky last bit (round to odd)."""
    near = x.astype(F32)
    towards_zero = np.where(np.abs(near.astype(F64)) > np.abs(x), np.nextafter(near, F32(0)), near).astype(F32)
    inexact = np.isfinite(near) & (towards_zero.astype(F64) != x)
    return f32_to_bf16((towards_zero.view(U32) | inexact.astype(U32)).view(F32))


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormal float32 to zero of the same sign (``.ftz``)."""
    return np.where(np.abs(x) < F32(2.0**-126), np.copysign(F32(0), x), x).astype(F32)


def approximate(exact: np.ndarray, argument: np.ndarray, bound: float) -> np.ndarray:
    """A value off by up to `bound` of itself, as an approximate instruction's may be, always the same for an argument.

    The device's own error is not documented beyond its bound, so a kernel must bear any: this one hangs on the bits of
    the argument.
    """
    return (exact * (1.0 + bound * share(argument))).astype(F32)


def share(argument: np.ndarray) -> np.ndarray:
    """A hash of a float32 in [-1, 1]: Knuth's multiplicative one."""
    bits = np.asarray(argument, F32).view(U32)
    return ((bits * U32(2654435761)) >> U32(16)).astype(F64) / 32767.5 - 1.0
