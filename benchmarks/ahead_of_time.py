"""Compiles Triton kernels for GPUs that are not there, as a launch on them would, and reads the machine code."""

from __future__ import annotations

import collections
import contextlib
import functools
import inspect
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

from lemur_fast.kernels import common

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 108),
    "sm_89": (GPUTarget("cuda", 89, 32), 128),
    "sm_90": (GPUTarget("cuda", 90, 32), 132),
    "sm_100": (GPUTarget("cuda", 100, 32), 148),
    "sm_120": (GPUTarget("cuda", 120, 32), 188),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 304),
}
"""Architectures that kernels are compiled for: Triton's target, and the processors of a large device of its kind
(A100, RTX 4090, H100, B200, RTX PRO 6000, MI300X)."""

SHARED_LIMIT = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
"""KiB of shared memory that a program may have. Sources: CUDA C++ Programming Guide, table of compute capabilities; AMD
CDNA 3 ISA."""

REGISTERS = dict.fromkeys(SHARED_LIMIT, 65536) | {"gfx942": 131072}
"""Registers of a processor. Source: the same tables."""

THREADS = {"sm_80": 2048, "sm_89": 1536, "sm_90": 2048, "sm_100": 2048, "sm_120": 1536, "gfx942": 2048}
"""The most threads that a processor holds. Source: the same tables."""

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class _NoDevice(DriverBase):
    """As much of a driver as compiling asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    @classmethod
    def is_active(cls) -> bool:
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        return "void*"

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)  # kernels are cached by it

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise RuntimeError("there is no device to time anything on")


@dataclass
class Launch:
    """A launch that was asked for: the kernel, its grid, its arguments by name, and what was compiled for it."""

    name: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    compiled: Any


@contextlib.contextmanager
def recording(
    architecture: str, execute: Callable[[Launch], None] | None = None, only: str | None = None
) -> Iterator[list[Launch]]:
    """Compiles what is launched in the block for `architecture`, and lists it instead of running it.

    Tensors stay on the CPU and their values are never written, unless `execute`, called with every launch, does so.

    Args:
        architecture: a key of `TARGETS`.
        execute: what is done in place of a launch.
        only: name of the one kernel that is compiled; launches of others are passed over.
    """
    target, count = TARGETS[architecture]
    launches: list[Launch] = []
    run = JITFunction.run

    def record(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> Any:
        if only is not None and self.fn.__name__ != only:
            return None
        compiled = run(self, *arguments, grid=grid, warmup=True, **keywords)
        names = inspect.signature(self.fn).parameters
        bound = dict(zip(names, arguments, strict=False)) | {k: v for k, v in keywords.items() if k in names}
        launch = Launch(self.fn.__name__, tuple(grid), bound, compiled)
        launches.append(launch)
        if execute is not None:
            execute(launch)
        return compiled

    driver = triton.runtime.driver
    before = driver._active
    driver.set_active(_NoDevice(target))
    JITFunction.run = record
    try:
        with common.pretending(architecture, count):
            yield launches
    finally:
        JITFunction.run = run
        driver._active = before  # which may be none at all: nothing asks for a device before it is used


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes, and the instructions it has.

    Attributes:
        registers: of a thread.
        stack: bytes of a thread; more than 0 means that registers did not suffice, or that an array is indexed.
        spills: bytes of a thread that went from registers to memory, where the compiler says so.
        shared: bytes of a program.
        threads: of a program.
        instructions: how often each machine instruction, without its modifiers, stands in the code.
        widest: bits of the widest load from global memory.
    """

    registers: int
    stack: int
    spills: int
    shared: int
    threads: int
    instructions: dict[str, int]
    widest: int

    def count(self, *prefixes: str) -> int:
        """Instructions whose names begin with one of the prefixes."""
        return sum(n for name, n in self.instructions.items() if name.startswith(prefixes))


def programs_at_once(target: str, r: Resources) -> int:
    """Programs that one processor holds, by its registers, threads and shared memory."""
    by_registers = REGISTERS[target] // (max(r.registers, 1) * r.threads)
    by_shared = SHARED_LIMIT[target] * 1024 // (r.shared + 1024)
    return min(by_registers, THREADS[target] // r.threads, by_shared, 32)


@functools.cache
def _disassembled(binary: bytes) -> tuple[str, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        tools = (["cuobjdump", "-res-usage"], ["nvdisasm", "-c"])
        texts = [
            subprocess.run([TOOLS / name, *options, file.name], capture_output=True, text=True, check=True).stdout
            for name, *options in tools
        ]
    return texts[0], texts[1]


def resources(compiled: Any) -> Resources:
    """Reads a compiled kernel's machine code."""
    threads = compiled.metadata.num_warps * compiled.metadata.target.warp_size
    if "cubin" in compiled.asm:
        usage, code = _disassembled(compiled.asm["cubin"])
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
        assert found, usage
        names = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", code, re.MULTILINE)
        counted = collections.Counter(name.split(".")[0] for name in names)
        loads = [name for name in names if name.startswith(("LDG", "LDGSTS"))]
        widths = [int(m[1]) if (m := re.search(r"\.(64|128|256)\b", name)) else 32 for name in loads]
        spills = 4 * (counted["STL"] + counted["LDL"])
        return Resources(
            int(found[1]),
            int(found[2]),
            spills,
            compiled.metadata.shared,
            threads,
            dict(counted),
            max(widths, default=0),
        )
    code = compiled.asm["amdgcn"]

    def value(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", code)
        assert found, name
        return int(found[1])

    names = re.findall(r"^\s+([a-z][a-z0-9_]+)", code, re.MULTILINE)
    wide = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32}
    widths = [wide.get(name.rsplit("_", 1)[-1], 16) for name in names if re.match(r"(global|buffer)_load", name)]
    return Resources(
        value("vgpr_count"), value("private_segment_fixed_size"), 4 * value("vgpr_spill_count"),
        compiled.metadata.shared, threads, dict(collections.Counter(names)), max(widths, default=0),
    )  # fmt: skip
