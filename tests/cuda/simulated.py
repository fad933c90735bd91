"""The launchers and kernels of ``csrc/cuda``, on machines without a GPU.

nvcc compiles them for sm_80 and links them against a CUDA runtime of our own (``runtime.cpp``). So the host code that
users run decides what is launched and with which arguments, and `tests.ptxsim` executes the machine code, on CPU
tensors:

    with simulated() as launches:
        y, h, rstd = rms_norm.forward(x, None, weight, 1e-5)
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import nvcc
from lemur_fast import _compiled
from lemur_fast.dispatch import implementation
from lemur_fast.ops._loss import LossOptions, TokenLoss, compiled_token_loss
from tests.ptxsim import Counts, Kernel

HOST = [nvcc.ROOT / "csrc" / "cuda" / "bindings.cpp", Path(__file__).with_name("runtime.cpp")]
OPTIONS = [*nvcc.OPTIONS, "-lineinfo", "-gencode=arch=compute_80,code=compute_80"]
"""PTX alone, with the lines of the source in it."""


@functools.cache
def build() -> Path:
    """Compiles what is not yet there, and returns the folder: ``_simulated.so``, and a ``.ptx`` for every ``.cu``."""
    import pybind11

    key = nvcc.digest(sys.version, *OPTIONS, *(path.read_text() for path in HOST))
    folder = nvcc.ROOT / "build" / f"simulated-{key}"
    module = folder / "_simulated.so"
    if module.exists():
        return folder
    for old in folder.parent.glob("simulated-*"):
        shutil.rmtree(old)
    folder.mkdir(parents=True)
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]

    def compile_(source: Path) -> Path:
        to = folder / f"{source.stem}.o"
        kept = ["--keep", f"--keep-dir={folder}"] if source.suffix == ".cu" else []
        options = [*OPTIONS, *includes, "-Xcompiler=-fPIC,-fvisibility=hidden", *kept]
        _run(["nvcc", *options, "-c", str(source), "-o", str(to)])
        return to

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_, [*HOST, *nvcc.SOURCES]))
    _run(["nvcc", "-shared", "-cudart=none", *map(str, objects), "-o", str(module) + ".new"])
    os.replace(str(module) + ".new", module)
    return folder


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"


# ---- the ops, as the modules of lemur_fast.kernels have them -------------------------------------------------------


def _role(op: str, role: str) -> Callable:
    return implementation(op, "cuda", role)


def _loss(
    logits: Tensor,
    labels: Tensor,
    want_stats: bool,
    dloss: Tensor | None = None,
    dlogits: Tensor | None = None,
    **options: Any,
) -> TokenLoss:
    return compiled_token_loss(logits, labels, LossOptions(**options), want_stats, dloss, dlogits)


def _loss_gradient(dloss: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, **options: Any) -> Tensor:
    return _role("cross_entropy", "backward")(dloss, logits, labels, lse, LossOptions(**options))


def _rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, dtype: torch.dtype, transposed: bool
) -> tuple[Tensor, Tensor]:
    if transposed:
        return _role("rotary", "backward")(q, k, cos, sin, interleaved, dtype)
    return _role("rotary", "forward")(q, k, cos, sin, interleaved)


rms_norm = SimpleNamespace(forward=_role("rms_norm", "forward"), backward=_role("rms_norm", "backward"))
swiglu = SimpleNamespace(forward=_role("swiglu", "forward"), backward=_role("swiglu", "backward"))
cross_entropy = SimpleNamespace(forward=_loss, backward=_loss_gradient)
rotary = SimpleNamespace(rotate=_rotate)


@contextlib.contextmanager
def processors(count: int) -> Iterator[None]:
    """Inside of `simulated`: the GPU has so many processors."""
    before, _compiled.processors = _compiled.processors, lambda index: count
    try:
        yield
    finally:
        _compiled.processors = before


# ---- launches --------------------------------------------------------------------------------------------------------

_ON_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_size_t,
    ctypes.c_void_p,
    ctypes.c_int,
)


@functools.cache
def module() -> ModuleType:
    """The bindings of ``csrc/cuda``, with our runtime."""
    spec = importlib.util.spec_from_file_location("_simulated", build() / "_simulated.so")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@functools.cache
def modules() -> list[str]:
    """The PTX of every source file of ``csrc/cuda`` that has kernels."""
    return [path.read_text() for path in sorted(build().glob("*.ptx"))]


@functools.cache
def alone(entry: str) -> str:
    """The module that has an entry of this mangled name, without its other entries."""
    module = next(text for text in modules() if f".entry {entry}(" in text)
    starts = [m.start() for m in re.finditer(r"^(?:\.visible |\.weak )?\.entry ", module, re.MULTILINE)]
    start = next(at for at in starts if module[at:].split(".entry ", 1)[1].startswith(f"{entry}("))
    length = module[start:].index("\n}\n") + 3
    files = re.findall(r"^\s*\.file.*$", module, re.MULTILINE)
    return "\n".join([module[: starts[0]], module[start : start + length], *files])


@functools.cache
def _decoded(entry: str) -> Kernel:
    return Kernel(alone(entry), entry)


@functools.cache
def parameters(kernel: str) -> tuple[str, ...]:
    """Names of the parameters of a kernel, as its source has them."""
    for source in nvcc.SOURCES:
        if found := re.search(rf"\b{kernel}\(([^)]*)\)\s*{{", source.read_text()):
            return tuple(re.findall(r"(\w+)\s*(?:,|$)", found[1]))
    raise ValueError(f"kernel: got {kernel!r}; it is in none of {', '.join(path.name for path in nvcc.SOURCES)}")


@dataclass
class CudaLaunch:
    """What a launcher launched.

    Attributes:
        entry: the kernel's mangled name.
        grid: blocks.
        block: threads of a block.
        arguments: by the names of the kernel's parameters; a tensor where an op handed over its address.
        shared: bytes of dynamic shared memory.
        device: the current one at the launch.
        stream: that was asked for.
        counts: what was counted.
    """

    entry: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    arguments: dict[str, Any]
    shared: int
    device: int
    stream: int
    counts: Counts | None = None

    @property
    def name(self) -> str:
        """Name and template arguments of the kernel."""
        return nvcc.plain(self.entry)

    @property
    def ptx(self) -> str:
        """The kernel alone, as a module."""
        return alone(self.entry)

    def execute(self, ptx: str | None = None, most_steps: int = 20_000_000) -> Counts:
        """Runs it on the tensors that it was launched with; `ptx` in place of what was compiled."""
        kernel = _decoded(self.entry) if ptx is None else Kernel(ptx, self.entry)
        arrays = {k: _array(v) if isinstance(v, Tensor) else v for k, v in self.arguments.items()}
        return kernel.launch(self.grid, self.block, arrays, self.shared, most_steps)


def _array(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


_C_TYPES = {
    "u8": ctypes.c_uint8, "b8": ctypes.c_uint8, "s8": ctypes.c_int8, "u32": ctypes.c_int32, "b32": ctypes.c_int32,
    "s32": ctypes.c_int32, "u64": ctypes.c_int64, "b64": ctypes.c_int64, "s64": ctypes.c_int64, "f32": ctypes.c_float,
}  # fmt: skip


class _Kernels:
    """The functions of the bindings; a `Fault` goes on through them, as an error of CUDA would."""

    def __init__(self, raised: list[BaseException]) -> None:
        self.raised = raised

    def __getattr__(self, name: str) -> Callable:
        function = getattr(module(), name)

        def call(*given: Any, **arguments: Any) -> Any:
            try:
                return function(*given, **arguments)
            except RuntimeError:
                if self.raised:
                    raise self.raised.pop() from None
                raise

        return call


@contextlib.contextmanager
def simulated(
    processors: int = 4,
    device: int = 0,
    stream: int = 0,
    execute: bool = True,
    status: int = 0,
) -> Iterator[list[CudaLaunch]]:
    """Serves CPU tensors by the CUDA kernels, and lists the launches.

    Args:
        processors: of the GPU that is not there.
        device: that tensors lie on.
        stream: that is current.
        execute: whether launches are executed, or only listed.
        status: what CUDA says to a launch; 0 for success.
    """
    launches: list[CudaLaunch] = []
    raised: list[BaseException] = []
    known: dict[int, Tensor] = {}
    data_ptr = Tensor.data_ptr

    def note(tensor: Tensor) -> int:
        address = data_ptr(tensor)
        if address:  # not that of an empty tensor
            known[address] = tensor
        return address

    def on_launch(name: bytes, sizes: Any, values: Any, shared: int, on: int | None, current: int) -> int:
        try:
            entry = name.decode()
            declared = _decoded(entry).program.parameters
            arguments: dict[str, Any] = {}
            for i, (name_of, parameter) in enumerate(
                zip(parameters(nvcc.plain(entry).split("<")[0]), declared, strict=True)
            ):
                kind = _C_TYPES[parameter.type]
                value = ctypes.cast(values[i], ctypes.POINTER(kind))[0]
                pointer = ctypes.sizeof(kind) == 8 and value in known
                arguments[name_of] = known[value] if pointer else value
            launch = CudaLaunch(entry, tuple(sizes[:3]), tuple(sizes[3:6]), arguments, shared, current, on or 0)
            launches.append(launch)
            if execute and not status:
                launch.counts = launch.execute()
        except BaseException as error:  # it cannot cross C++; `_Kernels` raises it
            raised.append(error)
            return 1
        return status

    callback = _ON_LAUNCH(on_launch)
    of_device, of_place = _compiled.processors, _compiled.place
    module().set_on_launch(ctypes.cast(callback, ctypes.c_void_p).value)
    _compiled.processors = lambda index: processors
    _compiled.place = lambda tensor: (_Kernels(raised), {"device": device, "stream": stream})
    Tensor.data_ptr = note
    try:
        yield launches
    finally:
        Tensor.data_ptr, _compiled.place, _compiled.processors = data_ptr, of_place, of_device
        module().set_on_launch(0)
