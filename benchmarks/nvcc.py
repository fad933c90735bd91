"""Compiles the kernels of ``csrc/cuda`` for GPUs that are not there, and reads the machine code."""

from __future__ import annotations

import collections
import functools
import hashlib
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.ahead_of_time import TOOLS, Resources

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
OPTIONS = ["-std=c++17", "-O3", "--fmad=false", f"-I{ROOT / 'csrc'}"]
"""As ``cmake/cuda.cmake`` has them."""


def missing() -> str | None:
    """Why nothing can be compiled; None when it can."""
    return None if shutil.which("nvcc") else "nvcc is not on the PATH"


def digest(*what: str) -> str:
    """A name for what is compiled from the sources as they are."""
    found = hashlib.sha256(" ".join([*OPTIONS, *what]).encode())
    for path in [*SOURCES, *sorted((ROOT / "csrc").glob("*.h")), *sorted((ROOT / "csrc" / "cuda").glob("*.*h"))]:
        found.update(path.read_bytes())
    found.update(subprocess.run(["nvcc", "--version"], check=True, capture_output=True).stdout)
    return found.hexdigest()[:16]


@functools.cache
def plain(name: str) -> str:
    """``rms_norm_fwd_kernel<float, float, float, 4, true>`` for the mangled name of a kernel."""
    demangled = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"\(anonymous namespace\)::(\w+(?:<.*?>)?)\(", demangled)
    assert found, demangled
    return found[1]


@dataclass(frozen=True)
class Compiled:
    """A kernel for one architecture: what a thread and a block take, and its instructions."""

    registers: int
    stack: int
    shared: int
    instructions: tuple[str, ...]

    def resources(self, threads: int, dynamic_shared: int) -> Resources:
        """What a launch of so many threads takes."""
        counted = collections.Counter(name.split(".")[0] for name in self.instructions)
        loads = [name for name in self.instructions if name.startswith("LDG")]
        widths = [int(m[1]) if (m := re.search(r"\.(64|128|256)\b", name)) else 32 for name in loads]
        spills = 4 * (counted["STL"] + counted["LDL"])
        shared = self.shared + dynamic_shared
        return Resources(self.registers, self.stack, spills, shared, threads, dict(counted), max(widths, default=0))


_USAGE = re.compile(r"Function (\w+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)")
_SECTION = re.compile(r"^\s*\.text\.(\w+):\n(.*?)(?=^\s*\.text\.\w+:\n|\Z)", re.MULTILINE | re.DOTALL)
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", re.MULTILINE)


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([str(TOOLS / name), *arguments], capture_output=True, text=True, check=True).stdout


@functools.cache
def compiled(target: str) -> dict[str, Compiled]:
    """Every kernel for a target such as ``sm_90``, by its plain name; what is not yet there is compiled."""
    folder = ROOT / "build" / f"cubin-{target}-{digest(target)}"

    def cubin(source: Path) -> Path:
        to = folder / f"{source.stem}.cubin"
        if not to.exists():
            command = ["nvcc", *OPTIONS, f"-arch={target}", "-cubin", str(source), "-o", f"{to}.{os.getpid()}"]
            subprocess.run(command, check=True, capture_output=True)
            os.replace(f"{to}.{os.getpid()}", to)
        return to

    if not folder.exists():
        for old in folder.parent.glob(f"cubin-{target}-*"):
            shutil.rmtree(old)
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        files = list(pool.map(cubin, SOURCES))
    found: dict[str, Compiled] = {}
    for path in files:
        code = dict(_SECTION.findall(_tool("nvdisasm", "-c", str(path))))
        for name, registers, stack, shared in _USAGE.findall(_tool("cuobjdump", "-res-usage", str(path))):
            if "_GLOBAL__N_" in name:  # ours; the self test's does not matter
                instructions = tuple(_INSTRUCTION.findall(code[name]))
                found[plain(name)] = Compiled(int(registers), int(stack), int(shared), instructions)
    return found
