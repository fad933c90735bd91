"""What the units of a GPU need for the instructions that a kernel executed: a bound, not a time.

Instructions come from executing a kernel's PTX (`tests.ptxsim`); what each costs a unit is known from the vendor's
tables. A unit's cycles are a lower bound of the kernel's, if its work is spread evenly over the processors and nothing
waits; the unit with the most is the one that limits it. Latencies, caches and the scheduler are not modelled, and the
machine code of a device has other instructions than PTX, so configs are ranked by this and never timed.

Rates, for a processor and a cycle: CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions"; tensor
cores, clocks and memory: NVIDIA A100 and H100 Tensor Core GPU Architecture whitepapers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tests.ptxsim import Counts


@dataclass(frozen=True)
class Device:
    """Rates of a device: of one processor in one cycle, where nothing else is said.

    Attributes:
        name: the device.
        processors: streaming multiprocessors.
        gigahertz: boost clock.
        dram: GB/s of the device's memory, for all processors together.
        tensor: 16-bit products that are added up in float32.
        float32: float32 additions, products or both in one.
        integer: integer, logic, comparison and conversion results.
        special: exponentials, reciprocals and the like (MUFU).
        issue: instructions of warps.
        shared: passes over the banks of shared memory, 128 bytes each.
    """

    name: str
    processors: int
    gigahertz: float
    dram: float
    tensor: int
    float32: int
    integer: int = 64
    special: int = 16
    issue: int = 4
    shared: int = 1


DEVICES = {
    "sm_80": Device("A100 SXM4 40 GB", 108, 1.41, 1555, tensor=1024, float32=64),
    "sm_90": Device("H100 SXM5", 132, 1.83, 3350, tensor=2048, float32=128),
}

# Unit, operations of a lane, issue slots; the first that matches. Moves and parameters cost nothing: the compiler
# renames the former and reads the latter from the constant cache as operands.
_COSTS: tuple[tuple[re.Pattern, tuple[tuple[str, float], ...], float], ...] = tuple(
    (re.compile(pattern), costs, slots)
    for pattern, costs, slots in (
        (r"mov\..*|ld\.param\..*|cvt\.[us]64\.[us]32|cvt\.u32\.u64|cvta\..*", (), 0),
        (r"(ex2|lg2|rcp|rsqrt|sqrt|tanh)\.approx.*", (("special", 1),), 1),
        # A reciprocal, and products that scale and correct it.
        (r"div\.(full|approx|rn).*f32", (("special", 1), ("float32", 4)), 5),
        (r"(div|rem)\.[us]\d+", (("special", 1), ("integer", 16)), 17),
        (r"cvt\.rn\.f32\.[us]\d+|cvt\.r.i.*", (("special", 1),), 1),
        (r"(add|sub|mul|fma|neg|abs)\.(rn\.)?(ftz\.)?(f32|b?f16(x2)?)|fma\.rn.*", (("float32", 1),), 1),
        (r"(mul|mad)\.lo\.[us]64", (("integer", 4),), 4),
        (r"(add|sub|shl|shr|and|or|xor|not|neg|max|min|setp\.\w+|selp)\.[busf]64", (("integer", 2),), 2),
        (r"(shfl|vote)\..*", (("shared", 1),), 1),
        (r"(ld|st|cp\.async\.c[ag]|ldmatrix|stmatrix)\..*", (), 1),
        (r"mma\.sync\.aligned\.m16n8k16\..*", (("tensor", 16 * 8 * 16 / 32),), 1),
        (r"(bar|bra|ret|exit|fence|cp\.async|wgmma\.(fence|commit_group|wait_group))\b.*", (), 1),
        (
            r"[a-z]\w*(\.\w+)*\.(pred|[busf](8|16|32)|bf16(x2)?\.f32|f32\.bf16|f16x2\.f32|f32\.f16)",
            (("integer", 1),),
            1,
        ),
    )
)
_WGMMA = re.compile(r"wgmma\.mma_async\..*m64n(\d+)k16\..*")


def _cost(opcode: str) -> tuple[dict[str, float], float]:
    """What a warp's instruction costs each unit, in operations of all its lanes, and its issue slots."""
    if m := _WGMMA.fullmatch(opcode):
        return {"tensor": 16 * int(m[1]) * 16}, 1
    for pattern, costs, slots in _COSTS:
        if pattern.fullmatch(opcode):
            return {unit: 32 * operations for unit, operations in costs}, slots
    raise ValueError(f"opcode: got {opcode}, whose cost is not in the table")


UNITS = ("tensor", "special", "float32", "integer", "issue", "shared", "dram")


def cycles(counts: Counts, device: Device, scale: float = 1.0) -> dict[str, float]:
    """Cycles that each unit of every processor needs, by unit.

    Args:
        counts: of a launch.
        device: the device.
        scale: how many such launches there are.
    """
    operations = dict.fromkeys(UNITS, 0.0)
    for opcode, executed in counts.instructions.items():
        costs, slots = _cost(opcode)
        operations["issue"] += executed * slots
        for unit, cost in costs.items():
            operations[unit] += executed * cost
    # A shuffle takes the path of a pass over shared memory.
    operations["shared"] = (
        operations["shared"] / 32 + counts.shared_loads.units + counts.shared_stores.units + counts.operand_bytes / 128
    )
    result = {
        unit: operations[unit] * scale / getattr(device, unit) / device.processors for unit in UNITS if unit != "dram"
    }
    return result | {"dram": counts.distinct * scale / (device.dram / device.gigahertz)}


def bound(cycles_of: dict[str, float], device: Device) -> tuple[str, float]:
    """The unit that limits, and the microseconds that it needs."""
    unit = max(cycles_of, key=lambda name: cycles_of[name])
    return unit, cycles_of[unit] / device.gigahertz / 1e3
